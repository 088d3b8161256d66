"""Draws the pictures of docs/performance.md from saved results.

    python benchmarks/plots.py [--results benchmarks/results] [--out docs/performance]

Run by `make plots`. The results are those of compare.py and scaling.py; `make performance` measures, then draws. The
same results, drawn by the same matplotlib, are the same bytes.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
from compare import Result, mean, of_copy
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

ROOT = Path(__file__).parents[1]
WIDTH = 8  # inches; shown 800 pixels wide, a point is 1.4 pixels
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.hashsalt": "cybn",
}

# Okabe and Ito's colours, which the colour-blind can tell apart.
OPERATIONS = {"training": ("#0072B2", "o"), "evaluation": ("#E69F00", "s"), "backward": ("#009E73", "^")}
PEERS = {  # (peer, channels-last): label, colour
    ("torch", False): ("PyTorch", "#D55E00"),
    ("torch", True): ("PyTorch, both channels-last", "#CC79A7"),
    ("reference", False): ("NumPy (cybn.reference)", "0.65"),
    ("onnx", False): ("ONNX Runtime", "#56B4E9"),
}
NETWORKS = {
    "resnet50_n32": "ResNet-50\nN = 32",
    "resnet50_n1": "ResNet-50\nN = 1",
    "mobilenet_v2_n32": "MobileNet v2\nN = 32",
    "dense_2d": "dense\n(N, C)",
    "few_channels": "1 to 8\nchannels",
    "latency": "small arrays\n(to 12 KB)",
}


def figure(saved, height):
    """Blank, but for a line that says what was measured on what."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    libraries = ", ".join(f"{name} {version}" for name, version in saved["versions"].items())
    fig.supxlabel(f"{saved['machine']}; {libraries}; {saved['date']}", size=9, color="0.4")
    return fig


