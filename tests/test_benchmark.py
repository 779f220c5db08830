"""The machinery of bench/: who is timed, what a record holds, and that a benchmark runs from end to end."""

import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import harness
import peers
import pytest
import records
import torch
from harness import Case
from torch import nn


def case(ours: nn.Module | None = None) -> Case:
    reference = nn.Linear(4, 3)
    same = nn.Linear(4, 3)
    same.load_state_dict(reference.state_dict())
    return Case("small", ours or same, reference, (torch.randn(2, 4),), 24.0, 100.0, in_any_format=False)


def raising(module: nn.Module, inputs: tuple) -> peers.Call:
    raise NotImplementedError("\n\nno such operator\nand a long story")


def wrong(module: nn.Module, inputs: tuple) -> peers.Call:
    return peers.Call(lambda: module(*inputs) + 1, module, inputs)


@pytest.fixture
def three_peers(monkeypatch):
    known = {"eager": peers.eager, "raising": raising, "wrong": wrong}
    monkeypatch.setattr(peers, "of", lambda device, mode: known)


@pytest.mark.parametrize("mode", ["inference", "forward", "training"])
def test_who_cannot_run_a_case_is_left_out_with_the_reason(three_peers, mode):
    runs, left_out = harness.providers(case(), mode, [])
    assert list(runs) == ["fastarch", "eager"]
    assert left_out["raising"] == "NotImplementedError: no such operator"
    assert left_out["wrong"].startswith("AssertionError: result 0 is off by ")


def test_who_was_asked_for_but_does_not_do_it_is_named(three_peers):
    runs, left_out = harness.providers(case(), "training", ["eager", "openvino"])
    assert list(runs) == ["fastarch", "eager"]
    assert left_out == {"openvino": "does not do training of such a case"}


def test_ours_must_be_right(three_peers):
    with pytest.raises(AssertionError, match="result 0 is off by"):
        harness.providers(case(nn.Linear(4, 3)), "inference", [])


def test_dropout_is_timed_and_what_is_under_it_is_checked(three_peers):
    reference = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    inputs = (torch.randn(64, 4),)
    drops = Case("drops", copy.deepcopy(reference), reference, inputs, 24.0, 100.0, in_any_format=False, drops=True)
    runs, left_out = harness.providers(drops, "training", [])
    assert set(left_out) == {"raising", "wrong"}
    for run in runs.values():
        assert 0.3 < (run()[0] == 0).float().mean() < 0.7
    other = drops._replace(ours=nn.Sequential(nn.Linear(4, 3), nn.Dropout()))
    with pytest.raises(AssertionError, match="result 0 is off by"):
        harness.providers(other, "training", [])


@pytest.mark.parametrize(("error", "is_rounding"), [(1e-6, True), (1e-2, False)])
def test_a_gradient_may_be_zero_but_for_rounding(error, is_rounding):
    y, large, zero = torch.ones(3), torch.full((3,), 100.0), torch.full((3,), 1e-17)
    outcome = nullcontext() if is_rounding else pytest.raises(AssertionError, match="result 2 is off by")
    with outcome:
        harness.check((y, large, zero + error), (y, large, zero), case())


def test_rounds_are_kept(three_peers, monkeypatch):
    monkeypatch.setattr(harness, "ROUND_SECONDS", 1e-4)
    runs, _ = harness.providers(case(), "inference", [])
    timings = harness.time_all(runs, torch.device("cpu"), budget=0)
    for timing in timings.values():
        assert len(timing.nanoseconds) == 3
        assert all(isinstance(n, int) for n in timing.nanoseconds)
        assert timing.best == pytest.approx(min(timing.nanoseconds) / 1e9, abs=1e-9)


@pytest.mark.parametrize(
    ("machine", "slug"),
    [
        ({"device": "AMD EPYC", "model": "25-17", "isa": "avx2", "threads": 2}, "amd_epyc_model_25_17_avx2_2_threads"),
        (
            {"device": "Intel(R) Core(TM) i7-1260P", "isa": "generic", "threads": 12},
            "intel_core_i7_1260p_generic_12_threads",
        ),
        ({"device": "NVIDIA H100 80GB HBM3"}, "nvidia_h100_80gb_hbm3"),
    ],
)
def test_devices_have_folders(machine, slug):
    assert records.slug(machine) == slug


def test_records_are_kept_by_operation_and_dtype(tmp_path):
    kinds = [("gru", "float32"), ("gru", "bfloat16"), ("attention", "float32")]
    results = [{"operation": o, "dtype": d, "timings": {"eager": {"nanoseconds": [3, 4]}}} for o, d in kinds]
    record = {"machine": {"device": "A", "isa": "avx2", "threads": 1}, "results": results}
    paths = records.keep(record, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        f"a_avx2_1_threads/{name}.json" for name in ("gru", "gru_bfloat16", "attention")
    ]
    assert '"nanoseconds": [ 3, 4 ]' in paths[0].read_text()
    together = records.load(tmp_path / "a_avx2_1_threads")
    assert sorted(map(str, together["results"])) == sorted(map(str, results))


def test_changes_of_the_source_show(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.provenance([], {})["commit"] is None  # no clone
    for command in (
        ["init", "-q"],
        ["-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "A"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    made = records.provenance(["-k", f"{tmp_path}/bench/bench_gru.py"], {"inputs": 0})
    assert len(made["commit"]) == 40
    assert (made["dirty"], made["command"], made["seeds"]) == (False, "pytest -k bench/bench_gru.py", {"inputs": 0})
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "gru.json").touch()
    assert records.provenance([], {})["dirty"] is False  # a record is not the source of another
    (tmp_path / "kernel.cpp").touch()
    assert records.provenance([], {})["dirty"] is True


def test_kept_records_stand_where_their_names_say():
    for path in records.RESULTS.glob("*/*.json"):
        record = json.loads(path.read_text())
        kinds = {(r["operation"], r["dtype"]) for r in record["results"]}
        assert len(kinds) == 1
        (operation, dtype) = kinds.pop()
        name = operation if dtype == "float32" else f"{operation}_{dtype}"
        assert path == records.RESULTS / records.slug(record["machine"]) / f"{name}.json"
        assert len({records.key(r) for r in record["results"]}) == len(record["results"])


def test_a_benchmark_runs_from_end_to_end(tmp_path):
    """Two operations, with a record, a page, and a comparison with itself, as a user types them."""
    fastarch = [Path(sys.executable).with_name("fastarch"), "bench"]
    options = ["--infer", "--dtype", "float32", "--peers", "eager", "--budget", "0", "-k", "lenet_c3 or stream"]
    command = [*fastarch, "conv_relu_pool", "gru", *options, "--device", "cpu", "--report", tmp_path, "--", "-x"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
    record = records.load(tmp_path / "record.json")
    assert [records.key(r) for r in record["results"]] == [
        ("conv_relu_pool", "lenet_c3", "inference", "float32"),
        ("gru", "stream", "inference", "float32"),
    ]
    assert {"commit", "dirty", "date", "command", "seeds", "environment"} <= record["run"].keys()
    assert {"device", "threads", "isa", "flags", "python", "torch", "fastarch"} <= record["machine"].keys()
    for r in record["results"]:
        assert r["floor_seconds"] > 0
        assert {len(t["nanoseconds"]) for t in r["timings"].values()} == {3}
    assert (tmp_path / "index.html").exists()
    compared = subprocess.run([*fastarch, "--compare", *[tmp_path / "record.json"] * 2], capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "0 slower" in compared.stdout
