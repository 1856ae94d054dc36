"""For all tests.

Ranks are forked from this process, and a fork hangs that uses OpenMP's threads after its parent has
used them. Processes that tests start anew keep what a user would have. Hypothesis judges what a
test says and not how long it took, which on a busy machine says nothing.
"""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-families",
        action="store_true",
        help="one server after another for every model family, not for those alone that stand for "
        "the others",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-families"):
        skipped = pytest.mark.skip(reason="another family stands for it; --all-families runs it")
        for item in items:
            if item.get_closest_marker("on_request"):
                item.add_marker(skipped)
