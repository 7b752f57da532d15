"""What the in-process engine costs beside training, and the same run under Flower's own simulation.

    python -m simulations.benchmarks.engine [--rounds 4] [--threads 1] [--flower]

Prints the wall time of a simulated run without evaluation over the sum of its clients' optimiser steps, and with
`--flower` the wall time of the same run by `flwr run` (its processes, Ray and messages included) over ours.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from clients.app import app
from clients.resident import resident_base
from fedlora.config import RunConfig, flat, load_config
from fedlora.report.log import read_log
from server.app import open_run, run
from simulations.engine import LocalGrid
from simulations.flower import FlowerSimulation


def in_process(config: RunConfig, folder: Path) -> tuple[float, float, float]:
    """(wall seconds of the run, seconds in the clients' training calls, seconds in their optimiser steps)."""
    resident_base(config.model)
    open_run(folder, config)
    grid = LocalGrid(app, clients=config.rounds.clients, run_config=flat(config), memory=folder / "clients")
    began = time.perf_counter()
    run(grid, config, folder, evaluator=None, notify=lambda event: None)
    wall = time.perf_counter() - began
    told = [c for e in read_log(folder) if e["event"] == "round" for c in e["clients"]]
    return wall, sum(c["seconds"] for c in told), sum(c["step_seconds"] for c in told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--method", default="flora")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than one starves a process pool")
    parser.add_argument("--flower", action="store_true", help="also under Flower's own simulation")
    arguments = parser.parse_args()
    config = load_config(
        None,
        [
            f"method.name={arguments.method}",
            f"rounds.count={arguments.rounds}",
            f"training.threads={arguments.threads}",
            "evaluation.server=false",
            "evaluation.every=0",
            "data.holdout=0",
        ],
    )
    with tempfile.TemporaryDirectory() as name:
        wall, calls, steps = in_process(config, Path(name) / "here")
        print(f"{arguments.method}, {config.rounds.clients} clients, {arguments.rounds} rounds, in this process")
        print(f"  wall {wall:.2f} s, training calls {calls:.2f} s, optimiser steps {steps:.2f} s")
        print(f"  wall over optimiser steps: {wall / steps:.3f}")
        if arguments.flower:
            with FlowerSimulation(Path(__file__).resolve().parents[2], Path(name) / "home") as flower:
                began = time.perf_counter()
                status, log = flower.run(config, Path(name) / "there")
                theirs = time.perf_counter() - began
            if status != "finished:completed":
                raise SystemExit(log)
            same = (Path(name) / "there/adapter/adapter_model.safetensors").read_bytes() == (
                Path(name) / "here/adapter/adapter_model.safetensors"
            ).read_bytes()
            print(f"  the same run under Flower's simulation: {theirs:.2f} s, {theirs / wall:.2f} times ours")
            print(f"  adapters byte-identical: {same}")


if __name__ == "__main__":
    main()
