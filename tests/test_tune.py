"""fastarch tune: what wins, what is discarded, when it ends. The GPU and its clock are this file."""

import json
import operator
import re
import types
from pathlib import Path

import gpu as gpu_run
import pytest
import torch
import typer
from test_cli import fastarch_cli

from fastarch import cli

pytest.importorskip("triton", reason="Triton is not installed")

import harness
import launches
import tune
from candidates_ahead_of_time import SMALL
from fastarch.kernels import attention, gru, tiles
from triton import OutOfResources
from triton.runtime.jit import JITFunction

KEY, OTHER = ("fwd", "half", "vectors"), ("bwd", "half", "vectors")
SAFE, FAST, FASTER, SLOW = gru.TILES[KEY], *gru.CANDIDATES[KEY][:3]
GPU = "NVIDIA H100 80GB HBM3"


class Device:
    """Runs launches that give ones, in seconds by tile: a figure, or a function of the call's number."""

    def __init__(self, seconds: dict, spills: dict | None = None, results: dict | None = None):
        self.seconds, self.spills, self.results = seconds, spills or {}, results or {}
        self.table, self.timed_tiles = {KEY: SAFE, OTHER: gru.TILES[OTHER]}, []

    def run(self):
        return self.results.get(self.table[KEY], (torch.ones(3),))

    def launched(self, run):
        results = run()
        if isinstance(results, BaseException):
            raise results
        return results, self.spills.get(self.table[KEY], 0)

    def timed(self, run, calls):
        run()
        tile = self.table[KEY]
        self.timed_tiles.append(tile)
        seconds = self.seconds[tile]
        return seconds(self.timed_tiles.count(tile)) if callable(seconds) else seconds

    def choose(self, *candidates, launches=1, budget=1e9) -> tune.Choice:
        device = tune.Gpu(self.launched, self.timed)
        return tune.choose(self.table, KEY, list(candidates), [self.run] * launches, device, tune.Clock(budget))


def test_the_fastest_candidate_wins():
    device = Device({SAFE: 10e-6, FAST: 9e-6, FASTER: 8e-6, SLOW: 11e-6})
    choice = device.choose(FAST, FASTER, SLOW, launches=2)
    assert choice[:3] == (FASTER, pytest.approx(8e-6), pytest.approx(10e-6))
    assert choice.discarded == {}
    assert device.table[KEY] == SAFE  # as it was
    second = device.timed_tiles[4 * 2 * tune.ROUNDS :]
    assert {*second} == {SAFE, FASTER} and len(second) == 2 * 2 * tune.ROUNDS


def test_tiles_take_turns():
    device = Device({SAFE: 10e-6, FAST: 11e-6, SLOW: 11e-6})
    device.choose(FAST, SLOW)
    rounds = [device.timed_tiles[i : i + 3] for i in range(0, len(device.timed_tiles), 3)]
    assert len(rounds) == tune.ROUNDS
    assert all({*tiles} == {SAFE, FAST, SLOW} for tiles in rounds)
    assert len({tuple(tiles) for tiles in rounds}) > 1


@pytest.mark.parametrize(
    ("seconds", "wins"),
    [
        (9.9e-6, False),  # not by as much as two of a hundred
        (9.7e-6, True),
        (lambda n: 20e-6 if n % 3 == 0 else 5e-6, False),  # the median is, a third of the rounds are not
        (lambda n: 20e-6 if n % 9 == 0 else 5e-6, True),  # one disturbed round in nine
        (lambda n: 5e-6 if n <= tune.ROUNDS else 10e-6, False),  # by luck: not a second time
    ],
)
def test_a_candidate_wins_by_more_than_noise(seconds, wins):
    choice = Device({SAFE: 10e-6, FAST: seconds}).choose(FAST)
    assert choice.tile == (FAST if wins else SAFE)
    assert wins or choice.seconds == choice.safe_seconds == pytest.approx(10e-6)


