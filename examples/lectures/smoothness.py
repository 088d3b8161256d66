"""What changes: the shift inside, or the error surface

A network of five ReLU layers learns the digits by gradient descent: without batch normalization at the rate that is
fastest for it (L16), with it at the same rate, and at its own fastest. Every tenth step, as Santurkar et al. (2018,
"How does batch normalization help optimization?") measured it, the gradient is followed for 0.5 to 4 times the step:
over what range the loss goes, how far the gradient gets from where it began and turns, and the effective beta-
smoothness, which is that change over the distance in the weights. The shift inside, as they define it, is how the
gradient of the third layer changes when the layers below it take their step. It counts as small up to 30 degrees.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import (
    GREEN,
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
    "L22": "Later work measured that internal shift is small either way, and that what improves is the smoothness "
    "of the error surface.",
}

WIDTHS = [64] + [50] * 5
SMALL = 30  # degrees
ALONG = [0.5, 1, 2, 3, 4]  # steps of the rate
EVERY = 10
VARIANTS = [  # with the layer, rate, how it is drawn
    (False, 0.1, WITHOUT | {"label": "without, rate 0.1"}),
    (True, 0.1, WITH | {"label": "with, rate 0.1"}),
    (True, 0.3, {"label": "with, rate 0.3", "color": GREEN, "linestyle": "-."}),
]


def loss_and_gradient(network, x, digit):
    loss, gradient = networks.cross_entropy(network.train()(x), digit)
    network.backward(gradient)
    return loss, [dw.copy() for _, dw in network.parameters()]


def move(network, gradients, distance):
    for (w, _), dw in zip(network.parameters(), gradients, strict=True):
        w -= np.float32(distance) * dw


def flat(gradients):
    return np.concatenate([dw.ravel() for dw in gradients])


def compared(before, after):
    """How far a gradient turns, in degrees, and how far it gets from what it was, relative to its length."""
    length = np.linalg.norm(before)
    cosine = np.clip(before @ after / (length * np.linalg.norm(after)), -1, 1)
    return np.degrees(np.arccos(cosine)), np.linalg.norm(after - before) / length


def along(network, x, digit, rate):
    """Least and largest loss on the way; how far the gradient turns and changes, and the latter over the distance."""
    state = network.state_dict()
    first, gradients = loss_and_gradient(network, x, digit)
    start = flat(gradients)
    losses, turned, changed = [first], [], []
    for steps in ALONG:
        move(network, gradients, steps * rate)
        loss, there = loss_and_gradient(network, x, digit)
        losses.append(loss)
        turn, change = compared(start, flat(there))
        turned.append(turn)
        changed.append(change)
        network.load_state_dict(state)
    # The way is steps * rate times the gradient's length, which the change is relative to: the length cancels.
    beta = np.max(np.divide(changed, np.multiply(ALONG, rate)))
    return {"low": min(losses), "high": max(losses), "turned": max(turned), "changed": max(changed), "beta": beta}


def inside(network, x, digit, rate):
    """How the third layer's gradient changes when the two below it take their step."""
    state = network.state_dict()
    _, _, third, *_ = [layer for layer in network.layers if isinstance(layer, networks.Dense)]
    below = networks.Network(network.layers[: network.layers.index(third)])
    loss_and_gradient(network, x, digit)
    before = third.grad_weight
    networks.GradientDescent(rate).step(below.parameters())
    loss_and_gradient(network, x, digit)
    network.load_state_dict(state)
    turn, change = compared(before.ravel(), third.grad_weight.ravel())
    return {"inside": turn, "inside changed": change}


def trial(seed, variant, steps):
    with_layer, rate, _ = VARIANTS[variant]
    x, digit, _, _ = digits()
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer, WIDTHS, networks.ReLU)
    probes = networks.minibatches(len(x), networks.BATCH, np.random.default_rng(seed + 100))
    rows = []
    for step, _ in networks.descent(network, networks.GradientDescent(rate), x, digit, steps, rng):
        if step % EVERY == 0:
            probe = x[batch := next(probes)], digit[batch], rate
            rows.append({**along(network, *probe), **inside(network, *probe)})
    return by_key(rows)


def measure(run=map, seeds=SEEDS, steps=300):
    m = each(run, partial(trial, steps=steps), seeds, range(len(VARIANTS)))  # seed, variant, step
    return {"steps": np.arange(EVERY, steps + 1, EVERY), "loss": m["high"] - m["low"], **m}


WHAT = {
    "loss": "range of the loss along the step",
    "changed": "change of the gradient along it, relative",
    "turned": "turn of the gradient along it, degrees",
    "beta": "effective beta-smoothness",
    "inside": "turn by the layers below, degrees",
    "inside changed": "change by the layers below, relative",
}


def numbers(m):
    for key, what in WHAT.items():
        for variant, (_, _, style) in enumerate(VARIANTS):
            yield f"L22  {what:42} {style['label']:17} {spread(np.median(m[key][:, variant], axis=-1))}"


def verdicts(m):
    seeds = {key: np.median(m[key], axis=-1) for key in WHAT}  # seed, variant
    at = {key: np.median(values, axis=0) for key, values in seeds.items()}
    smoother = [beyond_chance(seeds[key][:, 1] < seeds[key][:, 0]) for key in ("loss", "changed", "beta")]
    small = at["inside"] <= SMALL
    less = beyond_chance(seeds["inside"][:, 1] < seeds["inside"][:, 0])
    yield judge(
        "L22",
        [all(smoother), small[:2].all()],
        f"At one rate the loss ranges over {at['loss'][0]:.2g} along the step without and {at['loss'][1]:.2g} with "
        f"normalization, the gradient changes by {at['changed'][0]:.2g} and {at['changed'][1]:.2g} times its length, "
        f"and beta is {at['beta'][0]:.0f} and {at['beta'][1]:.0f} (at the layer's own rate {at['loss'][2]:.2g}, "
        f"{at['changed'][2]:.2g} and {at['beta'][2]:.0f}). The shift inside turns the third layer's gradient by "
        f"{at['inside'][0]:.0f} and {at['inside'][1]:.0f} degrees: {'' if small[0] else 'not '}small without, "
        f"{'' if small[1] else 'not '}small with normalization"
        f"{', which lessens it here; in that paper it did not' if less else ', which does not lessen it'}.",
    )


def draw(m):
    fig, panels = figure(8, 3, 2)
    for variant, (_, _, style) in enumerate(VARIANTS):
        panels[0, 0].fill_between(
            m["steps"],
            np.median(m["low"][:, variant], axis=0),
            np.median(m["high"][:, variant], axis=0),
            color=style["color"],
            alpha=0.4,
            linewidth=0,
            hatch=("//", "", "\\\\")[variant],
            label=style["label"],
        )
        for axes, key in zip(panels.flat[1:], ("changed", "turned", "beta", "inside", "inside changed"), strict=True):
            band(axes, m["steps"], m[key][:, variant], **style)
    for axes, title, unit in zip(
        panels.flat,
        (
            "loss along the step, least to largest",
            "change of the gradient along it",
            "turn of the gradient along it",
            "effective beta-smoothness",
            "turn by the step of the layers below",
            "change by the step of the layers below",
        ),
        ("loss", "relative to its length", "degrees", "change / distance", "degrees", "relative to its length"),
        strict=True,
    ):
        axes.set(title=f"L22: {title}", ylabel=unit, yscale="linear" if unit == "degrees" else "log")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    fig.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig
