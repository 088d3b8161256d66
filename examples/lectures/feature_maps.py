"""One mean and variance for a whole feature map

Images of digits pass a convolution of 8 kernels. Their feature maps (N, 8, 8, 8) are normalized per channel, as the
layer does, and for comparison per channel and pixel.
"""

import networks
import numpy as np
from lectures.lecture import SEEDS, WIDTH, digits, each, figure, judge, spread

import cybn

CLAIMS = {
    "L9": "In a convolutional network every spatial location of a feature map shares the same mu and sigma.",
}

SHOWN = 6


def feature_maps(seed):
    rng = np.random.default_rng(seed)
    x = digits()[0]
    return networks.Conv(rng, (8, 1, 3, 3), bias=False)(x[rng.permutation(len(x))[:256]])


def trial(seed):
    z = feature_maps(seed)
    shared = cybn.batch_norm(z, None, None, training=True)
    # Every pixel of every image an example of its own.
    rows = np.ascontiguousarray(z.transpose(0, 2, 3, 1)).reshape(-1, 8)
    as_rows = cybn.batch_norm(rows, None, None, training=True).reshape(256, 8, 8, 8).transpose(0, 3, 1, 2)
    channels_last = cybn.batch_norm(np.ascontiguousarray(z.transpose(0, 2, 3, 1)), None, None, training=True, axis=-1)
    alone = cybn.batch_norm(z.reshape(256, -1), None, None, training=True).reshape(z.shape)
    return {
        "rows": abs(shared - as_rows).max(),
        "last": abs(shared - channels_last.transpose(0, 3, 1, 2)).max(),
        "shared": correlation(z, shared),
        "alone": correlation(z, alone),
        "pictures": [a[:SHOWN, 0] for a in (z, shared, alone)],
    }


def correlation(z, y):
    """Of feature maps before and after, their mean: 1 where a picture is the same but for its scale."""
    z, y = (a.reshape(-1, 64) - a.reshape(-1, 64).mean(axis=1, keepdims=True) for a in (z, y))
    with np.errstate(invalid="ignore"):
        return np.nanmean((z * y).sum(axis=1) / np.sqrt((z**2).sum(axis=1) * (y**2).sum(axis=1)))


def measure(run=map, seeds=SEEDS):
    return each(run, trial, seeds)


def numbers(m):
    yield f"L9  (N, C, H, W) against its pixels as (N H W, C), largest difference: {spread(m['rows'], '{:.0e}')}"
    yield f"L9  against channels-last, largest difference: {spread(m['last'], '{:.0e}')}"
    yield f"L9  correlation of a map before and after, shared: {spread(m['shared'], '{:.4f}')}"
    yield f"L9  correlation of a map before and after, a mean and variance per pixel: {spread(m['alone'], '{:.2f}')}"


def verdicts(m):
    yield judge(
        "L9",
        [m["rows"].max() < 1e-5, m["last"].max() < 1e-5, m["shared"].min() > 0.999 > m["alone"].max()],
        f"The layer's output is that of every pixel taken as one more example, to {m['rows'].max():.0e}, in either "
        "memory layout. So a map's correlation with what it was before is "
        f"{np.median(m['shared']):.3f}; with statistics per pixel it would be {np.median(m['alone']):.2f}.",
    )


def draw(m):
    fig, panels = figure(WIDTH / SHOWN * 3 + 0.7, 3, SHOWN)
    names = ("z = W * a", "normalized,\nshared", "normalized,\nper pixel")
    for row, name, maps in zip(panels, names, m["pictures"][0], strict=True):
        low, high = np.percentile(maps, [1, 99])
        for axes, picture in zip(row, maps, strict=True):
            image = axes.imshow(picture, cmap="cividis", vmin=low, vmax=high)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        row[0].set_ylabel(name)
        fig.colorbar(image, ax=row, shrink=0.8, label="value")
    fig.suptitle("L9: the first feature map of six digits", size=10)
    return fig
