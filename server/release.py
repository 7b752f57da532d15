"""What a run hands out: PEFT folders that load anywhere, a model card, a manifest of it all, and its signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.adapter import Adapter, Array
from fedlora.composition import compacted
from fedlora.config import RunConfig
from fedlora.model_card import model_card
from fedlora.privacy.statement import statement
from fedlora.provenance import MANIFEST, SIGNATURE, Ranks, describe, list_files, ranks_of, signature, utc_now
from fedlora.state import GlobalState
from server.checkpoint import write_atomic
from strategies.base import get
from strategies.continual.views import blocks_of, joint_head, sealed_in_order


def release(
    folder: Path,
    state: GlobalState,
    config: RunConfig,
    *,
    run: str,
    events: Sequence[Mapping[str, Any]],
    signing_key: Ed25519PrivateKey | None = None,
    now: Callable[[], datetime] = utc_now,
) -> Path:
    """Write `adapter/` (PEFT, scale folded in, and a card), `manifest.json`, and `manifest.sig` if there is a key.

    `events` is the run log. Needs peft; all but the signature is byte-identical for identical states and logs. Without
    a key an older signature is taken away: it would be of another manifest.

    Of a run with tasks `adapter/` is the sum of all with one head for all classes, and `tasks/NAME/` each task's own
    adapter with its own head; W0 with the adapters of a task and of those sealed before it is what it was trained as.
    Where one pair goes on from task to task the last has it; where nothing was trained there is no folder.
    Raises: CheckpointError if the log has not the state after each round, or a file of no release lies there.
    """
    from fedlora.peft_bridge import save_adapter  # peft brings torch, which a server that only aggregates may lack

    method = get(config.method.name)
    ranks: dict[str, Ranks] = {}

    def save(where: str, adapter: Adapter, head: Mapping[str, Array]) -> None:
        ranks[where] = ranks_of(adapter)
        save_adapter(
            folder / where,
            adapter,
            state.layout,
            base_name=config.model.name,
            task_type=config.model.task_type,
            head=dict(head),
        )

    if config.tasks:
        parts = {
            f"tasks/{t.name}": ([b.adapter for b in blocks_of(state, [t])], t.extras) for t in sealed_in_order(state)
        }
        parts = {"adapter": ([state.update()], joint_head(state, config)), **parts}
        for where, (own, head) in parts.items():
            small = compacted(own) if own else None
            if small is not None and any(small.ranks.values()):  # PEFT has no adapter of rank 0
                save(where, small, head)
    else:
        shared = method.released(state)
        # a personal method's B is zero: its A is what is shared
        save("adapter", shared if method.personal else compacted([shared]), state.open_task.extras)
    manifest = describe(
        state,
        config,
        run=run,
        ranks=ranks,
        events=events,
        base_folder=_base_folder(config),
        privacy=statement(events),
    )
    if "adapter" in ranks:
        write_atomic(folder / "adapter" / "README.md", model_card(manifest, config, events).encode())
    data = replace(manifest, files=list_files(folder, [folder / where for where in ranks])).to_bytes()
    (folder / SIGNATURE).unlink(missing_ok=True)
    write_atomic(folder / MANIFEST, data)
    if signing_key is not None:
        write_atomic(folder / SIGNATURE, signature(data, signing_key, now=now))
    return folder / "adapter"


def _base_folder(config: RunConfig) -> Path | None:
    """Where the base lies, if this machine has it in a folder of its own."""
    if config.model.name == "tiny":
        from fedlora.tiny import base_path

        return base_path()
    folder = Path(config.model.name).expanduser()
    return folder if folder.is_dir() else None
