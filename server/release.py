"""What a run hands out: a PEFT folder that loads anywhere, and a manifest of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from fedlora.adapter import Adapter, Array
from fedlora.code import code_digest
from fedlora.composition import compacted
from fedlora.config import RunConfig
from fedlora.state import GlobalState
from server.checkpoint import write_atomic
from strategies.base import get
from strategies.streams import blocks_of, joint_head, sealed_in_order


def release(folder: Path, state: GlobalState, config: RunConfig, *, run: str, rounds: int) -> Path:
    """Write `adapter/` (PEFT, scale folded in) and `manifest.json`. Needs peft; byte-identical for identical states.

    Of a run with tasks `adapter/` is the sum of all with one head for all classes, and `tasks/NAME/` each task's own
    adapter with its own head; W0 with the adapters of a task and of those sealed before it is what it was trained as.
    Where one pair goes on from task to task the last has it; where nothing was trained there is no folder.
    """
    from fedlora.peft_bridge import save_adapter  # peft brings torch, which a server that only aggregates may lack

    method = get(config.method.name)

    def save(where: str, adapter: Adapter, head: Mapping[str, Array]) -> Path:
        save_adapter(
            folder / where,
            adapter,
            state.layout,
            base_name=config.model.name,
            task_type=config.model.task_type,
            head=dict(head),
        )
        return folder / where

    if config.tasks:
        parts = {
            f"tasks/{t.name}": ([b.adapter for b in blocks_of(state, [t])], t.extras) for t in sealed_in_order(state)
        }
        parts = {"adapter": ([state.update()], joint_head(state, config)), **parts}
        small = {where: (compacted(own), head) for where, (own, head) in parts.items() if own}
        # PEFT has no adapter of rank 0
        written = [save(where, own, head) for where, (own, head) in small.items() if any(own.ranks.values())]
    else:
        shared = method.released(state)
        # a personal method's B is zero: its A is what is shared
        written = [save("adapter", shared if method.personal else compacted([shared]), state.open_task.extras)]
    manifest = {
        "format": "fedlora-manifest/1",
        "run": run,
        "method": config.method.name,
        "seed": config.seed,
        "rounds": rounds,
        "base": {"name": config.model.name, "revision": config.model.revision, "fingerprint": state.base},
        "files": {
            p.relative_to(folder).as_posix(): {
                "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
                "bytes": p.stat().st_size,
            }
            for p in sorted(path for target in written for path in target.iterdir())
        },
        "code": {"fedlora": version("fedlora"), "digest": code_digest()},
    }
    write_atomic(folder / "manifest.json", (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
    return folder / "adapter"
