"""What names a base: SHA-256 over its stored weights, its config and its tokenizer.

The bytes on disk are hashed, in the dtype of the file, never the loaded tensors: so the name is the same whatever dtype
or device the base is loaded in, however its files are sharded, and whatever head is put on it. Weights are taken by
sorted name with dtype and shape; the config without fields that say who wrote it; the tokenizer by its vocabulary
files and chat template. A tokenizer.json counts without its padding and truncation, which are settings of a call.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError

__all__ = ["fingerprint"]

VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation")
VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def fingerprint(folder: Path) -> str:
    """The fingerprint of a model folder, hexadecimal.

    Cost: one read of the weights, once per file and process (files are known by path, size and time of change).
    Raises: ConfigError if the folder holds no weights.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ConfigError(f"model: {folder} has no weights (model*.safetensors or pytorch_model*.bin)")
    weights: dict[str, str] = {}
    for file in files:
        status = file.stat()
        weights.update(_tensor_digests(file, status.st_size, status.st_mtime_ns))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    whole = {
        "weights": weights,
        "config": {k: v for k, v in config.items() if k not in VOLATILE},
        "tokenizer": _tokenizer(folder),
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _tensor_digests(file: Path, size: int, changed: int) -> dict[str, str]:
    """Tensor name -> digest of its dtype, shape and bytes."""
    if file.suffix == ".safetensors":
        return _safetensors_digests(file)
    import torch  # only pickled weights need it

    tensors: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {
        name: _digest(
            _SHORT.get(str(x.dtype), str(x.dtype)), list(x.shape), x.contiguous().view(-1).view(torch.uint8).numpy()
        )
        for name, x in tensors.items()
    }


_SHORT = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
}  # safetensors' names


def _safetensors_digests(file: Path) -> dict[str, str]:
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8:start])
        with memoryview(data) as view:
            return {
                name: _digest(x["dtype"], x["shape"], view[start + x["data_offsets"][0] : start + x["data_offsets"][1]])
                for name, x in header.items()
                if name != "__metadata__"
            }


def _digest(dtype: str, shape: list[int], data: Any) -> str:
    out = hashlib.sha256(f"{dtype}{shape}".encode())
    out.update(data)
    return out.hexdigest()


def _tokenizer(folder: Path) -> dict[str, Any]:
    """What decides how text becomes tokens: tokenizer.json, else the vocabulary files; and the chat template."""
    out: dict[str, Any] = {}
    fast = folder / "tokenizer.json"
    if fast.is_file():
        content = json.loads(fast.read_text("utf-8"))
        out["tokenizer"] = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    else:
        for name in VOCABULARIES:
            if (folder / name).is_file():
                out[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    settings = folder / "tokenizer_config.json"
    template = folder / "chat_template.jinja"
    if template.is_file():
        out["chat_template"] = template.read_text("utf-8")
    elif settings.is_file():
        out["chat_template"] = json.loads(settings.read_text("utf-8")).get("chat_template")
    return out
