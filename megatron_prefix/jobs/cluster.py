"""Where a run goes, and the scripts of its steps: pure text, quoted here. ``launch.py`` submits it.

``slurm/multi_node.sbatch`` does the same by hand; docs/slurm.md has the life of such a job.
"""

import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prefix.config import Recipe, RolloutConfig
from megatron_prefix.modes import check_own_servers, needs_servers, section_of, started_teachers
from megatron_prefix.secret_keys import key_prefix, names_a_secret, referenced

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CHECK_S = 300  # given to a node to say that it can run the job
# Runs in the batch script, on the first node, where the ranks will meet: at a port that follows the
# job's number, since jobs may share a node, and that nobody there has. The lines that nemo-run adds
# below it end the job with the exit code of the first step that ends, so servers must outlast the
# trainer: they wait for the folder to go.
_SETUP = """\
export run_head="$SLURMD_NODENAME"
export run_attempt="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export run_port=$((20000 + SLURM_JOB_ID % 12000))
while grep -qis ": [0-9A-F]*:$(printf %04X $run_port) " /proc/net/tcp /proc/net/tcp6; do
  ((run_port++))
done
@CPUS@
unset SLURM_UNBUFFEREDIO  # it gives each task a terminal, and so the logs a progress bar
endpoints=@ENDPOINTS@
rm -rf -- "$endpoints"
mkdir -p -- "$endpoints/$run_attempt"
finish() {
  code=$?
  rm -rf -- "$endpoints"
  if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID" || echo "saved, and not requeued"; fi
  exit "$code"
}
trap finish EXIT"""

_REFUSED = f'"node $SLURMD_NODENAME cannot run this: see above, or no answer in {_CHECK_S} s"'
_CPUS = 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_ON_NODE"'
_HET_CPUS = "run_cpus_@=${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_@%%(*}"


@dataclass(frozen=True)
class Cluster:
    """Words are sbatch's; an empty one or 0 leaves the cluster's own default."""

    executor: str = "local"  # local | slurm
    nodes: int = 1  # of the job, those that serve included
    # Behind those that train; 0: the one node does both, or servers run elsewhere.
    server_nodes: int = 0
    # The last ones, for the servers of teachers with placement=server.
    teacher_server_nodes: int = 0
    # Of those that train, for a teacher on nodes of its own: whole ones, which the ranks' meeting
    # chooses.
    teacher_nodes: int = 0
    heterogeneous: bool = False  # those that serve as groups of their own
    gpus_per_node: int = 0
    server_gpus_per_node: int = 0  # of these groups; 0: as gpus_per_node
    ranks_per_node: int = 0  # 0: gpus_per_node, or 1 without GPUs
    max_restarts: int = 0  # of all ranks in place, after one of them failed
    partition: str = ""
    account: str = ""
    time: str = "04:00:00"
    signal_before_s: int = 300  # before the limit; the ranks save then
    singleton: bool = False  # wait for the jobs of the same name: a chain
    container: str = ""  # an image for pyxis
    mounts: tuple[str, ...] = ()  # SRC:DST, into the container
    env: tuple[tuple[str, str], ...] = ()  # of the steps
    modules: tuple[str, ...] = ()
    python: str = ""  # empty: this one, or a container's `python`

    @property
    def trainer_nodes(self) -> int:
        return self.nodes - self.serving_nodes

    @property
    def serving_nodes(self) -> int:
        return self.server_nodes + self.teacher_server_nodes

    @property
    def trains_alone(self) -> bool:
        """One node with servers of its own, as ``megatron-prefix train`` runs it."""
        return self.nodes == 1

    def servers(self, rollout: RolloutConfig) -> int:
        """That sample, over all nodes."""
        return len(rollout.server_urls) or max(self.server_nodes, 1) * rollout.num_servers

    @property
    def world_size(self) -> int:
        """Ranks over all nodes; 0 where the recipe decides."""
        ranks = self.ranks_per_node or self.gpus_per_node
        return ranks if self.trains_alone else self.trainer_nodes * (ranks or 1)


