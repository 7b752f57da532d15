"""The command `fedlora`. The one file of this package that may import the others, inside its commands only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fedlora.errors import ConfigError, FedLoRAError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    help="Fine-tune one language model across clients that keep their data: federated LoRA, exact at mixed ranks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(highlight=False)

Scenario = Annotated[Path | None, typer.Argument(help="A TOML file of settings; without it, the embedded default.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set training.learning_rate=1e-3")]
Out = Annotated[Path | None, typer.Option(help="A new folder for the results; without it, the next under runs/.")]


def main() -> None:
    """Run the command; an error of ours is one message on standard error and exit status 1, never a traceback."""
    try:
        app()
    except FedLoRAError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


@app.command()
def simulate(
    scenario: Scenario = None,
    method: Annotated[str | None, typer.Option(help="flora, ffa-lora, fedit, ...; see docs/METHODS.md.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How many rounds.")] = None,
    ranks: Annotated[str | None, typer.Option(help="LoRA ranks by client, repeated in turn: 16,8,8,4")] = None,
    model: Annotated[str | None, typer.Option(help="`tiny` (embedded), a Hugging Face id, or a folder.")] = None,
    data: Annotated[str | None, typer.Option(help="`skills` (embedded), a file, a folder, or a data set id.")] = None,
    task_type: Annotated[str | None, typer.Option(help="causal-lm or sequence-classification.")] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it.")] = None,
    references: Annotated[
        bool, typer.Option(help="Also train each client alone, and on all rows in one place.")
    ] = False,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a run that was stopped.")] = None,
    sets: Sets = None,
) -> None:
    """Fine-tune across simulated clients on this machine, and write a run folder with the adapter and a report."""
    from fedlora.config import differences, load_config

    options = _overrides(
        {
            "method.name": method,
            "rounds.clients": clients,
            "rounds.count": rounds,
            "lora.ranks": ranks,
            "model.name": model,
            "data.name": data,
            "model.task_type": task_type,
            "seed": seed,
        },
        sets,
    )
    if resume is not None:
        if out is not None:
            raise ConfigError("--out and --resume exclude each other: a resumed run goes on in its own folder")
        folder = resume
        config = _run_config(folder)
        wanted = load_config(scenario, options) if scenario else load_config(folder / "config.toml", options)
        changed = differences(config, wanted)
        if changed:
            raise ConfigError(
                f"{folder} was started with other settings, and a resumed run must keep them: "
                + "; ".join(changed)
                + ". Resume without options, or start a new run."
            )
    else:
        config = load_config(scenario, options)
        folder = out or _next_folder(config.method.name)

    from server.app import open_run
    from simulations.simulate import MAKE, check
    from simulations.simulate import simulate as run_simulation

    if resume is None:
        check(config)
        open_run(folder, config)
    with _Display(config.rounds.count) as display:
        result = run_simulation(config, folder, notify=display.hear, references=tuple(MAKE) if references else ())
    _print_result(result)


@app.command()
def compare(
    scenario: Scenario = None,
    methods: Annotated[str, typer.Option(help="Names with commas between, or `all`.")] = "fedit,ffa-lora,flora",
    codecs: Annotated[
        str | None, typer.Option(help="Codecs of both ways, with commas between: float32,bfloat16,int8,int4.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from the scenario's on.", min=1)] = 3,
    out: Out = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting, of all methods or of one: --set ffa-lora:training.learning_rate=1e-2"),
    ] = None,
) -> None:
    """Run several methods on several seeds; print and save a table with the local-only and centralised rows."""
    from fedlora.config import METHOD_NAMES, load_config, with_method

    names = list(METHOD_NAMES) if methods.strip() == "all" else _names(methods)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--methods needs one or more different names with commas between, got {methods!r}")
    own = [s.partition(":") for s in sets or [] if ":" in s.partition("=")[0]]
    shared = [s for s in sets or [] if ":" not in s.partition("=")[0]]
    config = load_config(scenario, shared)
    for name, _, _ in own:
        if name not in names:
            raise ConfigError(f"--set {name}:...: no method {name!r} is compared here; there are {methods}")
    each = [
        _with(with_method(config, n), [*wire, *(rest for name, _, rest in own if name == n)])
        for n in names
        for wire in ([_both_ways(n, c) for c in _names(codecs)] if codecs is not None else [[]])
    ]

    from fedlora.report.compare import comparison_markdown
    from simulations.compare import compare as run_comparison

    folder = out or _next_folder("compare")
    with _Display(config.rounds.count) as display:
        rows = run_comparison(config, folder, methods=each, seeds=seeds, notify=display.hear)
    console.print(comparison_markdown(rows), markup=False, soft_wrap=True)
    console.print(f"Saved in {folder}: comparison.md, comparison.json, comparison.html, and every run's folder.")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run, also of one that is still going."""
    from fedlora.report.html import write_report

    _run_config(run)
    console.print(f"{write_report(run)}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder (then give --model).")],
    model: Annotated[str | None, typer.Option(help="The base, if not the run's.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to score on, if not the run's test rows.")] = None,
    personal: Annotated[
        bool, typer.Option(help="Each client's held-out rows: the global adapter, its own on top, and half of it.")
    ] = False,
    sets: Sets = None,
) -> None:
    """Score the base and the tuned model on the same rows, group by group."""
    from fedlora.data import test_rows

    config, adapter = _tuned(run, model, sets)
    if personal:
        if data is not None:
            raise ConfigError("--personal scores every client on its own held-out rows: leave --data out")
        _personal_table(config, run)
        return
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"test": data})})
    base, attach_tuned, attach_bare = _attached(config, adapter)
    from fedlora.data.prompt import prompt_format
    from fedlora.data.report import tell
    from fedlora.evaluation.score import score

    rows, left_out = prompt_format(config, base.tokenizer).encode(test_rows(config))
    tell(left_out, "test rows")
    if not rows:
        raise ConfigError("nothing to score on: give --data FILE, or a run whose settings name test rows")
    attach_bare()
    before = score(base, rows, batch_size=config.evaluation.batch_size)
    attach_tuned()
    after = score(base, rows, batch_size=config.evaluation.batch_size)
    table = Table("group", "rows", "base", "tuned")
    for group in sorted(k.split("/", 1)[1] for k in after if k.startswith("counted/")):
        n = after[f"counted/{group}"]
        table.add_row(escape(group), f"{n:.0f}", *(f"{s[f'correct/{group}'] / n:.1%}" for s in (before, after)))
    n = after["counted"]
    table.add_row("all", f"{n:.0f}", f"{before['correct'] / n:.1%}", f"{after['correct'] / n:.1%}")
    console.print(table)


