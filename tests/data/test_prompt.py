from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedlora import tiny
from fedlora.config import RunConfig
from fedlora.data.prompt import PromptFormat, prompt_format
from fedlora.data.rows import Row, TokenRow
from fedlora.data.sources import skill_rows
from fedlora.errors import ConfigError, DataError

# Templates of common kinds, as models ship them: end mark and newline; stripped contents; a block of thoughts that only
# the last answer has; no header for the answer to come; begin mark before every exchange, blanks around contents; an
# end mark after the last answer only.
CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
STRIPPED = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}<|bot|>\n\n{{ m.content | trim }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant<|bot|>\n\n{% endif %}"
)
THOUGHTFUL = (
    "{% for m in messages %}<|user|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|turn|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
HEADLESS = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system please') }}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
FINAL = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {
    "default": None,
    "chatml": CHATML,
    "stripped": STRIPPED,
    "thoughtful": THOUGHTFUL,
    "headless": HEADLESS,
    "brackets": BRACKETS,
    "final": FINAL,
}
START = {"brackets": " ", "final": " "}
END = {"default": "<eos>", "headless": "<eos>", "brackets": " <eos>", "final": "<eos>"}  # else <|turn|>

CHAT = Row(
    messages=(("user", "1 + 2?"), ("assistant", "It is 3."), ("user", "Sure?"), ("assistant", "Yes, 3.")), source="f:1"
)
words = st.text("abc 123.,\n", min_size=1).filter(lambda text: text.strip())


def answers(tokenizer, row: TokenRow) -> list[str]:
    """What stands under each run of the mask."""
    borders = np.flatnonzero(np.diff(row.answer, prepend=False, append=False))
    return [tokenizer.decode(row.tokens[a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
class TestEveryTemplate:
    def format(self, tokenizer, name, max_length=512) -> PromptFormat:
        tokenizer.chat_template = TEMPLATES[name]
        return PromptFormat(tokenizer, None, max_length)

    @given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=6))
    @settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_the_mask_covers_the_answer_and_its_end(self, tokenizer, name, rows):
        form = self.format(tokenizer, name)
        given = [Row.single("", question, answer) for question, answer in rows]
        found, report = form.encode(given)
        assert (report.kept, report.dropped) == (len(rows), ())
        for row, wanted, ids in zip(found, given, form.prompts(given), strict=True):
            text = wanted.answer.strip() if name == "stripped" else wanted.answer
            (said,) = answers(tokenizer, row)
            assert said == START.get(name, "") + text + END.get(name, "<|turn|>")
            assert row.answer[-1]  # nothing is trained on after the end
            assert row.tokens[: len(ids)].tolist() == ids  # what generation begins with
            assert not row.answer[: len(ids)].any()
            assert row.answer[len(ids) :].all()

    def test_every_answer_of_a_conversation_counts(self, tokenizer, name):
        (row,), _ = self.format(tokenizer, name).encode([CHAT])
        start, end = START.get(name, ""), END.get(name, "<|turn|>")
        first = "It is 3." + ("" if name in ("headless", "final") else end)
        assert answers(tokenizer, row) == [start + first, start + "Yes, 3." + end]

    def test_tokens_are_the_rendered_conversation(self, tokenizer, name):
        """Oracle: render the whole with the template alone; only what follows the last end may be missing."""
        form = self.format(tokenizer, name)
        (row,), _ = form.encode([CHAT])
        if name == "default":
            whole = "User:\n1 + 2?\nAssistant:\nIt is 3.<eos>\nUser:\nSure?\nAssistant:\nYes, 3.<eos>\n"
        else:
            chat = [{"role": role, "content": content} for role, content in CHAT.messages]
            whole = tokenizer.apply_chat_template(chat, tokenize=False)
        found = tokenizer.decode(row.tokens)
        if name == "headless":  # has no end mark: end of sequence is put in its place
            found = found.removesuffix("<eos>")
        assert whole.startswith(found)
        assert whole[len(found) :].strip() == ""

    def test_generation_ends_at_the_end_of_turn(self, tokenizer, name):
        ends = {"<eos>", END.get(name, "<|turn|>").strip()}
        assert set(self.format(tokenizer, name).stop_ids) == set(tokenizer.convert_tokens_to_ids(sorted(ends)))

    def test_prompt_ids_are_the_prompt_of_a_row(self, tokenizer, name):
        form = self.format(tokenizer, name)
        assert [form.prompt_ids("Add.\n1 + 2")] == form.prompts([Row.single("Add.", "1 + 2", "3")])

    def test_too_long_rows_are_dropped_with_their_source(self, tokenizer, name):
        form = self.format(tokenizer, name, max_length=60)
        long, short = Row.single("i", "x " * 80, "y", source="a.jsonl:7"), Row.single("i", "x", "y", source="a.jsonl:8")
        found, report = form.encode([long, short])
        assert len(found) == report.kept == 1
        ((source, reason),) = report.dropped
        assert source == "a.jsonl:7"
        assert reason.startswith("too long: ")
        assert reason.endswith(" tokens, at most 60")


def test_the_maximum_length_is_allowed(tokenizer):
    row = Row.single("i", "x", "y")
    (found,), _ = PromptFormat(tokenizer, None, 512).encode([row])
    n = len(found.tokens)
    assert PromptFormat(tokenizer, None, n).encode([row])[1].kept == 1
    assert PromptFormat(tokenizer, None, n - 1).encode([row])[1].kept == 0


def test_own_template(tokenizer):
    form = PromptFormat(tokenizer, "{instruction} {{x}} <{input}>\n", 512)
    row = Row.single("Echo {input}.", "in", "out", group="g")
    chat = Row(messages=(("user", "hello"), ("assistant", "hi")))
    found, report = form.encode([row, chat, CHAT])
    assert [tokenizer.decode(r.tokens) for r in found] == [
        "Echo {input}. {{x}} <in>\nout<eos>",
        "hello {{x}} <>\nhi<eos>",
    ]
    assert [answers(tokenizer, r) for r in found] == [["out<eos>"], ["hi<eos>"]]
    assert found[0].group == "g"
    assert report.dropped == (("f:1", "no such prompt: the format does not fit this conversation"),)
    assert tokenizer.decode(form.prompt_ids("Say")) == "Say {{x}} <>\n"
    with pytest.raises(DataError, match="f:1: the prompt format does not fit this conversation"):
        form.prompts([CHAT])
    with pytest.raises(ConfigError, match=r"data\.prompt needs \{instruction\} or \{input\} in it, got 'Q:'"):
        PromptFormat(tokenizer, "Q:", 512)


def test_a_token_that_spans_the_border_is_not_made(tokenizer):
    """`ki` + `lo` is one token in running text; after the prompt `ki` the model can only say `lo`."""
    form = PromptFormat(tokenizer, "{instruction}", 512)
    row = Row.single("Convert to ki", "", "lograms")
    joint = tokenizer("Convert to kilograms")["input_ids"]
    prompt = tokenizer("Convert to ki")["input_ids"]
    assert joint[: len(prompt)] != prompt
    (found,), _ = form.encode([row])
    assert found.tokens[: len(prompt)].tolist() == prompt == form.prompts([row])[0]
    assert answers(tokenizer, found) == ["lograms<eos>"]


def test_a_conversation_that_the_template_refuses_is_reported(tokenizer):
    tokenizer.chat_template = BRACKETS
    system = Row(messages=(("system", "s"), ("user", "u"), ("assistant", "a")), source="f:9")
    found, report = PromptFormat(tokenizer, None, 512).encode([system, Row.single("i", "", "a")])
    assert len(found) == report.kept == 1
    assert report.dropped == (("f:9", "no such prompt: the format does not fit this conversation"),)


def test_a_template_that_rewrites_earlier_turns_is_reported(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="cannot be used for training: no such prompt: the chat template writes"):
        PromptFormat(tokenizer, None, 512)
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(DataError, match="cannot be used for training: no such answer"):
        PromptFormat(tokenizer, None, 512)
    tokenizer.chat_template = "{{ (messages | length + 1) // 4 }}" + CHATML
    _, report = PromptFormat(tokenizer, None, 512).encode([CHAT])
    assert report.dropped == (("f:1", "no such prompt: the chat template writes earlier turns anew"),)


def test_an_answer_must_be_able_to_end(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token and the prompt format none of its own"):
        PromptFormat(tokenizer, None, 512)
    tokenizer.chat_template = CHATML
    assert PromptFormat(tokenizer, None, 512).stop_ids == (tokenizer.convert_tokens_to_ids("<|turn|>"),)


def test_what_the_tokenizer_puts_first_comes_first(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    form = PromptFormat(tokenizer, "{instruction}", 512)
    (row,), _ = form.encode([Row.single("Say", "", "hi")])
    assert tokenizer.decode(row.tokens) == "<bos>Sayhi<eos>"
    assert answers(tokenizer, row) == ["hi<eos>"]
    assert form.prompt_ids("Say")[0] == bos
    tokenizer.chat_template = STRIPPED  # writes its own
    (row,), _ = PromptFormat(tokenizer, None, 512).encode([Row.single("Say", "", "hi")])
    assert (row.tokens == bos).sum() == 1


def test_the_embedded_base():
    tokenizer = AutoTokenizer.from_pretrained(tiny.base_path())
    form = PromptFormat(tokenizer, None, 512)
    rows = skill_rows("kilos", "train", 20, seed=0)
    found, report = form.encode(rows)
    assert report.kept == 20
    assert [answers(tokenizer, row) for row in found] == [[row.answer + tokenizer.eos_token] for row in rows]
    assert form.stop_ids == (tokenizer.eos_token_id,)


def test_a_run_says_the_format(tokenizer):
    classify = {"task_type": "sequence-classification", "labels": ["World", "Sports"], "max_length": 9}
    data = {"name": "a.jsonl", "prompt": "{input} ->", "labels": ["Sports"]}
    run = RunConfig.model_validate({"model": classify, "data": data})
    form = prompt_format(run, tokenizer)
    assert form.choices == ("Sports",)
    assert (form.labels, form.max_length, form.template) == (("World", "Sports"), 9, "{input} ->")
    assert prompt_format(RunConfig(), tokenizer).labels == ()
    with pytest.raises(ConfigError, match="tiny comes without a tokenizer"):
        prompt_format(RunConfig(), None)


class TestClassification:
    def test_text_and_label_index(self, tokenizer):
        form = PromptFormat(tokenizer, None, 8, labels=("World", "Sports"))
        rows = [
            Row.single("Which topic?", "Goal!", "Sports", label="Sports", group="news"),
            Row.single("", "x 1 " * 20, "World", source="a.csv:3"),  # no label column: the answer is the label
        ]
        found, report = form.encode(rows)
        assert [row.label for row in found] == [1, 0]
        assert tokenizer.decode(found[0].tokens) == "Goal!"
        assert len(found[1].tokens) == 8
        assert not any(row.answer.any() for row in found)
        assert found[0].group == "news"
        assert (report.kept, report.truncated) == (2, ("a.csv:3",))
        assert report.summary() == "2 rows kept, 1 cut at the maximum length: a.csv:3"

    def test_the_choices_of_a_task(self, tokenizer):
        form = PromptFormat(tokenizer, None, 8, labels=("World", "Sports", "Good", "Bad"), choices=("Bad", "Good"))
        rows = [Row.single("", "Fine.", "Good", label="Good"), Row.single("", "Oh no", "Bad")]
        found, _ = form.encode(rows)
        assert [(row.label, row.choices) for row in found] == [(2, (3, 2)), (3, (3, 2))]
        with pytest.raises(DataError, match=r"a:1: label 'World' is none of data\.labels: Bad, Good"):
            form.encode([Row.single("", "Goal!", "World", source="a:1")])
        with pytest.raises(ConfigError, match=r"data\.labels: Godo not in model\.labels: .*; did you mean 'Good'"):
            PromptFormat(tokenizer, None, 8, labels=("Good", "Bad"), choices=("Godo", "Bad"))
        plain = PromptFormat(tokenizer, None, 8, labels=("Good", "Bad")).encode(rows)[0]
        assert [row.choices for row in plain] == [None, None]

    def test_choices_mean_nothing_to_a_language_model(self, tokenizer):
        rows = [Row.single("Say", "", "hi")]
        (with_choices,), (without,) = (
            PromptFormat(tokenizer, None, 512, choices=c).encode(rows)[0] for c in (("a",), ())
        )
        assert with_choices.choices is None
        assert with_choices.tokens.tolist() == without.tokens.tolist()

    def test_an_unknown_label_is_refused(self, tokenizer):
        form = PromptFormat(tokenizer, None, 8, labels=("World", "Sports"))
        with pytest.raises(
            DataError, match=r"a:1: label 'sports' is none of .*: World, Sports; did you mean 'Sports'\?"
        ):
            form.encode([Row.single("", "Goal!", "sports", source="a:1")])


def test_no_rows(tokenizer):
    form = PromptFormat(tokenizer, None, 8)
    assert form.encode([])[0] == form.prompts([]) == []


def test_three_thousand_rows_take_well_under_a_second(tokenizer):
    rows = [Row.single("Convert to kilograms", f"{i} pounds on day {7 * i}", f"{i} kg") for i in range(3000)]
    form = PromptFormat(tokenizer, None, 512)
    began = time.process_time()
    assert form.encode(rows)[1].kept == 3000
    assert time.process_time() - began < 1.5  # 0.3 s on a quiet core; room for a busy one
