"""What travels over the Unix socket between a node's relay and its worker: a length and the bytes, both ways.

    request  = length u64 | ask            response = status u8 | length u64 | answer, or why there is none (UTF-8)

Everything is big endian. The relay is Flower's process and not trusted; the ask in it is (or is not) signed.
"""

from __future__ import annotations

import socket
import struct
import time

from fedlora.errors import WireError

ANSWERED, REFUSED = 0, 1  # status


def receive(connection: socket.socket, *, max_bytes: int) -> bytes:
    """One length and that many bytes, however long it takes. Raises: WireError if they are more than `max_bytes`, or
    the peer is gone."""
    return receive_bytes(connection, receive_length(connection, max_bytes=max_bytes))


def receive_length(connection: socket.socket, *, max_bytes: int, seconds: float | None = None) -> int:
    """The length alone. Raises: WireError as `receive`; TimeoutError if it is not whole after so many seconds."""
    (length,) = struct.unpack(">Q", receive_bytes(connection, 8, seconds=seconds))
    if length > max_bytes:
        raise WireError(f"a message of {length:,} bytes, at most {max_bytes:,} are taken")
    return int(length)


def receive_bytes(connection: socket.socket, count: int, *, seconds: float | None = None) -> bytes:
    """So many bytes. Raises: WireError if the peer is gone; TimeoutError if they are not whole after so many seconds,
    also where each single one came in time."""
    end = None if seconds is None else time.monotonic() + seconds
    parts = bytearray()
    while len(parts) < count:
        if end is not None:
            left = end - time.monotonic()
            if left <= 0.0:
                raise TimeoutError(f"{len(parts):,} of {count:,} bytes came within {seconds:g} s")
            connection.settimeout(left)
        some = connection.recv(min(count - len(parts), 1 << 20))
        if not some:
            raise WireError(f"the connection ended after {len(parts):,} of {count:,} bytes")
        parts += some
    return bytes(parts)


def send(connection: socket.socket, data: bytes, status: int | None = None) -> None:
    """The inverse of `receive`; with a `status` a response."""
    connection.sendall((b"" if status is None else bytes([status])) + struct.pack(">Q", len(data)))
    connection.sendall(data)


def receive_response(connection: socket.socket, *, max_bytes: int) -> tuple[int, bytes]:
    """(status, bytes). Raises: WireError as `receive`."""
    status = receive_bytes(connection, 1)[0]
    return status, receive(connection, max_bytes=max_bytes)
