"""A deployment of three nodes as its files tell it, three rounds into a run of five; no process runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedlora import pki
from fedlora.config import load_config, to_toml
from fedlora.deploy import DeployFile, read_deploy
from fedlora.report.log import RunLog

NOW = datetime.now(UTC).replace(microsecond=0)
NODES = ("east", "north", "west")
RUN = "0123456789abcdef"
SETTINGS = ["rounds.count=5", "rounds.clients=3", "method.name=ffa-lora"]
DEPLOY = 'settings = "run.toml"\nfolder = "run"\nkeys = "keys"\nhost = "127.0.0.1"\nmetrics = 0\n'


def deployment(folder: Path) -> DeployFile:
    """Keys of three nodes, settings, and nothing that a server wrote."""
    pki.init(folder / "keys", names=[], addresses=["127.0.0.1"], at=NOW, days=365)
    for name in NODES:
        pki.node(folder / "keys", name, at=NOW)
    (folder / "deploy.toml").write_text(DEPLOY)
    (folder / "run.toml").write_text(to_toml(load_config(overrides=SETTINGS)))
    return read_deploy(folder / "deploy.toml")


def ids(deploy: DeployFile) -> dict[str, str]:
    """name -> stable id"""
    return {node.name: node.id for node in pki.registry(deploy.keys, revoked=True)}


def write_run(deploy: DeployFile) -> None:
    """The run folder after three rounds: north trained in all, east in the first two, west in none."""
    deploy.folder.mkdir()
    (deploy.folder / "config.toml").write_text(to_toml(load_config(overrides=SETTINGS)))
    (deploy.folder / "run-id").write_text(f"{RUN}\n")
    who, log = ids(deploy), RunLog(deploy.folder)
    here = [{"id": who[name], "rank": 4} for name in ("east", "north")]
    refused = [{"client": "node 7", "rule": "other base", "detail": "\x1b[2J"}]
    log.append({"event": "start", "run": RUN, "method": "ffa-lora", "config": {}, "clients": here, "refused": refused})
    for number in (1, 2, 3):
        names = ("east", "north")[number // 3 :]
        event: dict[str, Any] = {
            "event": "round",
            "round": number,
            "seconds": 10.0 * number,
            "clients": [{"id": who[name], "loss_after": 0.4321, "bytes_up": 7} for name in names],
            "bytes_up": 1_000_000 * number,
            "bytes_down": 3_000_000,
            "refused": [{"client": who["west"], "rule": "my own rule", "detail": "loss 0.4321"}] if number == 2 else [],
            "evaluation": {"score": 0.5, "loss": 0.4321, "clients": {who[name]: {"score": 0.123} for name in names}},
        }
        if number == 2:
            event["evaluation"]["server"] = {"score": 0.75, "loss": 0.4321}
        if number == 3:
            event["quarantined"] = [who["west"]]
        log.append(event)


def journal(deploy: DeployFile, *events: dict[str, Any], first: datetime = NOW) -> None:
    """Append lines to `run.jsonl`, one second apart."""
    path = deploy.state / "logs" / "run.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for i, event in enumerate(events):
            time = (first + timedelta(seconds=i)).isoformat(timespec="milliseconds")
            file.write(json.dumps({"time": time, **event}) + "\n")


def steps(deploy: DeployFile) -> list[dict[str, Any]]:
    """What a conductor tells that is in its fourth round: east has answered, west was refused, north trains."""
    who = ids(deploy)
    return [
        {"event": "conducting", "run": RUN},
        {"event": "waiting", "online": 1, "wanted": 3},
        {"event": "start", "clients": 3, "rounds": 5, "done": 3, "strikes": {who["west"]: 1}},
        {"event": "round", "round": 4, "clients": 3},
        {"event": "answer", "kind": "measure", "round": 4, "client": who["east"]},
        {"event": "answer", "kind": "measure", "round": 4, "client": who["north"]},
        {"event": "answer", "kind": "train", "round": 4, "client": who["east"]},
        {"event": "refused", "client": who["west"], "rule": "not finite", "strikes": 2},
    ]
