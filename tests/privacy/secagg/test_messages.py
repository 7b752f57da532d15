"""Messages survive bytes, and no bytes whatever do anything but give a message or a WireError."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import WireError
from fedlora.privacy.secagg import messages as m
from fedlora.privacy.secagg.field import SHARE_BYTES

fast = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
ids = st.binary(min_size=32, max_size=32).map(bytes.hex)
keys = st.binary(min_size=32, max_size=32)
signatures = st.binary(min_size=64, max_size=64)
sealed = st.builds(m.Sealed, ids, keys, keys, st.binary(min_size=m.SEALED_BYTES, max_size=m.SEALED_BYTES))
shares = st.tuples(ids, st.binary(min_size=SHARE_BYTES, max_size=SHARE_BYTES))
adverts = st.builds(
    m.Advertise, session=keys, sender=ids, channel_key=keys, mask_key=keys, seed_commitment=keys, signature=signatures
)
few = {"max_size": 4}
up = st.one_of(
    adverts,
    st.builds(
        m.Shares, session=keys, sender=ids, own_commitment=keys, sealed=st.lists(sealed, **few).map(tuple),
        signature=signatures,
    ),
    st.builds(m.Confirm, session=keys, sender=ids, shared=keys, survivors=keys, signature=signatures),
    st.builds(
        m.Unmask, session=keys, sender=ids, seeds=st.lists(shares, **few).map(tuple),
        keys=st.lists(shares, **few).map(tuple), signature=signatures,
    ),
)  # fmt: skip
lists = st.lists(ids, **few).map(tuple)
down = st.one_of(
    st.builds(m.Survivors, session=keys, ids=lists),
    st.builds(m.Deliveries, session=keys, shared=lists, sealed=st.lists(sealed, **few).map(tuple)),
    st.builds(m.Advertisements, session=keys, entries=st.lists(adverts, **few).map(tuple)),
    st.builds(
        m.UnmaskRequest, session=keys, alive=lists, gone=lists,
        signatures=st.lists(st.tuples(ids, signatures), **few).map(tuple),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def context(sessions: ModuleType) -> Any:
    return sessions.federation(5).session()[0]


@fast
@given(message=up)
def test_up_and_back(context: Any, message: Any) -> None:
    assert m.from_client(message.to_bytes(), context) == message
    with pytest.raises(WireError):
        m.from_server(message.to_bytes(), context)


@fast
@given(message=down)
def test_down_and_back(context: Any, message: Any) -> None:
    assert m.from_server(message.to_bytes(), context) == message
    with pytest.raises(WireError):
        m.from_client(message.to_bytes(), context)


def test_masked_vectors_and_back_without_a_copy(context: Any) -> None:
    words = np.arange(37, dtype=np.uint32)
    data = m.Masked(session=bytes(32), sender="a" * 64, words=words, tag=bytes(16)).to_bytes()
    back = m.from_client(data, context)
    assert isinstance(back, m.Masked)
    np.testing.assert_array_equal(back.words, words)
    assert not back.words.flags.owndata
    assert back.words.flags.aligned
    assert len(data) == 4 * 37 + 96


@fast
@given(message=st.one_of(up, down), data=st.data())
def test_altered_bytes_give_another_message_or_an_error(context: Any, message: Any, data: st.DataObject) -> None:
    whole = message.to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(["cut", "flip", "grow", "insert"]))
    bad = {
        "cut": whole[:at],
        "flip": whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :],
        "grow": whole + data.draw(st.binary(min_size=1, max_size=9)),
        "insert": whole[:at] + data.draw(st.binary(min_size=1, max_size=9)) + whole[at:],
    }[how]
    for read in (m.from_client, m.from_server):
        try:
            other = read(bad, context)
        except WireError:
            continue
        assert other.to_bytes() == bad
        assert other != message


@fast
@given(data=st.binary(max_size=300), kind=st.integers(0, 255))
def test_any_bytes(context: Any, data: bytes, kind: int) -> None:
    for whole in (data, b"fsagg-1" + bytes([kind]) + data):
        for read in (m.from_client, m.from_server):
            with contextlib.suppress(WireError):
                assert read(whole, context).to_bytes() == whole


@pytest.mark.parametrize("count", [5, 6, 2**32 - 1])
def test_counts_beyond_the_session_s_are_refused_before_they_are_read(context: Any, count: int) -> None:
    head = b"fsagg-1" + bytes([m.Shares.KIND]) + bytes(96) + count.to_bytes(4, "little")
    with pytest.raises(WireError, match=f"{count} entries where at most 4"):
        m.from_client(head, context)


def test_signatures_cover_every_field(context: Any) -> None:
    advert = m.Advertise(session=bytes(32), sender="a" * 64, channel_key=b"b" * 32, mask_key=b"c" * 32,
                         seed_commitment=b"d" * 32, signature=bytes(64))  # fmt: skip
    covered = advert.signed_bytes()
    assert covered == advert.to_bytes()[:-64]
    for part in (bytes(32), bytes.fromhex("a" * 64), b"b" * 32, b"c" * 32, b"d" * 32):
        assert part in covered


def test_lists_have_no_order_in_their_digest() -> None:
    a, b = "a" * 64, "b" * 64
    assert m.digest_of([a, b]) == m.digest_of((b, a)) != m.digest_of([a])
