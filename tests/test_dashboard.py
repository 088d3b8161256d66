"""The published dashboard, seen in a browser: run after `make bench` (`make test-dashboard`, and in CI)."""

import functools
import http.server
import json
import os
import runpy
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

pytest.importorskip("asv", reason="asv is not installed: `make test-dashboard`")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: `make test-dashboard`")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

ROOT = Path(__file__).parents[1]
HERE = ROOT / ".asv" / "here"
COMMITS = 3
SECONDS = 30

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no Chromium with its driver is installed"),
    pytest.mark.skipif(not list(HERE.glob("*/*-*.json")), reason="there are no results: `make bench`"),
    pytest.mark.timeout(300),
]


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What asv publishes of the last run of `make bench`, told that it has seen the same at three commits."""
    folder = tmp_path_factory.mktemp("asv")
    configuration = json.loads((ROOT / "benchmarks" / "asv.here.json").read_text())
    configuration |= {
        "repo": str(ROOT),
        "benchmark_dir": str(ROOT / "benchmarks" / "benchmarks"),
        "results_dir": str(folder / "results"),
        "html_dir": str(folder / "html"),
        "env_dir": str(folder / "env"),
    }
    (folder / "asv.json").write_text(json.dumps(configuration))
    newest = max(HERE.glob("*/*-*.json"), key=lambda path: path.stat().st_mtime)
    to = folder / "results" / newest.parent.name
    to.mkdir(parents=True)
    shutil.copy(HERE / "benchmarks.json", folder / "results")
    shutil.copy(newest.parent / "machine.json", to)
    for commit in git("log", f"-{COMMITS}", "--format=%H"):
        results = json.loads(newest.read_text())
        results["commit_hash"] = commit
        results["date"] = 1000 * int(git("show", "-s", "--format=%ct", commit)[0])
        (to / newest.name.replace(newest.name.partition("-")[0], commit[:8])).write_text(json.dumps(results))
    publish = runpy.run_path(str(ROOT / "benchmarks" / "publish.py"))["publish"]
    publish(folder / "asv.json")
    handler = functools.partial(Quiet, directory=folder / "html")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which root cannot have
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture
def page(site, browser, request):
    """Open a page; at the end keep a picture of it and ask for errors."""

    def show(address, condition):
        browser.get("about:blank")
        browser.get(site + address)
        return WebDriverWait(browser, SECONDS).until(condition)

    yield show
    pictures = ROOT / ".asv" / "pictures"
    pictures.mkdir(exist_ok=True)
    browser.save_screenshot(str(pictures / f"{request.node.name}.png"))
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry["message"] for entry in errors if "favicon" not in entry["message"]] == []


def published():
    benchmarks = json.loads((HERE / "benchmarks.json").read_text())
    return {name for name, benchmark in benchmarks.items() if isinstance(benchmark, dict)}


def test_grid_lists_every_benchmark(page):
    # Under a heading for each file.
    expected = sorted(name.partition(".")[2] for name in published())

    def titles(browser):
        found = browser.find_elements("css selector", "#summarygrid-display .benchmark-text")
        return sorted(element.text for element in found)

    assert page("", lambda browser: len(titles(browser)) >= len(expected) and titles(browser)) == expected


def test_graph_has_a_line_for_cybn_and_one_for_numpy(page):
    def lines(browser):
        return browser.execute_script(
            "const plot = window.jQuery && jQuery('#main-graph').data('plot');"
            "return plot ? plot.getData().map(s => [s.label, s.data.length]) : null;"
        )

    address = "#networks.Training.time_network?p-library=%27cybn%27&p-library=%27numpy%27&p-network=%27resnet50_n32%27"
    found = page(address, lambda browser: (lines(browser) or [None] * 2)[1:] and lines(browser))
    points = dict(found)
    assert len(points) == 2
    assert any("cybn" in label for label in points)
    assert any("numpy" in label for label in points)
    assert set(points.values()) == {COMMITS}


def test_regressions_page_loads(page):
    def text(browser):
        found = browser.find_element("id", "regressions-body").text
        return found if found != "Loading..." else None

    assert "regress" in page("#regressions", text).lower()
