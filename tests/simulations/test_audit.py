"""The correct mechanism passes the audit; less noise, no clip, noise that anyone can draw and lost charges do not.

Coins and canaries are of fixed seeds, and so are the keys of the noise here, so that a test gives the same twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import fedlora.training.private as private_module
from fedlora.adapter import Array
from fedlora.audit_command import record, show, show_inversion, write
from fedlora.base import Base, load_base
from fedlora.config import ModelConfig, load_config
from fedlora.data.rows import TokenRow
from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy.accounting import Event, Privacy, gaussian_epsilon
from fedlora.privacy.ledger import Key, Ledger, Terms
from fedlora.privacy.noise import Noise
from fedlora.provenance import Base as ManifestBase
from fedlora.provenance import Code, Manifest, read_manifest
from fedlora.training.private import PrivateGradient
from simulations.audit import ClientAudit, RowAudit, Sum, audit_clients, audit_losses, audit_rows
from simulations.audit_run import audit_ledgers, audit_run, inversion
from simulations.inversion import KINDS, invert, update

CLIENTS = ClientAudit(
    canaries=200, rounds=8, noise_multiplier=2.0, shapes=(("A:m", (4, 50)), ("B:m", (50, 4)), ("head:w", (4, 50)))
)
ROWS = RowAudit(
    privacy=Privacy(clip=0.5, noise_multiplier=1.0, sampling=1.0, expected=32.0),
    canaries=32,
    repeats=10,
    rank=8,
)


def keys(seed: int) -> Callable[[], bytes]:
    counter = itertools.count()
    return lambda: hashlib.sha256(f"{seed}:{next(counter)}".encode()).digest()


def noise_of(factor: float, key: Callable[[], bytes]) -> Callable[[], Noise]:
    """Noise `factor` times as strong as asked for, each time of another key."""

    class Scaled(Noise):
        def normal(self, shape: tuple[int, ...], sd: float) -> np.ndarray:
            return super().normal(shape, sd * factor)

    return lambda: Scaled._with_key(key())


# -- clients


def faulty(fault: str, seed: int) -> Callable[[ClientAudit], Sum]:
    key = keys(seed) if fault != "replayable" else lambda: bytes(32)
    make_noise = noise_of({"half noise": 0.5, "a tenth": 0.1}.get(fault, 1.0), key)

    class Audited(Sum):
        def __init__(self, settings: ClientAudit) -> None:
            super().__init__(settings)
            self.noise = make_noise()

        def clipped(self, update: Mapping[str, Array]) -> Mapping[str, Array]:
            if fault == "no clip":
                return update
            if fault == "clipped one by one":
                return {k: super(Audited, self).clipped({k: x})[k] for k, x in update.items()}
            if fault == "head unclipped":
                return {**super().clipped(update), "head:w": update["head:w"]}
            return super().clipped(update)

        def charge(self, ledger: Ledger, number: int) -> None:
            if fault != "forgotten charges" or number % 4 == 0:
                super().charge(ledger, number)

    return Audited


FAULTS = ["half noise", "a tenth", "no clip", "clipped one by one", "head unclipped", "replayable", "forgotten charges"]


@pytest.mark.parametrize("seed", range(3))
def test_the_correct_sum_passes(seed: int) -> None:
    found = audit_clients(CLIENTS, faulty("none", seed), harness=np.random.default_rng(seed))
    assert not found.flagged
    assert found.claimed == pytest.approx(gaussian_epsilon(8**0.5 / 2.0, 1e-5))
    assert found.bounds[0].mu == pytest.approx(8**0.5 / 2.0, abs=0.5)
    assert found.best.epsilon > 0.0
    assert found.auc > 0.6


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_sums_are_flagged(fault: str) -> None:
    found = audit_clients(CLIENTS, faulty(fault, 0), harness=np.random.default_rng(0))
    assert found.flagged, str(found.best)


def test_noise_that_can_be_drawn_again_is_seen_by_the_replay_alone() -> None:
    found = audit_clients(CLIENTS, faulty("replayable", 0), harness=np.random.default_rng(0))
    plain = [b.epsilon for b in found.bounds if "replayed" not in b.attack]
    assert max(plain) <= found.claimed
    assert found.auc == 1.0

    class Global(Sum):  # numpy's own generator, as a library might
        def release(self, updates: Any) -> Any:
            self.noise.normal = lambda shape, sd: np.random.normal(0.0, sd, shape)  # type: ignore[method-assign]
            return super().release(updates)

    assert audit_clients(CLIENTS, Global, harness=np.random.default_rng(0)).flagged


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="from 3 to 200 canaries fit in each array, got 500"):
        audit_clients(replace(CLIENTS, canaries=500))


# -- rows


def spoil(monkeypatch: pytest.MonkeyPatch, fault: str, seed: int) -> None:
    """Put a fault into the training code itself."""
    key = keys(seed) if fault != "replayable" else lambda: bytes(32)
    factor = {"half noise": 0.5, "a tenth": 0.1}.get(fault, 1.0)
    monkeypatch.setattr(private_module, "Noise", noise_of(factor, key))
    if fault == "no clip":
        clipping = PrivateGradient._add_clipped

        def unclipped(self: PrivateGradient, total: Any, counted: Any) -> None:
            kept, self.privacy = self.privacy, replace(self.privacy, clip=1e9)
            clipping(self, total, counted)
            self.privacy = kept

        monkeypatch.setattr(PrivateGradient, "_add_clipped", unclipped)


def caught(base: Base, monkeypatch: pytest.MonkeyPatch, fault: str, settings: RowAudit, seed: int = 0) -> bool:
    spoil(monkeypatch, fault, seed)
    if fault == "forgotten charges":  # four steps ran, one was charged
        charged = replace(settings, steps=1).claimed
        found = audit_rows(base, replace(settings, steps=4), harness=np.random.default_rng(seed))
        return replace(found, claimed=charged).flagged
    return audit_rows(base, settings, harness=np.random.default_rng(seed)).flagged


ROW_FAULTS = ["half noise", "a tenth", "no clip", "replayable", "forgotten charges"]


@pytest.mark.parametrize(
    "fault", ["none", "half noise", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ROW_FAULTS[1:])]
)
def test_private_training_is_audited(load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    assert caught(load("llama"), monkeypatch, fault, ROWS) == (fault != "none")


def test_losses_tell_without_noise_and_hardly_with_it(
    load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "none", 0)
    privacy = replace(ROWS.privacy, noise_multiplier=4.0)
    settings = replace(ROWS, privacy=privacy, steps=20, repeats=2, learning_rate=2e-2)
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


def test_a_manifest_carries_the_last_audit_beside_its_claim(tmp_path: Path) -> None:
    findings = [audit_clients(CLIENTS, faulty("none", 0), harness=np.random.default_rng(0))]
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
def test_private_training_of_the_embedded_base_is_audited(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    settings = RowAudit(privacy=Privacy(clip=1.0, noise_multiplier=1.0, sampling=1.0, expected=64.0))
    assert caught(load_base(ModelConfig()), monkeypatch, fault, settings) == (fault != "none")
