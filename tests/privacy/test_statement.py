"""What is promised, in words: unit, relation, numbers, and who is trusted with what."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.privacy.accounting import RELATION
from fedlora.privacy.statement import statement

TOLD = {
    "unit": "client",
    "relation": RELATION,
    "epsilon": 3.14159,
    "delta": 1e-5,
    "noise_multiplier": 1.25,
    "clip": 0.5,
    "sampling": 1.0,
    "steps": 7,
    "noise_by": "server",
    "parties": 1,
    "quantile": None,
}


def said(*, secure: bool = False, **fields: Any) -> str:
    events = [{"event": "start", "config": {"secure.on": secure}}, {"event": "round", "privacy": TOLD | fields}]
    found = statement(events)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fields", "who", "drawn"),
    [
        ({"sampling": 0.1}, "the server, which is trusted with every single update", "each client drawn by itself"),
        ({"secure": True}, "the server, which is trusted with each round's sum, and sees no single update", "none"),
        (
            {"secure": True, "noise_by": "clients", "parties": 5},
            "the clients, inside a secure sum, each 1/sqrt(5) of it; at least 5 are in every sum",
            "none",
        ),
    ],
)
def test_the_three_forms_of_client_level(fields: dict[str, Any], who: str, drawn: str) -> None:
    found = said(**fields)
    assert f"Who adds the noise: {who}" in found
    assert f"amplification by sampling: {drawn}" in found
    for part in (
        "differential privacy of whole clients, with all their rows",
        f"unit: client; relation: {RELATION}",
        "epsilon 3.142 at delta 1e-05",
        "each clipped to 0.5 in one norm over all that it sends",
        "Gaussian noise multiplier 1.25, 7 releases",
        "dp-accounting",
    ):
        assert part in found
    assert "row (unit" not in found
    assert found.isascii()
    assert ("the noise of those who deceive does not count" in found) == (fields.get("noise_by") == "clients")
    assert ("kept from the log" in found) == ("sampling" in fields)


def test_a_clip_that_moves_is_said_to() -> None:
    found = said(quantile=0.5)
    assert "each clipped to a bound that began at 0.5 and follows the quantile 0.5 of the clients' norms" in found
    assert "by noised counts that the noise multiplier includes" in found


def test_the_last_round_and_the_last_start_count() -> None:
    first = {"event": "round", "privacy": TOLD}
    events = [{"event": "start"}, first, {"event": "start", "config": {"secure.on": True}}]
    assert "3.142" in (statement([*events, {"event": "evaluation"}]) or "")
    assert "epsilon 4 at" in (statement([*events, {"event": "round", "privacy": TOLD | {"epsilon": 4.0}}]) or "")
    assert "sees no single update" in (statement(events) or "")


def test_where_nothing_is_promised_nothing_is_said() -> None:
    assert statement([]) is None
    assert statement([{"event": "start"}, {"event": "round"}, {"event": "round", "privacy": {}}]) is None
