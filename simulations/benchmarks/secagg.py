"""A secure sum of large vectors, and Flower's SecAgg+ on vectors of the same size.

    python simulations/benchmarks/secagg.py --size 8400000 --clients 20 --dropped 2

One session of fedlora-secagg/1 runs whole, every message through bytes; those who drop out do so before they send a
vector, the case that costs the server most. Times are CPU milliseconds of one thread, of a client the median. `share`
takes in that keys are verified. The server's time is in two parts: `collect` is admission and adding, `unmask` what
follows the last share, decoding included.

Flower's rows are put together from the functions of flwr.common.secure_aggregation that its client and server call,
with its defaults (clipping range 8, 2^22 steps, modulus 2^32, int64 arrays). Their cost is linear in masks, so that one
quantisation and two masks are measured and the rest is computed: a client makes one mask and one for each neighbour (as
many as ours has), the server one for each survivor and one for each neighbour of a dropped client. Key agreement,
shares and bytes are left out of Flower's rows, and are in ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from numpy.typing import NDArray

from fedlora.pki import node_id
from fedlora.privacy.secagg.client import Client
from fedlora.privacy.secagg.consent import Consent
from fedlora.privacy.secagg.context import Context, roster, usual_threshold
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.graph import least_degree
from fedlora.privacy.secagg.messages import FromClient, from_client, from_server
from fedlora.privacy.secagg.server import Server

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8_400_000, help="coordinates of a vector")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--dropped", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of Flower's functions")
    options = parser.parse_args()
    print(f"{options.size:,} coordinates, {options.clients} clients, {options.dropped} dropped before sending")
    ours(options.size, options.clients, options.dropped)
    flower(options.size, options.clients, options.dropped, options.repeats)


class Record:
    """A consent that is kept in memory."""

    def __init__(self) -> None:
        self.consent = Consent("benchmark")

    def load(self) -> Consent:
        return self.consent

    def save(self, consent: Consent) -> None:
        self.consent = consent


class Clock:
    """CPU seconds by who spent them and in which step."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}

    def time(self, who: str, step: str, act: Callable[..., T], *args: Any) -> T:
        start = time.process_time()
        made = act(*args)
        steps = self.seconds.setdefault(who, {})
        steps[step] = steps.get(step, 0.0) + time.process_time() - start
        return made


def ours(size: int, count: int, dropped: int) -> None:
    keys = {node_id(k.public_key()): k for k in (Ed25519PrivateKey.generate() for _ in range(count))}
    server_key, degree = X25519PrivateKey.generate(), least_degree(count)
    context = Context(
        run="benchmark",
        round=0,
        attempt=0,
        part=1,
        parts=1,
        base="0" * 64,
        layout="0" * 64,
        basis="0" * 64,
        server_key=server_key.public_key().public_bytes_raw(),
        fixed_point=FixedPoint(size=size, clients=count, bound=1.0),
        threshold=usual_threshold(degree + 1),
        degree=degree,
        least_survivors=3,
        least_per_tier=3,
        roster=roster({k.public_key().public_bytes_raw(): 16 for k in keys.values()}),
    )
    clock, server, sent = Clock(), Server(context, server_key), dict.fromkeys(keys, 0)
    clients = {i: clock.time(i, "advertise", Client, context, k, Record()) for i, k in keys.items()}
    plain, survivors = np.zeros(size), sorted(keys)[dropped:]

    def receive(i: str, data: bytes) -> None:
        server.receive(i, from_client(data, context))

    def answer(step: Callable[..., FromClient], down: bytes) -> bytes:
        return step(from_server(down, context)).to_bytes()

    def send(i: str, name: str, act: Callable[..., bytes], *args: Any) -> None:
        data = clock.time(i, name, act, *args)
        sent[i] += len(data)
        clock.time("server", "collect", receive, i, data)

    for i, client in clients.items():
        send(i, "advertise", lambda step: step().to_bytes(), client.advertise)
    adverts = clock.time("server", "collect", server.close_advertising)
    for i, client in clients.items():
        send(i, "share", answer, client.share, adverts[i].to_bytes())
    deliveries = clock.time("server", "collect", server.close_sharing)
    for at, i in enumerate(survivors):
        vector = direction(size, at)
        plain += vector
        send(i, "mask", answer, partial(clients[i].mask, vector=vector), deliveries[i].to_bytes())
    alive = clock.time("server", "collect", server.close_masking).to_bytes()
    for i in survivors:
        send(i, "confirm", answer, clients[i].confirm, alive)
    requests = clock.time("server", "collect", server.close_confirming)
    for i in survivors:
        send(i, "unmask", answer, clients[i].unmask, requests[i].to_bytes())
    total = clock.time("server", "unmask", server.finish)

    error = float(np.abs(total.values - plain).max())
    if not error <= context.fixed_point.error(len(survivors)):
        raise AssertionError(f"the sum is off by {error}")
    steps = {s: 1e3 * statistics.median(clock.seconds[i][s] for i in survivors) for s in clock.seconds[survivors[0]]}
    at_server = {s: 1e3 * t for s, t in clock.seconds["server"].items()}
    show("fedlora   client", steps)
    show("          server", at_server)
    print(f"          up     {max(sent.values()) / (4 * size):8.4f} of float32's bytes")
    print(f"          off by {error:8.1e}, at most {context.fixed_point.error(len(survivors)):.1e}")


