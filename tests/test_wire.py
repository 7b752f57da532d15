"""Messages survive the wire bit for bit, and everything that is not a message is refused with its own words."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedlora.adapter import Adapter, Factors
from fedlora.codec import rounded
from fedlora.errors import WireError
from fedlora.frame import body
from fedlora.state import (
    Answer,
    Ask,
    Block,
    GlobalState,
    Header,
    Layout,
    LocalTraining,
    Module,
    Task,
    TrainPlan,
    expected_shapes,
)
from fedlora.wire import (
    blocks_id,
    decode_answer,
    decode_ask,
    decode_state,
    encode_answer,
    encode_ask,
    encode_blocks,
    encode_state,
    peek,
)

CAP = 10**7
CODECS = ("float32", "float16", "bfloat16", "int8", "int4")
HEADER = Header(run="run-1", round=3, client="hôpital 7", kind="train", base="abc", version=2, attempt=1, phase=4)
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=None, local_epochs=0.1, batch_size=4, clip_norm=None)
PLAN = TrainPlan(
    method="flora",
    rank=4,
    rows=8,
    scale=1 / 3,
    train=("A", "B"),
    send=("A", "B", "head"),
    changes=("B",),
    a_from="public",
    a_seed=2**40,
    training=TRAINING,
    progress=(0.25, 0.5),
    seed=7,
)
LAYOUT = Layout(modules={"v": Module(out=3, inp=6), "q": Module(out=6, inp=6)}, head={"score.weight": (2, 6)})
EXPECTED = expected_shapes(PLAN, LAYOUT)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def adapter(rank: int, seed: int = 0, scale: float = 1.0) -> Adapter:
    g = rng(seed)
    return Adapter(
        {
            n: Factors(
                g.normal(size=(rank, m.inp)).astype(np.float32), g.normal(size=(m.out, rank)).astype(np.float32), scale
            )
            for n, m in LAYOUT.modules.items()
        }
    )


def in_codec(value, codec):
    """The ask or answer with every array as the codec can say it."""

    def factors(ad: Adapter) -> Adapter:
        return Adapter({n: Factors(rounded(f.a, codec), rounded(f.b, codec), f.scale) for n, f in ad.items()})

    arrays = {k: x if x.ndim != 2 or k.startswith("probe:") else rounded(x, codec) for k, x in value.arrays.items()}
    if isinstance(value, Answer):
        return replace(value, arrays=arrays)
    blocks = tuple(replace(b, adapter=factors(b.adapter)) for b in value.blocks)
    return replace(value, blocks=blocks, frozen=factors(value.frozen), arrays=arrays)


def ask() -> Ask:
    return Ask(
        plan=PLAN,
        blocks=(Block(adapter=adapter(3, 1), born=1), Block(adapter=adapter(0, 2, 0.1), born=2)),
        frozen=adapter(2, 3, -1 / 3),
        arrays={"B:q": rng(4).normal(size=(6, 4)).astype(np.float32), "probe:q": rng(5).normal(size=4)},
    )


def answer() -> Answer:
    arrays = {k: rng(i).normal(size=s).astype(np.float32) for i, (k, s) in enumerate(EXPECTED.items())}
    return Answer(examples=12, metrics={"loss": np.float32(0.1), "steps": 3}, arrays=arrays, info={"rank": [4, None]})


def reframed(message: bytes, change) -> bytes:
    """The message with its header and bodies changed by `change(values, bodies)`, sizes and digests put right."""
    size = int.from_bytes(message[4:8], "little")
    values, at, bodies = json.loads(message[8 : 8 + size]), 8 + size, []
    for nbytes, _, _ in values["bodies"]:
        bodies.append(message[at : at + nbytes])
        at += nbytes
    change(values, bodies)
    if values.get("bodies"):
        counts = [entry[1] for entry in values["bodies"]]
        values["bodies"] = [[len(b), n, hashlib.sha256(b).hexdigest()] for b, n in zip(bodies, counts, strict=True)]
    return framed(json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False), bodies)


def framed(header: str, bodies: list[bytes]) -> bytes:
    raw = header.encode()
    return b"FLW1" + len(raw).to_bytes(4, "little") + raw + b"".join(bodies)


def with_table(message: bytes, change) -> bytes:
    """The message with the table of its first body changed."""

    def rewrite(values, bodies):
        size = int.from_bytes(bodies[0][:8], "little")
        table = json.loads(bodies[0][8 : 8 + size])
        change(table)
        raw = json.dumps(table).encode()
        bodies[0] = len(raw).to_bytes(8, "little") + raw + bodies[0][8 + size :]

    return reframed(message, rewrite)


class TestRoundTrip:
    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("exact", [True, False], ids=["in the codec", "anything"])
    def test_ask(self, codec, exact):
        sent = in_codec(ask(), codec) if exact else ask()
        data = encode_ask(HEADER, sent, codec)
        header, got = decode_ask(data, max_bytes=len(data))
        assert header == HEADER == peek(data, max_bytes=len(data))
        assert got.plan == PLAN
        assert [b.born for b in got.blocks] == [1, 2]
        pairs = [
            (got.frozen, sent.frozen),
            *((x.adapter, y.adapter) for x, y in zip(got.blocks, sent.blocks, strict=True)),
        ]
        for mine, theirs in pairs:
            assert mine.ranks == theirs.ranks
            for name, f in mine.items():
                assert f.scale == theirs[name].scale
                for x, y in ((f.a, theirs[name].a), (f.b, theirs[name].b)):
                    np.testing.assert_array_equal(x, y)
                    assert x.dtype == np.float32
                    assert x.flags.c_contiguous
                    assert not x.flags.writeable
        np.testing.assert_array_equal(got.arrays["probe:q"], sent.arrays["probe:q"].astype(np.float32))
        np.testing.assert_array_equal(got.arrays["B:q"], sent.arrays["B:q"])

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("exact", [True, False], ids=["in the codec", "anything"])
    def test_answer(self, codec, exact):
        sent = in_codec(answer(), codec) if exact else answer()
        header, got = decode_answer(encode_answer(HEADER, sent, codec), max_bytes=CAP, expected=EXPECTED)
        assert header == HEADER
        assert (got.examples, got.info) == (12, {"rank": [4, None]})
        assert got.metrics == {"loss": float(np.float32(0.1)), "steps": 3.0}
        assert got.arrays.keys() == EXPECTED.keys()
        for key, x in got.arrays.items():
            np.testing.assert_array_equal(x, sent.arrays[key])

    @pytest.mark.parametrize(("codec", "times"), [("float16", 2.0), ("bfloat16", 2.0), ("int8", 4.0), ("int4", 7.5)])
    def test_what_the_codec_can_say_is_as_small_as_it_promises(self, codec, times):
        big = Answer(arrays={"A:q": rng(1).normal(size=(8, 4096)), "B:q": rng(2).normal(size=(4096, 8))})
        plain, small = len(encode_answer(HEADER, big)), len(encode_answer(HEADER, in_codec(big, codec), codec))
        assert plain / small == pytest.approx(times, rel=0.01)
        assert len(encode_answer(HEADER, big, codec)) >= plain  # what it cannot say goes whole

    def test_hello_has_no_plan_and_no_arrays(self):
        hello = Header(run="r", round=0, client="c", kind="hello")
        assert decode_ask(encode_ask(hello, Ask()), max_bytes=CAP) == (hello, Ask())
        assert decode_answer(encode_answer(hello, Answer()), max_bytes=CAP, expected={}) == (hello, Answer())

    def test_float32_is_not_copied(self):
        data = encode_answer(HEADER, answer())
        _, got = decode_answer(data, max_bytes=CAP)
        start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        for x in got.arrays.values():
            at = x.__array_interface__["data"][0]
            assert start <= at < start + len(data)
            assert at % 4 == 0

    def test_bodies_are_safetensors_files(self):
        data = encode_answer(HEADER, in_codec(answer(), "float16"), "float16")
        theirs = load(data[8 + int.from_bytes(data[4:8], "little") :])
        assert {k.removeprefix("array/") for k in theirs} == EXPECTED.keys()
        for key, x in theirs.items():
            np.testing.assert_array_equal(x, answer().arrays[key.removeprefix("array/")].astype(np.float16))

    def test_same_value_same_bytes(self):
        backwards = replace(answer(), arrays=dict(reversed(answer().arrays.items())))
        assert encode_answer(HEADER, answer()) == encode_answer(HEADER, backwards)
        fortran = replace(ask(), arrays={k: np.asfortranarray(x) for k, x in ask().arrays.items()})
        assert encode_ask(HEADER, ask()) == encode_ask(HEADER, fortran)

    def test_blocks_encoded_once_give_the_same_bytes(self):
        sent = ask()
        shared = encode_blocks(sent.blocks, "bfloat16")
        assert encode_ask(HEADER, sent, "bfloat16", shared=shared) == encode_ask(HEADER, sent, "bfloat16")
        with pytest.raises(WireError, match="ask to hôpital 7: the shared body is of 2 blocks in bfloat16"):
            encode_ask(HEADER, sent, "float32", shared=shared)
        with pytest.raises(WireError, match="call encode_blocks on the blocks of this round"):
            encode_ask(HEADER, ask(), "bfloat16", shared=shared)

    @settings(deadline=None, max_examples=30)
    @given(
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.integers(0, 3), max_size=5),
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, allow_infinity=False)
        ),
    )
    @example({"\U0010ffff": 0, "": 1, "/": 2}, {})
    def test_any_names_and_numbers(self, sizes, metrics):
        sent = Answer(metrics=metrics, arrays={k: np.ones((n,) * n, np.float32) for k, n in sizes.items()})
        _, got = decode_answer(encode_answer(HEADER, sent), max_bytes=CAP)
        assert got.metrics == sent.metrics
        assert {k: x.shape for k, x in got.arrays.items()} == {k: x.shape for k, x in sent.arrays.items()}

    def test_blocks_id_is_about_content(self):
        blocks = ask().blocks
        _, got = decode_ask(encode_ask(HEADER, ask()), max_bytes=CAP)
        assert blocks_id(got.blocks) == blocks_id(blocks)
        later = tuple(replace(b, born=9) for b in blocks)
        assert blocks_id(later) == blocks_id(blocks)
        assert (
            len({blocks_id(x) for x in (blocks, blocks[:1], (), (Block(adapter=adapter(3, 9), born=1), blocks[1]))})
            == 4
        )


class TestState:
    def state(self) -> GlobalState:
        return GlobalState(
            version=5,
            base="abc",
            layout=LAYOUT,
            tasks={
                "z/0": Task(name="z/0", blocks=ask().blocks, sealed=True, statistics={"b": 0.1, "a": 1e300}),
                "a": Task(
                    name="a",
                    pair=adapter(2, 6, 2.0),
                    extras={"score.weight": np.asfortranarray(rng().normal(size=(2, 6)))},
                    public_seed=3,
                ),
            },
            memory={
                "z": {"y": np.arange(4), "x": np.float64(0.1) * np.ones(())},
                "a": {"h": np.ones(3, np.float16), "b": np.ones((2, 0), ml_dtypes.bfloat16), "t": np.array([True])},
            },
        )

    def test_is_lossless(self):
        state = self.state()
        got = decode_state(encode_state(state))
        assert encode_state(got) == encode_state(state)
        assert (got.version, got.base, got.layout) == (5, "abc", LAYOUT)
        assert list(got.layout.modules) == ["v", "q"]
        assert list(got.tasks) == ["z/0", "a"]
        for name, task in state.tasks.items():
            mine = got.tasks[name]
            assert (mine.name, mine.sealed, mine.public_seed) == (task.name, task.sealed, task.public_seed)
            assert list(mine.statistics.items()) == list(task.statistics.items())
            assert blocks_id(mine.blocks) == blocks_id(task.blocks)
            assert [b.born for b in mine.blocks] == [b.born for b in task.blocks]
        assert got.tasks["z/0"].pair is None
        assert got.tasks["a"].pair.digest == state.tasks["a"].pair.digest
        np.testing.assert_array_equal(got.tasks["a"].extras["score.weight"], state.tasks["a"].extras["score.weight"])
        assert [list(x) for x in got.memory.values()] == [["y", "x"], ["h", "b", "t"]]
        for owner, named in state.memory.items():
            for name, x in named.items():
                assert got.memory[owner][name].dtype == x.dtype
                np.testing.assert_array_equal(got.memory[owner][name], x)

    def test_kinds_are_not_mixed_up(self):
        with pytest.raises(WireError, match="expected a message of kind state, got 'ask'"):
            decode_state(encode_ask(HEADER, ask()))
        with pytest.raises(WireError, match="expected a message of kind ask or answer, got 'state'"):
            peek(encode_state(self.state()), max_bytes=CAP)

    def test_fields_of_a_task_are_checked(self):
        def change(values, bodies):
            values["tasks"][0]["sealed"] = 1

        with pytest.raises(WireError, match=r"tasks\.sealed must be bool, got 1"):
            decode_state(reframed(encode_state(self.state()), change))


class TestNotSent:
    @pytest.mark.parametrize("codec", CODECS)
    def test_what_a_codec_cannot_say_travels_in_float32(self, codec):
        for value in (70000.1, 3.4e38, np.inf, np.nan):
            odd = replace(answer(), arrays={**answer().arrays, "A:q": np.full((4, 6), value, np.float32)})
            _, got = decode_answer(encode_answer(HEADER, odd, codec), max_bytes=CAP, expected=EXPECTED)
            np.testing.assert_array_equal(got.arrays["A:q"], odd.arrays["A:q"])  # not for the wire to judge

    def test_float32_overflow_is_refused_by_name(self):
        with pytest.raises(WireError, match=r"B:q: 1e\+300 overflows float32"):
            encode_answer(HEADER, replace(answer(), arrays={"B:q": np.array([1e300])}))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_numbers_that_are_not_finite(self, value):
        with pytest.raises(WireError, match="not plain, finite JSON"):
            encode_answer(HEADER, Answer(metrics={"loss": value}))
        with pytest.raises(WireError, match="not plain, finite JSON"):
            encode_ask(HEADER, Ask(plan=replace(PLAN, scale=value)))

    def test_facts_that_are_not_json(self):
        with pytest.raises(WireError, match="not plain, finite JSON"):
            encode_answer(HEADER, Answer(info={"x": {1, 2}}))

    def test_unknown_wire_dtype(self):
        with pytest.raises(WireError, match="unknown wire codec 'int3'; known: float32, float16, bfloat16, int8, int4"):
            encode_answer(HEADER, Answer(), "int3")

    def test_unknown_array_dtype_and_absurd_names(self):
        with pytest.raises(WireError, match="x: arrays of dtype complex128 do not travel"):
            body({"x": np.ones(2, np.complex128)})
        with pytest.raises(WireError, match="names are at most 512 bytes"):
            body({"x" * 600: np.ones(2)})

    def test_a_header_above_the_cap(self):
        with pytest.raises(WireError, match=r"answer: the header takes \d+ bytes, more than the 1048576 allowed"):
            encode_answer(HEADER, Answer(info={"x": "y" * (1 << 20)}))


class TestRefused:
    def refuse(self, data: bytes, match: str, **options):
        with pytest.raises(WireError, match=match):
            decode_answer(data, **{"max_bytes": CAP, "expected": EXPECTED, **options})

    def test_size_cap(self):
        data = encode_answer(HEADER, answer())
        self.refuse(data, f"a message of {len(data)} bytes is above the cap of 100", max_bytes=100)
        with pytest.raises(WireError, match="above the cap of 100"):
            peek(data, max_bytes=100)

    def test_header_cap_is_checked_before_parsing(self):
        self.refuse(b"FLW1" + (2**31).to_bytes(4, "little") + b"{}", "a header of 2147483648 bytes is above the cap")

    @pytest.mark.parametrize("data", [b"", b"FL", b"PK\x03\x04zip", b"\x80\x04\x95pickle", b"\x93NUMPY"])
    def test_bad_magic(self, data):
        self.refuse(data, "not a fedlora message")

    def test_every_prefix_is_torn(self):
        data = encode_answer(HEADER, answer())
        for size in [4, 6, 8, 40, len(data) // 2, len(data) - 1]:
            self.refuse(data[:size], "torn message|header")

    def test_trailing_bytes(self):
        self.refuse(encode_answer(HEADER, answer()) + b"\0\0", "2 bytes follow the end of the message")

    def test_a_flipped_bit_in_a_body(self):
        data = bytearray(encode_answer(HEADER, answer()))
        data[-3] ^= 1
        self.refuse(bytes(data), "the body does not match its SHA-256")

    @settings(deadline=None, max_examples=50)
    @given(st.data())
    def test_any_damage_is_a_wire_error(self, data):
        message = bytearray(encode_answer(HEADER, answer()))
        for _ in range(data.draw(st.integers(1, 4))):
            message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
        try:
            decode_answer(bytes(message), max_bytes=CAP, expected=EXPECTED)
        except WireError:
            return
        # only the header's own text can change unnoticed: it is the channel that vouches for it
        size = int.from_bytes(message[4:8], "little")
        assert bytes(message[8 + size :]) == encode_answer(HEADER, answer())[8 + size :]

    def test_unknown_kind(self):
        self.refuse(encode_ask(HEADER, ask()), "expected a message of kind answer, got 'ask'")
        self.refuse(framed('{"kind":"pickle"}', []), "got 'pickle'")

    @pytest.mark.parametrize(
        ("header", "match"),
        [
            ("[1]", "must be a JSON object, got list"),
            ("{", "the header is not JSON"),
            ('{"kind":"answer","kind":"answer"}', r"duplicate keys in JSON: \['kind'\]"),
            ('{"kind":"answer","metrics":NaN}', "NaN is not a JSON number"),
            ('{"kind":"answer","metrics":-Infinity}', "-Infinity is not a JSON number"),
            ('{"kind":"answer","metrics":1e999}', "not plain, finite JSON"),
            ('{"kind": "answer"}', "not canonical JSON"),
            ('{"kind":"answer","x":"\\ud800"}', "not plain, finite JSON"),
            ("[" * 100_000, "the header is not JSON"),
            ('{"kind":"answer","x":' + "1" * 5000 + "}", "the header is not JSON"),
            ('{"kind":"answer"}', r"answer: fields differ; missing \['bodies', 'codec', 'examples', 'header'"),
        ],
    )
    def test_headers_that_are_no_headers(self, header, match):
        self.refuse(framed(header, []), match)

    @pytest.mark.parametrize(
        ("field", "value", "match"),
        [
            ("round", "3", r"header\.round must be int, got '3'"),
            ("round", True, r"header\.round must be int, got True"),
            ("round", 3.0, r"header\.round must be int, got 3\.0"),
            ("client", None, r"header\.client must be str, got None"),
            ("kind", "steal", r"header\.kind must be .*Literal.*, got 'steal'"),
        ],
    )
    def test_fields_of_another_type(self, field, value, match):
        data = reframed(encode_answer(HEADER, answer()), lambda v, b: v["header"].update({field: value}))
        self.refuse(data, match)
        with pytest.raises(WireError, match=match):
            peek(data, max_bytes=CAP)

    def test_unknown_and_missing_fields(self):
        data = encode_answer(HEADER, answer())
        self.refuse(
            reframed(data, lambda v, b: v.update(extra=1)), r"answer: fields differ; missing \[\], unknown \['extra'\]"
        )
        self.refuse(reframed(data, lambda v, b: v["header"].pop("run")), r"header: fields differ; missing \['run'\]")
        self.refuse(reframed(data, lambda v, b: v["metrics"].update(loss="x")), r"metrics\.loss must be float, got 'x'")
        self.refuse(reframed(data, lambda v, b: v["metrics"].update(loss=10**400)), r"metrics\.loss must be float")
        self.refuse(reframed(data, lambda v, b: v.update(examples=-1.5)), r"examples must be int, got -1\.5")
        self.refuse(reframed(data, lambda v, b: v.update(header=[])), r"header must be an object, got \[\]")
        self.refuse(reframed(data, lambda v, b: v.update(codec="F64")), r"codec must be .*Literal.*, got 'F64'")
        self.refuse(reframed(data, lambda v, b: v.update(bodies=[])), "expected 1 bodies, got 0")

        def nested(values, bodies):
            values["plan"]["training"]["momentum"] = 0.9

        with pytest.raises(WireError, match=r"plan\.training: fields differ; missing \[\], unknown \['momentum'\]"):
            decode_ask(reframed(encode_ask(HEADER, ask()), nested), max_bytes=CAP)

    def test_keys_and_shapes_against_the_plan(self):
        def changed(key: str, x) -> bytes:
            arrays = {k: v for k, v in answer().arrays.items() if k != key}
            return encode_answer(HEADER, replace(answer(), arrays=arrays if x is None else {**arrays, key: x}))

        self.refuse(changed("A:q", None), r"missing \['A:q'\], extra \[\]")
        self.refuse(changed("A:k", np.ones(2)), r"missing \[\], extra \['A:k'\]")
        self.refuse(changed("A:q", np.ones((1, 6))), re.escape("A:q has shape (1, 6), expected (4, 6)"))
        self.refuse(changed("A:q", np.ones((6, 4))), re.escape("A:q has shape (6, 4), expected (4, 6)"))
        self.refuse(changed("A:q", np.ones(6)), re.escape("A:q has 1 dimensions (6,), expected 2: (4, 6)"))
        self.refuse(changed("A:q", np.ones(())), re.escape("A:q has 0 dimensions (), expected 2: (4, 6)"))

    def test_dtypes(self):
        data = encode_answer(HEADER, in_codec(answer(), "float16"), "float16")
        self.refuse(reframed(data, lambda v, b: v.update(codec="float32")), "has dtype F16, this message's are F32")
        probe = Answer(arrays={"probe:q": np.ones(3)})

        def narrow(values, bodies):
            bodies[0] = save({"array/probe:q": np.ones(3, np.float16)})

        self.refuse(reframed(encode_answer(HEADER, probe, "float16"), narrow), "probe:q has dtype F16; probes travel")

    def test_packed_arrays(self):
        data = encode_answer(HEADER, in_codec(answer(), "int8"), "int8")
        [packed] = json.loads(data[8 : 8 + int.from_bytes(data[4:8], "little")])["packed"]
        assert packed == {f"array/{k}": list(shape) for k, shape in EXPECTED.items()}

        def shapes(change):
            return reframed(data, lambda v, b: change(v["packed"][0]))

        self.refuse(shapes(lambda p: p.pop("array/A:q")), "A:q has dtype U8, this message's are F32")
        self.refuse(shapes(lambda p: p.update({"array/A:z": [1, 1]})), r"arrays that are not there.*array/A:z")
        self.refuse(
            shapes(lambda p: p.update({"array/A:q": [6, 4]})), re.escape("A:q has shape (6, 4), expected (4, 6)")
        )
        self.refuse(shapes(lambda p: p.update({"array/A:q": [5, 6]})), re.escape("bytes do not hold int8 (5, 6)"))
        self.refuse(shapes(lambda p: p.update({"array/A:q": [2**40, 2**40]})), "bytes do not hold int8")
        self.refuse(shapes(lambda p: p.update({"array/A:q": [-4, -6]})), "A:q")
        self.refuse(shapes(lambda p: p.update({"array/A:q": [24]})), "packed.array/A:q must be tuple")
        self.refuse(reframed(data, lambda v, b: v.update(codec="float32")), "not packed")
        self.refuse(reframed(data, lambda v, b: v.update(codec="int4")), "bytes do not hold int4")
        self.refuse(reframed(data, lambda v, b: v.update(packed=[])), "expected the shapes of 1 bodies, got 0")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t: t.clear(), "the table lists 0 arrays, the header announced 5"),
            (lambda t: t["array/A:q"].update(dtype="Q7"), "array/A:q: unknown dtype 'Q7'"),
            (lambda t: t["array/A:q"].update(dtype=["F32"]), "array/A:q: unknown dtype"),
            (lambda t: t["array/A:q"].update(shape=[-4, -6]), r"shape \(-4, -6\) is impossible"),
            (lambda t: t["array/A:q"].update(shape=[1] * 60 + [4, 6]), "is impossible"),
            (lambda t: t["array/A:q"].update(shape=[4, 7]), r"do not hold F32 \(4, 7\)"),
            (lambda t: t["array/A:q"].update(shape=[2**62, 2**62]), "do not hold F32"),
            (lambda t: t["array/A:q"].update(data_offsets=[0, 8]), "do not hold F32"),
            (
                lambda t: t["array/A:v"].update(data_offsets=t["array/A:q"]["data_offsets"]),
                "next to the array before it",
            ),
            (lambda t: t["array/A:q"].update(data_offsets=[0]), "array/A:q: data_offsets must be"),
            (lambda t: t["array/A:q"].update(x=1), r"array/A:q: fields differ; missing \[\], unknown \['x'\]"),
            (lambda t: t["array/A:q"].pop("shape"), r"array/A:q: fields differ; missing \['shape'\]"),
            (lambda t: t.update({"other": t.pop("array/A:q")}), "arrays differ from the plan's"),
        ],
    )
    def test_tables_that_lie(self, change, match):
        self.refuse(with_table(encode_answer(HEADER, answer()), change), match)

    def test_arrays_beyond_the_body_and_bytes_beyond_the_arrays(self):
        data = encode_answer(HEADER, answer())
        self.refuse(
            reframed(data, lambda v, b: b.__setitem__(0, b[0][:-4])), r"ends at byte \d+ of a body that has \d+"
        )
        self.refuse(
            reframed(data, lambda v, b: b.__setitem__(0, b[0] + b"1234")), "4 bytes of a body belong to no array"
        )

    def test_too_many_arrays_are_refused_before_the_table_is_parsed(self):
        def many(values, bodies):
            values["bodies"][0][1] = 10**9

        self.refuse(
            reframed(encode_answer(HEADER, answer()), many), "a body of 1000000000 arrays is above the cap of 65536"
        )

        def few(values, bodies):
            values["bodies"][0][1] = 0
            bodies[0] = (5000).to_bytes(8, "little") + b"{" + b" " * 4998 + b"}"

        self.refuse(reframed(encode_answer(HEADER, answer()), few), "a table of 5000 bytes does not fit")

    def test_duplicate_and_nested_tables(self):
        def duplicate(values, bodies):
            bodies[0] = (14).to_bytes(8, "little") + b'{"a":1,"a":2} '

        self.refuse(reframed(encode_answer(HEADER, answer()), duplicate), r"duplicate keys in JSON: \['a'\]")

        def nested(values, bodies):
            bodies[0] = (4000).to_bytes(8, "little") + b"[" * 4000

        self.refuse(
            reframed(encode_answer(HEADER, answer()), nested),
            "a table of 4000 bytes has more values than 5 arrays need",
        )

    def test_arrays_that_belong_to_nothing(self):
        def rename(table):
            table["stray"] = table.pop("array/A:q")

        data = with_table(encode_answer(HEADER, answer()), rename)
        self.refuse(data, r"arrays that belong to nothing: \['stray'\]", expected=None)

    def test_adapters_that_do_not_fit_together(self):
        data = encode_ask(HEADER, ask())
        half = with_table(data, lambda t: t.update({"array/x": t.pop("frozen/b/q")}))
        with pytest.raises(WireError, match="array frozen/b/q is missing"):
            decode_ask(half, max_bytes=CAP)
        skewed = with_table(data, lambda t: t["frozen/a/q"].update(shape=[6, 2]))
        with pytest.raises(WireError, match=r"q: factors need a .* with one rank"):
            decode_ask(skewed, max_bytes=CAP)
        with pytest.raises(WireError, match=r"scales for modules that are not there: \['k'\]"):
            decode_ask(reframed(data, lambda v, b: v["frozen"].update(k=2.0)), max_bytes=CAP)
        with pytest.raises(WireError, match="arrays that belong to nothing"):
            decode_ask(reframed(data, lambda v, b: v["blocks"].pop()), max_bytes=CAP)
