"""Which tile a launch takes: the one measured on its GPU, if tuned/<GPU>.json has one, else its file's safe one.

`fastarch tune` writes these tables, tuned/README.md says how they read. FASTARCH_TUNED names another folder of them;
empty, there are none. A table counts as a whole or not at all, and can only choose among TILES and CANDIDATES of the
operations' files: whatever is wrong with it, one warning says so and the safe tiles stay. They also follow where a
measured tile turns out not to fit, with another Triton or on a call unlike those that it was measured on.
"""

import functools
import json
import os
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton import OutOfResources

FOLDER = Path(__file__).with_name("tuned")
OPERATIONS = ("attention", "batch_norm", "conv_relu_pool", "gru")  # all whose file has TILES and CANDIDATES


class Table(NamedTuple):
    tiles: dict[tuple[str, tuple], tuple]  # by operation and key
    dates: dict[str, str]  # when they were measured, by operation


NONE = Table({}, {})


def tuned(operation: str, key: tuple, t: Tensor):
    """The tile that was measured for t's GPU, or None."""
    return of_device(t.get_device()).tiles.get((operation, key))


def launcher(operation: str):
    """Of a function that launches kernels and, until all are launched, changes nothing that it is given."""

    def decorate(launch):
        @functools.wraps(launch)
        def fitting(*args):
            try:
                return launch(*args)
            except OutOfResources as error:
                t = next(arg for arg in args if isinstance(arg, Tensor))
                forget(operation, of_device(t.get_device()), error)
            return launch(*args)  # which raises the same if the safe tile does not fit

        return fitting

    return decorate


def forget(operation: str, table: Table, error: OutOfResources) -> None:
    for key in list(table.tiles):
        if key[0] == operation:
            table.tiles.pop(key, None)  # None: another thread was as quick
    if date := table.dates.pop(operation, None):
        warnings.warn(f"fastarch: {operation}: the tiles of {date} are not used any more: {error}", stacklevel=4)


@functools.cache
def of_device(index: int) -> Table:
    return NONE if index < 0 else of_gpu(torch.cuda.get_device_name(index))  # below 0: kernels are interpreted


@functools.cache
def of_gpu(gpu: str) -> Table:
    file = file_of(gpu)
    if not (file and file.exists()):
        return NONE
    try:
        return read(file, gpu)
    except (OSError, ValueError, RecursionError) as error:  # no file to read, no JSON, none of our tables
        warnings.warn(f"fastarch: {file} is not used, all tiles are the safe ones: {error}", stacklevel=2)
        return NONE


def file_of(gpu: str) -> Path | None:
    """Where its table is, or would be."""
    folder = os.environ.get("FASTARCH_TUNED", str(FOLDER))
    return Path(folder) / file_name(gpu) if folder else None


def file_name(gpu: str) -> str:
    return f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def read(file: Path, gpu: str) -> Table:
    table = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or table.get("gpu") != gpu or not isinstance(table.get("operations"), dict):
        raise ValueError(f"want a table with operations for the GPU {gpu!r}, got {shown(table)}")
    tiles, dates = {}, {}
    for operation, section in table["operations"].items():
        if operation not in OPERATIONS:
            raise ValueError(f"want operations among {', '.join(OPERATIONS)}, got {operation!r}")
        if not (
            isinstance(section, dict)
            and isinstance(section.get("date"), str)
            and isinstance(section.get("tiles"), dict)
        ):
            raise ValueError(f"{operation}: want a date and tiles, got {shown(section)}")
        known = choices(operation)
        for name, entry in section["tiles"].items():
            if name not in known:
                raise ValueError(f"{operation}: no tiles have the key {name!r}")
            key, allowed = known[name]
            got = entry.get("tile") if isinstance(entry, dict) else entry
            tile = next((tile for tile in allowed if tile._asdict() == got), None)
            if tile is None:
                raise ValueError(f"{operation}, {name}: want a tile of TILES or CANDIDATES, got {shown(got)}")
            tiles[operation, key] = tile
        dates[operation] = section["date"]
    return Table(tiles, dates)


def choices(operation: str) -> dict[str, tuple[tuple, list[tuple]]]:
    """By the name that a key has in tables: the key, and its tiles, the safe one first."""
    module = import_module(f"fastarch.kernels.{operation}")
    return {name_of(key): (key, [safe, *module.CANDIDATES.get(key, ())]) for key, safe in module.TILES.items()}


def name_of(key: tuple) -> str:
    return " ".join(map(str, key))


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def described(gpu: str) -> str:
    """For people: which tiles launches take on this GPU."""
    dates = of_gpu(gpu).dates
    if not dates:
        return f"safe, no table {file_of(gpu) or 'is wanted'}"
    measured = ", ".join(f"{operation} {date[:10]}" for operation, date in dates.items())
    return f"tuned in {file_of(gpu)}: {measured}; the rest safe"
