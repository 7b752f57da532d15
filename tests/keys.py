"""Keys for tests of deployed parts, made in a moment: no CA, no certificates."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def node_keys(folder: Path) -> Ed25519PrivateKey:
    """Write `keys/signing.key` and `keys/operator.pub` into `folder`; returns the operator's key."""
    keys = folder / "keys"
    keys.mkdir(parents=True)
    operator, node = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    path = keys / "signing.key"
    path.write_bytes(node.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    public = operator.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (keys / "operator.pub").write_bytes(public)
    return operator
