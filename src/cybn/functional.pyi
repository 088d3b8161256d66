from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from cybn.reference import Moments

_Array = npt.NDArray[Any]  # of x's dtype
_Vector = npt.NDArray[np.float64]
_Activation = Literal["relu", "leaky_relu"] | None
_MaskedOutput = Literal["normalize", "zero"]

def batch_norm(
    x: npt.ArrayLike,
    running_mean: npt.ArrayLike | None,
    running_var: npt.ArrayLike | None,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-05,
    *,
    axis: SupportsIndex = 1,
    out: npt.ArrayLike | None = None,
    num_threads: SupportsIndex | None = None,
    correction: int = 1,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    masked_output: _MaskedOutput = "normalize",
) -> _Array: ...
def batch_norm_forward(
    x: npt.ArrayLike,
    running_mean: npt.ArrayLike | None = None,
    running_var: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-05,
    *,
    axis: SupportsIndex = 1,
    out: npt.ArrayLike | None = None,
    num_threads: SupportsIndex | None = None,
    correction: int = 1,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    masked_output: _MaskedOutput = "normalize",
) -> tuple[_Array, _Vector, _Vector]: ...
def batch_norm_backward(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    save_mean: npt.ArrayLike,
    save_invstd: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    training: bool = True,
    *,
    axis: SupportsIndex = 1,
    out: npt.ArrayLike | None = None,
    num_threads: SupportsIndex | None = None,
    bias: npt.ArrayLike | None = None,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    output: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    return_grad_residual: bool = False,
) -> tuple[_Array, ...]: ...
def batch_norm_stats(
    x: npt.ArrayLike,
    *,
    axis: SupportsIndex = 1,
    num_threads: SupportsIndex | None = None,
    mask: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
) -> Moments: ...
def batch_norm_apply(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    invstd: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    axis: SupportsIndex = 1,
    out: npt.ArrayLike | None = None,
    num_threads: SupportsIndex | None = None,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    masked_output: _MaskedOutput = "normalize",
) -> _Array: ...
def batch_norm_backward_reduce(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    *,
    axis: SupportsIndex = 1,
    num_threads: SupportsIndex | None = None,
    invstd: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    output: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
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
    *,
    axis: SupportsIndex = 1,
    out: npt.ArrayLike | None = None,
    num_threads: SupportsIndex | None = None,
    bias: npt.ArrayLike | None = None,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    output: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    return_grad_residual: bool = False,
) -> _Array | tuple[_Array, _Array]: ...
