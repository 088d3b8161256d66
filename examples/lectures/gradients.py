"""Gradients that flow through the statistics, and examples that depend on one another

A batch of 64 patients and their 30 measurements (breast cancer, standardized once, in float64) goes through the
layer. For L8 the gradients that come back are random; for L10 one example is changed and the others are watched.
"""

import numpy as np
from lectures.lecture import BLUE, ORANGE, SEEDS, band, each, figure, judge, spread, tumours

import cybn

CLAIMS = {
    "L8": "Gradients flow through mu and sigma, so the gradient never merely raises the mean or the standard "
    "deviation of a unit: per channel sum dx = 0 and sum dx x_norm = 0 (as eps -> 0).",
    "L10": "One training example of a batch now depends on all others: change z1, and z2, z3 change too.",
}

EPS = [1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12]
BATCH = 64
SHOWN = 12


def batch(rng, count):
    data = tumours().data
    data = (data - data.mean(axis=0)) / data.std(axis=0)
    return data[rng.permutation(len(data))[:count]]


def trial(seed):
    """For each eps: both sums, relative to the sums of absolute values; with statistics as constants, too."""
    rng = np.random.default_rng(seed)
    x = batch(rng, BATCH)
    dy = rng.normal(size=x.shape)
    sums = {"through": [], "constant": []}
    for eps in EPS:
        bn = cybn.BatchNorm1d(x.shape[1], eps=eps, dtype=np.float64)
        x_norm = bn(x)
        sums["through"].append(relative(bn.backward(dy), x_norm))
        sums["constant"].append(relative(dy / np.sqrt(x.var(axis=0) + eps), x_norm))
    return sums


def relative(dx, x_norm):
    """The largest over the channels."""
    return [(abs(terms.sum(axis=0)) / abs(terms).sum(axis=0)).max() for terms in (dx, dx * x_norm)]


def dependence(seed):
    """|d y_i / d x_j| of one channel of a small batch, by central differences."""
    x = batch(np.random.default_rng(seed), SHOWN)[:, :1]
    step = 1e-6
    columns = []
    for j in range(SHOWN):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[j] += sign * step
            ends.append(cybn.batch_norm(moved, None, None, training=True)[:, 0])
        columns.append((ends[0] - ends[1]) / (2 * step))
    return abs(np.array(columns).T)


def measure(run=map, seeds=SEEDS):
    return {**each(run, trial, seeds), "dependence": each(run, dependence, seeds)}


def others(m):
    """How far an output moves when another example's input does, relative to its own: each seed's least and mean."""
    own = np.eye(SHOWN, dtype=bool)
    share = m["dependence"] / m["dependence"][:, own].mean(axis=1)[:, None, None]
    return share[:, ~own].min(axis=1), share[:, ~own].mean(axis=1)


def numbers(m):
    for place, name in enumerate(("sum dx", "sum dx x_norm")):
        for eps in (0, 2, 4):
            yield f"L8   {name:14} relative, eps {EPS[eps]:<6g} {spread(m['through'][:, eps, place], '{:.0e}')}"
        yield f"L8   {name:14} with mu and sigma held constant   {spread(m['constant'][:, -1, place], '{:.1g}')}"
    yield f"L10  derivative of an output by another example's input, relative to its own's: {spread(others(m)[1])}"


def verdicts(m):
    smallest = m["through"][:, EPS.index(1e-10)].max()
    yield judge(
        "L8",
        [smallest < 1e-9 and m["constant"][:, -1].min() > 0.01],
        f"Both sums are at most {smallest:.0e} of their terms at eps = 1e-10; with mu and sigma held constant they "
        f"are {np.median(m['constant'][:, -1]):.1f} of them.",
    )
    least, mean = others(m)
    yield judge(
        "L10",
        [least.min() > 0],
        f"In a batch of {SHOWN} another example moves an output {100 * np.median(mean):.0f} % as far as its own input "
        f"does, and never less than {100 * least.min():.2g} %.",
    )


def draw(m):
    fig, (left, right) = figure(3.6, 1, 2)
    for place, (name, colour, marker) in enumerate((("sum dx", BLUE, "o"), ("sum dx x_norm", ORANGE, "s"))):
        band(left, EPS, m["through"][:, :, place], color=colour, marker=marker, label=name)
        label = f"{name}, statistics held constant"
        band(left, EPS, m["constant"][:, :, place], color=colour, marker=marker, linestyle=":", label=label)
    left.set(
        title="L8: the sums over a batch", xlabel="eps", ylabel="relative to the terms", xscale="log", yscale="log"
    )
    left.set_ylim(1e-25, 10)  # room for the legend
    left.legend(fontsize=8, loc="lower right")
    image = right.imshow(m["dependence"][0], cmap="cividis")
    right.set(
        title="L10: |derivative| of an output by an input",
        xlabel="example whose input moves",
        ylabel="whose output moves",
    )
    right.grid(False)
    fig.colorbar(image, ax=right, label="output's move over the input's")
    return fig
