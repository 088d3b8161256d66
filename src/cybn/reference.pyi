from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from cybn.functional import batch_norm as batch_norm
from cybn.functional import batch_norm_apply as batch_norm_apply
from cybn.functional import batch_norm_backward as batch_norm_backward
from cybn.functional import batch_norm_backward_apply as batch_norm_backward_apply
from cybn.functional import batch_norm_backward_reduce as batch_norm_backward_reduce
from cybn.functional import batch_norm_forward as batch_norm_forward
from cybn.functional import batch_norm_stats as batch_norm_stats

class Moments(NamedTuple):
    count: float
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]
    def var(self, correction: int = 0) -> npt.NDArray[np.float64]: ...
    def invstd(self, eps: float = 1e-05) -> npt.NDArray[np.float64]: ...
    def merge(self, *others: Self) -> Self: ...
