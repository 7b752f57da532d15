"""From rows to tokens: the model's chat template, a default one, or the user's own; which tokens are the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import numpy as np
from jinja2 import TemplateError

from fedlora.config import RunConfig
from fedlora.data.columns import nearest
from fedlora.data.report import Report
from fedlora.data.rows import Row, TokenRow
from fedlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = tuple[tuple[str, str], ...]

# For tokenizers without a chat template: each turn is its speaker's name, a colon, and on the next line what is said.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m.role] }}:\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n"
    "{% endfor %}"
    "{{ 'Assistant:\n' if add_generation_prompt }}"
)
_FIELD = re.compile(r"\{(instruction|input)\}")


class PromptFormat:
    """How rows become tokens for one tokenizer. With `labels`, for sequence classification; else for causal LM.

    `choices`, some of the `labels`, are all that these rows can have: a task's own classes among those of a run. They
    mean nothing for causal LM.

    The format is `template` (text with {instruction} and {input}, after which come the answer and the end-of-sequence
    token), else the tokenizer's chat template, else `DEFAULT_TEMPLATE`. A generated answer is over at any of
    `stop_ids`: end of sequence, and the chat template's end of turn.

    Raises: ConfigError if `template` names no field or `choices` are not among `labels`; DataError if an answer could
    not end (no chat template and no end-of-sequence token), or the chat template does not render an answer after its
    prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        max_length: int,
        labels: Sequence[str] = (),
        choices: Sequence[str] = (),
    ) -> None:
        if template is not None and not _FIELD.search(template):
            raise ConfigError(f"data.prompt needs {{instruction}} or {{input}} in it, got {template!r}")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.labels = tuple(labels)
        self.choices = tuple(choices) if labels else ()
        if stray := [c for c in self.choices if c not in self.labels]:
            raise ConfigError(
                f"data.labels: {', '.join(stray)} not in model.labels: {', '.join(self.labels)}"
                f"{nearest(stray[0], self.labels)}"
            )
        self.stop_ids: tuple[int, ...] = ()
        if labels:
            return
        own = tokenizer.chat_template if template is None else None
        self._chat_template = own or DEFAULT_TEMPLATE
        # what the tokenizer puts before every text, e.g. <s>; a model's chat template writes its own
        first = tokenizer("a", verbose=False)["input_ids"][:1]
        self._lead: list[int] = [] if own or first != [tokenizer.bos_token_id] else first
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")
        # what the chat template writes between its prompt and an answer, e.g. an empty block of thoughts; blanks at the
        # end are left to the answer, whose first token they usually belong to
        self._opening = ""
        probe = Row.single("question", "", "answer", source="the chat template")
        parts = self._parts([probe])[0]
        if isinstance(parts, str):
            raise DataError(f"the chat template cannot be used for training: {parts}")
        self._opening = parts[1][: parts[1].index("answer")].rstrip(" ")
        last = self._ids([parts[1]])[0][-1]
        self.stop_ids = tuple(sorted({last, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}))

    def encode(self, rows: Sequence[Row]) -> tuple[list[TokenRow], Report]:
        """Token rows in the order of `rows`, and the report.

        Causal LM: a row is its prompt's tokens as `prompts` gives them, then the answer and its end-of-turn token, on
        which `answer` is True; in a conversation, so are the earlier answers. Rows over `max_length` tokens are dropped
        and reported, not cut. Sequence classification: the row's text, cut to `max_length` and reported; the label, or
        where there is no label column the answer, becomes its index in `labels`; the indices of `choices` go with it.

        Raises: DataError for a label that is not in `labels`, or in `choices` where there are any. Cost: about 0.1 ms a
        row of 50 tokens.
        """
        if not rows:
            return [], Report()
        return self._classified(rows) if self.labels else self._answered(rows)

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens after which the model answers a user who says `text`."""
        return self.prompts([Row.single(text, "", "-")])[0]

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The tokens after which the model gives the last answer of each row.

        Raises: DataError for a row that the format cannot render.
        """
        if not rows:
            return []
        texts = []
        for row, text in zip(rows, self._prompt_texts(rows, [len(row.messages) - 1 for row in rows]), strict=True):
            if text is None:
                raise DataError(f"{row.source or 'row'}: the prompt format does not fit this conversation")
            texts.append(text)
        return [self._lead + ids for ids in self._ids(texts)]

    def _classified(self, rows: Sequence[Row]) -> tuple[list[TokenRow], Report]:
        index = {label: i for i, label in enumerate(self.labels)}
        known, setting = (self.choices, "data.labels") if self.choices else (self.labels, "model.labels")
        choices = tuple(index[label] for label in self.choices) or None
        for row in rows:
            if (label := row.label if row.label is not None else row.answer) not in known:
                raise DataError(
                    f"{row.source or 'row'}: label {label!r} is none of {setting}: {', '.join(known)}"
                    f"{nearest(label, known)}"
                )
        whole = cast("list[list[int]]", self.tokenizer([row.text for row in rows], verbose=False)["input_ids"])
        out, cut = [], []
        for row, ids in zip(rows, whole, strict=True):
            if len(ids) > self.max_length:
                ids = self.tokenizer(row.text, truncation=True, max_length=self.max_length)["input_ids"]
                cut.append(row.source)
            label = row.label if row.label is not None else row.answer
            silent = np.zeros(len(ids), np.bool_)
            out.append(TokenRow(np.array(ids, np.int32), silent, index[label], row.group, choices))
        return out, Report(kept=len(out), truncated=tuple(cut))

    def _answered(self, rows: Sequence[Row]) -> tuple[list[TokenRow], Report]:
        parts = self._parts(rows)
        # every beginning of a row that ends where an answer begins or ends; the last is the whole row
        beginnings = [list(accumulate(part)) if isinstance(part, list) else [] for part in parts]
        tokens = iter(self._ids([text for begin in beginnings for text in begin]))
        out: list[TokenRow] = []
        dropped: list[tuple[str, str]] = []
        for row, part, begin in zip(rows, parts, beginnings, strict=True):
            if isinstance(part, str):
                dropped.append((row.source, part))
                continue
            known = [next(tokens) for _ in begin]
            ids, ends = known[-1], [len(ids) for ids in known]
            if any(ids[: len(first)] != first for first in known):  # a token spans a border: tokenise part by part
                pieces = self._ids(part)
                ids, ends = [i for piece in pieces for i in piece], list(accumulate(map(len, pieces)))
            lead = len(self._lead)
            if lead + len(ids) > self.max_length:
                dropped.append((row.source, f"too long: {lead + len(ids)} tokens, at most {self.max_length}"))
                continue
            answer = np.zeros(lead + len(ids), np.bool_)
            for start, end in zip(ends[::2], ends[1::2], strict=True):
                answer[lead + start : lead + end] = True
            out.append(TokenRow(np.array(self._lead + ids, np.int32), answer, None, row.group))
        return out, Report(kept=len(out), dropped=tuple(dropped))

    def _parts(self, rows: Sequence[Row]) -> list[list[str] | str]:
        """Each row's text as prompt, answer, prompt, answer, ...; or why it cannot be had."""
        turns = [
            (i, at)
            for i, row in enumerate(rows)
            for at, (role, _) in enumerate(row.messages)
            if at and role == "assistant"
        ]
        prompts = self._prompt_texts([rows[i] for i, _ in turns], [at for _, at in turns])
        if self.template is None:
            wholes = self._rendered([row.messages for row in rows], answer_next=False)
        else:
            last = {i: prompt for (i, _), prompt in zip(turns, prompts, strict=True)}
            wholes = [None if (text := last[i]) is None else text + row.answer for i, row in enumerate(rows)]
        out: list[list[str] | str] = [[] for _ in rows]
        done = [0] * len(rows)  # characters of the whole that are in `out`
        for (i, at), prompt in zip(turns, prompts, strict=True):
            whole, so_far, messages = wholes[i], out[i], rows[i].messages
            if isinstance(so_far, str):
                continue
            if whole is None or prompt is None:
                out[i] = "no such prompt: the format does not fit this conversation"
                continue
            if not whole.startswith(prompt):  # some templates open only the last answer
                prompt = prompt.removesuffix(self._opening)
            following = messages[at + 1][1] if at + 1 < len(messages) else None
            end = self._end(whole, len(prompt), messages[at][1], following)
            if not whole.startswith(prompt) or len(prompt) < done[i]:
                out[i] = "no such prompt: the chat template writes earlier turns anew"
            elif end is None:
                out[i] = "no such answer: the chat template does not write it as it is"
            else:
                eos = "" if end[1] or following is not None else self._eos()
                so_far += [whole[done[i] : len(prompt)], whole[len(prompt) : end[0]] + eos]
                done[i] = end[0]
        return out

    def _end(self, whole: str, start: int, answer: str, following: str | None) -> tuple[int, bool] | None:
        """Where a turn is over, and whether an end-of-turn token says so; None if the answer is not there."""
        for text in (answer, answer.strip()):  # many templates strip what is said
            if (at := whole.find(text, start)) < 0:
                continue
            over = at + len(text)
            limit = len(whole) if following is None else whole.find(following.strip(), over)
            mark = self._special.search(whole, over, max(limit, over))
            return (mark.end(), True) if mark else (over, False)
        return None

    def _eos(self) -> str:
        if self.tokenizer.eos_token is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token and the prompt format none of its own, so an answer "
                "could not end; set tokenizer.eos_token"
            )
        return str(self.tokenizer.eos_token)

    def _prompt_texts(self, rows: Sequence[Row], ats: Sequence[int]) -> list[str | None]:
        """The text before message `at` of each row; None where the format does not fit."""
        if self.template is None:
            texts = self._rendered([row.messages[:at] for row, at in zip(rows, ats, strict=True)], answer_next=True)
            return [None if text is None else text + self._opening for text in texts]
        return [self._filled(self.template, row) for row in rows]

    def _filled(self, template: str, row: Row) -> str | None:
        if [role for role, _ in row.messages] != ["user", "assistant"]:
            return None
        single = bool(row.instruction or row.input)
        fields = {"instruction": row.instruction if single else row.messages[0][1], "input": row.input}
        return _FIELD.sub(lambda field: fields[field[1]], template)

    def _rendered(self, conversations: Sequence[Messages], *, answer_next: bool) -> list[str | None]:
        """Conversations as text; None where the chat template refuses one."""
        chats = [[{"role": role, "content": content} for role, content in messages] for messages in conversations]

        def render(some: list[list[dict[str, str]]]) -> list[str]:
            texts = self.tokenizer.apply_chat_template(
                some, chat_template=self._chat_template, tokenize=False, add_generation_prompt=answer_next
            )
            return cast("list[str]", texts)

        def one(chat: list[dict[str, str]]) -> str | None:
            try:
                return render([chat])[0]
            except TemplateError:
                return None

        try:
            return list(render(chats))
        except TemplateError:
            return [one(chat) for chat in chats]  # to find out which

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return cast("list[list[int]]", self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_format(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> PromptFormat:
    """The format of a run on a base's tokenizer. Raises: ConfigError if the base has none, and as PromptFormat."""
    if tokenizer is None:
        raise ConfigError(f"model.name: {config.model.name} comes without a tokenizer, so text cannot be read")
    labels = config.model.labels if config.model.task_type == "sequence-classification" else ()
    return PromptFormat(tokenizer, config.data.prompt, config.model.max_length, labels, config.data.labels)
