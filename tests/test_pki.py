"""Keys and certificates, read by openssl, ssh-keygen, Python's ssl and another verifier; crashes; what is refused."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import ssl
import stat
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509 import verification

from fedlora.pki import (
    PkiError,
    init,
    inventory,
    load_certificate,
    load_private_key,
    load_public_key,
    node,
    node_id,
    registry,
    renew,
    require_valid,
    revoke,
    server_names,
)

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
NAMES, ADDRESSES = ["fl.example.org", "localhost"], ["10.0.0.5", "::1"]
PRIVATE = {"ca.key", "server.key", "operator.key", "auth.key", "signing.key"}


def made(folder: Path, *, at: datetime = NOW, **settings: int) -> Path:
    init(folder, names=NAMES, addresses=ADDRESSES, at=at, **settings)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with two nodes, one revoked; not to be changed."""
    folder = made(tmp_path_factory.mktemp("shared") / "pki")
    for name in ("north", "south"):
        node(folder, name, at=NOW)
    revoke(folder, "south", at=NOW + DAY)
    return folder


@pytest.fixture
def own(shared: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(shared, tmp_path / "own")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def run(*words: str | Path, fed: str = "") -> str:
    done = subprocess.run([str(w) for w in words], input=fed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs the ssh-keygen command")


# What is made, by other programs' reading


@openssl
def test_openssl_verifies_the_chain_strictly(shared: Path, tmp_path: Path) -> None:
    ca, server = shared / "ca.pem", shared / "server.pem"
    strict = ("openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile")
    for check in (("-verify_hostname", "fl.example.org"), ("-verify_ip", "10.0.0.5"), ("-verify_ip", "::1")):
        assert "OK" in run(*strict, ca, *check, server)
    for check in (("-verify_hostname", "other.example.org"), ("-verify_ip", "10.0.0.6")):
        with pytest.raises(AssertionError, match="mismatch"):
            run(*strict, ca, *check, server)
    with pytest.raises(AssertionError, match=r"unable to get local issuer|signature failure"):
        run(*strict, made(tmp_path / "other") / "ca.pem", server)


@openssl
def test_openssl_reads_what_the_certificates_allow(shared: Path) -> None:
    text = run("openssl", "x509", "-in", shared / "ca.pem", "-noout", "-text")
    for words in ("CA:TRUE, pathlen:0", "Certificate Sign\n", "secp384r1", "ecdsa-with-SHA384", "Version: 3"):
        assert words in text
    assert text.count("critical") == 2
    text = run("openssl", "x509", "-in", shared / "server.pem", "-noout", "-text")
    for words in ("CA:FALSE", "Digital Signature\n", "TLS Web Server Authentication\n", "prime256v1"):
        assert words in text
    for host in ("DNS:fl.example.org", "DNS:localhost", "IP Address:10.0.0.5", "IP Address:0:0:0:0:0:0:0:1"):
        assert host in text


@openssl
def test_openssl_reads_every_key_and_finds_its_public_part(shared: Path) -> None:
    def public(key: Path) -> str:
        return run("openssl", "pkey", "-in", key, "-pubout")

    for name in ("ca", "server"):
        assert public(shared / f"{name}.key") == run(
            "openssl", "x509", "-in", shared / f"{name}.pem", "-noout", "-pubkey"
        )
    assert public(shared / "operator.key") == (shared / "operator.pub").read_text()
    north = shared / "nodes" / "north"
    assert public(north / "signing.key") == (north / "signing.pub").read_text()


@openssl
def test_the_id_of_a_node_is_the_hash_of_its_raw_public_key(shared: Path) -> None:
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", shared / "nodes/north/signing.pub", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    assert hashlib.sha256(der[-32:]).hexdigest() == registry(shared)[0].id  # RFC 8410: the key ends the structure


@ssh_keygen
def test_ssh_keygen_reads_the_authentication_key(shared: Path) -> None:
    north = shared / "nodes" / "north"
    assert run("ssh-keygen", "-y", "-f", north / "auth.key") == (north / "auth.pub").read_text()
    assert run("ssh-keygen", "-l", "-f", north / "auth.pub").startswith("384 ")


def test_the_authentication_key_is_what_flower_loads(shared: Path) -> None:
    """The two calls of flwr 1.41: supernode/cli/flower_supernode.py and cli/supernode/register.py."""
    north = shared / "nodes" / "north"
    private = load_ssh_private_key((north / "auth.key").read_bytes(), None)
    assert isinstance(private, EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert load_ssh_public_key((north / "auth.pub").read_bytes()) == private.public_key()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        node(made(tmp_path / "pki"), "north", at=NOW)
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "pki", *(tmp_path / "pki").rglob("*"))}
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600 if path.name in PRIVATE else 0o644), path
    assert {p.name for p in modes} >= PRIVATE


