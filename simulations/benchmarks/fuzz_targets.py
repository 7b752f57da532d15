"""What fuzz.py fuzzes: valid inputs of every reader of others' bytes, how to break them, and what may come of it.

A case is a set of files by path. A reader of bytes gets the one file of its case; a reader of folders gets them all.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fedlora.adapter import Adapter, Factors
from fedlora.errors import AnswerRejected, FedLoRAError, WireError
from fedlora.rng import stream
from fedlora.state import (
    Answer,
    Ask,
    Block,
    Codec,
    GlobalState,
    Header,
    Layout,
    LocalTraining,
    Measure,
    Module,
    PublicPair,
    Subspace,
    Task,
    TrainPlan,
    expected_arrays,
)
from fedlora.wire import (
    decode_answer,
    decode_ask,
    decode_block,
    decode_state,
    encode_answer,
    encode_ask,
    encode_block,
    encode_state,
    peek,
)
from server.admission import MAX_EXAMPLES, MAX_MEASURE, MAX_VALUE, admit
from simulations.benchmarks.fuzz_mutations import Mutation, frame, large_frame, opened

CAP = 2**26  # bytes of a message
TEXT = 10_000  # characters of an error


class Unsound(Exception):
    """Something was accepted that must not be, or refused with a text that fits no log."""


@dataclass(frozen=True)
class Special:
    """What a hostile folder holds instead of a file; `size` of a sparse file, `to` of a link."""

    kind: Literal["link", "pipe", "folder", "sparse"]
    to: str = ""
    size: int = 0


Case = dict[str, bytes | Special]


@dataclass(frozen=True)
class Target:
    """`read` raises one of `errors` or returns what it accepted, after checking that it is as promised."""

    name: str
    draw: Callable[[random.Random], Case]
    read: Callable[[Case], object]
    errors: tuple[type[Exception], ...]


def size_of(case: Case) -> int:
    """Bytes, with the names."""
    return sum(len(name) + (len(x) if isinstance(x, bytes) else 0) for name, x in case.items())


def of_bytes(
    name: str,
    seeds: Sequence[bytes],
    mutations: Sequence[Mutation],
    read: Callable[[bytes], object],
    *errors: type[Exception],
    large: Mutation | None = None,
) -> Target:
    """A reader of one byte string."""

    def draw(rng: random.Random) -> Case:
        if rng.random() < 0.01:
            return {"case": rng.choice(seeds)}
        mutation = large if large is not None and rng.random() < 1 / 400 else rng.choice(mutations)
        return {"case": mutation(rng, rng.choice(seeds), seeds)}

    def of(case: Case) -> object:
        data = case["case"]
        assert isinstance(data, bytes)
        return read(data)

    return Target(name, draw, of, errors)


def require(right: bool, what: str) -> None:
    """Raises: Unsound."""
    if not right:
        raise Unsound(what)


@contextmanager
def folder_of(case: Case) -> Iterator[Path]:
    """The files of a case in a folder of their own."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for name, content in case.items():
            with suppress(OSError, ValueError):  # two cases of one name, or a name that no disk takes
                _place(root / name, content)
        yield root
    finally:
        try:
            shutil.rmtree(root)
        except RecursionError:
            subprocess.run(["rm", "-rf", str(root)], check=True)


def _place(path: Path, content: bytes | Special) -> None:
    for folder in reversed(path.parents):  # os.makedirs calls itself once a level
        with suppress(FileExistsError):
            folder.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
        path.chmod(0o600)
    elif content.kind == "link":
        path.symlink_to(content.to)
    elif content.kind == "pipe":
        os.mkfifo(path)
    elif content.kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.write(content.to.encode("latin-1"))
            file.truncate(content.size)


# Messages


CODECS: tuple[Codec, ...] = get_args(Codec)
LAYOUT = Layout(
    modules={"v": Module(out=3, inp=6, shares="q"), "q": Module(out=6, inp=6)},
    head={"score.weight": (2, 6)},
    features=6,
)
HEADER = Header(run="run-1", round=3, client="c1", kind="train", base="b", version=2, attempt=1, phase=4, code="c")
PLAN = TrainPlan(
    method="flora",
    rank=4,
    rows=4,
    scale=0.5,
    train=("A", "B"),
    send=("A", "B", "head"),
    training=LocalTraining(learning_rate=1e-3, local_steps=None, local_epochs=0.1, batch_size=4),
)


