"""The correct mechanism passes the audit; less noise, no clip, noise that anyone can draw and lost charges do not.

Coins and canaries are of fixed seeds, and so are the keys of the noise here, so that a test gives the same twice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import fedlora.training.private as private_training
import strategies.private as private_sums
from fedlora.audit_command import record, show, show_inversion, write
from fedlora.base import Base, load_base
from fedlora.config import ModelConfig, load_config, to_toml
from fedlora.data.rows import TokenRow
from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy.accounting import Event, Privacy, gaussian_epsilon
from fedlora.privacy.clients import ClientPrivacy
from fedlora.privacy.ledger import Key, Ledger, Terms
from fedlora.privacy.noise import Noise
from fedlora.provenance import Base as ManifestBase
from fedlora.provenance import Code, Manifest, read_manifest
from fedlora.report.log import RunLog
from server.releases import Releases
from simulations.audit import ClientAudit, RowAudit, audit_clients, audit_losses
from simulations.audit_run import audit_ledgers, audit_run, inversion
from simulations.inversion import KINDS, invert, update
from simulations.planted import CLIENT_FAULTS, ROW_FAULTS, clients_with, noise_of, rows_with

CLIENTS = ClientAudit(canaries=200, rounds=8, noise_multiplier=2.0, rank=4, width=50)
ROWS = RowAudit(
    privacy=Privacy(clip=0.5, noise_multiplier=1.0, sampling=1.0, expected=32.0),
    canaries=32,
    repeats=10,
    rank=8,
)


# -- clients


@pytest.mark.parametrize("seed", range(3))
def test_the_correct_sum_passes(seed: int) -> None:
    found = clients_with("none", CLIENTS, seed)
    assert not found.flagged
    assert found.claimed == pytest.approx(gaussian_epsilon(8**0.5 / 2.0, 1e-5))
    assert found.bounds[0].mu == pytest.approx(8**0.5 / 2.0, abs=0.5)
    assert found.best.epsilon > 0.0
    assert found.auc > 0.6


@pytest.mark.parametrize("fault", CLIENT_FAULTS)
def test_faulty_sums_are_flagged(fault: str) -> None:
    found = clients_with(fault, CLIENTS, 0)
    assert found.flagged, str(found.best)


def test_what_was_planted_is_taken_out_again() -> None:
    kept = [vars(private_sums)["Noise"], vars(private_sums)["clip_jointly"], vars(ClientPrivacy)["sd"], Releases.charge]
    state = random.getstate()
    for fault in CLIENT_FAULTS:
        clients_with(fault, replace(CLIENTS, canaries=5, rounds=1), 0)
    now = [vars(private_sums)["Noise"], vars(private_sums)["clip_jointly"], vars(ClientPrivacy)["sd"], Releases.charge]
    assert all(one is other for one, other in zip(kept, now, strict=True))
    assert random.getstate() == state


def test_noise_that_can_be_drawn_again_is_seen_by_the_replay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = clients_with("replayable", CLIENTS, 0)
    plain = [b.epsilon for b in found.bounds if "replayed" not in b.attack]
    assert max(plain) <= found.claimed
    assert found.auc == 1.0
    monkeypatch.setattr(Noise, "normal", lambda self, shape, sd: np.random.normal(0.0, sd, shape))  # as a library might
    assert audit_clients(CLIENTS, harness=np.random.default_rng(0)).flagged


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="from 3 to 200 canaries fit in each array, got 500"):
        audit_clients(replace(CLIENTS, canaries=500))
    with pytest.raises(ConfigError, match="or none; got 'x'"):
        clients_with("x", CLIENTS, 0)


# -- rows


@pytest.mark.parametrize(
    "fault", ["none", "half noise", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ROW_FAULTS[1:])]
)
def test_private_training_is_audited(load: Callable[..., Base], fault: str) -> None:
    assert rows_with(fault, load("llama"), ROWS, 0).flagged == (fault != "none")


def test_losses_tell_without_noise_and_hardly_with_it(load: Callable[..., Base]) -> None:
    privacy = replace(ROWS.privacy, noise_multiplier=4.0)
    settings = replace(ROWS, privacy=privacy, steps=20, repeats=2, learning_rate=2e-2)
    with noise_of("none", 0, private_training):
        found = audit_losses(load("llama"), settings, harness=np.random.default_rng(0))
    assert not found.flagged
    assert found.settings["auc_without_privacy"] > 0.9
    assert found.auc < 0.8


# -- reading training text out of an update


@pytest.mark.slow  # the embedded base
def test_text_is_read_from_an_unprotected_update_and_not_from_a_private_one() -> None:
    console = Console(record=True, width=200)
    trained, found = inversion(load_config(None, []), notify=lambda line: None)
    show_inversion(trained, found, KINDS, console)
    plain, adamw, private = found
    assert (plain.found, plain.wrong) == (plain.tokens, 0)
    assert plain.whole >= 1
    assert any(text.startswith(trained[0][:40]) for text in plain.texts)
    assert adamw.ranked > 0.5 * adamw.tokens
    assert (private.found, private.whole, private.texts) == (0, 0, ())
    assert private.ranked < 0.2 * private.tokens
    assert f"{plain.tokens} of {plain.tokens}" in console.export_text()


def test_inversion_refuses(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    with pytest.raises(ConfigError, match="needs a decoder with query, key and value"):
        invert(load("bert"), rows[:1], "gradient")
    with pytest.raises(ConfigError, match="an update is one of gradient, adamw, private, got 'x'"):
        update(load("llama"), {}, rows[:1], "x", noise=1.0)


# -- a run's folder


def private_run(folder: Path, *, charged: tuple[int, ...] = (1, 2), told: float | None = None) -> Path:
    """A run of two rounds of three steps by one client, whose ledger has charges for the rounds in `charged`."""
    sets = ["method.name=ffa-lora", "rounds.count=2", "rounds.clients=1", "lora.ranks=4", "training.local_steps=3"]
    sets += ["training.batch_size=4", "privacy.level=example", "privacy.noise_multiplier=1.0", "privacy.rows=20"]
    sets += ["data.holdout=0", "evaluation.server=false", "rounds.quorum=1"]
    config = load_config(None, sets)
    from fedlora.config import to_toml
    from fedlora.privacy.accounting import epsilon
    from fedlora.report.log import RunLog

    kept = folder / "clients" / "client-00000"
    kept.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "run-id").write_text("r1\n")
    event = Event(noise_multiplier=1.0, sampling=0.2, times=3)
    terms = Terms(owner="client-00000", unit="example", epsilon=9.0, delta=1e-5)
    with Ledger.open(kept / "privacy.jsonl", terms, create=True) as ledger:
        for number in charged:
            ledger.charge(Key(run="r1", round=number, release="x"), event)
        ledger.charge(Key(run="another", round=1, release="x"), event)
    told = told or epsilon([event, event], 1e-5)
    log = RunLog(folder)
    for number in (1, 2):
        said = {"epsilon": told, "delta": 1e-5, "noise_multiplier": 1.0, "steps": 3 * number}
        log.append({"event": "round", "round": number, "clients": [{"id": "client-00000"}], "privacy": said})
    return folder


def test_ledgers_beside_the_log(tmp_path: Path) -> None:
    [good] = audit_ledgers(private_run(tmp_path / "good"))
    assert not good.flagged
    assert (good.rounds, good.steps, good.charged_steps) == (2, 6, 6)
    assert good.charged == pytest.approx(good.told)
    [lost] = audit_ledgers(private_run(tmp_path / "lost", charged=(1,)))
    assert lost.flagged
    assert lost.uncharged == (2,)
    [low] = audit_ledgers(private_run(tmp_path / "low", told=1.0))
    assert low.flagged
    damaged = private_run(tmp_path / "damaged")
    (damaged / "clients" / "client-00000" / "privacy.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="no ledger with terms"):
        audit_ledgers(damaged)


def test_the_servers_ledger_of_whole_clients_beside_the_log(tmp_path: Path) -> None:
    sets = ["method.name=ffa-lora", "privacy.level=client", "privacy.noise_multiplier=2", "rounds.count=3"]
    config = load_config(None, sets)
    (tmp_path / "config.toml").write_text(to_toml(config))
    (tmp_path / "run-id").write_text("r1")
    books, log = Releases(config, tmp_path, "r1", begun=False), RunLog(tmp_path)
    for number in (1, 2, 3):
        if number < 3:
            books.charge(number)
        log.append({"event": "round", "round": number, "clients": [], "privacy": books.told()})
    books.close()
    [found] = audit_ledgers(tmp_path)
    assert (found.client, found.rounds, found.charged_steps, found.uncharged) == ("the server", 3, 2, (3,))
    assert found.flagged


def test_a_manifest_carries_the_last_audit_beside_its_claim(tmp_path: Path) -> None:
    findings = [clients_with("none", CLIENTS, 0)]
    [lost] = audit_ledgers(private_run(tmp_path / "lost", charged=(1,)))
    assert "no manifest yet" in record(tmp_path, findings, [])
    claimed = Manifest(
        format="fedlora-manifest/2",
        run="r1",
        method="fedit",
        settings="0" * 64,
        base=ManifestBase(name="tiny", revision=None, fingerprint="f", files=None),
        ranks={},
        public={},
        rounds=(),
        privacy="epsilon 5 at delta 1e-05.",
        code=Code(digest="d", versions={}, constraints=None),
    )
    path = tmp_path / "manifest.json"
    path.write_bytes(claimed.to_bytes())
    record(tmp_path, [replace(findings[0], claimed=0.1)], [])
    assert "FLAGGED" in read_manifest(path.read_bytes()).privacy
    assert "beside the claim" in record(tmp_path, findings, [lost])
    said = read_manifest(path.read_bytes()).privacy
    assert said.startswith("epsilon 5 at delta 1e-05. Audit (lower bound from one attack): sums of clients")
    assert said.endswith("; 1 ledgers read, 1 FLAGGED.")
    assert said.count("Audit") == said.count("FLAGGED") == 1
    (tmp_path / "manifest.sig").write_text("{}")
    assert "is signed and stays as it is" in record(tmp_path, [], [])
    assert read_manifest(path.read_bytes()).privacy == said


@pytest.mark.slow  # the embedded base
def test_a_run_is_audited_at_its_own_settings(tmp_path: Path) -> None:
    folder = private_run(tmp_path / "run")
    console = Console(record=True, width=200)
    findings, ledgers = audit_run(folder, quick=True, notify=lambda line: None)
    assert write(folder, findings, ledgers) == folder / "audit.json"
    assert not show(findings, ledgers, console)
    told = json.loads((folder / "audit.json").read_text())
    assert told["says"] == "lower bound from one attack"
    assert told["flagged"] is False
    assert [f["settings"]["privacy"]["sampling"] for f in told["findings"]] == [1.0, 0.2, 0.2]
    assert told["findings"][1]["claimed"] == pytest.approx(ledgers[0].told)
    assert "lower bound from one attack" in console.export_text()


@pytest.mark.slow  # the embedded base, all faults
@pytest.mark.parametrize("fault", ["none", *ROW_FAULTS])
def test_private_training_of_the_embedded_base_is_audited(fault: str) -> None:
    settings = RowAudit(privacy=Privacy(clip=1.0, noise_multiplier=1.0, sampling=1.0, expected=64.0))
    assert rows_with(fault, load_base(ModelConfig()), settings, 0).flagged == (fault != "none")
