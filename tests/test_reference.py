"""The reference: checked against the formulas written out for one channel, and the same in form as cybn."""

import ast
import inspect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import dtypes, raises

import cybn
from cybn import reference

FUNCTIONS = [name for name in reference.__all__ if inspect.isfunction(getattr(reference, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_cybn(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(cybn, name))


def test_every_stateless_function_has_its_reference():
    assert set(FUNCTIONS) == {name for name in cybn.__all__ if name.startswith("batch_norm")}
    assert cybn.Moments is reference.Moments
    assert set(reference.__all__) == {*FUNCTIONS, "Moments"}


def test_it_imports_numpy_only():
    tree = ast.parse(inspect.getsource(reference))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"numpy", "typing"}


# ------------------------------------------------------------------------------ the formulas, on lists of Python floats


def by_hand(z, gamma, beta, eps):
    m = len(z)
    mu = math.fsum(z) / m
    var = math.fsum((v - mu) ** 2 for v in z) / m
    z_hat = [(v - mu) / math.sqrt(var + eps) for v in z]
    return mu, var, z_hat, [gamma * v + beta for v in z_hat]


X = np.random.default_rng(0).normal(3, 2, (4, 3, 5))
G = np.random.default_rng(1).normal(size=(4, 3, 5))
WEIGHT, BIAS = np.array([0.5, -1.5, 2.0]), np.array([1.0, 0.0, -3.0])


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("c", range(3))
def test_forward_is_the_four_equations(c):
    running_mean, running_var = np.full(3, 10.0), np.full(3, 20.0)
    y, mean, invstd = reference.batch_norm_forward(
        X, running_mean, running_var, WEIGHT, BIAS, momentum=0.25, eps=1e-3, correction=1
    )
    mu, var, _, want = by_hand(X[:, c].ravel().tolist(), WEIGHT[c], BIAS[c], 1e-3)
    close(y[:, c].ravel(), want)
    close([mean[c], invstd[c]], [mu, 1 / math.sqrt(var + 1e-3)])
    close([running_mean[c], running_var[c]], [0.75 * 10 + 0.25 * mu, 0.75 * 20 + 0.25 * var * 20 / 19])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("c", range(3))
def test_backward_is_the_derivative(c, training):
    """Central differences of the loss sum(g * y), one value at a time."""
    z, g = X[:, c].ravel().tolist(), G[:, c].ravel().tolist()
    mu, var, z_hat, _ = by_hand(z, 1, 0, 1e-5)

    def loss(z, gamma=WEIGHT[c], beta=BIAS[c]):
        hat = by_hand(z, 1, 0, 1e-5)[2] if training else [(v - mu) / math.sqrt(var + 1e-5) for v in z]
        return math.fsum(w * (gamma * v + beta) for w, v in zip(g, hat, strict=True))

    h = 1e-6
    want = [
        (loss([*z[:i], z[i] + h, *z[i + 1 :]]) - loss([*z[:i], z[i] - h, *z[i + 1 :]])) / (2 * h) for i in range(20)
    ]
    _, mean, invstd = reference.batch_norm_forward(X)
    dx, dw, db = reference.batch_norm_backward(G, X, mean, invstd, WEIGHT, training)
    np.testing.assert_allclose(dx[:, c].ravel(), want, atol=1e-8)
    close(dw[c], math.fsum(a * b for a, b in zip(g, z_hat, strict=True)))
    close(db[c], math.fsum(g))


def test_evaluation_uses_what_it_is_given():
    mean, var = np.array([1.0, 2, 3]), np.array([4.0, 5, 6])
    y = reference.batch_norm(X, mean, var, WEIGHT, BIAS, eps=0)
    close(y[:, 1], (X[:, 1] - 2) / math.sqrt(5) * -1.5)
    assert mean.tolist() == [1, 2, 3]


@dtypes
def test_it_computes_in_the_precision_of_its_input(dtype):
    x = X.astype(dtype)
    y, mean, invstd = reference.batch_norm_forward(x, weight=WEIGHT, bias=BIAS)
    assert y.dtype == dtype
    assert mean.dtype == invstd.dtype == np.float64
    dx, dw, db = reference.batch_norm_backward(G.astype(dtype), x, mean, invstd, WEIGHT.astype(np.float32))
    assert (dx.dtype, dw.dtype, db.dtype) == (dtype, np.float32, np.float32)


def test_out_receives_the_result():
    out = np.empty_like(X)
    assert reference.batch_norm(X, None, None, training=True, out=out) is out
    close(out, reference.batch_norm(X, None, None, training=True))


def test_an_empty_batch():
    x = np.empty((0, 3))
    running_mean, running_var = np.ones(3), np.ones(3)
    y, mean, invstd = reference.batch_norm_forward(x, running_mean, running_var)
    assert y.shape == (0, 3)
    assert not mean.any()
    assert not invstd.any()
    assert running_mean.tolist() == running_var.tolist() == [1, 1, 1]
    dx, dw, db = reference.batch_norm_backward(x, x, mean, invstd)
    assert dx.shape == (0, 3)
    assert not dw.any()
    assert not db.any()


# -------------------------------------------------------------------------------------------------------------- moments


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1.0, -1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_moments_are_those_of_the_whole(sizes, offset, seed):
    x = np.random.default_rng(seed).normal(offset, 1, (sum(sizes), 3))
    parts = np.split(x, np.cumsum(sizes)[:-1])
    for module in (cybn, reference):
        first, *others = map(module.batch_norm_stats, parts)
        before = [(m.mean.tobytes(), m.m2.tobytes()) for m in (first, *others)]
        merged = first.merge(*others)
        assert [(m.mean.tobytes(), m.m2.tobytes()) for m in (first, *others)] == before
        assert merged.count == len(x)
        if len(x):
            scale = 1 + abs(offset)
            np.testing.assert_allclose(merged.mean, x.mean(0), rtol=0, atol=1e-12 * scale)
            np.testing.assert_allclose(merged.m2, len(x) * x.var(0), rtol=1e-12 * scale, atol=1e-12)


def test_merging_nothing_and_empty_moments():
    moments, empty = cybn.batch_norm_stats(X), cybn.batch_norm_stats(X[:0])
    for same in (moments.merge(), moments.merge(empty), empty.merge(moments), empty.merge(empty, moments, empty)):
        assert same.count == 20
        assert same.mean.tobytes() == moments.mean.tobytes()
        assert same.m2.tobytes() == moments.m2.tobytes()
    assert empty.merge(empty).count == 0


def test_moments_of_other_channels_are_not_merged():
    for channels in (1, 4):
        other = cybn.batch_norm_stats(np.ones((5, channels)))
        message = f"others must have the shape of the moments that they are merged with, (3,), got ({channels},)"
        with raises(ValueError, message):
            cybn.batch_norm_stats(X).merge(other)


def test_counts_of_four_billion_merge():
    """As an all-reduce returns them, int64: their product does not fit."""
    count = np.int64(4_000_000_000)
    one, two = (cybn.Moments(count, np.array([mean]), np.array([0.0])) for mean in (1.0, 3.0))
    assert one.merge(two).m2.tolist() == [8e9]


def test_merging_is_independent_of_the_order():
    a, b, c = (cybn.batch_norm_stats(x) for x in (X[:1], X[1:3], X[3:]))
    for one, two in ((a.merge(b, c), c.merge(a, b)), (a.merge(b).merge(c), a.merge(b.merge(c)))):
        np.testing.assert_allclose(one.m2, two.m2, rtol=1e-13)
        np.testing.assert_allclose(one.mean, two.mean, rtol=1e-13)


def test_var_and_invstd_of_moments():
    moments = cybn.Moments(4, np.array([1.0, 2.0]), np.array([12.0, 0.0]))
    assert moments.var().tolist() == [3, 0]
    assert moments.var(1).tolist() == [4, 0]
    assert moments.invstd(1.0).tolist() == [0.5, 1]
    # A constant channel without eps is no division by zero.
    assert moments.invstd(0).tolist() == [1 / math.sqrt(3), 0]
    single = cybn.batch_norm_stats(np.ones((1, 2)))
    assert single.var().tolist() == [0, 0]
    assert np.isnan(single.var(1)).all()
    assert np.isnan(cybn.batch_norm_stats(np.ones((0, 2))).var()).all()
