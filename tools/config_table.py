"""Writes the tables of docs/configuration.md out of the comments in config/."""

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix import config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- tables: make format writes them -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Row:
    key: str  # dotted, under its section
    kind: str
    default: str
    comment: str


class ConfigSource:
    """The settings' files as one text: its classes, and the comment that belongs to each line."""

    def __init__(self, source: str) -> None:
        nodes = ast.parse(source).body
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self._comments: Mapping[int, tuple[bool, str]] = {
            token.start[0]: (not token.line[: token.start[1]].strip(), token.string.lstrip("# "))
            for token in tokens
            if token.type == tokenize.COMMENT
        }

    def comment_of(self, field: ast.AnnAssign) -> str:
        """The comment at the field's end, or the lines of comment right above it."""
        alone, text = self._comments.get(field.lineno, (True, ""))
        if text and not alone:
            return text
        above: list[str] = []
        line = field.lineno - 1
        while line in self._comments and self._comments[line][0]:
            above.insert(0, self._comments[line][1])
            line -= 1
        return " ".join(above)

    def rows(self, name: str, prefix: str = "") -> Iterator[Row]:
        for field in self.classes[name].body:
            if not isinstance(field, ast.AnnAssign):
                continue
            kind, key = ast.unparse(field.annotation), prefix + ast.unparse(field.target)
            if kind in self.classes:
                yield from self.rows(kind, f"{key}.")
            else:
                yield Row(key, kind, default_of(field), self.comment_of(field))


def default_of(field: ast.AnnAssign) -> str:
    assert field.value is not None, "every setting has a default"
    if isinstance(field.value, ast.Call):  # field(default_factory=dict)
        return "{}"
    return ast.unparse(field.value).replace("'", '"')


def sections(source: ConfigSource) -> dict[str, list[str]]:
    """Section names of a recipe by the class that describes them, in order."""
    found: dict[str, list[str]] = {}
    for field in source.classes["Recipe"].body:
        if isinstance(field, ast.AnnAssign):
            kind, key = ast.unparse(field.annotation), ast.unparse(field.target)
            named = re.fullmatch(r"dict\[str, (\w+)\]", kind)
            found.setdefault(named[1] if named else kind, []).append(
                f"{key}.NAME" if named else key
            )
    return found


def tables(source: ConfigSource) -> str:
    parts = []
    for name, keys in sections(source).items():
        parts.append(f"### {' and '.join(f'`{key}`' for key in keys)}\n")
        about = ast.get_docstring(source.classes[name])
        if about:
            parts.append(about.replace("``", "`") + "\n")
        parts.append("| setting | type | default | |\n|---|---|---|---|")
        for row in source.rows(name):
            comment = row.comment.replace("|", "\\|")
            parts.append(f"| `{row.key}` | {row.kind} | `{row.default}` | {comment} |")
        parts.append("")
    return "\n".join(parts)


def filled(page: str) -> str:
    """``page`` with fresh tables between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    assert mark, f"{PAGE.name} has lost its marks"
    parts = (config.modes, config.prefix, config.teacher, config)
    fresh = tables(ConfigSource("".join(map(inspect.getsource, parts))))
    return f"{head}{BEGIN}\n\n{fresh}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if they differ")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    fresh = filled(page)
    if check:
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
