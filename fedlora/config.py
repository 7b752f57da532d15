"""Every knob of a run, typed and bounded, with its default and its reason.

A TOML file, dotted overrides (`training.learning_rate=1e-3`) and Flower's flat run config give the same `RunConfig`.
Text stands for any value: lists are `16,8,4` (or a JSON list), tables are `instruction=question,output=answer` (or a
JSON object), `none` is None or an empty list, and an empty text is None where that is allowed, else the default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedlora.config_conflicts import BELONGS_TO, EXCLUSIVE, TASK_KEYS, conflicts
from fedlora.config_text import (
    UNSET,
    Leaf,
    Scalar,
    is_nothing,
    nested,
    read_toml,
    settings_of,
    shown,
    split,
    unknown,
    wrong_value,
)
from fedlora.errors import ConfigError
from fedlora.state import Codec, LocalTraining, Overlap

Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
MethodName = Literal[
    "fed-sb",
    "fedex-lora",
    "fedit",
    "fedsa-lora",
    "fedsvd",
    "ffa-lora",
    "flexlora",
    "flora",
    "frlora",
    "hetlora",
    "lora-fair",
    "rolora",
]

ContinualName = Literal[
    "ewc",
    "incremental",
    "input-aware",
    "joint",
    "nearest-mean",
    "o-lora",
    "replay",
    "separate",
    "sequential",
    "subspace",
]

METHOD_NAMES: Final[tuple[str, ...]] = get_args(MethodName)
CONTINUAL_NAMES: Final[tuple[str, ...]] = get_args(ContinualName)
FLOWER_ONLY: Final[Mapping[str, Scalar]] = {
    "out": ""
}  # keys of Flower's run config that are no setting: the run folder


class _Conflicts(ValueError):
    """Cross-field mistakes: (the keys involved, the first one to blame; what is wrong)."""

    def __init__(self, found: Sequence[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(f"{keys[0]}: {text}" for keys, text in found))
        self.found = found


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        own = {leaf.key: leaf for leaf in settings_of(cls)} if data else {}
        read = {name: own[name].read(value) if name in own else value for name, value in data.items()}
        return {name: value for name, value in read.items() if value is not UNSET}


class ModelConfig(_Section):
    """The frozen base and what of it is adapted."""

    name: str = Field("tiny", description="`tiny` (embedded), a Hugging Face id, or a local folder")
    revision: str | None = Field(None, description="Hub revision; pin it")
    fingerprint: str | None = Field(None, description="refuse any base whose fingerprint is another")
    task_type: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    labels: tuple[Name, ...] = Field((), description="label names in order, for sequence classification")
    target_modules: Literal["all-linear"] | Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        "all-linear", description="`all-linear` or name endings, e.g. q_proj,v_proj"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bf16 where it is real, else fp32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0")
    max_length: Positive = Field(512, description="tokens per row, prompt and answer together")
    pooling: Literal["model", "mean"] = Field(
        "model",
        description="what a classifier's head reads: what the model's own class gives it (BERT: the first token, "
        "through its pooler), or the mean of the last hidden states, as sentence encoders are pre-trained",
    )
    head: Literal["random", "discriminants"] = Field(
        "random",
        description="how a classifier's head begins: random, or as linear discriminants of what it reads, from sums "
        "that clients give before they train; needs pooling=mean",
    )


class PartitionConfig(_Section):
    """How rows are dealt to clients."""

    kind: Literal["skills", "iid", "dirichlet", "natural", "files"] = Field(
        "skills", description="skills for the embedded data; iid where nothing is said about other data"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(0.5, description="Dirichlet concentration; small is uneven")
    key: str | None = Field(None, description="column for dirichlet (the label) and natural (the owner)")
    skills_per_client: Positive | None = Field(
        None, description="skills: how many each client holds; None: 4, or more where few clients must hold all skills"
    )
    minimum_rows: int = Field(1, ge=0, description="dirichlet: redraw until each client has this many")


class DataConfig(_Section):
    """Rows, columns, and what is held out."""

    name: str = Field(
        "skills", description="`skills` (embedded), a JSONL/CSV/Parquet file or folder, or a Hugging Face data set id"
    )
    split: str = "train"
    test: str | None = Field(
        None, description="file or split that the server may evaluate on; None: the skills' own test rows, or none"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="role -> column, e.g. instruction=question; empty: guessed by name"
    )
    prompt: str | None = Field(
        None, description="template with {instruction} and {input}; None: the model's chat template, else the default"
    )
    skills: tuple[Name, ...] = Field((), description="skills by name; empty: all private ones")
    rows_per_client: Positive = Field(300, description="skills: generated rows per client")
    test_rows: Positive = Field(240, description="skills: generated test rows in all")
    labels: tuple[Name, ...] = Field(
        (), description="the labels that these rows can have, in order, among model.labels; empty: all of those"
    )
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of each client's rows held out for evaluation"
    )
    partition: PartitionConfig = PartitionConfig()

    @model_validator(mode="before")
    @classmethod
    def _deal_other_data_evenly(cls, data: object) -> object:
        if not isinstance(data, Mapping) or data.get("name", "") in ("", "skills"):
            return data
        partition = data.get("partition", {})
        if not isinstance(partition, Mapping) or partition.get("kind", ""):
            return data
        return {**data, "partition": {**partition, "kind": "iid"}}


class LoraConfig(_Section):
    """Ranks and scales. s_k = alpha / rank_k, or alpha / sqrt(rank_k) with rslora."""

    ranks: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (16, 16, 8, 8, 8, 8, 4, 4, 4, 4), description="by client, repeated in turn"
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="fixed alpha for every client; None: `scale` times the rank"
    )
    scale: Annotated[float, Field(gt=0)] = Field(2.0, description="s_k of every client, when alpha is None")
    rslora: bool = Field(False, description="divide alpha by the root of the rank; needs `alpha`")


class MethodConfig(_Section):
    """The federated method and its own settings."""

    name: MethodName = "flora"
    max_rank: Positive | None = Field(
        None,
        description="flora, fedex-lora, frlora: rank kept of the sum; None: all (flexlora: the largest client rank)",
    )
    max_error: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="the same: keep the fewest directions that leave an error of at most this share of the sum's norm",
    )
    warm_start: bool = Field(
        False, description="flora: start from the last update's leading directions, for many short rounds"
    )
    task_rank: Positive | None = Field(None, description="rank of the global pair; None: the largest client rank")
    prune: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="hetlora: share of its rank that a client keeps when it prunes itself; None: 0.99; 1: never"
    )
    prune_penalty: Annotated[float, Field(ge=0)] | None = Field(
        None, description="hetlora: weight of the norm of what may be pruned, in the local loss; None: 5e-3"
    )
    ridge: Annotated[float, Field(ge=0)] | None = Field(
        None, description="lora-fair: weight of the size of the correction of B; None: 0.01"
    )
    basis: Literal["random", "update"] | None = Field(
        None, description="fed-sb: orthonormal public bases, or the singular vectors of the first round; None: update"
    )


class RoundsConfig(_Section):
    """How many, who takes part, and when a round is good enough."""

    count: Positive = 6
    clients: Positive = 10
    sampling: Literal["fraction", "poisson"] = "fraction"
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="of the clients, each round (poisson: the probability)"
    )
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of those asked that must answer")
    deadline: Annotated[float, Field(gt=0)] = Field(3600.0, description="seconds per round")
    retries: int = Field(1, ge=0, description="times a round below quorum is repeated before the run pauses")
    quarantine: int = Field(
        3, ge=0, description="answers of a client refused for what they are, after which it is asked no more; 0: never"
    )
    max_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="refuse an update whose norm (Frobenius, of its product and head changes together) is above"
    )
    in_flight: Positive = Field(64, description="asks sent and not yet answered, at most; bounds the server's memory")


class TrainingConfig(_Section):
    """Local training; the fields are those of fedlora.state.LocalTraining, plus threads."""

    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="None: 1e-2 for the embedded base, 2e-4 for any other; three times that for ffa-lora"
    )
    local_steps: Positive | None = Field(15, description="optimiser steps a round; this or local_epochs")
    local_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="passes over the client's rows a round; setting it unsets the default of local_steps"
    )
    batch_size: Positive = 16
    accumulation: Positive = 1
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    checkpointing: bool = False
    autocast: bool = False
    optimizer_state: Literal["fresh", "keep"] = Field(
        "fresh", description="keep AdamW's moments between a client's rounds (fedit, ffa-lora), or begin afresh"
    )
    threads: int = Field(
        0, ge=0, description="torch threads; 0: the machine's cores. The last bits of a result depend on it"
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_steps(cls, data: object) -> object:
        if isinstance(data, Mapping) and "local_steps" not in data and not is_nothing(data.get("local_epochs")):
            return {**data, "local_steps": None}
        return data


class EvaluationConfig(_Section):
    """When and how the model is scored. Scores are the last round's, never the best round's."""

    every: int = Field(1, ge=0, description="rounds between evaluations by the clients; 0: only at the end")
    server: bool = Field(True, description="the server evaluates too, if it has test rows")
    batch_size: Positive = 64


class WireConfig(_Section):
    """How values travel."""

    up: Codec = Field("float32", description="codec of the clients' answers; what it leaves out is sent next time")
    down: Codec = Field("float32", description="codec of what is sent down; the run's state itself is rounded to it")
    top: Positive | None = Field(
        None, description="flora, flexlora: only so many leading directions of a client's update are sent; None: all"
    )
    max_bytes: Positive = Field(2_000_000_000, description="larger messages are refused before they are parsed")


class ServerConfig(_Section):
    """An optimiser of the server, over the mean update of each round (Reddi et al., ICLR 2021)."""

    optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none", description="momentum: FedAvgM; adam and yogi: only where what moves has one shape and one basis"
    )
    rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="server learning rate; None: 1 for momentum, 1e-2 for adam and yogi"
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = Field(1e-3, description="adam, yogi: added to the root of the second moment")


class RobustConfig(_Section):
    """A rule against hostile or broken clients, in product space: it weighs, scales or leaves out whole updates."""

    rule: Literal[
        "none",
        "norm-bound",
        "screen",
        "krum",
        "multi-krum",
        "geometric-median",
        "centred-clipping",
        "fltrust",
        "median",
        "trimmed-mean",
    ] = "none"
    attackers: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="share of hostile clients that krum, multi-krum, median and trimmed-mean are set up for"
    )
    bound: Annotated[float, Field(gt=0)] | None = Field(
        None, description="norm-bound, centred-clipping: largest Frobenius norm; None: the round's median norm"
    )
    trusted: str | None = Field(None, description="fltrust: id of the client whose update the others are held against")


class AttackConfig(_Section):
    """Hostile clients to test a rule against; `fedlora simulate` and `compare` only."""

    kind: Literal[
        "none",
        "sign-flip",
        "scaling",
        "gaussian",
        "label-flip",
        "little-is-enough",
        "collusion",
        "backdoor",
    ] = "none"
    share: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="of the clients, the first ones by id")
    strength: Annotated[float, Field(gt=0)] | None = Field(None, description="None: what suits the attack")


class SecureConfig(_Section):
    """Secure sums: the server learns what the clients' updates add up to, and no single one; see docs/PRIVACY.md."""

    on: bool = False
    bound: Annotated[float, Field(ge=16)] = Field(
        100.0, description="L2 norm that a client's update is clipped to, in the factors that it sends, heads included"
    )
    examples: Positive = Field(
        1000, description="rows at which a client's weight is full; more do not count, so that no weight shows"
    )
    least: Annotated[int, Field(ge=3)] = Field(3, description="clients of a rank or above it, in every sum")
    columns: Positive | None = Field(
        None, description="flora: columns of the two-pass sketch; exact from the sum of the clients' ranks on"
    )


