"""No kernel reads or writes one byte beside its buffers, or of one that was freed: there it would crash."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastarch import extension

HERE = Path(__file__).parent

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)
if sys.platform != "linux" or shutil.which("cc") is None:
    pytest.skip("needs Linux and a C compiler", allow_module_level=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """guarded_worker.py in a process whose memory stands between guard pages."""
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(HERE / "guard_pages.c"), "-o", str(library), "-ldl"], check=True)

    def run(what: str, touches: str, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "LD_PRELOAD": str(library), "FASTARCH_GUARD": touches, **environment}
        command = [sys.executable, str(HERE / "guarded_worker.py"), what]
        return subprocess.run(command, env=env | {"PYTHONPATH": str(HERE)}, text=True, capture_output=True)

    return run


@pytest.mark.parametrize("what, touches", [("behind", "after"), ("before", "before"), ("freed", "after")])
def test_one_byte_too_far_crashes(run, what, touches):
    done = run(what, touches)
    assert done.returncode == -signal.SIGSEGV, done.stdout + done.stderr


@pytest.mark.parametrize("isa", extension.cpu.isas)
@pytest.mark.parametrize("touches", ["after", "before"])
def test_operations_keep_to_their_buffers(run, isa, touches):
    done = run("all", touches, FASTARCH_CPU_ISA=isa)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout.count("done") == 4
