import importlib.metadata

import pytest
from support import python, raises

import cybn
from cybn import _caches, _kernels, _memory, _ops, _threads


def test_dicts():
    config = cybn.show_config("dicts")
    assert config == {
        "version": cybn.__version__,
        "compiler": _ops.compiler,
        "kernels": _ops.selected_kernels(),
        "kernels available": ", ".join(_kernels.builds),
        "openmp": _threads.openmp_version or None,
        "threads": cybn.get_num_threads(),
        "processors": _threads.processors(),
        "cpu quota": _threads.cpu_quota,
        "second cache bytes": _caches.read().l2,
        "last cache bytes": _caches.read().l3,
        "last caches": _caches.read().count,
        "helpers": _threads.helpers(),
        "cached bytes": _memory.cached_bytes(),
        "cache max bytes": _memory.cache_max_bytes(),
    }
    assert config["kernels"] in _kernels.builds
    assert config["compiler"].strip()
    with cybn.num_threads(3):
        assert cybn.show_config("dicts")["threads"] == 3


def test_stdout_shows_the_same(capsys):
    assert cybn.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    config = cybn.show_config("dicts")
    assert len(lines) == len(config)
    for line, (name, value) in zip(lines, config.items(), strict=True):
        shown = "none" if value is None else str(value)
        assert line.startswith(f"{name}  ")
        assert line.removeprefix(name).strip() == shown
    # One column of names, one of values.
    assert len({line.index(str(value)) for line, value in zip(lines, config.values(), strict=True) if value}) == 1


def test_a_build_without_openmp_says_so(capsys, monkeypatch):
    monkeypatch.setattr(_threads, "openmp_version", 0)
    assert cybn.show_config("dicts")["openmp"] is None
    cybn.show_config()
    assert "openmp              none" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["json", "", None, "STDOUT"])
def test_other_modes(mode):
    with raises(ValueError, f"mode must be 'stdout' or 'dicts', got {mode!r}"):
        cybn.show_config(mode)


def test_version():
    assert cybn.__version__ == importlib.metadata.version("cybn")


def test_the_preferred_build_is_used():
    code = "import cybn; print(cybn.show_config('dicts')['kernels'])"
    assert python(code) == python(code, CYBN_ISA="auto") == python(code, CYBN_ISA=" ") == next(iter(_kernels.builds))


@pytest.mark.parametrize("name", _kernels.builds)
def test_a_build_is_chosen_by_the_environment(name):
    assert python("import cybn; print(cybn.show_config('dicts')['kernels'])", CYBN_ISA=name) == name


@pytest.mark.parametrize("name", ["avx9", "X86_V3", "baseline,auto"])
def test_an_unknown_build_is_an_import_error(name):
    code = """
        try:
            import cybn
        except ImportError as error:
            print(error)
    """
    builds = ", ".join(_kernels.builds)
    assert python(code, CYBN_ISA=name) == f"CYBN_ISA must be auto or one of {builds} on this machine, got {name!r}"
