"""What a client keeps between messages, on disk: its last answer, the blocks it was sent, and where a plan asks for it
its optimiser's moments, parts that stay with it, and what its codec left out.

Flower's context is not trusted to survive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlora.errors import BlocksMissing, CheckpointError, WireError
from fedlora.state import Block
from fedlora.wire import decode_block, digests_id, encode_block

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = 32  # bytes


class Memory:
    """One client's folder, keyed by fedlora's run id and the client's stable id; nobody else may read it.

    It holds the last answer with the digests of that and of the ask that it answered, so that the same question, asked
    again after a crash, gets the same bytes without training twice.
    """

    def __init__(self, root: Path, run: str, client: str) -> None:
        self._folder = root / folder_name(run) / folder_name(client)

    def recall(self, ask: bytes) -> bytes | None:
        """The answer given to exactly this ask, or None, also where a crash tore what was kept.

        Raises: CheckpointError if there is something that cannot be read.
        """
        path = self._folder / "answer"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; mend that") from error
        answer = data[2 * _DIGEST :]
        kept = data[: 2 * _DIGEST]
        return answer if kept == hashlib.sha256(ask).digest() + hashlib.sha256(answer).digest() else None

    def remember(self, ask: bytes, answer: bytes) -> None:
        """Keep `answer` for `ask`, in place of the one before; whole or not at all.

        Raises: CheckpointError if the disk refuses; the one before is intact.
        """
        self._write("answer", hashlib.sha256(ask).digest() + hashlib.sha256(answer).digest() + answer)

    def durable(self, name: str) -> bytes | None:
        """What `keep_durable` kept last under `name`; None before. Raises: CheckpointError if it cannot be read."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self._folder / name} cannot be read: {error.strerror}; mend that") from error

    def keep_durable(self, name: str, data: bytes) -> None:
        """Keep `data`, whole or not at all; returns once it is on the disk. Raises: CheckpointError if that refuses."""
        self._write(name, data, sync=True)

    def last_round(self) -> int:
        """The last round that was noted; 0 before the first. Raises: CheckpointError if what was kept is damaged."""
        try:
            return int((self._folder / "round").read_text())
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._folder / 'round'} cannot be read: {error}; delete it to go on") from error

    def note_round(self, round_: int) -> None:
        """Keep the number of the round that is being answered. Raises: CheckpointError if the disk refuses."""
        self._write("round", str(round_).encode())

    def arrays(self, name: str, round_: int) -> dict[str, NDArray[np.floating]]:
        """What was kept under `name` after this client's last round before `round_`; empty if there was none.

        Raises: CheckpointError if the file is damaged.
        """
        before = [path for number, path in self._kept(name) if number < round_]
        if not before:
            return {}
        try:
            return dict(load(before[-1].read_bytes()))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{before[-1]} cannot be read: {error}. Delete the file to begin without what it kept."
            ) from error

    def keep_arrays(self, name: str, round_: int, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        """Keep named arrays after `round_`, and those of one round before, which a repeated round starts from.

        Raises: CheckpointError if the disk refuses.
        """
        self._write(f"{name}-{round_:06d}", save({k: np.array(x, order="C") for k, x in arrays.items()}))
        for _, path in self._kept(name)[:-2]:
            path.unlink(missing_ok=True)

    def _kept(self, name: str) -> list[tuple[int, Path]]:
        found = self._folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9][0-9]")
        return sorted((int(path.name.removeprefix(f"{name}-")), path) for path in found)

    def blocks(self, which: str) -> tuple[Block, ...]:
        """The blocks held under the id `which`, in order.

        Raises: BlocksMissing if this client does not hold them (any longer), or a file of them is damaged.
        """
        try:
            digests = self._lists()[which]
            if digests_id(digests) != which:
                raise WireError("their list was changed")
            return tuple(self._block(digest) for digest in digests)
        except (OSError, ValueError, KeyError, WireError) as error:
            raise BlocksMissing(f"the blocks {which[:12]} are not held here ({error!r}); send them again") from error

    def keep_blocks(self, which: str, blocks: Sequence[Block]) -> None:
        """Hold `blocks` under the id `which`, beside those held before; the ones before these are let go.

        A block is one file for all clients of this folder: each holds it by a link, and with its last link it goes.
        Raises: CheckpointError if the disk refuses.
        """
        try:
            before = self._lists()
        except (OSError, ValueError):
            before = {}
        if list(before)[-1:] == [which] and all((self._folder / f"{d}.block").exists() for d in before[which]):
            return
        for block in blocks:
            _CACHE.put(block.adapter.digest, block)
            if not (self._folder / f"{block.adapter.digest}.block").exists():
                self._link(block.adapter.digest, block)
        before.pop(which, None)
        lists = dict([*before.items()][-1:]) | {which: [b.adapter.digest for b in blocks]}
        self._write("blocks", json.dumps(lists).encode())
        used = {digest for digests in lists.values() for digest in digests}
        for path in self._folder.glob("*.block"):
            if path.stem not in used:
                path.unlink(missing_ok=True)
                pooled = self._pool / path.name
                with contextlib.suppress(FileNotFoundError):  # another client let it go at the same moment
                    if pooled.stat().st_nlink == 1:
                        pooled.unlink()

    def _lists(self) -> dict[str, list[str]]:
        """Id -> digests of blocks, those asked for last at the end. Raises: OSError; ValueError if it is damaged."""
        try:
            lists = json.loads((self._folder / "blocks").read_text())
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(lists, dict) or not all(map(_are_digests, lists.values())):
            raise ValueError("no lists of digests")
        return lists

    def _block(self, digest: str) -> Block:
        own = self._folder / f"{digest}.block"
        block = _CACHE.get(digest) if own.exists() else None
        if block is None:
            try:
                block = decode_block(own.read_bytes())
                if block.adapter.digest != digest:
                    raise WireError(f"{own} holds another block than its name says")
            except WireError:  # damaged: what is sent again must not be linked to it
                own.unlink(missing_ok=True)
                (self._pool / own.name).unlink(missing_ok=True)
                raise
            _CACHE.put(digest, block)
        return block

    def _link(self, digest: str, block: Block) -> None:
        pooled = self._pool / f"{digest}.block"
        try:
            self._make()
            for _ in range(3):
                if not pooled.exists():
                    self._write_in(self._pool, pooled.name, encode_block(block))
                try:
                    os.link(pooled, self._folder / pooled.name)
                except FileNotFoundError:  # another client let it go at the same moment
                    continue
                except OSError:  # no links here, or none left
                    break
                return
            self._write_in(self._folder, pooled.name, encode_block(block))
        except OSError as error:
            raise CheckpointError(
                f"cannot keep a block in {self._folder}: {error.strerror or error}. Free some space or mend the "
                "permissions."
            ) from error

    @property
    def _pool(self) -> Path:
        return self._folder.parent / ".blocks"  # no client can be called that, see folder_name

    def _make(self) -> None:
        for folder in (self._folder.parents[1], self._folder.parent, self._folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _write(self, name: str, data: bytes, *, sync: bool = False) -> None:
        self._write_in(self._folder, name, data, sync=sync)

    def _write_in(self, folder: Path, name: str, data: bytes, *, sync: bool = False) -> None:
        partial = folder / f"{name}.{secrets.token_hex(4)}.partial"  # other processes may write the same block
        try:
            self._make()
            folder.mkdir(exist_ok=True, mode=0o700)
            with open(partial, "wb", opener=_private) as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, folder / name)
            if sync:
                _sync(folder)
        except OSError as error:
            raise CheckpointError(
                f"cannot keep {len(data):,} bytes in {folder}: {error.strerror or error}. Free some space or "
                "mend the permissions."
            ) from error


class _Recent:
    """Blocks that this process read or kept last, by digest, up to a number of bytes: their files need no reading."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: OrderedDict[str, Block] = OrderedDict()

    def get(self, digest: str) -> Block | None:
        if digest in self._blocks:
            self._blocks.move_to_end(digest)
        return self._blocks.get(digest)

    def put(self, digest: str, block: Block) -> None:
        self._blocks[digest] = block
        self._blocks.move_to_end(digest)
        while len(self._blocks) > 1 and sum(b.adapter.nbytes for b in self._blocks.values()) > self._limit:
            self._blocks.popitem(last=False)


_CACHE = _Recent(limit=256 * 2**20)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _are_digests(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(x, str) and _SHA256.fullmatch(x) for x in found)


def folder_name(name: str) -> str:
    """A folder name that no id can use to leave the root: the id if it is plain, else its hash."""
    return name if _PLAIN.fullmatch(name) else hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
