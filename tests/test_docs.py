"""What README and docs say is run: python blocks, page by page in one namespace, and the tables of records."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> dict[str, list[str]]:
    found = {page: [code for of, code in BLOCK.findall(page.read_text()) if of == language] for page in PAGES}
    return {str(page.relative_to(ROOT)): codes for page, codes in found.items() if codes}


@pytest.mark.parametrize("page", blocks("python"))
def test_python(page, capsys):
    names = {"__name__": page}
    for code in blocks("python")[page]:
        if "transformers" in code:  # not on Python 3.10
            transformers = pytest.importorskip("transformers")
        exec(compile(code, page, "exec"), names)
    if page == "README.md":
        assert names["y"].shape == (64, 6, 13, 13)
        assert all(p.grad is not None for p in names["model"].parameters())
        assert "conv_relu_pool" in capsys.readouterr().out
        assert "fastarch" in transformers.AttentionInterface().valid_keys()


@pytest.mark.parametrize("page", blocks("sh"))
def test_shell_commands_exist(page):
    from typer.main import get_command

    from fastarch.cli import main

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {"make": targets, "fastarch": get_command(main).commands}
    for line in "".join(blocks("sh")[page]).splitlines():
        program, command, *_ = line.split()
        assert command in known[program], line


@pytest.mark.parametrize("page", sorted((ROOT / "docs/kernels").glob("*.md")), ids=lambda page: page.stem)
def test_kernels_have_pictures(page):
    """They stand beside the page, are XML, and take nothing from elsewhere."""
    pictures = re.findall(r"^!\[.+\]\((.+\.svg)\)$", page.read_text(), re.MULTILINE)
    assert pictures
    for name in pictures:
        picture = ElementTree.parse(page.parent / name)
        assert picture.getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert not any("href" in attribute for element in picture.iter() for attribute in element.attrib)


def test_readme_shows_the_records():
    assert tables.summary() in (ROOT / "README.md").read_text()
