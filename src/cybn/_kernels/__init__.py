"""The kernels: the arithmetic, compiled once per instruction set, and the choice among the builds.

Every build gives the same bits, so the choice is of speed alone.
"""

from cybn._kernels import baseline

builds = {"baseline": baseline.kernels}
"""Name -> kernel table (a capsule) of the builds this processor can run, the preferred one first."""
