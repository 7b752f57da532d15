"""What a client keeps: the same ask gets the same bytes, whatever happened in between."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path

import numpy as np
import pytest

from clients.memory import Memory, _Recent
from fedlora.adapter import Adapter, Factors
from fedlora.errors import BlocksMissing, CheckpointError
from fedlora.state import Block
from fedlora.wire import blocks_id

NASTY = [
    "../../x",
    "..",
    ".",
    "",
    "a/b",
    "/etc/passwd",
    "a\0b",
    "ü" * 90,
    "n" * 300,
    "\ud800",
    "CON.",
    "a b",
    "~",
    "-\n",
]


def test_only_the_same_ask_gets_the_kept_answer(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run", "client")
    assert memory.recall(b"ask") is None
    memory.remember(b"ask", b"answer")
    assert Memory(tmp_path, "run", "client").recall(b"ask") == b"answer"
    assert memory.recall(b"another") is None
    assert Memory(tmp_path, "run", "other").recall(b"ask") is None
    assert Memory(tmp_path, "run-2", "client").recall(b"ask") is None
    memory.remember(b"another", b"")
    assert memory.recall(b"another") == b""
    assert memory.recall(b"ask") is None  # one answer is kept


@pytest.mark.parametrize("cut", [0, 10, 40, 64, 66])
def test_a_torn_answer_is_no_answer(tmp_path: Path, cut: int) -> None:
    memory = Memory(tmp_path, "run", "client")
    memory.remember(b"ask", b"answer")
    path = tmp_path / "run" / "client" / "answer"
    path.write_bytes(path.read_bytes()[:cut])
    assert memory.recall(b"ask") is None


def test_an_interruption_leaves_the_answer_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(tmp_path, "run", "client")
    memory.remember(b"ask", b"answer")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        memory.remember(b"next", b"torn")
    assert memory.recall(b"ask") == b"answer"


def test_no_id_leaves_the_root_or_meets_another(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    for i, name in enumerate(NASTY):
        Memory(root, name, name).remember(b"ask", str(i).encode())
    for i, name in enumerate(NASTY):
        assert Memory(root, name, name).recall(b"ask") == str(i).encode()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == len(NASTY)
    assert all(len(p.relative_to(root).parts) == 3 for p in files)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    Memory(tmp_path / "root", "run", "client").remember(b"ask", b"answer")
    for path in (tmp_path / "root").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o700


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot keep 70 bytes in .*: (File exists|Not a directory). Free"):
        Memory(tmp_path / "file", "run", "client").remember(b"ask", b"answer")


def test_arrays_are_those_before_the_round_that_is_asked(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run", "client")
    assert memory.arrays("moments", 1) == {}
    for number in (2, 3, 7):
        memory.keep_arrays("moments", number, {"exp_avg": np.full(3, number, np.float32), "step": np.array(2.0)})
    memory.keep_arrays("parts", 4, {"B:q": np.zeros((2, 1), np.float32)})
    assert memory.arrays("moments", 8)["exp_avg"].tolist() == [7, 7, 7]
    assert memory.arrays("moments", 8)["step"].shape == ()
    assert memory.arrays("moments", 7)["exp_avg"].tolist() == [3, 3, 3]  # round 7 is repeated after a crash
    assert memory.arrays("moments", 3) == {}  # only the last two are kept
    assert memory.arrays("parts", 5).keys() == {"B:q"}
    assert len(list(tmp_path.rglob("moments-*"))) == 2
    assert Memory(tmp_path, "run", "other").arrays("moments", 8) == {}


def test_damaged_arrays_are_named(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run", "client")
    memory.keep_arrays("moments", 1, {"exp_avg": np.zeros(3, np.float32)})
    next(tmp_path.rglob("moments-*")).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="moments-000001 cannot be read"):
        memory.arrays("moments", 2)


def block(seed: int, born: int = 1) -> Block:
    rng = np.random.default_rng(seed)
    factors = Factors(rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32), 0.5)
    return Block(adapter=Adapter({"q": factors}), born=born, since=born - 1)


@pytest.fixture(params=[True, False], ids=["from the disk", "from this process"])
def fresh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr("clients.memory._CACHE", _Nothing())


class _Nothing:
    def get(self, digest: str) -> None:
        return None

    def put(self, digest: str, block: Block) -> None:
        pass


@pytest.mark.usefixtures("fresh")
def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    blocks = (block(1), block(2, 2))
    memory = Memory(tmp_path, "run", "client")
    memory.keep_blocks(blocks_id(blocks), blocks)
    got = Memory(tmp_path, "run", "client").blocks(blocks_id(blocks))
    assert [(b.born, b.since, b.adapter.digest) for b in got] == [(b.born, b.since, b.adapter.digest) for b in blocks]
    with pytest.raises(BlocksMissing, match="send them again"):
        Memory(tmp_path, "run", "other").blocks(blocks_id(blocks))
    with pytest.raises(BlocksMissing):
        memory.blocks(blocks_id(blocks[:1]))


def test_the_last_two_lists_are_held_and_their_blocks_alone(tmp_path: Path) -> None:
    chain = [block(i, i) for i in range(5)]
    one, two = (Memory(tmp_path, "run", c) for c in ("one", "two"))
    for n in range(1, 5):
        for memory in (one, two):
            memory.keep_blocks(blocks_id(chain[:n]), chain[:n])
    assert len(one.blocks(blocks_id(chain[:3]))) == 3
    with pytest.raises(BlocksMissing):
        one.blocks(blocks_id(chain[:2]))
    snapshot = (block(9, 5),)
    for memory in (one, two):
        memory.keep_blocks(blocks_id(snapshot), snapshot)
    assert len(list((tmp_path / "run" / ".blocks").glob("*.block"))) == 5  # four of the list before, and the new one
    again = (block(10, 6),)
    one.keep_blocks(blocks_id(again), again)
    assert len(list((tmp_path / "run" / "one").glob("*.block"))) == 2
    assert len(list((tmp_path / "run" / ".blocks").glob("*.block"))) == 6  # the other client still holds the chain
    two.keep_blocks(blocks_id(again), again)
    assert len(list((tmp_path / "run" / ".blocks").glob("*.block"))) == 2


def test_blocks_that_are_asked_for_again_are_the_last_to_go(tmp_path: Path) -> None:
    a, b, c = ((block(i),) for i in range(3))
    memory = Memory(tmp_path, "run", "client")
    memory.keep_blocks(blocks_id(a), a)
    memory.keep_blocks(blocks_id(b), b)
    memory.keep_blocks(blocks_id(a), a)  # the same version is asked for again
    memory.keep_blocks(blocks_id(c), c)
    assert memory.blocks(blocks_id(a))
    assert memory.blocks(blocks_id(c))
    with pytest.raises(BlocksMissing):
        memory.blocks(blocks_id(b))


@pytest.mark.parametrize("how", ["torn", "exchanged", "gone"])
def test_a_damaged_block_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("clients.memory._CACHE", _Nothing())
    memory, blocks = Memory(tmp_path, "run", "client"), (block(1), block(2))
    memory.keep_blocks(blocks_id(blocks), blocks)
    first, second = sorted((tmp_path / "run" / "client").glob("*.block"))
    if how == "torn":
        first.write_bytes(first.read_bytes()[:-1])
    elif how == "exchanged":
        first.write_bytes(second.read_bytes())
    else:
        first.unlink()
    with pytest.raises(BlocksMissing):
        memory.blocks(blocks_id(blocks))
    memory.keep_blocks(blocks_id(blocks), blocks)  # sent again
    assert [b.adapter.digest for b in memory.blocks(blocks_id(blocks))] == [b.adapter.digest for b in blocks]


def _keep(root: str, client: str) -> None:
    blocks = [block(i, i) for i in range(40)]
    memory = Memory(Path(root), "run", client)
    for n in range(40):
        memory.keep_blocks(blocks_id(blocks[n : n + 2]), blocks[n : n + 2])


def test_clients_of_one_folder_may_keep_blocks_at_the_same_moment(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_keep, args=(str(tmp_path), f"client-{i}")) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_process_remembers_a_bounded_number_of_bytes() -> None:
    recent = _Recent(limit=3 * block(0).adapter.nbytes)
    for i in range(5):
        recent.put(str(i), block(i))
        assert recent.get("0") is not None or i > 2  # asking keeps it
    assert [i for i in range(5) if recent.get(str(i)) is not None] in ([0, 3, 4], [2, 3, 4])


@pytest.mark.parametrize(
    "text",
    ["[]", "5", "null", '{"w":5}', '{"w":[["a"]]}', '{"w":["../../x"]}', '{"w":["a\\u0000"]}', "[" * 100_000, "\xff"],
    ids=range(9),
)
def test_lists_of_blocks_that_are_no_lists_are_missing_and_can_be_sent_again(tmp_path: Path, text: str) -> None:
    blocks = (block(1), block(2, 2))
    memory = Memory(tmp_path, "run", "client")
    memory.keep_blocks(blocks_id(blocks), blocks)
    (tmp_path / "run" / "client" / "blocks").write_text(text.replace('"w"', f'"{blocks_id(blocks)}"'), "latin-1")
    with pytest.raises(BlocksMissing, match="send them again"):
        memory.blocks(blocks_id(blocks))
    memory.keep_blocks(blocks_id(blocks), blocks)
    assert blocks_id(memory.blocks(blocks_id(blocks))) == blocks_id(blocks)


def test_a_list_that_was_changed_gives_no_other_blocks(tmp_path: Path) -> None:
    blocks = (block(1), block(2, 2))
    memory = Memory(tmp_path, "run", "client")
    memory.keep_blocks(blocks_id(blocks), blocks)
    one = [b.adapter.digest for b in blocks]
    for digests in (one[:1], one[::-1], one + one, []):
        (tmp_path / "run" / "client" / "blocks").write_text(json.dumps({blocks_id(blocks): digests}))
        with pytest.raises(BlocksMissing, match="send them again"):
            memory.blocks(blocks_id(blocks))


def test_an_answer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "client" / "answer").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="answer cannot be read: Is a directory"):
        Memory(tmp_path, "run", "client").recall(b"ask")
