"""Handwritten digits over HTTP: one ASGI application, for prefork servers and for threads. See README.md beside it.

POST /predict takes images, GET /health says that the process answers, GET /config what it runs with. Whatever a client
sends, it is checked before memory is spent on it, and refused with the field, what was expected and what came.
"""

import io
import json
import math
import os
import reprlib
from pathlib import Path

import anyio
import numpy as np
from networks import convolutional
from numpy.lib import format as npy
from service.cores import usable_cores
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from threadpoolctl import threadpool_limits

import cybn

SIDE = 8  # pixels
WHITE = 16  # the largest value of a pixel, as in scikit-learn's digits
MAX_IMAGES = 256  # in a request: some 20 ms, for which another request may have to wait
MAX_BYTES = 1 << 20  # of a body: three times what so many images take as JSON in full precision
MAX_DISCARDED = 16 * MAX_BYTES  # of a body too long: many clients look for an answer only when they have sent all
READ_SECONDS = 10  # for a body to arrive

JSON = "application/json"
NPY = ("application/x-npy", "application/octet-stream")
NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Refused(Exception):
    def __init__(self, status, field, expected, got):
        super().__init__(field, expected, got)
        self.status = status
        self.error = {"field": field, "expected": expected, "got": got}


# ------------------------------------------------------------------------------------------------------- what comes in


def decode(body, kind):
    """The images (N, 8, 8) of a request's body, their values as they came."""
    if kind != JSON and kind not in NPY:
        raise Refused(415, "Content-Type", f"{JSON} or {NPY[0]} (or {NPY[1]})", reprlib.repr(kind))
    if not body:
        raise Refused(400, "body", "images", "nothing")
    images = decode_json(body) if kind == JSON else decode_npy(body)
    bad = ~((images >= 0) & (images <= WHITE))  # NaN too
    if bad.any():
        i = np.unravel_index(bad.argmax(), bad.shape)
        raise Refused(422, "images" + "".join(f"[{n}]" for n in i), f"a number from 0 to {WHITE}", str(images[i]))
    return images


