"""The benchmarks of the gallery say what is so: their stand-in is that of the laws, and broken methods show."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedlora.config import MethodConfig
from fedlora.errors import MethodError, WireError
from fedlora.state import Answer, Ask, Block, GlobalState
from server.holdings import Holdings
from simulations.benchmarks import gallery, published, residual, stream
from simulations.benchmarks.oracles import OWN, moves, off
from simulations.benchmarks.stand_in import cohort_of, federation, follow, opened, turn
from strategies.base import METHODS, Cohort, Method, Round, get
from strategies.fedex_lora import METHOD as FEDEX
from strategies.flexlora import METHOD as FLEXLORA

CASES = gallery.every_case()
FLORA = MethodConfig(name="flora")
every = pytest.mark.parametrize("case", CASES, ids=gallery.label)


@pytest.fixture(scope="module")
def laws() -> ModuleType:
    where = Path(__file__).parents[1] / "laws" / "test_every_method.py"
    spec = importlib.util.spec_from_file_location("the_laws", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # its dataclasses look their module up
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["flora", "fed-sb", "rolora", "ffa-lora"])
def test_the_stand_in_is_that_of_the_laws(name: str, laws: ModuleType) -> None:
    case = MethodConfig.model_validate({"name": name})
    fed = federation(3, fewest=3)
    state = gallery.after(case, fed, 2)
    for ask in next(get(name).protocol(state, cohort_of(case, fed.members, 3))).values():
        for seed in (None, 5):
            ours, theirs = follow(ask, fed.layout, 9, 0.1, seed), laws.follow(ask, fed.layout, 9, 0.1, seed)
            assert {k: x.tobytes() for k, x in ours.answer.arrays.items()} == {
                k: x.tobytes() for k, x in theirs.answer.arrays.items()
            }
            assert ours.answer.examples == theirs.answer.examples == 9
            assert off(ours.model(ours.start), theirs.before) < 1e-7
            assert off(ours.model(ours.trained), theirs.after) < 1e-7


def test_every_method_and_variant_has_a_row() -> None:
    labels = [gallery.label(c) for c in CASES]
    assert labels == sorted(labels)
    assert set(labels) == METHODS.keys() | {"flora warm", "fed-sb random"}
    assert {"fedit", "fedex-lora", "fedsa-lora", "fedsvd", "flexlora", "frlora", "hetlora", "rolora"} <= METHODS.keys()
    assert OWN.keys() <= METHODS.keys()


@every
def test_every_row_is_small(case: MethodConfig) -> None:
    *errors, bias = gallery.row(case, [2], [1])
    assert len(errors) + 1 == len(gallery.COLUMNS)
    assert errors[0] == 0.0
    assert max(errors) < 1e-6
    if METHODS[case.name].personal:
        assert math.isnan(bias)
    else:
        assert (bias > 1e-4) == (case.name in OWN)


def sabotaged(change: Callable[[Mapping[str, Answer], Cohort], Mapping[str, Answer]], name: str = "flora") -> Method:
    """A method whose server gets other answers than were given."""
    good = METHODS[name]

    def protocol(state: GlobalState, cohort: Cohort) -> Round:
        inner = good.protocol(state, cohort)
        answers = yield next(inner)
        try:
            inner.send(change(answers, cohort))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        raise AssertionError

    return replace(good, protocol=protocol)


def last_counts_double(answers: Mapping[str, Answer], _: Cohort) -> Mapping[str, Answer]:
    last = list(answers)[-1]
    return {**answers, last: replace(answers[last], examples=2 * answers[last].examples)}


def uniform(answers: Mapping[str, Answer], _: Cohort) -> Mapping[str, Answer]:
    return {c: replace(a, examples=1) for c, a in answers.items()}


def absent_count_as_zero(answers: Mapping[str, Answer], cohort: Cohort) -> Mapping[str, Answer]:
    one = next(iter(answers.values()))
    zero = replace(one, arrays={k: np.zeros_like(x) for k, x in one.arrays.items()})
    rest = [m for m in cohort.members if m.id not in answers and m.rank == zero_rank(zero)]
    return {**answers, **{m.id: zero for m in rest}}


def zero_rank(answer: Answer) -> int:
    return next(int(x.shape[0]) for k, x in answer.arrays.items() if k.startswith("A:"))


def halved(answers: Mapping[str, Answer], _: Cohort) -> Mapping[str, Answer]:
    return {
        c: replace(a, arrays={k: x / 2 if k.startswith("B:") else x for k, x in a.arrays.items()})
        for c, a in answers.items()
    }


@pytest.mark.parametrize(
    ("change", "red"),
    [
        (last_counts_double, {"order", "oracle", "partial"}),
        (uniform, {"oracle", "partial"}),
        (absent_count_as_zero, {"partial"}),
        (halved, {"fixed point", "oracle", "partial"}),
    ],
)
def test_a_wrong_server_is_red_where_it_should_be(
    change: Callable[[Mapping[str, Answer], Cohort], Mapping[str, Answer]],
    red: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "flora", sabotaged(change))
    found = {
        c for c, x in zip(gallery.COLUMNS, gallery.row(FLORA, [1, 2], [1]), strict=True) if x > 1e-3 and c != "bias"
    }
    assert found == red


@pytest.mark.parametrize("name", ["fedit", "flexlora", "lora-fair", "hetlora", "frlora", "fedsa-lora"])
def test_a_formula_that_is_not_the_methods_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving what clients send must not fit a published formula by accident."""
    case = MethodConfig.model_validate({"name": name})

    def smaller(answers: Mapping[str, Answer], _: Cohort) -> Mapping[str, Answer]:
        return {
            c: replace(a, arrays={k: x / 2 if k[:2] == ("A:" if name == "fedsa-lora" else "B:") else x
                                  for k, x in a.arrays.items()})
            for c, a in answers.items()
        }  # fmt: skip

    monkeypatch.setitem(METHODS, name, sabotaged(smaller, name))
    assert gallery.oracle(case, 1)[0] > 1e-3
    assert gallery.oracle(case, 1, some=True)[0] > 1e-3


