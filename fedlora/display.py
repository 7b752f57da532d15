"""What a run says while it goes: a live line for each round on a terminal, plain lines when piped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedlora.config import RunConfig
from fedlora.continual.tasks import JOINT, legs, rounds_in_all

__all__ = ["Display", "counted", "megabytes"]


class Display:
    """Hears what a run notifies of, and shows it. Leaving it clears the live line."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._line = self._bar.add_task("starting", total=None)
        self._clients = 0
        self._answered = 0
        self._follow(config)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def hear(self, event: Mapping[str, Any]) -> None:
        """One line or one step of the bar for what the run does."""
        kind = event["event"]
        if kind == "run":
            self._follow(event["config"])
            self._say(f"-- {event['method']}, seed {event['seed']}")
        elif kind == "start":
            self._say(
                f"{counted(event['clients'], 'client')}, {counted(event['rounds'], 'round')}"
                + (f", {len(self._legs)} tasks" if len(self._legs) > 1 else "")
                + (f", {counted(event['done'], 'round')} done before" if event["done"] else "")
            )
        elif kind == "round":
            self._clients, self._answered = event["clients"], 0
            number = event["round"]
            self._bar.update(
                self._line,
                description="  ".join(filter(None, (f"round {number}/{self._rounds}", self._trained(number)))),
                total=self._rounds * max(1, self._clients),
                completed=(number - 1) * self._clients,
            )
        elif kind == "answer" and event["kind"] == "train" and self._answered < self._clients:
            self._answered += 1  # no further: a method may ask twice in a round, and two tasks may be open at once
            self._bar.advance(self._line)
        elif kind == "refused":
            self._say(f"refused {event['client']}: {event['rule']}: {event['detail']}")
        elif kind == "retry":
            self._say(f"round {event['round']} is repeated: {event['reason']}")
        elif kind == "note":
            self._say(event["text"])
        elif kind == "reference":
            self._bar.update(self._line, description=f"{event['name']} (no federation), for comparison", total=None)
            verb = "scoring" if event["name"] == "bare base" else "training"
            self._say(f"{verb} for comparison: {event['name']}")
        elif kind == "closed":
            self._say(self._round_line(event["summary"]))
            if "border" in event["summary"]:
                self._say(self._sealed_line(event["summary"]))

    def _follow(self, config: RunConfig) -> None:
        self._rounds, self._legs = rounds_in_all(config), legs(config)

    def _trained(self, number: int) -> str:
        """The tasks that a round trains, by name."""
        names = (leg.name for leg in self._legs if leg.first <= number <= leg.last)
        return ", ".join("all tasks" if name == JOINT else name for name in names)

    def _round_line(self, summary: Mapping[str, Any]) -> str:
        trained = self._trained(summary["round"])
        width = max((len(self._trained(number)) for number in range(1, self._rounds + 1)), default=0)
        parts = [f"round {summary['round']:>3}/{self._rounds}"]
        parts += [trained.ljust(width)] if trained else []
        if "clients" in summary:
            parts += [counted(len({client["id"] for client in summary["clients"]}), "client")]
        measured = summary.get("evaluation", {})
        final = measured.get("server", measured)
        parts += [f"score {final['score']:.1%}"] if "score" in final else []
        parts += [f"loss {final['loss']:.3f}"] if "loss" in final else []
        parts += [f"epsilon {summary['privacy']['epsilon']:.2f}"] if "privacy" in summary else []
        if "bytes_up" in summary:
            parts += [f"up {megabytes(summary['bytes_up'])}", f"down {megabytes(summary['bytes_down'])}"]
        parts += [f"{summary['seconds']:.1f} s"]
        return "  ".join(parts)

    def _sealed_line(self, summary: Mapping[str, Any]) -> str:
        """Which tasks ended, and what all that have ended score now."""
        border = summary["border"]
        names = ["all tasks" if name == JOINT else name for name in border["sealed"]]
        ended = {leg.name for leg in self._legs if leg.last <= summary["round"]}
        told = [
            f"{name} {task['score']:.1%}"
            for name, task in (border.get("server") or border.get("own") or {}).items()
            if "score" in task and (name in ended or JOINT in ended)
        ]
        return f"sealed {', '.join(names)}" + (f"; now {', '.join(told)}" if told else "")

    def _say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """A number of things, as `1 round` or `2 rounds`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def megabytes(count: float) -> str:
    """Bytes as `1.2 MB`; nan is what a private run does not tell."""
    return "not told" if math.isnan(count) else f"{count / 1e6:.1f} MB"
