"""cybn beside PyTorch, ONNX Runtime and its own NumPy reference, on this machine.

Run by `make compare`, which installs the peers into an environment of their own. Each library runs in a process of its
own; the processes take turns, one at a time, for several rounds, and a figure is the median over the rounds. Ratios are
formed per shape, then averaged geometrically, weighted by how often the shape occurs in its network. "Of copy" is the
fraction of the limit: the least bytes that the operation can move (x read once and y written once; backward reads two
arrays and writes one; a step is both) per second of cybn, over those of PyTorch's `copy_` of the same tensor into
memory that exists. "Alive": so many layers one after the other whose results live until the last is through, as in a
network: what the memory of results costs.

    python benchmarks/compare.py [--rounds 5] [--only WORDS] [--details] [--markdown FILE] [--save FILE]
"""

import argparse
import contextlib
import functools
import json
import math
import platform
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from benchmarks.libraries import CORES, FLOOR_ARRAYS, NETWORKS, Task
from benchmarks.timing import geometric_mean, in_turns, seconds
from tqdm import tqdm

from benchmarks import libraries

TRAINING = ("resnet50_n32", "mobilenet_v2_n32", "dense_2d", "few_channels")
STEPS = ("resnet50_n32", "mobilenet_v2_n32")
EVALUATION = ("resnet50_n32", "resnet50_n1", "mobilenet_v2_n32", "dense_2d", "few_channels")
ROUND_SECONDS = 0.05
ALIVE = 8

# ----------------------------------------------------------------------------------------------- a library, as a worker

# "plain" is cybn once more, in a process of its own: what a step costs without extras. "copy": PyTorch's.
WORKERS = {
    "cybn": "cybn",
    "plain": "cybn",
    "reference": "numpy",
    "torch": "torch",
    "onnx": "onnxruntime",
    "copy": "torch",
}


def prepare(library, operation, shape, last):
    """`operation`: one of the benchmarks', with what a step comes with behind it; or "copy"."""
    if operation == "copy":
        return copy(Task("evaluation", shape, last=last))
    name, *words = operation.split()
    task = Task(
        name,
        shape,
        last=last,
        activation="relu" if "relu" in words else None,
        residual="add" in words,
        counted=next((word for word in words if word in ("mask", "weights")), None),
    )
    function = libraries.prepare(WORKERS[library], task)
    return functools.partial(together, function) if "alive" in words else function


def together(function):
    return [function() for _ in range(ALIVE)]


def copy(task):
    import torch

    x = torch.from_numpy(task.array())
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


def measure(function):
    """Seconds per call, over a round."""
    return seconds(function, ROUND_SECONDS, 3)


def work(library):
    """Serve measurements: a JSON request per line in, seconds per call out."""
    previous = function = None
    for line in sys.stdin:
        operation, shape, last = request = json.loads(line)
        if request != previous:
            function = None  # its arrays go before the next come
            function = prepare(library, operation, tuple(shape), last)
            previous = request
        function()  # after another's turn caches hold nothing of it
        print(measure(function), flush=True)


# ------------------------------------------------------------------------------------------------------- the comparison


