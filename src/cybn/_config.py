"""What this cybn is: version, compiler, kernels, threads."""

from importlib.metadata import version

from cybn import _kernels, _memory, _ops, _threads

__version__ = version("cybn")


def show_config(mode="stdout"):
    """Print, or return, how this cybn was built and how it will run.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        Print, or return a dictionary (as `numpy.show_config`).

    Returns
    -------
    dict or None
        With "dicts": ``version``, ``compiler``, ``kernels`` (the build in use), ``kernels available``, ``openmp`` (the
        specification's date, or None), ``threads`` (what a call in this thread may use) and ``cached bytes`` (memory
        of dead results that is kept for new ones, see `cybn.empty_cache`).

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
        "cached bytes": _memory.cached_bytes(),
    }
    if mode == "dicts":
        return config
    width = max(map(len, config))
    for name, value in config.items():
        print(f"{name:<{width}}  {value if value is not None else 'no (built without)'}")
    return None
