"""Large results are ordinary arrays whose memory is used again."""

import pickle
import threading

import numpy as np
import pytest
from support import python

import cybn
from cybn import _memory

KIB = 1024
MIB = 1024 * KIB

pytestmark = pytest.mark.skipif(not _memory.can_keep, reason="no memory is kept on this system")


@pytest.fixture(autouse=True)
def cache():
    """An empty cache of 64 MiB, for the test alone."""
    before = _memory.set_cache_max_bytes(64 * MIB)
    yield
    _memory.set_cache_max_bytes(before)


def ones(mib):
    return np.ones((int(mib * MIB) // 16, 4), np.float32)


def apply(x):
    return cybn.batch_norm_apply(x, np.zeros(4), np.ones(4))


def address(a):
    return a.__array_interface__["data"][0]


@pytest.mark.parametrize("mib", [0.125, 0.77, 1, 3, 7.3, 33])
def test_memory_is_used_again(mib):
    x = ones(mib)
    y = apply(x)
    before = address(y)
    assert _memory.cached_bytes() == 0
    del y
    kept = _memory.cached_bytes()
    assert x.nbytes <= kept < x.nbytes + (4 * MIB if mib >= 1 else 32 * KIB)
    y = apply(x)
    assert address(y) == before
    assert _memory.cached_bytes() == 0
    np.testing.assert_array_equal(y, x)


def test_small_results_are_numpys():
    y = apply(ones(0.124))
    del y
    assert _memory.cached_bytes() == 0


def test_results_that_die_together_are_used_again_together():
    """The layers of a network: the C library would give the end of its memory back to the system."""
    x = ones(0.7)
    results = [apply(x) for _ in range(100)]
    addresses = [address(y) for y in results]
    del results
    kept = _memory.cached_bytes()
    assert kept >= 64 * MIB - MIB  # as many as there is room for
    again = [apply(x) for _ in range(50)]
    assert {address(y) for y in again} <= set(addresses)
    assert _memory.cached_bytes() < kept - 50 * x.nbytes


def test_the_youngest_is_used_first():
    x = ones(0.7)
    results = [apply(x) for _ in range(3)]
    addresses = [address(y) for y in results]
    for i in (1, 2, 0):
        results[i] = None
    again = [apply(x) for _ in range(3)]
    assert [address(y) for y in again] == [addresses[i] for i in (0, 2, 1)]


def test_no_more_blocks_are_kept_than_there_are_places():
    _memory.set_cache_max_bytes(200 * MIB)
    x = ones(0.125)
    results = [apply(x) for _ in range(1100)]
    del results
    assert 1024 * x.nbytes <= _memory.cached_bytes() <= 1024 * (x.nbytes + 32 * KIB)


def test_temporaries_are_kept_when_they_would_cost_more_than_the_call():
    """A mask as flags, 128 KiB of them: the system could take and clear it again in every call."""
    x = np.ones((MIB // 8, 1), np.float32)
    cybn.batch_norm_stats(x[:1000], mask=np.ones(1000, bool))
    assert _memory.cached_bytes() == 0
    mask = np.ones(len(x), bool)
    for _ in range(2):
        cybn.batch_norm_stats(x, mask=mask)
        assert len(x) <= _memory.cached_bytes() < len(x) + 32 * KIB
    _memory.set_cache_max_bytes(0)
    cybn.batch_norm_stats(x, mask=mask)
    assert _memory.cached_bytes() == 0


def test_a_result_owns_its_data():
    x = ones(2)
    y = apply(x)
    assert y.base is None
    assert y.flags.owndata
    assert y.flags.writeable
    assert address(y) % 64 == 0


def test_live_results_share_nothing():
    x = ones(2)
    results = [apply(x) for _ in range(8)]
    for i, y in enumerate(results):
        y[...] = i
    assert [set(y.ravel().tolist()) for y in results] == [{float(i)} for i in range(8)]


def test_the_limit_holds_and_the_oldest_goes():
    x = ones(15)  # 16 MiB with what belongs to it
    results = [apply(x) for _ in range(6)]
    addresses = [address(y) for y in results]
    while results:
        del results[0]
        assert _memory.cached_bytes() <= 64 * MIB
    assert _memory.cached_bytes() == 64 * MIB
    again = [apply(x) for _ in range(4)]
    assert {address(y) for y in again} == set(addresses[2:])


def test_what_thousands_of_results_have_not_needed_goes():
    """The memory of one large request does not stay for good; what is used again does, however seldom."""
    large, small = ones(20), ones(0.125)
    y, z = apply(large), apply(large)
    del y, z
    kept = _memory.cached_bytes()
    for _ in range(4000):
        apply(small)
    assert _memory.cached_bytes() > kept
    apply(large)  # of the two the youngest
    for _ in range(200):
        apply(small)
    assert large.nbytes < _memory.cached_bytes() < kept  # the other one is gone
    for _ in range(5000):
        apply(small)
    assert small.nbytes < _memory.cached_bytes() < MIB


def test_an_eighth_of_the_memory_by_default():
    code = "from cybn import _memory; print(_memory.cache_max_bytes() / _memory.usable_bytes())"
    assert float(python(code)) == pytest.approx(1 / 8)


def test_the_smaller_of_machine_and_control_groups(monkeypatch):
    """Where either cannot be read, the other; where both cannot, nothing is kept."""
    machine = _memory.usable_bytes()
    for group, pages, usable in (None, 5, 5), (0, 5, 5), (3, 5, 3), (7, 5, 5), (7, -1, 7), (None, -1, 0):
        monkeypatch.setattr(_memory._cgroup, "memory", lambda group=group: group)
        monkeypatch.setattr(_memory.os, "sysconf", lambda name, pages=pages: pages if name == "SC_PHYS_PAGES" else 1)
        assert _memory.usable_bytes() == usable

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(_memory.os, "sysconf", unknown)
    assert _memory.usable_bytes() == 0
    monkeypatch.undo()
    assert _memory.usable_bytes() == machine > 0


def test_larger_than_the_limit_is_not_kept():
    y = apply(ones(70))
    del y
    assert _memory.cached_bytes() == 0


def test_no_block_is_used_for_much_less():
    y = apply(ones(40))
    del y
    kept = _memory.cached_bytes()
    smaller = apply(ones(20))
    assert smaller.nbytes < kept == _memory.cached_bytes()


def test_empty_cache():
    x = ones(2)
    y, z = apply(x), apply(x)
    del y
    assert _memory.cached_bytes() > 0
    assert cybn.empty_cache() is None
    assert _memory.cached_bytes() == 0
    np.testing.assert_array_equal(z, x)  # in use: not affected
    assert cybn.show_config("dicts")["cached bytes"] == 0


def test_resize_copy_and_pickle():
    x = ones(3)
    y = apply(x)
    y.resize((x.shape[0] * 2, 4), refcheck=False)
    np.testing.assert_array_equal(y[: x.shape[0]], x)
    assert not y[x.shape[0] :].any()
    y.resize((5, 4), refcheck=False)
    np.testing.assert_array_equal(y, x[:5])
    y = apply(x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(y)), y)
    np.testing.assert_array_equal(y.copy(), y)


def test_other_arrays_are_left_to_numpy():
    """NumPy's allocator is exchanged for the one result, not for what others allocate."""
    apply(ones(2))
    cybn.empty_cache()
    a = np.empty(4 * MIB, np.uint8)
    del a
    assert _memory.cached_bytes() == 0


def test_many_threads():
    """Results of threads that run at the same time: each gets its own memory."""
    wrong = []

    def work(seed):
        x = np.random.default_rng(seed).normal(size=(MIB // 16, 4)).astype(np.float32)
        for _ in range(30):
            y = apply(x)
            if not np.array_equal(y, x):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert _memory.cached_bytes() <= 64 * MIB


CODE = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import cybn, numpy as np
    x = np.ones((2**20, 4), np.float32)
    for _ in range(2):
        cybn.batch_norm_apply(x, np.zeros(4), np.ones(4))
    print(*[w.message for w in caught], cybn.show_config("dicts")["cached bytes"], sep="|")
"""


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("", "18874368"),
        ("0", "0"),
        ("20000000", "18874368"),
        ("16000000", "0"),
        ("-1", "CYBN_CACHE_MAX_BYTES must be a number of bytes, got '-1'; ignored|18874368"),
        ("1e9", "CYBN_CACHE_MAX_BYTES must be a number of bytes, got '1e9'; ignored|18874368"),
    ],
)
def test_environment(text, printed):
    assert python(CODE, CYBN_CACHE_MAX_BYTES=text) == printed


def test_after_fork():
    """A child has the memory that its parent kept, as its own."""
    code = """
        import os, numpy as np, cybn
        x = np.ones((2**20, 4), np.float32)
        apply = lambda: cybn.batch_norm_apply(x, np.zeros(4), np.ones(4))
        y = apply(); del y
        child = os.fork()
        if child == 0:
            y = apply(); y[...] = 7
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), apply().max())
    """
    assert python(code) == "0 1.0"
