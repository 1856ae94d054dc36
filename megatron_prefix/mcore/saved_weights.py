"""Weights of a model out of Megatron's distributed checkpoints: a run's or a converted one."""

from megatron.core import dist_checkpointing

from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.steps import check_saved_weights

# Of linear layers: FP8 scales of a run, nothing otherwise. Grouped experts number theirs.
EXTRA_STATE = "_extra_state"


def load_saved_weights(model: MegatronModel, folder: str) -> None:
    """Fill ``model``, in any layout, with the weights alone. Collective; ValueError as
    of ``check_saved_weights``."""
    step = check_saved_weights(model.hf, folder)
    sharded = model.module.sharded_state_dict(metadata={"dp_cp_group": model.groups.pg.dp_cp})
    wanted = {key: tensor for key, tensor in sharded.items() if EXTRA_STATE not in key}
    state = dist_checkpointing.load(
        {"model": wanted},
        str(step),
        validate_access_integrity=False,  # asks the whole world, and a teacher may have ranks there
    )
    left = model.module.load_state_dict(state["model"], strict=False)
    assert not left.unexpected_keys, left
    assert all(EXTRA_STATE in key for key in left.missing_keys), left
