"""What setup.py does where it cannot compile, and what it packs."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = "fastarch: there is no GCC or Clang, so no C++ or CUDA kernels are built"


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """What Python printed, in a process of its own."""
    command = [sys.executable, *arguments]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what setup.py reads, without what was compiled: nothing is written into the real one."""
    for folder in ("fastarch", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "kernels/tuned/a_gpu.json").write_text("{}")  # as fastarch tune writes one
    return tmp_path


def test_without_a_compiler_the_package_builds_and_runs_on_the_reference(checkout):
    printed = python("setup.py", "--quiet", "build", "--build-lib", "lib", cwd=checkout, CXX="/nonexistent")
    assert printed.count(MISSING) == 1
    assert not [*checkout.rglob("*.so"), *checkout.rglob("*.o")]
    assert {"README.md", "a_gpu.json"} <= {file.name for file in (checkout / "lib/fastarch/kernels/tuned").iterdir()}
    show = """
import fastarch, torch
print(fastarch.__file__)
network, images = fastarch.models.lenet5(), torch.randn(2, 1, 32, 32)
network(images).sum().backward()
print(*(p.grad.isfinite().all().item() for p in network.parameters()))
for call in fastarch.explain(network, images):
    print(call.layer, call.kernel, call.reason, sep=": ")
"""
    # -S: an editable installation puts a finder into site, which would find the checkout's fastarch._C
    path = os.pathsep.join([str(checkout / "lib"), *(p for p in sys.path if p)])
    lines = python("-S", "-c", show, cwd=checkout / "lib", PYTHONPATH=path, PYTHONSAFEPATH="1").splitlines()
    assert lines == [
        str(checkout / "lib/fastarch/__init__.py"),
        " ".join(["True"] * 10),
        "c1: reference: fastarch._C is not built",
        "c3: reference: fastarch._C is not built",
    ]


@pytest.mark.skipif(shutil.which("env") is None or shutil.which("c++") is None, reason="needs a compiler")
def test_a_compiler_may_come_with_arguments(checkout):
    assert MISSING not in python("setup.py", "--version", cwd=checkout, CXX="env c++")
    assert MISSING in python("setup.py", "--version", cwd=checkout, CXX="nonexistent c++")


def test_the_source_distribution_has_every_source(checkout):
    python("setup.py", "--quiet", "sdist", cwd=checkout)
    (archive,) = (checkout / "dist").glob("fastarch-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    sources = [p for folder in ("csrc", "kernels", "fastarch") for p in (checkout / folder).rglob("*") if p.is_file()]
    wanted = {str(p.relative_to(checkout)) for p in sources if p.suffix not in (".so", ".pyc")}
    assert not wanted - packed
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= packed
