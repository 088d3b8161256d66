"""Handwritten digits, learned with batch normalization and without it.

Two networks in plain NumPy, one fully connected and one convolutional, learn scikit-learn's 1,797 bundled images with
four optimizers. With the layer, a hidden layer computes ``a = g(BN(W a))``: whatever constant b were added to W a, the
subtraction of the mean would remove it, so there is no b, and the bias inside BN takes its place. Without the layer it
computes ``a = g(W a + b)``. All else is equal: the initial W, the mini-batches and the learning rate.

    python examples/digits.py [--out digits.png] [--steps 300] [--seed 0]

It prints a table, times cybn against the same mathematics in NumPy, and draws the learning curves.
"""

import argparse
import math
import statistics
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import cybn

BATCH = 64
EVALUATE_EVERY = 2
GOAL = 90  # % of the test images

# ------------------------------------------------------------------------------------------------------------- layers
# A cybn layer is called for the forward pass, has backward, weight and bias, and leaves grad_weight and grad_bias. The
# layers here do the same under the same names, so that nothing below needs to know which is which.


class Linear:
    def __init__(self, rng, shape, bias=True):
        # Normal, with the variance that keeps a signal's size through layers of ReLU (He et al. 2015).
        self.weight = rng.standard_normal(shape, np.float32) * math.sqrt(2 / math.prod(shape[1:]))
        self.bias = np.zeros(shape[0], np.float32) if bias else None


class Dense(Linear):
    """z = W a (+ b); each row of an array is an example."""

    def __call__(self, a):
        self.a = a
        z = a @ self.weight.T
        return z if self.bias is None else z + self.bias

    def backward(self, dz):
        self.grad_weight = dz.T @ self.a
        self.grad_bias = dz.sum(axis=0)
        return dz @ self.weight


class Conv(Linear):
    """z = W * a (+ b) over (N, C, H, W), with 3x3 kernels and zeros around the image."""

    def __call__(self, a):
        z, self.columns = convolve(a, self.weight)
        return z if self.bias is None else z + self.bias[:, None, None]

    def backward(self, dz):
        flat = dz.reshape(*dz.shape[:2], -1)
        self.grad_weight = np.tensordot(flat, self.columns, axes=((0, 2), (0, 2))).reshape(self.weight.shape)
        self.grad_bias = flat.sum(axis=(0, 2))
        # What a pixel gave to its neighbours comes back from them: the same kernels, turned by 180 degrees.
        return convolve(dz, self.weight[:, :, ::-1, ::-1].swapaxes(0, 1))[0]


