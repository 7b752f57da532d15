"""The bytes in a .npy file of one array of uint8, which is what Flower carries, without trusting its header."""

from __future__ import annotations

import io

import numpy as np

from fedlora.errors import WireError

__all__ = ["npy_bytes"]


def npy_bytes(data: bytes) -> bytes:
    """What `np.save` of an array `[n]` of uint8 holds; the header is read alone, since np.load reserves what that says.

    Raises: WireError for anything else, such as an .npz, a pickle, or a header that states another length.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("no .npy file of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # whatever numpy raises on bytes that are no header
        raise WireError(f"not a fedlora message: `bytes` is no array ({error!r:.200})") from error
    rest = data[file.tell() :]
    if dtype != np.uint8 or len(shape) != 1:
        raise WireError("not a fedlora message: `bytes` must be one array of uint8")
    if shape != (len(rest),):
        raise WireError(f"not a fedlora message: `bytes` is no array of {shape!s:.80}: it has {len(rest)} bytes")
    return rest
