"""Every knob of a run, typed and bounded, with its default and its reason."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """The frozen base and what of it is adapted."""

    name: str = Field("tiny", description="`tiny` (embedded), a Hugging Face id, or a local folder")
    revision: str | None = Field(None, description="Hub revision; pin it")
    fingerprint: str | None = Field(None, description="refuse any base whose fingerprint is another")
    task_type: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    labels: tuple[str, ...] = Field((), description="label names in order, for sequence classification")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="`all-linear` or name endings, e.g. q_proj,v_proj"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bf16 where it is real, else fp32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0")
    max_length: Positive = Field(512, description="tokens per row, prompt and answer together")


class PartitionConfig(_Section):
    """How rows are dealt to clients."""

    kind: Literal["skills", "iid", "dirichlet", "natural", "files"] = "skills"
    alpha: Annotated[float, Field(gt=0)] = Field(0.5, description="Dirichlet concentration; small is uneven")
    key: str | None = Field(None, description="column for dirichlet (the label) and natural (the owner)")
    skills_per_client: Positive = Field(4, description="skills: how many each client holds")
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
    skills: tuple[str, ...] = Field((), description="skills by name; empty: all private ones")
    rows_per_client: Positive = Field(300, description="skills: generated rows per client")
    test_rows: Positive = Field(240, description="skills: generated test rows in all")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of each client's rows held out for evaluation"
    )
    partition: PartitionConfig = PartitionConfig()


class LoraConfig(_Section):
    """Ranks and scales. s_k = alpha / rank_k, or alpha / sqrt(rank_k) with rslora."""

    ranks: tuple[Positive, ...] = Field((16, 16, 8, 8, 8, 8, 4, 4, 4, 4), description="by client, repeated in turn")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="fixed alpha for every client; None: `scale` times the rank"
    )
    scale: Annotated[float, Field(gt=0)] = Field(2.0, description="s_k of every client, when alpha is None")
    rslora: bool = False


class MethodConfig(_Section):
    """The federated method and its own settings."""

    name: str = "flora"
    max_rank: Positive | None = Field(
        None, description="flora: recompress blocks above this rank; None: the lossless bound"
    )
    warm_start: bool = Field(
        False, description="flora: start from the last update's leading directions, for many short rounds"
    )
    task_rank: Positive | None = Field(
        None, description="ffa-lora, fedit: rank of the global pair; None: the largest client rank"
    )


class RoundsConfig(_Section):
    """How many, who takes part, and when a round is good enough."""

    count: Positive = 8
    clients: Positive = 10
    sampling: Literal["fraction", "poisson"] = "fraction"
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="of the clients, each round (poisson: the probability)"
    )
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of those asked that must answer")
    deadline: Annotated[float, Field(gt=0)] = Field(3600.0, description="seconds per round")
    retries: int = Field(1, ge=0, description="times a round below quorum is repeated before the run pauses")
    in_flight: Positive = Field(64, description="asks sent and not yet answered, at most; bounds the server's memory")


class TrainingConfig(_Section):
    """Local training; the fields are those of fedlora.state.LocalTraining, plus threads."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    local_steps: Positive | None = 20
    local_epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 16
    accumulation: Positive = 1
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    checkpointing: bool = False
    autocast: bool = False
    optimizer_state: Literal["fresh", "keep"] = "fresh"
    threads: int = Field(
        0, ge=0, description="torch threads; 0: the machine's cores. The last bits of a result depend on it"
    )


class EvaluationConfig(_Section):
    """When and how the model is scored. Scores are the last round's, never the best round's."""

    every: int = Field(1, ge=0, description="rounds between evaluations by the clients; 0: only at the end")
    server: bool = Field(True, description="the server evaluates too, if it has test rows")
    batch_size: Positive = 64


class WireConfig(_Section):
    """How values travel."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    max_bytes: Positive = Field(2_000_000_000, description="larger messages are refused before they are parsed")


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

    def rank_of(self, index: int) -> int:
        """The LoRA rank of the client with this index: `lora.ranks`, repeated in turn."""
        return self.lora.ranks[index % len(self.lora.ranks)]

    def scale_of(self, rank: int) -> float:
        """s_k of a client of this rank: alpha / rank, or alpha / sqrt(rank) with rslora; see LoraConfig."""
        if self.lora.alpha is None:
            return self.lora.scale
        return self.lora.alpha / (rank**0.5 if self.lora.rslora else rank)
