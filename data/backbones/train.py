"""Train the mini backbones from scratch on the 100 classes of Tiny-ImageNet.

    FUNGI_DATA=... python data/backbones/train.py vit_mini.sup_tin100 [--epochs 24] [--seed 0]

Writes ``<name>.safetensors`` (fp16) and ``<name>.json`` (recipe, curve, time, machine) beside this
file. Two recipes: ``sup`` is cross-entropy with label smoothing; ``simclr`` is NT-Xent on two
crops, no labels. Both use random resized crops, flips and colour changes, Muon for the blocks'
matrices and AdamW for the rest on one-cycle schedules, and bf16 autocast with unfused attention (on
CPUs the fused kernel's backward is the slower one).
"""

import argparse
import io
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import timm.layers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

HERE = Path(__file__).resolve().parent
MEAN, STD = 0.5, 0.25
MINI = {  # 64 px, patch 8: arguments of timm's ViT-Ti
    "vit_mini": dict(img_size=64, patch_size=8, embed_dim=192, depth=9, num_heads=3),
    "vit_micro": dict(img_size=64, patch_size=8, embed_dim=128, depth=6, num_heads=2),
}
# patch_drop: share of tokens dropped until `full_from` of the steps; after that the training sees
# whole images
RECIPES = {
    "vit_mini.sup_tin100": dict(
        epochs=24, batch=256, lr=1.5e-3, weight_decay=0.05, patch_drop=0.5, full_from=0.7
    ),
    "vit_micro.sup_tin100": dict(
        epochs=12, batch=256, lr=2e-3, weight_decay=0.05, patch_drop=0.25, full_from=0.7
    ),
    "vit_mini.simclr_tin100": dict(
        epochs=5, batch=512, lr=1.5e-3, weight_decay=0.05, patch_drop=0.5, full_from=0.9
    ),
}


def load_images(folder: Path):
    """uint8 tensors (N, 3, 64, 64) and int64 labels (N,) of the train and validation split."""
    with np.load(folder / "tiny_imagenet_100a.npz") as packed:
        blob, offsets = packed["data"], packed["offsets"]
        labels, split = packed["labels"].astype(np.int64), packed["split"]
    images = np.empty((len(labels), 3, 64, 64), np.uint8)
    for i in range(len(labels)):
        with Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())) as image:
            images[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    return [
        (images[torch.from_numpy(split == s)], labels[torch.from_numpy(split == s)]) for s in (0, 1)
    ]


def normalize(images):
    return (images.float() / 255 - MEAN) / STD


def augment(images, generator, min_scale, jitter):
    """Random resized crop, flip and colour changes, one draw per image. (B, 3, H, W) uint8 ->
    float, normalised.
    """
    batch = len(images)
    uniform = lambda low, high, *shape: (
        low + (high - low) * torch.rand(batch, *shape, generator=generator)
    )
    area = uniform(min_scale, 1.0)
    aspect = torch.exp(uniform(-0.288, 0.288))  # in [3/4, 4/3]
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    out = F.grid_sample(normalize(images), grid, padding_mode="reflection", align_corners=False)
    gray = out.mean(1, keepdim=True)
    saturation = uniform(1 - jitter, 1 + jitter, 1, 1, 1)
    if jitter > 0.3:  # the contrastive recipe also drops colour altogether for one image in five
        saturation = torch.where(uniform(0, 1, 1, 1, 1) < 0.2, 0.0, saturation)
    out = gray + (out - gray) * saturation
    mean = out.mean((1, 2, 3), keepdim=True)
    out = mean + (out - mean) * uniform(1 - jitter, 1 + jitter, 1, 1, 1)  # contrast
    brightness, gain = uniform(-jitter, jitter, 1, 1, 1), uniform(-jitter, jitter, 3, 1, 1) / 2
    return out + brightness + gain


def cutout(images, generator, size=24):
    """Blank one square of ``size`` pixels per image, in place (value 0 = the mean colour)."""
    side = images.shape[-1]
    corner = torch.randint(0, side - size + 1, (len(images), 2), generator=generator)
    index = torch.arange(side)
    inside = (index >= corner[..., None]) & (index < corner[..., None] + size)  # (B, 2, side)
    return images.mul_((~(inside[:, 0, :, None] & inside[:, 1, None, :]))[:, None].to(images.dtype))


def supervised_loss(forward, model, images, labels, generator):
    logits = forward(cutout(augment(images, generator, 0.35, 0.2), generator))
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


def simclr_loss(forward, model, images, labels, generator, temperature=0.2):
    views = torch.cat([augment(images, generator, 0.2, 0.4) for _ in range(2)])
    z = F.normalize(forward(views).float(), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-1e9)
    half = len(images)
    positive = torch.arange(2 * half).roll(half)  # the other crop of the same image
    return F.cross_entropy(similarity, positive)


@torch.no_grad()
def embed(model, images):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = [
            model.forward_head(model.forward_features(normalize(x)), pre_logits=True).float()
            for x in images.split(500)
        ]
    model.train()
    return torch.cat(out)


@torch.no_grad()
def knn_accuracy(model, train, test, k=20):
    """Percent correct of cosine k-nearest neighbours, every fourth training image as the memory
    bank.
    """
    bank, query = (F.normalize(embed(model, x), dim=1) for x in (train[0][::4], test[0]))
    votes = train[1][::4][(query @ bank.T).topk(k).indices]
    return 100 * (F.one_hot(votes).sum(1).argmax(1) == test[1]).float().mean().item()


@torch.no_grad()
def top1(model, test):
    head = model.head(embed(model, test[0]))
    return 100 * (head.argmax(1) == test[1]).float().mean().item()


def build(name, recipe):
    """Return the trunk and the network that is trained: the trunk itself or with a projector."""
    supervised, architecture = ".sup_" in name, MINI[name.split(".")[0]]
    model = VisionTransformer(
        **architecture, num_classes=100 if supervised else 0, patch_drop_rate=recipe["patch_drop"]
    )
    if supervised:
        return model, model
    hidden, out = torch.nn.Linear(architecture["embed_dim"], 512), torch.nn.Linear(512, 128)
    return model, torch.nn.Sequential(model, torch.nn.Sequential(hidden, torch.nn.GELU(), out))


def optimise(model, network, recipe, steps):
    """Return pairs of optimiser and schedule: Muon for the blocks' matrices, AdamW for the rest."""
    rate = recipe["lr"]
    blocks = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if not any(p is q for q in blocks)]
    options = dict(weight_decay=recipe["weight_decay"], adjust_lr_fn="match_rms_adamw")
    optimizers = [
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        torch.optim.Muon(blocks, lr=rate, **options),
    ]
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    return [
        (each, one_cycle(each, rate, steps, pct_start=0.15, cycle_momentum=False))
        for each in optimizers
    ]


