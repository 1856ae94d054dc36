"""The parity tool against a real server, in a process of its own: it adapts torch to Megatron."""

import subprocess
import sys
from pathlib import Path

from megatron_prefix.rollout.server import Server

TOOL = Path(__file__).parents[2] / "tools" / "check_parity.py"


def test_a_server_agrees_with_transformers(
    server: Server, model_folder: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(server.endpoint.api_key)
    command = [TOOL, "--hf-model", model_folder, "--server", server.endpoint.url]
    command += ["--api-key-file", key, "--tolerance=1e-4"]
    answer = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "not seen" in answer.stdout  # the row of the server, whose layers nobody sees
