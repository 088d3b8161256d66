"""What docs/embedding.md promises to a process that cybn is a part of; forks and teams: test_team.py."""

import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from support import clean_environment, python, raises

import cybn

# ---------------------------------------------------------------------------------------------------- shared by threads


@pytest.mark.parametrize("shape", [(1, 48), (16, 48), (2, 48, 14, 14), (8, 48, 40, 40)], ids=str)
def test_a_layer_in_evaluation_is_shared_without_a_lock(shape):
    rng = np.random.default_rng(0)
    bn = cybn.BatchNorm(48)
    bn(rng.normal(3, 2, (64, 48)).astype(np.float32))
    bn.eval()
    inputs = [rng.normal(3, 2, shape).astype(np.float32) for _ in range(6)]
    want = [bn(x).tobytes() for x in inputs]
    start = threading.Barrier(8)

    def serve(number):
        start.wait()
        order = np.random.default_rng(number).integers(6, size=60)
        return all(bn(inputs[i], num_threads=1 + number % 3).tobytes() == want[i] for i in order)

    with ThreadPoolExecutor(8) as pool, bn._lock:  # nobody may ask for it
        assert all(pool.map(serve, range(8), timeout=60))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_one_layer_from_many_threads_is_serialised(momentum):
    """With the same batch everywhere each order of the passes gives the same; a lost update would show."""
    x = np.random.default_rng(0).normal(3, 2, (64, 16, 20, 20)).astype(np.float32)
    alone, shared = (cybn.BatchNorm2d(16, momentum=momentum) for _ in range(2))
    (want,) = {alone(x).tobytes() for _ in range(40)}
    start = threading.Barrier(8)

    def train(_):
        start.wait()
        return all(shared(x).tobytes() == want for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(train, range(8)))
    assert shared.num_batches_tracked == 40
    for name in ("running_mean", "running_var"):
        assert getattr(shared, name).tobytes() == getattr(alone, name).tobytes()


def test_state_is_never_seen_half_written():
    x = np.random.default_rng(0).normal(3, 2, (64, 16, 20, 20)).astype(np.float32)
    bn, ended = cybn.BatchNorm2d(16), threading.Event()
    states = [{name: np.full_like(array, value) for name, array in bn.state_dict().items()} for value in (1, 2)]

    def load():
        while not ended.is_set():
            for state in states:
                bn.load_state_dict(state)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(300):
            assert len({float(value) for array in bn.state_dict().values() for value in np.ravel(array)}) == 1 or (
                bn.num_batches_tracked < 1
            )
            time.sleep(0)
    finally:
        ended.set()
        thread.join()
    bn(x)


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


REPLACED = "backward needs the last forward: another thread has called forward on this layer since"


def test_backward_refuses_a_pass_of_another_thread():
    rng = np.random.default_rng(0)
    bn = cybn.BatchNorm(4)
    mine, other = (rng.normal(size=(8, 4)) for _ in range(2))
    bn(mine)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(bn, other).result()
        with raises(RuntimeError, REPLACED, bn.weight):
            bn.backward(mine)
        # Whose pass it is may go on; and so may who begins again.
        got = pool.submit(bn.backward, other).result()
    again = cybn.BatchNorm(4)
    again(other)
    assert got.tobytes() == again.backward(other).tobytes()
    bn(mine)
    again(mine)
    assert bn.backward(mine).tobytes() == again.backward(mine).tobytes()


def test_an_evaluation_in_between_does_not_hide_whose_pass_it_was():
    rng = np.random.default_rng(0)
    bn = cybn.BatchNorm(4).eval()
    mine, other = (rng.normal(size=(8, 4)) for _ in range(2))
    for passes in ([False], [False, True], [True, False]):
        bn(mine, save_for_backward=True)
        for save in passes:
            in_thread(lambda save=save: bn(other, save_for_backward=save))
        with raises(RuntimeError, REPLACED, bn.weight):
            bn.backward(mine)
    bn(mine, save_for_backward=True)
    bn(mine)
    with pytest.raises(RuntimeError, match=r"^backward needs a forward before it: "):
        bn.backward(mine)


def test_a_thread_does_not_answer_for_a_dead_one_whose_identifier_it_has():
    x = np.random.default_rng(0).normal(size=(8, 4))
    bn = cybn.BatchNorm(4)
    for _ in range(20):  # identifiers are used again at once
        in_thread(lambda: bn(x))
        bn(x)
        in_thread(lambda: bn.backward(x))


def test_passes_may_move_from_thread_to_thread():
    """As they do where a server gives each step to whichever thread of its pool is free."""
    x = np.random.default_rng(0).normal(size=(8, 4))
    bn, alone = cybn.BatchNorm(4), cybn.BatchNorm(4)
    alone(x)
    want = alone.backward(x).tobytes()
    pools = [ThreadPoolExecutor(1) for _ in range(3)]
    for step in range(6):
        pools[step % 3].submit(bn, x).result()
        assert pools[(step + 1) % 3].submit(bn.backward, x).result().tobytes() == want
    for pool in pools:
        pool.shutdown()


