"""Learning faster, at higher rates, deeper, and with less care

Fully connected networks learn scikit-learn's digits by plain gradient descent, 64 images a step. With and without
batch normalization they start from the same weights and see the same mini-batches. Each is asked at ten learning
rates, so neither is judged by the other's. Steps count until 90 % of the test images are right.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import (
    BLUE,
    ORANGE,
    SEEDS,
    WITH,
    WITHOUT,
    band,
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
    "L17": "With it, learning rates 5 and 30 times larger still train; 5 times ended better than 30 times.",
    "L18": "A deep sigmoid network trains with it, and does not without it.",
    "L19": "The range of hyperparameters that work grows.",
}

GOAL = 90  # % of the test images
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
SCALES = [0.1, 0.3, 1, 3, 10]
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
    m["sigmoid"] = each(run, sigmoid, seeds, [False, True], rates)  # seed, without or with, rate, step
    m["relu"] = each(run, relu, seeds, [False, True], rates)
    m["base"] = rates[fastest(m, 0)[0]]
    m["multiples"] = each(run, relu, seeds, [False, True], [times * m["base"] for times in MULTIPLES])
    # Where the median of three seeds reaches the goal: without or with, rate, scale.
    m["works"] = np.median(each(run, relu, seeds[:3], [False, True], rates, scales).max(-1), axis=0) >= GOAL
    return m


def fastest(m, layer):
    """The rate at which the median seed reaches the goal first: its index, and each seed's steps (inf: never)."""
    steps = first_reached(GOAL, m["steps"], m["relu"][:, layer])
    best = np.median(steps, axis=0).argmin()
    return best, steps[:, best]


def ends(curves):
    """Accuracy over the last tenth of the steps: single points jump."""
    return curves[..., -max(1, curves.shape[-1] // 10) :].mean(-1)


# ------------------------------------------------------------------------------------------------------------- telling


def numbers(m):
    for layer, name in enumerate(("without", "with")):
        rate, steps = fastest(m, layer)
        yield f"L16  steps to {GOAL} %, {name:8} at its fastest rate {m['rates'][rate]:<5g} {spread(steps)}"
    for i, times in enumerate(MULTIPLES):
        at = [spread(ends(m["multiples"][:, layer, i]), "{:.0f}") for layer in (0, 1)]
        yield f"L17  % at the end at rate {m['base']:g} x {times:<3} without {at[0]:15} with {at[1]}"
    for layer, name in enumerate(("without", "with")):
        best = np.median(ends(m["sigmoid"][:, layer]), axis=0).argmax()
        end = spread(ends(m["sigmoid"][:, layer, best]), "{:.0f}")
        yield f"L18  % at the end, {SIGMOID[1]} sigmoid layers, {name:8} at its best rate {m['rates'][best]:<5g} {end}"
    works = [f"{m['works'][layer].sum()} of {m['works'][layer].size}" for layer in (0, 1)]
    yield f"L19  combinations of rate and initial scale that reach {GOAL} %: without {works[0]}, with {works[1]}"


def verdict(m):
    without, with_layer = (np.median(fastest(m, layer)[1]) for layer in (0, 1))
    at = np.median(ends(m["multiples"]), axis=0)
    deep = np.median(ends(m["sigmoid"]), axis=0).max(-1)
    works = m["works"].sum((1, 2))
    held = [
        np.isfinite(with_layer) and with_layer <= without / 2,
        at[1].min() >= GOAL and at[1, 1] >= at[1, 2],
        deep[0] < 20 and deep[1] >= GOAL,
        works[1] > works[0],
    ]
    sentence = (
        f"The goal takes {with_layer:.0f} steps instead of {without:.0f}; 5 and 30 times the rate end at "
        f"{at[1, 1]:.0f} % and {at[1, 2]:.0f} % ({at[0, 1]:.0f} % and {at[0, 2]:.0f} % without); {SIGMOID[1]} "
        f"sigmoid layers learn to {deep[1]:.0f} % ({deep[0]:.0f} % without, at the best rate for that initial "
        f"scale); {works[1]} combinations of rate and scale work instead of {works[0]}."
    )
    return judge(held, sentence)


def draw(m):
    fig, panels = figure(7.2, mosaic=[["L16", "L16", "L17", "L17"], ["L18", "L18", "without", "with"]])
    for layer, style in enumerate((WITHOUT, WITH)):
        best = fastest(m, layer)[0]
        label = f"{style['label']}, rate {m['rates'][best]:g}"
        band(panels["L16"], m["steps"], m["relu"][:, layer, best], **(style | {"label": label}))
        for i, (times, width) in enumerate(zip(MULTIPLES, (1, 2, 3), strict=True)):
            label = f"{('without', 'with')[layer]}, rate x {times}"
            panels["L17"].plot(
                m["steps"],
                np.median(m["multiples"][:, layer, i], axis=0),
                **(style | {"label": label, "linewidth": width}),
            )
        band(panels["L18"], m["rates"], ends(m["sigmoid"][:, layer]), marker="o", **style)
        works = panels[("without", "with")[layer]]
        works.pcolormesh(m["works"][layer].T, cmap=COLOURS[layer], vmin=0, vmax=1, edgecolor="white")
        for (i, j), reached in np.ndenumerate(m["works"][layer]):
            works.text(i + 0.5, j + 0.5, "•" if reached else "", ha="center", va="center", color="white")
        works.set_xticks(np.arange(0, len(m["rates"]), 3) + 0.5, [f"{rate:g}" for rate in m["rates"][::3]])
        works.set_yticks(np.arange(len(m["scales"])) + 0.5, [f"{scale:g}" for scale in m["scales"]])
        works.set(title=f"L19: {m['works'][layer].sum()} {('without', 'with')[layer]}", xlabel="learning rate")
        works.grid(False)
    for name in ("L16", "L17"):
        panels[name].set(xlabel="step", ylim=(0, 101))
    panels["L16"].legend(fontsize=8, loc="lower right")
    panels["L17"].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.65), ncols=2)
    panels["L16"].set(title="L16: each at its fastest rate", ylabel="test accuracy in %")
    panels["L17"].set(title=f"L17: multiples of the rate {m['base']:g}")
    panels["L18"].set(
        title=f"L18: {SIGMOID[1]} sigmoid layers", xlabel="learning rate", ylabel="% at the end", xscale="log"
    )
    panels["L18"].set_ylim(0, 101)
    panels["L18"].legend(fontsize=8)
    panels["without"].set_ylabel("initial scale of W")
    return fig
