"""`make bench-check`: what it calls slower, and on which machines it compares nothing."""

import json

import check
import pytest

RECORDED = {"a": 2.0, "b": 4.0}


def measuring(*attempts: dict[str, float]):
    """Stands for the benchmark: attempt after attempt, and which cases each was asked for."""
    asked, left = [], list(attempts)

    def measure(cases: list[str]) -> dict[str, float]:
        asked.append(cases)
        ratios = left.pop(0)
        return {case: ratios[case] for case in cases}

    return measure, asked


def test_one_good_attempt_is_enough():
    measure, asked = measuring({"a": 1.0, "b": 4.0}, {"a": 1.5}, {"a": 1.61})
    assert check.slower(RECORDED, measure) == {}
    assert asked == [["a", "b"], ["a"], ["a"]]


def test_three_bad_ones_are_slower():
    measure, _ = measuring({"a": 1.0, "b": 3.1}, {"a": 1.59, "b": 3.3}, {"a": 1.2})
    assert check.slower(RECORDED, measure) == {"a": [1.0, 1.59, 1.2]}


def test_nothing_runs_again_when_all_is_well():
    measure, asked = measuring({"a": 2.5, "b": 3.3})
    assert check.slower(RECORDED, measure) == {}
    assert asked == [["a", "b"]]


@pytest.fixture
def ratios(tmp_path, monkeypatch):
    """A folder for recorded ratios; on a machine named Here, every case is measured at 1."""
    monkeypatch.setattr(check, "RATIOS", tmp_path)
    monkeypatch.setattr(check, "machine", lambda device: {"device": "Here", "threads": 2, "isa": "avx2"})
    monkeypatch.setattr(check, "measure", lambda cases: dict.fromkeys(cases, 1.0))
    return tmp_path


@pytest.mark.parametrize(
    ("recorded", "status", "message"),
    [(1.2, 0, "0 of 1 cases are slower"), (1.3, 1, "1 of 1 cases are slower")],
)
def test_status(ratios, capsys, recorded, status, message):
    (ratios / "here_avx2_2_threads.json").write_text(json.dumps({"ratios": {"::a": recorded}}))
    assert check.main([]) == status
    assert message in " ".join(capsys.readouterr().out.split())


def test_another_device_or_instruction_set_is_not_compared(ratios, capsys):
    (ratios / "here_avx512_2_threads.json").write_text("{}")
    assert check.main([]) == 0
    assert "No ratios were recorded on this device (here_avx2_2_threads)" in " ".join(capsys.readouterr().out.split())


def test_what_is_recorded_is_compared(ratios):
    assert check.main(["--record"]) == 0
    assert json.loads((ratios / "here_avx2_2_threads.json").read_text())["ratios"] == dict.fromkeys(check.CASES, 1.0)
    assert check.main([]) == 0


def test_recorded_cases_exist():
    for file in check.Path(check.__file__).with_name("ratios").glob("*.json"):
        assert set(json.loads(file.read_text())["ratios"]) <= set(check.CASES)
