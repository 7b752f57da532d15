"""deploy.toml and node.toml: what they may say, where paths lead, and every mistake in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.deploy import read_deploy, read_node
from fedlora.errors import ConfigError

NODE = """
server = "fl.example.org:9092"
keys = "keys"
rank = 4
share = [1, 2]

[limits]
local_steps = 100

[settings.model]
name = "../base"

[settings.data]
name = "./rows.jsonl"
columns = {instruction = "q", output = "a"}

[settings.training]
threads = 2

[[tasks]]
name = "topics"
data.name = "./topics.jsonl"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "file.toml"
    path.write_text(text)
    return path


def test_a_node_file_with_paths_from_its_own_folder(tmp_path: Path) -> None:
    node = read_node(written(tmp_path, NODE))
    assert (node.keys, node.memory, node.meeting) == (
        tmp_path / "keys",
        tmp_path / "memory",
        tmp_path / "state" / "worker" / "socket",
    )
    assert node.settings == {
        "model.name": str(tmp_path.parent / "base"),
        "data.name": str(tmp_path / "rows.jsonl"),
        "data.columns": "instruction=q,output=a",
        "training.threads": 2,
    }
    assert (node.limits.local_steps, node.share, node.port) == (100, (1, 2), 9094)
    assert node.tasks[0].name == "topics"
    assert node.tasks[0].settings == {"data.name": str(tmp_path / "topics.jsonl")}


def test_a_word_without_a_slash_stays_a_name_at_a_hub(tmp_path: Path) -> None:
    text = NODE.replace('"../base"', '"org/model"').replace('"./rows.jsonl"', '"skills"')
    assert read_node(written(tmp_path, text)).settings["model.name"] == "org/model"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("rank = 4", "rank = 0"), "rank: Input should be greater than or equal to 1"),
        (("[limits]", "[limits]\nrank = 2"), "rank: 4 is above limits.rank, 2"),
        (("share = [1, 2]", "share = [2, 2]"), r"share: \[i, n\] with 0 <= i < n"),
        (("fl.example.org:9092", "fl.example.org"), "HOST:PORT"),
        (("threads = 2", "learning_rate = 1.0"), "settings: training.learning_rate: the run sets this"),
        (('data.name = "./topics', 'rounds.count = 3\ndata.name = "./topics'), "tasks, topics: rounds.count"),
        (("threads = 2", "thread = 2"), "settings: training.thread: no such setting; the nearest is training.threads"),
        (('data.name = "./topics', 'data.nmae = "./topics'), "tasks, topics: data.nmae: .* the nearest is data.name"),
        (("rank = 4", "rang = 4"), "\n  rang: no such setting; the nearest is rank$"),
        (("[limits]", "[limit]"), "limit: no such setting; the nearest is limits$"),
        (("local_steps = 100", "steps = 100"), "limits.steps: no such setting; the nearest is limits.local_steps$"),
        (("rank = 4", "epsilon = 4"), "epsilon: no such setting; the nearest is limits.epsilon$"),
        (("[limits]", "[limits"), "not valid TOML"),
        (("[settings.model]", '[[tasks]]\nname = "topics"\n[settings.model]'), "the same name twice"),
    ],
)
def test_mistakes_in_a_node_file(tmp_path: Path, change: tuple[str, str], what: str) -> None:
    assert change[0] in NODE
    with pytest.raises(ConfigError, match=what):
        read_node(written(tmp_path, NODE.replace(*change)))


def test_a_state_folder_too_deep_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for a Unix socket"):
        read_node(written(tmp_path, f'state = "{"deep/" * 20}"' + NODE))


def test_a_deploy_file(tmp_path: Path) -> None:
    deploy = read_deploy(written(tmp_path, 'settings = "run.toml"\nfolder = "/srv/run"\nkeys = "keys"\nport = 443'))
    assert (deploy.settings, deploy.folder, deploy.keys, deploy.state, deploy.port) == (
        tmp_path / "run.toml",
        Path("/srv/run"),
        tmp_path / "keys",
        tmp_path / "state",
        443,
    )
    with pytest.raises(ConfigError) as error:
        read_deploy(written(tmp_path, 'settings = "run.toml"\nport = 0'))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == ["folder", "keys", "port"]
    with pytest.raises(ConfigError, match="adress: no such setting; the nearest is address"):
        read_deploy(written(tmp_path, 'settings = "run.toml"\nadress = "localhost"'))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_deploy(tmp_path / "nowhere.toml")