def test_private_files_are_private_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []

    def watched(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            opened.append((Path(path).name, mode))
        return real(path, flags, mode)

    real = os.open
    monkeypatch.setattr(os, "open", watched)
    node(made(tmp_path / "pki"), "north", at=NOW)
    assert {name for name, mode in opened if mode == 0o600} >= PRIVATE


def test_a_nodes_folder_holds_its_own_secrets_and_no_others(shared: Path) -> None:
    held = tree(shared / "nodes" / "north")
    assert set(held) == {"auth.key", "auth.pub", "signing.key", "signing.pub", "ca.pem", "operator.pub"}
    assert held["ca.pem"] == (shared / "ca.pem").read_bytes()
    assert held["operator.pub"] == (shared / "operator.pub").read_bytes()
    others = [p for p in shared.rglob("*.key") if p.parent.name != "north"]
    assert len(others) == 5
    for other in others:
        body = b"".join(other.read_bytes().splitlines()[1:-1])
        assert not any(body in (data or b"").replace(b"\n", b"") for data in held.values())


def test_every_key_is_another(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = made(tmp_path / name)
        for which in ("north", "south"):
            node(folder, which, at=NOW)
    keys = [p.read_bytes() for p in tmp_path.rglob("*.key")]
    assert len(set(keys)) == len(keys) == 2 * (3 + 2 * 2)


# TLS


def shake(server: Path, ca: Path, host: str) -> None:
    """A TLS handshake in memory, as a node does it: pinned CA, checked host name."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(server / "server.pem", server / "server.key")
    theirs = ssl.create_default_context(cafile=ca)
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        theirs.wrap_bio(to_client, to_server, server_hostname=host),
        ours.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for side in list(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)
        if not sides:
            return
    raise AssertionError("no end of the handshake")


@pytest.mark.parametrize("host", [*NAMES, *ADDRESSES])
def test_a_client_that_pins_the_ca_accepts_each_host(shared: Path, host: str) -> None:
    shake(shared, shared / "ca.pem", host)
    shake(shared, shared / "nodes" / "north" / "ca.pem", host)


@pytest.mark.parametrize("host", ["example.org", "x.fl.example.org", "10.0.0.6"])
def test_a_client_refuses_a_wrong_host(shared: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        shake(shared, shared / "ca.pem", host)


def test_a_client_refuses_another_ca_and_an_expired_certificate(shared: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|signature failure"):
        shake(shared, other / "ca.pem", "localhost")
    old = made(tmp_path / "old", at=NOW - 400 * DAY)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake(old, old / "ca.pem", "localhost")
    renew(old, at=NOW)
    shake(old, old / "ca.pem", "localhost")
    early = made(tmp_path / "early", at=NOW + DAY)
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        shake(early, early / "ca.pem", "localhost")


# require_valid


def verified_elsewhere(certificate: x509.Certificate, ca: x509.Certificate, at: datetime, host: str) -> bool:
    """The verifier of `cryptography`, which follows the profile of the web."""
    try:
        subject: verification.Subject = x509.IPAddress(ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    builder = verification.PolicyBuilder().store(verification.Store([ca])).time(at)
    try:
        builder.build_server_verifier(subject).verify(certificate, [])
    except verification.VerificationError:
        return False
    return True


@pytest.mark.parametrize("days", [-1, 0, 200, 364, 366, 4000])
@pytest.mark.parametrize("host", ["fl.example.org", "FL.example.org", "::1", "10.0.0.5", "10.0.0.50", "example.org"])
def test_require_valid_agrees_with_another_verifier(shared: Path, days: int, host: str) -> None:
    ca, server = load_certificate(shared / "ca.pem"), load_certificate(shared / "server.pem")
    try:
        require_valid(server, ca=ca, at=NOW + days * DAY, names=[host])
        ours = True
    except PkiError:
        ours = False
    assert ours == verified_elsewhere(server, ca, NOW + days * DAY, host.lower())


def test_require_valid_names_the_rule(shared: Path, tmp_path: Path) -> None:
    ca, server = load_certificate(shared / "ca.pem"), load_certificate(shared / "server.pem")
    other = load_certificate(made(tmp_path / "other") / "ca.pem")
    for rule, wrong in (
        ("was not issued by the CA", {"ca": other}),
        ("do not let it issue others", {"ca": server}),
        (r"server certificate 'fedlora server': expired at \d{4}-", {"at": NOW + 366 * DAY}),
        (r"CA certificate 'fedlora CA [0-9a-f]{8}': expired", {"at": NOW + 3651 * DAY}),
        ("not valid before .*clock", {"at": NOW - DAY}),
        (
            "good for fl.example.org, localhost, 10.0.0.5, ::1, not for x.org: .*renew",
            {"names": ["localhost", "x.org"]},
        ),
    ):
        settings = {"ca": ca, "at": NOW, "names": ["localhost"]} | wrong
        with pytest.raises(PkiError, match=rule):
            require_valid(server, **settings)  # type: ignore[arg-type]
    with pytest.raises(PkiError, match=r"not one for serverAuth|not issued"):
        require_valid(ca, ca=ca, at=NOW, names=["localhost"])
    with pytest.raises(ValueError, match="without a zone"):
        require_valid(server, ca=ca, at=NOW.replace(tzinfo=None), names=[])


def test_a_node_whose_clock_is_up_to_an_hour_late_accepts_a_new_certificate(shared: Path) -> None:
    ca, server = load_certificate(shared / "ca.pem"), load_certificate(shared / "server.pem")
    require_valid(server, ca=ca, at=NOW - timedelta(minutes=59), names=["localhost"])
    with pytest.raises(PkiError, match="not valid before"):
        require_valid(server, ca=ca, at=NOW - timedelta(minutes=61), names=["localhost"])


# Settings that cannot work


@pytest.mark.parametrize(
    ("names", "addresses", "rule"),
    [
        ([], [], "needs a name or an address"),
        (["10.0.0.5"], [], "give it with --address"),
        (["*.example.org"], [], "not a DNS name"),
        (["a b"], [], "not a DNS name"),
        (["-a.org"], [], "not a DNS name"),
        (["a.org."], [], "not a DNS name"),
        (["a" * 64], [], "not a DNS name"),
        (["10.0.0.256"], [], "not a DNS name"),
        (["münchen.de"], [], "not a DNS name"),
        (["a.org\n"], [], "not a DNS name"),
        ([""], [], "not a DNS name"),
        ([], ["example.org"], "not an IP address"),
        ([], ["0.0.0.0"], "at which nodes reach"),
        ([], ["fe80::1%eth0"], "without a zone"),
    ],
)
def test_hosts_that_no_node_can_ask_for_are_refused(
    tmp_path: Path, names: list[str], addresses: list[str], rule: str
) -> None:
    with pytest.raises(PkiError, match=rule):
        init(tmp_path / "pki", names=names, addresses=addresses, at=NOW)
    assert list(tmp_path.iterdir()) == []


def test_names_are_kept_in_small_letters_and_once(tmp_path: Path) -> None:
    init(tmp_path / "pki", names=["Node-12", "node-12"], addresses=["10.0.0.5", "10.0.0.5"], at=NOW)
    assert server_names(load_certificate(tmp_path / "pki" / "server.pem")) == (("node-12",), ("10.0.0.5",))


@pytest.mark.parametrize(("days", "ca_days"), [(0, 10), (11, 10), (-1, 10), (1, 40000)])
def test_days_have_bounds(tmp_path: Path, days: int, ca_days: int) -> None:
    with pytest.raises(PkiError, match="holds 1 to"):
        made(tmp_path / "pki", days=days, ca_days=ca_days)


@pytest.mark.parametrize("name", ["", "North", "a/b", "..", ".a", "a.", "a b", "-a", "a-", "a" * 64, "a\n", "é"])
def test_names_of_nodes_that_cannot_be_used(own: Path, name: str) -> None:
    before = tree(own)
    with pytest.raises(PkiError, match="node name"):
        node(own, name, at=NOW)
    assert tree(own) == before


# Nothing is overwritten, and a crash leaves no half


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_init_never_overwrites(tmp_path: Path, what: str) -> None:
    place = tmp_path / "pki"
    if what == "folder":
        place.mkdir()
        (place / "kept").write_text("kept")
    elif what == "file":
        place.write_text("kept")
    else:
        place.symlink_to("nowhere")
    before = tree(tmp_path)
    with pytest.raises(PkiError, match="exists already"):
        made(place)
    assert tree(tmp_path) == before


def test_a_name_is_taken_once_even_by_a_revoked_node(own: Path) -> None:
    before = tree(own)
    for name in ("north", "south"):
        with pytest.raises(PkiError, match="enrolled already"):
            node(own, name, at=NOW)
    assert tree(own) == before


def test_a_folder_of_other_things_in_a_nodes_place_is_not_touched(own: Path) -> None:
    (own / "nodes" / "east").mkdir()
    (own / "nodes" / "east" / "kept").write_text("kept")
    before = tree(own)
    with pytest.raises(PkiError, match=r"auth\.pub: cannot be read"):
        node(own, "east", at=NOW)
    shutil.copytree(own / "nodes" / "north", own / "nodes" / "west")
    (own / "nodes" / "west" / "signing.pub").write_bytes((own / "nodes" / "south" / "signing.pub").read_bytes())
    with pytest.raises(PkiError, match="move it away"):
        node(own, "west", at=NOW)
    shutil.rmtree(own / "nodes" / "west")
    assert tree(own) == before


STEPS = ("open", "fsync", "rename", "replace", "mkdir", "fchmod")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Callable[[], int]]]:
    """Make the n-th call that changes the disk fail with an OSError; gives back how many calls there were."""

    def arm(at: int) -> Callable[[], int]:
        monkeypatch.undo()
        calls = 0

        def wrap(name: str) -> None:
            real = getattr(os, name)

            def step(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise OSError(28, "No space left on device")
                return None if name == "fsync" else real(*args, **kwargs)  # no power is lost here

            monkeypatch.setattr(os, name, step)

        for name in STEPS:
            wrap(name)
        return lambda: calls

    yield arm
    monkeypatch.undo()


def every_failure(arm: Callable[[int], Callable[[], int]], act: Callable[[], object]) -> Iterator[int]:
    """Run `act` with its first step failing, then its second, ... until it gets through."""
    for at in range(1, 200):
        counted = arm(at)
        try:
            act()
        except PkiError as error:
            assert "No space left" in str(error)  # noqa: PT017
        arm(0)
        if counted() < at:
            return
        yield at
    raise AssertionError("no end of steps")


def test_a_failure_at_any_step_of_init_leaves_all_or_nothing(
    tmp_path: Path, failing: Callable[[int], Callable[[], int]]
) -> None:
    place = tmp_path / "pki"
    steps = whole = 0
    for _ in every_failure(failing, lambda: made(place)):
        steps += 1
        left = [p.name for p in tmp_path.iterdir()]
        assert left in ([], ["pki"])  # no temporary folder with keys in it either
        if left:  # only the folder above could not be synchronised
            assert all(i.level == "ok" for i in inventory(place, at=NOW))
            whole += 1
            shutil.rmtree(place)
    assert steps > 20
    assert whole <= 2


def test_a_failure_at_any_step_of_node_leaves_the_registry_whole_and_can_be_repeated(
    own: Path, failing: Callable[[int], Callable[[], int]]
) -> None:
    before, nodes = tree(own), registry(own, revoked=True)
    steps = 0
    for _ in every_failure(failing, lambda: node(own, "east", at=NOW)):
        steps += 1
        left = set(tree(own)) - set(before)
        assert not [p for p in left if Path(p).name.startswith(".")]
        kept = own / "nodes" / "east"
        now = registry(own, revoked=True)
        if len(now) == len(nodes):
            assert now == nodes
            id_of_kept = node_id(load_public_key(kept / "signing.pub", "ed25519")) if kept.exists() else None
            assert node(own, "east", at=NOW).id == (id_of_kept or registry(own)[0].id)
        assert [n.name for n in registry(own)] == ["east", "north"]
        assert len(list(kept.iterdir())) == 6
        shutil.rmtree(kept)
        (own / "nodes.json").write_bytes(before["nodes.json"] or b"")
    assert steps > 20


def test_what_counts_is_on_the_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, then its folder, then the new name, then the folder that holds the name."""
    events: list[tuple[str, int]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def watched_rename(old: Path, new: Path) -> None:
        events.append(("named", os.stat(old).st_ino))
        (rename if Path(old).is_dir() else replace)(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(os, "replace", watched_rename)
    folder = tmp_path / "pki"
    made(folder)
    assert [e for e in events if e[0] == "named"] == [("named", folder.stat().st_ino)]
    assert {ino for _, ino in events[:-3]} == {p.stat().st_ino for p in folder.iterdir() if p.is_file()}
    assert events[-3:] == [
        ("fsync", folder.stat().st_ino),
        ("named", folder.stat().st_ino),
        ("fsync", tmp_path.stat().st_ino),
    ]
    events.clear()
    node(folder, "north", at=NOW)
    north, nodes, inner = folder / "nodes" / "north", folder / "nodes.json", folder / "nodes"
    assert {ino for _, ino in events[:6]} == {p.stat().st_ino for p in north.iterdir()}
    order = [
        ("fsync", north),
        ("named", north),
        ("fsync", inner),
        ("fsync", nodes),
        ("named", nodes),
        ("fsync", folder),
    ]
    assert events[6:] == [(what, path.stat().st_ino) for what, path in order]


@pytest.mark.parametrize("act", [renew, lambda d, at: revoke(d, "north", at=at)], ids=["renew", "revoke"])
def test_a_failure_at_any_step_leaves_the_old_file_or_the_new_one(
    own: Path, failing: Callable[[int], Callable[[], int]], act: Callable[..., object]
) -> None:
    before = tree(own)
    steps = 0
    for _ in every_failure(failing, lambda: act(own, at=NOW)):
        steps += 1
        now = tree(own)
        assert set(now) == set(before)
        assert {k for k in now if now[k] != before[k]} <= {"server.pem", "nodes.json"}
        assert not [i for i in inventory(own, at=NOW) if i.level != "ok"]
        for file in ("server.pem", "nodes.json"):
            (own / file).write_bytes(before[file] or b"")
    assert steps >= 4


def test_writers_wait_for_each_other_and_lose_nothing(own: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(own, tmp_path / "elsewhere")
    revoke(elsewhere, "north", at=NOW)
    with ThreadPoolExecutor(1) as pool:
        first = os.open(own, os.O_RDONLY)
        fcntl.flock(first, fcntl.LOCK_EX)
        second = pool.submit(node, own, "east", at=NOW)
        with pytest.raises(TimeoutError):
            second.result(0.1)
        shutil.copy(elsewhere / "nodes.json", own / "nodes.json")
        os.close(first)
        second.result(60)
    assert [n.name for n in registry(own)] == ["east"]


# Renewing, revoking, listing


def test_renew_keeps_key_and_names_and_needs_the_cas_own_key(own: Path, tmp_path: Path) -> None:
    ca, old = load_certificate(own / "ca.pem"), load_certificate(own / "server.pem")
    later = NOW + 300 * DAY
    os.rename(own / "ca.key", tmp_path / "safe.key")
    with pytest.raises(PkiError, match=r"ca\.key: cannot be read: No such file"):
        renew(own, at=later)
    with pytest.raises(PkiError, match="not the key of"):
        renew(own, at=later, ca_key=own / "server.key")
    renew(own, at=later, days=10, ca_key=tmp_path / "safe.key")
    new = load_certificate(own / "server.pem")
    assert (new.public_key(), server_names(new)) == (old.public_key(), server_names(old))
    assert new.serial_number != old.serial_number
    assert new.not_valid_after_utc == later + 10 * DAY
    require_valid(new, ca=ca, at=later, names=NAMES)
    renew(own, at=later, names=["new.example.org"], ca_key=tmp_path / "safe.key")
    assert server_names(load_certificate(own / "server.pem")) == (("new.example.org",), ())
    with pytest.raises(PkiError, match="outlive the CA"):
        renew(own, at=NOW + 3600 * DAY, ca_key=tmp_path / "safe.key")


def test_revoked_nodes_are_kept_and_not_trusted(own: Path) -> None:
    everyone = {n.name: n for n in registry(own, revoked=True)}
    assert [n.name for n in registry(own)] == ["north"]
    assert everyone["south"].revoked == NOW + DAY
    assert everyone["north"].signing_key == load_public_key(own / "nodes" / "north" / "signing.pub", "ed25519")
    assert everyone["north"].auth_key == load_public_key(own / "nodes" / "north" / "auth.pub", "ec")
    for name, rule in (("south", "revoked already, at 20"), ("east", "enrolled: north, south")):
        before = tree(own)
        with pytest.raises(PkiError, match=rule):
            revoke(own, name, at=NOW)
        assert tree(own) == before
    revoke(own, "north", at=NOW)
    assert registry(own) == ()


def test_the_nodes_folders_are_not_needed_after_enrolment(own: Path) -> None:
    shutil.rmtree(own / "nodes" / "north")
    assert [n.name for n in registry(own)] == ["north"]
    states = {i.name: i.state for i in inventory(own, at=NOW)}
    assert re.fullmatch(r"enrolled \S+Z", states["north"])
    assert "its private keys still in" in states["south"]


@pytest.mark.parametrize(
    ("days", "level"), [(0, "ok"), (334, "ok"), (335, "warning"), (364, "warning"), (366, "problem"), (-1, "problem")]
)
def test_inventory_warns_30_days_before_a_certificate_ends(shared: Path, days: int, level: str) -> None:
    levels = {i.what: i.level for i in inventory(shared, at=NOW + days * DAY)}
    assert levels["server certificate"] == level
    assert levels["CA certificate"] == ("problem" if days < 0 else "ok")
    assert {levels[what] for what in ("operator key", "private key", "node")} == {"ok"}


@openssl
def test_fingerprints_are_those_of_openssl(shared: Path) -> None:
    found = {i.what: i.fingerprint for i in inventory(shared, at=NOW)}
    for what, file in (("CA certificate", "ca.pem"), ("server certificate", "server.pem")):
        line = run("openssl", "x509", "-in", shared / file, "-noout", "-fingerprint", "-sha256")
        assert line.strip().split("=")[1].replace(":", "").lower() == found[what]


def test_inventory_finds_what_does_not_fit(own: Path, tmp_path: Path) -> None:
    def levels() -> dict[str, tuple[str, str]]:
        return {i.name if i.what == "private key" else i.what: (i.level, i.state) for i in inventory(own, at=NOW)}

    other = made(tmp_path / "other")
    (own / "ca.key").unlink()
    assert levels()["ca.key"] == ("ok", "not here")
    (own / "operator.key").chmod(0o640)
    assert levels()["operator.key"][0] == "problem"
    assert "chmod 600" in levels()["operator.key"][1]
    shutil.copy(other / "server.key", own / "server.key")
    assert levels()["server.key"] == ("problem", "is not the key of its certificate or public file")
    (own / "server.key").unlink()
    assert levels()["server.key"] == ("problem", "not here")
    shutil.copy(other / "server.pem", own / "server.pem")
    assert "not issued" in levels()["server certificate"][1]
    (own / "operator.pub").unlink()
    with pytest.raises(PkiError, match=r"operator\.pub"):
        levels()


# Files that are refused


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o610, 0o777])
def test_a_private_key_that_others_may_reach_is_refused(own: Path, mode: int) -> None:
    path = own / "operator.key"
    load_private_key(path, "ed25519")
    path.chmod(mode)
    with pytest.raises(PkiError, match=rf"mode {mode:04o}.*chmod 600 {re.escape(str(path))}"):
        load_private_key(path, "ed25519")
    (own / "link").symlink_to(path)
    with pytest.raises(PkiError, match="chmod 600"):
        load_private_key(own / "link", "ed25519")
    path.chmod(0o400)
    load_private_key(own / "link", "ed25519")


def test_private_files_of_other_kinds_are_refused_without_telling_them(own: Path) -> None:
    key = (own / "operator.key").read_bytes()
    secret = key.splitlines()[1].decode()
    for rule, data in (
        ("no private key", b""),
        ("no private key", b"\x00\xff" * 50),
        ("no private key", key[:60]),
        ("no private key", key.replace(b"MC4", b"MC5")),
        ("no private key", (own / "operator.pub").read_bytes()),
        ("no private key", (own / "ca.pem").read_bytes()),
        ("no private key", (own / "nodes/north/auth.key").read_bytes()[:300]),
        (r"type EC.*kind ed25519", (own / "ca.key").read_bytes()),
        (r"type EC.*kind ed25519", (own / "nodes/north/auth.key").read_bytes()),
        ("at most 65536", key + b"\n" * 70000),
    ):
        (own / "operator.key").write_bytes(data)
        with pytest.raises(PkiError, match=rule) as caught:
            load_private_key(own / "operator.key", "ed25519")
        assert secret not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    with pytest.raises(PkiError, match=r"type Ed25519.*kind ec"):
        load_private_key(own / "nodes/north/signing.key", "ec")


@openssl
@ssh_keygen
def test_encrypted_keys_are_refused(own: Path) -> None:
    encrypted = own / "encrypted.key"
    run("openssl", "pkey", "-in", own / "operator.key", "-aes256", "-passout", "pass:word", "-out", encrypted)
    encrypted.chmod(0o600)
    with pytest.raises(PkiError, match=r"is encrypted.*decrypt it"):
        load_private_key(encrypted, "ed25519")
    run("ssh-keygen", "-q", "-p", "-N", "words", "-f", own / "nodes/north/auth.key")
    with pytest.raises(PkiError, match="is encrypted"):
        load_private_key(own / "nodes/north/auth.key", "ec")


def test_what_is_no_regular_file_is_refused_at_once(own: Path) -> None:
    os.mkfifo(own / "fifo", 0o600)
    (own / "dangling").symlink_to("nowhere")
    for name, rule in (
        ("fifo", "not a regular file"),
        ("nodes", "not a regular file"),
        ("dangling", "cannot be read: No such file"),
        ("absent", "cannot be read: No such file"),
        ("ca.pem/x", "cannot be read: Not a directory"),
    ):
        for load in (
            lambda p: load_private_key(p, "ed25519"),
            lambda p: load_public_key(p, "ed25519"),
            load_certificate,
        ):
            with pytest.raises(PkiError, match=rule):
                load(own / name)


def test_public_files_of_other_kinds_are_refused(own: Path) -> None:
    path = own / "operator.pub"
    for rule, data in (
        ("no public key", b""),
        ("no public key", b"ssh-other AAAA"),
        ("no public key", path.read_bytes()[:50]),
        ("no public key", (own / "operator.key").read_bytes()),
        (r"type EC.*kind ed25519", (own / "nodes/north/auth.pub").read_bytes()),
    ):
        path.write_bytes(data)
        with pytest.raises(PkiError, match=rule):
            load_public_key(path, "ed25519")
    ca = (own / "ca.pem").read_bytes()
    for data in (b"", ca + ca, ca[:200], (own / "operator.key").read_bytes()):
        (own / "ca.pem").write_bytes(data)
        with pytest.raises(PkiError, match="one PEM certificate is needed"):
            load_certificate(own / "ca.pem")


# The registry


def test_the_registry_is_canonical_json(shared: Path) -> None:
    data = (shared / "nodes.json").read_bytes()
    document = json.loads(data)
    assert json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == data
    assert [sorted(n) for n in document["nodes"]] == 2 * [
        ["auth_key", "created", "id", "name", "revoked", "signing_key"]
    ]
    assert [n["revoked"] for n in document["nodes"]] == [None, (NOW + DAY).strftime("%Y-%m-%dT%H:%M:%SZ")]
    assert b"PRIVATE" not in data


def test_a_malformed_registry_is_refused(own: Path) -> None:
    path = own / "nodes.json"
    data = path.read_bytes()
    first, second = json.loads(data)["nodes"]

    def with_first(**changed: object) -> bytes:
        document = {"format": "fedlora-nodes-v1", "nodes": [first | changed, second]}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    assert with_first() == data
    wrong = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        data + b"\n",
        data.replace(b",", b", "),
        data.replace(b"-v1", b"-v2"),
        data.replace(b'"name"', b'"extra":1,"name"', 1),
        data.replace(b'"revoked":null', b'"revoked":null,"revoked":null'),
        b'{"format":"fedlora-nodes-v1","nodes":{}}',
        b'{"format":"fedlora-nodes-v1","nodes":[1]}',
        json.dumps({"format": "fedlora-nodes-v1", "nodes": [second, first]}, separators=(",", ":")).encode(),
        with_first(id=second["id"]),
        with_first(signing_key=second["signing_key"], id=second["id"]),
        with_first(auth_key=second["auth_key"]),
        with_first(name=second["name"]),
        with_first(name="../evil"),
        with_first(name=7),
        with_first(signing_key=first["signing_key"][2:]),
        with_first(signing_key=first["signing_key"].upper()),
        with_first(signing_key=None),
        with_first(auth_key=7),
        with_first(auth_key=first["auth_key"] + " comment"),
        with_first(auth_key="ssh-ed25519 AAAA"),
        with_first(auth_key=first["auth_key"].replace("384", "256")),
        with_first(created="2026-1-1T00:00:00Z"),
        with_first(created=None),
        with_first(revoked=False),
        with_first(revoked=""),
        b" " * (1 << 24) + b" ",
    ]
    for bad in wrong:
        path.write_bytes(bad)
        for act in (registry, lambda d: node(d, "east", at=NOW), lambda d: revoke(d, "north", at=NOW)):
            with pytest.raises(PkiError, match=r"nodes\.json"):
                act(own)
        assert path.read_bytes() == bad
        assert not (own / "nodes" / "east").exists()
    path.unlink()
    with pytest.raises(PkiError, match=r"nodes\.json: cannot be read"):
        registry(own)


@pytest.mark.parametrize("act", [lambda d: node(d, "x", at=NOW), lambda d: renew(d, at=NOW), registry])
def test_a_folder_that_is_not_there(tmp_path: Path, act: Callable[[Path], object]) -> None:
    with pytest.raises(PkiError, match="No such file"):
        act(tmp_path / "absent")
    with pytest.raises(PkiError, match="cannot be made: No such file"):
        made(tmp_path / "absent" / "pki")


# What fuzzing found: cryptography raises more types than it lists


def der_of(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(line for line in pem.split(b"\n") if not line.startswith(b"-----")))


def pem_of(der: bytes, label: str) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.b64encode(der).decode()}\n-----END {label}-----\n".encode()


def test_a_certificate_whose_key_or_extensions_cannot_be_read_is_refused_when_it_is_loaded(own: Path) -> None:
    good = der_of((own / "ca.pem").read_bytes())
    curve, usage, constraints = (bytes.fromhex(x) for x in ("06052b81040022", "0603551d0f", "0603551d13"))
    hostile = [
        good.replace(curve, bytes.fromhex("06052b8104007f")),  # no such curve
        good.replace(usage, constraints),  # an extension twice
        good.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020107")),  # version 8
    ]
    for der in hostile:
        assert der != good
        (own / "ca.pem").write_bytes(pem_of(der, "CERTIFICATE"))
        with pytest.raises(PkiError, match=r"ca\.pem: holds 0 certificates that can be read"):
            load_certificate(own / "ca.pem")
        with pytest.raises(PkiError):
            inventory(own, at=NOW)


def test_openssh_keys_of_a_form_that_is_not_read_are_refused(own: Path) -> None:
    name = "north"
    path = own / "nodes" / name / "auth.pub"
    kind, text = path.read_text().split()[:2]
    raw = base64.b64decode(text)
    at = len(raw) - 97  # the point on P-384: 4, x, y
    assert raw[at] == 4
    path.write_text(f"{kind} {base64.b64encode(raw[:at] + bytes([2]) + raw[at + 1 :]).decode()}\n")  # "compressed"
    with pytest.raises(PkiError, match="no public key that can be read"):
        load_public_key(path, "ec")
    path = own / "nodes" / name / "auth.key"
    lines = path.read_bytes().split(b"\n")
    raw = base64.b64decode(b"".join(lines[1:-2]))
    first = raw.index(b"nistp384\x00\x00\x00\x61\x04") + 12
    raw = raw[:first] + bytes([2]) + raw[first + 1 :]
    path.write_bytes(lines[0] + b"\n" + base64.b64encode(raw) + b"\n" + lines[-2] + b"\n")
    with pytest.raises(PkiError, match="no private key that can be read"):
        load_private_key(path, "ec")


def test_a_small_file_is_read_in_little_memory(shared: Path) -> None:
    registry(shared)
    tracemalloc.start()
    registry(shared)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
