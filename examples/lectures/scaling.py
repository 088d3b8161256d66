"""Inputs of very different scale

Logistic regression tells malignant from benign tumours (breast cancer), by gradient descent over all training
examples at once, from the features as they are and standardized by the training set's mean and standard deviation.
First with two features and two weights, where the error surface can be drawn (centred in either case, as there is no
intercept, so that both have the same least loss); then with all thirty. Of many rates each takes the best at which
the loss never rises. The condition number is the Hessian's at the start: how much steeper the surface is along its
steepest direction than along its flattest; up to ten it counts as round. The seeds split the examples into training
and test.
"""

from functools import partial

import numpy as np
from lectures.lecture import GREEN, SEEDS, WITH, WITHOUT, band, each, figure, first_reached, judge, spread, tumours
from scipy.optimize import minimize

import cybn

CLAIMS = {
    "L15": "Input features of very different scale make a linear or logistic model's error surface long and narrow; "
    "standardizing each dimension makes it round and learning fast.",
}

TWO = ["mean texture", "mean concavity"]
ROUND = 10  # a condition number up to here
RATES = 10.0 ** np.arange(-8, 2.1, 0.25)
STEPS = 500


def examples(seed, standardized, two):
    """Training and test features, a column of ones among them, and classes."""
    data = tumours()
    x = data.data[:, [list(data.feature_names).index(name) for name in TWO]] if two else data.data
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:400], order[400:]
    moments = cybn.batch_norm_stats(x[train])
    if standardized:
        x = cybn.batch_norm(x, moments.mean, moments.var(), eps=0)  # as at test time: the training set's statistics
    elif two:
        x = x - moments.mean  # without an intercept, so that scale is all that differs
    if not two:
        x = np.column_stack([x, np.ones(len(x))])
    return x[train], data.target[train], x[test], data.target[test]


def loss(x, y, w):
    """Mean of log(1 + exp(-z)) or log(1 + exp(z)), by class; for one vector of weights or a grid of them."""
    z = x @ w
    return np.mean(np.logaddexp(0, np.where(y == 1, -z.T, z.T)), axis=-1)


def gradient(x, y, w):
    p = 0.5 + 0.5 * np.tanh(0.5 * (x @ w))
    return x.T @ (p - y) / len(x)


def descend(x, y, rate, steps):
    """Weights before the first and after each step."""
    path = [np.zeros(x.shape[1])]
    for _ in range(steps):
        path.append(path[-1] - rate * gradient(x, y, path[-1]))
    return np.array(path)


def minimum(x, y):
    """The weights of least loss."""
    return minimize(lambda w: loss(x, y, w), np.zeros(x.shape[1]), jac=lambda w: gradient(x, y, w), tol=1e-10).x


def condition(x, y, w):
    """Of the Hessian: how much steeper the error surface is along its steepest direction than along its flattest."""
    p = 0.5 + 0.5 * np.tanh(0.5 * (x @ w))
    return np.linalg.cond((x.T * (p * (1 - p))) @ x / len(x))


def trial(seed, standardized, two, steps):
    """At the best steady rate: the losses, the test accuracy after each step; condition number, and the least loss."""
    x, y, x_test, y_test = examples(seed, standardized, two)
    paths = [descend(x, y, rate, steps) for rate in RATES]
    losses = np.array([loss(x, y, path.T) for path in paths])
    steady = (np.diff(losses) <= 0).all(axis=1)
    best = np.where(steady, losses[:, -1], np.inf).argmin()
    accuracy = 100 * np.mean(y_test == (x_test @ paths[best].T > 0).T, axis=1)
    return {
        "loss": losses[best],
        "accuracy": accuracy,
        "rate": RATES[best],
        "condition": condition(x, y, paths[best][0]),
        "least": loss(x, y, minimum(x, y)) if two else 0,  # thirty tell the classes apart nearly or quite
    }


def measure(run=map, seeds=SEEDS, steps=STEPS):
    m = each(run, partial(trial, steps=steps), seeds, [False, True], [True, False])  # seed, standardized, two or all
    return m | {"steps": np.arange(steps + 1), "seed": seeds[0]}


def steps_to_match(m, features):
    """Steps after which the standardized features' loss is what the others' is after all steps."""
    raw, standardized = m["loss"][:, 0, features], m["loss"][:, 1, features]
    return first_reached(-raw[:, -1:], m["steps"], -standardized)


