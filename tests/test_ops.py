"""Every refusal, word for word, and that a refused call changes nothing."""

import inspect

import numpy as np
import pytest
from support import (
    FUNCTIONS,
    TRAINABLE,
    WITH_OUT,
    HasArray,
    call,
    dtypes,
    every_variant,
    outcome,
    problem,
    raises,
)

import cybn

TENSORS = ("x", "grad_output")
VECTORS = (
    "running_mean", "running_var", "weight", "bias", "save_mean", "save_invstd", "mean", "invstd", "sum_dy",
    "sum_dy_xmu",
)  # fmt: skip


def taking(*names, among=FUNCTIONS):
    """(function, argument) for each function that has one of these arguments."""
    pairs = [(f, a) for f in among for a in names if a in inspect.signature(FUNCTIONS[f]).parameters]
    return pytest.mark.parametrize(("name", "argument"), pairs, ids=[f"{f}-{a}" for f, a in pairs])


@pytest.fixture
def p():
    return problem((6, 3, 10))


def refuse(kind, message, name, p, training=None, **changes):
    """The call must raise exactly this, and leave all its arrays, `out` and the running statistics as they are."""
    if name in WITH_OUT:
        changes.setdefault("out", np.full_like(p["x"], 7))
    if name in TRAINABLE and training is None:
        training = True
    arrays = [a for a in (p | changes).values() if isinstance(a, np.ndarray) and a.dtype != object]
    with raises(kind, message, *arrays):
        call(name, p, training, **changes)


# --------------------------------------------------------------------------------------------------------------- dtypes


def wrong_dtypes(a):
    return {
        "an array of int64": a.astype(np.int64),
        "an array of int32": a.astype(np.int32),
        "an array of uint8": np.ones(a.shape, np.uint8),
        "an array of bool": a > 0,
        "an array of float16": a.astype(np.float16),
        "an array of complex64": a.astype(np.complex64),
        "an array of complex128": a.astype(np.complex128),
        "an array of object": a.astype(object),
        "an array of <U4": np.full(a.shape, "text"),
        "a byte-swapped array of >f4": a.astype(">f4"),
        "a byte-swapped array of >f8": a.astype(">f8"),
    }


@pytest.mark.parametrize("kind", wrong_dtypes(np.ones(1)))
@taking(*TENSORS, *VECTORS)
def test_arrays_that_are_not_float32_or_float64(name, argument, kind, p):
    wrong = wrong_dtypes(p[argument])[kind]
    refuse(TypeError, f"{argument} must be a float32 or float64 array, got {kind}", name, p, **{argument: wrong})


@taking(*TENSORS, *VECTORS)
def test_long_doubles(name, argument, p):
    wrong = p[argument].astype(np.longdouble)
    if wrong.dtype == np.float64:
        pytest.skip("long double is double here")
    message = f"{argument} must be a float32 or float64 array, got an array of {wrong.dtype}"
    refuse(TypeError, message, name, p, **{argument: wrong})


@taking(*TENSORS, *VECTORS)
def test_masked_arrays(name, argument, p):
    wrong = np.ma.masked_array(p[argument], mask=False)
    message = f"{argument} must be a float32 or float64 array, got a masked array (its mask would be lost)"
    refuse(TypeError, message, name, p, **{argument: wrong})


@taking(*TENSORS, *(v for v in VECTORS if v not in ("weight", "bias", "running_mean", "running_var")))
def test_none_where_an_array_is_needed(name, argument, p):
    if (name, argument) == ("batch_norm_backward_reduce", "invstd"):
        pytest.skip("needed with an activation only: test_extras.py")
    refuse(TypeError, f"{argument} must be a float32 or float64 array, got NoneType", name, p, **{argument: None})


@pytest.mark.parametrize(
    ("wrong", "got"),
    [(object(), "object"), ({}, "dict"), ("text", "an array of <U4"), ([True], "an array of bool")],
    ids=["object", "dict", "str", "list"],
)
@taking("x", "weight")
def test_things_that_are_not_arrays(name, argument, wrong, got, p):
    message = f"{argument} must be a float32 or float64 array, got {got}"
    refuse(TypeError, message, name, p, **{argument: wrong})


