"""For all tests.

Ranks are forked from this process, and a fork hangs that uses OpenMP's threads after its parent has
used them. Processes that tests start anew keep what a user would have. Hypothesis judges what a
test says and not how long it took, which on a busy machine says nothing.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")
