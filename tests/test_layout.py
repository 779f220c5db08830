"""The house keeps its order: who may import whom, and one name for one operation in every folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATIONS = sorted(p.stem for p in (ROOT / "fastarch/ops").glob("*.py") if p.stem != "__init__")

# what each folder may import besides the standard library; deeper imports (inside functions) count as well
SHARED = {"fastarch.autocast", "fastarch.extension", "fastarch.routing", "fastarch.version"}
ALLOWED = {
    "fastarch/ref": {"torch"},
    "kernels": {"torch", "triton", "fastarch.kernels", "fastarch.version"},
    "fastarch/ops": {"torch", "fastarch", "fastarch.ref", "fastarch.kernels", "fastarch.ops", *SHARED},
    "fastarch/nn": {"torch", "fastarch", "fastarch.autocast", "fastarch.nn", "fastarch.ops"},
    "fastarch/models": {"torch", "fastarch", "fastarch.nn", "fastarch.models"},
    "fastarch/integrations": {
        *("torch", "transformers", "fastarch"),
        *("fastarch.integrations", "fastarch.nn", "fastarch.ops"),
    },
}
# names that `from fastarch import ...` may bring in
NAMES = {
    "fastarch/ops": {"autocast", "extension", "routing"},
    "fastarch/nn": {"autocast", "ops"},
    "fastarch/models": {"nn"},
    "fastarch/integrations": {"nn", "ops"},
}


def imports(file: Path):
    """(module, imported names) of every import in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module, [alias.name for alias in node.names]


def is_allowed(module: str, allowed: set[str]) -> bool:
    if not module.startswith(("fastarch", "torch", "triton", "transformers")):
        return True
    return any(module == name or (module.startswith(name + ".") and name != "fastarch") for name in allowed)


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_direction(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for module, names in imports(file):
            assert is_allowed(module, ALLOWED[folder]), f"{file.relative_to(ROOT)} must not import {module}"
            if module == "fastarch":
                assert set(names) <= NAMES[folder], f"{file.relative_to(ROOT)} must not import {names} from fastarch"


def test_nobody_imports_tests_or_bench():
    for folder in ("fastarch", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for module, _ in imports(file):
                assert module.split(".")[0] not in ("tests", "bench", "closeness", "workloads", "harness"), file


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_operation_one_name(operation):
    for pattern in ("fastarch/ref/{}.py", "fastarch/nn/{}.py", "tests/test_{}.py", "bench/bench_{}.py"):
        assert (ROOT / pattern.format(operation)).exists(), f"{operation} has no {pattern.format(operation)}"


def test_kernel_sources_know_no_torch_and_cpu_kernels_no_standard_library():
    for file in [*(ROOT / "csrc/cpu").glob("*_kernels.cpp"), *(ROOT / "csrc/cuda").glob("*.cu")]:
        seen, queue = set(), [file]
        while queue:
            for line in queue.pop().read_text().splitlines():
                if not line.startswith("#include"):
                    continue
                name = line.split()[1].strip('"<>')
                assert not name.startswith(("torch/", "ATen/", "c10/")), f"{file.name} reaches {name}"
                if line.split()[1].startswith("<"):
                    # a std:: function compiled with AVX can be linked into code for older machines
                    assert file.suffix == ".cu" or name.endswith(".h"), f"{file.name} reaches <{name}>"
                elif name not in seen:
                    seen.add(name)
                    queue.append(ROOT / "csrc" / name)
