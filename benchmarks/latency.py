"""How long small evaluations take, call by call, on an idle machine and on a busy one: p50, p99, p99.9.

A request's view: a pause of a millisecond before each call, so that helpers sleep and caches have been used by others.
Busy: as many other processes compute as there are cores. Each library in a process of its own, in turns; what is shown
is the median over the rounds. Run by `make latency`, with cybn's default of threads and with one.

    python benchmarks/latency.py [--rounds 3] [--calls 1000] [--markdown]
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
from benchmarks.libraries import CORES, Task, prepare
from tqdm import tqdm

SHAPES = [(1, 64), (1, 64, 14, 14), (1, 64, 56, 56), (8, 64, 56, 56)]
# Name, library, threads, environment. (A library that is not installed is left out.)
VARIANTS = [
    ("cybn", "cybn", None, {}),
    ("cybn, 1 thread", "cybn", 1, {}),
    ("PyTorch", "torch", None, {}),
    ("PyTorch, 1 thread", "torch", 1, {}),
    ("PyTorch, passive", "torch", None, {"OMP_WAIT_POLICY": "passive"}),
]
PERCENTILES = (50, 99, 99.9)
BURN = "while True: pass"


@contextlib.contextmanager
def busy(processes):
    """While others want the processors."""
    others = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(processes)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def microseconds(library, threads, shape, calls):
    """In this process: percentiles over the calls, which take five seconds at most."""
    call = prepare(library, Task("evaluation", shape, threads=threads))
    for _ in range(20):
        call()
    times, end = [], time.monotonic() + 5
    while len(times) < calls and time.monotonic() < end:
        time.sleep(0.001)
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1000)
    return [float(np.percentile(times, p)) for p in PERCENTILES]


def in_a_process(library, threads, shape, calls, environment):
    """The same in a fresh process; None: the library is not installed."""
    command = [sys.executable, __file__, "--one", json.dumps([library, threads, shape, calls])]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        if "NotImplementedError" in done.stderr:
            return None
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=1000, help="in a round (%(default)s)")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(microseconds(*json.loads(args.one))))
        return
    found = {}
    loads = {"idle": 0, "busy": CORES}
    with tqdm(total=args.rounds * len(loads) * len(SHAPES) * len(VARIANTS), unit="run", ncols=100) as progress:
        for _ in range(args.rounds):
            for load, processes in loads.items():
                with busy(processes):
                    for shape in SHAPES:
                        for name, library, threads, environment in VARIANTS:
                            progress.set_description(f"{load}: {name}")
                            times = in_a_process(library, threads, shape, args.calls, environment)
                            if times:
                                found.setdefault((load, shape, name), []).append(times)
                            progress.update()
    row = "| {} | {} | {} | {} | {} | {} |".format if args.markdown else "{:<5} {:<16} {:<18} {:>9} {:>9} {:>9}".format
    print(row("", "evaluation of", "", *(f"p{p:g} us" for p in PERCENTILES)))
    if args.markdown:
        print("|---|---|---|--:|--:|--:|")
    for (load, shape, name), rounds in found.items():
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(row(load, str(shape), name, *(f"{value:,.1f}" for value in medians)))


if __name__ == "__main__":
    main()
