"""Where a released adapter comes from: `manifest.json`, canonical, and `manifest.sig`, its detached signature.

**Canonical JSON.** UTF-8 without a byte order mark, no white space, each key once, keys in the order of their UTF-16
code units, strings escaped only where JSON asks for it, whole numbers of magnitude below 2^53 and no others: RFC 8785
without its fractions. Larger whole numbers and seeds are strings of decimal digits; a real number would be a string as
Python's `repr` writes it. A file in any other form is refused, so a manifest has one byte string and no other.

**Chain of rounds.** h_0 = SHA-256(canonical(what the run is: `ORIGIN`)), h_i = SHA-256(h_{i-1} || canonical(round_i)),
the digests as 32 bytes, round_i without its own `chain`. `state` of a round is the SHA-256 of the checkpoint's encoding
of the state after it, *without* the memory (moments of the server, who holds what, counts of refusals): that is what
the adapter is made of, and the same whether or not the run was interrupted. The name of no client is in a manifest.

**Signature.** Ed25519 (RFC 8032) over "fedlora-manifest/2" NUL `created` NUL and the bytes of manifest.json. The time
of signing stands in manifest.sig and is signed with it: releases of equal runs have equal manifests. Who verifies
brings the public key; the file only names it, by the SHA-256 of its 32 bytes (`fedlora.pki.node_id`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlora.adapter import Adapter
from fedlora.code import code_digest
from fedlora.config import RunConfig, to_toml
from fedlora.errors import CheckpointError, WireError
from fedlora.frame import from_json
from fedlora.pki import node_id
from fedlora.state import GlobalState
from fedlora.wire import encode_state

__all__ = [
    "ADAPTER_FILES",
    "MANIFEST",
    "SIGNATURE",
    "Base",
    "Code",
    "File",
    "Manifest",
    "Public",
    "Ranks",
    "Round",
    "Signature",
    "base_files",
    "canonical",
    "chained",
    "describe",
    "list_files",
    "parse",
    "ranks_of",
    "read_manifest",
    "read_signature",
    "rounds_of",
    "sign",
    "signature",
    "state_digest",
    "utc_now",
    "verify_signature",
]

FORMAT: Final = "fedlora-manifest/2"
MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
ADAPTER_FILES: Final = ("README.md", "adapter_config.json", "adapter_model.safetensors")  # all that a folder may hold
ORIGIN: Final = ("format", "run", "method", "settings", "base")  # fields of the manifest that h_0 is made of
MAX_BYTES: Final = 8 * 2**20  # of a manifest
MAX_VALUES: Final = 2**19  # in it; some 40,000 rounds
MAX_DEPTH: Final = 32
_LARGEST: Final = 2**53 - 1
_CREATED: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_RULE: Final = re.compile(r"[A-Za-z][A-Za-z -]{0,63}", re.ASCII)
_DISTRIBUTIONS: Final = ("fedlora", "flwr", "numpy", "peft", "safetensors", "torch")
_BASE_FILES: Final = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True, kw_only=True)
class File:
    """One released file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """The frozen base. `fingerprint` is over weights, config and tokenizer (`fedlora.fingerprint`) and decides; `files`
    has the SHA-256 of each file as it lay on the releasing machine, None where that had no base."""

    name: str
    revision: str | None
    fingerprint: str
    files: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Of one released adapter folder: ranks of its modules, and how many there are."""

    smallest: int
    largest: int
    modules: int


@dataclass(frozen=True, kw_only=True)
class Public:
    """What is public of a task's A: the seed it follows from, and the rows of the public basis that it lies in."""

    seed: str | None  # decimal digits
    basis: str | None = None  # "seed:start:rows", decimal digits


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: how many clients' answers it holds (None: private), the state after it, refusals by rule, its link."""

    round: int
    participants: int | None
    state: str
    refused: Mapping[str, int]
    chain: str = ""


