"""Peak memory of a run over many clients against a run over ten, each in its own process.

    python -m simulations.benchmarks.many_clients [--clients 1000] [--rounds 20]

One hundredth of the many (at least ten) take part in each round; the ten all take part. Prints both peaks and their
ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def peak(folder: Path, *, clients: int, share: float, rounds: int) -> tuple[float, float]:
    """(peak MiB, seconds) of one run in a process of its own."""
    settings = {
        "rounds.clients": clients,
        "rounds.fraction": share,
        "rounds.count": rounds,
        "training.local_steps": 5,
        "training.threads": 1,
        "evaluation.every": 0,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "fedlora.cli", "simulate", "--out", str(folder), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    end = next(e for e in events if e["event"] == "end")
    return float(end["peak_memory_mib"]), float(end["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    share = max(0.01, 10 / arguments.clients)
    with tempfile.TemporaryDirectory() as name:
        few, few_seconds = peak(Path(name) / "few", clients=10, share=1.0, rounds=arguments.rounds)
        many, seconds = peak(Path(name) / "many", clients=arguments.clients, share=share, rounds=arguments.rounds)
    print(f"10 clients, all in every round:            peak {few:7.1f} MiB, {few_seconds:6.1f} s")
    print(f"{arguments.clients} clients, {share:.1%} in every round: peak {many:7.1f} MiB, {seconds:6.1f} s")
    print(f"peak memory, many over ten: {many / few:.3f}")


if __name__ == "__main__":
    main()
