"""Server and clients agree on their code, or refuse."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fedlora import code
from fedlora.errors import ConfigError

ROOT = Path(code.__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Callable[[str], ModuleType]:
    """A small checkout by name, and its `fedlora.code` freshly loaded."""

    def load(name: str) -> ModuleType:
        root = tmp_path / name
        if not root.exists():
            for package in ("fedlora", "clients", "server"):
                (root / package / "deep").mkdir(parents=True)
                (root / package / "deep" / "part.py").write_text("x = 1\n")
            shutil.copy(code.__file__, root / "fedlora" / "code.py")
        spec = importlib.util.spec_from_file_location(f"code_of_{name}", root / "fedlora" / "code.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_digest_is_that_of_the_bytes_and_names(checkout: Callable[[str], ModuleType], tmp_path: Path) -> None:
    one = checkout("one").code_digest()
    assert checkout("one").code_digest() == checkout("two").code_digest() == one
    assert len(one) == 64
    digests = {one}
    part = tmp_path / "one" / "clients" / "deep" / "part.py"
    part.write_text("x = 2\n")
    digests.add(checkout("one").code_digest())
    part.rename(part.with_name("other.py"))
    digests.add(checkout("one").code_digest())
    (tmp_path / "one" / "fedlora" / "new.py").write_text("")
    digests.add(checkout("one").code_digest())
    assert len(digests) == 4


def test_other_files_do_not_count(checkout: Callable[[str], ModuleType], tmp_path: Path) -> None:
    before = checkout("one").code_digest()
    (tmp_path / "one" / "server" / "deep" / "part.py").write_text("x = 9\n")  # clients never meet the server's code
    (tmp_path / "one" / "fedlora" / "notes.md").write_text("note")
    (tmp_path / "one" / "fedlora" / "__pycache__").mkdir()
    (tmp_path / "one" / "fedlora" / "__pycache__" / "code.cpython-311.pyc").write_bytes(b"")
    assert checkout("one").code_digest() == before


def test_the_own_digest_is_stable() -> None:
    assert code.code_digest() == code.code_digest()
    code.require_same_code(code.code_digest())


def test_other_code_is_refused_with_both_digests() -> None:
    own = code.code_digest()[:12]
    with pytest.raises(ConfigError, match=f"code 012345678901 and this client runs {own}: install") as error:
        code.require_same_code("0123456789012345")
    assert str(Path(code.__file__).parents[1]) not in str(error.value)  # a node tells it to the server


def test_mixed_checkouts_are_refused(checkout: Callable[[str], ModuleType], tmp_path: Path) -> None:
    mine = checkout("one")
    checkout("two")
    mine.require_one_checkout(str(tmp_path / "one" / "clients" / "app.py"))
    with pytest.raises(ConfigError, match=r"fedlora comes from .*one but clients from .*two: two checkouts are mixed"):
        mine.require_one_checkout(str(tmp_path / "two" / "clients" / "app.py"))


def test_the_apps_are_beside_this_fedlora() -> None:
    for package in ("clients", "server"):
        code.require_one_checkout(str(ROOT / package / "app.py"))
