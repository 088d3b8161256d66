"""The caches, read from a tree that is made up."""

import pytest

from cybn import _caches
from cybn._caches import Caches


def add(folder, processor, index, level, kind, size, shared):
    cache = folder / f"cpu{processor}" / "cache" / f"index{index}"
    cache.mkdir(parents=True)
    files = {"level": level, "type": kind, "size": size, "shared_cpu_map": shared}
    for name, text in files.items():
        (cache / name).write_text(f"{text}\n")


@pytest.fixture
def tree(tmp_path):
    """Sixteen processors, two threads to a core, two last caches: 0 and 8 are one core."""
    for p in range(16):
        group = "00000000,00000f0f" if p % 8 < 4 else "00000000,0000f0f0"
        core = f"{1 << p % 8 | 1 << p % 8 + 8:08x}"
        add(tmp_path, p, 0, 1, "Data", "32K", core)
        add(tmp_path, p, 1, 1, "Instruction", "64K", core)
        add(tmp_path, p, 2, 2, "Unified", "1024K", core)
        add(tmp_path, p, 3, 3, "Unified", "32M", group)
    return tmp_path


@pytest.mark.parametrize(
    ("processors", "count", "sharers"),
    [
        (set(range(16)), 2, 8),
        ({0, 1, 2}, 1, 3),
        ({3, 8, 12}, 2, 2),
        ({5}, 1, 1),
    ],
)
def test_caches_are_counted_for_the_usable_processors(tree, processors, count, sharers):
    assert _caches.read(str(tree), processors) == Caches(2**20, 32 * 2**20, count, sharers)


def test_where_nothing_is_told_the_caches_are_those_of_a_small_processor(tmp_path):
    assert _caches.read(str(tmp_path), {0}) == (512 * 1024, 4 * 2**20, 1, 2**30)


@pytest.mark.parametrize("size", ["", "big", "-1K", "K"])
def test_a_size_that_is_none_counts_as_not_told(tmp_path, size):
    add(tmp_path, 0, 0, 2, "Unified", size, "1")
    add(tmp_path, 0, 1, 3, "Unified", size, "1")
    assert _caches.read(str(tmp_path), {0}) == Caches()


@pytest.mark.parametrize("shared", ["", "all", "0-1"])
def test_a_mask_that_is_none_leaves_each_processor_its_own(tmp_path, shared):
    for p in range(2):
        add(tmp_path, p, 3, 3, "Unified", "8M", shared)
    assert _caches.read(str(tmp_path), {0, 1}) == Caches(l3=8 * 2**20, count=2, sharers=1)


def test_code_is_not_data(tmp_path):
    add(tmp_path, 0, 0, 2, "Instruction", "2M", "1")
    assert _caches.read(str(tmp_path), {0}) == Caches()


def test_this_machine_has_caches():
    caches = _caches.read()
    assert 2**14 <= caches.l2 <= 2**30
    assert 2**14 <= caches.l3 <= 2**33
    assert caches.count >= 1
    assert caches.sharers >= 1
