"""For all tests: ranks are forked from this process, and a fork that uses OpenMP's threads after its
parent has used them hangs. Processes that tests start anew keep what a user would have."""

import torch

torch.set_num_threads(1)
