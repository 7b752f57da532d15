"""Attacks against robust rules, one in five clients hostile, at mixed ranks: two tables in Markdown.

    python -m simulations.benchmarks.robust --updates
    python -m simulations.benchmarks.robust --train --rounds 4 --attacks none,sign-flip,backdoor --rules none,screen

`--updates`: one round on made-up updates, in seconds. Twenty clients of ranks 4, 8, 16 and 32 in turn hold a common
signal of rank 3 and noise of their own of `--noise` times its norm; the first four are hostile. The number is
||move - mean of the honest|| / ||mean of the honest||, of W_eff, mean over seeds: 0 is perfect, 1 is as bad as not
moving. Rules in product space run under flora; median and trimmed-mean under ffa-lora, whose honest mean is another
one: its column `none (ffa-lora)` is what these two are to be compared with. Attacks on rows are not here.

`--train`: simulated runs on the embedded skills (ten clients of ranks 16 to 4, the first two hostile), score of the
last round on the server's test rows; for a backdoor also the share of triggered rows that get the attacker's answer, in
brackets. Every cell is a run, or one for each seed. `--set` takes settings as in `fedlora simulate`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from clients.resident import resident_base
from fedlora.adapter import Array, Factors
from fedlora.config import AttackConfig, MethodConfig, RobustConfig, RunConfig, load_config
from fedlora.errors import RoundFailed
from fedlora.rng import stream
from fedlora.state import Answer, Ask, GlobalState, Header, Layout, LocalTraining, Module
from server.app import open_run
from server.checkpoint import latest
from simulations.attacks import Colluders, altered, backdoor_success
from simulations.simulate import simulate
from strategies.base import Closed, Cohort, Member, get
from strategies.robust import guarded
from strategies.robust_rules import COORDINATE_RULES, hostile_count

Float64 = NDArray[np.float64]
ATTACKS = ("none", "sign-flip", "scaling", "gaussian", "collusion", "little-is-enough", "label-flip", "backdoor")
POISONS = ("label-flip", "backdoor")
RULES = (
    "none",
    "norm-bound",
    "screen",
    "krum",
    "multi-krum",
    "geometric-median",
    "centred-clipping",
    "fltrust",
    "none (ffa-lora)",
    "median",
    "trimmed-mean",
)
SHARE = 0.2
LAYOUT = Layout(modules={"q": Module(out=96, inp=64), "v": Module(out=48, inp=80)})
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
SIGNAL = 3  # rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", action="store_true", help="made-up updates, seconds")
    parser.add_argument("--train", action="store_true", help="simulated runs, minutes to hours")
    parser.add_argument("--attacks", default="", help="names with commas; all by default")
    parser.add_argument("--rules", default="", help="names with commas; all by default")
    parser.add_argument("--seeds", type=int, default=0, help="how many; 5 of updates and 1 of runs by default")
    parser.add_argument("--noise", type=float, default=1.0, help="updates: norm of a client's own noise, in signals")
    parser.add_argument("--clients", type=int, default=20, help="updates: how many")
    parser.add_argument("--rounds", type=int, default=4, help="train: how many")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="train: settings")
    options = parser.parse_args()
    if not (options.updates or options.train):
        parser.error("choose --updates, --train or both")
    attacks = options.attacks.split(",") if options.attacks else list(ATTACKS)
    rules = options.rules.split(",") if options.rules else list(RULES)
    if options.updates:
        title = f"error to the honest mean, {options.clients} clients, noise {options.noise:g}"
        some = [a for a in attacks if a not in POISONS]
        table(title, some, rules, lambda attack, rule: updates(attack, rule, options))
    if options.train:
        title, seeds = f"score after {options.rounds} rounds", options.seeds or 1
        table(title, attacks, rules, lambda attack, rule: runs(attack, rule, options.rounds, seeds, options.set))


def table(title: str, attacks: Sequence[str], rules: Sequence[str], cell: Callable[[str, str], str]) -> None:
    """A line for each attack, cell by cell as they are made."""
    print(f"\n| {title} | {' | '.join(rules)} |")
    print(f"|---|{'---:|' * len(rules)}")
    for attack in attacks:
        print(f"| {attack} |", end="", flush=True)
        for rule in rules:
            print(f" {cell(attack, rule)} |", end="", flush=True)
        print(flush=True)


def method_of(rule: str) -> str:
    return "ffa-lora" if rule in (*COORDINATE_RULES, "none (ffa-lora)") else "flora"


def settings_of(rule: str, trusted: str) -> RobustConfig:
    plain = "none" if rule.startswith("none") else rule
    return RobustConfig.model_validate(
        {"rule": plain, "attackers": SHARE, "trusted": trusted if rule == "fltrust" else None}
    )


def updates(attack: str, rule: str, options: argparse.Namespace) -> str:
    """Mean error over the seeds, or why there is none."""
    try:
        return (
            f"{mean(error_of(attack, rule, s, options.clients, options.noise) for s in range(options.seeds or 5)):.2f}"
        )
    except RoundFailed:
        return "all left out"


def error_of(attack: str, rule: str, seed: int, clients: int, noise: float) -> float:
    who = tuple(Member(id=f"client-{i:05d}", rank=(4, 8, 16, 32)[i % 4], scale=2.0) for i in range(clients))
    case = MethodConfig.model_validate({"name": method_of(rule)})
    method = guarded(get(case.name), settings_of(rule, who[-1].id))
    cohort = Cohort(
        round=1, rounds=1, members=who, settings=case, training=TRAINING, seed=seed, progress=(0.0, 1.0)
    )  # fmt: skip
    state = method.open("", LAYOUT, who, case, seed)
    honest = {c: honest_answer(ask, seed, noise) for c, ask in next(method.protocol(state, cohort)).items()}
    hostile = {m.id for m in who[: hostile_count(SHARE, clients)]} if attack != "none" else set()
    colluders = Colluders()
    sent: dict[str, Answer] = {}
    protocol = method.protocol(state, cohort)
    for c, ask in next(protocol).items():
        sent[c] = honest[c]
        if c in hostile:
            header = Header(run="", round=1, client=c, kind="train")
            rng = stream(seed, "attack", attack, c)
            settings = AttackConfig.model_validate({"kind": attack, "share": SHARE})
            sent[c] = altered(settings, header, ask, honest[c], LAYOUT, colluders=colluders, rng=rng)
    moved = product(closed(protocol, sent).state)
    plain = get(case.name).protocol(state, replace(cohort, members=tuple(m for m in who if m.id not in hostile)))
    next(plain)
    want = product(closed(plain, {c: a for c, a in honest.items() if c not in hostile}).state)
    return float(np.linalg.norm(moved - want) / np.linalg.norm(want))


def closed(protocol: object, answers: Mapping[str, Answer]) -> Closed:
    """The end of a round of one phase."""
    try:
        protocol.send(answers)  # type: ignore[attr-defined]
    except StopIteration as end:
        value: Closed = end.value
        return value
    raise AssertionError("the method asks twice")


def product(state: GlobalState) -> Float64:
    return np.concatenate([f.dense().reshape(-1) for f in state.update().values()])


def honest_answer(ask: Ask, seed: int, noise: float) -> Answer:
    """The signal, common to all, and the client's own noise, at its rank and in the form of its plan."""
    plan = ask.plan
    assert plan is not None
    common, own = stream(seed, "signal"), stream(plan.seed, "noise")
    arrays: dict[str, Array] = {}
    for name, module in LAYOUT.modules.items():
        if plan.a_from == "public":
            signal = np.zeros((module.out, plan.rank))
            signal[:, :SIGNAL] = common.standard_normal((module.out, SIGNAL))
            extra = own.standard_normal((module.out, plan.rank))
            arrays[f"B:{name}"] = signal + extra * (noise * np.linalg.norm(signal) / np.linalg.norm(extra))
            continue
        one = random_factors(common, module, SIGNAL)
        other = random_factors(own, module, plan.rank - SIGNAL)
        size = noise * np.linalg.norm(one.dense()) / np.linalg.norm(other.dense())
        arrays[f"A:{name}"] = np.concatenate([one.a, other.a])
        arrays[f"B:{name}"] = np.concatenate([one.b, size * other.b], axis=1) / plan.scale
    return Answer(examples=100, arrays={k: x.astype(np.float32) for k, x in arrays.items()})