def test_a_tile_is_as_fast_as_the_mean_of_its_launches():
    """Faster on one of two, as much slower on the other."""
    seconds = lambda n: 5e-6 if n % 2 else 21e-6  # noqa: E731
    choice = Device({SAFE: 10e-6, FAST: seconds}).choose(FAST, launches=2)
    assert choice.tile == SAFE


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(spills={FAST: 12}), "spills 12 words, the safe tile 0"),
        (
            dict(results={FAST: OutOfResources(300_000, 232_448, "shared memory")}),
            "OutOfResources: out of resource: sha",
        ),
        (dict(results={FAST: RuntimeError("ptxas died")}), "RuntimeError: ptxas died"),
        (dict(results={FAST: (torch.tensor([1.0, 1, 1.01]),)}), "its results differ from the safe tile's"),
        (dict(results={FAST: (torch.tensor([1.0, 1, float("nan")]),)}), "its results differ from the safe tile's"),
    ],
    ids=["spills", "too large", "not compiled", "wrong", "nan"],
)
def test_what_is_discarded_is_not_timed(given, why):
    device = Device({SAFE: 10e-6, FASTER: 8e-6}, **given)
    choice = device.choose(FAST, FASTER)
    assert choice.tile == FASTER
    assert [*choice.discarded] == [FAST] and choice.discarded[FAST].startswith(why)
    assert FAST not in device.timed_tiles


def test_a_candidate_may_spill_what_the_safe_tile_does():
    device = Device({SAFE: 10e-6, FAST: 8e-6, FASTER: 7e-6}, spills={SAFE: 20, FAST: 20, FASTER: 21})
    assert device.choose(FAST, FASTER).tile == FAST
    device = Device({SAFE: 10e-6, FAST: 8e-6}, spills={FAST: tune.FEW_SPILLS})
    assert device.choose(FAST).tile == FAST


def test_sums_in_another_order_are_the_same_results():
    device = Device({SAFE: 10e-6, FAST: 8e-6}, results={FAST: (torch.ones(3) + 1e-6, torch.zeros(2).byte())})
    device.results[SAFE] = torch.ones(3), torch.ones(2).byte()
    assert device.choose(FAST).tile == FAST


def test_without_candidates_left_the_safe_tile_is_timed():
    choice = Device({SAFE: 10e-6}, spills={FAST: 12}).choose(FAST)
    assert choice[:3] == (SAFE, *[pytest.approx(10e-6)] * 2)


def test_the_time_can_be_up_in_the_middle_of_a_key():
    device = Device({SAFE: 10e-6, FAST: 8e-6})
    with pytest.raises(tune.OutOfTimeError):
        device.choose(FAST, budget=-1)
    assert device.table[KEY] == SAFE


