"""A run's checkpoints as its loop sees them: what is saved beside the student, and when."""

import logging
from typing import Any

from megatron_prefix.conductor import Conductor
from megatron_prefix.mcore.checkpoint import Checkpointer, Restored


class Saves:
    """One save is under way at a time, and each step is saved once. Its calls are collective."""

    def __init__(self, checkpointer: Checkpointer, conductor: Conductor | None) -> None:
        self._checkpointer, self._conductor = checkpointer, conductor
        self._saved_step = -1

    def save(self, step: int, policy_version: int, *, wait: bool) -> None:
        """Save the state after ``step`` steps; with ``wait`` it is whole on return, or SaveFailed
        is raised."""
        # The one before ends first, and is told of by itself where it came to nothing.
        self.finalize(wait=wait or self._saved_step != step)
        if self._saved_step == step:  # by its interval, just now
            return
        state: dict[str, Any] = {"policy_version": policy_version}
        state["layout"] = self._checkpointer.layout_record()
        if self._conductor:
            state["conductor"] = self._conductor.state_dict()
        self._checkpointer.save(step, state, wait=wait)
        self._saved_step = step

    def finalize(self, *, wait: bool) -> None:
        """A save that came to nothing is told, and the next one is due as it was."""
        self._checkpointer.finalize(wait=wait)
        problem = self._checkpointer.take_problem()
        if problem:
            self._saved_step = -1
            if self._conductor:
                self._conductor.log.event("save", problem, level=logging.ERROR)

    def restore(self) -> Restored | None:
        """Load the newest checkpoint into student and conductor; None where there is none."""
        restored = self._checkpointer.restore()
        if restored is not None:
            self._saved_step = restored.step
            if self._conductor:
                self._conductor.resume(restored.step, restored.run_state["conductor"])
        return restored
