"""python bench/report.py FOLDER [RECORD ...]: FOLDER/index.html, a page of plots, of all in bench/results by default.

Nothing on the page is fetched from anywhere, and it needs no JavaScript: report.html is its template, each plot an SVG
beside it, and the numbers of a plot are in a table below it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import records
import tables
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from records import OURS, by_mode

TITLES = tables.FAMILIES | {"scaling": "Scaling"}
COLORS = {  # Okabe and Ito's, which the colour-blind tell apart
    OURS: "#000000",
    "eager": "#E69F00",
    "channels_last": "#56B4E9",
    "compile": "#009E73",
    "freezing": "#CC79A7",
    "onnxruntime": "#0072B2",
    "openvino": "#D55E00",
    "max-autotune": "#F0C419",
}
OPERATION_COLORS = dict(zip(TITLES, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999")))
MARKERS = {"inference": "o", "forward": "s", "training": "^"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fastarch",  # the same plot is the same file
}


class Plot(NamedTuple):
    file: str
    caption: str
    rows: list[list[str]]  # a table of what it shows, the heading first


class Section(NamedTuple):
    title: str
    about: list[str]
    plots: list[Plot]  # none: not measured


class Device(NamedTuple):
    name: str
    anchor: str
    sections: list[Section]


def build(found: list[dict], folder: Path) -> Path:
    """The page of these records, device by device."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    by_device = {}
    for record in found:
        by_device.setdefault(records.slug(record["machine"]), []).append(record)
    with matplotlib.rc_context(STYLE):
        devices = [of_device(slug, of, folder) for slug, of in by_device.items()]
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html")
    page = folder / "index.html"
    page.write_text(template.render(devices=devices))
    return page


def of_device(slug: str, found: list[dict], folder: Path) -> Device:
    sections = [Section("Roofline", [], [roofline(found, folder / f"{slug}-roofline.svg")])]
    for operation, title in TITLES.items():
        draw = scaling if operation == "scaling" else speed
        plots, texts = [], []
        for record in found:
            for dtype in dict.fromkeys(r["dtype"] for r in record["results"]):
                results = [r for r in record["results"] if (r["operation"], r["dtype"]) == (operation, dtype)]
                if results:
                    plots += draw(results, folder / (f"{slug}-{operation}" + f"-{dtype}" * (dtype != "float32")))
                    texts += [tables.machine(record), *tables.left_out(results)]
        sections.append(Section(title.replace("`", ""), texts, plots))
    return Device(records.title(found[0]["machine"]), slug, sections)


def save(figure: Figure, path: Path, caption: str, rows: list[list[str]]) -> Plot:
    figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = path.read_text()
    path.write_text(text[text.index("<svg") :])  # its document type would name an address
    return Plot(path.name, caption, rows)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def roofline(found: list[dict], path: Path) -> Plot:
    """What we reach of the arithmetic and of the traffic that this machine was measured to do in the same run."""
    points = []
    for record in found:
        for r in record["results"]:
            if r["flops"] and r["operation"] != "scaling":
                intensity, rate = r["flops"] / r["moved"], r["flops"] / r["timings"][OURS]["seconds"]
                points.append((r, intensity, rate, r["floor_seconds"] / r["timings"][OURS]["seconds"]))
    figure, ((axis,),) = new_figure(10, 5.5)
    for operation, mode in dict.fromkeys((r["operation"], r["mode"]) for r, *_ in points):
        of = [(x, y / 1e9) for r, x, y, _ in points if (r["operation"], r["mode"]) == (operation, mode)]
        style = {
            "marker": MARKERS[mode],
            "color": OPERATION_COLORS[operation],
            "edgecolors": "white",
            "linewidths": 0.5,
        }
        axis.scatter(*zip(*of), s=36, zorder=3, label=f"{TITLES[operation].replace('`', '')}, {mode}", **style)
    low, high = min([1.0, *(x for _, x, *_ in points)]) / 2, max([100.0, *(x for _, x, *_ in points)]) * 2
    for record in found:
        flops, bandwidth = record["floors"]["flops"] / 1e9, record["floors"]["bandwidth"] / 1e9
        axis.plot(
            [low, flops / bandwidth, high], [low * bandwidth, flops, flops], color="black", linewidth=0.8, alpha=0.6
        )
    rates = {name: [record["floors"][name] / 1e9 for record in found] for name in ("flops", "bandwidth")}
    most = f"{max(rates['flops']):.0f} GFLOP/s at most, {max(rates['bandwidth']):.0f} GB/s"
    axis.annotate(most, (high, max(rates["flops"])), (0, 4), textcoords="offset points", ha="right")
    axis.set(
        xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="GFLOP/s", xlim=(low, high)
    )
    plain(axis.xaxis, (1, 2, 5))
    plain(axis.yaxis, (1, 2, 5))
    axis.grid(which="major", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    rows = [["", "operations per byte", "GFLOP/s", "of the floor"]]
    for r, x, y, share in points:
        rows.append([f"{r['operation']} {r['case']}, {r['mode']}", f"{x:.3g}", f"{y / 1e9:.3g}", f"{share:.0%}"])
    caption = (
        "Ours, and what the machine was measured to do at best: a line a run. Operations are those of the direct "
        "algorithm: one that needs fewer may lie above. Batch norm, which hardly computes, is not shown."
    )
    return save(figure, path, caption, rows)


def speed(results: list[dict], stem: Path) -> list[Plot]:
    """By mode, how many times as long as ours each peer takes; then what the backward keeps."""
    plots = [speed_in(mode, of, stem.with_name(f"{stem.name}-{mode}.svg")) for mode, of in by_mode(results).items()]
    kept = [r for r in results if r.get("eager_saved_bytes")]
    return plots + ([memory(kept, stem.with_name(f"{stem.name}-memory.svg"))] if kept else [])


def speed_in(mode: str, results: list[dict], path: Path) -> Plot:
    present = {name for r in results for name in r["timings"]}
    peers = [name for name in COLORS if name in present and name != OURS]
    thick = 0.8 / len(peers)
    figure, ((axis,),) = new_figure(10, 1.3 + len(results) * max(0.3, 0.13 * len(peers)))
    bars = []  # where each stands, its peer and timing
    for y, r in enumerate(results):
        here = [name for name in peers if name in r["timings"]]
        bars += [(y + (i - (len(here) - 1) / 2) * thick, name, r["timings"][name]) for i, name in enumerate(here)]
    for peer in peers:
        ys, ts = zip(*((y, t) for y, name, t in bars if name == peer))
        # on a logarithmic axis a bar has no natural foot: it starts at 1, as fast as ours
        axis.barh(ys, [t["ratio"] - 1 for t in ts], thick * 0.92, left=1, color=COLORS[peer], label=peer)
    for y, _, t in bars:
        axis.plot([t["ratio_low"], t["ratio_high"]], [y, y], color="black", linewidth=0.7)
        end, align, gap = ("ratio_high", "left", 3) if t["ratio"] >= 1 else ("ratio_low", "right", -3)
        text = {"textcoords": "offset points", "va": "center_baseline", "ha": align, "fontsize": 6.5}
        axis.annotate(f"{t['ratio']:.2f}", (t[end], y), (gap, 0), **text)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(results)), [r["case"] for r in results])
    axis.set_ylim(len(results) - 0.4, -0.6)
    ends = [t[q] for *_, t in bars for q in ("ratio_low", "ratio_high")]
    axis.set(xscale="log", xlim=(min(1.0, *ends) ** 1.05 / 1.1, max(1.5, *ends) ** 1.05 * 1.1))  # room for the numbers
    axis.set_xlabel("times as long as ours takes; left of 1 the other is faster")
    plain(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(peers), frameon=False)
    rows = [[f"{mode}, ms", OURS, *peers]]
    rows += [[r["case"], *(milliseconds(r, name) for name in (OURS, *peers))] for r in results]
    return save(figure, path, f"{mode.capitalize()}: bars are medians over the rounds, whiskers quartiles.", rows)