def on_cluster(recipe: Recipe, cluster: Cluster) -> Recipe:
    """``recipe`` with the ranks that ``cluster`` has for it, and its teacher on its own nodes."""
    if not cluster.world_size:
        return recipe
    recipe = replace(recipe, run=replace(recipe.run, world_size=cluster.world_size))
    if not cluster.teacher_nodes:
        return recipe
    ranks = cluster.teacher_nodes * (cluster.world_size // cluster.trainer_nodes)
    return replace(recipe, teacher=replace(recipe.teacher, placement="separate", world_size=ranks))


def check_cluster(cluster: Cluster, recipe: Recipe) -> None:
    """ValueError for what cannot be launched, with the value and the remedy."""
    if cluster.executor not in ("local", "slurm"):
        raise ValueError(f"--executor {cluster.executor} must be local or slurm")
    if cluster.executor == "local" and cluster.nodes > 1:
        raise ValueError(f"--nodes {cluster.nodes} needs --executor slurm: this machine is one")
    least = min(cluster.server_nodes, cluster.teacher_server_nodes)
    if least < 0 or cluster.trainer_nodes < 1:
        both = f" and --teacher-server-nodes {cluster.teacher_server_nodes}"
        raise ValueError(
            f"--server-nodes {cluster.server_nodes}{both if cluster.teacher_server_nodes else ''} "
            f"of --nodes {cluster.nodes} must leave one to train on"
        )
    if not 0 <= cluster.teacher_nodes < max(cluster.trainer_nodes, 1):
        raise ValueError(
            f"--teacher-nodes {cluster.teacher_nodes} of the {cluster.trainer_nodes} that train "
            "must leave one to the student"
        )
    elsewhere = recipe.rollout.server_urls or not needs_servers(recipe)
    if cluster.nodes > 1 and not cluster.server_nodes and not elsewhere:
        raise ValueError(
            f"--nodes {cluster.nodes} has no node that serves: give --server-nodes 1, or name "
            "running servers in rollout.server_urls"
        )
    _check_teacher_servers(cluster, recipe)
    if cluster.server_nodes and elsewhere:
        raise ValueError(
            f"--server-nodes {cluster.server_nodes} is not needed: rollout.server_urls, "
            "rollout.replay or mode says where rollouts come from; give 0"
        )
    check_own_servers(recipe, cluster.servers(recipe.rollout))
    if cluster.heterogeneous and not cluster.serving_nodes:
        raise ValueError("--heterogeneous needs a group that serves: give --server-nodes 1")
    if cluster.server_gpus_per_node and not cluster.heterogeneous:
        raise ValueError(
            f"--server-gpus-per-node {cluster.server_gpus_per_node} needs --heterogeneous: the "
            "nodes of one group are alike"
        )
    _check_words(cluster)


def _check_teacher_servers(cluster: Cluster, recipe: Recipe) -> None:
    starting = [section_of(domain) for domain in started_teachers(recipe)]
    if starting and cluster.nodes > 1 and not cluster.teacher_server_nodes:
        raise ValueError(
            f"{starting[0]}.server.urls is empty, and no node of --nodes {cluster.nodes} serves "
            "teachers: give --teacher-server-nodes 1, or name running servers"
        )
    if cluster.teacher_server_nodes and not starting:
        raise ValueError(
            f"--teacher-server-nodes {cluster.teacher_server_nodes} is not needed: no teacher has "
            "placement=server and an empty server.urls; give 0"
        )


def _check_words(cluster: Cluster) -> None:
    """A line break would end an #SBATCH line, whatever quotes are around it."""
    words = (cluster.partition, cluster.account, cluster.time, cluster.container)
    for word in (*words, *cluster.mounts, *cluster.modules):
        if _CONTROL.search(word):
            raise ValueError(f"{word!r} has a control character; leave it out")
    for mount in cluster.mounts:
        if "," in mount:
            raise ValueError(
                f"--mount {mount}: pyxis takes a comma for the next mount's beginning; give one "
                "--mount for each, of folders without commas"
            )
    for name, value in cluster.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"--env {name!r} is no variable's name; give NAME=value")
        secret = names_a_secret(name) and value and not referenced(value)
        if secret or key_prefix(value):
            raise ValueError(
                f"--env {name}=... would write a secret into the steps' scripts; export {name} and "
                f"give --env {name}, or --env {name}='${{oc.env:OTHER}}'"
            )


