"""cybn beside PyTorch, ONNX Runtime and its own NumPy reference, on this machine.

Run by `make compare`, which installs the peers into an environment of their own. Each library runs in a process of its
own; the processes take turns, one at a time, for several rounds, and a figure is the median over the rounds. Ratios are
formed per shape, then averaged geometrically, weighted by how often the shape occurs in its network. "Of copy" is the
fraction of the limit: the least bytes that the operation can move (x read once and y written once; backward reads two
arrays and writes one; a step is both) per second of cybn, over those of PyTorch's `copy_` of the same tensor into
memory that exists.

    python benchmarks/compare.py [--rounds 5] [--only WORDS] [--details] [--markdown FILE]
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

WORKLOADS = Path(__file__).with_name("workloads.json")
TRAINING = ("resnet50_n32", "mobilenet_v2_n32", "dense_2d", "few_channels")
STEPS = ("resnet50_n32", "mobilenet_v2_n32")
EVALUATION = ("resnet50_n32", "resnet50_n1", "mobilenet_v2_n32", "dense_2d", "few_channels")
ROUND_SECONDS = 0.05
# Read and written at least. (With a residual: x, r -> y; then x, y, dy -> dx, dr.)
FLOOR_ARRAYS = {"training": 2, "evaluation": 2, "backward": 3, "step relu": 5, "step add relu": 8}

# -------------------------------------------------------------------------------------------- the libraries, as workers
# A worker gets an operation, a shape and a memory order, and returns a function to be timed.


def arrays(shape, last, seed=0):
    """float32 of a shape given channels-first, in channels-last memory if `last`."""
    if last:
        shape = (shape[0], *shape[2:], shape[1])
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.moveaxis(values, -1, 1) if last else values


def numpy_worker(operation, shape, last, library):
    import cybn

    module = cybn.reference if library == "reference" else cybn
    x = arrays(shape, last)
    if operation.startswith("step"):
        return step(cybn, x, arrays(shape, last, 1), operation.split())
    layer = cybn.BatchNorm(shape[1])
    parameters = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    if operation == "backward":
        dy = arrays(shape, last, 1)
        _, mean, invstd = cybn.batch_norm_forward(x, None, None, layer.weight, layer.bias)
        return lambda: module.batch_norm_backward(dy, x, mean, invstd, layer.weight)
    if library == "reference":
        return lambda: module.batch_norm_forward(x, *parameters, operation == "training")
    layer.train(operation == "training")
    return lambda: layer(x)


def step(cybn, x, dy, words):
    """Forward and backward of a layer with what the words say."""
    rng = np.random.default_rng(2)
    rest = (len(x), *x.shape[2:])
    layer = cybn.BatchNorm(x.shape[1], activation="relu" if "relu" in words else None)
    extras = {}
    if "add" in words:
        extras["residual"] = x + dy
    if "mask" in words:
        extras["mask"] = rng.random(rest) < 0.8
    if "weights" in words:
        extras["sample_weight"] = rng.random(rest, np.float32)

    def run():
        layer(x, **extras)
        layer.backward(dy)

    return run


def torch_step(torch, tensor, statistics, words):
    """The same with PyTorch's separate operators."""
    x, dy, residual = (tensor(seed) for seed in range(3))
    weight, bias, mean, var = statistics
    backward = torch.ops.aten.native_batch_norm_backward

    def run():
        y, save_mean, save_invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
        if "add" in words:
            y.add_(residual)
        y.relu_()
        g = torch.ops.aten.threshold_backward(dy, y, 0)
        backward(g, x, weight, mean, var, save_mean, save_invstd, True, 1e-5, [True] * 3)

    return run


def torch_worker(operation, shape, last, library):
    import torch

    def tensor(seed=0):
        return torch.from_numpy(arrays(shape, last, seed))

    x = tensor()
    weight, bias, mean, var = (torch.full((shape[1],), float(value)) for value in (1, 0, 0, 1))
    if operation.startswith("step"):
        return torch_step(torch, tensor, (weight, bias, mean, var), operation.split())
    if operation == "copy":
        out = torch.empty_like(x)
        return lambda: out.copy_(x)
    if operation == "backward":
        dy = tensor(1)
        _, save_mean, save_invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
        function = torch.ops.aten.native_batch_norm_backward
        return lambda: function(dy, x, weight, mean, var, save_mean, save_invstd, True, 1e-5, [True] * 3)
    return lambda: torch.native_batch_norm(x, weight, bias, mean, var, operation == "training", 0.1, 1e-5)


def onnx_worker(operation, shape, last, library):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    names = ("scale", "B", "mean", "var")
    constants = [
        numpy_helper.from_array(np.full(shape[1], value, np.float32), name)
        for name, value in zip(names, (1, 0, 0, 1), strict=True)
    ]
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *names], ["y"])],
        "batch_norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"x": arrays(shape, False)}
    return lambda: session.run(None, feed)


