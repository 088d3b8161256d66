"""The scripts that measure and draw what docs/performance.md shows."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pytest.importorskip("tqdm", reason="the scripts show their progress with tqdm")
    return importlib.import_module


@pytest.fixture
def plots(script):
    pytest.importorskip("matplotlib", reason="the pictures are drawn by matplotlib")
    return script("plots")


@pytest.fixture
def results(script, tmp_path):
    """A directory with made-up results, as compare.py and scaling.py save them."""
    compare = script("compare")
    table = compare.rows()
    for row in table:
        copy = 0.75 if row.peer in ("torch", "copy") and row.networks != ("latency",) else None
        for network, shape, count in compare.cases(row):
            row.results.append(compare.Result(network, shape, count, 1, 2, copy))
    compare.save(tmp_path / "compare.json", rows=[row.saved() for row in table])
    n = [1, 2, 4]
    networks = [compare.Result("resnet50_n32", shape, 1, 1, 2, None) for shape, _ in compare.NETWORKS["resnet50_n32"]]
    compare.save(
        tmp_path / "scaling.json",
        sample=[64, 14, 14],
        batch=[{"operation": "training", "n": n, "seconds": [1e-6 * (10 + 5 * k) for k in n]}],
        threads=[{"operation": "training", "results": [result._asdict() for result in networks]}],
    )
    return tmp_path


def test_rows_have_titles_of_their_own(script):
    titles = [row.title for row in script("compare").rows()]
    assert len(set(titles)) == len(titles)


def test_mean_is_geometric_and_weighted_by_count(script):
    compare = script("compare")
    results = [compare.Result("a", [2, 3], count, 1, peer, None) for count, peer in ((1, 1), (3, 16))]
    assert compare.mean(results, [result.ratio for result in results]) == pytest.approx(8)


def test_of_copy(script):
    """Backward moves three arrays in the time in which, at the copy's speed, two would take 4 seconds."""
    compare = script("compare")
    assert compare.of_copy("backward", compare.Result("a", [2, 3], 1, 12, 1, 4)) == pytest.approx(0.5)


def test_what_is_saved_is_what_was_measured(script, results):
    compare = script("compare")
    saved = json.loads((results / "compare.json").read_text())
    assert saved["machine"] == compare.machine()
    assert set(saved["versions"]) >= {"cybn", "numpy"}
    for row, kept in zip(compare.rows(), saved["rows"], strict=True):
        assert kept["title"] == row.title
        expected = [[network, list(shape), count] for network, shape, count in compare.cases(row)]
        assert [[r["network"], r["shape"], r["count"]] for r in kept["results"]] == expected


def test_pictures(plots, results):
    files = plots.draw(results, results / "out")
    assert [file.name for file in files] == ["peers.svg", "roofline.svg", "scaling.svg", "threads.svg"]
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in plots.draw(results, results / "out")] == before
    for picture in before:
        assert picture.startswith(b"<?xml")


def test_fit(plots, results):
    """The line through points that are on one."""
    saved = json.loads((results / "scaling.json").read_text())
    total, _ = plots.scaling(saved).axes
    (text,) = total.get_legend().get_texts()
    assert "10.0 µs + 5.00 µs" in text.get_text()


def test_networks_have_names(script, plots):
    assert set(plots.NETWORKS) == set(script("compare").NETWORKS)


@pytest.mark.skipif(not PAGE.exists(), reason="no docs in a source distribution")
def test_page_shows_the_pictures_there_are():
    shown = re.findall(r'src="(.*?)"', PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(f"performance/{file.name}" for file in (PAGE.parent / "performance").iterdir())
