"""Forward and backward pass against the NumPy reference, on shapes that networks use."""

import numpy as np

import cybn
from cybn import reference

SHAPES = {
    "dense (256, 1024)": (256, 1024),
    "early (8, 64, 56, 56)": (8, 64, 56, 56),
    "late (32, 512, 7, 7)": (32, 512, 7, 7),
}
LIBRARIES = {"cybn": cybn, "reference": reference}


class Passes:
    """One call on float32 arrays, results in memory that exists already."""

    params = (list(SHAPES), ["channels first", "channels last"], list(LIBRARIES))
    param_names = ("shape", "memory", "library")

    def setup(self, shape, memory, library):
        rng = np.random.default_rng(0)
        shape = SHAPES[shape]
        if memory == "channels last":
            if len(shape) == 2:
                raise NotImplementedError("(N, C) has one memory order")
            shape = (shape[0], *shape[2:], shape[1])
        self.library = LIBRARIES[library]
        self.axis = -1 if memory == "channels last" else 1
        channels = shape[self.axis]
        self.x = rng.standard_normal(shape, np.float32)
        self.grad_output = rng.standard_normal(shape, np.float32)
        self.out = np.ones_like(self.x)
        self.weight = np.ones(channels, np.float32)
        self.bias = np.zeros(channels, np.float32)
        self.running = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        _, self.mean, self.invstd = reference.batch_norm_forward(self.x, axis=self.axis)

    def time_training(self, shape, memory, library):
        self.library.batch_norm_forward(
            self.x, *self.running, self.weight, self.bias, True, axis=self.axis, out=self.out
        )

    def time_inference(self, shape, memory, library):
        self.library.batch_norm(self.x, *self.running, self.weight, self.bias, axis=self.axis, out=self.out)

    def time_backward(self, shape, memory, library):
        self.library.batch_norm_backward(
            self.grad_output, self.x, self.mean, self.invstd, self.weight, axis=self.axis, out=self.out
        )


class Steps:
    """Forward and backward of a layer, with what comes with a normalization."""

    extras = ("plain", "relu", "add relu", "mask", "weights")
    params = (list(SHAPES), list(extras), list(LIBRARIES))
    param_names = ("shape", "extras", "library")

    def setup(self, shape, extras, library):
        if not hasattr(cybn.BatchNorm(1), "activation"):
            raise NotImplementedError("this commit has no extras")
        rng = np.random.default_rng(0)
        shape = SHAPES[shape]
        rest = (shape[0], *shape[2:])
        self.library = LIBRARIES[library]
        self.x, self.grad_output, residual = (rng.standard_normal(shape, np.float32) for _ in range(3))
        self.parameters = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
        self.shared = {"activation": "relu" if "relu" in extras else None}
        if extras == "mask":
            self.shared["mask"] = rng.random(rest) < 0.8
        if extras == "weights":
            self.shared["sample_weight"] = rng.random(rest, np.float32)
        self.residual = residual if "add" in extras else None

    def time_step(self, shape, extras, library):
        weight, bias = self.parameters
        y, mean, invstd = self.library.batch_norm_forward(
            self.x, None, None, weight, bias, residual=self.residual, **self.shared
        )
        output = y if self.residual is not None else None
        self.library.batch_norm_backward(
            self.grad_output, self.x, mean, invstd, weight, bias=bias, output=output,
            return_grad_residual=output is not None, **self.shared,
        )  # fmt: skip
