"""Which ranks reduce the amax of delayed FP8 scaling together, by Megatron's own groups."""

from megatron.core import parallel_state

from megatron_prefix.config import Fp8Config
from megatron_prefix.layout import Layout
from megatron_prefix.mcore.fp8 import fp8_fields, keeps_own_scales
from megatron_prefix.mcore.groups import initialize_megatron
from tests.distributed.ranks import run_ranks

DELAYED = Fp8Config("hybrid", "delayed", first_last_layers_bf16=False)


def _amax_ranks() -> dict[str, tuple[bool, int]]:
    """Of each layout: does a rank keep its own scales, and among how many is amax reduced?"""
    initialize_megatron(1)
    layouts = {"dp": Layout(1, 2, 1), "pp": Layout(1, 1, 2), "beside": Layout(1, 1, 1)}
    found = {}
    for name, layout in layouts.items():
        own = keeps_own_scales(layout)
        only = fp8_fields(DELAYED, own_scales=own)["tp_only_amax_red"]
        # What Megatron's get_fp8_context does with the field.
        group = parallel_state.get_amax_reduction_group(
            with_context_parallel=True, tp_only_amax_red=only
        )
        found[name] = own, group.size()
    return found


def test_delayed_scales_are_shared_by_ranks_of_the_same_layers_alone() -> None:
    for found in run_ranks(2, _amax_ranks):
        assert found == {"dp": (False, 2), "pp": (True, 1), "beside": (True, 1)}
