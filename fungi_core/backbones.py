"""Frozen backbones: a timm name, a checkpoint that describes itself, or a module."""

import copy
import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from . import class_token
from .devices import default_modes, in_dtype, patch_embedding, resolve_device, resolve_dtype
from .gradients import Factors, Loss, factors_at, linear_layer, tapped
from .inputs import SIMPLE, one_line, source
from .views import ImageInputs

# How timm and transformers call the output projection of an attention.
_ATTENTION_OUTPUTS = ("attn.proj", "attention.output.dense", "SelfAttention.o")
_ATTENTION_OUTPUTS += ("self_attn.out_proj", "attention.out_lin", "attn.o")


@dataclass
class Backbone:
    """Hold a frozen encoder: `embed` gives embeddings, `factors` also per-sample gradient factors.

    ``layer``: the target layer. ``inputs``: what items it takes (`views.ImageInputs` or another
    modality's). ``read(model, views)`` gives embeddings (N, D). ``head``: the embedding is what the
    model's own head makes of it. ``given``: no name alone fixes the model's structure.
    ``fast=False`` forces the general path. Weights are not to be changed once it is used.
    """

    name: str
    model: torch.nn.Module
    layer: str
    inputs: Any
    read: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head: bool = False
    given: bool = True
    fast: bool = True

    @property
    def view_dtype(self) -> torch.dtype:
        """Return the dtype of views: float32 where patches are embedded in it."""
        return torch.float32 if patch_embedding(self.model) else self.dtype

    def embed(self, views: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, D), in the backbone's dtype, of views (N, ...) of any size."""
        return self.read(self._for(views).model, views)

    def _for(self, views: torch.Tensor) -> "Backbone":
        return self if self.inputs.fits(views) else self.at_size(views.shape[-1])

    @cached_property
    def width(self) -> int:
        """Return the embedding's size, D."""
        views = self.inputs.blank(self.device, self.view_dtype)
        try:
            with torch.inference_mode():
                out = self.embed(views)
        except Exception as error:  # a module raises anything for views that it cannot take
            refused = f"{self.name} cannot take views of shape {tuple(views.shape)}"
            raise ValueError(f"{refused}: {one_line(error)}") from error
        if not isinstance(out, torch.Tensor) or out.ndim != 2:
            of = f"tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else ""
            kind = of or type(out).__name__
            raise ValueError(f"{self.name} gives a {kind}; its forward must give embeddings (N, D)")
        return out.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the weights in float32: two checkpoints never share features.

        No name fixes the structure of a module that was passed in, or of an architecture with
        arguments: types, their code and plain attributes (pooling, heads, ...) are hashed as well.
        """
        digest = hashlib.blake2b(digest_size=16)
        ignored = "training", "fused_attn"  # these change no feature
        plain = lambda v: v if isinstance(v, (*SIMPLE, tuple)) else getattr(v, "__qualname__", 0)
        for path, module in self.model.named_modules() if self.given else ():
            own = [(k, plain(v)) for k, v in sorted(vars(module).items()) if k not in ignored]
            code = source(type(module), type(module).forward)
            digest.update(repr((path, type(module).__name__, own, code, self.head)).encode())
        tensors = self.model.state_dict() | (dict(self.model.named_buffers()) if self.given else {})
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def gradient_shape(self, layer: str | None = None) -> tuple[int, int]:
        """Return the shape of one gradient, (D_out, D_in + 1) with a bias."""
        module = linear_layer(self.model, layer or self.layer)
        return module.out_features, module.in_features + (module.bias is not None)

    def reads_class_token(self, layers: Sequence[str]) -> bool:
        """Say whether the class-token path serves these layers."""
        timms = getattr(self.read, "func", None) is _image_embedding
        return self.fast and timms and class_token.applies(self.model, layers)

    @default_modes()
    def at_size(self, size: int) -> "Backbone":
        """Return the same network for ``size`` px images, its position embedding interpolated.

        Raises ValueError where the patch does not divide it, and for all but timm's transformers.
        """
        if size == self.inputs.size:
            return self
        if size not in self._sizes:
            fixed = not hasattr(self.model, "set_input_size")
            patch = 0 if fixed else self.model.patch_embed.patch_size[0]
            if not patch or size % patch:
                known = f"multiples of {patch} px" if patch else f"{self.inputs.size} px"
                raise ValueError(f"{self.name} cannot take {size} px images; it takes {known}")
            model = copy.deepcopy(self.model)
            model.set_input_size((size, size))
            model.requires_grad_(False)  # the interpolated position embedding is a new parameter
            self._sizes[size] = replace(self, model=model, inputs=replace(self.inputs, size=size))
        return self._sizes[size]

    @cached_property
    def _sizes(self) -> dict[int, "Backbone"]:
        return {}

    def factors(
        self,
        views: torch.Tensor | list[torch.Tensor] | class_token.Trunk,
        loss: Loss | None,
        layers: Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, list[Factors]]:
        """Return embeddings (B, V, D) float32, and the factors of a loss at every layer.

        ``views``: (B, V, ...), a list of several sizes, or what `trunk` made of them. The loss maps
        (B, V, D) to (B,); None: the embeddings alone, by the same pass. Raises ValueError for views
        at their own sizes where the class-token path does not apply.
        """
        layers = list(layers or [self.layer])
        if self.reads_class_token(layers):
            seen = views if isinstance(views, class_token.Trunk) else self.trunk(views)
            return class_token.factors(self._tail, seen, loss)
        groups = views if isinstance(views, list) else [views]
        if len(groups) > 1 or not self.inputs.fits(groups[0]):
            need = "views at their own sizes need a class token at the last block"
            raise ValueError(f"{need}, not {self.name} {layers}")
        if loss is None:
            with torch.no_grad():
                embeddings = self.embed(groups[0].flatten(0, 1)).float()  # (B * V, D)
            return embeddings.unflatten(0, groups[0].shape[:2]), []
        embeddings, taps = tapped(self.model, self.embed, groups[0], layers)
        return embeddings.detach(), factors_at(embeddings, taps, loss)

    def trunk(self, views: torch.Tensor | list[torch.Tensor]) -> class_token.Trunk:
        """Return what the class-token path knows of views before any loss."""
        groups = views if isinstance(views, list) else [views]
        done = [class_token.trunk(self._for(group).model, group) for group in groups]
        return class_token.Trunk(*(torch.cat(parts, 1) for parts in zip(*done)))

    @cached_property
    def _tail(self) -> class_token.Tail:
        return class_token.Tail(self.model, self.head)


@default_modes()
def load(
    name: str | Path | torch.nn.Module,
    *,
    layer: str | None = None,
    device="auto",
    dtype="auto",
    head: bool = False,
    arguments: dict | None = None,
) -> Backbone:
    """Return a frozen image backbone.

    ``name``: a timm name (weights from its hub), ``random:NAME`` (that architecture with seeded
    random weights), the path of a ``.safetensors`` checkpoint, or an ``nn.Module`` together with
    ``layer``. ``layer``: the target; by default the attention output projection of the last block
    (section 4). ``device``, ``dtype``: what torch accepts, or "auto". ``head``: the embedding is
    what the model's own head makes of it. ``arguments``: for ``timm.create_model``, such as
    ``{"img_size": 224}``.

    Raises ValueError for an unknown name, a layer that is none, or a file that is no checkpoint.
    """
    given, inputs, arguments = isinstance(name, torch.nn.Module), None, arguments or {}
    if given:
        title = type(name).__name__
        if layer is None:
            such = "the path of a linear layer such as 'blocks.11.attn.proj'"
            raise ValueError(f"a {title} module needs layer=..., {such}")
        model = copy.deepcopy(name)  # the caller's module stays as it is
    elif Path(name).suffix == ".safetensors":
        title = Path(name).stem
        model, inputs, given = _read_checkpoint(Path(name), head, arguments)
    else:
        title = str(name)
        model = create(title, head, arguments)
    given = given or bool(arguments)
    options = dict(layer=layer, device=device, dtype=dtype, head=head)
    return replace(freeze(model, title, inputs or _timm_inputs(model), **options), given=given)


def freeze(
    model: torch.nn.Module,
    name: str,
    inputs,
    read: Callable | None = None,
    *,
    layer: str | None = None,
    device="auto",
    dtype="auto",
    head: bool = False,
) -> Backbone:
    """Return a `Backbone` around ``model``, moved to a device and dtype, without gradients.

    ``read`` defaults to timm's own read-out of images; another one takes the general path.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    model = model.eval().requires_grad_(False)
    for module in model.modules() if device == "cpu" else ():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # plain products are faster on CPUs, above all backward
    model = in_dtype(model.to(device), dtype)
    layer = layer or _last_attention_output(model)
    linear_layer(model, layer)
    read = read or partial(_image_embedding, head)
    return Backbone(name, model, layer, inputs, read, device, dtype, head)