class PrivacyConfig(_Section):
    """Differential privacy of single rows, by their clients, or of whole clients; see docs/PRIVACY.md."""

    level: Literal["none", "example", "client"] = Field(
        "none", description="what is protected: single training rows, or whole clients with all that they have"
    )
    clip: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="L2 norm, over all that is trained, that one row's gradient is clipped to, or at client level one "
        "client's whole update",
    )
    noise_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="standard deviation of the noise of a step, or of a round's sum, over the clip; this or epsilon",
    )
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="what the whole run may spend at, or of, each client; the noise follows from it"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="at which epsilon is counted; well below one over a client's rows, or over the clients"
    )
    noise: Literal["server", "clients"] = Field(
        "server", description="client level: who adds it; clients: each its share, inside a secure sum"
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="client level: the clip follows this quantile of the clients' norms; None: it stays"
    )
    scheme: Literal["poisson", "fixed-size"] = Field(
        "poisson", description="how a step draws rows; epsilon can be counted for poisson only"
    )
    sampling: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="probability with which a row takes part in a step; None: a step's rows over privacy.rows"
    )
    rows: Positive | None = Field(
        None, description="rows that a client is taken to have; the same for all, announced, counted from no data"
    )


class PersonalConfig(_Section):
    """A local adapter on top of the global one, trained by each client after the last round; it never leaves it."""

    steps: int = Field(0, ge=0, description="optimiser steps; 0: none")
    rank: Positive | None = Field(None, description="None: the client's own")


