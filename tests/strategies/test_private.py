"""Whole clients private, noised by the server: the plain method but for clip and noise, and what one can move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from fedlora.adapter import Array
from fedlora.config import MethodConfig, load_config
from fedlora.config_secure import LINEAR, NESTED
from fedlora.errors import MethodError
from fedlora.privacy.clients import ClientPrivacy
from fedlora.rng import stream
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_arrays
from strategies import private
from strategies.base import Closed, Cohort, Member, Method, get
from strategies.configured import configured
from strategies.private import clip_now, private_clients

LAYOUT = Layout(
    modules={"q": Module(out=6, inp=8), "v": Module(out=5, inp=7)}, head={"score.weight": (3, 6), "score.bias": (3,)}
)
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
SILENT = 1e-12  # noise multiplier of next to nothing
Edit = Callable[[str, dict[str, Array]], Mapping[str, Array]]


def terms_of(**fields: Any) -> ClientPrivacy:
    usual = {"clip": 1e3, "noise_multiplier": SILENT, "sampling": 1.0, "counted": 1.0, "population": 6}
    return ClientPrivacy(**usual | fields)


def members_of(name: str, count: int = 6, scale: float = 2.0) -> tuple[Member, ...]:
    return tuple(
        Member(id=f"client-{i}", rank=(4, 4, 4, 2, 2, 1)[i % 6] if name in NESTED else 4, scale=scale)
        for i in range(count)
    )


def opened(name: str, members: tuple[Member, ...]) -> GlobalState:
    settings = MethodConfig.model_validate({"name": name, "basis": "random" if name == "fed-sb" else ""})
    return get(name).open("ab" * 32, LAYOUT, members, settings, 7)


def played(
    method: Method,
    state: GlobalState,
    members: tuple[Member, ...],
    *,
    enrolled: tuple[Member, ...] | None = None,
    silent: tuple[str, ...] = (),
    edit: Edit | None = None,
    examples: int = 10,
) -> Closed:
    """One round; clients answer with noise that their plan's seed decides, and `edit` changes it."""
    protocol = method.protocol(
        state,
        Cohort(
            round=1,
            rounds=3,
            members=members,
            settings=MethodConfig(),
            training=TRAINING,
            seed=5,
            progress=(0.0, 1.0),
            enrolled=members if enrolled is None else enrolled,
        ),
    )

    def said(client: str, ask: Ask) -> Answer:
        assert ask.plan is not None
        noise = stream(ask.plan.seed, "fake", client)
        shapes = expected_arrays(ask, LAYOUT)
        arrays: dict[str, Array] = {k: noise.normal(size=s).astype(np.float32) for k, s in sorted(shapes.items())}
        return Answer(examples=examples, arrays=arrays if edit is None else edit(client, arrays))

    answers: dict[str, Answer] | None = None
    while True:
        try:
            asks = next(protocol) if answers is None else protocol.send(answers)
        except StopIteration as end:
            closed: Closed = end.value
            return closed
        assert asks.keys() == {m.id for m in members}  # nobody else is asked
        answers = {c: said(c, ask) for c, ask in sorted(asks.items()) if c not in silent}


