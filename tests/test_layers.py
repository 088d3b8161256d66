"""The layers: state and modes around the functions."""

import copy
import inspect
import pickle
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import bits, dtypes, every_protocol, problem, raises, rows_of

import cybn

pytestmark = pytest.mark.usefixtures("kernels")

LAYERS = {cybn.BatchNorm1d: (2, 3), cybn.BatchNorm2d: (4,), cybn.BatchNorm3d: (5,)}
SHAPE = (6, 3, 10)


@pytest.fixture
def x():
    return problem(SHAPE)["x"]


@pytest.fixture
def g():
    return problem(SHAPE)["grad_output"]


def trained(x, **options):
    """A layer whose parameters and statistics are no longer the initial ones."""
    bn = cybn.BatchNorm(3, **options)
    rng = np.random.default_rng(7)
    for parameter in (bn.weight, bn.bias):
        if parameter is not None:
            parameter[...] = rng.normal(size=3)
    bn(x)
    return bn


def state_bits(bn):
    state = bn.state_dict()
    return list(state), bits(state.values())


# -------------------------------------------------------------------------------------------------------------- initial


@dtypes
def test_initial_state(dtype):
    bn = cybn.BatchNorm(4, dtype=dtype)
    assert (bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, bn.axis) == (
        4,
        1e-5,
        0.1,
        True,
        True,
        1,
    )
    assert bn.dtype == dtype
    assert bn.training
    for array, value in ((bn.weight, 1), (bn.bias, 0), (bn.running_mean, 0), (bn.running_var, 1)):
        assert (array.dtype, array.tolist()) == (dtype, [value] * 4)
    assert bn.num_batches_tracked == 0
    assert bn.grad_weight is bn.grad_bias is None


def test_what_is_left_out_is_none():
    bn = cybn.BatchNorm(4, affine=False)
    assert bn.weight is bn.bias is None
    bn = cybn.BatchNorm(4, bias=False)
    assert bn.weight is not None
    assert bn.bias is None
    assert cybn.BatchNorm(4, affine=False, bias=True).bias is None
    bn = cybn.BatchNorm(4, track_running_stats=False)
    assert bn.running_mean is bn.running_var is bn.num_batches_tracked is None


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"num_features": -2}, ValueError, "num_features must be at least 1, got -2"),
        ({"num_features": 2.0}, TypeError, "num_features must be an integer, got 2.0"),
        ({"num_features": True}, TypeError, "num_features must be an integer, got True"),
        ({"num_features": None}, TypeError, "num_features must be an integer, got None"),
        ({"eps": -1e-5}, ValueError, "eps must be a finite number and not negative, got -1e-05"),
        ({"eps": np.inf}, ValueError, "eps must be a finite number and not negative, got inf"),
        ({"eps": np.nan}, ValueError, "eps must be a finite number and not negative, got nan"),
        ({"eps": None}, TypeError, "eps must be a real number, got NoneType"),
        ({"eps": "1"}, TypeError, "eps must be a real number, got str"),
        ({"momentum": 1.5}, ValueError, "momentum must be between 0 and 1, or None, got 1.5"),
        ({"momentum": -0.5}, ValueError, "momentum must be between 0 and 1, or None, got -0.5"),
        ({"momentum": np.nan}, ValueError, "momentum must be between 0 and 1, or None, got nan"),
        ({"momentum": True}, TypeError, "momentum must be a real number, got bool"),
        ({"axis": 1.0}, TypeError, "axis must be an integer, got 1.0"),
        ({"axis": None}, TypeError, "axis must be an integer, got None"),
        ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64, got float16"),
        ({"dtype": int}, TypeError, "dtype must be float32 or float64, got int64"),
        ({"dtype": ">f4"}, TypeError, "dtype must be float32 or float64, got >f4"),
        ({"dtype": complex}, TypeError, "dtype must be float32 or float64, got complex128"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [cybn.BatchNorm, cybn.BatchNorm2d])
def test_wrong_arguments(layer, arguments, kind, message):
    with raises(kind, message):
        layer(**{"num_features": 3} | arguments)


def test_numbers_may_be_numpys():
    bn = cybn.BatchNorm(np.int32(3), np.float64(1e-3), np.float32(0.5), axis=np.int8(-1), dtype="float64")
    assert (type(bn.num_features), type(bn.eps), type(bn.momentum), type(bn.axis)) == (int, float, float, int)


