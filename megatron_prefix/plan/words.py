"""How a plan's tables and sentences say numbers."""

from collections.abc import Iterable

from rich.table import Table


def table_of(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def scaled(value: float) -> str:
    """Three digits and a decimal prefix: 1.23 G."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:,.0f}"


def unit_of(largest: int) -> tuple[str, int]:
    """The binary unit in which ``largest`` bytes have one to four digits."""
    for power, name in ((3, "GiB"), (2, "MiB")):
        if largest >= 1024**power:
            return name, 1024**power
    return "KiB", 1024


def sized(size: int) -> str:
    unit, one = unit_of(size)
    return f"{size / one:.2f} {unit}"
