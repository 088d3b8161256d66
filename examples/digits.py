"""Handwritten digits, learned with batch normalization and without it.

Two networks in plain NumPy, one fully connected and one convolutional, are trained on scikit-learn's 1,797 bundled
images by four optimizers. With the layer, each hidden layer computes ``a = g(BN(W a))``: whatever constant b one adds
to z = W a, subtracting the mean removes it again, so b is left out and the layer's own bias takes its place. Without
it, each computes ``a = g(W a + b)``. Everything else is the same: the initial W, the order of the mini-batches, and
the learning rate, chosen for the network *without* the layer (see RATES).

    python examples/digits.py [--out digits.png] [--steps 200] [--seed 0]

It prints a table, times cybn against the same mathematics in NumPy, and draws the learning curves.
"""

import argparse
import math
import statistics
import time
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits
from tqdm import tqdm

import cybn

BATCH = 64
EVALUATE_EVERY = 5
GOAL = 0.9

# ------------------------------------------------------------------------------------------------------------- layers
# cybn's layers have forward as a call, backward, weight, bias, grad_weight and grad_bias. With the same names here, the
# network and the optimizers need not know which layer is which.


class Dense:
    """z = W a, or W a + b; a row of the arrays is an example."""

    def __init__(self, rng, inputs, outputs, gain=1.0, bias=True):
        self.weight = initial_weight(rng, (outputs, inputs), gain)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def __call__(self, a):
        self.a = a
        z = a @ self.weight.T
        return z if self.bias is None else z + self.bias

    def backward(self, dz):
        self.grad_weight = dz.T @ self.a
        self.grad_bias = dz.sum(axis=0)
        return dz @ self.weight


class Conv:
    """z = W * a, or W * a + b: 3x3 kernels over (N, C, H, W), padded to keep the size."""

    def __init__(self, rng, inputs, outputs, gain=1.0, bias=True):
        self.weight = initial_weight(rng, (outputs, inputs, 3, 3), gain)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def __call__(self, a):
        z, self.columns = convolve(a, self.weight)
        return z if self.bias is None else z + self.bias[:, None, None]

    def backward(self, dz):
        flat = dz.reshape(*dz.shape[:2], -1)
        self.grad_weight = np.tensordot(flat, self.columns, axes=((0, 2), (0, 2))).reshape(self.weight.shape)
        self.grad_bias = flat.sum(axis=(0, 2))
        # What a pixel contributed to its neighbours comes back from them: the kernels turned by 180 degrees.
        return convolve(dz, self.weight[:, :, ::-1, ::-1].swapaxes(0, 1))[0]


def initial_weight(rng, shape, gain):
    """Normal, with the variance gain / fan-in that lets the signal through: 2 for ReLU (He), 1 else (Xavier)."""
    return rng.standard_normal(shape, np.float32) * math.sqrt(gain / math.prod(shape[1:]))


