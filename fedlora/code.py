"""Which code is running: the digest by which a server and its clients know that they agree.

The top-level folder names `clients` and `server` are generic, so under a process pool a client can silently run
another checkout's files. Every Ask carries the asker's digest, and a client whose own differs refuses.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fedlora.errors import CodeMismatch, ConfigError


@cache
def code_digest() -> str:
    """SHA-256 over the names and bytes of every `.py` file of `fedlora` and of the `clients` folder beside it."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in ("clients", "fedlora"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def require_one_checkout(module_file: str) -> None:
    """Refuse to run when the package that `module_file` belongs to is not beside this fedlora.

    Raises: ConfigError naming both places.
    """
    ours, theirs = Path(__file__).resolve().parents[1], Path(module_file).resolve().parents[1]
    if ours != theirs:
        raise ConfigError(
            f"fedlora comes from {ours} but {Path(module_file).parent.name} from {theirs}: two checkouts are mixed. "
            "Start the processes from a folder outside every checkout, with one fedlora installed."
        )


def require_same_code(asked_by: str) -> None:
    """Refuse an Ask whose sender runs other code.

    Raises: CodeMismatch naming both digests and no path, since the sender is told.
    """
    if asked_by != code_digest():
        raise CodeMismatch(
            f"the server runs fedlora code {asked_by[:12]} and this client runs {code_digest()[:12]}: install the same "
            "version on both sides, and start the processes from a folder outside every checkout"
        )