class ContinualConfig(_Section):
    """How tasks that come one after another are kept apart; read only where there are `tasks`."""

    method: ContinualName = Field(
        "input-aware",
        description="what a new task may do to the old ones: a subspace designed from inputs, a public one of its own, "
        "O-LoRA's penalty, or a baseline",
    )
    task_dim: Positive | None = Field(
        None,
        description="subspace, input-aware: dimensions of a task's subspace; None: the largest client rank where A is "
        "frozen, four times that where it is trained",
    )
    floor: Annotated[float, Field(gt=0)] = Field(
        0.01,
        description="input-aware: what old inputs are taken to have along every direction, beside what they have on "
        "average; small: keep off whatever they touch",
    )
    sketch: Positive | None = Field(
        None, description="input-aware: columns of the sketch of each input that a client sends; None: 64"
    )
    penalty: Annotated[float, Field(gt=0)] | None = Field(
        None, description="weight of the penalty; None: 0.5 for o-lora, 100 for ewc"
    )
    penalty_form: Overlap | None = Field(
        None, description="o-lora: sum of squares (paper), of absolute values (its code), or of normalised overlaps"
    )
    replay_rows: Positive | None = Field(
        None, description="replay: rows of each old task that a client keeps and trains on again; None: 32"
    )
    rank: Positive | None = Field(
        None, description="rank that a finished task is cut to, with the loss reported; None: nothing is lost"
    )
    effects: bool = Field(
        False,
        description="clients sketch their inputs under every method, so that the report can say what a new task does "
        "to inputs of old ones",
    )
    routing: bool = Field(
        True, description="clients sum the frozen base's features by class, so that inputs find tasks"
    )


