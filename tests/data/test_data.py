from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import data, tiny
from fedlora.config import RunConfig
from fedlora.data.rows import Row
from fedlora.errors import ConfigError, DataError


def config(clients: int = 4, seed: int = 0, **section: Any) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, "rounds": {"clients": clients}, "data": section})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"instruction": "i", "text": f"{i}", "label": f"l{i // 20}"}) for i in range(80)]
    path.write_text("\n".join([*lines, "torn"]))
    return path


def questions(rows: list[Row]) -> set[str]:
    return {row.prompt for row in rows}


class TestSkills:
    def test_each_client_has_its_own_rows_of_its_own_skills(self):
        run = config(clients=6, rows_per_client=50)
        clients = [data.client_rows(run, i) for i in range(6)]
        held = set()
        for client, counts in zip(clients, data.describe(run), strict=True):
            assert (len(client.train), len(client.holdout)) == (45, 5)
            assert not questions(client.train) & questions(client.holdout)
            assert Counter(row.group for row in client.train + client.holdout) == counts
            assert len(counts) == 4
            assert max(counts.values()) - min(counts.values()) <= 1
            held |= counts.keys()
        assert held == {name for name, skill in tiny.SKILLS.items() if not skill.public}
        for skill in held:  # clients of one skill see different rows of it
            seen = [questions([row for row in c.train if row.group == skill]) for c in clients]
            assert len({frozenset(found) for found in seen if found}) == sum(map(bool, seen)) == 2
        assert clients[2] == data.client_rows(run, 2)
        assert clients[2] != data.client_rows(config(clients=6, rows_per_client=50, seed=1), 2)

    def test_a_thousand_clients_cost_nothing_until_asked(self):
        began = time.process_time()
        run = config(clients=1000, rows_per_client=40)
        assert len(data.describe(run)) == 1000
        assert len(data.client_rows(run, 999).train) == 36
        assert time.process_time() - began < 2

    def test_test_rows_are_spread_and_never_seen(self):
        run = config(clients=3, rows_per_client=100, test_rows=30)
        rows = data.test_rows(run)
        assert len(rows) == 30
        counts = Counter(row.group for row in rows)
        assert len(counts) == 12
        assert max(counts.values()) - min(counts.values()) <= 1
        for index in range(3):
            client = data.client_rows(run, index)
            assert not questions(rows) & questions(client.train + client.holdout)

    def test_chosen_skills(self):
        private = [name for name, skill in tiny.SKILLS.items() if not skill.public][:2]
        run = config(clients=2, rows_per_client=10, skills=private)
        assert [set(counts) for counts in data.describe(run)] == [set(private)] * 2
        with pytest.raises(ConfigError, match="2 clients with 1 skills each cannot hold all 12; raise it to 6"):
            data.client_rows(config(clients=2, partition={"kind": "skills", "skills_per_client": 1}), 0)

    @pytest.mark.parametrize(("clients", "each"), [(1, 12), (2, 6), (3, 4), (10, 4)])
    def test_few_clients_hold_more_skills(self, clients: int, each: int):
        run = config(clients=clients, rows_per_client=24)
        held = [set(counts) for counts in data.describe(run)]
        assert [len(skills) for skills in held] == [each] * clients
        assert len(set().union(*held)) == 12

    def test_other_partitions_deal_one_pool(self):
        run = config(clients=3, rows_per_client=6, partition={"kind": "dirichlet", "alpha": 0.2})
        assert sum(sum(counts.values()) for counts in data.describe(run)) == 12 * 6


