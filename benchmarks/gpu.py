"""All that only a card can show, in one command of a few minutes: is it right, and how fast?

    python benchmarks/gpu.py [--backbone random:vit_base_patch16_224] [--out FILE]
    python benchmarks/gpu.py --dry [--out FILE]

It runs the tests marked ``cuda``; compares the Triton kernel with its twin in torch, crops and
patches made on the card with PIL's, and bf16 features with float32 ones; then it times the kernel,
the features and `fungivision` 0.0.2 (where the extra ``test`` is installed). Targets are those of
the project's tests and of its design (speeds as shares of a floor measured in the same run); a
missed one is shown, and a case that fails does not stop the others. Without ``--out`` the record
goes to ``benchmarks/results/gpu_NAME.json``.

``--dry`` goes through every case on the CPU, tiny, with Triton's interpreter, and writes no record
unless ``--out`` names a file. Exit status 1 where a case failed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Nothing of the project need be installed, here or in the processes that this one starts.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, f"{sys.path[0]}/notebooks")
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
if "--dry" in sys.argv:  # read when a kernel is defined: before fungi_core is imported
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pandas as pd
import run
import torch
import torch.nn.functional as F
from PIL import Image

from companion import paths, provenance, throughput
from companion.data import datasets
from companion.figures import style
from fungi_core import kernels, load, tokens
from fungi_core.inputs import one_line
from fungi_core.projection import sign_bits
from fungi_core.resampling import crops_on
from fungi_core.rows import draw_parts
from fungi_core.views import Crops, ImageInputs, Patches, crop_boxes

SECONDS = 300  # no case starts later
# Targets of the project's design: ratios to the floor, stock / views, and patches' projections as a
# share of the card's matrix rate. Those of its tests: the kernel's difference to its twin.
RATIO = {"kl": "ratio >= 1", "dino": "ratio >= 0.95", "simclr": "ratio >= 0.95"}
SHARE = "share >= 0.6"
OFF = {torch.float32: "difference <= 1e-5", torch.bfloat16: "difference <= 1e-2"}
Rows = Iterator[dict]


@dataclass(frozen=True)
class Plan:
    """Say how large the cases are; defaults are a card's."""

    backbone: str
    device: str = "cuda"
    widths: tuple[int, ...] = (192, 384, 768)  # ViT-Ti, ViT-S, ViT-B
    images: int = 256  # whose gradients are projected at once
    tokens: int = 1024  # patches of an image whose gradients are projected
    side: int = 8192  # of the plain matrix product
    views: int = 392  # in a timed call
    repeats: int = 10
    patch_size: int = 512  # px, of the images that get a feature for every patch
    patch_images: int = 8
    trained: str = "vit_micro.sup_tin100"  # committed weights, for what values decide
    photographs: int = 64


DRY = Plan("random:test_vit", "cpu", (16,), 4, 8, 128, 4, 1, 64, 2, photographs=4)


class Skipped(Exception):
    """Say why a case cannot run here."""


def judged(row: dict, *targets: str) -> dict:
    """Return a row with its targets, such as "share >= 0.6", and whether all of them are met."""
    parts = [target.split() for target in targets]
    met = [row[x] >= float(y) if sign == ">=" else row[x] <= float(y) for x, sign, y in parts]
    return row | {"target": ", ".join(targets), "met": all(met)}


def cuda_tests(plan: Plan) -> Rows:
    """Run the tests that need a card in a process of their own."""
    if plan.device == "cpu":
        raise Skipped("no CUDA device is used")
    files = sorted((paths.ROOT / "tests").glob("test_*.py"))
    yield (found := outcomes([file for file in files if "mark.cuda" in file.read_text()]))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} tests failed")