def show(name: str, steps: dict[str, float]) -> None:
    print(f"{name} {sum(steps.values()):8.1f} ms  ({', '.join(f'{s} {t:.1f}' for s, t in steps.items())})")


def direction(size: int, seed: int) -> NDArray[np.float32]:
    """A vector `[size]` of L2 norm 1, or a little less."""
    x = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    x *= np.float32((1 - 1e-6) / np.linalg.norm(x.astype(np.float64)))
    return x


def flower(size: int, count: int, dropped: int, repeats: int) -> None:
    vector, modulus = direction(size, 0), 1 << 32
    given: list[Any] = [vector]
    shapes: list[tuple[int, ...]] = [(1,), (size,)]

    def quantised() -> list[Any]:
        weighted = parameters_multiply(quantize(given, 8.0, 1 << 22), 1)
        return [x.astype(np.int64) for x in factor_combine(1, weighted)]

    words = quantised()

    def two_masks() -> object:
        found = words
        for seed in (b"0123" * 8, b"4567" * 8):
            found = parameters_addition(found, pseudo_rand_gen(seed, modulus, shapes))
        return found

    quantise_ms = seconds(quantised, repeats)
    mask_ms = seconds(two_masks, repeats) / 2
    mod_ms = seconds(lambda: parameters_mod(words, modulus), repeats)
    add_ms = seconds(lambda: parameters_mod(parameters_addition(words, words), modulus), repeats)
    decode_ms = seconds(lambda: dequantize(words[1:], 8.0, 1 << 22), repeats)
    survivors = count - dropped
    near = least_degree(count)
    masks = survivors + dropped * min(near, survivors)
    client = quantise_ms + (near + 1) * mask_ms + mod_ms
    print(
        f"Flower    client {client:8.1f} ms  (computed: quantise {quantise_ms:.1f}, {near + 1} masks of {mask_ms:.1f})"
    )
    print(
        f"          server {survivors * add_ms + masks * mask_ms + mod_ms + decode_ms:8.1f} ms  (computed: {survivors} "
        f"sums of {add_ms:.1f}, {masks} masks of {mask_ms:.1f})"
    )
    print(f"          up     {words[1].nbytes / (4 * size):8.4f} of float32's bytes (int64)")


def seconds(act: Callable[[], object], repeats: int) -> float:
    """Median CPU milliseconds, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        made = act()
        times.append(1e3 * (time.process_time() - start))
        del made
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
