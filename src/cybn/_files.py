"""The small files in which the kernel describes the system."""

import os


def read(folder, name):
    """What the file says, without the end of its line; None where it cannot be read."""
    try:
        with open(os.path.join(folder, name)) as file:
            return file.read().strip()
    except (OSError, ValueError):
        return None
