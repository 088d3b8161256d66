"""Networks of NumPy arrays with batch normalization, and what trains them: layers, optimizers, the loop, the data.

With batch normalization a hidden layer computes ``a = g(BN(W a))``: whatever constant b were added to W a, the
subtraction of the mean would remove it, so there is no b, and the bias inside BN takes its place. Without it the layer
computes ``a = g(W a + b)``.
"""

import math
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import cybn

BATCH = 64
EVALUATE_EVERY = 2

# ------------------------------------------------------------------------------------------------------------- layers
# A cybn layer is called for the forward pass, has backward, weight and bias, and leaves grad_weight and grad_bias. The
# layers here do the same under the same names, so that nothing below needs to know which is which. What a forward pass
# leaves in a layer is for backward alone, and not read again on the way: several threads can evaluate one network.


class Linear:
    def __init__(self, rng, shape, bias=True):
        # Normal, with the variance that keeps a signal's size through layers of ReLU (He et al. 2015).
        self.weight = rng.standard_normal(shape, np.float32) * math.sqrt(2 / math.prod(shape[1:]))
        self.bias = np.zeros(shape[0], np.float32) if bias else None

    def state_dict(self):
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, state):
        arrays = self._arrays()
        shapes = {name: array.shape for name, array in arrays.items()}
        given = {name: array.shape for name, array in state.items()}
        if given != shapes:
            raise ValueError(f"state must have the arrays {shapes}, got {given}")
        for name, array in arrays.items():
            array[...] = state[name]

    def _arrays(self):
        return {name: getattr(self, name) for name in ("weight", "bias") if getattr(self, name) is not None}


class Dense(Linear):
    """z = W a (+ b); each row of an array is an example."""

    def __call__(self, a):
        self.a = a
        z = a @ self.weight.T
        return z if self.bias is None else z + self.bias

    def backward(self, dz):
        self.grad_weight = dz.T @ self.a
        self.grad_bias = dz.sum(axis=0)
        return dz @ self.weight


class Conv(Linear):
    """z = W * a (+ b) over (N, C, H, W), with 3x3 kernels and zeros around the image."""

    def __call__(self, a):
        z, self.columns = convolve(a, self.weight)
        return z if self.bias is None else z + self.bias[:, None, None]

    def backward(self, dz):
        flat = dz.reshape(*dz.shape[:2], -1)
        self.grad_weight = np.tensordot(flat, self.columns, axes=((0, 2), (0, 2))).reshape(self.weight.shape)
        self.grad_bias = flat.sum(axis=(0, 2))
        # What a pixel gave to its neighbours comes back from them: the same kernels, turned by 180 degrees.
        return convolve(dz, self.weight[:, :, ::-1, ::-1].swapaxes(0, 1))[0]


