from typing import Any

from cybn._caches import Caches

caches: Caches

def set_stream_min_bytes(n: int) -> int: ...
def last_caches(threads: int) -> int: ...
def streams(result: int, arrays: int, revisit: bool, l3: int) -> bool: ...
def set_caches(l2: int, l3: int, count: int = 1, sharers: int = ...) -> tuple[int, int, int, int]: ...
def plan_of(
    outer: int,
    channels: int,
    inner: int,
    threads: int,
    *,
    itemsize: int = 4,
    operands: int = 2,
    results: int = 1,
    reduces: bool = True,
    maps: bool = True,
    l2: int | None = None,
    l3: int | None = None,
) -> dict[str, Any]: ...
