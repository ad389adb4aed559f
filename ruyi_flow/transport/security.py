"""TLS: the one place that makes credentials of gRPC and contexts of `ssl`, and that reads who calls.

Servers look at their files whenever somebody connects, callers whenever they make a connection: files that have changed
count from the next connection on, and connections that are open stay.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc

from ruyi_flow.config.replicas import node_of
from ruyi_flow.config.security import Keys, check_private, node_identity
from ruyi_flow.errors import ConfigError

__all__ = ["TLS_VERSION", "Files", "listen", "names_of_caller", "open_channel", "server_context"]

TLS_VERSION = "TLSv1.3"
"""The version that every connection must have, as gRPC names it."""

_Stamp = tuple[tuple[int, int, int], ...]
"""Time of the last change in ns, size in bytes and inode of each file."""

logger = logging.getLogger(__name__)


class Files:
    """What the files of one party contain; they are read again when they have changed.

    Args:
        keys: the files.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._stamp: _Stamp | None = None
        self._told = ""
        self._found: tuple[bytes, bytes, bytes] | None = None

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return the CA's certificate, the own certificate and its private key, each as PEM.

        Raises:
            ConfigError: a file is missing or unreadable, or others may read the key.
        """
        stamp = _stamp(self._paths)
        if self._found is None or stamp != self._stamp:
            check_private(self._keys.key, _stat(self._keys.key))
            _context(self._keys, asks_caller=True)  # refuses what is no certificate, and a key of another one
            ca, certificate, key = (_read(path) for path in self._paths)
            self._stamp, self._found = stamp, (ca, certificate, key)
        return self._found

    def changed(self) -> bool:
        """Return whether the files have changed since they were last read. Files that cannot be used now have not.

        What is wrong with them is logged once.
        """
        try:
            stamp = _stamp(self._paths)
            if stamp == self._stamp:
                return False
            self.read()
        except ConfigError as error:
            if str(error) != self._told:
                self._told = str(error)
                logger.error("the keys of before stay in use: %s", error)
            return False
        return True

    @property
    def _paths(self) -> tuple[Path, Path, Path]:
        return self._keys.ca, self._keys.certificate, self._keys.key


def open_channel(address: str, options: Sequence[tuple[str, Any]], *, node: str, keys: Keys | None) -> grpc.aio.Channel:
    """Return a channel to a node.

    Args:
        address: host:port.
        options: options of gRPC.
        node: name of the node or replica, which its certificate must have.
        keys: the caller's files. Default: the connection is not encrypted.

    Raises:
        ConfigError: a file of the keys cannot be used.
    """
    if keys is None:
        return grpc.aio.insecure_channel(address, options)
    ca, certificate, key = Files(keys).read()
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    target = ("grpc.ssl_target_name_override", node_identity(node_of(node), keys.deployment))
    return grpc.aio.secure_channel(address, credentials, [*options, target])


def listen(server: grpc.aio.Server, address: str, keys: Keys | None) -> int:
    """Let a gRPC server listen on an address, and return the port. With keys, callers need certificates of the same CA.

    Args:
        server: the server.
        address: host:port.
        keys: the server's files. Default: its connections are not encrypted.

    Raises:
        ConfigError: a file of the keys cannot be used.
        RuntimeError: the address cannot be listened on.
    """
    if keys is None:
        return int(server.add_insecure_port(address))
    files = Files(keys)

    def configuration() -> Any:
        ca, certificate, key = files.read()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    def fetch() -> Any:
        """Return the new configuration, or None if nothing has changed; gRPC asks at every new connection."""
        return configuration() if files.changed() else None

    credentials = grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)
    return int(server.add_secure_port(address, credentials))


def names_of_caller(context: Any) -> frozenset[str]:
    """Return the names in the certificate of the caller of a gRPC method; none if it has shown none over TLS 1.3."""
    about = context.auth_context()
    if about.get("ssl_tls_version") != [TLS_VERSION.encode()]:
        return frozenset()
    return frozenset(name.decode(errors="replace") for name in about.get("x509_subject_alternative_name", ()))


def server_context(keys: Keys, *, asks_caller: bool) -> ssl.SSLContext:
    """Return the TLS context of an HTTP server.

    Args:
        keys: the server's files; their changes count from the next connection on.
        asks_caller: whether callers need certificates of the same CA.

    Raises:
        ConfigError: a file of the keys cannot be used.
    """
    files = Files(keys)
    files.read()
    context = newest = _context(keys, asks_caller=asks_caller)

    def renew(connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: ssl.SSLContext) -> None:
        nonlocal newest
        if files.changed():
            newest = _context(keys, asks_caller=asks_caller)
        connection.context = newest

    context.sni_callback = renew  # called at every handshake
    return context


def _context(keys: Keys, *, asks_caller: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(keys.certificate, keys.key)
        if asks_caller:
            context.load_verify_locations(keys.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{keys.certificate}: cannot be used for TLS: {error}; see ruyi-flow keys check") from None
    return context


def _stamp(paths: Iterable[Path]) -> _Stamp:
    return tuple((info.st_mtime_ns, info.st_size, info.st_ino) for info in map(_stat, paths))


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigError(_unreadable(path, error)) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: {error.strerror}; make the keys with ruyi-flow keys init, or correct the topology's key security"
