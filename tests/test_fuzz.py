"""Hostile arguments: every call gives what it gives for a clean copy, or a TypeError or ValueError that names one.

A disguise is an object that stands for an array; what a `fine` one stands for must be computed with, a `wrong` one must
be refused, and a refusal changes nothing. Memory errors show under `make sanitize`, which runs these tests too.
"""

import contextlib
import inspect
import math
import numbers
import re
import tempfile
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FUNCTIONS,
    WITH_OUT,
    HasArray,
    HasDLPack,
    assert_like_reference,
    bits,
    call,
    every_variant,
    outcome,
    place,
    places,
    problem,
    problems,
)

import cybn

ACTIVATED = [name for name, function in FUNCTIONS.items() if "activation" in inspect.signature(function).parameters]
NAMES = {name for function in FUNCTIONS.values() for name in inspect.signature(function).parameters}
few = settings(max_examples=min(settings().max_examples, 20))
TENSORS = ("x", "grad_output", "residual", "output")
RUNNING = ("running_mean", "running_var")


# ------------------------------------------------------------------------------------------------------------ disguises


class Hostile(np.ndarray):
    """A subclass with which nothing works but to look at its memory."""

    armed = False

    def refuse(self, *_, **__):
        if Hostile.armed:
            raise ZeroDivisionError("hostile")

    def __array_finalize__(self, _):
        self.refuse()

    __array_ufunc__ = __array_function__ = __getitem__ = __len__ = __iter__ = __eq__ = __bool__ = refuse
    __hash__ = None
    shape = property(refuse)
    dtype = property(refuse)
    ndim = property(refuse)


class Interface:
    def __init__(self, a):
        self.a = a  # keeps the memory
        self.__array_interface__ = a.__array_interface__


class Struct:
    def __init__(self, a):
        self.a = a
        self.__array_struct__ = a.__array_struct__


def mapped(a):
    with tempfile.TemporaryFile() as file:
        file.write(a.tobytes() or b"\0")
        file.flush()
        return np.memmap(file, a.dtype, "r", shape=a.shape)


FINE = {
    "itself": lambda a: a,
    "hostile subclass": lambda a: a.view(Hostile),
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "recarray": lambda a: a.view(np.recarray),
    "memmap": lambda a: mapped(a) if a.flags.c_contiguous else a,
    "buffer": memoryview,
    "__array__": HasArray,
    "__dlpack__": lambda a: HasDLPack(a) if a.flags.writeable and np.all(np.mod(a.strides, a.itemsize) == 0) else a,
    "__array_interface__": Interface,
    "__array_struct__": Struct,
    # A list is float64 and has no shape where it is empty.
    "list": lambda a: a.tolist() if a.dtype == np.float64 and a.size and a.flags.c_contiguous else a,
}


