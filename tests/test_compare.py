"""`fastarch bench --compare`: records whose answer is known."""

import math
import random

import compare
import pytest
import records

MACHINE = {"device": "A Processor", "isa": "avx2", "threads": 2}
NOISE = 0.03  # standard deviation of a round's ratio
WOBBLE = 0.2  # and of how fast the machine is from round to round


def record(slowdown: float, seed: int, cases: int = 40, rounds: int = 15, machine: float = 1.0) -> dict:
    """Ours takes half of eager's time, case 0 `slowdown` times as long, and everything on it `machine` times."""
    draw = random.Random(seed)

    def times(milliseconds: float, wobble: list[float]) -> dict:
        noise = [draw.lognormvariate(0, NOISE / math.sqrt(2)) for _ in wobble]
        return {"nanoseconds": [round(1e6 * milliseconds * machine * a * b) for a, b in zip(noise, wobble)]}

    results = []
    for i in range(cases):
        wobble = [draw.lognormvariate(0, WOBBLE) for _ in range(rounds)]
        milliseconds = {"fastarch": 0.5 * (slowdown if i == 0 else 1), "eager": 1, "compile": 0.9}
        timings = {name: times(t, wobble) for name, t in milliseconds.items()}
        results.append({"operation": "gru", "case": str(i), "mode": "training", "dtype": "float32", "timings": timings})
    return {"machine": MACHINE, "results": results}


def verdicts(a: dict, b: dict) -> list[str]:
    found, without = compare.changes(a, b)
    assert not without
    return [change.verdict for change in found]


@pytest.mark.parametrize("seed", range(20))
def test_a_tenth_slower_is_told_among_forty_cases(seed):
    assert verdicts(record(1.0, seed), record(1.1, 100 + seed)) == ["slower"] + ["noise"] * 39


def test_a_tenth_faster_is_told():
    assert verdicts(record(1.1, 0), record(1.0, 1)) == ["faster"] + ["noise"] * 39


def test_noise_is_none_of_both():
    """Of a hundred pairs of records of forty cases at most a few have any case that looks changed."""
    alarms = [set(verdicts(record(1.0, seed), record(1.0, 1000 + seed))) != {"noise"} for seed in range(100)]
    assert sum(alarms) <= 5


def test_a_slower_machine_cancels():
    assert set(verdicts(record(1.0, 0), record(1.0, 1, machine=1.4))) == {"noise"}


def test_three_rounds_decide_nothing():
    found, _ = compare.changes(record(1.0, 0, 1, 3), record(2.0, 1, 1, 3))
    assert (found[0].verdict, found[0].low, found[0].high) == ("noise", 0, math.inf)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(300):
        draw = random.Random(seed)
        x, y = ([draw.gauss(mean, 1) for _ in range(15)] for mean in (0, 0.5))
        _, low, high = compare.shift(x, y, 0.9)
        held += low <= 0.5 <= high
    assert 0.86 <= held / 300 <= 0.95


@pytest.mark.parametrize(("slowdown", "status", "word"), [(1.3, 1, "1 slower"), (1.0, 0, "0 slower")])
def test_the_status_tells(tmp_path, capsys, slowdown, status, word):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, r in zip(files, (record(1.0, 0, 4), record(slowdown, 1, 4))):
        records.write(r, file)
    assert compare.main(*files) == status
    assert word in capsys.readouterr().out


def test_what_cannot_be_compared_is_named():
    a, b = record(1.0, 0, 3), record(1.0, 1, 2)
    del b["results"][0]["timings"]["eager"]
    found, without = compare.changes(a, b)
    assert [change.case for change in found] == ["gru 1 training float32"]
    assert without == [
        "gru 2 training float32: only in A",
        "gru 0 training float32: a record lacks the rounds of fastarch or eager",
    ]
