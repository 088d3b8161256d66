"""One unit a layer: what a gradient step promises, and what it does

y = x w1 w2 ... wl, for the mean radius of 569 tumours (standardized) as x; the objective J is the mean of s y with s
= -1 or 1 for malignant or benign, so that it puts a gradient of 1 or -1 on each output, as the textbook does. One
step of gradient descent changes all weights at once. Its first-order promise is rate |gradient|²; what J really does
also has all the higher-order terms, rate² g1 g2 ... With batch normalization, the layer stands before the last
weight: y = norm(h) wl.
"""

import numpy as np
from lectures.lecture import NAMES, WITH, WITHOUT, band, each, figure, judge, spread, tumours

import cybn

CLAIMS = {
    "L23": "y = x w1 w2 ... wl: a first-order step is spoiled by higher-order terms; normalizing h_(l-1) makes the "
    "output learnable by a simple linear function, and lower layers hardly matter, except at w_i = 0 or where it "
    "changes sign.",
}

DEPTHS = list(range(2, 21))
RATE = 0.1
EPS = 1e-30  # of the layer: a product of many small weights may be small itself
FACTORS = np.linspace(-2, 2, 81)  # of the first weight; 0 among them
DEPTH = 10  # of the network where only that changes


def corpus():
    data = tumours()
    x = data.data[:, 0]
    return (x - x.mean()) / x.std(), np.where(data.target == 1, 1.0, -1.0)


def objective(x, s, w, with_layer):
    """J and its gradient by each weight."""
    h = [x]
    for weight in w[:-1]:
        h.append(h[-1] * weight)
    top = h[-1]
    if with_layer:
        top, mean, invstd = cybn.batch_norm_forward(h[-1][:, None], None, None, eps=EPS)
        top = top[:, 0]
    dy = s / len(s)
    gradient = [dy @ top]
    dh = dy * w[-1]
    if with_layer:
        dh = cybn.batch_norm_backward(dh[:, None], h[-1][:, None], mean, invstd)[0][:, 0]
    for weight, below in zip(w[-2::-1], h[-2::-1], strict=True):
        gradient.append(dh @ below)
        dh = dh * weight
    return w[-1] * gradient[0], np.array(gradient[::-1])


def trial(seed, with_layer, depth):
    """Promised and actual decrease, and the share of the lower weights in the promise."""
    w = initial(seed, depth)
    before, gradient = objective(*corpus(), w, with_layer)
    after, _ = objective(*corpus(), w - RATE * gradient, with_layer)
    return {
        "promised": RATE * gradient @ gradient,
        "actual": before - after,
        "lower": 1 - gradient[-1] ** 2 / (gradient @ gradient),
    }


def initial(seed, depth):
    return np.exp(np.random.default_rng(seed).uniform(-0.7, 0.7, depth))  # from a half to two, the product about 1


def first_weight(seed, with_layer):
    """J while the first weight is multiplied by FACTORS, relative to J at 1."""
    w = initial(seed, DEPTH)
    factors = np.ones((len(FACTORS), DEPTH))
    factors[:, 0] = FACTORS
    before, _ = objective(*corpus(), w, with_layer)
    return [objective(*corpus(), w * f, with_layer)[0] / before for f in factors]


def measure(run=map, seeds=range(20), depths=DEPTHS):
    steps = each(run, trial, seeds, [False, True], depths)  # seed, without or with, depth
    return {"depths": depths, **steps, "first": each(run, first_weight, seeds, [False, True])}


def ratio(m):
    """Actual over promised decrease."""
    return m["actual"] / m["promised"]


def numbers(m):
    for layer, name in enumerate(NAMES):
        for depth in (2, 10, 20):
            if depth in m["depths"]:
                at = spread(ratio(m)[:, layer, m["depths"].index(depth)])
                yield f"L23  actual over promised decrease, depth {depth:2}, {name:8} {at}"
        share = spread(m["lower"][:, layer].mean(-1), "{:.2g}")
        yield f"L23  share of the lower weights in |gradient|², {name:8} {share}"
    for factor in (-2, -1, 0.5, 2):
        without, with_layer = np.median(m["first"][..., abs(FACTORS - factor).argmin()], axis=0)
        yield f"L23  J when w1 is multiplied by {factor:<4g} without {without:5.2f} J, with {with_layer:5.2f} J"


def verdicts(m):
    deep = ratio(m)[:, :, -1]
    off = abs(deep[:, 0] - 1)
    positive, negative = (m["first"][:, 1, side(FACTORS, 0)] for side in (np.greater, np.less))
    zero = abs(m["first"][:, 1, FACTORS == 0]).max()
    steady = max(abs(positive - 1).max(), abs(negative + 1).max())
    yield judge(
        "L23",
        [np.median(off) > 0.1, abs(ratio(m)[:, 1] - 1).max() < 1e-9, steady < 1e-9, zero == 0],
        f"At depth {m['depths'][-1]} the step does {np.median(deep[:, 0]):.2g} times what its gradient promises "
        f"({deep[:, 0].min():.2g} to {deep[:, 0].max():.2g}); normalized, it keeps the promise to "
        f"{abs(ratio(m)[:, 1] - 1).max():.0e} at any depth. The first weight then changes J by {steady:.0e} at most "
        f"while it keeps its sign; at 0 the output is {zero:g}, and past 0 it turns.",
    )


def draw(m):
    fig, (left, right) = figure(3.6, 1, 2)
    for layer, style in enumerate((WITHOUT, WITH)):
        band(left, m["depths"], ratio(m)[:, layer], marker="o", **style)
        first = np.median(m["first"][:, layer], axis=0)
        # Points where it jumps, or a line would show values that are not there.
        right.plot(FACTORS, first, **(style | ({"linestyle": "", "marker": ".", "markersize": 4} if layer else {})))
    left.set(
        title=f"L23: one step at rate {RATE:g}",
        xlabel="depth",
        ylabel="actual / promised decrease",
        xticks=[2, 5, 10, 15, 20],
    )
    left.set(yscale="log", ylim=(0.7, 100), yticks=[1, 10, 100])
    left.text(20, 80, f"the range goes to {ratio(m)[:, 0].max():.0e}", ha="right", size=8)
    left.legend(fontsize=8)
    right.set(
        title=f"L23: depth {DEPTH}, only the first weight changes",
        xlabel="w1 / its value before",
        ylabel="J / its value before",
    )
    right.legend(fontsize=8)
    return fig