@taking("x", "weight")
def test_ragged_lists(name, argument, p):
    with pytest.raises(TypeError, match=rf"^{argument} must be a float32 or float64 array, got list \(.*\)$"):
        call(name, p, True if name in TRAINABLE else None, **{argument: [[1.0], [1.0, 2.0]]})


@taking("x", "weight", "out")
def test_arrays_on_another_device(name, argument, p):
    class Elsewhere:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **options):
            raise BufferError("not on the CPU")

    training = True if name in TRAINABLE else None
    with pytest.raises(TypeError, match=rf"^{argument} must be .+, got Elsewhere( \(not on the CPU\))?$"):
        call(name, p, training, **{argument: Elsewhere()})


@dtypes
@taking("grad_output")
def test_gradients_of_another_dtype_than_x(name, argument, dtype):
    p = problem((6, 3, 10), dtype=dtype)
    other = np.float64 if dtype == np.float32 else np.float32
    message = f"grad_output must have the dtype of x, {np.dtype(dtype)}, got {np.dtype(other)}"
    refuse(TypeError, message, name, p, grad_output=p["grad_output"].astype(other))


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", [(), (2,), (4,), (0,), (3, 1), (1, 3), (1, 3, 1)], ids=str)
@taking(*VECTORS)
def test_vectors_of_a_wrong_shape(name, argument, shape, p):
    message = f"{argument} must have shape (3,), one value per channel, got shape {shape}"
    refuse(ValueError, message, name, p, **{argument: np.ones(shape, np.float32)})


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 9), (6, 3, 10, 1), (3, 6, 10), (1, 3, 10), ()], ids=str)
@taking("grad_output")
def test_gradients_of_another_shape_than_x(name, argument, shape, p):
    message = f"grad_output must have the shape of x, (6, 3, 10), got {shape}"
    refuse(ValueError, message, name, p, grad_output=np.ones(shape, np.float32))


@pytest.mark.parametrize("axis", [3, -4, 100, 2**70])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_axes_that_x_does_not_have(name, axis, p):
    message = f"x must have an axis {axis} for the channels, got shape (6, 3, 10)"
    refuse(ValueError, message, name, p, axis=axis)


def test_axis_of_x_without_axes():
    with raises(ValueError, "x must have an axis 1 for the channels, got shape ()"):
        cybn.batch_norm_stats(np.float32(1))
    with raises(ValueError, "x must have an axis 1 for the channels, got shape (3,)"):
        cybn.batch_norm_stats(np.ones(3))


@pytest.mark.parametrize("axis", [None, 1.0, "1", True, np.True_, (1,)], ids=repr)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_axes_that_are_not_integers(name, axis, p):
    refuse(TypeError, f"axis must be an integer, got {axis!r}", name, p, axis=axis)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_forward"])
def test_one_value_per_channel(name, shape):
    message = f"Expected more than 1 value per channel when training, got input shape {shape}"
    refuse(ValueError, message, name, problem(shape), True)


# -------------------------------------------------------------------------------------------------------------- numbers

FORWARD = pytest.mark.parametrize("name", ["batch_norm", "batch_norm_forward"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("argument", ["momentum", "eps", "correction"])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [(None, "NoneType"), ("1", "str"), (True, "bool"), (1j, "complex"), ([0.1], "list"), (np.True_, "bool")],
    ids=["None", "str", "bool", "complex", "list", "numpy bool"],
)
@FORWARD
def test_numbers_that_are_not_real(name, argument, wrong, got, training, p):
    refuse(TypeError, f"{argument} must be a real number, got {got}", name, p, training, **{argument: wrong})


@pytest.mark.parametrize("argument", ["momentum", "eps", "correction"])
@pytest.mark.parametrize("wrong", [np.ones(2), np.ones((1, 1)), np.array("1"), np.array(True), np.array(1j)], ids=repr)
@FORWARD
def test_numbers_that_are_arrays_of_something_else(name, argument, wrong, p):
    """Whatever stands after "got": the argument and the expectation must be named."""
    with pytest.raises(TypeError, match=rf"^{argument} must be a real number, got .+$"):
        call(name, p, True, **{argument: wrong})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [-1e-9, -1.0, np.inf, -np.inf, np.nan])
