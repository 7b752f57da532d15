"""Nothing secret is in the bundle that Flower ships to every node, wherever somebody left it in the tree."""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from fedlora import pki
from fedlora.bundle import NAME, write_bundle

ROOT = Path(pki.__file__).resolve().parents[1]
PACKAGES = ("fedlora", "clients", "server", "strategies", "simulations")
MARK = b"planted-4f1c9a"

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr uses it


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A copy of the checkout with keys and tokens lying about in it."""
    root = tmp_path / "fedlora"
    for package in PACKAGES:
        skipped = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / package, root / package, ignore=skipped)
    for name in ("pyproject.toml", ".gitignore", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, root / name)
    now = datetime.now(UTC)
    for folder in (root, *(root / package for package in PACKAGES), root / "fedlora" / "data"):
        pki.init(folder / "pki", names=["localhost"], addresses=[], at=now)
        pki.node(folder / "pki", "north", at=now)
        for name in ("x.pem", "x.key", "id_ecdsa", "secret.json", "deploy.toml", "node.toml", "notes.md", "t.yaml"):
            (folder / name).write_bytes(MARK)
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "keys.jsonl").write_bytes(MARK)
        (folder / "link.py").symlink_to(folder / "x.key")
    return root


def bundle(app: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def found_in(held: dict[str, bytes], app: Path) -> set[str]:
    """The bundled files that hold any line of a planted file."""
    secrets = {MARK}
    for path in app.rglob("pki/**/*"):
        if path.is_file():
            secrets |= {line for line in path.read_bytes().splitlines() if len(line) > 30 and b"-----" not in line}
    assert len(secrets) > 30
    return {name for name, data in held.items() if any(secret in data for secret in secrets)}


def test_the_bundle_is_our_code_and_its_settings(app: Path) -> None:
    held = bundle(app)
    assert found_in(held, app) == set()
    strange = {n for n in held if not re.fullmatch(r"(fedlora|clients|server|strategies)/[\w/]+\.py", n)}
    assert strange == {"pyproject.toml", ".info/CONTENT"}
    for package in ("fedlora", "clients", "server", "strategies"):
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py") if "/test_" not in str(p)}
        assert ours <= set(held)


def test_without_the_list_of_what_is_ours_flower_would_ship_them(app: Path) -> None:
    """So the test above can fail."""
    settings = app / "pyproject.toml"
    text = settings.read_text()
    without = re.sub(r"(?m)^fab-(in|ex)clude = \[[^\]]*\]\n", "", text)
    assert without != text
    settings.write_text(without)
    (app / ".gitignore").unlink()
    found = found_in(bundle(app), app)
    assert {"deploy.toml", "server/secret.json", ".hidden/keys.jsonl", "pki/nodes.json"} <= found


def test_the_deployed_bundle_names_installed_code_and_holds_nothing_else(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    for place in (folder, folder / NAME):
        pki.init(place / "pki", names=["localhost"], addresses=[], at=datetime.now(UTC))
        for name in ("x.pem", "secret.json", "node.toml", "notes.md", ".env"):
            (place / name).write_bytes(MARK)
    held = bundle(folder)
    assert not found_in(held, folder)
    code = {name: data.decode() for name, data in held.items() if name.endswith(".py")}
    assert set(code) == {f"{NAME}/__init__.py", f"{NAME}/client.py", f"{NAME}/server.py"}
    assert [line for text in code.values() for line in text.splitlines() if "import" in line] == [
        "from clients.relay import app",
        "from server.deployed import app",
    ]