def numbers(m):
    for features, name in enumerate(("2 features", "30 features")):
        for layer, kind in enumerate(("as they are", "standardized")):
            condition = spread(m["condition"][:, layer, features], "{:.2g}")
            rate = np.median(m["rate"][:, layer, features])
            loss = spread(m["loss"][:, layer, features, -1], "{:.3f}")
            accuracy = spread(m["accuracy"][:, layer, features, -1], "{:.1f}")
            yield f"L15  {name:11} {kind:13} condition number {condition}, rate {rate:.2g}"
            yield f"     {'':25} loss {loss}, test accuracy {accuracy} %"
            if features == 0:
                above = spread(m["loss"][:, layer, 0, -1] - m["least"][:, layer, 0], "{:.1g}")
                yield f"     {'':25} above the least loss by {above}"
        steps = spread(steps_to_match(m, features), "{:.0f}")
        yield f"L15  {name:11} the loss after {m['steps'][-1]} steps as they are takes {steps} standardized"


def verdicts(m):
    condition = np.median(m["condition"], axis=0)
    losses = np.median(m["loss"][..., -1], axis=0)
    above = np.median(m["loss"][:, :, 0, -1] - m["least"][:, :, 0], axis=0)
    last = m["steps"][-1]
    yield judge(
        "L15",
        [
            (condition[0] > 10 * ROUND).all(),
            *(condition[1] <= ROUND),
            np.median(steps_to_match(m, 0)) < last / 10,
            np.median(steps_to_match(m, 1)) < last / 10,
        ],
        f"With two features standardizing makes the surface round, condition number {condition[1, 0]:.1f} instead of "
        f"{condition[0, 0]:.0f}, and after {last} steps the loss is {above[1]:.0e} above the least instead of "
        f"{above[0]:.1g}. With thirty it is {'' if condition[1, 1] <= ROUND else 'not '}round, {condition[1, 1]:.0e} "
        f"instead of {condition[0, 1]:.0e}: features go together, which scaling cannot part; the loss is "
        f"{losses[1, 1]:.3f} instead of {losses[0, 1]:.3f}. The loss that features as they are reach in {last} steps "
        f"takes {np.median(steps_to_match(m, 0)):.0f} steps with two that are standardized, "
        f"{np.median(steps_to_match(m, 1)):.0f} with thirty.",
    )


def draw(m):
    fig, (raw, round_, curves) = figure(3.4, 1, 3)
    for axes, standardized, style in zip((raw, round_), (False, True), (WITHOUT, WITH), strict=True):
        x, y, _, _ = examples(m["seed"], standardized, True)
        path = descend(x, y, m["rate"][0, int(standardized), 0], STEPS)
        least = minimum(x, y)
        low, high = np.minimum(path.min(axis=0), least), np.maximum(path.max(axis=0), least)
        half = 0.75 * (high - low).max()
        sides = [np.linspace(c - half, c + half, 121) for c in (low + high) / 2]
        surface = loss(x, y, np.array(np.meshgrid(*sides)).reshape(2, -1)).reshape(121, 121)
        levels = np.geomspace(surface.min(), surface.max(), 14)
        axes.contour(*sides, surface, levels=levels, cmap="cividis", linewidths=0.8)
        axes.plot(*path.T, color=style["color"], marker=".", markersize=4, linewidth=1)
        axes.plot(*path[0], "ko", label="start")
        axes.plot(*least, "*", color=GREEN, markersize=13, label="least loss")
        axes.plot(*path[-1], "kD", markersize=4, label=f"after {len(path) - 1} steps")
        title = "L15: standardized" if standardized else "L15: as they are"
        axes.set(title=title, xlabel=f"weight of {TWO[0]}", aspect="equal")
        axes.set_ylabel(f"weight of {TWO[1]}")
        axes.grid(False)
    fig.legend(*round_.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
    for layer, (style, label) in enumerate(((WITHOUT, "as they are"), (WITH, "standardized"))):
        band(curves, m["steps"], m["loss"][:, layer, 1], **(style | {"label": label}))
    curves.set(title="L15: all 30 features", xlabel="step", ylabel="loss", yscale="log")
    curves.set_yticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5], ticks)
    curves.minorticks_off()
    curves.legend(fontsize=8)
    return fig
