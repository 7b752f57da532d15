"""Put a state on the resident base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlora.adapter import Adapter, Array
from fedlora.base import Base
from fedlora.state import Block

__all__ = ["attach"]


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
