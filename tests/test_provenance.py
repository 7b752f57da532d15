"""Manifest, signature and verification: one byte string per manifest, and nothing tampered with passes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from typer.testing import CliRunner

from fedlora import provenance
from fedlora.adapter import Adapter, Factors
from fedlora.config import load_config, to_toml
from fedlora.errors import CheckpointError
from fedlora.pki import node_id
from fedlora.provenance import (
    Manifest,
    Ranks,
    canonical,
    chained,
    describe,
    list_files,
    parse,
    read_manifest,
    read_signature,
    rounds_of,
    sign,
    signature,
    state_digest,
    verify_signature,
)
from fedlora.state import GlobalState, Layout, Module, Subspace, Task
from fedlora.verification import Report, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = (KEY.public_key(),)
NOON = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
CONFIG = load_config(None, ["model.name=owner/base"])
MODULES = ("layers.0.q", "layers.1.q")


def state(seed: int = 0) -> GlobalState:
    rng = np.random.default_rng(seed)
    pair = Adapter(
        {
            n: Factors(rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(7, 2)).astype(np.float32))
            for n in MODULES
        }
    )
    task = Task(name="", pair=pair, public_seed=2**70, subspace=Subspace(dim=5, seed=3, start=1))
    layout = Layout(modules={n: Module(out=7, inp=5) for n in MODULES})
    return GlobalState(version=3, base="f" * 64, layout=layout, tasks={"": task})


def events() -> list[dict[str, Any]]:
    start = {"event": "start", "clients": [{"id": "hospital-a", "rank": 2}, {"id": "hospital-b", "rank": 4}]}
    refusal = {"client": "hospital-b", "rule": "not finite", "detail": "A has 3 NaN"}
    strange = {"client": "hospital-b", "rule": "my diagnosis: 7", "detail": ""}
    return [
        start,
        *(
            {
                "event": "round",
                "round": n,
                "state": state_digest(state(n)),
                "clients": [{"id": "hospital-a", "examples": 10}, {"id": "hospital-a", "task": "second"}],
                "refused": [refusal, strange, refusal] if n == 2 else [],
            }
            for n in (1, 2, 3)
        ),
    ]


def tensors(rank: int = 2, dtype: type = np.float32) -> dict[str, Any]:
    return {
        f"base_model.model.{n}.{side}.weight": np.full(shape, 0.5, dtype)
        for n in MODULES
        for side, shape in (("lora_A", (rank, 5)), ("lora_B", (7, rank)))
    }


def adapter_config(**changed: object) -> dict[str, object]:
    plain = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(MODULES),
        "modules_to_save": None,
        "base_model_name_or_path": "owner/base",
        "lora_dropout": 0.0,
    }
    return {**plain, **changed}


def write_release(folder: Path, config: dict[str, object] | None = None, weights: bytes | None = None) -> Manifest:
    where = folder / "adapter"
    where.mkdir(parents=True, exist_ok=True)
    (where / "README.md").write_text("A card.\n")
    (where / "adapter_config.json").write_text(json.dumps(adapter_config() if config is None else config))
    (where / "adapter_model.safetensors").write_bytes(save(tensors()) if weights is None else weights)
    manifest = describe(
        state(),
        CONFIG,
        run="a-run",
        ranks={"adapter": Ranks(smallest=2, largest=2, modules=2)},
        events=events(),
    )
    return write_signed(folder, replace(manifest, files=list_files(folder, [where])))


def write_signed(folder: Path, manifest: Manifest | bytes) -> Manifest:
    data = manifest if isinstance(manifest, bytes) else manifest.to_bytes()
    (folder / "manifest.json").write_bytes(data)
    sign(folder, KEY, now=lambda: NOON)
    return read_manifest(data)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    write_release(tmp_path / "run")
    return tmp_path / "run"


def said(report: Report) -> str:
    return "\n".join(report.findings)


# --- canonical JSON


def test_the_canonical_form_worked_out_by_hand() -> None:
    """UTF-16 puts U+1F600 (D83D DE00) before U+FB33, code points and UTF-8 the other way round."""
    value = {"\ufb33": [], "\U0001f600": {}, "b": [True, False, None, -7, 0], "a": 'é"\\/\n\x1f\x7f', "": 2**53 - 1}
    by_hand = (
        b'{"":9007199254740991,"a":"\xc3\xa9\\"\\\\/\\n\\u001f\x7f","b":[true,false,null,-7,0],'
        b'"\xf0\x9f\x98\x80":{},"\xef\xac\xb3":[]}'
    )
    assert canonical(value) == by_hand
    assert parse(by_hand) == value


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(VALUES)
def test_a_value_has_one_byte_string_and_it_is_plain_json(value: Any) -> None:
    data = canonical(value)
    assert parse(data) == value == json.loads(data)
    assert canonical(parse(data)) == data


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"b":1,"a":2}', "canonical"),
        (b'{"a": 1}', "canonical"),
        (b'{"a":1}\n', "canonical"),
        (b'"\\u0041"', "canonical"),
        (b'"\\/"', "canonical"),
        (b"-0", "canonical"),
        (b'{"a":1,"a":1}', "'a' is there more than once"),
        (b'[{"a":{"b":1,"b":1}}]', "'b' is there more than once"),
        (b"1.0", "only whole numbers"),
        (b"1e3", "only whole numbers"),
        (b"NaN", "only whole numbers"),
        (b"-Infinity", "only whole numbers"),
        (b"9007199254740992", "53 are exact"),
        (b"9" * 5000, "5000 digits"),
        (b"[" * 33 + b"]" * 33, "deeper than 32"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"[" + b"1," * 2**19 + b"1]", "more than 524,288 values"),
        (b'"' + b"x" * (8 * 2**20) + b'"', "at most 8,388,608"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        (b'"\\ud800"', "no Unicode text"),
        (b'{"\\ud800":1}', "no Unicode text"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"a":1}'.encode("utf-16"), "UTF-8"),
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
    ],
    ids=lambda x: repr(x[:20]),
)
def test_any_other_form_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        parse(data)


@pytest.mark.parametrize("value", [1.5, float("nan"), 2**53, {1: 2}, b"x", {"a": object()}])
def test_a_value_without_a_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="canonical JSON"):
        canonical(value)


TOKENS = (b'"', b"{", b"[", b"9" * 20, b"null", b",")


def mangled(draw: st.DrawFn) -> bytes:
    data = bytearray(EXAMPLE)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        cut = draw(st.integers(0, 12))
        data[at : at + cut] = draw(st.binary(max_size=4) | st.sampled_from(TOKENS))
    return bytes(data)


EXAMPLE = describe(state(), CONFIG, run="r", ranks={}, events=events()).to_bytes()


@settings(max_examples=150, deadline=None)
@given(st.composite(mangled)() | st.binary(max_size=40) | VALUES.map(canonical))
def test_the_readers_raise_nothing_but_our_errors(data: bytes) -> None:
    for read in (read_manifest, read_signature):
        with contextlib.suppress(CheckpointError):
            read(data)


# --- what a manifest says


def test_a_manifest_says_what_the_run_was_and_names_no_client(released: Path) -> None:
    data = (released / "manifest.json").read_bytes()
    manifest = read_manifest(data)
    assert manifest.to_bytes() == data
    assert b"hospital" not in data
    assert b"diagnosis" not in data
    assert manifest.settings == hashlib.sha256(to_toml(CONFIG).encode()).hexdigest()
    assert [r.participants for r in manifest.rounds] == [1, 1, 1]
    assert [dict(r.refused) for r in manifest.rounds] == [{}, {"not finite": 2, "other": 1}, {}]
    assert manifest.public[""].seed == str(2**70)
    assert manifest.public[""].basis == "3:1:5"
    assert manifest.privacy == "none claimed"
    assert manifest.code.versions["numpy"] == np.__version__
    weights = (released / "adapter/adapter_model.safetensors").read_bytes()
    entry = json.loads(data)["files"]["adapter/adapter_model.safetensors"]
    assert entry == {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}


def test_equal_runs_have_equal_manifests_and_at_the_same_second_equal_signatures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_release(tmp_path / name)
    for name in ("manifest.json", "manifest.sig"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_chain_worked_out_with_nothing_but_json_and_sha256() -> None:
    """The values hold only ASCII, so plain sorted JSON is the canonical form."""

    def plain(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    manifest = json.loads(EXAMPLE)
    link = hashlib.sha256(plain({k: manifest[k] for k in ("format", "run", "method", "settings", "base")})).digest()
    for one in manifest["rounds"]:
        chain = one.pop("chain")
        link = hashlib.sha256(link + plain(one)).digest()
        assert chain == link.hex()
    assert len(manifest["rounds"]) == 3


def test_the_digest_of_a_state_leaves_its_memory_out_and_sees_every_array() -> None:
    one = state()
    kept = replace(one, memory={"holdings": {"x": np.ones(3, np.float32)}})
    assert state_digest(kept) == state_digest(one)
    changed = Factors(one.open_task.pair[MODULES[0]].a + np.float32(1e-6), one.open_task.pair[MODULES[0]].b)
    task = replace(one.open_task, pair=Adapter({**one.open_task.pair, MODULES[0]: changed}))
    assert state_digest(replace(one, tasks={"": task})) != state_digest(one)


def test_a_log_without_states_or_with_a_gap_is_refused() -> None:
    log = events()
    with pytest.raises(CheckpointError, match="round 3 where 2 should be"):
        rounds_of([log[1], log[3]])
    del log[1]["state"]
    with pytest.raises(CheckpointError, match="no hash of the state after round 1"):
        rounds_of(log)


def test_a_release_lists_no_stray_file(released: Path) -> None:
    (released / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin does not belong to a release"):
        list_files(released, [released / "adapter"])


def test_a_manifest_of_another_format_is_refused_by_name() -> None:
    old = canonical({**json.loads(EXAMPLE), "format": "fedlora-manifest/1"})
    with pytest.raises(CheckpointError, match="its format is 'fedlora-manifest/1'"):
        read_manifest(old)


# --- the signature


def test_the_signature_worked_out_with_nothing_but_ed25519(released: Path) -> None:
    import base64

    envelope = json.loads((released / "manifest.sig").read_bytes())
    manifest = (released / "manifest.json").read_bytes()
    assert envelope["created"] == "2026-01-31T12:00:00Z"
    assert envelope["key"] == hashlib.sha256(PUBLIC[0].public_bytes_raw()).hexdigest() == node_id(PUBLIC[0])
    signed = b"fedlora-manifest/2\0" + b"2026-01-31T12:00:00Z\0" + manifest
    PUBLIC[0].verify(base64.b64decode(envelope["signature"]), signed)


def test_a_signature_of_something_else_is_none(released: Path) -> None:
    data = (released / "manifest.json").read_bytes()
    envelope = read_signature((released / "manifest.sig").read_bytes())
    assert verify_signature(data, envelope, [OTHER.public_key(), *PUBLIC]) is None
    assert "not among those you trust" in str(verify_signature(data, envelope, [OTHER.public_key()]))
    forged = replace(envelope, key=node_id(OTHER.public_key()))
    assert "does not fit" in str(verify_signature(data, forged, [OTHER.public_key()]))
    assert "does not fit" in str(verify_signature(data, replace(envelope, created="2026-01-31T12:00:01Z"), PUBLIC))
    assert "does not fit" in str(verify_signature(data, replace(envelope, signature="AAAA"), PUBLIC))
    assert "does not fit" in str(verify_signature(data, replace(envelope, signature="?"), PUBLIC))


def test_base64_has_one_form_of_a_signature(released: Path) -> None:
    """The last letter of 64 bytes has four bits that mean nothing."""
    data = (released / "manifest.json").read_bytes()
    envelope = read_signature((released / "manifest.sig").read_bytes())
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    texts = [f"{envelope.signature[:-3]}{letter}==" for letter in letters]
    taken = [x for x in texts if verify_signature(data, replace(envelope, signature=x), PUBLIC) is None]
    assert taken == [envelope.signature]


def test_only_a_manifest_is_signed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="canonical"):
        signature(b'{"a": 1}', KEY, now=lambda: NOON)
    with pytest.raises(CheckpointError, match="cannot be signed: No such file"):
        sign(tmp_path, KEY)


# --- verification


def test_what_was_released_is_verified(released: Path) -> None:
    report = verify(released, PUBLIC)
    assert (report.verified, report.findings) == (True, ())
    assert [c.name for c in report.checks] == [
        "manifest",
        "signature",
        "files",
        "other files",
        "adapter",
        "base",
        "rounds",
    ]
    told = "\n".join(c.said for c in report.checks)
    for text in ("privacy: none claimed", "2026-01-31T12:00:00Z", "3 files", "2 modules of rank 2", "3 rounds in one"):
        assert text in told


def test_without_a_trusted_key_nothing_is_verified(released: Path) -> None:
    report = verify(released, ())
    assert not report.verified
    assert "no public key was given" in said(report)
    (released / "manifest.sig").unlink()
    assert "anybody could have written" in said(verify(released, PUBLIC))
    (released / "manifest.json").unlink()
    report = verify(released, PUBLIC)
    assert not report.verified
    assert "nothing says where this came from" in said(report)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_no_byte_of_manifest_or_signature_can_change(released: Path, name: str) -> None:
    """Every byte of the signature's file, a third of the manifest's: the parsers and Ed25519 alone."""
    texts = {n: (released / n).read_bytes() for n in ("manifest.json", "manifest.sig")}

    def accepted() -> bool:
        try:
            manifest, envelope = texts["manifest.json"], read_signature(texts["manifest.sig"])
            read_manifest(manifest)
            return verify_signature(manifest, envelope, PUBLIC) is None
        except CheckpointError:
            return False

    assert accepted()
    whole = texts[name]
    for at in range(0, len(whole), 3 if name == "manifest.json" else 1):
        for flip in (1, 0x20, 0x80):
            texts[name] = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
            assert not accepted(), (at, texts[name][max(0, at - 20) : at + 20])
    for texts[name] in (whole[:-1], whole + b"\n", b" " + whole, b""):
        assert not accepted()


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
def test_no_byte_of_a_file_can_change(released: Path, name: str) -> None:
    path = released / "adapter" / name
    whole = path.read_bytes()
    for at in sorted({0, 7, 8, len(whole) // 2, len(whole) - 1} & set(range(len(whole)))):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        report = verify(released, PUBLIC)
        assert not report.verified
        assert f"adapter/{name}: was changed" in said(report)
    path.write_bytes(whole + b"\n")
    assert f"adapter/{name}: has {len(whole) + 1:,} bytes, {len(whole):,} were released" in said(
        verify(released, PUBLIC)
    )


def renamed(run: Path) -> None:
    (run / "adapter/README.md").rename(run / "adapter/readme.md")


def linked_file(run: Path) -> None:
    (run / "adapter/README.md").rename(run.parent / "away")
    (run / "adapter/README.md").symlink_to(run.parent / "away")


def linked_folder(run: Path) -> None:
    (run / "adapter").rename(run.parent / "away")
    (run / "adapter").symlink_to(run.parent / "away")


def linked_manifest(run: Path) -> None:
    (run / "manifest.json").rename(run.parent / "away")
    (run / "manifest.json").symlink_to(run.parent / "away")


def pipe(run: Path) -> None:
    (run / "adapter/README.md").unlink()
    os.mkfifo(run / "adapter/README.md")


def write(name: str, data: bytes = b"x") -> Callable[[Path], None]:
    def do(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(data)

    return do


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (lambda run: (run / "adapter/README.md").unlink(), "adapter/README.md: is missing"),
        (renamed, "adapter/README.md: is missing\n'adapter/readme.md': not listed"),
        (lambda run: shutil.rmtree(run / "adapter"), "adapter/adapter_model.safetensors: is missing"),
        (write("adapter/notes.txt"), "'adapter/notes.txt': not listed"),
        (write("adapter/.hidden"), "'adapter/.hidden': not listed"),
        (write("adapter/adapter_model.bin"), "a pickle or its like"),
        (write("adapter/more/x"), "'adapter/more': a folder that is not listed"),
        (write("adapter/\udcff\x1b[2J"), r"'adapter/\udcff\x1b[2J': not listed"),
        (write("adapter_config.json"), "could be loaded as a model from here"),
        (write("model.safetensors"), "could be loaded as a model from here"),
        (linked_file, "adapter/README.md: cannot be read: it is a symbolic link"),
        (linked_folder, "'adapter': is a symbolic link"),
        (linked_manifest, "manifest.json cannot be read: it is a symbolic link"),
        (pipe, "adapter/README.md: cannot be read: it is not a plain file"),
        (write("manifest.json"), "not JSON"),
        (write("manifest.sig", b"{}"), "manifest.sig: signature: fields differ"),
    ],
)
def test_a_folder_that_was_tampered_with_is_not_verified(
    released: Path, tamper: Callable[[Path], None], found: str
) -> None:
    tamper(released)
    report = verify(released, PUBLIC)
    assert not report.verified
    assert found in said(report)


def test_all_findings_come_and_other_files_of_a_run_may_lie_there(released: Path) -> None:
    write("metrics.jsonl")(released)
    report = verify(released, PUBLIC)
    assert report.verified
    assert "says nothing about 'metrics.jsonl'" in "\n".join(c.said for c in report.checks)
    (released / "manifest.sig").unlink()
    write("adapter/x")(released)
    (released / "adapter/README.md").unlink()
    assert len(verify(released, PUBLIC).findings) == 3


@pytest.mark.parametrize(
    "name",
    [
        "../away",
        "adapter/../../away",
        "/etc/passwd",
        "adapter//x",
        "adapter/./x",
        "adapter",
        "a\\b/x",
        "adapter/\x00",
        "adapter/x/y/z",
        "adapter/.x",
        "adapter/" + "x" * 300,
    ],
)
def test_a_signed_path_out_of_the_folder_is_never_opened(released: Path, name: str) -> None:
    """Even by a trusted signer: the file has the hash that is listed, so only its path is wrong."""
    (released.parent / "away").write_bytes(b"secret")
    manifest = read_manifest((released / "manifest.json").read_bytes())
    file = provenance.File(sha256=hashlib.sha256(b"secret").hexdigest(), bytes=6)
    ranks = {**manifest.ranks, os.path.dirname(name): manifest.ranks["adapter"]}
    write_signed(released, replace(manifest, files={**manifest.files, name: file}, ranks=ranks))
    report = verify(released, PUBLIC)
    assert not report.verified
    assert f"{name!r:.200}: such a path has no released file" in said(report)


def test_an_adapter_outside_is_not_looked_at_whatever_was_signed(released: Path) -> None:
    manifest = read_manifest((released / "manifest.json").read_bytes())
    shutil.copytree(released / "adapter", released.parent / "away")
    away = {name.replace("adapter/", "../away/", 1): file for name, file in manifest.files.items()}
    ranks = {**manifest.ranks, "../away": manifest.ranks["adapter"]}
    write_signed(released, replace(manifest, files={**manifest.files, **away}, ranks=ranks))
    report = verify(released, PUBLIC)
    assert "'../away': has no adapter" in said(report)
    assert len(report.findings) == 4


@pytest.mark.parametrize(
    ("config", "weights", "found"),
    [
        ({"target_modules": [MODULES[0]]}, {}, "belongs to no target module"),
        ({"target_modules": [*MODULES, "layers.2.q"]}, {}, "'layers.2.q', a target module, has not both factors"),
        ({"r": 3, "lora_alpha": 3}, {}, "the config says rank 3"),
        ({"rank_pattern": {r"^layers\.0\.q": 1}}, {}, "the config says rank 1"),
        ({"rank_pattern": {"(a+)+$": 2}}, {}, "rank_pattern '(a+)+$' is of no target module"),
        ({"lora_alpha": 4}, {}, "alpha is not the rank"),
        ({"alpha_pattern": {r"^layers\.0\.q": 8}}, {}, "alpha is not the rank"),
        ({"use_rslora": True}, {}, "use_rslora is True"),
        ({"auto_mapping": {"parent_library": "os"}}, {}, "auto_mapping is"),
        ({"base_model_name_or_path": "other"}, {}, "its base is 'other', the manifest's is 'owner/base'"),
        ({"modules_to_save": ["score"]}, {}, "'score' should be saved whole, and is not there"),
        ({"target_modules": "all-linear"}, {}, "is not what fedlora writes"),
        ({}, tensors(rank=3), "A (3, 5) and B (7, 3), the config says rank 2"),
        ({}, tensors(dtype=np.float16), "is F16, a release is F32"),
        ({}, {**tensors(), "base_model.model.extra": np.ones(1, np.float32)}, "belongs to no target module"),
        ({}, {k: x if "lora_B" in k else x * np.float32("nan") for k, x in tensors().items()}, "not finite"),
        ({}, b"\xff" * 40, "a header of"),
        ({}, b"\x08" + b"\0" * 40, "no safetensors file"),
        ({}, b"", "no safetensors file"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_adapter_that_does_not_fit_its_config_is_found_though_it_was_signed(
    tmp_path: Path, config: dict[str, object], weights: dict[str, Any] | bytes, found: str
) -> None:
    data = weights if isinstance(weights, bytes) else save(weights) if weights else None
    write_release(tmp_path, adapter_config(**config), data)
    report = verify(tmp_path, PUBLIC)
    assert not report.verified
    assert found in said(report)


def test_ranks_by_module_embeddings_and_a_head_are_understood(tmp_path: Path) -> None:
    weights = {k: x for k, x in tensors().items() if MODULES[0] in k}
    weights["base_model.model.embed.lora_embedding_A"] = np.ones((1, 50), np.float32)
    weights["base_model.model.embed.lora_embedding_B"] = np.ones((5, 1), np.float32)
    weights["base_model.model.score.weight"] = np.ones((2, 5), np.float32)
    pattern = {"^embed": 1}
    config = adapter_config(
        target_modules=[MODULES[0], "embed"], rank_pattern=pattern, alpha_pattern=pattern, modules_to_save=["score"]
    )
    manifest = write_release(tmp_path, config, save(weights))
    assert said(verify(tmp_path, PUBLIC)) == (
        "adapter/adapter_model.safetensors: 2 modules of rank 1 to 2; the manifest says 2 modules of rank 2"
    )
    ranks = {"adapter": Ranks(smallest=1, largest=2, modules=2)}
    write_signed(tmp_path, replace(manifest, ranks=ranks))
    assert verify(tmp_path, PUBLIC).verified


def test_the_history_cannot_change_in_its_order_or_its_values(released: Path) -> None:
    """Signed again by the key's holder: what is left to find it is the chain, which others may have noted down."""
    manifest = read_manifest((released / "manifest.json").read_bytes())
    one, two, three = manifest.rounds
    for rounds, link in (
        ((two, one, three), 1),
        ((one, three), 2),
        ((one, replace(two, participants=9), three), 2),
        ((one, two, replace(three, refused={"quota": 1})), 3),
    ):
        write_signed(released, replace(manifest, rounds=rounds))
        assert f"the chain of rounds is broken at its link {link}" in said(verify(released, PUBLIC))
    write_signed(released, replace(manifest, rounds=chained(manifest.origin, (two, one, three))))
    assert "round 2 stands where round 1 should be" in said(verify(released, PUBLIC))
    write_signed(released, replace(manifest, run="another-run"))
    assert "broken at its link 1" in said(verify(released, PUBLIC))


