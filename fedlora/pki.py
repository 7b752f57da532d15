"""Keys and certificates of one federation: a CA, the server's TLS certificate, the operator's and the nodes' keys.

    DIR/                     0700
      ca.key                 0600  P-384                   signs server certificates; may be kept elsewhere
      ca.pem                 0644  X.509, 10 years         what nodes trust in TLS
      server.key             0600  P-256                   TLS key of Flower's SuperLink
      server.pem             0644  X.509, 1 year           its names and addresses
      operator.key           0600  Ed25519                 signs what nodes may be told to do
      operator.pub           0644  Ed25519                 pinned by every node
      nodes.json             0644  who is enrolled         see `registry`
      nodes/NAME/            0700  to be moved to the node
        auth.key             0600  P-384, OpenSSH          flower-supernode --auth-supernode-private-key
        auth.pub             0644  P-384, OpenSSH          flwr supernode register
        signing.key          0600  Ed25519                 signs the node's answers
        signing.pub          0644  Ed25519                 its hash is the node's stable id
        ca.pem operator.pub  0644  copies

Private keys are unencrypted PKCS#8 PEM (RFC 5958, 7468; Ed25519 in it: RFC 8410), some 120 to 310 bytes, except
`auth.key`, for which Flower 1.41 takes only OpenSSH's own format; public keys are SubjectPublicKeyInfo PEM, and
`auth.pub` is one OpenSSH line (RFC 5656). Certificates are X.509 version 3 (RFC 5280), signed with ECDSA and SHA-384.
The CA has basicConstraints with path length 0 and the one key usage keyCertSign, both critical. The server's
certificate is for serverAuth only, and the names that it is good for are those in its subjectAltName (RFC 9525).
There are no revocation lists: a lost CA or server key means a new DIR, a lost node key means `revoke`.

Files are made whole or not at all, and are never overwritten, but for nodes.json and a renewed server.pem, which are
replaced at once. Private files have their mode from birth. Needs a POSIX system: modes and flock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Literal, overload

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import FedLoRAError

__all__ = [
    "CA_DAYS",
    "SERVER_DAYS",
    "Item",
    "Node",
    "PkiError",
    "init",
    "inventory",
    "load_certificate",
    "load_private_key",
    "load_public_key",
    "node",
    "node_id",
    "registry",
    "renew",
    "require_valid",
    "revoke",
    "server_names",
]

Kind = Literal["ed25519", "ec"]  # of a key; "ec" is any elliptic curve for ECDSA

SERVER_DAYS = 365
CA_DAYS = 3650
WARNING = timedelta(days=30)  # before a certificate ends

_LONGEST_DAYS = 36500
_BACKDATED = timedelta(hours=1)  # so that a node whose clock is late accepts a new certificate
_LARGEST = 1 << 16  # bytes of a key or certificate file
_LARGEST_REGISTRY = 1 << 24  # some 30,000 nodes
_FORMAT = "fedlora-nodes-v1"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_NODE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?!(?:.*\.)?[0-9]+\Z){_LABEL}(?:\.{_LABEL})*")  # RFC 1123, 2.1


class PkiError(FedLoRAError):
    """A key, certificate or registry of nodes that is missing, malformed, expired, revoked or open to others."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One enrolled node. `auth_key` is on P-384; times are in UTC, to the second; `revoked` is None while trusted."""

    name: str
    id: str
    signing_key: Ed25519PublicKey
    auth_key: EllipticCurvePublicKey
    created: datetime
    revoked: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of `inventory`. `fingerprint` is 64 hex digits, or nothing for a private file."""

    what: str
    name: str
    state: str
    level: Literal["ok", "warning", "problem"]
    fingerprint: str


def node_id(public_key: Ed25519PublicKey) -> str:
    """The stable id of the holder of a signing key: SHA-256 of its 32 raw bytes (RFC 8032, 5.1.5), 64 hex digits."""
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()


# Making, renewing, enrolling, revoking


def init(
    directory: Path,
    *,
    names: Sequence[str],
    addresses: Sequence[str],
    at: datetime,
    days: int = SERVER_DAYS,
    ca_days: int = CA_DAYS,
) -> None:
    """Make a federation's CA, server certificate, operator key and empty registry, in a new folder.

    `names` are DNS names and `addresses` IP addresses at which nodes reach the server; at least one is needed. The
    certificates hold from an hour before `at` until `days` and `ca_days` days after it.
    Raises: PkiError if `directory` exists, a name, an address or a number of days cannot be used, or the folder cannot
    be written; then nothing is left behind.
    """
    _check_days(days, ca_days)
    hosts = _hosts(names, addresses)
    ca_key, server_key = generate_private_key(SECP384R1()), generate_private_key(SECP256R1())
    operator_key = Ed25519PrivateKey.generate()
    ca = _issue_ca(ca_key, _utc(at), ca_days)
    server = _issue_server(server_key.public_key(), hosts, ca, ca_key, _utc(at), days)
    with _told(f"{directory}: cannot be made"), _new_folder(directory) as folder:
        _write(folder / "ca.key", _private_pem(ca_key), private=True)
        _write(folder / "ca.pem", ca.public_bytes(Encoding.PEM))
        _write(folder / "server.key", _private_pem(server_key), private=True)
        _write(folder / "server.pem", server.public_bytes(Encoding.PEM))
        _write(folder / "operator.key", _private_pem(operator_key), private=True)
        _write(folder / "operator.pub", _public_pem(operator_key.public_key()))
        _write(folder / "nodes.json", _registry_bytes(()))
        (folder / "nodes").mkdir(0o700)


def renew(
    directory: Path,
    *,
    at: datetime,
    days: int = SERVER_DAYS,
    names: Sequence[str] = (),
    addresses: Sequence[str] = (),
    ca_key: Path | None = None,
) -> x509.Certificate:
    """Replace server.pem by a certificate of the same key that holds for `days` days from `at`; gives it back.

    Its names and addresses are those of the old one, unless new ones are given. `ca_key` says where the CA's key is, if
    not in `directory`. A running SuperLink reads its certificate once, at its start.
    Raises: PkiError if a file is missing or does not fit the others, or the CA would end first.
    """
    _check_days(days, _LONGEST_DAYS)
    with _locked(directory):
        ca = load_certificate(directory / "ca.pem")
        signer = load_private_key(ca_key or directory / "ca.key", "ec")
        if signer.public_key() != ca.public_key():
            raise PkiError(f"{ca_key or directory / 'ca.key'}: not the key of {directory / 'ca.pem'}")
        key = load_private_key(directory / "server.key", "ec")
        if names or addresses:
            hosts = _hosts(names, addresses)
        else:
            hosts = _hosts(*server_names(load_certificate(directory / "server.pem")))
        certificate = _issue_server(key.public_key(), hosts, ca, signer, _utc(at), days)
        with _told(f"{directory / 'server.pem'}: cannot be replaced"):
            _replace(directory / "server.pem", certificate.public_bytes(Encoding.PEM))
    return certificate


def node(directory: Path, name: str, *, at: datetime) -> Node:
    """Enrol a node: its keys in the new folder nodes/NAME, then its entry in nodes.json, which is what counts.

    Of a run that was stopped between the two, the folder is left; the next call takes the keys that are there.
    Needs no CA key.
    Raises: PkiError if the name cannot be used or is taken (also by a revoked node: names are never used again), or a
    file is missing, does not fit the others or cannot be written.
    """
    if not _NODE_NAME.fullmatch(name):
        raise PkiError(f"node name {name!r}: 1 to 63 small letters, digits, '-' or '_', a letter or digit at both ends")
    with _locked(directory):
        nodes = _read_registry(directory)
        if any(n.name == name for n in nodes):
            raise PkiError(f"node {name}: is enrolled already, see `fedlora pki show {directory}`; take another name")
        load_certificate(directory / "ca.pem")
        load_public_key(directory / "operator.pub", "ed25519")
        shared = {file: _read(directory / file) for file in ("ca.pem", "operator.pub")}
        folder = directory / "nodes" / name
        with _told(f"{folder}: cannot be made"):
            if not os.path.lexists(folder):
                _make_keys(folder, shared)
        new = _enrolment(folder, shared, _utc(at))
        with _told(f"{directory / 'nodes.json'}: cannot be replaced"):
            _replace(directory / "nodes.json", _registry_bytes([*nodes, new]))
    return new


def revoke(directory: Path, name: str, *, at: datetime) -> Node:
    """Mark a node as revoked at a time; its entry is kept. Gives the entry back.

    Raises: PkiError if no such node is enrolled or it is revoked already.
    """
    with _locked(directory):
        nodes = _read_registry(directory)
        found = next((n for n in nodes if n.name == name), None)
        if found is None:
            known = ", ".join(n.name for n in nodes) or "none"
            raise PkiError(f"node {name!r}: not in {directory / 'nodes.json'}; enrolled: {known}")
        if found.revoked is not None:
            raise PkiError(f"node {name}: was revoked already, at {_time_text(found.revoked)}")
        revoked = replace(found, revoked=_utc(at))
        with _told(f"{directory / 'nodes.json'}: cannot be replaced"):
            _replace(directory / "nodes.json", _registry_bytes([revoked if n is found else n for n in nodes]))
    return revoked


# Reading


@overload
def load_private_key(path: Path, kind: Literal["ed25519"]) -> Ed25519PrivateKey: ...
@overload
def load_private_key(path: Path, kind: Literal["ec"]) -> EllipticCurvePrivateKey: ...
def load_private_key(path: Path, kind: Kind) -> Ed25519PrivateKey | EllipticCurvePrivateKey:
    """A private key from an unencrypted PKCS#8, SEC 1 or OpenSSH file.

    A symbolic link is followed; what counts is the file that was opened.
    Raises: PkiError if it is no regular file, its group or others may do anything with it, it is encrypted or
    malformed, or holds a key of another `kind`. No error text holds any of its content.
    """
    data = _read(path, private=True)
    load = load_ssh_private_key if b"-----BEGIN OPENSSH" in data else load_pem_private_key
    try:
        key = load(data, None)
    except TypeError:
        raise PkiError(
            f"{path}: is encrypted, and a process that starts alone has no password: "
            "decrypt it into a new file of mode 0600"
        ) from None
    except Exception:  # cryptography has many words for bytes that are no key, and does not list them
        raise PkiError(f"{path}: no private key that can be read (PKCS#8, SEC 1 or OpenSSH)") from None
    if isinstance(key, Ed25519PrivateKey if kind == "ed25519" else EllipticCurvePrivateKey):
        return key
    raise PkiError(f"{path}: holds a key of type {type(key).__name__}, and one of kind {kind} is needed here")


@overload
def load_public_key(path: Path, kind: Literal["ed25519"]) -> Ed25519PublicKey: ...
@overload
def load_public_key(path: Path, kind: Literal["ec"]) -> EllipticCurvePublicKey: ...
def load_public_key(path: Path, kind: Kind) -> Ed25519PublicKey | EllipticCurvePublicKey:
    """A public key from a SubjectPublicKeyInfo PEM file or an OpenSSH line.

    Raises: PkiError if it is no regular file, malformed, or holds a key of another `kind`.
    """
    data = _read(path)
    load = load_pem_public_key if data.lstrip().startswith(b"-----BEGIN") else load_ssh_public_key
    try:
        key = load(data)
    except Exception:  # as above
        raise PkiError(f"{path}: no public key that can be read (PEM or an OpenSSH line)") from None
    if isinstance(key, Ed25519PublicKey if kind == "ed25519" else EllipticCurvePublicKey):
        return key
    raise PkiError(f"{path}: holds a key of type {type(key).__name__}, and one of kind {kind} is needed here")


def load_certificate(path: Path) -> x509.Certificate:
    """The certificate of a PEM file. Raises: PkiError if it is no regular file, or not one well-formed certificate."""
    data = _read(path)
    try:
        found = x509.load_pem_x509_certificates(data)
        for one in found:  # each part is parsed when it is asked for
            _ = one.extensions, one.public_key(), one.signature_hash_algorithm, one.subject.rfc4514_string()
            _ = one.issuer, one.not_valid_before_utc, one.not_valid_after_utc
    except Exception:  # cryptography raises some ten types on bytes that are no certificate
        found = []
    if len(found) == 1:
        return found[0]
    raise PkiError(f"{path}: holds {len(found)} certificates that can be read, and one PEM certificate is needed")


def server_names(certificate: x509.Certificate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The DNS names and the IP addresses that a certificate is good for, in its order."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return (), ()
    names = found.get_values_for_type(x509.DNSName)
    return tuple(names), tuple(str(address) for address in found.get_values_for_type(x509.IPAddress))


def require_valid(certificate: x509.Certificate, *, ca: x509.Certificate, at: datetime, names: Sequence[str]) -> None:
    """Check a server certificate: issued by this CA, both in force at `at`, for serverAuth, good for all `names`.

    `names` are DNS names or IP addresses. Wildcards count for nothing: `init` and `renew` make none.
    Raises: PkiError naming the rule.
    """
    at = _utc(at)
    for what, one in (("CA certificate", ca), ("server certificate", certificate)):
        state, level = _validity(one, at)
        if level == "problem":
            raise PkiError(f"{what} {_common_name(one)!r}: {state}")
    if not _is_authority(ca):
        raise PkiError(f"CA certificate {_common_name(ca)!r}: basicConstraints and keyUsage do not let it issue others")
    _require_issued(certificate, ca)
    if _is_authority(certificate) or not _for_servers(certificate):
        raise PkiError(f"server certificate {_common_name(certificate)!r}: is not one for serverAuth only")
    own_names, own_addresses = server_names(certificate)
    good = {name.lower() for name in own_names} | {ip_address(address) for address in own_addresses}
    for name in names:
        if (_address(name) or name.lower()) not in good:
            raise PkiError(
                f"server certificate: is good for {', '.join((*own_names, *own_addresses)) or 'nothing'}, not for "
                f"{name}: reach the server by one of these, or `fedlora pki renew` with --name and --address"
            )


def registry(directory: Path, *, revoked: bool = False) -> tuple[Node, ...]:
    """The nodes that are enrolled, by name; those that were revoked only if asked for.

    nodes.json is canonical JSON in UTF-8: keys sorted, no space, no newline, nodes sorted by name; `format`
    "fedlora-nodes-v1"; of each node `name`, `id`, `signing_key` (32 raw bytes as hex), `auth_key` (an OpenSSH line
    without a comment), `created` and `revoked` (UTC, 2026-01-31T12:00:00Z, or null). Some 500 bytes a node.
    Raises: PkiError if it is missing, or differs by one byte from what this program writes for what it says.
    """
    return tuple(n for n in _read_registry(directory) if revoked or n.revoked is None)


def inventory(directory: Path, *, at: datetime) -> tuple[Item, ...]:
    """What is in DIR and how it is: certificates with their end, private files with their mode, nodes.

    A certificate that ends within 30 days is a warning; one that is not in force, a private file that others may
    reach or that does not fit its public one, and a missing server or operator key are problems. The CA's key may be
    elsewhere. Fingerprints: of a certificate, SHA-256 of its DER bytes; of the operator and of nodes, `node_id`.
    Raises: PkiError if a public file is missing or malformed.
    """
    at = _utc(at)
    ca, server = load_certificate(directory / "ca.pem"), load_certificate(directory / "server.pem")
    operator = load_public_key(directory / "operator.pub", "ed25519")
    names = ", ".join(name for kind in server_names(server) for name in kind)
    items = [
        _certificate_item("CA certificate", _common_name(ca), ca, at),
        _certificate_item("server certificate", names, server, at),
        Item(what="operator key", name="operator.pub", state="", level="ok", fingerprint=node_id(operator)),
        _private_item(directory / "ca.key", "ec", ca.public_key(), needed=False),
        _private_item(directory / "server.key", "ec", server.public_key(), needed=True),
        _private_item(directory / "operator.key", "ed25519", operator, needed=True),
    ]
    try:
        _require_issued(server, ca)
    except PkiError as error:
        items[1] = replace(items[1], state=str(error), level="problem")
    for one in _read_registry(directory):
        if one.revoked is not None:
            state = f"revoked {_time_text(one.revoked)}"
        else:
            state = f"enrolled {_time_text(one.created)}"
        if os.path.lexists(directory / "nodes" / one.name):
            state += f", its private keys still in {directory / 'nodes' / one.name}"
        items.append(Item(what="node", name=one.name, state=state, level="ok", fingerprint=one.id))
    return tuple(items)


# Certificates


def _issue_ca(key: EllipticCurvePrivateKey, at: datetime, days: int) -> x509.Certificate:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    subject = _name(f"fedlora CA {identifier.digest.hex()[:8]}")
    builder = _builder(subject, subject, key.public_key(), at, at + timedelta(days=days))
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign"), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA384())
    )


def _issue_server(
    key: EllipticCurvePublicKey,
    hosts: Sequence[x509.GeneralName],
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    at: datetime,
    days: int,
) -> x509.Certificate:
    until = at + timedelta(days=days)
    if until > ca.not_valid_after_utc:
        raise PkiError(
            f"server certificate: {days} days from now it would outlive the CA, which ends at "
            f"{_time_text(ca.not_valid_after_utc)}: ask for fewer days, or make a new DIR with `fedlora pki init`"
        )
    return (
        _builder(_name("fedlora server"), ca.subject, key, at, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, at: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - _BACKDATED)
        .not_valid_after(until)
    )


def _usage(one: str) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{usage: usage == one for usage in every})


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.rfc4514_string()).removeprefix("CN=")


def _hosts(names: Sequence[str], addresses: Sequence[str]) -> list[x509.GeneralName]:
    """The subjectAltName of a server, each host once; refuses what no client could ask for."""
    hosts: dict[x509.GeneralName, None] = {}
    for name in names:
        if _address(name) is not None:
            raise PkiError(f"--name {name}: is an IP address; give it with --address")
        if not _HOST_NAME.fullmatch(name.lower()):
            raise PkiError(f"--name {name!r}: not a DNS name (letters, digits, '-' and '.'; wildcards are not made)")
        hosts[x509.DNSName(name.lower())] = None
    for text in addresses:
        address = _address(text)
        if address is None:
            raise PkiError(f"--address {text!r}: not an IP address; a DNS name is given with --name")
        if address.is_unspecified or getattr(address, "scope_id", None):
            raise PkiError(f"--address {text}: give the address at which nodes reach the server, without a zone")
        hosts[x509.IPAddress(address)] = None
    if not hosts:
        raise PkiError("the server needs a name or an address: --name HOST or --address IP, as nodes will reach it")
    return list(hosts)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _check_days(days: int, longest: int) -> None:
    if not 1 <= days <= longest <= _LONGEST_DAYS:
        raise PkiError(f"{days} days: a server certificate holds 1 to {min(longest, _LONGEST_DAYS)} days")


def _validity(certificate: x509.Certificate, at: datetime) -> tuple[str, Literal["ok", "warning", "problem"]]:
    """In words, and how bad it is. Both ends belong to the time in which it holds (RFC 5280, 4.1.2.5)."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if at < begin:
        return f"not valid before {_time_text(begin)}: is the clock right?", "problem"
    if at > end:
        return f"expired at {_time_text(end)}", "problem"
    return f"until {_time_text(end)}, {(end - at).days} days", "warning" if end - at <= WARNING else "ok"


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return constraints.ca and usage.key_cert_sign


