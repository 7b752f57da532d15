"""FFA-LoRA: what travels, what stays, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_normal
from fedlora.state import Answer, GlobalState, Layout, LocalTraining, Module, expected_shapes, part
from strategies.base import Closed, Cohort, Member
from strategies.fedit import METHOD as FEDIT
from strategies.ffa_lora import METHOD
from strategies.flora import METHOD as FLORA

SETTINGS = MethodConfig(name="ffa-lora")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=5), "v": Module(out=4, inp=6)}, head={"score.weight": (2, 4)})
WHO = (Member(id="big", rank=4, scale=2.0), Member(id="small", rank=1, scale=8.0))


def cohort(*who: Member) -> Cohort:
    return Cohort(round=1, rounds=1, members=who, settings=SETTINGS, training=TRAINING, seed=0, progress=(0.0, 1.0))


def one_round(state: GlobalState, *who: Member) -> Closed:
    protocol = METHOD.protocol(state, cohort(*who))
    answers = {}
    for client, ask in next(protocol).items():
        assert ask.plan is not None
        shapes = expected_shapes(ask.plan, LAYOUT)
        assert not part({k: np.zeros(0) for k in shapes}, "A")
        answers[client] = Answer(examples=3, arrays={k: np.full(s, 0.5, np.float32) for k, s in shapes.items()})
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    closed: Closed = done.value.value
    return closed


def test_a_never_travels_but_its_checksum_does() -> None:
    state = METHOD.open("base", LAYOUT, WHO, SETTINGS, 11)
    pair = state.open_task.pair
    assert pair is not None
    for ask in next(METHOD.protocol(state, cohort(*WHO))).values():
        assert {key.split(":")[0] for key in ask.arrays} == {"B", "probe", "head"}
        assert ask.frozen is None
        assert ask.blocks == ()
        assert ask.plan is not None
        assert (ask.plan.a_from, ask.plan.b_from, ask.plan.a_seed) == ("public", "given", 11)
        assert (ask.plan.send, ask.plan.changes) == (("B", "head"), ("B", "head"))
        for name, probe in part(ask.arrays, "probe").items():
            want = pair[name].a.astype(np.float64) @ public_normal(11, "probe", name, shape=(pair[name].a.shape[1],))
            assert probe.dtype == np.float32
            np.testing.assert_allclose(probe, want, rtol=1e-6)


def test_a_is_orthonormal_and_the_same_bytes_for_ever() -> None:
    state = METHOD.open("base", LAYOUT, WHO, SETTINGS, 11)
    first = state.open_task.pair
    assert first is not None
    for f in first.values():
        np.testing.assert_allclose(f.a @ f.a.T, np.eye(4), atol=1e-6)
    for _ in range(3):
        state = one_round(state, *WHO).state
    assert state.open_task.pair is not None
    assert all(f.a.tobytes() == first[n].a.tobytes() for n, f in state.open_task.pair.items())
    assert state.open_task.public_seed == 11


def test_columns_nobody_trained_keep_their_bytes_and_shared_ones_are_diluted() -> None:
    state = one_round(METHOD.open("base", LAYOUT, WHO, SETTINGS, 0), *WHO).state
    pair = state.open_task.pair
    assert pair is not None
    for f in pair.values():
        np.testing.assert_array_equal(f.b, np.tile([0.5, 0.25, 0.25, 0.25], (f.b.shape[0], 1)))
    after = one_round(state, WHO[1]).state.open_task.pair
    assert after is not None
    for n, f in after.items():
        assert f.b[:, 1:].tobytes() == pair[n].b[:, 1:].tobytes()
        assert (f.b[:, 0] == 1.0).all()


def test_the_scale_is_the_largest_clients() -> None:
    state = METHOD.open("base", LAYOUT, WHO, SETTINGS, 0)
    asks = next(METHOD.protocol(state, cohort(*WHO)))
    assert {a.plan.scale for a in asks.values() if a.plan} == {2.0}
    assert {f.scale for f in state.update().values()} == {1.0}


def test_embeddings_are_refused_by_name() -> None:
    layout = Layout(modules={"q": Module(out=7, inp=5), "tok": Module(out=4, inp=60, kind="embedding")})
    with pytest.raises(MethodError, match="ffa-lora: tok is an embedding, where A is the factor that starts at zero"):
        METHOD.open("base", layout, WHO, SETTINGS, 0)


@pytest.mark.parametrize("settings", [SETTINGS.model_copy(update={"task_rank": 6}), SETTINGS])
def test_a_rank_above_the_inputs_is_refused_by_name(settings: MethodConfig) -> None:
    who = (Member(id="a", rank=6, scale=1.0),)
    with pytest.raises(MethodError, match="rank 6 is above the 5 inputs of q"):
        METHOD.open("base", LAYOUT, who, settings, 0)


def test_a_state_of_another_method_is_refused() -> None:
    flora = FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0)
    with pytest.raises(MethodError, match="ffa-lora: this state keeps no pair"):
        next(METHOD.protocol(flora, cohort(*WHO)))
    fedit = FEDIT.open("base", LAYOUT, WHO, MethodConfig(name="fedit"), 0)
    with pytest.raises(MethodError, match="ffa-lora: this state has no public seed"):
        next(METHOD.protocol(fedit, cohort(*WHO)))
