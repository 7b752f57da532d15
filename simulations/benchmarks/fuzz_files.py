"""The targets of fuzz.py that are files: keys and registries, checkpoints, run logs, clients' memory."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.memory import Memory
from fedlora import at_rest, pki
from fedlora.errors import BlocksMissing, CheckpointError, ConfigError
from fedlora.report.log import RunLog, read_log
from fedlora.wire import blocks_id, encode_state
from server.checkpoint import latest
from simulations.benchmarks.fuzz_mutations import Mutation, damaged, frame, lines, safetensors
from simulations.benchmarks.fuzz_release import edited
from simulations.benchmarks.fuzz_targets import (
    Case,
    Special,
    Target,
    asks,
    folder_of,
    of_bytes,
    require,
    state,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOON = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
_CHANGED = "changed"  # a mark in a case: what was signed anew is another release, and may be verified


# Keys


@cache
def keys() -> dict[str, bytes]:
    """The files of a federation of two nodes, by path."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "pki"
        pki.init(folder, names=["server.test"], addresses=["127.0.0.1"], at=NOON)
        for name in ("one", "two"):
            pki.node(folder, name, at=NOON)
        pki.revoke(folder, "two", at=NOON)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _read_nodes(case: Case) -> object:
    with folder_of(case) as folder:
        nodes = pki.registry(folder, revoked=True)
        pki.inventory(folder, at=NOON)
    require(len({n.name for n in nodes}) == len({n.id for n in nodes}) == len(nodes), "two nodes of one name or id")
    return nodes


