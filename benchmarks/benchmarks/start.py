"""What it takes until a network can run: import and construction."""

import cybn

from .sampling import Sampled


class Import:
    """Beside NumPy, which cybn imports."""

    params = (["cybn", "numpy"],)
    param_names = ("module",)
    repeat = 5
    rounds = 1
    number = 1
    warmup_time = 0

    def timeraw_import(self, module):
        return f"import {module}"


class Construction(Sampled):
    params = (["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"],)
    param_names = ("layer",)

    def setup(self, layer):
        self.layer = getattr(cybn, layer)

    def time_construct(self, layer):
        self.layer(64)