def fit(name, recipe, train, test, seed, compiled):
    """Train one backbone; return the trunk and its curve, a row for each epoch."""
    torch.manual_seed(seed)  # only weights and patch dropout use the global generator
    generator = torch.Generator().manual_seed(seed)
    model, network = build(name, recipe)
    forward = torch.compile(network) if compiled else network
    per_epoch = len(train[0]) // recipe["batch"]
    steps = int(recipe["epochs"] * per_epoch)
    schedules = optimise(model, network, recipe, steps)
    loss_of = supervised_loss if ".sup_" in name else simclr_loss
    start, curve, running = time.time(), [], 0.0
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train[0]), generator=generator)
        if step == int(recipe["full_from"] * steps):
            model.patch_drop.prob = 0.0
            forward = torch.compile(network) if compiled else network
        index = order[(step % per_epoch) * recipe["batch"] :][: recipe["batch"]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(forward, model, train[0][index], train[1][index], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, schedule in schedules:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        running += (loss.item() - running) / (step % per_epoch + 1)
        last = step + 1 == steps
        if last or (step + 1) % per_epoch == 0:
            epoch, minutes = (step + 1) / per_epoch, (time.time() - start) / 60
            row = {
                "epoch": round(epoch, 2),
                "loss": round(running, 4),
                "minutes": round(minutes, 1),
            }
            curve.append(row | scores(name, model, train, test, last or epoch % 5 == 0))
            running = 0.0
            print(json.dumps(curve[-1]), flush=True)
    return model, curve


def scores(name, model, train, test, neighbours):
    """Return the accuracies that are due after an epoch; kNN takes a while."""
    found = {"val_top1": round(top1(model, test), 2)} if ".sup_" in name else {}
    if neighbours:
        found["val_knn20"] = round(knn_accuracy(model, train, test), 2)
    return found


def save(out, name, recipe, seed, model, curve):
    """Write the checkpoint, which describes itself, and its card."""
    architecture = MINI[name.split(".")[0]]
    inputs = {"size": 64, "mean": [MEAN] * 3, "std": [STD] * 3, "crop": 1.0, "mode": "center"}
    metadata = {
        "name": name,
        "seed": str(seed),
        "architecture": "vit_tiny_patch16_224",
        "arguments": json.dumps(architecture),
        "input": json.dumps(inputs | {"interpolation": "bicubic"}),
        "licence": "trained on ImageNet images: non-commercial research",
    }
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / f"{name}.safetensors", metadata=metadata)
    card = dict(
        name=name,
        architecture=architecture,
        recipe=recipe,
        seed=seed,
        curve=curve,
        minutes=curve[-1]["minutes"],
        parameters=sum(p.numel() for p in model.parameters()),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        versions=dict(torch=torch.__version__, timm=timm.__version__),
        data="Tiny-ImageNet, 100 classes, 400 training and 50 validation images a class "
        "(tiny_imagenet_100a.npz)",
        terms="trained on ImageNet images: non-commercial research use",
    )
    (out / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", choices=RECIPES)
    add("--epochs", type=float, help="default: the recipe's")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=HERE)
    add("--compile", action="store_true", help="torch.compile the trunk (needs a C++ compiler)")
    args = parser.parse_args()
    recipe = RECIPES[args.name] | ({"epochs": args.epochs} if args.epochs else {})
    timm.layers.set_fused_attn(False)
    train, test = load_images(Path(os.environ["FUNGI_DATA"]))
    model, curve = fit(args.name, recipe, train, test, args.seed, args.compile)
    save(args.out, args.name, recipe, args.seed, model, curve)


if __name__ == "__main__":
    main()
