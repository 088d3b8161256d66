"""How many threads, and what must survive them: forks, pools, the floating-point mode."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import python, raises

import cybn

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


# -------------------------------------------------------------------------------------------------------- set and asked


@pytest.mark.openmp
def test_set_num_threads(process_threads):
    for n in (1, 3, np.int64(2)):
        assert cybn.set_num_threads(n) is None
        assert cybn.get_num_threads() == n
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cybn.get_num_threads).result() == 2


@pytest.mark.openmp
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


@pytest.mark.openmp
def test_the_context_may_be_entered_again(process_threads):
    cybn.set_num_threads(5)
    context = cybn.num_threads(3)
    with context, cybn.num_threads(4):
        with context:
            assert cybn.get_num_threads() == 3
        assert cybn.get_num_threads() == 4
    assert cybn.get_num_threads() == 5


@pytest.mark.openmp
def test_the_context_ends_with_an_exception(process_threads):
    cybn.set_num_threads(5)
    with pytest.raises(KeyError), cybn.num_threads(3):
        raise KeyError
    assert cybn.get_num_threads() == 5


@pytest.mark.openmp
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
        (None, TypeError, "num_threads must be an integer, got None"),
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


def test_very_many_threads_are_accepted():
    """More than an int holds; small arrays take one thread anyway."""
    x = np.ones((4, 3))
    assert cybn.batch_norm_stats(x, num_threads=2**70).count == 4


# How many threads there really were: those of the process after a call that starts a team.
COUNT = """
    import os, numpy as np, cybn
    x = np.ones((64, 64, 900), np.float32)
    def started(**options):
        before = len(os.listdir("/proc/self/task"))
        cybn.batch_norm_stats(x, **options)
        return len(os.listdir("/proc/self/task")) - before + 1
"""
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")


@pytest.mark.openmp
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
    assert python(f"{COUNT}\n    print({call})", CYBN_NUM_THREADS="2", OMP_DYNAMIC="false") == str(team)


@pytest.mark.openmp
@needs_proc
def test_small_arrays_start_no_team():
    code = f"{COUNT}\n    x = np.ones((16, 64, 31), np.float32)\n    print(started(num_threads=4))"
    assert python(code, OMP_DYNAMIC="false") == "1"


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


# -------------------------------------------------------------------------------------------------------- a team's life

WORK = """
    import os, sys, warnings
    import numpy as np, cybn
    # Since Python 3.12 fork warns of other threads, which is what this is about.
    warnings.simplefilter("ignore", DeprecationWarning)
    x = np.random.default_rng(0).normal(size=(64, 32, 30, 30)).astype(np.float32)
    def work(threads=2):
        y, mean, invstd = cybn.batch_norm_forward(x, num_threads=threads)
        dx, dw, db = cybn.batch_norm_backward(y, x, mean, invstd, num_threads=threads)
        return b"".join(a.tobytes() for a in (y, mean, invstd, dx, dw, db))
"""


@posix
def test_a_forked_child_computes_the_same():
    """libgomp hangs if a child whose parent had a team starts one: it must not be asked to."""
    code = f"""{WORK}
    want = work()
    assert work(1) == want
    child = os.fork()
    if child == 0:
        code = 1
        try:
            alone = cybn.get_num_threads() == 1
            code = 0 if alone and work() == want and work(7) == want else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), work() == want, cybn.get_num_threads() > 1)
    """
    result = python(code, CYBN_NUM_THREADS="2").split()
    assert result[:2] == ["0", "True"]
    if cybn._threads.openmp_version:
        assert result[2] == "True"


@posix
@pytest.mark.openmp
def test_threads_made_in_a_forked_child_have_teams():
    code = f"""{WORK}
    import threading
    want = work()
    child = os.fork()
    if child == 0:
        results = []
        thread = threading.Thread(target=lambda: results.append((cybn.get_num_threads(), work() == want)))
        thread.start()
        thread.join()
        os._exit(0 if results == [(2, True)] else 2)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
    """
    assert python(code, CYBN_NUM_THREADS="2") == "0"


@posix
def test_forks_of_forks_and_pools_of_processes():
    code = f"""{WORK}
    import multiprocessing, hashlib
    def digest(_):
        return hashlib.sha256(work()).hexdigest()
    if __name__ == "__main__":
        want = digest(0)
        with multiprocessing.get_context("fork").Pool(3) as pool:
            print(set(pool.map(digest, range(6))) == {{want}}, digest(0) == want)
    """
    assert python(code) == "True True"


def test_many_python_threads_with_a_team_each():
    code = f"""{WORK}
    from concurrent.futures import ThreadPoolExecutor
    want = work(1)
    with ThreadPoolExecutor(6) as pool:
        print(set(pool.map(work, [1, 2, 3, 4, 2, 3] * 3)) == {{want}})
    """
    assert python(code) == "True"


# -------------------------------------------------------------------------------------------------- floating-point mode


def test_subnormal_arithmetic_is_left_alone():
    """Fast-math libraries flush subnormals to zero, for the whole process, when they are loaded."""
    code = """
        import numpy as np, threading
        def plain():
            for dtype in (np.float32, np.float64):
                tiny = np.finfo(dtype).smallest_subnormal
                if not (np.full(99, 2 * tiny) * dtype(0.5) == np.full(99, tiny)).all() or tiny == 0:
                    return False
            return True
        def everywhere():
            found = [plain()]
            for _ in range(2):
                thread = threading.Thread(target=lambda: found.append(plain()))
                thread.start()
                thread.join()
            return all(found)
        before = everywhere()
        import cybn
        imported = everywhere()
        x = np.random.default_rng(0).normal(size=(64, 32, 30, 30))
        for dtype in (np.float32, np.float64):
            y, mean, invstd = cybn.batch_norm_forward(x.astype(dtype), num_threads=3)
            cybn.batch_norm_backward(y, x.astype(dtype), mean, invstd, num_threads=3)
        # The team of this thread and others' are still there.
        print(before, imported, everywhere())
    """
    assert python(code) == "True True True"
