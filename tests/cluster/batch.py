"""The same batch here and on a Slurm of one node, with jobs killed by hand: are the figures the
same, byte for byte?

    PYTHONPATH=. python tests/cluster/batch.py FOLDER [--only SLUG ...] [--rows N] [--warm STORE
    [--cold NAME]]

FOLDER gets two copies of the project, ``local`` and ``slurm``, each with its own store, figures and
runs. Prints the jobs with their states, what was killed and what became of it, and the comparison;
exit status 1 if anything is not as it should be.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import slurm

from companion.data import datasets
from companion.paths import ROOT
from fungi_core import store

TIMED = (
    "16_simclr_views",
    "17_throughput",
    "19_scoreboard",
    "21_projections",
)  # measure seconds, or show them


def copy(folder: Path, warm: Path | None, cold: list[str]) -> dict[str, str]:
    """A copy of the tracked files with a store and figures of its own; returns its environment."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        if not name.startswith("figures/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    mini = [
        name
        for name, entry in datasets.DATASETS.items()
        if entry.profile == "mini" and name not in cold
    ]
    for entry in store.entries(warm) if warm else ():
        if entry["meta"]["data"][0] in mini:
            shutil.copytree(warm / entry["key"], folder / "store" / entry["key"])
    own = {
        "PYTHONPATH": str(folder),
        "FUNGI_STORE": str(folder / "store"),
        "FUNGI_FIGURES": str(folder / "figures"),
    }
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("FUNGI_DATA", "OMP_NUM_THREADS")
    } | own


def snakemake(folder: Path, env: dict, targets: list[str], *options: str) -> float:
    """Runs the batch; returns seconds. Raises where it fails."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *options,
        "--rerun-triggers",
        "mtime",
        "--",
        *targets,
    ]
    start = time.monotonic()
    subprocess.run(command, cwd=folder, env=env, check=True)
    return time.monotonic() - start


def kill_some(env: dict, done: threading.Event, log: list[str], shards: bool) -> None:
    """Ends one extraction by scancel and one notebook by SIGKILL to all of its processes, each
    while it computes.
    """
    wanted = {"rule_notebook": "kill -9", f"rule_{'shard' if shards else 'features'}": "scancel"}
    while wanted and not done.wait(0.5):
        for job in slurm.jobs(env):
            rule = next((rule for rule in wanted if job["name"].startswith(rule)), None)
            how = wanted.get(rule)
            module = "fungi_core.extract" if how == "scancel" else "ipykernel_launcher"
            pids = (
                [pid for pid in processes(env, job["id"]) if module in command_line(pid)]
                if how
                else []
            )
            if not how or job["state"] != "RUNNING" or not pids:
                continue
            time.sleep(4)  # into its work
            if how == "scancel":
                subprocess.run(["scancel", job["id"]], env=env, check=True)
            else:
                for pid in processes(env, job["id"]):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass  # its parent ended it a moment ago
            log.append(f"{how} {job['id']}: {job['name']}")
            del wanted[rule]


def processes(env: dict, job: str) -> list[int]:
    """Processes of a running job: those with its number in their environment, as Slurm sets it."""
    mark = f"SLURM_JOB_ID={job}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = (
                mark in (entry / "environ").read_bytes()
                and b"slurmstepd" not in (entry / "cmdline").read_bytes()
            )
            found += [int(entry.name)] if ours else []
        except OSError:
            continue  # ended meanwhile
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def digests(folder: Path, suffixes: tuple[str, ...] = (".png", ".pdf", ".csv")) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in suffixes)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def timed(figures: Path) -> set[str]:
    """Files of the notebooks that measure time, by the provenance beside each figure."""
    names = {
        json.stem
        for json in figures.rglob("*.json")
        if any(f'"{s}"' in json.read_text() for s in TIMED)
    }
    return names | {f"claims_{slug}" for slug in TIMED}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="SLUG", help="these notebooks, not all")
    parser.add_argument("--rows", type=int, help="rows of a shard: extractions as several jobs")
    parser.add_argument("--warm", type=Path, metavar="STORE", help="start with what this store has")
    parser.add_argument(
        "--cold",
        nargs="*",
        default=["digits"],
        metavar="DATASET",
        help="but not of these data sets",
    )
    args = parser.parse_args()
    if reason := slurm.missing():
        sys.exit(reason)
    folder = args.folder.resolve()
    slugs = args.only or sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    env = {place: copy(folder / place, args.warm, args.cold) for place in ("local", "slurm")}
    targets = [f"runs/mini/{slug}.ipynb" for slug in slugs]
    config = ["--config", "profile=mini", *([f"rows_a_job={args.rows}"] if args.rows else [])]
    print(
        f"{len(slugs)} notebooks; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    killed, done = [], threading.Event()
    with slurm.cluster(folder / "cluster") as cluster:
        env["slurm"] |= {name: cluster[name] for name in ("SLURM_CONF", "PATH")}
        killer = threading.Thread(
            target=kill_some, args=(env["slurm"], done, killed, bool(args.rows))
        )
        killer.start()
        try:
            seconds = snakemake(
                folder / "slurm", env["slurm"], targets,
                "--workflow-profile", "notebooks/profiles/slurm", "--jobs", "8",
                "--slurm-status-command", "squeue",  # no accounting database here
                "--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5",
                *config,
            )  # fmt: skip
        finally:
            done.set()
            killer.join()
            jobs = slurm.jobs(env["slurm"])
            print(f"\n{'job':>5} {'state':<10} {'exit':>6} {'time':>9} {'cpus':>4}  what")
            for job in jobs:
                print("{id:>5} {state:<10} {exit:>6} {seconds:>9} {cpus:>4}  {name}".format(**job))
    states = Counter(job["state"] for job in jobs)
    print(
        f"slurm: {len(jobs)} jobs in {seconds:.0f} s: {', '.join(f'{n} {state}' for state, n in states.items())}"
    )
    good = len(killed) == 2
    for line in killed:
        number, name = line.split(":")[0].split()[-1], line.split(": ")[1]
        again = [job for job in jobs if job["name"] == name and int(job["id"]) > int(number)]
        became = ", ".join(f"job {job['id']} {job['state']}" for job in again) or "not run again"
        print(f"{line} -> {became}")
        good &= bool(again) and again[-1]["state"] == "COMPLETED"

    seconds = snakemake(
        folder / "local", env["local"], targets, "--cores", "all", "--quiet", "rules", *config
    )
    print(f"local: {len(slugs)} notebooks in {seconds:.0f} s", flush=True)
    here, there = (digests(folder / place / "figures") for place in ("local", "slurm"))
    apart = timed(folder / "local" / "figures")
    names = sorted(here.keys() | there.keys())
    left = [name for name in names if Path(name).stem in apart]
    other = [name for name in names if here.get(name) != there.get(name)]
    bad = [name for name in other if name not in left]
    print(f"figures: {len(names) - len(left) - len(bad)} of {len(names) - len(left)} files identical; "
          f"{len(left)} of {', '.join(s for s in TIMED if s in slugs) or 'no'} notebooks left out (times), "
          f"{len(set(other) & set(left))} of them differ")  # fmt: skip
    print(*(f"DIFFERENT: {name}" for name in bad), sep="\n")
    stores = [digests(folder / place / "store", (".npy", ".json")) for place in ("local", "slurm")]
    same = "identical" if stores[0] == stores[1] else "DIFFERENT"
    print(f"store: {len(stores[0])} and {len(stores[1])} files, {same}")
    return 0 if good and not bad and stores[0] == stores[1] else 1


if __name__ == "__main__":
    sys.exit(main())
