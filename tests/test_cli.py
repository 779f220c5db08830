"""The command line, and fastarch.explain, which it prints."""

import gzip
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fastarch
from fastarch import cli, demo, extension, nn, ops

NUMBER = r"[\d.]+"
IDX = {"train-images-idx3-ubyte": 40, "train-labels-idx1-ubyte": 40, "t10k-images-idx3-ubyte": 30}
IDX["t10k-labels-idx1-ubyte.gz"] = 30


@pytest.fixture(autouse=True)
def search_path(monkeypatch):
    """`fastarch explain` adds to it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def fastarch_cli(*arguments) -> tuple[int, str]:
    """The exit status of the command, and what it printed, each run of spaces, frames and line ends as one space."""
    with mock.patch.object(cli, "console", Console(width=200)):  # cli's own keeps the width that it was made with
        result = CliRunner().invoke(cli.main, [str(a) for a in arguments], env={"TERMINAL_WIDTH": "200"})
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result.exit_code, " ".join("".join(" " if c in "│┃" else c for c in result.output).split())


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A folder of IDX files: few images, whose brightest rows tell the label; one of the files gzipped."""
    for name, count in IDX.items():
        labels = torch.arange(count, dtype=torch.uint8) % 10
        values, sizes = labels, [count]
        if "images" in name:
            values, sizes = torch.randint(0, 90, (count, 28, 28), dtype=torch.uint8), [count, 28, 28]
            for image, label in zip(values, labels.tolist()):
                image[2 * label : 2 * label + 8] = 255
        content = (
            bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes) + values.numpy().tobytes()
        )
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path


def test_without_arguments_the_commands_are_listed():
    _, printed = fastarch_cli()
    assert all(command in printed for command in ("info", "demo", "bench", "explain"))


def test_info_lists_every_operation_and_the_instruction_set():
    status, printed = fastarch_cli("info")
    assert status == 0
    assert f"fastarch {fastarch.__version__}, " in printed
    assert torch.__version__ in printed
    assert "CPU kernels " + (f"{extension.isa} (built: " if extension.cpu else "not built: reference") in printed
    for name in ops.__all__:
        assert f"{name} yes {'yes' if extension.cpu else 'not built'} " in printed


def test_explain_shows_the_kernel_of_each_fused_layer():
    status, printed = fastarch_cli("explain", "fastarch.models:lenet5", "--shape", "2x1x32x32")
    assert status == 0
    kernel = f"cpu-{extension.isa} direct" if extension.cpu else "reference"
    assert f"c1 conv_relu_pool input 2x1x32x32 weight 6x1x5x5 {kernel}" in printed
    assert f"c3 conv_relu_pool input 2x6x14x14 weight 16x6x5x5 {kernel}" in printed