def convolve(a, weight):
    """A convolution as a matrix product, and the matrix: its columns are the 3x3 patches of a."""
    n, _, height, width = a.shape
    patches = sliding_window_view(np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    columns = patches.transpose(0, 1, 4, 5, 2, 3).reshape(n, -1, height * width)
    z = weight.reshape(len(weight), -1) @ columns
    return z.reshape(n, len(weight), height, width), columns


class Sigmoid:
    def __call__(self, z):
        self.a = 0.5 + 0.5 * np.tanh(0.5 * z)  # 1 / (1 + exp(-z)), which could overflow
        return self.a

    def backward(self, da):
        return da * self.a * (1 - self.a)


class ReLU:
    def __call__(self, z):
        self.positive = z > 0
        return z * self.positive

    def backward(self, da):
        return da * self.positive


class Flatten:
    def __call__(self, a):
        self.shape = a.shape
        return a.reshape(len(a), -1)

    def backward(self, da):
        return da.reshape(self.shape)


# ----------------------------------------------------------------------------------------------------------- networks


class Network:
    def __init__(self, layers):
        self.layers = layers

    def __call__(self, a):
        for layer in self.layers:
            a = layer(a)
        return a

    def backward(self, da):
        for layer in reversed(self.layers):
            da = layer.backward(da)

    def train(self, mode=True):
        for layer in self.layers:
            if isinstance(layer, cybn.BatchNorm):
                layer.train(mode)
        return self

    def eval(self):
        return self.train(False)

    def parameters(self):
        """Pairs of a parameter and its gradient: W and b, gamma and beta alike."""
        for layer in self.layers:
            for name in ("weight", "bias"):
                if getattr(layer, name, None) is not None:
                    yield getattr(layer, name), getattr(layer, "grad_" + name)


def fully_connected(rng, with_layer):
    layers = [Flatten()]
    for inputs, outputs in pairwise([64, 100, 100, 100]):
        layers.append(Dense(rng, (outputs, inputs), bias=not with_layer))
        if with_layer:
            layers.append(cybn.BatchNorm1d(outputs))
        layers.append(Sigmoid())
    return Network([*layers, Dense(rng, (10, 100))])


def convolutional(rng, with_layer):
    layers = []
    for inputs, outputs in pairwise([1, 8, 8, 8]):
        layers.append(Conv(rng, (outputs, inputs, 3, 3), bias=not with_layer))
        # One mean and variance for all pixels of a feature map; the ReLU in the same pass over memory.
        layers.append(cybn.BatchNorm2d(outputs, activation="relu") if with_layer else ReLU())
    return Network([*layers, Flatten(), Dense(rng, (10, 8 * 8 * 8))])


# --------------------------------------------------------------------------------------------------------- optimizers


class Optimizer:
    """The textbook rules: `update` changes a parameter w, given its gradient dw and averages of dw (v) and dw^2 (s)."""

    def __init__(self, rate):
        self.rate = rate
        self.t = 0
        self.averages = {}

    def step(self, parameters):
        self.t += 1
        for i, (w, dw) in enumerate(parameters):
            v, s = self.averages.setdefault(i, (np.zeros_like(w), np.zeros_like(w)))
            self.update(w, dw, v, s)


class GradientDescent(Optimizer):
    def update(self, w, dw, v, s):
        w -= self.rate * dw


class Momentum(Optimizer):
    def update(self, w, dw, v, s, beta=0.9):
        v += (1 - beta) * (dw - v)
        w -= self.rate * v


class RMSprop(Optimizer):
    def update(self, w, dw, v, s, beta=0.9, eps=1e-8):
        s += (1 - beta) * (dw**2 - s)
        w -= self.rate * dw / (np.sqrt(s) + eps)


class Adam(Optimizer):
    def update(self, w, dw, v, s, beta1=0.9, beta2=0.999, eps=1e-8):
        v += (1 - beta1) * (dw - v)
        s += (1 - beta2) * (dw**2 - s)
        v_hat = v / (1 - beta1**self.t)
        s_hat = s / (1 - beta2**self.t)
        w -= self.rate * v_hat / (np.sqrt(s_hat) + eps)


# ----------------------------------------------------------------------------------------------- training, evaluation


def load_data(rng):
    """Images (N, 1, 8, 8) from 0 to 1 and their digits: 1,437 to train on, 360 to test."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    train, test = np.split(rng.permutation(len(images)), [1437])
    return images[train], digits.target[train], images[test], digits.target[test]


def train(network, optimizer, data, steps, rng, progress):
    """Train, and return the learning curve: pairs of a step and the test accuracy after it."""
    x, digit, x_test, digit_test = data
    curve = [(0, accuracy(network.eval()(x_test), digit_test))]
    batches = iter(())
    for step in range(1, steps + 1):
        batch = next(batches, None)
        if batch is None:  # a new epoch, without its last and shorter batch
            batches = iter(rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH))
            batch = next(batches)
        logits = network.train()(x[batch])
        network.backward(cross_entropy_gradient(logits, digit[batch]))
        optimizer.step(network.parameters())
        if step % EVALUATE_EVERY == 0 or step == steps:
            curve.append((step, accuracy(network.eval()(x_test), digit_test)))
        progress.update()
    return curve


def cross_entropy_gradient(logits, digit):
    """Of the batch's mean of -log softmax(logits)[digit]."""
    gradient = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradient /= gradient.sum(axis=1, keepdims=True)
    gradient[np.arange(len(digit)), digit] -= 1
    return gradient / len(digit)


def accuracy(logits, digit):
    return 100 * float((logits.argmax(axis=1) == digit).mean())


def set_population_statistics(network, x):
    """Replace the running averages by the statistics of all of x, in one pass, layer by layer.

    Statistics depend on the layers below, so each layer gets what they yield with their final statistics.
    """
    network.eval()
    batches = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]
    for layer in network.layers:
        if isinstance(layer, cybn.BatchNorm):
            first, *others = map(cybn.batch_norm_stats, batches)
            population = first.merge(*others)  # exact; an average of the batches' variances would not be
            layer.running_mean[...] = population.mean
            layer.running_var[...] = population.var(correction=1)  # unbiased, as the running average is
        batches = [layer(batch) for batch in batches]


# --------------------------------------------------------------------------------------------------------- comparison

# The learning rates: of 0.001, 0.003, 0.01, ..., 10 those at which the network *without* the layer ended best, on
# average over three seeds. The layer gets no rate of its own, though it would bear larger ones.
EXPERIMENTS = {
    "fully connected": (fully_connected, [(GradientDescent, 1), (Momentum, 3), (RMSprop, 0.03), (Adam, 0.01)]),
    "convolutional": (convolutional, [(GradientDescent, 0.3), (Momentum, 0.3), (RMSprop, 0.01), (Adam, 0.01)]),
}


def compare(name, build, optimizer, rate, data, steps, seed, progress):
    """Train the network without the layer and with it, then evaluate the latter in other ways too."""
    x, _, x_test, digit_test = data
    curves = []
    for with_layer in (False, True):
        progress.set_description(f"{name}, {optimizer.__name__}, {'with' if with_layer else 'without'}")
        rng = np.random.default_rng(seed)
        network = build(rng, with_layer)
        curves.append(train(network, optimizer(rate), data, steps, rng, progress))
    logits = network.eval()(x_test)
    # As a service answers: no batch to wait for, and no request that changes the answer to another.
    singles = np.concatenate([network(image[None]) for image in x_test])
    set_population_statistics(network, x)
    return SimpleNamespace(
        network=name,
        optimizer=optimizer.__name__,
        rate=rate,
        curves=curves,
        single=accuracy(singles, digit_test),
        population=accuracy(network(x_test), digit_test),
        deviation=abs(singles - logits).max(),
    )


