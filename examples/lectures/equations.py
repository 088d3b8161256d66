"""The four equations, and what follows from them at once

Each data set of scikit-learn that is real becomes one batch: examples by features, in float32. The layer's output is
compared with the four equations in float64, and so is the one line of L14. Three pixels of the digits are 0 in every
image: features without variance.
"""

import numpy as np
from lectures.lecture import BLUE, GREEN, ORANGE, figure, judge, spread
from sklearn import datasets

import cybn

CLAIMS = {
    "L1": "Over the mini-batch: mu = 1/m sum z; sigma² = 1/m sum (z - mu)²; z_norm = (z - mu) / sqrt(sigma² + eps); "
    "z~ = gamma z_norm + beta.",
    "L2": "gamma and beta start at 1 and 0 and are learned; z~ then has whatever mean (beta) and standard deviation "
    "(gamma) the network wants.",
    "L3": "With gamma = sqrt(sigma² + eps) and beta = mu the four equations are the identity.",
    "L4": "The small eps (1e-8 in the textbook) keeps a constant feature finite, and its gradient.",
    "L14": "In a framework all of this is one line.",
}

SETS = {
    "breast cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "digits": datasets.load_digits,
    "exercise": datasets.load_linnerud,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
}
EPS = 1e-12  # far below the variance of any feature that varies (7e-6 and more)
GAMMA, BETA = 2, -1
SMALL = [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2]


def four_equations(z, gamma, beta, eps):
    """In float64."""
    z = z.astype(np.float64)
    mu = z.sum(axis=0) / len(z)
    var = ((z - mu) ** 2).sum(axis=0) / len(z)
    z_norm = (z - mu) / np.sqrt(var + eps)
    return gamma * z_norm + beta, mu, var


def measure(run=map):
    return {
        "sets": dict(zip(SETS, run(measure_set, SETS), strict=True)),
        "constant": constant_feature(),
        "wine": wine(),
    }


def measure_set(name):
    """Largest errors: "wanted" as it is, the others relative to the largest value of what is compared."""
    z = SETS[name]().data.astype(np.float32)
    varies = z.std(axis=0) > 0
    bn = cybn.BatchNorm1d(z.shape[1], eps=EPS)
    starts = (bn.weight == 1).all() and (bn.bias == 0).all()
    want, mu, var = four_equations(z, 1, 0, EPS)
    equations = abs(bn(z) - want).max() / abs(want).max()
    usual, *_ = four_equations(z, 1, 0, 1e-5)
    one_line = abs(cybn.batch_norm(z, None, None, training=True) - usual).max() / abs(usual).max()
    bn.weight[:], bn.bias[:] = GAMMA, BETA
    moved = bn(z).astype(np.float64)[:, varies]
    wanted = max(abs(moved.mean(axis=0) - BETA).max(), abs(moved.std(axis=0) - GAMMA).max())
    bn.weight[:], bn.bias[:] = np.sqrt(var + EPS), mu
    identity = (abs(bn(z) - z).max(axis=0)[varies] / abs(z).max(axis=0)[varies]).max()
    return {
        "starts": starts,
        "equations": equations,
        "one line": one_line,
        "wanted": wanted,
        "identity": identity,
        "constant": (~varies).sum(),
    }


def constant_feature():
    """The digits' pixels without variance: output and largest gradient for each eps, and without one."""
    z = datasets.load_digits().data.astype(np.float32)
    z = np.ascontiguousarray(z[:, z.std(axis=0) == 0])
    dy = np.random.default_rng(0).normal(size=z.shape).astype(np.float32)
    largest = []
    for eps in SMALL:
        bn = cybn.BatchNorm1d(z.shape[1], eps=eps)
        finite = np.isfinite(bn(z)).all()
        dz = bn.backward(dy)
        largest.append(abs(dz).max() if finite and np.isfinite(dz).all() else np.nan)
    with np.errstate(invalid="ignore"):
        without = four_equations(z, 1, 0, 0)[0]
    return {"largest": largest, "without": np.isnan(without).all()}


