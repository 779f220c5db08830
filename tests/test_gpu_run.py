"""The run of `make gpu`: in order, until the time is up, and on from there. No GPU is needed for that."""

import json
import sys
import time

import gpu
import pytest


def stage(name: str, code: str = "pass") -> gpu.Stage:
    return gpu.Stage(name, [sys.executable, "-c", code])


def test_stages_run_in_order_and_once(tmp_path):
    log = tmp_path / "order"
    found = [stage(name, f"open({str(log)!r}, 'a').write({name!r}); print('said', {name!r})") for name in "abc"]
    for _ in range(2):
        assert {name: outcome.status for name, outcome in gpu.go_on(found, tmp_path, 60, "1").items()} == dict.fromkeys(
            "abc", 0
        )
    assert log.read_text() == "abc"
    assert (tmp_path / "b.log").read_text() == "said b\n"
    gpu.go_on(found, tmp_path, 60, "2")  # another commit: all again
    assert log.read_text() == "abcabc"


def test_what_was_cut_off_comes_before_what_failed(tmp_path):
    log = tmp_path / "order"
    note = f"open({str(log)!r}, 'a').write"
    found = [
        stage("fails", f"{note}('f'); raise SystemExit(4)"),
        stage("passes", f"{note}('p')"),
        stage("waits", f"{note}('w'); import time; time.sleep({{}})"),
        stage("is not begun", f"{note}('n')"),
    ]
    slow = [s._replace(command=[c.replace("{}", "60") for c in s.command]) for s in found]
    started = time.monotonic()
    done = gpu.go_on(slow, tmp_path, 3, "1")
    assert time.monotonic() - started < 30
    assert [done[name].status for name in ("fails", "passes", "waits")] == [4, 0, None]
    assert "is not begun" not in done
    fast = [s._replace(command=[c.replace("{}", "0") for c in s.command]) for s in found]
    assert gpu.go_on(fast, tmp_path, 60, "1")["waits"].status == 0
    assert log.read_text() == "fpwwnf"
    assert json.loads((tmp_path / "stages.json").read_text())["stages"]["fails"][0] == 4


def test_nothing_follows_a_build_that_failed(tmp_path):
    done = gpu.go_on([stage("build", "raise SystemExit(1)"), stage("tests")], tmp_path, 60, "1")
    assert list(done) == ["build"]


def test_what_ends_by_itself_with_more_to_do_is_gone_on_with(tmp_path):
    log = tmp_path / "order"
    note = f"open({str(log)!r}, 'a').write"
    found = [stage("more", f"{note}('m'); raise SystemExit({gpu.LEFT})"), stage("next", f"{note}('n')")]
    for _ in range(2):
        done = gpu.go_on(found, tmp_path, 60, "1")
        assert [done[name].status for name in ("more", "next")] == [None, 0]
    assert log.read_text() == "mnm"


def test_tiles_are_measured_between_tests_and_benchmarks(tmp_path):
    names = [s.name for s in gpu.stages(tmp_path)]
    before, after = names[: names.index("tune")], names[names.index("tune") + 1 :]
    assert before == ["build", *(f"tests of {o}" for o in gpu.OPERATIONS)]
    assert {f"bench of {o}" for o in gpu.OPERATIONS} <= {*after}
    assert gpu.TUNING < 0.25 * 9 * 60


@pytest.mark.parametrize("operation", gpu.OPERATIONS)
def test_every_operation_is_tested_and_timed(operation, tmp_path):
    names = [s.name for s in gpu.stages(tmp_path)]
    assert {f"tests of {operation}", f"bench of {operation}"} <= set(names)
    for found in gpu.stages(tmp_path):
        for word in found.command:
            if word.startswith("tests/"):
                assert (gpu.records.ROOT / word).exists()
