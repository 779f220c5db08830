"""The README's example runs as it stands there."""

import re
from pathlib import Path


def test_example(capsys):
    text = Path(__file__).parents[1].joinpath("README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["y"].shape == (64, 6, 13, 13)
    assert all(p.grad is not None for p in names["model"].parameters())
    assert "conv_relu_pool" in capsys.readouterr().out
