"""The command `fedlora`. The one file of this package that may import the others, inside its commands only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperArgument, TyperCommand
from typer.utils import get_params_from_function

from fedlora import status_command, verify_command
from fedlora.errors import ConfigError, FedLoRAError
from fedlora.pki_commands import app as pki

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
app.add_typer(pki, name="pki", short_help="Keys and certificates of a deployed federation.")
console = Console(highlight=False)
aside = Console(stderr=True, highlight=False)  # what is going on, beside what was asked for

Scenario = Annotated[
    Path | None,
    typer.Argument(help="A TOML file of settings, or a shipped scenario: tasks. Without it, the embedded default."),
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set training.learning_rate=1e-3")]
Out = Annotated[Path | None, typer.Option(help="A new folder for the results; without it, the next under runs/.")]


class _Command(TyperCommand):
    """A command whose help is whole. Beside rich, typer 0.20 escapes brackets also where rich's markup is off; with
    click 8.5 it drops the words about arguments."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        told = get_params_from_function(self.callback) if self.callback is not None else {}
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and parameter.name in told:
                parameter.help = told[parameter.name].default.help
        super().format_help(ctx, formatter)
        formatter.buffer = [part.replace("\\[", "[") for part in formatter.buffer]

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: typer's `format_options` writes them, and click 8.5 would do so once more."""


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
        bool, typer.Option("--references", help="Also train each client alone, and on all rows in one place.")
    ] = False,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a run that was stopped.")] = None,
    sets: Sets = None,
) -> None:
    """Fine-tune across simulated clients on this machine.

    It writes a run folder with the adapter and a report.
    """
    from fedlora.config import differences, load_config
    from fedlora.display import Display

    scenario = _shipped(scenario)
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
        folder = out or _next_folder(config.continual.method if config.tasks else config.method.name)

    from server.app import open_run
    from simulations.simulate import MAKE, check
    from simulations.simulate import simulate as run_simulation

    if resume is None:
        if folder.exists():
            open_run(folder, config)  # says so before anything is loaded
        _loading(config)
        check(config)
        open_run(folder, config)
    with Display(console, config) as display:
        result = run_simulation(config, folder, notify=display.hear, references=tuple(MAKE) if references else ())
    _print_result(result)


@app.command()
def compare(
    scenario: Scenario = None,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas between, or `all`; fedit,ffa-lora,flora if nothing is said.")
    ] = None,
    codecs: Annotated[
        str | None, typer.Option(help="Codecs of both ways, with commas between: float32,bfloat16,int8,int4.")
    ] = None,
    continual: Annotated[
        str | None,
        typer.Option(help="With tasks: ways to keep them apart, each with a method if wanted: sequential,o-lora:fedit"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from the scenario's on.", min=1)] = 3,
    out: Out = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting, of all rows or of one: --set ffa-lora:training.learning_rate=1e-2"),
    ] = None,
) -> None:
    """Compare methods over several seeds.

    It prints and saves a table, with the rows of clients alone and of all data in one place. With --continual the rows
    are ways to learn tasks one after another, and the table says what each of them forgot.
    """
    from fedlora.config import METHOD_NAMES, load_config, with_method
    from fedlora.display import Display

    if continual is not None and (methods is not None or codecs is not None):
        other = "--methods" if methods is not None else "--codecs"
        raise ConfigError(
            f"--continual and {other} exclude each other: a row is a way, and brings its method as way:method, "
            "e.g. --continual o-lora:fedit"
        )
    text = continual if continual is not None else methods if methods is not None else "fedit,ffa-lora,flora"
    names = list(METHOD_NAMES) if continual is None and text.strip() == "all" else _names(text)
    if not names or len(set(names)) < len(names):
        option = "methods" if continual is None else "continual"
        raise ConfigError(f"--{option} needs one or more different names with commas between, got {text!r}")
    own = [(name, s[len(name) + 1 :] if name else s) for s in sets or [] for name in [_row_of(s)]]
    for name, _ in own:
        if name and name not in names:
            what = "method" if continual is None else "way"
            raise ConfigError(f"--set {name}:...: no {what} {name!r} is compared here; there are {text}")
    config = load_config(_shipped(scenario), [rest for name, rest in own if not name])
    mine = {n: [rest for name, rest in own if name == n] for n in names}

    from fedlora.report.compare import comparison_markdown, ways_markdown
    from simulations.compare import compare as run_comparison
    from simulations.compare import compare_ways, with_way

    folder = out or _next_folder("compare")
    if continual is not None:
        ways = {n: _with(with_way(config, n), mine[n]) for n in names}
        with Display(console, config) as display:
            told = ways_markdown(compare_ways(config, folder, ways=ways, seeds=seeds, notify=display.hear))
    else:
        each = [
            _with(with_method(config, n), [*wire, *mine[n]])
            for n in names
            for wire in ([_both_ways(n, c) for c in _names(codecs)] if codecs is not None else [[]])
        ]
        with Display(console, config) as display:
            told = comparison_markdown(run_comparison(config, folder, methods=each, seeds=seeds, notify=display.hear))
    console.print(told, markup=False, soft_wrap=True)
    line = f"Saved in {folder}: comparison.md, comparison.json, comparison.html, and every run's folder."
    console.print(line, markup=False, soft_wrap=True)


