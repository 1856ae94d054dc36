"""Running servers that a recipe names."""

from pathlib import Path

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.client import Endpoint


def recipe_endpoints(rollout: RolloutConfig) -> list[Endpoint]:
    """The servers at ``rollout.server_urls``, with the key in ``rollout.api_key_file``."""
    key = Path(rollout.api_key_file).read_text().strip() if rollout.api_key_file else ""
    return [
        Endpoint(url, key, rollout.request_timeout_s, rollout.retries)
        for url in rollout.server_urls
    ]
