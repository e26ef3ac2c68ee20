"""The self-supervised objectives: pure functions from latents to one loss per sample, and their
published settings.

Each loss takes latents of shape (B, V, C) -- B samples, V views, C latent units -- and returns (B,)
in the input's dtype (float32 everywhere in this project). No sample's loss depends on another
sample, so the gradient of the *sum* over the batch is the per-sample gradient. The settings classes
hold the paper's defaults (Table 17) and know their heads: plain dictionaries of tensors that a
caller may replace. An objective with ``negatives`` also keeps a fixed ``reference`` of that many
training images: SimCLR their latents, DeepCluster the centroids of their clusters.
"""

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

Heads = dict[str, torch.Tensor]


def kl_loss(
    latents: torch.Tensor, temperature: float, direction: str = "uniform_latent"
) -> torch.Tensor:
    """KL divergence between softmax(latents / temperature) and the uniform distribution, averaged
    over views.

    ``direction="uniform_latent"`` is KL(U || q), what Algorithm 1 and the published code compute;
    ``"latent_uniform"`` is KL(q || U), as eq. 6 is printed.
    """
    log_q = F.log_softmax(latents / temperature, dim=-1)
    log_u = -math.log(latents.shape[-1])
    if direction == "uniform_latent":
        divergence = log_u - log_q.mean(-1)
    elif direction == "latent_uniform":
        divergence = (log_q.exp() * (log_q - log_u)).sum(-1)
    else:
        raise ValueError(
            f"KL direction {direction!r} is unknown; use 'uniform_latent' (code) or 'latent_uniform' (eq. 6)"
        )
    return divergence.mean(-1)


def dino_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """DINO cross-entropy (eq. 4) summed over all teacher x student pairs, the same view included;
    no centring.

    ``student``: (B, V, C); ``teacher``: (B, G, C), the global views, used without gradient.
    """
    targets = F.softmax(teacher.detach() / teacher_temperature, dim=-1).sum(
        1
    )  # (B, C): the pair sum is separable
    log_probabilities = F.log_softmax(student / student_temperature, dim=-1).sum(1)  # (B, C)
    return -(targets * log_probabilities).sum(-1)


def info_nce(
    positives: torch.Tensor, negatives: torch.Tensor, temperature: float, denominator: str = "eq5"
) -> torch.Tensor:
    """SimCLR's InfoNCE over all ordered pairs of positive views (eq. 5), self-similarity masked.

    ``positives``: (B, V, C), V >= 2; ``negatives``: (M, C), fixed. Both are L2-normalised here
    (cosine similarity). ``denominator="eq5"`` divides every similarity by the temperature;
    ``"published"`` leaves the log-sum-exp unscaled, as the published library and segmentation
    scripts do.
    """
    views = positives.shape[1]
    if views < 2:
        raise ValueError(f"SimCLR needs at least 2 positive views a sample, got {views}")
    z, n = F.normalize(positives, dim=-1), F.normalize(negatives, dim=-1)
    if temperature < 1 / 40:
        raise ValueError(
            f"InfoNCE temperature {temperature} is too low for float32; the lowest is {1 / 40}"
        )
    same = torch.eye(views, dtype=torch.bool, device=z.device)
    among = z @ z.transpose(1, 2)  # (B, V, V)
    scale = {"eq5": 1 / temperature, "published": 1.0}.get(denominator)
    if scale is None:
        raise ValueError(
            f"InfoNCE denominator {denominator!r} is unknown; use 'eq5' or 'published'"
        )
    attraction = among.masked_fill(same, 0.0).sum(-1) / temperature / (views - 1)
    inner = torch.logsumexp((among * scale).masked_fill(same, -torch.inf), -1)  # (B, V)
    outer = _logsumexp_against(z, n, scale)  # (B, V)
    return (torch.logaddexp(inner, outer) - attraction).mean(-1)


def _logsumexp_against(z: torch.Tensor, negatives: torch.Tensor, scale: float) -> torch.Tensor:
    """log sum_m exp(scale <z, n_m>) with the similarity matrix held once: (B, V, C), (M, C) -> (B,
    V).
    """
    return _LogSumExp.apply(z.flatten(0, 1), negatives, scale).unflatten(0, z.shape[:2])