@pytest.mark.parametrize("verb", ["training", "evaluation", "backward", "stats"])
def test_the_gil_is_released(verb):
    """While one thread computes, another one runs Python: its longest pause is far shorter than the call."""
    x = np.random.default_rng(0).normal(size=(64, 64, 64, 64)).astype(np.float32)
    y, mean, invstd = cybn.batch_norm_forward(x)
    calls = {
        "training": lambda: cybn.batch_norm_forward(x, out=y, num_threads=1),
        "evaluation": lambda: cybn.batch_norm_apply(x, mean, invstd, out=y, num_threads=1),
        "backward": lambda: cybn.batch_norm_backward(x, x, mean, invstd, out=y, num_threads=1),
        "stats": lambda: cybn.batch_norm_stats(x, num_threads=1),
    }

    def attempt():
        spans = []

        def compute():
            start = time.perf_counter()
            calls[verb]()
            spans.append((start, time.perf_counter()))

        thread = threading.Thread(target=compute)
        seen = [time.perf_counter()]
        thread.start()
        while thread.is_alive():
            seen.append(time.perf_counter())
        start, end = spans[0]
        within = [t for t in seen if start <= t <= end]
        # How much of the call's time other Python has seen. With the GIL held: nothing between start and end.
        steps = [b - a for a, b in pairwise(within)]
        return sum(step for step in steps if step < (end - start) / 10) / (end - start)

    # A busy machine may take the processor away for longer than the call lasts.
    assert any(attempt() > 0.5 for _ in range(20))


# -------------------------------------------------------------------------------------------- the process is left alone


STATE = """
    import gc, os, signal, sys, threading
    import numpy as np
    def state():
        import locale
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        try:
            with open("/proc/self/status") as file:
                signals = [line for line in file if line.startswith("Sig") and not line.startswith("SigQ")]
        except OSError:
            signals = None
        return (dict(os.environ), handlers, signals, locale.setlocale(locale.LC_ALL), os.getcwd(), gc.get_threshold(),
                sys.getswitchinterval(), sys.getrecursionlimit(), np.geterr(), threading.active_count(),
                threading.stack_size(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None)
    before = state()
    import cybn
    imported = state()
    x = np.random.default_rng(0).normal(size=(64, 32, 30, 30)).astype(np.float32)
    y, mean, invstd = cybn.batch_norm_forward(x, num_threads=3)
    cybn.batch_norm_backward(y, x, mean, invstd, num_threads=3)
    cybn.BatchNorm(32).eval()(x, num_threads=2)
"""


def test_environment_signals_locale_and_settings():
    assert python(f"{STATE}\n    print(before == imported == state())") == "True"


def test_thread_limits_of_other_libraries():
    pytest.importorskip("threadpoolctl")
    code = """
        import numpy as np
        from threadpoolctl import threadpool_info
        def limits():
            return {(pool["filepath"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"}
        before = limits()
        import cybn
        x = np.ones((64, 64, 900), np.float32)
        with cybn.num_threads(1):
            cybn.batch_norm_stats(x)
        cybn.set_num_threads(3)
        cybn.batch_norm_stats(x)
        openmp = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"]
        print(before == limits(), set(openmp) <= {5})
    """
    assert python(code, OMP_NUM_THREADS="5") == "True True"


def test_the_allocator_of_numpy():
    code = """
        import numpy as np
        name = np._core.multiarray.get_handler_name
        before = name()
        import cybn
        y = cybn.batch_norm_forward(np.ones((64, 64, 900), np.float32))[0]
        print(before == name() == name(np.ones(1_000_000)), name(y))
    """
    assert python(code).split()[0] == "True"


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


def test_import_takes_no_time():
    """Under 30 ms beyond NumPy's; of several, because a machine may be busy with other things."""

    def seconds(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=clean_environment(), timeout=60)
        return time.perf_counter() - start

    for _ in range(5):
        both = [(seconds("import numpy"), seconds("import numpy, cybn")) for _ in range(5)]
        extra = statistics.median(b for _, b in both) - statistics.median(a for a, _ in both)
        if extra < 0.030:
            return
    raise AssertionError(f"import takes {extra * 1000:.0f} ms")


def test_import_needs_numpy_alone():
    code = """
        import sys, numpy
        before = set(sys.modules)
        import cybn
        new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
        # What Cython puts there for its modules is no package.
        print({name for name in new if "cython" not in name})
    """
    assert python(code) == "{'cybn'}"


# -------------------------------------------------------------------------------------------------------------- latency


@pytest.mark.parametrize("shape", [(1, 64), (32, 64), (1, 64, 14, 14), (8, 64, 56, 56)], ids=str)
def test_evaluation_into_out_allocates_nothing(shape):
    """Nothing that stays, and nothing that grows with the call."""
    import tracemalloc

    bn = cybn.BatchNorm(64).eval()
    x = np.ones(shape, np.float32)
    y = np.empty_like(x)
    bn(x, out=y)
    tracemalloc.start()
    try:
        for _ in range(3):
            bn(x, out=y)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            assert bn(x, out=y) is y
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 500
    assert peak - before < 80_000  # the call's per-channel vectors and partial sums


def test_a_busy_machine_costs_turns_not_milliseconds():
    """Small calls while every processor is wanted by others: helpers that get no turn are not waited for."""
    code = """
        import multiprocessing, os, time
        import numpy as np, cybn
        def burn(seconds):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                pass
        if __name__ == "__main__":
            bn = cybn.BatchNorm(64).eval()
            x = np.ones((4, 64, 28, 28), np.float32)
            y = np.empty_like(x)
            fork = multiprocessing.get_context("fork")
            others = [fork.Process(target=burn, args=(4,)) for _ in range(os.cpu_count())]
            for other in others:
                other.start()
            time.sleep(0.2)
            times = []
            end = time.monotonic() + 2
            while time.monotonic() < end:
                start = time.perf_counter()
                bn(x, out=y)
                times.append(time.perf_counter() - start)
                time.sleep(0.001)
            for other in others:
                other.join()
            print(np.median(times) < 0.002)
    """
    assert python(code, CYBN_NUM_THREADS="2") == "True"
