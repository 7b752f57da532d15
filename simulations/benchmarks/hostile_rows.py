"""What a hostile node sends, row by row: each builds one forged answer to one ask. See `hostile.py`."""

from __future__ import annotations

import io
import json
import os
import pickle
import secrets
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.relay import asked
from clients.worker import Worker
from fedlora.adapter import Array
from fedlora.deploy import read_node
from fedlora.envelope import ANSWER_OVERHEAD, SignedAsk, sign_answer
from fedlora.frame import Body, body, message
from fedlora.state import Answer, Header

__all__ = ["DEADLINE", "MAX_BYTES", "ROWS", "TOUCHED", "WHERE", "Case", "Row"]

MAX_BYTES: Final = 8_000_000  # wire.max_bytes of the run
DEADLINE: Final = 90.0  # seconds of a round
LATE: Final = 12.0  # seconds after it
TOUCHED: Final = "touched-by-pickle"
WHERE: Final = "HOSTILE_FOLDER"  # the environment variable that names the folder of that file


@dataclass
class Case:
    """One ask that the hostile node was given, its honest answer, and what it kept."""

    answer: Answer
    header: Header
    ask: SignedAsk
    layout: str
    key: Ed25519PrivateKey
    honest: bytes  # its honest answer, signed
    kept: Mapping[int, bytes]  # round -> the honest answer of that round, signed
    other: Path  # node.toml of an honest node, whose worker this one can reach
    signed_ask: bytes

    @property
    def payload(self) -> bytes:
        return self.honest[ANSWER_OVERHEAD:]

    @property
    def arrays(self) -> dict[str, Array]:
        return {key: np.array(x) for key, x in self.answer.arrays.items()}

    def sign(self, payload: bytes, **stated: Any) -> bytes:
        """Signed with its own real key; `stated` are fields of the header that it states instead of those asked."""
        return sign_answer(payload, self.ask, replace(self.header, **stated), self.layout, self.key)

    def said(self, arrays: Mapping[str, Array] | None = None, *, examples: object = None, **fields: Any) -> bytes:
        """A well-formed message with other contents, signed; `fields` are of its header."""
        own = body({f"array/{key}": x for key, x in (self.arrays if arrays is None else arrays).items()})
        return self.sign(self.framed(own, examples=examples, **fields))

    def framed(self, own: Body, *, examples: object = None, **fields: Any) -> bytes:
        values: dict[str, Any] = {
            "header": asdict(replace(self.header, **fields)),
            "examples": self.answer.examples if examples is None else examples,
            "metrics": dict(self.answer.metrics),
            "info": {},
            "codec": "float32",
            "packed": [{}],
        }
        return message("answer", values, [(own, own.entry())])

    def first(self, letter: str) -> str:
        """The key of the first array of a part."""
        return next(key for key in sorted(self.answer.arrays) if key.startswith(f"{letter}:"))

    def changed(self, letter: str, change: Callable[[Array], Array]) -> bytes:
        key = self.first(letter)
        return self.said({**self.arrays, key: change(self.arrays[key])})

    def every(self, change: Callable[[Array], Array]) -> bytes:
        return self.said({key: change(x) for key, x in self.arrays.items()})

    def header_text(self, old: str, new: str) -> bytes:
        """The honest message with a text of its JSON header replaced, which `fedlora.frame` would not write."""
        size = int.from_bytes(self.payload[4:8], "little")
        text = self.payload[8 : 8 + size].rstrip(b" ")
        if old.encode() not in text:
            raise ValueError(f"{old} is not in the header")
        text = text.replace(old.encode(), new.encode())
        text += b" " * (-len(text) % 8)
        return self.sign(b"FLW1" + len(text).to_bytes(4, "little") + text + self.payload[8 + size :])


@dataclass(frozen=True)
class Row:
    """What is sent in one round, and the rule that must refuse it; `accepted` where it may count."""

    what: str
    rule: str
    make: Callable[[Case], bytes]


def _set(value: float) -> Callable[[Array], Array]:
    def change(x: Array) -> Array:
        y = x.copy()
        y.flat[0] = value
        return y

    return change


def _wrong_rank(case: Case) -> bytes:
    """Every module of one rank more, consistently."""
    grown = {
        key: np.concatenate([x, x[:1]]) if key.startswith("A:") else np.concatenate([x, x[:, :1]], axis=1)
        for key, x in case.arrays.items()
    }
    return case.said(grown)


def _renamed(case: Case) -> bytes:
    key = case.first("A")
    return case.said({(f"{k}.x" if k == key else k): x for k, x in case.arrays.items()})


def _missing(case: Case) -> bytes:
    return case.said({k: x for k, x in case.arrays.items() if k != case.first("B")})


def _earlier(case: Case) -> bytes:
    return case.kept[min(case.kept)]


def _same_round(case: Case) -> bytes:
    """As an answer to an earlier sending of this very ask."""
    earlier = SignedAsk(nonce=secrets.token_bytes(32), payload=case.ask.payload)
    return sign_answer(case.payload, earlier, case.header, case.layout, case.key)


def _other_run(case: Case) -> bytes:
    return case.sign(case.payload, run="0" * 16)


def _as_another(case: Case) -> bytes:
    """Its own signature under the id of an honest node."""
    other = Worker(read_node(case.other)).id
    start = ANSWER_OVERHEAD - 64 - 32
    return case.honest[:start] + bytes.fromhex(other) + case.honest[start + 32 :]