def test_repr():
    assert repr(cybn.BatchNorm(3)) == (
        "BatchNorm(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, axis=1, dtype=float32, bias=True)"
    )
    bn = cybn.BatchNorm2d(4, 1e-3, None, track_running_stats=False, axis=-1, dtype=np.float64, bias=False)
    text = repr(bn)
    assert text == (
        "BatchNorm2d(4, eps=0.001, momentum=None, affine=True, track_running_stats=False, axis=-1, dtype=float64, "
        "bias=False)"
    )
    assert repr(eval(text, {"float64": np.float64, "BatchNorm2d": cybn.BatchNorm2d})) == text


# ------------------------------------------------------------------------------------------------------------- the pass


@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@dtypes
def test_training_is_the_functions(x, g, dtype, axis, affine, bias):
    channels = SHAPE[axis]
    bn = cybn.BatchNorm(channels, 1e-3, 0.25, affine, axis=axis, bias=bias, dtype=dtype)
    mean, var = np.zeros(channels, dtype), np.ones(channels, dtype)
    for step in range(3):
        y = bn(x + step)
        want, *saved = cybn.batch_norm_forward(
            x + step, mean, var, bn.weight, bn.bias, momentum=0.25, eps=1e-3, axis=axis
        )
        assert bits([y, bn.running_mean, bn.running_var]) == bits([want, mean, var])
        assert bn.num_batches_tracked == step + 1
        dx = bn.backward(g)
        want = cybn.batch_norm_backward(g, x + step, *saved, bn.weight, axis=axis)
        assert bits([dx]) == bits(want[:1])
        assert (bn.grad_weight is None) is (bn.weight is None)
        assert (bn.grad_bias is None) is (bn.bias is None)
        if bn.weight is not None:
            assert bits([bn.grad_weight]) == bits(want[1:2])
        if bn.bias is not None:
            assert bits([bn.grad_bias]) == bits(want[2:])
            bn.bias -= 0.1 * bn.grad_bias


@dtypes
def test_evaluation_is_the_functions(x, g, dtype):
    bn = trained(x, dtype=dtype, eps=1e-3).eval()
    before = state_bits(bn)
    args = bn.running_mean, bn.running_var, bn.weight, bn.bias
    assert bits([bn(x)]) == bits([cybn.batch_norm(x, *args, eps=1e-3)])
    # With what the backward pass of frozen statistics needs.
    y, *saved = cybn.batch_norm_forward(x, *args, training=False, eps=1e-3)
    assert bits([bn.forward(x, save_for_backward=True)]) == bits([y])
    want = cybn.batch_norm_backward(g, x, *saved, bn.weight, training=False)
    assert bits([bn.backward(g), bn.grad_weight, bn.grad_bias]) == bits(want)
    assert state_bits(bn) == before


def test_evaluation_without_running_statistics_takes_the_batchs(x, g):
    bn = cybn.BatchNorm(3, track_running_stats=False)
    want = bn(x), bn.backward(g)
    bn.eval()
    assert bits([bn(x, save_for_backward=True), bn.backward(g)]) == bits(want)
    message = "Expected more than 1 value per channel when training, got input shape (1, 3)"
    with raises(ValueError, message):
        bn(x[:1, :, 0])


def test_momentum_none_is_the_cumulative_average(x):
    bn = cybn.BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [x.astype(np.float64) + step for step in (0, 5, -3, 11)]
    for n, batch in enumerate(batches, 1):
        bn(batch)
        rows = [rows_of(b, 1) for b in batches[:n]]
        np.testing.assert_allclose(bn.running_mean, np.mean([r.mean(1) for r in rows], axis=0), rtol=1e-13)
        np.testing.assert_allclose(bn.running_var, np.mean([r.var(1, ddof=1) for r in rows], axis=0), rtol=1e-13)


def test_momentum_none_without_running_statistics(x):
    bn = cybn.BatchNorm(3, momentum=None, track_running_stats=False)
    assert bits([bn(x)]) == bits([cybn.BatchNorm(3)(x)])


def test_a_call_of_the_wrong_form(x):
    bn = cybn.BatchNorm(3)
    assert inspect.getdoc(bn.__call__) == "See `forward`."
    with raises(TypeError, "__call__() got an unexpected keyword argument 'training'"):
        bn(x, training=True)
    with raises(TypeError, "__call__() takes exactly 1 positional argument (2 given)"):
        bn(x, None)


def test_parameters_keep_their_identity(x, g):
    """An optimizer may hold on to them."""
    bn = cybn.BatchNorm(3)
    arrays = bn.weight, bn.bias, bn.running_mean, bn.running_var
    bn(x)
    bn.backward(g)
    bn.load_state_dict(bn.state_dict())
    bn.reset_parameters()
    assert all(a is b for a, b in zip(arrays, (bn.weight, bn.bias, bn.running_mean, bn.running_var), strict=True))