class RunConfig(_Section):
    """One run. From TOML, dotted overrides, or Flower's run config: the same value."""

    name: str = "run"
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    method: MethodConfig = MethodConfig()
    rounds: RoundsConfig = RoundsConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wire: WireConfig = WireConfig()
    server: ServerConfig = ServerConfig()
    robust: RobustConfig = RobustConfig()
    personal: PersonalConfig = PersonalConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secure: SecureConfig = SecureConfig()
    attack: AttackConfig = AttackConfig()
    continual: ContinualConfig = ContinualConfig()
    tasks: tuple[dict[str, str], ...] = Field(
        (),
        description="tasks in order, each a table: name, and what is its own of data, training, method, rounds.count, "
        "continual.task_dim; start, clients, rank",
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _task_tables(cls, data: object) -> object:
        if not isinstance(data, list | tuple) or not all(isinstance(task, Mapping) for task in data):
            return data
        return [{key: _text(value) for key, value in _flattened(task, [])} for task in data]

    def rank_of(self, index: int) -> int:
        """The LoRA rank of the client with this index: `lora.ranks`, repeated in turn."""
        return self.lora.ranks[index % len(self.lora.ranks)]

    def scale_of(self, rank: int) -> float:
        """s_k of a client of this rank: alpha / rank, or alpha / sqrt(rank) with rslora; see LoraConfig."""
        if self.lora.alpha is None:
            return self.lora.scale
        return self.lora.alpha / (rank**0.5 if self.lora.rslora else rank)

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        found = list(conflicts(self, {leaf.key: (value, leaf.default) for leaf, value in _values(self)}))
        if found:
            raise _Conflicts(found)
        return self


_LEAVES: Final[Mapping[str, Leaf]] = {leaf.key: leaf for leaf in settings_of(RunConfig)}


def load_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    flower: Mapping[str, Scalar] | None = None,
) -> RunConfig:
    """The settings of a run: defaults, then the TOML file, then Flower's run config, then `key=value` overrides.

    Flower sends every key, so there a value that equals its default says nothing. Of `training.local_steps` and
    `training.local_epochs`, a later source that sets one unsets the other.

    Raises: ConfigError with every mistake, one a line: the dotted key, what is allowed, what came, the nearest name.
    """
    mistakes: list[str] = []
    layers: list[dict[str, object]] = []
    if path is not None:
        layers.append(dict(_flattened(read_toml(path), mistakes)))
    if flower is not None:
        layers.append(
            {
                key: value
                for key, value in flower.items()
                if key not in FLOWER_ONLY
                and not (key in _LEAVES and _same(_LEAVES[key].text(_LEAVES[key].default), value))
            }
        )
    layers.append(dict(split(overrides, mistakes)))
    merged: dict[str, object] = {}
    for layer in layers:
        _lay(merged, layer, mistakes)
    _name_labels(merged)
    config = _validated(merged, mistakes)
    if config is not None:
        mistakes += _wrong_tasks(config)
    if config is None or mistakes:
        where = f" ({path})" if path is not None else ""
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
        raise ConfigError(f"{count} in the settings{where}:\n" + "\n".join(f"  {m}" for m in mistakes))
    return config


