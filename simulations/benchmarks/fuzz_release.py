"""The target of fuzz.py that is a release: a manifest, its signature, and a folder whose owner is hostile."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save as save_tensors

from fedlora.errors import CheckpointError
from fedlora.provenance import (
    MANIFEST,
    SIGNATURE,
    Base,
    Code,
    File,
    Manifest,
    Public,
    Ranks,
    Round,
    canonical,
    chained,
    read_manifest,
    read_signature,
    signature,
)
from fedlora.verification import verify
from simulations.benchmarks.fuzz_mutations import damaged, json_text, safetensors
from simulations.benchmarks.fuzz_targets import (
    LAYOUT,
    Case,
    Special,
    Target,
    folder_of,
    of_bytes,
    require,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOON = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
_CHANGED = "changed"  # a mark in a case: what was signed anew is another release, and may be verified


@cache
def release() -> dict[str, bytes]:
    """The files of a good release."""
    tensors = {
        f"base_model.model.{n}.{side}.weight": np.full(shape, 0.5, np.float32)
        for n, m in LAYOUT.modules.items()
        for side, shape in (("lora_A", (2, m.inp)), ("lora_B", (m.out, 2)))
    }
    tensors["base_model.model.score.weight"] = np.ones((2, 6), np.float32)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(LAYOUT.modules),
        "modules_to_save": ["score"],
        "base_model_name_or_path": "owner/base",
    }
    files = {
        "adapter/README.md": b"A card.\n",
        "adapter/adapter_config.json": json.dumps(config).encode(),
        "adapter/adapter_model.safetensors": save_tensors(tensors),
    }
    rounds = [Round(round=n, participants=4, state="a" * 64, refused={"not finite": 1}) for n in (1, 2)]
    manifest = Manifest(
        format="fedlora-manifest/2",
        run="r",
        method="flora",
        settings="0" * 64,
        base=Base(name="owner/base", revision=None, fingerprint="f" * 64, files={"config.json": "0" * 64}),
        ranks={"adapter": Ranks(smallest=2, largest=2, modules=2)},
        public={"": Public(seed="7", basis="1:2:3")},
        rounds=(),
        privacy="none claimed",
        code=Code(digest="0" * 64, versions={"numpy": "2", "peft": None}, constraints=None),
        files={name: _listed(data) for name, data in files.items()},
    )
    data = replace(manifest, rounds=chained(manifest.origin, rounds)).to_bytes()
    return {**files, MANIFEST: data, SIGNATURE: signature(data, KEY, now=lambda: NOON)}


def _listed(data: bytes) -> File:
    return File(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def _folder(rng: random.Random) -> Case:
    case: Case = dict(release())
    for _ in range(rng.choice((1, 1, 2))):
        _spoil(rng, case)
    said = case.get(MANIFEST)
    if isinstance(said, bytes) and rng.random() < 0.3:  # whoever signs may be hostile too
        try:
            value = json.loads(said)
            for name, content in case.items():
                if isinstance(content, bytes) and isinstance(value["files"], dict) and name.startswith("adapter/"):
                    value["files"][name] = asdict(_listed(content))
            case[MANIFEST] = canonical(value)
            case[SIGNATURE] = signature(canonical(value), KEY, now=lambda: NOON)
        except (ValueError, CheckpointError, TypeError, KeyError, RecursionError):
            return case
        case[_CHANGED] = b""
    return case


def _spoil(rng: random.Random, case: Case) -> None:
    good, how, adapter = release(), rng.randrange(14), "adapter/adapter_model.safetensors"
    name = rng.choice(list(good))
    if how <= 2:
        case[MANIFEST] = json_text(rng, json.loads(good[MANIFEST]))
    elif how == 3:
        case[SIGNATURE] = json_text(rng, json.loads(good[SIGNATURE]))
    elif how <= 5:
        config = json_text(rng, json.loads(good["adapter/adapter_config.json"]), ordered=False)
        case["adapter/adapter_config.json"] = config
    elif how <= 7:
        case[adapter] = safetensors(rng, good[adapter], [good[adapter]])
    elif how == 8:
        case[name] = damaged(rng, good[name], list(good.values()))
    elif how == 9:
        case.pop(name, None)
    elif how == 10:
        to = rng.choice(("/etc/passwd", "README.md", "/dev/zero", "..", name.split("/")[-1], "/nowhere", "/proc/self"))
        case[name] = rng.choice((Special("link", to), Special("pipe"), Special("folder"), Special("sparse", "", 2**34)))
    elif how == 11:
        for part in [n for n in case if n.startswith("adapter/")]:
            del case[part]
        case["adapter"] = rng.choice((Special("link", "/etc"), Special("link", "."), Special("pipe"), b"", b"PK"))
    elif how == 12:
        strange = ("adapter/x.pkl", "adapter/a/b", "x.bin", "config.json", "adapter/\udcff\x1b[2J", ".hidden", "a\nb")
        case[rng.choice(strange)] = rng.choice((b"", b"x", Special("folder"), Special("pipe"), Special("link", "/")))
    elif rng.random() < 0.1:
        _enlarge(rng, case)


def _enlarge(rng: random.Random, case: Case) -> None:
    """What takes a reader long, or much memory, whose cost grows faster than what it reads."""
    value, how = json.loads(release()[MANIFEST]), rng.randrange(6)
    config = json.loads(release()["adapter/adapter_config.json"])
    if how == 0:
        value["files"] = {f"a{i}/b": {"bytes": 1, "sha256": ""} for i in range(rng.choice((9_000, 20_000)))}
    elif how == 1:
        value["ranks"]["/".join("a" * rng.choice((2000, 100_000)))] = value["ranks"]["adapter"]
    elif how == 2:
        value["ranks"] |= {f"a{i}": value["ranks"]["adapter"] for i in range(5_000)}
        value["files"] |= {f"a{i}/README.md": {"bytes": 1, "sha256": ""} for i in range(5_000)}
    elif how == 3:
        deep = "adapter" + "/a" * rng.choice((40, 1500))
        case[f"{deep}/README.md"] = b""
        value["files"][f"{deep}/README.md"] = {"bytes": 0, "sha256": ""}
    elif how == 4:
        n = 2 ** rng.choice((20, 33, 40))
        rows = {"base_model.model.q.lora_A.weight": {"dtype": "F32", "shape": [n // 4], "data_offsets": [0, n]}}
        table = json.dumps(rows).encode()
        head = len(table).to_bytes(8, "little") + table
        case["adapter/adapter_model.safetensors"] = Special("sparse", head.decode("latin-1"), len(head) + n)
    else:
        names = [f"m{i}" for i in range(20_000)]
        config[rng.choice(("modules_to_save", "target_modules"))] = names
        case["adapter/adapter_config.json"] = json.dumps(config).encode()
        shape = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        table = json.dumps({rng.choice(("", "base_model.model.")) + f"x{i}": shape for i in range(10_000)}).encode()
        case["adapter/adapter_model.safetensors"] = len(table).to_bytes(8, "little") + table
    case[MANIFEST] = canonical(value)


def _read_release(case: Case) -> object:
    signed_anew = _CHANGED in case
    with folder_of({name: x for name, x in case.items() if name != _CHANGED}) as folder:
        report = verify(folder, (KEY.public_key(),))
    require(all(f for check in report.checks for f in check.findings), "a finding without a word")
    if not report.verified:
        raise CheckpointError(report.findings[0][:200])
    if not signed_anew:
        others = {n for n in case if n.startswith("adapter/")} - release().keys()
        require({n: case.get(n) for n in release()} == release() and not others, "a changed release was verified")
    return report


def _read_manifest(data: bytes) -> object:
    found = read_manifest(data)
    require(found.to_bytes() == data, "a manifest with another byte string")
    return found


def _read_signature(data: bytes) -> object:
    found = read_signature(data)
    require(canonical(asdict(found)) == data, "a signature with another byte string")
    return found


def edited(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Canonical JSON with edits, or plain damage."""
    return damaged(rng, data, others) if rng.random() < 0.25 else json_text(rng, json.loads(data))


def release_targets() -> list[Target]:
    good = release()
    return [
        of_bytes("release/manifest", [good[MANIFEST]], [edited], _read_manifest, CheckpointError),
        of_bytes("release/signature", [good[SIGNATURE]], [edited], _read_signature, CheckpointError),
        Target("release/folder", _folder, _read_release, (CheckpointError,)),
    ]
