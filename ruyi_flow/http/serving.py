"""uvicorn on a socket, from start to drained stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from h11 import RemoteProtocolError
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.http.app import application
from ruyi_flow.http.asking import Site
from ruyi_flow.http.entry import EntryNodes
from ruyi_flow.http.errors import HttpError, encode
from ruyi_flow.http.models import Models
from ruyi_flow.http.usage import Usage
from ruyi_flow.telemetry.spans import NO_TRACER, Tracer
from ruyi_flow.transport.addresses import resolve
from ruyi_flow.transport.security import server_context

__all__ = ["Listening", "serve"]

_IDLE_S = 75.0
"""Seconds after which a connection without a request is closed; longer than those of usual proxies (60 s)."""

_LINGER_S = 1.0
"""Seconds for which the rest of a refused request is read and thrown away."""


class Listening:
    """A running server.

    Args:
        site: its parts.
        host: the host that it listens on, as it was given.
        port: the port that it listens on.
        is_encrypted: whether it speaks HTTPS.
    """

    def __init__(self, site: Site, host: str, port: int, *, is_encrypted: bool = False) -> None:
        self.site = site
        name = f"[{host}]" if ":" in host else host
        self.url = f"http{'s' * is_encrypted}://{name}:{port}"
        """The URL that the API's paths follow."""
        self.port = port

    async def reach_nodes(self, *, timeout_s: float = 5.0) -> None:
        """Wait until this server reaches every node; nodes that have just started may be dialled again only later."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while any(state != "serving" for state in (await self.site.entry.states()).values()):
            if asyncio.get_running_loop().time() > deadline:
                return  # /ready tells which node it is
            await asyncio.sleep(0.1)


@asynccontextmanager
async def serve(
    topology: Topology,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    policies: Mapping[str, Path] | None = None,
    default_max_tokens: int = 1024,
    timeout_s: float = 600.0,
    grace_s: float = 10.0,
    insecure: bool = False,
    tracer: Tracer = NO_TRACER,
) -> AsyncIterator[Listening]:
    """Serve OpenAI's API for a topology while the block lasts. Leaving the block drains the server.

    A topology with the section security is served over HTTPS, with the certificate that it names. While it drains, new
    requests are answered with status 503, and running ones have their grace time. Then they fail.

    Args:
        topology: the topology.
        host: name or address to listen on.
        port: port to listen on; 0 picks a free one.
        policies: policy files by name; each adds a model.
        default_max_tokens: largest number of new tokens of a request that sets none.
        timeout_s: seconds that an answer may take.
        grace_s: seconds that running requests have when the server stops.
        insecure: whether it may listen on an address that is not loopback.
        tracer: records what asks for answers.

    Raises:
        ConfigError: the server cannot listen there, or a policy does not fit.
        RuyiFlowError: the one node of a topology without addresses cannot be loaded.
    """
    models = await asyncio.to_thread(Models, topology, policies)
    keys = topology.user_keys
    context = None if keys is None else await asyncio.to_thread(server_context, keys, asks_caller=False)
    sockets = listen(await _addresses(host, port, insecure))
    try:
        entry = EntryNodes(topology, timeout_s=timeout_s)
        await entry.start()
    except BaseException:
        for one in sockets:
            one.close()
        raise
    site = Site(entry, models, usage=Usage(tracer), default_max_tokens=default_max_tokens)
    app = application(site)
    server = _Server(_config(app, context))
    serving = asyncio.create_task(server.serve(sockets))
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.005)
        entry.learn()
        yield Listening(site, host, sockets[0].getsockname()[1], is_encrypted=keys is not None)
    finally:
        app.drain()
        deadline = asyncio.get_running_loop().time() + grace_s
        while app.running and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await entry.close()  # what still runs fails now, and tells its client
        server.should_exit = True
        await serving


async def _addresses(host: str, port: int, insecure: bool) -> Sequence[Any]:
    """Return the socket addresses to listen on.

    Raises:
        ConfigError: there is none, or one is not loopback.
    """
    try:
        found = await resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: the name cannot be resolved ({error}); use 127.0.0.1 or localhost") from None
    outside = [address[0] for *_, address in found if not ipaddress.ip_address(address[0].split("%")[0]).is_loopback]
    if outside and not insecure:
        which = host if host == outside[0] else f"{host} ({outside[0]})"
        raise ConfigError(
            f"--host {which}: can be reached from other machines, and the server cannot yet tell its callers apart; "
            "use 127.0.0.1, or --insecure in a network that you trust"
        )
    return found


def listen(found: Sequence[Any]) -> list[socket.socket]:
    """Open the sockets of a host's addresses; port 0 picks one port for all of them.

    Raises:
        ConfigError: none can be opened.
    """
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, _, _, address in found:
        port = address[1] or (sockets[0].getsockname()[1] if sockets else 0)
        one = socket.socket(family, kind)
        try:
            # As servers do, after an earlier one. On Windows, SO_REUSEADDR would take over a port in use.
            one.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
            one.listen(2048)
        except OSError as error:
            one.close()
            problem = error
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                break
        else:
            sockets.append(one)
    if problem is None or (sockets and problem.errno not in (errno.EADDRINUSE, errno.EACCES)):
        return sockets  # a name with several addresses, one of which this machine does not have
    for one in sockets:
        one.close()
    where = f"{address[0]}:{port}"
    if problem.errno == errno.EADDRINUSE:
        raise ConfigError(
            f"{where} is in use already; end that process, or choose another port with --port (0: a free one)"
        )
    if problem.errno == errno.EACCES:
        raise ConfigError(f"this user may not listen on {where}; choose a port from 1024 on with --port")
    raise ConfigError(f"the server cannot listen on {where}: {problem.strerror}; correct --host")


def _config(app: ASGIApp, context: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ssl_context_factory=None if context is None else lambda *_: context,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(_IDLE_S),
        timeout_graceful_shutdown=1,  # the requests have had their grace time by then
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: whoever runs the event loop has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """HTTP/1.1 that refuses what is no request in the shape of OpenAI's errors."""

    _is_refused = False

    def data_received(self, data: bytes) -> None:
        """Read on; what follows a refused request is thrown away."""
        if not self._is_refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Tell that what arrived is no request, or has too many headers, and close the connection a while later.

        Closing it at once, with bytes that nobody has read, would reset it before the client sees the reply.
        """
        error = sys.exception()
        if isinstance(error, RemoteProtocolError) and error.error_status_hint == 431:
            reason, told = b"Request Header Fields Too Large", HttpError(431, "the headers of the request are too long")
        else:
            reason, told = b"Bad Request", HttpError(400, "this is no HTTP request that the server understands")
        body = encode(told.body)
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (told.status, reason, len(body)) + body)
        if self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()
        self._is_refused = True
        self.loop.call_later(_LINGER_S, self.transport.close)

    def shutdown(self) -> None:
        """End the connection with the server."""
        if self._is_refused:
            self.transport.close()
        else:
            super().shutdown()
