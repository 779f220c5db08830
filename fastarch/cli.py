"""The command line: fastarch info | demo | bench | tune | explain."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from enum import Enum
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
        "Triton's tiles": tiles_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else "",
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


def tiles_of(gpu: str) -> str:
    from fastarch.kernels import tiles  # here: it imports Triton

    return tiles.described(gpu)


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
    shape: Annotated[
        list[str],
        typer.Option(help="of an input, e.g. 1x1x32x32, or with a dtype 2x16:long; once for each input, in order"),
    ],
    fuse: Annotated[bool, typer.Option("--fuse", help="explain what fastarch.fuse makes of the model")] = False,
    train: Annotated[
        bool | None, typer.Option("--train/--eval", help="the mode, which else is the one that the model comes in")
    ] = None,
    timed: Annotated[bool, typer.Option(help="measure each call, and PyTorch's way to do the same")] = True,
) -> None:
    """Show which kernel serves each layer of a model, what that costs, and what is left to PyTorch.

    Inputs are random: normal for floating dtypes (float32 unless said), 0 or 1 for the others.
    """
    sys.path.append("")  # the user's own module may lie in the current folder
    inputs = [drawn(s) for s in shape]
    network = built(model)
    if train is not None:
        network.train(train)
    if fuse:
        network = fastarch.fuse(network)
    try:
        explanations = fastarch.explain(network, *inputs, timed=timed)
    except Exception as error:  # whatever forward raises
        message = f"want inputs that {model} takes, got {', '.join(shape)}: {error}"
        raise typer.BadParameter(message, param_hint="--shape") from error
    console.print(explanations)


def built(model: str) -> torch.nn.Module:
    """What module:callable returns."""
    module, _, name = model.partition(":")
    try:
        network = getattr(importlib.import_module(module), name)()
    except Exception as error:  # whatever importing and calling it raise
        raise typer.BadParameter(f"want module:callable, got {model!r}: {error}", param_hint="model") from error
    if not isinstance(network, torch.nn.Module):
        came = f"{type(network).__name__} from {model!r}"
        raise typer.BadParameter(f"want a callable that returns a torch.nn.Module, got {came}", param_hint="model")
    return network


def drawn(shape: str) -> torch.Tensor:
    """A tensor of a shape such as 1x1x32x32 or, with a dtype, 2x16:long."""
    sizes, colon, name = shape.partition(":")
    try:
        sizes = [int(n) for n in sizes.split("x")]
        dtype = getattr(torch, name) if colon else torch.float32
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(sizes, dtype=dtype)
        return torch.randint(2, sizes, dtype=dtype)  # tokens of any vocabulary
    except (ValueError, AttributeError, RuntimeError) as error:  # no number, no such dtype, nothing to be drawn
        want = "sizes such as 1x1x32x32, or with a dtype of torch 2x16:long"
        raise typer.BadParameter(f"want {want}, got {shape!r}", param_hint="--shape") from error


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class WithOptionsOfPytest(typer.core.TyperCommand):
    """Whatever follows -- goes to pytest as it is."""

    def parse_args(self, ctx, args):
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = args[end + 1 :]
        return super().parse_args(ctx, args[:end])


@main.command(cls=WithOptionsOfPytest)
def bench(
    context: typer.Context,
    operations: Annotated[list[str] | None, typer.Argument(help="e.g. gru attention models; all by default")] = None,
    device: Annotated[str, typer.Option(help="cuda if there is one")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="float32, but bfloat16 for single operations on a GPU")] = None,
    train: Annotated[bool | None, typer.Option("--train/--infer", help="both by default")] = None,
    peers: Annotated[str, typer.Option(help="e.g. eager,onnxruntime; all that are installed by default")] = "",
    budget: Annotated[
        float, typer.Option(min=0, help="seconds for the rounds of a case, of which it has 3 to 15")
    ] = 30,
    name: Annotated[str, typer.Option("-k", help="only cases whose name has this in it, as pytest's -k")] = "",
    json: Annotated[Path | None, typer.Option(help="the record: machine, floors, how it was made, every round")] = None,
    record: Annotated[bool, typer.Option("--record", help="the same into bench/results, for README and docs")] = False,
    report: Annotated[Path | None, typer.Option(help="a folder for a page of plots, index.html")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="run nothing: is B slower than A? Status 1 if any case is"),
    ] = None,
) -> None:
    """Compare operations and whole networks with their peers. Options of pytest may follow after --."""
    folder = Path(fastarch.__file__).parents[1] / "bench"
    if compare:
        raise typer.Exit(python(folder / "compare.py", *compare))
    known = sorted(p.stem.removeprefix("bench_") for p in folder.glob("bench_*.py"))
    if not known or (unknown := set(operations or known) - set(known)):
        got = f", got {', '.join(map(repr, sorted(unknown)))}" if known else ""
        console.print(f"fastarch bench: want some of {known}{got}; benchmarks need a checkout of the source")
        raise typer.Exit(2)
    if report and json is None:
        json = report / "record.json"

    command = ["-m", "pytest", "-q", "--progress", "--benchmark-quiet", "-o", "console_output_style=classic"]
    command += [f"--device={device}", f"--budget={budget}"]
    command += [f"--dtype={dtype.value}"] if dtype else []
    command += [] if train is None else ["--modes=forward,training" if train else "--modes=inference"]
    command += [f"--peers={peers}"] if peers else []
    command += ["-k", name] if name else []
    command += [f"--json={json}"] if json else []
    command += ["--record"] if record else []
    files = [folder / f"bench_{operation}.py" for operation in operations or known]
    status = python(*command, *context.obj, *files)
    if report and json.exists():
        python(folder / "report.py", report, json)
    raise typer.Exit(status)


@main.command()
def tune(
    operations: Annotated[list[str] | None, typer.Argument(help="e.g. gru attention; all by default")] = None,
    device: Annotated[str, typer.Option(help="a CUDA device, such as cuda:1")] = "cuda",
    budget: Annotated[float, typer.Option(min=0, help="seconds; what is measured by then stays")] = 600,
    output: Annotated[
        Path | None, typer.Option(help="the folder of the table: FASTARCH_TUNED, else fastarch's own")
    ] = None,
) -> None:
    """Measure on this GPU which tiles Triton's kernels are fastest with. Launches take those from then on.

    Run again, it goes on where it ended. Status 75 if there is more to measure, 1 if something could not be.
    """
    from fastarch.kernels import tiles

    if unknown := set(operations or []) - set(tiles.OPERATIONS):
        want = f"want some of {', '.join(tiles.OPERATIONS)}, got {', '.join(map(repr, sorted(unknown)))}"
        raise typer.BadParameter(want, param_hint="operations")
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in ("cuda", *there) or not there:
        raise typer.BadParameter(
            f"want a CUDA device, of which there are {len(there)}, got {device!r}", param_hint="--device"
        )
    script = Path(fastarch.__file__).parents[1] / "bench" / "tune.py"
    if not script.exists():
        console.print("fastarch tune: needs a checkout of the source, with its workloads")
        raise typer.Exit(2)
    options = [f"--device={device}", f"--budget={budget}", *([f"--output={output}"] if output else [])]
    raise typer.Exit(python(script, *options, *(operations or [])))


def python(*arguments: str | Path) -> int:
    """The status of a run of this Python. Modules are not looked for in the current folder, scripts find their own."""
    command = [sys.executable, *map(str, arguments)]
    safe = "1" if arguments[0] == "-m" else ""
    return subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": safe}).returncode


if __name__ == "__main__":
    main()