def _image_embedding(head: bool, model: torch.nn.Module, views: torch.Tensor) -> torch.Tensor:
    """Read out images (N, 3, s, s) as timm does, before any classifier unless ``head``: (N, D)."""
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(views), pre_logits=not head)
    return model(views)


def create(name: str, head: bool, arguments: dict) -> torch.nn.Module:
    """Create a timm network, with seeded random weights for ``random:NAME``."""
    architecture = name.removeprefix("random:")
    if not timm.is_model(architecture.split(".")[0]):
        near = difflib.get_close_matches(architecture, timm.list_models(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backbone {name!r}: no timm model and no .safetensors file{hint}")
    arguments = ({} if head else {"num_classes": 0}) | arguments
    if name != architecture:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the cards' generators stay as they are
            return timm.create_model(architecture, pretrained=False, **arguments)
    try:
        return timm.create_model(architecture, pretrained=True, **arguments)
    except Exception as error:  # the hub's client raises many kinds; the cause is kept
        missing = f"the weights of {name} are not here and could not be downloaded"
        raise ConnectionError(f"{missing}: {one_line(error)[:200]}") from error


def _read_checkpoint(file: Path, head: bool, asked: dict) -> tuple:
    """Read a checkpoint that describes itself: network, inputs, and whether its name is not enough.

    Its metadata names the timm ``architecture`` (else the file's name does), and may hold JSON with
    ``arguments`` of ``timm.create_model`` and with the ``input`` (size, mean, std, crop, ...).
    Every tensor but an unused classifier must find its place, else ValueError.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key).float() for key in opened.keys()}
        architecture = metadata.get("architecture", file.stem)
        arguments = json.loads(metadata.get("arguments", "{}")) | asked
        model = create(f"random:{architecture}", head, arguments)
        if not head:  # a distilled network has two classifiers
            unused = model.pretrained_cfg.get("classifier") or ()
            unused = (unused,) if isinstance(unused, str) else unused
            prefixes = tuple(f"{layer}." for layer in unused)
            state = {key: value for key, value in state.items() if not key.startswith(prefixes)}
        if "img_size" in asked and isinstance(model, VisionTransformer):
            state = checkpoint_filter_fn(state, model)  # position embedding, as from timm's hub
        model.load_state_dict(state, strict=True)
        inputs = replace(_timm_inputs(model), **json.loads(metadata.get("input", "{}")))
    except (SafetensorError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error)[:300]
        raise ValueError(f"{file} does not hold the weights it should: {reason}") from error
    return model, inputs, architecture != file.stem or bool(arguments)


def _timm_inputs(model: torch.nn.Module) -> ImageInputs:
    """Return the evaluation transform that timm has for a network; ImageNet's for others."""
    config = resolve_data_config({}, model=model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = (size, size) if isinstance(size, int) else size or config["input_size"][-2:]
    if size[0] != size[1]:
        kind = type(model).__name__
        raise ValueError(f"{kind} takes images of {size[0]} x {size[1]} px; accepted: squares")
    mean, std, mode = tuple(config["mean"]), tuple(config["std"]), config.get("crop_mode")
    crop = float(config["crop_pct"])
    return ImageInputs(int(size[0]), mean, std, crop, mode or "center", config["interpolation"])


def _last_attention_output(model: torch.nn.Module) -> str:
    """Return the paper's target layer: the attention output projection of the last block."""
    linear = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    names = [name for name in linear if name.endswith(_ATTENTION_OUTPUTS)]
    if not names:
        kind = type(model).__name__
        raise ValueError(f"{kind} has no '...attn.proj' layer; name one with layer=...")
    return names[-1]
