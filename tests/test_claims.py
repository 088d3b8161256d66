"""examples/lectures at reduced size: what each claim came to, with room for the spread that was measured over seeds.

`make lectures` measures them at full size. The statements as the library keeps them are in test_lectures.py.
"""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

REASON = "{} is not installed: `make test` installs the group `examples`"
for module in ("sklearn", "matplotlib", "tqdm", "threadpoolctl"):
    pytest.importorskip(module, reason=REASON.format(module))

from lectures import __main__ as main  # noqa: E402
from lectures import (  # noqa: E402
    chain,
    equations,
    feature_maps,
    gradients,
    inference,
    lecture,
    noise,
    optimizers,
    placement,
    scaling,
    shift,
    smoothness,
    training,
)
from threadpoolctl import threadpool_limits  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "lectures.md"


@pytest.fixture(autouse=True)
def _one_thread():
    """Such small arrays gain nothing from BLAS's threads, and lose much where cores are few."""
    with threadpool_limits(1):
        yield


def told(module, **sizes):
    """The measurements, once they could be printed and drawn; and the verdict."""
    m = module.measure(**sizes)
    assert all(isinstance(line, str) for line in module.numbers(m))
    assert module.draw(m).axes
    return m, module.verdict(m).held


def test_equations():
    m, held = told(equations)
    assert held == "Held"
    for errors in m["sets"].values():
        assert errors["starts"]
        assert max(errors[key] for key in ("equations", "wanted", "identity")) < 1e-6
    assert m["sets"]["digits"]["constant"] == 3
    assert m["constant"]["without"]
    np.testing.assert_allclose(m["constant"]["largest"] * np.sqrt(equations.SMALL), 3.9, rtol=0.1)


def test_placement():
    m, held = told(placement, seeds=range(2), rates=[0.03, 0.3, 3], steps=80)
    assert held == "Held"
    assert min(np.median(placement.best(m, place)[1]) for place in placement.PLACES) > 85
    assert min(placement.works(m, place) for place in ("before", "after")) > placement.works(m, "none")
    assert m["changes"][:, 0, 0].max() < 1e-5  # float32, b = 0.1
    assert m["changes"][:, 1].max() < 1e-8  # float64, all of them
    assert m["gradient"].max() < 1e-12


def test_optimizers():
    m, held = told(optimizers, seeds=range(2), steps=200)
    assert held == "Held"
    assert all(m["same"])
    assert m["curves"][:, :, -1].min() > 93
    assert m["curves"][:, :, 0].max() < 40


def test_gradients():
    m, held = told(gradients, seeds=range(2))
    assert held == "Held"
    assert m["through"][..., 0].max() < 1e-14
    ratios = m["through"][..., 1] / gradients.EPS  # the second sum is proportional to eps
    assert 0.1 < ratios.min() < ratios.max() < 2
    assert m["constant"].min() > 0.1
    assert gradients.others(m)[1].min() > 0.08


def test_feature_maps():
    m, held = told(feature_maps, seeds=range(2))
    assert held == "Held"
    assert max(m["rows"].max(), m["last"].max()) < 2e-6
    assert m["shared"].min() > 0.9999
    assert 0.5 < m["alone"].min() < m["alone"].max() < 0.8


def test_inference():
    m, held = told(inference, seeds=range(2), stops=(2, 20, 60))
    assert held == "Held"
    assert (m["running"] == m["single"]).all()
    assert (m["population"][:, 0] - m["running"][:, 0]).mean() > 3  # the averages lag
    assert abs(m["running"][:, -1] - m["population"][:, -1]).max() <= 2
    assert (m["mean"][:, -1] < m["mean"][:, 0] / 2).all()


def test_noise():
    m, _ = told(noise, seeds=range(3), batches=[64, 512], steps=60)
    assert m["message"] == "Expected more than 1 value per channel when training, got input shape (1, 64)"
    np.testing.assert_allclose(noise.slopes(m), -0.5, atol=0.06)
    at_64 = m["errors"][:, noise.SIZES.index(64), 0]
    np.testing.assert_allclose(at_64, 1 / 8, rtol=0.15)
    assert abs(noise.gaps(m)).max() < 0.2
    assert m["gaps"][..., 2].min() > 90