def test_modes():
    bn = cybn.BatchNorm(3)
    assert bn.eval() is bn
    assert bn.training is False
    assert bn.train() is bn
    assert bn.training is True
    assert bn.train(False).training is False
    assert bn.train(np.True_).training is True


@pytest.mark.parametrize("layer", LAYERS)
def test_an_empty_batch_counts_for_nothing(layer):
    bn = layer(3)
    before = state_bits(bn)
    shape = (0, 3, *(2,) * (LAYERS[layer][0] - 2))
    y = bn(np.empty(shape, np.float32))
    assert y.shape == shape
    assert state_bits(bn) == before
    assert bn.backward(y).shape == shape
    assert not bn.grad_weight.any()
    assert not bn.grad_bias.any()


@every_protocol
def test_inputs_may_be_anything_numpy_can_view(x, g, wrap):
    bn, same = cybn.BatchNorm(3), cybn.BatchNorm(3)
    assert bits([same(wrap(x)), same.backward(wrap(g))]) == bits([bn(x), bn.backward(g)])


def test_out_and_num_threads(x, g):
    bn, out = cybn.BatchNorm(3), np.empty_like(x)
    assert bn(x, out=out, num_threads=2) is out
    assert bits([out]) == bits([cybn.BatchNorm(3)(x)])
    dx = bn.backward(g)
    assert bn.backward(g, out=out, num_threads=2) is out
    assert bits([out]) == bits([dx])
    with raises(ValueError, "num_threads must be at least 1, got 0"):
        bn(x, num_threads=0)
    with raises(ValueError, "num_threads must be at least 1, got 0"):
        bn.backward(g, num_threads=0)


# ------------------------------------------------------------------------------------------------------ before backward

NO_FORWARD = (
    "backward needs a forward before it: call forward(x) in training mode, "
    "or forward(x, save_for_backward=True) in evaluation mode"
)
OVERWRITTEN = "backward needs the input of forward, which out=x has overwritten"


def test_backward_before_forward(g):
    with raises(RuntimeError, NO_FORWARD):
        cybn.BatchNorm(3).backward(g)


@pytest.mark.parametrize("training", [True, False])
def test_backward_when_nothing_was_kept(x, g, training):
    bn = trained(x)
    bn.train(training)(x, save_for_backward=False)
    with raises(RuntimeError, NO_FORWARD):
        bn.backward(g)


def test_evaluation_keeps_nothing(x, g):
    """Not even what a forward before it kept: it would be the gradient of another call."""
    bn = trained(x).eval()
    bn(x)
    with raises(RuntimeError, NO_FORWARD):
        bn.backward(g)


def test_backward_after_out_is_x(x, g):
    bn = cybn.BatchNorm(3)
    want = cybn.BatchNorm(3)(x)
    assert bits([bn(x, out=x)]) == bits([want])
    with raises(RuntimeError, OVERWRITTEN):
        bn.backward(g)


def test_backward_after_out_beside_x(x, g):
    """Interleaved with x, but not x: nothing was overwritten."""
    memory = np.empty((6, 3, 20), np.float32)
    memory[..., ::2] = x
    bn, same = cybn.BatchNorm(3), cybn.BatchNorm(3)
    assert bits([bn(memory[..., ::2], out=memory[..., 1::2])]) == bits([same(x)])
    assert bits([bn.backward(g)]) == bits([same.backward(g)])


def test_backward_may_be_repeated(x, g):
    bn = cybn.BatchNorm(3)
    bn(x)
    assert bits([bn.backward(g), bn.grad_weight]) == bits([bn.backward(g), bn.grad_weight])


