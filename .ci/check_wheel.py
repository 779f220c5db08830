"""Of a wheel: one top-level package, Triton's kernels and tables in it, wide vectors in no function but the kernels."""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

wheel = zipfile.ZipFile(sys.argv[1])
names = wheel.namelist()
top = {name.split("/")[0] for name in names if ".dist-info" not in name}
assert top == {"fastarch"}, f"top-level names of the wheel: {top}"
packages = {path.as_posix() for kind in ("__init__.py", "*.json") for path in Path("fastarch").rglob(kind)}
tuned = {f"fastarch/{path.as_posix()}" for path in Path("kernels/tuned").iterdir()}
missing = {"fastarch/kernels/__init__.py", *packages, *tuned} - {*names}
assert not missing, f"missing: {sorted(missing)}"
(extension,) = [name for name in names if re.fullmatch(r"fastarch/_C\..*so", name)]

with tempfile.TemporaryDirectory() as folder:
    listing = subprocess.check_output(
        ["objdump", "--disassemble", "--demangle", wheel.extract(extension, folder)], text=True
    )
function, wide = "", set()
for line in listing.splitlines():
    if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
        function = match[1]
    elif re.search(r"%[yz]mm\d", line):
        wide.add(function)
# anonymous namespaces of the kernel sources: nothing that another translation unit could be linked to
outside = {
    name for name in wide if not name.startswith("(anonymous namespace)::") and "(anonymous namespace)::" not in name
}
assert not outside, f"ymm or zmm registers outside of the kernels: {sorted(outside)[:10]}"
assert wide, "no ymm or zmm register at all: were the kernels built?"
print(f"{Path(sys.argv[1]).name}: one package, wide vectors in {len(wide)} kernel functions only")
