"""What a user is told who asked for what cannot be."""

from collections.abc import Callable

import pytest


def refusal_of(act: Callable[..., object], *arguments: object) -> str:
    """The one line of the ValueError that ``act(*arguments)`` raises."""
    with pytest.raises(ValueError) as refused:
        act(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message
