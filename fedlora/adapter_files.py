"""One adapter folder in PEFT's form that somebody else wrote, against what a manifest says of it.

Nothing in it is run, no symbolic link is followed, and no more than a part of an array is in memory: whatever the
files hold, checking them takes time in proportion to their bytes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedlora.errors import CheckpointError, WireError
from fedlora.frame import Row, read_rows
from fedlora.provenance import Base, Ranks

__all__ = ["check_adapter", "opened", "read_whole", "reason"]

_PREFIX: Final = "base_model.model."
_SIDES: Final = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_MAX_CONFIG: Final = 2**20  # bytes of adapter_config.json
_MAX_HEADER: Final = 2**22  # bytes of a safetensors header
_MAX_NAME: Final = 512  # characters of an array's name
_CHUNK: Final = 2**20  # bytes of weights that are read at once
_SETTINGS: Final[Mapping[str, object]] = {
    "auto_mapping": None,  # names a Python module that PEFT imports
    "bias": "none",
    "init_lora_weights": True,  # some others change the base
    "layer_replication": None,
    "lora_bias": False,
    "peft_type": "LORA",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}  # of adapter_config.json, where W = W0 + B A


def check_adapter(folder: Path, base: Base, ranks: Ranks | None, size: int) -> tuple[str, list[str]]:
    """What the adapter in `folder` is, and what is wrong with it, each beginning with the name of its file.

    The weights have exactly the arrays that the config speaks of, `[rank, in]` and `[out, rank]`, float32 and finite;
    the config adds W0 + B A and nothing else; both agree with `base` and `ranks`. Weights that have not `size` bytes
    are not read. Raises: CheckpointError if a file cannot be read.
    """
    config = _config(folder / "adapter_config.json")
    findings = [f"adapter_config.json: {f}" for f in _settings(config, base)]
    said, wrong = _weights(folder / "adapter_model.safetensors", config, ranks, size)
    return said, findings + [f"adapter_model.safetensors: {f}" for f in wrong]


def read_whole(path: Path, limit: int, missing: str) -> tuple[bytes | None, str]:
    """The bytes of a file of at most `limit` bytes, or what is wrong; `missing` is said where there is none."""
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                return None, f"{path.name} is larger than {limit:,} bytes"
            return file.read(size), ""
    except FileNotFoundError:
        return None, missing
    except OSError as error:
        return None, f"{path.name} cannot be read: {reason(error)}"


def opened(path: Path) -> BufferedReader:
    """A regular file, open for reading; no link, pipe or device. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a plain file")
    return open(descriptor, "rb")


def reason(error: OSError) -> str:
    """An error of `opened` in words."""
    return "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror or error)


