"""Mini-batches, and the rule that updates W, beta and gamma

The network of the demo (three sigmoid layers of 100 units, batch normalization before each) learns the digits by each
of four rules, the learning rates those of the demo. For the first part of the claim a step's gradients are computed
among other mini-batches and alone.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SEEDS,
    band,
    digits,
    each,
    figure,
    first_reached,
    judge,
    spread,
)

CLAIMS = {
    "L7": "Step t uses only X{t}'s mean and variance; W, beta and gamma are updated by gradient descent, Momentum, "
    "RMSprop or Adam.",
}

RULES = {
    "GradientDescent": (1, BLUE, "-"),
    "Momentum": (3, ORANGE, "--"),
    "RMSprop": (0.03, GREEN, "-."),
    "Adam": (0.01, PURPLE, ":"),
}
GOAL = 95  # % of the test images
EVERY = 5


def curve(seed, rule, steps):
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer=True)
    optimizer = getattr(networks, rule)(RULES[rule][0])
    return [accuracy for _, accuracy in networks.train(network, optimizer, digits(), steps, rng, every=EVERY)]


def same_step(seed):
    """Whether X{t}'s gradients are the same bits whatever batch came before."""
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer=True)
    x, digit, _, _ = digits()
    batch, *others = rng.permutation(len(x))[: 4 * networks.BATCH].reshape(4, -1)
    gradients = []
    for before in [None, *others]:
        if before is not None:
            network.train()(x[before])
        _, gradient = networks.cross_entropy(network.train()(x[batch]), digit[batch])
        network.backward(gradient)
        gradients.append([dw.tobytes() for _, dw in network.parameters()])
    return all(other == gradients[0] for other in gradients)


def measure(run=map, seeds=SEEDS, steps=300):
    return {
        "steps": np.arange(0, steps + 1, EVERY),
        "curves": each(run, partial(curve, steps=steps), seeds, RULES),  # seed, rule, step
        "same": each(run, same_step, seeds),
    }


def steps_to_goal(m):
    """Of each seed by each rule; inf: never."""
    return first_reached(GOAL, m["steps"], m["curves"])


def numbers(m):
    yield f"L7  gradients, whatever batch came before: the same bits for {sum(m['same'])} of {len(m['same'])} seeds"
    for i, (rule, (rate, _, _)) in enumerate(RULES.items()):
        steps, end = spread(steps_to_goal(m)[:, i], "{:.0f}"), spread(m["curves"][:, i, -1], "{:.1f}")
        yield f"L7  {rule:16} rate {rate:<5g} steps to {GOAL} %: {steps:18} at the end {end} %"


def verdict(m):
    ends = np.median(m["curves"][:, :, -1], axis=0)
    sentence = (
        f"The four rules end at {ends.min():.1f} to {ends.max():.1f} %. A step's gradients are the same bits "
        f"whatever batch came before, for {sum(m['same'])} of {len(m['same'])} seeds."
    )
    return judge([all(m["same"]), ends.min() >= GOAL], sentence)


def draw(m):
    fig, axes = figure(3.8)
    for i, (rule, (rate, colour, line)) in enumerate(RULES.items()):
        band(axes, m["steps"], m["curves"][:, i], color=colour, linestyle=line, label=f"{rule}, rate {rate:g}")
    axes.set(
        title="L7: three sigmoid layers with batch normalization",
        xlabel="step",
        ylabel="test accuracy in %",
        ylim=(0, 101),
    )
    axes.legend()
    return fig
