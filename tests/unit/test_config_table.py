"""docs/configuration.md says what config/ says."""

from dataclasses import fields, is_dataclass

from megatron_prefix.config import Recipe
from tools.config_table import PAGE, ConfigSource, filled, tables

SOURCE = '''
@dataclass(frozen=True)
class Inner:
    a: int = 1  # at the end
    # above, over
    # two lines
    b: str = "x|y"

@dataclass(frozen=True)
class Outer:
    """About ``it``."""
    inner: Inner = field(default_factory=Inner)
    # not for c, a blank line is between

    c: float = 0.5

@dataclass(frozen=True)
class Recipe:
    one: Outer = field(default_factory=Outer)
    two: Outer = field(default_factory=Outer)
'''


def test_a_comment_goes_with_its_field() -> None:
    rows = {row.key: row for row in ConfigSource(SOURCE).rows("Outer")}
    assert list(rows) == ["inner.a", "inner.b", "c"]
    assert rows["inner.a"].comment == "at the end"
    assert rows["inner.b"].comment == "above, over two lines"
    assert (rows["c"].comment, rows["c"].kind, rows["c"].default) == ("", "float", "0.5")


def test_sections_of_one_class_share_a_table() -> None:
    text = tables(ConfigSource(SOURCE))
    assert text.count("###") == 1 and "### `one` and `two`" in text and "About `it`." in text
    assert '| `inner.b` | str | `"x|y"` | above, over two lines |' in text


def test_the_page_is_up_to_date() -> None:
    """``make format`` renews it."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page)


def test_the_page_names_every_setting() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [key for key in settings(Recipe()) if f"| `{key}` |" not in page] == []


def settings(section: object, above: str = "") -> list[str]:
    """Dotted keys under a section of the recipe, as the page names them."""
    keys = []
    for field in fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        name = "" if isinstance(section, Recipe) else f"{above}{field.name}"
        if field.name == "teachers":  # named by the user; in the table of its class
            continue
        if is_dataclass(value):
            keys += settings(value, f"{name}." if name else "")
        else:
            keys.append(name)
    return keys
