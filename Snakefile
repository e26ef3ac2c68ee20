# One batch: features, then every notebook, then the scoreboard.
#     snakemake --cores all --config profile=mini
# Parameters come from the notebooks' own defaults and from notebooks/profiles/PROFILE.yaml. They are job parameters, so
# a changed line of a profile runs again just the notebooks that it concerns.
import sys

sys.path.insert(0, workflow.basedir)
from fungi_core import backbones, datasets, run

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

FEATURES = ["embedding", "kl", "dino", "simclr"]


def groups(backbone):
    """A job starts Python and torch, which takes seconds: as long as the mini extraction itself. So one job makes all
    features of a (backbone, data set, split), but in the paper profile, where each takes hours, each is a job."""
    image = getattr(backbones.spec_of(backbone), "modality", "image") == "image"
    names = [name for name in FEATURES if image or name != "dino"]  # crops are of images alone
    return names if PROFILE == "paper" else ["+".join(names)]


PRESENT = {row["name"] for row in datasets.table() if row["available"]}  # the rest is "not run" in the notebooks
PRESENT |= {name for p in PARAMETERS.values() for name in p.get("backbones", ()) if not backbones.unavailable(name)}

CODE = sorted(Path("fungi_core").glob("*.py"))
# Modules that change no feature; a change in any other runs the features jobs again, which then find their rows stored.
AFTER_FEATURES = {"clustering", "diagram", "evaluate", "explore", "figures", "grids", "iou", "masks", "neighbours", "own",
                  "paper", "pca", "plots", "probe", "protocol", "retrieval", "run", "scenes", "segmentation", "similarity",
                  "site", "studies", "throughput", "tokens"}


def features(slug):
    """Markers of the features that a notebook reads: all that declare backbones, data sets and their sizes."""
    p = PARAMETERS[slug]
    if not {"backbones", "datasets", "n_train", "n_test", "seed"} <= p.keys():
        return []
    return [
        f"{RUNS}/features/{backbone}/{dataset}/{split}-{p['n_train']}-{p['n_test']}-seed{p['seed']}/{group}.done"
        for backbone in p["backbones"] if backbone in PRESENT
        for dataset in p["datasets"] if dataset in PRESENT
        for split in ("train", "test")
        for group in groups(backbone)
    ]


rule all:
    input: expand(RUNS + "/{slug}.ipynb", slug=SLUGS)


rule features:
    input: [path for path in CODE if path.stem not in AFTER_FEATURES]
    output: touch(RUNS + "/features/{backbone}/{dataset}/{split}-{n_train}-{n_test}-seed{seed}/{names}.done")
    wildcard_constraints: dataset="[^/]+", split="train|test", n_train=r"\d+", n_test=r"\d+", seed=r"\d+", names="[a-z+]+"
    params: names=lambda wc: wc.names.replace("+", " ")
    threads: workflow.cores or 1
    shell:
        "{sys.executable} -m fungi_core.extract {wildcards.backbone:q} {wildcards.dataset} {wildcards.split} {params.names}"
        " --n-train {wildcards.n_train} --n-test {wildcards.n_test} --seed {wildcards.seed}"


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
