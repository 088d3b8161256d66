from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from cybn.reference import Moments

_Array = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_Vector = npt.NDArray[np.float64]

compiler: str

def select_kernels(name: str) -> str: ...
def selected_kernels() -> str: ...
def layer_input(
    x: npt.ArrayLike,
    axis: SupportsIndex,
    num_features: int,
    ranks: tuple[int, ...] | None,
    layer: str,
) -> _Array: ...
def batch_norm(
    x: npt.ArrayLike,
    running_mean: npt.ArrayLike | None,
    running_var: npt.ArrayLike | None,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    training: bool,
    momentum: float,
    eps: float,
    axis: SupportsIndex,
    out: _Array | None,
    num_threads: SupportsIndex | None,
    correction: float,
) -> _Array: ...
def batch_norm_forward(
    x: npt.ArrayLike,
    running_mean: npt.ArrayLike | None,
    running_var: npt.ArrayLike | None,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    training: bool,
    momentum: float,
    eps: float,
    axis: SupportsIndex,
    out: _Array | None,
    num_threads: SupportsIndex | None,
    correction: float,
) -> tuple[_Array, _Vector, _Vector]: ...
def batch_norm_backward(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    save_mean: npt.ArrayLike,
    save_invstd: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    training: bool,
    axis: SupportsIndex,
    out: _Array | None,
    num_threads: SupportsIndex | None,
) -> tuple[_Array, _Array, _Array]: ...
def batch_norm_stats(x: npt.ArrayLike, axis: SupportsIndex, num_threads: SupportsIndex | None) -> Moments: ...
def batch_norm_apply(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    invstd: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    axis: SupportsIndex,
    out: _Array | None,
    num_threads: SupportsIndex | None,
) -> _Array: ...
def batch_norm_backward_reduce(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    axis: SupportsIndex,
    num_threads: SupportsIndex | None,
) -> tuple[_Vector, _Vector]: ...
def batch_norm_backward_apply(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    invstd: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    sum_dy: npt.ArrayLike,
    sum_dy_xmu: npt.ArrayLike,
    count: float,
    axis: SupportsIndex,
    out: _Array | None,
    num_threads: SupportsIndex | None,
) -> _Array: ...
