"""SyncBatchNorm and batch_norm over a process group: two processes, with unequal batches, equal one with the whole."""

import pytest
import ranks
import sync_batch_norm_worker

if not ranks.is_available:
    pytest.skip("torch was built without gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    return ranks.outcomes(sync_batch_norm_worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", sync_batch_norm_worker.CHECKS)
def test_two_ranks(outcomes, check):
    ranks.assert_passed(outcomes, check)
