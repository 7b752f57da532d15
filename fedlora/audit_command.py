"""What `fedlora audit` prints and writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.errors import CheckpointError
from fedlora.privacy.audit import CLAIM, Finding, Inverted, LedgerFinding
from fedlora.provenance import MANIFEST, SIGNATURE, read_manifest

__all__ = ["FILE", "record", "show", "show_inversion", "write"]

FILE: Final = "audit.json"
_AUDITED: Final = " Audit ("  # and what the bounds are; ends the claim in a manifest


def show(findings: Sequence[Finding], ledgers: Sequence[LedgerFinding], console: Console) -> bool:
    """Print what was found; whether anything is flagged."""
    table = Table("attacked", "claimed", "at least", "by", "rigorous", "AUC", "")
    for found in findings:
        rigorous = max((b.epsilon for b in found.bounds if b.way == "one run"), default=0.0)
        table.add_row(
            Text(found.what),
            f"{found.claimed:.2f}",
            f"{found.best.epsilon:.2f}",
            Text(f"{found.best.attack} ({found.best.way})" if found.best.epsilon else "-"),
            f"{rigorous:.2f}",
            f"{found.auc:.2f}",
            Text("FLAGGED", style="red") if found.flagged else "",
        )
    console.print(table)
    confidence = min((b.confidence for f in findings for b in f.bounds), default=0.0)
    delta = max((f.delta for f in findings), default=0.0)
    for line in (
        f"Epsilon at delta {delta:g}. 'at least' is a {CLAIM}, each at confidence {confidence:g}: a better attack may "
        "show more, so a number below the claim proves nothing.",
        "Normal scores: asymptotic, for many canaries. One run: rigorous, at most about the log of their number.",
        *(
            f"{f.what}: without privacy the same attack has AUC {f.settings['auc_without_privacy']:.2f}."
            for f in findings
            if "auc_without_privacy" in f.settings
        ),
    ):
        console.print(line, markup=False, soft_wrap=True)
    for ledger in ledgers:
        verdict = "FLAGGED" if ledger.flagged else "ok"
        missing = f", rounds without a charge: {', '.join(map(str, ledger.uncharged))}" if ledger.uncharged else ""
        console.print(
            f"ledger of {ledger.client}: {verdict}: {ledger.rounds} rounds answered, "
            f"{ledger.charged_steps} steps charged, epsilon {ledger.charged:.4g} "
            f"charged of {ledger.told:.4g} told{missing}",
            markup=False,
            soft_wrap=True,
        )
    return any(f.flagged for f in findings) or any(one.flagged for one in ledgers)


def write(folder: Path, findings: Sequence[Finding], ledgers: Sequence[LedgerFinding]) -> Path:
    """Write audit.json into a run folder, in one step. Raises: CheckpointError if the disk refuses."""
    data = {
        "says": CLAIM,
        "flagged": any(f.flagged for f in findings) or any(one.flagged for one in ledgers),
        "findings": [f.to_json() for f in findings],
        "ledgers": [one.to_json() for one in ledgers],
    }
    return _write(folder / FILE, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


def record(folder: Path, findings: Sequence[Finding], ledgers: Sequence[LedgerFinding]) -> str:
    """Put the bounds beside the claim in the manifest of a run folder, unless that is signed; says what was done.

    A manifest that was audited before has only the last audit. Raises: CheckpointError for a damaged manifest, or if
    the disk refuses.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder} has no manifest yet: the run has not ended; the bounds are in {FILE} alone"
    if (folder / SIGNATURE).exists():
        return f"{path} is signed and stays as it is; take {SIGNATURE} away, audit again, and sign it then"
    try:
        manifest = read_manifest(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    claim = manifest.privacy.partition(_AUDITED)[0]
    said = "; ".join(
        f"{f.what}: epsilon >= {f.best.epsilon:.3g} of {f.claimed:.3g} claimed at delta {f.delta:g}, confidence "
        f"{f.best.confidence:g}, {f.best.way}{', FLAGGED' if f.flagged else ''}"
        for f in findings
    )
    kept = f"; {len(ledgers)} ledgers read, {sum(one.flagged for one in ledgers)} FLAGGED" if ledgers else ""
    audited = replace(manifest, privacy=f"{claim}{_AUDITED}{CLAIM}): {said}{kept}.")
    return f"beside the claim in {_write(path, audited.to_bytes())}"


def _write(path: Path, data: bytes) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; make room, or check its owner") from error
    return path


def show_inversion(
    trained: Sequence[str], found: Sequence[Inverted], names: Mapping[str, str], console: Console
) -> None:
    """Print what was trained on, and what was read out of each update."""

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    for text in trained:
        say(f"trained on: {text!r}")
    table = Table("update", "tokens found", "wrong", "among the nearest", "by chance", "rows word for word")
    for one in found:
        table.add_row(
            Text(names[one.kind]),
            f"{one.found} of {one.tokens}",
            f"{one.wrong}",
            f"{one.ranked} of {one.tokens}",
            f"{one.by_chance:.1f}",
            f"{one.whole} of {one.rows}",
        )
    console.print(table)
    for one in found:
        for text in one.texts:
            say(f"read out of {names[one.kind]}: {text!r}")
    say(
        "One attack, on one step of few rows: that it fails elsewhere protects nothing. A row's last token is "
        "predicted and never read, so it is not looked for."
    )