def _both_ways(method: str, codec: str) -> list[str]:
    """A codec up and down; flexlora takes none down."""
    return [f"wire.up={codec}", *([f"wire.down={codec}"] if method != "flexlora" else [])]


def _personal_table(config: Any, run: Path) -> None:
    from simulations.personal import score_personal

    found = score_personal(config, run, (0.0, 0.5, 1.0))
    table = Table("client", "own rows", "global", "half", "personal")
    rows = sum(s.rows for s in found)
    for s in found:
        table.add_row(escape(s.client), str(s.rows), *(f"{s.scores[w]:.1%}" for w in (0.0, 0.5, 1.0)))
    means = [sum(s.rows * s.scores[w] for s in found) / rows for w in (0.0, 0.5, 1.0)]
    table.add_row("all", str(rows), *(f"{x:.1%}" for x in means), style="bold")
    console.print(table)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder (then give --model).")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to ask; without it, some of the run's test rows.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base, if not the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    sets: Sets = None,
) -> None:
    """Answer prompts with the base and with the tuned model, side by side (greedy)."""
    config, adapter = _tuned(run, model, sets)
    _side_by_side(config, adapter, prompts or [], max_new_tokens)


@app.command()
def compose(
    sources: Annotated[
        list[str], typer.Argument(help="NAME=WEIGHT for each run folder or PEFT adapter folder; NAME alone: weight 1.")
    ],
    how: Annotated[
        str, typer.Option(help="cat (exact sum), task-arithmetic, ties, dare, dare-ties or lorahub (searches weights).")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Largest rank that is kept.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="cat, task-arithmetic, lorahub: largest share of the norm that may be lost.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="ties: share of entries that is kept; 0.2.")] = None,
    drop: Annotated[float | None, typer.Option(help="dare, dare-ties: share of entries that is dropped; 0.5.")] = None,
    coefficient: Annotated[
        float | None, typer.Option("--lambda", help="task-arithmetic, ties, dare: what the result is multiplied by; 1.")
    ] = None,
    examples: Annotated[str | None, typer.Option(help="lorahub: a file of the rows to score weights on.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="lorahub: how many weights are tried; 40.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="The base, if sources do not say or say it differently.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn: dropped entries, tried weights.")] = 0,
    out: Out = None,
    sets: Sets = None,
) -> None:
    """Combine trained adapters of one base into one, and write it as a PEFT folder."""
    from fedlora.composing import compose_folders
    from fedlora.composition import Recipe

    recipe = Recipe(
        how=how, rank=rank, max_error=max_error, density=density, drop=drop, coefficient=coefficient, seed=seed
    )
    done = compose_folders(
        sources,
        out or _next_folder("compose"),
        recipe,
        model=model,
        examples=examples,
        evaluations=evaluations,
        overrides=sets or [],
        notify=lambda line: console.print(line, markup=False, soft_wrap=True),
    )
    table = Table("source", "weight", "rank")
    for source, weight in zip(done.sources, done.weights, strict=True):
        table.add_row(escape(source.name), f"{weight:.4g}", f"{max(source.adapter.ranks.values())}")
    largest = max(done.result.adapter.ranks.values())
    table.add_row(f"{how}, error {done.result.relative_error:.2%}", "", f"{largest}", style="bold")
    console.print(table)
    for line in (f"adapter: {done.folder}", f"try:     fedlora evaluate {done.folder} --model {done.base}"):
        console.print(line, markup=False, soft_wrap=True)


def _side_by_side(config: Any, adapter: Path, prompts: Sequence[str], max_new_tokens: int) -> None:
    from fedlora.data import test_rows
    from fedlora.data.prompt import prompt_format
    from fedlora.evaluation.generate import generate as generate_tokens

    if config.model.task_type != "causal-lm":
        raise ConfigError("a classifier writes nothing: score it with fedlora evaluate, --data FILE")
    rows = [] if prompts else test_rows(config)
    rows = rows[:: max(1, len(rows) // 8)][:8]
    if not prompts and not rows:
        raise ConfigError("no prompt: give one or more, in quotes, after the folder")
    base, attach_tuned, attach_bare = _attached(config, adapter)
    form = prompt_format(config, base.tokenizer)
    ids = form.prompts(rows) if rows else [form.prompt_ids(p) for p in prompts]
    prompts = [r.prompt for r in rows] or prompts
    said = []
    for attach_one in (attach_bare, attach_tuned):
        attach_one()
        said.append(generate_tokens(base, ids, max_new_tokens=max_new_tokens, end_ids=form.stop_ids))
    table = Table("prompt", "base", "tuned", *(["right answer"] if rows else []), show_lines=True)
    for i, prompt in enumerate(prompts):
        cells = [
            prompt,
            *(base.tokenizer.decode(s[i]) for s in said),
            *([rows[i].answer] if rows else []),
        ]
        table.add_row(*(Text(c) for c in cells))
    console.print(table)


def _attached(config: Any, folder: Path) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    """(base, attach the tuned weights, attach none)."""
    from fedlora.adapter import Adapter
    from fedlora.base import load_base
    from fedlora.peft_bridge import load_adapter
    from fedlora.state import Block, zero_adapter
    from fedlora.training.attach import attach
    from fedlora.wire import blocks_id

    base = load_base(config.model)
    adapter, head = load_adapter(folder)
    whole = Adapter({**zero_adapter(base.layout, 0), **adapter.folded()})  # modules the adapter leaves as they are
    blocks = (Block(adapter=whole, born=0),)

    def bare() -> None:
        attach(base, (), blocks_id(()), None, base.initial_head)

    return base, lambda: attach(base, blocks, blocks_id(blocks), None, {**base.initial_head, **head}), bare


def _tuned(run: Path, model: str | None, sets: Sequence[str] | None) -> tuple[Any, Path]:
    from fedlora.config import load_config

    options = _overrides({"model.name": model}, sets)
    if (run / "config.toml").is_file():
        if not (run / "adapter").is_dir():
            raise ConfigError(
                f"{run} has no adapter yet: the run has not ended. Go on with: fedlora simulate --resume {run}"
            )
        return load_config(run / "config.toml", options), run / "adapter"
    if (run / "adapter_config.json").is_file():
        if model is None:
            raise ConfigError(f"{run} is an adapter, not a run: say which base it is for with --model")
        return load_config(None, options), run
    raise ConfigError(f"{run} is neither a run folder (config.toml) nor a PEFT adapter folder (adapter_config.json)")


def _run_config(folder: Path) -> Any:
    from fedlora.config import load_config

    if not (folder / "config.toml").is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no config.toml. Runs lie under runs/ unless --out said else."
        )
    return load_config(folder / "config.toml")


def _with(config: Any, options: Sequence[str]) -> Any:
    from fedlora.config import flat, load_config

    return load_config(None, options, flower=flat(config))


def _overrides(named: Mapping[str, object | None], sets: Sequence[str] | None) -> list[str]:
    return [f"{key}={value}" for key, value in named.items() if value is not None] + list(sets or [])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _next_folder(name: str) -> Path:
    taken = [int(p.name.split("-", 1)[0]) for p in Path("runs").glob("*-*") if p.name.split("-", 1)[0].isdigit()]
    return Path("runs") / f"{max(taken, default=0) + 1:03d}-{name}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _print_result(result: Any) -> None:
    table = Table("", "exact match / accuracy", "loss", "up", "down", "seconds")
    for reference in result.references:
        table.add_row(
            reference.name, f"{reference.score:.1%}", f"{reference.loss:.3f}", "", "", f"{reference.seconds:.0f}"
        )
    if result.score is not None or result.own is not None:
        table.add_row(
            "federated" if result.score is not None else "personal, each on its own rows",
            f"{result.score if result.score is not None else result.own:.1%}",
            "" if result.loss is None else f"{result.loss:.3f}",
            _megabytes(result.bytes_up),
            _megabytes(result.bytes_down),
            f"{result.seconds:.0f}",
            style="bold",
        )
    console.print(table)
    for line in (
        f"adapter: {result.folder / 'adapter'}",
        f"report:  {result.folder / 'report.html'}",
        f"try:     fedlora {result.next_command}",
    ):
        console.print(line, markup=False, soft_wrap=True)


class _Display:
    """A live line for each round on a terminal; plain lines when piped."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._live = console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._clients = 0
        self._answered = 0

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def hear(self, event: Mapping[str, Any]) -> None:
        """One line or one step of the bar for what the run does."""
        kind = event["event"]
        if kind == "run":
            self._say(f"-- {event['method']}, seed {event['seed']}")
        elif kind == "start":
            self._say(
                f"{event['clients']} clients, {event['rounds']} rounds"
                + (f", {event['done']} done before" if event["done"] else "")
            )
        elif kind == "round":
            self._clients, self._answered = event["clients"], 0
            total = self._rounds * max(1, self._clients)
            done = (event["round"] - 1) * self._clients
            self._bar.update(
                self._task, description=f"round {event['round']}/{self._rounds}", total=total, completed=done
            )
        elif kind == "answer" and event["kind"] == "train":
            self._bar.advance(self._task)
        elif kind == "refused":
            self._say(f"refused {event['client']}: {event['rule']}: {event['detail']}")
        elif kind == "retry":
            self._say(f"round {event['round']} is repeated: {event['reason']}")
        elif kind == "note":
            self._say(event["text"])
        elif kind == "reference":
            self._bar.update(self._task, description=f"{event['name']} (no federation), for comparison", total=None)
            verb = "scoring" if event["name"] == "bare base" else "training"
            self._say(f"{verb} for comparison: {event['name']}")
        elif kind == "closed":
            self._say(self._round_line(event["summary"]))

    def _round_line(self, summary: Mapping[str, Any]) -> str:
        parts = [f"round {summary['round']:>3}/{self._rounds}", f"{len(summary['clients'])} clients"]
        measured = summary.get("evaluation", {})
        final = measured.get("server", measured)
        if "score" in final:
            parts += [f"score {final['score']:.1%}", f"loss {final['loss']:.3f}"]
        parts += [
            f"up {_megabytes(summary['bytes_up'])}",
            f"down {_megabytes(summary['bytes_down'])}",
            f"{summary['seconds']:.1f} s",
        ]
        return "  ".join(parts)

    def _say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