def adapter(rank: int, seed: int, scale: float = 1.0) -> Adapter:
    rng = stream(seed, "fuzz")

    def drawn(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    return Adapter({n: Factors(drawn(rank, m.inp), drawn(m.out, rank), scale) for n, m in LAYOUT.modules.items()})


def arrays(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    rng = stream(0, "fuzz", *shapes)
    return {key: np.abs(rng.standard_normal(shape, dtype=np.float32)) for key, shape in shapes.items()}


@cache
def asks() -> tuple[tuple[Header, Ask], ...]:
    blocks = (Block(adapter=adapter(3, 1), born=1), Block(adapter=adapter(0, 2, 0.1), born=2, since=1))
    pair = {f"{side}:{n}": f for n, m in LAYOUT.modules.items() for side, f in (("A", (4, m.inp)), ("B", (m.out, 4)))}
    train = Ask(plan=PLAN, blocks=blocks, frozen=adapter(2, 3, -0.5), arrays=arrays({**pair, "probe:q": (4,)}))
    return (
        (replace(HEADER, kind="hello", round=0), Ask()),
        (HEADER, train),
        (HEADER, replace(train, blocks=blocks[:1], on="0" * 64, whole="1" * 64, task="t", subspace=Subspace(dim=4))),
        (replace(HEADER, kind="evaluate"), Ask(public=PublicPair(seed=2**40, rows=4, scale=0.5), blocks=blocks)),
        (
            replace(HEADER, kind="measure"),
            Ask(measure=Measure(sketch=2, classes=2, columns=2, fisher=3), arrays=arrays(pair)),
        ),
    )


@cache
def answers() -> tuple[tuple[Header, Answer, dict[str, tuple[int, ...]] | None], ...]:
    """Header, answer, and the arrays that it must have; None leaves them to the caller."""
    said: list[tuple[Header, Answer, dict[str, tuple[int, ...]] | None]] = []
    for header, ask in asks():
        expected = None if header.kind == "hello" else expected_arrays(ask, LAYOUT)
        metrics = {"loss_after": 0.5, "steps": 3.0}
        if header.kind == "evaluate":
            metrics = {"correct": 3.0, "counted": 4.0, "loss": 2.5, "tokens": 9.0, "correct/a": 1.0, "counted/a": 2.0}
        info = {"id": "c1", "rank": 2, "base": "b", "layout": LAYOUT.to_json(), "keeps": True}
        if header.kind == "hello":
            said.append((header, Answer(info=info, arrays=arrays({"head:score.weight": (2, 6)})), None))
        else:
            said.append((header, Answer(examples=12, metrics=metrics, arrays=arrays(expected or {})), expected))
    return tuple(said)


@cache
def state() -> GlobalState:
    block = Block(adapter=adapter(2, 5), born=1)
    tasks = (
        Task(name="one", blocks=(block,), sealed=True, statistics={"rows": 7.0}, extras={"score": np.ones((2, 6))}),
        Task(
            name="two",
            pair=adapter(2, 6, 0.5),
            public_seed=2**70,
            subspace=Subspace(dim=6),
            basis={n: np.eye(6, dtype=np.float32) for n in LAYOUT.modules},
        ),
    )
    memory = {"server": {"m/A:q": np.ones(3), "count": np.array(4)}, "holdings": {"c1": np.arange(3, dtype=np.uint64)}}
    return GlobalState(version=3, base="b", layout=LAYOUT, tasks={t.name: t for t in tasks}, memory=memory)


def _read_ask(data: bytes) -> object:
    header, ask = decode_ask(data, max_bytes=CAP)
    pairs = [*(b.adapter for b in ask.blocks), *([] if ask.frozen is None else [ask.frozen])]
    _require_views([*ask.arrays.values(), *(x for p in pairs for f in p.values() for x in (f.a, f.b))])
    again = encode_ask(header, ask)
    require(encode_ask(*decode_ask(again, max_bytes=2 * CAP)) == again, "an ask changes on another round trip")
    return ask


def _read_answer(data: bytes) -> object:
    header, answer = decode_answer(data, max_bytes=CAP)
    _require_views(list(answer.arrays.values()))
    again = encode_answer(header, answer)
    require(encode_answer(*decode_answer(again, max_bytes=2 * CAP)) == again, "an answer changes on another round trip")
    return answer


def _require_views(found: Sequence[Any]) -> None:
    for x in found:
        require(x.dtype == np.float32 and x.flags.c_contiguous, f"an array of {x.dtype}, or not contiguous")
        require(not x.flags.writeable, "an array that can be written to")


def _read_state(data: bytes) -> object:
    found = decode_state(data)
    values, _ = opened(data)
    held = {"tasks": found.tasks, "memory": found.memory, "modules": found.layout.modules, "head": found.layout.head}
    require(all(len(values[what]) == len(x) for what, x in held.items()), "two things of one name became one")
    again = encode_state(found)
    require(encode_state(decode_state(again)) == again, "a state changes on another round trip")
    return again


def _read_block(data: bytes) -> object:
    again = encode_block(decode_block(data))
    require(encode_block(decode_block(again)) == again, "a block changes on another round trip")
    return again


def _read_answered(data: bytes) -> object:
    """As the server would, for the ask whose kind the bytes name."""
    try:
        kind = peek(data, max_bytes=CAP).kind
    except WireError:
        kind = "train"
    asked, _, expected = next((a for a in answers() if a[0].kind == kind), answers()[1])
    try:
        answer = admit(data, asked, expected=expected, max_bytes=CAP)
    except AnswerRejected as error:
        require(error.client == asked.client, "a refusal that names another client")
        require(error.detail.isprintable() and error.rule.isprintable(), "a refusal that is not one printable line")
        require(len(error.detail) <= 2500, f"a refusal of {len(error.detail)} characters")
        raise
    shapes = {key: x.shape for key, x in answer.arrays.items()}
    require(expected is None or shapes == expected, f"arrays {shapes} instead of {expected}")
    require(all(np.isfinite(x).all() and (abs(x) <= MAX_VALUE).all() for x in answer.arrays.values()), "absurd values")
    require(asked.kind not in ("train", "measure") or 1 <= answer.examples <= MAX_EXAMPLES, "an absurd weight")
    require(all(abs(x) <= MAX_MEASURE for x in answer.metrics.values()), "an absurd measure")
    return answer


def _messages() -> list[Target]:
    questions = [encode_ask(h, a, codec) for h, a in asks() for codec in CODECS]
    said = [encode_answer(h, a, codec) for h, a, _ in answers() for codec in CODECS]
    failed = encode_answer(replace(HEADER, kind="error"), Answer(info={"error": "TrainingError", "message": "no rows"}))
    blocks = [encode_block(b) for b in asks()[1][1].blocks]
    states = [encode_state(state()), encode_state(replace(state(), tasks={}, memory={}))]

    def target(name: str, seeds: Sequence[bytes], read: Callable[[bytes], object], error: type[Exception]) -> Target:
        return of_bytes(name, seeds, [frame], read, error, large=large_frame)

    return [
        target("wire/peek", [*questions, *said], lambda data: peek(data, max_bytes=CAP), WireError),
        target("wire/ask", questions, _read_ask, WireError),
        target("wire/answer", said, _read_answer, WireError),
        target("wire/state", states, _read_state, WireError),
        target("wire/block", blocks, _read_block, WireError),
        target("server/admit", [*said, failed], _read_answered, AnswerRejected),
    ]


def targets() -> dict[str, Target]:
    """All targets, by name."""
    from simulations.benchmarks.fuzz_files import file_targets  # they need what is above
    from simulations.benchmarks.fuzz_release import release_targets
    from simulations.benchmarks.fuzz_transport import transport_targets

    found = (*_messages(), *transport_targets(), *release_targets(), *file_targets())
    return {target.name: target for target in found}


def is_documented(error: BaseException, target: Target) -> bool:
    """Whether the reader says that it raises this. Raises: Unsound if the text fits no log."""
    if not isinstance(error, target.errors):
        return False
    if isinstance(error, FedLoRAError):
        require(len(str(error)) <= TEXT, f"an error of {len(str(error)):,} characters: {str(error)[:80]}")
    return True