def test_explain_finds_a_module_in_the_current_folder(tmp_path, monkeypatch):
    source = "from fastarch import nn\n\ndef network():\n    return nn.ConvReLUPool2d(3, 4, 3)\n"
    (tmp_path / "a_module_of_the_user.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    status, printed = fastarch_cli("explain", "a_module_of_the_user:network", "--shape", "1x3x8x8")
    assert status == 0
    assert "(model) conv_relu_pool input 1x3x8x8 weight 4x3x3x3" in printed


NETWORKS = """
import torch
from fastarch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru, self.norm = nn.Embedding(2, 4), torch.nn.GRU(4, 4), nn.BatchNorm1d(4)

    def forward(self, tokens, bias):
        assert tokens.dtype == torch.int64 and bias.dtype == torch.float64, (tokens.dtype, bias.dtype)
        print("training" if self.training else "evaluating")
        return self.norm(self.gru(self.embedding(tokens))[0].flatten(0, 1) + bias.float())

def two():
    return Two().eval()

def two_in_training():
    return Two()

def number():
    return 7

def broken():
    raise KeyError("weights")
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "networks_of_the_user.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "networks_of_the_user", raising=False)
    return "networks_of_the_user"


def test_explain_draws_several_inputs_of_their_dtypes(networks):
    status, printed = fastarch_cli("explain", f"{networks}:two", "--shape", "5x3:long", "--shape", "4:float64")
    assert status == 0
    assert "norm batch_norm input 15x4" in printed
    assert "gru GRU not fused: fastarch.fuse makes it fastarch.nn.GRU" in printed


def test_explain_of_what_fuse_makes(networks):
    status, printed = fastarch_cli(
        "explain", f"{networks}:two", "--shape", "5x3:long", "--shape", "4:float64", "--fuse"
    )
    assert status == 0
    assert "gru gru input 5x3x4 state 3x4" in printed
    assert "not fused" not in printed


@pytest.mark.parametrize(
    ("model", "options", "mode"),
    [
        ("two", (), "evaluating"),
        ("two", ("--train",), "training"),
        ("two_in_training", (), "training"),
        ("two_in_training", ("--eval",), "evaluating"),
    ],
    ids=str,
)
def test_explain_in_a_mode(networks, model, options, mode):
    inputs = ("--shape", "5x3:long", "--shape", "4:float64")
    _, printed = fastarch_cli("explain", f"{networks}:{model}", *inputs, *options)
    assert printed.startswith(mode)


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
def test_explain_measures_unless_told_not_to():
    model = ("explain", "fastarch.models:lenet5", "--shape", "2x1x32x32")
    status, printed = fastarch_cli(*model)
    assert status == 0
    assert re.search(rf"c1 conv_relu_pool .* {NUMBER} {NUMBER} 0.0112 0.0652 ", printed)
    status, printed = fastarch_cli(*model, "--no-timed")
    assert status == 0
    assert "c1 conv_relu_pool" in printed
    assert "0.0112" not in printed


SIZES = "want sizes such as 1x1x32x32, or with a dtype of torch 2x16:long, got "


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            "fastarch.nonsense:lenet5",
            "1x1x32x32",
            "want module:callable, got 'fastarch.nonsense:lenet5': No module named",
        ),
        ("fastarch.models:nonsense", "1x1x32x32", "want module:callable, got 'fastarch.models:nonsense': module"),
        ("fastarch.models", "1x1x32x32", "want module:callable, got 'fastarch.models'"),
        ("networks_of_the_user:broken", "1", "want module:callable, got 'networks_of_the_user:broken': 'weights'"),
        (
            "networks_of_the_user:number",
            "1",
            "want a callable that returns a torch.nn.Module, got int from 'networks_of_the_user:number'",
        ),
        ("fastarch.models:lenet5", "1,1,32,32", SIZES + "'1,1,32,32'"),
        ("fastarch.models:lenet5", "1x-1", SIZES + "'1x-1'"),
        ("fastarch.models:lenet5", "2x16:", SIZES + "'2x16:'"),
        ("fastarch.models:lenet5", "2x16:longer", SIZES + "'2x16:longer'"),
        ("fastarch.models:lenet5", "2x16:nn", SIZES + "'2x16:nn'"),
        ("fastarch.models:lenet5", "2x16:quint8", SIZES + "'2x16:quint8'"),
        ("fastarch.models:lenet5", "2x16:long", "want inputs that fastarch.models:lenet5 takes, got 2x16:long: "),
    ],
)
def test_explain_says_what_was_wanted(networks, model, shape, message):
    status, printed = fastarch_cli("explain", model, "--shape", shape)
    assert status == 2
    assert message in printed


def test_bench_of_an_unknown_operation_names_the_known_ones():
    status, printed = fastarch_cli("bench", "nonsense")
    assert status == 2
    assert "got 'nonsense'" in printed
    assert all(f"'{cli.operation_of(name)}'" in printed for name in ops.__all__)


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """What `fastarch bench` would run, all of which end with status 5."""
    ran = []
    finished = cli.subprocess.CompletedProcess([], returncode=5)
    monkeypatch.setattr(cli.subprocess, "run", lambda command, env: ran.append(command) or finished)
    return ran


def test_bench_hands_its_options_and_pytests_status_on(commands):
    options = ["--device", "cpu", "--dtype", "bfloat16", "--infer", "--peers", "eager,compile", "--budget", 2]
    status, _ = fastarch_cli("bench", "gru", "attention", *options, "-k", "char", "--json", "a.json", "--record")
    assert status == 5
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "pytest"]
    assert [Path(file).name for file in command[-2:]] == ["bench_gru.py", "bench_attention.py"]
    assert all(Path(file).exists() for file in command[-2:])
    given = ["--device=cpu", "--dtype=bfloat16", "--modes=inference", "--peers=eager,compile", "--budget=2.0"]
    assert {*given, "--json=a.json", "--record"} <= {*command}
    assert command[command.index("-k") + 1] == "char"


def test_bench_runs_everything_by_default(commands):
    fastarch_cli("bench", "--train")
    (command,) = commands
    known = {f"bench_{name}.py" for name in ("conv_relu_pool", "batch_norm", "gru", "attention", "models", "fuse")}
    assert known <= {Path(argument).name for argument in command}
    assert "--modes=forward,training" in command


def test_bench_hands_what_follows_two_dashes_to_pytest(commands):
    fastarch_cli("bench", "gru", "--", "-x", "--benchmark-json", "b.json")
    (command,) = commands
    assert command[-4:-1] == ["-x", "--benchmark-json", "b.json"]
    assert Path(command[-1]).name == "bench_gru.py"


def test_bench_compares_two_records_instead(commands):
    assert fastarch_cli("bench", "--compare", "a.json", "b.json")[0] == 5
    (command,) = commands
    assert [Path(argument).name for argument in command[1:]] == ["compare.py", "a.json", "b.json"]


@pytest.mark.parametrize("options", [("--dtype", "int8"), ("--budget", "-1"), ("--compare", "a.json"), ("--nonsense",)])
def test_bench_refuses_nonsense(commands, options):
    assert fastarch_cli("bench", "gru", *options)[0] == 2
    assert not commands


COMPARISON = (
    rf"test accuracy {NUMBER}% {NUMBER}% .*"
    rf"training step, median {NUMBER} ms {NUMBER} ms {NUMBER} times as fast .*"
    rf"kept for the backward {NUMBER} MB {NUMBER} MB {NUMBER}% less .*"
    rf"loss, last epoch ({NUMBER}) ({NUMBER}) at most "
)


def test_demo_learns_prints_a_comparison_and_draws(tmp_path):
    picture = tmp_path / "new" / "picture.png"
    status, printed = fastarch_cli("demo", "--epochs", 1, "--output", picture, "--device", "cpu")
    assert status == 0
    assert "LeNet-5 on scikit-learn's handwritten digits: 1437 to learn from, 360 to test, on cpu" in printed
    comparison = re.search(COMPARISON, printed)
    assert comparison, printed
    assert float(comparison[1]) == pytest.approx(float(comparison[2]), rel=1e-2)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_learns_from_a_folder_of_idx_files(mnist):
    picture = mnist / "picture.png"
    status, printed = fastarch_cli("demo", "--data", mnist, "--epochs", 12, "--output", picture, "--device", "cpu")
    assert status == 0
    assert "40 to learn from, 30 to test, on cpu" in printed
    assert re.search(COMPARISON, printed), printed
    first, last = (re.search(rf"loss, {epoch} epoch ({NUMBER})", printed) for epoch in ("first", "last"))
    assert float(last[1]) < 0.9 * float(first[1])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_idx_files_are_read_as_they_were_written(mnist):
    digits = demo.load_digits(mnist)
    assert [[*t.shape] for t in (*digits.train, *digits.test)] == [[40, 1, 32, 32], [40], [30, 1, 32, 32], [30]]
    assert digits.train[1].tolist() == [i % 10 for i in range(40)]
    assert digits.test[1].tolist() == [i % 10 for i in range(30)]
    assert digits.train[0].mean(3).argmax(2).flatten().sub(16 / 7 * digits.train[1]).abs().max() < 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "want train-images-idx3-ubyte or train-images-idx3-ubyte.gz in"),
        (b"", "is not an IDX file of bytes"),
        (b"\0\0\x08", "is not an IDX file of bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "is not an IDX file of bytes"),
        (b"\0\0\x08\x01\0\0\0\x02\x07", "is not an IDX file of bytes"),
        (b"\0\0\x08\x01\0\0\0\0", "is not an IDX file of bytes"),
    ],
    ids=["missing", "empty", "short", "floats", "truncated", "none"],
)
def test_demo_says_which_file_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    status, printed = fastarch_cli("demo", "--data", tmp_path, "--output", tmp_path / "picture.png")
    assert status == 2
    assert message in printed
    assert not (tmp_path / "picture.png").exists()


def test_demo_says_which_extra_it_needs(monkeypatch, tmp_path):
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    status, printed = fastarch_cli("demo", "--epochs", 1, "--output", tmp_path / "picture.png")
    assert status == 2
    assert "matplotlib missing: pip install 'fastarch[demo]'" in printed


def test_demo_wants_an_epoch():
    status, printed = fastarch_cli("demo", "--epochs", 0)
    assert status == 2
    assert "--epochs" in printed


class Mixed(nn.Module):
    """Calls of the operation inside layers, before them and after them."""

    def __init__(self):
        super().__init__()
        self.large = nn.ConvReLUPool2d(1, 2, 3, pool_size=16)
        self.block = nn.Sequential(nn.ConvReLUPool2d(2, 2, 1), nn.ReLU())

    def forward(self, x):
        x = ops.conv_relu_pool(x, torch.ones(1, 1, 1, 1), pool=None)
        x = self.block(self.large(x))
        return ops.conv_relu_pool(x, torch.ones(2, 2, 1, 1), pool=None)


def test_explain_shows_the_reason_for_the_reference():
    explanations = fastarch.explain(Mixed(), torch.randn(2, 1, 70, 70), timed=False)
    large = explanations[1]
    assert (large.layer, large.operation, large.kernel) == ("large", "conv_relu_pool", "reference")
    assert large.shapes == {"input": (2, 1, 70, 70), "weight": (2, 1, 3, 3)}
    assert large.reason == "one byte of index cannot describe so large a pool window"
    (row,) = [line for line in str(explanations).splitlines() if large.reason in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "large",
        "conv_relu_pool",
        "input 2x1x70x70 weight 2x1x3x3",
        "reference",
        large.reason,
    ]


def test_explain_credits_each_call_to_the_layer_that_made_it():
    explanations = fastarch.explain(Mixed(), torch.randn(2, 1, 70, 70))
    assert [call.layer for call in explanations] == ["(model)", "large", "block.0", "(model)"]


def test_explain_inside_reference():
    with fastarch.reference():
        (call,) = fastarch.explain(nn.ConvReLUPool2d(1, 2, 3), torch.randn(1, 1, 8, 8))
    assert (call.layer, call.kernel, call.reason) == ("(model)", "reference", "inside fastarch.reference()")


def test_explain_of_a_model_without_our_operations_is_empty():
    assert fastarch.explain(nn.Linear(3, 4), torch.randn(2, 3)) == []


def test_explain_leaves_the_model_as_it_was():
    model = Mixed()
    with pytest.raises(ValueError, match="conv_relu_pool: "):
        fastarch.explain(model, torch.randn(2, 1, 9, 9))
    fastarch.explain(model, torch.randn(2, 1, 70, 70))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model(torch.randn(2, 1, 70, 70)).requires_grad
