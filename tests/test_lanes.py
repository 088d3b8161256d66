"""The headers of the kernels, compiled as for other processors and compilers: the same bits."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cybn import _kernels

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
CLANG = shutil.which("clang")

VARIANTS = {
    "this processor": [COMPILER],
    "vectors, but not x86's": [COMPILER, "-U__SSE2__", "-U__SSE__"],
    "no vectors": [COMPILER, "-U__SSE2__", "-U__SSE__", "-DNO_VECTORS"],
}
if "x86_v3" in _kernels.builds:
    VARIANTS["x86-64-v3"] = [COMPILER, "-march=x86-64-v3"]
if CLANG:  # (stricter about vectors than gcc)
    VARIANTS["clang"] = [CLANG]


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_headers_give_the_same_bits_on_processors_and_compilers_of_other_kinds(tmp_path):
    compilers = {}
    for name, variant in VARIANTS.items():  # side by side: each takes seconds
        command = [*variant, "-O2", "-ffp-contract=off", "-Werror=implicit-function-declaration"]
        kernels = HERE.parent / "src" / "cybn" / "_kernels"
        command += [f"-I{kernels}", HERE / "lanes_run.c", "-o", tmp_path / name, "-lm"]
        compilers[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = {}
    for name, compiler in compilers.items():
        output, _ = compiler.communicate()
        assert compiler.returncode == 0, output
        program = subprocess.run([tmp_path / name], check=True, capture_output=True, text=True)
        printed[name] = program.stdout.splitlines()
    first = printed.pop("this processor")
    assert len(first) == 2 * (1 + 12 * 3 + 1) + 1
    assert printed == dict.fromkeys(printed, first)
