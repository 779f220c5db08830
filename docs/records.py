"""The tables of bench/results/**/*.json: all of them for docs/performance.md (a hook of MkDocs), a summary for README.

python docs/records.py prints the summary.
"""

import importlib.util
import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# by its path: MkDocs itself has a module of the name `markdown`
spec = importlib.util.spec_from_file_location("bench_markdown", ROOT / "bench/markdown.py")
bench_markdown = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_markdown)
OURS, table = bench_markdown.OURS, bench_markdown.table

FAMILIES = {
    "conv_relu_pool": "Convolution, ReLU, pool",
    "batch_norm": "Batch norm",
    "gru": "GRU",
    "attention": "Attention",
    "models": "Whole networks",
}


def records(family: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((ROOT / "bench/results").rglob(f"{family}_*.json"))]


def machine(record: dict) -> str:
    about, floors = dict(record["machine"]), record["floors"]
    device, threads = about.pop("device"), about.pop("threads", None)
    where = f"{device}, {threads} threads" if threads else device
    rates = f"{floors['flops'] / 1e9:.0f} GFLOP/s and {floors['bandwidth'] / 1e9:.0f} GB/s measured in the same run"
    return f"{where}: {', '.join(f'{name} {value}' for name, value in about.items())}; {rates}."


def modes(record: dict) -> dict[str, list[dict]]:
    results = record["results"]
    return {mode: [r for r in results if r["mode"] == mode] for mode in dict.fromkeys(r["mode"] for r in results)}


def best_ratio(result: dict) -> float:
    """Time of the fastest peer by ours."""
    others = [t for name, t in result["timings"].items() if not name.startswith(OURS)]
    return min(others, key=lambda t: t["seconds"])["ratio"]


def summary() -> str:
    """Per family, machine and mode, the ratio to the fastest peer: geometric mean, least, and where that is."""
    lines = ["| fastest peer's time / fastarch's | machine | | geometric mean | least | cases |"]
    lines.append("|---|---|---|---|---|---|")
    for family, title in FAMILIES.items():
        for record in records(family):
            about = record["machine"]
            for mode, results in modes(record).items():
                ratios = {r["case"]: best_ratio(r) for r in results}
                least = min(ratios, key=ratios.get)
                lines.append(
                    f"| {title} | {about['device']}, torch {about['torch']} | {mode} "
                    f"| {statistics.geometric_mean(ratios.values()):.2f} "
                    f"| {ratios[least]:.2f} ({least}) | {len(ratios)} |"
                )
        if not records(family):
            lines.append(f"| {title} | | | not measured | | |")
    return "\n".join(lines)


def all_tables() -> str:
    parts = []
    for family, title in FAMILIES.items():
        parts.append(f"## {title}")
        for record in records(family):
            parts += [machine(record), *(table(mode, results) for mode, results in modes(record).items())]
        if not records(family):
            parts.append("Not measured.")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace("<!-- summary -->", summary()).replace("<!-- tables -->", all_tables())


if __name__ == "__main__":
    print(summary())
