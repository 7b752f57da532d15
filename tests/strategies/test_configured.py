"""What settings wrap around a method: settings refuse what the wrappers refuse, and what is rounded is published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest

from fedlora.codec import lossless
from fedlora.config import METHOD_NAMES, RobustConfig, RunConfig, ServerConfig, load_config
from fedlora.errors import ConfigError
from fedlora.rng import stream
from fedlora.state import Answer, Ask, Codec, GlobalState, Layout, LocalTraining, Module, expected_shapes
from strategies import robust, server_optimizer
from strategies.base import Cohort, Member, play
from strategies.configured import PUBLISHED, configured

RULES = get_args(RobustConfig.model_fields["rule"].annotation)
OPTIMIZERS = get_args(ServerConfig.model_fields["optimizer"].annotation)
LAYOUT = Layout(
    modules={"q": Module(out=9, inp=8), "v": Module(out=12, inp=8)}, head={"score.weight": (3, 8), "score.bias": (3,)}
)
WHO = tuple(Member(id=f"client-{i:05d}", rank=r, scale=2.0) for i, r in enumerate((4, 2, 1)))


def accepted(*sets: str) -> RunConfig | None:
    try:
        return load_config(None, sets)
    except ConfigError:
        return None


@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_settings_and_robust_rules_refuse_the_same_pairs(name: str, rule: str) -> None:
    trusted = ["robust.trusted=client-00000"] if rule == "fltrust" else []
    config = accepted(f"method.name={name}", f"robust.rule={rule}", *trusted)
    assert (config is None) == (robust.pair_mistake(name, rule) is not None)
    if config is not None:
        assert configured(config).name == name


@pytest.mark.parametrize("optimizer", [o for o in OPTIMIZERS if o != "none"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_settings_and_server_optimisers_refuse_the_same_pairs(name: str, optimizer: str) -> None:
    config = accepted(f"method.name={name}", f"server.optimizer={optimizer}")
    assert (config is None) == (server_optimizer.pair_mistake(name, optimizer) is not None)
    if config is not None:
        assert configured(config).name == name


def run(config: RunConfig, rounds: int) -> Iterator[tuple[GlobalState, list[Ask]]]:
    """Rounds in which clients move what they are asked to by noise that is exact in the codec."""
    method = configured(config)
    state = method.open("base", LAYOUT, WHO, config.method, 0)
    training = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
    for number in range(1, rounds + 1):
        cohort = Cohort(
            round=number,
            rounds=rounds,
            members=WHO,
            settings=config.method,
            training=training,
            seed=0,
            progress=(0.0, 1.0),
        )
        asks: list[Ask] = []

        def answer(client: str, ask: Ask, number: int = number, asks: list[Ask] = asks) -> Answer:
            assert ask.plan is not None
            asks.append(ask)
            rng = stream(1, "noise", client, number)
            shapes = expected_shapes(ask.plan, LAYOUT)
            return Answer(examples=3, arrays={k: 0.1 * rng.normal(size=s) for k, s in shapes.items()})

        state = play(method.protocol(state, cohort), answer).state
        yield state, asks


def codable(codec: Codec) -> list[str]:
    return [n for n in METHOD_NAMES if accepted(f"method.name={n}", f"wire.down={codec}") is not None]


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", codable("int8"))
def test_what_is_published_travels_without_loss(name: str, codec: Codec) -> None:
    """From the second round on, all that goes down is what the codec can say."""
    config = load_config(None, [f"method.name={name}", f"wire.down={codec}"])
    for number, (state, asks) in enumerate(run(config, 4), 1):
        assert any(np.any(x) for x in state.memory[PUBLISHED].values())
        for ask in asks if number > 1 else []:
            pieces = [x for b in ask.blocks for f in b.adapter.values() for x in (f.a, f.b)]
            pieces += [x for k, x in ask.arrays.items() if x.ndim == 2]
            assert pieces
            assert all(lossless(np.asarray(x, np.float32), codec) for x in pieces)


def test_float32_publishes_the_state_itself() -> None:
    for state, _ in run(load_config(None, ["method.name=flora"]), 2):
        assert PUBLISHED not in state.memory
