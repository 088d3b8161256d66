"""What changes: the shift inside, or the error surface

A network of five ReLU layers learns the digits by gradient descent at one rate, with batch normalization and without.
Every tenth step, as Santurkar et al. (2018, "How does batch normalization help optimization?") measured it: the
gradient is followed for 0.5 to 4 times the step, and the range of the loss on the way noted, and how far the gradient
turns. And the shift inside: how much the gradient of the third layer changes when the layers below it take their
step.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import SEEDS, WITH, WITHOUT, band, by_key, digits, each, figure, judge, spread

CLAIMS = {
    "L22": "Later work measured that internal shift is small either way, and that what improves is the smoothness "
    "of the error surface.",
}

WIDTHS = [64] + [50] * 5
RATE = 0.1
ALONG = [0.5, 1, 2, 3, 4]  # steps of the rate
EVERY = 10


def loss_and_gradient(network, x, digit):
    loss, gradient = networks.cross_entropy(network.train()(x), digit)
    network.backward(gradient)
    return loss, [dw.copy() for _, dw in network.parameters()]


def move(network, gradients, distance):
    for (w, _), dw in zip(network.parameters(), gradients, strict=True):
        w -= np.float32(distance) * dw


def along(network, x, digit):
    """Least and largest loss on the way; how far the gradient turns (degrees) and changes (relative to the first)."""
    state = network.state_dict()
    first, gradients = loss_and_gradient(network, x, digit)
    start = np.concatenate([dw.ravel() for dw in gradients])
    losses, angles, distances = [first], [], []
    for distance in ALONG:
        move(network, gradients, distance * RATE)
        loss, there = loss_and_gradient(network, x, digit)
        there = np.concatenate([dw.ravel() for dw in there])
        losses.append(loss)
        angles.append(angle(start, there))
        distances.append(np.linalg.norm(start - there) / np.linalg.norm(start))
        network.load_state_dict(state)
    return {"low": min(losses), "high": max(losses), "turned": max(angles), "distance": max(distances)}


def inside(network, x, digit):
    """By how much the third layer's gradient turns, in degrees, when the two below it take their step."""
    state = network.state_dict()
    _, _, third, *_ = [layer for layer in network.layers if isinstance(layer, networks.Dense)]
    below = networks.Network(network.layers[: network.layers.index(third)])
    loss_and_gradient(network, x, digit)
    before = third.grad_weight
    networks.GradientDescent(RATE).step(below.parameters())
    loss_and_gradient(network, x, digit)
    network.load_state_dict(state)
    return angle(before.ravel(), third.grad_weight.ravel())


def angle(a, b):
    return np.degrees(np.arccos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)))


def trial(seed, with_layer, steps):
    """Every EVERY steps: least and largest loss, angle and distance of the gradient along the step, angle inside."""
    x, digit, _, _ = digits()
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer, WIDTHS, networks.ReLU)
    probes = networks.minibatches(len(x), networks.BATCH, np.random.default_rng(seed + 100))
    rows = []
    for step, _ in networks.training(network, networks.GradientDescent(RATE), x, digit, steps, rng):
        if step % EVERY == 0:
            batch = next(probes)
            found = along(network, x[batch], digit[batch])
            rows.append({**found, "inside": inside(network, x[batch], digit[batch])})
    return by_key(rows)


def measure(run=map, seeds=SEEDS, steps=300):
    m = each(run, partial(trial, steps=steps), seeds, [False, True])  # seed, without or with, step
    return {"steps": np.arange(EVERY, steps + 1, EVERY), "loss": m["high"] - m["low"], **m}


WHAT = {
    "loss": "range of the loss along the step",
    "distance": "change of the gradient along it, relative",
    "turned": "turn of the gradient along it, degrees",
    "inside": "turn by the layers below, degrees",
}


def numbers(m):
    for key, what in WHAT.items():
        for layer, name in enumerate(("without", "with")):
            yield f"L22  {what:42} {name:8} {spread(np.median(m[key][:, layer], axis=-1))}"


def verdict(m):
    middle = {key: np.median(np.median(m[key], axis=-1), axis=0) for key in WHAT}
    smoother = middle["loss"][1] < middle["loss"][0] and middle["distance"][1] < middle["distance"][0]
    small = (middle["inside"] < 30).all()
    sentence = (
        f"Along the step the loss ranges over {middle['loss'][0]:.2g} without and {middle['loss'][1]:.2g} with "
        f"normalization, and the gradient changes by {middle['distance'][0]:.2g} and {middle['distance'][1]:.2g} "
        "times its length. When the layers below take their step, the third layer's gradient turns by "
        f"{middle['inside'][0]:.0f} and {middle['inside'][1]:.0f} degrees: that shift is "
        f"{'small either way' if small else 'not small here without normalization, and with it smaller, not gone'}."
    )
    return judge([smoother, small], sentence)


def draw(m):
    fig, panels = figure(6, 2, 2)
    for layer, style in enumerate((WITHOUT, WITH)):
        panels[0, 0].fill_between(
            m["steps"],
            np.median(m["low"][:, layer], axis=0),
            np.median(m["high"][:, layer], axis=0),
            color=style["color"],
            alpha=0.4,
            linewidth=0,
            hatch=("//", "")[layer],
            label=style["label"],
        )
        for axes, key in zip(panels.flat[1:], ("distance", "turned", "inside"), strict=True):
            band(axes, m["steps"], m[key][:, layer], **style)
    panels[0, 0].set(title=WHAT["loss"], ylabel="loss", yscale="log")
    panels[0, 1].set(title="change of the gradient along the step", ylabel="relative to its length", yscale="log")
    panels[1, 0].set(title="turn of the gradient along the step", ylabel="degrees", xlabel="step")
    panels[1, 1].set(title="third layer's gradient, when those below step", ylabel="degrees", xlabel="step")
    panels[0, 0].legend(fontsize=8)
    return fig
