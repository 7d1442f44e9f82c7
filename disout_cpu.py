"""What disout.py draws, drawn with less work on a CPU, where every pass over a map counts. On one thread, a training
step of ResNet-56 takes 1.5 times as long with the plain form as without the layer, and 1.06 times with this one
(results/published/benchmark).

The distribution is the same. Each place of a map is still a seed with the probability of `disout.seed_rate`,
independently of the others: the gaps between the hits of such a Bernoulli process are geometric, so the gaps are drawn,
and only as many as there can be seeds. And noise is drawn for the elements of the seeds' blocks alone, as no other is
read. What is left are three passes over the map: for its deviation, the mask and the division by mean(keep). No shape
depends on what was drawn: there is always room for as many seeds as chance can bring at the largest rate.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Above the rate that a layer was made with. They are few, as a compiled network is made for one of them, and
# torch._dynamo gives up after eight.
BOUNDS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class Blocks(NamedTuple):
    """The blocks that are distorted. S slots for seeds, of a map of E elements."""

    # int64 (S, b * b): where the elements lie in the memory of the map. A block that the map's edge cuts names some
    # twice. Slots that are left over repeat the first seed; where there is none, all are of one place that is no seed.
    elements: Tensor
    channel: Tensor  # int64 (S,): the channel that each block is in
    keep: Tensor  # uint8 (E,), in the order of memory: 0 for the elements in a seed's block, else 1


def bound(rate: float, before: str) -> str:
    """At least the largest rate so far, on which the number of slots depends: the first one (`before` is then empty),
    and above it one of BOUNDS. It is text, as a compiler would take a number that changed for a variable, which no
    shape can depend on."""
    if not before:
        return repr(rate)
    higher = rate > float(before) * (1 + 1e-6)  # not for what 0.09 * step / steps rounds to
    return repr(next(bound for bound in BOUNDS if rate <= bound)) if higher else before


def draw_blocks(x: Tensor, rate: Tensor, largest_rate: float, block: Sequence[int], offsets: Sequence[int]) -> Blocks:
    """Draws the seeds of a map.

    Args:
        x: (N, C, H, W), or of one or three dimensions; contiguous, or with C last in memory.
        rate: float32 (), the probability of a seed.
        largest_rate: what it may become.
        block: the sides of a block, each at most the map's.
        offsets: along each dimension, where the block of the first seed in the region (H - b + 1, W - b + 1) begins.
    """
    valid = [side - b + 1 for side, b in zip(x.shape[2:], block, strict=True)]
    places = x.shape[0] * x.shape[1] * math.prod(valid)
    seeds, no_seed = draw_seeds(rate, places, most_seeds(largest_rate, places))
    elements, channel = block_elements(seeds, x, block, offsets)
    return Blocks(elements, channel, keep_mask(elements, no_seed, x))


def distort(x: Tensor, blocks: Blocks, strength: Tensor | float, alpha: float) -> tuple[Tensor, Tensor]:
    """What `disout.distort` returns, y and mean(keep), with the noise that it draws; the strength is (C,), or one
    number."""
    if isinstance(strength, Tensor):
        strength = strength.index_select(0, blocks.channel)[:, None]
    elements = blocks.elements
    noise = torch.randn(elements.shape, dtype=torch.float32) if alpha else torch.zeros((), dtype=torch.float32)
    return replace(x, blocks.keep, elements, noise, strength, alpha)


def most_seeds(rate: float, places: int) -> int:
    """A number of seeds that chance exceeds with a probability below 1e-12 (Bernstein's inequality)."""
    mean, log_chance = rate * places, math.log(1e12)
    above = log_chance / 3 + math.sqrt((log_chance / 3) ** 2 + 2 * log_chance * mean * (1 - rate))
    return max(1, min(places, math.ceil(mean + above)))


def draw_seeds(rate: Tensor, places: int, most: int) -> tuple[Tensor, Tensor]:
    """Makes each of `places` a seed with probability `rate`, independently, but no more than `most` of them, in time
    that grows with `most` alone: the gaps between the hits of a Bernoulli process are geometric, log(uniform) /
    log(1 - rate) rounded up.

    Returns: int64 (most,), the seeds in order, the first of them again in slots that are left over; and bool (1,), True
    where there is none: all slots are then of one place that is no seed.
    """
    # Not 0, whose logarithm is infinite. In float32, as Apple's GPUs have no float64: a chance is off by 2^-24 at most.
    gaps = torch.rand(most, dtype=torch.float32, device=rate.device).clamp_(min=2**-25).log_().div_(torch.log1p(-rate))
    seeds = gaps.ceil_().clamp_(1, 2 * places).cumsum(0, dtype=torch.int64).sub_(1)
    first = seeds[:1]
    return seeds.where(seeds < places, first.clamp(max=places - 1)), first >= places


def block_elements(seeds: Tensor, x: Tensor, block: Sequence[int], offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the elements of each seed's block lie, and its channel, as in `Blocks`. `seeds`, int64 (S,), are numbers of
    places in the regions (H - b + 1, W - b + 1) of all maps (N, C), in this order; the rest is of `draw_blocks`."""
    channels, sides, strides = x.shape[1], x.shape[2:], x.stride()[2:]
    along = []  # (S, b) a dimension, the last one first: what its rows add to an element's place in memory
    for side, b, first, stride in list(zip(sides, block, offsets, strides, strict=True))[::-1]:
        seeds, row = seeds // (side - b + 1), seeds % (side - b + 1)
        rows = _once(row)[:, None] + torch.arange(first, first + b, device=seeds.device)
        along.append((rows.clamp_(max=side - 1) if first else rows).mul_(stride))
    n, channel = seeds // channels, seeds % channels
    elements = _once(n * x.stride(0) + channel * x.stride(1))[:, None]
    for rows in reversed(along):
        elements = (elements[:, :, None] + rows[:, None, :]).flatten(1)
    return _once(elements), channel


def keep_mask(elements: Tensor, no_seed: Tensor, x: Tensor) -> Tensor:
    """`Blocks.keep`: a bool mask would multiply more slowly. `no_seed` is of `draw_seeds`."""
    keep = torch.ones(x.numel(), dtype=torch.uint8, device=x.device)
    return keep.scatter_(0, elements.flatten(), no_seed.to(torch.uint8).expand(elements.numel()))


def replace(
    x: Tensor, keep: Tensor, elements: Tensor, noise: Tensor, strength: Tensor | float, alpha: float
) -> tuple[Tensor, Tensor]:
    """y and mean(keep), with `noise`, float32 (S, b * b), or one number, and `strength`, (S, 1), or one number. Where
    blocks overlap, any of them gives an element its noise. Only the mask and one number are saved for the gradient."""
    kept_share = _count(keep).float() / keep.numel()
    divisor = torch.where(kept_share > 0, kept_share, 1.0)
    # Without a seed all blocks are the first one, and it stays as it is.
    untouched = _once(keep[elements[0, :1]] == 1)
    features = _in_memory(x.detach())[elements[0]].to(torch.promote_types(x.dtype, torch.float32))
    scale = (alpha * deviation(x.detach()) / divisor).view(1) * strength if alpha else divisor.new_zeros(1)
    features, scale = torch.where(untouched, features, 0.0), torch.where(untouched, 0.0, scale)
    values = torch.addcmul(_once(features), noise, _once(scale))
    return _Replaced.apply(x, keep, divisor, elements, values), kept_share


class _Replaced(torch.autograd.Function):
    """x / divisor, with `values` in place of its `elements`, where keep is 0."""

    @staticmethod
    def forward(x: Tensor, keep: Tensor, divisor: Tensor, elements: Tensor, values: Tensor) -> Tensor:
        values = values.to(x.dtype).expand(elements.shape).flatten()
        size = math.prod(x.shape[1:])
        if torch.compiler.is_compiling() and not torch.fx.experimental.symbolic_shapes.has_static_value(size):
            # Inductor cannot put the strides of a view in order where they are symbols, so y must not be one, though
            # that costs a pass.
            replaced = torch.empty_like(x)
            _in_memory(replaced).index_put_((elements.flatten(),), values)
            return torch.where(_as_map(keep, x.shape, x.is_contiguous()) == 1, x / divisor, replaced)
        y = x / divisor
        _in_memory(y).scatter_(0, elements.flatten(), values)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.contiguous = inputs[0].is_contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep, divisor = ctx.saved_tensors
        grad_x = _as_map(keep.to(grad.dtype), grad.shape, ctx.contiguous)
        where_kept = torch.ops.aten.threshold_backward  # also of an infinite gradient, at five times the speed of where
        try:
            where_kept.grad_input(grad, grad_x, 0, grad_input=grad_x)
        except RuntimeError:  # gradients with a graph of their own, or many for the one mask, as vmap has them
            grad_x = where_kept.default(grad, grad_x, 0)
        return grad_x.div_(divisor), None, None, None, None


def deviation(x: Tensor) -> Tensor:
    """std(x), float32 at least, to 0.05 %. It is taken from sums, which are faster, where these are as good: where rows
    have few terms, the mean is not far from 0, and no square is too large or too small."""
    features = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling() or x[0].numel() > 2**20:
        return features.std(correction=min(1, x.numel() - 1))
    rows = _in_memory(features).view(x.shape[0], -1)
    squares = torch.linalg.vector_norm(rows, dim=1).square().sum()
    centred = squares - rows.sum(1).sum().square() / x.numel()
    try:
        good = bool(1e-30 * x.numel() < squares < 16 * centred)
    except RuntimeError:  # traced, without values
        good = False
    return torch.sqrt(centred / max(x.numel() - 1, 1)) if good else features.std(correction=min(1, x.numel() - 1))


def _count(keep: Tensor) -> Tensor:
    """How many of these zeros and ones, uint8 in one dimension, are one: int64. Adds words of eight bytes, 64 of them,
    as a CPU does well."""
    whole = keep.numel() // 512 * 512
    words = keep[:whole].view(torch.int64).view(64, whole // 512).sum(0)
    return words.view(torch.uint8).sum(dtype=torch.int64) + keep[whole:].sum(dtype=torch.int64)


def _in_memory(x: Tensor) -> Tensor:
    """The elements of a map that is contiguous, or has its channels last, in the order of memory, as a view."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).view(-1)


def _as_map(elements: Tensor, shape: Sequence[int], contiguous: bool) -> Tensor:
    """The other way round: a map (N, C, H, W) of elements in the order of memory, as a view."""
    n, channels, *size = shape
    return elements.view(shape) if contiguous else elements.view(n, *size, channels).movedim(-1, 1)


def _once(x: Tensor) -> Tensor:
    """x. as_strided wants memory, so a compiled network computes x once, not again wherever it is read."""
    return x.as_strided(x.shape, x.stride())