def random_factors(rng: np.random.Generator, module: Module, rank: int) -> Factors:
    a = rng.standard_normal((rank, module.inp)) / np.sqrt(module.inp)
    return Factors(a, rng.standard_normal((module.out, rank)))


def runs(attack: str, rule: str, rounds: int, seeds: int, settings: Sequence[str]) -> str:
    """Mean score over the seeds in percent, and of a backdoor its success; or why there is none."""
    scores, successes = [], []
    for seed in range(seeds):
        config = load_config(
            None,
            [
                f"seed={seed}",
                f"method.name={method_of(rule)}",
                f"rounds.count={rounds}",
                *([] if attack == "none" else [f"attack.kind={attack}", f"attack.share={SHARE}"]),
                "evaluation.every=0",
                *([] if rule.startswith("none") else [f"robust.rule={rule}"]),
                *([f"robust.attackers={SHARE}"] if rule in ("krum", "multi-krum", *COORDINATE_RULES) else []),
                *(["robust.trusted=client-00009"] if rule == "fltrust" else []),
                *settings,
            ],
        )
        try:
            score, success = run_of(config)
        except RoundFailed:
            return "paused"
        scores.append(score)
        successes.append(success)
    told = f"{100 * mean(scores):.1f}"
    return told if attack != "backdoor" else f"{told} ({100 * mean(successes):.0f})"


def run_of(config: RunConfig) -> tuple[float, float]:
    """Score, and the success of the backdoor if that is the attack."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        open_run(folder, config)
        result = simulate(config, folder, notify=lambda event: None, bare=False)
        saved = latest(folder / "checkpoints")
        assert saved is not None and result.score is not None  # noqa: PT018
        if config.attack.kind != "backdoor":
            return result.score, 0.0
        return result.score, backdoor_success(resident_base(config.model), config, saved[1])


if __name__ == "__main__":
    main()
