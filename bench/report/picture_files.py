"""A matplotlib figure as a file's bytes, and as SVG that stands inside of a page.

Equal figures give equal bytes. An artist whose gid comes from ``tip`` says that text when a reader
points at it, in a file of SVG and in a page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Literal

import matplotlib
from matplotlib.figure import Figure

from bench.report.style import PAGE_COLOURS, RC

__all__ = ["inline_svg", "picture_bytes", "tip"]

Kind = Literal["png", "svg"]

_DPI = 150
_METADATA: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}
_TIP = "tip:"
_TIPPED = re.compile(f'<g id="{_TIP}([^"]*)">')
_IDS = re.compile(r' id="([^"]*)"')
_REFERENCES = re.compile(r'(?:url\(#|href="#)([^)"]+)')
_TAG = re.compile(r"<[^<>]*>")
_NAMESPACE = re.compile(r' xmlns(:\w+)?="[^"]*"')
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
_VARIABLES = {colour.lower(): f"var({name})" for colour, name in PAGE_COLOURS.items()}
_FONTS = "'DejaVu Sans', Verdana, sans-serif"  # Verdana is as wide as the font of the layout


def tip(text: str) -> str:
    """Return the gid of an artist that says ``text`` when it is pointed at."""
    return _TIP + text


def picture_bytes(draw: Callable[[], Figure], kind: Kind, dpi: int = _DPI) -> bytes:
    """Return the figure that ``draw`` makes as a file of ``kind``."""
    with matplotlib.rc_context(RC):
        return _saved(draw(), kind, dpi)


def inline_svg(draw: Callable[[], Figure], number: int, label: str) -> str:
    """Return the figure as an ``svg`` element for a page; it names no address anywhere.

    ``number`` is the figure's own on the page, for its ids; ``label`` is what a reader who cannot
    see it is told. The colours of page, text and grid are the page's variables.
    """
    rc = {**RC, "svg.fonttype": "none", "svg.hashsalt": f"membench-{number}"}
    with matplotlib.rc_context(rc):
        text = _saved(draw(), "svg", _DPI).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Only inside of tags: what a reader sees may look like any of these.
    text = _TAG.sub(lambda tag: _page_tag(tag[0]), text)
    text = _own_ids(text, f"f{number}-")
    text = re.sub(r"\n\s*", "\n", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _page_tag(tag: str) -> str:
    tag = _NAMESPACE.sub("", tag).replace("xlink:href", "href")
    tag = _COLOUR.sub(lambda found: _VARIABLES.get(found[0].lower(), found[0]), tag)
    return tag.replace("'DejaVu Sans'", _FONTS)


def _saved(figure: Figure, kind: Kind, dpi: int) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=dpi, metadata=_METADATA[kind])
    if kind == "png":
        return file.getvalue()
    text = file.getvalue().decode()
    return _TIPPED.sub(r"<g><title>\1</title>", text).encode()


def _own_ids(text: str, prefix: str) -> str:
    """Leave out the ids that nothing refers to, and begin the others with ``prefix``."""
    referred = set(_REFERENCES.findall(text))
    text = _IDS.sub(lambda m: f' id="{prefix}{m[1]}"' if m[1] in referred else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
