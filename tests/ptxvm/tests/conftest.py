import pytest

from tests.ptxvm import nvcc


@pytest.fixture(scope="session", autouse=True)
def ptx_cache(request):
    nvcc.cache_folder = request.config.cache.mkdir("ptx")


@pytest.fixture
def record(record_property):
    """record(name, counters): note what was emulated, and for how long, in the test report."""

    def add(name, c):
        instructions = sum(c.warp_instructions.values())
        record_property(name, f"{c.wall_seconds:.2f} s, {instructions} warp instructions")
        return c

    return add
