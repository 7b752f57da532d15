"""The embedded default: a small pre-trained base, and instruction skills that clients teach it.

`base_path` finds the model, `rows` generates text. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fedlora.errors import ConfigError
from fedlora.tiny.skills import GROUPS, SKILLS, Skill, Split, rows

__all__ = ["GROUPS", "SKILLS", "Skill", "Split", "base_path", "rows"]


def base_path() -> Path:
    """The Hugging Face folder of the embedded base.

    It is looked up in the installed distribution, not beside this file: Flower may run a copy of the code that holds no
    weights.

    Raises: ConfigError if fedlora is not installed, or was installed without the weights.
    """
    try:
        distribution = importlib.metadata.distribution("fedlora")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "the embedded base belongs to the fedlora distribution, which is not installed here; "
            "run `pip install fedlora`, or name another base model"
        ) from None
    folder = _root(distribution) / "fedlora" / "tiny" / "base"
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"fedlora {distribution.version} has no embedded base in {folder}; reinstall it, "
            f"or make the base with `python -m fedlora.tiny.pretrain --out {folder}`"
        )
    return folder


def _root(distribution: importlib.metadata.Distribution) -> Path:
    """The folder that holds the installed packages: the source tree, for an editable install."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlsplit(origin["url"]).path))
    return Path(str(distribution.locate_file("")))