@app.command()
def plan(
    scenario: Scenario = None,
    privacy: Annotated[
        bool, typer.Option("--privacy", help="Epsilon, noise, bytes and seconds of training in private.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A picture of epsilon against rounds, an SVG file.")] = None,
    sets: Sets = None,
) -> None:
    """Say what a run would promise and cost; nothing is trained."""
    from fedlora.config import load_config

    if not privacy:
        raise ConfigError("plan: say what to plan; there is --privacy")
    config = load_config(_shipped(scenario), sets or [])
    from fedlora.base import load_base
    from fedlora.plan_command import show
    from simulations.step_time import step_seconds

    _loading(config)
    base = load_base(config.model)
    show(config, base.layout, console, out, step=step_seconds(config, base))


@app.command()
def audit(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder made with privacy on; without it, the parts.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer canaries and repeats: weaker bounds.")] = False,
    inversion: Annotated[
        bool, typer.Option("--inversion", help="Instead: read training text out of one update, to see why.")
    ] = False,
) -> None:
    """Attack our own privacy with canaries.

    What an attacker learnt is held beside what is claimed. Exit status 2 if something is flagged: an
    attack learnt more than the claim allows, or a ledger lacks a charge.
    """
    from fedlora.audit_command import record, show, show_inversion, write

    def notify(line: str) -> None:
        aside.print(line, style="dim", markup=False)

    if inversion:
        if run is not None or quick:
            raise ConfigError("audit --inversion shows the embedded base and skills: leave the folder and --quick out")
        from fedlora.config import load_config
        from simulations.audit_run import inversion as run_inversion
        from simulations.inversion import KINDS

        trained, read = run_inversion(load_config(None, []), notify=notify)
        show_inversion(trained, read, KINDS, console)
        return
    from simulations.audit_run import audit_parts, audit_run

    if run is not None:
        _run_config(run)
        findings, ledgers = audit_run(run, quick=quick, notify=notify)
        console.print(f"written: {write(run, findings, ledgers)}", markup=False, soft_wrap=True)
        console.print(record(run, findings, ledgers), markup=False, soft_wrap=True)
    else:
        findings, ledgers = audit_parts(quick=quick, notify=notify), []
    if show(findings, ledgers, console):
        raise typer.Exit(2)


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
        bool,
        typer.Option("--personal", help="Each client's held-out rows: the global adapter, its own on top, half of it."),
    ] = False,
    without: Annotated[
        str | None, typer.Option(help="With tasks: score all of them also without this one's adapter.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Score the base and the tuned model on the same rows.

    Group by group, or task by task.
    """
    from fedlora.data import test_rows

    config, adapter = _tuned(run, model, sets)
    if config.tasks:
        if personal or data is not None:
            raise ConfigError(
                f"{run} has tasks, and each is scored on its own test rows: leave "
                f"{'--personal' if personal else '--data'} out"
            )
        _tasks_table(config, run, without)
        return
    if without is not None:
        raise ConfigError(f"--without {without}: {run} was trained without tasks, so there is none to leave out")
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


def _row_of(setting: str) -> str:
    """The row that a setting of `compare` is for, before the last colon of its key; empty: all rows."""
    return setting.partition("=")[0].rpartition(":")[0]


def _both_ways(method: str, codec: str) -> list[str]:
    """A codec up and down; flexlora takes none down."""
    return [f"wire.up={codec}", *([f"wire.down={codec}"] if method != "flexlora" else [])]


def _tasks_table(config: Any, run: Path, without: str | None) -> None:
    """Scores by task and way of inference; with `without`, of the sums also after one task's adapter is taken out."""
    from statistics import fmean

    from simulations.inference import score_tasks

    found = score_tasks(config, run, without=without)
    heads = {
        "summed": "all adapters",
        "known": "task known",
        "routed": "task found",
        "open": "all classes",
        "weighed": "weighed",
        "mixed": "mixed",
    }
    if config.model.task_type == "causal-lm":
        del heads["open"]  # no classes: the same as all adapters
    columns: list[tuple[str, Mapping[str, float], bool]] = [("base", found.base, False)]
    for way, head in heads.items():
        if way not in found.ways or (found.without is not None and way not in ("summed", "known")):
            continue
        columns.append((head, found.ways[way], False))
        if found.without is not None:
            less = found.without[way]
            columns.append((f"without {without}", less, False))
            columns.append(("change", {n: less[n] - found.ways[way][n] for n in less}, True))
    if found.without is None and "routing" in found.ways:
        columns.append(("routing", found.ways["routing"], False))
    table = Table(
        "task", *(Column(escape(head), justify="right") for head in ("rows", *(head for head, _, _ in columns)))
    )
    for name, rows in found.rows.items():
        table.add_row(Text(name), str(rows), *(_share(column[name], signed) for _, column, signed in columns))
    means = [_share(fmean(column.values()), signed) for _, column, signed in columns]
    table.add_row("mean", "", *means, style="bold")
    console.print(table)
    if without is not None:
        console.print(
            f"Without {without}: its adapter is taken out of the sum, exactly; the others stay as they were trained, "
            "those after it on top of it.",
            markup=False,
            soft_wrap=True,
        )


def _share(value: float, signed: bool) -> str:
    """A share, or a difference of two in points."""
    return f"{100 * value:+.1f}" if signed else f"{value:.1%}"


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
    task: Annotated[
        str | None,
        typer.Option(
            help="With tasks: a name; `all`, every adapter at once; `auto`, the task that each prompt is most like "
            "(if nothing is said, and it can be found); `mix`, the two likeliest, each as much as it is likely."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut off.", min=1)] = 48,
    sets: Sets = None,
) -> None:
    """Answer prompts with the base and with the tuned model.

    Side by side; each token is the likeliest one.
    """
    config, adapter = _tuned(run, model, sets)
    if config.tasks:
        _by_task(config, run, prompts or [], task, max_new_tokens)
        return
    if task is not None:
        raise ConfigError(f"--task {task}: {run} was trained without tasks: leave it out")
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
    without: Annotated[
        list[str] | None,
        typer.Option(help="Of one run with tasks: the exact sum of all tasks but this one; may be given again."),
    ] = None,
    out: Out = None,
    sets: Sets = None,
) -> None:
    """Combine trained adapters of one base into one.

    It is written as a PEFT folder. With --without it is one run's tasks, but those that are named.
    """
    from fedlora.composing import compose_folders
    from fedlora.composition import Recipe

    if without:
        given: dict[str, object] = {
            "--how": None if how == "cat" else how,
            "--rank": rank,
            "--max-error": max_error,
            "--density": density,
            "--drop": drop,
            "--lambda": coefficient,
            "--examples": examples,
            "--evaluations": evaluations,
            "--model": model,
            "--seed": seed or None,
            "--set": sets or None,
        }
        wrong = [option for option, value in given.items() if value is not None]
        _compose_without(sources, without, wrong, out or _next_folder("compose"))
        return
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
    reads = " --set model.pooling=mean" if any(s.pooling == "mean" for s in done.sources) else ""
    for line in (f"adapter: {done.folder}", f"try:     fedlora evaluate {done.folder} --model {done.base}{reads}"):
        console.print(line, markup=False, soft_wrap=True)


def _compose_without(sources: Sequence[str], without: Sequence[str], wrong: Sequence[str], out: Path) -> None:
    """The sum of all tasks of a run but some. `wrong` are options that say how sources are combined."""
    from fedlora.composing import parse_source
    from simulations.removal import compose_without

    run, weight = parse_source(sources[0])
    if len(sources) > 1 or weight is not None:
        raise ConfigError(f"--without takes a task out of one run: give its folder alone, got {' '.join(sources)}")
    if wrong:
        raise ConfigError(
            f"--without sums the other tasks exactly: leave {', '.join(wrong)} out; the folder that it writes can be a "
            "source of fedlora compose"
        )
    _run_config(run)
    left = compose_without(run, without, out)
    table = Table("task", "rank")
    for name, rank in left.ranks.items():
        table.add_row(Text(name), f"{rank}")
    table.add_row(Text(f"without {', '.join(left.on_top)}, exact"), f"{left.rank}", style="bold")
    console.print(table)
    for name, above in left.on_top.items():
        if above:
            line = f"{', '.join(above)}: trained on top of {name}; what is lost without it: "
            console.print(f"{line}fedlora evaluate {run} --without {name}", markup=False, soft_wrap=True)
    console.print(f"adapter: {left.folder}", markup=False, soft_wrap=True)


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


def _by_task(config: Any, run: Path, prompts: Sequence[str], task: str | None, max_new_tokens: int) -> None:
    from simulations.inference import answers

    _loading(config)
    said = answers(config, run, prompts, task=task, max_new_tokens=max_new_tokens)
    rows = [] if prompts else ["right answer"]
    table = Table("prompt", "task", "base", "tuned", *rows, show_lines=True)
    for one in said:
        found = f"{one.task}, not {one.of}" if one.of and one.task not in ("all", one.of) else one.task
        if one.shares:
            found += ": " + ", ".join(f"{name} {share:.0%}" for name, share in one.shares.items())
        cells = [one.prompt, found, one.base, one.tuned, *([one.right] if rows else [])]
        table.add_row(*(Text(c) for c in cells))
    console.print(table)


def _loading(config: Any) -> None:
    """Says that a model is being read, which can take a while."""
    aside.print(f"loading {config.model.name} ...", style="dim", markup=False)


def _attached(config: Any, folder: Path) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    """(base, attach the tuned weights, attach none)."""
    from fedlora.adapter import Adapter
    from fedlora.base import load_base
    from fedlora.peft_bridge import load_adapter
    from fedlora.state import Block, zero_adapter
    from fedlora.training.attach import attach
    from fedlora.wire import blocks_id

    _loading(config)
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
        config = load_config(run / "config.toml", options)
        if not config.tasks and not (run / "adapter").is_dir():  # tasks are read from the checkpoint
            raise ConfigError(
                f"{run} has no adapter yet: the run has not ended. Go on with: fedlora simulate --resume {run}"
            )
        return config, run / "adapter"
    if (run / "adapter_config.json").is_file():
        if model is None:
            raise ConfigError(f"{run} is an adapter, not a run: say which base it is for with --model")
        return load_config(None, options), run
    raise ConfigError(f"{run} is neither a run folder (config.toml) nor a PEFT adapter folder (adapter_config.json)")


@app.command()
def server(
    config: Annotated[Path, typer.Option("--config", help="The server's deploy.toml; see docs/DEPLOYMENT.md.")],
) -> None:
    """Serve real nodes over TLS, and conduct the run.

    It starts Flower, tells every closed round, and ends when the adapter is there. Exit status 0 when the run is done,
    3 when it paused and can be gone on with, 1 for everything else.
    """
    from fedlora.deploy import read_deploy
    from server.serve import serve

    outcome = serve(read_deploy(config), config, notify=_step)
    _step({"event": outcome.state, "detail": outcome.detail})
    if outcome.state != "done":
        raise typer.Exit(3 if outcome.state in ("paused", "stopped") else 1)


@app.command()
def node(
    config: Annotated[Path, typer.Option("--config", help="The node's node.toml; see docs/DEPLOYMENT.md.")],
    part: Annotated[str, typer.Option(help="both, worker or relay: the halves may run under two users.")] = "both",
) -> None:
    """Be a node: train what the operator signed.

    It holds the data and the base, and runs until it is stopped.
    """
    from clients.node import PARTS, serve
    from fedlora.deploy import read_node

    if part not in PARTS:
        raise ConfigError(f"--part: one of {', '.join(PARTS)}, got {part!r}")
    serve(read_node(config), config, part=part, notify=_step)


def _step(event: Mapping[str, Any]) -> None:
    """One line of a server's or node's log: the time, what happened, and the rest as key=value."""
    rest = " ".join(f"{k}={v}" for k, v in event.items() if k != "event")
    aside.print(f"{datetime.now():%H:%M:%S} {event['event']} {rest}".rstrip(), markup=False, soft_wrap=True)


def _shipped(scenario: Path | None) -> Path | None:
    """The file as given; of a bare name that is no file here, the shipped scenario of that name.

    Raises: ConfigError for a bare name without an ending that is neither, with those that there are.
    """
    if scenario is None or scenario.exists() or len(scenario.parts) > 1 or scenario.suffix not in ("", ".toml"):
        return scenario
    import simulations

    folder = Path(next(iter(simulations.__path__))) / "scenarios"
    found = folder / f"{scenario.stem}.toml"
    if not found.is_file() and not scenario.suffix:
        there = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise ConfigError(f"{scenario} is neither a file nor a shipped scenario; shipped are {there}")
    return found if found.is_file() else scenario


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


def _print_result(result: Any) -> None:
    from fedlora.display import megabytes

    if result.stream is not None:
        _print_stream(result)
        return
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
            megabytes(result.bytes_up),
            megabytes(result.bytes_down),
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


def _print_stream(result: Any) -> None:
    """What a run with tasks kept and lost, and what came of it."""
    from fedlora.display import megabytes
    from fedlora.report.log import read_log
    from fedlora.report.stream import stream_table

    console.print(f"\n{stream_table(read_log(result.folder))}", markup=False, soft_wrap=True)
    made = {"adapter": "all tasks", "tasks": "an adapter for each"}  # a way that trains none writes none
    for line in (
        f"sent:    {megabytes(result.bytes_up)} up, {megabytes(result.bytes_down)} down, in {result.seconds:.0f} s",
        *(f"{n + ':':9}{result.folder / n} ({what})" for n, what in made.items() if (result.folder / n).is_dir()),
        f"report:  {result.folder / 'report.html'}",
        f"try:     fedlora {result.next_command}",
    ):
        console.print(line, markup=False, soft_wrap=True)


app.command()(status_command.status)
app.command(short_help="Check a release: signature, files, adapter, base, history.")(verify_command.verify)
app.command(short_help="Sign the manifest of a release.")(verify_command.sign)
for _registered in (*app.registered_commands, *pki.registered_commands):
    _registered.cls = _Command

if __name__ == "__main__":
    main()
