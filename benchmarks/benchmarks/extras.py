"""Forward and backward of a layer with what comes with a normalization: activation, residual, mask, weights."""

from .layers import SHAPE
from .libraries import LIBRARIES, Task, prepare
from .sampling import Sampled


class Activation(Sampled):
    params = (list(LIBRARIES), ["none", "relu", "leaky_relu"], ["without", "added"])
    param_names = ("library", "activation", "residual")

    def setup(self, library, activation, residual):
        activation = None if activation == "none" else activation
        self.call = prepare(library, Task("step", SHAPE, activation=activation, residual=residual == "added"))

    def time_step(self, library, activation, residual):
        self.call()


class Counted(Sampled):
    params = (list(LIBRARIES), ["mask", "weights"])
    param_names = ("library", "counted")

    def setup(self, library, counted):
        self.call = prepare(library, Task("step", SHAPE, counted=counted))

    def time_step(self, library, counted):
        self.call()
