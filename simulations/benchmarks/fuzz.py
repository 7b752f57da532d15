"""A fuzzing campaign over every reader of bytes that others wrote.

    python -m simulations.benchmarks.fuzz --seconds 600 [--target wire,server/admit] [--seed 0] [--failures DIR]

Valid inputs of every kind are damaged by mutations that know their structure (`fuzz_mutations`), and read
(`fuzz_targets`). Every case ends in one of three ways: *accepted*, and what was accepted is as promised; *refused*, by
an error that the reader documents; *not clean*: another error, an acceptance that must not be, more than 2 s of CPU
time, two minutes of silence, a crash of the process, or more memory than 64 times the input and 8 MiB. There must be
none of the last; each is written to DIR with its traceback.

The readers run in a child process whose address space may grow by 1 GiB. In every eighth case tracemalloc measures the
peak of Python's and numpy's memory; as it slows Python down, such a case may take 20 s. Case number i of a target
depends on the seed, the target and i alone: `--target T --only I` repeats it. All times are CPU seconds of one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import signal
import sys
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NoReturn

from simulations.benchmarks.fuzz_targets import Case, Target, Unsound, is_documented, size_of, targets

SECONDS = 2.0  # of CPU time for one case
TRACED_SECONDS = 20.0
SILENCE = 120.0  # seconds by the clock without a new case
TRACED = 8  # every so many cases
MULTIPLE, MORE = 64, 8 * 2**20  # peak of memory: so many times the input, and so many bytes
GROWTH = 2**30  # bytes of address space
SLICE = 2.0  # seconds of one target before the next has its turn


class Hang(BaseException):
    """A case took too long. No `except Exception` may take it for an error of the reader."""


@dataclass
class Tally:
    """What became of the cases of one target; `peak` is the largest, of a case of `peak_of` bytes."""

    cases: int = 0
    seconds: float = 0.0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unclean: list[tuple[int, str]] = field(default_factory=list)
    peak: int = 0
    peak_of: int = 0

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        self.seconds += other.seconds
        self.accepted += other.accepted
        self.refused += other.refused
        self.unclean += other.unclean
        if other.peak > self.peak:
            self.peak, self.peak_of = other.peak, other.peak_of


def drawn(target: Target, seed: int, index: int) -> Case:
    """Case number `index`."""
    return target.draw(random.Random(f"{seed}/{target.name}/{index}"))


def attempt(target: Target, seed: int, index: int, tally: Tally, *, traced: bool) -> Case:
    """One case, and what became of it, in `tally`; gives the case back."""
    case = drawn(target, seed, index)
    tally.cases += 1
    if traced:
        tracemalloc.start()
    try:
        with _limited(TRACED_SECONDS if traced else SECONDS):
            target.read(case)
        tally.accepted += 1
    except Hang:
        tally.unclean.append((index, f"hang: more than {TRACED_SECONDS if traced else SECONDS:g} s\n{_where()}"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a reader can raise is what is looked for here
        try:
            if is_documented(error, target):
                tally.refused[type(error).__name__] += 1
            else:
                tally.unclean.append((index, f"{type(error).__name__}: {str(error)[:200]}\n{_where()}"))
        except Unsound as wrong:
            tally.unclean.append((index, f"Unsound: {wrong}\n{_where()}"))
    finally:
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            size = size_of(case)
            if peak > tally.peak:
                tally.peak, tally.peak_of = peak, size
            if peak > MULTIPLE * size + MORE:
                tally.unclean.append((index, f"memory: {peak:,} bytes for an input of {size:,}\n"))
    return case


def _where() -> str:
    return "".join(traceback.format_exc(limit=-8))[-6000:]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises: Hang inside, after so many seconds of CPU time."""

    def stop(*_: object) -> NoReturn:
        raise Hang

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def several(target: Target, seed: int, indices: Sequence[int], *, traced_every: int = TRACED) -> Tally:
    """Cases in this process, without its limits."""
    tally, began = Tally(), time.process_time()
    for index in indices:
        attempt(target, seed, index, tally, traced=index % traced_every == 0)
    tally.seconds = time.process_time() - began
    return tally


def _child(pipe: Connection, at: Synchronized[int], names: Sequence[str], seed: int) -> None:
    """Serve (target, first index, seconds) until the pipe closes."""
    found = targets()
    for name in names:  # what is made once is made before memory is limited
        several(found[name], -1, range(3))
    grown = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (grown, grown))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    while True:
        try:
            name, index, seconds = pipe.recv()
        except EOFError:
            return
        tally, began = Tally(), time.process_time()
        while time.process_time() < began + seconds:
            at.value = index
            attempt(found[name], seed, index, tally, traced=index % TRACED == 0)
            index += 1
        tally.seconds = time.process_time() - began
        pipe.send((index, tally))


