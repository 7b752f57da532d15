"""The frozen base model: loaded once, named by a fingerprint, adapted in place without being copied or reloaded.

    W_eff = W0 + sum of blocks + frozen branch + scale * B A

The base stays resident while clients come and go: `set_blocks` and `set_frozen` swap what is attached, training
attaches the pair. No parameter of the base ever requires a gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from fedlora.adapter import stack
from fedlora.config import ModelConfig
from fedlora.errors import AdapterError, BaseMismatch, ConfigError
from fedlora.fingerprint import fingerprint
from fedlora.state import Block, Layout, Module
from fedlora.training.lora import LoraLayer, to_tensor

__all__ = ["Base", "load_base"]

log = logging.getLogger(__name__)

TaskType = Literal["causal-lm", "sequence-classification"]


@dataclass(eq=False, kw_only=True)
class Base:
    """A resident base. `layers` are the adapted modules by name, `head` the dense extras of a classifier by name."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any | None  # a transformers tokenizer
    task_type: TaskType
    device: torch.device
    dtype: torch.dtype
    layout: Layout
    fingerprint: str
    layers: Mapping[str, LoraLayer]
    head: Mapping[str, nn.Parameter]
    initial_head: Mapping[str, NDArray[np.float32]]  # as loaded; freshly initialised with a fixed seed if not on disk
    pad_id: int
    splits: bool  # whether logits are the output head on the last hidden states and nothing more; see `_splits`
    classifier: nn.Module | None = None  # of model.pooling=mean: logits `[rows, classes]` from means of hidden states
    _blocks_id: str | None = None

    def set_blocks(self, blocks: Sequence[Block], blocks_id: str) -> None:
        """Attach the blocks of W_eff. Nothing happens if `blocks_id` is what is attached already.

        fp32: `W0 + sum B_j A_j` is computed from the pristine W0 into the weight (one dense product per module, and a
        pristine copy of the adapted weights). Otherwise the blocks are a factored branch in the base's dtype.
        `set_blocks((), ...)` restores the pristine base exactly.
        Raises: AdapterError if modules or shapes are not this base's.
        """
        if blocks_id == self._blocks_id:
            return
        adapters = [block.adapter for block in blocks]
        for adapter in adapters:
            self.require_fit(adapter)
        total = stack(adapters) if adapters else None
        self._blocks_id = None  # a failure below leaves nothing that claims to be attached
        for name, layer in self.layers.items():
            factors = None if total is None else total[name]
            layer.set_blocks(None if factors is None or factors.rank == 0 else factors)
        self._blocks_id = blocks_id

    def set_frozen(self, adapter: Mapping[str, Any] | None) -> None:
        """Attach one client's frozen factors, a factored branch; None removes them. Raises: AdapterError as above."""
        if adapter is not None:
            self.require_fit(adapter)
        for name, layer in self.layers.items():
            layer.set_frozen(None if adapter is None else adapter[name])

    def set_head(self, head: Mapping[str, NDArray[Any]]) -> None:
        """Write the dense extras of a classifier. Raises: AdapterError naming what is missing, extra or misshapen."""
        want = {n: tuple(s) for n, s in self.layout.head.items()}
        came = {n: tuple(x.shape) for n, x in head.items()}
        if want != came:
            raise AdapterError(f"head: this base needs {want}, got {came}; same base and labels on both sides?")
        for name, parameter in self.head.items():
            parameter.data.copy_(to_tensor(head[name], self.device))

    def require_fit(self, adapter: Mapping[str, Any]) -> None:
        """Raises: AdapterError unless the adapter has exactly this base's modules, with their shapes."""
        if adapter.keys() != self.layers.keys():
            missing, extra = sorted(self.layers.keys() - adapter.keys()), sorted(adapter.keys() - self.layers.keys())
            raise AdapterError(
                f"adapter and base differ: missing {missing[:5]}, extra {extra[:5]}; same target_modules?"
            )
        for name, module in self.layout.modules.items():
            if adapter[name].shape != (module.out, module.inp):
                raise AdapterError(
                    f"{name}: the base needs (out, in) = {(module.out, module.inp)}, got {adapter[name].shape}"
                )