def test_scaling():
    m, held = told(scaling, seeds=range(2), steps=200)
    assert held == "Held"
    assert m["condition"][:, 0, 0].min() > 50 > 10 > m["condition"][:, 1, 0].max()
    assert (m["condition"][:, 0, 1] > 1e6 * m["condition"][:, 1, 1]).all()
    assert scaling.steps_to_match(m, 0).max() <= 3
    assert scaling.steps_to_match(m, 1).max() <= 10


def test_training():
    m, held = told(training, seeds=range(2), rates=[0.03, 0.1, 0.3], scales=[0.3, 1], steps=120)
    assert held == "Held"
    without, with_layer = (np.median(training.fastest(m, layer)[1]) for layer in (0, 1))
    assert with_layer <= without / 2
    assert training.ends(m["multiples"])[:, 1].min() > 80  # also at 30 times the rate
    assert training.ends(m["multiples"])[:, 0, 2].max() < 30
    assert training.ends(m["sigmoid"])[:, 0].max() < 20
    assert training.ends(m["sigmoid"])[:, 1].max(-1).min() > 90
    assert m["works"][1].sum() > m["works"][0].sum()


def test_shift():
    m, held = told(shift, seeds=range(3), steps=300)
    assert held == "Held"
    middle = shift.GREYS.index(0.5)
    assert (m["grey"][:, 1, middle] < m["grey"][:, 1, 0] - 10).all()
    assert abs(m["adapted"] - m["grey"][:, 1, :1]).max() < 3
    assert (m["moved"][:, 1, -1] < m["moved"][:, 0, -1] / 4).all()


def test_smoothness():
    m, _ = told(smoothness, seeds=range(2), steps=80)
    for key, factor in (("loss", 4), ("distance", 3), ("turned", 1.5), ("inside", 1.5)):
        without, with_layer = np.median(m[key], axis=(0, 2))
        assert with_layer < without / factor


def test_chain():
    m, held = told(chain, seeds=range(8), depths=[2, 10, 20])
    assert held == "Held"
    np.testing.assert_allclose(chain.ratio(m)[:, 1], 1, rtol=1e-9)
    deep = chain.ratio(m)[:, 0, -1]
    assert np.median(deep) > 1.3
    assert np.median(deep) > np.median(chain.ratio(m)[:, 0, 0])


def test_every_claim_has_its_lecture():
    claims = [claim for name in main.LECTURES for claim in importlib.import_module(f"lectures.{name}").CLAIMS]
    assert sorted(claims, key=lambda claim: int(claim[1:])) == [f"L{i}" for i in range(1, 24)]


def test_the_page_shows_every_lecture():
    page = PAGE.read_text()
    for name in main.LECTURES:
        module = importlib.import_module(f"lectures.{name}")
        title = module.__doc__.split("\n")[0]
        section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
        assert f"![{title}](lectures/{name}.png)" in section
        assert (PAGE.parent / "lectures" / f"{name}.png").stat().st_size > 10_000
        assert re.search(r"\*\*(Held|Held in part|Did not hold)\.\*\*", section)
        assert f"(#{main.anchor(title)})" in page
        for claim, statement in module.CLAIMS.items():
            assert f"- **{claim}** {statement}\n" in section


def test_spread_and_verdicts():
    assert lecture.spread([1, 2, 30]) == "2 (1 to 30)"
    assert [lecture.judge(parts, "").held for parts in ([True, True], [True, False], [False, False])] == [
        "Held",
        "Held in part",
        "Did not hold",
    ]


def test_each_combination():
    together = lecture.each(map, lambda letter, number: [ord(letter), number], "abc", [1, 2])
    assert together.shape == (3, 2, 2)
    assert together[2, 1].tolist() == [ord("c"), 2]
    apart = lecture.each(map, lambda number: {"once": number, "twice": [number, number]}, [5, 6, 7])
    assert apart["once"].tolist() == [5, 6, 7]
    assert apart["twice"].shape == (3, 2)


def test_what_is_asked_for_must_exist(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lectures", "chains"])
    with pytest.raises(SystemExit):
        main.main()
    assert f"lectures are {', '.join(main.LECTURES)}, got chains" in capsys.readouterr().err
