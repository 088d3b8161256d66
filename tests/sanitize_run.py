"""All verbs in one thread, in teams and in many Python threads at once, for tools that look for errors.

`make tsan` runs the shapes of every schedule; `make valgrind`, which is fifty times slower, small ones: `--small`.
"""

import functools
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from support import GEOMETRIES, VARIANTS, bits, outcome, problem

import cybn
from cybn import _kernels, _ops

small = "--small" in sys.argv
geometries = [((9, 5, 7), 1, None), ((40, 3), 1, None), ((6, 4, 70), 1, (0, 2, 1)), ((0, 3), 1, None)]
geometries.append(((40, 50, 70), 1, None))  # large enough for a team
if not small:
    geometries = list(GEOMETRIES.values())
callers = 1 if small else 4


def run(shape, axis, order, dtype, build):
    p = problem(shape, axis, dtype, order)
    rest = np.delete(shape, axis)
    extras = [{}, {"activation": "relu", "mask": np.arange(np.prod(rest)).reshape(rest) % 5 > 0}]

    def once(name, training, changes, threads):
        changes = {} if name == "batch_norm_stats" else changes
        return bits(outcome(name, p, training, num_threads=threads, **changes))

    def layer(activation, threads):
        """A training step behind a residual: threads write bits into the same bytes."""
        bn = cybn.BatchNorm(p["x"].shape[axis], axis=axis, activation=activation)
        y = bn(p["x"], residual=p["grad_output"], num_threads=threads)
        return bits([y, *bn.backward(p["grad_output"], num_threads=threads)])

    calls = [functools.partial(once, *variant, changes) for variant in VARIANTS for changes in extras]
    calls += [functools.partial(layer, activation) for activation in (None, "relu", "leaky_relu")]
    with ThreadPoolExecutor(callers) as pool:
        for call in calls:
            jobs = [pool.submit(call, n) for n in ((1, 2) if small else (1, 2, 3, 4))]
            first, *others = (job.result() for job in jobs)
            assert all(other == first for other in others), (call, shape)
    print(f"{build}: {np.dtype(dtype).name} {shape}", flush=True)


warnings.simplefilter("error")
for build in _kernels.builds:
    _ops.select_kernels(build)
    for geometry in geometries:
        for dtype in (np.float32, np.float64) if small else (np.float32,):
            run(*geometry, dtype, build)
cybn.empty_cache()
