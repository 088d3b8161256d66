"""Learning faster, at higher rates, deeper, and with less care

Fully connected networks learn scikit-learn's digits by plain gradient descent, 300 steps of 64 images: five ReLU layers
of 50 units, and for L18 nine sigmoid layers of 50. With and without batch normalization they start from the same
weights and see the same mini-batches. For L16 each is asked at ten learning rates and counted at its own fastest; L17
multiplies the rate that is fastest without the layer. For L18 and L19 ten rates times six scales of the initial W (1: a
variance of 2 over the inputs, as for ReLU) are tried on three seeds each. What is reached at the end is the mean over
the last tenth of the steps.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import (
    BLUE,
    NAMES,
    ORANGE,
    SEEDS,
    WITH,
    WITHOUT,
    band,
    beyond_chance,
    digits,
    each,
    figure,
    first_reached,
    judge,
    spread,
)
from matplotlib.colors import ListedColormap

CLAIMS = {
    "L16": "Networks with batch normalization reach the same accuracy in half the steps or fewer.",
    "L17": "With it, learning rates 5 and 30 times larger still train (in the paper's figure 5 times ended better than "
    "30 times).",
    "L18": "A deep sigmoid network trains with it, and does not without it.",
    "L19": "The range of hyperparameters that work grows.",
}

GOAL = 90  # % of the test images
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
SCALES = [0.1, 0.3, 1, 2, 5, 10]
RELU = (networks.ReLU, 5)  # layers of 50 units
SIGMOID = (networks.Sigmoid, 9)
COLOURS = [ListedColormap(["0.92", colour]) for colour in (ORANGE, BLUE)]
MULTIPLES = [1, 5, 30]
STEPS = 300
EVERY = 5

# ----------------------------------------------------------------------------------------------------------- measuring


def curve(seed, with_layer, rate, scale=1, *, kind, steps):
    """Test accuracies in %, every EVERY steps."""
    activation, depth = kind
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer, [64] + [50] * depth, activation, scale)
    with np.errstate(all="ignore"):  # what diverges ends in NaN
        points = networks.train(network, networks.GradientDescent(rate), digits(), steps, rng, every=EVERY)
    return [accuracy for _, accuracy in points]


def measure(run=map, seeds=SEEDS, rates=RATES, scales=SCALES, steps=STEPS):
    m = {"rates": rates, "scales": scales, "steps": np.arange(0, steps + 1, EVERY)}
    relu, sigmoid = (partial(curve, kind=kind, steps=steps) for kind in (RELU, SIGMOID))
    m["relu"] = each(run, relu, seeds, [False, True], rates)  # seed, without or with, rate, step
    m["base"] = rates[fastest(m, 0)[0]]
    m["multiples"] = each(run, relu, seeds, [False, True], [times * m["base"] for times in MULTIPLES])
    # At the end: seed, without or with, rate, scale.
    m["sigmoid grid"], m["relu grid"] = (
        ends(each(run, kind, seeds[:3], [False, True], rates, scales)) for kind in (sigmoid, relu)
    )
    return m


def fastest(m, layer):
    """The rate at which the median seed reaches the goal first: its index, and each seed's steps (inf: never)."""
    steps = first_reached(GOAL, m["steps"], m["relu"][:, layer])
    best = np.median(steps, axis=0).argmin()
    return best, steps[:, best]


