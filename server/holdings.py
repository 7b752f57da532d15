"""Which blocks each client holds, so that it is sent the least that gives it the weights of this round.

A client that has last round's weights is sent the blocks that came since: a chain. One that joins late, or whose blocks
were recompressed in the meantime, is sent all blocks, or a snapshot of them (per module the stack, or its lossless
compact form where that is smaller), whichever is the fewest bytes. All three are the same weights, up to the rounding
of one recompression in float32.

What clients hold is a part of the checkpoint, so a resumed run sends what an undisturbed one would have sent. A client
that has lost its folder says so (`BlocksMissing`) and is asked again with everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.adapter import Adapter, Array, stack, truncate
from fedlora.codec import nbytes
from fedlora.errors import CheckpointError
from fedlora.frame import from_json
from fedlora.state import Block, Codec
from fedlora.wire import digests_id
from strategies.blocks import as_float32

__all__ = ["OWNER", "Holdings", "Offer", "snapshot"]

OWNER = "holdings"  # in GlobalState.memory


@dataclass(frozen=True)
class Offer:
    """What goes into one client's ask: `blocks` come after those that it holds under the id `on`; all: `whole`."""

    on: str | None
    blocks: tuple[Block, ...]
    whole: str


@dataclass(frozen=True)
class _List:
    """Blocks that a client was sent, by digest, and the state version whose weights they are."""

    version: int
    digests: tuple[str, ...]


class Holdings:
    """Who holds what. `saved` is what `memory()` gave before a checkpoint.

    `versioned`: every ask of one state version speaks of the same weights, so that what was added since a version can
    be told. In a stream of tasks it is not so; there a chain continues a list that it begins with, and nothing else.
    Raises: CheckpointError if `saved` is not that.
    """

    def __init__(
        self, saved: Mapping[str, Array] | None = None, *, codec: Codec = "float32", versioned: bool = True
    ) -> None:
        self._versioned = versioned
        self._codec = codec  # of a block on the wire; a snapshot travels in float32
        self._lists: dict[str, _List] = {}
        self._clients: dict[str, str] = {}
        self._snapshot: tuple[str, Block] | None = None
        if saved:
            try:
                found = json.loads(bytes(saved["json"]))
                lists = from_json(tuple[tuple[str, int, tuple[str, ...]], ...], found["lists"], "lists")
                self._lists = {i: _List(version, digests) for i, version, digests in lists}
                self._clients = {c: lists[n][0] for c, n in found["clients"].items()}
            except (KeyError, ValueError, IndexError, TypeError) as error:
                raise CheckpointError(f"the checkpoint's record of held blocks cannot be read: {error}") from error

    def offer(self, client: str, blocks: Sequence[Block], version: int, *, merge: bool = True) -> Offer:
        """The cheapest way to give `client` the weights of `blocks`, the state's at `version`.

        Without `merge` the client gets these blocks, one by one, and no other sum of them.
        """
        all_digests = [b.adapter.digest for b in blocks]
        held_id = self._clients.get(client)
        held = self._lists.get(held_id) if held_id is not None else None
        if held is not None and held_id is not None:
            chain = _chain(held, blocks, all_digests, versioned=self._versioned and merge)
            if chain is not None and not any(b.adapter.nbytes for b in chain):
                return self._offer(version, held_id, held.digests, chain)
            if chain is not None and (not merge or self._bytes(chain) <= self._snapshot_bytes(blocks)):
                return self._offer(version, held_id, held.digests, chain)
        if merge and self._snapshot_bytes(blocks) < self._bytes(blocks):
            return self._offer(version, None, (), (self._snapshot_of(blocks, version),))
        return self._offer(version, None, (), tuple(blocks))

    def accepted(self, client: str, offer: Offer) -> None:
        """The client answered to an ask with this offer: it holds all of its blocks now."""
        self._clients[client] = offer.whole

    def lost(self, client: str) -> None:
        """The client holds nothing any longer."""
        self._clients.pop(client, None)

    def memory(self) -> dict[str, Array]:
        """Everything, as arrays for `GlobalState.memory`; lists that no client holds are forgotten."""
        used = sorted(set(self._clients.values()))
        self._lists = {i: self._lists[i] for i in used}
        number = {i: n for n, i in enumerate(used)}
        text = json.dumps(
            {
                "lists": [[i, entry.version, list(entry.digests)] for i, entry in self._lists.items()],
                "clients": {c: number[i] for c, i in sorted(self._clients.items())},
            }
        )
        return {"json": np.frombuffer(text.encode(), np.uint8)}

    def _offer(self, version: int, on: str | None, before: tuple[str, ...], blocks: tuple[Block, ...]) -> Offer:
        digests = before + tuple(b.adapter.digest for b in blocks)
        whole = digests_id(digests)
        self._lists[whole] = _List(version, digests)
        return Offer(on, blocks, whole)

    def _bytes(self, blocks: Sequence[Block]) -> int:
        factors = [f for b in blocks for f in b.adapter.values()]
        return sum(nbytes(x.shape, self._codec) for f in factors for x in (f.a, f.b))

    def _snapshot_bytes(self, blocks: Sequence[Block]) -> int:
        total = 0
        for name in blocks[0].adapter if blocks else ():
            shape = blocks[0].adapter[name].shape
            total += min(sum(b.adapter[name].rank for b in blocks), *shape) * sum(shape) * 4
        return total

    def _snapshot_of(self, blocks: Sequence[Block], version: int) -> Block:
        key = digests_id(b.adapter.digest for b in blocks)
        if self._snapshot is None or self._snapshot[0] != key:
            self._snapshot = key, Block(adapter=snapshot([b.adapter for b in blocks]), born=version)
        return self._snapshot[1]


def _chain(
    held: _List, blocks: Sequence[Block], digests: Sequence[str], *, versioned: bool
) -> tuple[Block, ...] | None:
    """What is missing to a client with this list, or None if its blocks were recompressed since."""
    if tuple(digests[: len(held.digests)]) == held.digests:
        return tuple(blocks[len(held.digests) :])
    if not versioned:
        return None
    chain = tuple(b for b in blocks if b.born > held.version)
    return chain if all(b.since >= held.version for b in chain) else None


def snapshot(adapters: Sequence[Adapter]) -> Adapter:
    """The sum of products, per module the stack, or its compact SVD where that has fewer directions."""
    whole = stack(adapters)
    return as_float32(
        Adapter({n: truncate(f, min(f.shape))[0] if f.rank > min(f.shape) else f for n, f in whole.items()})
    )