class TestFiles:
    def test_clients_share_the_file_out(self, file):
        run = config(name=str(file), holdout=0.25, partition={"kind": "dirichlet", "alpha": 0.5, "key": "label"})
        clients = [data.client_rows(run, i) for i in range(4)]
        sources = [row.source for client in clients for row in client.train + client.holdout]
        assert sorted(sources) == sorted(f"{file}:{n}" for n in range(1, 81))
        assert clients[0].report.kept == 80
        assert clients[0].report.dropped == ((f"{file}:81", "bad JSON: Expecting value: line 1 column 1 (char 0)"),)
        assert [sum(c.values()) for c in data.describe(run)] == [len(c.train) + len(c.holdout) for c in clients]

    def test_the_file_is_read_once(self, file):
        run = config(name=str(file), partition={"kind": "iid"})
        first = data.client_rows(run, 0)
        file.unlink()
        assert data.client_rows(run, 1).report is first.report

    def test_an_empty_client_is_visible(self, tmp_path):
        path = tmp_path / "two.jsonl"
        path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
        run = config(name=str(path), clients=3, partition={"kind": "iid"})
        assert [sum(counts.values()) for counts in data.describe(run)] == [1, 1, 0]
        assert (data.client_rows(run, 2).train, data.client_rows(run, 2).holdout) == ([], [])
        assert len(data.client_rows(run, 0).train) == 1

    def test_all_clients_empty_is_an_error(self, tmp_path):
        for name in "ab":
            (tmp_path / f"{name}.jsonl").write_text("")
        run = config(name=str(tmp_path), clients=2, partition={"kind": "files"})
        with pytest.raises(DataError, match="nothing is usable; 0 rows kept"):
            data.client_rows(run, 0)

    def test_no_such_client(self):
        with pytest.raises(ConfigError, match="no client has index 4; there are 4, counted from 0"):
            data.client_rows(config(clients=4), 4)

    def test_test_rows(self, file, tmp_path):
        assert data.test_rows(config(name=str(file), partition={"kind": "iid"})) == []
        test = tmp_path / "held_out.jsonl"
        test.write_text('{"instruction": "i", "text": "t", "label": "l1"}\n')
        rows = data.test_rows(config(name=str(file), test=str(test), partition={"kind": "iid"}))
        assert [row.text for row in rows] == ["t"]
        with pytest.raises(DataError, match=r"'validation' is read as a split, and .*a\.jsonl has none; for a file"):
            data.test_rows(config(name=str(file), test="validation", partition={"kind": "iid"}))
        with pytest.raises(DataError, match=r"/nowhere\.jsonl: no such file or folder"):
            data.test_rows(config(test=str(tmp_path / "nowhere.jsonl")))

    def test_a_test_file_needs_no_column_of_the_partition_s_key(self, tmp_path):
        train, test = tmp_path / "train.jsonl", tmp_path / "t.jsonl"
        train.write_text("".join(f'{{"prompt": "{i}", "response": "b", "clinic": "c{i % 4}"}}\n' for i in range(8)))
        test.write_text('{"prompt": "a", "response": "b"}\n')
        run = config(name=str(train), test=str(test), partition={"kind": "natural", "key": "clinic"})
        assert [row.prompt for row in data.test_rows(run)] == ["a"]
        assert [sum(counts.values()) for counts in data.describe(run)] == [2] * 4

    @pytest.mark.parametrize(("labels", "grouped"), [(200, False), (201, True)])
    def test_free_text_labels_are_one_group(self, tmp_path, labels, grouped):
        path = tmp_path / "notes.jsonl"
        records = [{"text": f"{i}", "label": f"l{i % labels}"} for i in range(402)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        run = config(name=str(path), test=str(path), partition={"kind": "iid"})
        rows = [row for i in range(4) for row in data.client_rows(run, i).train] + data.test_rows(run)
        wanted = {"notes.jsonl"} if grouped else {f"l{i}" for i in range(labels)}
        assert set().union(*data.describe(run)) == wanted
        assert {row.group for row in data.test_rows(run)} == wanted
        assert all((row.group == "notes.jsonl") == grouped and row.label == row.answer for row in rows)

    def test_a_test_split_of_a_folder(self, file, tmp_path):
        file.rename(tmp_path / "train.jsonl")
        (tmp_path / "test.jsonl").write_text('{"instruction": "i", "text": "t", "label": "l1"}\n')
        run = config(name=str(tmp_path), test="test", partition={"kind": "iid"})
        assert [row.text for row in data.test_rows(run)] == ["t"]
        assert sum(sum(counts.values()) for counts in data.describe(run)) == 80


@given(
    texts=st.lists(st.integers(0, 12), max_size=40),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_hold_out_laws(texts, share, seed):
    rows = [Row.single("", str(t), "a", source=str(i)) for i, t in enumerate(texts)]
    train, held = data.hold_out(rows, share, seed=seed, index=0)
    assert sorted(int(row.source) for row in train + held) == list(range(len(rows)))
    assert not questions(train) & questions(held)
    assert len(held) <= round(len(rows) * share)
    assert train or not rows
    assert (train, held) == data.hold_out(rows, share, seed=seed, index=0)
    if len(set(texts)) == len(texts) > 0:
        assert len(held) == min(round(len(rows) * share), len(rows) - 1)


def test_data_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import fedlora.data.batches, fedlora.data.prompt, fedlora.data as d; "
    )
    code += "from fedlora.config import RunConfig; print(len(d.client_rows(RunConfig(), 0).train)); "
    code += "assert not {'flwr', 'transformers', 'datasets'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("270", "")


REAL = Path(os.environ.get("FEDLORA_REAL_DATA", "no such folder")) / "agnews"


@pytest.mark.skipif(not REAL.is_dir(), reason="FEDLORA_REAL_DATA names no folder with agnews")
def test_real_news():
    run = config(name=str(REAL), clients=8, test="test", partition={"kind": "dirichlet", "alpha": 0.5, "key": "label"})
    counts = data.describe(run)
    assert sum(sum(c.values()) for c in counts) == 1000
    assert len(data.test_rows(run)) == 500
    labels = json.loads((REAL / "labels.json").read_text())
    assert {row.label for row in data.test_rows(run)} == set(labels)