# "plain" is cybn once more, in a process of its own: what a step costs without extras.
WORKERS = {
    "cybn": numpy_worker,
    "plain": numpy_worker,
    "reference": numpy_worker,
    "torch": torch_worker,
    "onnx": onnx_worker,
}


def work(library):
    """Serve measurements: a JSON request per line in, seconds per call out."""
    previous = function = None
    for line in sys.stdin:
        operation, shape, last = request = json.loads(line)
        if request != previous:
            function = None  # its arrays go before the next come
            function = WORKERS[library](operation, tuple(shape), last, library)
            previous = request
            function()
        times = []
        end = time.perf_counter() + ROUND_SECONDS
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        print(statistics.median(times), flush=True)


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

    def mean(self, values):
        """Geometric, weighted by count."""
        total = sum(result.count for result in self.results)
        return math.exp(sum(r.count * math.log(v) for r, v in zip(self.results, values, strict=True)) / total)

    def summary(self):
        worst = min(self.results, key=lambda result: result.ratio)
        cells = [self.title, f"{self.mean([r.ratio for r in self.results]):.2f}x", f"{worst.ratio:.2f}x"]
        cells.append(str(tuple(worst.shape)))
        if self.results[0].copy is None:
            return [*cells, "", ""]
        arrays = FLOOR_ARRAYS[self.operation]
        speed = self.mean([arrays * 4 * math.prod(r.shape) / r.ours / 1e9 for r in self.results])
        fraction = self.mean([arrays / 2 * r.copy / r.ours for r in self.results])
        return [*cells, f"{speed:.1f}", f"{fraction:.2f}"]


class Result(NamedTuple):
    """Seconds per call; `copy`: of PyTorch's copy_ of the tensor, or None where it was not measured."""

    shape: list
    count: int
    ours: float
    peer: float
    copy: float | None

    @property
    def ratio(self):
        return self.peer / self.ours


def rows():
    resnet = ("resnet50_n32",)
    return [
        Row("training, channels-first, vs PyTorch", "training", "torch", TRAINING),
        Row("training, channels-last, vs PyTorch", "training", "torch", TRAINING, last=True),
        Row("training vs PyTorch's copy_", "training", "torch", resnet, peer_operation="copy"),
        Row("evaluation vs PyTorch", "evaluation", "torch", EVALUATION),
        Row("evaluation, channels-last, vs PyTorch", "evaluation", "torch", EVALUATION, last=True),
        Row("evaluation vs PyTorch's copy_", "evaluation", "torch", resnet, peer_operation="copy"),
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


def cases(row, workloads):
    for network in row.networks:
        for case in workloads[network]:
            if len(case["shape"]) > 2 or not row.last:
                yield case["shape"], case["count"]


def compare(table, workloads, rounds):
    workers = {library: Worker(library) for library in WORKERS}
    total = sum(1 for row in table for _ in cases(row, workloads))
    with tqdm(total=total, unit="shape", ncols=100) as progress:
        for row in table:
            progress.set_description(row.title)
            for shape, count in cases(row, workloads):
                # Beside PyTorch on whole networks, the copy too: it is the limit.
                asked = [("cybn", row.operation), (row.peer, row.peer_operation)]
                if row.peer == "torch" and row.networks != ("latency",):
                    asked.append(("torch", "copy"))
                times = [
                    [workers[library].measure(operation, shape, row.last) for library, operation in asked]
                    for _ in range(rounds)
                ]
                medians = [statistics.median(column) for column in zip(*times, strict=True)]
                row.results.append(Result(shape, count, *medians, *[None] * (3 - len(medians))))
                progress.update()
    for worker in workers.values():
        worker.close()


def machine():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


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
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    table = [row for row in rows() if args.only in row.title]
    compare(table, json.loads(WORKLOADS.read_text()), args.rounds)
    print(f"\n{machine()}; ratios above 1: cybn is faster\n")
    print(f"{'':<42} {'mean':>8} {'worst':>8}  {'worst shape':<20} {'GB/s':>6} {'of copy':>8}")
    for row in table:
        print("{:<42} {:>8} {:>8}  {:<20} {:>6} {:>8}".format(*row.summary()))
        if args.details:
            for r in row.results:
                print(f"    {tuple(r.shape)!s:<22} {1000 * r.ours:9.4f} ms {1000 * r.peer:9.4f} ms {r.ratio:6.2f}x")
    if args.markdown:
        Path(args.markdown).write_text(f"{machine()}\n\n{markdown(table)}\n")


if __name__ == "__main__":
    main()