def _for_servers(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def _require_issued(certificate: x509.Certificate, ca: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise PkiError(f"server certificate: was not issued by the CA {_common_name(ca)!r}") from None


def _certificate_item(what: str, name: str, certificate: x509.Certificate, at: datetime) -> Item:
    state, level = _validity(certificate, at)
    fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
    return Item(what=what, name=name, state=state, level=level, fingerprint=fingerprint)


def _private_item(path: Path, kind: Kind, public_key: object, *, needed: bool) -> Item:
    item = Item(what="private key", name=path.name, state="0600", level="ok", fingerprint="")
    if not os.path.lexists(path):
        return replace(item, state="not here", level="problem" if needed else "ok")
    try:
        if load_private_key(path, kind).public_key() != public_key:
            return replace(item, state="is not the key of its certificate or public file", level="problem")
    except PkiError as error:
        return replace(item, state=str(error), level="problem")
    return replace(item, state=f"{stat.S_IMODE(path.stat().st_mode):04o}")


# Nodes


def _make_keys(folder: Path, shared: dict[str, bytes]) -> None:
    auth, signing = generate_private_key(SECP384R1()), Ed25519PrivateKey.generate()
    with _new_folder(folder) as building:
        auth_bytes = auth.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        _write(building / "auth.key", auth_bytes, private=True)
        _write(building / "auth.pub", _ssh_line(auth.public_key()).encode() + b"\n")
        _write(building / "signing.key", _private_pem(signing), private=True)
        _write(building / "signing.pub", _public_pem(signing.public_key()))
        for file, data in shared.items():
            _write(building / file, data)


def _enrolment(folder: Path, shared: dict[str, bytes], at: datetime) -> Node:
    """The entry of the node whose keys are in a folder, which must be whole and hold nothing else."""
    auth = load_public_key(folder / "auth.pub", "ec")
    signing = load_public_key(folder / "signing.pub", "ed25519")
    whole = (
        {path.name for path in folder.iterdir()} == {"auth.key", "auth.pub", "signing.key", "signing.pub", *shared}
        and isinstance(auth.curve, SECP384R1)
        and load_private_key(folder / "auth.key", "ec").public_key() == auth
        and load_private_key(folder / "signing.key", "ed25519").public_key() == signing
        and all(_read(folder / file) == data for file, data in shared.items())
    )
    if not whole:
        raise PkiError(f"{folder}: is not what `fedlora pki node` makes; move it away and try again")
    return Node(name=folder.name, id=node_id(signing), signing_key=signing, auth_key=auth, created=at)


def _registry_bytes(nodes: Sequence[Node]) -> bytes:
    entries = [
        {
            "name": n.name,
            "id": n.id,
            "signing_key": n.signing_key.public_bytes_raw().hex(),
            "auth_key": _ssh_line(n.auth_key),
            "created": _time_text(n.created),
            "revoked": None if n.revoked is None else _time_text(n.revoked),
        }
        for n in sorted(nodes, key=lambda n: n.name)
    ]
    document = {"format": _FORMAT, "nodes": entries}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _read_registry(directory: Path) -> tuple[Node, ...]:
    path = directory / "nodes.json"
    data = _read(path, largest=_LARGEST_REGISTRY)
    try:
        nodes = tuple(_entry(one) for one in json.loads(data)["nodes"])
        canonical = _registry_bytes(nodes)
    except Exception as error:  # of JSON, of its types, and of cryptography
        raise PkiError(f"{path}: not a registry of nodes: {type(error).__name__}: {str(error)[:200]}") from None
    if canonical != data:
        raise PkiError(f"{path}: is not byte for byte what it says in canonical form; was it edited by hand?")
    for what in ("name", "id", "auth_key"):
        found = [str(getattr(n, what)) if what != "auth_key" else _ssh_line(n.auth_key) for n in nodes]
        if len(set(found)) < len(found):
            raise PkiError(f"{path}: two nodes have the same {what}")
    return nodes


def _entry(fields: dict[str, Any]) -> Node:
    """One node of the registry. Its id is derived, so that a wrong one is found when the bytes are compared."""
    signing = Ed25519PublicKey.from_public_bytes(bytes.fromhex(fields["signing_key"]))
    auth = load_ssh_public_key(fields["auth_key"].encode() if isinstance(fields["auth_key"], str) else b"")
    if not isinstance(auth, EllipticCurvePublicKey) or not isinstance(auth.curve, SECP384R1):
        raise ValueError("auth_key is not on P-384")
    if not isinstance(fields["name"], str) or not _NODE_NAME.fullmatch(fields["name"]):
        raise ValueError(f"name {fields['name']!r} cannot be used")
    return Node(
        name=fields["name"],
        id=node_id(signing),
        signing_key=signing,
        auth_key=auth,
        created=_time(fields["created"]),
        revoked=None if fields["revoked"] is None else _time(fields["revoked"]),
    )


def _ssh_line(key: EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _private_pem(key: EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _utc(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise ValueError(f"a time without a zone: {at}")
    return at.astimezone(UTC).replace(microsecond=0)


def _time_text(at: datetime) -> str:
    return at.strftime(_TIME)


def _time(text: str) -> datetime:
    return datetime.strptime(text, _TIME).replace(tzinfo=UTC)


# Files


def _read(path: Path, *, private: bool = False, largest: int = _LARGEST) -> bytes:
    with _told(f"{path}: cannot be read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not make us wait
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise PkiError(f"{path}: not a regular file")
            if private and found.st_mode & 0o077:
                raise PkiError(
                    f"{path}: holds a private key, and its mode {stat.S_IMODE(found.st_mode):04o} lets others than its "
                    f"owner reach it: chmod 600 {path}"
                )
            if found.st_size > largest:
                raise PkiError(f"{path}: {found.st_size} bytes, and at most {largest} are read")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(found.st_size)
        finally:
            os.close(descriptor)


def _write(path: Path, data: bytes, *, private: bool = False) -> None:
    """A new file on the disk, whatever the umask: 0600 from birth, or 0644."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        if not private:
            os.fchmod(descriptor, 0o644)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _replace(path: Path, data: bytes) -> None:
    """The old content or the new one, at any instant, and after a power loss too. For public files."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        _write(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, of mode 0700, that takes its place at the end; an error removes it."""
    if os.path.lexists(path):
        raise PkiError(f"{path}: exists already, and nothing is overwritten; name a new folder")
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield building
        _sync(building)
        os.rename(building, path)
    except BaseException:
        shutil.rmtree(building)
        raise
    _sync(path.parent)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One writer at a time."""
    with _told(f"{directory}: cannot be opened"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """An error of the file system as one of ours."""
    try:
        yield
    except OSError as error:
        raise PkiError(f"{what}: {error.strerror or error}") from error
