"""Tap linear layers of a frozen network and get per-sample gradient factors, without a gradient on
any parameter.

For y = W a + b with n = views x tokens rows, the gradient of sample i is G_i = sum_n d_n [a_n;
1]^T, where d is the loss gradient at y. A tap keeps ``a`` and replaces y by a detached leaf that
requires grad: everything before it runs without autograd, only the tail behind it is recorded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


class LossNotFinite(FloatingPointError):
    """The loss of one sample is NaN or infinite; ``sample`` is its place in the batch, ``value``
    the loss.
    """

    def __init__(self, sample: int, value: float, name: str = ""):
        super().__init__(
            f"the loss of {name or f'sample {sample} of the batch'} is {value}; nothing was written"
        )
        self.sample, self.value = sample, value


@dataclass(frozen=True)
class Factors:
    """Per-sample gradient factors: ``activations`` (B, n, D_in), ``output_gradients`` (B, n,
    D_out), float32.
    """

    activations: torch.Tensor
    output_gradients: torch.Tensor
    bias: bool

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, index) -> "Factors":
        """Some of the samples: a slice or an array of indices."""
        return Factors(self.activations[index], self.output_gradients[index], self.bias)

    def gradient(self) -> torch.Tensor:
        """The gradients themselves, (B, D_out, D_in + 1) with a bias, else (B, D_out, D_in); views
        summed in the product.
        """
        a, d = self.activations, self.output_gradients
        gradient = d.transpose(1, 2) @ a  # (B, D_out, n) @ (B, n, D_in)
        return torch.cat([gradient, d.sum(1)[..., None]], 2) if self.bias else gradient


def linear_layer(model: torch.nn.Module, path: str) -> torch.nn.Linear:
    """The linear layer at ``path``, e.g. ``blocks.11.attn.proj``; one-line errors for a wrong path
    or kind of layer.
    """
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        names = [
            name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        ]
        shown = ", ".join(names[-4:]) or "none"
        raise ValueError(
            f"{type(model).__name__} has no layer {path!r}; its last linear layers: {shown}"
        ) from None
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(
            f"layer {path!r} is a {type(layer).__name__}; gradients are taken at a torch.nn.Linear"
        )
    return layer


class _Tap:
    def __init__(self, path: str, layer: torch.nn.Linear):
        self.path, self.bias, self.calls = path, layer.bias is not None, 0
        self.handles = [
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after),
        ]

    def _before(self, layer, inputs):
        self.activations = inputs[0].detach()

    def _after(self, layer, inputs, output):
        self.calls += 1
        # Behind an earlier tap the output is already in the graph; in front of all of them it
        # becomes its root.
        self.output = output if output.requires_grad else output.detach().requires_grad_()
        torch.set_grad_enabled(True)  # ends with the caller's no_grad block
        return self.output


@contextmanager
def tap(model: torch.nn.Module, paths: Sequence[str]) -> Iterator[list[_Tap]]:
    """Hooks on the linear layers at ``paths``, removed on exit, always."""
    layers = [(path, linear_layer(model, path)) for path in paths]
    taps = [_Tap(path, layer) for path, layer in layers]
    try:
        yield taps
    finally:
        for handle in (handle for one in taps for handle in one.handles):
            handle.remove()


def tapped_factors(
    model: torch.nn.Module,
    embed: Callable[[torch.Tensor], torch.Tensor],
    views: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor] | Sequence[Callable],
    paths: Sequence[str],
) -> tuple[torch.Tensor, list[Factors]]:
    """The general path: any network, any linear layers, one forward and one backward pass for all
    of them.

    ``embed`` maps (N, 3, s, s) to embeddings (N, D) through ``model``; ``views``: (B, V, 3, s, s);
    ``loss`` maps embeddings (B, V, D) float32 to (B,) losses. Returns embeddings (B, V, D) and one
    ``Factors`` a path. Several losses share the forward pass: all paths of the first one, all of
    the second, ...; none, (): the embeddings alone.
    """
    batch, count = views.shape[:2]
    with tap(model, paths) as taps, torch.no_grad():
        embeddings = embed(views.flatten(0, 1))  # (B * V, D)
        for one in taps:
            if one.calls != 1:
                raise ValueError(
                    f"layer {one.path!r} ran {one.calls} times in one forward pass; it must run exactly once"
                )
    with torch.enable_grad():
        embeddings = embeddings.float().unflatten(0, (batch, count))
        losses, outputs = [loss] if callable(loss) else list(loss), [one.output for one in taps]
        found = [
            loss_gradients(one(embeddings), outputs, keep=one is not losses[-1]) for one in losses
        ]
    activations = [rows(one.activations, batch) for one in taps]
    factors = [
        Factors(a, rows(gradient, batch), one.bias)
        for gradients in found
        for one, a, gradient in zip(taps, activations, gradients, strict=True)
    ]
    return embeddings.detach(), factors


def loss_gradients(
    losses: torch.Tensor, outputs: Sequence[torch.Tensor], keep: bool = False
) -> Sequence[torch.Tensor]:
    """d(sum of losses) / d(outputs); ``keep``: another loss follows. Raises `LossNotFinite` for the
    first sample whose loss is.
    """
    bad = ~torch.isfinite(losses.detach())
    if bad.any():
        first = int(bad.nonzero()[0])
        raise LossNotFinite(first, losses[first].item())
    return torch.autograd.grad(losses.sum(), outputs, retain_graph=keep)


def rows(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """(B * V, T, D) or (B * V, D) -> (B, V * T, D) float32: views and tokens of a sample are one
    axis.
    """
    return tensor.detach().float().reshape(batch, -1, tensor.shape[-1])
