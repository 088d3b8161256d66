"""What the lectures say about the mechanism, statement by statement; the numbers are those of their list."""

import numpy as np
import pytest
from support import dtypes, raises, rows_of

import cybn

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = [(32, 6), (8, 6, 30), (8, 6, 9, 9), (4, 6, 80, 5)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def data(shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)


@every_shape
@dtypes
def test_L1_the_four_equations(shape, dtype):
    """mu = 1/m sum z; sigma^2 = 1/m sum (z - mu)^2; z_norm = (z - mu)/sqrt(sigma^2 + eps); z~ = gamma z_norm + beta."""
    z, _ = data(shape, dtype)
    gamma, beta = np.linspace(-1, 2, 6).astype(dtype), np.linspace(3, 4, 6).astype(dtype)
    rows = rows_of(z, 1).astype(np.float64)
    mu, var = rows.mean(1, keepdims=True), rows.var(1, keepdims=True)
    want = gamma[:, None] * ((rows - mu) / np.sqrt(var + 1e-5)) + beta[:, None]
    got = cybn.batch_norm(z, None, None, gamma, beta, training=True)
    np.testing.assert_allclose(rows_of(got, 1), want, rtol=0, atol=2e-6 if dtype == np.float32 else 1e-13)


@every_shape
def test_L2_the_network_chooses_mean_and_standard_deviation(shape):
    """gamma and beta start at 1 and 0; z~ then has whatever mean (beta) and standard deviation (gamma) is wanted."""
    z, _ = data(shape)
    bn = cybn.BatchNorm(6, eps=1e-12)
    assert (bn.weight == 1).all()
    assert (bn.bias == 0).all()
    rows = rows_of(bn(z), 1)
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(rows.std(1), 1, rtol=1e-9)
    bn.weight[:], bn.bias[:] = np.arange(1, 7), np.arange(-3, 3)
    rows = rows_of(bn(z), 1)
    np.testing.assert_allclose(rows.mean(1), np.arange(-3, 3), atol=1e-12)
    np.testing.assert_allclose(rows.std(1), np.arange(1, 7), rtol=1e-9)


@every_shape
@dtypes
def test_L3_the_identity_is_among_the_choices(shape, dtype):
    """With gamma = sqrt(sigma^2 + eps) and beta = mu the four equations are the identity."""
    z, _ = data(shape, dtype)
    moments = cybn.batch_norm_stats(z)
    gamma, beta = 1 / moments.invstd(), moments.mean
    got = cybn.batch_norm(z, None, None, gamma, beta, training=True)
    np.testing.assert_allclose(got, z, rtol=0, atol=np.abs(z).max() * (4e-7 if dtype == np.float32 else 1e-15))


@every_shape
@dtypes
@pytest.mark.parametrize("value", [0, 1, -1e6, 0.1])
@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_L4_a_constant_feature_stays_finite(shape, dtype, value, eps):
    """The small positive term (textbook: 1e-8) keeps a constant feature finite and avoids the undefined gradient of
    sqrt at 0.
    """
    z, g = data(shape, dtype)
    z[:, 2] = value
    y, mean, invstd = cybn.batch_norm_forward(z, eps=eps)
    dx, dw, db = cybn.batch_norm_backward(g, z, mean, invstd)
    assert not y[:, 2].any()
    assert dw[2] == 0
    for array in (y, mean, invstd, dx, dw, db):
        assert np.isfinite(array).all()
    # Not merely finite: of a constant feature only the mean is taken from the gradient.
    rows = rows_of(g, 1)[2].astype(np.float64)
    want = (rows - rows.mean()) / np.sqrt(eps)
    np.testing.assert_allclose(rows_of(dx, 1)[2], want, atol=np.abs(want).max() * 1e-6)


@every_shape
@dtypes
def test_L6_a_bias_before_is_redundant(shape, dtype):
    """Any constant added to z is subtracted again: the bias b is redundant, drop it; beta takes its place."""
    rng = np.random.default_rng(1)
    # Integers, so that adding the constant is exact and the two results may be compared without rounding of the input.
    z = rng.integers(-100, 100, shape).astype(dtype)
    b = rng.integers(-1000, 1000, 6).astype(dtype)
    shifted = z + b.reshape(6, *[1] * (len(shape) - 2))
    y, y_shifted = (cybn.batch_norm(a, None, None, training=True) for a in (z, shifted))
    np.testing.assert_allclose(y_shifted, y, rtol=0, atol=3e-7 if dtype == np.float32 else 1e-13)
    # And b would learn nothing: its gradient, the sum of dx over the batch, is 0.
    g = rng.normal(size=shape).astype(dtype)
    _, mean, invstd = cybn.batch_norm_forward(z)
    dx, *_ = cybn.batch_norm_backward(g, z, mean, invstd)
    sums = rows_of(dx.astype(np.float64), 1).sum(1)
    np.testing.assert_allclose(sums, 0, atol=np.abs(dx).sum() * (1e-7 if dtype == np.float32 else 1e-15))


@every_shape
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_L8_the_gradient_neither_raises_the_mean_nor_the_deviation(shape, axis):
    """Gradients flow through mu and sigma: per channel, sum dx = 0 and sum dx * x_norm = 0 (eps -> 0)."""
    z, g = data(shape)
    g += 5  # a gradient that does ask for a larger mean
    _, mean, invstd = cybn.batch_norm_forward(z, eps=1e-30, axis=axis)
    dx, *_ = cybn.batch_norm_backward(g, z, mean, invstd, axis=axis)
    rows, normal = rows_of(dx, axis), (rows_of(z, axis) - mean[:, None]) * invstd[:, None]
    assert np.abs(rows).sum(1).min() > 0.1
    size = np.abs(rows).sum(1).max()
    np.testing.assert_allclose(rows.sum(1), 0, atol=1e-14 * size)
    np.testing.assert_allclose((rows * normal).sum(1), 0, atol=1e-14 * size)
    # With the statistics taken as constants it does both.
    frozen = rows_of(cybn.batch_norm_backward(g, z, mean, invstd, training=False, axis=axis)[0], axis)
    assert np.abs(frozen.sum(1)).min() > 1


@dtypes
def test_L9_every_location_of_a_feature_map_shares_its_statistics(dtype):
    """In a convolutional network every spatial location of a feature map shares the same mu and sigma."""
    z, _ = data((8, 6, 9, 7), dtype)
    maps = np.ascontiguousarray(z.transpose(0, 2, 3, 1))
    as_features = cybn.batch_norm(maps.reshape(-1, 6), None, None, training=True).reshape(maps.shape)
    as_maps = cybn.batch_norm(z, None, None, training=True).transpose(0, 2, 3, 1)
    channels_last = cybn.batch_norm(maps, None, None, training=True, axis=-1)
    assert channels_last.tobytes() == as_features.tobytes()
    np.testing.assert_allclose(as_maps, as_features, rtol=0, atol=1e-6 if dtype == np.float32 else 1e-13)
    assert cybn.batch_norm_stats(z).mean.shape == (6,)


@every_shape
@pytest.mark.parametrize("training", [True, False])
def test_L10_one_example_depends_on_all_others(shape, training):
    """One training example of a batch now depends on all others: change z1 and z2, z3 change too. Not at test time."""
    z, _ = data(shape)
    bn = cybn.BatchNorm(6).train(training)
    before = bn(z)
    z[0] += 1
    after = bn(z)
    assert (after[0] != before[0]).any()
    assert all((after[i] != before[i]).any() for i in range(1, len(z))) is training
    assert (after[1:] == before[1:]).all() is np.bool_(not training)


def test_L11_weighted_averages_over_the_mini_batches():
    """At test time: exponentially weighted averages of mu and sigma^2 kept over the mini-batches (factor 0.1 in
    PyTorch); or one pass over the whole training set; either works.
    """
    z, _ = data((64, 6))
    batches = np.split(z, 8)
    bn = cybn.BatchNorm(6, dtype=np.float64)
    mean, var = np.zeros(6), np.ones(6)
    for batch in batches:
        bn(batch)
        mean = 0.9 * mean + 0.1 * batch.mean(0)
        var = 0.9 * var + 0.1 * batch.var(0, ddof=1)
    np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(bn.running_var, var, rtol=1e-13)
    first, *others = map(cybn.batch_norm_stats, batches)
    whole = first.merge(*others)
    np.testing.assert_allclose(whole.mean, z.mean(0), rtol=1e-13)
    np.testing.assert_allclose(whole.var(), z.var(0), rtol=1e-13)


@dtypes
def test_L12_one_example_at_a_time(dtype):
    """An online service handles one example at a time: no batch is waited for. Its result is the one within a batch."""
    z, _ = data((9, 6, 5), dtype)
    bn = cybn.BatchNorm(6)
    bn(z)
    bn.eval()
    together = bn(z)
    for i in range(len(z)):
        assert bn(z[i : i + 1]).tobytes() == together[i : i + 1].tobytes()


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1), (1, 6, 1, 1), (1, 6, 1, 1, 1)], ids=str)
def test_L13_a_batch_of_one_has_no_variance(shape):
    """A batch of one has no variance: training needs a batch that is large enough to stand for the corpus."""
    bn = cybn.BatchNorm(6)
    x = np.ones(shape, np.float32)
    message = f"Expected more than 1 value per channel when training, got input shape {shape}"
    with raises(ValueError, message, bn.running_mean, bn.running_var):
        bn(x)
    assert bn.num_batches_tracked == 0
    assert bn.eval()(x).shape == shape


def test_L13_the_error_of_the_statistics_falls_with_the_batch():
    """The mean of m examples is off by about sigma / sqrt(m)."""
    z = np.random.default_rng(0).normal(size=(4096, 1, 50))
    errors = []
    for m in (4, 64, 1024):
        batches = z[:, 0].reshape(-1, m, 50)
        errors.append(np.sqrt(np.mean([cybn.batch_norm_stats(batch).mean ** 2 for batch in batches])) * np.sqrt(m))
    np.testing.assert_allclose(errors, 1, rtol=0.2)


def test_L14_one_line():
    """In a framework all of this is one line."""
    z, _ = data((32, 6))
    y = cybn.batch_norm(z, None, None, training=True)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-12)
