"""examples/networks.py: what the demo, the service and the lectures train."""

import functools

import networks
import numpy as np
import pytest

import cybn


def in_float64(network):
    for layer in network.layers:
        if isinstance(layer, networks.Linear):
            layer.weight = layer.weight.astype(np.float64)
            layer.bias = None if layer.bias is None else layer.bias.astype(np.float64)
        elif isinstance(layer, cybn.BatchNorm):
            layer.weight, layer.bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
    return network


NETWORKS = {
    "sigmoid": (networks.fully_connected, {"with_layer": False}),
    "sigmoid, normalized": (networks.fully_connected, {"with_layer": True}),
    "ReLU, normalized after": (
        networks.fully_connected,
        {"with_layer": True, "activation": networks.ReLU, "after": True, "scale": 0.5, "widths": (64, 20, 20)},
    ),
    "convolutional": (networks.convolutional, {"with_layer": False}),
    "convolutional, normalized": (networks.convolutional, {"with_layer": True}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_loss(name):
    build, options = NETWORKS[name]
    rng = np.random.default_rng(0)
    network = in_float64(build(rng, **options))
    x, digit = rng.random((12, 1, 8, 8)), rng.integers(10, size=12)

    def loss():
        return networks.cross_entropy(network.train()(x), digit)

    network.backward(loss()[1])
    step = 1e-6
    for w, dw in [(w, dw.copy()) for w, dw in network.parameters()]:
        for _ in range(3):
            place = tuple(rng.integers(length) for length in w.shape)
            before = w[place]
            ends = []
            for sign in (1, -1):
                w[place] = before + sign * step
                ends.append(loss()[0])
            w[place] = before
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(dw[place], rel=1e-4, abs=1e-8)


def test_initial_weights_are_scaled_and_otherwise_the_same():
    plain, small = (networks.fully_connected(np.random.default_rng(3), True, scale=scale) for scale in (1, 0.25))
    for a, b in zip(plain.layers, small.layers, strict=True):
        if isinstance(a, networks.Dense):
            np.testing.assert_array_equal(b.weight, a.weight * np.float32(0.25))


@pytest.mark.parametrize(("after", "order"), [(False, ["BatchNorm1d", "Sigmoid"]), (True, ["Sigmoid", "BatchNorm1d"])])
def test_the_layer_stands_where_it_was_asked_to(after, order):
    network = networks.fully_connected(np.random.default_rng(0), True, (64, 5), after=after)
    assert [type(layer).__name__ for layer in network.layers] == ["Flatten", "Dense", *order, "Dense"]
    assert (network.layers[1].bias is not None) == after


def test_each_hidden_layer_can_have_it_or_not():
    network = networks.fully_connected(np.random.default_rng(0), (False, True), (64, 5, 5))
    names = [type(layer).__name__ for layer in network.layers]
    assert names == ["Flatten", "Dense", "Sigmoid", "Dense", "BatchNorm1d", "Sigmoid", "Dense"]
    assert [layer.bias is None for layer in network.layers if isinstance(layer, networks.Dense)] == [False, True, False]


def test_dropout():
    dropout = networks.Dropout(np.random.default_rng(0), 0.25)
    a = np.full((400, 500), 3, np.float32)
    b = dropout(a)
    assert b.dtype == np.float32
    assert set(np.unique(b)) == {0, 4}
    assert b.mean() == pytest.approx(3, abs=0.02)
    np.testing.assert_array_equal(dropout.backward(a), b)
    network = networks.Network([dropout]).eval()
    np.testing.assert_array_equal(network(a), a)
    np.testing.assert_array_equal(network.train()(a) != 0, dropout.kept != 0)


def test_an_epoch_has_every_example_once():
    batches = networks.minibatches(20, 6, np.random.default_rng(0))
    for _ in range(3):
        epoch = np.concatenate([next(batches) for _ in range(3)])
        assert len(set(epoch)) == 18
        assert set(epoch) <= set(range(20))


def test_descent_lets_watch():
    rng = np.random.default_rng(0)
    x, digit = rng.random((64, 64), np.float32), rng.integers(10, size=64)
    network = networks.fully_connected(rng, True)
    watched = list(networks.descent(network, networks.Adam(0.01), x, digit, 30, rng, batch_size=32))
    assert [step for step, _ in watched] == list(range(1, 31))
    assert watched[0][1] == pytest.approx(np.log(10), rel=0.3)
    assert watched[-1][1] < watched[0][1] / 2


def test_the_loss_bears_large_logits():
    loss, gradient = networks.cross_entropy(np.array([[1e4, 0, -1e4]], np.float32), np.array([1]))
    assert loss == 1e4
    np.testing.assert_array_equal(gradient, [[1, -1, 0]])


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        # Of a constant gradient of 2 at rate 0.5, from the textbook's formulas.
        (networks.GradientDescent, -1, -2),
        (networks.Momentum, -0.1, -0.29),
        (networks.RMSprop, -0.5 / 0.1**0.5, -0.5 / 0.1**0.5 - 0.5 / 0.19**0.5),
        (networks.Adam, -0.5, -1),
    ],
)
def test_optimizers(rule, first, second):
    w, dw = np.zeros(1), np.full(1, 2.0)
    optimizer = rule(0.5)
    step = functools.partial(optimizer.step, [(w, dw)])
    step()
    assert w[0] == pytest.approx(first)
    step()
    assert w[0] == pytest.approx(second)


def test_population_statistics_are_those_of_all_examples():
    rng = np.random.default_rng(0)
    x = rng.random((200, 64), np.float32)
    network = networks.fully_connected(rng, True)
    networks.set_population_statistics(network, x)
    z = network.layers[1](x.reshape(200, 64))
    np.testing.assert_allclose(network.layers[2].running_mean, z.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(network.layers[2].running_var, z.var(axis=0, ddof=1), rtol=1e-4)
