"""Covariate shift, of the data and inside the network

Outside: a network trained on white ink on black looks at digits on ever greyer paper, x' = g + (1 - g) x, then again
with the grey images' own statistics (which remove a shift that is affine, as this one, exactly). Inside: while a
network learns, percentiles of what enters the activation of its last hidden layer, over the test images. Without
batch normalization that is z = W a + b, with it BN(W a). How far a unit's median moves is counted in standard
deviations of the unit at the end, added up over every fifth step and averaged over units.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import GREEN, SEEDS, WITH, WITHOUT, band, digits, each, figure, judge, spread

CLAIMS = {
    "L21": "Covariate shift: a model trained on black cats fails on coloured ones; inside a network the inputs of "
    "layer 3 move while layers 1 and 2 learn, and normalization limits how far.",
}

GREYS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
PERCENTILES = [15, 50, 85]
RATE = 1  # the demo's: the one that suits the network without the layer best
EVERY = 5
UNIT = 0  # whose percentiles are drawn


def inputs(network, x):
    """What enters the last activation, by the statistics of these examples, as in training."""
    last = max(i for i, layer in enumerate(network.layers) if isinstance(layer, networks.Sigmoid))
    state = network.state_dict()
    for layer in network.train().layers[:last]:
        x = layer(x)
    network.load_state_dict(state)
    return x


def trial(seed, with_layer, steps):
    """Percentiles of each unit after every EVERY steps; accuracies on grey paper, and with that paper's statistics."""
    x, digit, x_test, digit_test = digits()
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer)
    optimizer = networks.GradientDescent(RATE)
    watched = [np.percentile(inputs(network, x_test), PERCENTILES, axis=0)]
    deviations = [inputs(network, x_test).std(axis=0)]
    for step, _ in networks.training(network, optimizer, x, digit, steps, rng):
        if step % EVERY == 0:
            z = inputs(network, x_test)
            watched.append(np.percentile(z, PERCENTILES, axis=0))
            deviations.append(z.std(axis=0))
    on_grey, adapted = [], []
    for g in GREYS:
        grey = np.float32(g) + np.float32(1 - g) * x_test
        on_grey.append(networks.accuracy(network.eval()(grey), digit_test))
    for g in GREYS:
        grey = np.float32(g) + np.float32(1 - g) * x_test
        networks.set_population_statistics(network, grey)  # no label is needed
        adapted.append(networks.accuracy(network(grey), digit_test))
    return {"percentiles": watched, "deviations": deviations, "grey": on_grey, "adapted": adapted}


def measure(run=map, seeds=SEEDS, steps=300):
    m = each(run, partial(trial, steps=steps), seeds, [False, True])  # seed, without or with, step, ...
    moves = abs(np.diff(m["percentiles"][..., PERCENTILES.index(50), :], axis=2)) / m["deviations"][:, :, -1:]
    return {
        "steps": np.arange(0, steps + 1, EVERY),
        "unit": m["percentiles"][0, ..., UNIT],  # without or with, step, percentile
        "moved": moves.mean(-1).cumsum(-1),  # seed, without or with, step
        "grey": m["grey"],
        "adapted": m["adapted"][:, 1],
    }


def numbers(m):
    middle = GREYS.index(0.5)
    for layer, name in enumerate(("without", "with")):
        at = [spread(m["grey"][:, layer, i], "{:.0f}") for i in (0, middle)]
        yield f"L21  {name:8} accuracy in % on black paper {at[0]:15} on grey ({GREYS[middle]:g}) {at[1]}"
    at = spread(m["adapted"][:, middle], "{:.0f}")
    yield f"L21  with, its statistics those of the grey images: {at}"
    for layer, name in enumerate(("without", "with")):
        way = spread(m["moved"][:, layer, -1], "{:.1f}")
        yield f"L21  {name:8} way of a unit's median in its standard deviations: {way}"


def verdict(m):
    middle = GREYS.index(0.5)
    black, grey = (np.median(m["grey"][..., i], axis=0) for i in (0, middle))
    moved = np.median(m["moved"][..., -1], axis=0)
    held = [(grey < black - 20).all(), moved[1] < moved[0]]
    sentence = (
        f"On grey paper accuracy falls from {black[0]:.0f} to {grey[0]:.0f} % without and from {black[1]:.0f} to "
        f"{grey[1]:.0f} % with the layer; with statistics taken anew the latter has "
        f"{np.median(m['adapted'][:, middle]):.0f} %. Inside, a unit's median travels {moved[0]:.0f} standard "
        f"deviations without and {moved[1]:.1f} with normalization."
    )
    return judge(held, sentence)


def draw(m):
    fig, ((without, with_layer), (moved, grey)) = figure(6, 2, 2)
    for axes, percentiles, style in zip((without, with_layer), m["unit"], (WITHOUT, WITH), strict=True):
        low, middle, high = percentiles.T
        axes.plot(m["steps"], middle, color=style["color"], label="median")
        axes.fill_between(m["steps"], low, high, color=style["color"], alpha=0.25, linewidth=0, label="15 % to 85 %")
        axes.set(title=f"a hidden unit's input, {style['label']}", xlabel="step", ylabel="value")
        axes.legend(fontsize=8)
    for layer, style in enumerate((WITHOUT, WITH)):
        band(moved, m["steps"][1:], m["moved"][:, layer], **style)
        band(grey, GREYS, m["grey"][:, layer], marker="o", **style)
    band(
        grey, GREYS, m["adapted"], color=GREEN, linestyle="-.", marker="s", label="with, statistics of the grey images"
    )
    moved.set(title="way of the median, mean of all units", xlabel="step", ylabel="standard deviations")
    moved.legend(fontsize=8)
    grey.set(title="a test set that is shifted", xlabel="grey of the paper", ylabel="accuracy in %", ylim=(0, 101))
    grey.legend(fontsize=8)
    return fig
