from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora import tiny
from fedlora.config import DataConfig, PartitionConfig
from fedlora.data.sources import Loaded, data_files, load_rows
from fedlora.errors import ConfigError, DataError

GOOD = {"instruction": "Add.", "input": "1 + 2", "output": "3"}


def load(path: Path, **more: Any) -> Loaded:
    return load_rows(DataConfig(name=str(path), **more), seed=0)


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class TestColumns:
    def test_alpaca(self, tmp_path):
        file = jsonl(tmp_path / "a.jsonl", GOOD | {"text": "Add. 1 + 2 3"}, {"instruction": "Say hi.", "output": "hi"})
        first, second = load(file).rows
        assert first.messages == (("user", "Add.\n1 + 2"), ("assistant", "3"))
        assert (first.instruction, first.input, first.source) == ("Add.", "1 + 2", f"{file}:1")
        assert second.messages == (("user", "Say hi."), ("assistant", "hi"))

    def test_instruction_text_label(self, tmp_path):
        record = {"task": "news", "instruction": "Which topic?", "text": "Goal!", "label": "Sports"}
        (row,) = load(jsonl(tmp_path / "a.jsonl", record)).rows
        assert row.messages == (("user", "Which topic?\nGoal!"), ("assistant", "Sports"))
        assert (row.text, row.label, row.group) == ("Goal!", "Sports", "news")

    def test_text_label(self, tmp_path):
        (row,) = load(jsonl(tmp_path / "a.jsonl", {"text": "Goal!", "label": 3})).rows
        assert (row.text, row.label, row.answer, row.group) == ("Goal!", "3", "3", "3")

    @pytest.mark.parametrize("answer", ["response", "completion"])
    def test_prompt_response(self, tmp_path, answer):
        (row,) = load(jsonl(tmp_path / "a.jsonl", {"prompt": "1 + 2", answer: 3})).rows
        assert row.messages == (("user", "1 + 2"), ("assistant", "3"))

    def test_messages(self, tmp_path):
        turns = [
            ("system", "Be short."),
            ("user", "1 + 2"),
            ("assistant", "3"),
            ("user", "Sure?"),
            ("assistant", "Yes"),
        ]
        record = {"messages": [{"role": role, "content": content} for role, content in turns]}
        (row,) = load(jsonl(tmp_path / "a.jsonl", record)).rows
        assert row.messages == tuple(turns)
        assert (row.prompt, row.answer, row.text) == ("Sure?", "Yes", "1 + 2\nSure?")

    def test_explicit_columns_win(self, tmp_path):
        file = jsonl(tmp_path / "a.jsonl", GOOD | {"question": "2 + 2", "reply": "4", "clinic": "north"})
        columns = {"prompt": "question", "input": "input", "output": "reply"}
        (row,) = load(file, columns=columns, partition=PartitionConfig(kind="natural", key="clinic")).rows
        assert row.messages == (("user", "2 + 2\n1 + 2"), ("assistant", "4"))
        assert row.owner == "north"

    def test_a_wrong_column_is_an_error_with_the_nearest_name(self, tmp_path):
        file = jsonl(tmp_path / "a.jsonl", *[{"question": "q", "answer": "a"}] * 1000)
        with pytest.raises(
            DataError, match=r"asks for column 'answr'.*columns are 'question', 'answer'; did you mean 'answer'\?"
        ):
            load(file, columns={"instruction": "question", "output": "answr"})
        with pytest.raises(
            DataError, match=r"a\.jsonl: no column holds the question.*columns are 'question', 'answer'"
        ):
            load(file)
        with pytest.raises(DataError, match=r"no column holds the answer.*e\.g\. output = 'answer'"):
            load(file, columns={"instruction": "question"})
        with pytest.raises(DataError, match=r"data\.partition\.key asks for column 'clinic'"):
            load(file, columns={"prompt": "question", "output": "answer"}, partition=PartitionConfig(key="clinic"))

    def test_a_wrong_role_is_an_error(self, tmp_path):
        file = jsonl(tmp_path / "a.jsonl", GOOD)
        with pytest.raises(ConfigError, match=r"no role 'outptu'; roles are .* did you mean 'output'\?"):
            load(file, columns={"outptu": "output"})
        with pytest.raises(ConfigError, match=r"ask for columns 'input' and 'output'; keep one"):
            load(file, columns={"output": "output", "response": "input"})


