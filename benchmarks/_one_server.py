"""A server that several runs of the prefix benchmark use one after another."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_prefix.config import Recipe
from megatron_prefix.rollout.server import Server, server_pool


@contextlib.contextmanager
def one_server(recipe: Recipe, logs: Path) -> Iterator[list[str]]:
    """A server that several runs use one after another: each publishes its weights first."""
    with (
        tempfile.TemporaryDirectory(prefix="prefix-policies-") as scratch,
        server_pool(
            recipe.student.hf_path,
            recipe.rollout,
            params_dtype=recipe.student.params_dtype,
            log_folder=logs,
        ) as servers,
    ):
        yield server_settings(servers, Path(scratch, "key"))


def server_settings(servers: Sequence[Server], key_file: Path) -> list[str]:
    key_file.touch(mode=0o600)
    key_file.write_text(servers[0].endpoint.api_key)
    urls = ",".join(server.url for server in servers)
    return [f"rollout.server_urls=[{urls}]", f"rollout.api_key_file={key_file}"]
