"""What the stateless functions compute, whatever the shape; and that they agree with each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    DTYPES,
    FUNCTIONS,
    WITH_OUT,
    assert_like_reference,
    bits,
    call,
    dtypes,
    every_protocol,
    every_variant,
    outcome,
    problem,
    problems,
    rows_of,
    skip_where_views_cannot_be_written_to,
)

import cybn

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = [(6, 3), (3, 6, 5), (2, 5, 9, 9), (2, 3, 4, 5, 6), (40, 7, 70), (1, 4, 2), (300, 17)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
DOUBLES = ("mean", "invstd", "save_mean", "save_invstd", "sum_dy", "sum_dy_xmu")


@every_variant
@given(drawn=problems(min_count=2, max_size=3000))
def test_functions_compute_what_the_reference_computes(name, training, drawn):
    assert_like_reference(name, training, drawn.arguments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_forward"])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("eps", [1e-3, 1e-8])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_options_mean_what_they_mean_in_the_reference(name, training, momentum, eps, correction):
    assert_like_reference(
        name, training, problem((9, 4, 6), dtype=np.float64), momentum=momentum, eps=eps, correction=correction
    )


@dtypes
@every_variant
def test_parameters_may_be_missing(name, training, dtype):
    p = problem((9, 4, 6), dtype=dtype)
    p["weight"] = None
    assert_like_reference(name, training, p)
    if "bias" in p:
        p["bias"] = None
        assert_like_reference(name, training, p)


# -------------------------------------------------------------------------------------------------------------- results


@every_shape
@dtypes
@every_variant
def test_results_have_their_dtypes_and_shapes(name, training, dtype, shape):
    p = problem(shape, dtype=dtype)
    result = call(name, p, training)
    results = result if isinstance(result, tuple) else (result,)
    vector, x_like, double = ((shape[1],), dtype), (shape, dtype), ((shape[1],), np.float64)
    want = {
        "batch_norm": [x_like],
        "batch_norm_forward": [x_like, double, double],
        "batch_norm_backward": [x_like, vector, vector],
        "batch_norm_stats": [None, double, double],
        "batch_norm_apply": [x_like],
        "batch_norm_backward_reduce": [double, double],
        "batch_norm_backward_apply": [x_like],
    }[name]
    if name == "batch_norm_stats":
        assert type(result) is cybn.Moments
        assert type(result.count) is int
    for got, expected in zip(results, want, strict=True):
        if expected is not None:
            assert type(got) is np.ndarray
            assert (got.shape, got.dtype) == expected
            assert got.flags.writeable
            assert got.flags.owndata


@pytest.mark.parametrize("of_vectors", DTYPES)
@dtypes
@every_variant
def test_vectors_may_be_of_either_dtype(name, training, dtype, of_vectors):
    """Vectors that are representable in both must give the same bits from both."""
    p = problem((30, 5, 8), dtype=dtype)
    single = {k: v.astype(np.float32) for k, v in p.items() if isinstance(v, np.ndarray) and v.ndim == 1}
    given_as = p | {k: v.astype(of_vectors) for k, v in single.items()}
    got, want = outcome(name, given_as, training), outcome(name, p | single, training)
    for a, b in zip(got, want, strict=True):
        if (name == "batch_norm_backward" and a.shape == (5,)) or a is got[-1] or a is got[-2]:
            # grad_weight and grad_bias have weight's dtype, running statistics their own.
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            assert bits([a]) == bits([b])
    if name == "batch_norm_backward":
        assert got[1].dtype == got[2].dtype == of_vectors
    assert got[-1].dtype == got[-2].dtype == of_vectors


@dtypes
def test_gradients_of_parameters_have_the_dtype_of_x_without_weight(dtype):
    p = problem((30, 5, 8), dtype=dtype)
    _, grad_weight, grad_bias = call("batch_norm_backward", p | {"weight": None})
    assert grad_weight.dtype == grad_bias.dtype == dtype


def test_double_parameters_are_not_rounded_first():
    """A weight of 1 + 1e-9 shows in the float64 gradient, so it was not read as float32."""
    p = problem((30, 5), dtype=np.float64)
    y = [cybn.batch_norm(p["x"], None, None, np.full(5, w), training=True) for w in (1.0, 1 + 1e-9)]
    np.testing.assert_allclose(y[1] / y[0] - 1, 1e-9, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("of_running", DTYPES)
@dtypes
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_forward"])
@pytest.mark.parametrize("momentum", [0, 0.1, 0.7, 1])
@pytest.mark.parametrize("correction", [0, 1])
def test_running_statistics_are_updated_in_place(name, dtype, of_running, momentum, correction):
    p = problem((8, 3, 5), dtype=dtype)
    rows = rows_of(p["x"].astype(np.float64), 1)
    mean, var = (p[k].astype(of_running) for k in ("running_mean", "running_var"))
    before = mean.astype(np.float64), var.astype(np.float64)
    FUNCTIONS[name](p["x"], mean, var, training=True, momentum=momentum, correction=correction)
    rtol = 1e-6 if np.float32 in (dtype, of_running) else 1e-14
    np.testing.assert_allclose(mean, (1 - momentum) * before[0] + momentum * rows.mean(1), rtol=rtol)
    np.testing.assert_allclose(var, (1 - momentum) * before[1] + momentum * rows.var(1, ddof=correction), rtol=rtol)
    if momentum == 0:
        assert np.array_equal(mean, before[0])
        assert np.array_equal(var, before[1])


def test_running_statistics_may_be_views():
    """Strided, in any memory: what lies between is left alone."""
    p = problem((8, 3, 5))
    memory = np.full((3, 4), 7.0, np.float32)
    memory[:, 1], memory[::-1, 2] = p["running_mean"], p["running_var"]
    cybn.batch_norm(p["x"], memory[:, 1], memory[::-1, 2], training=True)
    cybn.batch_norm(p["x"], p["running_mean"], p["running_var"], training=True)
    assert bits([memory[:, 1], memory[::-1, 2]]) == bits([p["running_mean"], p["running_var"]])
    assert (memory[:, [0, 3]] == 7).all()


@every_variant
def test_only_training_updates_running_statistics(name, training):
    p = problem((8, 3, 5))
    *_, mean, var = outcome(name, p, training)
    updates = training and name in ("batch_norm", "batch_norm_forward")
    assert np.array_equal(mean, p["running_mean"]) is not updates
    assert np.array_equal(var, p["running_var"]) is not updates


def test_training_ignores_the_values_of_running_statistics():
    p = problem((8, 3, 5))
    y = cybn.batch_norm(p["x"], None, None, p["weight"], p["bias"], True)
    assert bits([call("batch_norm", p, True)]) == bits([y])


def test_evaluation_uses_running_statistics_and_returns_them():
    p = problem((8, 3, 5), dtype=np.float64)
    y, mean, invstd = call("batch_norm_forward", p, False)
    assert np.array_equal(mean, p["running_mean"])
    np.testing.assert_allclose(invstd, 1 / np.sqrt(p["running_var"] + 1e-5), rtol=1e-15)
    want = (rows_of(p["x"], 1).T - mean) * invstd * p["weight"] + p["bias"]
    np.testing.assert_allclose(rows_of(y, 1).T, want, rtol=1e-13, atol=1e-13)


def test_evaluation_does_not_write_to_read_only_running_statistics():
    p = problem((8, 3, 5))
    for name in ("running_mean", "running_var"):
        p[name].flags.writeable = False
    call("batch_norm", p, False)


def test_evaluation_takes_one_value_per_channel():
    p = problem((1, 3))
    assert call("batch_norm", p, False).shape == (1, 3)


@dtypes
def test_evaluation_without_eps_gives_the_bias_where_the_variance_is_zero(dtype):
    bias = np.array([1.5, -2], dtype)
    y = cybn.batch_norm(np.ones((3, 2), dtype), np.ones(2, dtype), np.zeros(2, dtype), None, bias, eps=0)
    assert np.array_equal(y, np.broadcast_to(bias, (3, 2)))


# ------------------------------------------------------------------------------------------------------- the same thing


@pytest.mark.parametrize("training", [True, False])
@given(drawn=problems(min_count=2))
def test_both_forward_functions_give_the_same_bits(training, drawn):
    y, *state = outcome("batch_norm", drawn.arguments, training)
    z, _, _, *state_too = outcome("batch_norm_forward", drawn.arguments, training)
    assert bits([y, *state]) == bits([z, *state_too])


@given(drawn=problems(min_count=2), eps=st.sampled_from([1e-5, 1e-3, 1e-8]))
def test_the_halves_make_the_whole_forward(drawn, eps):
    p = drawn.arguments
    y, mean, invstd = call("batch_norm_forward", p, True, eps=eps)
    moments = call("batch_norm_stats", p)
    assert moments.count == drawn.count
    assert bits([moments.mean, moments.invstd(eps)]) == bits([mean, invstd])
    z = call("batch_norm_apply", p | {"mean": moments.mean, "invstd": moments.invstd(eps)})
    assert bits([z]) == bits([y])


@given(drawn=problems(min_count=1))
def test_the_halves_make_the_whole_backward(drawn):
    p = drawn.arguments
    dx, grad_weight, grad_bias = call("batch_norm_backward", p, True)
    sum_dy, sum_dy_xmu = call("batch_norm_backward_reduce", p)
    dtype = p["weight"].dtype
    assert bits([grad_bias]) == bits([sum_dy.astype(dtype)])
    assert bits([grad_weight]) == bits([(sum_dy_xmu * p["save_invstd"]).astype(dtype)])
    again = call("batch_norm_backward_apply", p | {"sum_dy": sum_dy, "sum_dy_xmu": sum_dy_xmu, "count": drawn.count})
    assert bits([again]) == bits([dx])


@given(drawn=problems(min_count=1))
def test_frozen_gradients_are_the_linear_part(drawn):
    """Statistics that are constants: y is linear in x, and both modes agree on the parameters."""
    p = drawn.arguments
    frozen, trained = call("batch_norm_backward", p, False), call("batch_norm_backward", p, True)
    assert bits(frozen[1:]) == bits(trained[1:])
    shape = [1] * p["x"].ndim
    shape[p["axis"]] = -1
    want = p["grad_output"] * (p["weight"] * p["save_invstd"]).reshape(shape)
    np.testing.assert_allclose(frozen[0], want, rtol=1e-6 if p["x"].dtype == np.float32 else 1e-14)


def test_a_batch_in_parts_is_the_whole_batch():
    """What synchronized batch normalization does with the halves, over three parts."""
    p = problem((30, 4, 20), dtype=np.float64)
    cuts = [slice(0, 7), slice(7, 8), slice(8, 30)]
    first, *others = (cybn.batch_norm_stats(p["x"][cut]) for cut in cuts)
    moments = first.merge(*others)
    y, mean, invstd = cybn.batch_norm_forward(p["x"], weight=p["weight"], bias=p["bias"])
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(moments.invstd(), invstd, rtol=1e-14)
    parts = [cybn.batch_norm_apply(p["x"][cut], mean, invstd, p["weight"], p["bias"]) for cut in cuts]
    assert bits([np.concatenate(parts)]) == bits([y])
    sums = [cybn.batch_norm_backward_reduce(p["grad_output"][cut], p["x"][cut], mean) for cut in cuts]
    sum_dy, sum_dy_xmu = np.sum(sums, axis=0)
    parts = [
        cybn.batch_norm_backward_apply(
            p["grad_output"][cut], p["x"][cut], mean, invstd, p["weight"], sum_dy, sum_dy_xmu, moments.count
        )
        for cut in cuts
    ]
    dx, grad_weight, grad_bias = cybn.batch_norm_backward(p["grad_output"], p["x"], mean, invstd, p["weight"])
    np.testing.assert_allclose(np.concatenate(parts), dx, rtol=0, atol=1e-14)
    np.testing.assert_allclose(sum_dy_xmu * invstd, grad_weight, rtol=1e-13)
    np.testing.assert_allclose(sum_dy, grad_bias, rtol=1e-13)


# ---------------------------------------------------------------------------------------------------------------- empty


@dtypes
@every_variant
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4), (5, 3, 0), (5, 3, 0, 2), (0, 3, 0), (0, 1), (4, 0), (0, 0), (4, 0, 2)]
)
def test_an_empty_batch_gives_empty_results_and_updates_nothing(name, training, shape, dtype):
    p = problem(shape, dtype=dtype)
    p |= {"save_mean": np.ones(shape[1]), "save_invstd": np.ones(shape[1])}
    result = call(name, p, training)
    *results, mean, var = outcome(name, p, training)
    assert bits([mean, var]) == bits([p["running_mean"], p["running_var"]])
    for array in results:
        if array.ndim > 1:
            assert array.shape == shape
            assert array.dtype == dtype
    if name == "batch_norm_stats":
        assert result.count == 0
    if name == "batch_norm_forward" and not training:
        assert np.array_equal(result[1], p["running_mean"])
    elif name in ("batch_norm_stats", "batch_norm_forward", "batch_norm_backward", "batch_norm_backward_reduce"):
        for vector in results:
            if vector.shape == (shape[1],) and vector.ndim == 1:
                assert not vector.any()


# --------------------------------------------------------------------------------------------------------------- inputs


@every_protocol
@dtypes
@every_variant
def test_arrays_may_be_anything_numpy_can_view(name, training, dtype, wrap):
    if training:
        skip_where_views_cannot_be_written_to(wrap)
    p = problem((6, 3, 10), dtype=dtype)
    wrapped = {k: wrap(v) if isinstance(v, np.ndarray) else v for k, v in p.items()}
    state = {k: p[k].copy() for k in ("running_mean", "running_var")}
    got = call(name, wrapped | {k: wrap(v) for k, v in state.items()}, training)
    *want, mean, var = outcome(name, p, training)
    got = got if isinstance(got, tuple) else (got,)
    assert bits([np.asarray(a) for a in got]) == bits(want)
    # Updated where they are, not in a copy.
    assert bits(state.values()) == bits([mean, var])


@every_protocol
@pytest.mark.parametrize("name", WITH_OUT)
def test_out_may_be_anything_numpy_can_view(name, wrap):
    skip_where_views_cannot_be_written_to(wrap)
    p = problem((6, 3, 10))
    out = np.zeros_like(p["x"])
    want, *_ = outcome(name, p)
    result = call(name, p, out=wrap(out))
    y = result[0] if isinstance(result, tuple) else result
    assert np.shares_memory(y, out)
    assert bits([out]) == bits([want])


def test_lists_and_subclasses_are_arrays():
    class Sub(np.ndarray):
        pass

    x = np.arange(12.0).reshape(4, 3)
    want = cybn.batch_norm(x, None, None, training=True)
    for same in (x.tolist(), x.view(Sub)):
        y = cybn.batch_norm(same, None, None, training=True)
        assert type(y) is np.ndarray
        assert bits([y]) == bits([want])
    y = cybn.batch_norm(x, None, None, [1.0, 2.0, 3.0], (1.0, 0.0, 0.0), training=True)
    np.testing.assert_allclose(y, want * [1, 2, 3] + [1, 0, 0], rtol=1e-14)


@every_variant
def test_inputs_are_left_as_they_are(name, training):
    p = problem((30, 5, 80))
    before = {k: v.tobytes() for k, v in p.items() if isinstance(v, np.ndarray)}
    outcome(name, p, training)
    assert {k: v.tobytes() for k, v in p.items() if isinstance(v, np.ndarray)} == before


def test_any_axis_may_hold_the_channels():
    x = np.random.default_rng(0).normal(size=(4, 5, 6))
    for axis in range(-3, 3):
        want = np.moveaxis(cybn.batch_norm(np.moveaxis(x, axis, 1), None, None, training=True), 1, axis)
        np.testing.assert_allclose(cybn.batch_norm(x, None, None, training=True, axis=axis), want, atol=1e-13)
        assert cybn.batch_norm_stats(x, axis=axis).mean.shape == (x.shape[axis],)
    # Anything that is an integer.
    assert cybn.batch_norm_stats(x, axis=np.int8(-1)).mean.shape == (6,)


def test_numbers_may_be_numpys():
    p = problem((6, 3, 10))
    want = cybn.batch_norm(p["x"], None, None, training=True, momentum=0.5, eps=0.25)
    got = cybn.batch_norm(p["x"], None, None, training=np.True_, momentum=np.float16(0.5), eps=np.array(0.25))
    assert bits([got]) == bits([want])
