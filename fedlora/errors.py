"""Every refusal has a type. A message names who, which rule, what came, and the likely fix."""

from __future__ import annotations


class FedLoRAError(Exception):
    """Base of every error that fedlora raises on purpose."""


class ConfigError(FedLoRAError):
    """Settings that cannot work; carries all mistakes at once, one per line."""


class CodeMismatch(ConfigError):
    """A server and a client that run different versions of fedlora."""


class DataError(FedLoRAError):
    """Rows, files, columns or partitions that cannot be used."""


class AdapterError(FedLoRAError):
    """Factors whose shapes, ranks or module names do not fit together."""


class BaseMismatch(FedLoRAError):
    """A base model (or version of the state) other than the one the run was opened with."""


class WireError(FedLoRAError):
    """A byte string that is not a well-formed Ask, Answer or state."""


class BlocksMissing(FedLoRAError):
    """A client was told to add to blocks that it does not hold; it wants them sent whole."""


class AnswerRejected(FedLoRAError):
    """A client's answer that admission refused; `client` and `rule` say who and why."""

    def __init__(self, client: str, rule: str, detail: str) -> None:
        super().__init__(f"client {client}: {rule}: {detail}")
        self.client = client
        self.rule = rule
        self.detail = detail


class TrainingError(FedLoRAError):
    """Local training that must stop: a non-finite loss, nothing to train on, a plan that cannot be followed."""


class MethodError(FedLoRAError):
    """A method asked to do what its theory does not allow, or to aggregate nothing."""


class RoundFailed(FedLoRAError):
    """A round that did not reach its quorum; the last state is intact."""


class CheckpointError(FedLoRAError):
    """A run folder, checkpoint or manifest that is missing, damaged or belongs to other settings."""