def test_backward_sets_new_gradients(x, g):
    """Not written into the old ones, which may be in somebody's hands."""
    bn = cybn.BatchNorm(3)
    bn(x)
    bn.backward(g)
    old = bn.grad_weight
    kept = old.copy()
    bn.backward(2 * g)
    assert bits([old]) == bits([kept])
    np.testing.assert_allclose(bn.grad_weight, 2 * old, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("ndim", range(7))
def test_ranks(layer, ndim):
    bn = layer(3)
    shape = (4, 3, 2, 2, 2, 2)[:ndim]
    x = np.ones(shape, np.float32)
    if ndim in LAYERS[layer]:
        assert bn(x).shape == shape
        return
    expected = {cybn.BatchNorm1d: "2D or 3D", cybn.BatchNorm2d: "4D", cybn.BatchNorm3d: "5D"}[layer]
    with raises(ValueError, f"x must be {expected} for {layer.__name__}, got {ndim}D of shape {shape}"):
        bn(x)
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (np.ones((6, 4), np.float32), ValueError, "x must have 3 channels along axis 1, got 4 in shape (6, 4)"),
        (np.ones((3, 6, 1), np.float32), ValueError, "x must have 3 channels along axis 1, got 6 in shape (3, 6, 1)"),
        (np.ones(3, np.float32), ValueError, "x must have an axis 1 for the channels, got shape (3,)"),
        (np.float32(1), ValueError, "x must have an axis 1 for the channels, got shape ()"),
        (np.ones((6, 3), int), TypeError, "x must be a float32 or float64 array, got an array of int64"),
        (np.ones((6, 3), np.float16), TypeError, "x must be a float32 or float64 array, got an array of float16"),
        (
            np.ma.ones((6, 3), np.float32),
            TypeError,
            "x must be a float32 or float64 array, got a masked array (its mask would be lost)",
        ),
        (None, TypeError, "x must be a float32 or float64 array, got NoneType"),
    ],
    ids=lambda v: str(getattr(v, "shape", "")) if not isinstance(v, str) else "",
)
def test_a_refused_forward_changes_nothing(x, g, wrong, kind, message, training):
    bn = trained(x).train(training)
    before, dx = state_bits(bn), bn.backward(g)
    with raises(kind, message):
        bn(wrong)
    assert state_bits(bn) == before
    # Not even what backward works on.
    assert bits([bn.backward(g)]) == bits([dx])


def test_a_refused_out_changes_nothing(x, g):
    bn = trained(x)
    before, dx = state_bits(bn), bn.backward(g)
    out = np.zeros((6, 3, 9), np.float32)
    with raises(ValueError, "out must have the shape of x, (6, 3, 10), got (6, 3, 9)", out):
        bn(x, out=out)
    assert state_bits(bn) == before
    assert bits([bn.backward(g)]) == bits([dx])


def test_a_refused_backward_changes_nothing(x, g):
    bn = trained(x)
    bn.backward(g)
    gradients = bn.grad_weight, bn.grad_bias
    before = bits(gradients)
    with raises(ValueError, "grad_output must have the shape of x, (6, 3, 10), got (6, 3)"):
        bn.backward(g[..., 0])
    with raises(TypeError, "grad_output must have the dtype of x, float32, got float64"):
        bn.backward(g.astype(np.float64))
    assert bn.grad_weight is gradients[0]
    assert bn.grad_bias is gradients[1]
    assert bits(gradients) == before


def test_eps_of_zero_is_for_evaluation(x):
    bn = cybn.BatchNorm(3, eps=0)
    with raises(ValueError, "eps must be positive when training, got 0.0"):
        bn(x)
    assert bn.num_batches_tracked == 0
    assert bits([bn.eval()(x)]) == bits([x])


def test_one_value_per_channel(x):
    bn = cybn.BatchNorm2d(3)
    message = "Expected more than 1 value per channel when training, got input shape (1, 3, 1, 1)"
    with raises(ValueError, message, bn.running_mean, bn.running_var):
        bn(np.ones((1, 3, 1, 1), np.float32))
    assert bn.num_batches_tracked == 0


# ------------------------------------------------------------------------------------------------------------ the state

OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": np.float64, "momentum": None},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@every_option
def test_state_dict_and_back(x, options):
    bn = trained(x, **options)
    state = bn.state_dict()
    names = []
    if bn.weight is not None:
        names.append("weight")
    if bn.bias is not None:
        names.append("bias")
    if bn.track_running_stats:
        names += ["running_mean", "running_var", "num_batches_tracked"]
        assert state["num_batches_tracked"].dtype == np.int64
        assert state["num_batches_tracked"].shape == ()
        assert state["num_batches_tracked"] == 1
    assert list(state) == names
    other = cybn.BatchNorm(3, **options)
    assert other.load_state_dict(state) is None
    assert state_bits(other) == state_bits(bn)
    assert type(other.num_batches_tracked) is type(bn.num_batches_tracked)
    assert bits([other.eval()(x)]) == bits([bn.eval()(x)])


def test_state_dict_holds_copies(x):
    bn = trained(x)
    before = state_bits(bn)
    state = bn.state_dict()
    for array in state.values():
        array[...] = 9
    assert state_bits(bn) == before
    bn.load_state_dict(state)
    state["weight"][...] = 5
    assert (bn.weight == 9).all()


