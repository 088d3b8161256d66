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
    """The measurements, once they could be printed and drawn; and for each claim whether it held."""
    m = module.measure(**sizes)
    assert all(isinstance(line, str) for line in module.numbers(m))
    assert module.draw(m).axes
    return m, {verdict.claim: verdict.held for verdict in module.verdicts(m)}


def test_equations():
    m, held = told(equations)
    assert held == dict.fromkeys(["L1", "L2", "L3", "L4", "L14"], "Held")
    for errors in m["sets"].values():
        assert errors["starts"]
        assert max(errors[key] for key in ("equations", "wanted", "identity", "one line")) < 1e-6
    assert m["sets"]["digits"]["constant"] == 3
    assert m["constant"]["without"]
    np.testing.assert_allclose(m["constant"]["largest"] * np.sqrt(equations.SMALL), 3.9, rtol=0.1)


def test_placement():
    m, held = told(placement, seeds=range(2), rates=[0.03, 0.3, 3], steps=80)
    assert held == dict.fromkeys(["L5", "L6"], "Held")
    assert min(np.median(accuracy) for _, accuracy in placement.best(m)) > 85
    none, before, after, *alone = placement.works(m)
    assert min(before, after) > none <= min(alone)
    assert m["changes"][:, 0, 0].max() < 1e-5  # float32, b = 0.1
    assert m["changes"][:, 1].max() < 1e-8  # float64, all of them
    assert m["gradient"].max() < 1e-12


def test_optimizers():
    m, held = told(optimizers, seeds=range(2), steps=200)
    assert held == {"L7": "Held"}
    assert all(m["same"])
    assert m["curves"][:, :, -1].min() > 93
    assert m["curves"][:, :, 0].max() < 40


def test_gradients():
    m, held = told(gradients, seeds=range(2))
    assert held == dict.fromkeys(["L8", "L10"], "Held")
    assert m["through"][..., 0].max() < 1e-14
    ratios = m["through"][..., 1] / gradients.EPS  # the second sum is proportional to eps
    assert 0.1 < ratios.min() < ratios.max() < 2
    assert m["constant"].min() > 0.1
    assert gradients.others(m)[1].min() > 0.08


def test_feature_maps():
    m, held = told(feature_maps, seeds=range(2))
    assert held == {"L9": "Held"}
    assert max(m["rows"].max(), m["last"].max()) < 2e-6
    assert m["shared"].min() > 0.9999
    assert 0.5 < m["alone"].min() < m["alone"].max() < 0.8


def test_inference():
    m, held = told(inference, seeds=range(2), stops=(2, 20, 60))
    assert held == dict.fromkeys(["L11", "L12"], "Held")
    assert (m["running"] == m["single"]).all()
    assert (m["population"][:, 0] - m["running"][:, 0]).mean() > 3  # the averages lag
    assert abs(m["running"][:, -1] - m["population"][:, -1]).max() <= 2
    assert (m["mean"][:, -1] < m["mean"][:, 0] / 2).all()


def test_noise():
    m, held = told(noise, seeds=range(4), sizes=[2, 64], steps=50)
    assert held["L13"] == "Held"
    assert m["message"] == "Expected more than 1 value per channel when training, got input shape (1, 64)"
    assert (m["learned"][:, 0, 1] < m["learned"][:, 0, 0] - 10).all()  # batches of two
    assert m["learned"][:, 1].min() > 90
    np.testing.assert_allclose(noise.slopes(m), -0.5, atol=0.06)
    at_64 = m["errors"][:, noise.SIZES.index(64), 0]
    np.testing.assert_allclose(at_64, 1 / 8, rtol=0.15)
    # Noise lessens the gap for most seeds, not for all: so few can tell by their median only.
    assert held["L20"] != "Did not hold"
    assert np.median(noise.less(m, "groups of 64")) > 0
    assert np.median(noise.less(m, "groups of 64, dropout")) > 0


def test_scaling():
    m, held = told(scaling, seeds=range(2), steps=200)
    assert held == {"L15": "Held in part"}  # thirty features stay far from round
    assert m["condition"][:, 0, 0].min() > 50 > scaling.ROUND > m["condition"][:, 1, 0].max()
    assert (m["condition"][:, 0, 1] > 1e6 * m["condition"][:, 1, 1]).all()
    assert m["condition"][:, 1, 1].min() > 1000 * scaling.ROUND
    assert scaling.steps_to_match(m, 0).max() <= 3
    assert scaling.steps_to_match(m, 1).max() <= 10
    above = m["loss"][:, :, 0, -1] - m["least"][:, :, 0]
    assert above.min() > -1e-9
    assert above[:, 0].min() > 0.1 > 1e-3 > above[:, 1].max()


def test_training():
    m, held = told(training, seeds=range(2), rates=[0.1, 0.3], scales=[1, 5], steps=120)
    assert (held["L16"], held["L18"], held["L19"]) == ("Held", "Held in part", "Held")
    assert held["L17"] != "Did not hold"  # 5 times and 30 times end alike
    without, with_layer = (np.median(training.fastest(m, layer)[1]) for layer in (0, 1))
    assert with_layer <= without / 2
    assert training.ends(m["multiples"])[:, 1].min() > 80  # also at 30 times the rate
    assert training.ends(m["multiples"])[:, 0, 2].max() < 30
    usual, large = (np.median(training.deep(m, 0)[1][:, scale]) for scale in (0, 1))
    assert usual < 20 < 30 < large < 90
    assert np.median(training.deep(m, 1)[1], axis=0).min() > 90
    assert training.works(m)[1].sum() > training.works(m)[0].sum()


def test_shift():
    m, held = told(shift, seeds=range(4), steps=300)
    assert held == {"L21": "Held"}
    plain, with_layer, adapted = shift.loss_of_accuracy(m)
    assert min(np.median(plain), with_layer.min()) > shift.FAILS > 12 > adapted.max()
    for key in ("shift", "way"):
        assert (m[key][:, 1, -1] < m[key][:, 0, -1] / 3).all()


def test_smoothness():
    m, held = told(smoothness, seeds=range(4), steps=80)
    assert held == {"L22": "Held in part"}
    for key, factor in (("loss", 4), ("changed", 3), ("turned", 1.5), ("beta", 1.5), ("inside", 1.5)):
        without, with_layer, _ = np.median(m[key], axis=(0, 2))
        assert with_layer < without / factor
    assert np.median(m["inside"], axis=(0, 2))[0] > smoothness.SMALL  # the shift inside is not small without


def test_chain():
    m, held = told(chain, seeds=range(8), depths=[2, 10, 20])
    assert held == {"L23": "Held"}
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
        for claim, statement in module.CLAIMS.items():
            assert f"- **{claim}** {statement}\n" in section
            (held,) = re.findall(rf"- \*\*{claim} (held|held in part|did not hold)\.\*\* ", section)
            assert f"| {claim} | {held.capitalize()} | [{title}](#{main.anchor(title)}) |" in page


def test_spread_and_verdicts():
    assert lecture.spread([1, 2, 30]) == "2 (1 to 30)"
    assert [lecture.judge("L0", parts, "").held for parts in ([True, True], [True, False], [False, False])] == [
        "Held",
        "Held in part",
        "Did not hold",
    ]


@pytest.mark.parametrize(("better", "of", "told"), [(3, 3, False), (4, 4, True), (4, 5, False), (8, 10, True)])
def test_by_chance(better, of, told):
    assert lecture.beyond_chance(np.arange(of) < better) == told


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
