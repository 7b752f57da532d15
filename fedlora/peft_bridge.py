"""Adapter <-> PEFT model in memory <-> PEFT checkpoint folder; the only file that imports peft.

PEFT computes `W0 + scaling * B A`, with `scaling = alpha / r` (rsLoRA: `alpha / sqrt(r)`) by module. Reading makes that
scaling the explicit scale of our `Factors`; writing folds it into B and sets alpha = r, so that PEFT's scaling is
exactly 1 and the folder means W0 + sum of B A to every reader of PEFT folders. A is `[rank, in]` and B `[out, rank]` in
both worlds, for Linear, Conv1D (`fan_in_fan_out`: PEFT transposes the product, not the factors) and embeddings
(`in` = number of tokens); the sides are told apart by key, never by shape.

Source: LoRA, Hu et al. 2021, section 4.1; rsLoRA, Kalajdzievski 2023, eq. 4; PEFT's checkpoint format.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn

from fedlora.adapter import Adapter, Array, Factors, require_finite
from fedlora.errors import AdapterError, CheckpointError
from fedlora.state import Layout

TaskType = Literal["causal-lm", "sequence-classification"]

_TASKS: Mapping[TaskType, str] = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_NO_HEAD: Mapping[str, Array] = MappingProxyType({})
_PEFT_HEADS = ("classifier", "score")  # PEFT always saves these modules whole in sequence classification

_LINEAR_KEYS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_KEYS = ("lora_embedding_A", "lora_embedding_B")  # parameters, hence no .weight
_FACTOR = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<emb>[AB]))")

# Settings that say where the adapter sits, its size, or how it was trained: the function is W0 + scaling * B A for all.
_UNDERSTOOD = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type "
    "peft_version r rank_pattern revision target_modules task_type use_rslora".split()
)
# Initialisations that leave W0 as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract something from it.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_WHY = {
    "use_dora": "DoRA rescales W0 + BA by learnt magnitudes, which no sum of products expresses; train without it, or "
    "merge it into the base (merge_and_unload) and start from that base",
    "lora_bias": "a bias on lora_B is not a product B A; train with lora_bias=False",
    "bias": "trained biases of the base are not part of the adapter's products; train with bias='none'",
    "layer_replication": "replicated layers make another base; save the replicated model and use it as the base",
    "trainable_token_indices": "trained token rows replace rows of the base's embedding; target the embedding with "
    "LoRA instead",
}


def save_adapter(
    folder: Path,
    adapter: Adapter,
    layout: Layout,
    *,
    base_name: str,
    task_type: TaskType,
    head: Mapping[str, Array] = _NO_HEAD,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, so that PEFT computes W0 + sum of B A.

    `adapter` maps base module names to factors, `head` names of the base's parameters (all those of `layout.head`) to
    whole arrays. Everything is written as float32 with the scale folded into B. Modules of rank 0 are left out: PEFT
    has no rank 0, and their product is zero. Equal arguments give equal bytes. Files are replaced atomically, the
    config last, so an interrupted save never leaves a readable mixture. Costs one float32 copy; builds no model.
    Raises: AdapterError for names or shapes outside the layout, values that float32 cannot hold, an adapter of rank 0
    in every module, adapted modules that PEFT would save whole; CheckpointError if the disk refuses.
    """
    kept = _checked(adapter, layout, head, task_type)
    arrays = {}
    for name, f in kept.items():
        a, b = _EMBEDDING_KEYS if layout.modules[name].kind == "embedding" else _LINEAR_KEYS
        arrays[f"{_PREFIX}{name}.{a}"] = _single(f.a)
        arrays[f"{_PREFIX}{name}.{b}"] = _single(f.b, f.scale)
    arrays |= {_PREFIX + name: _single(x) for name, x in head.items()}
    require_finite(arrays.items())
    config = _settings(_lora_config(kept, layout, base_name, task_type, head))
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}  # sets have no stable order
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).unlink(missing_ok=True)
        _replace(folder / _WEIGHTS, safetensors.numpy.save(arrays, metadata={"format": "pt"}))
        _replace(folder / _CONFIG, json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n")
    except OSError as e:
        raise CheckpointError(
            f"cannot write the PEFT adapter to {folder}: {e}. Is it a folder, and is there room?"
        ) from e


def load_adapter(folder: Path) -> tuple[Adapter, dict[str, Array]]:
    """Reads a LoRA folder that PEFT (or `save_adapter`) wrote: (adapter with explicit scales, head arrays).

    bfloat16 and float16 become float32, which holds them exactly. The copies of the base's embedding that PEFT adds
    where an embedding is adapted (`*.base_layer.*`) are not read: the base belongs to its fingerprint.
    Raises: AdapterError naming what is missing or damaged, or what W0 + scale * B A cannot express (see `_WHY`).
    """
    where = f"PEFT folder {folder}"
    config = _read_config(folder / _CONFIG, where)
    _refuse_inexpressible(config, where)
    if not (folder / _WEIGHTS).is_file():
        pickled = (folder / _PICKLE).is_file()
        hint = f"only {_PICKLE}, a pickle, which fedlora never opens; save it again with PEFT (safetensors)"
        raise AdapterError(f"{where}: no {_WEIGHTS}: {hint if pickled else 'is this an adapter folder?'}")
    try:
        tensors = safetensors.torch.load_file(folder / _WEIGHTS)
    except SafetensorError as e:
        raise AdapterError(f"{where}: {_WEIGHTS} is damaged ({e}); copy it again from its source") from e

    rank_of = _by_pattern(config, ("rank_pattern", "r"), where)
    alpha_of = _by_pattern(config, ("alpha_pattern", "lora_alpha"), where)

    def scale(name: str, rank: int) -> float:
        if rank_of(name) != rank:
            raise AdapterError(f"{where}: {name}: the config says rank {rank_of(name):g}, the weights have rank {rank}")
        return alpha_of(name) / (math.sqrt(rank) if config["use_rslora"] else rank)

    return _assemble({k: _numpy(k, t) for k, t in tensors.items()}, scale, config["modules_to_save"] or (), where)


def from_peft_model(model: PeftModel, adapter_name: str = "default") -> tuple[Adapter, dict[str, Array]]:
    """The adapter (scales explicit) and the head of a PEFT model in memory, as copies on the CPU.

    Raises: AdapterError for an unknown name, a merged adapter, or what W0 + scale * B A cannot express.
    """
    where = f"PEFT adapter {adapter_name!r}"
    if adapter_name not in model.peft_config:
        raise AdapterError(f"{where} is not in the model, which has {sorted(model.peft_config)}")
    config = _settings(model.peft_config[adapter_name])
    _refuse_inexpressible(config, where)
    tensors, scales = _slots(model, adapter_name)
    arrays = {k: _numpy(k, t) for k, t in tensors.items()}
    return _assemble(arrays, lambda name, _: scales[name], config["modules_to_save"] or (), where)


def into_peft_model(
    model: PeftModel, adapter: Adapter, head: Mapping[str, Array] = _NO_HEAD, adapter_name: str = "default"
) -> None:
    """Overwrites the factors and head of an existing PEFT adapter, which keeps its scaling: B takes up the ratio.

    Everything is checked before anything is written. Raises: AdapterError if modules, ranks, shapes or head names
    differ from the model's, or as `from_peft_model` does.
    """
    there, there_head = from_peft_model(model, adapter_name)
    here, want = (
        {n: (f.a.shape, f.b.shape) for n, f in ad.items()} | {n: x.shape for n, x in dense.items()}
        for ad, dense in ((adapter, head), (there, there_head))
    )
    if wrong := sorted(n for n in here.keys() | want.keys() if here.get(n) != want.get(n)):
        n = wrong[0]
        raise AdapterError(
            f"{len(wrong)} modules or head arrays do not fit PEFT adapter {adapter_name!r}; first {n}: "
            f"got {here.get(n)}, the model has {want.get(n)} (shapes of a and b). Same base, target modules and ranks?"
        )
    tensors, scales = _slots(model, adapter_name)
    if dead := sorted(n for n, s in scales.items() if s == 0.0):
        raise AdapterError(f"PEFT adapter {adapter_name!r} has scaling 0 in {dead}: nothing written there would count")
    with torch.no_grad():
        for key, tensor in tensors.items():
            if match := _FACTOR.fullmatch(key):
                f = adapter[match["name"]]
                is_a = "A" in (match["side"], match["emb"])
                value = f.a if is_a else f.b.astype(np.float64) * (f.scale / scales[match["name"]])
            else:
                value = head[key.removeprefix(_PREFIX)]
            tensor.copy_(torch.from_numpy(value.astype(np.float64)))


def as_peft_model(
    base_model: nn.Module,
    adapter: Adapter,
    layout: Layout,
    *,
    task_type: TaskType,
    head: Mapping[str, Array] = _NO_HEAD,
) -> PeftModel:
    """Wraps `base_model` (in place, as PEFT does) with the adapter at scaling 1, frozen, for inference or merging.

    Raises: AdapterError as `save_adapter` does, or if the base does not have exactly these modules and shapes.
    """
    kept = _checked(adapter, layout, head, task_type)
    model = get_peft_model(base_model, _lora_config(kept, layout, None, task_type, head))
    into_peft_model(model, kept, head)
    return model


def _checked(adapter: Adapter, layout: Layout, head: Mapping[str, Array], task_type: TaskType) -> Adapter:
    """The modules of rank 1 or more, all of them known to fit the layout and PEFT's rules."""
    for name, f in adapter.items():
        if name not in layout.modules:
            raise AdapterError(f"{name} is not among the {len(layout.modules)} adapted modules of the layout")
        if f.shape != (want := (layout.modules[name].out, layout.modules[name].inp)):
            raise AdapterError(f"{name}: the product has shape {f.shape}, the layout says {want} (out, in)")
    given = {n: x.shape for n, x in head.items()}
    if given != dict(layout.head):
        raise AdapterError(f"the head has arrays {given}, the layout says {dict(layout.head)}; give all of them, whole")
    if task_type == "sequence-classification" and not head:
        raise AdapterError("sequence classification needs its head: PEFT saves and restores the classifier with it")
    kept = Adapter({n: f for n, f in adapter.items() if f.rank > 0})
    if not kept:
        raise AdapterError("every module has rank 0, and PEFT has no empty adapter: train first, or use the bare base")
    saved = [*_head_modules(head), *(_PEFT_HEADS if task_type == "sequence-classification" else ())]
    if clash := [n for n in kept if _inside(n, saved)]:
        raise AdapterError(f"{clash} lie in modules that PEFT saves whole {saved}: adapt them or train them, not both")
    return kept


def _lora_config(
    adapter: Adapter, layout: Layout, base_name: str | None, task_type: TaskType, head: Mapping[str, Array]
) -> LoraConfig:
    """alpha = rank for every module. `^` makes PEFT's suffix patterns exact: `layers.1` must not match `x.layers.1`."""
    top = max(adapter.ranks.values())
    ranks = {f"^{re.escape(n)}": r for n, r in adapter.ranks.items() if r != top}
    return LoraConfig(
        task_type=_TASKS[task_type],
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=top,
        lora_alpha=top,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=list(adapter),
        modules_to_save=_head_modules(head) or None,
        fan_in_fan_out=any(layout.modules[n].kind == "conv1d" for n in adapter),
    )


def _head_modules(head: Iterable[str]) -> list[str]:
    """The modules to save whole: up to the one PEFT itself would take, otherwise the parameter's own module."""
    found = set()
    for name in head:
        path = name.split(".")[:-1]
        if not path:
            raise AdapterError(f"head array {name!r} belongs to no module: PEFT saves modules, e.g. score.weight")
        whole = next((i for i, part in enumerate(path) if part in _PEFT_HEADS), len(path) - 1)
        found.add(".".join(path[: whole + 1]))
    return sorted(found)


def _inside(name: str, modules: Iterable[str]) -> bool:
    """Whether PEFT would take `name` for a part of these modules: it compares ends, so `pre_classifier` counts."""
    return any(f"{m}." in f"{name}." for m in modules)


def _settings(config: Any) -> dict[str, Any]:
    """PEFT's own view of a config as JSON would hold it (its method has no types, hence Any)."""
    return dict(config.to_dict())


def _read_config(path: Path, where: str) -> dict[str, Any]:
    """The JSON over PEFT's defaults, with the types that the rest relies on."""
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise AdapterError(f"{where}: cannot read {_CONFIG} ({e}); is this an adapter folder?") from e
    if not isinstance(given, dict):
        raise AdapterError(f"{where}: {_CONFIG} holds a {type(given).__name__}, not settings")
    config = {**_settings(LoraConfig()), "peft_type": None, **given}
    config |= {k: config[k] or {} for k in ("rank_pattern", "alpha_pattern")}
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        numbers = config[key].values() if isinstance(config[key], dict) else [config[key]]
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise AdapterError(f"{where}: {_CONFIG}: {key} is {config[key]!r}, which is no number")
    return config


def _by_pattern(config: Mapping[str, Any], keys: tuple[str, str], where: str) -> Callable[[str], float]:
    """Module name -> its value: PEFT's patterns match the end of a module's path from a dot on.

    PEFT takes the first match but sorts the keys when it saves: what overlapping patterns meant is lost, so refused.
    """
    try:
        patterns = [(re.compile(rf"(.*\.)?({p})$"), v) for p, v in config[keys[0]].items()]
    except re.error as e:
        raise AdapterError(f"{where}: {keys[0]} holds {e.pattern!r}, which is no regular expression ({e})") from e

    def value(name: str) -> float:
        found = {float(v) for pattern, v in patterns if pattern.match(name)} or {float(config[keys[1]])}
        if len(found) > 1:
            raise AdapterError(
                f"{where}: {name}: several keys of {keys[0]} match, with {sorted(found)}; give it one key"
            )
        return found.pop()

    return value


def _refuse_inexpressible(config: Mapping[str, Any], where: str) -> None:
    if config["peft_type"] != "LORA":
        raise AdapterError(f"{where}: peft_type is {config['peft_type']!s}; fedlora reads LORA adapters only")
    if config["init_lora_weights"] not in _PLAIN_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which may change the base; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA adapter"
        )
    plain = _settings(LoraConfig())
    for key in sorted(config.keys() - _UNDERSTOOD):
        if config[key] and config[key] != plain.get(key):
            why = _WHY.get(key, "fedlora does not know that this still means W0 + scale * B A; train without it")
            raise AdapterError(f"{where}: {key} is {config[key]!r}: {why}")


