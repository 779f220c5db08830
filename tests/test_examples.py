"""The examples run, and show what they claim."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def load(name: str) -> ModuleType:
    """An example as a module, to look at what it computes."""
    path = next(p for p in EXAMPLES if p.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_and_draws(path, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(path), "--quick", "--output", str(picture)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture.name) in ran.stdout.replace("\n", "")


def test_skip_connections_keep_the_gradient():
    example = load("vanishing_gradient")
    images, labels = example.load_digits()
    kept = {}
    for activation in ("sigmoid", "ReLU"):
        for skip in (False, True):
            network = example.DeepNetwork(15, activation, skip)
            next(example.train(network, images, labels, steps=1))
            norms = network.gradient_norms()
            assert len(norms) == 15
            kept[activation, skip] = norms[0] / norms[-1]
    assert kept["sigmoid", False] < 1e-8
    assert kept["ReLU", False] < 1e-3
    assert kept["sigmoid", False] < kept["ReLU", False]
    assert min(kept["sigmoid", True], kept["ReLU", True]) > 0.01
