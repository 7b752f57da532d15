"""Make the embedded base: tokenizer and model, from generated text alone.

    python -m fedlora.tiny.pretrain --out fedlora/tiny/base

The text is three parts: the public skills; some hundred *house styles* (an instruction of random words that always
means the same random template), so that a new instruction is one more of a kind; and templates spelt out in the
instruction. Private skills and test inputs are never drawn. One core; the same seed, thread count, versions and kind of
processor give the same base. Needs torch 2.9 or later, for its Muon.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.rng import stream
from fedlora.tiny.skills import (
    CITIES,
    FAULTS,
    FIRST_NAMES,
    FORMS,
    GOODS,
    SERVICES,
    SKILLS,
    SURNAMES,
    SYMPTOMS,
    Form,
    rows,
    split_of,
)

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('only user and assistant have turns, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A lower-case word takes the space before it; digits, capitalised words and spaces before those stand alone, so that a
# name or a number is the same tokens wherever it is written.
WORDS = r"\p{N}| ?\p{Ll}+|\p{Lu}+(?!\p{Ll})|\p{Lu}\p{Ll}*| ?[^\s\p{L}\p{N}]+|\s+|."

_VERBS = (
    "Write Give Make Print Set Note Fill Format Read Put Say Name Enter Add Show Send Mark List Turn Copy Open Stamp "
    "Label Tag Sign Dial Convert Find"
).split()
_NOUNS = (
    "card ledger desk board file index notice page sheet slip form column title table line entry report archive letter "
    "order label ticket tag stamp badge folder receipt permit pass key plate sign map chart list plan bill quote offer "
    "claim contract brief draft invoice total payment fault dose number date time name record visit shift book parcel "
    "phone clerk agent buyer nurse doctor driver guard cook farmer judge teacher student porter visitor guest customer "
    "patient owner office branch depot ward clinic bank court school station hotel market store triage abroad street "
    "room"
).split()
_LINKS = "for of in on to from at with by".split()
_MARKS = "-~/~.~, ~: ~ / ~ | ~ - ~; ~ ~_~ (~) ~=~+~#~ x ~ > ~'~ at ".split("~")
_OPENERS = "|||[|(|#|No |Due |Ref |To |By |At |For |Yours, |+|* ".split("|")
_CLOSERS = "||||]|)|.|!|;| ok| only| EUR| kg".split("|")


T = TypeVar("T")


class Text(NamedTuple):
    content: str  # what the user says
    answer: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything the base depends on, but the versions."""

    seed: int = 0
    vocabulary: int = 1536
    hidden: int = 192
    intermediate: int = 384
    layers: int = 3
    heads: int = 6
    steps: int = 2400
    batch_rows: int = 64
    muon_learning_rate: float = 4e-3  # hidden matrices
    adam_learning_rate: float = 4e-3  # embeddings and norms
    warmup_steps: int = 100
    weight_decay: float = 0.02
    house_styles: int = 400
    share_public: float = 0.4
    share_styles: float = 0.45  # the rest are templates spelt out


class Style(NamedTuple):
    instruction: str
    form: Form
    answer: str  # a template