def decode_json(body):
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: [[[[[...
        raise Refused(400, "body", "JSON", f"{type(error).__name__}: {error}") from None
    if not isinstance(message, dict) or message.keys() != {"images"}:
        got = f"the names {reprlib.repr(list(message))}" if isinstance(message, dict) else type(message).__name__
        raise Refused(422, "body", 'an object with "images" and nothing else', got)
    # Objects first: asked for numbers, NumPy takes "3" and null, and left to choose, it makes every element as long as
    # the longest string.
    images = np.array(message["images"], object)
    check_shape(images.shape)
    unfit = {type(value) for value in images.flat} - {int, float}
    if unfit:
        raise Refused(422, "images", "numbers", ", ".join(sorted(kind.__name__ for kind in unfit)))
    try:
        return with_batch_axis(images.astype(np.float64))
    except OverflowError as error:
        raise Refused(422, "images", f"numbers from 0 to {WHITE}", str(error)) from None


def decode_npy(body):
    """As `np.load` does, but with nothing allocated on the word of a header, and without pickle and zip."""
    stream = io.BytesIO(body)
    try:
        version = npy.read_magic(stream)
        shape, fortran_order, dtype = NPY_HEADERS[version](stream)
    except Exception as error:  # a header is Python source that NumPy evaluates: it does not say what that may raise
        raise Refused(400, "body", "an .npy file", f"{type(error).__name__}: {str(error)[:200]}") from None
    if dtype.kind not in "fiu":
        raise Refused(422, "images", "an array of real numbers", f"an array of {str(dtype)[:80]}")
    check_shape(shape)
    size, expected = len(body) - stream.tell(), math.prod(shape) * dtype.itemsize
    if size != expected:
        raise Refused(400, "body", f"{expected} bytes after the header, for shape {shape} of {dtype}", f"{size} bytes")
    images = np.frombuffer(body, dtype, offset=stream.tell())
    return with_batch_axis(images.reshape(shape, order="F" if fortran_order else "C"))


def check_shape(shape):
    if shape[-2:] != (SIDE, SIDE) or len(shape) > 3 or not 1 <= math.prod(shape[:-2]) <= MAX_IMAGES:
        expected = f"shape ({SIDE}, {SIDE}) or (n, {SIDE}, {SIDE}) with n from 1 to {MAX_IMAGES}"
        raise Refused(422, "images", expected, f"shape {shape}"[:200])


def with_batch_axis(images):
    return images.reshape(-1, SIDE, SIDE)


async def read(request):
    """The body, of which no more than MAX_BYTES are kept."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "Content-Encoding", "none", reprlib.repr(request.headers["content-encoding"]))
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > (MAX_BYTES if "expect" in request.headers else MAX_DISCARDED):
        raise Refused(413, "body", f"at most {MAX_BYTES} bytes", f"Content-Length {length[:20]}")
    body, size = bytearray(), 0
    try:
        with anyio.fail_after(READ_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BYTES:
                    body += chunk
                elif size > MAX_DISCARDED:
                    break
    except TimeoutError:
        raise Refused(408, "body", f"all of it within {READ_SECONDS} s", f"{size} bytes") from None
    if size > MAX_BYTES:
        raise Refused(413, "body", f"at most {MAX_BYTES} bytes", f"at least {size}")
    return bytes(body)


# ------------------------------------------------------------------------------------------------------ what goes out


def predict(network, images):
    """Probabilities (N, 10)."""
    logits = network(images[:, None].astype(np.float32) / WHITE)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def answer(network, body, kind, accept):
    """From a request's body to the response."""
    p = predict(network, decode(body, kind))
    headers = {"X-Worker-Pid": str(os.getpid())}
    if any(kind in accept for kind in NPY):
        stream = io.BytesIO()
        np.save(stream, p)
        return Response(stream.getvalue(), headers=headers, media_type=NPY[0])
    return JSONResponse({"digits": p.argmax(axis=1).tolist(), "probabilities": p.tolist()}, headers=headers)


async def refused(request, error):
    return JSONResponse({"error": error.error}, error.status)


async def http_error(request, error):
    if error.status_code == 405:
        wrong = Refused(405, "method", error.headers["Allow"], request.method)
    else:
        wrong = Refused(404, "path", "/predict, /health or /config", request.url.path[:80])
    return JSONResponse({"error": wrong.error}, wrong.status, error.headers)


async def disconnected(request, error):
    return Response(status_code=400)  # nobody reads it


async def failed(request, error):
    return JSONResponse({"error": "internal error, see the log"}, 500)


# ---------------------------------------------------------------------------------------------------- the application


def load_network(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"no trained network in {path}: `make digits.npz` trains one")
    return convolutional(np.random.default_rng(), with_layer=True).load(path).eval()


def warm_up(network, threads):
    """Answer the largest request once, so that no client waits for first times.

    With `threads`: a process that has run a team and forks is what hangs where the team is OpenMP's.
    """
    with cybn.num_threads(threads):
        p = predict(network, np.zeros((MAX_IMAGES, SIDE, SIDE), np.float32))
        if not np.isfinite(p).all():
            raise ValueError("the network answers NaN to an empty image: it is not a trained one")
        return {"pid": os.getpid(), "threads": cybn.get_num_threads()}


def create_app():
    """The application. Environment: SERVICE_NETWORK, SERVICE_THREADS, WEB_CONCURRENCY, CYBN_NUM_THREADS."""
    cores = usable_cores()
    processes = int(os.environ.get("WEB_CONCURRENCY", 1))
    # 0: predictions are made by the thread of the event loop. Right where there is a process for every core.
    threads = int(os.environ.get("SERVICE_THREADS", 0))

    network = load_network(os.environ.get("SERVICE_NETWORK", Path(__file__).parents[2] / "digits.npz"))
    threadpool_limits(1, user_api="blas")
    warmed_up = warm_up(network, max(2, cores))
    # From here on cores are shared: processes x threads x threads of a call should be no more than there are.
    if "CYBN_NUM_THREADS" not in os.environ:
        cybn.set_num_threads(max(1, cores // (processes * max(1, threads))))
    limiter = anyio.CapacityLimiter(max(1, threads))

    async def run(function, *arguments):
        if threads:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter)
        return function(*arguments)

    async def post_predict(request):
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        return await run(answer, network, await read(request), kind, request.headers.get("accept", ""))

    async def get_health(request):
        return JSONResponse({"status": "ok", "pid": os.getpid()})

    async def get_config(request):
        return JSONResponse(
            {
                "cybn": await run(cybn.show_config, "dicts"),
                "pid": os.getpid(),
                "processes": processes,
                "threads": threads,
                "warmed_up": warmed_up,
                "limits": {"images": MAX_IMAGES, "bytes": MAX_BYTES, "seconds": READ_SECONDS},
            }
        )

    app = Starlette(
        routes=[
            Route("/predict", post_predict, methods=["POST"]),
            Route("/health", get_health),
            Route("/config", get_config),
        ],
        exception_handlers={
            Refused: refused,
            HTTPException: http_error,
            ClientDisconnect: disconnected,
            Exception: failed,
        },
    )
    app.router.redirect_slashes = False
    return app
