"""Objectives beyond the paper's three, as examples of extending, and all of them by name.

DeepCluster and iBOT are compared in Fig. 10; masked words are the paper's future work for text;
`FullAugmentation` is the right half of Table 15.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from sklearn.cluster import KMeans
from torchvision.transforms.v2 import functional as TF

from companion.messages import require
from fungi_core import DINO, KL, SimCLR, audio, text
from fungi_core.gradients import factors_at, tapped
from fungi_core.inputs import Views
from fungi_core.objectives import Heads, Objective, head_latents, linear_head
from fungi_core.views import Crops

# DINO's odds by place: first global crop, other global crops, local crops.
BLUR, SOLARIZE = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)


@dataclass(frozen=True)
class FullAugmentation(Crops):
    """Take DINO's crops with the rest of its policy: flips, colour changes, blur (Table 15)."""

    def augment(self, cut: list[Image.Image], rng: np.random.Generator) -> list[Image.Image]:
        """Return the distorted crops."""
        places = [0] + [1] * (self.global_count - 1) + [2] * self.local_count
        return [distort(view, place, rng) for view, place in zip(cut, places, strict=True)]


def distort(view: Image.Image, place: int, rng: np.random.Generator) -> Image.Image:
    """Flip, jitter in random order, turn grey, blur and solarise a crop, each at random.

    Odds and ranges are those of DINO's main_dino.py; its blur radii of 0.1 to 2 px belong to 224 px
    and scale with the view's size. Every number is drawn each time, so that no step moves
    another's.
    """
    odds = (0.5, 0.8, 0.2, BLUR[place], SOLARIZE[place])
    flip, jitter, grey, blur, solarize = rng.random(5) < odds
    # brightness, contrast, saturation, hue
    amounts = rng.uniform((0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1))
    order, radius = rng.permutation(4), rng.uniform(0.1, 2.0) * view.width / 224
    view = TF.horizontal_flip(view) if flip else view
    steps = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in order if jitter else ():
        view = steps[i](view, float(amounts[i]))
    view = TF.rgb_to_grayscale(view, num_output_channels=3) if grey else view
    view = view.filter(ImageFilter.GaussianBlur(radius)) if blur else view
    return ImageOps.solarize(view) if solarize else view