def _choose(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _template(rng: np.random.Generator, form: Form) -> str:
    """One to four fields of the form, in any order, with fixed strings between and around them."""
    fields = rng.permutation(form.fields)[: int(rng.choice([1, 2, 3, 4], p=[0.15, 0.3, 0.35, 0.2]))]
    opener = _choose(rng, _OPENERS)
    if rng.random() < 0.4:
        opener += "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[int(i)] for i in rng.integers(26, size=rng.integers(1, 4)))
        opener += _choose(rng, [" ", "-", "", ": "])
    middle = "".join(part for field in fields for part in ("{" + field + "}", _choose(rng, _MARKS)))
    return opener + middle[: middle.rindex("}") + 1] + _choose(rng, _CLOSERS)


def house_styles(rng: np.random.Generator, count: int) -> list[Style]:
    """`count` instructions, each with the one form it applies to and the template it stands for."""
    taken = {skill.instruction for skill in SKILLS.values()}
    forms = list(FORMS.values())
    styles: list[Style] = []
    while len(styles) < count:
        words = [_choose(rng, _VERBS), "the", _choose(rng, _NOUNS)]
        if rng.random() < 0.8:
            words += [_choose(rng, _LINKS), _choose(rng, ["the", "the", "this"]), _choose(rng, _NOUNS)]
        instruction = " ".join(words)
        if instruction not in taken:
            taken.add(instruction)
            form = forms[len(styles) % len(forms)]
            styles.append(Style(instruction, form, _template(rng, form)))
    return styles


def _fill(rng: np.random.Generator, form: Form, instruction: str, answer: str) -> Text:
    while True:
        fields = form.draw(rng)
        text = form.prompt.format(**fields)
        if split_of(text) == "train":
            return Text(f"{instruction}\n{text}", answer.format(**fields))


def texts(recipe: Recipe, rng: np.random.Generator) -> Iterator[Text]:
    """Training rows without end."""
    public = [skill for skill in SKILLS.values() if skill.public]
    styles = house_styles(stream(recipe.seed, "house styles"), recipe.house_styles)
    forms = list(FORMS.values())
    while True:
        kind = rng.random()
        if kind < recipe.share_public:
            skill = _choose(rng, public)
            yield _fill(rng, skill.form, skill.instruction, skill.answer)
        elif kind < recipe.share_public + recipe.share_styles:
            style = _choose(rng, styles)
            yield _fill(rng, style.form, style.instruction, style.answer)
        else:
            form = _choose(rng, forms)
            answer = _template(rng, form)
            yield _fill(rng, form, "Fill " + answer.replace("{", "<").replace("}", ">"), answer)


def make_tokenizer(recipe: Recipe) -> Any:
    """A byte-level BPE over the generated text, with the four special tokens and the chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    source = texts(recipe, stream(recipe.seed, "tokenizer text"))
    lists = [FIRST_NAMES, SURNAMES, CITIES, SERVICES, FAULTS, SYMPTOMS, GOODS, _VERBS, _NOUNS, _LINKS]
    words = sorted({space + word for entry in itertools.chain(*lists) for word in entry.split() for space in ("", " ")})
    raw.train_from_iterator(
        itertools.chain(("\n".join(next(source)) for _ in range(20_000)), words * 100),
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=[PAD, USER, ASSISTANT, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    wrapped: Any = PreTrainedTokenizerFast  # transformers leaves its constructor untyped
    return wrapped(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=256,
    )


def make_model(recipe: Recipe, tokenizer: Any) -> Any:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(recipe: Recipe, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and which of them are answer, both [batch_rows, longest]; rows of one batch are of similar length."""
    source, rng = texts(recipe, stream(recipe.seed, "pre-training text")), stream(recipe.seed, "batch order")
    while True:
        drawn = [next(source) for _ in range(16 * recipe.batch_rows)]
        asked = tokenizer([USER + text.content + ASSISTANT for text in drawn])["input_ids"]
        given = tokenizer([text.answer + END for text in drawn])["input_ids"]
        pool = sorted(zip(asked, given, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        for start in rng.permutation(16) * recipe.batch_rows:
            chunk = pool[start : start + recipe.batch_rows]
            ids = torch.full((len(chunk), len(chunk[-1][0]) + len(chunk[-1][1])), tokenizer.pad_token_id)
            is_answer = torch.zeros_like(ids, dtype=torch.bool)
            for row, (prompt, answer) in enumerate(chunk):
                ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                is_answer[row, len(prompt) : len(prompt) + len(answer)] = True
            yield ids, is_answer


def train(recipe: Recipe, model: Any, tokenizer: Any) -> list[tuple[int, float]]:
    """Muon on the hidden matrices, AdamW on the rest; cross entropy of the answers. Returns (step, loss) points."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers: list[tuple[torch.optim.Optimizer, float]] = [
        (
            torch.optim.Muon(
                hidden,
                lr=recipe.muon_learning_rate,
                weight_decay=recipe.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            recipe.muon_learning_rate,
        ),
        (
            torch.optim.AdamW(rest, lr=recipe.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
            recipe.adam_learning_rate,
        ),
    ]
    curve, recent, source = [], [], batches(recipe, tokenizer)
    model.train()
    for step in range(recipe.steps):
        ids, is_answer = next(source)
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # pads follow, causally unseen
        wanted = is_answer[:, 1:]
        loss = torch.nn.functional.cross_entropy(model.lm_head(states[wanted]), ids[:, 1:][wanted])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        left = (recipe.steps - step) / recipe.steps
        scale = min((step + 1) / recipe.warmup_steps, min(1.0, left / 0.6))
        for optimiser, rate in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
            optimiser.step()
            optimiser.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            curve.append((step + 1, round(math.fsum(recent) / len(recent), 4)))
            recent = []
            print(f"step {step + 1}: loss {curve[-1][1]}", flush=True)
    model.eval()
    return curve


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 32) -> list[str]:
    """Greedy answers to user contents, one batch, no cache; exact for a batch of any lengths."""
    encoded = tokenizer([USER + prompt + ASSISTANT for prompt in prompts])["input_ids"]
    ends = torch.tensor([len(ids) for ids in encoded])
    ids = torch.full((len(encoded), int(ends.max()) + new_tokens), tokenizer.pad_token_id)
    for row, prompt in enumerate(encoded):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    each, open_rows = torch.arange(len(encoded)), torch.ones(len(encoded), dtype=torch.bool)
    for _ in range(new_tokens):
        states = model.model(input_ids=ids[:, : int(ends.max())], use_cache=False).last_hidden_state
        token = model.lm_head(states[each, ends - 1]).argmax(-1)
        open_rows &= token != tokenizer.eos_token_id
        if not open_rows.any():
            break
        ids[each[open_rows], ends[open_rows]] = token[open_rows]
        ends += open_rows
    return [tokenizer.decode(row[len(p) : end]) for row, p, end in zip(ids, encoded, ends.tolist(), strict=True)]


def exact_match(model: Any, tokenizer: Any, skill: str, count: int, seed: int = 0) -> float:
    """Share of `count` test rows of a skill answered to the letter."""
    examples = rows(skill, "test", count, seed)
    given = answers(model, tokenizer, [f"{row['instruction']}\n{row['input']}" for row in examples])
    return sum(row["output"] == answer for row, answer in zip(examples, given, strict=True)) / count


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the Hugging Face folder: weights in half precision, to be loaded in single precision."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    model.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, but a package is for everybody
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = Recipe(seed=given.seed, steps=given.steps)

    began = time.monotonic()
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer)
    curve = train(recipe, model, tokenizer)
    seconds = time.monotonic() - began
    model = model.to(torch.float16).to(torch.float32)  # what the stored weights will be
    scores = {name: exact_match(model, tokenizer, name, 100) for name in SKILLS}
    public = {name: score for name, score in scores.items() if SKILLS[name].public}
    private = {name: score for name, score in scores.items() if not SKILLS[name].public}

    save(model, tokenizer, given.out)
    record = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "threads": given.threads,
        "seconds": round(seconds),
        "loss": curve,
        "exact_match_public": {"mean": round(float(np.mean(list(public.values()))), 4), **public},
        "exact_match_private": {"mean": round(float(np.mean(list(private.values()))), 4), **private},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
    }
    (given.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"public": record["exact_match_public"], "private": record["exact_match_private"]}, indent=1))


if __name__ == "__main__":
    main()
