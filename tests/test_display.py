"""What a run says on the screen, from the events that it notifies of."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from fedlora.config import RunConfig, load_config
from fedlora.display import Display


def settings(*overrides: str) -> RunConfig:
    tables = '[{"name": "dates"}, {"name": "records"}, {"name": "numbers"}]'
    return load_config(overrides=[f"tasks={tables}", "rounds.count=2", *overrides])


def closed(number: int, **more: Any) -> dict[str, Any]:
    summary = {"round": number, "clients": [{"id": "a"}, {"id": "b"}, {"id": "a"}], "bytes_up": 10, "bytes_down": 20}
    return {"event": "closed", "round": number, "summary": {**summary, "seconds": 1.0, **more}}


def said(config: RunConfig, *events: dict[str, Any], live: bool = False) -> str:
    screen = StringIO()
    with Display(Console(file=screen, force_terminal=live, width=200, highlight=False), config) as display:
        for event in events:
            display.hear(event)
    return screen.getvalue()


def border(sealed: str, **scores: float) -> dict[str, Any]:
    return {"sealed": [sealed], "own": {}, "server": {n: {"score": s, "counted": 9} for n, s in scores.items()}}


def test_a_round_says_which_task_it_trains() -> None:
    text = said(settings(), {"event": "start", "clients": 2, "rounds": 6, "done": 0}, closed(1), closed(3))
    assert "2 clients, 6 rounds, 3 tasks" in text
    assert "round   1/6  dates    2 clients" in text
    assert "round   3/6  records  2 clients" in text
    assert "score" not in text


def test_a_sealed_task_is_told_with_the_scores_of_all_that_ended() -> None:
    told = border("records", dates=0.875, records=0.5, numbers=0.01)
    assert "sealed records; now dates 87.5%, records 50.0%\n" in said(settings(), closed(4, border=told))
    nothing = {"sealed": ["dates"], "own": {}, "server": {}}
    assert "sealed dates\n" in said(settings(), closed(2, border=nothing))


def test_all_tasks_at_once() -> None:
    told = border("all-tasks", dates=0.5, records=0.5, numbers=0.25)
    text = said(settings("continual.method=joint"), closed(6, border=told))
    assert "round   6/6  all tasks  2 clients" in text
    assert "sealed all tasks; now dates 50.0%, records 50.0%, numbers 25.0%" in text


def test_a_comparison_follows_the_settings_of_every_run() -> None:
    joint = settings("continual.method=joint")
    text = said(settings(), {"event": "run", "method": "joint", "seed": 1, "config": joint}, closed(2))
    assert "-- joint, seed 1" in text
    assert "round   2/6  all tasks" in text


@pytest.mark.parametrize("count", [2, 4])
def test_the_live_line_counts_the_rounds_of_all_tasks(count: int) -> None:
    answer = {"event": "answer", "kind": "train", "round": 3}
    events = [{"event": "round", "round": 3, "clients": 2}, *[answer] * count]
    text = said(settings(), *events, live=True)
    assert "round 3/6  records" in text
    assert "6/12" in text
    assert "7/12" not in text  # a method that asks twice does not run ahead


def test_one_is_not_called_many() -> None:
    one = {**closed(1), "summary": {**closed(1)["summary"], "clients": [{"id": "a"}]}}
    text = said(load_config(overrides=[]), {"event": "start", "clients": 1, "rounds": 1, "done": 0}, one)
    assert "1 client, 1 round\n" in text
    assert "  1 client  " in text


def test_a_run_without_tasks() -> None:
    text = said(load_config(overrides=["rounds.count=3"]), closed(1, evaluation={"score": 0.5, "loss": 1.0}))
    assert "round   1/3  2 clients  score 50.0%  loss 1.000  up 0.0 MB" in text