def test_a_base_is_compared_by_its_fingerprint(released: Path, tmp_path: Path) -> None:
    from fedlora.fingerprint import fingerprint

    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(save({"w": np.ones(3, np.float32)}))
    (base / "config.json").write_text("{}")
    manifest = read_manifest((released / "manifest.json").read_bytes())
    record = replace(manifest.base, fingerprint=fingerprint(base), files=provenance.base_files(base))
    right = replace(manifest, base=record)
    write_signed(released, replace(right, rounds=chained(right.origin, right.rounds)))
    report = verify(released, PUBLIC, base_folder=base)
    assert (report.verified, report.findings) == (True, ())
    (base / "config.json").write_text('{"hidden_size": 4}')
    report = verify(released, PUBLIC, base_folder=base)
    assert not report.verified
    assert "these files differ: 'config.json'" in said(report)
    assert "no base can be read there" in said(verify(released, PUBLIC, base_folder=tmp_path))


# --- keys and commands


def pem(folder: Path, key: Ed25519PrivateKey = KEY) -> tuple[Path, Path]:
    secret, public = folder / "key.pem", folder / "key.pub"
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    secret.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return secret, public


def test_the_commands_sign_and_verify(released: Path, tmp_path: Path) -> None:
    import typer

    from fedlora import verify_command

    app = typer.Typer()
    app.command()(verify_command.verify)
    app.command()(verify_command.sign)
    secret, public = pem(tmp_path)
    run = CliRunner().invoke
    done = run(app, ["sign", str(released), "--key", str(secret)])
    assert done.exit_code == 0, done.output
    done = run(app, ["verify", str(released), "--key", str(public)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "VERIFIED"), done.output
    done = run(app, ["verify", str(released)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (1, "NOT VERIFIED")
    (tmp_path / "two").mkdir()
    _, stranger = pem(tmp_path / "two", OTHER)
    done = run(app, ["verify", str(released), "--key", str(stranger), "--key", str(public)])
    assert done.exit_code == 0
    write("adapter/\x1b[2Jx")(released)
    done = run(app, ["verify", str(released), "--key", str(public)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (1, "NOT VERIFIED")
    assert "\x1b[2J" not in done.output


# What fuzzing found: each of these took hours, gigabytes or an exception that was not ours


def rewritten(released: Path, change: Callable[[dict[str, Any]], object]) -> Report:
    value = json.loads((released / "manifest.json").read_bytes())
    change(value)
    (released / "manifest.json").write_bytes(canonical(value))
    return verify(released, PUBLIC)


FILE = {"bytes": 1, "sha256": ""}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: v["files"].update({f"a{i}/b": FILE for i in range(3_000)}), "a0/b: is missing"),
        (lambda v: v["files"].update({f"a{i}/b": FILE for i in range(10_000)}), "it lists 10,003 files of"),
        (lambda v: v["ranks"].update({f"a{i}": v["ranks"]["adapter"] for i in range(10_000)}), "and 10,001 adapters"),
        (lambda v: v["files"].update({"a/b": {"bytes": 2**36, "sha256": ""}}), "at most 10,000 and 68,719,476,736"),
        (lambda v: v["ranks"].update({"/".join("a" * 100_000): v["ranks"]["adapter"]}), "has no adapter that the"),
    ],
)
def test_a_manifest_that_lists_much_is_read_in_time(released: Path, change: Any, why: str) -> None:
    assert why in said(rewritten(released, change))


def test_folders_deeper_than_python_can_follow_are_a_finding(released: Path) -> None:
    name = "adapter" + "/a" * 1200
    path = released
    for part in name.split("/"):
        path = path / part
        path.mkdir(exist_ok=True)
    report = rewritten(released, lambda v: v["files"].update({f"{name}/README.md": FILE}))
    assert "'adapter/a': a folder that is not listed" in said(report)
    while path != released / "adapter":  # shutil.rmtree could not
        path.rmdir()
        path = path.parent


def test_weights_are_read_in_parts(released: Path) -> None:
    """A sparse file in one array: safetensors copies it whole, and panics where it cannot."""
    size = 2**26
    row = {"base_model.model.q.lora_A.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    table = json.dumps(row).encode()
    path = released / "adapter" / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write(len(table).to_bytes(8, "little") + table)
        file.truncate(8 + len(table) + size)
    assert "its arrays were not read, as its 67,108,9" in said(verify(released, PUBLIC))
    listed = {"bytes": path.stat().st_size, "sha256": ""}
    tracemalloc.start()
    report = rewritten(released, lambda v: v["files"].update({"adapter/adapter_model.safetensors": listed}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "base_model.model.q.lora_A.weight' belongs to no target module" in said(report)
    assert peak < 2**23


@pytest.mark.timeout(20)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_many_modules_and_many_arrays_are_compared_in_time(released: Path, prefix: str) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    table = json.dumps({f"{prefix}x{i}": empty for i in range(5_000)}).encode()
    config = adapter_config(modules_to_save=[f"m{i}" for i in range(20_000)])
    manifest = write_release(released, config, len(table).to_bytes(8, "little") + table)
    write_signed(released, manifest)
    text = said(verify(released, PUBLIC))
    assert "'m19999' should be saved whole" in text
    assert "belongs to no target module" in text


def test_an_array_with_a_name_beyond_reason_is_refused(released: Path) -> None:
    table = json.dumps({"a." * 300: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    write_signed(released, write_release(released, weights=len(table).to_bytes(8, "little") + table))
    assert "is a name of 600 characters" in said(verify(released, PUBLIC))
