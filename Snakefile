# One batch: features, then every notebook, then the scoreboard.
#     snakemake --cores all --config profile=mini
#     snakemake --workflow-profile notebooks/profiles/slurm --config profile=paper     # the same on a cluster
#     snakemake -n --config profile=paper                                              # what would be run
# Parameters come from the notebooks' own defaults and from notebooks/profiles/PROFILE.yaml. They are job parameters, so
# a changed line of a profile runs again just the notebooks that it concerns.
import json
import logging
import os
import re
import sys
import time

PACKAGES = [workflow.basedir, f"{workflow.basedir}/notebooks"]  # found in a plain copy of the project, too
sys.path[:0] = PACKAGES
os.environ["PYTHONPATH"] = os.pathsep.join([*PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])])

workdir: workflow.basedir

PROFILE = config.get("profile", "mini")
RUNS = f"runs/{PROFILE}"
PLAN = Path(RUNS) / "plan.json"
DRYRUN = any(re.fullmatch(r"--dry-?run|-\w*n\w*", word) for word in sys.argv)  # workflow.dryrun is not known yet
LAST = {"00_start_here", "19_scoreboard"}  # they show what the others found
ALONE = {"16_simclr_views", "17_throughput"}  # timings: nothing else runs beside these

PAPER = PROFILE == "paper"
CORES = None if workflow.remote_exec else workflow.resource_settings.cores  # None on a cluster, here and in its jobs
THREADS = 8 if PAPER else 1  # small networks: two jobs of one thread do more than one job of two
MEMORY, MINUTES = (64_000, 240) if PAPER else (4_000, 60)  # MB and time limit of a job; twice that at its second try
GPU = int(PAPER)  # what a job asks for; locally limited by --resources gpu=N, one process a device

CODE = sorted(p for folder in ("fungi_core", "notebooks/companion") for p in Path(folder).rglob("*.py"))
# What can change a feature; a change there runs the features jobs again, which find their rows stored.
CODE_OF_FEATURES = [p for p in CODE if p.parts[0] == "fungi_core" or p.parts[2] in ("data", "encoders")]
TABLES = sorted(p for some in ("data/*.csv", "data/paper/*", "data/texts/*", "figures/*.mplstyle") for p in Path().glob(some))


def made_plan():
    """Return the parameters of each notebook, what of them is here, its features jobs, and the shards of these jobs:
    names of marker files. Say what is not here; end where no data set is.
    """
    from companion import paths, plan, run
    from companion.data import datasets, masks
    from companion.encoders.table import unavailable

    slugs = run.notebooks()
    try:
        run.load_profile(PROFILE)  # an unknown one is an error, with or without notebooks
        parameters = {slug: run.parameters(slug, PROFILE) for slug in slugs}
        named = lambda kind: {name for p in parameters.values() for name in p.get(kind, ())}
        scenes = {name for name in named("sets") if not datasets.missing(masks.find(name))}
    except ValueError as error:
        sys.exit(str(error))  # one line, under --quiet too
    present = {row["name"] for row in datasets.table() if row["available"]}  # the rest is "not run" in the notebooks
    present |= scenes
    data, networks = named("datasets") | named("sets"), named("backbones")
    if data and not (data & present or DRYRUN):
        sys.exit(f"none of the data sets of {PROFILE} is in {paths.downloads_dir()}; it needs {', '.join(sorted(data))}")
    present |= {name for name in networks if not unavailable(name)}
    if lacking := (data | networks) - present:
        print(f"not here, so not run: {', '.join(sorted(lacking))}")
    here = lambda p: sorted({*p.get("datasets", ()), *p.get("sets", ()), *p.get("backbones", ())} & present)
    rows = int(config.get("rows_a_job", plan.ROWS))  # --config rows_a_job=N: another size of the shards
    jobs = plan.merged({slug: plan.jobs(parameters[slug], PROFILE, present) for slug in slugs})
    parts = {MARKER.format(job): job.shards(rows) for found in jobs.values() for job in found}
    return {
        "parameters": parameters,
        "here": {slug: here(parameters[slug]) for slug in slugs},
        "features": {slug: [f"{MARKER.format(job)}.done" for job in jobs[slug]] for slug in slugs},
        "shards": {f"{m}.done": [f"{m}.{i}-of-{n}.done" for i in range(1, n + 1)] for m, n in parts.items() if n > 1},
    }


