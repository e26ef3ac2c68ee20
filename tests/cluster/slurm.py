"""A Slurm of one node on the loopback interface, in a folder of its own; no database.

It runs munged, slurmctld and slurmd. Needs Debian's slurm-wlm and munge, and root: slurmd starts
jobs as other users. Nothing outside the folder is written.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
# MinJobAge: without accounting, squeue is the only memory of finished jobs. ReturnToService: a node
# that was down is taken back when it reports. cons_tres shares the node's cores among jobs, as
# clusters do.
CONFIG = """
ClusterName=single
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
MpiDefault=none
MinJobAge=86400
MaxJobCount=2000
ReturnToService=2
SchedulerParameters=bf_interval=2,sched_interval=2,defer_batch
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why no cluster can be started here, in one line; "" where it can."""
    absent = [name for name in DAEMONS if not daemon(name)]
    if absent:
        return f"no {', '.join(absent)} here (Debian: apt-get install slurm-wlm munge)"
    if not find_spec("snakemake_executor_plugin_slurm"):
        return "the extra cluster is not installed (pip install -e 'notebooks[cluster]')"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def daemon(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/sbin/{name}")


def pids(folder: Path) -> list[int]:
    """Return the processes of a folder's daemons that run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
        if str(folder) in line and any(name in line.split()[0] for name in DAEMONS):
            found.append(int(file.parent.name))
    return found


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster and yield the environment for sbatch, squeue and scancel.

    At the end all jobs are cancelled and the daemons stopped.
    """
    folder = Path(folder).resolve()
    env, started = os.environ | prepare(folder), []
    try:
        for name in DAEMONS:
            started.append(start(name, folder, env))
            if name == "munged":
                wait(lambda: (folder / "munge.socket").exists(), "munged", folder)
        wait(lambda: "idle" in ask(env, "sinfo", "-h", "-o", "%T"), "the node", folder)
        yield env
    finally:
        with_jobs = ask(env, "squeue", "-h", "-o", "%i").split()
        if with_jobs:
            ask(env, "scancel", *with_jobs)
            wait(lambda: not ask(env, "squeue", "-h", "-o", "%i").split(), "cancelled jobs", folder)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def prepare(folder: Path) -> dict[str, str]:
    """Write configuration and key into the folder; return the variables that point to them."""
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # munged refuses a socket in a folder that others can write, or cannot enter.
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    config = CONFIG.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        ports=free_ports(2),
        cores=os.cpu_count(),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 - 512,
    )
    (folder / "slurm.conf").write_text(config)
    # The executor's job step drops every SLURM_ variable before its srun, SLURM_CONF with them;
    # this srun has its own.
    shim = folder / "bin" / "srun"
    shim.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    shim.chmod(0o755)
    path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
    return {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}


def start(name: str, folder: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start one of the daemons; what it prints goes into the folder."""
    options = ["-D", "-f", env["SLURM_CONF"]]
    if name == "munged":
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        options = ["--foreground", "--force"]
        options += [f"--{option}={folder}/{file}" for option, file in files.items()]
    with open(folder / f"{name}.out", "wb") as out:
        return subprocess.Popen([daemon(name), *options], env=env, stdout=out, stderr=out)


def ask(env: dict[str, str], *command: str) -> str:
    """Return what a Slurm command prints; "" while the controller does not answer."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def jobs(env: dict[str, str]) -> list[dict[str, str]]:
    """Return all jobs since the start, in order; ``name`` is the rule with its wildcards."""
    rows = []
    for line in ask(env, "scontrol", "-o", "show", "jobs").splitlines():
        if not line.startswith("JobId="):
            continue  # "No jobs in the system"
        fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        names = {"id": "JobId", "state": "JobState", "exit": "ExitCode", "seconds": "RunTime"}
        row = {name: fields[field] for name, field in names.items()}
        row |= {"cpus": fields["NumCPUs"], "name": fields.get("Comment", "")}
        rows.append(row)
    return sorted(rows, key=lambda row: int(row["id"]))


def wait(ready, what: str, folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(
                f"{f.name}: {f.read_text(errors='replace')[-1000:]}" for f in folder.glob("*.log")
            )
            raise TimeoutError(f"{what}: not there after {seconds:.0f} s\n{logs}")
        time.sleep(0.3)
