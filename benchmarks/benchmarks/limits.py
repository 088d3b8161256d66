"""How near to the limit, and how far ahead of NumPy: both sides measured in turns within one process."""

import itertools
import math
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .libraries import FLOOR_ARRAYS, NETWORKS, Task, prepare

ROUNDS = 3
SECONDS = 0.01


def median_time(call):
    times = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turns(*calls):
    """The medians over rounds in which each call has its turn."""
    for call in calls:
        call()
    rounds = [[median_time(call) for call in calls] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def copies(x, pool):
    """x -> memory that exists already, by NumPy in one thread and in all: which is faster depends on the size."""
    out = np.ones_like(x)
    flat, to = x.reshape(-1), out.reshape(-1)
    workers = pool._max_workers
    edges = [len(flat) * i // workers for i in range(workers + 1)]
    parts = [(to[a:b], flat[a:b]) for a, b in itertools.pairwise(edges)]
    return lambda: np.copyto(to, flat), lambda: list(pool.map(lambda part: np.copyto(*part), parts))


class Limits:
    """Geometric means over the layers of a network, each as often as it occurs."""

    params = (["training", "evaluation", "backward"], list(NETWORKS))
    param_names = ("operation", "network")
    timeout = 300

    def setup(self, operation, network):
        self.layers = [(Task(operation, shape), count) for shape, count in NETWORKS[network]]

    def mean(self, ratio):
        total = sum(count for _, count in self.layers)
        return math.exp(sum(count * math.log(ratio(task)) for task, count in self.layers) / total)

    def track_copy_fraction(self, operation, network):
        """Floor bytes per second over those of a copy by NumPy: 1 is as fast as copying. (compare.py takes PyTorch's
        copy, which is faster.)"""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

            def ratio(task):
                ours, *theirs = in_turns(prepare("cybn", task), *copies(task.array(), pool))
                return FLOOR_ARRAYS[operation] / 2 * min(theirs) / ours

            return self.mean(ratio)

    def track_speedup(self, operation, network):
        """Times as fast as cybn.reference."""

        def ratio(task):
            ours, theirs = in_turns(prepare("cybn", task), prepare("numpy", task))
            return theirs / ours

        return self.mean(ratio)

    track_copy_fraction.unit = "of a copy"
    track_speedup.unit = "times NumPy"
