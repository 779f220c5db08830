"""Records: a machine, its floors, how the run was made, and the timings of every case.

bench/results/<device>/<operation>.json holds those that README and docs/performance.md show. Nothing here needs torch.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MODES = ("inference", "forward", "training")
OURS = "fastarch"  # as are all providers whose name begins with it
REFERENCE = "eager"  # what the same module of torch's layers does: present in every run, unless --peers leaves it out


def title(machine: dict) -> str:
    """The device, and of a CPU what else tells it apart: clouds call three generations "AMD EPYC", two with AVX-512."""
    parts = [machine["device"]]
    if machine.get("model"):
        parts += [f"model {machine['model']}"]
    if "threads" in machine:
        parts += [machine["isa"] or "no kernels", f"{machine['threads']} threads"]
    return ", ".join(parts)


def slug(machine: dict) -> str:
    """The title as a folder, such as amd_epyc_model_25_17_avx512_2_threads."""
    return re.sub(r"\W+", "_", re.sub(r"\((R|TM)\)", "", title(machine)).lower()).strip("_")


def provenance(arguments: Iterable[str], seeds: dict[str, int]) -> dict:
    """What it takes to run the same again."""
    written = ":!bench/results", ":!kernels/tuned", ":!.ci/nightly.md"  # by runs
    changes = git("status", "--porcelain", "--", ".", *written)
    settings = ("FASTARCH_", "ATEN_", "OMP_", "MKL_", "TORCH", "CUDA_VISIBLE")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "command": " ".join(["pytest", *arguments]).replace(f"{ROOT}/", ""),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(settings)},
        "platform": platform.platform(),
        "seeds": seeds,
    }


def git(*arguments: str) -> str | None:
    """What it prints, or None away from a clone."""
    try:
        run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def write(record: dict, path: Path) -> None:
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[\d\s,]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # rounds: a line a provider
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def keep(record: dict, folder: Path) -> list[Path]:
    """Writes one file an operation into the device's folder; of a dtype that is not float32 one of its own."""
    kinds = dict.fromkeys((r["operation"], r["dtype"]) for r in record["results"])
    paths = []
    for operation, dtype in kinds:
        results = [r for r in record["results"] if (r["operation"], r["dtype"]) == (operation, dtype)]
        name = operation if dtype == "float32" else f"{operation}_{dtype}"
        paths.append(folder / slug(record["machine"]) / f"{name}.json")
        write(record | {"results": results}, paths[-1])
    return paths


def load(path: Path) -> dict:
    """A record, or those of a device's folder as one; it must be one device's."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"want a record or a folder of records, got {path}")
    parts = [json.loads(file.read_text()) for file in files]
    return parts[0] | {"results": [r for part in parts for r in part["results"]]}


def every() -> list[dict]:
    """All that are kept, device by device."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/*.json"))]


def of(operation: str) -> list[dict]:
    return [record for record in every() if record["results"][0]["operation"] == operation]


def key(result: dict) -> tuple[str, str, str, str]:
    """What a result has in common with the same case's of another run."""
    return result["operation"], result["case"], result["mode"], result["dtype"]


def by_mode(results: list[dict]) -> dict[str, list[dict]]:
    parts = {mode: [r for r in results if r["mode"] == mode] for mode in MODES}
    return {mode: part for mode, part in parts.items() if part}


def best_peer(result: dict) -> str:
    others = {name: t["seconds"] for name, t in result["timings"].items() if not name.startswith(OURS)}
    return min(others, key=others.get)


def ratio(result: dict) -> float:
    """Time of the fastest peer by ours."""
    return result["timings"][best_peer(result)]["ratio"]
