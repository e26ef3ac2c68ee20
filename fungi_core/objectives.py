"""The self-supervised objectives: pure functions from latents to one loss per sample, and settings.

Each loss takes latents of shape (B, V, C) -- B samples, V views, C latent units -- and returns
(B,). No sample's loss depends on another sample, so the gradient of the *sum* over the batch is the
per-sample gradient. The settings classes hold the paper's defaults (Table 17), name their views and
draw their heads: plain dictionaries of tensors that a caller may replace.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from .inputs import SIMPLE, Views, Whole, source
from .views import Crops, Patches

Heads = dict[str, torch.Tensor]


def kl_loss(
    latents: torch.Tensor, temperature: float, direction: str = "uniform_latent"
) -> torch.Tensor:
    """Return the KL divergence of q = softmax(latents / temperature) and uniform U, view by view.

    ``direction="uniform_latent"`` is KL(U || q), what Algorithm 1 and the published code compute;
    ``"latent_uniform"`` is KL(q || U), as eq. 6 is printed. Views are averaged.
    """
    log_q = F.log_softmax(latents / temperature, dim=-1)
    log_u = -math.log(latents.shape[-1])
    if direction == "uniform_latent":
        divergence = log_u - log_q.mean(-1)
    elif direction == "latent_uniform":
        divergence = (log_q.exp() * (log_q - log_u)).sum(-1)
    else:
        raise ValueError(f"KL direction {direction!r}: use 'uniform_latent' or 'latent_uniform'")
    return divergence.mean(-1)


def dino_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """Return DINO's cross-entropy (eq. 4) of all teacher x student pairs, without centring.

    The pair of a view with itself counts too. ``student``: (B, V, C); ``teacher``: (B, G, C), the
    global views, used without gradient.
    """
    # The sum over pairs is separable: (B, C) targets times (B, C) log probabilities.
    targets = F.softmax(teacher.detach() / teacher_temperature, dim=-1).sum(1)
    log_probabilities = F.log_softmax(student / student_temperature, dim=-1).sum(1)
    return -(targets * log_probabilities).sum(-1)


def info_nce(
    positives: torch.Tensor, negatives: torch.Tensor, temperature: float, denominator: str = "eq5"
) -> torch.Tensor:
    """Return SimCLR's InfoNCE over all ordered pairs of positive views (eq. 5).

    ``positives``: (B, V, C), V >= 2; ``negatives``: (M, C), fixed; both are L2-normalised here, and
    a view is not compared with itself. ``denominator="eq5"`` divides every similarity by the
    temperature; ``"published"`` leaves the log-sum-exp unscaled, as the published library and the
    segmentation scripts do.
    """
    views = positives.shape[1]
    if views < 2:
        raise ValueError(f"SimCLR needs at least 2 positive views a sample, got {views}")
    if temperature < 1 / 40:
        raise ValueError(f"temperature {temperature} is too low for float32; the lowest: {1 / 40}")
    scale = {"eq5": 1 / temperature, "published": 1.0}.get(denominator)
    if scale is None:
        raise ValueError(f"InfoNCE denominator {denominator!r}: use 'eq5' or 'published'")
    z, n = F.normalize(positives, dim=-1), F.normalize(negatives, dim=-1)
    same = torch.eye(views, dtype=torch.bool, device=z.device)
    among = z @ z.transpose(1, 2)  # (B, V, V)
    attraction = among.masked_fill(same, 0.0).sum(-1) / temperature / (views - 1)
    inner = torch.logsumexp((among * scale).masked_fill(same, -torch.inf), -1)  # (B, V)
    outer = _LogSumExp.apply(z.flatten(0, 1), n, scale).unflatten(0, z.shape[:2])  # (B, V)
    return (torch.logaddexp(inner, outer) - attraction).mean(-1)


class _LogSumExp(torch.autograd.Function):
    """Compute log sum_m exp(scale <z, n_m>), (N, C) and (M, C) -> (N,), in blocks of rows.

    Cosine similarities are bounded by 1, so exp(scale * (s - 1)) needs no row maximum, is taken in
    place, and the similarity matrix is held once.
    """

    @staticmethod
    def forward(ctx, z, negatives, scale):
        totals, means = [], []
        for rows in z.split(512):  # blocks bound the memory to 512 x M whatever the batch
            weights = torch.mm(rows, negatives.T).sub_(1.0).mul_(scale).exp_()  # (512, M)
            totals.append(weights.sum(1, keepdim=True))
            means.append(torch.mm(weights, negatives).div_(totals[-1]))  # softmax's mean, (512, C)
        ctx.save_for_backward(torch.cat(means))
        ctx.scale = scale
        return torch.cat(totals).squeeze(1).log() + scale

    @staticmethod
    def backward(ctx, grad):
        (mean_negative,) = ctx.saved_tensors
        return grad[:, None] * ctx.scale * mean_negative, None, None


class Objective:
    """Say what an objective needs; subclass it as a frozen dataclass to add one.

    ``views``: what it sees of an item. ``dim``: units of its random linear head; ``normalize``: the
    head's input is L2-normalised; ``head=False``: none, the loss takes the embedding itself (Table
    6). ``negatives``: how many training items the loss is compared with, and ``negative_views`` how
    many views of each (0: all).
    """

    name: ClassVar[str]
    views: Views = Whole()
    dim: int = 768
    normalize: bool = True
    head: bool = True
    negatives: int = 0
    negative_views: int = 0

    def settings(self) -> tuple[list, dict]:
        """Return the views, by name and settings, and the objective's own settings.

        Those of a class of one's own hold its fields, annotated or not, and the code of its loss.
        """
        kind, own = type(self), asdict(self)
        if (code := source(kind, kind.loss)) is not None:
            every = {name: getattr(self, name) for name in dir(self) if name[0] != "_"}
            own |= {name: value for name, value in every.items() if isinstance(value, SIMPLE)}
            own |= {"class": kind.__qualname__, "loss": code}
        own.pop("views", None)
        return [type(self.views).__name__, asdict(self.views)], own

    @property
    def sees_whole(self) -> bool:
        """Say whether the one view is the whole item, so that its embedding comes along."""
        return isinstance(self.views, Whole)

    def heads(self, backbone, generator: np.random.Generator) -> Heads:
        """Draw the tensors that the loss needs besides embeddings: a linear head, or none."""
        return linear_head(backbone.width, self.dim, generator) if self.head else {}

    def latents(self, embeddings: torch.Tensor, heads: Heads) -> torch.Tensor:
        """Map embeddings (..., D) to latents (..., C)."""
        return head_latents(embeddings, heads, self.normalize)

    def loss(self, embeddings, heads: Heads, negatives=None) -> torch.Tensor:
        """Return the loss of each sample, (B,), from embeddings (B, V, D) float32."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def memory(self, latents: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Return what the loss is compared with, (M, C), from the negatives' latents (N, V, C)."""
        return latents.flatten(0, 1)

    def factors(self, backbone, batch, heads: Heads, negatives, layers: Sequence[str]) -> tuple:
        """Return embeddings (B, V, D), and the `Factors` of the loss at each layer.

        ``batch``: views, see `Backbone.factors`; ``negatives``: (M, C) or None. An objective that
        reads something else than the embedding overrides this.
        """
        loss = lambda embeddings: self.loss(embeddings, heads, negatives)
        return backbone.factors(batch, loss, layers)


