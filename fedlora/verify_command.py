"""`fedlora verify` and `fedlora sign`: who released a folder, and whether it is still what was released."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["sign", "verify"]

console = Console(highlight=False)

Folder = Annotated[Path, typer.Argument(help="A run folder, or a copy of its manifest, signature and adapters.")]


def verify(
    folder: Folder,
    key: Annotated[
        list[Path] | None,
        typer.Option(help="A public key (PEM) that you trust; may be given again. Take it from its owner."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base's folder: is it the one trained on?")] = None,
) -> None:
    """Check signature, files, adapter, base and history of a release; exit status 0 only if all of it is right."""
    from fedlora.pki import load_public_key
    from fedlora.verification import verify as check

    report = check(folder, [load_public_key(path, "ed25519") for path in key or ()], base_folder=base)
    table = Table("check", "", "what was found")
    for one in report.checks:
        verdict = "wrong" if one.findings else "ok" if one.done else "-"
        for line in one.findings or (one.said,):
            table.add_row(_plain(one.name), verdict, _plain(line))
    console.print(table)
    console.print("VERIFIED" if report.verified else "NOT VERIFIED")
    if not report.verified:
        raise typer.Exit(1)


def sign(
    folder: Folder,
    key: Annotated[Path, typer.Option(help="The private key (Ed25519, PEM, mode 0600).")],
) -> None:
    """Sign the manifest of a release, on whatever machine the signing key lies."""
    from fedlora.pki import load_private_key, node_id
    from fedlora.provenance import sign as write

    secret = load_private_key(key, "ed25519")
    path = write(folder, secret)
    console.print(f"{path}: signed by key {node_id(secret.public_key())[:16]}", markup=False, soft_wrap=True)


def _plain(text: str) -> Text:
    """As it is, but for what could move a terminal's cursor."""
    return Text("".join(c if c.isprintable() else "?" for c in text))
