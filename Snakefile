# One batch: features, then every notebook, then the scoreboard.
#     snakemake --cores all --config profile=mini
# Parameters come from the notebooks' own defaults and from notebooks/profiles/PROFILE.yaml. They are job parameters, so
# a changed line of a profile runs again just the notebooks that it concerns.
import sys

sys.path.insert(0, workflow.basedir)
from fungi_core import datasets, run

workdir: workflow.basedir

PROFILE = config.get("profile", "mini")
RUNS = f"runs/{PROFILE}"
SLUGS = run.notebooks()
PARAMETERS = {slug: run.parameters(slug, PROFILE) for slug in SLUGS}
SCOREBOARD = "19_scoreboard"
ALONE = {"17_throughput"}  # timings: nothing else runs beside these

OBJECTIVES = ["embedding", "kl", "dino", "simclr"]
# A job starts Python and torch, which takes seconds: as long as the mini extraction itself. So one job makes all four
# features of a (backbone, data set, split), but in the paper profile, where each takes hours, each is a job.
GROUPS = OBJECTIVES if PROFILE == "paper" else ["+".join(OBJECTIVES)]
PRESENT = {row["name"] for row in datasets.table() if row["available"]}  # the rest is "not run" in the notebooks

CODE = sorted(Path("fungi_core").glob("*.py"))
AFTER_FEATURES = {"evaluate", "figures", "paper", "pca", "plots", "run", "similarity"}  # cannot change a feature


def features(slug):
    """Markers of the features that a notebook reads: all that declare backbones, data sets and their sizes."""
    p = PARAMETERS[slug]
    if not {"backbones", "datasets", "n_train", "n_test", "seed"} <= p.keys():
        return []
    return [
        f"{RUNS}/features/{backbone}/{dataset}/{split}-n{p['n_' + split]}-seed{p['seed']}/{group}.done"
        for backbone in p["backbones"]
        for dataset in p["datasets"] if dataset in PRESENT
        for split in ("train", "test")
        for group in GROUPS
    ]


rule all:
    input: expand(RUNS + "/{slug}.ipynb", slug=SLUGS)


rule features:
    input: [path for path in CODE if path.stem not in AFTER_FEATURES]
    output: touch(RUNS + "/features/{backbone}/{dataset}/{split}-n{limit}-seed{seed}/{objectives}.done")
    wildcard_constraints: dataset="[^/]+", split="train|test", limit=r"\d+", seed=r"\d+", objectives="[a-z+]+"
    params: objectives=lambda wc: wc.objectives.replace("+", " ")
    threads: workflow.cores or 1
    shell:
        "{sys.executable} -m fungi_core.extract {wildcards.backbone:q} {wildcards.dataset} {wildcards.split}"
        " {params.objectives} --limit {wildcards.limit} --seed {wildcards.seed}"


rule notebook:
    input:
        "notebooks/{slug}.ipynb", "requirements.lock", CODE,
        features=lambda wc: features(wc.slug),
        others=lambda wc: [f"{RUNS}/{slug}.ipynb" for slug in SLUGS if slug != SCOREBOARD and wc.slug == SCOREBOARD],
    output: RUNS + "/{slug}.ipynb"
    wildcard_constraints: slug=r"\d\d_\w+"
    params: parameters=lambda wc: PARAMETERS[wc.slug]
    threads: lambda wc: (workflow.cores or 1) if wc.slug in ALONE else 1
    shell: "{sys.executable} -m fungi_core.run {wildcards.slug} --profile {PROFILE} --out {output}"
