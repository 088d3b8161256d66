"""The team: what it must survive (forks, pools, threads of the caller's), and that nothing of it shows in the bits."""

import os
import platform
import sys

import pytest
from support import python

from cybn import _threads

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# Two threads are forced: one would pass everything here. The time limits are hard: a hang is what this is about.
WORK = """
    import faulthandler, os, signal, sys, threading, time, warnings
    import numpy as np, cybn
    faulthandler.dump_traceback_later(50, exit=True)
    # Since Python 3.12 fork warns of other threads, which is what this is about.
    warnings.simplefilter("ignore", DeprecationWarning)
    x = np.random.default_rng(0).normal(size=(64, 32, 30, 30)).astype(np.float32)

    def work(threads=2):
        y, mean, invstd = cybn.batch_norm_forward(x, num_threads=threads)
        dx, dw, db = cybn.batch_norm_backward(y, x, mean, invstd, num_threads=threads)
        return b"".join(a.tobytes() for a in (y, mean, invstd, dx, dw, db))

    # So large that helpers come even if every processor is busy.
    large = np.zeros((16, 32, 128, 130), np.float32)

    def is_helped(seconds=20):
        "Whether a helper takes part: the first ones may come too late."
        before, end = cybn._threads.helped(), time.monotonic() + seconds
        while cybn._threads.helped() == before:
            if time.monotonic() > end:
                return False
            cybn.batch_norm_stats(large, num_threads=2)
        return True

    def in_child(check, fork=os.fork, seconds=40):
        "The exit code of a child that calls check: 0 where it is true, -14 where it takes longer than that."
        child = fork()
        if child == 0:
            code = 99
            try:
                signal.alarm(seconds)
                code = 0 if check() else 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    want = work(1)
    assert want == work() and is_helped()
"""


# ---------------------------------------------------------------------------------------------------------------- forks


@posix
def test_a_forked_child_computes_the_same_in_parallel():
    code = f"""{WORK}
    def check():
        return cybn._threads.helpers() == 0 and work() == want == work(7) and is_helped() and work() == want
    print(in_child(check), work() == want, is_helped())
    """
    assert python(code) == "0 True True"


@posix
def test_threads_made_in_a_forked_child_work_in_parallel():
    code = f"""{WORK}
    def check():
        results = []
        thread = threading.Thread(target=lambda: results.append((cybn.get_num_threads(), work() == want, is_helped())))
        thread.start()
        thread.join()
        return results == [(2, True, True)]
    print(in_child(check))
    """
    assert python(code, CYBN_NUM_THREADS="2") == "0"


@posix
def test_grandchildren():
    code = f"""{WORK}
    def check():
        return work() == want and is_helped()
    print(in_child(lambda: check() and in_child(lambda: check() and in_child(check) == 0) == 0))
    """
    assert python(code) == "0"


@posix
def test_a_fork_from_a_worker_thread():
    code = f"""{WORK}
    results = []
    def fork():
        results.append((work() == want, in_child(lambda: work() == want and is_helped())))
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    print(results)
    """
    assert python(code) == "[(True, 0)]"


@posix
def test_forks_while_other_threads_are_at_work():
    """The child gets the team's lock in whatever state another thread had it, and that thread is not there."""
    code = f"""{WORK}
    ended = threading.Event()
    small = x[:4]
    def hammer():
        while not ended.is_set():
            cybn.batch_norm_stats(small, num_threads=2)
    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    codes = {{in_child(lambda: work() == want) for _ in range(25)}}
    ended.set()
    for thread in threads:
        thread.join()
    print(codes, work() == want)
    """
    assert python(code) == "{0} True"


@posix
def test_pools_of_forked_processes():
    code = f"""{WORK}
    import multiprocessing
    def check(_):
        return work() == want and is_helped()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        print(set(pool.map(check, range(6))), work() == want)
    """
    assert python(code) == "{True} True"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_pools_of_other_processes(method, tmp_path):
    if method == "forkserver" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    script = tmp_path / "script.py"
    script.write_text(f"""
import hashlib, multiprocessing
import numpy as np, cybn
def digest(threads):
    x = np.random.default_rng(0).normal(size=(64, 32, 30, 30)).astype(np.float32)
    return hashlib.sha256(cybn.batch_norm_forward(x, num_threads=threads)[0].tobytes()).hexdigest()
if __name__ == "__main__":
    want = digest(2)
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        print(set(pool.map(digest, [1, 2, 3, 4])) == {{want}})
""")
    assert python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')") == "True"


