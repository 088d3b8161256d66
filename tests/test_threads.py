"""How many threads."""

import os
import shutil
import timeit
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import python, raises

import cybn

# -------------------------------------------------------------------------------------------------------- set and asked


def test_set_num_threads(process_threads):
    for n in (1, 3, np.int64(2)):
        assert cybn.set_num_threads(n) is None
        assert cybn.get_num_threads() == n
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cybn.get_num_threads).result() == 2


def test_set_num_threads_to_none_forgets_what_was_set(process_threads):
    code = "import cybn; cybn.set_num_threads(7); cybn.set_num_threads(None); print(cybn.get_num_threads())"
    assert python(code, CYBN_NUM_THREADS="3") == "3"
    assert python(code, OMP_NUM_THREADS="4") == "4"


def test_one_context_may_serve_several_threads(process_threads):
    cybn.set_num_threads(5)
    context = cybn.num_threads(2)
    with ThreadPoolExecutor(1) as pool:
        with cybn.num_threads(7):
            context.__enter__()
            pool.submit(context.__enter__).result()
            context.__exit__(None, None, None)
            assert cybn.get_num_threads() == 7
            assert pool.submit(cybn.get_num_threads).result() == 2
        pool.submit(context.__exit__, None, None, None).result()
        assert pool.submit(cybn.get_num_threads).result() == 5


def test_a_context_is_left_where_it_was_entered(process_threads):
    context = cybn.num_threads(2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(context.__enter__).result()
        with raises(RuntimeError, "num_threads must be left by the thread that has entered it"):
            context.__exit__(None, None, None)


def test_the_context_is_for_its_block(process_threads):
    cybn.set_num_threads(5)
    with cybn.num_threads(3) as context:
        assert isinstance(context, cybn.num_threads)
        assert cybn.get_num_threads() == 3
        with cybn.num_threads(2):
            assert cybn.get_num_threads() == 2
            # The process's number gives way to the block's.
            cybn.set_num_threads(7)
            assert cybn.get_num_threads() == 2
        assert cybn.get_num_threads() == 3
    assert cybn.get_num_threads() == 7


def test_the_context_may_be_entered_again(process_threads):
    cybn.set_num_threads(5)
    context = cybn.num_threads(3)
    with context, cybn.num_threads(4):
        with context:
            assert cybn.get_num_threads() == 3
        assert cybn.get_num_threads() == 4
    assert cybn.get_num_threads() == 5


def test_the_context_ends_with_an_exception(process_threads):
    cybn.set_num_threads(5)
    with pytest.raises(KeyError), cybn.num_threads(3):
        raise KeyError
    assert cybn.get_num_threads() == 5


def test_the_context_is_of_its_thread(process_threads):
    cybn.set_num_threads(5)
    with cybn.num_threads(3), ThreadPoolExecutor(1) as pool:
        assert pool.submit(cybn.get_num_threads).result() == 5
        assert cybn.get_num_threads() == 3


@pytest.mark.parametrize("function", [cybn.set_num_threads, cybn.num_threads])
@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (0, ValueError, "num_threads must be at least 1, got 0"),
        (-(2**80), ValueError, f"num_threads must be at least 1, got {-(2**80)}"),
        (1.5, TypeError, "num_threads must be an integer, got 1.5"),
        ("4", TypeError, "num_threads must be an integer, got '4'"),
        (True, TypeError, "num_threads must be an integer, got True"),
        (np.True_, TypeError, "num_threads must be an integer, got np.True_"),
    ],
    ids=repr,
)
def test_numbers_that_are_none(function, wrong, kind, message):
    before = cybn.get_num_threads()
    with raises(kind, message):
        function(wrong)
    assert cybn.get_num_threads() == before


def test_a_block_of_no_number_of_threads(process_threads):
    with raises(TypeError, "num_threads must be an integer, got None"):
        cybn.num_threads(None)


@pytest.mark.parametrize("function", [cybn.set_num_threads, cybn.num_threads])
def test_a_number_that_raises(function):
    class Number:
        def __index__(self):
            raise ValueError("no")

    with raises(TypeError, "num_threads must be an integer, got Number (no)"):
        function(Number())


def test_very_many_threads_are_accepted():
    """More than an int holds; small arrays take one thread anyway."""
    x = np.ones((4, 3))
    assert cybn.batch_norm_stats(x, num_threads=2**70).count == 4


# How many threads there really were: those of the process after a call that starts helpers.
COUNT = """
    import os, numpy as np, cybn
    x = np.ones((64, 64, 900), np.float32)
    def started(**options):
        before = len(os.listdir("/proc/self/task"))
        cybn.batch_norm_stats(x, **options)
        return len(os.listdir("/proc/self/task")) - before + 1
"""
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")


@needs_proc
@pytest.mark.parametrize(
    ("call", "team"),
    [
        ("started(num_threads=4)", 4),
        ("started(num_threads=1)", 1),
        ("started()", 2),  # CYBN_NUM_THREADS
        ("(cybn.set_num_threads(3), started())[1]", 3),
        ("(cybn.set_num_threads(3), cybn.num_threads(5).__enter__(), started())[2]", 5),
        ("(cybn.num_threads(5).__enter__(), started(num_threads=4))[1]", 4),
    ],
)
def test_precedence_by_the_team_that_is_started(call, team):
    assert python(f"{COUNT}\n    print({call})", CYBN_NUM_THREADS="2") == str(team)


@needs_proc
def test_small_arrays_start_no_team():
    code = f"{COUNT}\n    x = np.ones((16, 64, 31), np.float32)\n    print(started(num_threads=4))"
    assert python(code) == "1"