def test_load_state_dict_takes_what_numpy_can_view(x):
    bn = cybn.BatchNorm(3)
    bn.load_state_dict(
        {
            "weight": [1, 2, 3],
            "bias": np.array([1, 2, 3], np.float16),
            "running_mean": memoryview(np.array([4.0, 5.0, 6.0])),
            "running_var": (1, 2, 3),
            "num_batches_tracked": 12,
        }
    )
    assert bn.weight.tolist() == bn.bias.tolist() == bn.running_var.tolist() == [1, 2, 3]
    assert bn.running_mean.tolist() == [4, 5, 6]
    assert bn.num_batches_tracked == 12
    assert bn.weight.dtype == bn.running_mean.dtype == np.float32


def test_load_state_dict_without_the_counter_keeps_it(x):
    bn = trained(x)
    state = bn.state_dict()
    del state["num_batches_tracked"]
    bn.load_state_dict(state)
    assert bn.num_batches_tracked == 1


ALL = "['bias', 'running_mean', 'running_var', 'weight']"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"bias": ...}, KeyError, f"state must have the names {ALL}, missing ['bias'], unexpected []"),
        ({"gamma": 1}, KeyError, f"state must have the names {ALL}, missing [], unexpected ['gamma']"),
        (
            {"weight": ..., "running_var": ..., "gamma": 1, "beta": 1},
            KeyError,
            f"state must have the names {ALL}, missing ['weight', 'running_var'], unexpected ['gamma', 'beta']",
        ),
        ({"bias": np.ones(4)}, ValueError, "bias must have shape (3,), got shape (4,)"),
        ({"running_var": 1.0}, ValueError, "running_var must have shape (3,), got shape ()"),
        ({"running_var": [1, -0.5, 2]}, ValueError, "running_var must not be negative, got -0.5"),
        ({"bias": ["a", "b", "c"]}, TypeError, "bias must be an array of real numbers, got an array of <U1"),
        ({"bias": [1j, 2, 3]}, TypeError, "bias must be an array of real numbers, got an array of complex128"),
        ({"bias": [True] * 3}, TypeError, "bias must be an array of real numbers, got an array of bool"),
        ({"bias": None}, TypeError, "bias must be an array of real numbers, got an array of object"),
        ({"num_batches_tracked": -1}, ValueError, f"num_batches_tracked must be from 0 to {2**62}, got -1"),
        ({"num_batches_tracked": 2**63}, ValueError, f"num_batches_tracked must be from 0 to {2**62}, got {2**63}"),
        (
            {"bias": np.ma.ones(3)},
            TypeError,
            "bias must be an array of real numbers, got a masked array (its mask would be lost)",
        ),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_load_state_dict_refuses_all_or_nothing(x, changes, kind, message):
    bn = trained(x)
    before = state_bits(bn)
    # Everything else differs from what the layer has.
    state = {name: array + 1 for name, array in bn.state_dict().items()} | changes
    state = {name: value for name, value in state.items() if value is not ...}
    with raises(kind, message):
        bn.load_state_dict(state)
    assert state_bits(bn) == before


def test_a_state_is_a_mapping(x):
    with raises(TypeError, "state must be a mapping of names to arrays, got NoneType"):
        trained(x).load_state_dict(None)


@every_protocol
def test_a_state_may_have_any_array_that_numpy_can_view(x, wrap):
    state = trained(x).state_dict()
    counter = state.pop("num_batches_tracked")
    bn = cybn.BatchNorm(3)
    bn.load_state_dict({name: wrap(array) for name, array in state.items()})
    assert bits(bn.state_dict().values()) == bits([*state.values(), counter * 0])


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_what_cannot_be_written_is_left_alone_with_the_rest(x, name):
    bn = trained(x)
    state = {name: array + 1 for name, array in bn.state_dict().items()}
    before = state_bits(bn)
    getattr(bn, name).flags.writeable = False
    calls = {lambda: bn.load_state_dict(state), bn.reset_parameters}
    for call in calls | ({bn.reset_running_stats} if name.startswith("running") else set()):
        with raises(ValueError, f"{name} of the layer must be a writeable array, got a read-only array"):
            call()
        assert state_bits(bn) == before
    setattr(bn, name, [1.0, 1.0, 1.0])
    with raises(ValueError, f"{name} of the layer must be a writeable array, got list"):
        bn.load_state_dict(state)


