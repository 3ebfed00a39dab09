"""One static page: it opens from disk, needs no network, and shows its content without scripts, which sort and filter.

Everything that comes from data is escaped by whoever makes the body, and a content security policy forbids the page to
load anything.
"""

import html
import os
import pathlib
from collections.abc import Sequence

Section = tuple[str, str, str]  # anchor, name, body as HTML


def write_page(path: pathlib.Path, title: str, header: str, sections: Sequence[Section]) -> None:
    """Writes the page, whole or not at all; sections without a body are left out."""
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name, _ in sections)
    body = (
        header
        + (f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if links else "")
        + "<main>"
        + "".join(f'<section id="{anchor}"><h2>{name}</h2>{content}</section>' for anchor, name, content in sections)
        + "</main><footer>Written by r3jax. This page is one file and loads nothing.</footer>"
    )
    page = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    head, rest = page.split("@@title@@")
    before, after = rest.split("@@body@@")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # "replace": a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
        text = head + html.escape(title) + before + body + after
        draft.write_text(text, encoding="utf-8", errors="replace")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def head(eyebrow: str, title: str, facts: Sequence[str], tiles: Sequence[tuple[str, str, str]], below: str = "") -> str:
    """The page's head: a line of facts, and tiles, (name, value, the line below it); `below` is HTML already."""
    line = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    shown = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(small)}</small></dd></div>"
        for name, value, small in tiles
    )
    return (
        f'<header><p class="eyebrow">{html.escape(eyebrow)}</p>'
        f"<h1>{html.escape(title)}</h1>"
        + (f'<p class="facts">{line}</p>' if line else "")
        + (f'<dl class="tiles">{shown}</dl>' if shown else "")
        + below
        + "</header>"
    )
