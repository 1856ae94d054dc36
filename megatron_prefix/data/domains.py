"""Which of several teachers a row of the data set wants."""

from dataclasses import dataclass, replace

from megatron_prefix.config import Recipe
from megatron_prefix.data.data_source import Row, require_columns
from megatron_prefix.data.prompts import RowReader
from megatron_prefix.types import Prompt

DEFAULT = "teacher"  # names the recipe's section of that name


@dataclass(frozen=True)
class DomainReader:
    """Reads a row's domain: one of ``domains``, or the default teacher's name."""

    column: str
    domains: tuple[str, ...]
    path: str

    def __call__(self, number: int, row: Row, prompt: Prompt) -> Prompt:
        """The prompt with its domain; ValueError as :meth:`check`."""
        self.check(number, row)
        name = row[self.column]
        return replace(prompt, domain="" if name == DEFAULT else name)

    def check(self, number: int, row: Row) -> None:
        """ValueError for a name that no teacher of the recipe has."""
        require_columns(row, {"domain_column": self.column}, "data", self.path)
        name = row[self.column]
        if name != DEFAULT and name not in self.domains:
            raise ValueError(
                f"data.domain_column={self.column}: row {number} of {self.path} wants the teacher "
                f"{name!r}; there are {', '.join((DEFAULT, *self.domains))}; add teachers.{name} "
                "or change the row"
            )


def domain_readers(recipe: Recipe) -> tuple[RowReader, ...]:
    """What a prompt stream needs to tell the recipe's teachers apart; nothing for one teacher."""
    if not recipe.teachers:
        return ()
    data = recipe.data
    return (DomainReader(data.domain_column, tuple(sorted(recipe.teachers)), data.path),)
