"""Where the layer goes, and the bias that it makes redundant

Fully connected networks of three ReLU layers learn the digits by gradient descent, 300 mini-batches of 64, with batch
normalization before the activation, after it, or not at all, each at nine learning rates. For L6 a constant b is
added to z = W a of a hidden layer, for real images.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import BLUE, GREEN, ORANGE, SEEDS, band, digits, each, figure, judge, spread

import cybn

CLAIMS = {
    "L5": "It goes between z = W a + b and the activation, on any hidden layer and on many; normalizing z (before) "
    "is the default, a (after) the debated alternative.",
    "L6": "Any constant added to z is subtracted again: the bias b is redundant, drop it; beta takes its place.",
}

PLACES = {
    "none": {"label": "without", "color": ORANGE, "linestyle": "--"},
    "before": {"label": "before the activation", "color": BLUE, "linestyle": "-"},
    "after": {"label": "after the activation", "color": GREEN, "linestyle": "-."},
}
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
CONSTANTS = [0.1, 1, 10, 100, 1e3, 1e4, 1e5, 1e6]


def final_accuracy(seed, place, rate, steps):
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, place != "none", activation=networks.ReLU, after=place == "after")
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


def best(m, place):
    """The rate with the best median: its index, and each seed's accuracy there."""
    accuracy = m["accuracy"][:, list(PLACES).index(place)]
    rate = np.median(accuracy, axis=0).argmax()
    return rate, accuracy[:, rate]


def works(m, place):
    """Rates that end above 90 % at the median seed."""
    return (np.median(m["accuracy"][:, list(PLACES).index(place)], axis=0) > 90).sum()


def numbers(m):
    for place, style in PLACES.items():
        rate, accuracy = best(m, place)
        end = spread(accuracy, "{:.1f}")
        above = f"{works(m, place)} of {len(m['rates'])} rates end above 90 %"
        yield f"L5  {style['label']:22} best rate {m['rates'][rate]:<5g} test accuracy {end} %, {above}"
    for i, dtype in enumerate(("float32", "float64")):
        for b in (1, 1e3, 1e6):
            change = spread(m["changes"][:, i, CONSTANTS.index(b)], "{:.0e}")
            yield f"L6  change of the output by b = {b:<7g} {dtype} {change}"
    yield f"L6  gradient of b, relative to that of beta: {spread(m['gradient'], '{:.0e}')}"


def verdict(m):
    none, before, after = (np.median(best(m, place)[1]) for place in PLACES)
    held = min(before, after) >= none - 1 and min(works(m, "before"), works(m, "after")) > works(m, "none")
    redundant = m["changes"][:, 1].max() < 1e-6 and m["gradient"].max() < 1e-10
    sentence = (
        f"Accuracy ends at {before:.1f} % with the layer before the activation, {after:.1f} % after it, {none:.1f} % "
        f"without, each at its best rate; above 90 % at {works(m, 'before')}, {works(m, 'after')} and "
        f"{works(m, 'none')} of {len(m['rates'])} rates. A constant b changes the float64 output by "
        f"{m['changes'][:, 1].max():.0e} at most, for b up to 1e6, and its gradient is {m['gradient'].max():.0e} of "
        "that of beta. (In float32 the sum z + b itself loses digits.)"
    )
    return judge([held, redundant], sentence)


def draw(m):
    fig, (left, right) = figure(3.6, 1, 2)
    for i, style in enumerate(PLACES.values()):
        band(left, m["rates"], m["accuracy"][:, i], marker="o", **style)
    left.set(title="L5: three ReLU layers", xlabel="learning rate", ylabel="test accuracy in %")
    left.set(xscale="log", ylim=(0, 101))
    left.legend(fontsize=8, loc="lower left")
    for i, (dtype, colour, marker) in enumerate((("float32", ORANGE, "s"), ("float64", BLUE, "o"))):
        band(right, CONSTANTS, m["changes"][:, i], color=colour, marker=marker, label=f"{dtype}, layer")
        rounding = np.array(CONSTANTS) * np.finfo(dtype).eps
        right.plot(CONSTANTS, rounding, color=colour, linestyle=":", linewidth=1, label=f"{dtype}, rounding of z + b")
    right.set(title="L6: a constant b added to z", xlabel="b", ylabel="largest change of the output")
    right.set(xscale="log", yscale="log")
    right.set_ylim(1e-17, 1e7)  # room for the legend
    right.legend(fontsize=8, loc="upper left")
    return fig
