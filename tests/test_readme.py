"""README's examples run as they stand there."""

import re
from pathlib import Path

import pytest

TEXT = Path(__file__).parents[1].joinpath("README.md").read_text()
USE, TRANSFORMERS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_use(capsys):
    names = {}
    exec(USE, names)
    assert names["y"].shape == (64, 6, 13, 13)
    assert all(p.grad is not None for p in names["model"].parameters())
    assert "conv_relu_pool" in capsys.readouterr().out


def test_transformers():
    transformers = pytest.importorskip("transformers")
    exec(TRANSFORMERS, {})
    assert "fastarch" in transformers.AttentionInterface().valid_keys()