def wine():
    """Percentiles of the features: as they are, normalized, and where gamma and beta put them."""
    z = datasets.load_wine().data.astype(np.float32)
    bn = cybn.BatchNorm1d(z.shape[1])
    normalized = bn(z)
    bn.weight[:], bn.bias[:] = GAMMA, BETA
    return [np.percentile(values, [0, 25, 50, 75, 100], axis=0) for values in (z, normalized, bn(z))]


def slope(m):
    """Of the largest gradient over eps, on log axes."""
    return np.polyfit(np.log(SMALL), np.log(m["constant"]["largest"]), 1)[0]


def numbers(m):
    def line(claim, what, key):
        errors = [s[key] for s in m["sets"].values()]
        return f"{claim:4} {what}, over {len(errors)} data sets: {spread(errors, '{:.0e}')}"

    yield line("L1", "largest error of the layer against float64, relative", "equations")
    yield line("L2", f"error of mean {BETA} and standard deviation {GAMMA}", "wanted")
    yield line("L3", "largest error of the identity, relative", "identity")
    gradients = ", ".join(f"{value:.0e}" for value in m["constant"]["largest"])
    yield f"L4   largest gradient of a constant pixel, eps {SMALL[0]:g} to {SMALL[-1]:g}: {gradients}"
    yield f"L4   its slope over eps, on log axes: {slope(m):.2f}"
    yield f"L4   the same output with eps = 0: {'NaN' if m['constant']['without'] else 'finite'}"
    yield line("L14", "largest error of the one line, relative", "one line")


def verdicts(m):
    worst = {key: max(s[key] for s in m["sets"].values()) for key in ("equations", "wanted", "identity", "one line")}
    yield judge(
        "L1",
        [worst["equations"] < 1e-6],
        f"On {len(m['sets'])} data sets the layer differs from the four equations by {worst['equations']:.0e} at "
        "most, in float32.",
    )
    yield judge(
        "L2",
        [all(s["starts"] for s in m["sets"].values()), worst["wanted"] < 1e-6],
        f"The layer starts at 1 and 0; set to {GAMMA} and {BETA}, they are the output's standard deviation and mean, "
        f"to {worst['wanted']:.0e}.",
    )
    yield judge("L3", [worst["identity"] < 1e-6], f"The identity holds to {worst['identity']:.0e}.")
    largest = m["constant"]["largest"]
    yield judge(
        "L4",
        [np.isfinite(largest).all(), m["constant"]["without"]],
        f"With eps, output and gradient of a constant pixel are finite, but the gradient grows as eps to the power of "
        f"{slope(m):.2f}: {largest[-1]:.0f} at eps = {SMALL[-1]:g}, {largest[0]:.0e} at {SMALL[0]:g}. Without eps the "
        f"output is {'0/0' if m['constant']['without'] else 'finite'}.",
    )
    yield judge(
        "L14",
        [worst["one line"] < 1e-6],
        f"It is: `y = cybn.batch_norm(z, None, None, training=True)`, within {worst['one line']:.0e} of the equations "
        "with its eps of 1e-5.",
    )


def draw(m):
    fig, panels = figure(6, 2, 2)
    titles = ("L1: wine, its 13 features as they are", "L1: normalized", f"L2: gamma = {GAMMA}, beta = {BETA}")
    for axes, title, (low, first, middle, third, high) in zip(panels.flat, titles, m["wine"], strict=False):
        place = np.arange(len(middle))
        axes.vlines(place, low, high, color="0.6", linewidth=1, label="all examples")
        axes.vlines(place, first, third, color=BLUE, linewidth=6, label="the middle half")
        axes.plot(place, middle, "o", color="white", markeredgecolor=BLUE, label="median")
        axes.set(title=title, xlabel="feature", xticks=place[::3], ylabel="value")
    panels[0, 0].set_yscale("symlog", linthresh=1)
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.65, 1))
    axes = panels[1, 1]
    axes.loglog(SMALL, m["constant"]["largest"], "o-", color=ORANGE, label="largest gradient, measured")
    axes.loglog(SMALL, 1 / np.sqrt(SMALL), color=GREEN, linestyle=":", label="1 / sqrt(eps)")
    axes.set(title="L4: digits, pixels that are 0 in every image", xlabel="eps", ylabel="gradient")
    axes.legend(fontsize=8)
    return fig
