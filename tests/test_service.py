"""The service in examples/service: every request gets its answer, whatever came before it, whichever worker it is."""

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cybn

REASON = "{} is not installed: `make test` installs the group `service`"
for module in ("gunicorn", "uvicorn", "uvicorn_worker", "httptools", "uvloop", "starlette", "threadpoolctl", "tqdm"):
    pytest.importorskip(module, reason=REASON.format(module))

import networks  # noqa: E402
from service import app as service  # noqa: E402
from service.cores import usable_cores  # noqa: E402
from service.load import serve, workers_seen  # noqa: E402

pytestmark = pytest.mark.timeout(60)

JSON = "application/json"
NPY = "application/x-npy"
IMAGES = np.random.default_rng(1).integers(0, 17, (12, 8, 8))


def as_json(images):
    return json.dumps({"images": np.asarray(images).tolist()}).encode()


def as_npy(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), **options)
    return stream.getvalue()


def npy_header(shape, descr="<f8", version=(1, 0)):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}\n".encode()
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2 if version == (1, 0) else 4, "little") + text


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A network of random weights, with running statistics of its own."""
    rng = np.random.default_rng(0)
    network = networks.convolutional(rng, with_layer=True)
    network.train()(rng.random((64, 1, 8, 8), np.float32))
    path = tmp_path_factory.mktemp("network") / "digits.npz"
    network.save(path)
    return path


@pytest.fixture(scope="module")
def app(path):
    threads = cybn.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVICE_NETWORK", str(path))
        patch.delenv("SERVICE_THREADS", raising=False)
        with service.threadpool_limits(1, user_api="blas"):  # which restores what the application limits
            yield service.create_app()
    cybn.set_num_threads(threads)


class Client:
    """ASGI's side of the server: what comes in, in pieces, and what goes out."""

    def __init__(self, app):
        self.app = app

    def __call__(self, method, path, pieces=(), headers=None, disconnect=False):
        self.read, self.sent = 0, []
        pieces = list(pieces)

        async def receive():
            if not pieces:
                if disconnect:
                    return {"type": "http.disconnect"}
                await asyncio.sleep(10)  # a client that says no more
            self.read += 1
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces) or disconnect}

        async def send(message):
            self.sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        try:
            asyncio.run(self.app(scope, receive, send))
        finally:
            start, *bodies = self.sent
            self.status = start["status"]
            self.headers = {k.decode(): v.decode() for k, v in start["headers"]}
            self.body = b"".join(message.get("body", b"") for message in bodies)
        return self

    def get(self, path):
        return self("GET", path, [b""])

    def post(self, body, kind=JSON, **headers):
        return self("POST", "/predict", [body], {"Content-Type": kind, **headers})

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def probabilities(self):
        assert self.status == 200, self.body
        return np.array(self.json["probabilities"])


@pytest.fixture
def client(app):
    return Client(app)


# ------------------------------------------------------------------------------------------------------------- answers


def test_every_form_of_an_image_gets_the_same_answer(client):
    image = IMAGES[0]
    want = client.post(as_json(image)).probabilities
    assert want.shape == (1, 10)
    np.testing.assert_allclose(want.sum(), 1, rtol=1e-5)
    assert client.json["digits"] == [want.argmax()]
    bodies = [(as_json(image[None]), JSON), (as_json(image.astype(float)), f"{JSON}; charset=utf-8")]
    for dtype in ("u1", "i4", "<i8", ">i8", "f2", "<f4", ">f4", "<f8", ">f8", "g"):
        bodies.append((as_npy(image.astype(dtype)), NPY))
    bodies.append((as_npy(np.asfortranarray(image)), "application/octet-stream"))
    bodies.append((as_npy(image, version=(2, 0)), NPY))
    for body, kind in bodies:
        np.testing.assert_array_equal(client.post(body, kind).probabilities, want)


