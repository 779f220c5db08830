"""DistributedDataParallel and FSDP2: two processes, each with half of every batch, learn as one with the whole."""

import data_parallel_worker
import pytest
import ranks

pytestmark = ranks.needs_gloo


@pytest.mark.parametrize("check", data_parallel_worker.CHECKS)
def test_two_ranks(check):
    ranks.assert_passed(data_parallel_worker, check)