def _config(path: Path) -> dict[str, Any]:
    data, wrong = read_whole(path, _MAX_CONFIG, f"{path.name} is missing")
    if data is None:
        raise CheckpointError(wrong)
    try:
        config = json.loads(data, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {str(error)[:200]}") from None
    names = ("target_modules", "modules_to_save")
    patterns = ("rank_pattern", "alpha_pattern")
    if (
        not isinstance(config, dict)
        or not all(_strings(config.get(key) or []) for key in names)
        or not all(isinstance(config.get(key) or {}, dict) for key in patterns)
        or type(config.get("r")) is not int
    ):
        raise CheckpointError(f"{path.name}: {', '.join((*names, *patterns))} or r is not what fedlora writes")
    return config


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there more than once")
    return dict(pairs)


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _settings(config: Mapping[str, Any], base: Base) -> Iterator[str]:
    for key, wanted in _SETTINGS.items():
        if config.get(key, wanted) != wanted or (key == "peft_type" and key not in config):
            yield f"{key} is {config.get(key)!r:.80}; the adapter is W0 + B A only with {wanted!r}"
    if config.get("lora_alpha") != config["r"] or (config.get("alpha_pattern") or {}) != _pattern(config):
        yield "alpha is not the rank everywhere: it scales the adapter"
    if (came := config.get("base_model_name_or_path")) != base.name:
        yield f"its base is {came!r:.200}, the manifest's is {base.name!r:.200}"


def _pattern(config: Mapping[str, Any]) -> Mapping[str, Any]:
    pattern: Mapping[str, Any] = config.get("rank_pattern") or {}
    return pattern


def _weights(path: Path, config: Mapping[str, Any], ranks: Ranks | None, size: int) -> tuple[str, list[str]]:
    """What the weights hold, and what is wrong with them. Raises: CheckpointError if they cannot be read at all."""
    findings: list[str] = []
    try:
        with opened(path) as file:
            rows = _rows(file, path.name, size)
            for row in rows:
                if len(row.key) > _MAX_NAME:
                    raise CheckpointError(f"{path.name}: {row.key:.40}... is a name of {len(row.key):,} characters")
                if row.dtype != "F32":
                    findings.append(f"{row.key!r:.200} is {row.dtype}, a release is F32")
                elif not _finite(file, row.end - row.start):
                    findings.append(f"{row.key!r:.200} has values that are not finite")
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {reason(error)}") from None
    except WireError as error:
        raise CheckpointError(f"{path.name} is no safetensors file: {str(error)[:200]}") from None
    found = _found_ranks({row.key: row.shape for row in rows}, config, findings)
    stated = Ranks(smallest=min(found, default=0), largest=max(found, default=0), modules=len(found))
    if ranks is not None and stated != ranks:
        findings.append(f"{_say(stated)}; the manifest says {_say(ranks)}")
    return f"{_say(stated)}, all finite", findings


def _rows(file: BufferedReader, name: str, listed: int) -> list[Row]:
    """The table of a safetensors file, in the order of the arrays; `file` is then at the first of them.

    Raises: WireError; CheckpointError if it has not the bytes that were listed, or its table is too large.
    """
    size, first = os.fstat(file.fileno()).st_size, file.read(8)
    header = int.from_bytes(first, "little")
    if size != listed:
        raise CheckpointError(f"{name}: its arrays were not read, as its {size:,} bytes are not the {listed:,} listed")
    if header > _MAX_HEADER:
        raise CheckpointError(f"{name}: a header of {header:,} bytes, at most {_MAX_HEADER:,} are read")
    if len(first) < 8 or 8 + header > size:
        raise WireError(f"a header of {header:,} bytes in a file of {size:,}")
    text = file.read(header)
    return read_rows(text, size - 8 - header, text.count(b'"data_offsets"'), metadata=True)


def _finite(file: BufferedReader, left: int) -> bool:
    """Whether the next so many bytes are finite float32; all of them are read, a part at a time."""
    good = True
    while left:
        part = file.read(min(left, _CHUNK))
        if len(part) < min(left, _CHUNK):
            raise OSError(0, "it became shorter while it was read")
        good &= bool(np.isfinite(np.frombuffer(part, "<f4")).all())
        left -= len(part)
    return good


def _found_ranks(shapes: dict[str, tuple[int, ...]], config: Mapping[str, Any], findings: list[str]) -> list[int]:
    """The rank of each target module; `findings` gains what does not fit the config."""
    found: list[int] = []
    left = dict(shapes)
    pattern = dict(_pattern(config))
    for name in config.get("target_modules") or []:
        keys = next((k for s in _SIDES if (k := _keys(name, s))[0] in left or k[1] in left), _keys(name, _SIDES[0]))
        a, b = (left.pop(key, None) for key in keys)
        rank = pattern.pop("^" + re.escape(name), config["r"])
        if a is None or b is None:
            findings.append(f"{name!r:.200}, a target module, has not both factors, or is named twice")
            continue
        found.append(a[0] if a else 0)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            findings.append(f"{name!r:.200}: A {a} and B {b}, the config says rank {rank!r:.40}")
    saved, there = set(config.get("modules_to_save") or []), set[str]()
    for key in left:
        parts = key.removeprefix(_PREFIX).split(".") if key.startswith(_PREFIX) else []
        own = saved.intersection(".".join(parts[:n]) for n in range(1, len(parts) + 1))
        there |= own
        if not own:
            findings.append(f"{key!r:.200} belongs to no target module and to none that is saved whole")
    findings += [f"{module!r:.200} should be saved whole, and is not there" for module in sorted(saved - there)]
    findings += [f"rank_pattern {key!r:.200} is of no target module" for key in pattern]
    return found


def _keys(name: str, sides: tuple[str, str]) -> tuple[str, str]:
    return f"{_PREFIX}{name}.{sides[0]}", f"{_PREFIX}{name}.{sides[1]}"


def _say(ranks: Ranks) -> str:
    span = f"{ranks.smallest}" if ranks.smallest == ranks.largest else f"{ranks.smallest} to {ranks.largest}"
    return f"{ranks.modules} modules of rank {span}"
