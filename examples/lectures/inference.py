"""What an example is normalized by when there is no batch

The convolutional network of the demo learns the digits by Adam. Now and then training stops, and the test images are
classified with the running averages, with the statistics of one pass over the whole training set, and one image at a
time. How far the averages are from that pass is shown for the first of the three layers.
"""

from functools import partial

import networks
import numpy as np
from lectures.lecture import BLUE, GREEN, ORANGE, SEEDS, band, by_key, digits, each, figure, judge, spread

import cybn

CLAIMS = {
    "L11": "At test time: exponentially weighted averages of mu and sigma² kept over the mini-batches (factor 0.1), "
    "or one pass over the whole training set; either works.",
    "L12": "An online service handles one example at a time: no batch is waited for.",
}

STOPS = (2, 5, 10, 20, 40, 80, 160, 300)


def trial(seed, stops):
    """At each stop: accuracies by running averages, one at a time, by population; and how far the former are off."""
    x, digit, x_test, digit_test = digits()
    rng = np.random.default_rng(seed)
    network = networks.convolutional(rng, with_layer=True)
    first = next(layer for layer in network.layers if isinstance(layer, cybn.BatchNorm))
    rows = []
    for step, _ in networks.descent(network, networks.Adam(0.01), x, digit, stops[-1], rng):
        if step not in stops:
            continue
        running = network.state_dict()
        logits = network.eval()(x_test)
        singles = np.concatenate([network(image[None]) for image in x_test])
        mean, var = first.running_mean.copy(), first.running_var.copy()
        networks.set_population_statistics(network, x)
        rows.append(
            {
                "running": networks.accuracy(logits, digit_test),
                "single": networks.accuracy(singles, digit_test),
                "population": networks.accuracy(network(x_test), digit_test),
                "deviation": abs(singles - logits).max() / abs(logits).max(),
                "mean": np.sqrt(np.mean((mean - first.running_mean) ** 2 / first.running_var)),
                "var": np.sqrt(np.mean((var / first.running_var - 1) ** 2)),
            }
        )
        network.load_state_dict(running)
    return by_key(rows)


def measure(run=map, seeds=SEEDS, stops=STOPS):
    return {"stops": stops, **each(run, partial(trial, stops=stops), seeds)}  # seed, stop


def worth(m, stop):
    """Points by which the pass over the training set is better than the running averages, with the same network."""
    return spread(m["population"][:, stop] - m["running"][:, stop], "{:.1f}")


def numbers(m):
    for i in (0, len(m["stops"]) // 2, -1):
        running, population = (spread(m[key][:, i], "{:.1f}") for key in ("running", "population"))
        yield f"L11  test accuracy in %, step {m['stops'][i]:3}: running {running:20} population {population}"
        yield f"L11  the pass's less the running averages', by seed, step {m['stops'][i]:3}: {worth(m, i)}"
    yield f"L12  N = 1: a batch's accuracy at {same(m):.0f} % of the stops; logits within {m['deviation'].max():.0e}"


def same(m):
    """% of the stops at which images one at a time get the accuracy of a batch."""
    return 100 * (m["running"] == m["single"]).mean()


def verdicts(m):
    late = abs(m["running"][:, -1] - m["population"][:, -1]).max()
    yield judge(
        "L11",
        [late <= 2],
        f"After {m['stops'][-1]} steps the two differ by {late:.1f} percentage points at most. After "
        f"{m['stops'][0]} steps, when the averages have hardly left their start, the pass is worth {worth(m, 0)} "
        "points more, by seed.",
    )
    yield judge(
        "L12",
        [same(m) == 100 and m["deviation"].max() < 1e-5],
        f"One image at a time gets its batch's accuracy at {same(m):.0f} % of the stops, its logits within "
        f"{m['deviation'].max():.0e} of those in the batch.",
    )


def draw(m):
    fig, (left, right) = figure(3.6, 1, 2)
    for key, label, colour, style in (
        ("population", "L11: one pass over the training set", GREEN, "-."),
        ("running", "L11: running averages", BLUE, "-"),
    ):
        band(left, m["stops"], m[key], color=colour, linestyle=style, label=label)
    left.plot(
        m["stops"], np.median(m["single"], axis=0), "o", color=ORANGE, fillstyle="none", label="L12: running, N = 1"
    )
    left.set(
        title="L11, L12: the whole network", xlabel="step", ylabel="test accuracy in %", xscale="log", ylim=(0, 101)
    )
    left.legend(fontsize=8, loc="lower right")
    for key, label, colour, style in (
        ("mean", "mean, in standard deviations", BLUE, "-"),
        ("var", "variance, relative", ORANGE, "--"),
    ):
        band(right, m["stops"], m[key], color=colour, linestyle=style, marker="o", label=label)
    right.set(title="L11: the first layer", xlabel="step", xscale="log", yscale="log")
    right.set_ylabel("running averages less those of the pass")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xticks(m["stops"], [str(stop) for stop in m["stops"]])
        axes.minorticks_off()
    return fig
