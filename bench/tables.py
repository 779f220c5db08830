"""The tables of bench/results/*/*.json: all of them for docs/performance.md (a hook of MkDocs), a summary for README.

python bench/tables.py prints the summary.
"""

import statistics

import records
from records import best_peer, by_mode, ratio

FAMILIES = {
    "conv_relu_pool": "Convolution, ReLU, pool",
    "batch_norm": "Batch norm",
    "gru": "GRU",
    "attention": "Attention",
    "models": "Whole networks",
    "fuse": "Models after `fastarch.fuse`",
}


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


def left_out(results: list[dict]) -> list[str]:
    """Who does not run which cases, and why: a line a reason."""
    cases = {}
    for r in results:
        for name, reason in r.get("left_out", {}).items():
            cases.setdefault((name, reason), []).append(f"{r['case']} {r['mode']}")
    return [f"Without {name}: {', '.join(of)}. {reason}" for (name, reason), of in cases.items()]


def machine(record: dict) -> str:
    about, floors = dict(record["machine"]), record["floors"]
    where = records.title(about)
    for shown in ("device", "isa", "threads"):
        about.pop(shown, None)
    about = {name: " ".join(value) if isinstance(value, list) else value for name, value in about.items()}
    rates = f"{floors['flops'] / 1e9:.0f} GFLOP/s and {floors['bandwidth'] / 1e9:.0f} GB/s measured in the same run"
    made = record.get("run")  # the oldest records do not have it
    when = (
        f" {made['date']}, commit {(made['commit'] or 'unknown')[:12]}{' changed' * bool(made['dirty'])}."
        if made
        else ""
    )
    return f"{where}: {', '.join(f'{name} {value}' for name, value in about.items())}; {rates}.{when}"


def heading(mode: str, results: list[dict]) -> str:
    dtype = results[0]["dtype"]
    return mode if dtype == "float32" else f"{mode} in {dtype}"


def cases(n: int) -> str:
    return f"{n} case{'s' * (n != 1)}"


def summary() -> str:
    """Per family, machine and mode, the ratio to the fastest peer: geometric mean, least, and where that is."""
    lines = ["| fastest peer's time / fastarch's | machine | | geometric mean | least | of |"]
    lines.append("|---|---|---|---|---|---|")
    for family, title in FAMILIES.items():
        found = records.of(family)
        for record in found:
            about = record["machine"]
            for mode, results in by_mode(record["results"]).items():
                ratios = {r["case"]: ratio(r) for r in results}
                least = min(ratios, key=ratios.get)
                lines.append(
                    f"| {title} | {records.title(about)}, torch {about['torch']} | {heading(mode, results)} "
                    f"| {statistics.geometric_mean(ratios.values()):.2f} "
                    f"| {ratios[least]:.2f} ({least}) | {cases(len(ratios))} |"
                )
        if not found:
            lines.append(f"| {title} | | | not measured | | |")
    return "\n".join(lines)


def all_cases() -> str:
    parts = []
    for family, title in FAMILIES.items():
        found = records.of(family)
        parts.append(f"## {title}")
        for record in found:
            modes = by_mode(record["results"]).items()
            parts += [machine(record), *(table(heading(mode, results), results) for mode, results in modes)]
            parts += ["\n".join(f"- {line}" for line in left_out(record["results"]))]
        if not found:
            parts.append("Not measured.")
    return "\n\n".join(part for part in parts if part)


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace("<!-- summary -->", summary()).replace("<!-- tables -->", all_cases())


if __name__ == "__main__":
    print(summary())
