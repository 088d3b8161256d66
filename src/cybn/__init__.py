"""Batch normalization for NumPy on the CPU: at the speed of memory, the same bits on every machine."""

from cybn import reference
from cybn._config import show_config
from cybn._memory import empty_cache
from cybn._threads import get_num_threads, num_threads, set_num_threads
from cybn._version import __version__
from cybn.functional import (
    batch_norm,
    batch_norm_apply,
    batch_norm_backward,
    batch_norm_backward_apply,
    batch_norm_backward_reduce,
    batch_norm_forward,
    batch_norm_stats,
)
from cybn.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from cybn.reference import Moments

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "__version__",
    "batch_norm",
    "batch_norm_apply",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_forward",
    "batch_norm_stats",
    "empty_cache",
    "get_num_threads",
    "num_threads",
    "reference",
    "set_num_threads",
    "show_config",
]
