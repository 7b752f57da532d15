"""What a client, or a check that both sides make, refuses."""

from __future__ import annotations

from fedlora.errors import FedLoRAError


class Refused(FedLoRAError):
    """A step of a secure sum that would break a promise; `rule` says which. The session is over for who raises it."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail
