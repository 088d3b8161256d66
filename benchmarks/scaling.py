"""How cybn's time grows with the batch, and what a second thread brings, on this machine.

Run by `make performance`; `plots.py` draws what is saved. float32, results allocated by each call; what is compared
takes turns for several rounds, and a figure is the median over the rounds.

    python benchmarks/scaling.py [--rounds 5] [--save benchmarks/results/scaling.json]
"""

import argparse
import functools
from pathlib import Path

from benchmarks.libraries import NETWORKS, Task, prepare
from benchmarks.timing import in_turns
from compare import Result, measure, save
from tqdm import tqdm

OPERATIONS = ("training", "evaluation", "backward")
RESULTS = Path(__file__).with_name("results") / "scaling.json"
SAMPLE = [64, 14, 14]
BATCHES = [2**k for k in range(11)]
NETWORK = "resnet50_n32"


def alternate(functions, rounds, progress):
    """Seconds per call of each."""

    def turn(function):
        taken = measure(function)
        progress.update()
        return taken

    for function in functions:
        function()
    return in_turns([functools.partial(turn, function) for function in functions], rounds)


def results_of(rounds):
    cases = NETWORKS[NETWORK]
    batch, pairs = [], []
    total = rounds * len(OPERATIONS) * (len(BATCHES) + 2 * len(cases))
    with tqdm(total=total, unit="round", ncols=100) as progress:
        for operation in OPERATIONS:
            progress.set_description(f"{operation}, N = 1 to {BATCHES[-1]}")
            functions = [prepare("cybn", Task(operation, (n, *SAMPLE))) for n in BATCHES]
            times = alternate(functions, rounds, progress)
            batch.append({"operation": operation, "n": BATCHES, "seconds": times})
        del functions  # their arrays go before the next come
        for operation in OPERATIONS:
            progress.set_description(f"{operation}, one thread and two")
            results = []
            for shape, count in cases:
                functions = [prepare("cybn", Task(operation, shape, threads=threads)) for threads in (1, 2)]
                one, two = alternate(functions, rounds, progress)
                results.append(Result(NETWORK, shape, count, ours=two, peer=one, copy=None)._asdict())
            pairs.append({"operation": operation, "results": results})
    return {"sample": SAMPLE, "batch": batch, "threads": pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often what is compared takes turns (%(default)s)")
    parser.add_argument("--save", metavar="FILE", default=RESULTS, help="where to (benchmarks/results/scaling.json)")
    args = parser.parse_args()
    save(args.save, rounds=args.rounds, **results_of(args.rounds))


if __name__ == "__main__":
    main()