@dataclass(frozen=True, kw_only=True)
class Code:
    """What ran: the digest of the code, versions of the packages that computed, SHA-256 of constraints.txt."""

    digest: str
    versions: Mapping[str, str | None]
    constraints: str | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is signed. `ranks` and `files` are by path from the run folder, `public` by name of task."""

    format: Literal["fedlora-manifest/2"]
    run: str
    method: str
    settings: str  # SHA-256 of config.toml
    base: Base
    ranks: Mapping[str, Ranks]
    public: Mapping[str, Public]
    rounds: tuple[Round, ...]
    privacy: str
    code: Code
    files: Mapping[str, File] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The one byte string of this manifest."""
        return canonical(asdict(self))

    @property
    def origin(self) -> dict[str, Any]:
        """What the first link of the chain of rounds is made of."""
        whole = asdict(replace(self, rounds=(), files={}))
        return {name: whole[name] for name in ORIGIN}


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The content of manifest.sig; `key` is the id of the key, `signature` base64 of 64 bytes."""

    format: Literal["fedlora-signature/1"]
    algorithm: Literal["Ed25519"]
    key: str
    created: str  # ISO 8601, UTC, whole seconds
    signature: str


def canonical(value: object) -> bytes:
    """The one byte string of a JSON value, see above.

    Raises: CheckpointError for a value that has none: a float, a huge number, half a surrogate pair, a key that is no
    string, more than `MAX_DEPTH` levels.
    """
    try:
        return json.dumps(_ordered(value, 0), ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"canonical JSON: {error.object[:40]!r} is no Unicode text") from None


def _ordered(value: object, depth: int) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        if abs(value) > _LARGEST:
            raise CheckpointError(f"canonical JSON: {value.bit_length()} bits, 53 are exact; write a string of digits")
        return value
    if depth == MAX_DEPTH:
        raise CheckpointError(f"canonical JSON: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list | tuple):
        return [_ordered(x, depth + 1) for x in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise CheckpointError("canonical JSON: every key is a string")
        return {key: _ordered(value[key], depth + 1) for key in sorted(value, key=lambda k: k.encode("utf-16-be"))}
    raise CheckpointError(f"canonical JSON: {value!r:.60} is a {type(value).__name__}; write a real number as a string")


def parse(data: bytes) -> Any:
    """The value of canonical JSON. Memory: at most some 200 bytes for each of `MAX_VALUES` values.

    Raises: CheckpointError for anything else: too large, no UTF-8, no JSON, a key twice, a fraction or huge number,
    too deep, or the right value in another form.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"it has {len(data):,} bytes, at most {MAX_BYTES:,} are read")
    if sum(data.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_VALUES:
        raise CheckpointError(f"it has more than {MAX_VALUES:,} values")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_each_once,
            parse_int=_whole,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:  # no UTF-8 and no JSON are ValueErrors
        raise CheckpointError(f"it is not JSON in UTF-8: {str(error)[:200]}") from None
    if canonical(value) != data:
        raise CheckpointError("it is not in canonical form: it was edited, or another program wrote it")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise CheckpointError(f"the key {twice!r:.80} is there more than once")
    return values


def _whole(digits: str) -> int:
    if len(digits) > 17:
        raise CheckpointError(f"a number of {len(digits)} digits: 53 bits are exact")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise CheckpointError(f"the number {text[:40]}: only whole numbers are exact")


def read_manifest(data: bytes) -> Manifest:
    """The manifest in `data`. Raises: CheckpointError saying what is wrong with it."""
    value = parse(data)
    if isinstance(value, dict) and value.get("format") != FORMAT:
        raise CheckpointError(f"its format is {value.get('format')!r:.60}; this fedlora reads {FORMAT!r}")
    try:
        found: Manifest = from_json(Manifest, value, "manifest")
    except WireError as error:
        raise CheckpointError(str(error)) from None
    return found


def read_signature(data: bytes) -> Signature:
    """The content of a manifest.sig. Raises: CheckpointError saying what is wrong with it."""
    try:
        found: Signature = from_json(Signature, parse(data), "signature")
    except WireError as error:
        raise CheckpointError(str(error)) from None
    _require_created(found.created)
    return found


def chained(origin: Mapping[str, Any], rounds: Iterable[Round]) -> tuple[Round, ...]:
    """The rounds with their links; what `chain` held before does not count."""
    link = hashlib.sha256(canonical(origin)).digest()
    done: list[Round] = []
    for one in rounds:
        said = {key: value for key, value in asdict(one).items() if key != "chain"}
        link = hashlib.sha256(link + canonical(said)).digest()
        done.append(replace(one, chain=link.hex()))
    return tuple(done)


def state_digest(state: GlobalState) -> str:
    """SHA-256, hexadecimal, of the encoding of a state without its memory: layout, tasks, pairs, blocks and heads.

    Cost: one copy of the arrays, and some 0.5 s a GB.
    """
    return hashlib.sha256(encode_state(replace(state, memory={}))).hexdigest()


def rounds_of(events: Sequence[Mapping[str, Any]]) -> list[Round]:
    """The rounds of a run log (`fedlora.report.log.read_log`), not yet chained.

    A rule of refusal that is more than a few plain words, which a client can cause, counts as `other`.
    Raises: CheckpointError for a round without the hash of its state, or rounds that do not count from 1.
    """
    found: list[Round] = []
    for event in events:
        if event["event"] != "round":
            continue
        number = event["round"]
        if number != len(found) + 1:
            raise CheckpointError(f"the run log has round {number} where {len(found) + 1} should be; restore it")
        if "state" not in event:
            raise CheckpointError(
                f"the run log has no hash of the state after round {number}: an older fedlora wrote it; end the run "
                "with that version, or start it anew"
            )
        rules = (r["rule"] if _RULE.fullmatch(r["rule"]) else "other" for r in event.get("refused", ()))
        found.append(
            Round(
                round=number,
                participants=len({c["id"] for c in event["clients"]}) if "clients" in event else None,
                state=event["state"],
                refused=dict(Counter(rules)),
            )
        )
    return found


def ranks_of(adapter: Adapter) -> Ranks:
    """Ranks of what is written: modules of rank 0 are left out of a PEFT folder."""
    ranks = [r for r in adapter.ranks.values() if r]
    return Ranks(smallest=min(ranks, default=0), largest=max(ranks, default=0), modules=len(ranks))


def describe(
    state: GlobalState,
    config: RunConfig,
    *,
    run: str,
    ranks: Mapping[str, Ranks],
    events: Sequence[Mapping[str, Any]],
    base_folder: Path | None = None,
    privacy: str | None = None,
) -> Manifest:
    """The manifest of a run's final state, but for its files; `ranks` by folder, `events` of the run log.

    With `base_folder` the hashes of the base's files are recorded, unless it holds another base.
    Raises: CheckpointError as `rounds_of`, or if a file of `base_folder` cannot be read; ConfigError if it is no base.
    """

    def public(seed: int | None) -> str | None:
        return None if seed is None else str(seed)

    manifest = Manifest(
        format=FORMAT,
        run=run,
        method=config.method.name,
        settings=hashlib.sha256(to_toml(config).encode()).hexdigest(),
        base=Base(
            name=config.model.name,
            revision=config.model.revision,
            fingerprint=state.base,
            files=None if base_folder is None else _files_of(base_folder, state.base),
        ),
        ranks=ranks,
        public={
            task.name: Public(
                seed=public(task.public_seed),
                basis=None
                if task.subspace is None or task.subspace.seed is None
                else f"{task.subspace.seed}:{task.subspace.start}:{task.subspace.dim}",
            )
            for task in state.tasks.values()
        },
        rounds=(),
        privacy=privacy or "none claimed",
        code=Code(
            digest=code_digest(), versions={name: _version(name) for name in _DISTRIBUTIONS}, constraints=_constraints()
        ),
    )
    return replace(manifest, rounds=chained(manifest.origin, rounds_of(events)))


def _files_of(base: Path, trained_on: str) -> dict[str, str] | None:
    """The hashes of a base's files, if it is the one that was trained on."""
    from fedlora.fingerprint import fingerprint

    return base_files(base) if fingerprint(base) == trained_on else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _constraints() -> str | None:
    """SHA-256 of the constraints.txt beside the package: of a checkout; an installed wheel has none."""
    path = Path(__file__).resolve().parents[1] / "constraints.txt"
    return _sha256(path).sha256 if path.is_file() else None


def base_files(folder: Path) -> dict[str, str]:
    """File -> SHA-256 of the weights, config and tokenizer in a base's folder.

    Cost: one read of the weights. Raises: CheckpointError if one cannot be read.
    """
    return {p.name: _sha256(p).sha256 for p in sorted({p for form in _BASE_FILES for p in folder.glob(form)})}


def list_files(folder: Path, trees: Iterable[Path]) -> dict[str, File]:
    """Path from `folder` -> size and hash of every file in `trees`, which are folders in it.

    Raises: CheckpointError for a file that no release has, or one that cannot be read.
    """
    found: dict[str, File] = {}
    for path in sorted(path for tree in trees for path in tree.iterdir()):
        name = path.relative_to(folder).as_posix()
        if path.name not in ADAPTER_FILES or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} does not belong to a release, and would be signed with it: take it away")
        found[name] = _sha256(path)
    return found


