"""Which answers outlive the process that asked for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.config import load_config
from fedlora.state import GlobalState, Layout
from server.asking import Courier, Tally, Turn
from server.channel import Plain
from server.private import Account
from server.spool import Spool


@pytest.mark.parametrize("durable", [True, False])
def test_messages_of_a_secure_sum_are_never_kept_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """The keys that could open them are gone with this one; all other answers are kept, where a run is durable."""
    made: dict[str, bool] = {}

    def spool(place: Path, decode: Any, *, memory_limit: int, durable: bool) -> Spool:
        made[place.name.split("-")[2]] = durable
        return Spool(place, decode, memory_limit=memory_limit, durable=durable)

    monkeypatch.setattr("server.asking.Spool", spool)
    config = load_config()
    grid: Any = None  # nobody is asked
    courier = Courier(grid, config, tmp_path, run="r", channel=Plain(), durable=durable, notify=lambda event: None)
    courier.restore({}, Account(config, {}))
    state = GlobalState(version=0, base="b", layout=Layout(modules={}), tasks={})
    roster: Any = SimpleNamespace(clients={})
    for kind in ("train", "measure", "evaluate", "secure"):
        answers, told = courier.ask(Turn(kind=kind, round=1), state, {}, roster, Tally())
        assert (len(answers), told) == (0, [])
    assert made == {"train": durable, "measure": durable, "evaluate": durable, "secure": False}
