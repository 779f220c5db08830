"""The tables of bench/results/*.json: all of them for docs/performance.md (a hook of MkDocs), a summary for README.

python bench/tables.py prints the summary.
"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "fastarch"  # as are all providers whose name begins with it
FAMILIES = {
    "conv_relu_pool": "Convolution, ReLU, pool",
    "batch_norm": "Batch norm",
    "gru": "GRU",
    "attention": "Attention",
    "models": "Whole networks",
    "fuse": "Models after `fastarch.fuse`",
}


def best_peer(result: dict) -> str:
    others = {name: t["seconds"] for name, t in result["timings"].items() if not name.startswith(OURS)}
    return min(others, key=others.get)


def ratio(result: dict) -> float:
    """Time of the fastest peer by ours."""
    return result["timings"][best_peer(result)]["ratio"]


def table(mode: str, results: list[dict]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["timings"]))
    saved = any("saved_bytes" in r for r in results)
    lines = [[f"{mode}, ms", *names, "best of the others / fastarch"] + ["kept"] * saved]
    lines.append(["---"] * len(lines[0]))
    for r in results:
        best, line = best_peer(r), [r["case"]]
        for name in names:
            text = f"{r['timings'][name]['seconds'] * 1e3:.3g}" if name in r["timings"] else ""
            line.append(f"**{text}**" if name == best else text)
        line.append(f"{ratio(r):.2f}")
        if saved:
            line.append(f"{r['saved_bytes'] / r['eager_saved_bytes']:.0%}")
        lines.append(line)
    mean = statistics.geometric_mean(map(ratio, results))
    lines.append(["geometric mean", *[""] * len(names), f"{mean:.2f}"] + [""] * saved)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def records(family: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{family}_*.json"))]


def by_mode(record: dict) -> dict[str, list[dict]]:
    results = record["results"]
    return {mode: [r for r in results if r["mode"] == mode] for mode in dict.fromkeys(r["mode"] for r in results)}


def machine(record: dict) -> str:
    about, floors = dict(record["machine"]), record["floors"]
    device, threads = about.pop("device"), about.pop("threads", None)
    where = f"{device}, {threads} threads" if threads else device
    rates = f"{floors['flops'] / 1e9:.0f} GFLOP/s and {floors['bandwidth'] / 1e9:.0f} GB/s measured in the same run"
    return f"{where}: {', '.join(f'{name} {value}' for name, value in about.items())}; {rates}."


def cases(n: int) -> str:
    return f"{n} case{'s' * (n != 1)}"


def summary() -> str:
    """Per family, machine and mode, the ratio to the fastest peer: geometric mean, least, and where that is."""
    lines = ["| fastest peer's time / fastarch's | machine | | geometric mean | least | of |"]
    lines.append("|---|---|---|---|---|---|")
    for family, title in FAMILIES.items():
        for record in records(family):
            about = record["machine"]
            for mode, results in by_mode(record).items():
                ratios = {r["case"]: ratio(r) for r in results}
                least = min(ratios, key=ratios.get)
                lines.append(
                    f"| {title} | {about['device']}, torch {about['torch']} | {mode} "
                    f"| {statistics.geometric_mean(ratios.values()):.2f} "
                    f"| {ratios[least]:.2f} ({least}) | {cases(len(ratios))} |"
                )
        if not records(family):
            lines.append(f"| {title} | | | not measured | | |")
    return "\n".join(lines)


def all_cases() -> str:
    parts = []
    for family, title in FAMILIES.items():
        parts.append(f"## {title}")
        for record in records(family):
            parts += [machine(record), *(table(mode, results) for mode, results in by_mode(record).items())]
        if not records(family):
            parts.append("Not measured.")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace("<!-- summary -->", summary()).replace("<!-- tables -->", all_cases())


if __name__ == "__main__":
    print(summary())