@FORWARD
def test_eps_out_of_range(name, eps, training, p):
    refuse(ValueError, f"eps must be a finite number and not negative, got {eps}", name, p, training, eps=eps)


@FORWARD
def test_eps_of_zero_when_training(name, p):
    refuse(ValueError, "eps must be positive when training, got 0.0", name, p, True, eps=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [-0.1, 1.0000001, np.nan, np.inf])
@FORWARD
def test_momentum_out_of_range(name, momentum, training, p):
    message = f"momentum must be between 0 and 1, got {momentum}"
    refuse(ValueError, message, name, p, training, momentum=momentum)


@pytest.mark.parametrize("correction", [-1, 2, 0.5, np.nan])
@FORWARD
def test_correction_out_of_range(name, correction, p):
    refuse(ValueError, f"correction must be 0 or 1, got {correction}", name, p, True, correction=correction)


@pytest.mark.parametrize("count", [0, -1, np.nan, np.inf])
def test_count_out_of_range(count, p):
    message = f"count must be a positive number of values per channel, got {count}"
    refuse(ValueError, message, "batch_norm_backward_apply", p, count=count)


@pytest.mark.parametrize(("wrong", "got"), [(None, "NoneType"), ("6", "str"), (True, "bool")])
def test_count_that_is_not_a_number(wrong, got, p):
    refuse(TypeError, f"count must be a real number, got {got}", "batch_norm_backward_apply", p, count=wrong)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (0, ValueError, "num_threads must be at least 1, got 0"),
        (-3, ValueError, "num_threads must be at least 1, got -3"),
        (1.0, TypeError, "num_threads must be an integer, got 1.0"),
        ("2", TypeError, "num_threads must be an integer, got '2'"),
        (True, TypeError, "num_threads must be an integer, got True"),
    ],
)
@every_variant
def test_num_threads(name, training, wrong, kind, message, p):
    refuse(kind, message, name, p, training, num_threads=wrong)


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("given", "missing"), [("running_mean", "running_var"), ("running_var", "running_mean")])
@FORWARD
def test_half_of_the_running_statistics(name, given, missing, training, p):
    message = f"running_mean and running_var must be given together, got only {given}"
    refuse(ValueError, message, name, p, training, **{missing: None})


@FORWARD
def test_no_running_statistics_in_evaluation(name, p):
    message = "running_mean and running_var must be given when not training, got None"
    refuse(ValueError, message, name, p, False, running_mean=None, running_var=None)


@pytest.mark.parametrize("training", [True, False])
@FORWARD
def test_negative_running_var(name, training, p):
    p["running_var"][1] = -0.5
    refuse(ValueError, "running_var must not be negative, got -0.5 in channel 1", name, p, training)


@taking("invstd", "save_invstd")
def test_negative_invstd(name, argument, p):
    p[argument][2] = -0.25
    refuse(ValueError, f"{argument} must not be negative, got -0.25 in channel 2", name, p)


@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
@FORWARD
def test_read_only_running_statistics_when_training(name, argument, p):
    p[argument].flags.writeable = False
    refuse(ValueError, f"{argument} must be writeable when training, got a read-only array", name, p, True)


@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
@FORWARD
def test_running_statistics_that_would_have_to_be_copied_when_training(name, argument, p):
    """A copy would be updated and thrown away."""
    message = f"{argument} must be viewable as an array without a copy, got list"
    refuse(TypeError, message, name, p, True, **{argument: p[argument].tolist()})


# ------------------------------------------------------------------------------------------------------------------ out

every_out = pytest.mark.parametrize("name", WITH_OUT)


@every_out
def test_out_of_another_dtype(name, p):
    out = np.zeros((6, 3, 10))
    refuse(TypeError, "out must have the dtype of x, float32, got float64", name, p, out=out)
    out = np.zeros((6, 3, 10), int)
    refuse(TypeError, f"out must be a float32 or float64 array, got an array of {out.dtype}", name, p, out=out)
    out = np.zeros((6, 3, 10), ">f4")
    refuse(TypeError, "out must be a float32 or float64 array, got a byte-swapped array of >f4", name, p, out=out)
    out = np.ma.zeros((6, 3, 10), np.float32)
    message = "out must be a float32 or float64 array, got a masked array (its mask would be lost)"
    refuse(TypeError, message, name, p, out=out)


