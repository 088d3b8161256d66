"""The kernels: the arithmetic, compiled once per instruction set, and the choice among the builds.

Every build gives the same bits, so the choice is of speed alone.
"""

import contextlib
import importlib
import os

from cybn._kernels import baseline, processor


def _find_builds():
    builds = {}
    if processor.has_x86_v3():
        # (Where `setup.py` knows no flags for it there is none.)
        with contextlib.suppress(ModuleNotFoundError):
            builds["x86_v3"] = importlib.import_module("cybn._kernels.x86_v3").kernels
    builds["baseline"] = baseline.kernels
    return builds


def _choose(builds):
    wish = os.environ.get("CYBN_ISA", "").strip() or "auto"
    if wish == "auto":
        return next(iter(builds))
    if wish not in builds:
        raise ImportError(f"CYBN_ISA must be auto or one of {', '.join(builds)} on this machine, got {wish!r}")
    return wish


builds = _find_builds()
"""Name -> kernel table (a capsule) of the builds this processor can run, the preferred one first."""

default = _choose(builds)
"""Name of the build to use: CYBN_ISA=auto (the preferred one), baseline or x86_v3."""
