"""A sum of products at any ranks in two secure sums: the randomised range finder over summed sketches.

Of one module, client i holds B_i `[out, r_i]`, A_i `[r_i, inp]` and a weight w_i; Omega `[inp, p]` is public. Pass 1
sums Y = sum_i w_i B_i (A_i Omega); the server takes Q = qr(Y) `[out, p]` and sends it; pass 2 sums
Z = sum_i w_i (Q^T B_i) A_i. Then Q Z = Q Q^T sum_i w_i B_i A_i: with a Gaussian Omega it is the sum itself, almost
surely, if p is at least the sum's rank, and near its best approximation of rank p otherwise. Both sums must be over
the same clients. The server learns Y and Z, linear images of the sum, not any client's factors.

Source: Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithm 4.1; in federated learning, FedASK (2507.09990).
All in float64.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array, Factors
from fedlora.errors import AdapterError
from fedlora.rng import public_normal

Matrix = NDArray[np.float64]


def public_omega(seed: int, module: str, *, inp: int, columns: int) -> Matrix:
    """Omega `[inp, columns]`: standard normals that anyone derives from the run's public seed."""
    return public_normal(seed, "sketch", module, shape=(columns, inp)).T


def first_pass(factors: Factors, omega: Matrix, weight: float) -> Matrix:
    """w B (A Omega) `[out, p]`, the product's scale included. Raises: AdapterError if Omega has not `inp` rows."""
    if omega.ndim != 2 or omega.shape[0] != factors.shape[1]:
        raise AdapterError(f"Omega {omega.shape} does not fit a product of shape {factors.shape}")
    return weight * factors.scale * (_float64(factors.b) @ (_float64(factors.a) @ omega))


def public_range(total: Matrix) -> Matrix:
    """Q `[out, min(out, p)]`, orthonormal columns that span those of the summed first pass `[out, p]`."""
    return np.ascontiguousarray(np.linalg.qr(total).Q)


def second_pass(factors: Factors, q: Matrix, weight: float) -> Matrix:
    """w (Q^T B) A `[p, inp]`, the product's scale included.

    Raises: AdapterError if Q has not `out` rows or its columns are not orthonormal to 1e-5: then a coordinate could be
    magnified past the bound that the sum is coded for.
    """
    if q.ndim != 2 or q.shape[0] != factors.shape[0]:
        raise AdapterError(f"Q {q.shape} does not fit a product of shape {factors.shape}")
    if not np.abs(q.T @ q - np.eye(q.shape[1])).max(initial=0.0) <= 1e-5:
        raise AdapterError("the columns of Q are not orthonormal")
    return weight * factors.scale * ((q.T @ _float64(factors.b)) @ _float64(factors.a))


def result(q: Matrix, total: Matrix) -> Factors:
    """The summed product as factors of rank p: b = Q, a = the summed second pass."""
    return Factors(a=total, b=q)


def digest(q: Matrix) -> str:
    """SHA-256 of Q's shape and little-endian bytes, 64 hex digits: the `basis` of part 2's context."""
    data = np.ascontiguousarray(q, "<f8")
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def _float64(x: Array) -> Matrix:
    return x.astype(np.float64)
