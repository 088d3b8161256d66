"""One layer in the middle of ResNet-50: what dtype, memory layout and threads change."""

from .libraries import LIBRARIES, Task, prepare
from .sampling import Sampled

SHAPE = (32, 256, 14, 14)


class _Layer(Sampled):
    params = (list(LIBRARIES), ["float32", "float64"], ["channels-first", "channels-last"], ["all", "1"])
    param_names = ("library", "dtype", "layout", "threads")

    def setup(self, library, dtype, layout, threads):
        task = Task(self.operation, SHAPE, dtype, layout == "channels-last", None if threads == "all" else 1)
        self.call = prepare(library, task)

    def time_layer(self, library, dtype, layout, threads):
        self.call()


class Training(_Layer):
    operation = "training"


class Evaluation(_Layer):
    operation = "evaluation"


class Backward(_Layer):
    operation = "backward"


class Step(_Layer):
    """Forward and backward."""

    operation = "step"
