"""A real Slurm of several nodes on one machine: slurmctld, munged, and a slurmd a node.

A node is a network, host name, mount and process namespace: it has an address and a loopback of its
own, and ends at once, with all that runs on it, when its first process is killed. The controller
has a network namespace too, so that nothing of the machine's own network is touched; commands that
talk to Slurm are run in there by :meth:`VirtualSlurm.run`.

``sacct`` needs slurmdbd with a database, which is heavy: here it is a stand-in over ``scontrol``,
in the folder ``bin`` of the fixture alone.
"""

import os
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "nsenter", "ps")
NETWORK = "10.77.0"
CONTROLLER = f"{NETWORK}.254"
GPUS, CPUS = 1, 8
DIE_WITH_PARENT = Path(__file__).parents[2] / "megatron_prefix" / "die_with_parent.py"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE")

SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost={host}({controller})
SlurmUser=root
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,bf_continue,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=86400
KillWait=5
# A busy machine must not make a node look dead.
SlurmdTimeout=20
MessageTimeout=60
TCPTimeout=30
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=600
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeAddr={address} NodeHostname={name} CPUs={cpus} Gres=gpu:{gpus}"
# Slurm's own words, in the columns that torchx reads.
SACCT = r"""#!/bin/bash
while (($#)); do [[ $1 == -j ]] && id=$2; shift; done
echo "JobID|JobName|Partition|Account|AllocCPUS|State|ExitCode"
scontrol --oneliner show job "$id" | while read -r line; do
  field() { grep -oP "(?<= $1=)[^ ]*" <<<" $line" | head -n1; }
  state=$(field JobState)
  [[ $state == COMPLETING ]] && state=RUNNING
  [[ $state == CONFIGURING ]] && state=PENDING
  echo "$(field JobId)|$(field JobName)|$(field Partition)||1|$state|$(field ExitCode)"
done
"""


def missing() -> str:
    """Why no virtual Slurm can be had here; empty where it can."""
    if os.geteuid() != 0:
        return "a virtual Slurm needs root, for network namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} missing: install what tools/debian-test-packages.txt lists"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"])
    return "" if probe.returncode == 0 else "this machine forbids namespaces"