class Worker:
    def __init__(self, library):
        command = [sys.executable, __file__, "--worker", library]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"worker failed on {request}: {self.process.args}")
        return float(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Row:
    """A line of the table: an operation of cybn against an operation of a peer."""

    def __init__(self, title, operation, peer, networks, last=False, peer_operation=None):
        self.title = title
        self.operation = operation
        self.peer = peer
        self.networks = networks
        self.last = last
        self.peer_operation = peer_operation or operation
        self.results = []  # Result

    def summary(self):
        worst = min(self.results, key=lambda result: result.ratio)
        cells = [self.title, f"{mean(self.results, [r.ratio for r in self.results]):.2f}x", f"{worst.ratio:.2f}x"]
        cells.append(str(tuple(worst.shape)))
        if self.results[0].copy is None:
            return [*cells, "", ""]
        arrays = FLOOR_ARRAYS[self.operation]
        speed = mean(self.results, [arrays * 4 * math.prod(r.shape) / r.ours / 1e9 for r in self.results])
        fraction = mean(self.results, [of_copy(self.operation, r) for r in self.results])
        return [*cells, f"{speed:.1f}", f"{fraction:.2f}"]

    def saved(self):
        fields = ("title", "operation", "peer", "peer_operation", "last")
        return {name: getattr(self, name) for name in fields} | {"results": [r._asdict() for r in self.results]}


class Result(NamedTuple):
    """Seconds per call; `copy`: of PyTorch's copy_ of the tensor, or None where it was not measured."""

    network: str
    shape: list
    count: int
    ours: float
    peer: float
    copy: float | None

    @property
    def ratio(self):
        return self.peer / self.ours


def mean(results, values):
    """Geometric, weighted by count."""
    return geometric_mean(values, [result.count for result in results])


def of_copy(operation, result):
    """The fraction of the limit that cybn reaches."""
    return FLOOR_ARRAYS[operation] / 2 * result.copy / result.ours


def rows():
    resnet = ("resnet50_n32",)
    return [
        Row("training, channels-first, vs PyTorch", "training", "torch", TRAINING),
        Row("training, channels-last, vs PyTorch", "training", "torch", TRAINING, last=True),
        Row("training vs PyTorch's copy_", "training", "copy", resnet, peer_operation="copy"),
        Row("evaluation vs PyTorch", "evaluation", "torch", EVALUATION),
        Row("evaluation, channels-last, vs PyTorch", "evaluation", "torch", EVALUATION, last=True),
        Row("evaluation vs PyTorch's copy_", "evaluation", "copy", resnet, peer_operation="copy"),
        Row(f"evaluation, {ALIVE} results alive, vs PyTorch", "evaluation alive", "torch", ("resnet50_n1",)),
        Row("evaluation vs ONNX Runtime", "evaluation", "onnx", EVALUATION),
        Row("backward, channels-first, vs PyTorch", "backward", "torch", TRAINING),
        Row("backward, channels-last, vs PyTorch", "backward", "torch", TRAINING, last=True),
        Row("step with ReLU vs PyTorch", "step relu", "torch", STEPS),
        Row("step with add + ReLU vs PyTorch", "step add relu", "torch", STEPS),
        Row("step with ReLU vs without", "step relu", "plain", STEPS, peer_operation="step"),
        Row("step with add + ReLU vs without", "step add relu", "plain", STEPS, peer_operation="step"),
        Row("step with a mask vs without", "step mask", "plain", STEPS, peer_operation="step"),
        Row("step with weights vs without", "step weights", "plain", STEPS, peer_operation="step"),
        Row("evaluation of small arrays vs PyTorch", "evaluation", "torch", ("latency",)),
        Row("training vs cybn.reference", "training", "reference", TRAINING),
        Row("evaluation vs cybn.reference", "evaluation", "reference", EVALUATION),
        Row("backward vs cybn.reference", "backward", "reference", TRAINING),
    ]


def cases(row):
    for network in row.networks:
        for shape, count in NETWORKS[network]:
            if len(shape) > 2 or not row.last:
                yield network, shape, count


def compare(table, rounds):
    workers = {library: Worker(library) for library in WORKERS}
    total = sum(1 for row in table for _ in cases(row))
    with tqdm(total=total, unit="shape", ncols=100) as progress:
        for row in table:
            progress.set_description(row.title)
            for network, shape, count in cases(row):
                # On whole networks, the copy too: it is the limit.
                asked = [("cybn", row.operation), (row.peer, row.peer_operation)]
                if row.peer == "torch" and row.networks != ("latency",) and row.operation in FLOOR_ARRAYS:
                    asked.append(("copy", "copy"))
                turns = [
                    functools.partial(workers[library].measure, operation, shape, row.last)
                    for library, operation in asked
                ]
                medians = in_turns(turns, rounds)
                copy = medians[-1] if asked[-1][0] == "copy" else None
                row.results.append(Result(network, shape, count, *medians[:2], copy))
                progress.update()
    for worker in workers.values():
        worker.close()


def machine():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {CORES} cores"


def save(file, **results):
    """Results as JSON, with what they are of."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "versions": versions(), "date": date.today().isoformat()}
    file.write_text(json.dumps(about | results, indent=1) + "\n")


def versions():
    """Of the libraries that are installed."""
    found = {}
    for name in ("cybn", "numpy", "torch", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def markdown(table):
    lines = ["| what | geometric mean | worst | worst shape | GB/s | of copy |", "|---|--:|--:|---|--:|--:|"]
    lines += ["| " + " | ".join(row.summary()) + " |" for row in table]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often the libraries take turns (%(default)s)")
    parser.add_argument("--only", default="", help="only rows whose title contains this")
    parser.add_argument("--details", action="store_true", help="every shape, in milliseconds")
    parser.add_argument("--markdown", help="write the table to this file, too")
    parser.add_argument("--save", metavar="FILE", help="write every shape's times to this file, as JSON (plots.py)")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    table = [row for row in rows() if args.only in row.title]
    compare(table, args.rounds)
    print(f"\n{machine()}; ratios above 1: cybn is faster\n")
    print(f"{'':<42} {'mean':>8} {'worst':>8}  {'worst shape':<20} {'GB/s':>6} {'of copy':>8}")
    for row in table:
        print("{:<42} {:>8} {:>8}  {:<20} {:>6} {:>8}".format(*row.summary()))
        if args.details:
            for r in row.results:
                print(f"    {tuple(r.shape)!s:<22} {1000 * r.ours:9.4f} ms {1000 * r.peer:9.4f} ms {r.ratio:6.2f}x")
    if args.markdown:
        Path(args.markdown).write_text(f"{machine()}\n\n{markdown(table)}\n")
    if args.save:
        save(args.save, rounds=args.rounds, rows=[row.saved() for row in table])


if __name__ == "__main__":
    main()
