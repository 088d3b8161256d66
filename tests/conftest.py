import os
import subprocess

import pytest
from hypothesis import HealthCheck, settings

import cybn
from cybn import _kernels, _ops, _threads

settings.register_profile(
    "cybn",
    deadline=None,  # two shared cores: a slow example is not a bug
    max_examples=60,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
# Where each example takes ten times as long: `make sanitize`.
settings.register_profile("sanitize", settings.get_profile("cybn"), max_examples=10)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "cybn"))


@pytest.fixture(scope="module", params=list(_kernels.builds))
def kernels(request):
    """Each kernel build this processor can run, in turn. (Module scope: hypothesis refuses function scope.)"""
    before = _ops.select_kernels(request.param)
    yield request.param
    _ops.select_kernels(before)


@pytest.fixture
def process_threads():
    """For tests that call set_num_threads: the number before is restored."""
    before = cybn.get_num_threads()
    yield before
    cybn.set_num_threads(before)


OPENMP = """
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

static int team(void) {
    int n = 0;
    #pragma omp parallel num_threads(2) reduction(+:n)
    n += 1;
    return n;
}

/* look(), called by one thread of a region. */
void inside(void (*look)(void)) {
    #pragma omp parallel num_threads(2)
    #pragma omp single
    look();
}

/* 0: a forked child of a process with a team has one too; otherwise the number of the signal that ended its wait. */
int fork_with_a_team(int seconds) {
    int status;
    pid_t child;
    if (team() != 2) return -1;
    child = fork();
    if (child == 0) {
        alarm(seconds);
        _exit(team() != 2);
    }
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}
"""


@pytest.fixture(scope="session")
def openmp_library(tmp_path_factory):
    """A library of somebody else's that has OpenMP teams, in the runtime that cybn is linked to."""
    folder = tmp_path_factory.mktemp("openmp")
    source, library = folder / "other.c", folder / "other.so"
    source.write_text(OPENMP)
    try:
        subprocess.run(["cc", "-fopenmp", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler with OpenMP here")
    return library


needs_openmp = pytest.mark.skipif(not _threads.openmp_version, reason="built without OpenMP")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("openmp"):
            item.add_marker(needs_openmp)


def pytest_configure(config):
    config.addinivalue_line("markers", "openmp: needs a cybn built with OpenMP")
    config.addinivalue_line("markers", "large: takes gigabytes; `make test-large` runs it")
