"""What servers sampled for a step and nobody trains on: for the ledger."""

from collections.abc import Iterable, Mapping, Sequence

from megatron_prefix.types import Rollout

Lengths = tuple[int, int]  # of one rollout: prompt tokens, sampled tokens


def sampled_lengths(rollouts: Iterable[Rollout]) -> list[Lengths]:
    """Of those that a server wrote, what came past a cut included."""
    return [(len(r.prompt_ids), len(r.prefix_ids) + r.discarded) for r in rollouts if not r.written]


def unreadable(rollouts: Sequence[Rollout], vocabularies: Mapping[str, int]) -> list[Rollout]:
    """Those with a token that their teacher does not have, by the ids of each domain's: a student
    whose vocabulary is padded further may sample its padding. No teacher can be fed that, nor say
    how likely it was."""
    return [
        rollout
        for rollout in rollouts
        if rollout.domain in vocabularies
        and max(rollout.prefix_ids, default=0) >= vocabularies[rollout.domain]
    ]


class Discarded:
    """Stragglers of ``over_sample``, rollouts beyond the wanted ones, those that the teacher cannot
    read, and those of a step that held nothing to train on. Whoever throws them away adds; the
    conductor takes."""

    def __init__(self) -> None:
        self._lengths: list[Lengths] = []

    def add(self, lengths: Iterable[Lengths]) -> None:
        """Requests that were aborted in the server's queue have no token and cost nothing."""
        self._lengths += [pair for pair in lengths if pair[1] > 0]

    def seen(self) -> tuple[Lengths, ...]:
        """What ``take`` would return now."""
        return tuple(self._lengths)

    def take(self) -> tuple[Lengths, ...]:
        """Those since the last call."""
        taken, self._lengths = self.seen(), []
        return taken