def plain(axis, ticks):
    """A logarithmic axis with these ticks, written out."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def bar(axes, place, ratio, label, color):
    """Horizontal, from 1, where both are equally fast."""
    axes.barh(place, ratio - 1, left=1, height=0.9, label=label, color=color)
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    axes.annotate(text, (max(ratio, 1), place), (3, 0), textcoords="offset points", va="center_baseline", size=9)


def legend(fig, panels):
    """One for all panels, above them."""
    labelled = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels)
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), columnspacing=1)


def like_for_like(comparison):
    """(operation, (peer, channels-last)) -> results, where cybn and the peer do the same."""
    found = {}
    for row in comparison["rows"]:
        if row["operation"] == row["peer_operation"]:
            results = found.setdefault((row["operation"], (row["peer"], row["last"])), [])
            results += [Result(**result) for result in row["results"]]
    return found


def peers(comparison):
    speedups = {}  # (operation, peer, network)
    for (operation, peer), results in like_for_like(comparison).items():
        for network in NETWORKS:
            if group := [result for result in results if result.network == network]:
                speedups[operation, peer, network] = mean(group, [result.ratio for result in group])
    fig = figure(comparison, 6.6)
    panels = fig.subplots(1, len(OPERATIONS), sharex=True, sharey=True)
    height = len(PEERS) + 1
    for axes, operation in zip(panels, OPERATIONS, strict=True):
        for place, network in enumerate(NETWORKS):
            measured = [peer for peer in PEERS if (operation, peer, network) in speedups]
            top = height * place + (len(PEERS) - len(measured)) / 2
            for slot, peer in enumerate(measured):
                bar(axes, top + slot, speedups[operation, peer, network], *PEERS[peer])
        axes.set(title=operation, xscale="log", xlabel="times as fast as the peer")
        axes.axvline(1, color="black", linewidth=1)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    low, high = min(speedups.values()), max(speedups.values())
    panels[0].set_xlim(min(low, 1) / 1.2, 2.5 * high)  # with room for the last label
    plain(panels[0].xaxis, [0.1, 0.3, 1, 3, 10, 30, 100])
    panels[0].set_yticks([height * place + (len(PEERS) - 1) / 2 for place in range(len(NETWORKS))], NETWORKS.values())
    panels[0].set_ylim(height * len(NETWORKS) - 1, -1)
    legend(fig, panels)
    return fig


def roofline(comparison):
    found = like_for_like(comparison)
    fig = figure(comparison, 4.6)
    panels = fig.subplots(1, len(OPERATIONS), sharex=True, sharey=True)
    for axes, (operation, (color, marker)) in zip(panels, OPERATIONS.items(), strict=True):
        for last, name, face in ((False, "channels-first", color), (True, "channels-last", "white")):
            results = [result for result in found.get((operation, ("torch", last)), ()) if result.copy is not None]
            if results:
                sizes = [4e-6 * math.prod(result.shape) for result in results]
                fractions = [of_copy(operation, result) for result in results]
                label = f"{name}: mean {mean(results, fractions):.2f}"
                axes.plot(sizes, fractions, marker, color=color, markerfacecolor=face, label=label)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="size of the array, MB")
        axes.legend(title=operation, loc="lower center", bbox_to_anchor=(0.5, 1), handletextpad=0)
    panels[0].set_ylabel("fraction of the copy's bandwidth")
    plain(panels[0].xaxis, [0.01, 0.1, 1, 10, 100])
    plain(panels[0].yaxis, [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5])
    return fig


def scaling(measured):
    fig = figure(measured, 6.4)
    total, each = fig.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for case in measured["batch"]:
        color, marker = OPERATIONS[case["operation"]]
        n, times = np.array(case["n"]), 1e6 * np.array(case["seconds"])
        b, a = np.polyfit(n, times, 1, w=1 / times)  # least squares of relative errors: small N count as much as large
        off = np.exp(np.abs(np.log(times / (a + b * n))).max())
        x = np.geomspace(n[0], n[-1], 200)
        label = f"{case['operation']}: {a:.1f} µs + {b:.2f} µs · N, at most {off:.2f}x off"
        total.plot(n, times, marker, color=color)
        total.plot(x, a + b * x, color=color, label=label)
        each.plot(n, times / n, marker, color=color)
        each.plot(x, a / x + b, color=color)
    shape = ", ".join(map(str, measured["sample"]))
    total.set(xscale="log", yscale="log", ylabel="microseconds")
    each.set(yscale="log", ylabel="microseconds per sample", xlabel=f"N, of arrays (N, {shape}) of float32")
    plain(total.xaxis, measured["batch"][0]["n"])
    plain(total.yaxis, [10**k for k in range(6)])
    plain(each.yaxis, [1, 2, 5, 10, 20, 50, 100])
    total.legend()
    return fig


def threads(measured):
    fig = figure(measured, 6.2)
    axes = fig.subplots()
    height = len(OPERATIONS) + 1
    for slot, case in enumerate(measured["threads"]):
        results = [Result(**result) for result in case["results"]]
        average = mean(results, [result.ratio for result in results])
        color, _ = OPERATIONS[case["operation"]]
        for place, result in enumerate(results):
            bar(axes, height * place + slot, result.ratio, f"{case['operation']}: mean {average:.2f}", color)
    axes.axvline(1, color="black", linewidth=1)
    axes.axvline(2, color="0.4", linewidth=1, linestyle="--", zorder=0)
    axes.set(xlabel="times as fast with two threads as with one", ylim=(height * len(results) - 1, -1))
    axes.set_yticks([height * place + 1 for place in range(len(results))], [str(tuple(r.shape)) for r in results])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    legend(fig, [axes])
    return fig


def draw(results, out):
    """The four pictures; returns their files."""
    comparison, measured = (json.loads((results / name).read_text()) for name in ("compare.json", "scaling.json"))
    out.mkdir(parents=True, exist_ok=True)
    pictures = ((peers, comparison), (roofline, comparison), (scaling, measured), (threads, measured))
    files = []
    with matplotlib.rc_context(STYLE):
        for picture, saved in pictures:
            files.append(out / f"{picture.__name__}.svg")
            # Neither the date of drawing nor the version that drew.
            picture(saved).savefig(files[-1], metadata={"Date": None, "Creator": None})
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="a directory")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance", help="a directory")
    args = parser.parse_args()
    for file in draw(args.results, args.out):
        print(file)


if __name__ == "__main__":
    main()
