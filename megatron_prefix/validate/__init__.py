"""Whatever can be refused is refused here, in one line, before any server or rank starts.

No GPU is needed, no weight is read and nothing is fetched: ``plan`` stands on it alone.
``preflight.py`` asks what only the machine that trains can answer.
"""

from megatron_prefix.validate.model import ValidModel, check_model, read_model
from megatron_prefix.validate.run import ValidRun, validate

__all__ = ["ValidModel", "ValidRun", "check_model", "read_model", "validate"]
