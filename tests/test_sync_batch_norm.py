"""SyncBatchNorm and batch_norm over a process group: two processes, with unequal batches, equal one with the whole."""

import pytest
import ranks
import sync_batch_norm_worker

pytestmark = ranks.needs_gloo


@pytest.mark.parametrize("check", sync_batch_norm_worker.CHECKS)
def test_two_ranks(check):
    ranks.assert_passed(sync_batch_norm_worker, check)
