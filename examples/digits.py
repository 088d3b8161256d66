"""Handwritten digits, learned with batch normalization and without it.

Two networks in plain NumPy, one fully connected and one convolutional, learn scikit-learn's 1,797 bundled images with
four optimizers: once with the layer between ``W a`` and the activation, once without. All else is equal: the initial W,
the mini-batches and the learning rate. How the networks work and are trained is in networks.py.

    python examples/digits.py [--out digits.png] [--save digits.npz] [--only-save] [--steps 300] [--seed 0]

It prints a table, times cybn against the same mathematics in NumPy, draws the learning curves, and saves a trained
network for the service (examples/service).
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from networks import (
    BATCH,
    Adam,
    GradientDescent,
    Momentum,
    RMSprop,
    accuracy,
    convolutional,
    fully_connected,
    load_data,
    set_population_statistics,
    train,
)
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import cybn

GOAL = 90  # % of the test images

# --------------------------------------------------------------------------------------------------------- comparison

# The learning rates: of 0.001, 0.003, 0.01, ..., 10 those at which the network *without* the layer ended best, on
# average over three seeds. The layer gets no rate of its own, though it would bear larger ones.
EXPERIMENTS = {
    "fully connected": (fully_connected, [(GradientDescent, 1), (Momentum, 3), (RMSprop, 0.03), (Adam, 0.01)]),
    "convolutional": (convolutional, [(GradientDescent, 0.3), (Momentum, 0.3), (RMSprop, 0.01), (Adam, 0.01)]),
}

# The network that is saved, with the layer and the statistics of the whole training set.
SAVED = ("convolutional", Adam)


def learn(name, optimizer, with_layer, data, steps, seed, progress):
    """A trained network and its learning curve."""
    progress.set_description(f"{name}, {optimizer.__name__}, {'with' if with_layer else 'without'}")
    build, optimizers = EXPERIMENTS[name]
    rng = np.random.default_rng(seed)
    network = build(rng, with_layer)
    return network, train(network, optimizer(dict(optimizers)[optimizer]), data, steps, rng, progress)


def compare(name, optimizer, rate, data, steps, seed, progress):
    """Train the network without the layer and with it, then evaluate the latter in other ways too."""
    x, _, x_test, digit_test = data
    _, without = learn(name, optimizer, False, data, steps, seed, progress)
    network, curve = learn(name, optimizer, True, data, steps, seed, progress)
    logits = network.eval()(x_test)
    # As a service answers: no batch to wait for, and no request that changes the answer to another.
    singles = np.concatenate([network(image[None]) for image in x_test])
    set_population_statistics(network, x)
    return SimpleNamespace(
        name=name,
        optimizer=optimizer,
        rate=rate,
        network=network,
        curves=(without, curve),
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
        print(row(r.name, r.optimizer.__name__, f"{r.rate:g}", *accuracies, *goals))
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
        panel.set(title=f"{r.optimizer.__name__}, rate {r.rate:g}", ylim=(0, 102), yticks=[0, 25, 50, 75, GOAL, 100])
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
    parser.add_argument("--save", default="digits.npz", help="the convolutional network, by Adam (%(default)s)")
    parser.add_argument("--only-save", action="store_true", help="train that network alone, with the same result")
    parser.add_argument("--steps", type=int, default=300, help="mini-batches in each of the 16 trainings (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    data = load_data(rng)
    trainings = 1 if args.only_save else sum(2 * len(optimizers) for _, optimizers in EXPERIMENTS.values())
    # Arrays this small gain nothing from a second core, and lose much when BLAS and OpenMP both wait for it.
    with threadpool_limits(1), tqdm(total=trainings * args.steps, unit="step", ncols=100, mininterval=0.5) as progress:
        if args.only_save:
            network, _ = learn(*SAVED, True, data, args.steps, args.seed, progress)
            set_population_statistics(network, data[0])
        else:
            results = [
                compare(name, optimizer, rate, data, args.steps, args.seed, progress)
                for name, (_, optimizers) in EXPERIMENTS.items()
                for optimizer, rate in optimizers
            ]
            network = next(r.network for r in results if (r.name, r.optimizer) == SAVED)
        progress.set_description("trained")
    network.save(args.save)
    if not args.only_save:
        print_table(results)
        print_timing(rng)
        draw(results, args.out)
        print(f"\nlearning curves in {args.out}")
    print(f"network for examples/service in {args.save}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
