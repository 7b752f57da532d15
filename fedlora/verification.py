"""Whether a released folder is what somebody signed: `verify` runs every check and returns all that it found.

What a good report means: whoever holds the signing key released these files, with this history, and nothing was added,
taken away or changed since. What it does not mean: that the clients' data or their training were honest.

Nothing here runs code from the folder, follows a symbolic link out of it, or holds more than part of an array. A
folder that somebody changes while it is read proves nothing: copy it first.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedlora.adapter_files import check_adapter, opened, read_whole, reason
from fedlora.errors import CheckpointError
from fedlora.provenance import (
    ADAPTER_FILES,
    MANIFEST,
    MAX_BYTES,
    SIGNATURE,
    Base,
    File,
    Manifest,
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
_MAX_FILES: Final = 10_000
_MAX_TOTAL: Final = 2**36  # bytes of all files together


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
    data, wrong = read_whole(folder / MANIFEST, MAX_BYTES, _NO_MANIFEST)
    checks = [_signature(folder, data, keys)]
    manifest = None
    if data is not None:
        try:
            found = read_manifest(data)
            _require_size(found)
            manifest = found
        except CheckpointError as error:
            wrong = f"{MANIFEST}: {error}"
    if manifest is None:
        names = ("files", "other files", "adapter", "base", "rounds")
        return Report((Check(name="manifest", said="", findings=(wrong,)), *checks, *map(_not_read, names)))
    said = f"run {manifest.run}, {manifest.method}, privacy: {manifest.privacy}"
    checks.insert(0, Check(name="manifest", said=said))
    checks += [_files(folder, manifest), _other_files(folder, manifest)]
    folders = _folders(manifest)
    checks += [_adapter(folder, where, manifest, folders) for where in sorted(folders | manifest.ranks.keys())]
    checks += [_base(manifest.base, base_folder), _rounds(manifest)]
    return Report(tuple(checks))


def _require_size(manifest: Manifest) -> None:
    """What a manifest lists is read, so that must have an end. Raises: CheckpointError."""
    files, total = len(manifest.files), sum(file.bytes for file in manifest.files.values())
    if max(files, len(manifest.ranks)) > _MAX_FILES or total > _MAX_TOTAL:
        raise CheckpointError(
            f"it lists {files:,} files of {total:,} bytes together and {len(manifest.ranks):,} adapters; at most "
            f"{_MAX_FILES:,} and {_MAX_TOTAL:,} bytes are read"
        )


def _not_read(name: str) -> Check:
    return Check(name=name, said=f"not checked: there is no {MANIFEST} that can be read", done=False)


def _signature(folder: Path, manifest: bytes | None, keys: tuple[Ed25519PublicKey, ...]) -> Check:
    if manifest is None:
        return Check(name="signature", said=f"not checked: there is no {MANIFEST} to sign", done=False)
    data, wrong = read_whole(folder / SIGNATURE, MAX_BYTES, _UNSIGNED)
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
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != said.bytes:
                yield f"{name}: has {size:,} bytes, {said.bytes:,} were released"
            elif hashlib.file_digest(file, "sha256").hexdigest() != said.sha256:
                yield f"{name}: was changed: its SHA-256 is not the one listed"
    except FileNotFoundError:
        yield f"{name}: is missing"
    except OSError as error:
        yield f"{name}: cannot be read: {reason(error)}"


def _inside(folder: Path, name: str) -> Path | None:
    """The place of a listed file, if its name is one that a release has."""
    return folder / name if _PATH.fullmatch(name) else None


def _folders(manifest: Manifest) -> set[str]:
    return {name.rsplit("/", 1)[0] for name in manifest.files if _PATH.fullmatch(name)}


def _other_files(folder: Path, manifest: Manifest) -> Check:
    """Nothing unlisted beside a released file, nor at the top of the folder where a loader could take it."""
    findings: list[str] = []
    folders = _folders(manifest)
    roots = {where.split("/", 1)[0] for where in folders}
    known = folders | roots
    others: list[str] = []
    try:
        for root in sorted(roots):
            findings += _unlisted(folder / root, root, manifest, known)
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.name in roots or entry.name in (MANIFEST, SIGNATURE):
                continue
            others.append(entry.name)
            if entry.name in _LOADED or entry.name.endswith((".safetensors", *_PICKLES)):
                findings.append(f"{entry.name!r}: not listed, and could be loaded as a model from here")
    except OSError as error:
        findings.append(f"the folder cannot be read: {reason(error)}")
    said = f"none in {', '.join(sorted(roots))}"
    if others:
        said += f"; the manifest says nothing about {', '.join(map(repr, others[:8]))}"
        said += f" and {len(others) - 8} more" if len(others) > 8 else ""
    return Check(name="other files", said=said, findings=tuple(findings))


def _unlisted(path: Path, name: str, manifest: Manifest, folders: Set[str]) -> Iterator[str]:
    """`folders` are all that a released file lies in; no released file lies deeper than two, see `_PATH`."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        yield f"{name!r}: is a symbolic link"
    elif stat.S_ISDIR(mode):
        if name not in folders:
            yield f"{name!r}: a folder that is not listed"
            return
        for entry in sorted(os.listdir(path)):
            yield from _unlisted(path / entry, f"{name}/{entry}", manifest, folders)
    elif name.endswith(_PICKLES):
        yield f"{name!r}: a pickle or its like, which can run code when it is loaded"
    elif name not in manifest.files:
        yield f"{name!r}: not listed"
    elif path.name not in ADAPTER_FILES:
        yield f"{name!r}: no release has a file of this name"
    elif not stat.S_ISREG(mode):
        yield f"{name!r}: is not a plain file"


def _adapter(folder: Path, where: str, manifest: Manifest, folders: Set[str]) -> Check:
    """The weights have exactly the arrays that the config and the manifest speak of, in shape, and finite."""
    ranks, findings, said = manifest.ranks.get(where), [], ""
    if ranks is None:
        findings.append(f"{where}: {MANIFEST} does not state its ranks")
    if where not in folders:
        findings.append(f"{where!r:.200}: has no adapter that the manifest lists ({' and '.join(ADAPTER_FILES[1:])})")
        return Check(name=f"{where:.200}", said="", findings=tuple(findings))
    listed = [f"{where}/{name}" for name in ADAPTER_FILES[1:] if f"{where}/{name}" in manifest.files]
    linked = any((folder / part).is_symlink() for part in (where, *_parents(where)))
    if linked or len(listed) < 2:
        findings.append(f"{where!r:.200}: has no adapter that the manifest lists ({' and '.join(ADAPTER_FILES[1:])})")
        return Check(name=where, said="", findings=tuple(findings))
    try:
        size = manifest.files[f"{where}/adapter_model.safetensors"].bytes
        said, wrong = check_adapter(folder / where, manifest.base, ranks, size)
        findings += [f"{where}/{f}" for f in wrong]
    except CheckpointError as error:
        findings.append(f"{where}: {error}")
    return Check(name=where, said=said, findings=tuple(findings))


def _parents(where: str) -> list[str]:
    return [p.as_posix() for p in Path(where).parents if p.name]


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
