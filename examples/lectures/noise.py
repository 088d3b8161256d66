"""The noise of a mini-batch's statistics

Hidden units of an untrained network see mini-batches of digits, drawn with replacement; the mean and the standard
deviation of each batch are compared with those of all 1,437 images, and a line is fitted from 8 images on. For L13
networks learn from mini-batches of 2 to 64 images, 300 steps of Adam each, with the layer and without.

For L20 all networks learn from the same 300 mini-batches of 512 images, by Adam. Only the groups differ over which
the layer takes its statistics: 64, 256 or 512 of them. (Each group goes forward and back by itself, and one step is
taken with the sum of the gradients; without the layer that is the batch's own gradient.) So nothing but the noise of
the statistics differs. The gap is the loss on the test images less that on the training images, both in evaluation
mode, and what one group size does to it is counted seed by seed, because seeds differ from one another by more than
that.
"""

import itertools
from functools import partial

import networks
import numpy as np
from lectures.lecture import BLUE, ORANGE, WITH, WITHOUT, band, beyond_chance, digits, each, figure, judge, spread

import cybn

CLAIMS = {
    "L13": "A batch of one has no variance: training needs a batch that is large enough to stand for the corpus.",
    "L20": "Statistics of a mini-batch of 64 are noisy: a slight regularizer, weaker at 512; it can be used with "
    "dropout; it is not meant as one.",
}

SIZES = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
FITTED = 8  # from here on
TRAINED = [2, 4, 8, 16, 32, 64]
BATCH = 512
VARIANTS = {  # with the layer or without, examples in a group, dropout
    "without the layer": (False, 512, 0),
    "groups of 64": (True, 64, 0),
    "groups of 256": (True, 256, 0),
    "groups of 512": (True, 512, 0),
    "groups of 64, dropout": (True, 64, 0.2),
}
RATE = 0.003


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


def learned(seed, size, with_layer, steps):
    """Test accuracy in % after learning from mini-batches of a size."""
    x, digit, x_test, digit_test = digits()
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer, activation=networks.ReLU)
    for _ in networks.descent(network, networks.Adam(RATE), x, digit, steps, rng, size):
        pass
    return networks.accuracy(network.eval()(x_test), digit_test)


def in_groups(seed, variant, steps):
    """Losses on the training and on the test images, accuracy on the latter."""
    with_layer, group, dropout = VARIANTS[variant]
    x, digit, x_test, digit_test = digits()
    rng = np.random.default_rng(seed)
    network = networks.fully_connected(rng, with_layer, activation=networks.ReLU, dropout=dropout)
    optimizer = networks.Adam(RATE)
    for batch in itertools.islice(networks.minibatches(len(x), BATCH, rng), steps):
        sums = itertools.repeat(0)
        for part in batch.reshape(-1, group):
            _, gradient = networks.cross_entropy(network.train()(x[part]), digit[part])
            network.backward(gradient * np.float32(group / BATCH))
            sums = [total + dw for total, (_, dw) in zip(sums, network.parameters(), strict=False)]
        optimizer.step((w, dw) for (w, _), dw in zip(network.parameters(), sums, strict=True))
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


def measure(run=map, seeds=range(10), sizes=TRAINED, steps=300):
    groups = each(run, partial(in_groups, steps=steps), seeds, VARIANTS)
    return {
        "message": one_example(),
        "errors": each(run, statistics_error, seeds),  # seed, size, which
        "sizes": sizes,
        "learned": each(run, partial(learned, steps=steps), seeds[:5], sizes, [False, True]),  # seed, size, with
        "groups": dict(zip(VARIANTS, groups.swapaxes(0, 1), strict=True)),  # seed, which
    }


def slopes(m):
    """Of the errors over the batch size, on log axes, for each seed."""
    large = np.array(SIZES) >= FITTED
    return np.array([np.polyfit(np.log(np.array(SIZES)[large]), np.log(e[large]), 1)[0] for e in m["errors"]])


def gap(m, variant):
    """Of each seed."""
    return m["groups"][variant][:, 1] - m["groups"][variant][:, 0]


def less(m, variant, other="groups of 512"):
    """By how much each seed's gap is less than another variant's."""
    return gap(m, other) - gap(m, variant)


def agreed(m, variant, other="groups of 512"):
    """By how much and for how many seeds a gap is less, in words; and whether it is for more of them than by chance."""
    by = less(m, variant, other)
    doubt = "" if beyond_chance(by > 0) or beyond_chance(by < 0) else " (no difference to be seen)"
    return f"{np.median(by):.4f} for {(by > 0).sum()} of {len(by)} seeds{doubt}", beyond_chance(by > 0)