def wait_until(done: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(0.1)


class VirtualSlurm:
    """Started by :meth:`start`, ended by :meth:`stop`; ``root`` is an empty folder of its own."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self.names = root, [f"node{i}" for i in range(1, nodes + 1)]
        self._spaces = f"vs{os.getpid()}{secrets.token_hex(2)}"  # prefix of our namespaces
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{root}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)

    def start(self) -> None:
        self._write_files()
        self._make_network()
        run = self.root / "run"
        options = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        options |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        munged = [f"--{option}={run / name}" for option, name in options.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", *munged])
        wait_until((run / "munge.sock").exists, "munged's start")
        self._daemon("slurmctld", [*self._inside("ctl"), "slurmctld", "-D", "-i"])
        for name in self.names:
            self.start_node(name)
        wait_until(lambda: self.idle_nodes() == self.names, "all nodes idle")

    def stop(self) -> None:
        for name in list(self._nodes):
            self.kill_node(name)
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        for space in ("ctl", *self.names):
            subprocess.run(["ip", "netns", "del", f"{self._spaces}{space}"], check=False)

    def start_node(self, name: str) -> None:
        """Its first process is a shell, which reaps what daemons leave behind."""
        script = (
            f"hostname {name} && ip link set lo up && mount --bind {self.root}/hosts /etc/hosts "
            f"&& slurmd -D -N {name} -c & wait"
        )
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*self._inside(name), *unshare, "bash", "-c", script]
        self._nodes[name] = self._spawn(f"{name}.out", command)

    def kill_node(self, name: str) -> None:
        """As if its power failed: the kernel kills every process of the node."""
        node = self._nodes.pop(name)
        node.kill()
        node.wait()

    def run(self, *words: str, check: bool = True, **more: str) -> str:
        """``words`` as a command beside the controller; its output. ``more`` is environment."""
        done = self.popen(*words, **more)
        output, errors = done.communicate(timeout=600)
        if check and done.returncode != 0:
            raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode}: {errors}")
        return output

    def popen(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self._inside("ctl"), *words],
            env={**self.env, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def sbatch(self, *words: str, **more: str) -> int:
        return int(self.run("sbatch", "--parsable", *words, **more))

    def job(self, number: int) -> Mapping[str, str]:
        """Slurm's fields of a job."""
        line = self.run("scontrol", "--oneliner", "show", "job", str(number)).splitlines()[0]
        pairs = (word.partition("=") for word in line.split())
        return {key: value for key, _, value in pairs}

    def wait_for(self, number: int, *states: str, timeout_s: float = 600.0) -> str:
        """The first of ``states`` that the job is in; TimeoutError shows how far it came."""
        seen: list[str] = []

        def there() -> bool:
            state = self.job(number)["JobState"]
            seen[len(seen) - (state in seen[-1:]) :] = [state]
            return state in states

        try:
            wait_until(there, f"job {number} in {states}", timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it was {seen}: {self.job(number)}") from error
        return seen[-1]

    def wait_for_end(self, number: int, timeout_s: float = 600.0) -> str:
        return self.wait_for(number, *ENDED, timeout_s=timeout_s)

    def wait_for_restart(self, number: int, restarts: int, timeout_s: float = 600.0) -> None:
        """Until the job was requeued so many times; RuntimeError where it ends before."""

        def there() -> bool:
            job = self.job(number)
            if job["JobState"] in ENDED:
                raise RuntimeError(f"job {number} ended before requeue {restarts}: {job}")
            return int(job["Restarts"]) >= restarts

        wait_until(there, f"requeue {restarts} of job {number}", timeout_s)

    def pids(self, name: str) -> list[int]:
        """Of the node's processes, as this machine numbers them."""
        space = f"{self._spaces}{name}"
        shown = subprocess.run(["ip", "netns", "pids", space], capture_output=True, check=True)
        return [int(word) for word in shown.stdout.split()]

    def idle_nodes(self) -> list[str]:
        shown = self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
        return sorted(set(shown.split()))

    def _inside(self, space: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self._spaces}{space}"]

    def _daemon(self, name: str, command: list[str]) -> None:
        self._daemons.insert(0, self._spawn(f"{name}.out", command))

    def _spawn(self, log: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Under a request to the kernel to end it with the tests, however they end."""
        program = shutil.which(command[0])
        assert program is not None, command
        guard = [sys.executable, "-P", str(DIE_WITH_PARENT), str(os.getpid())]
        with open(self.root / "log" / log, "ab") as output:
            return subprocess.Popen(
                [*guard, program, *command[1:]],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _make_network(self) -> None:
        """A bridge in the controller's namespace, with a cable to every node."""

        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True)

        controller = f"{self._spaces}ctl"
        ip("netns", "add", controller)
        ip("-n", controller, "link", "set", "lo", "up")
        ip("-n", controller, "link", "add", "bridge", "type", "bridge")
        ip("-n", controller, "address", "add", f"{CONTROLLER}/24", "dev", "bridge")
        ip("-n", controller, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names, start=1):
            space = f"{self._spaces}{name}"
            ip("netns", "add", space)
            cable = ["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space]
            ip("-n", controller, *cable)
            ip("-n", controller, "link", "set", name, "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")

    def _write_files(self) -> None:
        for name in ("run", "log", "state", "bin", "dev", *(f"spool/{n}" for n in self.names)):
            (self.root / name).mkdir(parents=True)
        for gpu in range(GPUS):  # Slurm counts devices; nothing opens these
            os.mknod(self.root / "dev" / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        host = socket.gethostname().partition(".")[0]
        addresses = {name: f"{NETWORK}.{i}" for i, name in enumerate(self.names, start=1)}
        nodes = [
            NODE.format(name=name, address=address, cpus=CPUS, gpus=GPUS)
            for name, address in addresses.items()
        ]
        settings = SLURM_CONF.format(
            host=host, controller=CONTROLLER, root=self.root, nodes="\n".join(nodes)
        )
        hosts = {"localhost": "127.0.0.1", host: CONTROLLER, **addresses}
        files = {
            "slurm.conf": settings,
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",  # or slurmd looks for a bus of systemd's
            "gres.conf": f"Name=gpu File={self.root}/dev/gpu0\n",
            "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
            "bin/sacct": SACCT,
        }
        for name, text in files.items():
            (self.root / name).write_text(text)
        (self.root / "bin" / "sacct").chmod(0o755)
        key = self.root / "run" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
