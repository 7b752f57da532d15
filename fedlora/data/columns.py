"""From records of named cells to rows: which column plays which role, and what makes a record unusable."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedlora.config import DataConfig
from fedlora.data.rows import Row
from fedlora.errors import ConfigError, DataError

Record = Mapping[str, object]

ROLES = {  # name in settings -> role; `prompt` and `instruction` are one, and so are the three names of an answer
    "instruction": "instruction",
    "prompt": "instruction",
    "input": "input",
    "text": "input",
    "output": "output",
    "response": "output",
    "completion": "output",
    "label": "label",
    "messages": "messages",
    "group": "group",
    "task": "group",
    "skill": "group",
}
_SPEAKERS = ("system", "user", "assistant")
_LAYOUTS = (
    "instruction[+input]+output, [instruction+]text+label, prompt+response, prompt+completion, or messages "
    "(a list of {role, content})"
)


class Unusable(Exception):
    """Why one record is no row."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The column of each role in one file. `owner` is the column of the partition's key."""

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    label: str | None = None
    messages: str | None = None
    group: str | None = None
    owner: str | None = None

    @classmethod
    def of(cls, names: Iterable[str], config: DataConfig, where: str) -> Columns:
        """Explicit columns first, then names that tell their role.

        Alpaca files carry the whole prompt in `text` once more, so `text` counts only where no instruction and output
        are there already. Raises: DataError for a column that is not there, or if no layout fits; ConfigError for a
        role that does not exist.
        """
        names = list(dict.fromkeys(names))
        found: dict[str, str] = {}
        for role, column in config.columns.items():
            if role not in ROLES:
                raise ConfigError(f"data.columns: no role {role!r}; roles are {', '.join(ROLES)}{nearest(role, ROLES)}")
            _require(column, names, where, f"data.columns.{role}")
            if found.setdefault(ROLES[role], column) != column:
                raise ConfigError(
                    f"data.columns: {role!r} and another name of the same role ({ROLES[role]}) ask for "
                    f"columns {column!r} and {found[ROLES[role]]!r}; keep one"
                )
        free = [name for name in names if name not in found.values()]

        def guess(role: str, *candidates: str) -> None:
            if role not in found and (hit := next((c for c in candidates if c in free), None)):
                found[role] = hit

        if not found.keys() & {"instruction", "input"}:
            guess("messages", "messages")
        if "messages" not in found:
            guess("instruction", "instruction", "prompt")
            guess("output", "output", "response", "completion")
            guess("input", "input", *(() if {"instruction", "output"} <= found.keys() else ("text",)))
        guess("label", "label")
        guess("group", "skill", "task", "group")
        if key := config.partition.key:
            _require(key, names, where, "data.partition.key")
            found["owner"] = key
        asked = found.keys() & {"instruction", "input"}
        if "messages" not in found and not (asked and found.keys() & {"output", "label"}):
            missing = "answer (output or label)" if asked else "question (instruction, prompt, text or messages)"
            raise DataError(
                f"{where}: no column holds the {missing}; the columns are {', '.join(map(repr, names)) or 'none'}; "
                f"understood are {_LAYOUTS}. Name yours with data.columns, e.g. output = {names[-1]!r}"
            )
        return cls(**found)

    def row(self, record: Record, source: str) -> Row:
        """The row of one record. Raises: Unusable, with the reason."""
        label = None if self.label is None else _cell(record, self.label)
        group = label or "" if self.group is None else _cell(record, self.group)
        owner = None if self.owner is None else _cell(record, self.owner)
        if self.messages is not None:
            turns = _turns(record.get(self.messages), self.messages)
            return Row(messages=turns, label=label, group=group, owner=owner, source=source)
        answer = _cell(record, self.output) if self.output is not None else label
        assert answer is not None  # `of` found an output or a label
        instruction = "" if self.instruction is None else _cell(record, self.instruction)
        text = "" if self.input is None else _cell(record, self.input, optional=self.instruction is not None)
        return Row.single(instruction, text, answer, label=label, group=group, owner=owner, source=source)


def _require(column: str, names: list[str], where: str, setting: str) -> None:
    if column not in names:
        raise DataError(
            f"{where}: {setting} asks for column {column!r}, and there is none; "
            f"the columns are {', '.join(map(repr, names)) or 'none'}{nearest(column, names)}"
        )


def _cell(record: Record, column: str, *, optional: bool = False) -> str:
    """A cell as text: numbers and truth values are written out; nothing, NaN and blanks are empty."""
    value = record.get(column)
    if isinstance(value, float) and math.isnan(value):
        value = None
    if isinstance(value, (dict, list)):
        raise Unusable(f"no text in {column!r}: holds a {type(value).__name__}")
    text = "" if value is None else str(value)
    if not text.strip():
        if optional:
            return ""
        raise Unusable(f"{'missing' if column not in record else 'empty'} {column!r}")
    return _sound(text, column)


def _sound(text: str, column: str) -> str:
    """The text, if it can be written as UTF-8 (bytes that were not UTF-8 arrive here as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"bad UTF-8: in {column!r} at character {error.start}") from None
    return text


def _turns(value: object, column: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise Unusable(f"no messages: {column!r} holds {'an empty list' if value == [] else type(value).__name__}")
    turns = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in _SPEAKERS:
            raise Unusable(f"bad message: role {role!r} is not one of {', '.join(_SPEAKERS)}")
        if not isinstance(content, str) or (role != "system" and not content.strip()):
            raise Unusable(f"empty message: the {role} says nothing")
        turns.append((str(role), _sound(content, column)))
    if turns[-1][0] != "assistant" or all(role != "user" for role, _ in turns):
        raise Unusable("no answer: a conversation needs a user, and the assistant must have the last word")
    return tuple(turns)
