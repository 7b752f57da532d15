"""The files `deploy.toml` (of a server) and `node.toml` (of a node): where things lie and who may do what.

Paths are relative to the file that names them. Neither file holds a secret, and neither leaves its machine.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedlora.config import RunConfig, flat
from fedlora.config_text import Scalar, settings_of, unknown
from fedlora.errors import ConfigError
from fedlora.shared_settings import OWN

__all__ = ["LONGEST_SOCKET", "DeployFile", "Limits", "NodeFile", "NodeTask", "read_deploy", "read_node"]

LONGEST_SOCKET: Final = 100  # bytes of a Unix socket's path; Linux takes 107
_AnyFile = TypeVar("_AnyFile", bound=BaseModel)
Port = Annotated[int, Field(ge=1, le=65535)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DeployFile(_File):
    """`deploy.toml`: one server and the run that it conducts."""

    settings: Path = Field(description="the run's settings, a TOML file as for `fedlora simulate`")
    folder: Path = Field(description="the run folder; made if it is not there, gone on with if it is")
    keys: Path = Field(description="the folder that `fedlora pki init` made")
    state: Path = Field(Path("state"), description="Flower's database, logs and shared secret; 0700")
    host: str = Field("0.0.0.0", description="the address that the SuperLink listens on")
    port: Port = 9092
    address: str = Field("127.0.0.1", description="how this machine reaches it; must be in its certificate")
    metrics: int = Field(9464, ge=0, le=65535, description="loopback port of the Prometheus endpoint; 0: none")
    restarts: int = Field(5, ge=0, description="times in ten minutes that a process which died is started again")


class Limits(_File):
    """What a node does at most, whatever the operator asks for. None: no limit."""

    rank: Annotated[int, Field(ge=1)] | None = None
    local_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimiser steps in one round")
    local_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="passes over its rows in one round")
    measure: bool = Field(True, description="whether sums of inputs, features and gradients may be given")
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="what may be told of one unit, over all runs; with it only private training is answered"
    )
    unit: Literal["example", "client"] = Field(
        "example", description="of epsilon: a single row, or this node as a whole, which then adds noise of its own"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="at which epsilon is counted")


class NodeTask(_File):
    """The node's own settings of one task of the run."""

    name: str
    settings: dict[str, Scalar] = Field(default_factory=dict)


class NodeFile(_File):
    """`node.toml`: one node. `settings` are those of `fedlora.shared_settings.OWN`, as nested tables."""

    server: str = Field(description="HOST:PORT of the server")
    keys: Path = Field(description="the folder that `fedlora pki node` made")
    memory: Path = Field(Path("memory"), description="what the node keeps between rounds; 0700")
    state: Path = Field(Path("state"), description="Flower's home, the worker's socket, logs, shared secret; 0700")
    rank: Annotated[int, Field(ge=1)] = Field(8, description="the LoRA rank that it announces")
    port: Port = Field(9094, description="loopback port of its SuperNode; another one for each node of a machine")
    share: tuple[int, int] = Field((0, 1), description="[i, n]: part i of the data dealt in n; [0, 1] is all of it")
    socket: Path | None = Field(None, description="the worker's socket; None: in the state folder")
    relay_group: str | None = Field(None, description="the group that may use the worker's socket; None: this user")
    restarts: int = Field(20, ge=0, description="times in ten minutes that a process which died is started again")
    peers: Path | None = Field(
        None,
        description="a folder with the nodes.json that this owner has checked: secure sums with others are refused",
    )
    limits: Limits = Limits()
    settings: dict[str, Scalar] = Field(default_factory=dict)
    tasks: tuple[NodeTask, ...] = ()

    @field_validator("settings", mode="before")
    @classmethod
    def _dotted(cls, data: object) -> object:
        return _flat(data) if isinstance(data, dict) else data

    @field_validator("tasks", mode="before")
    @classmethod
    def _tables(cls, data: object) -> object:
        if not isinstance(data, list) or not all(isinstance(table, dict) for table in data):
            return data
        return [
            {"name": table.get("name", ""), "settings": _flat({k: v for k, v in table.items() if k != "name"})}
            for table in data
        ]

    @field_validator("server")
    @classmethod
    def _host_and_port(cls, text: str) -> str:
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"HOST:PORT, such as fl.example.org:9092, got {text!r}")
        return text

    @model_validator(mode="after")
    def _sane(self) -> Self:
        part, parts = self.share
        if not 0 <= part < parts:
            raise ValueError(f"share: [i, n] with 0 <= i < n, got {list(self.share)}")
        if self.limits.rank is not None and self.rank > self.limits.rank:
            raise ValueError(f"rank: {self.rank} is above limits.rank, {self.limits.rank}")
        for where, given in (("settings", self.settings), *((f"tasks, {t.name}", t.settings) for t in self.tasks)):
            if foreign := sorted(given.keys() - set(OWN)):
                raise ValueError(f"{where}: {'; '.join(map(_foreign, foreign))}. A node may set {', '.join(OWN)}")
        if len({t.name for t in self.tasks}) < len(self.tasks):
            raise ValueError("tasks: the same name twice")
        return self

    @property
    def meeting(self) -> Path:
        """The socket at which relay and worker meet."""
        return self.socket or self.state / "worker" / "socket"


