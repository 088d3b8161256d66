"""How what asv does not time itself is timed: in turns, by medians, and averaged over the layers of a network."""

import math
import statistics
import time


def seconds(call, duration, least):
    """Of a call, the median of `least` calls or of as many as fit into `duration` seconds."""
    times = []
    end = time.perf_counter() + duration
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turns(measures, rounds):
    """The median of each over rounds in which all have their turn, each round beginning with another."""
    times = [[] for _ in measures]
    for first in range(rounds):
        for turn in range(len(measures)):
            index = (first + turn) % len(measures)
            times[index].append(measures[index]())
    return [statistics.median(column) for column in times]


def geometric_mean(values, counts):
    """Of values that occur so often."""
    return math.exp(sum(n * math.log(v) for v, n in zip(values, counts, strict=True)) / sum(counts))