MARKER = RUNS + "/features/{0.backbone}/{0.dataset}/{0.n_train}-{0.n_test}-seed{0.seed}/{0.group}"
if workflow.remote_exec:  # a cluster's job follows the plan that it was submitted by, and saves the import of torch
    plan = json.loads(PLAN.read_text())
else:
    plan = json.loads(json.dumps(made_plan()))  # as a job reads it
    if not DRYRUN:
        PLAN.parent.mkdir(parents=True, exist_ok=True)
        PLAN.with_suffix(".tmp").write_text(json.dumps(plan))
        PLAN.with_suffix(".tmp").replace(PLAN)  # whole or as it was: jobs of a run before this one may be reading it
SLUGS = list(plan["parameters"])


class Progress(logging.Handler):
    """After each job, say in one line how many are done and how long the others take at the same pace."""

    start = time.monotonic()

    def emit(self, record):
        if getattr(record, "event", None) == "progress" and record.done < record.total:
            left = (time.monotonic() - self.start) / record.done * (record.total - record.done)
            print(f"{record.done} of {record.total} jobs done, about {left / 60:.1f} minutes left", flush=True)


if not (DRYRUN or workflow.remote_exec):
    logging.getLogger("snakemake.logging").addHandler(Progress())


rule all:
    input: expand(RUNS + "/{slug}.ipynb", slug=SLUGS)


EXTRACT = (
    "{sys.executable:q} -m companion.features {wildcards.backbone:q} {wildcards.dataset:q}"
    " {params.names} --n-train {wildcards.n_train} --n-test {wildcards.n_test} --seed {wildcards.seed}"
)
FOLDER = RUNS + "/features/{backbone}/{dataset}/{n_train}-{n_test}-seed{seed}"
DONE = FOLDER + "/{names}.done"

wildcard_constraints:
    dataset="[^/]+", n_train=r"\d+", n_test=r"\d+", seed=r"\d+", names="[a-z+]+", slug=r"\d\d_\w+",
    part=r"\d+", parts=r"\d+"


rule shard:  # one of several jobs that fill different rows of one store
    input: CODE_OF_FEATURES
    output: touch(FOLDER + "/{names}.{part}-of-{parts}.done")
    params: names=lambda wc: wc.names.replace("+", " ")
    threads: THREADS
    resources: gpu=GPU, mem_mb=lambda wc, attempt: MEMORY * attempt, runtime=lambda wc, attempt: MINUTES * attempt
    shell: EXTRACT + " --shard {wildcards.part}/{wildcards.parts}"


rule features:  # all rows; after its shards it finds them there, and reads every checksum
    input: CODE_OF_FEATURES, lambda wc: plan["shards"].get(DONE.format(**dict(wc.items())), [])
    output: touch(DONE)
    params: names=lambda wc: wc.names.replace("+", " ")
    threads: THREADS
    resources: gpu=GPU, mem_mb=lambda wc, attempt: MEMORY * attempt, runtime=lambda wc, attempt: MINUTES * attempt
    shell: EXTRACT


rule notebook:
    input:
        "notebooks/{slug}.ipynb", "requirements.lock", CODE, TABLES,
        features=lambda wc: plan["features"][wc.slug],
        others=lambda wc: [f"{RUNS}/{slug}.ipynb" for slug in SLUGS if wc.slug in LAST and slug not in LAST],
    output: report(RUNS + "/{slug}.ipynb", category="executed notebooks")  # for snakemake --report
    params: parameters=lambda wc: plan["parameters"][wc.slug], here=lambda wc: plan["here"][wc.slug]
    threads: lambda wc: CORES or 2 if wc.slug in ALONE and not PAPER else THREADS
    resources:
        gpu=GPU, mem_mb=lambda wc, attempt: MEMORY * attempt, runtime=lambda wc, attempt: 4 * MINUTES * attempt,
        slurm_extra=lambda wc: "--exclusive" if wc.slug in ALONE else ""
    shell:  # 3: it ended early for want of data, which the plan has said
        "{sys.executable:q} -m companion.run {wildcards.slug} --profile {PROFILE:q} --out {output:q} || test $? -eq 3"
