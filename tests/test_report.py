"""`fastarch bench --report`: the page has every plot, and needs nothing else."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import records
import report
from matplotlib.image import imread

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMING = {
    "seconds": 2e-3,
    "best": 1e-3,
    "ratio": 1.0,
    "ratio_low": 1.0,
    "ratio_high": 1.0,
    "nanoseconds": [2000000] * 3,
}


class Page(HTMLParser):
    """The addresses and the text of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.images += [value for name, value in attributes if tag == "img" and name == "src"]

    def handle_data(self, data):
        self.text += data


def record(results: list[dict]) -> dict:
    floors = {"flops": 1e12, "bandwidth": 1e11, "fresh_bandwidth": 1e10, "huge_bandwidth": 5e10}
    run = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "dirty": True}
    machine = {"device": "A <Processor>", "isa": "avx2", "threads": 4, "flags": ["avx2", "fma"], "torch": "2.13.0"}
    return {"machine": machine, "floors": floors, "run": run, "results": results}


def result(case: str, mode: str, **more) -> dict:
    timings = {"fastarch": TIMING, "eager": TIMING | {"seconds": 4e-3, "ratio": 2.0, "ratio_high": 2.5}}
    sizes = {"flops": 1e9, "moved": 1e7, "floor_seconds": 1e-3, "fresh_floor_seconds": 1e-3}
    of = {"operation": "gru", "case": case, "mode": mode, "dtype": "float32"}
    return of | sizes | {"timings": timings, "left_out": {}} | more


def test_every_kept_record_is_shown(tmp_path):
    found = records.every()
    page = Page(report.build(found, tmp_path))
    expected = {f"{records.slug(r['machine'])}-roofline.svg" for r in found}
    for part in found:
        stem = f"{records.slug(part['machine'])}-{part['results'][0]['operation']}"
        expected |= {f"{stem}-{mode}.svg" for mode in records.by_mode(part["results"])}
        expected |= {f"{stem}-memory.svg"} if any("saved_bytes" in r for r in part["results"]) else set()
        for r in part["results"]:
            assert r["case"] in page.text
    assert expected <= set(page.images)
    assert {p.name for p in tmp_path.glob("*.svg")} == set(page.images)
    if browser := next(filter(shutil.which, BROWSERS), None):
        assert_shows(browser, tmp_path)


def assert_shows(browser: str, folder: Path) -> None:
    """The browser draws the plots, whose colours the page has nowhere else."""
    picture = folder / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu"]
    options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,3000", f"--screenshot={picture}"]
    subprocess.run([browser, *options, (folder / "index.html").as_uri()], check=True, capture_output=True, timeout=120)
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    for color in (report.COLORS["eager"], report.COLORS["channels_last"]):
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        assert (pixels == (red, green, blue)).all(-1).sum() > 1000, color


@pytest.fixture
def small(tmp_path) -> Path:
    """A page of one device that has everything but whole networks."""
    grown = [
        result(
            f"GRU, units {n}",
            mode,
            operation="scaling",
            point={"series": "GRU, units", "axis": "hidden size", "size": n},
        )
        for n in (64, 128)
        for mode in ("inference", "training")
    ]
    kept = {"saved_bytes": 10, "eager_saved_bytes": 40, "left_out": {"openvino": "RuntimeError: no <such> operator"}}
    return report.build([record([result("char", "training", **kept), *grown])], tmp_path)


def test_what_was_measured_and_what_was_not(small):
    page = Page(small)
    assert sorted(page.images) == [
        f"a_processor_avx2_4_threads-{name}.svg" for name in ("gru-memory", "gru-training", "roofline", "scaling")
    ]
    assert page.text.count("Not measured on this device.") == len(report.TITLES) - 2
    assert "A <Processor>, avx2, 4 threads" in page.text
    assert "Without openvino: char training. RuntimeError: no <such> operator" in page.text
    assert "2026-01-02T03:04:05+00:00, commit 0123456789ab changed" in page.text
    assert "flags avx2 fma" in page.text


def test_nothing_is_fetched_and_nothing_runs(small):
    page = Page(small)
    assert page.addresses
    for address in page.addresses:
        target = re.fullmatch(r"#([\w-]+)", address)
        assert f'id="{target[1]}"' in small.read_text() if target else (small.parent / address).is_file(), address
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    for file in small.parent.iterdir():
        text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", file.read_text())
        assert not re.search(r"https?:|@import|<!DOCTYPE svg|<script|url\((?!#)", text), file


def test_the_same_records_are_the_same_page(tmp_path):
    again = report.build([record([result("char", "training")])], tmp_path / "again").parent
    once_more = report.build([record([result("char", "training")])], tmp_path / "more").parent
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in once_more.iterdir()}