def test_backward_into_x_is_the_last_one(x, g):
    """It needs x. (`test_backward_may_be_repeated`: other ones may be.)"""
    bn = cybn.BatchNorm(3)
    bn(x)
    want = bn.backward(g)
    assert bits([bn.backward(g, out=x)]) == bits([want])
    with raises(RuntimeError, "backward needs the input of forward, which out=x has overwritten", x, g):
        bn.backward(g)
    bn(want)
    bn.backward(g)


def test_a_subclass_may_override_forward(x, g):
    class Doubled(cybn.BatchNorm):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    class Again(Doubled):
        pass

    want = cybn.BatchNorm(3)(x)
    for kind in (Doubled, Again):
        assert bits([kind(3)(x)]) == bits([2 * want])
        assert bits([kind(3).forward(x)]) == bits([2 * want])

    class Called(cybn.BatchNorm):
        def __call__(self, x, **options):
            return self.forward(x, **options)

    assert bits([Called(3)(x)]) == bits([want])


SETTINGS = {
    "training": True, "eps": 0.5, "axis": 0, "num_features": 4, "activation": "relu", "in_place": True,
    "track_running_stats": False, "weight": np.full(3, 2.0, np.float32), "bias": np.ones(3, np.float32),
    "running_mean": np.ones(3), "running_var": np.full(3, 9.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_attributes_hold_from_the_next_call_on(x, name):
    """Calls keep what they have read; setting, deleting and `__class__` end that."""

    def outcome(bn):
        given = x.copy()
        try:
            return bits([bn(given), given])
        except Exception as error:
            return repr(error)

    bn, twin = (trained(x).eval() for _ in range(2))
    first, *others = (outcome(bn) for _ in range(4))
    assert others == [first] * 3
    before = getattr(bn, name)
    for layer in (bn, twin):
        setattr(layer, name, SETTINGS[name])
    assert outcome(bn) == outcome(twin) != first
    setattr(bn, name, before)
    bn.training = False
    if name != "training":
        assert outcome(bn) == first
    delattr(bn, name)
    assert outcome(bn) == repr(AttributeError(f"'BatchNorm' object has no attribute '{name}'"))
    setattr(bn, name, before)
    bn.__class__ = cybn.BatchNorm3d
    with raises(ValueError, f"x must be 5D for BatchNorm3d, got {x.ndim}D of shape {x.shape}"):
        bn(x)


@pytest.mark.parametrize("change", ["set", "delete", "in place"])
@pytest.mark.parametrize("name", [*SETTINGS, "momentum"])
def test_attributes_hold_from_the_next_training_pass_on(x, g, name, change):
    """And from the next `backward` on."""

    def outcome(bn, backward_alone=False):
        given = x.copy()
        try:
            result = [] if backward_alone else [bn(given)]
            return bits([*result, bn.backward(g), given, bn.running_mean, bn.running_var, bn.grad_weight, bn.grad_bias])
        except Exception as error:
            return repr(error)

    def alter(bn):
        value = copy.copy(SETTINGS.get(name))
        if change == "delete":
            delattr(bn, name)
        elif change == "in place" and isinstance(value, np.ndarray):
            array = getattr(bn, name)
            array += value
            setattr(bn, name, array)  # as `bn.weight += value` does
        else:
            setattr(bn, name, value)

    bn, twin = (trained(x) for _ in range(2))
    for _ in range(4):
        twin.whatever = 0  # after which nothing is kept
        assert outcome(bn) == outcome(twin)
    for layer in (bn, twin):
        alter(layer)
    twin.whatever = 1
    for alone in (True, False, False, False):
        assert outcome(bn, alone) == outcome(twin, alone)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["momentum", "eps", "training", "axis", "num_features"])
def test_settings_that_can_change_by_themselves_are_read_in_each_call(x, name, training):
    """Arrays of no axes, which are taken as the numbers that they hold."""
    bn, twin = (trained(x).train(training) for _ in range(2))
    setattr(bn, name, np.array(getattr(bn, name)))
    changed = {"momentum": 0.5, "eps": 0.25, "training": not training, "axis": 0, "num_features": 4}[name]

    def outcome(bn):
        try:
            return bits([bn(x), bn.running_mean])
        except ValueError as error:
            return repr(error)

    for _ in range(4):
        assert outcome(bn) == outcome(twin)
    getattr(bn, name)[...] = changed
    setattr(twin, name, changed)
    assert outcome(bn) == outcome(twin)


def test_setting_says_what_holds_whatever_is_kept(x):
    bn = cybn.BatchNorm(3).eval()
    for _ in range(4):
        bn(x)
    kept, other = bn.weight, np.full(3, 2, np.float32)
    want = [bn(x), 2 * bn(x)]
    for value in (other, kept, other):
        vars(bn)["weight"] = value
        bn.weight = value
        assert bits([bn(x)]) == bits([want[value is other]])
    bn.weight = kept
    for _ in range(4):
        bn(x)
    vars(bn)["weight"] = other
    bn.weight = kept
    assert bn.weight is kept
    assert bits([bn(x)]) == bits([want[0]])
    bn.weight = vars(bn).pop("weight")
    assert bits([bn(x)]) == bits([want[0]])


def test_attributes_are_needed_by_what_uses_them_alone(x, g):
    bn, twin = trained(x), trained(x)
    for layer in (bn, twin):
        layer(x)
    for name in ("eps", "momentum", "num_features"):
        delattr(bn, name)
    assert bits([bn.backward(g)]) == bits([twin.backward(g)])
    bn.eps, bn.num_features = twin.eps, 3
    assert bits([bn.eval()(x)]) == bits([twin.eval()(x)])
    bn = cybn.BatchNorm(3, track_running_stats=False)
    del bn.running_mean, bn.running_var
    assert bits([bn(x)]) == bits([cybn.BatchNorm(3)(x)])


def test_a_dictionary_of_another_kind_will_do(x):
    bn, twin = trained(x), trained(x)
    bn.__dict__ = OrderedDict(vars(bn))
    for _ in range(4):
        assert bits([bn(x)]) == bits([twin(x)])


def test_a_pass_that_waits_for_another_one_takes_what_holds_then(x):
    bn, twin = trained(x), trained(x)
    for _ in range(4):
        assert bits([bn(x)]) == bits([twin(x)])
    with ThreadPoolExecutor(1) as pool:
        with bn._lock:
            waiting = pool.submit(bn, x)
            time.sleep(0.1)
            for layer in (bn, twin):
                layer.weight, layer.running_mean, layer.momentum = np.full(3, 2, np.float32), np.ones(3), 0.25
            bn.training = False  # is another matter: it has begun as a training pass
            for _ in range(4):
                bn(x)
        y = waiting.result(timeout=60)
    assert bits([y, bn.running_mean]) == bits([twin(x), twin.running_mean])


@pytest.mark.parametrize("other", [3, None, "layer", object()], ids=lambda other: type(other).__name__)
def test_methods_are_refused_to_what_is_no_layer(x, other):
    for method in (cybn.BatchNorm.forward, cybn.BatchNorm.backward):
        with raises(TypeError, f"self must be a layer of cybn, got {type(other).__name__}"):
            method(other, x)


@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_changes_its_shape_during_the_call_is_refused(training):
    class Reshaping:
        def __index__(self):
            x.shape = (1, 600)
            return 1

    x = np.ones((200, 3), np.float32)
    bn = cybn.BatchNorm(3).train(training)
    message = (
        "weight must have shape (600,), one value per channel, got shape (3,)"
        if training
        else "x must keep its shape during the call, got (1, 600) in the end"
    )
    with raises(ValueError, message):
        bn(x, num_threads=Reshaping())
    assert bn.num_batches_tracked == 0


def test_a_slope_holds_from_the_next_call_on(x):
    bn = cybn.BatchNorm(3, activation="leaky_relu").eval()
    bn(x)
    bn.negative_slope = 0.5
    assert bits([bn(x)]) == bits([cybn.BatchNorm(3, activation="leaky_relu", negative_slope=0.5).eval()(x)])


@pytest.mark.parametrize("training", [True, False])
def test_a_call_keeps_no_vector_alive(x, training):
    bn = cybn.BatchNorm(3).train(training)
    for _ in range(4):
        bn(x)
    watched = weakref.ref(bn.bias)
    bn.bias = None
    assert watched() is None


def test_a_subclass_may_have_attributes_of_its_own(x):
    """What its class says may change without being set."""

    class Switched(cybn.BatchNorm):
        frozen = False

        @property
        def training(self):
            return not self.frozen

        @training.setter
        def training(self, mode):
            pass

    class Mixin:
        eps = property(lambda self: Mixin.value, lambda self, value: None)
        value = 0.25

    class Mixed(cybn.BatchNorm, Mixin):
        pass

    class Scaled(cybn.BatchNorm):
        __slots__ = ("weight",)

    want = cybn.BatchNorm(3).eval()(x)
    bn = Switched(3)
    for Switched.frozen in (True, False, True):
        for _ in range(2):
            before = bn.num_batches_tracked
            bn(x)
            assert bn.num_batches_tracked == before + (not bn.frozen)
    bn = Mixed(3).eval()
    for Mixin.value in (0.25, 0.5, 1e-5):
        assert bits([bn(x)]) == bits([cybn.BatchNorm(3, eps=Mixin.value).eval()(x)])
    bn = Scaled(3).eval()
    assert bits([bn(x)]) == bits([want])
    bn.weight = None
    bn.bias = np.full(3, 7, np.float32)
    assert bits([bn(x)]) == bits([cybn.BatchNorm(3, affine=False).eval()(x) + 7])


def test_a_subclass_may_compare(x):
    class Equal(cybn.BatchNorm):
        def __eq__(self, other):
            return True

    assert Equal(3)(x).shape == x.shape


@pytest.mark.parametrize("counter", [1.5, "3", [1, 2], True])
def test_load_state_dict_refuses_counters_that_are_no_integers(x, counter):
    bn = trained(x)
    before = state_bits(bn)
    state = {name: array + 1 for name, array in bn.state_dict().items()} | {"num_batches_tracked": counter}
    with pytest.raises(TypeError, match=r"^num_batches_tracked must be an integer, got .+$"):
        bn.load_state_dict(state)
    assert state_bits(bn) == before


def test_load_state_dict_is_all_or_nothing_when_numbers_do_not_fit(x):
    """float64 values beyond float32: whether NumPy warns, raises or neither, there is no half-loaded layer."""
    bn = trained(x)
    before = state_bits(bn)
    state = {name: array + 1 for name, array in bn.state_dict().items()} | {"running_var": np.full(3, 1e300)}
    with np.errstate(over="raise"), pytest.raises((FloatingPointError, ValueError)):
        bn.load_state_dict(state)
    assert state_bits(bn) == before


@every_option
def test_loading_into_a_layer_with_other_parts(x, options):
    """A state fits layers with the same parts only."""
    state = trained(x, **options).state_dict()
    for others in OPTIONS[:5]:
        bn = cybn.BatchNorm(3, **others)
        if set(bn.state_dict()) == set(state):
            bn.load_state_dict(state)
            continue
        before = state_bits(bn)
        with pytest.raises(KeyError, match="state must have the names"):
            bn.load_state_dict(state)
        assert state_bits(bn) == before


def test_reset(x, g):
    bn = trained(x)
    bn.backward(g)
    weight = bn.weight.copy()
    bn.reset_running_stats()
    assert bn.running_mean.tolist() == [0] * 3
    assert bn.running_var.tolist() == [1] * 3
    assert bn.num_batches_tracked == 0
    assert bits([bn.weight]) == bits([weight])
    bn.reset_parameters()
    assert state_bits(bn) == state_bits(cybn.BatchNorm(3))
    assert bn.grad_weight is bn.grad_bias is None
    with raises(RuntimeError, NO_FORWARD):
        bn.backward(g)


@every_option
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, *(lambda bn, p=p: pickle.loads(pickle.dumps(bn, p)) for p in range(6))],
    ids=["deepcopy", *(f"pickle{p}" for p in range(6))],
)
def test_copies(x, g, options, duplicate):
    """They carry the state, not the activations of the last pass; the original keeps those."""
    bn = trained(x, **options)
    dx = bn.backward(g)
    twin = duplicate(bn)
    assert type(twin) is type(bn)
    assert repr(twin) == repr(bn)
    assert state_bits(twin) == state_bits(bn)
    assert twin.training == bn.training
    for name in ("grad_weight", "grad_bias"):
        a, b = getattr(twin, name), getattr(bn, name)
        assert (a is None and b is None) or bits([a]) == bits([b])
    with raises(RuntimeError, NO_FORWARD):
        twin.backward(g)
    assert bits([bn.backward(g)]) == bits([dx])
    # Nothing is shared.
    before = state_bits(bn)
    twin(x + 1)
    if twin.weight is not None:
        twin.weight += 1
    assert state_bits(bn) == before
    if bn.track_running_stats:
        assert state_bits(twin) != before


def test_pickles_are_small(x):
    bn = cybn.BatchNorm(3)
    empty = len(pickle.dumps(bn))
    bn(np.ones((1000, 3), np.float32))
    assert len(pickle.dumps(bn)) < empty + 100


def test_only_a_pass_with_a_backward_keeps_its_input(x):
    bn = cybn.BatchNorm(3)
    for training in (False, True):
        watched = x.copy()
        reference = weakref.ref(watched)
        bn.train(training)(watched)
        del watched
        assert (reference() is not None) is training