def quote(word: object) -> str:
    """For a shell, and past nemo-run, which replaces ``/nemo_run`` wherever it stands."""
    return shlex.quote(str(word)).replace("/nemo_run", "/nemo''_run")


def setup_lines(record: Path, cluster: Cluster) -> str:
    text = _SETUP.replace("@ENDPOINTS@", quote(record.parent / "endpoints"))
    groups = 1 + bool(cluster.server_nodes) + bool(cluster.teacher_server_nodes)
    het = "\n".join(_HET_CPUS.replace("@", str(group)) for group in range(groups))
    return text.replace("@CPUS@", het if cluster.heterogeneous else _CPUS)


def step_cpus(group: int) -> str:
    """srun's option for a step of a heterogeneous job, in which nodes of two kinds meet."""
    return f"--cpus-per-task=$run_cpus_{group}"


def trainer_script(cluster: Cluster, record: Path, folder: Path) -> str:
    """What each node that trains runs, from ``folder``."""
    check = _node_check(record, cluster.gpus_per_node)
    if cluster.trains_alone:
        words = ["-m", "megatron_prefix.cli", "train", str(record)]
        return _script(cluster, folder, words, check=check if cluster.executor == "slurm" else [])
    words = ["-m", "megatron_prefix.agent", str(record)]
    words += ["--nodes", str(cluster.trainer_nodes)]
    words += ["--ranks-per-node", str(cluster.ranks_per_node or cluster.gpus_per_node or 1)]
    words += ["--max-restarts", str(cluster.max_restarts)]
    more = '--id "$run_attempt" --rendezvous "$run_head:$run_port"'
    if cluster.server_nodes:
        more += f" --endpoints {_endpoints(record)} --endpoint-files {cluster.server_nodes}"
    if cluster.teacher_server_nodes:
        more += f" --teacher-endpoints {_endpoints(record)}"
        more += f" --teacher-endpoint-files {cluster.teacher_server_nodes}"
    return _script(cluster, folder, words, more, check)


def server_script(cluster: Cluster, record: Path, folder: Path, *, teachers: bool = False) -> str:
    """What each node that serves runs, from ``folder``."""
    module = "teachers.serve" if teachers else "rollout.serve"
    words = ["-m", f"megatron_prefix.{module}", str(record)]
    more = f'--peer "$run_head" --endpoints-dir {_endpoints(record)}'
    gpus = cluster.server_gpus_per_node or cluster.gpus_per_node
    return _script(cluster, folder, words, more, _node_check(record, gpus))


def _node_check(record: Path, gpus: int) -> list[str]:
    """Asked of each node before anything of the run starts there."""
    words = ["-m", "megatron_prefix.cli", "doctor", "--node", str(record.parent)]
    return [*words, "--gpus", str(gpus)] if gpus else words


def _endpoints(record: Path) -> str:
    return f'{quote(record.parent / "endpoints")}/"$run_attempt"'


def _value(value: str) -> str:
    """As it is, or, of a reference, what the step's environment holds: sbatch handed it on."""
    name = referenced(value)
    return f'"${{{name}?was not in the environment of sbatch}}"' if name else quote(value)


def _script(
    cluster: Cluster, folder: Path, words: list[str], more: str = "", check: list[str] | None = None
) -> str:
    """``words`` are quoted, ``more`` is shell text; ``check`` has to end well, and soon, before."""
    python = cluster.python or ("python" if cluster.container else sys.executable)
    lines = ["set -e"]
    lines += [f"module load {quote(name)}" for name in cluster.modules]
    lines += [f"export {name}={_value(value)}" for name, value in cluster.env]
    lines += [f"cd -- {quote(folder)}"]
    if check:
        asked = " ".join(map(quote, [python, *check]))
        lines += ["trap 'exit 75' USR1 TERM  # nothing has begun: nothing is lost"]
        lines += [
            f"timeout -k 10 {_CHECK_S} {asked} || {{",
            f"  echo {_REFUSED} >&2",
            "  exit 2",
            "}",
        ]
        lines += ["trap - USR1 TERM"]
    lines += [f"exec {' '.join(map(quote, [python, *words]))} {more}".rstrip()]
    return "\n".join(lines) + "\n"
