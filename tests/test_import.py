"""What importing fastarch costs and touches, each in a process of its own."""

import os
import subprocess
import sys

import pytest


def python(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=env, text=True, check=True, capture_output=True
    ).stdout


def test_import_is_light(tmp_path):
    # as where bytecode is kept: compiling 56 files takes 53 of the 90 ms of an import without it
    keep = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = """
import time, torch
start = time.perf_counter()
import fastarch
print(time.perf_counter() - start)
import sys
assert not [m for m in sys.modules if m.split(".")[0] in ("triton", "sympy", "typer", "rich", "matplotlib")]
assert not torch.cuda.is_initialized()
"""
    assert min(float(python(code, **keep)) for _ in range(4)) < 0.15


def test_kernels_folder_is_not_a_package_of_its_own():
    code = """
import importlib.util, sys, pathlib, fastarch.kernels
path = pathlib.Path(fastarch.kernels.__file__)
sys.path.insert(0, str(path.parents[1]))
try:
    import kernels
except ImportError as error:
    print(error)
"""
    if "import fastarch.kernels" not in (printed := python(code)):
        pytest.fail(f"the folder was importable as kernels: {printed}")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_set_can_be_lowered_but_not_raised(isa):
    show = "from fastarch import extension; print(extension.isa, *extension.cpu.isas)"
    best, *built = python(show, FASTARCH_CPU_ISA="avx512").split()
    chosen = python(show, FASTARCH_CPU_ISA=isa).split()[0]
    order = ["generic", "avx2", "avx512"]
    assert chosen == min(isa, best, key=order.index) or built == ["generic"]
    assert python(show, ATEN_CPU_CAPABILITY="default").split()[0] == "generic"


def test_an_unknown_instruction_set_is_an_error():
    code = """
try:
    import fastarch
except ValueError as error:
    print(error)
"""
    assert "FASTARCH_CPU_ISA: want generic, avx2 or avx512, got sse9" in python(code, FASTARCH_CPU_ISA="sse9")
