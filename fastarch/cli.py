"""The command line: fastarch info | demo | bench | explain."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import fastarch
from fastarch import extension

main = typer.Typer(help=fastarch.__doc__, no_args_is_help=True, add_completion=False)
console = Console()


@main.command()
def info() -> None:
    """Versions, devices, and the back ends that each operation has here."""
    built = extension.cpu is not None
    kernels = f"{extension.isa} (built: {', '.join(extension.cpu.isas)})" if built else f"{extension.no_cpu}: reference"
    rows = {
        "fastarch": f"{fastarch.__version__}, {Path(fastarch.__file__).parent}",
        "Python, torch": f"{platform.python_version()}, {torch.__version__}",
        "Triton": triton_version() or "not installed",
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "CPU kernels": kernels,
        "compiled with": f"{extension.cpu.compiler}, {extension.cpu.flags}" if built else "",
        "CUDA kernels": f"built for {extension.cuda.architectures}" if extension.cuda else "not built",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console.print(table)

    operations = Table("operation", "reference", "CPU C++", "Triton", "CUDA C++")
    for name in fastarch.ops.__all__:
        operation = operation_of(name)
        serves = ("yes", "yes" if built else "not built", triton_state(operation), cuda_state(operation))
        operations.add_row(name, *serves)
    console.print(operations)


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def operation_of(function: str) -> str:
    """The operation that a function of fastarch.ops belongs to, by which its files are named."""
    return getattr(fastarch.ops, function).__module__.rpartition(".")[2]


def triton_state(operation: str) -> str:
    if importlib.util.find_spec(f"fastarch.kernels.{operation}") is None:
        return "none"
    return "no Triton" if triton_version() is None else "yes" if torch.cuda.is_available() else "no GPU"


def cuda_state(operation: str) -> str:
    algorithm = getattr(importlib.import_module(f"fastarch.ops.{operation}"), "CUDA_ALGORITHM", None)
    if algorithm is None:
        return "none"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastarch::{operation}_{algorithm}_fwd", "CUDA"):
        return "not built"
    return "yes" if torch.cuda.is_available() else "no GPU"


@main.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="a folder of MNIST's IDX files instead of scikit-learn's digits")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training images")] = 15,
    output: Annotated[Path, typer.Option(help="where the picture goes")] = Path("out/demo.png"),
    device: Annotated[str, typer.Option(help="cuda if there is one")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train LeNet-5 on handwritten digits, on fastarch's kernels and on PyTorch's layers, and compare the two."""
    if missing := [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]:
        raise typer.BadParameter(f"{' and '.join(missing)} missing: pip install 'fastarch[demo]'", param_hint="demo")
    from fastarch.demo import load_digits, run  # here: they need not be installed for the other commands

    try:
        digits = load_digits(data)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    run(digits, epochs, output, torch.device(device), console)


@main.command()
def explain(
    model: Annotated[str, typer.Argument(help="module:callable that returns a model, e.g. fastarch.models:lenet5")],
    shape: Annotated[str, typer.Option(help="of the input, e.g. 1x1x32x32")],
) -> None:
    """Show which kernel serves each layer of a model."""
    sys.path.append("")  # the user's own module may lie in the current folder
    module, _, name = model.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise typer.BadParameter(f"want module:callable, got {model!r}: {error}", param_hint="model") from error
    try:
        sizes = [int(n) for n in shape.split("x")]
    except ValueError as error:
        raise typer.BadParameter(f"want sizes such as 1x1x32x32, got {shape!r}", param_hint="--shape") from error
    console.print(fastarch.explain(build(), torch.randn(sizes)))


@main.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, operation: Annotated[str, typer.Argument(help="e.g. conv_relu_pool")]) -> None:
    """Compare an operation with its peers; more options go to pytest (-k NAME, --peers A,B, --benchmark-json FILE)."""
    file = Path(fastarch.__file__).parents[1] / "bench" / f"bench_{operation}.py"
    if not file.exists():
        known = sorted(p.stem.removeprefix("bench_") for p in file.parent.glob("bench_*.py"))
        console.print(
            f"fastarch bench: want one of {known}, got {operation!r}; benchmarks need a checkout of the source"
        )
        raise typer.Exit(2)
    command = [sys.executable, "-m", "pytest", "-q", str(file), "--plot", f"out/{operation}.png", *context.args]
    raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}).returncode)


if __name__ == "__main__":
    main()
