"""The optimizer's state in a form that does not know the layout.

Megatron keeps the experts' parameters in an optimizer of their own where expert parallelism, or an
expert tensor parallelism unlike the rest's, tells them apart, and in the one optimizer elsewhere.
Tensors are saved under parameters' names either way. What lies beside them (groups, learning rates)
is the configuration's and stays this run's own; the number of steps alone is taken over.
"""

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedBase

State = dict[Any, Any]


def split_state(state: State) -> tuple[State, State]:
    """(what goes into a checkpoint, what stays here) of an optimizer's sharded_state_dict."""
    sharded, own = extract_matching_values(state, lambda value: isinstance(value, ShardedBase))
    return sharded, own


def optimizer_step(own: State) -> int:
    """Updates made so far, for Adam's bias correction; 0 before the first."""
    return max((int(group.get("step", 0)) for group in _groups(own)), default=0)


def join_state(loaded: State, own: State, step: int) -> State:
    """What the optimizer's load_state_dict takes: loaded tensors, this run's groups."""
    for group in _groups(own):
        group["step"] = step
    return merge(own, loaded)


def _groups(state: Any) -> list[State]:
    """Every param group, of one optimizer or of several chained."""
    if not isinstance(state, dict):
        return []
    found = [group for value in state.values() for group in _groups(value)]
    return [*state.get("param_groups", []), *found]