def convolve(a, weight):
    """A convolution as a matrix product, and the matrix: its columns are the 3x3 patches of a."""
    n, _, height, width = a.shape
    patches = sliding_window_view(np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    columns = patches.transpose(0, 1, 4, 5, 2, 3).reshape(n, -1, height * width)
    z = weight.reshape(len(weight), -1) @ columns
    return z.reshape(n, len(weight), height, width), columns


class Sigmoid:
    def __call__(self, z):
        self.a = a = 0.5 + 0.5 * np.tanh(0.5 * z)  # 1 / (1 + exp(-z)), which could overflow
        return a

    def backward(self, da):
        return da * self.a * (1 - self.a)


class ReLU:
    def __call__(self, z):
        self.positive = positive = z > 0
        return z * positive

    def backward(self, da):
        return da * self.positive


class Dropout:
    """In training each value becomes 0 with probability `rate`, and the others grow, so that the mean stays."""

    def __init__(self, rng, rate):
        self.rng = rng
        self.rate = rate
        self.training = True

    def train(self, mode=True):
        self.training = mode

    def __call__(self, a):
        self.kept = kept = (self.rng.random(a.shape) >= self.rate) / np.float32(1 - self.rate) if self.training else 1
        return a * kept

    def backward(self, da):
        return da * self.kept


class Flatten:
    def __call__(self, a):
        self.shape = a.shape
        return a.reshape(len(a), -1)

    def backward(self, da):
        return da.reshape(self.shape)


# ----------------------------------------------------------------------------------------------------------- networks


class Network:
    def __init__(self, layers):
        self.layers = layers

    def __call__(self, a):
        for layer in self.layers:
            a = layer(a)
        return a

    def backward(self, da):
        for layer in reversed(self.layers):
            da = layer.backward(da)

    def train(self, mode=True):
        for layer in self.layers:
            if hasattr(layer, "train"):
                layer.train(mode)
        return self

    def eval(self):
        return self.train(False)

    def parameters(self):
        """Pairs of a parameter and its gradient: W and b, gamma and beta alike."""
        for layer in self.layers:
            for name in ("weight", "bias"):
                if getattr(layer, name, None) is not None:
                    yield getattr(layer, name), getattr(layer, "grad_" + name)

    def state_dict(self):
        """Parameters and running statistics, as "0.weight", "1.running_mean", ...: the layer's number and its name."""
        return {f"{i}.{name}": array for i, layer in self._stateful() for name, array in layer.state_dict().items()}

    def load_state_dict(self, state):
        numbers = {str(i) for i, _ in self._stateful()}
        unexpected = [name for name in state if name.partition(".")[0] not in numbers]
        if unexpected:
            raise ValueError(f"state must be of the layers {sorted(numbers)}, got {unexpected}")
        for i, layer in self._stateful():
            prefix = f"{i}."
            layer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def save(self, path):
        """As an .npz of plain arrays."""
        with open(path, "wb") as file:
            np.savez(file, **self.state_dict())

    def load(self, path):
        with np.load(path, allow_pickle=False) as state:
            self.load_state_dict(dict(state))
        return self

    def _stateful(self):
        return [(i, layer) for i, layer in enumerate(self.layers) if hasattr(layer, "state_dict")]


def fully_connected(rng, with_layer, widths=(64, 100, 100, 100), activation=Sigmoid, scale=1, after=False, dropout=0):
    """W a, activation, ...; `scale` multiplies the initial W, `after` puts the layer behind the activation.

    `with_layer` is for all hidden layers, or one answer for each.
    """
    layers = [Flatten()]
    for (before, width), normalized in zip(pairwise(widths), np.broadcast_to(with_layer, len(widths) - 1), strict=True):
        layers.append(Dense(rng, (width, before), bias=after or not normalized))
        block = [cybn.BatchNorm1d(width), activation()] if normalized else [activation()]
        layers += reversed(block) if after else block
        if dropout:
            layers.append(Dropout(rng, dropout))
    network = Network([*layers, Dense(rng, (10, widths[-1]))])
    for layer in network.layers:
        if isinstance(layer, Dense):
            layer.weight *= np.float32(scale)
    return network


def convolutional(rng, with_layer):
    layers = []
    for inputs, outputs in pairwise([1, 8, 8, 8]):
        layers.append(Conv(rng, (outputs, inputs, 3, 3), bias=not with_layer))
        # One mean and variance for all pixels of a feature map; the ReLU in the same pass over memory.
        layers.append(cybn.BatchNorm2d(outputs, activation="relu") if with_layer else ReLU())
    return Network([*layers, Flatten(), Dense(rng, (10, 8 * 8 * 8))])


# --------------------------------------------------------------------------------------------------------- optimizers


class Optimizer:
    """The textbook rules: `update` changes a parameter w, given its gradient dw and averages of dw (v) and dw^2 (s)."""

    def __init__(self, rate):
        self.rate = rate
        self.t = 0
        self.averages = {}

    def step(self, parameters):
        self.t += 1
        for i, (w, dw) in enumerate(parameters):
            v, s = self.averages.setdefault(i, (np.zeros_like(w), np.zeros_like(w)))
            self.update(w, dw, v, s)


class GradientDescent(Optimizer):
    def update(self, w, dw, v, s):
        w -= self.rate * dw


class Momentum(Optimizer):
    def update(self, w, dw, v, s, beta=0.9):
        v += (1 - beta) * (dw - v)
        w -= self.rate * v


class RMSprop(Optimizer):
    def update(self, w, dw, v, s, beta=0.9, eps=1e-8):
        s += (1 - beta) * (dw**2 - s)
        w -= self.rate * dw / (np.sqrt(s) + eps)


class Adam(Optimizer):
    def update(self, w, dw, v, s, beta1=0.9, beta2=0.999, eps=1e-8):
        v += (1 - beta1) * (dw - v)
        s += (1 - beta2) * (dw**2 - s)
        v_hat = v / (1 - beta1**self.t)
        s_hat = s / (1 - beta2**self.t)
        w -= self.rate * v_hat / (np.sqrt(s_hat) + eps)


# ----------------------------------------------------------------------------------------------- training, evaluation


def load_data(rng):
    """Images (N, 1, 8, 8) from 0 to 1 and their digits: 1,437 to train on, 360 to test."""
    from sklearn.datasets import load_digits  # who loads a trained network does without scikit-learn

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    train, test = np.split(rng.permutation(len(images)), [1437])
    return images[train], digits.target[train], images[test], digits.target[test]


def minibatches(count, size, rng):
    """Indices of examples without end: in each epoch all of them in a new order, less a last and shorter batch."""
    while True:
        yield from rng.permutation(count)[: count // size * size].reshape(-1, size)


def descent(network, optimizer, x, digit, steps, rng, batch_size=BATCH):
    """Train while being iterated over: after each step its number, from 1, and the loss that it started from."""
    for step, batch in zip(range(1, steps + 1), minibatches(len(x), batch_size, rng), strict=False):
        loss, gradient = cross_entropy(network.train()(x[batch]), digit[batch])
        network.backward(gradient)
        optimizer.step(network.parameters())
        yield step, loss


def train(network, optimizer, data, steps, rng, progress=None, every=EVALUATE_EVERY):
    """Train, and return the learning curve: pairs of a step and the test accuracy after it."""
    x, digit, x_test, digit_test = data
    curve = [(0, accuracy(network.eval()(x_test), digit_test))]
    for step, _ in descent(network, optimizer, x, digit, steps, rng):
        if step % every == 0 or step == steps:
            curve.append((step, accuracy(network.eval()(x_test), digit_test)))
        if progress is not None:
            progress.update()
    return curve


def cross_entropy(logits, digit):
    """The batch's mean of -log softmax(logits)[digit], and its gradient."""
    rows = np.arange(len(digit))
    logits = logits - logits.max(axis=1, keepdims=True)
    gradient = np.exp(logits)
    total = gradient.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - logits[rows, digit]).mean())
    gradient /= total
    gradient[rows, digit] -= 1
    return loss, gradient / len(digit)


def accuracy(logits, digit):
    return 100 * float((logits.argmax(axis=1) == digit).mean())


def set_population_statistics(network, x):
    """Replace the running averages by the statistics of all of x, in one pass, layer by layer.

    Statistics depend on the layers below, so each layer gets what they yield with their final statistics.
    """
    network.eval()
    batches = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]
    for layer in network.layers:
        if isinstance(layer, cybn.BatchNorm):
            first, *others = map(cybn.batch_norm_stats, batches)
            population = first.merge(*others)  # exact; an average of the batches' variances would not be
            layer.running_mean[...] = population.mean
            layer.running_var[...] = population.var(correction=1)  # unbiased, as the running average is
        batches = [layer(batch) for batch in batches]
