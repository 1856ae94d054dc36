"""What a cut-off rule makes of a whole rollout; a sampler feeds it token by token."""

from collections.abc import Sequence

from megatron_prefix.prefix import SampledToken
from megatron_prefix.prefix.cutoff import CutOff


def cut_length(cut_off: CutOff, tokens: Sequence[SampledToken]) -> int:
    """Tokens that ``cut_off`` keeps: all of them where it never says stop."""
    return next((n for n, token in enumerate(tokens, start=1) if cut_off.feed(token)), len(tokens))
