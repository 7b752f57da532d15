"""What a run hands out: a PEFT folder that loads anywhere, and a manifest of its files."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fedlora.adapter import Adapter, Factors, truncate
from fedlora.code import code_digest
from fedlora.config import RunConfig
from fedlora.state import GlobalState
from server.checkpoint import write_atomic
from strategies.base import get


def compact(adapter: Adapter) -> Adapter:
    """The same products at the lowest rank that holds them to float32 rounding; ranks never exceed min(out, in)."""
    small = {}
    for name, factors in adapter.items():
        cut, _ = truncate(factors, min(factors.rank, *factors.shape))
        # truncate splits singular values evenly, so a column of b has norm sqrt(sigma)
        sigma = np.linalg.norm(cut.b.astype(np.float64), axis=0) ** 2
        keep = int(np.sum(sigma > 1e-7 * sigma.max(initial=0.0)))
        small[name] = Factors(np.ascontiguousarray(cut.a[:keep]), np.ascontiguousarray(cut.b[:, :keep]))
    return Adapter(small)


def release(folder: Path, state: GlobalState, config: RunConfig, *, run: str, rounds: int) -> Path:
    """Write `adapter/` (PEFT, scale folded in) and `manifest.json`. Needs peft; byte-identical for identical states."""
    from fedlora.peft_bridge import save_adapter  # peft brings torch, which a server that only aggregates may lack

    method, target = get(config.method.name), folder / "adapter"
    shared = method.released(state)
    save_adapter(
        target,
        shared if method.personal else compact(shared),  # a personal method's B is zero: its A is what is shared
        state.layout,
        base_name=config.model.name,
        task_type=config.model.task_type,
        head=dict(state.open_task.extras),
    )
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
            for p in sorted(target.iterdir())
        },
        "code": {"fedlora": version("fedlora"), "digest": code_digest()},
    }
    write_atomic(folder / "manifest.json", (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
    return target