def load_base(config: ModelConfig) -> Base:
    """The base that `config` names, frozen, on its device, with a LoRA layer installed over every adapted module.

    Cost: one read of the weights to load them and one to fingerprint them (remembered per file in this process).
    Raises: ConfigError if there is no such model, module or device, or a file of the model is damaged; BaseMismatch if
    `config.fingerprint` is another.
    """
    source = _source(config)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    try:
        settings = transformers.AutoConfig.from_pretrained(source, revision=config.revision)
        at = cached_file(source, "config.json", revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.name, error)) from error
    folder = Path(str(at)).parent
    with _reading(config, folder):
        print_ = fingerprint(folder)
    if config.fingerprint is not None and config.fingerprint != print_:
        raise BaseMismatch(f"model: the run was opened with base {config.fingerprint}, this one is {print_}")
    with _reading(config, folder):
        model, fresh = _load_model(config, source, settings, dtype)
        tokenizer = _tokenizer(source, config.revision)
    model.to(device).eval().requires_grad_(False)
    pad_id = _pad_id(model, tokenizer)
    model.config.get_text_config().pad_token_id = pad_id  # a decoder with a classifier's head looks for it in batches
    head = _head(model, fresh) if config.task_type == "sequence-classification" else {}
    classifier = _classifier(model, head, config) if config.pooling == "mean" else None
    if classifier is not None:  # a pooler of its own is not passed
        head = {n: p for n, p in head.items() if any(p is own for own in classifier.parameters())}
    _keep_fp32(model, head)
    modules = _shared(model, _targets(model, config, head))
    layout = Layout(
        modules=modules,
        head={n: tuple(p.shape) for n, p in head.items()},
        features=model.config.get_text_config().hidden_size,
    )
    layers = {n: LoraLayer(model.get_submodule(n), spec, folds=_folds(model, n)) for n, spec in sorted(modules.items())}
    return Base(
        model=model,
        tokenizer=tokenizer,
        task_type=config.task_type,
        device=device,
        dtype=dtype,
        layout=layout,
        fingerprint=print_,
        layers=layers,
        head=head,
        initial_head={n: p.detach().float().cpu().numpy().copy() for n, p in head.items()},
        pad_id=pad_id,
        splits=config.task_type == "causal-lm" and _splits(model),
        classifier=classifier,
    )


@contextmanager
def _reading(config: ModelConfig, folder: Path) -> Iterator[None]:
    """Raises: ConfigError for whatever the files of a base make their readers raise."""
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"model: {config.name!r} cannot be loaded for {config.task_type} from {folder}: {type(error).__name__}: "
            f"{reason}; if a file there is torn, copy or download the folder anew, else choose a base of this kind"
        ) from error


def _source(config: ModelConfig) -> str:
    if config.name == "tiny":
        from fedlora.tiny import base_path

        return str(base_path())
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model: folder {folder} has no config.json; name the folder that save_pretrained wrote")
        return str(folder)
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ConfigError(_not_found(config.name, None))
    return config.name


