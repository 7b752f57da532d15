"""Named arrays and scalars as one flat vector, so that one sum carries the update, its weight and its metrics."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import AdapterError


@dataclass(frozen=True)
class Packing:
    """Shapes by name, and names of scalars. The vector: arrays by name, rows first, then scalars by name."""

    shapes: Mapping[str, tuple[int, ...]]
    scalars: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int:
        """Coordinates of the vector."""
        return sum(math.prod(s) for s in self.shapes.values()) + len(self.scalars)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and order, 64 hex digits."""
        table = [[[name, list(self.shapes[name])] for name in sorted(self.shapes)], sorted(self.scalars)]
        return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode()).hexdigest()

    def pack(self, arrays: Mapping[str, Array], scalars: Mapping[str, float]) -> NDArray[np.float32]:
        """The vector `[size]` in float32. Scalars count in its L2 norm: scale them as the bound demands.

        Raises: AdapterError if names or shapes differ from the packing's.
        """
        if {k: x.shape for k, x in arrays.items()} != dict(self.shapes) or scalars.keys() != set(self.scalars):
            raise AdapterError(
                f"packed are {dict(self.shapes)} and {sorted(self.scalars)}, got "
                f"{ {k: x.shape for k, x in arrays.items()} } and {sorted(scalars)}"
            )
        vector, at = np.empty(self.size, np.float32), 0
        for name in sorted(self.shapes):
            x = arrays[name]
            vector[at : at + x.size].reshape(x.shape)[...] = x
            at += x.size
        vector[at:] = [scalars[name] for name in sorted(self.scalars)]
        return vector

    def unpack(self, vector: Array) -> tuple[dict[str, Array], dict[str, float]]:
        """Arrays (views of the vector) and scalars. Raises: AdapterError if the vector is not `[size]`."""
        if vector.shape != (self.size,):
            raise AdapterError(f"a vector of shape {vector.shape} where [{self.size}] was packed")
        arrays, at = {}, 0
        for name in sorted(self.shapes):
            shape = self.shapes[name]
            arrays[name] = vector[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
        return arrays, {name: float(x) for name, x in zip(sorted(self.scalars), vector[at:], strict=True)}
