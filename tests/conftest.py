"""Shared by all tests: uninitialised memory is poisoned, and every test starts from the same seed."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--forbid-skips", action="store_true", help="fail if anything was skipped: for CI")


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # None in a process that another directs
    if session.config.getoption("forbid_skips") and reporter and reporter.stats.get("skipped", []):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills torch.empty with NaN and the largest integers: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def products_row_by_row():
    """torch's products without oneDNN, whose 16-bit rows of an odd length see NaN in other rows where there is AMX.

    Of 300 products of [30, 7] and [7, 54] with rows of NaN, 282 changed in other rows (torch 2.13.0 on a Xeon).
    """
    with torch.backends.mkldnn.flags(enabled=False):
        yield
