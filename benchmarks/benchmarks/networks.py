"""All normalizations of a network, one after the other, as often as they occur in it: float32, channels-first."""

from .libraries import LIBRARIES, NETWORKS, Task, prepare
from .sampling import Sampled


class _Network(Sampled):
    params = (list(LIBRARIES), list(NETWORKS))
    param_names = ("library", "network")
    timeout = 300

    def setup(self, library, network):
        self.calls = [(prepare(library, Task(self.operation, shape)), count) for shape, count in NETWORKS[network]]

    def time_network(self, library, network):
        for call, count in self.calls:
            for _ in range(count):
                call()


class Training(_Network):
    operation = "training"


class Evaluation(_Network):
    operation = "evaluation"


class Inference(Evaluation):
    """The same for one image, each result alive until the last layer is through: what memory costs."""

    params = (list(LIBRARIES), ["resnet50_n1"])

    def time_network(self, library, network):
        results = []
        for call, count in self.calls:
            results += [call() for _ in range(count)]


class Backward(_Network):
    operation = "backward"


class Step(_Network):
    """Forward and backward."""

    operation = "step"
