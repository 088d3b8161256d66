"""Where arrays lie in memory must not matter: strides, alignment, order, names of the axes, `out`."""

import inspect
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    FUNCTIONS,
    GEOMETRIES,
    VARIANTS,
    WITH_OUT,
    arrange,
    bits,
    call,
    dtypes,
    every_geometry,
    every_variant,
    one_build,
    outcome,
    place,
    places,
    problem,
    problems,
    surroundings,
)

import cybn

pytestmark = pytest.mark.usefixtures("kernels")

every_out = pytest.mark.parametrize("name", WITH_OUT)


def tensors(name):
    return ("x", "grad_output") if "backward" in name else ("x",)


def copied(arguments, *names):
    """The same with these arrays contiguous, their axes in memory as before."""
    return arguments | {name: np.copy(arguments[name], order="K") for name in names}


@every_variant
@given(drawn=problems(min_count=2), data=st.data())
def test_any_place_gives_the_bits_of_a_contiguous_copy(name, training, drawn, data):
    placed = drawn.placed(data, *tensors(name))
    got = outcome(name, placed, training)
    assert bits(got) == bits(outcome(name, copied(placed, *tensors(name)), training))


def vectors_of(name):
    known = inspect.signature(FUNCTIONS[name]).parameters
    return [
        k
        for k in ("weight", "bias", "save_mean", "save_invstd", "mean", "invstd", "sum_dy", "sum_dy_xmu")
        if k in known
    ]


@one_build
@pytest.mark.parametrize(("name", "training"), [variant for variant in VARIANTS if vectors_of(variant[0])])
@given(drawn=problems(min_count=2, max_size=3000), data=st.data())
def test_vectors_may_lie_anywhere(name, training, drawn, data):
    placed = drawn.placed(data, *vectors_of(name))
    assert bits(outcome(name, placed, training)) == bits(outcome(name, drawn.arguments, training))


@every_out
@given(drawn=problems(min_count=2), data=st.data())
def test_out_may_lie_anywhere(name, drawn, data):
    """It gets the bits of a new array, is what is returned, and what lies between its elements stays."""
    p = drawn.placed(data, *tensors(name))
    where = data.draw(places(p["x"].ndim, p["x"].itemsize), label="out")
    out = place(np.zeros(p["x"].shape, p["x"].dtype), **where)
    want, *others = outcome(name, p)
    got, *others_too = outcome(name, p, out=out)
    assert got is out
    assert bits([out, *others]) == bits([want, *others_too])
    assert np.count_nonzero(~np.isnan(surroundings(out, **where))) == out.size


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in WITH_OUT for argument in tensors(name)])
@given(drawn=problems(min_count=2), data=st.data())
def test_out_may_be_an_input(name, argument, drawn, data):
    p = drawn.placed(data, *tensors(name))
    want = outcome(name, p)
    p = p | {argument: place(p[argument], **data.draw(places(p["x"].ndim, p["x"].itemsize), label="out"))}
    if argument == "x":
        want = outcome(name, p)
    got = outcome(name, p, out=p[argument])
    assert got[0] is p[argument]
    assert bits(got) == bits(want)


@every_out
@every_geometry
def test_out_gives_the_bits_of_a_new_array_in_large(name, geometry):
    """In place too, with teams of threads at work."""
    shape, axis, order = geometry
    p = problem(shape, axis, np.float32, order)
    want = bits(outcome(name, p))
    assert bits(outcome(name, p, out=np.empty(shape, np.float32))) == want
    for argument in tensors(name):
        in_place = p | {argument: p[argument].copy(order="K")}
        assert bits(outcome(name, in_place, out=in_place[argument])) == want


@every_variant
@given(drawn=problems(min_count=2), data=st.data())
def test_the_names_of_the_axes_do_not_matter(name, training, drawn, data):
    """The same memory with its axes named in another order: equal bits, transposed."""
    p = drawn.arguments
    ndim = p["x"].ndim
    order = tuple(data.draw(st.permutations(range(ndim))))
    renamed = p | {k: p[k].transpose(order) for k in tensors(name)}
    renamed["axis"] = order.index(p["axis"] % ndim) - data.draw(st.sampled_from([0, ndim]))
    got, want = outcome(name, renamed, training), outcome(name, p, training)
    got = [a.transpose(np.argsort(order)) if a.ndim == ndim > 1 else a for a in got]
    assert bits(got) == bits(want)


@dtypes
def test_channels_last_is_traversed_as_it_lies(dtype):
    last = np.random.default_rng(0).normal(size=(4, 9, 9, 20)).astype(dtype)
    first = last.transpose(0, 3, 1, 2)
    y_last = cybn.batch_norm(last, None, None, training=True, axis=-1)
    y_first = cybn.batch_norm(first, None, None, training=True)
    assert y_first.strides == first.strides
    assert y_last.strides == last.strides
    assert y_first.transpose(0, 2, 3, 1).tobytes() == y_last.tobytes()