class Campaign:
    """Turns of all targets in one child process, which is started anew where a case ends it."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self.names, self.seed = names, seed
        self.tallies = {name: Tally() for name in names}
        self._next = dict.fromkeys(names, 0)
        self._context = multiprocessing.get_context("spawn")

    def run(self, seconds: float) -> None:
        """For about so many CPU seconds of the readers and of the mutations; starts of the child are not counted."""
        while self.seconds < seconds:
            ours, theirs = self._context.Pipe()
            at = self._context.Value("q", 0)
            child = self._context.Process(target=_child, args=(theirs, at, self.names, self.seed), daemon=True)
            child.start()
            theirs.close()
            try:
                ours.recv()
                self._turns(ours, at, seconds)
            finally:
                ours.close()
                child.kill()
                child.join()

    @property
    def seconds(self) -> float:
        return sum(tally.seconds for tally in self.tallies.values())

    def _turns(self, pipe: Connection, at: Synchronized[int], seconds: float) -> None:
        """Until the time is over or the child has to be started anew."""
        while self.seconds < seconds:
            for name in self.names:
                pipe.send((name, self._next[name], SLICE))
                deadline, last = time.monotonic() + SILENCE, -1
                while not pipe.poll(0.2) and time.monotonic() < deadline:
                    if at.value != last:
                        deadline, last = time.monotonic() + SILENCE, at.value
                try:
                    if not pipe.poll():
                        raise EOFError("no word")
                    self._next[name], tally = pipe.recv()
                    self.tallies[name].add(tally)
                except (EOFError, ConnectionResetError) as error:
                    text = f"{str(error) or 'crash'}: the process ended or was silent for {SILENCE:g} s\n"
                    self.tallies[name].unclean.append((at.value, text))
                    self._next[name] = at.value + 1
                    return


def table(tallies: dict[str, Tally]) -> str:
    """Markdown."""
    rows = [
        "| target | cases | CPU s | cases/s | accepted | refused | largest peak, of an input of | not clean |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    total = Tally()
    for name, t in tallies.items():
        rows.append(_row(name, t))
        total.add(t)
    rows.append(_row("all", total))
    return "\n".join(rows)


def _row(name: str, t: Tally) -> str:
    refused = ", ".join(f"{kind} {count:,}" for kind, count in t.refused.most_common())
    peak = f"{t.peak / 2**20:.1f} MiB of {t.peak_of / 2**20:.3f}" if t.peak else ""
    speed = t.cases / t.seconds if t.seconds else 0.0
    return (
        f"| {name} | {t.cases:,} | {t.seconds:.0f} | {speed:,.0f} | {t.accepted:,} | {refused} | {peak} |"
        f" {len(t.unclean)} |"
    )


def write_failures(folder: Path, tallies: dict[str, Tally], seed: int) -> None:
    """For each kind of failure of a target its first cases: their files, and how to repeat them."""
    found = targets()
    for name, tally in tallies.items():
        seen: Counter[str] = Counter()
        for index, text in tally.unclean:
            kind = text.split("\n", 1)[0][:60]
            seen[kind] += 1
            if seen[kind] > 3:
                continue
            where = folder / f"{name.replace('/', '-')}-{index}"
            where.mkdir(parents=True, exist_ok=True)
            command = f"python -m simulations.benchmarks.fuzz --target {name} --seed {seed} --only {index}"
            (where / "why.txt").write_text(f"{command}\n\n{text}", errors="backslashreplace")
            for number, (path, content) in enumerate(drawn(found[name], seed, index).items()):
                (where / f"{number}.bin").write_bytes(content if isinstance(content, bytes) else b"")
                with (where / "files.txt").open("a", errors="backslashreplace") as file:
                    file.write(f"{number}.bin {path!r} {'' if isinstance(content, bytes) else content}\n")


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """The targets whose names begin with one of those in `text`, which has commas between them; all for an empty one.

    Raises: SystemExit for one that is unknown.
    """
    wanted = [part for part in text.split(",") if part]
    if strange := [w for w in wanted if not any(name.startswith(w) for name in known)]:
        raise SystemExit(f"unknown target {', '.join(strange)}; known: {', '.join(known)}")
    return [name for name in known if not wanted or any(name.startswith(w) for w in wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--target", default="", help="names or beginnings of names, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--only", type=int, help="this one case, in this process")
    options = parser.parse_args()
    found = targets()
    names = chosen(options.target, list(found))
    if options.only is not None:
        tallies = {name: several(found[name], options.seed, [options.only]) for name in names}
        for tally in tallies.values():
            print("".join(text for _, text in tally.unclean) or f"clean: {dict(tally.refused) or 'accepted'}")
    else:
        campaign = Campaign(names, options.seed)
        campaign.run(options.seconds)
        tallies = campaign.tallies
        print(table(tallies))
    if any(tally.unclean for tally in tallies.values()):
        write_failures(options.failures, tallies, options.seed)
        sys.exit(f"not clean: see {options.failures}")


if __name__ == "__main__":
    main()
