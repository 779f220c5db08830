"""DistributedDataParallel and FSDP2: two processes, each with half of every batch, learn as one with the whole."""

import data_parallel_worker
import pytest
import ranks

if not ranks.is_available:
    pytest.skip("torch was built without gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    return ranks.outcomes(data_parallel_worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", data_parallel_worker.CHECKS)
def test_two_ranks(outcomes, check):
    ranks.assert_passed(outcomes, check)