def read_deploy(path: Path) -> DeployFile:
    """`deploy.toml` with absolute paths. Raises: ConfigError with every mistake, one a line."""
    file = _read(path, DeployFile)
    here = path.resolve().parent
    return file.model_copy(update={n: here / getattr(file, n) for n in ("settings", "folder", "keys", "state")})


def read_node(path: Path) -> NodeFile:
    """`node.toml` with absolute paths; also data and base, where they are given as ./ or ../ paths.

    Raises: ConfigError with every mistake, one a line.
    """
    file = _read(path, NodeFile)
    here = path.resolve().parent
    moved = {n: here / getattr(file, n) for n in ("keys", "memory", "state")}
    moved |= {n: here / path for n in ("socket", "peers") if (path := getattr(file, n)) is not None}
    tasks = tuple(t.model_copy(update={"settings": _placed(t.settings, here)}) for t in file.tasks)
    node = file.model_copy(update={**moved, "settings": _placed(file.settings, here), "tasks": tasks})
    if len(str(node.meeting).encode()) > LONGEST_SOCKET:
        raise ConfigError(f"{path}: {node.meeting} is too long for a Unix socket; choose a shorter state or socket")
    return node


def _placed(settings: dict[str, Scalar], here: Path) -> dict[str, Scalar]:
    """Relative paths of data and base, from the file's folder. A word without ./ may be an id at a hub."""
    return {
        key: str((here / value).resolve())
        if key in ("data.name", "model.name") and isinstance(value, str) and value.startswith(("./", "../"))
        else value
        for key, value in settings.items()
    }


def _read(path: Path, kind: type[_AnyFile]) -> _AnyFile:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        keys = [leaf.key for leaf in settings_of(kind)]
        keys += sorted({key.split(".")[0] for key in keys})
        lines = []
        for one in error.errors():
            key = ".".join(map(str, one["loc"])) or "file"
            misspelt = one["type"] == "extra_forbidden"
            lines.append(f"  {unknown(key, keys)}" if misspelt else f"  {key}: {one['msg']}")
        raise ConfigError(f"{path}:\n" + "\n".join(lines)) from None


def _foreign(key: str) -> str:
    """Why a node may not set this."""
    return f"{key}: the run sets this" if key in flat(RunConfig()) else unknown(key, OWN)


def _flat(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict) and f"{above}{name}" not in OWN:
            found |= _flat(value, f"{above}{name}.")
        elif isinstance(value, dict):  # a table such as data.columns
            found[f"{above}{name}"] = ",".join(f"{k}={v}" for k, v in value.items())
        elif isinstance(value, list):
            found[f"{above}{name}"] = ",".join(map(str, value))
        else:
            found[f"{above}{name}"] = value
    return found