def _not_found(name: str, error: Exception | None) -> str:
    folder = Path(name).expanduser()
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = [str(folder.parent / n) for n in get_close_matches(folder.name, siblings)]
    near += get_close_matches(name, ["tiny"], cutoff=0.5)
    tried = [f"the folder {folder.absolute()}"] + (
        [] if error is None else [f"the Hub id {name!r} and its local cache"]
    )
    reason = "" if error is None else f" ({str(error).splitlines()[0]})"
    return (
        f"model: no base {name!r}; tried {' and '.join(tried)}{reason}. "
        f"Near: {', '.join(near) or 'nothing'}. `tiny` is the embedded base; a Hub id needs the network once"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device: {name!r} is no device; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device: {name} was asked for, torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _load_model(config: ModelConfig, source: str, settings: Any, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The model, and the names of parameters that its files do not hold."""
    auto: Any = transformers.AutoModelForCausalLM
    if config.task_type == "sequence-classification":
        if len(config.labels) < 2:
            raise ConfigError(
                f"model.labels: sequence classification needs at least 2 labels, got {list(config.labels)}"
            )
        auto = transformers.AutoModelForSequenceClassification
        settings.num_labels = len(config.labels)
        settings.id2label = dict(enumerate(config.labels))
        settings.label2id = {label: i for i, label in enumerate(config.labels)}
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)  # what the files do not hold starts the same everywhere
        model, info = auto.from_pretrained(
            source,
            config=settings,
            revision=config.revision,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    fresh = set(info["missing_keys"]) | {item[0] for item in info["mismatched_keys"]}
    if fresh and config.task_type == "causal-lm":
        raise ConfigError(f"model: the files of {config.name!r} lack weights of the model: {sorted(fresh)[:5]}")
    return model, fresh


def _tokenizer(source: str, revision: str | None) -> Any | None:
    has = [
        name
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")
        if cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    ]
    return transformers.AutoTokenizer.from_pretrained(source, revision=revision) if has else None


def _pad_id(model: Any, tokenizer: Any | None) -> int:
    for holder in (tokenizer, model.config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and value >= 0:
                return value
    return 0


def _head(model: Any, fresh: set[str]) -> dict[str, nn.Parameter]:
    """The dense extras: everything outside the encoder, and a pooler that the files do not hold."""
    prefix = f"{model.base_model_prefix}."
    lost = sorted(n for n in fresh if n.startswith(prefix) and "pooler" not in n)
    if lost:
        raise ConfigError(
            f"model: the files lack weights of the encoder: {lost[:5]}; is this checkpoint of another model?"
        )
    return {n: p for n, p in sorted(model.named_parameters()) if not n.startswith(prefix) or n in fresh}


def _classifier(model: Any, head: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    """The one linear module that can read means of hidden states. Raises: ConfigError if the head is something else."""
    width, classes = model.config.get_text_config().hidden_size, len(config.labels)
    owners = {n.rpartition(".")[0] for n in head if not n.startswith(f"{model.base_model_prefix}.")}
    found = [model.get_submodule(owner) for owner in sorted(owners)]
    if len(found) == 1 and isinstance(found[0], nn.Linear) and found[0].weight.shape == (classes, width):
        return found[0]
    told = ", ".join(f"{o} {type(m).__name__}" for o, m in zip(sorted(owners), found, strict=True)) or "none"
    raise ConfigError(
        f"model.pooling: mean needs a head of one linear module [{classes}, {width}]; {config.name!r} has {told}. Use "
        "pooling=model"
    )


def _keep_fp32(model: Any, head: Mapping[str, nn.Parameter]) -> None:
    """A head is trained whole, so it stays fp32 under a bf16 base: its modules cast what they are given."""
    for owner in sorted({name.rpartition(".")[0] for name in head}):
        module = model.get_submodule(owner)
        if any(p.dtype != torch.float32 for p in module.parameters(recurse=False)):
            module.float()
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _targets(model: Any, config: ModelConfig, head: Mapping[str, Tensor]) -> dict[str, Module]:
    """Adapted modules by name, by `config.target_modules`. Raises: ConfigError for an ending that matches nothing."""
    owners = {name.rpartition(".")[0] for name in head}
    able = {n: spec for n, m in model.named_modules() if n not in owners and (spec := _spec(m)) is not None}
    if config.pooling == "mean":  # nothing that a pooler gives is read
        able = {n: spec for n, spec in able.items() if "pooler" not in n.split(".")}
    wanted = config.target_modules
    if wanted == "all-linear":
        output = model.get_output_embeddings() if config.task_type == "causal-lm" else None
        chosen = {n: s for n, s in able.items() if s.kind != "embedding" and model.get_submodule(n) is not output}
        if not chosen:
            raise ConfigError(f"model.target_modules: {config.name!r} has no Linear or Conv1D module to adapt")
        return chosen
    endings = tuple(e.strip() for e in wanted.split(",")) if isinstance(wanted, str) else wanted
    found = {e: [n for n in able if n == e or n.endswith(f".{e}")] for e in endings}
    lost = [e for e in endings if not found[e]]
    if lost or not endings:
        last = sorted({n.rpartition(".")[2] for n in able})
        near = sorted({m for e in lost for m in get_close_matches(e, last)})
        raise ConfigError(
            f"model.target_modules: {lost} match no module of {config.name!r}; "
            f"near: {near or 'nothing'}; there are {last}"
        )
    return {n: able[n] for names in found.values() for n in names}


def _folds(model: Any, name: str) -> bool:
    """Whether blocks may go into the weight: fp32, and no other module's (an embedding tied to the output head)."""
    weight = model.get_submodule(name).weight
    owners = sum(p is weight for m in model.modules() for p in m.parameters(recurse=False))
    return weight.dtype == torch.float32 and owners == 1


def _spec(module: nn.Module) -> Module | None:
    if isinstance(module, nn.Linear):
        return Module(out=module.out_features, inp=module.in_features)
    if isinstance(module, Conv1D):
        return Module(out=int(module.nf), inp=int(module.weight.shape[0]), kind="conv1d")
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return Module(out=module.embedding_dim, inp=module.num_embeddings, kind="embedding")
    return None


@torch.no_grad()
def _shared(model: Any, modules: Mapping[str, Module]) -> dict[str, Module]:
    """The modules with `shares` set where several read one input: in one forward pass over a few tokens, every call of
    theirs got the very same tensors. A module that no token passed shares nothing."""
    seen: dict[str, list[Any]] = {n: [] for n, spec in modules.items() if spec.kind != "embedding"}

    def see(name: str) -> Any:
        return model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen[name].append(inputs[0]))

    hooks = [see(name) for name in seen]
    try:
        model(input_ids=_probe(model))
    finally:
        for hook in hooks:
            hook.remove()
    readers: dict[tuple[int, ...], list[str]] = {}  # the tensors live as long as `seen`, so their ids are theirs alone
    for name in sorted(seen):
        if seen[name]:
            readers.setdefault(tuple(map(id, seen[name])), []).append(name)
    first = {name: names[0] for names in readers.values() for name in names[1:]}
    return {n: replace(spec, shares=first.get(n, "")) for n, spec in modules.items()}


def _probe(model: Any) -> Tensor:
    """A few tokens `[1, 8]`."""
    tokens = torch.arange(1, 9, device=model.device)[None]
    return tokens % int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def _splits(model: Any) -> bool:
    """Whether logits are the output head on the last hidden states, so that they can be computed where needed only.

    Found out by a probe whose head is made a thousand times louder, so that a soft cap, scale or bias after the head
    shows however small the logits are.
    """
    head, encoder = model.get_output_embeddings(), getattr(model, model.base_model_prefix or "-", None)
    same = False
    if head is not None and encoder is not None:
        tokens = _probe(model)
        louder = head.register_forward_hook(lambda _module, _inputs, out: out * 1000)
        try:
            full = model(input_ids=tokens, use_cache=False).logits.float()
            split = head(encoder(input_ids=tokens, use_cache=False).last_hidden_state).float()
        finally:
            louder.remove()
        same = full.shape == split.shape and bool((full - split).abs().max() <= 1e-3 * full.abs().max())
    if not same:
        log.warning(
            "%s changes its logits after the output head (soft cap, scale, or no such split): computing the logits of "
            "all positions, which is slower",
            type(model).__name__,
        )
    return same


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without transformers' progress bar: a run has its own display."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
