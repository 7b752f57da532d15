"""Put a state on the resident base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from fedlora.adapter import Adapter, Array
from fedlora.base import Base
from fedlora.state import Block

__all__ = ["attach", "blocks_digest"]


def attach(
    base: Base,
    blocks: Sequence[Block],
    blocks_id: str,
    frozen: Adapter | None = None,
    head: Mapping[str, Array] | None = None,
) -> None:
    """Attach blocks, one client's frozen factors (or none) and a head, and take off any trained pair.

    Blocks already attached under `blocks_id` cost nothing. Raises: AdapterError if something does not fit the base.
    """
    for layer in base.layers.values():
        layer.set_pair(None)
    base.set_blocks(blocks, blocks_id)
    base.set_frozen(frozen)
    if head is not None:
        base.set_head(head)


def blocks_digest(blocks: Sequence[Block]) -> str:
    """A name for what the blocks hold, whoever sent them: SHA-256 of their factors. One pass over their bytes."""
    out = hashlib.sha256()
    for block in blocks:
        for name, f in block.adapter.items():
            out.update(f"{name}{f.scale}{f.a.shape}{f.b.shape}{f.a.dtype}{f.b.dtype}".encode())
            out.update(np.ascontiguousarray(f.a).view(np.uint8).reshape(-1).data)
            out.update(np.ascontiguousarray(f.b).view(np.uint8).reshape(-1).data)
        out.update(b"|")
    return out.hexdigest()