def _name_labels(merged: dict[str, object]) -> None:
    """Where tasks have labels of their own and nothing says `model.labels`, those are all of theirs, in order."""
    tasks = merged.get("tasks")
    tables = _LEAVES["tasks"].read(tasks)
    if not isinstance(tables, list | tuple) or not is_nothing(merged.get("model.labels")):
        return
    names: dict[str, None] = {}
    for table in tables:
        if isinstance(table, Mapping):
            found = _LEAVES["data.labels"].read(dict(_flattened(table, [])).get("data.labels", ""))
            names |= dict.fromkeys(found if isinstance(found, list | tuple) else ())
    if names:
        merged["model.labels"] = list(names)


def _wrong_tasks(config: RunConfig) -> list[str]:
    """Mistakes in the settings that tasks have for themselves, one a line."""
    found = []
    for task in config.tasks:
        try:
            task_config(config, task["name"])
        except ConfigError as error:
            found += [f"tasks, {task['name']}: {line.strip()}" for line in str(error).splitlines()[1:]]
    return found


def task_config(config: RunConfig, name: str) -> RunConfig:
    """The settings of one task as those of a run of its own; `config` itself where there are no tasks and no name.

    Raises: ConfigError if there is no such task, with those that there are.
    """
    if not config.tasks and not name:
        return config
    return _task_config(config.model_dump_json(), name)


@lru_cache(maxsize=64)
def _task_config(text: str, name: str) -> RunConfig:
    config = RunConfig.model_validate_json(text)
    tables = {task["name"]: task for task in config.tasks}
    if name not in tables:
        raise ConfigError(f"no task is called {name!r}; there are {', '.join(tables) or 'none'}")
    plain = config.model_copy(update={"tasks": (), "continual": ContinualConfig(), "name": name})
    own = [f"{k}={v}" for k, v in tables[name].items() if k not in TASK_KEYS and not k.startswith("continual.")]
    return load_config(None, own, flower=flat(plain))


def _validated(merged: dict[str, object], mistakes: list[str]) -> RunConfig | None:
    """Validate; wrong values are noted and left out until the rest can be checked for conflicts too."""
    failed: set[str] = set()
    while True:
        try:
            config = RunConfig.model_validate(nested(merged))
        except ValidationError as error:
            wrong = error.errors()
        else:
            return None if mistakes else config
        for item in wrong:
            if not item["loc"]:
                found = item["ctx"]["error"].found
                mistakes += [f"{keys[0]}: {text}" for keys, text in found if not failed & set(keys)]
                return None
            names = [str(part) for part in item["loc"]]
            key = next(k for k in (".".join(names[:n]) for n in range(len(names), 0, -1)) if k in _LEAVES)
            if key not in failed:
                failed.add(key)
                mistakes.append(wrong_value(_LEAVES[key], merged.pop(key)))