class Rubbish:
    """An object whose attribute `name` is, or returns, or raises `value`."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __getattr__(self, name):
        if name != self.name:
            raise AttributeError(name)
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class Raises:
    def __init__(self, error):
        self.error = error

    def fail(self, *_, **__):
        raise self.error

    __array__ = __float__ = __index__ = __bool__ = __eq__ = fail
    __hash__ = None


numbers.Real.register(Raises)
ERRORS = (
    KeyError("k"),
    ZeroDivisionError(),
    OverflowError("o"),
    AttributeError("a"),
    RecursionError(),
    StopIteration(),
)

WRONG = {
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    **{
        dtype: lambda a, dtype=dtype: np.zeros(a.shape, dtype)
        for dtype in ("f2", "g", "F", "D", "O", "i4", "u1", "S3", "U2", "M8[s]", "m8[s]", "V4", "f4,f4", "(2,)f4,i1")
    },
    "masked": np.ma.masked_array,
    "one axis more": lambda a: a[..., None],
    "one side longer": lambda a: np.zeros((*a.shape[:-1], a.shape[-1] + 1), a.dtype),
    "0-d": lambda a: a.dtype.type(1),
    "huge": lambda a: np.broadcast_to(a.dtype.type(1), (2**31 + 5, 2**20, *a.shape[2:]) if a.size else (2**50,)),
    "64 axes": lambda a: np.zeros((1,) * 64, a.dtype),
    "text": lambda a: "1",
    "bytes": lambda a: a.tobytes(),
    "set": lambda a: {1.0},
    "dict": lambda a: {0: 1.0},
    "ragged": lambda a: [[1.0], [1.0, 2.0]],
    "type": lambda a: np.ndarray,
    "generator": lambda a: (x for x in (1.0,)),
    "__array__ of a list": lambda a: Rubbish("__array__", lambda *_, **__: [1.0]),
    "__array__ that cannot be called": lambda a: Rubbish("__array__", 3),
    "__dlpack__ of a number": lambda a: Rubbish("__dlpack__", lambda **_: 1),
    "__array_interface__ of rubbish": lambda a: Rubbish("__array_interface__", {"shape": (-1,), "typestr": "<f4"}),
    "__array_struct__ of rubbish": lambda a: Rubbish("__array_struct__", "rubbish"),
    **{f"__array__ raises {error!r}": lambda a, error=error: Raises(error) for error in ERRORS},
    **{
        f"{name} raises {error!r}": lambda a, name=name, error=error: Rubbish(name, error)
        for name in ("__array__", "__dlpack__", "__array_interface__", "__array_struct__")
        for error in ERRORS
    },
}

SHAPES = ("one axis more", "one side longer", "64 axes", "huge")


def overlapping(values):
    """An array whose rows lie over each other, and over the end of itself."""
    steps = [values.itemsize * (1 + d % 2) for d in range(values.ndim)]
    extent = sum((side - 1) * step for side, step in zip(values.shape, steps, strict=True)) // values.itemsize + 1
    memory = np.resize(values.ravel(), max(extent, 1))
    return np.lib.stride_tricks.as_strided(memory, values.shape, steps, writeable=False)


def thin(values):
    """Stride 0 along the first axis and the last."""
    part = values[:1, ..., :1] if values.ndim > 1 else values[:1]
    return np.broadcast_to(part, values.shape) if values.size else values


# ---------------------------------------------------------------------------------------------------------------- calls


def clean(value):
    return np.array(value, order="K", copy=True) if isinstance(value, np.ndarray) else value


def snapshot(arguments):
    """The bytes of every plain array, and of those that the disguises were made of."""
    return {key: value.tobytes() for key, value in arguments.items() if isinstance(value, np.ndarray)}


def refused(function):
    """Call; return the result, or None after a refusal that is one."""
    Hostile.armed = True
    try:
        return function()
    except Exception as caught:
        error = caught
    finally:
        Hostile.armed = False
    if not (isinstance(error, MemoryError) and "statistics of" in str(error)):  # of so many channels
        assert type(error) in (TypeError, ValueError), repr(error)
        assert set(re.findall(r"\w+", str(error))) & NAMES or "per channel when training" in str(error), repr(error)
    return None


def extended(data, name, drawn):
    """The arguments of `drawn`, and some of those that are not needed."""
    p = dict(drawn.arguments)
    known = inspect.signature(FUNCTIONS[name]).parameters
    x, axis = p["x"], p["axis"]
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed"))
    for key in ("weight", "bias"):
        if data.draw(st.integers(0, 3), label=f"without {key}") == 0:
            p[key] = None
    for key in ("residual", "output"):
        if key in known and data.draw(st.booleans(), label=key):
            p[key] = rng.normal(size=x.shape).astype(x.dtype)
    rest = np.delete(x.shape, axis)
    weights = data.draw(st.sampled_from([None, None, "mask", "sample_weight"]), label="weights")
    if weights in known:
        keep = rng.random(rest) < 0.7
        keep.flat[:2] = True
        p[weights] = keep if weights == "mask" else np.where(keep, rng.uniform(0.5, 2, rest), 0).astype(x.dtype)
    if "activation" in known:
        p["activation"] = data.draw(st.sampled_from([None, "relu", "leaky_relu"]), label="activation")
    if "return_grad_residual" in known:
        p["return_grad_residual"] = data.draw(st.booleans(), label="return_grad_residual")
    p["num_threads"] = data.draw(st.sampled_from([None, 1, 2, 10**30]), label="num_threads")
    return {key: value for key, value in p.items() if key in known}


def reshaped(data, p):
    """Arrays that lie in memory as no allocator would have it."""
    for key, value in p.items():
        if isinstance(value, np.ndarray) and key not in RUNNING and value.dtype != bool:
            how = data.draw(st.sampled_from(["as it is", "placed", "overlapping", "thin"]), label=key)
            if how == "placed":
                value = place(value, **data.draw(places(value.ndim, value.itemsize)))
            elif how != "as it is" and key in ("x", "grad_output", "residual"):
                value = {"overlapping": overlapping, "thin": thin}[how](value)
            if how != "as it is":
                p[key] = value
    return p


@every_variant
@few
@given(drawn=problems(min_count=2, max_size=600), data=st.data())
def test_disguised_arrays_give_what_clean_copies_give(name, training, drawn, data):
    p = reshaped(data, extended(data, name, drawn))
    arrays = [key for key, value in p.items() if isinstance(value, np.ndarray) and not (training and key in RUNNING)]
    disguised = data.draw(st.sets(st.sampled_from(arrays), max_size=3))
    kinds = {key: data.draw(st.sampled_from(list(FINE)), label=key) for key in sorted(disguised)}
    given_as = p | {key: FINE[kind](p[key]) for key, kind in kinds.items()}
    given_as |= {key: p[key].copy() for key in RUNNING if training and key in p}
    state = {key: given_as[key] for key in RUNNING if training and key in p}
    before = snapshot(p)
    Hostile.armed = True
    try:
        result = call(name, given_as, training)
    finally:
        Hostile.armed = False
    *want, want_mean, want_var = outcome(
        name, {key: clean(value) for key, value in (drawn.arguments | p).items()}, training
    )
    got = result if isinstance(result, tuple) else (result,)
    assert bits(map(np.asarray, got)) == bits(want)
    if state:
        assert bits(state.values()) == bits([want_mean, want_var])
    assert snapshot(p) == before


@every_variant
@few
@given(drawn=problems(min_count=2, max_size=600, dtypes=[np.float64]), data=st.data())
def test_hostile_memory_gives_what_the_reference_gives(name, training, drawn, data):
    p = reshaped(data, drawn.arguments | {key: drawn.arguments[key].copy() for key in RUNNING})
    # Statistics that fit the x that there is now.
    count, mean, m2 = cybn.reference.batch_norm_stats(np.array(p["x"]), axis=p["axis"])
    p["mean"] = p["save_mean"] = mean
    p["invstd"] = p["save_invstd"] = 1 / np.sqrt(m2 / count + 1e-5)
    # (Sums over constants cancel; how far is test_kernels' matter.)
    if np.all(m2 > 1e-3):
        assert_like_reference(name, training, p)


@every_variant
@few
@given(drawn=problems(min_count=2, max_size=600), data=st.data())
def test_what_is_no_array_is_refused(name, training, drawn, data):
    p = extended(data, name, drawn)
    arrays = sorted(key for key, value in p.items() if isinstance(value, np.ndarray))
    victim = data.draw(st.sampled_from(arrays), label="victim")
    kind = data.draw(st.sampled_from(list(WRONG)), label="kind")
    wrong = WRONG[kind](p[victim])
    if name == "batch_norm_stats" and victim == "x" and kind in SHAPES:
        return  # as good as any other array
    if name in WITH_OUT:
        p["out"] = np.full_like(p["x"], 7)
    before = snapshot(p)
    result = refused(lambda: call(name, p | {victim: wrong}, training))
    # A mask may have fewer axes, and without an activation nobody looks at its output.
    taken = (
        kind in ("0-d", "byte-swapped")
        if victim in ("mask", "sample_weight")
        else victim == "output" and p["activation"] is None
    )
    assert result is None or taken
    assert result is not None or snapshot(p) == before


ANYTHING = st.sampled_from(
    [math.nan, math.inf, -math.inf, -1, 0, 1, 2, 10**30, -(10**30), 10**400, 0.5, 1e-320, True, None, "1", b"1", 1j]
    + [
        np.float32(0.5),
        np.float64(math.nan),
        np.longdouble("1e4000"),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.bool_(True),
    ]
    + [np.array(0.5), np.array([0.5]), np.array([0.5, 1]), np.ma.masked, np.datetime64(1, "s"), Fraction(1, 3)]
    + [Fraction(10**400), [], {}, object(), "relu", "zero", np.str_("relu"), np.array(["relu", "zero"])]
    + [Raises(error) for error in ERRORS]
)


@every_variant
@few
@given(drawn=problems(min_count=2, max_size=200), data=st.data())
def test_scalars_may_be_anything(name, training, drawn, data):
    p = extended(data, name, drawn)
    if training is not None:
        p["training"] = training
    known = inspect.signature(FUNCTIONS[name]).parameters
    scalars = sorted(key for key in known if key not in {*TENSORS, "out"} and not isinstance(p.get(key), np.ndarray))
    scalars = [key for key in scalars if "mean" not in key and "var" not in key]
    victim = data.draw(st.sampled_from(scalars), label="victim")
    value = data.draw(ANYTHING, label="value")
    if victim == "num_threads" and isinstance(value, Raises):
        return  # operator.index passes on what the object raises
    if name in WITH_OUT:
        p["out"] = np.full_like(p["x"], 7)
    before = snapshot(p)
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        result = refused(lambda: call(name, p | {victim: value}))
    assert result is not None or snapshot(p) == before


# ------------------------------------------------------------------------------------------------------------------ out


def shifted(a):
    """Half over `a`: the memory of both."""
    memory = np.empty(a.size + 1, a.dtype)
    memory[:-1] = a.ravel()
    return memory[:-1].reshape(a.shape), memory[1:].reshape(a.shape)


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize("victim", ["x", "grad_output", "residual", "output"])
@few
@given(drawn=problems(min_count=2, max_size=600))
def test_out_that_overlaps_is_refused(name, victim, drawn):
    p = dict(drawn.arguments)
    if victim not in inspect.signature(FUNCTIONS[name]).parameters:
        return
    p |= {"activation": "relu"} if victim == "output" else {}
    p[victim], p["out"] = shifted(p.get(victim, p["x"]))
    before = snapshot(p)
    result = refused(lambda: call(name, p))
    assert (result is None) == (p["x"].size > 1)
    assert result is not None or snapshot(p) == before


OUT = {
    **WRONG,
    "read-only": lambda a: mapped(a),
    "stride 0": lambda a: np.lib.stride_tricks.as_strided(a.copy(), a.shape, (0,) * a.ndim),
    "list": lambda a: a.tolist(),
}


@pytest.mark.parametrize("name", WITH_OUT)
@few
@given(drawn=problems(min_count=2, max_size=600), kind=st.sampled_from(list(OUT)))
def test_out_that_cannot_be_written_to_is_refused(name, drawn, kind):
    p = drawn.arguments
    out = OUT[kind](p["x"])
    before = snapshot(p)
    result = refused(lambda: call(name, p, out=out))
    assert result is None or p["x"].size <= 1
    assert snapshot(p) == before or result is not None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_read_to_the_end_must_not_be_written_over(dtype):
    """Weights, and the running statistics among each other."""
    p = problem((64, 1, 33), dtype=dtype)
    w = np.random.default_rng(1).uniform(0.5, 2, (64, 33)).astype(dtype)
    before = w.tobytes()
    for name in ("batch_norm", "batch_norm_forward", "batch_norm_backward", "batch_norm_backward_apply"):
        training = None if name == "batch_norm_backward_apply" else True
        with pytest.raises(ValueError, match="out must share no memory with sample_weight"):
            call(name, p, training, sample_weight=w, out=w[:, None])
    both = np.ones(4, dtype)
    x = np.random.default_rng(2).normal(size=(8, 3)).astype(dtype)
    message = "running_mean must share no memory with running_var, got overlapping arrays"
    for pair in ((both[:3], both[1:]), (both[:3], both[:3])):
        with pytest.raises(ValueError, match=message):
            cybn.batch_norm(x, *pair, training=True)
        cybn.batch_norm(x, *pair)
    with pytest.raises(ValueError, match="out must share no memory with running_mean"):
        cybn.batch_norm(x, x[0], both[:3], training=True, out=x)
    one = np.lib.stride_tricks.as_strided(both, (3,), (0,))
    with pytest.raises(ValueError, match="running_mean must not overlap itself"):
        cybn.batch_norm(x, one, both[:3], training=True)
    assert (both == 1).all()
    assert w.tobytes() == before


# ------------------------------------------------------------------------------------------------------ other code runs


class Meddles:
    """Any kind of argument; looking at it runs `meddle` first."""

    def __init__(self, value, meddle):
        self.value, self.meddle = value, meddle

    def __array__(self, dtype=None, copy=None):
        self.meddle()
        return self.value

    def __float__(self):
        self.meddle()
        return float(self.value)

    def __index__(self):
        self.meddle()
        return int(self.value)

    def __bool__(self):
        self.meddle()
        return bool(self.value)


numbers.Real.register(Meddles)

MEDDLING = {
    "flattened": lambda a: setattr(a, "shape", (a.size,)),
    "more axes": lambda a: setattr(a, "shape", (1,) * 60 + a.shape),
    "freed": lambda a: a.resize(0, refcheck=False),
    "shorter": lambda a: a.resize((a.shape[0] - 1, *a.shape[1:]), refcheck=False),
    "longer": lambda a: a.resize((a.shape[0] + 9, *a.shape[1:]), refcheck=False),
    "transposed": lambda a: setattr(a, "shape", a.shape[::-1]),
    "bytes": lambda a: setattr(a, "dtype", np.uint8),
    "structured": lambda a: setattr(a, "dtype", "V1"),
    "read-only": lambda a: a.setflags(write=False),
    "NaN": lambda a: a.fill(np.nan),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, about setting shape and dtype
@every_variant
@few
@given(
    data=st.data(),
    how=st.sampled_from(list(MEDDLING)),
    shape=st.sampled_from([(5, 3, 4), (40, 3, 70), (2, 1, 9)]),
)
def test_arguments_that_change_others_during_the_call(name, training, data, how, shape):
    """The result is anybody's guess, but no other memory is touched, and an error is one of ours."""
    p = problem(shape, dtype=data.draw(st.sampled_from([np.float32, np.float64])))
    known = inspect.signature(FUNCTIONS[name]).parameters
    p |= {"residual": p["x"] + 1, "sample_weight": np.ones((shape[0], shape[2]), p["x"].dtype)}
    p |= {"output": p["x"] * 2, "out": np.zeros_like(p["x"]), "training": bool(training), "activation": "relu"}
    p |= {"eps": 1e-5, "momentum": 0.5, "negative_slope": 0.1, "correction": 1, "return_grad_residual": True}
    p |= {"num_threads": 2}
    p = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in p.items() if key in known}
    for key in ("out", "sample_weight", "residual", "output"):
        if key in p and data.draw(st.booleans(), label=f"without {key}"):
            del p[key]
    victim = data.draw(st.sampled_from(sorted(k for k, v in p.items() if isinstance(v, np.ndarray))), label="victim")
    through = data.draw(st.sampled_from(sorted(k for k in p if k not in (victim, "activation"))), label="through")

    def meddle():
        # (What NumPy does not allow, as another dtype for memory that is not dense.)
        with contextlib.suppress(AttributeError, ValueError, TypeError):
            MEDDLING[how](p[victim])

    with np.errstate(all="ignore"):
        refused(lambda: call(name, p | {through: Meddles(p[through], meddle)}))


