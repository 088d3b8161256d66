"""The public surface: its names, its docstrings, and which module knows which."""

import ast
import doctest
import importlib
import inspect
import operator
import re
from pathlib import Path

import numpy as np
import pytest

import cybn

SURFACE = [
    "batch_norm",
    "batch_norm_forward",
    "batch_norm_backward",
    "batch_norm_stats",
    "batch_norm_apply",
    "batch_norm_backward_reduce",
    "batch_norm_backward_apply",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "set_num_threads",
    "get_num_threads",
    "num_threads",
    "empty_cache",
    "show_config",
    "reference",
    "__version__",
]

PUBLIC = {name: getattr(cybn, name) for name in SURFACE if callable(getattr(cybn, name))}
METHODS = {
    f"{owner.__name__}.{name}": method
    for owner in (cybn.BatchNorm, cybn.Moments)
    for name, method in vars(owner).items()
    if not name.startswith("_") and inspect.isfunction(method)
}
NOTHING = {"empty_cache", "set_num_threads", "BatchNorm.load_state_dict"}  # return nothing
IN_ONE_LINE = {
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNorm.train",
    "BatchNorm.eval",
    "BatchNorm.reset_running_stats",
    "BatchNorm.reset_parameters",
}


def sections(documented):
    return re.findall(r"^ *([A-Z][A-Za-z ]+)\n *-{3,}$", inspect.cleandoc(documented.__doc__), re.MULTILINE)


def test_names():
    assert sorted(cybn.__all__) == sorted(SURFACE)
    assert all(hasattr(cybn, name) for name in SURFACE)
    assert {name for name in vars(cybn) if not name.startswith("_")} - set(SURFACE) <= {"functional", "layers"}


@pytest.mark.parametrize("name", PUBLIC | METHODS)
def test_docstrings(name):
    """NumPy's form: a summary that is a sentence or a name, then what goes in and what comes out."""
    documented = (PUBLIC | METHODS)[name]
    summary = inspect.cleandoc(documented.__doc__).split("\n\n")[0]
    assert summary[0].isupper() or summary[0] == "`", summary
    found = sections(documented)
    if parameters(name, documented) and name not in IN_ONE_LINE:
        assert ("Attributes" if name == "Moments" else "Parameters") in found
    if not inspect.isclass(documented) and name not in NOTHING | IN_ONE_LINE:
        assert "Returns" in found


def parameters(name, documented):
    return [p for p in inspect.signature(documented).parameters if p != "self"]


@pytest.mark.parametrize("name", [n for n, d in (PUBLIC | METHODS).items() if "Parameters" in sections(d)])
def test_docstrings_name_their_parameters(name):
    documented = (PUBLIC | METHODS)[name]
    text = inspect.cleandoc(documented.__doc__)
    body = text.split("Parameters\n----------\n")[1].split("\n\n")[0]
    named = {n.strip(" *") for line in body.splitlines() if line[0] != " " for n in line.split(" : ")[0].split(",")}
    assert named == set(parameters(name, documented))


@pytest.mark.parametrize("name", PUBLIC | METHODS)
def test_examples_in_docstrings(name):
    documented = (PUBLIC | METHODS)[name]
    test = doctest.DocTestParser().get_doctest(documented.__doc__, {"np": np, "cybn": cybn}, name, None, None)
    failures, _ = doctest.DocTestRunner(verbose=False).run(test)
    assert failures == 0


def test_there_are_examples():
    assert any(">>>" in documented.__doc__ for documented in PUBLIC.values())


def test_what_is_typed_is_marked():
    assert Path(cybn.__file__).with_name("py.typed").exists()


def stub_of(module):
    """Of each function of a stub, methods with their class: the parameters, as source."""
    tree = ast.parse(Path(cybn.__file__).with_name(f"{module}.pyi").read_text(encoding="utf-8"))
    found = {}
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef):
                for argument in ast.walk(node.args):
                    if isinstance(argument, ast.arg):
                        argument.annotation = None
                found[f"{owner.name}.{node.name}" if owner is not tree else node.name] = ast.unparse(node.args)
    return found