def _slots(model: PeftModel, adapter_name: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The live tensors of one adapter under the keys of a PEFT checkpoint, and PEFT's scaling by module."""
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            if adapter_name in module.merged_adapters:
                raise AdapterError(f"PEFT adapter {adapter_name!r} is merged into the base at {path}: unmerge it first")
            scales[path.removeprefix(_PREFIX)] = float(module.scaling[adapter_name])
            for side in "AB":
                linear, embedding = getattr(module, f"lora_{side}"), getattr(module, f"lora_embedding_{side}")
                if adapter_name in linear:
                    tensors[f"{path}.lora_{side}.weight"] = linear[adapter_name].weight
                if adapter_name in embedding:
                    tensors[f"{path}.lora_embedding_{side}"] = embedding[adapter_name]
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            tensors |= {f"{path}.{k}": t for k, t in module.modules_to_save[adapter_name].state_dict().items()}
    return tensors, scales


def _assemble(
    arrays: Mapping[str, Array], scale: Callable[[str, int], float], saved: Iterable[str], where: str
) -> tuple[Adapter, dict[str, Array]]:
    """Sorts the arrays of a checkpoint into factors and head by their keys, and checks them."""
    saved = list(saved)
    sides: dict[str, dict[str, Array]] = {}
    head: dict[str, Array] = {}
    copies: list[str] = []
    for key, x in arrays.items():
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(key):
            if x.ndim != 2:
                raise AdapterError(f"{where}: {key} has shape {x.shape}: fedlora adapts matrices, not convolutions")
            sides.setdefault(match["name"], {})[match["side"] or match["emb"]] = x
        elif ".lora_magnitude_vector" in key:
            raise AdapterError(f"{where}: {key}: {_WHY['use_dora']}")
        elif key.endswith((".lora_A.bias", ".lora_B.bias")):
            raise AdapterError(f"{where}: {key}: {_WHY['lora_bias']}")
        elif ".base_layer." in key:
            copies.append(key)
        elif key.startswith(_PREFIX) and _inside(name, saved):
            head[name] = x
        else:
            raise AdapterError(f"{where}: {key} is neither a LoRA factor nor in modules_to_save {saved}")
    if alien := [k for k in copies if k.removeprefix(_PREFIX).split(".base_layer.")[0] not in sides]:
        raise AdapterError(f"{where}: {alien} are weights of the base, which fedlora does not take from an adapter")
    if saved and not head:
        raise AdapterError(f"{where}: modules_to_save names {saved}, but none of their weights are there")
    if not sides:
        raise AdapterError(f"{where}: there are no LoRA factors")
    require_finite((f"{where}: {key}", x) for key, x in arrays.items())
    modules = {}
    for name, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"{where}: {name} has only the factor {next(iter(pair))}; copy the file from its source")
        a, b = pair["A"], pair["B"]
        if a.shape[0] != b.shape[1]:
            raise AdapterError(f"{where}: {name}: A {a.shape} and B {b.shape} do not share a rank")
        modules[name] = Factors(a, b, scale(name, a.shape[0]))
    return Adapter(modules), head


def _numpy(key: str, tensor: torch.Tensor) -> Array:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise AdapterError(f"{key} has dtype {tensor.dtype}: fedlora reads float64, float32, float16 and bfloat16")
    here = tensor.detach().cpu()
    array: Array = (here.float() if tensor.dtype.itemsize == 2 else here).numpy()
    return array.copy()


def _single(x: Array, scale: float = 1.0) -> NDArray[np.float32]:
    """`scale * x` as contiguous float32, multiplied in float64; too large a value becomes infinite."""
    with np.errstate(over="ignore"):
        scaled = x if scale == 1.0 else x.astype(np.float64) * scale
        return np.ascontiguousarray(scaled, np.float32)


def _replace(path: Path, data: bytes) -> None:
    """Puts a whole file in place: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
