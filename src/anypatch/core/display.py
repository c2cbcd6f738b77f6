"""How small results look in a notebook: a caption and a table of two columns, escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def facts_table(caption: str, facts: Mapping[str, object]) -> str:
    """Facts as an HTML table, for ``_repr_html_``. Written by hand, as templates are for the report, above the core.

    Examples:
        >>> facts_table("A <b>", {"x": 1})
        '<table><caption>A &lt;b&gt;</caption><tbody><tr><th scope="row">x</th><td>1</td></tr></tbody></table>'
    """
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>' for name, value in facts.items()
    )
    return f"<table><caption>{escape(caption)}</caption><tbody>{lines}</tbody></table>"
