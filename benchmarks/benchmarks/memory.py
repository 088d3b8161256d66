"""The most memory that a process takes, with the arrays of one large layer in it."""

from .libraries import LIBRARIES, OPERATIONS, Task, prepare

SHAPE = (32, 64, 56, 56)


class Peak:
    params = (list(LIBRARIES), list(OPERATIONS))
    param_names = ("library", "operation")

    def setup(self, library, operation):
        self.call = prepare(library, Task(operation, SHAPE))

    def peakmem_layer(self, library, operation):
        self.call()