def convolve(a, weight):
    """A 3x3 convolution as a matrix product; also the matrix, whose columns are the patches of 3x3 pixels."""
    n, _, height, width = a.shape
    patches = sliding_window_view(np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    columns = patches.transpose(0, 1, 4, 5, 2, 3).reshape(n, -1, height * width)
    z = weight.reshape(len(weight), -1) @ columns
    return z.reshape(n, len(weight), height, width), columns


class Sigmoid:
    def __call__(self, z):
        self.a = 0.5 + 0.5 * np.tanh(0.5 * z)  # 1 / (1 + exp(-z)) without overflow
        return self.a

    def backward(self, da):
        return da * self.a * (1 - self.a)


class ReLU:
    def __call__(self, z):
        self.positive = z > 0
        return z * self.positive

    def backward(self, da):
        return da * self.positive


class MeanPool:
    """The mean of every 2x2 pixels."""

    def __call__(self, a):
        n, c, height, width = a.shape
        return a.reshape(n, c, height // 2, 2, width // 2, 2).mean(axis=(3, 5))

    def backward(self, da):
        return np.repeat(np.repeat(da / 4, 2, axis=2), 2, axis=3)


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
        self.batch_norms = [layer for layer in layers if isinstance(layer, cybn.BatchNorm)]

    def __call__(self, a):
        for layer in self.layers:
            a = layer(a)
        return a

    def backward(self, da):
        for layer in reversed(self.layers):
            da = layer.backward(da)

    def train(self, mode=True):
        for layer in self.batch_norms:
            layer.train(mode)
        return self

    def eval(self):
        return self.train(False)

    def parameters(self):
        """Pairs of a parameter and its gradient: W, b, gamma and beta alike."""
        for layer in self.layers:
            for name in ("weight", "bias"):
                if getattr(layer, name, None) is not None:
                    yield getattr(layer, name), getattr(layer, "grad_" + name)


def fully_connected(rng, with_layer):
    """Four hidden layers of sigmoids."""
    layers = [Flatten()]
    for inputs, outputs in pairwise([64, 100, 100, 100, 100]):
        layers.append(Dense(rng, inputs, outputs, bias=not with_layer))
        if with_layer:
            layers.append(cybn.BatchNorm1d(outputs))
        layers.append(Sigmoid())
    return Network([*layers, Dense(rng, 100, 10)])


def convolutional(rng, with_layer):
    """Three convolutions with ReLU; all pixels of a feature map share one mean and one variance."""
    layers = []
    for inputs, outputs in pairwise([1, 16, 16, 32]):
        layers.append(Conv(rng, inputs, outputs, gain=2.0, bias=not with_layer))
        if with_layer:
            layers.append(cybn.BatchNorm2d(outputs))
        layers.append(ReLU())
        if outputs == inputs:
            layers.append(MeanPool())
    return Network([*layers, Flatten(), Dense(rng, 32 * 4 * 4, 10)])


# --------------------------------------------------------------------------------------------------------- optimizers


class Optimizer:
    """Update rules as in the textbooks; `update` changes the parameter w in place, given its gradient dw."""

    def __init__(self, rate):
        self.rate = rate
        self.step_count = 0
        self.averages = {}  # of the gradients and of their squares, for each parameter

    def step(self, parameters):
        self.step_count += 1
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
        v_hat = v / (1 - beta1**self.step_count)
        s_hat = s / (1 - beta2**self.step_count)
        w -= self.rate * v_hat / (np.sqrt(s_hat) + eps)


# ----------------------------------------------------------------------------------------------------------- training


def load_data(rng):
    """Images (N, 1, 8, 8) from 0 to 1 and their digits; 1437 to train on, 360 to test."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = rng.permutation(len(images))
    train, test = order[:1437], order[1437:]
    return images[train], digits.target[train], images[test], digits.target[test]


def train(network, optimizer, data, steps, rng, progress):
    """Train; return the test accuracy after every few steps, as (step, accuracy)."""
    x, digit, x_test, digit_test = data
    curve = []
    batches = iter(())
    for step in range(1, steps + 1):
        batch = next(batches, None)
        if batch is None:  # a new epoch; its last, shorter batch is dropped
            order = rng.permutation(len(x))
            batches = iter(order[: len(x) // BATCH * BATCH].reshape(-1, BATCH))
            batch = next(batches)
        logits = network.train()(x[batch])
        network.backward(cross_entropy_gradient(logits, digit[batch]))
        optimizer.step(network.parameters())
        if step % EVALUATE_EVERY == 0:
            curve.append((step, accuracy(network.eval()(x_test), digit_test)))
        progress.update()
    return curve


def cross_entropy_gradient(logits, digit):
    """Of the mean of -log softmax(logits)[digit] over the batch."""
    gradient = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradient /= gradient.sum(axis=1, keepdims=True)
    gradient[np.arange(len(digit)), digit] -= 1
    return gradient / len(digit)


def accuracy(logits, digit):
    return float((logits.argmax(axis=1) == digit).mean())
