"""The deployment as its owner starts it, `fedlora server` and `fedlora node` over TLS with keys; and who is refused."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.framing import ANSWERED, REFUSED
from clients.relay import WorkerGone, asked
from fedlora import pki
from fedlora.code import code_digest
from fedlora.envelope import ANSWER_OVERHEAD, new_nonce, sign_ask
from fedlora.report.log import read_log
from fedlora.shared_settings import shared_settings
from fedlora.state import Ask, Header
from fedlora.wire import decode_answer, encode_ask
from server.deployed import run_settings
from simulations.benchmarks.deployment import FEDLORA, ROOT, Deployment, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
START = 300.0  # seconds in which programs must be up, on a busy machine
TRIGGER = """
CREATE TABLE counts (id INTEGER PRIMARY KEY, down INTEGER, up INTEGER);
CREATE TRIGGER counted AFTER UPDATE OF bytes_sent, bytes_recv ON run BEGIN
  INSERT INTO counts (down, up) VALUES (NEW.bytes_sent - OLD.bytes_sent, NEW.bytes_recv - OLD.bytes_recv);
END;
"""
ENVELOPE, VARIES = 2000, 24  # bytes that Flower adds to a question and its answer; and by which they may differ


def test_two_nodes_three_rounds(tmp_path: Path) -> None:
    """Done, verified with the operator's key, equal to the run without Flower; its bytes are those Flower counted."""
    settings = {"rounds.count": 3, "rounds.in_flight": 1}  # one question at a time, so Flower's counts come in order
    with Deployment(tmp_path / "d", {"a": 4, "b": 2}, settings) as whole:
        whole.make()
        for name in whole.nodes:
            whole.start_node(name)
        whole.start_server()
        database = whole.deploy.state / "flower.db"
        whole.wait("a SuperLink at work", lambda: "registered node=b" in whole.log("server"), seconds=START)
        with closing(sqlite3.connect(database, timeout=60)) as opened:
            opened.executescript(TRIGGER)
        number = whole.wait("the run", lambda: re.search(r"submitted run=(\d+)", whole.log("server")), seconds=START)[1]
        whole.wait("the last round", lambda: len(_rounds(whole)) == 3, seconds=START)
        [listed] = whole.flwr("list", "fedlora", "--run-id", number)["runs"]
        assert whole.wait_for_end("server", seconds=START) == 0, whole.logs()
        with closing(sqlite3.connect(database, timeout=60)) as opened:
            counts = opened.execute("SELECT down, up FROM counts ORDER BY id").fetchall()
    run = tmp_path / "d" / "run"
    words = [str(FEDLORA), "verify", str(run), "--key", str(tmp_path / "d" / "keys" / "operator.pub")]
    verified = subprocess.run(words, env=whole.environment, cwd="/", capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert re.search(r"^VERIFIED$", verified.stdout, re.M)
    assert (run / "report.html").stat().st_size > 10_000
    assert not list(run.glob("spool/*"))

    alone = undisturbed(whole, tmp_path / "alone")
    name = "adapter_model.safetensors"
    assert (run / "adapter" / name).read_bytes() == (alone / name).read_bytes()
    assert [e["state"] for e in _rounds(whole)] == [e["state"] for e in _rounds(whole, tmp_path / "alone" / "run")]

    carried = _exchanges(counts)
    asks = [2, 2, 4]  # in each round: to train, and after the last also to evaluate
    assert len(carried) == 2 + sum(asks)  # and two hellos, which the log does not count
    assert max(max(hello) for hello in carried[:2]) < 2 * ENVELOPE + 4000
    del carried[:2]
    added: list[list[float]] = []  # by Flower to each question and its answer: down, up
    for event, count in zip(_rounds(whole), asks, strict=True):
        down, up = (sum(c) for c in zip(*carried[:count], strict=True))
        del carried[:count]
        added.append([(down - event["bytes_down"]) / count, (up - event["bytes_up"]) / count])
    print(f"added by Flower to each message: {added}; flwr list: {listed}")
    for direction in zip(*added, strict=True):
        assert 0 < min(direction) <= max(direction) <= min(ENVELOPE, min(direction) + VARIES), added


def _rounds(whole: Deployment, run: Path | None = None) -> list[dict[str, Any]]:
    path = run or whole.folder / "run"
    events = read_log(path) if (path / "metrics.jsonl").exists() else []
    return [dict(event) for event in events if event["event"] == "round"]


def _exchanges(counts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A node takes a message and brings its answer in one call each, which alone count in both directions."""
    calls = [i for i, (down, up) in enumerate(counts) if down and up]
    parts = [counts[i:j] for i, j in zip(calls[::2], [*calls[2::2], len(counts)], strict=True)]
    return [(sum(d for d, _ in part), sum(u for _, u in part)) for part in parts]


def _said(path: Path, words: str) -> bool:
    return words in _text(path)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def test_a_server_does_not_start_with_an_expired_certificate(tmp_path: Path) -> None:
    with Deployment(tmp_path / "d", {"a": 2}, {}) as whole:
        whole.make()
        keys, then = whole.folder / "keys", datetime.now(UTC) - timedelta(days=40)
        shutil.rmtree(keys)
        pki.init(keys, names=["localhost"], addresses=["127.0.0.1"], at=then, days=30)
        pki.node(keys, "a", at=then)
        whole.start_server()
        assert whole.wait_for_end("server", seconds=START) == 1
        said = " ".join(whole.log("server").split())
        assert re.search(r"certificate.* (expired|ended)", said), said
        assert not whole.deploy.state.exists()


def test_who_does_not_get_in(tmp_path: Path) -> None:
    """At one server that waits for its second node: a key that is not registered, a CA that is another, other code."""
    nodes = {"a": 4, "b": 2, "c": 2, "e": 2}
    with Deployment(tmp_path / "d", nodes, {"rounds.clients": 2, "rounds.count": 1}) as whole:
        whole.make()
        _another_pki(whole, tmp_path)
        other = tmp_path / "other"
        for package in ("fedlora", "clients"):
            shutil.copytree(ROOT / package, other / package)
        with (other / "fedlora" / "code.py").open("a") as file:
            file.write("\n# another version\n")
        whole.start_server()
        whole.wait("registration", lambda: "registered node=e" in whole.log("server"), seconds=START)
        whole.start_node("c", part="relay")
        whole.start_node("e", part="relay")
        for name, words in (("c", "Failed to activate SuperNode"), ("e", "CERTIFICATE_VERIFY_FAILED")):
            supernode, relay = whole.folder / f"state-{name}" / "logs" / "supernode.log", f"{name}-relay"
            whole.wait(words, partial(_said, supernode, words), seconds=START)
            whole.wait(
                "its end", partial(_said, whole.folder / f"{relay}.log", "died program=supernode"), seconds=START
            )
            whole.end(relay)
        assert not [e for e in whole.journal() if e["event"] in ("start", "refused")]

        whole.start_node("a")
        whole.start_node("b", environment={"PYTHONPATH": str(other)})
        assert whole.wait_for_end("server", seconds=START) == 0
        words = f"the server runs fedlora code {code_digest()[:12]} and this client runs "
        assert words in _text(whole.folder / "state-b" / "logs" / "worker.log")
        [refused] = whole.events()[0]["refused"]  # of the start
        assert (refused["rule"], refused["detail"][: len(words)]) == ("CodeMismatch", words)
        assert [e["rule"] for e in whole.journal() if e["event"] == "refused"] == ["CodeMismatch"]
        [round_] = _rounds(whole)
        assert [client["id"] for client in round_["clients"]] == [whole.id_of("a")]


def _another_pki(whole: Deployment, folder: Path) -> None:
    """Node c keeps the CA and has an auth.key that nobody registered; node e is registered and trusts another CA."""
    now = datetime.now(UTC)
    pki.init(folder / "foreign", names=["localhost"], addresses=["127.0.0.1"], at=now)
    pki.node(folder / "foreign", "x", at=now)
    shutil.copy2(folder / "foreign" / "nodes" / "x" / "auth.key", whole.folder / "keys-c" / "auth.key")
    shutil.copy2(folder / "foreign" / "ca.pem", whole.folder / "keys-e" / "ca.pem")


def test_forged_and_replayed_answers_at_a_running_server(tmp_path: Path) -> None:
    """Real processes; the hostile node holds its real keys. The states are those of the honest nodes alone."""
    words = "(control),earlier sending,round 1,bit changed,not enrolled,real signature"
    command = [sys.executable, "-P", "-m", "simulations.benchmarks.hostile", str(tmp_path / "d"), "--only", words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=880, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for rule in ("stale: it answers another ask", "signature: node", "other node: no node with key", "was not asked"):
        assert rule in done.stdout


class Resident:
    """One running worker, and what its operator would ask of it."""

    def __init__(self, whole: Deployment) -> None:
        self.whole = whole
        self.where = str(whole.node("a").meeting)
        self.operator = pki.load_private_key(whole.folder / "keys" / "operator.key", "ed25519")
        whole.wait("the worker", lambda: "listens" in self.log, seconds=START)

    @property
    def log(self) -> str:
        return _text(self.whole.folder / "state-a" / "logs" / "worker.log")

    def ask(self, *, key: Ed25519PrivateKey | None = None, **fields: Any) -> bytes:
        """A signed ask with no more than its header, by default a hello."""
        usual: dict[str, Any] = {"run": "r", "round": 0, "client": "node 1", "kind": "hello", "code": code_digest()}
        ask = Ask(settings=shared_settings(run_settings(self.whole.deploy)))
        return sign_ask(encode_ask(Header(**usual | fields), ask), key or self.operator, new_nonce())

    def said(self, data: bytes) -> str:
        """The facts in the worker's signed answer."""
        answer = asked(self.where, data, patience=5.0)
        return json.dumps(dict(decode_answer(answer[ANSWER_OVERHEAD:], max_bytes=10**8)[1].info))


def test_a_worker_does_what_its_operator_signed_and_nothing_else(tmp_path: Path) -> None:
    with Deployment(tmp_path / "d", {"a": 2}, {}) as whole:
        whole.make()
        whole.start_node("a", part="worker")
        worker, mine = Resident(whole), whole.id_of("a")
        assert mine in worker.said(worker.ask())
        for data in (worker.ask(key=Ed25519PrivateKey.generate()), worker.ask()[:-1]):
            with pytest.raises(WorkerGone, match="the ask is not signed by the operator whose key is pinned here"):
                asked(worker.where, data, patience=5.0)
        with pytest.raises(WorkerGone, match="12 bytes that are no signed ask"):
            asked(worker.where, b"train for me", patience=5.0)
        assert "the server runs fedlora code 000000000000" in worker.said(worker.ask(code="0" * 64))
        old = worker.ask(client=mine, round=3, kind="evaluate")
        worker.said(old)
        worker.said(worker.ask(client=mine, round=4, kind="evaluate"))
        assert "round 3 is over: this node answered round 4 of run r already" in worker.said(old)
        warned = [line for line in worker.log.splitlines() if "WARNING" in line]
    for text, times in (("refused an ask: signature", 2), ("no signed ask", 1), ("round 3 is over", 1)):
        assert sum(text in line for line in warned) == times, warned


CLIENT = """
import json, os, socket, struct
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def tried(what):
    try:
        return str(what())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def ask(where, data, length=None):
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(30)
        one.connect(where)
        one.sendall(struct.pack(">Q", len(data) if length is None else length) + data)
        one.shutdown(socket.SHUT_WR)
        said = b""
        while some := one.recv(65536):
            said += some
    return said[0], said[9:].decode(errors="replace")


@app.query()
def loot(message, context):
    where, plan = context.node_config["socket"], json.loads(message.content["plan"]["json"])
    found = {name: tried(lambda: ask(where, bytes.fromhex(data))) for name, data in plan["send"].items()}
    found["length"] = tried(lambda: ask(where, b"", 1 << 60))
    for path in plan["read"]:
        found[path] = tried(lambda: len(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read()))
    return Message(RecordDict({"found": ConfigRecord(found)}), reply_to=message)
"""
SERVER = """
import json, os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    plan = open(PLAN).read()
    content = RecordDict({"plan": ConfigRecord({"json": plan})})
    [reply] = grid.send_and_receive([Message(content, nodes[0], "query", group_id="0")], timeout=200)
    found = {"error": str(reply.error)} if reply.has_error() else dict(reply.content["found"])
    try:
        found["operator"] = str(len(open(json.loads(plan)["operator"], "rb").read()))
    except OSError as error:
        found["operator"] = str(error)
    with open(PLAN + ".part", "w") as file:
        json.dump(found, file)
    os.replace(PLAN + ".part", PLAN + ".found")
"""
APP = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "malicious"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["malicious"]
[tool.flwr.app]
publisher = "nobody"
fab-include = ["malicious/*.py"]
[tool.flwr.app.components]
serverapp = "malicious.server:app"
clientapp = "malicious.client:app"
[tool.flwr.app.config]
"""


def test_what_a_malicious_bundle_can_reach(tmp_path: Path) -> None:
    """Whoever reaches Flower's control interface has any bundle run, on the server and on its nodes. It gets nothing
    out of the worker; files are another matter: what the relay's user and the server's may read, it reads. So a node's
    halves belong under two users (see below), and the control interface must be shielded.
    """
    with Deployment(tmp_path / "d", {"a": 2, "b": 2}, {}) as whole:
        whole.make()
        whole.start_server()
        whole.start_node("a")
        worker, mine = Resident(whole), whole.id_of("a")
        recorded, hello = worker.ask(client=mine, round=1, kind="evaluate"), worker.ask()
        worker.said(recorded)
        worker.said(worker.ask(client=mine, round=2, kind="evaluate"))
        forged = worker.ask(key=Ed25519PrivateKey.generate(), client=mine, round=3, kind="evaluate")
        key = str(whole.folder / "keys-a" / "signing.key")
        send = {"nothing": b"", "unsigned": b"train", "forged": forged, "changed": hello[:-1] + b"\0"}
        good = {"recorded": recorded, "hello": hello}
        plan = {
            "send": {name: data.hex() for name, data in (send | good).items()},
            "read": [key],
            "operator": str(whole.folder / "keys" / "operator.key"),
        }
        path, app = tmp_path / "plan.json", tmp_path / "app"
        path.write_text(json.dumps(plan))
        (app / "malicious").mkdir(parents=True)
        (app / "pyproject.toml").write_text(APP)
        (app / "malicious" / "__init__.py").write_text("")
        (app / "malicious" / "client.py").write_text(CLIENT)
        (app / "malicious" / "server.py").write_text(f"PLAN = {str(path)!r}\n{SERVER}")
        whole.wait("the conductor", lambda: [e for e in whole.journal() if e["event"] == "waiting"], seconds=START)
        said = whole.flwr("run", str(app), "fedlora")
        assert said.get("success"), said
        found = json.loads(whole.wait("the loot", lambda: _text(tmp_path / "plan.json.found"), seconds=START))
        print(json.dumps(found, indent=1))
        assert whole.status("server") is None
        assert mine in worker.said(worker.ask())  # it still serves
    for name in (*send, "length"):
        assert found[name].startswith(f"({REFUSED}, "), (name, found[name])
    assert "not signed by the operator" in found["forged"]
    assert "at most" in found["length"]
    assert "round 1 is over" in found["recorded"]
    assert found["hello"].startswith(f"({ANSWERED}, ")
    assert mine in found["hello"]  # what was signed is answered again: id, rank, base and layout; no rows
    assert found[key].isdigit()  # under one user files are not the worker's to guard
    assert found["operator"].isdigit()  # nor at the server: a bundle's ServerApp runs as the user who conducts


PROBE = """
import json, os, socket, struct, sys

plan = json.loads(sys.stdin.read())
os.setgroups(plan["groups"])
os.setgid(plan["user"])
os.setuid(plan["user"])


def tried(what):
    try:
        return str(what())
    except Exception as error:
        return type(error).__name__


def ask(data):
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(30)
        one.connect(plan["socket"])
        one.sendall(struct.pack(">Q", len(data)) + data)
        one.shutdown(socket.SHUT_WR)
        said = b""
        while some := one.recv(65536):
            said += some
    return said[0]


def read(path):
    return len(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read())


found = {name: tried(lambda: ask(bytes.fromhex(data))) for name, data in plan["send"].items()}
found |= {path: tried(lambda: read(path)) for path in plan["read"]}
found["unlink"] = tried(lambda: os.unlink(plan["socket"]))
found["kill"] = tried(lambda: os.kill(plan["worker"], 0))
print(json.dumps(found))
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become another user")
def test_a_relay_under_another_user_reaches_the_socket_and_nothing_else() -> None:
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid)
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))  # others must be able to enter what is above
        folder.chmod(0o711)
        whole = held.enter_context(Deployment(folder / "d", {"a": 2}, {}))
        whole.make()
        whole.folder.chmod(0o711)
        file = whole.node_path("a")
        file.write_text(file.read_text().replace("[settings]", f'relay_group = "{group.gr_name}"\n\n[settings]'))
        whole.start_node("a", part="worker")
        worker = Resident(whole)
        worker.said(worker.ask(client=whole.id_of("a"), round=1, kind="evaluate"))
        [process] = whole.children("a-worker", "clients.worker")
        closed = [
            *(whole.folder / "keys-a" / name for name in ("signing.key", "auth.key", "operator.pub")),
            whole.folder / "keys" / "operator.key",
            whole.folder / "memory-a",
            whole.folder / "state-a" / "logs" / "worker.log",
            Path(f"/proc/{process.pid}/mem"),
            Path(f"/proc/{process.pid}/environ"),
        ]
        forged = worker.ask(key=Ed25519PrivateKey.generate())
        plan: dict[str, Any] = {
            "socket": worker.where,
            "worker": process.pid,
            "send": {"hello": worker.ask().hex(), "forged": forged.hex()},
            "read": [*map(str, closed), str(file)],
            "user": 64_242,
        }
        within, outside = _probed({**plan, "groups": [group.gr_gid]}), _probed({**plan, "groups": []})
        assert worker.said(worker.ask())
    assert (within["hello"], within["forged"]) == (str(ANSWERED), str(REFUSED))
    assert {str(p): within[str(p)] for p in closed} == {str(p): "PermissionError" for p in closed}
    assert within[str(file)].isdigit()  # it can read what is open to all
    assert {within[name] for name in ("unlink", "kill")} == {"PermissionError"}
    assert {outside[name] for name in ("hello", "forged", "unlink", "kill")} == {"PermissionError"}


def _probed(plan: dict[str, Any]) -> dict[str, str]:
    command = [sys.executable, "-I", "-c", PROBE]
    done = subprocess.run(command, input=json.dumps(plan), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))