@needs_proc
def test_import_starts_no_thread():
    """Nor a call in one thread: a server that loads before it forks must stay as it was."""
    code = f"{COUNT}\n    print(started(num_threads=1), cybn._threads.helpers(), len(os.listdir('/proc/self/task')))"
    assert python(code, OPENBLAS_NUM_THREADS="1") == "1 0 1"


# ---------------------------------------------------------------------------------------------------------- environment


@pytest.mark.openmp
@pytest.mark.parametrize(("text", "threads"), [("3", 3), (" 2 ", 2), ("1", 1), ("007", 7)])
def test_environment(text, threads):
    code = "import cybn; print(cybn.get_num_threads())"
    assert python(code, CYBN_NUM_THREADS=text, OMP_NUM_THREADS="6") == str(threads)


@pytest.mark.openmp
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_environment_variable_is_none(text):
    code = "import cybn; print(cybn.get_num_threads())"
    assert python(code, CYBN_NUM_THREADS=text, OMP_NUM_THREADS="6") == "6"


@pytest.mark.openmp
@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "2,3", "0x2", "²"])
def test_a_wrong_environment_variable_is_warned_of_and_ignored(text):
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import cybn
        (warning,) = caught
        print(warning.category.__name__, warning.message, cybn.get_num_threads(), sep="|")
    """
    want = f"RuntimeWarning|CYBN_NUM_THREADS must be a positive integer, got {text.strip()!r}; ignored|6"
    assert python(code, CYBN_NUM_THREADS=text, OMP_NUM_THREADS="6", PYTHONIOENCODING="utf-8") == want


def test_import_warns_of_nothing_and_prints_nothing():
    assert python("import warnings; warnings.simplefilter('error'); import cybn") == ""


# ----------------------------------------------------------------------------------------- what the process is allowed

THREADS = "import cybn; print(cybn.get_num_threads())"
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
two_processors = pytest.mark.skipif(PROCESSORS < 2, reason="one processor only")


@linux
def test_affinity_by_taskset():
    if shutil.which("taskset") is None:
        pytest.skip("no taskset here")
    assert python(THREADS, wrapper=["taskset", "-c", str(min(os.sched_getaffinity(0)))]) == "1"


@linux
@two_processors
def test_affinity_that_changes_later():
    """As where a server pins its workers."""
    code = """
        import os, cybn
        everywhere = os.sched_getaffinity(0)
        found = [cybn.get_num_threads()]
        for allowed in ({min(everywhere)}, everywhere):
            os.sched_setaffinity(0, allowed)
            found.append(cybn.get_num_threads())
        print(*found)
    """
    assert python(code) == f"{PROCESSORS} 1 {PROCESSORS}"


def with_quota(folder, processors, code):
    """Code for a process that finds itself in a control group with this quota."""
    (folder / "cgroup").write_text("0::/\n")
    (folder / "mountinfo").write_text(f"1 2 0:1 / {folder} rw - cgroup2 cgroup2 rw\n")
    (folder / "cpu.max").write_text(f"{int(processors * 100_000)} 100000\n")
    return f"""
import builtins, os
real = builtins.open
builtins.open = lambda path, *rest, **options: real(
    path.replace("/proc/self", {str(folder)!r}) if path in ("/proc/self/cgroup", "/proc/self/mountinfo") else path,
    *rest, **options)
import cybn
builtins.open = real
{code}
"""


@pytest.mark.parametrize(("processors", "threads"), [(1, 1), (0.5, 1), (1.9, 1), (64, PROCESSORS)])
def test_the_quota_limits(tmp_path, processors, threads):
    code = with_quota(tmp_path, processors, THREADS + "; print(cybn.show_config('dicts')['cpu quota'])")
    assert python(code).split() == [str(threads), str(max(1, int(processors)))]


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("", {"OMP_NUM_THREADS": "3"}),
        ("", {"OMP_NUM_THREADS": "3,2"}),
        ("", {"CYBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "7"}),
        ("cybn.set_num_threads(3)", {"CYBN_NUM_THREADS": "9"}),
        ("cybn.num_threads(3).__enter__()", {"OMP_NUM_THREADS": "7"}),
    ],
)
def test_who_asks_for_more_than_the_quota_gets_it(tmp_path, code, environment):
    code = with_quota(tmp_path, 1, f"{code}\n{THREADS}")
    assert python(code, **environment) == "3"


@pytest.mark.openmp
def test_threadpoolctl_sees_and_limits():
    pytest.importorskip("threadpoolctl")
    code = """
        import cybn, numpy as np
        from threadpoolctl import threadpool_info, threadpool_limits
        found = [any(pool["user_api"] == "openmp" for pool in threadpool_info()), cybn.get_num_threads()]
        x = np.ones((64, 64, 900), np.float32)
        with threadpool_limits(1):
            found.append(cybn.get_num_threads())
            cybn.batch_norm_stats(x)
            found.append(cybn._threads.helpers())
        print(*found, cybn.get_num_threads())
    """
    assert python(code) == f"True {PROCESSORS} 1 0 {PROCESSORS}"


@pytest.mark.openmp
def test_inside_a_parallel_region(openmp_library):
    code = f"""
        import ctypes, cybn
        library = ctypes.CDLL({str(openmp_library)!r})
        found = []
        look = ctypes.CFUNCTYPE(None)(lambda: found.append(cybn.get_num_threads()))
        library.inside(look)
        look()
        print(*found)
    """
    assert python(code, OMP_NUM_THREADS="2") == "1 2"


def test_the_number_is_found_in_under_a_microsecond():
    assert min(timeit.repeat(cybn.get_num_threads, number=1000, repeat=50)) / 1000 < 1e-6