def outcomes(files: Sequence[Path]) -> dict:
    """Return how many tests marked ``cuda`` passed, were skipped and failed, and which failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "cuda", "-p", "no:cacheprovider"]
    command += map(str, files)
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=240)
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    failing = re.findall(r"^(?:FAILED|ERROR) (?:.*::)?(\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not failing:
        raise RuntimeError(f"pytest: {last}")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", last)}
    counts = {"passed": 0, "skipped": 0} | counts
    return counts | {"failed": len(failing), "failing": "; ".join(failing)}


def kernel(plan: Plan) -> Rows:
    """Time the Triton kernel beside its twin and a plain matrix product of the same dtype.

    Its shapes are gradients of images, (images, 1) x (images, D * (D + 1)), and those of patches,
    (tokens, D) x (tokens, D + 1), each to D rows. ``first_seconds`` holds the compilation, unless
    Triton has kept it from an earlier run.
    """
    if kernels.triton is None:
        raise Skipped("Triton has no build for this platform")
    for dtype in OFF:
        matrix = run.matrix_flops(plan.device, dtype, plan.repeats, plan.side)
        for width in plan.widths:
            for shape in ((plan.images, 1, width * (width + 1)), (plan.tokens, width, width + 1)):
                row = one_shape(plan, dtype, shape, width)
                row |= {"matrix_gflops": matrix / 1e9, "share": row["gflops"] * 1e9 / matrix}
                fast = [SHARE] if dtype == torch.bfloat16 and shape[1] > 1 else []
                yield judged(row, OFF[dtype], *fast)


def one_shape(plan: Plan, dtype: torch.dtype, shape: tuple[int, int, int], rows: int) -> dict:
    """Return speeds of the kernel and its twin in GFLOP/s, and their relative difference."""
    count, d_out, d_in = shape
    rng = torch.Generator().manual_seed(0)
    d, a = (torch.randn(count, n, generator=rng).to(plan.device, dtype) for n in (d_out, d_in))
    bits = torch.from_numpy(sign_bits(rows, d_out * d_in, "benchmark")).to(plan.device)
    ours = lambda: kernels.project_tokens_triton(d, a, bits)
    twin = lambda: kernels.project_tokens_torch(d, a, bits)
    first, (found, expected) = throughput.seconds(ours, plan.device), (ours(), twin())
    gflop = 2 * count * d_out * d_in * rows / 1e9
    speed = [gflop / run.per_call(call, plan.device, plan.repeats) for call in (ours, twin)]
    row = {"dtype": str(dtype).removeprefix("torch."), "shape": f"{shape} -> {rows}"}
    row |= {"first_seconds": first, "gflops": speed[0], "twin_gflops": speed[1]}
    return row | {"difference": ((found - expected).norm() / expected.norm()).item()}


def views(plan: Plan) -> Rows:
    """Compare crops and patches made on the device with PIL's, in units of 1/255."""
    size, rng, kind = 96 if plan.device == "cpu" else 224, np.random.default_rng(0), Crops()
    scales = [kind.global_scale] * kind.global_count + [kind.local_scale] * kind.local_count
    made = []
    for width, height in ((500, 375), (90, 70), (size, size)):
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
        boxes = crop_boxes(width, height, np.array(scales), rng)
        made.append(("crops", image, boxes, crops_on(plan.device, image, size, boxes)))
    takes, side, step = ImageInputs(size, (0.0,) * 3, (1.0,) * 3), size // 2, size // 12
    pixels = torch.from_numpy(np.array(image))[None, None].to(plan.device)  # (1, 1, s, s, 3)
    (found,) = Patches().finish(pixels, takes, torch.float32)  # (49, 3, s, s)
    found = found.mul(255).round().clamp(0, 255).permute(0, 2, 3, 1)
    corners = [(j * step, i * step) for i in range(7) for j in range(7)]  # row by row
    made.append(("patches", image, [(x, y, x + side, y + side) for x, y in corners], found))
    for name, image, boxes, found in made:
        cut = [image.crop(tuple(map(int, box))) for box in boxes]
        pil = np.stack([np.asarray(one.resize((size, size), Image.BICUBIC), int) for one in cut])
        off = np.abs(found.cpu().numpy().astype(int) - pil)
        row = {"views": name, "image": "{} x {}".format(*image.size)}
        row |= {"largest": int(off.max()), "mean": float(off.mean())}
        yield judged(row, "largest <= 2", "mean <= 0.35") if name == "crops" else row


def precision(plan: Plan) -> Rows:
    """Compare bf16 features with float32 ones by their cosine, on photographs and real weights."""
    photographs = datasets.load("photos", "test", limit=plan.photographs)
    where = {"device": plan.device, "dtype": "bfloat16"}
    for row in throughput.precision(plan.trained, photographs, **where).to_dict("records"):
        yield judged(row, "mean >= 0.98") if row["features"] == "K" else row  # as notebook 17


def speed(plan: Plan) -> Rows:
    """Time the embedding and the features of whole images, with peak memory beyond the weights.

    ``ratio``: to the floor, which is stock over the number of views.
    """
    encoder = load(plan.backbone, device=plan.device)
    model, size = throughput.plain_model(encoder), encoder.inputs.size
    x = torch.zeros(plan.views, 3, size, size, device=plan.device, dtype=encoder.dtype)
    table = throughput.measure(encoder, views_a_call=plan.views, repeats=plan.repeats)
    memory = peak_memory(torch.inference_mode()(lambda: model(x)), plan.device)
    row = {"features": "stock embedding", "views": 1, "peak_mib": memory}
    yield row | {"images_per_second": table["floor"][0]}  # KL's, which has one view
    for objective, found in zip(throughput.OBJECTIVES, table.to_dict("records"), strict=True):
        images = max(1, round(plan.views / found["views"]))
        call = throughput.feature(encoder, objective, images, 0)
        call()  # what stays, such as the signs, is in use from now on
        row = {"features": objective.name, "views": found["views"]}
        row |= {"images_per_second": found["value"], "ratio": found["ratio"]}
        row |= {"peak_mib": peak_memory(call, plan.device)}
        yield judged(row, RATIO[objective.name])