@pytest.mark.parametrize("module", ["functional", "layers", "reference"])
def test_stubs_have_the_signatures_of_what_they_describe(module):
    source = importlib.import_module(f"cybn.{module}")
    for name, written in stub_of(module).items():
        signature = inspect.signature(operator.attrgetter(name)(source))
        plain = [
            p.replace(annotation=p.empty, default=... if p.default is np.float32 else p.default)
            for p in signature.parameters.values()
        ]
        text = str(inspect.Signature(plain)).removeprefix("(").removesuffix(")").replace("Ellipsis", "...")
        assert written.replace(" ", "") == text.replace(" ", ""), name
    described = {
        "functional": set(source.__all__),
        "layers": {f"BatchNorm.{name}" for name in [*vars(cybn.BatchNorm), "__init__"] if is_public(name)},
        "reference": {"Moments.var", "Moments.invstd", "Moments.merge"},
    }
    assert set(stub_of(module)) == described[module]


def is_public(name):
    return name == "__init__" or (name[0] != "_" and inspect.isfunction(getattr(cybn.BatchNorm, name)))


# --------------------------------------------------------------------------------------------------------------- layers

SOURCE = Path(__file__).resolve().parents[1] / "src" / "cybn"
checkout = pytest.mark.skipif(not SOURCE.is_dir(), reason="the sources are not at hand")

# Who may import whom: arrows point down only.
BELOW = {
    "__init__": {"_config", "_memory", "_threads", "_version", "functional", "layers", "reference"},
    "_config": {"_kernels", "_memory", "_ops", "_schedule", "_threads", "_version"},
    "layers": {"_layer", "_ops"},
    "functional": {"_ops", "reference"},
    "reference": set(),
    "_layer": {"_arrays", "_coefficients", "_ops"},
    "_ops": {"_arrays", "_coefficients", "_kernels", "_kernels.kernels", "_schedule", "_threads"},
    "_coefficients": {"_arrays", "_kernels.kernels"},
    "_schedule": {"_caches", "_environment", "_kernels.kernels", "_threads"},
    "_arrays": {"_kernels.kernels", "_memory"},
    "_memory": {"_cgroup", "_environment"},
    "_threads": {"_cgroup", "_environment"},
    "_cgroup": {"_files"},
    "_caches": {"_files"},
    "_files": set(),
    "_version": set(),
    "_environment": set(),
}


def imported(path):
    """Modules of cybn that a source file imports or cimports."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        names = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        known = {f"cybn.{name}" for name in [*BELOW, "_kernels"]}
        return {name.removeprefix("cybn.") for name in names if name in known}
    found = set()
    for module, names in re.findall(r"^from (cybn[\w.]*) c?import \(?([\w, \n]*)", text, re.MULTILINE):
        if module == "cybn":
            found |= {name.strip() for name in names.split("\n")[0].split(",")}
        else:
            found.add(module.removeprefix("cybn."))
    return found


@checkout
@pytest.mark.parametrize("name", BELOW)
def test_imports_point_down(name):
    files = [path for path in (SOURCE / f"{name}{end}" for end in (".py", ".pyx", ".pxd")) if path.exists()]
    assert files
    assert set().union(*map(imported, files)) <= BELOW[name]


@checkout
def test_every_module_has_its_place():
    assert {path.stem for path in SOURCE.glob("*.py*") if path.suffix in (".py", ".pyx")} == set(BELOW)


@checkout
def test_kernels_know_no_other_module():
    for path in (SOURCE / "_kernels").iterdir():
        if path.suffix in (".pyx", ".pxi", ".pxd", ".py"):
            for module in imported(path):
                assert module.startswith("_kernels")


@checkout
def test_openmp_is_named_in_one_file():
    naming = {path.name for path in SOURCE.rglob("*.p*") if path.is_file() and "omp.h" in path.read_text("utf-8")}
    assert naming == {"_threads.pyx"}


@checkout
def test_the_compiler_is_given_nothing_of_the_fast_math_family():
    text = (SOURCE.parents[1] / "setup.py").read_text("utf-8")
    flags = set(re.findall(r'"(-[fmO][^"]*|/[A-Za-z:]+)"', text))
    assert "-ffp-contract=off" in flags
    assert not [f for f in flags if "fast" in f or "unsafe" in f or "associative" in f or "finite" in f]
    assert "-march=native" not in flags
