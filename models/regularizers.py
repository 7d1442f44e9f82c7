"""From `--method` to the layers that the networks insert. A new method is one more row of METHODS, and, if the CNN
is to take it, of CNN_METHODS in train.py."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from disout import Disout

# A network calls its regularizer with a place ('inner': between a block's convolutions, 'branch': before the addition,
# 'shortcut': on the other side of it, 'hidden': after a linear layer's ReLU) and the share of the rate that acts there,
# and inserts what it gets back, if anything. Every layer takes forward(x, next_weight=None, groups=None) and has a
# settable `dist_prob` and a `distorted`.
Regularizer = Callable[[str, float], nn.Module | None]


class Dropped(nn.Module):
    """A layer of torch or torchvision that zeroes at its rate `p`, as a regularizer's layer. It draws its mask on ones,
    (N, C, H, W) or (N, F) cut to `dims` dimensions, so that what it dropped can be counted."""

    def __init__(self, layer: nn.Module, dims: int) -> None:
        super().__init__()
        self.layer, self.dims = layer, dims
        self.register_buffer("distorted", torch.zeros((), dtype=torch.float32), persistent=False)

    @property
    def dist_prob(self) -> float:
        return self.layer.p

    @dist_prob.setter
    def dist_prob(self, rate: float) -> None:
        self.layer.p = rate

    def forward(self, x: Tensor, next_weight: Tensor | None = None, groups: int | None = None) -> Tensor:
        return dropout_forward(self, x)


# torch.fx does not look into it, as with Disout.
@fx.wrap
def dropout_forward(module: Dropped, x: Tensor) -> Tensor:
    if not module.training:
        return x
    mask = module.layer(x.new_ones(*x.shape[: module.dims], *(1,) * (x.dim() - module.dims)))
    module.distorted.copy_((mask == 0).float().mean())
    return x * mask


class Method(NamedTuple):
    settings: tuple[str, ...]  # the flags it reads; a run records 0 for those that it does not
    compiles: bool  # once, not anew whenever the rate has grown
    layer: Callable[..., nn.Module | None]  # of place, rate, block_size, alpha, inside


METHODS = {
    "none": Method((), True, lambda *_: None),
    "dropout": Method(("dist_prob", "constant_prob"), False, lambda place, rate, *_: Dropped(nn.Dropout(rate), 4)),
    "spatial_dropout": Method(
        ("dist_prob", "constant_prob"), False, lambda place, rate, *_: Dropped(nn.Dropout2d(rate), 2)
    ),
    "drop_path": Method(
        ("dist_prob", "constant_prob"),
        False,
        lambda place, rate, *_: Dropped(StochasticDepth(rate, "row"), 1) if place == "branch" else None,
    ),
    "dropblock": Method(
        ("dist_prob", "constant_prob", "block_size", "inside"),
        True,
        lambda place, rate, block_size, alpha, inside: Disout(rate, block_size, 0.0, inside),
    ),
    "disout": Method(
        ("dist_prob", "constant_prob", "block_size", "alpha", "inside"),
        True,
        lambda place, rate, block_size, alpha, inside: Disout(rate, block_size, alpha, inside),
    ),
}


def make_regularizer(method: str, dist_prob: float, block_size: int, alpha: float, inside: bool) -> Regularizer:
    """The function that a network calls once for every place where it can take a layer of `method`."""
    return lambda place, scale: METHODS[method].layer(place, dist_prob * scale, block_size, alpha, inside)


def regularizer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a regularizer put into `model`, in its order of registration."""
    return [module for module in model.modules() if hasattr(module, "dist_prob")]
