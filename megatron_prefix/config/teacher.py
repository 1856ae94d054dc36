"""The settings of a teacher behind servers (docs/teachers.md); the package holds all others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherServerConfig:
    """SGLang servers that hold a teacher whose placement is "server": they name its likeliest
    tokens at each prefix position. They run where rollout.device says."""

    # Tokens of each position, with their log-probabilities; all others count as one, the tail.
    top_k: int = 64
    urls: tuple[str, ...] = ()  # running servers of its hf_path; empty: start num_servers here
    api_key_file: str = ""  # holds the key of the servers at urls; mode 600, on every node
    # Of urls: compare every tensor's checksum with hf_path's before the first step.
    verify_weights: bool = False
    num_servers: int = 1  # that are started; on a cluster, on each teacher-server node
    tensor_parallel_size: int = 1  # GPUs of each
    first_gpu: int = 0  # Index of the first GPU that the servers use.
    max_total_tokens: int = 0  # of each one's cache; 0: SGLang decides (60000 on a CPU)
    args: tuple[str, ...] = ()  # more arguments for sglang.launch_server
    # How long the ranks wait, at the start and for a server that starts again.
    start_timeout_s: float = 300.0
    request_timeout_s: float = 120.0  # of a few sequences' scores; then the server is given up
    restarts: int = 5  # of one server, each within ten minutes of the last
    retries: int = 4  # of a request, with exponential backoff
