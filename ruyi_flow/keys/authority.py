"""A deployment's private CA, and the certificates that it signs: ECDSA P-256, files of PEM, keys with mode 0600."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.config.addresses import is_everywhere, split_host
from ruyi_flow.config.replicas import replicas_of
from ruyi_flow.config.security import Keys, Security, check_private, node_identity, user_identity
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError

__all__ = ["Authority", "hosts_of", "is_signed_by", "key_of", "keys_of_user", "read_certificate"]

_CLOCKS = timedelta(hours=1)
"""How far the clock of a machine may be behind the one that makes a certificate."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts by which a server is reached from its own machine."""


class Authority:
    """The private CA of a deployment.

    Args:
        security: the section `security` of the topology; the CA's key is ca.key beside its certificate.

    Raises:
        ConfigError: the CA's files are missing or cannot be used.
    """

    def __init__(self, security: Security) -> None:
        self._security, key_file = security, key_of(security)
        self._certificate = read_certificate(security.ca)
        try:
            check_private(key_file, key_file.stat())
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        except OSError as error:
            raise ConfigError(
                f"{key_file}: {error.strerror}; certificates are made where the CA's key is, on the machine on which "
                "ruyi-flow keys init has run"
            ) from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key_file}: is no private key: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise ConfigError(f"{key_file}: is not the key of {security.ca}; put the two files of one CA there")
        self._key = key

    @classmethod
    def create(cls, security: Security, *, days: int) -> Authority:
        """Make a new CA, and write its files.

        Args:
            security: where the files belong.
            days: days for which its certificate is valid.

        Raises:
            ConfigError: there is a CA already.
        """
        for file in (security.ca, key_of(security)):
            if file.exists():
                raise ConfigError(
                    f"{file}: is there already; a new CA would end all certificates of the old one. Use ruyi-flow keys "
                    "node, user or renew, or move the old keys away"
                )
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"{security.deployment}.ruyi-flow CA")
        builder = _builder(name, name, key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(is_ca=True), critical=True)
        _write_key(key_of(security), key)
        _write(security.ca, builder.sign(key, hashes.SHA256()))
        return cls(security)

    def issue_node(self, topology: Topology, name: str, *, days: int) -> Keys:
        """Make the certificate of a node, with the hosts of its addresses as further names, and write its files.

        Args:
            topology: the topology, with the section `security`.
            name: the node's name.
            days: days for which it is valid.

        Returns:
            The files.
        """
        keys = topology.keys_of(name)
        assert keys is not None
        identity = node_identity(name, self._security.deployment)
        self._issue(keys, name, [identity, *hosts_of(topology, name)], days=days, is_server=True)
        return keys

    def issue_user(self, name: str, hosts: Sequence[str] = (), *, days: int) -> Keys:
        """Make the certificate of a user, a person or a program, and write its files.

        Args:
            name: the user's name.
            hosts: hosts at which the user runs an HTTP server with it.
            days: days for which it is valid.

        Returns:
            The files.
        """
        keys = keys_of_user(self._security, name)
        identity = user_identity(name, self._security.deployment)
        self._issue(keys, name, [identity, *hosts], days=days, is_server=bool(hosts))
        return keys

    def renew(self, keys: Keys, *, days: int) -> None:
        """Make a new certificate and a new key with the same names.

        Args:
            keys: the files to replace.
            days: days for which it is valid.

        Raises:
            ConfigError: the old certificate cannot be read, or is of another CA.
        """
        old = read_certificate(keys.certificate)
        if not is_signed_by(old, self._certificate):
            raise ConfigError(
                f"{keys.certificate}: is not of this CA, {self._security.ca}; make it with keys node or user"
            )
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        common = old.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        uses = old.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        hosts = [str(one.value) for one in names]
        self._issue(keys, str(common), hosts, days=days, is_server=ExtendedKeyUsageOID.SERVER_AUTH in uses)

    def _issue(self, keys: Keys, common: str, names: Iterable[str], *, days: int, is_server: bool) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH] + [ExtendedKeyUsageOID.SERVER_AUTH] * is_server
        builder = _builder(_name(common), self._certificate.subject, key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(is_ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general(name) for name in dict.fromkeys(names)]), critical=False
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        # Whoever reads between the two replacements finds a key that does not fit, and keeps what it has.
        _write_key(keys.key, key)
        _write(keys.certificate, certificate)


def key_of(security: Security) -> Path:
    """Return the file of the CA's private key."""
    return security.ca.with_suffix(".key")


def keys_of_user(security: Security, name: str) -> Keys:
    """Return the files of a user's certificate where `ruyi-flow keys` keeps them.

    Raises:
        ConfigError: the name cannot be one of a file.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise ConfigError(f"{name!r} cannot be the name of a user; use letters, digits, dots and hyphens")
    folder = security.folder / "users"
    return Keys(security.deployment, security.ca, folder / f"{name}.pem", folder / f"{name}.key")


def hosts_of(topology: Topology, name: str) -> list[str]:
    """Return the hosts at which a node is reached, as its topology tells them, and those of its own machine."""
    addresses = [one for replica in replicas_of(topology.node(name)) for one in (replica.address, replica.listen)]
    addresses += [one for link in topology.links if link.target == name for one in link.addresses]
    return list(dict.fromkeys([*(split_host(one) for one in addresses if not is_everywhere(one)), *_LOOPBACK]))


def read_certificate(file: Path) -> x509.Certificate:
    """Read a certificate.

    Raises:
        ConfigError: the file is missing, unreadable, or no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: is no certificate (PEM): {error}") from None


def is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Return whether a CA has signed a certificate."""
    with suppress(ValueError, TypeError, InvalidSignature):
        certificate.verify_directly_issued_by(ca)
        return True
    return False


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _general(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ip_address(name))
    return x509.DNSName(name)


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _write(file: Path, certificate: x509.Certificate) -> None:
    with atomic_file(file) as new:
        new.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_key(file: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key that nobody else can read at any moment."""
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with atomic_file(file) as new, open(new, "wb", opener=_private) as out:
        out.write(text)