def plain(axis: Axis, digits: tuple[float, ...]) -> None:
    """A logarithmic axis with 0.5, 20 and 100 rather than powers of ten."""
    axis.set_major_locator(LogLocator(base=10, subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())


def milliseconds(result: dict, name: str) -> str:
    timing = result["timings"].get(name)
    return f"{timing['seconds'] * 1e3:.3g}" if timing else ""


def memory(results: list[dict], path: Path) -> Plot:
    shares = [100 * r["saved_bytes"] / r["eager_saved_bytes"] for r in results]
    figure, ((axis,),) = new_figure(10, 1.0 + 0.22 * len(results))
    bars = axis.barh(range(len(results)), shares, 0.7, color="#56B4E9")
    axis.bar_label(bars, [f"{s:.0f} %" for s in shares], padding=3, fontsize=7)
    axis.axvline(100, color="black", linewidth=1)
    axis.set_yticks(range(len(results)), [r["case"] for r in results])
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.set(xlabel="% of what eager keeps", xlim=(0, 1.08 * max(100, *shares)))
    rows = [["MB kept for the backward", OURS, "eager"]]
    rows += [[r["case"], *(f"{r[k] / 1e6:.2f}" for k in ("saved_bytes", "eager_saved_bytes"))] for r in results]
    return save(figure, path, "Memory kept for the backward.", rows)


def scaling(results: list[dict], stem: Path) -> list[Plot]:
    """A row of axes for each series, a column for each mode: milliseconds as one size grows."""
    series = list(dict.fromkeys(r["point"]["series"] for r in results))
    modes = list(by_mode(results))
    figure, axes = new_figure(5 * len(modes), 2.4 * len(series), len(series), len(modes))
    rows = [["ms", *(providers := [n for n in COLORS if any(n in r["timings"] for r in results)])]]
    for name, line in zip(series, axes):
        for mode, axis in zip(modes, line):
            of = sorted(
                (r for r in results if (r["point"]["series"], r["mode"]) == (name, mode)),
                key=lambda r: r["point"]["size"],
            )
            for provider in providers:
                points = [
                    (r["point"]["size"], r["timings"][provider]["seconds"] * 1e3)
                    for r in of
                    if provider in r["timings"]
                ]
                if points:
                    width = 2 if provider == OURS else 1.2
                    axis.plot(
                        *zip(*points), "o-", color=COLORS[provider], label=provider, linewidth=width, markersize=4
                    )
            rows += [[f"{r['case']}, {mode}", *(milliseconds(r, p) for p in providers)] for r in of]
            sizes = [r["point"]["size"] for r in of]
            axis.set(xscale="log", yscale="log", title=f"{name}: {mode}", ylabel="ms")
            axis.set_xlabel(of[0]["point"]["axis"] if of else "")
            axis.set_xticks(sizes, map(str, sizes))
            axis.xaxis.set_minor_locator(NullLocator())
            plain(axis.yaxis, (1, 2, 5))
            axis.grid(color="#dddddd", linewidth=0.6)
    handles = {label: h for line in axes for a in line for h, label in zip(*a.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    caption = "Time as one size grows and the others stay; both axes are logarithmic."
    return [save(figure, stem.with_name(f"{stem.name}.svg"), caption, rows)]


def main(folder: Path, files: list[Path]) -> None:
    found = [records.load(file) for file in files] or records.every()
    print(build(found, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [*map(Path, sys.argv[2:])])
