"""Time of a call on machines that are not at hand, on paper: from the plan, bytes, bandwidths and barriers.

    python benchmarks/model.py

The thread with most to do, at its share of the bandwidth, plus the meetings of the threads. What is revisited in a
cache counts as free; results are streamed. The machines are assumptions, not measurements.
"""

import math
from typing import NamedTuple

from cybn import _schedule

MIB = 1024 * 1024


class Machine(NamedTuple):
    cores: int
    core: float  # GB/s that one core can move
    socket: float  # GB/s of all together
    l2: int
    l3: int
    barrier: float = 0.5e-6  # seconds, times log2 of the threads


MACHINES = [
    Machine(2, 15, 25, MIB // 2, 32 * MIB),
    Machine(16, 15, 150, 2 * MIB, 32 * MIB),
    Machine(64, 15, 300, 2 * MIB, 128 * MIB),
]
GEOMETRIES = [
    ("(32, 64, 112, 112)", (32, 64, 12544)),
    ("(32, 256, 56, 56)", (32, 256, 3136)),
    ("(32, 256, 14, 14)", (32, 256, 196)),
    ("(32, 2048, 7, 7)", (32, 2048, 49)),
    ("(64, 3, 224, 224)", (64, 3, 50176)),
    ("(32, 64, 112, 112) channels-last", (401408, 64, 1)),
    ("(32, 2048, 7, 7) channels-last", (1568, 2048, 1)),
    ("(1000000, 10)", (1000000, 10, 1)),
]


def training_forward(geometry, machine):
    """The plan, and seconds."""
    plan = _schedule.plan_of(*geometry, machine.cores, l2=machine.l2, l3=machine.l3)
    threads = plan["threads"]
    shares = [0] * threads
    for thread, elements, *_ in plan["tasks"]:
        shares[thread] += elements
    arrays = 3 if plan["kind"] == "two sweeps" and plan["distant"] else 2
    speed = min(machine.core, machine.socket / threads) * 1e9
    meetings = 3 * plan["bands"] + 1
    return plan, arrays * 4 * max(shares) / speed + meetings * machine.barrier * math.log2(max(threads, 2))


def main():
    head = "".join(f" | {m.cores} cores: plan | ms | speed-up" for m in MACHINES)
    print(f"| training forward{head} |")
    print("|---" + "|---|--:|--:" * len(MACHINES) + "|")
    for name, geometry in GEOMETRIES:
        alone = training_forward(geometry, MACHINES[0]._replace(cores=1))[1]
        cells = ""
        for machine in MACHINES:
            plan, seconds = training_forward(geometry, machine)
            cells += f" | {plan['kind']}, {plan['threads']} | {1000 * seconds:.2f} | {alone / seconds:.1f}x"
        print(f"| {name}{cells} |")


if __name__ == "__main__":
    main()
