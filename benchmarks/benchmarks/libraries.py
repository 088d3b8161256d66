"""The libraries beside each other: `prepare` gives a function that does one thing once with one of them.

What a library or an older commit of cybn cannot do raises NotImplementedError, which asv shows as n/a.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORKLOADS = Path(__file__).parents[1] / "workloads.json"
NETWORKS = {
    name: [(tuple(case["shape"]), case["count"]) for case in cases]
    for name, cases in json.loads(WORKLOADS.read_text()).items()
    if name != "comment"
}


def usable_cores():
    """What cybn would use, for its peers too: affinity, and the CPU quota, which they (and older commits) ignore."""
    import cybn

    processors = len(os.sched_getaffinity(0))
    return min(processors, cybn.show_config("dicts").get("cpu quota") or processors)


CORES = usable_cores()
OPERATIONS = ("training", "evaluation", "backward", "step")
# Arrays that must be read or written. (A step with a residual: x, r -> y; then x, dy -> dx, dr, and a bit for each
# element tells what passes.)
FLOOR_ARRAYS = {"training": 2, "evaluation": 2, "backward": 3, "step relu": 5, "step add relu": 7}


@dataclass(frozen=True)
class Task:
    """What to do: `operation` on a shape that is given channels-first, and in which way."""

    operation: str
    shape: tuple
    dtype: str = "float32"
    last: bool = False  # in channels-last memory
    threads: int | None = None  # None: as many as the library takes by itself
    activation: str | None = None
    residual: bool = False
    counted: str | None = None  # by a "mask" or by "weights"

    def __post_init__(self):
        if self.operation != "evaluation" and math.prod(self.shape) == self.shape[1]:
            raise NotImplementedError("one value per channel has no variance")

    def array(self, seed=0):
        shape = (self.shape[0], *self.shape[2:], self.shape[1]) if self.last else self.shape
        values = np.random.default_rng(seed).standard_normal(shape, self.dtype)
        return np.moveaxis(values, -1, 1) if self.last else values

    def vectors(self):
        """weight, bias, running_mean, running_var"""
        return tuple(np.full(self.shape[1], value, self.dtype) for value in (1, 0, 0, 1))

    def counts(self):
        """Mask or weights, as arguments."""
        values = np.random.default_rng(2).random((self.shape[0], *self.shape[2:]), np.float32)
        return {None: {}, "mask": {"mask": values < 0.8}, "weights": {"sample_weight": values}}[self.counted]


def prepare(library, task):
    return LIBRARIES[library](task)


def with_cybn(task):
    """The layer, as it is used; backward alone has no layer."""
    import cybn

    x = task.array()
    extras = {"num_threads": task.threads} if task.threads else {}
    if task.operation == "backward":
        return backward(cybn, task, x, extras)
    try:
        layer = cybn.BatchNorm(task.shape[1], **({"activation": task.activation} if task.activation else {}))
        if (task.residual or task.counted) and not hasattr(layer, "activation"):
            raise TypeError("residual, mask and sample_weight came with activation")
    except TypeError as error:
        raise NotImplementedError("not in this commit") from error
    layer.train(task.operation != "evaluation")
    if task.operation != "step":
        return lambda: layer(x, **extras)
    dy = task.array(1)
    inputs = {**extras, **task.counts()}
    if task.residual:
        inputs["residual"] = task.array(3)

    def step():
        layer(x, **inputs)
        layer.backward(dy, **extras)

    return step


def with_numpy(task):
    """cybn.reference, in functions: it has no layers."""
    from cybn import reference

    if task.threads not in (None, 1):
        raise NotImplementedError("NumPy has one thread")
    x = task.array()
    weight, bias, mean, var = task.vectors()
    if task.operation == "backward":
        return backward(reference, task, x, {})
    if task.operation != "step":
        return lambda: reference.batch_norm_forward(x, mean, var, weight, bias, task.operation == "training")
    dy = task.array(1)
    extras = {"activation": task.activation, **task.counts()} if task.activation or task.counted else {}
    before = {"residual": task.array(3)} if task.residual else {}

    def step():
        y, *saved = reference.batch_norm_forward(x, mean, var, weight, bias, True, **extras, **before)
        # (Not named where it is not needed, for commits that did not know it.)
        after = {"bias": bias} if extras or before else {}
        if before:
            after |= {"output": y, "return_grad_residual": True}
        reference.batch_norm_backward(dy, x, *saved, weight, **extras, **after)

    return step


def backward(module, task, x, extras):
    dy = task.array(1)
    weight, bias, *_ = task.vectors()
    _, mean, invstd = module.batch_norm_forward(x, None, None, weight, bias)
    return lambda: module.batch_norm_backward(dy, x, mean, invstd, weight, **extras)


def with_torch(task):
    """The separate operators, without autograd."""
    try:
        import torch
    except ImportError as error:
        raise NotImplementedError("PyTorch is not installed") from error
    if task.counted:
        raise NotImplementedError("PyTorch has neither masks nor weights")
    torch.set_num_threads(task.threads or CORES)
    aten = torch.ops.aten

    def tensor(seed=0):
        return torch.from_numpy(task.array(seed))

    # (No more than is used: memory is measured, too.)
    x = tensor()
    dy = tensor(1) if task.operation in ("backward", "step") else None
    residual = tensor(3) if task.residual else None
    weight, bias, mean, var = (torch.from_numpy(vector) for vector in task.vectors())

    def forward(training):
        return torch.native_batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5)

    def backward(g, saved):
        return aten.native_batch_norm_backward(g, x, weight, mean, var, *saved, True, 1e-5, [True] * 3)

    def step():
        y, *saved = forward(True)
        g = dy
        if task.residual:
            y.add_(residual)
        if task.activation == "relu":
            g = aten.threshold_backward(dy, y.relu_(), 0)
        elif task.activation:
            g = aten.leaky_relu_backward(dy, torch.nn.functional.leaky_relu_(y), 0.01, True)
        backward(g, saved)

    if task.operation == "step":
        return step
    if task.operation == "backward":
        saved = forward(True)[1:]
        return lambda: backward(dy, saved)
    return lambda: forward(task.operation == "training")


def with_onnxruntime(task):
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise NotImplementedError("ONNX Runtime is not installed") from error
    if task.operation != "evaluation" or task.last or task.dtype != "float32":
        raise NotImplementedError("ONNX Runtime evaluates channels-first float32")
    names = ("scale", "B", "mean", "var")
    constants = [numpy_helper.from_array(vector, name) for name, vector in zip(names, task.vectors(), strict=True)]
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *names], ["y"])],
        "batch_norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, task.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, task.shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads or CORES
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": task.array()}
    return lambda: session.run(None, feed)


LIBRARIES = {"cybn": with_cybn, "numpy": with_numpy, "torch": with_torch, "onnxruntime": with_onnxruntime}