@every_out
@given(drawn=problems(min_count=2), data=st.data())
def test_results_have_the_memory_layout_of_x(name, drawn, data):
    p = drawn.placed(data, *tensors(name))
    y = outcome(name, p)[0]
    # As np.copy(x, order="K"): the order of the axes; axes of size 1 have no order.
    want = np.copy(p["x"], order="K")
    assert [s for s, side in zip(y.strides, y.shape, strict=True) if side > 1] == [
        s for s, side in zip(want.strides, want.shape, strict=True) if side > 1
    ]
    assert y.flags.aligned


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
@dtypes
@every_variant
def test_axes_of_stride_zero(name, training, dtype, order):
    """Broadcast input: every axis in turn and all at once."""
    p = problem((6, 5, 70), dtype=dtype, order=order)
    for thin in ((1, 5, 70), (6, 5, 1), (6, 1, 70), (1, 5, 1), (1, 1, 1)):
        part = tuple(slice(side) for side in thin)
        q = p | {k: np.broadcast_to(p[k][part], (6, 5, 70)) for k in tensors(name)}
        assert bits(outcome(name, q, training)) == bits(outcome(name, copied(q, *tensors(name)), training))


@every_variant
@every_geometry
def test_places_in_large(name, training, geometry):
    """Every second element, backwards, off alignment: above the size where teams of threads start."""
    shape, axis, order = geometry
    p = problem(shape, axis, np.float32, order)
    want = bits(outcome(name, p, training, num_threads=2))
    order = order or tuple(range(len(shape)))
    steps = (1,) * (len(shape) - 1) + (2,), (-1,) * len(shape), (2, *(1,) * (len(shape) - 1))
    for step, shift in zip(steps, (0, 0, 1), strict=True):
        q = p | {k: place(p[k], order, step, shift) for k in tensors(name)}
        assert bits(outcome(name, q, training, num_threads=2)) == want


@dtypes
@every_variant
@pytest.mark.parametrize("shape", [(50, 3, 70), (300, 17)], ids=str)
def test_alignment(name, training, shape, dtype):
    p = problem(shape, dtype=dtype)
    want = bits(outcome(name, p, training))
    for shift in range(1, 65):
        q = p | {k: place(p[k], shift=shift) for k in tensors(name)}
        assert bits(outcome(name, q, training)) == want


def test_memory_maps(tmp_path):
    p = problem((20, 5, 70))
    maps = {}
    for name in ("x", "grad_output"):
        path = tmp_path / name
        p[name].tofile(path)
        # 4 bytes in: not even aligned to a cache line; read-only.
        maps[name] = np.memmap(path, np.float32, "r", shape=p[name].shape)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=p["x"].shape)
    for name in WITH_OUT:
        want = outcome(name, p)
        got = outcome(name, p | maps)
        assert type(got[0]) is np.ndarray
        assert bits(got) == bits(want)
        outcome(name, p | maps, out=out)
        out.flush()
        assert np.fromfile(tmp_path / "out", np.float32).tobytes() == want[0].tobytes()


@every_variant
def test_inputs_may_be_one_array(name, training):
    """grad_output may be x itself: both are only read."""
    p = problem((20, 5, 70))
    assert bits(outcome(name, p | {"grad_output": p["x"]}, training)) == bits(
        outcome(name, p | {"grad_output": p["x"].copy()}, training)
    )


def test_many_axes():
    """NumPy's limit."""
    x = np.random.default_rng(0).normal(size=(3, 4) + (1, 2) * 5 + (1,) * 20)
    y = cybn.batch_norm(x, None, None, training=True)
    want = cybn.batch_norm(np.ascontiguousarray(x.reshape(3, 4, 32)), None, None, training=True)
    assert y.shape == x.shape
    assert y.tobytes() == want.tobytes()
    strided = place(x.reshape((3, 4) + (2,) * 5 + (1,) * 20), steps=(2,) * 7 + (1,) * 20)
    assert cybn.batch_norm(strided, None, None, training=True).tobytes() == want.tobytes()


@one_build
@pytest.mark.parametrize(
    ("shape", "strides"), [((65_537, 32_768, 1), (4, 0, 0)), ((32_769, 32_768, 2), (4, 0, 4))], ids=str
)
def test_more_elements_than_an_int_counts(shape, strides):
    """2^31 and some, of a little memory: element i of it stands at x[i, :, 0] and x[i - 1, :, 1]."""
    memory = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    x = np.lib.stride_tricks.as_strided(memory, shape, strides, writeable=False)
    assert x.size > 2**31
    moments = cybn.batch_norm_stats(x, axis=2)
    assert moments.count == shape[0] * shape[1]
    for c in range(shape[2]):
        values = memory[c : c + shape[0]].astype(np.float64)
        np.testing.assert_allclose(
            [moments.mean[c], moments.var()[c]], [values.mean(), values.var()], rtol=0, atol=1e-7
        )


# --------------------------------------------------------------------------------------------------------------- memory


def peak(function):
    """Most bytes that were allocated at once within the call, by NumPy and cybn (which both report to tracemalloc)."""
    function()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = function()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


@one_build
@every_variant
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("steps", [(1, 1, 1), (1, 1, 2), (-1, 2, 1)], ids=str)
def test_no_second_array_is_allocated(name, training, order, steps):
    p = problem((100, 20, 200))
    for tensor in tensors(name):
        p[tensor] = place(p[tensor], order, steps)
    size = p["x"].size * p["x"].itemsize
    small = size // 8
    most, _ = peak(lambda: call(name, p, training))
    result = size if name in WITH_OUT else 0
    assert result <= most < result + small
    if name in WITH_OUT:
        out = np.empty_like(p["x"])
        most, _ = peak(lambda: call(name, p, training, out=out))
        assert most < small


def test_geometries_are_what_they_are_called():
    """GEOMETRIES must stay large enough for teams of seven (128 KB each), in every channel order."""
    for shape, axis, order in GEOMETRIES.values():
        x = arrange(np.empty(shape, np.float32), order)
        assert x.nbytes > 7 * 128 * 1024
        assert x.shape[axis] >= 1
