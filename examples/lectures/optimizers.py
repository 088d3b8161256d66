"""Mini-batches, and the rule that updates W, beta and gamma

The network of the demo (three sigmoid layers of 100 units, batch normalization before each) learns the digits by each
of four rules, at the learning rates of the demo. For the first part of the claim a step's gradients are computed after
other mini-batches and after none.
"""

from functools import partial

import networks
import numpy as np
from digits import EXPERIMENTS
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

BUILD, RULES = EXPERIMENTS["fully connected"]  # the demo's: pairs of a rule and its rate
STYLES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":")]
GOAL = 95  # % of the test images
EVERY = 5


def curve(seed, rule, steps):
    rng = np.random.default_rng(seed)
    network = BUILD(rng, with_layer=True)
    optimizer, rate = rule
    return [accuracy for _, accuracy in networks.train(network, optimizer(rate), digits(), steps, rng, every=EVERY)]


def same_step(seed):
    """Whether X{t}'s gradients are the same bits whatever batch came before."""
    rng = np.random.default_rng(seed)
    network = BUILD(rng, with_layer=True)
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
    for i, (rule, rate) in enumerate(RULES):
        steps, end = spread(steps_to_goal(m)[:, i], "{:.0f}"), spread(m["curves"][:, i, -1], "{:.1f}")
        yield f"L7  {rule.__name__:16} rate {rate:<5g} steps to {GOAL} %: {steps:18} at the end {end} %"


def verdicts(m):
    ends = np.median(m["curves"][:, :, -1], axis=0)
    yield judge(
        "L7",
        [all(m["same"]), ends.min() >= GOAL],
        f"The four rules end at {ends.min():.1f} to {ends.max():.1f} %. A step's gradients are the same bits "
        f"whatever batch came before, for {sum(m['same'])} of {len(m['same'])} seeds.",
    )


def draw(m):
    fig, axes = figure(3.8)
    for i, ((rule, rate), (colour, line)) in enumerate(zip(RULES, STYLES, strict=True)):
        label = f"{rule.__name__}, rate {rate:g}"
        band(axes, m["steps"], m["curves"][:, i], color=colour, linestyle=line, label=label)
    axes.set(
        title="L7: three sigmoid layers with batch normalization",
        xlabel="step",
        ylabel="test accuracy in %",
        ylim=(0, 101),
    )
    axes.legend()
    return fig
