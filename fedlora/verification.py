"""Whether a released folder is what somebody signed: `verify` runs every check and returns all that it found.

What a good report means: whoever holds the signing key released these files, with this history, and nothing was added,
taken away or changed since. What it does not mean: that the clients' data or their training were honest.

Nothing here runs code from the folder, follows a symbolic link out of it, or holds more than one array in memory. A
folder that somebody changes while it is read proves nothing: copy it first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError, safe_open

from fedlora.errors import CheckpointError
from fedlora.provenance import (
    ADAPTER_FILES,
    MANIFEST,
    MAX_BYTES,
    SIGNATURE,
    Base,
    File,
    Manifest,
    Ranks,
    base_files,
    chained,
    read_manifest,
    read_signature,
    verify_signature,
)

__all__ = ["Check", "Report", "verify"]

_NO_MANIFEST: Final = f"there is no {MANIFEST}: nothing says where this came from"
_UNSIGNED: Final = f"unsigned: there is no {SIGNATURE}, and anybody could have written {MANIFEST}"
_PATH: Final = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,127}/){1,2}[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_PICKLES: Final = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
_LOADED: Final = ("adapter_config.json", "config.json")  # names that make a folder loadable
_PREFIX: Final = "base_model.model."
_SIDES: Final = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_MAX_CONFIG: Final = 2**20  # bytes of adapter_config.json
_MAX_HEADER: Final = 2**24  # bytes of a safetensors header
_SETTINGS: Final[Mapping[str, object]] = {
    "auto_mapping": None,  # names a Python module that PEFT imports
    "bias": "none",
    "init_lora_weights": True,  # some others change the base
    "layer_replication": None,
    "lora_bias": False,
    "peft_type": "LORA",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}  # of adapter_config.json, where W = W0 + B A


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: `findings` say what is wrong, `said` what was found where nothing is. Not `done`: said tells why."""

    name: str
    said: str
    findings: tuple[str, ...] = ()
    done: bool = True


@dataclass(frozen=True)
class Report:
    """All checks of a folder, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        return tuple(f for check in self.checks for f in check.findings)

    @property
    def verified(self) -> bool:
        """Whether a trusted key signed this, and nothing is wrong with it."""
        signed = any(check.name == "signature" and check.done for check in self.checks)
        return signed and not self.findings


def verify(folder: Path, keys: Iterable[Ed25519PublicKey], *, base_folder: Path | None = None) -> Report:
    """Check a run folder, or a copy of its manifest, signature and released folders.

    `keys` are whom the caller trusts; without any, nothing can be verified. With `base_folder` the base in it is
    compared, by its fingerprint. Damage is a finding, never an exception. Cost: one read of the files, and of the base.
    """
    keys = tuple(keys)
    data, wrong = _read(folder / MANIFEST, MAX_BYTES, _NO_MANIFEST)
    checks = [_signature(folder, data, keys)]
    manifest = None
    if data is not None:
        try:
            manifest = read_manifest(data)
        except CheckpointError as error:
            wrong = f"{MANIFEST}: {error}"
    if manifest is None:
        names = ("files", "other files", "adapter", "base", "rounds")
        return Report((Check(name="manifest", said="", findings=(wrong,)), *checks, *map(_not_read, names)))
    said = f"run {manifest.run}, {manifest.method}, privacy: {manifest.privacy}"
    checks.insert(0, Check(name="manifest", said=said))
    checks += [_files(folder, manifest), _other_files(folder, manifest)]
    checks += [_adapter(folder, where, manifest) for where in sorted(_folders(manifest) | manifest.ranks.keys())]
    checks += [_base(manifest.base, base_folder), _rounds(manifest)]
    return Report(tuple(checks))


def _not_read(name: str) -> Check:
    return Check(name=name, said=f"not checked: there is no {MANIFEST} that can be read", done=False)


def _read(path: Path, limit: int, missing: str) -> tuple[bytes | None, str]:
    """The bytes of a file of at most `limit`, or what is wrong."""
    try:
        with _opened(path) as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None, missing
    except OSError as error:
        return None, f"{path.name} cannot be read: {_reason(error)}"
    if len(data) > limit:
        return None, f"{path.name} is larger than {limit:,} bytes"
    return data, ""


def _opened(path: Path) -> Any:
    """A regular file, open for reading; no link, pipe or device. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a plain file")
    return os.fdopen(descriptor, "rb")


