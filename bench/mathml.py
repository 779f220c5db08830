"""Equations of docs, blocks of ```math as GitHub shows them, to MathML (a hook of MkDocs): no script, no network."""

import re

from math_core import LatexToMathML

BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONVERTER = LatexToMathML()


def typeset(block: re.Match) -> str:
    equations = CONVERTER.convert_with_local_state(block[1], displaystyle=True)
    return f'<div style="overflow-x: auto">{equations}</div>'


def on_page_markdown(markdown: str, **_) -> str:
    return BLOCK.sub(typeset, markdown)
