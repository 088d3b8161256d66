"""What the control groups of this process allow it: processors and memory of containers, which OpenMP does not see.

Rules: the kernel's documentation of cgroup v2 (cpu.max, memory.max) and v1 (cpu.cfs_quota_us, cpu.cfs_period_us,
memory.limit_in_bytes). A limit binds all groups below it, so the process's own group and all above it count.
Processors are rounded down: a thread more than the quota pays for would have all of them stopped until the next period,
of 100 ms as a rule.
"""

import os
import re

from cybn import _files


def processors(proc="/proc/self"):
    """Processors that the quota pays for, at least 1; None: there is no quota (or none that can be read)."""
    shares = [share for folder in _folders(proc, "cpu") if (share := _share(folder)) is not None]
    return max(1, int(min(shares))) if shares else None


def memory(proc="/proc/self"):
    """Bytes; None: there is no limit (or none that can be read)."""
    return min((limit for folder in _folders(proc, "memory") if (limit := _limit(folder)) is not None), default=None)


def _folders(proc, controller):
    """The folders of a process's groups, in every hierarchy that may have the controller."""
    try:
        with open(f"{proc}/cgroup") as groups, open(f"{proc}/mountinfo") as mounts:
            return list(_walk(groups.read().splitlines(), mounts.read().splitlines(), controller))
    except (OSError, ValueError):  # a system without, or with files of another kind
        return []


def _walk(groups, mounts, controller):
    """From each group up to where its hierarchy is mounted."""
    paths = {}
    for line in groups:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            paths[name] = path  # v2 has no controllers here
    for line in mounts:  # id parent device root mount-point options [optional ...] - type source options
        before, _, after = line.partition(" - ")
        root, mount = (_unescape(text) for text in before.split(" ")[3:5])
        kind, _, options = after.split(" ", 2)
        name = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if name not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        # In a container the mounted part of the tree may be the process's own group.
        inside = os.path.relpath(paths[name], root)
        folder = os.path.normpath(os.path.join(mount, "" if inside.startswith("..") else inside))
        while True:
            yield folder
            if len(folder) <= len(mount):
                break
            folder = os.path.dirname(folder)


def _share(folder):
    """Processors' worth of time per period, or None."""
    try:
        if (text := _files.read(folder, "cpu.max")) is not None:
            quota, period = text.split()
        else:
            quota, period = _files.read(folder, "cpu.cfs_quota_us"), _files.read(folder, "cpu.cfs_period_us")
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (TypeError, ValueError):  # absent; "max"
        return None


def _limit(folder):
    """Bytes of memory, or None. (v1 has a number beyond all memory where there is no limit.)"""
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _files.read(folder, name)
        if text is not None and text.isdecimal():
            return int(text)
    return None


def _unescape(text):
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
