"""make nightly: every target runs, and the table says how each last went."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "nightly.py"
MAKEFILE = "good:\n\t@echo building\n\t@echo '== 7 passed =='\nbad:\n\t@echo 'what | was wrong'\n\t@false\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_fails_is_recorded_and_the_rest_runs(tmp_path):
    env = {**os.environ, "MAKELEVEL": "1"}  # as make sets it: a make under it also prints which folder it leaves

    def nightly(*targets):
        run = subprocess.run([sys.executable, SCRIPT, *targets], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
        return run.returncode

    def table():
        lines = (tmp_path / ".ci" / "nightly.md").read_text().splitlines()
        return [line.strip("| ").split(" | ")[:3] for line in lines[2:]]

    (tmp_path / ".ci").mkdir()
    (tmp_path / "Makefile").write_text(MAKEFILE)
    assert nightly("bad", "good") == 1
    first = table()
    assert first[0][:2] == ["bad", "failed"] and first[1] == ["good", "passed", "7 passed"]
    (tmp_path / "Makefile").write_text(MAKEFILE.replace("@false", "@true"))
    assert nightly("bad") == 0  # the other's row stays
    assert table() == [["bad", "passed", "what / was wrong"], first[1]]
