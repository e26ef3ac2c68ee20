# One batch: features, then every notebook, then the scoreboard.
#     snakemake --cores all --config profile=mini
#     snakemake --workflow-profile notebooks/profiles/slurm --config profile=paper     # the same on a cluster
#     snakemake -n --config profile=paper                                              # the plan, with hours
# Parameters come from the notebooks' own defaults and from notebooks/profiles/PROFILE.yaml. They are job parameters, so
# a changed line of a profile runs again just the notebooks that it concerns.
import sys

sys.path.insert(0, workflow.basedir)
from fungi_core import backbones, datasets, plan, run

workdir: workflow.basedir

PROFILE = config.get("profile", "mini")
RUNS = f"runs/{PROFILE}"
SLUGS = run.notebooks()
try:
    run.load_profile(PROFILE)  # an unknown one is an error, with or without notebooks
    PARAMETERS = {slug: run.parameters(slug, PROFILE) for slug in SLUGS}
except ValueError as error:
    sys.exit(str(error))  # one line, under --quiet too
SCOREBOARD = "19_scoreboard"
ALONE = {"16_simclr_views", "17_throughput"}  # timings: nothing else runs beside these

PAPER = PROFILE == "paper"
ROWS = config.get("rows_a_job")  # --config rows_a_job=N: another size of the shards; 0: none
GROUPS = plan.groups(PROFILE) | plan.groups(PROFILE, "audio")
GROUPS = GROUPS if ROWS is None else dict.fromkeys(GROUPS, int(ROWS))
CORES = None if workflow.remote_exec else workflow.resource_settings.cores  # None on a cluster, here and in its jobs
THREADS = 8 if PAPER else CORES or 2
MEMORY, MINUTES = (64_000, 240) if PAPER else (4_000, 60)  # MB and time limit of a job; twice that at its second try
GPU = int(PAPER)  # what a job asks for; locally limited by --resources gpu=N, one process a device
PRESENT = {row["name"] for row in datasets.table() if row["available"]}  # the rest is "not run" in the notebooks
PRESENT |= {name for p in PARAMETERS.values() for name in p.get("backbones", ()) if not backbones.unavailable(name)}

CODE = sorted(Path("fungi_core").glob("*.py"))
# Modules that change no feature; a change in any other runs the features jobs again, which then find their rows stored.
AFTER_FEATURES = {"clustering", "devices", "diagram", "evaluate", "explore", "figures", "grids", "iou", "masks",
                  "neighbours", "paper", "pca", "plan", "plots", "probe", "protocol", "retrieval", "run", "scenes",
                  "segmentation", "similarity", "site", "studies", "throughput", "tokens"}


JOBS = {slug: plan.jobs(PARAMETERS[slug], PROFILE, PRESENT) for slug in SLUGS}
MARKER = RUNS + "/features/{0.backbone}/{0.dataset}/{0.split}-{0.n_train}-{0.n_test}-seed{0.seed}/{0.group}"


def shards(wc):
    """Markers of the jobs that fill the rows of a features job; none if it fills them itself."""
    job = plan.Job(wc.backbone, wc.dataset, wc.split, int(wc.n_train), int(wc.n_test), int(wc.seed), wc.names)
    count = plan.shards(job, GROUPS[wc.names])
    return [f"{MARKER.format(job)}.{i}-of-{count}.done" for i in range(1, count + 1)] if count > 1 else []


if workflow.dryrun:
    todo = {job for slug in SLUGS for job in JOBS[slug] if not Path(f"{MARKER.format(job)}.done").exists()}
    print(plan.summary(sorted(todo), PROFILE, None if ROWS is None else int(ROWS)), file=sys.stderr)


rule all:
    input: expand(RUNS + "/{slug}.ipynb", slug=SLUGS)


EXTRACT = (
    "{sys.executable} -m fungi_core.extract {wildcards.backbone:q} {wildcards.dataset} {wildcards.split} {params.names}"
    " --n-train {wildcards.n_train} --n-test {wildcards.n_test} --seed {wildcards.seed}"
)
FOLDER = RUNS + "/features/{backbone}/{dataset}/{split}-{n_train}-{n_test}-seed{seed}"
CODE_OF_FEATURES = [path for path in CODE if path.stem not in AFTER_FEATURES]

wildcard_constraints:
    dataset="[^/]+", split="train|test", n_train=r"\d+", n_test=r"\d+", seed=r"\d+", names="[a-z+]+", slug=r"\d\d_\w+",
    part=r"\d+", parts=r"\d+"


rule shard:  # one of several jobs that fill different rows of one store
    input: CODE_OF_FEATURES
    output: touch(FOLDER + "/{names}.{part}-of-{parts}.done")
    params: names=lambda wc: wc.names.replace("+", " ")
    threads: THREADS
    resources: gpu=GPU, mem_mb=lambda wc, attempt: MEMORY * attempt, runtime=lambda wc, attempt: MINUTES * attempt
    shell: EXTRACT + " --shard {wildcards.part}/{wildcards.parts}"


rule features:  # all rows; after its shards it finds them there, and reads every checksum
    input: CODE_OF_FEATURES, shards
    output: touch(FOLDER + "/{names}.done")
    params: names=lambda wc: wc.names.replace("+", " ")
    threads: THREADS
    resources: gpu=GPU, mem_mb=lambda wc, attempt: MEMORY * attempt, runtime=lambda wc, attempt: MINUTES * attempt
    shell: EXTRACT


rule notebook:
    input:
        "notebooks/{slug}.ipynb", "requirements.lock", CODE,
        features=lambda wc: [f"{MARKER.format(job)}.done" for job in JOBS[wc.slug]],
        others=lambda wc: [f"{RUNS}/{slug}.ipynb" for slug in SLUGS if slug != SCOREBOARD and wc.slug == SCOREBOARD],
    output: RUNS + "/{slug}.ipynb"
    params: parameters=lambda wc: PARAMETERS[wc.slug]
    threads: lambda wc: THREADS if wc.slug in ALONE or PAPER else 1
    resources:
        gpu=GPU, mem_mb=lambda wc, attempt: MEMORY * attempt, runtime=lambda wc, attempt: 4 * MINUTES * attempt,
        slurm_extra=lambda wc: "--exclusive" if wc.slug in ALONE else ""
    shell: "{sys.executable} -m fungi_core.run {wildcards.slug} --profile {PROFILE} --out {output}"
