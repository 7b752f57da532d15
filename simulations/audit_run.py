"""What `fedlora audit` looks at: the parts as they are, or a run's own settings and the ledgers of its clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clients.memory import folder_name
from clients.private import LEDGER
from clients.resident import resident_base
from fedlora.config import ModelConfig, RunConfig, load_config
from fedlora.data import client_rows
from fedlora.data.prompt import prompt_format
from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy.accounting import Privacy, epsilon
from fedlora.privacy.audit import Finding, Inverted, LedgerFinding
from fedlora.privacy.budget import planned_steps, resolved
from fedlora.privacy.ledger import Ledger, Terms
from fedlora.report.log import read_log
from server.releases import LEDGER as RELEASES
from simulations.audit import ClientAudit, RowAudit, audit_clients, audit_losses, audit_rows
from simulations.inversion import KINDS, invert, rows_that_fit

__all__ = ["Notify", "audit_ledgers", "audit_parts", "audit_run", "inversion"]

Notify = Callable[[str], None]
DEFAULT = Privacy(clip=1.0, noise_multiplier=1.0, sampling=1.0, expected=64.0)
MOST_STEPS = 40  # of a run's training that are repeated


def audit_parts(*, quick: bool, notify: Notify) -> list[Finding]:
    """Attack the parts at settings that show faults best: sums of clients, and private training on the embedded base.

    `quick`: fewer canaries and repeats, so weaker bounds. Cost: about 15 s of one core, quick a third of it.
    """
    notify("canary clients in a sum ...")
    findings = [audit_clients(ClientAudit(canaries=200 if quick else 500))]
    base = resident_base(ModelConfig())
    settings = RowAudit(privacy=DEFAULT, repeats=3 if quick else 10)
    notify("canary rows, by gradients ...")
    findings.append(audit_rows(base, settings))
    notify("canary rows, by losses ...")
    steps = 10 if quick else 20
    slow = replace(DEFAULT, noise_multiplier=steps**0.5)
    findings.append(audit_losses(base, replace(settings, privacy=slow, steps=steps, repeats=2)))
    return findings


def audit_run(folder: Path, *, quick: bool, notify: Notify) -> tuple[list[Finding], list[LedgerFinding]]:
    """Attack training at the settings of a run, on canaries and the embedded base, and read its ledgers.

    At client level canary clients join sums of its noise and clip, without sampling, for at most 20 of its rounds.
    The run's own rows and model are not touched: what is attacked is the same code under the same clip, noise, sampling
    and rank. The claim beside each bound is that of the steps that were repeated, which may be fewer than the run's.
    Raises: ConfigError for a run without privacy; CheckpointError as `read_log`; LedgerError for a damaged ledger.
    """
    config = load_config(folder / "config.toml")
    told = _told(read_log(folder), folder)
    if told.get("unit") == "client":
        notify("canary clients in sums with the run's noise and clip, without its sampling ...")
        rounds = min(int(told["steps"]), 10 if quick else 20)
        terms = {"noise_multiplier": told["noise_multiplier"], "clip": told["clip"], "delta": told["delta"]}
        clients = ClientAudit(canaries=200 if quick else 500, rounds=rounds, **terms)
        return [audit_clients(clients)], audit_ledgers(folder)
    privacy = resolved(config, noise=told["noise_multiplier"])
    assert privacy is not None
    base = resident_base(ModelConfig())
    rank = min(base.layout.max_rank(), max(config.rank_of(i) for i in range(config.rounds.clients)))
    delta, steps = float(told["delta"]), min(planned_steps(config), 10 if quick else MOST_STEPS)
    own = RowAudit(privacy=privacy, rank=rank, steps=steps, delta=delta, repeats=1 if quick else 3)
    whole = replace(own, privacy=replace(privacy, sampling=1.0), steps=2, repeats=3 if quick else 10)
    findings = []
    for said, attack, settings in (
        ("canary rows in every step, by gradients ...", audit_rows, whole),
        ("canary rows drawn as in the run, by gradients ...", audit_rows, own),
        ("canary rows drawn as in the run, by losses ...", audit_losses, own),
    ):
        notify(said)
        findings.append(attack(base, settings))
    return findings, audit_ledgers(folder)


def audit_ledgers(folder: Path) -> list[LedgerFinding]:
    """Each simulated client's ledger against the log, and at client level the server's.

    Empty at example level where the ledgers lie with their nodes.
    Raises: ConfigError for a run without privacy; CheckpointError as `read_log`; LedgerError for a damaged ledger.
    """
    config, events = load_config(folder / "config.toml"), read_log(folder)
    told = _told(events, folder)
    run = (folder / "run-id").read_text(encoding="utf-8").strip()
    rounds = [event for event in events if event["event"] == "round"]
    whole = told.get("unit") == "client"
    each = 0 if config.tasks else 1 if whole else config.training.local_steps or 0  # tasks may have steps of their own
    answered: dict[str, set[int]] = {}
    for event in rounds:
        for client in event.get("clients", ()):
            answered.setdefault(client["id"], set()).add(event["round"])
    kept = folder / "clients"
    books = [
        (c, kept / f"{folder_name(c)}{'.whole' if whole else ''}" / LEDGER, n) for c, n in sorted(answered.items())
    ]
    if whole:
        books.append(("the server", folder / RELEASES, {event["round"] for event in rounds}))
    found = []
    for owner, path, there in books:
        if not path.is_file():
            continue
        with Ledger.open(path, _terms(path)) as ledger:
            charges = {key: event for key, event in ledger.charges.items() if key.run == run}
        found.append(
            LedgerFinding(
                client=owner,
                rounds=len(there),
                uncharged=tuple(sorted(there - {key.round for key in charges})),
                steps=each * len(there),
                charged_steps=sum(event.times for event in charges.values()),
                charged=epsilon(charges.values(), float(told["delta"])),
                told=float(told["epsilon"]),
            )
        )
    return found


def inversion(config: RunConfig, *, notify: Notify) -> tuple[list[str], list[Inverted]]:
    """Read training text out of one update, unprotected and private: the texts trained on, and what was read.

    On the embedded base and skills, whatever the settings. Cost: about ten seconds.
    """
    base = resident_base(config.model)
    rows, _ = prompt_format(config, base.tokenizer).encode(client_rows(config, 0).train)
    chosen = rows_that_fit(base, rows)
    found = []
    for kind, said in KINDS.items():
        notify(f"{said} ...")
        found.append(invert(base, chosen, kind))
    assert base.tokenizer is not None
    return [str(base.tokenizer.decode(row.tokens.tolist())) for row in chosen], found


def _told(events: Sequence[Mapping[str, Any]], folder: Path) -> Mapping[str, Any]:
    told = next((e["privacy"] for e in reversed(events) if e["event"] == "round" and e.get("privacy")), None)
    if told is None:
        raise ConfigError(
            f"{folder}: the run promises nothing of rows or clients (privacy.level is none), or no round is done yet; "
            "there is no claim to audit. Without a folder, fedlora audit attacks the parts"
        )
    return dict(told)


def _terms(path: Path) -> Terms:
    """The terms that a ledger says it has; whether they were kept is seen when it is opened."""
    try:
        with path.open(encoding="utf-8") as file:
            terms = json.loads(file.readline())["body"]["terms"]
        return Terms(owner=terms["owner"], unit=terms["unit"], epsilon=terms["epsilon"], delta=terms["delta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no ledger with terms: {error}; was it damaged?") from error