def test_an_interrupt_leaves_the_safe_tile():
    device = Device({SAFE: 10e-6}, results={FAST: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        device.choose(FAST)
    assert device.table[KEY] == SAFE


# ---- the table


@pytest.fixture
def tuned(tmp_path):
    return lambda: tune.Tuned(tmp_path, GPU)


@pytest.fixture
def run(monkeypatch):
    """Tunes two keys of gru with a choice that is given or raises; the keys that were measured."""

    def with_choices(tuned, choices: dict, budget=1e9):
        measured = []

        def choose(table, key, candidates, runs, *_):
            measured.append(key)
            if isinstance(choices[key], Exception):
                raise choices[key]
            return choices[key]

        monkeypatch.setattr(tune, "choose", choose)
        launch = types.SimpleNamespace(prepare=lambda device: None)
        by_key = {("gru", key): [launch] for key in (KEY, OTHER)}
        failed = tune.tune(by_key, tuned, None, tune.Clock(budget), torch.device("cpu"), lambda *_: None)
        return measured, failed, tune.summary(by_key, tuned, failed)

    return with_choices


CHOICES = {KEY: tune.Choice(FAST, 8e-6, 10e-6, {}), OTHER: tune.Choice(gru.TILES[OTHER], 3e-6, 3e-6, {})}


def test_what_was_measured_is_what_launches_take(tuned, run, tmp_path):
    assert run(tuned(), CHOICES) == ([KEY, OTHER], {}, 0)
    table = tiles.read(tmp_path / tiles.file_name(GPU), GPU)
    assert table.tiles == {("gru", KEY): FAST, ("gru", OTHER): gru.TILES[OTHER]}
    text = (tmp_path / tiles.file_name(GPU)).read_text()
    line = '{ "tile": { "h": 64, "n": 16, "k": 64, "warps": 4, "stages": 3, "registers": 255 }, "microseconds": 8.0, '
    assert f' "fwd half vectors": {line}"safe_microseconds": 10.0 }},\n' in text
    written = json.loads(text)
    assert written["gpu"] == GPU
    section = written["operations"]["gru"]
    assert (section["torch"], section["triton"]) == (torch.__version__, tune.triton.__version__)
    assert re.match(r"\d{4}-\d\d-\d\dT", section["date"]) and section["commit"]
    assert [file.name for file in tmp_path.iterdir()] == [tiles.file_name(GPU)]


def test_a_run_goes_on_behind_the_last(tuned, run):
    cut = {KEY: CHOICES[KEY], OTHER: tune.OutOfTimeError()}
    assert run(tuned(), cut) == ([KEY, OTHER], {}, gpu_run.LEFT)
    assert run(tuned(), CHOICES) == ([OTHER], {}, 0)
    assert run(tuned(), CHOICES, budget=-1) == ([], {}, 0)


def test_nothing_is_begun_when_the_time_is_up(tuned, run, tmp_path):
    assert run(tuned(), CHOICES, budget=-1) == ([], {}, gpu_run.LEFT)
    assert not [*tmp_path.iterdir()]


def test_a_key_that_fails_leaves_the_others(tuned, run):
    measured, failed, status = run(tuned(), CHOICES | {KEY: RuntimeError("no such instruction")})
    assert (measured, status) == ([KEY, OTHER], 1)
    assert failed == {"gru fwd half vectors": "RuntimeError: no such instruction"}
    assert not tuned().has("gru", KEY) and tuned().has("gru", OTHER)


@pytest.mark.parametrize("what", ["kernels", "torch", "triton"])
def test_what_was_measured_with_others_is_measured_again(tuned, run, what, tmp_path):
    run(tuned(), CHOICES)
    file = tmp_path / tiles.file_name(GPU)
    table = json.loads(file.read_text())
    table["operations"]["gru"][what] = "another"
    attention = next(iter(tiles.choices("attention").items()))
    entry = {"tile": attention[1][1][0]._asdict()}
    table["operations"]["attention"] = {"date": "2026", "tiles": {attention[0]: entry}}
    file.write_text(json.dumps(table))
    assert run(tuned(), {KEY: CHOICES[KEY], OTHER: tune.OutOfTimeError()})[0] == [KEY, OTHER]
    after = json.loads(file.read_text())["operations"]
    assert [*after["gru"]["tiles"]] == ["fwd half vectors"]
    assert after["attention"] == table["operations"]["attention"]


def test_a_broken_table_is_written_anew(tuned, run, tmp_path, capsys):
    file = tmp_path / tiles.file_name(GPU)
    file.write_text('{"gpu": ')
    assert run(tuned(), CHOICES)[0] == [KEY, OTHER]
    assert "is written anew: Expecting value" in " ".join(capsys.readouterr().out.split())
    assert tiles.read(file, GPU).tiles


# ---- the launches


def test_launches_are_found_by_the_keys_that_they_take(monkeypatch):
    monkeypatch.setattr(launches, "GRUS", {"small": launches.GRUS["char"]._replace(T=2, N=2, C=16, H=16)})
    device = torch.device("cpu")
    by_key = tune.found(["gru"], device)
    assert [*by_key][:3] == [("gru", KEY), ("gru", OTHER), ("gru", ("gates", "any", "any"))]
    assert {key for _, key in by_key} == gru.CANDIDATES.keys()
    assert [launch.kernel for launch in by_key["gru", OTHER]] == ["bwd"]
    precisions = [(launch.dtype, launch.precision) for launch in by_key["gru", ("fwd", "ieee", "vectors")]]
    assert precisions == [(torch.float32, "ieee")]
    assert type(gru.TILES) is dict


@pytest.mark.parametrize("operation", tiles.OPERATIONS)
def test_every_key_with_candidates_has_a_launch(operation):
    kernels = {launch.kernel for launch in launches.of(operation)}
    assert {key[0] for key in launches.MODULES[operation].CANDIDATES} == kernels
    assert all(launch.dtype in harness.TOLERANCE for launch in launches.of(operation))


class Compiled:
    n_spills = 0


def test_every_key_of_every_operation_is_measured(monkeypatch, tmp_path):
    """From end to end, but that nothing is launched: all results are NaN, which no candidate survives."""
    for table, workloads in SMALL.items():
        monkeypatch.setattr(launches, table, workloads)
    monkeypatch.setattr(attention, "generation", lambda: 90)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: Compiled())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: operator.index(index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    monkeypatch.setattr(harness, "timed_on_gpu", lambda run, calls: 1e-6)
    monkeypatch.setenv("FASTARCH_TUNED", "")
    precisions = [backend.fp32_precision for backend in launches.MULTIPLIERS]
    try:
        with pytest.raises(typer.Exit) as ended:
            tune.main(None, "cpu", 600, tmp_path / "new")
    finally:
        for backend, precision in zip(launches.MULTIPLIERS, precisions):
            backend.fp32_precision = precision
    assert ended.value.exit_code == 0
    table = tiles.read(tmp_path / "new" / tiles.file_name(GPU), GPU)
    keys = {(operation, key) for operation, kernels in launches.MODULES.items() for key in kernels.CANDIDATES}
    assert table.tiles.keys() == {(operation, key) for operation, key in keys if "half, sm_80" not in key}
    assert all(tile == launches.MODULES[operation].TILES[key] for (operation, key), tile in table.tiles.items())


# ---- the command


def test_a_folder_that_cannot_be_made_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTARCH_TUNED", "")
    with pytest.raises(typer.BadParameter, match=r"want a folder, got '.*file'"):
        tune.main(None, "cpu", 600, tmp_path / "file")


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(cli.torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cpu", "cuda:0"):
        status, printed = fastarch_cli("tune", "--device", device)
        assert status == 2
        assert f"want a CUDA device, of which there are 0, got '{device}'" in printed


def test_the_command_runs_the_script(monkeypatch, tmp_path):
    ran = []
    finished = cli.subprocess.CompletedProcess([], returncode=gpu_run.LEFT)
    monkeypatch.setattr(cli.subprocess, "run", lambda command, env: ran.append(command) or finished)
    monkeypatch.setattr(cli.torch.cuda, "device_count", lambda: 2)
    options = ["--device", "cuda:1", "--budget", "7", "--output", tmp_path]
    assert fastarch_cli("tune", "gru", "attention", *options)[0] == gpu_run.LEFT
    assert ran[0][2:] == ["--device=cuda:1", "--budget=7.0", f"--output={tmp_path}", "gru", "attention"]
    assert Path(ran[0][1]).samefile(tune.__file__)
    status, printed = fastarch_cli("tune", "os")
    assert status == 2 and "want some of attention, batch_norm, conv_relu_pool, gru, got 'os'" in printed
    assert fastarch_cli("tune", "--device", "cuda:2")[0] == 2
    assert len(ran) == 1


def test_info_says_which_tiles_a_gpu_has(monkeypatch, tuned, run, tmp_path):
    monkeypatch.setenv("FASTARCH_TUNED", str(tmp_path))
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli.torch.cuda, "get_device_name", lambda *_: GPU)
    tiles.of_gpu.cache_clear()
    assert "Triton's tiles safe, no table" in fastarch_cli("info")[1]
    run(tuned(), CHOICES)
    tiles.of_gpu.cache_clear()
    printed = fastarch_cli("info")[1]
    tiles.of_gpu.cache_clear()
    assert "Triton's tiles tuned in " in printed and ": gru 20" in printed and "the rest safe" in printed
