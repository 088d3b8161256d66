"""The schedule is free and must not show: threads, runs, callers."""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
import pytest
from support import DTYPES, bits, every_geometry, every_variant, outcome, problem, python

import cybn
from cybn import _schedule

pytestmark = pytest.mark.usefixtures("kernels")


@every_geometry
@every_variant
def test_the_number_of_threads_does_not_show(name, training, geometry):
    shape, axis, order = geometry
    for dtype in DTYPES:
        p = problem(shape, axis, dtype, order)
        want = bits(outcome(name, p, training, num_threads=1))
        for threads in (2, 3, 7):
            assert bits(outcome(name, p, training, num_threads=threads)) == want


@pytest.mark.parametrize("size", [100, 8_000, 9_000, 16_000, 17_000, 32_000, 33_000, 66_000, 131_000, 140_000])
@every_variant
def test_the_number_of_threads_does_not_show_around_thresholds(name, training, size):
    """Sizes on both sides of where the GIL is given up, a team starts, or a channel stops fitting a cache."""
    for shape in ((size // 10, 10), (4, 10, size // 40), (1, 2, size // 2)):
        p = problem(shape)
        want = bits(outcome(name, p, training, num_threads=1))
        for threads in (2, 5, 64):
            assert bits(outcome(name, p, training, num_threads=threads)) == want


@every_geometry
def test_runs_are_alike(geometry):
    shape, axis, order = geometry
    p = problem(shape, axis, np.float32, order)
    assert len({str(bits(outcome("batch_norm_forward", p, True, num_threads=3))) for _ in range(5)}) == 1


def test_the_values_of_other_channels_do_not_show():
    """A channel's bits depend on its own values alone, so what is in its neighbours may change."""
    for shape in ((3001, 24), (64, 96, 49), (8, 64, 600), (4, 3, 5000)):
        p = problem(shape)
        y = cybn.batch_norm(p["x"], None, None, training=True)
        other = p["x"].copy()
        other[:, 1::2] *= -1e6
        z = cybn.batch_norm(other, None, None, training=True)
        assert y[:, ::2].tobytes() == z[:, ::2].tobytes()
        assert y[:, 1::2].tobytes() != z[:, 1::2].tobytes()


@every_variant
def test_the_calling_thread_does_not_show(name, training):
    """Many callers at once, each of which may have a team."""
    problems = [problem(shape, dtype=dtype) for shape in ((60, 16, 300), (40, 5), (9000, 24)) for dtype in DTYPES]
    want = [bits(outcome(name, p, training)) for p in problems]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            got = pool.map(lambda p: bits(outcome(name, p, training, num_threads=2)), problems)
            assert list(got) == want


def test_callers_run_at_the_same_time():
    """The GIL is given up: while one Python thread is in a long call another goes on.

    With the GIL held its clock would stand still for the whole call, every time.
    """
    x = np.ones((64, 64, 56, 56), np.float32)
    out = np.empty_like(x)

    def timed():
        start = perf_counter()
        cybn.batch_norm(x, None, None, training=True, out=out, num_threads=1)
        return perf_counter() - start

    def longest_standstill_within_a_call():
        with ThreadPoolExecutor(1) as pool:
            # The clock starts first and stops last: a call may come and go before this thread's next turn.
            longest, last = 0.0, perf_counter()
            future = pool.submit(timed)
            while not future.done():
                now = perf_counter()
                longest, last = max(longest, now - last), now
            longest = max(longest, perf_counter() - last)
        return longest / future.result()

    # Other programs may stop the clock too, but not in each of ten calls.
    assert min(longest_standstill_within_a_call() for _ in range(10)) < 0.5


@every_geometry
@every_variant
def test_streaming_stores_do_not_show(name, training, geometry):
    shape, axis, order = geometry
    before = _schedule.set_stream_min_bytes(0)
    try:
        for dtype in DTYPES:
            p = problem(shape, axis, dtype, order)
            _schedule.set_stream_min_bytes(2**62)
            want = bits(outcome(name, p, training))
            _schedule.set_stream_min_bytes(0)
            assert bits(outcome(name, p, training)) == want
            assert bits(outcome(name, p, training, num_threads=1)) == want
    finally:
        _schedule.set_stream_min_bytes(before)


def test_a_wrong_stream_size_is_warned_of_and_ignored():
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import cybn
        (warning,) = caught
        print(warning.category.__name__, warning.message, sep="|")
        from cybn import _schedule
        print(_schedule.set_stream_min_bytes(0))
    """
    want = "RuntimeWarning|CYBN_STREAM_MIN_BYTES must be a number of bytes, got '1e6'; ignored\n-1"
    assert python(code, CYBN_STREAM_MIN_BYTES="1e6") == want


def test_the_stream_size_is_read_from_the_environment():
    code = "from cybn import _schedule; print(_schedule.set_stream_min_bytes(0))"
    assert python(code, CYBN_STREAM_MIN_BYTES="4096") == "4096"
    assert python(code) == "-1"


def test_what_does_not_fit_the_last_cache_is_streamed():
    caches = _schedule.set_caches(512 * 1024, 24 * 2**20)
    before = _schedule.set_stream_min_bytes(-1)
    try:
        one = _schedule.last_caches(1)
        assert not _schedule.streams(10 * 2**20 - 4, 2, True, one)
        assert _schedule.streams(10 * 2**20, 2, True, one)
        assert _schedule.streams(5 * 2**20, 4, True, one)
        # What is read once has no second time to be kept for.
        assert not _schedule.streams(24 * 2**20 - 4, 3, False, one)
        assert _schedule.streams(24 * 2**20, 2, False, one)
        # Two such caches, eight processors each: the ninth thread has the second one, the seventeenth none of its own.
        _schedule.set_caches(512 * 1024, 24 * 2**20, count=2, sharers=8)
        assert _schedule.streams(10 * 2**20, 2, True, _schedule.last_caches(8))
        assert not _schedule.streams(20 * 2**20 - 4, 2, True, _schedule.last_caches(9))
        assert _schedule.streams(20 * 2**20, 2, True, _schedule.last_caches(17))
        _schedule.set_stream_min_bytes(2**20)
        assert _schedule.streams(2**20, 1, True, one)
        assert not _schedule.streams(2**20 - 4, 100, True, one)
    finally:
        _schedule.set_stream_min_bytes(before)
        _schedule.set_caches(*caches)


@every_geometry
@every_variant
def test_caches_do_not_show(name, training, geometry):
    """Owner, cooperative, two sweeps: the same bits."""
    shape, axis, order = geometry
    p = problem(shape, axis, np.float32, order)
    want = bits(outcome(name, p, training, num_threads=1))
    before = _schedule.set_caches(1, 1)
    try:
        for caches in ((1, 1), (100_000, 1), (1_000_000, 1), (64_000_000, 64_000_000)):
            _schedule.set_caches(*caches)
            for threads in (1, 2, 3):
                assert bits(outcome(name, p, training, num_threads=threads)) == want
    finally:
        _schedule.set_caches(*before)


@pytest.mark.parametrize(
    ("shape", "threads", "caches", "kind"),
    [
        ((1601, 512), 2, (1 << 19, 1 << 25), "two sweeps"),
        ((100_003, 10), 2, (1 << 19, 1 << 20), "two sweeps"),  # the second one backwards
        ((31, 512, 49), 2, (1 << 19, 1 << 25), "two sweeps"),
        ((31, 512, 49), 2, (1 << 19, 1 << 20), "two sweeps"),
        ((1, 7, 700_001), 2, (1 << 19, 1 << 20), "two sweeps"),
        ((100, 100, 200), 3, (2_300_000, 1 << 20), "cooperative"),  # bands of 40, 40 and 20 channels
    ],
    ids=str,
)
def test_shares_do_not_show(shape, threads, caches, kind):
    """Parts of threads that are several shares, which others may take."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape), dtype=np.float32)

    def results(threads):
        y, mean, invstd = cybn.batch_norm_forward(x, num_threads=threads)
        evaluated = cybn.batch_norm_apply(x, mean, invstd, num_threads=threads)
        return bits((y, mean, invstd, evaluated, *cybn.batch_norm_backward(dy, x, mean, invstd, num_threads=threads)))

    before = _schedule.set_caches(*caches)
    try:
        plan = _schedule.plan_of(shape[0], shape[1], shape[2] if len(shape) > 2 else 1, threads)
        assert plan["kind"] == kind
        assert plan["shares"] > plan["threads"] == threads
        want = results(1)
        assert all(results(n) == want for n in (2, 3, 5))
    finally:
        _schedule.set_caches(*before)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("beside", [None, "sample_weight", "mask"])
@pytest.mark.parametrize("shape", [(600, 2, 2100), (350, 3, 4100), (16, 2, 140000)])
def test_the_order_of_memory_does_not_show(shape, beside, activation):
    """Sums take runs of several blocks one after the other where they come from memory; a slice has two blocks now and
    then, also the last of one run and the first of the next. Weights leave whole blocks and slices out."""
    plan = _schedule.plan_of(*shape, 2)
    assert plan["slices"] < shape[0] * -(-shape[2] // 2048)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    dy = rng.standard_normal(shape, dtype=np.float32)
    extras = {}
    if beside:
        weight = rng.random((shape[0], shape[2]), dtype=np.float32)
        weight[::3] = 0
        weight[1::3, : shape[2] // 2] = 0
        extras[beside] = weight if beside == "sample_weight" else weight > 0.5

    def results(threads):
        options = {"activation": activation, "num_threads": threads, **extras}
        y, mean, invstd = cybn.batch_norm_forward(x, **options)
        return bits((y, mean, invstd, *cybn.batch_norm_backward(dy, x, mean, invstd, **options)))

    before = _schedule.set_caches(1 << 20, 1 << 30)
    try:
        want = results(1)
        _schedule.set_caches(1 << 20, 1)
        for threads in (1, 2, 3):
            assert results(threads) == want
    finally:
        _schedule.set_caches(*before)
