"""The arithmetic of the load and floor benchmarks; what they measure is not tested."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from simulations.benchmarks import floor, load
from strategies.base import Sums, moved


def test_the_expected_b_is_that_of_the_servers_own_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in any order of the clients, since nothing is rounded."""
    monkeypatch.setattr(load, "OUT", 40)
    for order in itertools.permutations(range(4)):
        b = {"m": np.zeros((40, load.RANK), np.float32)}
        for round_ in range(1, 14):
            sums = Sums({"m": (40, load.RANK)})
            for node in order:
                x = load.change(round_, node, "m").astype(np.float32) * np.float32(load.UNIT)
                sums.add({"m": x}, load.WEIGHTS[node])
            b = moved(b, sums.mean())  # type: ignore[assignment]
        np.testing.assert_array_equal(b["m"], load.expected(13, 4, "m"))


@pytest.mark.parametrize("other", [(2, 1, "m"), (1, 2, "m"), (1, 1, "n")])
def test_every_change_is_its_own(other: tuple[int, int, str]) -> None:
    np.testing.assert_array_equal(load.change(1, 1, "m"), load.change(1, 1, "m"))
    assert (load.change(1, 1, "m") != load.change(*other)).mean() > 0.99


def test_one_update_fills_what_the_page_says() -> None:
    assert pytest.approx(100e6, rel=0.01) == 24 * load.OUT * load.RANK * 4
    assert load.layout(24).max_rank() == load.RANK


def test_spans_of_a_journal() -> None:
    def at(second: float, event: str, kind: str = "train") -> dict[str, str]:
        return {"time": f"2026-01-01T00:00:{second:06.3f}+00:00", "event": event, "kind": kind}

    journal = [at(0, "conducting"), at(1, "round"), at(3, "answer"), at(3.5, "refused"), at(7, "answer")]
    journal += [at(8, "closed"), at(8, "round"), at(10, "answer"), at(11, "answer", "evaluate"), at(12, "closed")]
    assert load.spans(journal) == [(2.0, 4.0, 1.0), (2.0, 0.0, 2.0)]


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["python", "/x/flower-superexec", "--root-certificates", "ca.pem"], "executor (server)"),
        (["python", "/x/flower-superexec", "--insecure"], "executor (node)"),
        (["python", "/x/flwr-clientapp", "--insecure"], "ClientApp"),
        (["python", "-m", "clients.worker", "node.toml"], "worker"),
        (["python", "/x/fedlora", "server"], "other"),
    ],
)
def test_kinds_of_processes(command: Sequence[str], kind: str) -> None:
    assert load._kind(command) == kind


def test_what_came_with_each_round() -> None:
    assert floor.per_round([5.0, 7.0, 7.5]) == [2.0, 0.5]
