"""How near to the limit, and how far ahead of NumPy: both sides measured in turns within one process."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .libraries import CORES, FLOOR_ARRAYS, NETWORKS, Task, prepare
from .timing import geometric_mean, in_turns, seconds

ROUNDS = 3
SECONDS = 0.01


def compare(*calls):
    """The time of each; once before, for what a first call does."""
    for call in calls:
        call()
    return in_turns([functools.partial(seconds, call, SECONDS, 1) for call in calls], ROUNDS)


def copies(x, pool):
    """x -> memory that exists already, by NumPy in one thread and in all: which is faster depends on the size."""
    out = np.ones_like(x)
    flat, to = x.reshape(-1), out.reshape(-1)
    edges = [len(flat) * i // CORES for i in range(CORES + 1)]
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
        return geometric_mean([ratio(task) for task, _ in self.layers], [count for _, count in self.layers])

    # (asv takes less for better, whatever is tracked.)

    def track_time_of_a_copy(self, operation, network):
        """Time over that of a copy of as many bytes, by NumPy: 1 is as fast as copying. (compare.py takes PyTorch's
        copy, which is faster.)"""
        with ThreadPoolExecutor(CORES) as pool:

            def ratio(task):
                ours, *theirs = compare(prepare("cybn", task), *copies(task.array(), pool))
                return ours / (FLOOR_ARRAYS[operation] / 2 * min(theirs))

            return self.mean(ratio)

    def track_time_of_the_reference(self, operation, network):
        """Time over that of cybn.reference."""

        def ratio(task):
            ours, theirs = compare(prepare("cybn", task), prepare("numpy", task))
            return ours / theirs

        return self.mean(ratio)

    track_time_of_a_copy.unit = "times a copy's"
    track_time_of_the_reference.unit = "times NumPy's"