def peak_memory(call, device: str) -> float | None:
    """Return the MiB that a call took on a card beyond what was in use; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def patches(plan: Plan) -> Rows:
    """Time a feature for every patch against the forward pass, and the projection alone."""
    small = load(plan.backbone, device=plan.device)
    encoder, rng = small.at_size(plan.patch_size), torch.Generator().manual_seed(0)
    shape = (plan.patch_images, plan.patch_size, plan.patch_size, 3)
    images = list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    x = torch.randn(shape[0], 3, *shape[1:3], generator=rng).to(encoder.device, encoder.dtype)
    support = torch.randn(10_000, encoder.width, generator=rng).to(encoder.device)
    support, loss = F.normalize(support, dim=-1), tokens.LOSS
    part, ids = draw_parts(encoder, loss, 0), [str(i) for i in range(len(images))]
    stock = torch.inference_mode()(lambda: encoder.model(x))
    ours = lambda: tokens.unit_gradients(encoder, images, ids, support, [(loss, part, 0)])
    seconds = [run.per_call(call, plan.device, plan.repeats) for call in (stock, ours)]
    for name, call, spent in zip(("stock embedding", "every patch"), (stock, ours), seconds):
        row = {"features": name, "images_per_second": len(images) / spent}
        row |= {"share_of_stock": seconds[0] / spent}
        yield row | {"peak_mib": peak_memory(call, plan.device)}
    found = run.per_token(small, plan.repeats, plan.tokens, plan.side)
    row = {"features": f"projection of {plan.tokens} patches", "gflops": found["flops"] / 1e9}
    yield judged(row | {"share": found["share"]}, SHARE)


def published(plan: Plan) -> Rows:
    """Time both libraries from decoded images to projected gradients; peak memory with weights."""
    if not importlib.util.find_spec("fungivision"):
        raise Skipped("fungivision 0.0.2 (the extra 'test') is not installed")
    apart = {}
    if plan.device == "cpu":  # a dry run has no time for processes
        apart = {"measure": partial(run.measured, negatives=49), "repeats": 1}
    for name, pair in run.against_published(plan.backbone, plan.device, **apart).items():
        row = {"features": name, "ratio": pair["ratio"]}
        for which in ("ours", "published"):
            row[f"{which}_images_per_second"] = pair[which]["images_per_second"]
            row[f"{which}_peak_mib"] = pair[which]["peak_bytes"] / 2**20
        yield row


CASES = (cuda_tests, kernel, views, precision, speed, patches, published)


def measure(plan: Plan, keep: Callable[[list[dict]], None] = lambda cases: None) -> list[dict]:
    """Run and print every case: its name, status ("ran" or why not), seconds and rows. ``keep``
    gets those so far after each: a killed run has them.
    """
    started, done = time.perf_counter(), []
    for case in CASES:
        since, rows, status = time.perf_counter(), [], "ran"
        try:
            if since - started > SECONDS:
                raise Skipped(f"{SECONDS} s have passed")
            torch.cuda.empty_cache()  # a case's own processes need the card's memory
            rows.extend(case(plan))
        except Skipped as why:
            status = f"skipped: {why}"
        except (Exception, SystemExit) as error:
            status = f"failed: {type(error).__name__}: {one_line(error)}"
        spent = round(time.perf_counter() - since, 1)
        done.append({"case": case.__name__, "status": status, "seconds": spent, "rows": rows})
        print(f"\n{case.__name__}: {status} ({spent} s)", flush=True)
        if rows:
            table = pd.DataFrame(rows)
            print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
        keep(done)
    return done


def card(device: str) -> dict:
    """Return the card and its driver, and the versions that compile for it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    there = shutil.which("nvidia-smi")
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if there else []
    found = {"properties": str(torch.cuda.get_device_properties(device)), "driver": driver[:1]}
    return found | {"cuda": torch.version.cuda, "triton": provenance.version("triton")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="random:vit_base_patch16_224")
    parser.add_argument("--dry", action="store_true", help="every case on the CPU, tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --dry goes through every case on the CPU")
    plan, out, started = DRY if args.dry else Plan(args.backbone), args.out, time.time()
    if args.dry:
        print("a dry run on the CPU: its speeds say nothing of a card")
    elif out is None:
        name = re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name(plan.device).lower())
        out = Path(__file__).parent / "results" / f"gpu_{name.strip('_')}.json"

    def keep(cases: list[dict]) -> None:
        if out is None:
            return
        settings = vars(plan) | {"dry": args.dry}
        record = provenance.provenance("benchmarks/gpu.py", settings | {"seed": 0}, started=started)
        record |= {"date": time.strftime("%Y-%m-%d", time.gmtime(started))}
        record |= {"card": None if args.dry else card(plan.device), "cases": cases}
        out.parent.mkdir(parents=True, exist_ok=True)
        style.write(out, (json.dumps(record, indent=1) + "\n").encode())

    cases = measure(plan, keep)
    sys.exit(any(case["status"].startswith("failed") for case in cases))


if __name__ == "__main__":
    main()