def numbers(m):
    yield f"L13  a batch of one raises: {m['message']}"
    for i, size in enumerate(m["sizes"]):
        at = [spread(m["learned"][:, i, layer], "{:.1f}") for layer in (0, 1)]
        yield f"L13  test accuracy in % by batches of {size:2}: without {at[0]:20} with {at[1]}"
    for i, what in enumerate(("mean, in standard deviations", "standard deviation, relative")):
        at = ", ".join(f"{size}: {np.median(m['errors'][:, SIZES.index(size), i]):.3f}" for size in (2, 64, 512))
        yield f"L20  error of the {what}, at batches of {at}; slope {spread(slopes(m)[:, i], '{:.2f}')}"
    for variant in VARIANTS:
        accuracy = spread(m["groups"][variant][:, 2], "{:.1f}")
        yield f"L20  {variant:22} gap {spread(gap(m, variant), '{:.4f}'):26} test accuracy {accuracy} %"
    for variant in ("groups of 64", "groups of 256"):
        yield f"L20  {variant:22} gap less than in groups of 512, by seed: {spread(less(m, variant), '{:.4f}')}"


def verdicts(m):
    small, large = (np.median(m["learned"][:, i], axis=0) for i in (0, -1))
    yield judge(
        "L13",
        [m["message"] is not None, small[1] < small[0] - 10 and large[1] >= large[0] - 1],
        f"A batch of one is refused. By batches of {m['sizes'][0]} the network learns to {small[1]:.0f} % with the "
        f"layer and {small[0]:.0f} % without, by batches of {m['sizes'][-1]} to {large[1]:.0f} % and "
        f"{large[0]:.0f} %.",
    )
    fitted = np.median(slopes(m), axis=0)
    by_64, regularizes = agreed(m, "groups of 64")
    by_64_of_256, _ = agreed(m, "groups of 64", "groups of 256")
    by_dropout, more = agreed(m, "groups of 64, dropout", "groups of 64")
    accuracy = [np.median(m["groups"][variant][:, 2]) for variant in ("groups of 64", "groups of 64, dropout")]
    yield judge(
        "L20",
        [abs(fitted + 0.5).max() < 0.05, regularizes, more and accuracy[1] >= accuracy[0] - 1],
        f"The errors fall as 1/sqrt(m) (slopes {fitted[0]:.2f} and {fitted[1]:.2f}). Statistics over 64 instead of 512 "
        f"of the same examples lessen the gap by {by_64}, instead of 256 by {by_64_of_256}. Dropout beside "
        f"them lessens it by {by_dropout}, at {accuracy[1]:.1f} instead of {accuracy[0]:.1f} % accuracy. "
        "(Beside no layer at all none of it is seen here: the gap is "
        f"{np.median(gap(m, 'without the layer')):.4f} "
        f"without, {np.median(gap(m, 'groups of 64')):.4f} with groups of 64.)",
    )


def draw(m):
    fig, (left, middle, right) = figure(3.8, 1, 3)
    for i, (label, colour, marker) in enumerate((("mean", BLUE, "o"), ("standard deviation", ORANGE, "s"))):
        band(left, SIZES, m["errors"][..., i], color=colour, marker=marker, label=label)
    left.plot(SIZES, 1 / np.sqrt(SIZES), color="0.4", linestyle=":", label="1 / sqrt(m)")
    left.set(title="L20: error of a batch's statistics", xlabel="batch size m")
    left.set(xscale="log", yscale="log", xticks=SIZES[::3], xticklabels=SIZES[::3])
    left.set_ylabel("in standard deviations of the unit")
    left.set_yticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5], ticks)
    for layer, style in enumerate((WITHOUT, WITH)):
        band(middle, m["sizes"], m["learned"][..., layer], marker="o", **style)
    middle.set(title="L13: learned in as many steps", xlabel="batch size", ylabel="test accuracy in %", ylim=(0, 101))
    middle.set(xscale="log", xticks=m["sizes"], xticklabels=m["sizes"])
    for axes in (left, middle):
        axes.minorticks_off()
        axes.legend(fontsize=8)
    gaps = np.array([gap(m, variant) for variant in VARIANTS])
    right.plot(gaps, color="0.75", linewidth=0.8)
    right.plot(gaps[:, 0], color="0.75", linewidth=0.8, label="one seed")
    right.plot(np.median(gaps, axis=1), "o", color=BLUE, label="median")
    right.set(title="L20: statistics over groups", ylabel="loss on test less training images")
    right.set_xticks(
        range(len(VARIANTS)), [name.replace(" ", "\n").replace("of\n", "of ") for name in VARIANTS], size=7
    )
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return fig
