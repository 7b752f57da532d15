"""The commands `fedlora pki`: what `fedlora.pki` does, in words. Nothing secret is printed."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora.errors import ConfigError
from fedlora.pki import (
    SERVER_DAYS,
    init,
    inventory,
    load_certificate,
    load_public_key,
    node,
    node_id,
    renew,
    revoke,
    server_names,
)

app = typer.Typer(
    help="Keys and certificates of a deployed federation: its CA, its server, its operator and its nodes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder with everything; keep it out of every app.")]
Names = Annotated[list[str] | None, typer.Option("--name", help="A DNS name of the server; may be repeated.")]
Addresses = Annotated[list[str] | None, typer.Option("--address", help="An IP address of the server; may be repeated.")]
Days = Annotated[int, typer.Option(help="How long the server's certificate holds.")]
NodeName = Annotated[str, typer.Argument(metavar="NAME", help="The node's name: small letters, digits, - and _.")]


@app.command("init")
def init_command(directory: Folder, names: Names = None, addresses: Addresses = None, days: Days = SERVER_DAYS) -> None:
    """Make CA, server certificate and operator key.

    In a new folder; without --name and --address it asks for them.
    """
    names, addresses = names or [], addresses or []
    if not names and not addresses:
        names, addresses = _ask()
    init(directory, names=names, addresses=addresses, at=_now(), days=days)
    ca, server = load_certificate(directory / "ca.pem"), load_certificate(directory / "server.pem")
    _say(f"CA certificate      {directory / 'ca.pem'}, until {ca.not_valid_after_utc:%Y-%m-%d}")
    _say(f"server certificate  {directory / 'server.pem'}, until {server.not_valid_after_utc:%Y-%m-%d}")
    _say(f"                    good for {_hosts(server_names(server))}")
    _say(f"operator key        {node_id(load_public_key(directory / 'operator.pub', 'ed25519'))}")
    _say(f"Next: `fedlora pki node {directory} NAME` for every node. Only `renew` needs {directory / 'ca.key'} again:")
    _say("move it to a place that is not on the network.")


@app.command("node")
def node_command(directory: Folder, name: NodeName) -> None:
    """Make a node's two keys and enrol it."""
    made = node(directory, name, at=_now())
    folder = directory / "nodes" / name
    _say(f"node {name}")
    _say(f"id   {made.id}")
    _say(f"Next: move {folder} to the node by a way that nobody else can read, and delete it here: it holds the node's")
    _say("private keys. `fedlora server` registers the node with Flower when it starts.")


@app.command("revoke")
def revoke_command(directory: Folder, name: NodeName) -> None:
    """Trust a node no longer; its entry is kept."""
    gone = revoke(directory, name, at=_now())
    _say(f"node {name} is revoked; id {gone.id}")
    _say("A running server refuses its answers from the next message on, and takes it off Flower at its next start.")


@app.command("renew")
def renew_command(
    directory: Folder,
    names: Names = None,
    addresses: Addresses = None,
    days: Days = SERVER_DAYS,
    ca_key: Annotated[Path | None, typer.Option(help="The CA's private key, if it is not in DIR.")] = None,
) -> None:
    """Renew the server's certificate.

    Its key stays; so do its names and addresses, unless new ones are given.
    """
    made = renew(directory, names=names or [], addresses=addresses or [], at=_now(), days=days, ca_key=ca_key)
    _say(f"server certificate  {directory / 'server.pem'}, until {made.not_valid_after_utc:%Y-%m-%d}")
    _say(f"                    good for {_hosts(server_names(made))}")
    _say("The server reads it when it starts: restart it.")


@app.command("show")
def show_command(directory: Folder) -> None:
    """List what is there and when it ends.

    Exit status 1 if something is expired, missing, or open to others.
    """
    if (directory / "signing.pub").is_file():  # a node's own folder
        _say(f"this node     {node_id(load_public_key(directory / 'signing.pub', 'ed25519'))}")
        _say(f"its operator  {node_id(load_public_key(directory / 'operator.pub', 'ed25519'))}")
        _say(f"its CA        until {load_certificate(directory / 'ca.pem').not_valid_after_utc:%Y-%m-%d}")
        return
    items = inventory(directory, at=_now())
    rows = [(i.what, i.name, i.state if i.level == "ok" else f"{i.level}: {i.state}", i.fingerprint) for i in items]
    rows.insert(0, ("what", "name", "state", "SHA-256"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=False))
        _say("  ".join((*cells, row[3])).rstrip())
    if any(i.what == "server certificate" and i.level != "ok" for i in items):
        _say(f"Next: `fedlora pki renew {directory}`, with the same names and addresses unless you give others.")
    if any(i.level == "problem" for i in items):
        raise typer.Exit(1)


def _ask() -> tuple[list[str], list[str]]:
    """The server's names and addresses from a person. Raises: ConfigError if there is none."""
    if not sys.stdin.isatty():
        raise ConfigError("the server needs --name HOST or --address IP, as its nodes will reach it")
    names = typer.prompt("DNS names of the server, with commas between (may be empty)", default="", show_default=False)
    addresses = typer.prompt("IP addresses, with commas between (may be empty)", default="", show_default=False)
    return _listed(names), _listed(addresses)


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _hosts(found: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    return ", ".join((*found[0], *found[1]))


def _now() -> datetime:
    return datetime.now(UTC)


def _say(line: str) -> None:
    Console(highlight=False).print(line, markup=False, soft_wrap=True)
