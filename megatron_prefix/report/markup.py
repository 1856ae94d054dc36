"""HTML put together so that nothing is markup by accident: a plain ``str`` is always escaped.

Rollouts hold whatever a model may write, run names whatever a person may type.
"""

import html
from collections.abc import Iterable

_VOID = ("br", "col", "hr", "img", "meta")
_KEPT = "\n\t"
# Directions that would turn around what follows, and invisible joins: shown by their number.
_HIDDEN = (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF)


class Html(str):
    """Text that is markup already."""


def element(name: str, /, *children: object, **attributes: str) -> Html:
    """``<name attributes>children</name>``; children are escaped unless they are :class:`Html`.

    ``class_`` and ``for_`` lose their underscore, others turn it into a hyphen; an attribute that
    is empty is left out.
    """
    words = [name]
    for key, value in attributes.items():
        if value:
            words.append(f'{key.strip("_").replace("_", "-")}="{html.escape(visible(value))}"')
    if name in _VOID:
        return Html(f"<{' '.join(words)}>")
    return Html(f"<{' '.join(words)}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(part if isinstance(part, Html) else text(part) for part in parts))


def text(value: object) -> Html:
    """``value`` as text of a page, whatever it holds."""
    return Html(html.escape(visible(str(value))))


def visible(value: str) -> str:
    """Control characters and half surrogates as signs that can be seen and written as UTF-8."""
    return "".join(map(_sign, value)) if not value.isprintable() else value


def _sign(character: str) -> str:
    code = ord(character)
    if character in _KEPT:
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of control characters
    if 0xD800 <= code < 0xE000:
        return "\ufffd"
    if 0x7F <= code < 0xA0 or code in _HIDDEN:
        return f"\u27e8U+{code:04X}\u27e9"
    return character


def shorten(value: str, limit: int) -> str:
    """At most ``limit`` characters of ``value``, with how many were left out."""
    left = len(value) - limit
    return value if left <= 0 else f"{value[:limit]}\u2026 ({left:,} characters more)"


def table(headings: Iterable[object], rows: Iterable[Iterable[object]], numbers: str = "") -> Html:
    """A table that scrolls by itself where it is too wide. ``numbers``: a letter a column, r to
    set it to the right, l to the left; shorter than the table, its last letter goes on."""

    def cells(kind: str, values: Iterable[object]) -> Html:
        return join(
            element(kind, value, class_="r" if _at(numbers, i) == "r" else "")
            for i, value in enumerate(values)
        )

    head = element("thead", element("tr", cells("th", headings)))
    body = element("tbody", join(element("tr", cells("td", row)) for row in rows))
    return element("div", element("table", head, body), class_="scroll", tabindex="0")


def _at(letters: str, index: int) -> str:
    return letters[min(index, len(letters) - 1)] if letters else "l"
