from typing import Any, SupportsIndex

import numpy.typing as npt

from cybn.functional import _Array, _MaskedOutput

class Layer:
    def forward(
        self,
        x: npt.ArrayLike,
        *,
        residual: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        sample_weight: npt.ArrayLike | None = None,
        masked_output: _MaskedOutput = "normalize",
        out: npt.ArrayLike | None = None,
        num_threads: SupportsIndex | None = None,
        save_for_backward: bool | None = None,
    ) -> _Array: ...
    __call__ = forward
    def backward(
        self,
        grad_output: npt.ArrayLike,
        *,
        out: npt.ArrayLike | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> Any: ...  # grad_input; with grad_residual, if a residual went in
