"""The headers of the kernels, compiled as for other processors and compilers: the same bits."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cybn import _kernels

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")

VARIANTS = {
    "this processor": [],
    "vectors, but not x86's": ["-U__SSE2__", "-U__SSE__"],
    "no vectors": ["-U__SSE2__", "-U__SSE__", "-DNO_VECTORS"],
}
if "x86_v3" in _kernels.builds:
    VARIANTS["x86-64-v3"] = ["-march=x86-64-v3"]


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_headers_give_the_same_bits_on_processors_and_compilers_of_other_kinds(tmp_path):
    printed = {}
    for name, flags in VARIANTS.items():
        command = [COMPILER, "-O2", "-ffp-contract=off", "-Werror=implicit-function-declaration", *flags]
        source, program = HERE / "lanes_run.c", tmp_path / "lanes_run"
        kernels = HERE.parent / "src" / "cybn" / "_kernels"
        subprocess.run([*command, f"-I{kernels}", source, "-o", program, "-lm"], check=True, capture_output=True)
        printed[name] = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    first = printed.pop("this processor")
    assert len(first) == 2 * (1 + 12 * 3 + 1) + 1
    assert printed == dict.fromkeys(printed, first)