def checked(objectives: Iterable) -> tuple[Objective, ...]:
    """Return objectives as a tuple; ValueError for what is none, or has the name of another."""
    found = tuple(objectives) if isinstance(objectives, Iterable) else (objectives, None)
    if not all(isinstance(one, Objective) for one in found):
        raise ValueError(f"objectives are a list such as [KL(), DINO()], got {objectives!r}")
    names = [one.name for one in found]
    if len({*names}) != len(names):
        raise ValueError(f"each objective can be used once, got {', '.join(names)}")
    return found


@dataclass(frozen=True)
class KL(Objective):
    """Describe the KL divergence to the uniform distribution (Table 17): one view, one head."""

    views: Whole = Whole()
    temperature: float = 15.0
    dim: int = 768
    direction: str = "uniform_latent"
    normalize: bool = True
    head: bool = True
    name: ClassVar[str] = "kl"

    def loss(self, embeddings, heads, negatives=None) -> torch.Tensor:
        return kl_loss(self.latents(embeddings, heads), self.temperature, self.direction)


@dataclass(frozen=True)
class DINO(Objective):
    """Describe self-distillation between crops (Table 17): independent student and teacher heads.

    ``independent_heads=False``: both share one (Table 15). ``head=False``: both distributions are
    softmaxes of the embedding itself, apart by temperature and crop.
    """

    views: Crops = Crops()
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    dim: int = 2048
    independent_heads: bool = True
    normalize: bool = True
    head: bool = True
    name: ClassVar[str] = "dino"

    def heads(self, backbone, generator: np.random.Generator) -> Heads:
        student = teacher = super().heads(backbone, generator)
        if self.independent_heads:
            teacher = super().heads(backbone, generator)
        return student | {f"teacher_{name}": tensor for name, tensor in teacher.items()}

    def loss(self, embeddings, heads, negatives=None) -> torch.Tensor:
        seen = embeddings[:, : self.views.global_count].detach()
        student = head_latents(embeddings, heads, self.normalize)
        teacher = head_latents(seen, heads, self.normalize, prefix="teacher_")
        return dino_loss(student, teacher, self.student_temperature, self.teacher_temperature)


@dataclass(frozen=True)
class SimCLR(Objective):
    """Describe InfoNCE between views of one item and a fixed batch of negatives (eq. 5, Table 17).

    Cosines normalise the latents. Images are cut into overlapping patches; `text.SIMCLR` and
    `audio.SIMCLR` have the paper's settings for sentences and sounds.
    """

    views: Views = Patches()
    temperature: float = 0.07
    dim: int = 96
    negatives: int = 256
    negative_views: int = 0
    denominator: str = "eq5"
    normalize: bool = False
    head: bool = True
    name: ClassVar[str] = "simclr"

    def loss(self, embeddings, heads, negatives=None) -> torch.Tensor:
        if negatives is None:
            raise ValueError("SimCLR needs negatives: latents (M, dim) of training images")
        latents = self.latents(embeddings, heads)
        return info_nce(latents, negatives, self.temperature, self.denominator)


def linear_head(width: int, dim: int, generator: np.random.Generator) -> Heads:
    """Draw a linear layer uniform in +-1/sqrt(width), as ``torch.nn.Linear`` starts.

    Returns "weight" (dim, width) and "bias" (dim,), float32.
    """
    bound = np.float32(1 / math.sqrt(width))

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy((generator.random(shape, dtype=np.float32) * 2 - 1) * bound)

    return {"weight": draw(dim, width), "bias": draw(dim)}


def head_latents(
    embeddings: torch.Tensor, heads: Heads, normalize: bool, prefix: str = ""
) -> torch.Tensor:
    """Map embeddings (..., D) to latents (..., C) by the head called ``prefix``, if any."""
    z = F.normalize(embeddings, dim=-1) if normalize else embeddings
    return F.linear(z, heads[f"{prefix}weight"], heads[f"{prefix}bias"]) if heads else z
