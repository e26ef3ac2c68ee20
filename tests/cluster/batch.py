"""Run one batch here and on a Slurm of one node, with jobs killed by hand; compare the figures.

    python tests/cluster/batch.py FOLDER [--only SLUG ...] [--rows N]

FOLDER gets two copies of the project, ``local`` and ``slurm``, each with its own store, figures and
runs, and each with its own two packages on the path. Prints the jobs with their states, what was
killed and what became of it, and the comparison, byte for byte; exit status 1 if anything is not as
it should be.
"""

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import slurm

ROOT = Path(__file__).resolve().parents[2]
# Notebooks that measure seconds, or show them.
TIMED = ("16_simclr_views", "17_throughput", "19_scoreboard", "21_projections")
EXTRACTION = re.search(r"-m ([\w.]+) \{wildcards", (ROOT / "Snakefile").read_text())[1]


def copy(folder: Path) -> dict[str, str]:
    """Copy the tracked files; return an environment with the copy's own packages and folders."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith("figures/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    other = ("FUNGI_DATA", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in other}
    return kept | {
        "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'notebooks'}",
        "FUNGI_STORE": str(folder / "store"),
        "FUNGI_FIGURES": str(folder / "figures"),
    }


def snakemake(folder: Path, env: dict, targets: list[str], *options: str) -> float:
    """Run the batch and return its seconds; raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "snakemake", *options, "--rerun-triggers", "mtime", "--"]
    start = time.monotonic()
    subprocess.run([*command, *targets], cwd=folder, env=env, check=True)
    return time.monotonic() - start


def kill_some(env: dict, done: threading.Event, log: list[str], shards: bool) -> None:
    """End one extraction by scancel and one notebook by SIGKILL to all of its processes.

    Each is ended while it computes; ``log`` gets a line for each.
    """
    wanted = {"rule_notebook": "kill -9", f"rule_{'shard' if shards else 'features'}": "scancel"}
    while wanted and not done.wait(0.5):
        for job in slurm.jobs(env):
            rule = next((rule for rule in wanted if job["name"].startswith(rule)), None)
            if rule is None or job["state"] != "RUNNING":
                continue
            how = wanted[rule]
            module = EXTRACTION if how == "scancel" else "ipykernel_launcher"
            if not any(module in command_line(pid) for pid in processes(env, job["id"])):
                continue
            time.sleep(4)  # into its work
            end(env, job["id"], how)
            log.append(f"{how} {job['id']}: {job['name']}")
            del wanted[rule]


def end(env: dict, job: str, how: str) -> None:
    """End a running job, by scancel or by SIGKILL to each of its processes."""
    if how == "scancel":
        subprocess.run(["scancel", job], env=env, check=True)
        return
    for pid in processes(env, job):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # its parent ended it a moment ago


def processes(env: dict, job: str) -> list[int]:
    """Return the processes of a running job: its number is in their environment, by Slurm."""
    mark = f"SLURM_JOB_ID={job}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = mark in (entry / "environ").read_bytes()
            if ours and b"slurmstepd" not in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def digests(folder: Path, *suffixes: str) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder that has one of the suffixes."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in suffixes)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def timed(figures: Path) -> set[str]:
    """Return the names of figures of notebooks that measure time, by the provenance beside each."""
    names = {
        json.stem
        for json in figures.rglob("*.json")
        if any(f'"{slug}"' in json.read_text() for slug in TIMED)
    }
    return names | {f"claims_{slug}" for slug in TIMED}


def on_slurm(folder: Path, env: dict, targets: list[str], config: list[str], shards: bool) -> bool:
    """Run the batch on a Slurm of its own while jobs are killed; say whether all went well."""
    killed, done = [], threading.Event()
    with slurm.cluster(folder.parent / "cluster") as cluster:
        env = env | {name: cluster[name] for name in ("SLURM_CONF", "PATH")}
        killer = threading.Thread(target=kill_some, args=(env, done, killed, shards))
        killer.start()
        options = ["--workflow-profile", "notebooks/profiles/slurm", "--jobs", "8"]
        options += ["--slurm-status-command", "squeue"]  # no accounting database here
        options += ["--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5"]
        try:
            seconds = snakemake(folder, env, targets, *options, *config)
        finally:
            done.set()
            killer.join()
            jobs = slurm.jobs(env)
            print(f"\n{'job':>5} {'state':<10} {'exit':>6} {'time':>9} {'cpus':>4}  what")
            for job in jobs:
                print("{id:>5} {state:<10} {exit:>6} {seconds:>9} {cpus:>4}  {name}".format(**job))
    states = ", ".join(f"{n} {state}" for state, n in Counter(j["state"] for j in jobs).items())
    print(f"slurm: {len(jobs)} jobs in {seconds:.0f} s: {states}")
    finished = [run_again(line, jobs) for line in killed]
    return len(finished) == 2 and all(finished)


def run_again(line: str, jobs: list[dict[str, str]]) -> bool:
    """Say, and print, whether the job that a line of the killer's log names was run to its end."""
    how, _, name = line.partition(": ")
    number = int(how.split()[-1])
    again = [job for job in jobs if job["name"] == name and int(job["id"]) > number]
    became = ", ".join(f"job {job['id']} {job['state']}" for job in again) or "not run again"
    print(f"{line} -> {became}")
    return bool(again) and again[-1]["state"] == "COMPLETED"


def same_figures(local: Path, other: Path) -> bool:
    """Compare the figures of two copies, byte for byte, but for those that show times."""
    here, there = (digests(copy / "figures", ".png", ".pdf", ".csv") for copy in (local, other))
    apart = timed(local / "figures")
    names = sorted(here.keys() | there.keys())
    left = [name for name in names if Path(name).stem in apart]
    bad = [name for name in names if here.get(name) != there.get(name) and name not in left]
    compared = len(names) - len(left)
    print(f"figures: {compared - len(bad)} of {compared} files identical; {len(left)} show times")
    print(*(f"DIFFERENT: {name}" for name in bad), sep="\n")
    return compared > 0 and not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="SLUG", help="these notebooks, not all")
    parser.add_argument("--rows", type=int, help="rows of a shard: extractions as several jobs")
    args = parser.parse_args()
    if reason := slurm.missing():
        sys.exit(reason)
    local, other = (args.folder.resolve() / place for place in ("local", "slurm"))
    env = {folder: copy(folder) for folder in (local, other)}
    slugs = args.only or sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    targets = [f"runs/mini/{slug}.ipynb" for slug in slugs]
    config = ["--config", "profile=mini", *([f"rows_a_job={args.rows}"] if args.rows else [])]
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"{len(slugs)} notebooks; load average {load:.1f} on {cores} cores", flush=True)
    good = on_slurm(other, env[other], targets, config, bool(args.rows))
    options = ("--cores", "all", "--quiet", "rules", *config)
    seconds = snakemake(local, env[local], targets, *options)
    print(f"local: {len(slugs)} notebooks in {seconds:.0f} s", flush=True)
    good &= same_figures(local, other)
    stores = [digests(folder / "store", ".npy", ".json") for folder in (local, other)]
    same = stores[0] == stores[1]
    print(f"store: {len(stores[0])} and {len(stores[1])} files, {'same' if same else 'DIFFERENT'}")
    return 0 if good and same else 1


if __name__ == "__main__":
    sys.exit(main())