def test_every_bad_json_line_is_reported(tmp_path):
    good = json.dumps(GOOD).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"\xff\xfe bad",
        good,
        b"[1]",
        b"",
        b'{"instruction": "Add.", "output": ""}',
        b'{"instruction": "Add.", "output": NaN}',
        b'{"instruction": "Add."}',
        b'{"instruction": "Add.", "output": ["3"]}',
        b'{"instruction": "\\ud800", "output": "3"}',
        b'{"instruction": null, "input": "1", "output": "3"}',
        good,
        good[:20],  # torn
    ]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    loaded = load(file)
    assert [row.source for row in loaded.rows] == [f"{file}:{n}" for n in (1, 3, 12)]
    assert loaded.report.kept == 3
    reasons = {int(source.rpartition(":")[2]): reason for source, reason in loaded.report.dropped}
    expected = {
        2: "bad UTF-8: byte 0xff at 0",
        4: "no object: list",
        5: "empty line",
        6: "empty 'output'",
        7: "empty 'output'",
        8: "missing 'output'",
        9: "no text in 'output': holds a list",
        10: "bad UTF-8: in 'instruction' at character 0",
        11: "empty 'instruction'",
        13: "bad JSON: Unterminated string starting at",
    }
    assert reasons.keys() == expected.keys()
    assert all(reasons[n].startswith(text) for n, text in expected.items())
    summary = loaded.report.summary()
    assert "\n" not in summary
    assert summary.startswith("3 rows kept, 10 dropped (2 bad UTF-8, ")
    assert summary.endswith(f"{file}:2, {file}:4, {file}:5, ...")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("hello", "no messages: 'messages' holds str"),
        ([], "no messages: 'messages' holds an empty list"),
        ([{"role": "robot", "content": "x"}], "bad message: role 'robot'"),
        ([{"role": "user", "content": ["x"]}], "empty message: the user says nothing"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}], "empty message: the assistant"),
        ([{"role": "user", "content": "x"}], "no answer: a conversation needs a user"),
        ([{"role": "assistant", "content": "x"}], "no answer: a conversation needs a user"),
    ],
)
def test_bad_conversations(tmp_path, turns, reason):
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    loaded = load(jsonl(tmp_path / "a.jsonl", {"messages": good}, {"messages": turns}))
    assert loaded.report.kept == 1
    ((source, found),) = loaded.report.dropped
    assert source.endswith("a.jsonl:2")
    assert found.startswith(reason)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"not json\n", b"\xff\n", b'{"instruction": "a", "output": ""}\n'])
def test_a_file_in_which_nothing_is_usable_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl: none of \d rows is usable: "):
        load(tmp_path / "a.jsonl")


def test_csv_lines_are_counted_through_quoted_newlines(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"\xef\xbb\xbfprompt,response\r\n"  # line 1
        b'"two\r\nlines, and a ""quote""",ok\r\n'  # 2, 3
        b"only one cell\r\n"  # 4
        b"\r\n"  # 5
        b"caf\xe9,latin\r\n"  # 6
        b"empty,\r\n"  # 7
        b'fine,"3\n4"\r\n'  # 8, 9
        b'bad "quote,fine\r\n'  # 10: quotes inside an unquoted cell are themselves
        b'"x"y,z\r\n'  # 11
        b"last,ok\r\n"  # 12
        b'torn,"never closed\r\n'  # 13
        b"swallowed,row\r\n"
    )
    loaded = load(file)
    assert {row.source: row.answer for row in loaded.rows} == {
        f"{file}:{n}": a for n, a in ((2, "ok"), (8, "3\n4"), (10, "fine"), (12, "ok"))
    }
    assert loaded.rows[0].prompt == 'two\r\nlines, and a "quote"'
    assert dict(loaded.report.dropped) == {
        f"{file}:4": "wrong number of cells: 1, the header has 2",
        f"{file}:5": "empty line",
        f"{file}:6": "bad UTF-8: in 'prompt' at character 3",
        f"{file}:7": "empty 'response'",
        f"{file}:11": "bad CSV: ',' expected after '\"'",
        f"{file}:13": "bad CSV: unexpected end of data, and the 1 lines after it are lost",
    }


def test_csv_headers(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv:1: two columns have one name: text, text"):
        load(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text('"text\na,b\n')
    with pytest.raises(DataError, match=r"b\.csv:1: the header is no CSV: unexpected end"):
        load(tmp_path / "b.csv")
    (tmp_path / "c.tsv").write_text("text\tlabel\na, b\tc\n")
    assert load(tmp_path / "c.tsv").rows[0].text == "a, b"


def test_json_list(tmp_path):
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps([GOOD, 7, GOOD], indent=1))
    loaded = load(file)
    assert [row.source for row in loaded.rows] == [f"{file}:row 1", f"{file}:row 3"]
    assert loaded.report.dropped == ((f"{file}:row 2", "no object: int"),)
    file.write_text("[{")
    with pytest.raises(DataError, match=r"alpaca\.json: not a JSON list"):
        load(file)


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"], "label": [1.5, 2.0, math.nan]}), file)
    loaded = load(file)
    assert [(row.text, row.label) for row in loaded.rows] == [("a", "1.5")]
    assert loaded.report.dropped == ((f"{file}:row 2", "empty 'text'"), (f"{file}:row 3", "empty 'label'"))
    file.write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"a\.parquet: not a sound Parquet file"):
        load(file)


