"""A real Slurm cluster for a test: controller and machines as namespaces of this one, all files in one folder.

Each machine has its own host name, network, mounts and processes, and can be switched off. Nothing outside the folder
and the namespaces is touched, and all of it ends with the controller's first process, also when the tests are killed.

    python -m tests.helpers.slurm_cluster COMMAND...    runs a command on the controller of a new cluster
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.ranks import PATIENCE_S

PACKAGES = ("slurmctld", "slurmd", "munged", "unshare", "nsenter", "setpriv", "ip")
NAMESPACES = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")

# Times as short as Slurm takes them. The life of a credential is also how long a requeued job is kept waiting; below 5
# seconds Slurm takes it for wrong, and waits 2 minutes.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=controller(10.77.0.1)
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
MailProg=/bin/true
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
KillWait=10
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-{nodes}] NodeAddr=10.77.0.[11-{last}] CPUs=4 RealMemory=4000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=main Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=5 State=UP
PartitionName=urgent Nodes=node[1-{nodes}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""
# Machines that say they are large, all of them the controller's: enough for `sbatch --test-only`.
LARGE = """\
NodeName=large[1-{large}] NodeAddr=10.77.0.1 Port=[17001-{last_port}] CPUs=96 RealMemory=1000000 Gres=gpu:h100:8
PartitionName=large Nodes=large[1-{large}] MaxTime=INFINITE State=UP
"""
CONTROLLER = """\
set -eu
hostname controller
mount --bind {root}/hosts /etc/hosts; mount --bind {root}/nsswitch.conf /etc/nsswitch.conf
ip link set lo up; ip link add br0 type bridge; ip addr add 10.77.0.1/24 dev br0; ip link set br0 up
munged --socket={root}/munge/socket --key-file={root}/munge/key --pid-file={root}/munge/pid \
  --log-file={root}/munge/log --seed-file={root}/munge/seed --num-threads=2
slurmctld -D &
for number in $(seq {large}); do slurmd -N large$number; done
for number in $(seq {nodes}); do
  unshare {namespaces} bash {root}/node.sh node$number 10.77.0.$((10 + number)) & pid=$!
  echo $pid >{root}/node$number.pid
  while [ "$(readlink /proc/$pid/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
  ip link add port$number type veth peer name eth0 netns $pid
  ip link set port$number master br0; ip link set port$number up
done
while :; do wait; sleep 3600 & done  # the first process of its namespace: it buries orphans
"""
NODE = """\
hostname $1
mount --bind {root}/hosts /etc/hosts; mount --bind {root}/nsswitch.conf /etc/nsswitch.conf
ip link set lo up
while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add $2/24 dev eth0; ip link set eth0 up
slurmd -D -N $1 &
while :; do wait; sleep 3600 & done
"""


def missing() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "needs root"
    if absent := [name for name in PACKAGES if not shutil.which(name)]:
        return f"needs {', '.join(absent)} (apt-get install slurm-wlm munge)"
    if subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True).returncode:
        return "needs namespaces"
    return None


class Cluster:
    """`with Cluster(nodes=2) as cluster:` machines node1, node2, each with 4 CPUs and 2 GPUs that are none.

    `large`: machines of the partition of that name, to ask sbatch about.
    """

    def __init__(self, nodes: int = 2, large: int = 0):
        self.nodes, self.large = nodes, large
        # munge wants its socket where anyone may look, under a short name: not in pytest's folders
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.root.chmod(0o755)
        self.env = os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")}

    def _write_files(self) -> None:
        for name in ("munge", "state", "dev"):
            (self.root / name).mkdir(mode=0o755)
        key = self.root / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for number in range(8):  # must be a device; else CUDA_VISIBLE_DEVICES is not set
            (self.root / f"dev/gpu{number}").symlink_to("/dev/null")
        names = {
            "root": self.root, "nodes": self.nodes, "last": 10 + self.nodes, "namespaces": " ".join(NAMESPACES),
            "large": self.large, "last_port": 17000 + self.large,
        }  # fmt: skip
        gres = f"AutoDetect=off\nNodeName=node[1-{self.nodes}] Name=gpu Type=fake File={self.root}/dev/gpu[0-1]\n"
        if self.large:
            gres += f"NodeName=large[1-{self.large}] Name=gpu Type=h100 File={self.root}/dev/gpu[0-7]\n"
        hosts = ["127.0.0.1 localhost", "10.77.0.1 controller"]
        hosts += [f"10.77.0.{10 + number} node{number}" for number in range(1, self.nodes + 1)]
        files = {
            "slurm.conf": SLURM_CONF + (LARGE if self.large else ""), "gres.conf": gres,
            "controller.sh": CONTROLLER, "node.sh": NODE,
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n", "hosts": "\n".join(hosts) + "\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        }  # fmt: skip
        for name, text in files.items():
            for field, value in names.items():
                text = text.replace(f"{{{field}}}", str(value))
            (self.root / name).write_text(text)

    def __enter__(self) -> "Cluster":
        self._write_files()
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "bash", str(self.root / "controller.sh")]
        with open(self.root / "up.log", "w") as log:
            self._process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            until(lambda: _children(self._process.pid), 10)
            (self._init,) = _children(self._process.pid)
            until(lambda: self.idle_nodes("main") == self.nodes, 30)
            until(lambda: not self.large or self.idle_nodes("large") == self.large, 30)
        except BaseException:
            print((self.root / "up.log").read_text())
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for pid in (*_children(self._process.pid), self._process.pid):  # the kernel kills all that is in the namespace
            os.kill(pid, signal.SIGKILL)
        self._process.wait(20)
        shutil.rmtree(self.root)

    def run(self, *command: str, env: dict | None = None, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess:
        """A command on the controller, from the current folder."""
        env = self.env | (env or {})
        return subprocess.run(self.enter(*command), env=env, capture_output=True, text=True, timeout=timeout_s)

    def enter(self, *command: str) -> list[str]:
        """The words that run a command in the namespaces of the controller."""
        return ["nsenter", "-t", str(self._init), "-n", "-u", "-m", "-p", f"--wd={os.getcwd()}", *command]

    def idle_nodes(self, partition: str) -> int:
        words = self.run(
            "sinfo", "--noheader", f"--partition={partition}", "--states=idle", "--format=%D"
        ).stdout.split()
        return int(words[0]) if words else 0

    def sbatch(self, *words: str) -> str:
        done = self.run("sbatch", "--parsable", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.splitlines()
        return dict(word.split("=", 1) for word in lines[0].split() if "=" in word) if lines else {}

    def wait(self, job_id: str, *states: str, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        """The job once it is in one of the states, else once it ended."""
        until(lambda: self.job(job_id)["JobState"] in (states or ENDED), timeout_s, lambda: self.job(job_id))
        return self.job(job_id)

    def switch_off(self, node: str) -> None:
        """As a machine that loses its power: its processes and its network are gone."""
        number = (self.root / f"{node}.pid").read_text().strip()  # as the controller's namespace counts
        for pid in _children(self._init):
            (numbers,) = [line for line in open(f"/proc/{pid}/status") if line.startswith("NSpid:")]
            if number in numbers.split()[2:]:
                (first,) = _children(pid)
                os.kill(first, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition, timeout_s: float, describe=lambda: ""):
    """The condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {describe()}"
        time.sleep(0.1)
    return value


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"error: no Slurm can be started here: {reason}")
    with Cluster() as new:
        done = subprocess.run(new.enter(*sys.argv[1:]), env=new.env)
    sys.exit(done.returncode)