def test_npy_where_the_client_accepts_it(client):
    want = client.post(as_json(IMAGES)).probabilities
    got = client.post(as_json(IMAGES), Accept=NPY)
    assert got.headers["content-type"] == NPY
    p = np.load(io.BytesIO(got.body), allow_pickle=False)
    assert p.dtype == np.float32
    np.testing.assert_array_equal(p, want)


def test_the_batch_does_not_matter(path, client):
    """Bit by bit up to the last matrix product, for which BLAS has a way of its own for every size."""
    batch = client.post(as_json(IMAGES)).probabilities
    for i, image in enumerate(IMAGES):
        np.testing.assert_allclose(client.post(as_json(image)).probabilities[0], batch[i], rtol=1e-4, atol=1e-6)
    *hidden, _ = service.load_network(path).layers
    features = networks.Network(hidden)
    x = (IMAGES[:, None] / 16).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([features(image[None]) for image in x]), features(x))


def test_an_answer_is_that_of_the_network_in_evaluation_mode(path, client):
    network = networks.convolutional(np.random.default_rng(5), with_layer=True).load(path).eval()
    logits = network((IMAGES[:, None] / 16).astype(np.float32)).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(client.post(as_json(IMAGES)).probabilities, p, rtol=1e-5)


def test_health_and_config(client):
    assert client.get("/health").json == {"status": "ok", "pid": os.getpid()}
    config = client.get("/config").json
    assert config["cybn"]["version"] == cybn.__version__
    assert config["warmed_up"]["pid"] == config["pid"] == os.getpid()
    assert config["limits"] == {"images": service.MAX_IMAGES, "bytes": service.MAX_BYTES, "seconds": 10}


def test_the_most_images_in_the_longest_form_fit(client):
    images = np.full((service.MAX_IMAGES, 8, 8), np.nextafter(1e-300, 1))
    assert len(as_json(images)) < service.MAX_BYTES
    assert client.post(as_json(images)).probabilities.shape == (service.MAX_IMAGES, 10)


# ------------------------------------------------------------------------------------------------------------ refusals


def with_value(value):
    image = np.zeros((8, 8)).tolist()
    image[2][3] = value
    return json.dumps({"images": image}).encode()


TOO_MANY = np.zeros((service.MAX_IMAGES + 1, 8, 8), np.uint8)
GOOD = as_npy(IMAGES.astype(np.float32))