def released(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """The one answer that the method gets in a round, as float64."""
    found: list[Answer] = []
    inner = private.closed_with

    def caught(method: str, protocol: Any, largest: str, answer: Answer) -> Closed:
        found.append(answer)
        return inner(method, protocol, largest, answer)

    with monkeypatch.context() as patched:
        patched.setattr(private, "closed_with", caught)
        played(*args, **kwargs)
    [answer] = found
    return {k: np.asarray(x, np.float64) for k, x in answer.arrays.items()}


def distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return math.sqrt(sum(float(np.sum((a[k] - b[k]) ** 2)) for k in a))


def dense(state: GlobalState) -> dict[str, np.ndarray]:
    found = {n: f.scale * f.b.astype(np.float64) @ f.a.astype(np.float64) for n, f in state.update().items()}
    return found | {n: x.astype(np.float64) for n, x in state.open_task.extras.items()}


@pytest.mark.parametrize("name", LINEAR)
def test_without_clip_and_noise_it_is_the_plain_method(name: str) -> None:
    members = members_of(name)
    state = opened(name, members)
    for _ in range(2):  # rolora trains both of its factors
        want, got = (played(m, state, members) for m in (get(name), private_clients(get(name), terms_of())))
        assert got.state.version == want.state.version
        for key, x in dense(want.state).items():
            np.testing.assert_allclose(dense(got.state)[key], x, rtol=0, atol=2e-6)
        state = want.state


def test_scales_that_differ_are_folded_in() -> None:
    members = tuple(replace(m, scale=0.5 + i % 2) for i, m in enumerate(members_of("fedit")))
    state = opened("fedit", members)
    got = played(private_clients(get("fedit"), terms_of()), state, members)
    for key, x in dense(played(get("fedit"), state, members).state).items():
        np.testing.assert_allclose(dense(got.state)[key], x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_one_client_moves_the_release_by_the_clip_over_the_plan_at_most(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All as one vector, heads included. `n` is one client more or less; replacing its update by another is two."""
    members, clip, q = members_of(name), 3.0, 0.5
    state = opened(name, members)
    method = private_clients(get(name), terms_of(clip=clip, sampling=q))
    bound = clip / (q * 6) * (1 + 1e-6)

    def larger(factor: float, where: str = "") -> Edit:
        return lambda c, x: {k: v * np.float32(factor if c == "client-1" and where in k else 1.0) for k, v in x.items()}

    everybody = released(monkeypatch, method, state, members)
    without = released(monkeypatch, method, state, members, silent=("client-1",))
    assert distance(everybody, without) <= bound
    for factor in (1e6, -1e6, 1e-6, 0.0):
        for where in ("", "head:score.bias"):
            other = released(monkeypatch, method, state, members, edit=larger(factor, where))
            assert distance(other, without) <= bound
            assert distance(other, everybody) <= 2 * bound
    far = released(monkeypatch, method, state, members, edit=larger(1e6))
    assert distance(far, without) == pytest.approx(bound, rel=1e-5)  # the bound is reached
    heads = released(monkeypatch, method, state, members, edit=larger(1e6, "head:"))
    part = {k: x - without[k] for k, x in heads.items() if not k.startswith("head:")}
    assert math.sqrt(sum(float(np.sum(x**2)) for x in part.values())) < 1e-4  # a head of 1e6 leaves factors no room


def test_factors_of_the_same_product_are_bounded_as_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """(t B)(A / t) is one product for every t, so a clip of products lets any t through."""
    members = members_of("fedit")
    state = opened("fedit", members)
    method = private_clients(get("fedit"), terms_of(clip=1.0))

    def skewed(t: float) -> Edit:
        def edit(client: str, x: dict[str, Array]) -> Mapping[str, Array]:
            if client != "client-1":
                return x
            return {k: v * np.float32({"B": t, "A": 1.0 / t}.get(k[0], 1.0)) for k, v in x.items()}

        return edit

    without = released(monkeypatch, method, state, members, silent=("client-1",))
    for t in (1.0, 1e3, 1e6, 1e-6):
        got = released(monkeypatch, method, state, members, edit=skewed(t))
        assert distance(got, without) <= (1.0 / 6) * (1 + 1e-6)


def test_rows_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of("ffa-lora")
    state = opened("ffa-lora", members)
    method = private_clients(get("ffa-lora"), terms_of(clip=1.0))
    few, many = (released(monkeypatch, method, state, members, examples=n) for n in (1, 10**6))
    assert distance(few, many) < 1e-7


def test_what_is_divided_by_is_planned_whoever_was_drawn_and_whoever_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of("ffa-lora")
    state = opened("ffa-lora", members)
    method = private_clients(get("ffa-lora"), terms_of(sampling=0.5, population=100))
    alone = [released(monkeypatch, method, state, (m,), enrolled=members) for m in members]
    drawn = released(monkeypatch, method, state, members[:4], enrolled=members)
    answered = released(monkeypatch, method, state, members, silent=("client-4", "client-5"))
    want = {k: sum(x[k] for x in alone[:4]) for k in drawn}
    assert distance(drawn, want) < 1e-6
    assert distance(answered, want) < 1e-6


@pytest.mark.parametrize("name", LINEAR)
def test_where_nobody_was_drawn_noise_alone_is_released(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square: the variance is that of the noise; it fails wrongly once in 10^9 runs."""
    members = members_of(name)
    state = opened(name, members)
    terms = terms_of(clip=2.0, noise_multiplier=1.5, sampling=0.25, population=8)
    method = private_clients(get(name), terms)
    some = released(monkeypatch, method, state, members)
    none = [released(monkeypatch, method, state, (), enrolled=members) for _ in range(3)]
    mute = released(monkeypatch, method, state, members, silent=tuple(m.id for m in members))
    for got in (*none, mute):
        assert {k: x.shape for k, x in got.items()} == {k: x.shape for k, x in some.items()}
        x = np.concatenate([v.ravel() for v in got.values()])
        low, high = chi2.ppf([5e-10, 1 - 5e-10], len(x))
        assert low < float(x @ x) / (1.5 * 2.0 / 2.0) ** 2 < high
    assert all(np.all(none[0][k] != none[1][k]) for k in some)
    closed = played(method, state, (), enrolled=members)
    assert closed.state.version == state.version + 1
    assert closed.clients == {}


def test_the_same_round_of_the_same_seed_has_other_noise_and_tells_nothing_of_single_clients() -> None:
    members = members_of("ffa-lora")
    state = opened("ffa-lora", members)
    method = private_clients(get("ffa-lora"), terms_of(clip=1.0, noise_multiplier=1.0))
    one, other = (played(method, state, members) for _ in range(2))
    for key, x in dense(one.state).items():
        assert not np.array_equal(x, dense(other.state)[key])
    assert one.clients == {}
    assert one.report.keys() == {"update_norm", "rank", "clip"}
    fedit = private_clients(get("fedit"), terms_of())
    told = played(fedit, opened("fedit", members_of("fedit")), members_of("fedit")).report
    assert "aggregation_error" not in told


def test_the_clip_moves_to_the_quantile_and_counts_every_client() -> None:
    members = members_of("ffa-lora")
    state = opened("ffa-lora", members)
    for clip, indicators in ((1e3, 3.0), (1e-3, -3.0)):
        terms = terms_of(clip=clip, quantile=0.5)  # count noise: a twentieth of six clients
        method = private_clients(get("ffa-lora"), terms)
        moves = []
        for _ in range(20):
            closed = played(method, state, members)
            assert closed.report["clip"] == clip
            moves.append(math.log(clip_now(terms, closed.state).clip / clip))
        # the mean of twenty: N(0, (0.2 * 0.3 / 6)^2 / 20); ten deviations
        assert np.mean(moves) == pytest.approx(-0.2 * indicators / 6, abs=10 * 0.01 / math.sqrt(20))
        assert np.std(moves) > 0.0
    nobody = played(private_clients(get("ffa-lora"), terms_of(quantile=0.5)), state, (), enrolled=members)
    assert math.log(clip_now(terms_of(quantile=0.5), nobody.state).clip / 1e3) == pytest.approx(0.0, abs=0.1)


def test_the_next_round_clips_to_the_clip_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of("ffa-lora")
    state = opened("ffa-lora", members)
    method = private_clients(get("ffa-lora"), terms_of(clip=1.0, quantile=0.9))
    first = played(method, state, members).state
    now = clip_now(terms_of(clip=1.0, quantile=0.9), first).clip
    assert now != 1.0
    one = released(monkeypatch, method, first, members[:1], enrolled=members)
    assert distance(one, {k: 0.0 * x for k, x in one.items()}) == pytest.approx(now / 6, rel=1e-5)


def test_the_settings_wrap_the_method_under_server_optimisers_and_codecs() -> None:
    sets = ("method.name=ffa-lora", "privacy.level=client", "privacy.noise_multiplier=1", "server.optimizer=adam")
    members = members_of("ffa-lora")
    method = configured(load_config(None, [*sets, "wire.down=bfloat16"]), terms_of(clip=1.0, noise_multiplier=1.0))
    closed = played(method, opened("ffa-lora", members), members)
    assert closed.report["server_step_norm"] > 0.0
    assert closed.report["clip"] == 1.0


def test_what_is_no_weighted_sum_is_refused() -> None:
    with pytest.raises(MethodError, match="flora: whole clients are private in sums"):
        private_clients(get("flora"), terms_of())
    mixed = members_of("ffa-lora")
    with pytest.raises(MethodError, match="another mean than that of its answers"):
        played(private_clients(get("fedit"), terms_of()), opened("fedit", mixed), mixed)
    stacked = get("fed-sb").open("ab" * 32, LAYOUT, mixed, MethodConfig(name="fed-sb"), 7)
    with pytest.raises(MethodError, match="factors on bases of their own"):
        played(private_clients(get("fed-sb"), terms_of()), stacked, mixed)