@pytest.fixture
def labelled() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)


def test_class_numbers_become_names(tmp_path, labelled):
    labelled.to_parquet(tmp_path / "a.parquet")
    labelled.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": labelled}).save_to_disk(tmp_path / "split")
    for name in ("a.parquet", "one", "split"):
        loaded = load(tmp_path / name)
        assert [(row.text, row.label) for row in loaded.rows] == [("a", "good"), ("b", "bad")]
        assert [reason for _, reason in loaded.report.dropped] == ["empty 'label'"]
    with pytest.raises(DataError, match="split: no split 'test'; there are train"):
        load(tmp_path / "split", split="test")


def test_hub_data_sets_come_through_datasets(monkeypatch, labelled):
    asked: list[object] = []

    def load_dataset(*args: object, **more: object) -> datasets.Dataset:
        asked.append((args, more))
        return labelled

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_rows(DataConfig(name="owner/reviews:small", split="validation"), seed=0)
    assert asked == [(("owner/reviews", "small"), {"split": "validation"})]
    assert loaded.rows[0].source == "owner/reviews:small/validation:row 1"


def test_without_a_network_a_hub_data_set_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: no such file or folder here.*Offline\? Name a local file"):
        load_rows(DataConfig(name="nobody/nothing"), seed=0)


class TestFiles:
    def test_a_folder_gives_the_files_of_its_split(self, tmp_path):
        for name in ("train.jsonl", "train-00001-of-2.jsonl", "test.jsonl", "labels.json", "notes.txt"):
            jsonl(tmp_path / name, GOOD)
        (tmp_path / ".cache").mkdir()
        jsonl(tmp_path / ".cache" / "train.jsonl", GOOD)

        def names(split: str) -> list[str]:
            return [file.name for file in data_files(DataConfig(name=str(tmp_path), split=split))]

        assert names("train") == ["train-00001-of-2.jsonl", "train.jsonl"]
        assert names("test") == ["test.jsonl"]
        assert len(load(tmp_path).rows) == 2
        with pytest.raises(DataError, match=r"no file of split 'validation'; splits by name: train, test; files: "):
            names("validation")

    def test_a_folder_without_split_names_is_all_train(self, tmp_path):
        for name in ("b.jsonl", "a.csv"):
            (tmp_path / name).write_text("")
        config = DataConfig(name=str(tmp_path))
        assert [file.name for file in data_files(config)] == ["a.csv", "b.jsonl"]
        with pytest.raises(DataError, match="no file of split 'test'; splits by name: none"):
            data_files(config.model_copy(update={"split": "test"}))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(DataError, match=r"none\.jsonl: no such file or folder, and no data file matches"):
            load(tmp_path / "none.jsonl")
        with pytest.raises(DataError, match=r"the folder holds no data file; known are \.jsonl"):
            load(tmp_path)
        (tmp_path / "a.xlsx").write_text("")
        with pytest.raises(DataError, match=r"cannot read files ending in '\.xlsx'"):
            load(tmp_path / "a.xlsx")

    def test_an_empty_file_of_one_client_is_an_empty_client(self, tmp_path):
        jsonl(tmp_path / "a.jsonl", GOOD)
        (tmp_path / "b.jsonl").write_text("torn")
        loaded = load(tmp_path, partition=PartitionConfig(kind="files"))
        assert [row.owner for row in loaded.rows] == [str(tmp_path / "a.jsonl")]
        assert loaded.report.dropped[0][0] == f"{tmp_path / 'b.jsonl'}:1"
        (tmp_path / "a.jsonl").write_text("")
        with pytest.raises(DataError, match="nothing is usable; 0 rows kept, 1 dropped"):
            load(tmp_path, partition=PartitionConfig(kind="files"))

    def test_a_file_that_cannot_be_read(self, tmp_path, monkeypatch):
        file = jsonl(tmp_path / "a.jsonl", GOOD)

        def refuse(_: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied"):
            load(file)


def test_skills():
    loaded = load_rows(DataConfig(name="skills", rows_per_client=5), seed=3)
    private = [name for name, skill in tiny.SKILLS.items() if not skill.public]
    assert [row.group for row in loaded.rows] == [name for name in private for _ in range(5)]
    first = tiny.rows(private[0], "train", 1, 3)[0]
    assert loaded.rows[0].messages == (
        ("user", first["instruction"] + "\n" + first["input"]),
        ("assistant", first["output"]),
    )
    with pytest.raises(ConfigError, match="no skill is called 'juggling'; there are "):
        load_rows(DataConfig(name="skills", skills=("juggling",)), seed=0)