def _sha256(path: Path) -> File:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return File(sha256=digest.hexdigest(), bytes=file.tell())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def utc_now() -> datetime:
    return datetime.now(UTC)


def signature(manifest: bytes, key: Ed25519PrivateKey, *, now: Callable[[], datetime] = utc_now) -> bytes:
    """The manifest.sig for the bytes of a manifest. Equal bytes, key and second give equal signatures.

    Raises: CheckpointError if `manifest` is not one.
    """
    read_manifest(manifest)
    created = now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    _require_created(created)
    said = Signature(
        format="fedlora-signature/1",
        algorithm="Ed25519",
        key=node_id(key.public_key()),
        created=created,
        signature=base64.b64encode(key.sign(_signed(created, manifest))).decode(),
    )
    return canonical(asdict(said))


def sign(folder: Path, key: Ed25519PrivateKey, *, now: Callable[[], datetime] = utc_now) -> Path:
    """Write manifest.sig for the manifest.json of `folder`; it says nothing about the files, which `verify` checks.

    Raises: CheckpointError if there is no manifest, it is damaged, or the disk refuses (an old signature stays).
    """
    path, partial = folder / SIGNATURE, folder / f".{SIGNATURE}.partial"
    try:
        data = signature((folder / MANIFEST).read_bytes(), key, now=now)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be signed: {error.strerror or error}: {error.filename}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be signed: {error}") from None
    return path


def verify_signature(manifest: bytes, said: Signature, keys: Iterable[Ed25519PublicKey]) -> str | None:
    """What is wrong with a signature, in words; None if one of `keys` made it for exactly these bytes."""
    pinned = {node_id(key): key for key in keys}
    if said.key not in pinned:
        return f"signed by a key ({said.key[:16]}) that is not among those you trust ({_shortened(pinned)})"
    try:
        raw = base64.b64decode(said.signature, validate=True)
        if base64.b64encode(raw).decode() != said.signature:
            return "the signature is not in the one form that base64 has for it"
        pinned[said.key].verify(raw, _signed(said.created, manifest))
    except (binascii.Error, ValueError, InvalidSignature):
        return f"the signature does not fit {MANIFEST}: one of the two was changed after it was signed"
    return None


def _signed(created: str, manifest: bytes) -> bytes:
    return b"\0".join([FORMAT.encode(), created.encode(), manifest])


def _require_created(created: str) -> None:
    if not _CREATED.fullmatch(created):
        raise CheckpointError(f"signature.created must be like 2026-01-31T09:30:00Z, got {created!r:.60}")


def _shortened(ids: Iterable[str]) -> str:
    return ", ".join(sorted(i[:16] for i in ids)) or "none"