def ends(curves):
    """Accuracy over the last tenth of the steps: single points jump."""
    return curves[..., -max(1, curves.shape[-1] // 10) :].mean(-1)


def works(m):
    """Combinations of rate and scale whose median seed ends at the goal or above: without or with, rate, scale."""
    return np.median(m["relu grid"], axis=0) >= GOAL


def deep(m, layer):
    """The sigmoid networks at the best rate for each scale: the rates, and the ends (seed, scale)."""
    grid = m["sigmoid grid"][:, layer]
    best = np.median(grid, axis=0).argmax(axis=0)
    return np.array(m["rates"])[best], grid[:, best, np.arange(len(best))]


# ------------------------------------------------------------------------------------------------------------- telling


def numbers(m):
    for layer, name in enumerate(NAMES):
        rate, steps = fastest(m, layer)
        yield f"L16  steps to {GOAL} %, {name:8} at its fastest rate {m['rates'][rate]:<5g} {spread(steps)}"
    for i, times in enumerate(MULTIPLES):
        at = [spread(ends(m["multiples"][:, layer, i]), "{:.0f}") for layer in (0, 1)]
        yield f"L17  % at the end at rate {m['base']:g} x {times:<3} without {at[0]:15} with {at[1]}"
    for layer, name in enumerate(NAMES):
        rates, reached = deep(m, layer)
        for scale, rate, end in zip(m["scales"], rates, reached.T, strict=True):
            at = f"scale {scale:<4g} its best rate {rate:<5g}"
            yield f"L18  % at the end, {SIGMOID[1]} sigmoid layers, {name:8} {at} {spread(end, '{:.0f}')}"
    for layer, name in enumerate(NAMES):
        count = f"{works(m)[layer].sum()} of {works(m)[layer].size}"
        yield f"L19  combinations of rate and initial scale that end at {GOAL} % or more: {name:8} {count}"


def verdicts(m):
    without, with_layer = (np.median(fastest(m, layer)[1]) for layer in (0, 1))
    yield judge(
        "L16",
        [np.isfinite(with_layer) and with_layer <= without / 2],
        f"{GOAL} % takes {with_layer:.0f} steps instead of {without:.0f}, each at its fastest rate.",
    )
    end = ends(m["multiples"])
    at = np.median(end, axis=0)
    better = end[:, 1, 1] > end[:, 1, 2]
    yield judge(
        "L17",
        [at[1].min() >= GOAL, beyond_chance(better)],
        f"5 and 30 times the rate end at {at[1, 1]:.1f} % and {at[1, 2]:.1f} % ({at[0, 1]:.0f} % and {at[0, 2]:.0f} % "
        f"without); 5 times ends better than 30 times for {better.sum()} of {len(better)} seeds"
        f"{'' if beyond_chance(better) else ', no difference to be seen'}.",
    )
    usual = m["scales"].index(1)
    scaled = [np.median(deep(m, layer)[1], axis=0) for layer in (0, 1)]
    best = scaled[0].argmax()
    yield judge(
        "L18",
        [scaled[1].min() >= GOAL, scaled[0][usual] < 20, scaled[0].max() < 20],
        f"With the layer {SIGMOID[1]} sigmoid layers learn to {scaled[1].min():.0f} % or more from every initial scale "
        f"tried. Without it they learn to {scaled[0][usual]:.0f} % at the usual scale, which is chance, whatever the "
        f"rate, and to {scaled[0][best]:.0f} % at most, with {m['scales'][best]:g} times that scale.",
    )
    count = works(m).sum((1, 2))
    yield judge(
        "L19",
        [count[1] > count[0]],
        f"{count[1]} of {works(m)[0].size} combinations of rate and scale work instead of {count[0]}.",
    )


SHADES = (("#F0A878", ORANGE, "#7A3600"), ("#6FB7E3", BLUE, "#003A5C"))  # of the two layers' colours


def draw(m):
    fig, panels = figure(7.6, mosaic=[["L16", "L16", "L17", "L17"], ["L18", "L18", "without", "with"]])
    for layer, style in enumerate((WITHOUT, WITH)):
        best = fastest(m, layer)[0]
        label = f"{style['label']}, rate {m['rates'][best]:g}"
        band(panels["L16"], m["steps"], m["relu"][:, layer, best], **(style | {"label": label}))
        for i, (times, marker) in enumerate(zip(MULTIPLES, "os^", strict=True)):
            middle = np.median(m["multiples"][:, layer, i], axis=0)
            label = f"{NAMES[layer]}, rate x {times}"
            # The larger the rate, the darker; markers of different curves at different steps.
            shade = {"color": SHADES[layer][i], "linewidth": 1.2, "markersize": 6}
            panels["L17"].plot(
                m["steps"], middle, marker=marker, markevery=(2 + 3 * i, 9), **(style | {"label": label} | shade)
            )
        band(panels["L18"], m["scales"], deep(m, layer)[1], marker="o", **style)
        draw_grid(panels[NAMES[layer]], m, layer)
    for name in ("L16", "L17", "L18"):
        panels[name].set_ylim(0, 101)
    for name in ("L16", "L17"):
        panels[name].set(xlabel="step", ylabel="test accuracy in %")
    panels["L16"].legend(fontsize=8, loc="lower right")
    panels["L17"].legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.7))
    panels["L16"].set_title("L16: each at its fastest rate")
    panels["L17"].set_title(f"L17: multiples of the rate {m['base']:g}, medians")
    panels["L18"].set(title=f"L18: {SIGMOID[1]} sigmoid layers, at the best rate", xlabel="initial scale of W")
    panels["L18"].set(ylabel="test accuracy in %, at the end", xscale="log")
    panels["L18"].set_xticks(m["scales"], [f"{scale:g}" for scale in m["scales"]])
    panels["L18"].minorticks_off()
    panels["L18"].legend(fontsize=8, loc="center left")
    panels["without"].set_ylabel("initial scale of W")
    return fig


def draw_grid(axes, m, layer):
    reached = works(m)[layer]
    axes.pcolormesh(reached.T, cmap=COLOURS[layer], vmin=0, vmax=1, edgecolor="white")
    for i, j in np.argwhere(reached):
        axes.text(i + 0.5, j + 0.5, "•", ha="center", va="center", color="white")
    axes.set_xticks(np.arange(0, len(m["rates"]), 3) + 0.5, [f"{rate:g}" for rate in m["rates"][::3]])
    axes.set_yticks(np.arange(len(m["scales"])) + 0.5, [f"{scale:g}" for scale in m["scales"]])
    axes.set_title(f"L19: {reached.sum()} of {reached.size} {NAMES[layer]}\n(•: {GOAL} % or more)")
    axes.set_xlabel("learning rate")
    axes.grid(False)
