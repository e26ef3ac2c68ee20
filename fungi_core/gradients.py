"""Tap linear layers of a frozen network and get per-sample gradient factors.

For y = W a + b the gradient of a sample with n views x tokens is sum_n d_n [a_n; 1]^T, where d is
the loss gradient at y. A tap keeps ``a`` and replaces y by a detached leaf that requires grad:
everything before it runs without autograd, only the tail behind it is recorded, and no parameter
ever requires a gradient.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Loss = Callable[[torch.Tensor], torch.Tensor]


class LossNotFinite(FloatingPointError):
    """Say that the loss of one sample, or its gradient, is NaN or infinite.

    ``sample`` is its place in the batch, ``value`` the loss.
    """

    def __init__(self, sample: int, value: float, name: str = ""):
        named = name or f"sample {sample} of the batch"
        what, found = ("gradient", "not finite") if math.isfinite(value) else ("loss", value)
        super().__init__(f"the {what} of {named} is {found}; nothing was written")
        self.sample, self.value = sample, value


@dataclass(frozen=True)
class Factors:
    """Hold the factors of a batch's gradients, float32.

    ``activations``: (B, n, D_in); ``output_gradients``: (B, n, D_out); ``bias``: whether the layer
    has one, so that the gradient gains a column.
    """

    activations: torch.Tensor
    output_gradients: torch.Tensor
    bias: bool

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, index) -> "Factors":
        """Return some of the samples: a slice or an array of indices."""
        return Factors(self.activations[index], self.output_gradients[index], self.bias)

    def gradient(self) -> torch.Tensor:
        """Return the gradients, (B, D_out, D_in + 1) with a bias, else (B, D_out, D_in)."""
        a, d = self.activations, self.output_gradients
        gradient = d.transpose(1, 2) @ a  # (B, D_out, n) @ (B, n, D_in): views are summed here
        return torch.cat([gradient, d.sum(1)[..., None]], 2) if self.bias else gradient

    def appended(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output gradients and activations, with the bias's ones: (B, n, D_in + 1)."""
        a = self.activations
        if self.bias:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
        return self.output_gradients, a


def linear_layer(model: torch.nn.Module, path: str) -> torch.nn.Linear:
    """Return the linear layer at ``path``, such as ``blocks.11.attn.proj``.

    Raises ValueError where there is none or it is another kind of layer.
    """
    try:
        layer = model.get_submodule(path)  # for every batch: no walk through all modules
    except AttributeError:
        modules = model.named_modules(remove_duplicate=False)
        linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
        shown, kind = ", ".join(linear[-4:]) or "none", type(model).__name__
        message = f"{kind} has no layer {path!r}; its last linear layers: {shown}"
        raise ValueError(message) from None
    if not isinstance(layer, torch.nn.Linear):
        kind = type(layer).__name__
        raise ValueError(f"layer {path!r} is a {kind}; gradients are taken at a torch.nn.Linear")
    return layer


class Tap:
    """Keep what passes through one linear layer: its input, and its output as a leaf."""

    def __init__(self, path: str, layer: torch.nn.Linear):
        self.path, self.bias, self.calls = path, layer.bias is not None, 0
        before = layer.register_forward_pre_hook(self._before)
        self.handles = [before, layer.register_forward_hook(self._after)]

    def _before(self, layer, inputs):
        self.activations = inputs[0].detach()

    def _after(self, layer, inputs, output):
        self.calls += 1
        # Behind an earlier tap the output is in the graph already; else it becomes its root.
        self.output = output if output.requires_grad else output.detach().requires_grad_()
        torch.set_grad_enabled(True)  # ends with the caller's no_grad block
        return self.output


@contextmanager
def tap(model: torch.nn.Module, paths: Sequence[str]) -> Iterator[list[Tap]]:
    """Hook the linear layers at ``paths``; the hooks are removed on exit, always."""
    layers = [linear_layer(model, path) for path in paths]  # all are there before one is hooked
    taps = [Tap(path, layer) for path, layer in zip(paths, layers, strict=True)]
    try:
        yield taps
    finally:
        for handle in (handle for one in taps for handle in one.handles):
            handle.remove()


def tapped(
    model: torch.nn.Module,
    embed: Callable[[torch.Tensor], torch.Tensor],
    views: torch.Tensor,
    paths: Sequence[str],
) -> tuple[torch.Tensor, list[Tap]]:
    """Run one forward pass that is recorded behind the linear layers at ``paths``.

    ``embed`` maps views (N, ...) through ``model`` to (N, D), or (N, T, D) for losses of tokens.
    From ``views`` (B, V, ...) come embeddings (B, V, ..., D) float32, and the taps. Raises
    ValueError for a layer that does not run exactly once, or not on the batch first.
    """
    with tap(model, paths) as taps, torch.no_grad():
        embeddings = embed(views.flatten(0, 1))  # (B * V, D)
        if odd := [x for x in taps if x.calls != 1 or len(x.activations) % len(embeddings)]:
            ran = f"layer {odd[0].path!r} ran {odd[0].calls} times in one forward pass"
            raise ValueError(f"{ran}; it must run exactly once, on tensors whose batch comes first")
    if not embeddings.requires_grad:
        need = "the network must use its output, without torch.inference_mode or detach behind it"
        raise ValueError(f"no gradient leads from the embedding to layer {paths[0]!r}: {need}")
    with torch.enable_grad():
        return embeddings.float().unflatten(0, views.shape[:2]), taps


def factors_at(
    embeddings: torch.Tensor, taps: Sequence[Tap], loss: Loss, again: bool = False
) -> list[Factors]:
    """Take the gradient of a loss of what `tapped` returned, at each tap.

    The loss maps embeddings (B, V, ..., D) to (B,). ``again``: another loss of them will follow.
    """
    batch = len(embeddings)
    with torch.enable_grad():
        gradients = loss_gradient(loss, embeddings, [one.output for one in taps], again)
    return [
        Factors(per_sample(one.activations, batch), per_sample(gradient, batch), one.bias)
        for one, gradient in zip(taps, gradients, strict=True)
    ]


def loss_gradient(
    loss: Loss, embeddings: torch.Tensor, outputs: Sequence[torch.Tensor], again: bool = False
) -> Sequence[torch.Tensor]:
    """Return d(sum of a loss of the embeddings over the samples) / d(outputs).

    Raises `LossNotFinite` for the first sample whose loss or gradient is NaN or infinite, and
    ValueError for a loss that does not give one number a sample.
    """
    values = loss(embeddings)  # (B,)
    if values.shape != embeddings.shape[:1]:
        given = f"the loss gave shape {tuple(values.shape)} for {len(embeddings)} samples"
        raise ValueError(f"{given}; it must give one number each")
    gradients = torch.autograd.grad(values.sum(), outputs, retain_graph=again)
    for found in (values.detach(), *gradients):
        bad = ~torch.isfinite(found).reshape(len(values), -1).all(1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise LossNotFinite(first, values[first].item())
    return gradients


def per_sample(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Join each sample's views and tokens, (B * V, [T,] D) -> (B, V * T, D) float32."""
    return tensor.detach().float().reshape(batch, -1, tensor.shape[-1])
