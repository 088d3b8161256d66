"""Who does what, read from `_schedule.plan_of`: a plain function of shape, threads and caches."""

import json
import math
from pathlib import Path

import pytest

from cybn import _schedule

KIB, MIB = 1024, 1024 * 1024
CACHES = [(512 * KIB, 32 * MIB), (2 * MIB, 480 * MIB), (MIB, 4 * MIB)]
"""L2 and L3 of processors of the last years."""

WORKLOADS = Path(__file__).parents[1] / "benchmarks" / "workloads.json"


def workload_geometries():
    """(outer, channels, inner) of every shape of the workload table, channels-first and channels-last."""
    for network, cases in json.loads(WORKLOADS.read_text()).items():
        for case in cases if network != "comment" else ():
            n, c, *spatial = case["shape"]
            inner = math.prod(spatial)
            if c == 1:
                yield 1, 1, n * inner
                continue
            yield n, c, inner
            yield n * inner, c, 1


GEOMETRIES_OF_WORKLOADS = sorted(set(workload_geometries()))
every_workload = pytest.mark.parametrize("geometry", GEOMETRIES_OF_WORKLOADS, ids=str)


@every_workload
def test_every_thread_has_its_share(geometry):
    """From 1 to 64 threads: none idle, none with more than 1.25 times the average, where each has 256 KiB of x."""
    size = math.prod(geometry)
    for l2, l3 in CACHES:
        for operands, results, reduces, maps in ((2, 1, 1, 1), (1, 0, 1, 1), (3, 1, 1, 1), (1, 0, 1, 0), (2, 1, 0, 1)):
            for threads in range(1, min(64, 4 * size // (256 * KIB)) + 1):
                plan = _schedule.plan_of(
                    *geometry, threads, operands=operands, results=results, reduces=reduces, maps=maps, l2=l2, l3=l3
                )
                shares = [0] * threads
                for thread, elements, *_ in plan["tasks"]:
                    shares[thread] += elements
                assert plan["threads"] == threads
                assert sum(shares) == size
                assert min(shares) > 0
                assert max(shares) * threads <= 1.25 * size


@every_workload
def test_a_threads_part_is_cut_into_shares(geometry):
    """At most 16, 1024 in all, of one MB of memory that is moved or more. An owner's are groups."""
    size = math.prod(geometry)
    for l2, l3 in CACHES:
        for operands, results, reduces, maps in ((2, 1, 1, 1), (1, 0, 1, 0), (2, 1, 0, 1)):
            for threads in (1, 2, 3, 16, 64, 100):
                plan = _schedule.plan_of(
                    *geometry, threads, operands=operands, results=results, reduces=reduces, maps=maps, l2=l2, l3=l3
                )
                assert plan["shares"] <= 1024
                if plan["kind"] == "owner":
                    assert plan["shares"] == len(plan["tasks"])
                    continue
                each, rest = divmod(plan["shares"], plan["threads"])
                assert rest == 0
                assert 1 <= each <= (16 if plan["threads"] > 1 else 1)
                moved = operands * 4 * size + reduces * 256 * geometry[1]
                assert each == 1 or each * plan["threads"] <= moved / MIB


def test_shares_end_with_tiles_or_threads():
    """Half rows would be read in half as long pieces: 0.5 to 0.8 times as fast. 13 slices, six shares for each."""
    plan = _schedule.plan_of(6272, 256, 1, 2, l2=512 * KIB, l3=32 * MIB)
    assert plan["shares"] == 12
    assert plan["slices"] == 13
    slices = [(thread, elements * 13 / (6272 * 256)) for thread, elements, *_ in plan["tasks"]]
    whole = [thread for thread, part in slices if part > 0.9]
    assert whole == 6 * [0] + 6 * [1]
    assert [thread for thread, part in slices if 0.4 < part < 0.6] == [0, 1]
    assert len(slices) == 14


@every_workload
def test_partial_sums_share_no_cache_line(geometry):
    """Of two shares, which any two threads may have; and each is written once."""
    for l2, l3 in CACHES:
        for threads in (2, 3, 7, 16, 61, 64):
            plan = _schedule.plan_of(*geometry, threads, l2=l2, l3=l3)
            writer = {}
            written = 0
            for task, (_, _, *ranges) in enumerate(plan["tasks"]):
                for first, end in ranges:
                    written += end - first
                    assert end + plan["slices"] <= plan["doubles"]
                    for line in range(first // 8, (end - 1) // 8 + 1):
                        assert writer.setdefault(line, task) == task
            assert plan["kind"] == "owner" or written == 2 * plan["slices"] * geometry[1]


@pytest.mark.parametrize(
    ("geometry", "caches", "threads", "kind"),
    [
        ((32, 256, 196), (2 * MIB, 7 * MIB), 2, "owner"),  # a few channels fit L2
        ((32, 256, 196), (512 * KIB, 7 * MIB), 2, "owner"),  # or L3, where not all of them do
        ((32, 256, 196), (512 * KIB, 32 * MIB), 2, "two sweeps"),  # and where all do there is no need
        ((32, 64, 12544), (512 * KIB, 32 * MIB), 2, "owner"),  # one channel, 1.6 MB, fits its share of L3
        ((32, 64, 12544), (2 * MIB, 2 * MIB), 16, "cooperative"),  # in parts, L2
        ((32, 64, 12544), (512 * KIB, 2 * MIB), 2, "two sweeps"),
        ((401408, 64, 1), (512 * KIB, 32 * MIB), 2, "two sweeps"),
        ((64, 8192, 1), (512 * KIB, 32 * MIB), 2, "owner"),  # shares are channels anyway
        ((12, 1024, 49), (MIB, 32 * MIB), 2, "owner"),  # so here, in few pieces of memory
        ((32, 512, 49), (MIB, 32 * MIB), 2, "two sweeps"),  # in many, at whose ends threads take each other's lines
        ((1, 64, 12544), (MIB, 32 * MIB), 2, "owner"),  # in one
        ((40, 3000, 1), (MIB, 32 * MIB), 2, "owner"),  # or where a group fits L2
        ((128, 1024, 1), (MIB, 32 * MIB), 2, "two sweeps"),  # unless pieces are many and short
        ((32, 64, 1), (512 * KIB, 32 * MIB), 2, "owner"),  # everything fits
    ],
)
def test_kinds_of_plans(geometry, caches, threads, kind):
    l2, l3 = caches
    assert _schedule.plan_of(*geometry, threads, l2=l2, l3=l3)["kind"] == kind


def test_an_owners_groups_have_room_for_their_partial_sums():
    """Each in the pitch of the widest."""
    for channels in range(8, 400):
        for threads in (8, 11, 16, 32):
            plan = _schedule.plan_of(1, channels, 440_320, threads, operands=1, results=0, l2=512 * KIB, l3=504 * MIB)
            assert max(end for *_, (_, end) in plan["tasks"]) + plan["slices"] <= plan["doubles"]


def test_an_owners_groups_are_of_equal_width():
    """To a channel. Of 128 channels, as 12 groups of 10 and one of 8, one of two threads had 70."""
    owners = 0
    for channels in range(60, 400):
        for threads in (2, 3, 4):
            plan = _schedule.plan_of(32, channels, 784, threads, l2=512 * KIB, l3=12 * MIB)
            if plan["kind"] != "owner":
                continue
            owners += 1
            widths = [elements // (32 * 784) for _, elements, *_ in plan["tasks"]]
            assert sum(widths) == channels
            assert max(widths) - min(widths) <= 1
            assert len(widths) % threads == 0
    assert owners > 500


def test_wide_groups_of_owners_are_for_what_two_sweeps_would_lose():
    """Of arrays of which L3 holds two, two sweeps find both there again; but few pieces are read as fast by owners."""

    def kind(outer, channels, inner):
        plan = _schedule.plan_of(outer, channels, inner, 2, operands=3, l2=512 * KIB, l3=32 * MIB)
        assert plan["distant"]
        return plan["kind"]

    assert kind(32, 128, 784) == "two sweeps"
    assert kind(32, 160, 784) == "owner"
    assert kind(10, 20, 14400) == "owner"


def test_what_is_written_past_the_caches_takes_no_room_in_them():
    plan = _schedule.plan_of(32, 64, 12544, 2, l2=512 * KIB, l3=32 * MIB)
    assert plan["streamed"]
    assert plan["kind"] == "owner"
    assert not _schedule.plan_of(32, 64, 12544, 2, results=0, l2=512 * KIB, l3=32 * MIB)["streamed"]


def test_no_block_is_shorter_than_the_vectors_that_its_sums_end_with():
    """That of 510 x 510 had four elements: its sums read, and wrote, twelve that belong to others."""
    assert _schedule.plan_of(1, 2, 510 * 510, 1)["block"] == 2016
    for inner in [*range(2049, 400_000, 13), *range(260_000, 270_000)]:
        block = _schedule.plan_of(1, 1, inner, 1)["block"]
        assert inner % block == 0 or inner % block >= 16
        assert 1024 <= block <= 2048


def test_maps_take_runs_as_they_lie_in_memory():
    """Blocks cut them for sums. Two threads at the two halves of every run took up to three times as long."""
    runs = 1, 256, 56 * 56
    assert _schedule.plan_of(*runs, 2)["slices"] == 2
    plan = _schedule.plan_of(*runs, 2, reduces=False)
    runs = [(thread, elements / 3136) for thread, elements, *_ in plan["tasks"]]
    assert runs == [(0, 42), (0, 43), (0, 43), (1, 42), (1, 43), (1, 43)]
    # In pieces where there are too few for equal shares, and no more of them than that takes.
    plan = _schedule.plan_of(1, 3, 10**6, 2, reduces=False)
    assert plan["slices"] == 11
    shares = [sum(elements for thread, elements, *_ in plan["tasks"] if thread == t) for t in range(2)]
    assert sum(shares) == 3 * 10**6
    assert max(shares) < 1.1 * min(shares)


def test_maps_of_rows_are_shared_in_whole_rows():
    """Two threads with halves of each row of (128, 2048) took two to five times as long."""
    for rows, channels, inner, each in (256, 1024, 1, 1), (64, 8192, 1, 1), (32, 512, 49, 2):
        assert _schedule.plan_of(rows, channels, inner, 2)["slices"] == 1
        plan = _schedule.plan_of(rows, channels, inner, 2, reduces=False)
        part = rows * channels * inner // (2 * each)
        assert [(thread, elements) for thread, elements, *_ in plan["tasks"]] == each * [(0, part)] + each * [(1, part)]
        assert plan["slices"] == plan["shares"] == 2 * each
    # (The second one's shares would have 16 rows each: 0.9 times as fast.)
    assert _schedule.plan_of(64, 8192, 1, 2, itemsize=8, reduces=False)["shares"] == 2
    assert _schedule.plan_of(1024, 8192, 1, 2, reduces=False)["shares"] == 2 * (512 // 128)
    # Not where each would have so few that its tables cost more, nor where their numbers would differ.
    assert _schedule.plan_of(20, 8192, 1, 2, reduces=False)["slices"] == 1
    assert _schedule.plan_of(5, 8192, 49, 4, reduces=False)["slices"] == 1
