"""What the lectures have in common: their parts, seeds, how a spread is shown, how pictures look.

A lecture is a module with a docstring (a title; then what is measured, and how) and

CLAIMS          what is claimed: {"L16": "...", ...}
measure(run)    the measurements, as a dict; `run(function, *iterables)` calls like `map`, maybe in several processes
numbers(m)      lines to print
verdicts(m)     a `Verdict` on each claim, in their order
draw(m)         a matplotlib `Figure`
"""

import itertools
from functools import cache
from typing import NamedTuple

import matplotlib
import networks
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.datasets import load_breast_cancer

SEEDS = range(5)

WIDTH = 8  # inches; shown 800 pixels wide
DPI = 150

# Okabe and Ito's colours, which the colour-blind can tell apart; never told apart by colour alone.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
NAMES = ("without", "with")
WITHOUT = {"label": "without", "color": ORANGE, "linestyle": "--"}
WITH = {"label": "with batch normalization", "color": BLUE, "linestyle": "-"}

matplotlib.rcParams.update(
    {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "0.9",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
    }
)


class Verdict(NamedTuple):
    claim: str
    held: str
    sentence: str


def judge(claim, parts, sentence):
    """By whether each part of the claim held."""
    return Verdict(claim, "Held" if all(parts) else "Held in part" if any(parts) else "Did not hold", sentence)


@cache
def digits():
    """Training and test images and digits: the same split in every process."""
    return networks.load_data(np.random.default_rng(0))


@cache
def tumours():
    """Breast cancer: 569 tumours, 30 features each, benign (1) or malignant (0)."""
    return load_breast_cancer()


def each(run, function, *axes):
    """The results of `function` for every combination, as an array: first the axes given, then those of a result.

    Where a result is a dict, a dict of such arrays.
    """
    results = list(run(function, *zip(*itertools.product(*axes), strict=True)))

    def gather(values):
        values = np.array(values)
        return values.reshape(*map(len, axes), *values.shape[1:])

    if isinstance(results[0], dict):
        return {key: gather(values) for key, values in by_key(results).items()}
    return gather(results)


def by_key(rows):
    """Dicts that have the same keys, as one dict of lists."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def first_reached(goal, steps, curves):
    """The step at which each curve reaches the goal; inf: never."""
    reached = curves >= goal
    return np.where(reached.any(-1), steps[reached.argmax(-1)], np.inf)


def spread(values, form="{:.3g}"):
    """Median and range over the seeds, as text."""
    middle, low, high = (form.format(number(values)) for number in (np.median, np.min, np.max))
    return f"{middle} ({low} to {high})"


def beyond_chance(better):
    """Whether so many of the seeds, if it made no difference, would be better in less than one case of ten."""
    return binomtest(int(np.sum(better)), len(better), alternative="greater").pvalue < 0.1


def figure(height, rows=1, columns=1, mosaic=None):
    """A figure and its panels: an array of them, or a dict by the names in a mosaic."""
    fig = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return fig, fig.subplots(rows, columns) if mosaic is None else fig.subplot_mosaic(mosaic)


def band(axes, x, runs, **style):
    """The median over the seeds, which are the rows of `runs`, and their range."""
    (line,) = axes.plot(x, np.median(runs, axis=0), **style)
    axes.fill_between(x, np.min(runs, axis=0), np.max(runs, axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
    return line
