from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import DataConfig, PartitionConfig
from fedlora.data.partition import deal, partition
from fedlora.data.rows import Row
from fedlora.data.sources import load_rows
from fedlora.errors import ConfigError, DataError


def settings_for(kind: str, **more: object) -> DataConfig:
    return DataConfig(name="x.jsonl", partition=PartitionConfig.model_validate({"kind": kind, **more}))


def make(count: int, labels: int = 4, owners: int = 7) -> list[Row]:
    """Sorted by label, as data files often are."""
    return [
        Row.single(
            "i", f"{i}", "a", label=f"l{i * labels // count}", group=f"g{i * labels // count}", owner=f"o{i % owners}"
        )
        for i in range(count)
    ]


def is_cover(parts: list[np.ndarray], count: int) -> bool:
    return sorted(np.concatenate(parts).tolist()) == list(range(count))


@pytest.mark.parametrize(
    "config",
    [
        settings_for("iid"),
        settings_for("dirichlet", alpha=0.3, minimum_rows=0),
        settings_for("natural", key="owner"),
    ],
    ids=lambda config: config.partition.kind,
)
class TestEveryKind:
    @given(clients=st.integers(2, 7), count=st.integers(30, 90), seed=st.integers(0, 1000))
    @settings(deadline=None, max_examples=20)
    def test_disjoint_cover_decided_by_the_seed(self, config, clients, count, seed):
        rows = make(count)
        parts = partition(rows, config, clients=clients, seed=seed)
        assert len(parts) == clients
        assert is_cover(parts, count)
        again = partition(rows, config, clients=clients, seed=seed)
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))

    def test_no_rows_are_refused(self, config):
        with pytest.raises(DataError, match="all 3 clients would be empty: there are no rows"):
            partition([], config, clients=3, seed=0)

    def test_no_clients_are_refused(self, config):
        with pytest.raises(ConfigError, match="clients must be at least 1, got 0"):
            partition(make(9), config, clients=0, seed=0)


def entropy(parts: list[np.ndarray], rows: list[Row]) -> float:
    """Mean entropy of the clients' labels, in nats."""
    total = 0.0
    for part in parts:
        share = np.array(list(Counter(rows[i].label for i in part).values())) / max(len(part), 1)
        total -= float((share * np.log(share)).sum())
    return total / len(parts)


def test_iid_is_even_and_mixes_sorted_rows():
    rows = make(400)
    parts = partition(rows, settings_for("iid"), clients=8, seed=0)
    assert {len(part) for part in parts} == {50}
    assert entropy(parts, rows) > 0.95 * np.log(4)
    other = partition(rows, settings_for("iid"), clients=8, seed=1)
    assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_dirichlet_is_uneven_when_alpha_is_small_and_even_when_it_is_large():
    rows = make(800)
    uneven = [
        partition(rows, settings_for("dirichlet", alpha=0.1, minimum_rows=0), clients=8, seed=s) for s in range(5)
    ]
    even = [partition(rows, settings_for("dirichlet", alpha=1000.0), clients=8, seed=s) for s in range(5)]
    assert np.mean([entropy(p, rows) for p in uneven]) < 0.7 * np.log(4)
    assert np.mean([entropy(p, rows) for p in even]) > 0.98 * np.log(4)
    assert np.std([len(p) for p in uneven[0]]) > 5 * np.std([len(p) for p in even[0]])


def test_dirichlet_redraws_until_each_client_has_enough():
    parts = partition(make(400), settings_for("dirichlet", alpha=0.5, minimum_rows=12), clients=8, seed=0)
    assert min(len(part) for part in parts) >= 12
    with pytest.raises(DataError, match=r"no Dirichlet draw with alpha 0.01 gave each of 10 clients 30 of 400 rows"):
        partition(make(400), settings_for("dirichlet", alpha=0.01, minimum_rows=30), clients=10, seed=0)


def test_dirichlet_takes_the_key_before_the_label():
    rows = make(300, labels=1, owners=3)
    parts = partition(rows, settings_for("dirichlet", alpha=0.05, minimum_rows=0, key="owner"), clients=3, seed=0)
    held = [Counter(rows[i].owner for i in part) for part in parts]
    assert max(max(c.values(), default=0) for c in held) > 60  # an owner's rows lie together, though labels are all one
    bare = [Row.single("i", str(i), "a") for i in range(9)]
    with pytest.raises(DataError, match=r"dirichlet needs a label, a group or data\.partition\.key"):
        partition(bare, settings_for("dirichlet"), clients=3, seed=0)


@given(clients=st.integers(1, 9), owners=st.integers(9, 20))
@settings(deadline=None, max_examples=20)
def test_natural_keys_are_never_split(clients, owners):
    rows = make(120, owners=owners)
    parts = partition(rows, settings_for("natural", key="hospital"), clients=clients, seed=0)
    owned = [{rows[i].owner for i in part} for part in parts]
    assert sum(map(len, owned)) == owners
    assert all(owned)


def test_natural_refusals():
    with pytest.raises(DataError, match=r"names 7 owners for 8 clients; set rounds\.clients to at most 7"):
        partition(make(50), settings_for("natural", key="hospital"), clients=8, seed=0)
    with pytest.raises(DataError, match=r"natural needs data\.partition\.key"):
        partition(make(50), settings_for("natural"), clients=3, seed=0)


def test_more_clients_than_rows_leaves_some_empty():
    parts = partition(make(3), settings_for("iid"), clients=5, seed=0)
    assert is_cover(parts, 3)
    assert sum(len(part) == 0 for part in parts) == 2
    with pytest.raises(DataError, match="no Dirichlet draw"):
        partition(make(3), settings_for("dirichlet"), clients=5, seed=0)


def test_files_are_clients_in_sorted_order(tmp_path: Path):
    for name, rows in (("b", 3), ("a", 2), ("c", 0)):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "q", "response": "r"}\n' * rows)
    config = DataConfig(name=str(tmp_path), partition=PartitionConfig(kind="files"))
    loaded = load_rows(config, seed=0)
    parts = partition(loaded.rows, config, clients=3, seed=0)
    assert [len(part) for part in parts] == [2, 3, 0]
    assert is_cover(parts, 5)
    with pytest.raises(ConfigError, match=r"holds 3 files for 4 clients; set rounds\.clients = 3"):
        partition(loaded.rows, config, clients=4, seed=0)
    pattern = config.model_copy(update={"name": str(tmp_path / "[ab].jsonl")})
    parts = partition(load_rows(pattern, seed=0).rows, pattern, clients=2, seed=0)
    assert [len(part) for part in parts] == [2, 3]


@given(count=st.integers(1, 15), per_client=st.integers(1, 6), clients=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_skills_are_dealt_evenly(count, per_client, clients, seed):
    names = [f"s{i}" for i in range(count)]
    if clients * per_client < count:
        with pytest.raises(ConfigError, match=f"cannot hold all {count}; raise it to {-(-count // clients)}"):
            deal(names, clients=clients, per_client=per_client, seed=seed)
        return
    dealt = deal(names, clients=clients, per_client=per_client, seed=seed)
    assert all(len(set(held)) == len(held) == min(per_client, count) for held in dealt)
    holders = Counter(name for held in dealt for name in held)
    assert set(holders) == set(names)
    assert max(holders.values()) - min(holders.values()) <= 1
    assert dealt == deal(names, clients=clients, per_client=per_client, seed=seed)


def test_skills_are_no_way_to_share_out_rows():
    with pytest.raises(ConfigError, match=r"kind skills deals generated rows, see `deal`; x\.jsonl has its own"):
        partition(make(8), settings_for("skills"), clients=2, seed=0)