def _by_another(case: Case) -> bytes:
    """An honest node's real signature over what it says to this ask, which was not meant for it."""
    return asked(str(read_node(case.other).meeting), case.signed_ask, patience=30.0)


def _stranger(case: Case) -> bytes:
    return sign_answer(case.payload, case.ask, case.header, case.layout, Ed25519PrivateKey.generate())


def _npz(case: Case) -> bytes:
    out = io.BytesIO()
    np.savez(out, *case.arrays.values())
    return case.sign(out.getvalue())


class _Touch:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {Path(os.environ[WHERE]) / TOUCHED}",)


def _pickle(case: Case) -> bytes:
    return case.sign(pickle.dumps(_Touch()))


def _zip_bomb(case: Case) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter.npy", bytes(256 * 2**20))
    return case.sign(out.getvalue())


def _absurd_table(case: Case) -> bytes:
    """A table that claims 2^80 numbers."""
    own = body({f"array/{key}": x for key, x in case.arrays.items()})
    size = int.from_bytes(own.data[:8], "little")
    table = json.loads(bytes(own.data[8 : 8 + size]))
    table[f"array/{case.first('A')}"]["shape"] = [2**40, 2**40]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return case.sign(case.framed(Body(len(text).to_bytes(8, "little") + text + own.data[8 + size :], own.tensors)))


def _nested(case: Case) -> bytes:
    text = b'{"a":' * 120_000
    return case.sign(b"FLW1" + len(text).to_bytes(4, "little") + text)


def _late(case: Case) -> bytes:
    time.sleep(DEADLINE + LATE)
    return case.honest


def _flip(case: Case) -> bytes:
    return case.honest[:-1] + bytes([case.honest[-1] ^ 1])


ROWS: Final[tuple[Row, ...]] = (
    Row("an honest answer (control)", "accepted", lambda c: c.honest),
    Row("one NaN", "not finite", lambda c: c.changed("A", _set(np.nan))),
    Row("one Inf", "not finite", lambda c: c.changed("B", _set(np.inf))),
    Row("a shape transposed", "malformed", lambda c: c.changed("B", lambda x: np.ascontiguousarray(x.T))),
    Row("a shape that broadcasts: one row of A", "malformed", lambda c: c.changed("A", lambda x: x[:1])),
    Row("a shape that broadcasts: ()", "malformed", lambda c: c.changed("A", lambda x: np.ones((), np.float32))),
    Row("an axis too many: (1, r, in)", "malformed", lambda c: c.changed("A", lambda x: x[None])),
    Row("rank + 1 in every module", "malformed", _wrong_rank),
    Row("dtype float64", "malformed", lambda c: c.changed("A", lambda x: x.astype(np.float64))),
    Row("dtype int32", "malformed", lambda c: c.changed("A", lambda x: x.astype(np.int32))),
    Row("a key renamed", "malformed", _renamed),
    Row("a key missing", "malformed", _missing),
    Row("a key too many", "malformed", lambda c: c.said({**c.arrays, "A:extra": np.zeros((2, 2), np.float32)})),
    Row("huge norm: values of 1e30", "absurd value", lambda c: c.every(lambda x: np.full_like(x, 1e30))),
    Row("huge norm: values of 9e5, below the cap", "screened", lambda c: c.every(lambda x: np.full_like(x, 9e5))),
    Row("zero norm: every value 0", "accepted", lambda c: c.every(np.zeros_like)),
    Row("0 examples", "example count", lambda c: c.said(examples=0)),
    Row("-5 examples", "example count", lambda c: c.said(examples=-5)),
    Row("NaN examples", "malformed", lambda c: c.header_text(f'"examples":{c.answer.examples}', '"examples":NaN')),
    Row("1e300 examples (a float)", "malformed", lambda c: c.said(examples=1e300)),
    Row("10**30 examples (a whole number)", "example count", lambda c: c.said(examples=10**30)),
    Row("replay: an answer to an earlier sending of this round", "stale", _same_round),
    Row("replay: its answer of round 1", "stale", _earlier),
    Row("of another run", "signature", _other_run),
    Row("another node's id over its own signature", "signature", _as_another),
    Row("another node's real signature", "other node", _by_another),
    Row("a key that is not enrolled", "other node", _stranger),
    Row("one bit changed after signing", "signature", _flip),
    Row("not signed", "not signed", lambda c: c.payload),
    Row("another base hash", "other base", lambda c: c.said(base="0" * 64)),
    Row("another code digest", "other code", lambda c: c.said(code="0" * 64)),
    Row("another round in the signed message", "not the answer asked for", lambda c: c.said(round=999)),
    Row("npz", "malformed", _npz),
    Row("a pickle that would run a command", "malformed", _pickle),
    Row("a zip bomb (256 MiB in 0.3)", "malformed", _zip_bomb),
    Row("a header of 4 GiB announced", "malformed", lambda c: c.sign(b"FLW1" + b"\xff" * 4 + c.payload[8:])),
    Row("JSON nested 120,000 deep", "malformed", _nested),
    Row("an array table that lies about sizes", "malformed", _absurd_table),
    Row("half of the message", "malformed", lambda c: c.sign(c.payload[: len(c.payload) // 2])),
    Row("nothing at all", "not signed", lambda c: b""),
    Row("above wire.max_bytes", "not signed", lambda c: c.sign(c.payload + bytes(MAX_BYTES))),
    Row("the same answer twice (its SuperNode)", "accepted", lambda c: c.honest),
    Row("a late answer", "deadline", _late),
    Row("an honest answer again (control)", "accepted", lambda c: c.honest),
)