def _reason(error: OSError) -> str:
    return "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror or error)


def _signature(folder: Path, manifest: bytes | None, keys: tuple[Ed25519PublicKey, ...]) -> Check:
    if manifest is None:
        return Check(name="signature", said=f"not checked: there is no {MANIFEST} to sign", done=False)
    data, wrong = _read(folder / SIGNATURE, MAX_BYTES, _UNSIGNED)
    said = None
    if data is not None:
        try:
            said = read_signature(data)
        except CheckpointError as error:
            wrong = f"{SIGNATURE}: {error}"
    if said is None:
        return Check(name="signature", said="", findings=(wrong,))
    if not keys:
        return Check(
            name="signature",
            said="",
            findings=(
                f"signed by a key ({said.key[:16]}), but no public key was given to check it with: get the signer's "
                "key from the signer, not from where the files came from",
            ),
        )
    fault = verify_signature(manifest, said, keys)
    return Check(
        name="signature",
        said=f"by key {said.key[:16]} at {said.created}",
        findings=() if fault is None else (fault,),
    )


def _files(folder: Path, manifest: Manifest) -> Check:
    findings = [f for name, file in sorted(manifest.files.items()) for f in _file(folder, name, file)]
    if not manifest.files:
        findings.append(f"{MANIFEST} lists no file: it releases nothing")
    total = sum(file.bytes for file in manifest.files.values())
    return Check(
        name="files", said=f"{len(manifest.files)} files, {total:,} bytes, as listed", findings=tuple(findings)
    )


def _file(folder: Path, name: str, said: File) -> Iterator[str]:
    path = _inside(folder, name)
    if path is None:
        yield f"{name!r:.200}: such a path has no released file (it could lead out of the folder)"
        return
    try:
        for part in reversed(path.relative_to(folder).parents[:-1]):
            if (folder / part).is_symlink():
                yield f"{name}: {part.as_posix()} is a symbolic link"
                return
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != said.bytes:
                yield f"{name}: has {size:,} bytes, {said.bytes:,} were released"
            elif hashlib.file_digest(file, "sha256").hexdigest() != said.sha256:
                yield f"{name}: was changed: its SHA-256 is not the one listed"
    except FileNotFoundError:
        yield f"{name}: is missing"
    except OSError as error:
        yield f"{name}: cannot be read: {_reason(error)}"


def _inside(folder: Path, name: str) -> Path | None:
    """The place of a listed file, if its name is one that a release has."""
    return folder / name if _PATH.fullmatch(name) else None


def _folders(manifest: Manifest) -> set[str]:
    return {name.rsplit("/", 1)[0] for name in manifest.files if _PATH.fullmatch(name)}


def _other_files(folder: Path, manifest: Manifest) -> Check:
    """Nothing unlisted beside a released file, nor at the top of the folder where a loader could take it."""
    findings: list[str] = []
    roots = {where.split("/", 1)[0] for where in _folders(manifest)}
    others: list[str] = []
    try:
        for root in sorted(roots):
            findings += _unlisted(folder / root, root, manifest)
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.name in roots or entry.name in (MANIFEST, SIGNATURE):
                continue
            others.append(entry.name)
            if entry.name in _LOADED or entry.name.endswith((".safetensors", *_PICKLES)):
                findings.append(f"{entry.name!r}: not listed, and could be loaded as a model from here")
    except OSError as error:
        findings.append(f"the folder cannot be read: {_reason(error)}")
    said = f"none in {', '.join(sorted(roots))}"
    if others:
        said += f"; the manifest says nothing about {', '.join(map(repr, others[:8]))}"
        said += f" and {len(others) - 8} more" if len(others) > 8 else ""
    return Check(name="other files", said=said, findings=tuple(findings))


def _unlisted(path: Path, name: str, manifest: Manifest) -> Iterator[str]:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        yield f"{name!r}: is a symbolic link"
    elif stat.S_ISDIR(mode):
        if not any(file.startswith(f"{name}/") for file in manifest.files):
            yield f"{name!r}: a folder that is not listed"
            return
        for entry in sorted(os.listdir(path)):
            yield from _unlisted(path / entry, f"{name}/{entry}", manifest)
    elif name.endswith(_PICKLES):
        yield f"{name!r}: a pickle or its like, which can run code when it is loaded"
    elif name not in manifest.files:
        yield f"{name!r}: not listed"
    elif path.name not in ADAPTER_FILES:
        yield f"{name!r}: no release has a file of this name"
    elif not stat.S_ISREG(mode):
        yield f"{name!r}: is not a plain file"


