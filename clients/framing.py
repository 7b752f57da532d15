"""What travels over the Unix socket between a node's relay and its worker: a length and the bytes, both ways.

    request  = length u64 | ask            response = status u8 | length u64 | answer, or why there is none (UTF-8)

Everything is big endian. The relay is Flower's process and not trusted; the ask in it is (or is not) signed.
"""

from __future__ import annotations

import socket
import struct

from fedlora.errors import WireError

ANSWERED, REFUSED = 0, 1  # status


def receive(connection: socket.socket, *, max_bytes: int) -> bytes:
    """One length and that many bytes. Raises: WireError if they are more than `max_bytes`, or the peer is gone."""
    (length,) = struct.unpack(">Q", _exactly(connection, 8))
    if length > max_bytes:
        raise WireError(f"a message of {length:,} bytes, at most {max_bytes:,} are taken")
    return _exactly(connection, length)


def send(connection: socket.socket, data: bytes, status: int | None = None) -> None:
    """The inverse of `receive`; with a `status` a response."""
    connection.sendall((b"" if status is None else bytes([status])) + struct.pack(">Q", len(data)))
    connection.sendall(data)


def receive_response(connection: socket.socket, *, max_bytes: int) -> tuple[int, bytes]:
    """(status, bytes). Raises: WireError as `receive`."""
    status = _exactly(connection, 1)[0]
    return status, receive(connection, max_bytes=max_bytes)


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        some = connection.recv(min(count - len(parts), 1 << 20))
        if not some:
            raise WireError(f"the connection ended after {len(parts):,} of {count:,} bytes")
        parts += some
    return bytes(parts)
