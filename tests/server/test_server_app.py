"""The run folder: made once, gone on with under the same settings only; the release."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedlora.adapter import Adapter, Factors
from fedlora.config import flat, load_config
from fedlora.errors import ConfigError
from fedlora.state import Block, GlobalState, Layout, Module, Task
from server.app import main, open_run, require_same_settings, run
from server.release import release


def test_a_folder_is_opened_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    open_run(folder, load_config(None, ["seed=3"]))
    assert sorted(p.name for p in folder.iterdir()) == ["config.toml", "run-id"]
    assert load_config(folder / "config.toml") == load_config(None, ["seed=3"])
    assert len((folder / "run-id").read_text().strip()) == 16
    with pytest.raises(ConfigError, match=r"run exists already. Choose another folder with --out, or .* --resume "):
        open_run(folder, load_config(None, []))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot be made: Not a directory. Choose another"):
        open_run(tmp_path / "file" / "run", load_config(None, []))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    open_run(tmp_path / "run", load_config(None, []))
    require_same_settings(tmp_path / "run", load_config(None, []))
    with pytest.raises(ConfigError, match=r"holds a run with other settings.*seed: 0 -> 4"):
        require_same_settings(tmp_path / "run", load_config(None, ["seed=4"]))


def context(config: Any, **more: str) -> Context:
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={**flat(config), **more})


def test_the_server_app_needs_a_folder(lab: Any) -> None:
    one = lab()
    with pytest.raises(ConfigError, match="out: where should the run folder be"):
        main(one.grid, context(one.config()))


def test_the_server_app_goes_on_with_its_own_run_only(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, folder = lab(), tmp_path / "run"
    released: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "server.app.release",
        lambda folder, state, config, run, events, signing_key: released.append((run, state.version)),
    )
    config = one.config("evaluation.server=false")
    main(one.grid, context(config, out=str(folder)))
    main(one.grid, context(config, out=str(folder)))  # nothing is left to do but the release
    assert released == [((folder / "run-id").read_text().strip(), 2)] * 2
    with pytest.raises(ConfigError, match="must keep them: seed: 0 -> 9"):
        main(one.grid, context(one.config("seed=9"), out=str(folder)))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine exists already"):
        main(one.grid, context(config, out=str(tmp_path / "mine")))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_a_release_has_the_lowest_rank_that_holds_the_update(tmp_path: Path, rank: int) -> None:
    """Two blocks in the same `rank` directions are one adapter of that rank, and of at most min(out, in)."""
    bridge = pytest.importorskip("fedlora.peft_bridge")
    rng = np.random.default_rng(rank)
    a, b = rng.normal(size=(rank, 5)).astype(np.float32), rng.normal(size=(9, rank)).astype(np.float32)
    blocks = tuple(Block(adapter=Adapter({"q": Factors(a, b, s)}), born=i) for i, s in enumerate((0.5, 0.75)))
    layout = Layout(modules={"q": Module(out=9, inp=5)})
    state = GlobalState(version=2, base="x", layout=layout, tasks={"": Task(name="", blocks=blocks)})
    release(tmp_path, state, load_config(None, []), run="a-run", events=[])
    released, _ = bridge.load_adapter(tmp_path / "adapter")
    assert released.ranks == {"q": min(rank, 5)}
    np.testing.assert_allclose(released["q"].dense(), 1.25 * b.astype(np.float64) @ a, atol=1e-4)


def test_a_release_is_the_same_bytes_for_the_same_state(lab: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    one = lab()
    config = one.config("method.name=flora", "evaluation.server=false")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        open_run(folder, config)
        (folder / "run-id").write_text("the-same-run\n")
        assert run(lab().grid, config, folder, evaluator=None, notify=lambda event: None) == folder / "adapter"
    manifests = [(f / "manifest.json").read_bytes() for f in folders]
    assert manifests[0] == manifests[1]
    files = json.loads(manifests[0])["files"]
    assert set(files) == {f"adapter/{p.name}" for p in (folders[0] / "adapter").iterdir()}
    for name, entry in files.items():
        data = (folders[1] / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
