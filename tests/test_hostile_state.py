"""A state in which a name stands twice: one of the two would be lost without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedlora.errors import WireError
from fedlora.state import GlobalState, Layout, Module, Task
from fedlora.wire import decode_state, encode_state

STATE = GlobalState(
    version=1,
    base="b",
    layout=Layout(modules={"q": Module(out=2, inp=2)}, head={"score": (2, 2)}),
    tasks={"one": Task(name="one")},
    memory={"server": {}},
)


@pytest.mark.parametrize("field", ["tasks", "modules", "head", "memory"])
def test_a_name_that_is_there_twice_is_refused(field: str) -> None:
    data = encode_state(STATE)
    assert list(decode_state(data).tasks) == ["one"]
    size = int.from_bytes(data[4:8], "little")
    values: dict[str, Any] = json.loads(data[8 : 8 + size])
    values[field] = values[field] * 2
    header = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(WireError, match=f"{field}: a name is there more than once"):
        decode_state(data[:4] + len(header).to_bytes(4, "little") + header + data[8 + size :])