def print_table(results):
    row = "{:<16} {:<15} {:>5} {:>10} {:>9} {:>11} {:>6} {:>11} {:>6}".format
    print(f"\n{'':39}{'test accuracy in %':^38}{f'steps to {GOAL} %':>19}")
    print(row("", "", "", "without", "with the", "layer:", "", "without", "with"))
    print(row("network", "optimizer", "rate", "layer", "running", "population", "N = 1", "layer", "layer"))
    for r in results:
        ends = [curve[-1][1] for curve in r.curves]
        goals = [next((step for step, value in curve if value >= GOAL), "-") for curve in r.curves]
        accuracies = [f"{value:.1f}" for value in (*ends, r.population, r.single)]
        print(row(r.network, r.optimizer, f"{r.rate:g}", *accuracies, *goals))
    deviation = max(r.deviation for r in results)
    print(f"""
running      with the statistics averaged during training
population   with the statistics of one more pass over the whole training set
N = 1        running, one example at a time; its logits are within {deviation:.0e} of those in a batch
-            not reached""")


def draw(results, path):
    """The learning curves, one row of panels for each network."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(len(EXPERIMENTS), len(results) // len(EXPERIMENTS), sharex=True, sharey=True)
    for panel, r in zip(panels.flat, results, strict=True):
        for curve, label, style in zip(r.curves, ("without: W a + b", "with: BN(W a)"), ("C1--", "C0-"), strict=True):
            panel.plot(*zip(*curve, strict=True), style, label=label, linewidth=2)
        panel.axhline(GOAL, color="0.5", linewidth=1, linestyle=":")
        panel.set(title=f"{r.optimizer}, rate {r.rate:g}", ylim=(0, 102), yticks=[0, 25, 50, 75, GOAL, 100])
        panel.grid(alpha=0.25)
    for name, row in zip(EXPERIMENTS, panels, strict=True):
        row[0].set_ylabel(f"{name}\ntest accuracy in %", fontsize=12)
    for panel in panels[-1]:
        panel.set_xlabel("step", fontsize=12)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=12)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------------------- timing


def training_pass(module, x, dy, running_mean, running_var, gamma, beta):
    """Forward and backward, by cybn or by cybn.reference: the same functions of the same arguments."""
    _, mean, invstd = module.batch_norm_forward(x, running_mean, running_var, gamma, beta)
    module.batch_norm_backward(dy, x, mean, invstd, gamma)


def milliseconds(shape, rng, rounds=7):
    """Medians over alternating rounds, so that whatever else the machine does meets all variants alike."""
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(2)]
    arrays += [np.full(shape[1], value, np.float32) for value in (0, 1, 1, 0)]
    calls = max(1, 500_000 // arrays[0].size)  # in a round
    variants = [(cybn.reference, 1), (cybn, 1), (cybn, cybn.get_num_threads())]
    times = [[] for _ in variants]
    for _ in range(rounds):
        for (module, threads), elapsed in zip(variants, times, strict=True):
            with cybn.num_threads(threads):
                start = time.perf_counter()
                for _ in range(calls):
                    training_pass(module, *arrays)
                elapsed.append(1000 * (time.perf_counter() - start) / calls)
    return [statistics.median(elapsed) for elapsed in times]


def print_timing(rng):
    row = "{:<41} {:<16} {:>9} {:>15} {:>15}".format
    threads = f"cybn, {cybn.get_num_threads()} threads"
    print("\n" + row("ms per training pass, forward + backward", "shape", "reference", "cybn, 1 thread", threads))
    for name, shape in (
        ("hidden layer, fully connected", (BATCH, 100)),
        ("hidden layer, convolutional", (BATCH, 8, 8, 8)),
        ("for comparison, a layer for photographs", (BATCH, 64, 56, 56)),
    ):
        reference, *ours = milliseconds(shape, rng)
        print(row(name, str(shape), f"{reference:.3g}", *(f"{ms:.3g} ({reference / ms:.1f}x)" for ms in ours)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="digits.png", help="the picture of the learning curves (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="mini-batches in each of the 16 trainings (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    data = load_data(rng)
    trainings = sum(2 * len(optimizers) for _, optimizers in EXPERIMENTS.values())
    # Arrays this small gain nothing from a second core, and lose much when BLAS and OpenMP both wait for it.
    with threadpool_limits(1), tqdm(total=trainings * args.steps, unit="step", ncols=100, mininterval=0.5) as progress:
        results = [
            compare(name, build, optimizer, rate, data, args.steps, args.seed, progress)
            for name, (build, optimizers) in EXPERIMENTS.items()
            for optimizer, rate in optimizers
        ]
        progress.set_description("trained")
    print_table(results)
    print_timing(rng)
    draw(results, args.out)
    print(f"\nlearning curves in {args.out}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
