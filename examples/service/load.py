"""How many requests the service answers in a second and how long each takes, measured by wrk; and what a crash costs.

    PYTHONPATH=examples python -m service.load [--url URL] [--mode gunicorn] [--workers 2] [--seconds 10]

Without --url it starts the service itself, on a free port of 127.0.0.1, in one mode after the other, and in the end
kills a worker under load. It fails if any other request does.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from service.cores import usable_cores
from tqdm import tqdm

HERE = Path(__file__).parent
CORES = usable_cores()
MODES = ("gunicorn", "uvicorn")
START_SECONDS = 30
STOP_SECONDS = 15


# --------------------------------------------------------------------------------------------------------- the service


def get(url, path):
    # A connection each: which worker gets it is chosen anew.
    with urllib.request.urlopen(url + path, timeout=5) as response:
        return json.load(response)


def command(mode, port):
    if mode == "gunicorn":
        return [sys.executable, "-m", "gunicorn", "--config", HERE / "gunicorn.conf.py"]
    place = ("--host", "127.0.0.1", "--port", str(port), "--app-dir", HERE.parent)
    return [sys.executable, "-m", "uvicorn", *place, "--factory", "service.app:create_app", "--no-access-log"]


@contextlib.contextmanager
def serve(mode, workers=CORES, **environment):
    """The running service: its process, and its URL on a free port. It is stopped in the end, whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"PORT": str(port)}
    if mode == "gunicorn":
        settings |= {"WEB_CONCURRENCY": str(workers), "SERVICE_THREADS": "0"}
    else:
        settings |= {"WEB_CONCURRENCY": "1", "SERVICE_THREADS": str(workers)}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        # A session of its own: Ctrl-C does not reach it, and what is left of it can be ended as a group.
        process = subprocess.Popen(
            command(mode, port), env=os.environ | settings | environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError):
                    get(url, "/health")
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{mode} did not start:\n{log.read()}")
                time.sleep(0.05)
            yield process, url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):  # what should happen
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def workers_seen(url, count, without=(), seconds=START_SECONDS):
    """The pids that answer: at least `count`, apart from those `without`."""
    seen = set()
    deadline = time.monotonic() + seconds
    while len(seen) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {sorted(seen)} answered within {seconds} s, expected {count} workers")
        with contextlib.suppress(OSError):
            seen |= {get(url, "/health")["pid"]} - set(without)
    return seen


# ------------------------------------------------------------------------------------------------------------ the load


def write_bodies(folder):
    """The requests: name, file, content type."""
    images = np.random.default_rng(0).integers(0, 17, (64, 8, 8))
    stream = io.BytesIO()
    np.save(stream, images.astype(np.float32))
    one, many = Path(folder, "one.json"), Path(folder, "many.npy")
    one.write_text(json.dumps({"images": images[0].tolist()}))
    many.write_bytes(stream.getvalue())
    return [("1 image, JSON", one, "application/json"), ("64 images, .npy", many, "application/x-npy")]


def run_wrk(url, body, kind, args, progress, halfway=None):
    """What post.lua prints in the end."""
    options = f"--timeout 10s --threads 1 --connections {args.connections} --duration {args.seconds}s --script".split()
    process = subprocess.Popen(
        ["wrk", *options, HERE / "post.lua", f"{url}/predict", "--", body, kind], stdout=subprocess.PIPE, text=True
    )
    try:
        start = time.monotonic()
        shown = 0
        while process.poll() is None:
            elapsed = time.monotonic() - start
            if elapsed > args.seconds + 10:
                raise RuntimeError(f"wrk did not end after {args.seconds} s")
            if halfway and elapsed > args.seconds / 2:
                halfway()
                halfway = None
            now = min(int(elapsed * 10), args.seconds * 10)
            progress.update(now - shown)
            shown = now
            time.sleep(0.05)
        progress.update(args.seconds * 10 - shown)
    finally:
        process.kill()
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"wrk failed:\n{output}")
    return json.loads(output.splitlines()[-1])


def connections(pid, port):
    """How many clients are connected with this process."""
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.add(os.readlink(link))
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    established = "01"
    return sum(
        local.endswith(f":{port:04X}") and state == established and f"socket:[{inode}]" in links
        for _, local, _, state, _, _, _, _, _, inode, *_ in rows
    )


def run_and_kill(url, body, kind, args, progress):
    """The load again, in the middle of which the busiest worker is killed: the result, and what it had in flight."""
    workers = workers_seen(url, args.workers)
    port = int(url.rpartition(":")[2])
    killed = {}

    def kill():
        in_flight = {pid: connections(pid, port) for pid in workers}  # wrk waits for an answer on every connection
        victim = max(in_flight, key=in_flight.get)
        os.kill(victim, signal.SIGKILL)
        killed[victim] = in_flight[victim]

    result = run_wrk(url, body, kind, args, progress, halfway=kill)
    workers_seen(url, args.workers, without=killed)
    return result, sum(killed.values())


ROW = "{:<10} {:<28} {:>10} {:>9} {:>9} {:>9} {:>9} {:>8}".format


def row(mode, name, result):
    rate = f"{result['requests'] / result['seconds']:,.0f}"
    failed = result["refused"] + result["lost"] + result["timeouts"]
    return ROW(mode, name, rate, *(f"{ms:.2f}" for ms in result["milliseconds"]), failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="of a running service (it is started otherwise)")
    parser.add_argument("--mode", choices=MODES, help="start it in this mode alone")
    parser.add_argument(
        "--workers", type=int, default=CORES, help="processes of gunicorn, threads of uvicorn (%(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement (%(default)s)")
    parser.add_argument("--connections", type=int, default=16, help="of wrk (%(default)s)")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: `apt-get install wrk` (Debian, Ubuntu), `brew install wrk`")
    # Whoever ends this ends what it has started: as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    modes = [args.mode] if args.mode else MODES
    kills = not args.url and "gunicorn" in modes
    rows, problems = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=10 * args.seconds * ((1 if args.url else len(modes)) * 2 + kills), ncols=100, unit="") as progress,
    ):
        progress.bar_format = "{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
        bodies = write_bodies(folder)

        def measure(mode, url):
            for name, body, kind in bodies:
                progress.set_description(f"{mode}: {name}")
                result = run_wrk(url, body, kind, args, progress)
                rows.append(row(mode, name, result))
                if result["refused"] or result["lost"] or result["timeouts"] or not result["requests"]:
                    problems.append(f"{mode}, {name}: failed requests, {result}")

        if args.url:
            measure("given", args.url.rstrip("/"))
        else:
            for mode in modes:
                with serve(mode, args.workers) as (_, url):
                    measure(mode, url)
                    if mode == "gunicorn":
                        name, body, kind = bodies[0]
                        progress.set_description(f"{mode}: a worker is killed")
                        result, in_flight = run_and_kill(url, body, kind, args, progress)
                        rows.append(row(mode, f"{name}, a worker killed", result))
                        crash = f"The killed worker had {in_flight} requests in flight; {result['lost']} were lost."
                        if result["refused"] or result["timeouts"] or result["lost"] > in_flight:
                            problems.append(f"{mode}, a worker killed: {in_flight} in flight, {result}")
    print("\n" + ROW("", "", "requests/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "failed"))
    print("\n".join(rows))
    print(f"\n{args.connections} connections, each sends when it has its answer; wrk on the same {CORES} cores.")
    if kills:
        print(crash + " Another has taken its place.")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