@posix
def test_a_layer_in_training_when_another_thread_forks():
    """Its lock is held by a thread that the child does not have."""
    code = f"""{WORK}
    bn = cybn.BatchNorm(32)
    ended = threading.Event()
    def train():
        while not ended.is_set():
            bn(x)
    thread = threading.Thread(target=train)
    thread.start()
    codes = {{in_child(lambda: bn(x).tobytes() == want[:x.nbytes]) for _ in range(10)}}
    ended.set()
    thread.join()
    print(codes)
    """
    assert python(code) == "{0}"


# ------------------------------------------------------------------------------------------------------------- controls


@pytest.mark.openmp
@posix
def test_control_an_openmp_team_does_not_survive_a_fork(openmp_library):
    """What cybn's own team is for: with this runtime the same program hangs until its alarm rings."""
    code = f"""
        import ctypes
        print(ctypes.CDLL({str(openmp_library)!r}).fork_with_a_team(2))
    """
    result = python(code, OMP_NUM_THREADS="2")
    if result == "0":
        pytest.skip("an OpenMP runtime that survives forks (libomp does)")
    assert result == "14"  # SIGALRM


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="the number of a system call")
def test_control_without_the_handler_a_child_gets_no_help():
    """A fork that runs no handlers: the child counts on a helper that it does not have, and may wait for its lock."""
    code = f"""{WORK}
    import ctypes
    def check():
        return cybn._threads.helpers() == 1 and not is_helped(1)
    print(in_child(check, fork=lambda: ctypes.CDLL(None).syscall(57), seconds=5))
    """
    assert python(code) in ("0", "-14")


# --------------------------------------------------------------------------------------------------------- many callers


def test_many_callers_with_a_team_each():
    code = f"""{WORK}
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(6) as pool:
        print(set(pool.map(work, [1, 2, 3, 4, 2, 3] * 4)) == {{want}}, cybn._threads.helpers())
    """
    assert python(code) == "True 3"  # one pool for all callers, as large as the largest team wants


def test_callers_that_come_and_go():
    code = f"""{WORK}
    for _ in range(40):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    print(cybn._threads.helpers())
    """
    assert python(code) == "1"


def test_threads_that_cannot_be_started_are_not_missed():
    """Containers limit the number of threads; OpenMP ends the process there."""
    pytest.importorskip("resource")
    code = """
        import resource
        import numpy as np, cybn
        x = np.random.default_rng(0).normal(size=(64, 32, 30, 30)).astype(np.float32)
        want = cybn.batch_norm_stats(x, num_threads=1).m2
        # No memory for a stack.
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 200_000, resource.RLIM_INFINITY))
        got = cybn.batch_norm_stats(x, num_threads=4).m2
        none = cybn._threads.helpers()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        again = cybn.batch_norm_stats(x, num_threads=4).m2
        print((got == want).all(), none, (again == want).all(), cybn._threads.helpers())
    """
    if sys.platform != "linux":
        pytest.skip("limits of another kind")
    assert python(code) == "True 0 True 3"


def test_helpers_leave_signals_to_the_program():
    """A handler set by the program runs in the program's thread, also while helpers are there."""
    if sys.platform != "linux":
        pytest.skip("no /proc here")
    code = f"""{WORK}
    blocked = {{}}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{{task}}/comm") as name, open(f"/proc/self/task/{{task}}/status") as status:
            (mask,) = (int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))
            blocked["program" if int(task) == os.getpid() else name.read().strip()] = mask
    usual = [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1]
    print(all(blocked["cybn"] >> (number - 1) & 1 for number in usual), blocked["program"])
    """
    assert python(code) == "True 0"


# --------------------------------------------------------------------------------------------------------------- shares


def test_a_thread_takes_its_own_shares_first_and_what_others_come_to_last():
    order = _threads.order_of_shares
    assert order(0, 2, 6, False) == [0, 1, 2, 5, 4, 3]
    assert order(1, 2, 6, False) == [3, 4, 5, 2, 1, 0]
    assert order(1, 3, 6, False) == [2, 3, 1, 0, 5, 4]
    # Over what the step before has left in the caches.
    assert order(0, 2, 6, True) == [2, 1, 0, 3, 4, 5]
    assert order(1, 2, 6, True) == [5, 4, 3, 0, 1, 2]
    assert order(0, 1, 3, True) == [2, 1, 0]
    for places in range(1, 9):
        for shares in range(1, 20):
            for back in False, True:
                orders = [order(place, places, shares, back) for place in range(places)]
                assert all(sorted(each) == list(range(shares)) for each in orders)
                assert places > shares or len({each[0] for each in orders}) == places
