"""The benchmarks run and cover what cybn exports. (What asv makes of them: `make bench`, test_dashboard.py.)"""

import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

import cybn

ROOT = Path(__file__).parents[1]

MODULES = [path.stem for path in sorted((ROOT / "benchmarks" / "benchmarks").glob("[!_]*.py"))]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_every_public_function_has_a_benchmark(load):
    functions = {name for name in cybn.__all__ if callable(getattr(cybn, name))}
    layers = {name for name in functions if name.startswith("BatchNorm")}
    assert set(*load("start").Construction.params) == layers
    assert set(load("functions").CALLS) == functions - layers


def test_functions_run(load):
    for call in load("functions").CALLS.values():
        call()


@pytest.mark.parametrize("module", MODULES)
def test_parameters_are_named(load, module):
    classes = [c for _, c in inspect.getmembers(load(module), inspect.isclass) if c.__module__.endswith(module)]
    for benchmark in classes:
        if hasattr(benchmark, "params"):
            assert len(benchmark.param_names) == len(benchmark.params), benchmark


@pytest.mark.parametrize("library", ["cybn", "numpy"])
@pytest.mark.parametrize("operation", ["training", "evaluation", "backward", "step"])
@pytest.mark.parametrize("last", [False, True])
def test_tasks_run(load, library, operation, last):
    libraries = load("libraries")
    assert operation in libraries.OPERATIONS
    libraries.prepare(library, libraries.Task(operation, (3, 4, 5, 6), last=last))()


@pytest.mark.parametrize("library", ["cybn", "numpy"])
@pytest.mark.parametrize(
    "extras",
    [
        {"activation": "relu"},
        {"activation": "leaky_relu", "residual": True},
        {"counted": "mask"},
        {"counted": "weights"},
    ],
    ids=repr,
)
def test_extras_run(load, library, extras):
    libraries = load("libraries")
    libraries.prepare(library, libraries.Task("step", (3, 4, 5, 6), **extras))()


def test_what_an_older_commit_lacks_is_skipped(load, monkeypatch):
    class OldLayer:
        def __init__(self, num_features):
            pass

        def train(self, mode=True):
            pass

    monkeypatch.setattr(cybn, "BatchNorm", OldLayer)
    libraries = load("libraries")
    for extras in ({"activation": "relu"}, {"residual": True}, {"counted": "mask"}):
        with pytest.raises(NotImplementedError, match=r"^not in this commit$"):
            libraries.prepare("cybn", libraries.Task("step", (3, 4), **extras))


def test_limits_are_ratios(load, monkeypatch):
    limits = load("limits")
    monkeypatch.setattr(limits, "SECONDS", 0)
    monkeypatch.setattr(limits, "NETWORKS", {"small": [((4, 8), 1), ((2, 3, 4, 4), 2)]})
    benchmark = limits.Limits()
    benchmark.setup("training", "small")
    assert 0 < benchmark.track_time_of_a_copy("training", "small") < np.inf
    assert 0 < benchmark.track_time_of_the_reference("training", "small") < np.inf


def test_the_two_configurations_measure_the_same():
    history, here = (
        json.loads((ROOT / "benchmarks" / name).read_text()) for name in ("asv.conf.json", "asv.here.json")
    )
    differ = {key for key in history.keys() | here.keys() if history.get(key) != here.get(key)}
    assert differ == {
        "environment_type", "matrix", "build_command", "install_command", "build_cache_size", "results_dir",
    }  # fmt: skip