@every_out
@pytest.mark.parametrize("shape", [(6, 3), (3, 6, 10), (6, 3, 11), (6, 3, 10, 1)], ids=str)
def test_out_of_another_shape(name, shape, p):
    message = f"out must have the shape of x, (6, 3, 10), got {shape}"
    refuse(ValueError, message, name, p, out=np.zeros(shape, np.float32))


@every_out
def test_read_only_out(name, p):
    out = np.zeros((6, 3, 10), np.float32)
    out.flags.writeable = False
    refuse(ValueError, "out must be writeable, got a read-only array", name, p, out=out)
    refuse(ValueError, "out must be writeable, got a read-only array", name, p, out=memoryview(out))


@every_out
def test_out_that_would_be_a_copy(name, p):
    class Copying(HasArray):
        def __array__(self, dtype=None, copy=None):
            if copy is False:
                raise ValueError("cannot avoid a copy")
            return self.a.copy()

    out = Copying(np.zeros((6, 3, 10), np.float32))
    message = "out must be viewable as an array without a copy, got Copying"
    refuse(TypeError, message, name, p, out=out)
    message = "out must be viewable as an array without a copy, got list"
    refuse(TypeError, message, name, p, out=p["x"].tolist())


@every_out
def test_out_that_overlaps_itself(name, p):
    out = np.lib.stride_tricks.as_strided(np.zeros(100, np.float32), (6, 3, 10), (4, 4, 12))
    message = "out must not overlap itself, got strides (4, 4, 12) for shape (6, 3, 10)"
    refuse(ValueError, message, name, p, out=out)
    out = np.lib.stride_tricks.as_strided(np.zeros(100, np.float32), (6, 3, 10), (40, 0, 4))
    message = "out must not overlap itself, got strides (40, 0, 4) for shape (6, 3, 10)"
    refuse(ValueError, message, name, p, out=out)


def cut_overlaps(x):
    """Arrays of x's shape that share some of x's memory but not all, or all of it in another order."""
    memory = np.zeros((x.shape[0] + 1, *x.shape[1:]), x.dtype)
    memory[:-1] = x
    return {
        "shifted": (memory[:-1], memory[1:]),
        "reversed": (memory[:-1], memory[:-1][::-1]),
        "reversed inside": (memory[:-1], memory[:-1, :, ::-1]),
    }


@pytest.mark.parametrize("kind", ["shifted", "reversed", "reversed inside"])
@taking(*TENSORS, among=WITH_OUT)
def test_out_that_partly_overlaps_an_input(name, argument, kind, p):
    a, out = cut_overlaps(p[argument])[kind]
    message = f"out must be {argument} itself or share no memory with it, got a partly overlapping array"
    refuse(ValueError, message, name, p, **{argument: a, "out": out})


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_between_the_elements_of_the_input_is_allowed(name, p):
    memory = np.empty((6, 3, 20), np.float32)
    memory[..., ::2] = p["x"]
    want, *_ = outcome(name, p)
    call(name, p, x=memory[..., ::2], out=memory[..., 1::2])
    assert memory[..., 1::2].tobytes() == want.tobytes()
    assert memory[..., ::2].tobytes() == p["x"].tobytes()


# -------------------------------------------------------------------------------------------------- all before anything


def test_the_last_check_comes_before_the_first_change(p):
    """Each argument wrong alone, running statistics and out right: nothing is written."""
    wrong = {
        "weight": np.ones(4), "bias": np.ones(4), "eps": -1.0, "momentum": 2.0, "num_threads": 0, "axis": 9,
        "correction": 3, "out": np.zeros(3, np.float32), "running_var": np.full(3, -1.0),
    }  # fmt: skip
    for name in ("batch_norm", "batch_norm_forward"):
        for argument, value in wrong.items():
            given = p | {"out": np.full((6, 3, 10), 7, np.float32), argument: value}
            arrays = [a for a in given.values() if isinstance(a, np.ndarray)]
            before = [a.tobytes() for a in arrays]
            with pytest.raises(ValueError, match=argument):
                call(name, given, True)
            assert [a.tobytes() for a in arrays] == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_by_keyword(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    for option in ("axis", "out", "num_threads", "correction"):
        if option in parameters:
            assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
