"""The noise of a mini-batch's statistics

Hidden units of an untrained network see mini-batches of digits, drawn with replacement; the mean and the standard
deviation of each batch are compared with those of all 1,437 images. Then networks learn with mini-batches of 64, 256
and 512, by Adam, each for the same number of steps: with batch normalization, without, and with it and dropout. The
gap is the loss on the test images less that on the training images, both in evaluation mode.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import BLUE, GREEN, ORANGE, WITH, WITHOUT, band, digits, each, figure, judge, spread

import cybn

CLAIMS = {
    "L13": "A batch of one has no variance: training needs a batch that is large enough to stand for the corpus.",
    "L20": "Statistics of a mini-batch of 64 are noisy: a slight regularizer, weaker at 512; it can be used with "
    "dropout; it is not meant as one.",
}

SIZES = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
BATCHES = [64, 256, 512]
VARIANTS = {  # with the layer, dropout
    "without": (False, 0),
    "with": (True, 0),
    "with, and dropout": (True, 0.2),
}


def statistics_error(seed, draws=50):
    """For each size, root mean squares over units and draws: of the mean, of the standard deviation (relative)."""
    rng = np.random.default_rng(seed)
    x = digits()[0]
    z = x.reshape(len(x), -1) @ rng.standard_normal((64, 50), np.float32)
    corpus = cybn.batch_norm_stats(z)
    errors = []
    for size in SIZES:
        batches = [cybn.batch_norm_stats(z[rng.integers(len(z), size=size)]) for _ in range(draws)]
        mean = [(batch.mean - corpus.mean) / np.sqrt(corpus.var()) for batch in batches]
        deviation = [np.sqrt(batch.var() / corpus.var()) - 1 for batch in batches]
        errors.append([np.sqrt(np.mean(np.square(terms))) for terms in (mean, deviation)])
    return errors


def gap(seed, variant, batch, steps):
    """Losses on the training and the test images, accuracy on the latter."""
    with_layer, dropout = VARIANTS[variant]
    x, digit, x_test, digit_test = digits()
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer, activation=networks.ReLU, dropout=dropout)
    for _ in networks.training(network, networks.Adam(0.003), x, digit, steps, rng, batch):
        pass
    network.eval()
    test = network(x_test)
    return [
        networks.cross_entropy(network(x), digit)[0],
        networks.cross_entropy(test, digit_test)[0],
        networks.accuracy(test, digit_test),
    ]


def one_example():
    try:
        cybn.batch_norm(digits()[0][:1].reshape(1, 64), None, None, training=True)
    except ValueError as error:
        return str(error)


def measure(run=map, seeds=range(10), batches=BATCHES, steps=300):
    return {
        "message": one_example(),
        "errors": each(run, statistics_error, seeds),  # seed, size, which
        "batches": batches,
        "gaps": each(run, partial(gap, steps=steps), seeds, VARIANTS, batches),  # seed, variant, batch, which
    }


def slopes(m):
    """Of the errors over the batch size, on log axes, for each seed."""
    large = np.array(SIZES) >= 8
    return np.array([np.polyfit(np.log(np.array(SIZES)[large]), np.log(e[large]), 1)[0] for e in m["errors"]])


def gaps(m):
    return m["gaps"][..., 1] - m["gaps"][..., 0]


def numbers(m):
    yield f"L13  a batch of one raises: {m['message']}"
    for i, what in enumerate(("mean, in standard deviations", "standard deviation, relative")):
        at = ", ".join(f"{size}: {np.median(m['errors'][:, SIZES.index(size), i]):.3f}" for size in (2, 64, 512))
        yield f"L20  error of the {what}, at batches of {at}; slope {spread(slopes(m)[:, i], '{:.2f}')}"
    for i, variant in enumerate(VARIANTS):
        for j, batch in enumerate(m["batches"]):
            gap, accuracy = spread(gaps(m)[:, i, j], "{:.3f}"), spread(m["gaps"][:, i, j, 2], "{:.1f}")
            yield f"L20  {variant:18} batch {batch:3}: gap {gap:24} test accuracy {accuracy} %"


def verdict(m):
    fitted = np.median(slopes(m), axis=0)
    middle = np.median(gaps(m), axis=0)
    noisy = abs(fitted + 0.5).max() < 0.05
    regularizer = middle[1, 0] < middle[0, 0]
    weaker = middle[1, 0] < middle[1, -1]
    accuracy = np.median(m["gaps"][..., 2], axis=0)
    dropout = accuracy[2, 0] >= accuracy[1, 0] - 1
    held = [m["message"] is not None, noisy, regularizer, weaker, dropout]
    small, large = m["batches"][0], m["batches"][-1]
    apart = gaps(m)[:, 1, 0].min() > max(gaps(m)[:, 0, 0].max(), gaps(m)[:, 1, -1].max())
    sentence = (
        f"A batch of one is refused, and the errors fall as 1/sqrt(m) (slopes {fitted[0]:.2f} and {fitted[1]:.2f}). "
        f"The gap is {middle[1, 0]:.3f} at {small} and {middle[1, -1]:.3f} at {large}, "
        f"{'as claimed' if weaker else 'not less at the smaller'}; without the layer it is {middle[0, 0]:.3f} and "
        f"{middle[0, -1]:.3f}, the ranges over the seeds {'apart' if apart else 'overlapping'}. Dropout beside it "
        f"{'costs no accuracy' if dropout else 'costs accuracy'} ({accuracy[2, 0]:.1f} against {accuracy[1, 0]:.1f} "
        "%)."
    )
    return judge(held, sentence)


def draw(m):
    fig, (left, right) = figure(3.8, 1, 2)
    for i, (label, colour, marker) in enumerate((("mean", BLUE, "o"), ("standard deviation", ORANGE, "s"))):
        band(left, SIZES, m["errors"][..., i], color=colour, marker=marker, label=label)
    left.plot(SIZES, 1 / np.sqrt(SIZES), color="0.4", linestyle=":", label="1 / sqrt(m)")
    left.set(
        title="L13, L20: error of a batch's statistics",
        xlabel="batch size m",
        ylabel="in standard deviations of the unit",
    )
    left.set(xscale="log", yscale="log", xticks=SIZES[::2], xticklabels=SIZES[::2])
    left.set_yticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5], ticks)
    left.minorticks_off()
    left.legend(fontsize=8)
    styles = (WITHOUT, WITH, {"label": "with, and dropout", "color": GREEN, "linestyle": "-."})
    for i, style in enumerate(styles):
        band(right, m["batches"], gaps(m)[:, i], marker="o", **style)
    right.set(title="L20: loss on test less on training images", xlabel="batch size", ylabel="gap")
    right.set(xscale="log", xticks=m["batches"], xticklabels=m["batches"])
    right.minorticks_off()
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return fig
