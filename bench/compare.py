"""python bench/compare.py A.json B.json: is ours slower in B than in A? Two records, or two folders of records.

What is compared is our time relative to eager's of the same round: a machine that is slower as a whole cancels. The
change of a case is Hodges and Lehmann's estimate, the median over all pairs of a round of A and one of B; its interval
goes by ranks (Mann and Whitney), since nobody knows how rounds are distributed. Of many cases some would look slower by
chance: the confidence of each is such that with probability LEVEL none of them does. Few rounds then decide nothing.
Exit status: 1 if anything is slower, 2 if nothing could be compared.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import records
from records import OURS, REFERENCE
from rich.console import Console
from rich.table import Table

LEVEL = 0.95  # that no case is called slower or faster by chance
LEAST = 0.02  # a change that matters: two builds of the same source may differ by less


class Change(NamedTuple):
    """Of one of our variants in one case, B's relative time by A's: 1.1 is a tenth slower."""

    case: str
    provider: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1 and self.ratio > 1 + LEAST:
            return "slower"
        if self.high < 1 and self.ratio < 1 / (1 + LEAST):
            return "faster"
        return "noise"


def relative(result: dict, provider: str) -> list[float]:
    """Logarithms, round by round, of our time by eager's."""
    ours, reference = (result["timings"][name]["nanoseconds"] for name in (provider, REFERENCE))
    return [math.log(a / b) for a, b in zip(ours, reference, strict=True)]


def shift(a: list[float], b: list[float], level: float) -> tuple[float, float, float]:
    """How much larger b is than a: the estimate, and its interval at this level, infinite where rounds are too few."""
    pairs = sorted(y - x for x in a for y in b)
    deviation = math.sqrt(len(pairs) * (len(a) + len(b) + 1) / 12)  # of Mann and Whitney's count
    rank = math.floor(len(pairs) / 2 - statistics.NormalDist().inv_cdf((1 + level) / 2) * deviation)
    low, high = (pairs[rank - 1], pairs[-rank]) if rank > 0 else (-math.inf, math.inf)
    return statistics.median(pairs), low, high


def changes(a: dict, b: dict) -> tuple[list[Change], list[str]]:
    """Of what both records hold, and why the rest is not compared."""
    of_a, of_b = ({records.key(r): r for r in record["results"]} for record in (a, b))
    without = [f"{' '.join(key)}: only in {'AB'[key in of_b]}" for key in sorted(of_a.keys() ^ of_b.keys())]
    shared = []
    for key in of_a:
        if key not in of_b:
            continue
        for provider in (name for name in of_a[key]["timings"] if name.startswith(OURS)):
            timings = [of[key]["timings"].get(name) for of in (of_a, of_b) for name in (provider, REFERENCE)]
            if all(t and t.get("nanoseconds") for t in timings):
                shared.append((key, provider))
            else:
                without.append(f"{' '.join(key)}: a record lacks the rounds of {provider} or {REFERENCE}")
    found = []
    for key, provider in shared:
        level = 1 - (1 - LEVEL) / len(shared)
        numbers = map(math.exp, shift(relative(of_a[key], provider), relative(of_b[key], provider), level))
        found.append(Change(" ".join(key), provider, *numbers))
    return found, without


def main(a: Path, b: Path) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160)
    before, after = records.load(a), records.load(b)
    if records.slug(before["machine"]) != records.slug(after["machine"]):
        console.print(f"Not the same machine: {before['machine']['device']} and {after['machine']['device']}.")
    found, without = changes(before, after)
    view = Table("case", "ours", "B / A, relative to eager", "interval", "verdict", title=f"A {a}, B {b}")
    for change in sorted(found, key=lambda c: -c.ratio):
        color = {"slower": "red", "faster": "green", "noise": "default"}[change.verdict]
        interval = f"{change.low:.3f} to {change.high:.3f}"
        view.add_row(change.case, change.provider, f"{change.ratio:.3f}", interval, f"[{color}]{change.verdict}")
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("slower", "faster", "noise")}
    view.caption = f"{', '.join(f'{n} {verdict}' for verdict, n in counts.items())}; {LEVEL:.0%} sure of all together"
    console.print(view)
    for line in without:
        console.print(line, markup=False)
    if not found:
        console.print("Nothing could be compared.")
        return 2
    return int(counts["slower"] > 0)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
