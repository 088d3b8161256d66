"""What an inference keeps for the next one: of use while nothing changes, never used once something has."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bits, dtypes, raises

import cybn

VECTORS = ("running_mean", "running_var", "weight", "bias")
CHANNELS = 37


def layer(dtype=np.float32, channels=CHANNELS, **options):
    bn = cybn.BatchNorm(channels, dtype=dtype, **options).eval()
    rng = np.random.default_rng(0)
    for name, vector in bn._arrays().items():
        vector[...] = rng.uniform(0.5, 2, channels) if name == "running_var" else rng.normal(size=channels)
    return bn


def batch(channels=CHANNELS):
    return np.random.default_rng(1).normal(3, 2, (5, channels)).astype(np.float32)


def function(bn, x):
    """The same, of nothing but the present values."""
    return cybn.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


@dtypes
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_they_are_made_once(dtype, options):
    bn, x = layer(dtype, **options), batch()
    want = function(bn, x)
    assert bits([bn(x)]) == bits([want])
    made = bn._coefficients
    for again in (x, x.astype(np.float64), x[:1], np.asfortranarray(x)):
        bn(again)
        assert bn._coefficients is made
    assert bits([bn(x), bn(x, out=np.empty_like(x)), bn(x, num_threads=2)]) == bits([want] * 3)
    assert bn._coefficients is made


@settings(deadline=None)
@given(
    name=st.sampled_from(VECTORS),
    channel=st.integers(0, CHANNELS - 1),
    value=st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, float("nan"), float("inf"), 1e-45, 1e38])),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_a_value_written_into_a_vector_counts(name, channel, value, dtype):
    bn, x = layer(dtype), batch()
    bn(x)
    getattr(bn, name)[channel] = abs(value) if name == "running_var" else value
    assert bits([bn(x)]) == bits([function(bn, x)])


@pytest.mark.parametrize("name", VECTORS)
def test_another_vector_counts(name):
    bn, x = layer(), batch()
    first = bn(x)
    values = getattr(bn, name)
    other = (values + 1).astype(np.float64)
    for vector in (
        values.astype(np.float64),
        values.copy(),
        other,
        np.repeat(other, 2)[::2],  # not dense
        other[::-1][::-1],
        list(map(float, other)),
        np.frombuffer(b"\0" + other.tobytes(), np.uint8)[1:].view(np.float64),  # not aligned
    ):
        setattr(bn, name, vector)
        assert bits([bn(x)]) == bits([function(bn, x)])
    setattr(bn, name, values)
    assert bits([bn(x)]) == bits([first])


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_vector_may_come_and_go(name):
    bn, x = layer(), batch()
    values, first = getattr(bn, name), bn(x)
    setattr(bn, name, None)
    assert bits([bn(x)]) == bits([function(bn, x)])
    setattr(bn, name, values)
    assert bits([bn(x)]) == bits([first])


def test_bytes_of_one_type_are_not_those_of_another():
    """Two float32 numbers whose bytes, with the channels halved, a float64 could have: sizes are compared too."""
    bn, x = layer(), batch()
    bn(x)
    bn.running_mean = np.zeros(CHANNELS, np.float32)
    bn(x)
    bn.running_mean = np.zeros(CHANNELS)
    assert bits([bn(x)]) == bits([function(bn, x)])
    bn.running_mean = np.zeros(2 * CHANNELS, np.float32)
    with raises(ValueError, "running_mean must have shape (37,), one value per channel, got shape (74,)"):
        bn(x)


def test_eps_training_loading_and_resetting_count():
    bn, x = layer(), batch()
    bn(x)
    state = bn.state_dict()

    def check():
        assert bits([bn.eval()(x)]) == bits([function(bn, x)])

    bn.eps = 1e-3
    check()
    bn.train()(2 * x)
    check()
    bn.load_state_dict(state)
    check()
    bn.reset_running_stats()
    check()
    bn.reset_parameters()
    check()


def test_a_refused_vector_leaves_those_before():
    bn, x = layer(), batch()
    want, made = bn(x), bn._coefficients
    for name, value, kind, message in (
        ("running_var", -1, ValueError, "running_var must not be negative, got -1.0 in channel 0"),
        ("weight", 1, TypeError, "weight must be a float32 or float64 array, got an array of int64"),
    ):
        values = getattr(bn, name)
        setattr(bn, name, np.full(CHANNELS, value, values.dtype if value < 0 else np.int64))
        with raises(kind, message):
            bn(x)
        assert bn._coefficients is made
        setattr(bn, name, values)
        assert bits([bn(x)]) == bits([want])
        assert bn._coefficients is made


def test_statistics_that_are_gone():
    bn, x = layer(), batch()
    bn(x)
    mean, bn.running_mean = bn.running_mean, None
    with raises(ValueError, "running_mean and running_var must be given together, got only running_var"):
        bn(x)
    bn.running_mean, bn.running_var = mean, None
    with raises(ValueError, "running_mean and running_var must be given together, got only running_mean"):
        bn(x)
    bn.running_mean = None
    with raises(ValueError, "running_mean and running_var must be given when not training, got None"):
        bn(x)


def test_they_are_nobody_elses():
    """Neither a copy of a layer nor a pickle of it carries them, and a vector's owner may not change them."""
    bn, x = layer(), batch()
    want = bn(x)
    kept = {name: getattr(bn, name).copy() for name in VECTORS}
    for name in VECTORS:
        getattr(bn, name)[...] = 9
    bn(x)
    for name in VECTORS:
        getattr(bn, name)[...] = kept[name]
    assert bits([bn(x)]) == bits([want])
    assert "_coefficients" not in bn.__getstate__()


def test_threads_use_theirs_while_others_make_new_ones():
    """One thread alternates between two sets of statistics by replacing vectors; what the others see is one of them."""
    channels = 3000
    bn, x = layer(channels=channels, affine=False), batch(channels)
    first = bn(x).tobytes()
    means = bn.running_mean, bn.running_mean + 1
    bn.running_mean = means[1]
    second = bn(x).tobytes()
    stop = threading.Event()

    def watch(_):
        return all(bn(x).tobytes() in (first, second) for _ in range(300))

    def change():
        turn = 0
        while not stop.is_set():
            turn += 1
            bn.running_mean = means[turn % 2]
        return turn

    with ThreadPoolExecutor(5) as pool:
        turns = pool.submit(change)
        try:
            assert all(pool.map(watch, range(4)))
        finally:
            stop.set()
        assert turns.result() > 2
    assert first != second
