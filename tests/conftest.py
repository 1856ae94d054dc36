"""For all tests: ranks are forked from this process, and a fork hangs that uses OpenMP's threads
after its parent has used them. Processes that tests start anew keep what a user would have."""

import torch

torch.set_num_threads(1)
