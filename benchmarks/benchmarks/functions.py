"""Every public function once, on a small array: what a call costs beyond its bytes."""

import numpy as np

import cybn

from .sampling import Sampled

SHAPE = (32, 64)

rng = np.random.default_rng(0)
x, dy = rng.standard_normal((2, *SHAPE), np.float32)
weight, bias, running_mean, running_var = (np.full(SHAPE[1], value, np.float32) for value in (1, 0, 0, 1))
mean, invstd = np.zeros(SHAPE[1]), np.ones(SHAPE[1])
sums = np.zeros(SHAPE[1])
parts = [(32, mean, invstd)] * 2


def within_one_thread():
    with cybn.num_threads(1):
        pass


# A test holds these against what cybn exports. Older commits lack some: looked up when called.
CALLS = {
    "batch_norm": lambda: cybn.batch_norm(x, running_mean, running_var, weight, bias),
    "batch_norm_apply": lambda: cybn.batch_norm_apply(x, mean, invstd, weight, bias),
    "batch_norm_backward": lambda: cybn.batch_norm_backward(dy, x, mean, invstd, weight),
    "batch_norm_backward_apply": lambda: cybn.batch_norm_backward_apply(
        dy, x, mean, invstd, weight, sums, sums, SHAPE[0]
    ),
    "batch_norm_backward_reduce": lambda: cybn.batch_norm_backward_reduce(dy, x, mean),
    "batch_norm_forward": lambda: cybn.batch_norm_forward(x, running_mean, running_var, weight, bias),
    "batch_norm_stats": lambda: cybn.batch_norm_stats(x),
    "Moments": lambda: cybn.Moments(*parts[0]).merge(cybn.Moments(*parts[1])),
    "empty_cache": lambda: cybn.empty_cache(),
    "get_num_threads": lambda: cybn.get_num_threads(),
    "num_threads": within_one_thread,
    "set_num_threads": lambda: cybn.set_num_threads(cybn.get_num_threads()),
    "show_config": lambda: cybn.show_config(mode="dicts"),
}


class Functions(Sampled):
    params = (list(CALLS),)
    param_names = ("function",)

    def setup(self, function):
        if not hasattr(cybn, function):
            raise NotImplementedError("not in this commit")
        self.call = CALLS[function]

    def time_call(self, function):
        self.call()
