"""The app that Flower ships to the nodes: four small files that name installed code, and nothing else.

Flower sends every node the bundle that the operator runs. This one is made by `write_bundle`, so it can hold neither
data nor keys nor settings, and what it starts is what is installed on each machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["NAME", "write_bundle"]

NAME: Final = "fedlora_bundle"
_FILES: Final = {
    "pyproject.toml": f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{NAME.replace("_", "-")}"
version = "1.0.0"
description = "fedlora, deployed"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["{NAME}"]

[tool.flwr.app]
publisher = "fedlora"
fab-include = ["{NAME}/*.py"]

[tool.flwr.app.components]
serverapp = "{NAME}.server:app"
clientapp = "{NAME}.client:app"

[tool.flwr.app.config]
""",
    f"{NAME}/__init__.py": '"""What Flower starts; the code is the installed one."""\n',
    f"{NAME}/server.py": 'from server.deployed import app\n\n__all__ = ["app"]\n',
    f"{NAME}/client.py": 'from clients.relay import app\n\n__all__ = ["app"]\n',
}


def write_bundle(folder: Path) -> Path:
    """Write the bundle into `folder`, in place of what was there; returns it."""
    for name, text in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
