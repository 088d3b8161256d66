"""What this cybn is: version, compiler, kernels, threads."""

from typing import Any, Literal, overload

from cybn import _kernels, _memory, _ops, _schedule, _threads
from cybn._version import __version__


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Print, or return, how this cybn was built and how it will run.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        Print, or return a dictionary (as `numpy.show_config`).

    Returns
    -------
    dict or None
        With "dicts": ``version``, ``compiler``, ``kernels`` (the build in use), ``kernels available``, ``openmp`` (the
        specification's date; None: built without), ``threads`` (what a call in this thread may use), ``processors``
        (that this thread may run on), ``cpu quota`` (processors that the control groups pay for, read when cybn was
        imported; None: no quota), ``second cache bytes`` (of a processor), ``last cache bytes`` and ``last caches``
        (the size of one, and how many these processors have: what calls are planned for), ``helpers`` (threads that
        cybn has started), ``cached bytes`` and ``cache max bytes`` (memory of dead results that is kept for new ones,
        and how much may be, see `cybn.empty_cache`).

    Raises
    ------
    ValueError
        For any other mode.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    config = {
        "version": __version__,
        "compiler": _ops.compiler,
        "kernels": _ops.selected_kernels(),
        "kernels available": ", ".join(_kernels.builds),
        "openmp": _threads.openmp_version or None,
        "threads": _threads.get_num_threads(),
        "processors": _threads.processors(),
        "cpu quota": _threads.cpu_quota,
        "second cache bytes": _schedule.caches.l2,
        "last cache bytes": _schedule.caches.l3,
        "last caches": _schedule.caches.count,
        "helpers": _threads.helpers(),
        "cached bytes": _memory.cached_bytes(),
        "cache max bytes": _memory.cache_max_bytes(),
    }
    if mode == "dicts":
        return config
    width = max(map(len, config))
    for name, value in config.items():
        print(f"{name:<{width}}  {'none' if value is None else value}")
    return None