def _lay(merged: dict[str, object], layer: Mapping[str, object], mistakes: list[str]) -> None:
    """Put one source on top of what is there."""
    chosen = [key for key in EXCLUSIVE if not is_nothing(layer.get(key))]
    if len(chosen) == 1:
        merged.pop(next(key for key in EXCLUSIVE if key != chosen[0]), None)
    for key, value in layer.items():
        table, _, entry = key.rpartition(".")
        if key in _LEAVES:
            merged[key] = value
        elif table in _LEAVES and _LEAVES[table].has("object"):
            before = _LEAVES[table].read(merged.get(table, {}))
            merged[table] = {**(before if isinstance(before, dict) else {}), entry: value}
        elif any(k.startswith(f"{key}.") for k in _LEAVES):
            names = ", ".join(k.removeprefix(f"{key}.") for k in _LEAVES if k.startswith(f"{key}."))
            mistakes.append(f"{key}: is a section with the settings {names}, got {shown(value)}")
        else:
            mistakes.append(unknown(key, _LEAVES))


def _same(default: Scalar, value: Scalar) -> bool:
    return default == value and isinstance(default, bool) == isinstance(value, bool)


def _flattened(values: Mapping[str, Any], mistakes: list[str], above: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        key = above + name
        if isinstance(value, dict) and key not in _LEAVES:
            if not value and not any(leaf.startswith(f"{key}.") for leaf in _LEAVES):
                mistakes.append(unknown(key, _LEAVES))
            yield from _flattened(value, mistakes, f"{key}.")
        else:
            yield key, value


def _text(value: object) -> str:
    """A TOML or JSON value as the text that stands for it in any setting."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else str(value)


def _values(config: RunConfig) -> Iterator[tuple[Leaf, Any]]:
    for leaf in _LEAVES.values():
        value: Any = config
        for name in leaf.key.split("."):
            value = getattr(value, name)
        yield leaf, value


def flat(config: RunConfig) -> dict[str, Scalar]:
    """Every setting as dotted key -> scalar, for Flower's run config; `load_config(flower=flat(c)) == c`."""
    return {leaf.key: leaf.text(value) for leaf, value in _values(config)}


def to_toml(config: RunConfig) -> str:
    """Every setting as TOML that `load_config` reads back to the same value.

    None is left out, except where the default is another value: there it is the word `none`.
    """
    written = {
        leaf.key: "none" if value is None else _plain(value)
        for leaf, value in _values(config)
        if not (value is None and leaf.default is None)
    }
    return tomli_w.dumps(nested(written))


def _plain(value: Any) -> Any:
    """A value for TOML: tuples as lists, tables with dotted keys as tables in tables."""
    if isinstance(value, tuple):
        return [nested(item) if isinstance(item, dict) else item for item in value]
    return value


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """One line `dotted.key: old -> new` for each setting of `a` that is another in `b`."""
    return [
        f"{leaf.key}: {shown(old)} -> {shown(new)}"
        for (leaf, old), (_, new) in zip(_values(a), _values(b), strict=True)
        if old != new
    ]


def digest(config: RunConfig) -> str:
    """SHA-256, in hex, of all settings."""
    return hashlib.sha256(json.dumps(flat(config), sort_keys=True).encode()).hexdigest()


def with_method(config: RunConfig, name: str) -> RunConfig:
    """The same run under another method; settings that belong to other methods go back to their defaults.

    Raises: ConfigError for a name that is not known.
    """
    mine = {k: v for k, v in flat(config).items() if name in BELONGS_TO.get(k, (name,))}
    return load_config(flower={**mine, "method.name": name})


_USUAL_RATE: Final = 2e-4  # of LoRA on a language model
_TINY_RATES: Final[Mapping[str, float]] = {"": 1e-2, "plain LoRA": 4e-3}  # short rounds bear more than one long run
_RATE_FACTORS: Final[Mapping[str, float]] = {"ffa-lora": 3.0}  # B alone moves, on a random basis


def local_training(config: RunConfig, *, method: str | None = None) -> LocalTraining:
    """What every client does in a round, as the value that travels in a TrainPlan.

    A learning rate that is not set is resolved here, for the run's method, or for `method`: another one, or "plain
    LoRA", one long run without a federation.
    """
    fields = config.training.model_dump(exclude={"threads"})
    if fields["learning_rate"] is None:
        name = method or config.method.name
        usual = _TINY_RATES.get(name, _TINY_RATES[""]) if config.model.name == "tiny" else _USUAL_RATE
        fields["learning_rate"] = usual * _RATE_FACTORS.get(name, 1.0)
    return LocalTraining(**fields)
