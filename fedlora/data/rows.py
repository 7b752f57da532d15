"""What data becomes: a `Row` of text, and a `TokenRow` that a model can train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example. `messages` are (role, content) pairs; the last is the assistant's answer.

    `instruction` and `input` are the two halves of a single user turn, for prompt templates and classifiers; both are
    empty in a conversation. `label` is set where the data has a label column (then it is also the answer). `group` is
    the skill, task or label that scores are reported by, or the data set where those are too many; `owner` is the
    natural key that partitions by owner use; `source` says where the row came from (`file:line`, `file:row 7`,
    `skill:name`).
    """

    messages: tuple[tuple[str, str], ...]
    instruction: str = ""
    input: str = ""
    label: str | None = None
    group: str = ""
    owner: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1][0] != "assistant" or not self.messages[-1][1]:
            raise DataError(
                f"{self.source or 'row'}: the last message must be a non-empty one of the assistant, got "
                f"{self.messages[-1:]}"
            )

    @classmethod
    def single(
        cls,
        instruction: str,
        input: str,
        answer: str,
        *,
        label: str | None = None,
        group: str = "",
        owner: str | None = None,
        source: str = "",
    ) -> Row:
        """A row of one question and its answer; the question is the instruction, then the input on its own line.

        >>> Row.single("Add.", "1 + 2", "3").messages
        (('user', 'Add.\\n1 + 2'), ('assistant', '3'))
        """
        question = "\n".join(part for part in (instruction, input) if part)
        return cls(
            messages=(("user", question), ("assistant", answer)),
            instruction=instruction,
            input=input,
            label=label,
            group=group,
            owner=owner,
            source=source,
        )

    @property
    def answer(self) -> str:
        """What the assistant says last."""
        return self.messages[-1][1]

    @property
    def prompt(self) -> str:
        """What was said to the assistant before its last answer: the user's question."""
        return self.messages[-2][1] if len(self.messages) > 1 else ""

    @property
    def text(self) -> str:
        """What a classifier reads: the input, or the instruction if that is all there is, or the users' turns."""
        return self.input or self.instruction or "\n".join(content for role, content in self.messages if role == "user")


@dataclass(frozen=True)
class TokenRow:
    """One tokenised example.

    `tokens`: int32 `[length]`. `answer`: bool `[length]`, True on the tokens that the model is to produce (answers and
    their end-of-turn tokens); all False for sequence classification, where `label` is the index of the class and
    `choices` are those among which it is to be found (None: all classes).
    """

    tokens: NDArray[np.int32]
    answer: NDArray[np.bool_]
    label: int | None = None
    group: str = ""
    choices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or not len(self.tokens) or self.tokens.shape != self.answer.shape:
            raise DataError(
                f"a token row needs tokens and answer of one shape [length >= 1], got {self.tokens.shape} and "
                f"{self.answer.shape}"
            )
        if self.choices is not None and self.label not in self.choices:
            raise DataError(f"a token row's label {self.label} must be one of its choices {self.choices}")