def _pem(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A PEM file, or an OpenSSH line, whose DER was struck inside the base64; or plain damage."""

    rows = data.split(b"\n")
    inside = [r for r in rows if r and not r.startswith(b"-----")]
    if rng.random() < 0.25 or not inside:
        return damaged(rng, data, others)
    line = len(rows) == 2 or data.startswith(b"ecdsa")
    try:
        raw = bytearray(base64.b64decode(data.split()[1] if line else b"".join(inside)))
    except (binascii.Error, IndexError):
        return damaged(rng, data, others)
    if rng.random() < 0.3:  # one piece of DER twice, as an extension would be
        at, much = rng.randrange(len(raw)), rng.randrange(1, 60)
        raw[at:at] = raw[at : at + much]
    else:
        for _ in range(rng.choice((1, 1, 2, 3))):
            raw[rng.randrange(len(raw))] = rng.choice((0, 1, 2, 5, 6, 0x30, 0x31, 0x80, 0xFF, rng.randrange(256)))
    text = base64.b64encode(bytes(raw))
    if line:
        return data.split()[0] + b" " + text + b"\n"
    wrapped = b"\n".join(text[i : i + 64] for i in range(0, len(text), 64))
    return rows[0] + b"\n" + wrapped + b"\n" + next(r for r in reversed(rows) if r) + b"\n"


def _nodes(rng: random.Random) -> Case:
    case: Case = dict(keys())
    name = rng.choice(("nodes.json", "nodes.json", "ca.pem", "server.pem", "operator.pub", "server.key", "ca.key"))
    mutation = edited if name == "nodes.json" else _pem
    case[name] = mutation(rng, keys()[name], list(keys().values()))
    if rng.random() < 0.05:
        case[name] = rng.choice((Special("pipe"), Special("folder"), Special("sparse", "", 2**34), b""))
    return case


def _read_key(kind: Literal["ed25519", "ec"], private: bool) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        with folder_of({"key": data}) as folder:
            return (pki.load_private_key if private else pki.load_public_key)(folder / "key", kind)

    return read


def _read_certificate(data: bytes) -> object:
    with folder_of({"c": data, "ca": keys()["ca.pem"]}) as folder:
        found, ca = pki.load_certificate(folder / "c"), pki.load_certificate(folder / "ca")
    require(isinstance(found, x509.Certificate), "no certificate")
    names = pki.server_names(found)
    require(all(isinstance(n, str) for kind in names for n in kind), "a name that is no text")
    pki.require_valid(ca, ca=found, at=NOON, names=()) if data == keys()["ca.pem"] else None
    pki.require_valid(found, ca=ca, at=NOON, names=["server.test"])
    require(data.split() == keys()["server.pem"].split() or len(data) != 0, "an empty certificate")
    return found


# What lies on a disk


SECRET = bytes(range(32))
PLAIN = bytes(range(256)) * 9000  # three chunks


@cache
def sealed() -> bytes:
    return at_rest.seal(PLAIN, SECRET, "name")


def _chunks(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Chunks left out, doubled or in another order; or plain damage."""
    start, step = 20, at_rest.CHUNK + 16
    parts = [data[i : i + step] for i in range(start, len(data), step)]
    if rng.random() < 0.5:
        return damaged(rng, data, others)
    how = rng.randrange(4)
    if how == 0:
        rng.shuffle(parts)
    elif how == 1:
        parts.pop(rng.randrange(len(parts)))
    elif how == 2:
        parts.insert(rng.randrange(4), rng.choice(parts))
    else:
        parts[-1] = parts[-1][: rng.choice((0, 1, 15, 16, 17))]
    return data[:start] + b"".join(parts)


def _read_sealed(data: bytes) -> object:
    plain = at_rest.unseal(data, SECRET, "name")
    require(data == sealed() and plain == PLAIN, "a changed file was opened")
    return plain


def _read_secret(data: bytes) -> object:
    with folder_of({"key": data}) as folder:
        key = at_rest.key_from_file(folder / "key")
    again = at_rest.key_from_environment({at_rest.VARIABLE: data.decode(errors="surrogateescape")})
    require(key == again and len(key) == 32, "two keys in one text")
    return key


def _checkpoints(rng: random.Random) -> Case:
    data = encode_state(state())
    data = frame(rng, data, [data])
    if rng.random() < 0.8:
        data = hashlib.sha256(data).digest() + data
    case: Case = {f"round-{rng.choice((1, 7, 10**7)):06d}.flw": data, "round-000000.flw": b"", "round-x.flw": b""}
    if rng.random() < 0.1:
        case[rng.choice(("round-000009.flw", "round-٣٣٣٣٣٣.flw"))] = rng.choice(
            (Special("folder"), Special("link", "x"))
        )
    return case


def _read_checkpoint(case: Case) -> object:
    with folder_of(case) as folder:
        found = latest(folder)
    require(found is not None, "no checkpoint in a folder of some")
    return found


def _read_log(data: bytes) -> object:
    with folder_of({"metrics.jsonl": data}) as folder:
        return read_log(folder)


@cache
def memory() -> dict[str, bytes]:
    """The files of one client's folder, and of the pool beside it."""
    blocks = asks()[1][1].blocks
    with tempfile.TemporaryDirectory() as where:
        one = Memory(Path(where), "r", "c")
        one.remember(b"ask", b"answer")
        one.keep_arrays("moments", 1, {"m": np.ones((2, 3), np.float32), "step": np.array(2.0)})
        one.keep_blocks(blocks_id(blocks), blocks)
        return {p.relative_to(where).as_posix(): p.read_bytes() for p in Path(where).rglob("*") if p.is_file()}


def _memories(rng: random.Random) -> Case:
    case: Case = dict(memory())
    name = rng.choice(list(case))
    data = memory()[name]
    mutation: Mutation = damaged
    if name.endswith(".block"):
        mutation = frame
    elif "moments" in name:
        mutation = safetensors
    elif name.endswith("blocks"):
        mutation = edited
    case[name] = (
        rng.choice((mutation(rng, data, [data]), Special("folder")))
        if rng.random() < 0.1
        else mutation(rng, data, [data])
    )
    return case


def _read_memory(case: Case) -> object:
    blocks = asks()[1][1].blocks
    which = blocks_id(blocks)
    refusals: list[Exception] = []
    with folder_of(case) as folder:
        one = Memory(folder, "r", "c")
        for read in (lambda: one.recall(b"ask"), lambda: one.arrays("moments", 2), lambda: one.blocks(which)):
            try:
                got: Any = read()
            except (CheckpointError, BlocksMissing) as error:
                refusals.append(error)
                continue
            if isinstance(got, bytes):
                require(got == b"answer", "another answer than the one that was kept")
            if isinstance(got, tuple):
                require(blocks_id(got) == which, "other blocks than those that were kept")
        one.keep_blocks(which, blocks)  # sent again; they must be there now, unless the folder itself is in the way
        require(blocks_id(one.blocks(which)) == which, "blocks that were sent again are not there")
    if refusals:
        raise refusals[0]
    return one


def file_targets() -> list[Target]:
    own = keys()
    events: list[dict[str, Any]] = [
        {"event": "start", "run": "r", "method": "flora", "config": {"seed": 0}, "clients": [{"id": "c", "rank": 2}]},
        {"event": "round", "round": 1, "state": "a" * 64, "refused": [{"client": "c", "rule": "x", "detail": ""}]},
        {"event": "end", "seconds": 1.5},
    ]
    logs = [b"".join(json.dumps(e).encode() + b"\n" for e in events)]  # without a chain, as an older version wrote it
    with tempfile.TemporaryDirectory() as where:
        written = RunLog(Path(where))
        for event in events:
            written.append(event)
        logs.append(written.path.read_bytes())
    private = [own[n] for n in ("operator.key", "server.key", "ca.key", "nodes/one/auth.key", "nodes/one/signing.key")]
    public = [own[n] for n in ("operator.pub", "nodes/one/auth.pub", "nodes/one/signing.pub")]
    return [
        Target("pki/folder", _nodes, _read_nodes, (pki.PkiError,)),
        of_bytes("pki/private", private, [_pem], _read_key("ed25519", True), pki.PkiError),
        of_bytes("pki/private-ec", private, [_pem], _read_key("ec", True), pki.PkiError),
        of_bytes("pki/public", public, [_pem], _read_key("ed25519", False), pki.PkiError),
        of_bytes("pki/public-ec", public, [_pem], _read_key("ec", False), pki.PkiError),
        of_bytes("pki/certificate", [own["server.pem"], own["ca.pem"]], [_pem], _read_certificate, pki.PkiError),
        of_bytes("disk/sealed", [sealed()], [_chunks], _read_sealed, CheckpointError),
        of_bytes("disk/secret", [at_rest.new_key().encode() + b"\n"], [damaged], _read_secret, ConfigError),
        Target("disk/checkpoint", _checkpoints, _read_checkpoint, (CheckpointError,)),
        of_bytes("disk/log", logs, [lines], _read_log, CheckpointError),
        Target("disk/memory", _memories, _read_memory, (CheckpointError, BlocksMissing)),
    ]
