import os

import pytest
from hypothesis import HealthCheck, settings

import cybn
from cybn import _kernels, _ops, _threads

settings.register_profile(
    "cybn",
    deadline=None,  # two shared cores: a slow example is not a bug
    max_examples=100,
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


needs_openmp = pytest.mark.skipif(not _threads.openmp_version, reason="built without OpenMP")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("openmp"):
            item.add_marker(needs_openmp)


def pytest_configure(config):
    config.addinivalue_line("markers", "openmp: needs a cybn built with OpenMP")
