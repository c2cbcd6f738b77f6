"""What the documentation's build does to docstrings: examples that stand in the text are code, not quotations.

Markdown reads a line that begins with `>>>` as a quotation in a quotation in a quotation. mkdocs.yml names this file as
an extension of griffe, which reads the docstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# A paragraph that begins with a prompt at the margin; those under "Examples:" are indented, and griffe's own.
PARAGRAPH = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)


def fenced(text: str) -> str:
    """Paragraphs of examples as blocks of code.

    >>> fenced("Twice.\\n\\n>>> f(1)\\n2\\n\\nOr so.")
    'Twice.\\n\\n```pycon\\n>>> f(1)\\n2\\n```\\n\\nOr so.'
    """
    return PARAGRAPH.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


class Fences(griffe.Extension):
    """Every object's docstring, once it is known."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
