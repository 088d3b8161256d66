from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_Vector = npt.NDArray[np.float64]

compiler: str

def select_kernels(name: str) -> str: ...
def selected_kernels() -> str: ...
def real_number(value: object, name: str) -> float: ...
def integer(value: object, name: str) -> int: ...
def check_slope(negative_slope: object) -> float: ...
def activation_number(activation: object) -> int: ...
def truth(value: object, name: str) -> bool: ...
def view(value: object, name: str, wanted: str | None = None) -> npt.NDArray[Any]: ...
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
    activation: str | None,
    negative_slope: float,
    residual: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
    sample_weight: npt.ArrayLike | None,
    masked_output: str,
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
    activation: str | None,
    negative_slope: float,
    residual: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
    sample_weight: npt.ArrayLike | None,
    masked_output: str,
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
    bias: npt.ArrayLike | None,
    activation: str | None,
    negative_slope: float,
    output: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
    sample_weight: npt.ArrayLike | None,
    return_grad_residual: bool,
) -> tuple[_Array, ...]: ...
def batch_norm_stats(
    x: npt.ArrayLike,
    axis: SupportsIndex,
    num_threads: SupportsIndex | None,
    mask: npt.ArrayLike | None,
    sample_weight: npt.ArrayLike | None,
) -> tuple[float, _Vector, _Vector]: ...
def batch_norm_apply(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    invstd: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    axis: SupportsIndex,
    out: _Array | None,
    num_threads: SupportsIndex | None,
    activation: str | None,
    negative_slope: float,
    residual: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
    masked_output: str,
) -> _Array: ...
def batch_norm_backward_reduce(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    axis: SupportsIndex,
    num_threads: SupportsIndex | None,
    invstd: npt.ArrayLike | None,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    activation: str | None,
    negative_slope: float,
    output: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
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
    bias: npt.ArrayLike | None,
    activation: str | None,
    negative_slope: float,
    output: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
    sample_weight: npt.ArrayLike | None,
    return_grad_residual: bool,
) -> _Array | tuple[_Array, _Array]: ...
