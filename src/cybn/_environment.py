"""Environment variables that hold a number: what cannot be read is ignored, with a warning."""

import os
import warnings


def number(name, default, least=0, what="a number of bytes"):
    """The value of the environment variable `name`, or `default` where it is not set or makes no sense."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if text.isdecimal() and int(text) >= least:
        return min(int(text), 2**62)
    warnings.warn(f"{name} must be {what}, got {text!r}; ignored", RuntimeWarning, stacklevel=2)
    return default