class _LogSumExp(torch.autograd.Function):
    """Cosine similarities are bounded by 1, so exp(scale * (s - 1)) needs no row maximum and is
    taken in place.
    """

    @staticmethod
    def forward(ctx, z, negatives, scale):
        totals, means = [], []
        for rows in z.split(512):  # blocks bound the memory to 512 x M whatever the batch
            weights = torch.mm(rows, negatives.T).sub_(1.0).mul_(scale).exp_()  # (512, M)
            totals.append(weights.sum(1, keepdim=True))
            means.append(
                torch.mm(weights, negatives).div_(totals[-1])
            )  # softmax-weighted mean negative, (512, C)
        ctx.save_for_backward(torch.cat(means))
        ctx.scale = scale
        return torch.cat(totals).squeeze(1).log() + scale

    @staticmethod
    def backward(ctx, grad):
        (mean_negative,) = ctx.saved_tensors
        return grad[:, None] * ctx.scale * mean_negative, None, None


def deepcluster_loss(
    latents: torch.Tensor, centroids: torch.Tensor, temperature: float, global_crops: int = 2
) -> torch.Tensor:
    """DeepCluster-v2's cross-entropy: each crop predicts the cluster of a global crop; mean over
    crops and clusterings.

    ``latents``: (B, V, C), global crops first; ``centroids``: (H, K, C), H clusterings of K
    centroids; all of unit length. Clustering h takes as its target the centroid nearest to global
    crop h mod ``global_crops``, no gradient.
    """
    scores = torch.einsum("bvc,hkc->bhvk", latents, centroids)  # (B, H, V, K)
    clustering = torch.arange(len(centroids), device=latents.device)
    targets = scores[:, clustering, clustering % global_crops].argmax(-1)  # (B, H)
    log_probabilities = F.log_softmax(scores / temperature, dim=-1)
    targets = targets[:, :, None, None].expand(-1, -1, latents.shape[1], 1)  # (B, H, V, 1)
    return -log_probabilities.gather(-1, targets).mean((1, 2, 3))


def ibot_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_patches: torch.Tensor,
    teacher_patches: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """iBOT: cross-entropy between class tokens of different crops, plus that between patch tokens
    behind the mask.

    ``student``: (B, V, C), the masked global crops first; ``teacher``: (B, G, C), the global crops
    unmasked. ``student_patches``, ``teacher_patches``: (B, G, M, C), the M masked patches of each
    global crop. The mean over class-token pairs and the mean over patches weigh the same (iBOT's
    lambda 1 = lambda 2 = 1); no centring.
    """
    soft = lambda z: F.softmax(z.detach() / teacher_temperature, dim=-1)
    log_soft = lambda z: F.log_softmax(z / student_temperature, dim=-1)
    among = -soft(teacher) @ log_soft(student).transpose(1, 2)  # (B, G, V)
    other = 1 - torch.eye(*among.shape[1:], device=among.device)  # a crop is not its own target
    image = (among * other).sum((1, 2)) / other.sum()
    patches = -(soft(teacher_patches) * log_soft(student_patches)).sum(-1).mean((1, 2))
    return image + patches


