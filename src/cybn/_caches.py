"""The caches that calls are planned for, as the system describes them.

Rule: the kernel's documentation of /sys/devices/system/cpu (cache/index*). sysconf(_SC_LEVEL3_CACHE_SIZE) is no
substitute: on AMD processors it adds up the whole socket's (320 MiB where the processors at hand share 32), and what is
planned for a cache that large goes to memory. It costs training of 5 to 50 MB a third of its speed.
"""

import os
from glob import glob
from typing import NamedTuple

from cybn import _files

CPU = "/sys/devices/system/cpu"


class Caches(NamedTuple):
    """Sizes in bytes; where the system does not tell, those of a small processor of the last ten years."""

    l2: int = 512 * 1024  # of one processor
    l3: int = 4 * 1024 * 1024  # of one of the last caches
    count: int = 1  # of last caches that the usable processors have
    sharers: int = 2**30  # usable processors that have one together; unknown: all


def read(folder=CPU, processors=None):
    """The caches of these processors (a set; None: those that this process may run on)."""
    if processors is None:
        processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    found = {}
    for index in glob(f"{folder}/cpu{min(processors)}/cache/index*"):
        if _files.read(index, "type") in ("Data", "Unified"):
            found[_files.read(index, "level")] = os.path.basename(index), _bytes(_files.read(index, "size"))
    caches = Caches()
    if "2" in found:
        caches = caches._replace(l2=found["2"][1] or caches.l2)
    if "3" in found and found["3"][1]:
        groups = _groups(folder, found["3"][0], processors)
        caches = caches._replace(l3=found["3"][1], count=len(groups), sharers=max(len(group) for group in groups))
    return caches


def _groups(folder, index, processors):
    """The sets of processors that share such a cache."""
    groups = []
    while processors:
        first = min(processors)
        mask = _mask(_files.read(f"{folder}/cpu{first}/cache/{index}", "shared_cpu_map"))
        groups.append({first} | {processor for processor in processors if mask >> processor & 1})
        processors = processors - groups[-1]
    return groups


def _mask(text):
    """The number of a mask such as "00000001,0000ffff"; 0 of another text, or none."""
    try:
        return int((text or "").replace(",", ""), 16)
    except ValueError:
        return 0


def _bytes(text):
    """The number of a size such as "32768K"; 0 of another text, or none."""
    text = text or ""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * unit if digits.isdecimal() else 0
