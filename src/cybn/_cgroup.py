"""How many processors the control groups of this process allow: the quota of containers, which OpenMP does not see.

Rules: the kernel's documentation of cgroup v2 (cpu.max) and v1 (cpu.cfs_quota_us, cpu.cfs_period_us). A quota binds all
groups below it, so the process's own group and all above it count. Rounded down: a thread more than the quota pays for
would have all of them stopped until the next period, of 100 ms as a rule.
"""

import os
import re

from cybn import _files


def processors(proc="/proc/self"):
    """Processors that the quota pays for, at least 1; None: there is no quota (or none that can be read)."""
    try:
        with open(f"{proc}/cgroup") as groups, open(f"{proc}/mountinfo") as mounts:
            folders = list(_folders(groups.read().splitlines(), mounts.read().splitlines()))
    except (OSError, ValueError):  # a system without, or with files of another kind
        return None
    shares = [share for folder in folders if (share := _share(folder)) is not None]
    return max(1, int(min(shares))) if shares else None


def _folders(groups, mounts):
    """The folders of this process's groups, in every hierarchy that may limit processors, up to where it is mounted."""
    paths = {}
    for line in groups:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path  # v2 has no controllers here
    for line in mounts:  # id parent device root mount-point options [optional ...] - type source options
        before, _, after = line.partition(" - ")
        root, mount = (_unescape(text) for text in before.split(" ")[3:5])
        kind, _, options = after.split(" ", 2)
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # In a container the mounted part of the tree may be the process's own group.
        inside = os.path.relpath(paths[controller], root)
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


def _unescape(text):
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
