"""Covariate shift, of the data and inside the network

Outside: a network trained on white ink on black looks at digits on ever greyer paper: no pixel is darker than the
paper, max(x, grey). Then again with the statistics of the training images on that paper, which takes no labels.
Inside: while the network of the demo learns, percentiles over the test images of what its third layer takes in, the
activations of the second. Whatever moves them are layers 1 and 2. A unit's median is followed every fifth step, in
standard deviations of the unit at the end, averaged over units: how far it is from where it began (the shift), and how
long the way was.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import (
    GREEN,
    NAMES,
    SEEDS,
    WITH,
    WITHOUT,
    band,
    beyond_chance,
    by_key,
    digits,
    each,
    figure,
    judge,
    spread,
)

CLAIMS = {
    "L21": "Covariate shift: a model trained on black cats fails on coloured ones; inside a network the inputs of "
    "layer 3 move while layers 1 and 2 learn, and normalization limits how far.",
}

GREYS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
PERCENTILES = [15, 50, 85]
GREY = GREYS.index(0.5)  # whose figures are told
FAILS = 20  # a model that loses so many percentage points there, at the median seed
RATE = 1  # the demo's: the one that suits the network without the layer best
EVERY = 5
UNIT = 0  # whose percentiles are drawn


def third_inputs(network, x):
    """What enters the third layer, by the statistics of these examples, as in training."""
    _, second, *_ = (i for i, layer in enumerate(network.layers) if isinstance(layer, networks.Sigmoid))
    state = network.state_dict()
    for layer in network.train().layers[: second + 1]:
        x = layer(x)
    network.load_state_dict(state)  # looking changes no running average
    return x


def on_paper(x, grey):
    return np.maximum(x, np.float32(grey))


def trial(seed, with_layer, steps):
    """Percentiles and deviation of each unit every EVERY steps; accuracies on grey paper, and by its statistics."""
    x, digit, x_test, digit_test = digits()
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer)
    watched = []

    def watch():
        a = third_inputs(network, x_test)
        watched.append({"percentiles": np.percentile(a, PERCENTILES, axis=0), "deviation": a.std(axis=0)})

    watch()
    for step, _ in networks.descent(network, networks.GradientDescent(RATE), x, digit, steps, rng):
        if step % EVERY == 0:
            watch()
    network.eval()
    papers = [on_paper(x_test, grey) for grey in GREYS]
    plain = [networks.accuracy(network(paper), digit_test) for paper in papers]
    adapted = []
    for grey, paper in zip(GREYS, papers, strict=True):
        networks.set_population_statistics(network, on_paper(x, grey))
        adapted.append(networks.accuracy(network(paper), digit_test))
    return {**by_key(watched), "plain": plain, "adapted": adapted}


def measure(run=map, seeds=SEEDS, steps=300):
    m = each(run, partial(trial, steps=steps), seeds, [False, True])  # seed, without or with, step, ...
    median = m["percentiles"][..., PERCENTILES.index(50), :] / m["deviation"][:, :, -1:]
    return {
        "steps": np.arange(0, steps + 1, EVERY),
        "unit": m["percentiles"][0, ..., UNIT],  # without or with, step, percentile
        # Seed, without or with, step; mean of the units.
        "shift": abs(median - median[:, :, :1]).mean(-1),
        "way": abs(np.diff(median, axis=2, prepend=median[:, :, :1])).mean(-1).cumsum(-1),
        "plain": m["plain"],  # seed, without or with, grey
        "adapted": m["adapted"][:, 1],  # seed, grey
    }


def loss_of_accuracy(m):
    """Percentage points that each seed loses on grey paper: without, with, and with the grey paper's statistics."""
    return [*(m["plain"][..., 0] - m["plain"][..., GREY]).T, m["plain"][:, 1, 0] - m["adapted"][:, GREY]]


def numbers(m):
    for layer, name in enumerate(NAMES):
        at = [spread(m["plain"][:, layer, i], "{:.0f}") for i in (0, GREY)]
        yield f"L21  {name:8} accuracy in % on black paper {at[0]:15} on grey ({GREYS[GREY]:g}) {at[1]}"
    yield f"L21  with, its statistics those of grey paper: {spread(m['adapted'][:, GREY], '{:.0f}')}"
    for name, lost in zip((*NAMES, "with, statistics of grey paper"), loss_of_accuracy(m), strict=True):
        yield f"L21  points lost on grey paper, by seed: {spread(lost, '{:.0f}'):16} {name}"
    for key, what in (("shift", "shift of a unit's median"), ("way", "way of a unit's median")):
        for layer, name in enumerate(NAMES):
            yield f"L21  {what}, in its standard deviations: {spread(m[key][:, layer, -1], '{:.2f}'):22} {name}"


def verdicts(m):
    lost = loss_of_accuracy(m)
    moved = {key: np.median(m[key][..., -1], axis=0) for key in ("shift", "way")}
    limited = m["shift"][:, 1, -1] < m["shift"][:, 0, -1]
    yield judge(
        "L21",
        [min(np.median(lost[0]), np.median(lost[1])) > FAILS, beyond_chance(limited)],
        f"On grey paper the network loses {np.median(lost[0]):.0f} points without the layer and "
        f"{np.median(lost[1]):.0f} with it ({np.median(lost[2]):.0f} with the statistics of grey paper). Inside, the "
        f"median of an input of layer 3 ends {moved['shift'][0]:.2f} standard deviations from where it began without "
        f"normalization and {moved['shift'][1]:.2f} with it, after a way of {moved['way'][0]:.1f} and "
        f"{moved['way'][1]:.1f}.",
    )


def draw(m):
    fig, panels = figure(8, 3, 2)
    (without, with_layer), (shift, way), (grey, example) = panels
    for axes, percentiles, style, name in zip((without, with_layer), m["unit"], (WITHOUT, WITH), NAMES, strict=True):
        low, middle, high = percentiles.T
        axes.plot(m["steps"], middle, color=style["color"], label="median")
        axes.fill_between(m["steps"], low, high, color=style["color"], alpha=0.25, linewidth=0, label="15 % to 85 %")
        axes.set(title=f"L21: an input of layer 3, {name}", xlabel="step", ylabel="value", ylim=(0, 1))
        axes.legend(fontsize=8)
    for layer, style in enumerate((WITHOUT, WITH)):
        band(shift, m["steps"], m["shift"][:, layer], **style)
        band(way, m["steps"], m["way"][:, layer], **style)
        band(grey, GREYS, m["plain"][:, layer], marker="o", **style)
    label = "with, statistics of grey paper"
    band(grey, GREYS, m["adapted"], color=GREEN, linestyle="-.", marker="s", label=label)
    for axes, title in ((shift, "L21: shift of the median"), (way, "L21: way of the median")):
        axes.set(title=f"{title}, mean of all inputs", xlabel="step", ylabel="standard deviations")
        axes.legend(fontsize=8)
    grey.set(title="L21: a test set that is shifted", xlabel="grey of the paper", ylabel="accuracy in %", ylim=(0, 101))
    grey.legend(fontsize=8)
    papers = [on_paper(digits()[2][:4, 0], paper) for paper in (0, GREYS[GREY])]
    example.imshow(np.block([list(images) for images in papers]), cmap="gray", vmin=0, vmax=1)
    example.set(title=f"black paper, and grey ({GREYS[GREY]:g})", xticks=[], yticks=[])
    example.grid(False)
    return fig