@dataclass(frozen=True)
class DeepCluster(Objective):
    """Describe crops that predict the k-means cluster of one of them (Fig. 10; Caron et al. 2018).

    The paper prints no settings; these are its published script's, which follows DeepCluster-v2
    (Caron et al. 2020): crops without colour change, a bias-free projection with rows of unit
    length on the embedding as it is, unit latents, three clusterings whose centroids are the
    classifier, temperature 0.1. Ours: k-means is scikit-learn's and its centroids are normalised,
    and there is at most one cluster for ``images_per_cluster`` training images, because the
    script's 3,000 clusters are more than a small training split has images.
    """

    views: Crops = Crops(2, 6, global_scale=(0.14, 1.0), local_scale=(0.05, 0.14))
    temperature: float = 0.1
    dim: int = 128
    clusters: int = 3000
    clusterings: int = 3
    images_per_cluster: int = 10
    name: ClassVar[str] = "deepcluster"
    negatives: ClassVar[int] = sys.maxsize  # every training image is clustered

    @property
    def negative_views(self) -> int:
        """Return the number of global crops: no local crop is clustered."""
        return self.views.global_count

    def heads(self, backbone, generator: np.random.Generator) -> Heads:
        """Draw the projection."""
        drawn = linear_head(backbone.width, self.dim, generator)
        return {"weight": F.normalize(drawn["weight"], dim=-1)}

    def latents(self, embeddings: torch.Tensor, heads: Heads) -> torch.Tensor:
        """Map embeddings (..., D) to latents (..., C) of unit length."""
        return F.normalize(F.linear(embeddings, heads["weight"]), dim=-1)

    def loss(self, embeddings, heads, negatives=None) -> torch.Tensor:
        """Return DeepCluster-v2's cross-entropy of each sample, (B,).

        ``negatives`` are `memory`'s centroids; raises ValueError without. Clustering h takes as its
        target the centroid nearest to global crop h mod their number, without gradient; each crop
        predicts it. The mean is over crops and clusterings.
        """
        if negatives is None:
            raise ValueError("DeepCluster needs centroids (clusterings * K, dim), see memory")
        centroids = negatives.unflatten(0, (self.clusterings, -1))  # (H, K, C)
        latents = self.latents(embeddings, heads)
        scores = torch.einsum("bvc,hkc->bhvk", latents, centroids)  # (B, H, V, K)
        clustering = torch.arange(self.clusterings, device=latents.device)
        targets = scores[:, clustering, clustering % self.views.global_count].argmax(-1)  # (B, H)
        log_probabilities = F.log_softmax(scores / self.temperature, dim=-1)
        targets = targets[:, :, None, None].expand(-1, -1, latents.shape[1], 1)  # (B, H, V, 1)
        return -log_probabilities.gather(-1, targets).mean((1, 2, 3))

    def memory(self, latents: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Return centroids of the training images' latents (N, V, C), (clusterings * K, C)."""
        count = max(1, min(self.clusters, len(latents) // self.images_per_cluster))
        found = []
        for h in range(self.clusterings):
            crop = latents[:, h % self.views.global_count].cpu().numpy()
            state = int(generator.integers(2**31))
            means = KMeans(count, n_init=1, random_state=state).fit(crop).cluster_centers_
            found.append(F.normalize(torch.from_numpy(means), dim=-1))
        return torch.cat(found)


@dataclass(frozen=True)
class IBOT(Objective):
    """Describe DINO between crops with masked patches to predict (Fig. 10; Zhou et al. 2022).

    The paper prints no settings and its published scripts hold no iBOT. Crops, head size and
    temperatures are those of its DINO; from iBOT's own code: one head for class and patch tokens,
    the same crop is no pair, means instead of sums, and a mean mask ratio of 0.3. Ours: the masked
    patches are drawn one by one, not in blocks, once for a seed and not for each image, so that two
    images' gradients do not differ by their masks; a frozen network has no mask token, so they show
    the mean colour (zero after normalisation).
    """

    views: Crops = Crops()
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    dim: int = 2048
    mask_ratio: float = 0.3
    name: ClassVar[str] = "ibot"

    def heads(self, backbone, generator: np.random.Generator) -> Heads:
        """Draw student and teacher head, and the masks (global crops, patches) bool."""
        drawn = DINO(dim=self.dim).heads(backbone, generator)
        crops, patches = self.views.global_count, patch_count(backbone)
        order = generator.random((crops, patches)).argsort(1)
        masked = order.argsort(1) < max(1, round(self.mask_ratio * patches))
        return drawn | {"masks": torch.from_numpy(masked)}

    def factors(self, backbone, batch, heads, negatives, layers):
        """Return all tokens and their factors: the loss reads tokens of masked and whole crops."""
        masked, model = masked_crops(batch, heads["masks"]), backbone.model
        loss = lambda tokens: self.loss(tokens, heads)
        seen, taps = tapped(model, partial(class_and_patches, model), masked, layers)
        return seen.detach(), factors_at(seen, taps, loss)

    def loss(self, embeddings, heads, negatives=None) -> torch.Tensor:
        """Return the loss of each sample, (B,), from tokens (B, V + G, 1 + patches, D).

        Class tokens come first; the V student views, masked global crops first, are followed by the
        G global crops whole. Class tokens of different crops and masked patches have means of the
        same weight (iBOT's lambda 1 = lambda 2 = 1); no centring.
        """
        last, masks = self.views.global_count, heads["masks"]
        logits, patches = [], []  # of student and teacher: (B, V or G, C), (B, G, M, C)
        for tokens, prefix in ((embeddings[:, :-last], ""), (embeddings[:, -last:], "teacher_")):
            hidden = torch.stack([tokens[:, i, 1:][:, mask] for i, mask in enumerate(masks)], 1)
            logits.append(head_latents(tokens[:, :, 0], heads, True, prefix))
            patches.append(head_latents(hidden, heads, True, prefix))
        soft = lambda z: F.softmax(z.detach() / self.teacher_temperature, dim=-1)
        log_soft = lambda z: F.log_softmax(z / self.student_temperature, dim=-1)
        among = -soft(logits[1]) @ log_soft(logits[0]).transpose(1, 2)  # (B, G, V)
        other = 1 - torch.eye(*among.shape[1:], device=among.device)  # a crop is not its own target
        image = (among * other).sum((1, 2)) / other.sum()
        return image - (soft(patches[1]) * log_soft(patches[0])).sum(-1).mean((1, 2))


def patch_count(backbone) -> int:
    """Return the number of patch tokens of an image; raises ValueError where iBOT cannot read."""
    model = backbone.model
    count = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    token = getattr(model, "global_pool", "") == "token" and model.num_prefix_tokens
    if not token or count != math.isqrt(count) ** 2:
        needs = "iBOT needs both"
        raise ValueError(f"{backbone.name} has no class token or no square of patches; {needs}")
    return count


def class_and_patches(model, views: torch.Tensor) -> torch.Tensor:
    """Return class token and patch tokens behind the final norm, (N, 3, s, s) -> (N, 1 + T, D)."""
    x = model.forward_features(views)  # (N, class token and registers, patches, D)
    return torch.cat([x[:, :1], x[:, model.num_prefix_tokens :]], 1)


def masked_crops(views: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return global crops without their masked patches, local crops, then the global crops whole.

    ``views``: (B, V, 3, s, s), normalised, G global crops first; ``masks``: (G, T) bool, T patches
    row by row. Masked patches become zero, the mean colour. Returns (B, V + G, 3, s, s).
    """
    crops, side = len(masks), math.isqrt(masks.shape[1])
    keep = (~masks).reshape(crops, 1, side, side).to(views.dtype)
    keep = F.interpolate(keep, views.shape[-1])  # (G, 1, s, s), each patch in one value
    whole = views[:, :crops]
    return torch.cat([whole * keep, views[:, crops:], whole], 1)


@dataclass(frozen=True)
class MaskedCopies(Views):
    """Take copies of a text, each with some tokens behind the mask token, at least one.

    A batch is (B, V, 3, T): ids, attention mask, and the token behind each mask, elsewhere -1.
    """

    copies: int = 4
    ratio: float = 0.15
    of: ClassVar[str] = "text"

    def count(self, inputs: text.TextInputs) -> int:
        """Return the number of copies of a text."""
        return self.copies

    def draw(self, item: str, inputs: text.TextInputs, rng, device: str) -> np.ndarray:
        """Return the copies of one text, (V, 3, T) int64; special tokens are never hidden."""
        tokenizer = inputs.tokenizer
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token; masked words need one")
        ids = inputs.tokens([item])[0, 0]  # (T,)
        special = np.isin(ids, tokenizer.all_special_ids)
        chance = np.where(special, 2.0, rng.random((self.copies, len(ids))))
        # The lowest one is always below, so a special token is hidden in a text of nothing else.
        chosen = chance < np.maximum(self.ratio, chance.min(1, keepdims=True) + 1e-9)
        hidden = np.where(chosen, tokenizer.mask_token_id, ids)
        return np.stack([hidden, np.ones_like(chosen, int), np.where(chosen, ids, -1)], 1)


@dataclass(frozen=True)
class MaskedWords(Objective):
    """Describe masked language modelling of texts (ours), after BERT (Devlin et al. 2018).

    The head is the encoder's own table of word embeddings, as BERT's is tied to it, without BERT's
    transform in front of it, which sentence encoders do not keep. Only the masks are random.
    """

    views: MaskedCopies = MaskedCopies()
    name: ClassVar[str] = "mlm"

    def heads(self, backbone, generator: np.random.Generator) -> Heads:
        """Return the table of word embeddings, (words, D)."""
        return {"table": backbone.model.get_input_embeddings().weight.float()}

    def factors(self, backbone, batch, heads, negatives, layers):
        """Return all tokens and their factors: the loss reads the tokens behind the masks."""
        model, loss = backbone.model, lambda tokens: self.loss(tokens, heads, batch[:, :, 2])
        seen, taps = tapped(model, partial(text.hidden, model), batch, layers)
        return seen.detach(), factors_at(seen, taps, loss)

    def loss(self, embeddings, heads, negatives=None) -> torch.Tensor:
        """Return the mean cross-entropy of the hidden tokens, (B,).

        ``embeddings``: final latents of the copies, (B, V, T, D); ``negatives``: the token behind
        each mask, -1 where nothing is hidden, (B, V, T). Logits are made for hidden tokens alone,
        15 % of (B, V, T, words).
        """
        hidden = negatives >= 0
        logits = embeddings[hidden] @ heads["table"].T  # (hidden tokens, words)
        losses = F.cross_entropy(logits, negatives[hidden], reduction="none")
        total = torch.zeros(len(hidden), dtype=losses.dtype, device=losses.device)
        return total.index_add(0, hidden.nonzero()[:, 0], losses) / hidden.sum((1, 2))


PAPER = {  # the paper's settings by kind of input: Table 17, Table 19, Table 12; and ours
    "image": (KL(), DINO(), SimCLR(), DeepCluster(), IBOT()),
    "text": (KL(), text.SIMCLR, MaskedWords()),
    "audio": (KL(), audio.SIMCLR),
}


def named(objective: str | Objective, backbone) -> Objective:
    """Return an objective by its name, with the paper's settings for what the backbone reads.

    An objective is returned as it is. Raises ValueError for unknown names.
    """
    if isinstance(objective, Objective):
        return objective
    known = {one.name: one for one in PAPER[backbone.inputs.kind]}
    require(f"{backbone.inputs.kind} objective", objective, known)
    return known[objective]
