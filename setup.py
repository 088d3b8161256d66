"""The extension modules, their flags and the OpenMP probe. Everything else is in pyproject.toml.

OpenMP is linked for its settings (OMP_NUM_THREADS, limits set by threadpoolctl, parallel regions); the threads are
cybn's own. CYBN_OPENMP=required: fail when the compiler has none; off: do not look for it; unset: use it if there.
CYBN_SANITIZE=address,undefined, or another argument of gcc's -fsanitize: a build to look for errors with, in a build
directory of its own.
"""

import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

PROBE = """
#include <omp.h>
int main(void) {
    int n = 0;
    #pragma omp parallel reduction(+:n)
    n += 1;
    return n < 1 || omp_get_max_threads() < 1;
}
"""

# Plain IEEE arithmetic: the same bits whatever the instruction set. No fused multiply-add unless written, nothing of
# the fast-math family (at link it would change the floating-point mode of the whole process). Loops begin at a cache
# line: a map's loop of 47 bytes that came to lie in two took 1.2 times as long, one of 32 bytes 1.4 times.
FLAGS = {
    "unix": ["-O3", "-ffp-contract=off", "-falign-loops=64"],
    "msvc": ["/O2", "/fp:precise"],
}

# The kernels' leaves are written once and take constants that choose among their forms (`uniform`, `backward`): each
# form is a loop in vectors only where the constant arrives, and gcc gives up inlining in functions of that size.
INLINE = {
    "unix": "-DCYTHON_INLINE=inline __attribute__((always_inline))",
    "msvc": "/DCYTHON_INLINE=__forceinline",
}

# Builds of the one kernel body beside the baseline; which of them a processor can run is found out at import.
KERNEL_FLAGS = {}
if platform.machine().lower() in ("x86_64", "amd64") and os.name == "posix":
    KERNEL_FLAGS["cybn._kernels.x86_v3"] = ["-march=x86-64-v3"]

# -O1 and -g1: the frames of a report, without the minutes that variables would take. What is undefined is fatal.
SANITIZE = os.environ.get("CYBN_SANITIZE", "")
SANITIZE_LINK = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *SANITIZE_LINK]


def openmp_candidates(compiler):
    """Pairs (compile flags, link flags) to try."""
    if compiler.compiler_type == "msvc":
        return [(["/openmp"], [])]
    if sys.platform == "darwin":
        return [(["-Xpreprocessor", "-fopenmp"], ["-lomp"]), (["-fopenmp"], ["-fopenmp"])]
    return [(["-fopenmp"], ["-fopenmp"])]


def links(compiler, compile_flags, link_flags):
    """Whether a program with an OpenMP region compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(PROBE)
        try:
            objects = compiler.compile([str(source)], output_dir=folder, extra_postargs=compile_flags)
            compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=link_flags)
        except (CompileError, LinkError):
            return False
    return True


class BuildExt(build_ext):
    """build_ext that knows the compiler, and so its flags. It compiles on all processors."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        compiler = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        compile_flags, link_flags = self.find_openmp()
        for extension in self.extensions:
            extension.extra_compile_args = FLAGS[compiler] + compile_flags + KERNEL_FLAGS.get(extension.name, [])
            if extension.name.startswith("cybn._kernels."):
                extension.extra_compile_args.append(INLINE[compiler])
            extension.extra_link_args = link_flags + SANITIZE_LINK
            if SANITIZE:
                extension.extra_compile_args.extend(SANITIZE_FLAGS)
        # setuptools rebuilds what is older than its sources; other flags must rebuild too.
        stamp = Path(self.build_temp, "flags")
        now = repr([(e.extra_compile_args, e.extra_link_args) for e in self.extensions])
        self.force = self.force or not stamp.exists() or stamp.read_text() != now
        super().build_extensions()
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(now)

    def find_openmp(self):
        wish = os.environ.get("CYBN_OPENMP", "auto")
        if wish not in ("auto", "required", "off"):
            raise SystemExit(f"CYBN_OPENMP must be auto, required or off, got {wish!r}")
        if wish == "off":
            return [], []
        for candidate in openmp_candidates(self.compiler):
            if links(self.compiler, *candidate):
                return candidate
        if wish == "required":
            raise SystemExit("CYBN_OPENMP=required, but the compiler cannot build an OpenMP program")
        warnings.warn("cybn: the compiler has no OpenMP; its settings will not be followed", stacklevel=2)
        return [], []


def extension(name):
    return Extension(
        f"cybn.{name}",
        [f"src/cybn/{name.replace('.', '/')}.pyx"],
        include_dirs=[numpy.get_include(), "src/cybn", "src/cybn/_kernels"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
        depends=[str(path) for end in ("pxd", "pxi", "h") for path in Path("src/cybn").rglob(f"*.{end}")],
    )


setup(
    cmdclass={"build_ext": BuildExt},
    options={"build": {"build_base": f"build/{SANITIZE}"}} if SANITIZE else {},
    ext_modules=cythonize(
        [
            *(extension(name) for name in ("_kernels.baseline", "_kernels.processor")),
            *(extension(name.removeprefix("cybn.")) for name in KERNEL_FLAGS),
            *(extension(name) for name in ("_threads", "_memory", "_arrays", "_schedule", "_coefficients")),
            *(extension(name) for name in ("_ops", "_layer")),
        ],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": True,
        },
    ),
)
