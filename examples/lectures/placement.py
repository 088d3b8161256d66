"""Where the layer goes, and the bias that it makes redundant

Fully connected networks of three ReLU layers learn the digits by gradient descent, 300 mini-batches of 64, each at nine
learning rates: with batch normalization before every activation, after every one, before only one of the three, or not
at all. For L6 a constant b is added to z = W a of a hidden layer, for real images.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import BLUE, GREEN, ORANGE, PURPLE, SEEDS, band, digits, each, figure, judge, spread

import cybn

CLAIMS = {
    "L5": "It goes between z = W a + b and the activation, on any hidden layer and on many; normalizing z (before) "
    "is the default, a (after) the debated alternative.",
    "L6": "Any constant added to z is subtracted again: the bias b is redundant, drop it; beta takes its place.",
}

SHADES = ("#D9A0C4", PURPLE, "#8A3A66")  # of one purple, the first layer's the lightest
PLACES = {  # which of the three layers have it, whether after the activation; how it is drawn
    "without": (False, False, {"color": ORANGE, "linestyle": "--", "marker": "o"}),
    "before the activation": (True, False, {"color": BLUE, "linestyle": "-", "marker": "o"}),
    "after the activation": (True, True, {"color": GREEN, "linestyle": "-.", "marker": "o"}),
    "before the first alone": ((True, False, False), False, {"color": SHADES[0], "linestyle": ":", "marker": "v"}),
    "before the second alone": ((False, True, False), False, {"color": SHADES[1], "linestyle": ":", "marker": "s"}),
    "before the third alone": ((False, False, True), False, {"color": SHADES[2], "linestyle": ":", "marker": "^"}),
}
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
CONSTANTS = [0.1, 1, 10, 100, 1e3, 1e4, 1e5, 1e6]


def final_accuracy(seed, place, rate, steps):
    rng = np.random.default_rng(seed)
    layers, after, _ = PLACES[place]
    network = networks.fully_connected(rng, layers, activation=networks.ReLU, after=after)
    with np.errstate(all="ignore"):  # what diverges ends in NaN
        curve = networks.train(network, networks.GradientDescent(rate), digits(), steps, rng, every=10)
    return np.mean([accuracy for _, accuracy in curve[-3:]])


def constants(seed):
    """Largest change of the output when b is added, in float32 and in float64; and the gradient that b would get."""
    rng = np.random.default_rng(seed)
    x = digits()[0][:256].reshape(256, 64)
    z = x @ rng.normal(size=(64, 100)) / 8
    changes = []
    for dtype in (np.float32, np.float64):
        plain = cybn.batch_norm(z.astype(dtype), None, None, training=True)
        moved = [cybn.batch_norm((z + b).astype(dtype), None, None, training=True) for b in CONSTANTS]
        changes.append([abs(y - plain).max() for y in moved])
    bn = cybn.BatchNorm1d(100, dtype=np.float64)
    bn(z)
    dy = rng.normal(size=z.shape)
    dz = bn.backward(dy)
    return {"changes": changes, "gradient": abs(dz.sum(axis=0)).max() / abs(dy.sum(axis=0)).max()}


def measure(run=map, seeds=SEEDS, rates=RATES, steps=300):
    accuracy = each(run, partial(final_accuracy, steps=steps), seeds, PLACES, rates)
    return {"rates": rates, "accuracy": accuracy, **each(run, constants, seeds)}


def best(m):
    """For each place the rate with the best median: its index, and each seed's accuracy there."""
    for accuracy in m["accuracy"].swapaxes(0, 1):
        rate = np.median(accuracy, axis=0).argmax()
        yield rate, accuracy[:, rate]


def works(m):
    """For each place, how many rates end above 90 % at the median seed."""
    return (np.median(m["accuracy"], axis=0) > 90).sum(axis=1)


def numbers(m):
    for place, (rate, accuracy), above in zip(PLACES, best(m), works(m), strict=True):
        end = spread(accuracy, "{:.1f}")
        above = f"{above} of {len(m['rates'])} rates end above 90 %"
        yield f"L5  {place:24} best rate {m['rates'][rate]:<5g} test accuracy {end} %, {above}"
    for i, dtype in enumerate(("float32", "float64")):
        for b in (1, 1e3, 1e6):
            change = spread(m["changes"][:, i, CONSTANTS.index(b)], "{:.0e}")
            yield f"L6  change of the output by b = {b:<7g} {dtype} {change}"
    yield f"L6  gradient of b, relative to that of beta: {spread(m['gradient'], '{:.0e}')}"


def verdicts(m):
    none, before, after, *alone = (np.median(accuracy) for _, accuracy in best(m))
    range_none, range_before, range_after, *range_alone = works(m)
    yield judge(
        "L5",
        [
            min(before, after) >= none - 1 and min(range_before, range_after) > range_none,
            min(alone) >= none - 1 and min(range_alone) >= range_none,
        ],
        f"Each at its best rate, accuracy ends at {before:.1f} % with the layer before every activation, {after:.1f} % "
        f"after every one, {min(alone):.1f} to {max(alone):.1f} % before one alone, {none:.1f} % without; above 90 % "
        f"at {range_before}, {range_after}, {min(range_alone)} to {max(range_alone)} and {range_none} of "
        f"{len(m['rates'])} rates.",
    )
    yield judge(
        "L6",
        [m["changes"][:, 1].max() < 1e-6 and m["gradient"].max() < 1e-10],
        f"A constant b changes the float64 output by {m['changes'][:, 1].max():.0e} at most, for b up to 1e6, and its "
        f"gradient is {m['gradient'].max():.0e} of that of beta. (In float32 the sum z + b, which is rounded before "
        "the layer sees it, loses digits.)",
    )


def draw(m):
    fig, (left, right) = figure(3.6, 1, 2)
    for i, (place, (_, _, style)) in enumerate(PLACES.items()):
        band(left, m["rates"], m["accuracy"][:, i], label=place, **style)
    left.set(title="L5: three ReLU layers", xlabel="learning rate", ylabel="test accuracy in %")
    left.set(xscale="log", ylim=(0, 101))
    left.legend(fontsize=7, loc="lower left")
    for i, (dtype, colour, marker) in enumerate((("float32", ORANGE, "s"), ("float64", BLUE, "o"))):
        band(right, CONSTANTS, m["changes"][:, i], color=colour, marker=marker, label=f"{dtype}, layer")
        rounding = np.array(CONSTANTS) * np.finfo(dtype).eps
        right.plot(CONSTANTS, rounding, color=colour, linestyle=":", linewidth=1, label=f"{dtype}, rounding of z + b")
    right.set(title="L6: a constant b added to z", xlabel="b", ylabel="largest change of the output")
    right.set(xscale="log", yscale="log")
    right.set_ylim(1e-17, 1e7)  # room for the legend
    right.legend(fontsize=8, loc="upper left")
    return fig