def masked_loss(
    predictions: torch.Tensor, targets: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Masked language modelling: mean cross-entropy of the hidden tokens, (B,).

    ``predictions``: (B, V, T, D), final latents of V masked copies; ``targets``: (B, V, T) int64,
    the token behind each mask, -1 where nothing is hidden; ``table``: (words, D), its rows score a
    latent by their inner product. Logits are made for hidden tokens alone, 15 % of (B, V, T,
    words).
    """
    hidden = targets >= 0
    losses = F.cross_entropy(
        predictions[hidden] @ table.T, targets[hidden], reduction="none"
    )  # (hidden tokens,)
    sample = hidden.nonzero()[:, 0]
    total = torch.zeros(len(targets), dtype=losses.dtype, device=losses.device).index_add(
        0, sample, losses
    )
    return total / hidden.sum((1, 2))


def linear_head(
    width: int, dim: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A randomly initialised linear layer, uniform in +-1/sqrt(width) as ``torch.nn.Linear``:
    weight (dim, width), bias (dim,).
    """
    bound = 1 / math.sqrt(width)
    draw = lambda *shape: torch.from_numpy(
        (generator.random(shape, dtype=np.float32) * 2 - 1) * np.float32(bound)
    )
    return draw(dim, width), draw(dim)


@dataclass(frozen=True)
class KL:
    """KL to the uniform distribution: one view, L2-normalised embedding, linear head (Table 17).

    ``head=False`` computes the loss on the embedding itself (Table 6); ``dim`` then means nothing.
    """

    temperature: float = 15.0
    dim: int = 768
    direction: str = "uniform_latent"
    normalize: bool = True
    head: bool = True
    name: ClassVar[str] = "kl"
    views: ClassVar[str] = "whole"
    negatives: ClassVar[int] = 0

    def heads(self, width: int, generator: np.random.Generator) -> Heads:
        return (
            dict(zip(("weight", "bias"), linear_head(width, self.dim, generator)))
            if self.head
            else {}
        )

    def loss(
        self, embeddings: torch.Tensor, heads: Heads, negatives: torch.Tensor | None = None
    ) -> torch.Tensor:
        return kl_loss(self.latents(embeddings, heads), self.temperature, self.direction)

    def latents(self, embeddings: torch.Tensor, heads: Heads) -> torch.Tensor:
        return _project(embeddings, self.head and (heads["weight"], heads["bias"]), self.normalize)


@dataclass(frozen=True)
class DINO:
    """Self-distillation between crops, independent student and teacher heads (Table 17).

    ``head=False``: both distributions are softmaxes of the embedding itself (Table 6), apart by
    temperature and crop. ``augmentation="full"`` adds DINO's flips and colour changes to the crops
    (Table 15). ``native=True`` (ours) leaves local crops at 96 px of 224 instead of enlarging them:
    about a third of the cost.
    """

    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    dim: int = 2048
    global_crops: int = 2
    local_crops: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    independent_heads: bool = True
    normalize: bool = True
    head: bool = True
    augmentation: str = "crops"
    native: bool = False
    name: ClassVar[str] = "dino"
    views: ClassVar[str] = "crops"
    negatives: ClassVar[int] = 0

    def heads(self, width: int, generator: np.random.Generator) -> Heads:
        if not self.head:
            return {}
        weight, bias = linear_head(width, self.dim, generator)
        teacher = (
            linear_head(width, self.dim, generator) if self.independent_heads else (weight, bias)
        )
        return {
            "weight": weight,
            "bias": bias,
            "teacher_weight": teacher[0],
            "teacher_bias": teacher[1],
        }

    def loss(
        self, embeddings: torch.Tensor, heads: Heads, negatives: torch.Tensor | None = None
    ) -> torch.Tensor:
        student = _project(
            embeddings, self.head and (heads["weight"], heads["bias"]), self.normalize
        )
        seen = embeddings[:, : self.global_crops].detach()
        teacher = _project(
            seen, self.head and (heads["teacher_weight"], heads["teacher_bias"]), self.normalize
        )
        return dino_loss(student, teacher, self.student_temperature, self.teacher_temperature)


@dataclass(frozen=True)
class SimCLR:
    """InfoNCE between overlapping patches of one image and a fixed batch of negatives (eq. 5, Table
    17).

    ``grid`` patches a side before overlap (4 patches = 2 x 2), ``stride_scale`` steps a patch: 49
    views at 6. ``head=False`` compares the embeddings themselves (Table 6); cosines normalise them
    either way. ``native=True`` (ours) leaves the patches at their own size instead of enlarging
    them: a quarter of the cost or less. Texts and sounds have ``positives`` random views instead,
    and ``negative_views`` of each negative: see `by_name`. ``deletion``: the odds with which a word
    of a text is deleted (Table 19).
    """

    temperature: float = 0.07
    dim: int = 96
    negatives: int = 256
    grid: int = 2
    stride_scale: int = 6
    denominator: str = "eq5"
    normalize: bool = False
    head: bool = True
    native: bool = False
    positives: int = 0
    negative_views: int = 0
    deletion: float = 0.0
    name: ClassVar[str] = "simclr"
    views: ClassVar[str] = "patches"

    def heads(self, width: int, generator: np.random.Generator) -> Heads:
        return (
            dict(zip(("weight", "bias"), linear_head(width, self.dim, generator)))
            if self.head
            else {}
        )

    def loss(
        self, embeddings: torch.Tensor, heads: Heads, negatives: torch.Tensor | None = None
    ) -> torch.Tensor:
        if negatives is None:
            raise ValueError(
                "SimCLR needs negatives: latents of shape (M, dim) from the training split"
            )
        return info_nce(
            self.latents(embeddings, heads), negatives, self.temperature, self.denominator
        )

    def latents(self, embeddings: torch.Tensor, heads: Heads) -> torch.Tensor:
        return _project(embeddings, self.head and (heads["weight"], heads["bias"]), self.normalize)

    def reference(self, latents: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """All latents (N, V, C) of the training images, as they are: (N * V, C)."""
        return latents.flatten(0, 1)

    def reference_shape(self, images: int, views: int, width: int) -> tuple[int, int]:
        return min(self.negatives, images) * (
            self.negative_views or views
        ), self.dim if self.head else width


@dataclass(frozen=True)
class DeepCluster:
    """Crops predict the k-means cluster of one of them (Fig. 10; Caron et al. 2018).

    The paper prints no settings; these are its published script's, which follows DeepCluster-v2
    (Caron et al. 2020): 2 global and 6 local crops without colour change, a bias-free projection
    with rows of unit length on the embedding as it is, unit latents, three clusterings whose
    centroids are the classifier, temperature 0.1. Ours: k-means is scikit-learn's and its centroids
    are normalised, and there is at most one cluster for ``images_per_cluster`` training images,
    because the script's 3,000 are more than a small training split has images.
    """

    temperature: float = 0.1
    dim: int = 128
    clusters: int = 3000
    clusterings: int = 3
    images_per_cluster: int = 10
    global_crops: int = 2
    local_crops: int = 6
    global_scale: tuple[float, float] = (0.14, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.14)
    name: ClassVar[str] = "deepcluster"
    views: ClassVar[str] = "crops"
    augmentation: ClassVar[str] = "crops"
    negatives: ClassVar[int] = sys.maxsize  # every training image is clustered

    def heads(self, width: int, generator: np.random.Generator) -> Heads:
        return {"weight": F.normalize(linear_head(width, self.dim, generator)[0], dim=-1)}

    def loss(
        self, embeddings: torch.Tensor, heads: Heads, centroids: torch.Tensor | None = None
    ) -> torch.Tensor:
        if centroids is None:
            raise ValueError(
                "DeepCluster needs centroids: latents of shape (clusterings * K, dim), see reference"
            )
        centroids = centroids.unflatten(0, (self.clusterings, -1))  # (H, K, C)
        return deepcluster_loss(
            self.latents(embeddings, heads), centroids, self.temperature, self.global_crops
        )

    def latents(self, embeddings: torch.Tensor, heads: Heads) -> torch.Tensor:
        return F.normalize(F.linear(embeddings, heads["weight"]), dim=-1)

    def reference(self, latents: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Centroids of the training images' latents (N, V, C), (clusterings * K, C), from the crops
        of the targets.
        """
        count = self._count(len(latents))
        found = []
        for h in range(self.clusterings):
            crop = latents[:, h % self.global_crops].cpu().numpy()
            means = (
                KMeans(count, n_init=1, random_state=int(generator.integers(2**31)))
                .fit(crop)
                .cluster_centers_
            )
            found.append(F.normalize(torch.from_numpy(means), dim=-1))
        return torch.cat(found)

    def reference_shape(self, images: int, views: int, width: int) -> tuple[int, int]:
        return self.clusterings * self._count(images), self.dim

    def _count(self, images: int) -> int:
        return max(1, min(self.clusters, images // self.images_per_cluster))


@dataclass(frozen=True)
class IBOT:
    """DINO between crops, and masked patches that predict what the teacher sees of them (Fig. 10;
    Zhou et al. 2022).

    The paper prints no settings and its published scripts hold no iBOT. Crops, head size and
    temperatures are those of its DINO; from iBOT's own code: one head for class and patch tokens,
    the same crop is no pair, means instead of sums, and a mean mask ratio of 0.3. Ours: the masked
    patches are drawn one by one, not in blocks, once for a seed and not for each image, so that two
    images' gradients do not differ by their masks; a frozen network has no mask token, so they show
    the mean colour (zero after normalisation).
    """

    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    dim: int = 2048
    mask_ratio: float = 0.3
    global_crops: int = 2
    local_crops: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    name: ClassVar[str] = "ibot"
    views: ClassVar[str] = "crops"
    augmentation: ClassVar[str] = "crops"
    tokens: ClassVar[bool] = (
        True  # its loss takes all tokens of masked and whole crops, not embeddings
    )
    negatives: ClassVar[int] = 0

    def heads(self, width: int, generator: np.random.Generator) -> Heads:
        return DINO(dim=self.dim).heads(width, generator)

    def token_heads(self, backbone, generator: np.random.Generator) -> Heads:
        return {"masks": self.masks(backbone.patches, generator)}

    def masks(self, patches: int, generator: np.random.Generator) -> torch.Tensor:
        """(global crops, patches) bool, as many masked patches in each."""
        count = max(1, round(self.mask_ratio * patches))
        order = generator.random((self.global_crops, patches)).argsort(1)
        return torch.from_numpy(order.argsort(1) < count)

    def loss(
        self, tokens: torch.Tensor, heads: Heads, negatives: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``tokens``: (B, V + G, 1 + patches, D), class token first, of the V student views and
        then the G whole global crops; ``heads`` hold the masks too.
        """
        last = self.global_crops
        student = tokens[:, :-last], (heads["weight"], heads["bias"])
        teacher = tokens[:, -last:].detach(), (heads["teacher_weight"], heads["teacher_bias"])
        hidden = lambda x: torch.stack(
            [x[:, i, 1:][:, mask] for i, mask in enumerate(heads["masks"])], 1
        )  # (B, G, M, D)
        images = [_project(x[:, :, 0], head, True) for x, head in (student, teacher)]
        patches = [_project(hidden(x), head, True) for x, head in (student, teacher)]
        return ibot_loss(*images, *patches, self.student_temperature, self.teacher_temperature)


@dataclass(frozen=True)
class MaskedWords:
    """Masked language modelling of texts (ours; the paper names it as future work), after BERT
    (Devlin et al. 2018).

    ``copies`` of a text, each with ``ratio`` of its tokens behind the mask token, one at least;
    never the special ones. The head is the encoder's own table of word embeddings, as BERT's is
    tied to it, without BERT's transform in front of it, which sentence encoders do not keep.
    Nothing is random but the masks.
    """

    ratio: float = 0.15
    copies: int = 4
    name: ClassVar[str] = "mlm"
    views: ClassVar[str] = "masked"
    tokens: ClassVar[bool] = True
    negatives: ClassVar[int] = 0

    def heads(self, width: int, generator: np.random.Generator) -> Heads:
        return {}

    def token_heads(self, backbone, generator: np.random.Generator) -> Heads:
        return {"table": backbone.model.get_input_embeddings().weight.float()}

    def loss(
        self, tokens: torch.Tensor, heads: Heads, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``tokens``: (B, V, T, D); ``targets``: (B, V, T), see `masked_loss`."""
        return masked_loss(tokens, targets, heads["table"])


def _project(embeddings: torch.Tensor, head: tuple | bool, normalize: bool) -> torch.Tensor:
    """Latents (..., C) of embeddings (..., D); ``head``: weight and bias, or False for none."""
    z = F.normalize(embeddings, dim=-1) if normalize else embeddings
    return F.linear(z, *head) if head else z


Objective = KL | DINO | SimCLR | DeepCluster | IBOT | MaskedWords
OBJECTIVES: dict[str, type] = {
    one.name: one for one in (KL, DINO, SimCLR, DeepCluster, IBOT, MaskedWords)
}
OTHER = {  # settings that differ from the images' (Table 17): texts Table 19, sounds Table 12
    ("simclr", "text"): dict(positives=12, negative_views=2, dim=256, deletion=0.1),
    ("simclr", "audio"): dict(positives=16, negative_views=2, dim=768, negatives=64),
}


def by_name(name: str, modality: str = "image", **settings) -> Objective:
    """The objective called ``name`` with the paper's settings for images, texts ("text") or sounds
    ("audio"), some replaced.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](**OTHER.get((name, modality), {}) | settings)
