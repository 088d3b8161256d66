from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from cybn import _layer
from cybn.functional import _Activation, _Array

IN_PLACE_LEAST_WEIGHT: float
IN_PLACE_SLOPES: tuple[float, float]

class BatchNorm(_layer.Layer):
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    axis: int
    dtype: np.dtype[Any]
    activation: _Activation
    negative_slope: float
    in_place: bool
    training: bool
    weight: Any  # an array of shape (C,), or None
    bias: Any  # an array of shape (C,), or None
    grad_weight: Any  # an array of shape (C,), or None
    grad_bias: Any  # an array of shape (C,), or None
    running_mean: Any  # an array of shape (C,), or None
    running_var: Any  # an array of shape (C,), or None
    num_batches_tracked: Any  # an int, or None
    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-05,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: SupportsIndex = 1,
        dtype: npt.DTypeLike = ...,
        bias: bool = True,
        activation: _Activation = None,
        negative_slope: float = 0.01,
        in_place: bool = False,
    ) -> None: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def reset_running_stats(self) -> None: ...
    def reset_parameters(self) -> None: ...
    def state_dict(self) -> dict[str, _Array]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

class BatchNorm1d(BatchNorm): ...
class BatchNorm2d(BatchNorm): ...
class BatchNorm3d(BatchNorm): ...