def _adapter(folder: Path, where: str, manifest: Manifest) -> Check:
    """The weights have exactly the arrays that the config and the manifest speak of, in shape, and finite."""
    ranks, findings, said = manifest.ranks.get(where), [], ""
    if ranks is None:
        findings.append(f"{where}: {MANIFEST} does not state its ranks")
    listed = [f"{where}/{name}" for name in ADAPTER_FILES[1:] if f"{where}/{name}" in manifest.files]
    linked = any((folder / part).is_symlink() for part in (where, *_parents(where)) if where in _folders(manifest))
    if linked or where not in _folders(manifest) or len(listed) < 2:
        findings.append(f"{where!r:.200}: has no adapter that the manifest lists ({' and '.join(ADAPTER_FILES[1:])})")
        return Check(name=where, said="", findings=tuple(findings))
    try:
        config = _config(folder / where / "adapter_config.json")
        findings += [f"{where}/adapter_config.json: {f}" for f in _settings(config, manifest.base)]
        said, wrong = _weights(folder / where / "adapter_model.safetensors", config, ranks)
        findings += [f"{where}/adapter_model.safetensors: {f}" for f in wrong]
    except CheckpointError as error:
        findings.append(f"{where}: {error}")
    return Check(name=where, said=said, findings=tuple(findings))


def _parents(where: str) -> list[str]:
    return [p.as_posix() for p in Path(where).parents if p.name]