# ------------------------------------------------------------------------------------------------------------- extremes


@every_variant
@few
@given(data=st.data(), ndim=st.integers(33, 64))
def test_more_than_32_axes(name, training, data, ndim):
    sides = data.draw(st.lists(st.sampled_from([2, 3]), min_size=1, max_size=7))
    where = sorted(data.draw(st.sets(st.integers(0, ndim - 1), min_size=len(sides), max_size=len(sides))))
    shape = np.ones(ndim, int)
    shape[where] = sides
    axis = data.draw(st.integers(-ndim, ndim - 1))
    if math.prod(sides) // shape[axis] > 1:
        assert_like_reference(name, training, problem(tuple(shape), axis, np.float64))


def test_sizes_that_bytes_cannot_count():
    """17 doubles for each of so many channels are a few when the product is taken modulo 2**64."""
    for channels in (2**64 // 136 + 1, 2**64 // (17 * 8 + 40 * 8) + 1, 2**59):
        for rows in (0, 1):
            x = np.broadcast_to(np.float32(1), (rows, channels))
            with pytest.raises(MemoryError, match=f"statistics of {channels} channels"):
                cybn.batch_norm_stats(x)
    wide = np.broadcast_to(np.float32(1), (2, 2**50, 3))
    with pytest.raises(ValueError, match="out must have the shape of x"):
        cybn.batch_norm(wide, None, None, training=True, axis=2, out=np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="grad_output must have the dtype of x"):
        cybn.batch_norm_backward_reduce(np.zeros(3), wide, np.zeros(3), axis=2)


# --------------------------------------------------------------------------------------------------------------- layers


def state_of(layer):
    arrays = (layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.grad_weight, layer.grad_bias)
    return [a if a is None else a.tobytes() for a in arrays] + [layer.num_batches_tracked, layer.training, layer._saved]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
@few
@given(drawn=problems(min_count=2, max_size=600), data=st.data())
def test_a_refused_pass_of_a_layer_changes_nothing(training, in_place, drawn, data):
    x, axis = drawn.arguments["x"], drawn.arguments["axis"]
    if x.size == 0:
        return
    layer = cybn.BatchNorm(x.shape[axis], axis=axis, in_place=in_place).train(training)
    kept = x.copy(order="K")
    layer(kept, save_for_backward=True)
    before, output = state_of(layer), kept.tobytes()
    kind = data.draw(st.sampled_from(list(WRONG)), label="kind")
    victim = data.draw(st.sampled_from(["x", "residual", "mask", "sample_weight", "out"]), label="victim")
    # What is no array for x is none for a mask or weights, but fewer axes are.
    if not (victim == "x" and kind in SHAPES) and not (
        victim in ("mask", "sample_weight") and kind in ("0-d", "byte-swapped")
    ):
        wrong = WRONG[kind](x)
        given_as = {"x": wrong} if victim == "x" else {"x": x, victim: wrong}
        assert refused(lambda: layer(**given_as)) is None
        assert state_of(layer) == before
    assert refused(lambda: layer.backward(WRONG[kind](x))) is None
    assert refused(lambda: layer.backward(np.ones_like(x), out=WRONG[kind](x))) is None
    assert (state_of(layer), kept.tobytes()) == (before, output)
    assert layer.backward(np.ones_like(x)).shape == x.shape


@few
@given(data=st.data())
def test_arguments_of_a_layer_may_be_anything(data):
    names = sorted(set(inspect.signature(cybn.BatchNorm).parameters) - {"num_features"})
    victim = data.draw(st.sampled_from([*names, "num_features"]), label="victim")
    value = data.draw(ANYTHING, label="value")
    NAMES.update(names, ["num_features"])
    with np.errstate(all="ignore"):
        refused(lambda: cybn.BatchNorm(**{"num_features": 3, victim: value}))
