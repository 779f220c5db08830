"""Prints a recorded benchmark as the tables that README shows:  python bench/markdown.py RECORD.json"""

import json
import statistics
import sys
from pathlib import Path

OURS = "fastarch"


def table(mode: str, results: list[dict]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["timings"]))
    saved = any("saved_bytes" in r for r in results)
    lines = [[f"{mode}, ms", *names, "best of the others / fastarch"] + ["kept"] * saved]
    lines.append(["---"] * len(lines[0]))
    ratios = []
    for r in results:
        others = {name: t for name, t in r["timings"].items() if not name.startswith(OURS)}
        best = min(others, key=lambda name: others[name]["seconds"])
        ratios.append(others[best]["ratio"])
        line = [r["case"]]
        for name in names:
            text = f"{r['timings'][name]['seconds'] * 1e3:.3g}" if name in r["timings"] else ""
            line.append(f"**{text}**" if name == best else text)
        line.append(f"{ratios[-1]:.2f}")
        if saved:
            line.append(f"{r['saved_bytes'] / r['eager_saved_bytes']:.0%}")
        lines.append(line)
    mean = ["geometric mean", *[""] * len(names), f"{statistics.geometric_mean(ratios):.2f}"] + [""] * saved
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, mean])


def main(path: str) -> None:
    results = json.loads(Path(path).read_text())["results"]
    for mode in dict.fromkeys(r["mode"] for r in results):
        print(table(mode, [r for r in results if r["mode"] == mode]), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1])
