"""The README.md of a released adapter, in the form that the Hugging Face Hub reads: front matter and Markdown.

It is made of the manifest, the settings and the run log alone: the same run gives the same card, without times. What
one client did or scored is never in it, nor its name. The clients' scores are pooled, and only where at least
`POOLED` clients scored: a pool of fewer shows one of them to another. By group only the server's own rows are shown.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from fedlora.config import RunConfig
from fedlora.provenance import Manifest

__all__ = ["POOLED", "model_card"]

POOLED: Final = 3  # clients
_HUB: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?", re.ASCII)
_MARKS: Final = re.compile(r"([\\`*_{}\[\]<>#|!~$])")
_NO_PRIVACY: Final = (
    "None claimed: no differential privacy and no secure aggregation. The server saw every client's update, and text "
    "that a client trained on can be recovered from an update, or from an adapter that learnt it by heart."
)
_SUMS_ALONE: Final = (
    "No differential privacy. The server saw sums of the clients' updates and no single one (secure aggregation); what "
    "a sum shows of a client, and text that the adapter learnt by heart, is not bounded."
)
_MEANS: Final = (
    "",
    'texts = tokenizer(["a text"], return_tensors="pt", padding=True)',
    "inner = model.get_base_model()",
    "states = getattr(inner, inner.base_model_prefix)(**texts).last_hidden_state",
    'there = texts["attention_mask"].unsqueeze(-1)',
    "logits = list(inner.children())[-1]((states * there).sum(1) / there.sum(1))",
)
_READS_MEANS: Final = (
    "This head reads the mean of the last hidden states. The model's own logits are not those that it was trained for."
)
_TAGS: Final = ("fedlora", "federated-learning", "lora")


def model_card(manifest: Manifest, config: RunConfig, events: Sequence[Mapping[str, Any]]) -> str:
    """The card, ending with a newline. `manifest` may lack its files, one of which is the card itself.

    The licence is left unset: what the adapter may be used for depends on the base and on the data.
    """
    parts = [
        _front(manifest, config),
        _what(manifest, config),
        _how(manifest, config, events),
        _scores(events),
        _use(manifest, config),
        _limits(manifest, config),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _front(manifest: Manifest, config: RunConfig) -> list[str]:
    """YAML: texts are written as JSON, which YAML contains."""
    lines = ["---"]
    if _on_hub(manifest.base.name):
        lines.append(f"base_model: {json.dumps(manifest.base.name)}")
    lines.append("library_name: peft")
    kind = "text-generation" if config.model.task_type == "causal-lm" else "text-classification"
    lines += [f"pipeline_tag: {kind}", "tags:"]
    return [*lines, *(f"- {json.dumps(tag)}" for tag in sorted({*_TAGS, manifest.method})), "---"]


def _what(manifest: Manifest, config: RunConfig) -> list[str]:
    base = manifest.base
    kind = "A language model's" if config.model.task_type == "causal-lm" else "A classifier's"
    lines = [
        f"# {_title(manifest, config)}",
        "",
        f"{kind} LoRA adapter, fine-tuned by federated learning with fedlora: each client trained on its own machine, "
        "its data stayed there, and a server combined the adapters.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {_text(_base_name(base.name))}{f', revision {_text(base.revision)}' if base.revision else ''} |",
        f"| fingerprint of the base | `{base.fingerprint[:16]}` |",
    ]
    for where, ranks in sorted(manifest.ranks.items()):
        span = f"{ranks.smallest}" if ranks.smallest == ranks.largest else f"{ranks.smallest} to {ranks.largest}"
        modules = "1 module" if ranks.modules == 1 else f"{ranks.modules} modules"
        lines.append(f"| {_text(where)} | {modules} of rank {span} |")
    return lines


def _title(manifest: Manifest, config: RunConfig) -> str:
    """The name that was given to the run; without one, what the adapter is."""
    if config.name != RunConfig.model_fields["name"].default:
        return _text(config.name)
    return _text(f"LoRA adapter for {_base_name(manifest.base.name)}, federated ({manifest.method})")


def _how(manifest: Manifest, config: RunConfig, events: Sequence[Mapping[str, Any]]) -> list[str]:
    start = next((e for e in reversed(events) if e["event"] == "start"), None)
    rounds = [e for e in events if e["event"] == "round"]
    lines = ["## How it was trained", "", "| | |", "|---|---|", f"| method | {_text(manifest.method)} |"]
    if start is not None:
        ranks = Counter(client["rank"] for client in start["clients"])
        held = ", ".join(f"{rank} ({count})" for rank, count in sorted(ranks.items()))
        lines += [f"| clients | {len(start['clients'])} |", f"| their ranks (clients) | {held} |"]
    training = config.training
    if training.local_steps is not None:
        local = f"{training.local_steps} step{'s' if training.local_steps > 1 else ''}"
    else:
        local = f"{training.local_epochs:g} pass{'es' if training.local_epochs != 1 else ''} over the client's rows"
    rows = f"{training.batch_size} row{'s' if training.batch_size > 1 else ''}"
    lines.append(f"| a client in a round | {local}, {rows} a step |")
    lines.append(f"| rounds | {len(manifest.rounds)} |")
    if manifest.rounds:
        counts = [r.participants for r in manifest.rounds if r.participants is not None]
        refused = sum(n for r in manifest.rounds for n in r.refused.values())
        few, many = min(counts, default=0), max(counts, default=0)
        said = f"{few if few == many else f'{few} to {many}'}" if counts else "private"
        lines.append(f"| answers in a round | {said} |")
        lines.append(f"| answers refused | {refused if counts else 'private'} |")
    if any("clients" not in e for e in rounds):
        return lines
    up, down = (sum(e.get(key, 0) for e in rounds) for key in ("bytes_up", "bytes_down"))
    return [*lines, f"| sent by all clients | {up / 1e6:.1f} MB |", f"| sent to all clients | {down / 1e6:.1f} MB |"]


def _scores(events: Sequence[Mapping[str, Any]]) -> list[str]:
    scored = [e for e in events if e["event"] == "round" and ("evaluation" in e or "border" in e)]
    if not scored:
        return []
    last = scored[-1]
    rows = [row for row in _rows(last) if row is not None]
    if not rows:
        return []
    head = f"After round {last['round']}. A score is the share of right answers, a loss the mean over answer tokens."
    return ["## Scores", "", head, "", "| rows of | score | loss |", "|---|---|---|", *rows]


def _rows(event: Mapping[str, Any]) -> Iterator[str | None]:
    measured = event.get("evaluation", {})
    server, tasks = measured.get("server", {}), ", ".join(map(_text, event.get("tasks", ())))
    of = f", in training then: {tasks}" if tasks else ""
    yield _row(f"the server{of}", server)
    for group, sums in sorted(server.get("groups", {}).items()):
        if sums["counted"]:
            yield _row(f"the server, {_text(group)}", {"score": sums["correct"] / sums["counted"]})
    for task, one in sorted(event.get("border", {}).get("server", {}).items()):
        yield _row(f"the server, task {_text(task)}", one)
    if sum(1 for c in measured.get("clients", {}).values() if c.get("counted")) >= POOLED:
        yield _row(f"the clients, held out by them{of}", measured)


def _row(name: str, measured: Mapping[str, Any]) -> str | None:
    if "score" not in measured:
        return None
    loss = f"{measured['loss']:.3f}" if "loss" in measured else ""
    return f"| {name} | {measured['score']:.1%} | {loss} |"


def _use(manifest: Manifest, config: RunConfig) -> list[str]:
    base = manifest.base
    causal = config.model.task_type == "causal-lm"
    model = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    settings = [f"revision={base.revision!r}"] if base.revision else []
    labels = [] if causal else [f"num_labels={len(config.model.labels)}"]
    name = "str(base_path())" if base.name == "tiny" else repr(_base_name(base.name))
    return [
        "## How to load it",
        "",
        "```python",
        *(["from fedlora.tiny import base_path"] if base.name == "tiny" else []),
        "from peft import PeftModel",
        f"from transformers import {model}, AutoTokenizer",
        "",
        f"base = {model}.from_pretrained({', '.join([name, *settings, *labels])})",
        f"tokenizer = AutoTokenizer.from_pretrained({', '.join([name, *settings])})",
        'model = PeftModel.from_pretrained(base, "adapter")',
        *(_MEANS if config.model.pooling == "mean" else []),
        "```",
        *(["", _READS_MEANS] if config.model.pooling == "mean" else []),
        "",
        "Check first where it comes from, with the public key of whoever released it: "
        "`fedlora verify FOLDER --key KEY.pem`, FOLDER being the one with manifest.json.",
    ]


def _limits(manifest: Manifest, config: RunConfig) -> list[str]:
    claimed = manifest.privacy != "none claimed"
    return [
        "## Privacy",
        "",
        _text(manifest.privacy) if claimed else _SUMS_ALONE if config.secure.on else _NO_PRIVACY,
        "",
        "## Limits",
        "",
        "- It works on the base named above and on no other; its limits are also those of that base.",
        "- Scores are of the rows named there. Other data, other languages and other questions were not tried.",
        "- The signature tells who released these files and that nothing changed since. It does not tell that the "
        "clients' data were good, or that every client was honest.",
        "- No licence is stated here: that of the base and the rights in the data decide.",
    ]


def _on_hub(name: str) -> bool:
    return name != "tiny" and _HUB.fullmatch(name) is not None


def _base_name(name: str) -> str:
    """The name, or of a path its last part: folders of the releasing machine are nobody's business."""
    return name if name == "tiny" or _on_hub(name) else name.rstrip("/").rsplit("/", 1)[-1]


def _text(value: object) -> str:
    """One line of plain text in Markdown."""
    return _MARKS.sub(r"\\\1", "".join(c if c.isprintable() else " " for c in str(value)))
