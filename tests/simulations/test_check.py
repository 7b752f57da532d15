"""What no run could do is refused before there is a folder."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedlora.config import load_config
from fedlora.errors import ConfigError, FedLoRAError, MethodError
from simulations.simulate import check

SKILLS = ("badge_line", "invoice_total")


def tasks(**first: Any) -> str:
    own = [{"name": name, "data.skills": [skill]} for name, skill in zip("ab", SKILLS, strict=True)]
    return f"tasks={json.dumps([{**own[0], **first}, own[1]])}"


@pytest.mark.parametrize(
    ("sets", "error", "said"),
    [
        ([tasks(clients=[7])], MethodError, "task a: none of the 2 enrolled clients has it; mend `clients`"),
        ([tasks(), "continual.task_dim=120"], MethodError, r"the tasks need 240 dimensions \(a 120, b 120\)"),
        ([tasks(rank=4096)], ConfigError, "tasks, a: rank 4096; the smallest adapted layer allows 1 to"),
    ],
)
def test_tasks_that_cannot_be_trained(sets: list[str], error: type[FedLoRAError], said: str) -> None:
    with pytest.raises(error, match=said):
        check(load_config(None, ["rounds.clients=2", *sets]))


def test_rows_are_looked_at_where_a_client_has_the_task() -> None:
    check(load_config(None, ["rounds.clients=2", "evaluation.server=false", tasks(clients=[1])]))