REFUSED = {
    "empty body": (b"", JSON, 400, "body", "nothing"),
    "empty npy": (b"", NPY, 400, "body", "nothing"),
    "malformed JSON": (b'{"images": [[', JSON, 400, "body", "JSONDecodeError"),
    "not UTF-8": (b'{"images": "\xff"}', JSON, 400, "body", "UnicodeDecodeError"),
    "nested too deeply": (b"[" * 500_000, JSON, 400, "body", "RecursionError"),
    "nested deeply": (b'{"images":' + b"[" * 200 + b"]" * 200 + b"}", JSON, 422, "images", "shape (1, 1"),
    "not an object": (b"[[1, 2], [3, 4]]", JSON, 422, "body", "list"),
    "other name": (b'{"image": []}', JSON, 422, "body", "the names ['image']"),
    "one name more": (b'{"images": [], "x": 1}', JSON, 422, "body", "the names ['images', 'x']"),
    "null": (b'{"images": null}', JSON, 422, "images", "shape ()"),
    "no images": (b'{"images": []}', JSON, 422, "images", "shape (0,)"),
    "ragged": (json.dumps({"images": [[0] * 8] * 7 + [[0] * 7]}).encode(), JSON, 422, "images", "shape (8,)"),
    "wrong shape": (as_json(np.zeros((8, 7))), JSON, 422, "images", "shape (8, 7)"),
    "too many": (as_json(TOO_MANY), JSON, 422, "images", f"shape ({len(TOO_MANY)}, 8, 8)"),
    "a string": (with_value("3"), JSON, 422, "images", "str"),
    "a boolean": (with_value(True), JSON, 422, "images", "bool"),
    "a null": (with_value(None), JSON, 422, "images", "NoneType"),
    "NaN": (with_value(np.nan), JSON, 422, "images[0][2][3]", "nan"),
    "infinity": (with_value(np.inf), JSON, 422, "images[0][2][3]", "inf"),
    "negative": (with_value(-1), JSON, 422, "images[0][2][3]", "-1"),
    "too white": (with_value(16.5), JSON, 422, "images[0][2][3]", "16.5"),
    "a long integer": (with_value(10**400), JSON, 422, "images", "int too large"),
    # 30,000 elements as long as the longest would be 7 GB.
    "a long string": (b'{"images":["' + b"x" * 60_000 + b'"' + b",1" * 30_000 + b"]}", JSON, 422, "images", "(30001,)"),
    "text": (b"3", "text/plain", 415, "Content-Type", "'text/plain'"),
    "no type": (b"3", "", 415, "Content-Type", "''"),
    "not npy": (b"not an npy file", NPY, 400, "body", "magic string"),
    "npz": (b"PK\x03\x04" + bytes(100), NPY, 400, "body", "magic string"),
    "header alone": (b"\x93NUMPY\x01\x00\x76\x00{'descr", NPY, 400, "body", "ValueError"),
    "npy version 3": (as_npy(IMAGES, version=(3, 0)), NPY, 400, "body", "(3, 0)"),
    "truncated": (GOOD[:-1], NPY, 400, "body", "3071 bytes"),
    "too long": (GOOD + b"x", NPY, 400, "body", "3073 bytes"),
    "claims terabytes": (npy_header((1 << 34, 8, 8)), NPY, 422, "images", "shape (17179869184, 8, 8)"),
    "claims more than there is": (npy_header((200, 8, 8)), NPY, 400, "body", "0 bytes"),
    "claims a huge header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", NPY, 400, "body", "ValueError"),
    "huge elements": (npy_header((8, 8), "<U100000000"), NPY, 422, "images", "an array of <U100000000"),
    "negative sides": (npy_header((-1, 8, 8)), NPY, 422, "images", "shape (-1, 8, 8)"),
    "no images in npy": (npy_header((0, 8, 8)), NPY, 422, "images", "shape (0, 8, 8)"),
    "too many in npy": (as_npy(TOO_MANY), NPY, 422, "images", f"shape ({len(TOO_MANY)}, 8, 8)"),
    "wrong shape in npy": (as_npy(np.zeros((3, 1, 8, 8))), NPY, 422, "images", "shape (3, 1, 8, 8)"),
    "pickled": (as_npy(IMAGES.astype(object)), NPY, 422, "images", "an array of object"),
    "complex": (as_npy(IMAGES + 0j), NPY, 422, "images", "an array of complex128"),
    "booleans": (as_npy(IMAGES > 3), NPY, 422, "images", "an array of bool"),
    "records": (as_npy(np.zeros((8, 8), "f4,f4")), NPY, 422, "images", "an array of"),
    "NaN in npy": (as_npy(np.full((8, 8), np.nan, "f4")), NPY, 422, "images[0][0][0]", "nan"),
    "infinity in npy": (as_npy(np.full((2, 8, 8), np.inf)), NPY, 422, "images[0][0][0]", "inf"),
}


