"""Who may import whom. Imports inside functions count, and so does import_module with a literal name."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlora
import strategies

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "fedlora": set(),
    "strategies": {"fedlora"},
    "clients": {"fedlora"},
    "server": {"fedlora", "strategies"},
    "simulations": {"fedlora", "strategies", "clients", "server"},
}
CLI = "fedlora/cli.py"
FILES = [str(p.relative_to(ROOT)) for package in ALLOWED for p in sorted((ROOT / package).rglob("*.py"))]


def imported(source: str, path: str) -> Iterator[str]:
    """The dotted names that a file imports, relative ones resolved."""
    package = Path(path).parent.parts
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).rstrip(".")
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def breaches(source: str, path: str) -> list[str]:
    """What this file imports and must not."""
    package, tops = path.split("/", maxsplit=1)[0], {name.split(".")[0] for name in imported(source, path)}
    wrong = set() if path == CLI else (tops & ALLOWED.keys()) - ALLOWED[package] - {package}
    if (package == "fedlora" and path != CLI) or (package == "strategies" and path != "strategies/flower.py"):
        wrong |= tops & {"flwr"}
    if path != "fedlora/peft_bridge.py" and not path.startswith("simulations/benchmarks/"):
        wrong |= tops & {"peft"}
    return sorted(wrong)


@pytest.mark.parametrize("path", FILES)
def test_imports(path):
    assert breaches((ROOT / path).read_text("utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("clients/app.py", "from strategies import fedit", ["strategies"]),
        ("clients/app.py", "def f():\n    import server.rounds as r", ["server"]),
        ("clients/app.py", "import flwr, fedlora.wire", []),
        ("fedlora/wire.py", "import clients", ["clients"]),
        ("fedlora/wire.py", "import importlib\nimportlib.import_module('simulations.engine')", ["simulations"]),
        ("fedlora/data/sources.py", "from flwr.common import Array", ["flwr"]),
        ("fedlora/data/sources.py", "from flwr_datasets import FederatedDataset", []),
        ("fedlora/data/sources.py", "from .. import state\nfrom ..adapter import norm\nfrom . import prompts", []),
        ("fedlora/cli.py", "import flwr, server, clients, simulations, strategies", []),
        ("strategies/fedit.py", "import flwr, server", ["flwr", "server"]),
        ("strategies/flower.py", "import flwr", []),
        ("server/app.py", "import flwr, strategies, simulations, clients", ["clients", "simulations"]),
        ("simulations/engine.py", "import flwr, clients, server, strategies", []),
        ("simulations/engine.py", "import peft", ["peft"]),
        ("simulations/benchmarks/training.py", "import peft", []),
        ("fedlora/base.py", "from peft import LoraConfig", ["peft"]),
    ],
)
def test_a_breach_is_seen(path, source, wrong):
    assert breaches(source, path) == wrong


BLOCKED = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
"""


def import_without(blocked: set[str], modules: list[str]) -> subprocess.CompletedProcess[str]:
    script = BLOCKED.format(blocked=blocked, modules=modules)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)


def modules_of(package) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None)
    return [m.name for m in found if not m.name.endswith("__main__")]


def test_the_array_core_and_the_methods_need_neither_torch_nor_transformers():
    core = ["fedlora.adapter", "fedlora.state", "fedlora.wire", "fedlora.rng"]
    methods = [name for name in modules_of(strategies) if name != "strategies.flower"]
    done = import_without({"torch", "transformers", "peft", "flwr"}, core + methods)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # imports all of it in a process of its own
def test_fedlora_stands_alone():
    names = [name for name in modules_of(fedlora) if name != "fedlora.cli"]
    assert "fedlora.wire" in names
    done = import_without({"clients", "server", "strategies", "simulations"}, names)
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    done = import_without({"numpy"}, ["fedlora.adapter"])
    assert done.returncode != 0
    assert "numpy must not be imported here" in done.stderr
