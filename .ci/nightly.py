"""make nightly: targets of the Makefile that take too long for CI, and a table of how each last went, .ci/nightly.md.

python .ci/nightly.py TARGET [TARGET ...]

A target that fails does not keep the others from running; the status is 1 then. out/nightly has all that they print.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import floors
import records

HEAD = ["target", "outcome", "last line", "minutes", "date", "commit", "machine"]
TABLE, LOGS = Path(".ci/nightly.md"), Path("out/nightly")


def rows() -> dict[str, list[str]]:
    """By target, as they stand in the table."""
    lines = TABLE.read_text().splitlines()[2:] if TABLE.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells}


def write(table: dict[str, list[str]]) -> None:
    lines = [HEAD, ["---"] * len(HEAD), *table.values()]
    TABLE.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def run(target: str) -> tuple[bool, str, float]:
    """Whether it passed, the last line that it printed, and its minutes."""
    log, begin = LOGS / f"{target}.log", time.monotonic()
    with log.open("w") as out:
        status = subprocess.run(
            ["make", "--no-print-directory", target], stdout=out, stderr=subprocess.STDOUT
        ).returncode
    lines = [line.strip(" =") for line in log.read_text(errors="replace").splitlines() if line.strip(" =")]
    return status == 0, lines[-1][:100].replace("|", "/") if lines else "", (time.monotonic() - begin) / 60


def main(targets: list[str]) -> int:
    LOGS.mkdir(parents=True, exist_ok=True)
    machine, failed = floors.machine(torch.device("cpu")), []
    where = f"{machine['device']}, {machine['threads']} threads"
    for target in targets:
        made = records.provenance([], {})  # before it runs
        passed, said, minutes = run(target)
        outcome = "passed" if passed else "failed"
        print(f"{target}: {outcome} after {minutes:.0f} minutes: {said}", flush=True)
        commit = f"{made['commit']}{' changed' * bool(made['dirty'])}"
        row = [target, outcome, said, f"{minutes:.1f}", made["date"], commit, where]
        write(rows() | {target: row})
        failed += [] if passed else [target]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