@pytest.mark.parametrize(("body", "kind", "status", "field", "got"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_was_expected_and_cost_nothing(client, body, kind, status, field, got):
    before = client.post(as_json(IMAGES)).body
    assert len(body) <= service.MAX_BYTES
    tracemalloc.start()
    client.post(body, kind)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    error = client.json["error"]
    assert (client.status, error["field"]) == (status, field)
    assert got in error["got"]
    assert error["expected"]
    assert len(client.body) < 1000
    assert peak < 20e6
    assert client.post(as_json(IMAGES)).body == before


def test_wrong_paths_and_methods(client):
    client.get("/predictions")
    assert (client.status, client.json["error"]["field"]) == (404, "path")
    client.get("/predict/")
    assert client.status == 404
    client.get("/predict")
    assert (client.status, client.headers["allow"]) == (405, "POST")
    assert client.json == {"error": {"field": "method", "expected": "POST", "got": "GET"}}
    client("DELETE", "/health", [b""])
    assert client.status == 405


def test_a_long_body_is_not_kept(client):
    piece = bytes(1 << 16)
    tracemalloc.start()
    client("POST", "/predict", [piece] * 20, {"Content-Type": NPY})
    assert (client.status, client.json["error"]["got"]) == (413, f"at least {20 << 16}")
    client("POST", "/predict", [piece] * 1000, {"Content-Type": NPY})
    assert (client.status, client.json["error"]["field"]) == (413, "body")
    assert client.read == service.MAX_DISCARDED // len(piece) + 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * service.MAX_BYTES


def test_a_long_body_is_refused_before_it_comes(client):
    for headers in ({"Content-Length": str(1 << 30)}, {"Content-Length": str(2 << 20), "Expect": "100-continue"}):
        client("POST", "/predict", [b""], {"Content-Type": NPY, **headers})
        assert (client.status, client.json["error"]["field"]) == (413, "body")
        assert client.read == 0


def test_a_body_in_pieces(client):
    want = client.post(GOOD, NPY).body
    pieces = [GOOD[i : i + 100] for i in range(0, len(GOOD), 100)]
    assert client("POST", "/predict", pieces, {"Content-Type": NPY}).body == want


def test_compressed_bodies_are_refused(client):
    client.post(b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert (client.status, client.json["error"]["field"]) == (415, "Content-Encoding")


def test_a_client_that_stops_sending(client, monkeypatch):
    monkeypatch.setattr(service, "READ_SECONDS", 0.1)
    client("POST", "/predict", [], {"Content-Type": JSON})
    assert (client.status, client.json["error"]["got"]) == (408, "0 bytes")
    client("POST", "/predict", [b"{"], {"Content-Type": JSON}, disconnect=True)
    assert client.status == 400


def test_an_error_of_the_service_itself(client, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(service, "predict", broken)
    with pytest.raises(ZeroDivisionError):  # for the server's log, after the answer
        client.post(as_json(IMAGES))
    assert (client.status, client.json) == (500, {"error": "internal error, see the log"})


@settings(max_examples=200)
@given(data=st.data())
def test_no_bytes_break_it(app, data):
    """Random headers, and good files in which bytes were changed."""
    if data.draw(st.booleans()):
        body = bytearray(GOOD if data.draw(st.booleans()) else npy_header((1, 8, 8)) + bytes(512))
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, min(len(body), 140) - 1))] = data.draw(st.integers(0, 255))
    else:
        header = data.draw(st.binary(max_size=40) | st.text("{}[]()'\",:=\\ \n\t0L1descrfotan_oshp", max_size=60))
        header = header.encode() if isinstance(header, str) else header
        body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    client = Client(app).post(bytes(body), NPY)
    assert client.status in (200, 400, 422), client.body


# ------------------------------------------------------------------------------------------------------------- networks


def test_a_network_is_saved_whole(path):
    network = networks.convolutional(np.random.default_rng(7), with_layer=True).load(path)
    with np.load(path, allow_pickle=False) as saved:
        state = network.state_dict()
        assert saved.files == list(state)
        for name, array in state.items():
            np.testing.assert_array_equal(saved[name], array, strict=True)
    for changed in ({**state, "0.bias": np.zeros(8)}, {**state, "9.weight": np.zeros(8)}, {}):
        with pytest.raises((KeyError, ValueError), match=r"must have|must be"):
            network.load_state_dict(changed)


def test_without_a_network_it_does_not_start(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make digits\.npz"):
        service.load_network(tmp_path / "digits.npz")


# -------------------------------------------------------------------------------------------------------- real servers

# Large enough for a team of threads.
LARGEST = as_npy(np.random.default_rng(2).integers(0, 17, (service.MAX_IMAGES, 8, 8), np.uint8))


def post(url, body, kind=JSON):
    """Status, pid of the worker, body."""
    request = urllib.request.Request(f"{url}/predict", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, int(response.headers["X-Worker-Pid"]), response.read()
    except urllib.error.HTTPError as response:
        with response:
            return response.status, None, response.read()


def answers_of_workers(url, count):
    """Workers' answers to the same request, by pid, asked until `count` have answered."""
    answers = {}
    for _ in range(2000):
        status, pid, body = post(url, LARGEST, NPY)
        assert status == 200
        assert answers.setdefault(pid, body) == body
        if len(answers) == count:
            break
    return answers


def wait_for_end(pid):
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.01)
        raise AssertionError(f"{pid} lives")


def stop(process):
    """Asked politely, it goes, and its workers with it."""
    process.terminate()
    assert process.wait(15) in (0, -signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def environment(path):
    return {"SERVICE_NETWORK": str(path), "OMP_NUM_THREADS": "2"}


def test_gunicorn_forks_a_service_that_has_run(path, client):
    """The parent has run a team of two threads, and the children are told to use two: without a guard they hang."""
    want = client.post(LARGEST, NPY).body
    with serve("gunicorn", 2, CYBN_NUM_THREADS="2", **environment(path)) as (process, url):
        answers = answers_of_workers(url, 2)
        assert len(answers) == 2
        assert process.pid not in answers
        assert set(answers.values()) == {want}
        with urllib.request.urlopen(f"{url}/config", timeout=10) as response:
            config = json.load(response)
        assert config["warmed_up"] == {"pid": process.pid, "threads": max(2, usable_cores())}

        for name in ("malformed JSON", "truncated", "claims terabytes", "pickled", "nested too deeply"):
            body, kind, status, *_ = REFUSED[name]
            assert post(url, body, kind)[0] == status
        status, _, body = post(url, bytes(service.MAX_BYTES + 1), NPY)
        assert (status, json.loads(body)["error"]["field"]) == (413, "body")
        assert answers_of_workers(url, 2) == answers

        victim, survivor = answers
        os.kill(victim, signal.SIGKILL)
        wait_for_end(victim)
        later = answers_of_workers(url, 2)
        assert len(later) == 2
        assert survivor in later
        assert set(later.values()) == {want}
        stop(process)


def test_uvicorn_answers_from_several_threads(path, client):
    want = client.post(LARGEST, NPY).body
    with serve("uvicorn", 2, **environment(path)) as (process, url):
        assert workers_seen(url, 1) == {process.pid}
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.extend(post(url, LARGEST, NPY) for _ in range(20))) for _ in "1234"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert answers == [(200, process.pid, want)] * 80
        assert post(url, b"{", JSON)[0] == 400
        assert post(url, bytes(service.MAX_BYTES + 1), NPY)[0] == 413
        assert post(url, LARGEST, NPY) == (200, process.pid, want)
        stop(process)


@pytest.mark.parametrize(("processors", "quota", "usable"), [(4, None, 4), (4, 2, 2), (2, 4, 2)])
def test_cores_are_shared_out_as_far_as_the_quota_pays_for_them(monkeypatch, processors, quota, usable):
    config = {"processors": processors, "cpu quota": quota}
    monkeypatch.setattr(cybn, "show_config", lambda mode: config)
    assert usable_cores() == usable


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_under_load_only_a_killed_worker_loses_requests(path):
    run = subprocess.run(
        [sys.executable, "-m", "service.load", "--mode", "gunicorn", "--workers", "2", "--seconds", "1"],
        env=os.environ | environment(path) | {"PYTHONPATH": str(Path(networks.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Another has taken its place." in run.stdout
