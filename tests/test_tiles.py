"""Which tile a launch takes: tables of GPUs that are not here, right ones and broken ones."""

import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastarch.kernels import tiles
from triton import OutOfResources

GPU, FILE = "NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3.json"
ROOT = Path(__file__).parents[1]
CACHED = tiles.of_device, tiles.of_gpu
DATE = "2026-11-26T20:00:00+00:00"


def module(operation: str):
    return importlib.import_module(f"fastarch.kernels.{operation}")


def a_candidate(operation: str) -> tuple[tuple, tuple]:
    """A key of the operation and a tile that is not the safe one."""
    key, (tile, *_) = next(iter(module(operation).CANDIDATES.items()))
    return key, tile


def table_of(*operations: str) -> dict:
    found = {}
    for operation in operations:
        key, tile = a_candidate(operation)
        found[operation] = {"date": DATE, "tiles": {tiles.name_of(key): {"tile": tile._asdict()}}}
    return {"gpu": GPU, "operations": found}


@pytest.fixture(autouse=True)
def gpus(monkeypatch, tmp_path):
    """Two GPUs of one name behind the CPU's tensors' device and device 0, and a folder of tables."""
    monkeypatch.setenv("FASTARCH_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    forget_everything()
    yield
    forget_everything()


def forget_everything():
    for function in CACHED:
        function.cache_clear()


def write(folder: Path, content: object) -> None:
    (folder / FILE).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("operation", tiles.OPERATIONS)
def test_a_known_gpu_has_its_tiles_on_each_of_its_devices(operation, tmp_path, monkeypatch):
    write(tmp_path, table_of(*tiles.OPERATIONS))
    key, tile = a_candidate(operation)
    reads = []
    read = tiles.read
    monkeypatch.setattr(tiles, "read", lambda *args: reads.append(args) or read(*args))
    for index in (0, 1, 0):
        assert tiles.of_device(index).tiles[operation, key] == tile
    assert len(reads) == 1
    assert all(type(n) is int for n in tiles.of_device(0).tiles[operation, key])
    other = next(k for k in module(operation).TILES if k != key)
    assert (operation, other) not in tiles.of_device(0).tiles
    assert f"{FILE}: attention 2026-11-26, batch_norm 2026-11-26" in tiles.described(GPU)


def test_tensors_off_the_gpu_have_none(tmp_path):
    write(tmp_path, table_of("gru"))
    assert tiles.tuned("gru", a_candidate("gru")[0], torch.empty(0)) is None


def test_an_unknown_gpu_has_the_safe_tiles_and_no_warning(tmp_path):
    (tmp_path / "nvidia_a100.json").write_text(json.dumps(table_of("gru") | {"gpu": "NVIDIA A100"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.of_device(0) == tiles.NONE
    assert tiles.described(GPU).startswith("safe, no table ") and FILE in tiles.described(GPU)


def test_tables_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("FASTARCH_TUNED", "")
    assert tiles.file_of(GPU) is None
    assert tiles.of_device(0) == tiles.NONE
    monkeypatch.delenv("FASTARCH_TUNED")
    assert tiles.file_of(GPU) == Path(tiles.__file__).parent / "tuned" / FILE


def test_the_name_is_that_of_the_benchmarks_records():
    import records

    for name in (GPU, "NVIDIA GeForce RTX 4090", "NVIDIA H200", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"):
        assert tiles.file_name(name) == f"{records.slug({'device': name})}.json"


def with_tile(tile: object) -> dict:
    table = table_of("gru", "attention")
    key, _ = a_candidate("gru")
    table["operations"]["gru"]["tiles"][tiles.name_of(key)] = tile
    return table


def with_section(section: object) -> dict:
    table = table_of("attention")
    table["operations"]["gru"] = section
    return table


GOOD = {"h": 64, "n": 32, "k": 64, "warps": 4, "stages": 3, "registers": 255}
BROKEN = {
    "empty": ("", "Expecting value"),
    "truncated": (json.dumps(table_of("gru"))[:-9], "Expecting"),
    "bytes": ("\x00\x01", "Expecting value"),
    "nested": ("[" * 200_000, ""),
    "list": ([1, 2], "want a table with operations for the GPU"),
    "number": ("7", "want a table with operations"),
    "another GPU's": (table_of("gru") | {"gpu": "NVIDIA H200"}, f"for the GPU {GPU!r}, got"),
    "no operations": ({"gpu": GPU}, "want a table with operations"),
    "operations of another kind": ({"gpu": GPU, "operations": ["gru"]}, "want a table with operations"),
    "unknown operation": ({"gpu": GPU, "operations": {"os": {}}}, "want operations among attention, .*, got 'os'"),
    "section": (with_section(None), "gru: want a date and tiles, got None"),
    "section without a date": (with_section({"tiles": {}}), "gru: want a date and tiles"),
    "tiles of another kind": (with_section({"date": DATE, "tiles": 3}), "gru: want a date and tiles"),
    "unknown key": (with_section({"date": DATE, "tiles": {"fwd fp8 odd": {"tile": GOOD}}}), "no tiles have the key"),
    "entry of another kind": (with_tile([64, 32]), r"want a tile of TILES or CANDIDATES, got \[64, 32\]"),
    "no tile": (with_tile({}), "want a tile of TILES or CANDIDATES, got None"),
    "text": (with_tile({"tile": GOOD | {"h": "64"}}), "want a tile of TILES or CANDIDATES"),
    "unhashable": (with_tile({"tile": GOOD | {"h": [64]}}), "want a tile of TILES or CANDIDATES"),
    "missing field": (with_tile({"tile": {"h": 64}}), "want a tile of TILES or CANDIDATES"),
    "unknown field": (with_tile({"tile": GOOD | {"x": 1}}), "want a tile of TILES or CANDIDATES"),
    "no candidate": (with_tile({"tile": GOOD | {"n": 4096}}), "want a tile of TILES or CANDIDATES, got .*4096"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_warns_once_and_leaves_the_safe_tiles(content, message, tmp_path):
    write(tmp_path, content)
    with pytest.warns(UserWarning, match=message) as caught:
        assert tiles.of_device(0) == tiles.of_device(1) == tiles.NONE
        assert tiles.described(GPU).startswith("safe")
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"fastarch: {tmp_path / FILE} is not used, all tiles are the safe ones: ")
    assert len(str(caught[0].message)) < 1000


def test_what_is_no_text_and_no_file_warns_too(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe{}")
    with pytest.warns(UserWarning, match="is not used, .* codec"):
        assert tiles.of_device(0) == tiles.NONE
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    forget_everything()
    with pytest.warns(UserWarning, match=r"is not used, .*directory"):
        assert tiles.of_device(0) == tiles.NONE


def test_tiles_that_do_not_fit_are_forgotten(tmp_path, monkeypatch):
    """With a GPU's tiles on the CPU's tensors; an operation's own, and no other's."""
    write(tmp_path, table_of("gru", "attention"))
    monkeypatch.setattr(tiles, "of_device", lambda index: tiles.of_gpu(GPU))
    key, tile = a_candidate("gru")
    took = []

    @tiles.launcher("gru")
    def launch(nothing, t):
        took.append(tiles.tuned("gru", key, t) or module("gru").TILES[key])
        if took[-1] == tile:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return took[-1]

    with pytest.warns(UserWarning, match="gru: the tiles of .* are not used any more: .*Required: 300000") as caught:
        assert launch(None, torch.empty(0)) == module("gru").TILES[key]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(None, torch.empty(0))
    assert took == [tile, module("gru").TILES[key], module("gru").TILES[key]]
    assert tiles.tuned("attention", a_candidate("attention")[0], torch.empty(0)) is not None
    assert "gru" not in tiles.described(GPU)


def test_safe_tiles_that_do_not_fit_raise():
    @tiles.launcher("gru")
    def launch(t):
        raise OutOfResources(300_000, 232_448, "shared memory")

    with pytest.raises(OutOfResources):
        launch(torch.empty(0))


@pytest.mark.parametrize("operation", tiles.OPERATIONS)
def test_candidates_are_neighbours_of_safe_tiles(operation):
    """Each of a key of its own, another than the safe one, and once."""
    kernels = module(operation)
    assert kernels.CANDIDATES.keys() <= kernels.TILES.keys()
    for key, candidates in kernels.CANDIDATES.items():
        found = [kernels.TILES[key], *candidates]
        assert 2 <= len(found) == len({*found}) <= 5, key
        assert all(isinstance(tile, kernels.Tile) and all(type(n) is int for n in tile) for tile in found)
    names = [tiles.name_of(key) for key in kernels.TILES]
    assert len(names) == len({*names})


def test_every_kernel_file_with_tiles_is_known():
    files = [file.stem for file in (ROOT / "kernels").glob("*.py") if "\nTILES = {" in file.read_text()]
    assert sorted(files) == sorted(tiles.OPERATIONS)


def test_the_tables_of_the_repository_are_right():
    for file in (ROOT / "kernels/tuned").glob("*.json"):
        gpu = json.loads(file.read_text())["gpu"]
        assert tiles.file_name(gpu) == file.name
        assert tiles.read(file, gpu).tiles
