"""From `--method` to the layers that the networks insert. A new method is one more row of METHODS."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from disout import Disout

# A network calls its regularizer with a place ('inner': between a block's convolutions, 'branch': before the addition)
# and the share of the rate that acts there, and inserts what it gets back, if anything. Every layer takes
# forward(x, next_weight=None) and has a settable `dist_prob` and a `distorted`.
Regularizer = Callable[[str, float], nn.Module | None]


class Method(NamedTuple):
    settings: tuple[str, ...]  # the flags it reads; a run records 0 for those that it does not
    layer: Callable[..., nn.Module | None]  # of place, rate, block_size, alpha, inside


METHODS = {
    "none": Method((), lambda *_: None),
    "dropblock": Method(
        ("dist_prob", "block_size", "inside"),
        lambda place, rate, block_size, alpha, inside: Disout(rate, block_size, 0.0, inside),
    ),
    "disout": Method(
        ("dist_prob", "block_size", "alpha", "inside"),
        lambda place, rate, block_size, alpha, inside: Disout(rate, block_size, alpha, inside),
    ),
}


def make_regularizer(method: str, dist_prob: float, block_size: int, alpha: float, inside: bool) -> Regularizer:
    """The function that a network calls once for every place where it can take a layer of `method`."""
    return lambda place, scale: METHODS[method].layer(place, dist_prob * scale, block_size, alpha, inside)


def regularizer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a regularizer put into `model`, in its order of registration."""
    return [module for module in model.modules() if hasattr(module, "dist_prob")]