def _config(path: Path) -> dict[str, Any]:
    data, wrong = _read(path, _MAX_CONFIG, f"{path.name} is missing")
    if data is None:
        raise CheckpointError(wrong)
    try:
        config = json.loads(data, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {str(error)[:200]}") from None
    names = ("target_modules", "modules_to_save")
    patterns = ("rank_pattern", "alpha_pattern")
    if (
        not isinstance(config, dict)
        or not all(_strings(config.get(key) or []) for key in names)
        or not all(isinstance(config.get(key) or {}, dict) for key in patterns)
        or type(config.get("r")) is not int
    ):
        raise CheckpointError(f"{path.name}: {', '.join((*names, *patterns))} or r is not what fedlora writes")
    return config


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there more than once")
    return dict(pairs)


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _settings(config: Mapping[str, Any], base: Base) -> Iterator[str]:
    for key, wanted in _SETTINGS.items():
        if config.get(key, wanted) != wanted or (key == "peft_type" and key not in config):
            yield f"{key} is {config.get(key)!r:.80}; the adapter is W0 + B A only with {wanted!r}"
    if config.get("lora_alpha") != config["r"] or (config.get("alpha_pattern") or {}) != _pattern(config):
        yield "alpha is not the rank everywhere: it scales the adapter"
    if (came := config.get("base_model_name_or_path")) != base.name:
        yield f"its base is {came!r:.200}, the manifest's is {base.name!r:.200}"


def _pattern(config: Mapping[str, Any]) -> Mapping[str, Any]:
    pattern: Mapping[str, Any] = config.get("rank_pattern") or {}
    return pattern


def _weights(path: Path, config: Mapping[str, Any], ranks: Ranks | None) -> tuple[str, list[str]]:
    """What the weights hold, and what is wrong with them. Raises: CheckpointError if they cannot be read at all."""
    try:
        with _opened(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MAX_HEADER:
            raise CheckpointError(f"{path.name}: a header of {header:,} bytes, at most {_MAX_HEADER:,} are read")
        with safe_open(path, framework="np") as tensors:
            shapes: dict[str, tuple[int, ...]] = {}
            findings: list[str] = []
            for key in tensors.keys():  # noqa: SIM118 (safe_open has no __iter__)
                part = tensors.get_slice(key)
                shapes[key] = tuple(part.get_shape())
                if part.get_dtype() != "F32":
                    findings.append(f"{key!r:.200} is {part.get_dtype()}, a release is F32")
                elif not np.isfinite(tensors.get_tensor(key)).all():
                    findings.append(f"{key!r:.200} has values that are not finite")
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {_reason(error)}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name} is no safetensors file: {str(error)[:200]}") from None
    found = _found_ranks(shapes, config, findings)
    stated = Ranks(smallest=min(found, default=0), largest=max(found, default=0), modules=len(found))
    if ranks is not None and stated != ranks:
        findings.append(f"{_say(stated)}; the manifest says {_say(ranks)}")
    return f"{_say(stated)}, all finite", findings


def _found_ranks(shapes: dict[str, tuple[int, ...]], config: Mapping[str, Any], findings: list[str]) -> list[int]:
    """The rank of each target module; `findings` gains what does not fit the config."""
    found: list[int] = []
    left = dict(shapes)
    pattern = dict(_pattern(config))
    for name in config.get("target_modules") or []:
        keys = next((k for s in _SIDES if (k := _keys(name, s))[0] in left or k[1] in left), _keys(name, _SIDES[0]))
        a, b = (left.pop(key, None) for key in keys)
        rank = pattern.pop("^" + re.escape(name), config["r"])
        if a is None or b is None:
            findings.append(f"{name!r:.200}, a target module, has not both factors, or is named twice")
            continue
        found.append(a[0] if a else 0)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            findings.append(f"{name!r:.200}: A {a} and B {b}, the config says rank {rank!r:.40}")
    saved = config.get("modules_to_save") or []
    for key in left:
        if not any(f"{key}.".startswith(f"{_PREFIX}{module}.") for module in saved):
            findings.append(f"{key!r:.200} belongs to no target module and to none that is saved whole")
    for module in saved:
        if not any(f"{key}.".startswith(f"{_PREFIX}{module}.") for key in left):
            findings.append(f"{module!r:.200} should be saved whole, and is not there")
    findings += [f"rank_pattern {key!r:.200} is of no target module" for key in pattern]
    return found


def _keys(name: str, sides: tuple[str, str]) -> tuple[str, str]:
    return f"{_PREFIX}{name}.{sides[0]}", f"{_PREFIX}{name}.{sides[1]}"


def _say(ranks: Ranks) -> str:
    span = f"{ranks.smallest}" if ranks.smallest == ranks.largest else f"{ranks.smallest} to {ranks.largest}"
    return f"{ranks.modules} modules of rank {span}"


def _base(said: Base, folder: Path | None) -> Check:
    if folder is None:
        return Check(
            name="base",
            said=f"not checked: {said.name} with fingerprint {said.fingerprint[:16]} (give its folder)",
            done=False,
        )
    try:
        from fedlora.fingerprint import fingerprint

        came = fingerprint(folder)
        if came == said.fingerprint:
            return Check(name="base", said=f"{said.name}: weights, config and tokenizer are those trained on")
        finding = f"{folder}: its fingerprint is {came[:16]}, trained on was {said.fingerprint[:16]}"
        if said.files is not None:
            now = base_files(folder)
            differ = sorted(n for n in said.files.keys() | now.keys() if said.files.get(n) != now.get(n))
            finding += f"; these files differ: {', '.join(map(repr, differ[:8]))}"
    except Exception as error:  # whatever a damaged base makes its readers raise
        finding = f"{folder}: no base can be read there: {str(error)[:200]}"
    return Check(name="base", said="", findings=(finding,))


def _rounds(manifest: Manifest) -> Check:
    findings = [
        f"round {one.round} stands where round {number} should be"
        for number, one in enumerate(manifest.rounds, 1)
        if one.round != number
    ]
    told = (said.chain for said in manifest.rounds)
    broken = (n for n, (chain, right) in enumerate(zip(told, _links(manifest), strict=True), 1) if chain != right)
    if (first := next(broken, None)) is not None:
        findings.append(f"the chain of rounds is broken at its link {first}: the history was changed")
    count = len(manifest.rounds)
    refused = sum(n for one in manifest.rounds for n in one.refused.values())
    said = f"{count} rounds in one chain, {refused} answers refused" if count else "none are recorded"
    return Check(name="rounds", said=said, findings=tuple(findings))


def _links(manifest: Manifest) -> list[str]:
    return [one.chain for one in chained(manifest.origin, manifest.rounds)]
