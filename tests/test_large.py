"""More elements in one array than a 32-bit integer counts: `make test-large`, for which 18 GB must be free."""

import numpy as np
import pytest

import cybn

pytestmark = [pytest.mark.large, pytest.mark.timeout(900)]

# Rows, planes, many channels, channels last: one axis longer than all others, or none.
LARGE = pytest.mark.parametrize(
    ("shape", "axis"),
    [((2**28 + 3, 9), 1), ((9, 2, 2**27 + 5), 1), ((2**17 + 1, 2**13, 2), 1), ((5, 2**27 + 3, 4), 2)],
    ids=str,
)


@pytest.fixture(scope="module", autouse=True)
def free():
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 1e6
    except OSError:
        pytest.skip("nothing here says how much memory is free")
    if available < 18:
        pytest.skip(f"needs 18 GB of memory, {available:.1f} are free")


def windows(shape, seed):
    """An array of little memory of its own: it repeats itself, each axis with a stride of a few values."""
    strides = [1 if length == max(shape) else 3 + 2 * axis for axis, length in enumerate(shape)]
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    values = np.empty(size, np.float32)
    some = np.random.default_rng(seed).normal(3, 2, 1_000_003).astype(np.float32)
    for i in range(0, size, some.size):
        values[i : i + some.size] = some[: size - i]
    x = np.lib.stride_tricks.as_strided(values, shape, [4 * stride for stride in strides], writeable=False)
    assert x.size > 2**31
    return x


def parts(length):
    """Slices of the first axis, each of fewer than 2^31 elements."""
    step = -(-length // 5)
    return [slice(i, i + step) for i in range(0, length, step)]


@LARGE
def test_forward_equals_that_of_its_parts(shape, axis):
    x = windows(shape, 0)
    channels = shape[axis]
    y, mean, invstd = cybn.batch_norm_forward(x, None, None, axis=axis)
    first, *others = [cybn.batch_norm_stats(x[part], axis=axis) for part in parts(shape[0])]
    moments = first.merge(*others)
    assert moments.count == x.size // channels
    np.testing.assert_allclose(mean, moments.mean, rtol=1e-7)
    np.testing.assert_allclose(invstd, moments.invstd(), rtol=1e-7)
    for part in parts(shape[0]):
        want = cybn.batch_norm_apply(x[part], mean, invstd, axis=axis)
        assert np.array_equal(y[part].view(np.uint32), want.view(np.uint32))


@LARGE
def test_backward_equals_that_of_its_parts(shape, axis):
    x, dy = windows(shape, 0), windows(shape, 1)
    channels = shape[axis]
    mean, invstd = np.full(channels, 3.0), np.full(channels, 0.5)
    dx, grad_weight, grad_bias = cybn.batch_norm_backward(dy, x, mean, invstd, axis=axis)
    sums = cybn.batch_norm_backward_reduce(dy, x, mean, axis=axis)
    of_parts = [cybn.batch_norm_backward_reduce(dy[part], x[part], mean, axis=axis) for part in parts(shape[0])]
    for got, *terms in zip(sums, *of_parts, strict=True):
        np.testing.assert_allclose(got, np.sum(terms, axis=0), rtol=1e-7, atol=1e-7 * x.size / channels)
    assert np.array_equal(grad_bias, sums[0].astype(np.float32))
    assert np.array_equal(grad_weight, (0.5 * sums[1]).astype(np.float32))
    for part in parts(shape[0]):
        want = cybn.batch_norm_backward_apply(
            dy[part], x[part], mean, invstd, None, *sums, x.size // channels, axis=axis
        )
        assert np.array_equal(dx[part].view(np.uint32), want.view(np.uint32))
