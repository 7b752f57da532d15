"""The Prometheus endpoint over HTTP, and that what the conductor's journal writes is what status reads."""

from __future__ import annotations

import ast
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedlora import watching
from fedlora.deploy import DeployFile
from fedlora.errors import ConfigError
from fedlora.watched_events import RULES
from fedlora.watching import STATES, programs_record, watcher
from server import deployed
from server.watch import endpoint
from tests.watched import NODES, NOW, RUN, deployment, ids, journal, steps, write_run

ROOT = Path(__file__).resolve().parents[2]
Labels = frozenset[tuple[str, str]]


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[DeployFile]:
    found = deployment(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = (tmp_path / "deploy.toml").read_text()
    (tmp_path / "deploy.toml").write_text(text.replace("metrics = 0", f"metrics = {port}"))
    return found.model_copy(update={"metrics": port})


def scrape(deploy: DeployFile) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{deploy.metrics}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def parsed(text: str) -> dict[tuple[str, Labels], float]:
    """(name, labels) -> value, as Prometheus' own parser reads the text."""
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_a_scrape_says_what_status_says(deploy: DeployFile) -> None:
    write_run(deploy)
    journal(deploy, *steps(deploy), {"event": "refused", "client": ids(deploy)["north"], "rule": "deadline"})
    (deploy.state / watching.PROGRAMS).write_bytes(programs_record({"server": os.getpid()}))
    with endpoint(deploy):
        text = scrape(deploy)
        found = parsed(text)
        journal(deploy, {"event": "answer", "kind": "train", "round": 4, "client": ids(deploy)["north"]})
        later = parsed(scrape(deploy))

    def value(name: str, **labels: str) -> float:
        return found[f"fedlora_{name}", frozenset(labels.items())]

    assert (value("round"), value("rounds"), value("nodes_enrolled"), value("quarantined")) == (3, 5, 3, 1)
    assert (value("round_seconds"), value("answers_total")) == (30, 3)
    assert (value("refusals_total", rule="not finite"), value("missing_total", rule="deadline")) == (1, 1)
    assert ("fedlora_refusals_total", frozenset({("rule", "deadline")})) not in found
    assert (value("bytes_total", direction="up"), value("bytes_total", direction="down")) == (6e6, 9e6)
    programs = {"server": 1.0, "superlink": 0.0, "executor": 0.0, "conductor": 0.0}
    assert {name: value("up", program=name) for name in programs} == programs
    assert {state: value("state", state=state) for state in STATES} == dict.fromkeys(STATES, 0.0) | {"starting": 1.0}
    assert value("certificate_days") == pytest.approx(365.0, abs=0.1)
    assert later["fedlora_answers_total", frozenset()] == 4
    for one in (*ids(deploy).values(), *NODES, RUN, "0.4321", "0.123"):
        assert one not in text


def test_before_anything_ran_what_is_not_known_has_no_series(deploy: DeployFile) -> None:
    with endpoint(deploy):
        found = parsed(scrape(deploy))
    assert found["fedlora_state", frozenset({("state", "not started")})] == 1
    assert ("fedlora_round_seconds", frozenset()) not in found


def test_scrapes_at_once_and_one_that_cannot_be_answered(deploy: DeployFile) -> None:
    write_run(deploy)
    with endpoint(deploy):
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: parsed(scrape(deploy)), range(24)))
        for one in texts:
            assert one["fedlora_bytes_total", frozenset({("direction", "up")})] == 6e6
        (deploy.folder / "run-id").unlink()
        (deploy.folder / "run-id").mkdir()
        with pytest.raises(urllib.error.HTTPError, match="500"):
            scrape(deploy)
        (deploy.folder / "run-id").rmdir()
        assert parsed(scrape(deploy)).keys() == texts[0].keys()


def test_it_listens_on_loopback_alone_and_lets_go(deploy: DeployFile) -> None:
    with endpoint(deploy):
        listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.laddr.port == deploy.metrics]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        with pytest.raises(ConfigError, match=f"port {deploy.metrics} of 127.0.0.1 cannot be used"), endpoint(deploy):
            pass
    with endpoint(deploy):
        scrape(deploy)
    with pytest.raises(urllib.error.URLError):
        scrape(deploy)
    with endpoint(deploy.model_copy(update={"metrics": 0})), pytest.raises(urllib.error.URLError):
        scrape(deploy)


def test_what_the_journal_writes_is_what_status_reads(deploy: DeployFile) -> None:
    write_run(deploy)
    tell, who = deployed.Journal(deploy.state), ids(deploy)
    deploy.state.mkdir()
    (deploy.state / "conductor.pid").write_text(str(os.getpid()))
    (deploy.state / watching.PROGRAMS).write_bytes(programs_record({"server": os.getpid()}))
    looking = watcher(deploy.state.parent / "deploy.toml")
    tell({"event": "waiting", "online": 2, "wanted": 3})
    assert looking.look(at=NOW).state == "waiting"
    tell({"event": "start", "clients": 3, "rounds": 5, "done": 3, "strikes": {}})
    tell({"event": "round", "round": 4, "clients": 3})
    told = {"event": "answer", "kind": "train", "round": 4, "metrics": {"loss": 0.4321}}
    tell({**told, "client": who["north"]})
    hostile = {"client": who["west"], "rule": "absurd value", "detail": "\x1b[2J" + "x" * 9000, "strikes": 1}
    tell({"event": "refused", **hostile})
    tell({"event": "quarantine", "client": who["west"], "rule": "absurd value"})
    found = looking.look(at=NOW)
    assert found.open is not None
    assert (found.open.answered, found.answers, found.refusals) == (1, 1, {"absurd value": 1})
    assert [n.name for n in found.nodes if n.quarantined] == ["west"]
    tell({"event": "closed", "round": 4, "summary": {}})
    tell({"event": "done", "seconds": 3.0})
    assert looking.look(at=NOW).detail == "writing the adapter"
    data = (deploy.state / "logs" / "run.jsonl").read_bytes()
    assert b"0.4321" not in data
    assert data.replace(b"\n", b"").decode("ascii").isprintable()


def test_both_sides_mean_the_same_files() -> None:
    ours = (watching.JOURNAL, watching.ENDED, watching.CONDUCTOR)
    assert ours == (deployed.JOURNAL, deployed.ENDED, deployed.CONDUCTOR)


def test_every_rule_that_the_server_refuses_by_is_known() -> None:
    """Read from the source: the rule of every refusal that is written out."""
    places = {"AnswerRejected": 1, "Refusal": 1, "Failure": 0, "EnvelopeError": 0, "refuse": 0}
    sources = [*(ROOT / "server").glob("*.py"), ROOT / "fedlora" / "envelope.py"]
    sources += (ROOT / "fedlora" / "privacy" / "secagg").glob("*.py")
    found = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in places:
                rule = node.args[places[node.func.id]] if len(node.args) > places[node.func.id] else None
                found |= {c.value for c in ast.walk(rule) if isinstance(c, ast.Constant)} if rule is not None else set()
    assert len(found) > 30
    assert found <= RULES
