"""pytest plugin: tests see a GPU that computes; without it, and in those marked ``counted``, kernels do nothing.

``fakecuda pytest -p pytest_fakecuda``
"""

import sys

import compute
import fakecuda
import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    module = sys.modules.get("test_gpu")
    if module is not None and hasattr(module, "on_gpu"):  # torch.profiler sees nothing here
        module.on_gpu = on_gpu
    if item.get_closest_marker("counted"):  # what is computed takes a hundred times as long as what is counted
        yield
        return
    compute.errors.clear()
    with compute.on():
        outcome = yield
    if compute.errors and outcome.excinfo is None:
        outcome.force_exception(compute.errors[0])


def on_gpu(step):
    """Names of what a step has a GPU do."""
    with fakecuda.record() as log:
        step()
    done = [c for c in log.calls if c.kernel or c.kind >= 0 or "emset" in c.call]
    return ["Memcpy" if c.kind >= 0 else c.kernel or "Memset" for c in done]