def test_a_stale_client_that_misses_a_block_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Holdings.offer

    def forgetful(self: Holdings, client: str, blocks: tuple[Block, ...], version: int) -> object:
        return good(self, client, blocks[1:] if client == "late" else blocks, version)

    monkeypatch.setattr(Holdings, "offer", forgetful)
    assert gallery.stale(FLORA, 0) > 1e-3
    assert gallery.stale(MethodConfig(name="fedit"), 0) < 1e-6  # it has no blocks


def test_nobody_prunes_in_the_stale_column(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []

    def noted(state: GlobalState, settings: MethodConfig, *arguments: Any, **more: Any) -> Any:
        seen.append(settings.prune)
        return turn(state, settings, *arguments, **more)

    monkeypatch.setattr(gallery, "turn", noted)
    gallery.stale(MethodConfig(name="hetlora"), 2)
    assert seen == [1.0] * (gallery.LATE_ROUNDS + 1)


def test_blocks_that_do_not_fit_are_refused() -> None:
    fed = federation(0, fewest=2)
    state = gallery.after(FLORA, fed, 3)
    [ask] = [a for c, a in next(get("flora").protocol(state, cohort_of(FLORA, fed.members, 4))).items() if c == "c0"]
    post = gallery.Post()
    assert len(post.deliver(state, "c0", ask).blocks) >= 1
    post._held["c0"] = ("something else", ())
    with pytest.raises(WireError, match="c0 was sent blocks on top of"):
        post.deliver(state, "c0", ask)


def test_who_was_there_is_sent_the_last_block_only() -> None:
    """The stale column is not satisfied by sending everything to everybody."""
    fed, post = federation(1, fewest=2), gallery.Post()
    seen: list[tuple[str, bool, int]] = []
    state = opened(FLORA, fed)

    def through(client: str, ask: Ask) -> Ask:
        offer = post._holdings.offer(client, ask.blocks, before.version)
        seen.append((client, offer.on is not None, len(offer.blocks)))
        return post.deliver(before, client, ask)

    for t in range(1, 5):
        before = state
        state, _ = turn(state, FLORA, fed, t, through=through)
    assert [x for x in seen if x[1] and x[2] == 1]


def test_numbers_are_shown_in_short() -> None:
    assert [gallery.shown(x) for x in (0.0, math.nan, 3.21e-8, 0.0123, 1.234)] == ["0", "-", "3e-08", "0.012", "1.2"]


def test_the_table_is_markdown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gallery", "--federations", "1", "--stale", "1"])
    monkeypatch.setattr(gallery, "every_case", lambda: [FLORA, MethodConfig(name="fedit")])
    gallery.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "`flora`" in rows[2]
    assert "*" not in rows[2]
    assert rows[3].count("*") == 2


def test_federations_are_seeded_and_differ() -> None:
    assert federation(4) == federation(4)
    assert len({federation(i).members for i in range(20)}) == 20
    alike = federation(4, alike=True)
    assert len({(m.rank, m.scale) for m in alike.members}) == 1
    assert min(len(federation(i, fewest=3).members) for i in range(30)) == 3


def test_a_stand_in_without_a_plan_is_refused() -> None:
    with pytest.raises(MethodError, match="without a plan"):
        follow(Ask(), federation(0).layout, 1, 0.1)


def test_the_exact_mean_is_that_of_the_moves() -> None:
    fed = federation(2, fewest=2)
    state, took = turn(opened(FLORA, fed), FLORA, fed, 1)
    group = [took[c] for c in sorted(took)]
    zero = {n: 0.0 * x for n, x in gallery.learnt(state, FLORA).items()}
    whole = sum(t.examples for t in group)
    by_hand = {
        n: sum((t.examples / whole * (t.model(t.trained)[n] - t.model(t.start)[n]) for t in group), x)
        for n, x in zero.items()
    }
    assert off(moves(zero, group, 5), by_hand) < 1e-12


def small(equal: bool, shape: tuple[int, int] = (24, 24)) -> published.Inputs:
    return published.inputs(shape, [4] * 5, [2.0] if equal else published.SCALES, equal=equal)


def test_the_published_residual_is_right_only_untransposed_with_equal_clients() -> None:
    for equal in (True, False):
        x = small(equal)
        good, wrong = (published.published_fedex(x, transposed=t) for t in (False, True))
        assert good is not None
        assert wrong is not None
        assert (published.off(good, published.dense_mean(x)) < 1e-5) == equal
        assert published.off(wrong, published.dense_mean(x)) > 0.3
    assert published.published_fedex(small(True, (24, 12)), transposed=True) is None


@pytest.mark.parametrize("moved", [1.0, 0.01])
def test_our_residual_is_the_dense_one(moved: float) -> None:
    x = published.inputs((30, 22), [4] * 5, published.SCALES, moved=moved)
    closed, _, seconds, _ = residual.play_round(FEDEX, x)
    block = closed.state.open_task.blocks[0].adapter["w"]
    assert published.off(block.dense(), published.dense_residual(x)) < 1e-6
    assert published.off(closed.state.update()["w"].dense(), published.dense_mean(x)) < 1e-6
    assert seconds > 0


def test_only_alpha_up_and_down_gives_what_clients_should_see() -> None:
    ranks = [8, 4, 2, 8, 4]
    scales = [16 / r**0.5 for r in ranks]
    x = published.inputs((30, 22), ranks, scales)
    want = np.stack(published.cut(published.dense_mean(x), ranks))
    one, coded = [1.0] * 5, [16 / r for r in ranks]
    assert published.off(np.stack(residual.products_sent(x)), want) < 1e-6
    assert published.off(np.stack(published.published_flexlora(x, scales, scales)), want) < 1e-5
    for up, down in ((one, one), (scales, one), (coded, coded)):
        assert published.off(np.stack(published.published_flexlora(x, up, down)), want) > 0.1
    assert FLEXLORA.name == "flexlora"


def test_the_stream_is_the_weighted_mean_within_its_bound() -> None:
    size = stream.Size(modules=2, side=96, rank=4, limit=8)
    found = stream.run("products", size, 12)
    assert found.first is not None
    weight, total = 0, np.zeros((96, 96))
    for examples, arrays in stream.answers(size, 12, stream.signals(size, 1)):
        total += examples * stream.SCALE * arrays["B:00"].astype(np.float64) @ arrays["A:00"].astype(np.float64)
        weight += examples
    exact = total / weight
    off_first = float(np.linalg.norm(exact - found.first.dense()) / np.linalg.norm(exact))
    left = np.linalg.svd(exact, compute_uv=False)
    best = float(np.sqrt(np.sum(left[8:] ** 2) / np.sum(left**2)))
    error, least, _ = stream.errors(size, 12, found.first)
    assert error == pytest.approx(off_first, rel=1e-4)
    assert least == pytest.approx(best, rel=1e-3)
    assert best <= off_first <= found.bound * 1.5
    assert found.first.rank == 8
    assert stream.run("means", size, 3).first is None


def test_clients_of_the_stream_share_a_product_and_no_basis() -> None:
    size = stream.Size(modules=1, side=1000, rank=16)
    (_, one), (_, two) = stream.answers(size, 2, stream.signals(size, 1))
    products = [x["B:00"] @ x["A:00"] for x in (one, two)]
    factors = [x["A:00"] for x in (one, two)]
    cosines = [float(np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))) for x, y in (products, factors)]
    assert cosines[0] == pytest.approx(0.25, abs=0.05)  # half of each factor's energy is common
    assert abs(cosines[1]) < 0.2


def test_a_client_of_the_stream_is_the_same_in_any_number_of_modules() -> None:
    size = stream.Size(modules=3, side=32, rank=4)
    _, whole = next(stream.answers(size, 1, stream.signals(size, 3)))
    _, first = next(stream.answers(size, 1, stream.signals(size, 1)))
    assert first["A:00"].tobytes() == whole["A:00"].tobytes()
    assert sum(x.nbytes for x in whole.values()) == size.nbytes("products") == 2 * size.nbytes("means")
    default = stream.Size()
    assert default.nbytes("products") == 33_554_432
