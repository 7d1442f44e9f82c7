"""Disout: feature map distortion, from "Beyond Dropout: Feature Map Distortion to Regularize Deep Neural Networks"
(AAAI 2020, arXiv 2002.11022). This file is the whole method and imports torch only: copy it into your project.

Where the paper's formula went
    The paper bounds the generalization gap by the Rademacher complexity of the next layer and asks for the distortion
    of the feature map that makes this bound small. The authors' code does not solve that problem in each step, nor does
    this one. Both take the simplified gradient of the complexity term (section "Optimization of the Distortion",
    equation 15) as the size of the distortion and draw its direction at random:

    how the next layer's weight enters it      strength()   s_c = mean over k x k of (random signs * max over out of W)
    the distortion, relative to the features   distort()    d = alpha * s_c * std(x) * n, n standard normal
    the elements that are distorted            draw_seeds() at seed_rate(), and keep_mask() of the blocks around them
    the distorted map                          distort()    y = (keep * x + (1 - keep) * d) / mean(keep)

    alpha = 0 is DropBlock; block_size = 1 is the paper's element-wise "Feature Map Distortion".

Two forms
    The plain form follows the class and is the formula as it stands on paper: some 30 kernels, and one byte an
    element kept for the backward pass. On a CPU, where every pass over the map counts, the second form draws the same
    distribution with less work. Neither waits for the device, and a network with these layers compiles to one graph;
    torch.func.grad of it to several. Compiled for several threads of a CPU, the same seed gives the same bits only
    with torch.use_deterministic_algorithms(True), as blocks overlap.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# What takes the place of strength() where no layer reads the map next (authors' code).
NO_READER_STRENGTH = 0.01
# On a CPU, of a rate raised above the one given at construction. Few, as a compiled network is made for one of them,
# and torch._dynamo gives up after eight.
BOUNDS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
Rate = TypeVar("Rate", Tensor, float)


class Disout(nn.Module):
    """In training, replaces random blocks of a feature map by noise whose size comes from the weight that reads the map
    next. The identity in evaluation.

    Args:
        dist_prob: share of the elements to distort, 0 to 1. Settable, so that a schedule can let it grow; give the
            final one here: a CPU draws for as many seeds as this one can bring, and a network is compiled for it.
            Above it there is room for the next of 1/32, 1/16, ... 1: up to twice as much is drawn, and a compiled
            network compiles anew when a rate first passes one of these; an exported one never passes the first.
            Module.half() and bfloat16() round it; set it again after Module.to_empty().
        block_size: side of a block, at least 1; cut to the map, per side, where the map is smaller.
        alpha: intensity of the distortion, at least 0.
        inside: keep even blocks wholly inside the map. The authors place the block of a seed in row i, for an even
            block_size b, in rows i - b/2 + 1 to i + b/2, but allow the seeds b/2 to H - b/2 (columns likewise), so the
            first row is never distorted and the last block is cut. Their accuracies are those of this code, hence the
            default. Odd blocks lie inside either way, as does a block that covers the map along each side. An even one
            that covers one side alone is still shifted and cut there: of maps 2 x 40, at block_size 6 and dist_prob
            0.1, the first row is never distorted, and 4.76 % of the elements are (9.57 % inside).
                rows of an 8-row map          0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7
                block_size 6, as the authors  . # # # # # # .   . . # # # # # #   . . . # # # # #
                block_size 6, inside          # # # # # # . .   . # # # # # # .   . . # # # # # #
            On 8 x 8 at dist_prob 0.09, 7.61 % of the elements are distorted on average as the authors place blocks, and
            8.57 % inside (9 % but for overlaps).
        features_last: the features are the input's last dimension, as linear and batch-first recurrent layers have it.

    Attributes:
        distorted: 0-dim tensor, the share of elements distorted in the last training forward outside torch.func.

    Raises:
        ValueError: naming the argument and its value, where it makes no sense.

    Source: the authors' code; the paper for single elements. `inside`, `features_last` and maps of one or three sides
    are ours. torch.jit.script does not take it: `eval()` and torch.jit.trace, or torch.export, do. Nor, on a CPU, does
    forward-mode differentiation, unless `disout.for_cpu = lambda x: False` chooses the plain form.
    """

    block_size: int
    alpha: float
    inside: bool
    features_last: bool
    distorted: Tensor
    _dist_prob: Tensor
    _prob: float
    _bound: str

    def __init__(
        self,
        dist_prob: float,
        block_size: int = 6,
        alpha: float = 1.0,
        inside: bool = False,
        features_last: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(block_size, Integral) or block_size < 1:
            raise ValueError(f"block_size must be a whole number of at least 1, not {block_size!r}")
        if not isinstance(alpha, Real) or not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be a finite number of at least 0, not {alpha!r}")
        self.block_size = int(block_size)
        self.alpha = float(alpha)
        self.inside = inside
        self.features_last = features_last
        # A tensor, so that a compiled network does not recompile with every rate; not in the state dict, so that the
        # layer can be put into a trained network and taken out again.
        self.register_buffer("_dist_prob", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("distorted", torch.zeros((), dtype=torch.float32), persistent=False)
        # At least the largest rate set so far: bounds the number of seeds. Text, as a compiler would take a number that
        # changed for a variable, which no shape can depend on.
        self._bound = "1.0"
        self.dist_prob = dist_prob
        self._bound = repr(self._prob)

    @property
    def dist_prob(self) -> float:
        return self._prob

    @dist_prob.setter
    def dist_prob(self, value: float) -> None:
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"dist_prob must be a number from 0 to 1, not {value!r}")
        self._prob = float(value)
        self._dist_prob.fill_(self._prob)
        if self._prob > float(self._bound) * (1 + 1e-6):  # not for what 0.09 * step / steps rounds to
            self._bound = repr(next(bound for bound in BOUNDS if self._prob <= bound))

    def forward(self, x: Tensor, next_weight: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Args:
            x: feature map (N, C, H, W), (N, C, L) or (N, C, D, H, W), or features (N, F), which count as maps of one
                element; with `features_last`, C or F comes last. Any floating-point dtype.
            next_weight: weight of the convolution (out, C/groups, k, k; a transposed one's as .transpose(0, 1)) or
                linear layer (out, C) that reads `x` next. No gradient. None where nothing reads it: strength 0.01.
                That of fully_shard (FSDP2) is gathered in each forward, so all ranks must call the same layers.
            groups: of the layer that reads, 1 for a linear or transposed one; tells a weight that only happens to fit.
                None: C over the weight's second dimension.
        Returns: tensor of x's shape and dtype; in evaluation x itself.
        Raises:
            ValueError: x, or next_weight with these groups, is of no such shape; next_weight has no elements, or is on
                meta; in training, x is on another device than the layer, which .to() moves.
            RuntimeError: torch.func.vmap maps x, in training.
        """
        return distorted_map(self, x, next_weight, groups)

    def extra_repr(self) -> str:
        more = "".join(f", {name}=True" for name in ("inside", "features_last") if getattr(self, name))
        return f"dist_prob={self.dist_prob:g}, block_size={self.block_size}, alpha={self.alpha:g}{more}"


# torch.fx does not look into it, so that it can trace a network with this layer, in evaluation or training.
@fx.wrap
def distorted_map(layer: Disout, x: Tensor, next_weight: Tensor | None, groups: int | None) -> Tensor:
    """What `layer` makes of its arguments."""
    if not layer.training:
        return x
    if not 2 <= x.dim() <= 5 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point, of 2 to 5 dimensions, not {x.dtype} {tuple(x.shape)}")
    if x.numel() == 0:
        return x
    if layer._dist_prob.device != x.device:
        raise ValueError(f"the layer is on {layer._dist_prob.device}, x on {x.device}: move the layer with .to()")
    transformed = under_torch_func(x)
    if transformed and torch.func.debug_unwrap(x, recurse=True).dim() > x.dim():
        raise RuntimeError("Disout has statistics of a whole batch: not under torch.func.vmap, take a loop instead")
    maps = x.movedim(-1, 1) if layer.features_last else x
    maps = maps[..., None] if x.dim() == 2 else maps
    if not maps.movedim(1, -1).is_contiguous():
        maps = maps.contiguous()

    if for_cpu(x):
        y, kept_share = cpu_distorted_map(layer, maps, next_weight, groups)
    else:
        seeds = draw_seeds(layer._dist_prob, maps, layer.block_size)
        keep = keep_mask(seeds, maps.shape[2:], layer.block_size, layer.inside)
        s = NO_READER_STRENGTH if next_weight is None else strength(next_weight, draw_signs(next_weight, maps), groups)
        noise = torch.randn_like(maps, dtype=torch.float32) if layer.alpha else layer._dist_prob.new_zeros(())
        y, kept_share = distort(maps, keep, noise, s, layer.alpha)

    if not transformed:  # torch.func allows no change of what is not returned
        layer.distorted.copy_(1 - kept_share)
    y = y.view(y.shape[: x.dim()])
    return y.movedim(1, -1) if layer.features_last else y


def for_cpu(x: Tensor) -> bool:
    """Whether x is distorted in the form for CPUs."""
    return x.device.type == "cpu"


def under_torch_func(x: Tensor) -> bool:
    """Whether a transform of torch.func is active: torch says so under a private name, x if it takes part in one."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active() if active else torch.func.debug_unwrap(x, recurse=True) is not x


# The plain form


def cut_block(block_size: int, size: Sequence[int]) -> list[int]:
    """The sides of a block, b, cut to a map of this size. Not by min(), which a compiler that traces sizes as symbols
    would carry into every shape."""
    return [side if side < block_size else block_size for side in size]


def seed_rate(dist_prob: Rate, size: Sequence[int], block_size: int) -> tuple[Rate, list[int]]:
    """The probability of a seed, gamma = p * H * W / b^2 / ((H - b + 1)(W - b + 1)), and the size
    (H - b + 1, W - b + 1) of the region that seeds are drawn in, whose first row is row b // 2 of the map. With one
    side or three likewise. Source: the authors' code, after DropBlock (arXiv 1810.12890).
    """
    block = cut_block(block_size, size)
    valid = [side - b + 1 for side, b in zip(size, block, strict=True)]
    return dist_prob * (math.prod(size) / (math.prod(block) * math.prod(valid))), valid


def first_row(b: int, block: Sequence[int], size: Sequence[int], inside: bool) -> int:
    """Where a block begins along a side of b, counted from its seed's row in the region of `seed_rate`. The authors
    shift an even side by one, but not in a block that covers the whole map."""
    return int(b % 2 == 0 and not inside and list(block) != list(size))


def draw_seeds(dist_prob: Tensor, x: Tensor, block_size: int) -> Tensor:
    """Each place of the region a seed with the probability of `seed_rate`, independently: bool, in the layout of x,
    (N, C, H - b + 1, W - b + 1)."""
    rate, valid = seed_rate(dist_prob, x.shape[2:], block_size)
    region = x.detach()[(slice(None), slice(None), *(slice(side) for side in valid))]
    return torch.rand_like(region, dtype=torch.float32) < rate


def keep_mask(seeds: Tensor, size: Sequence[int], block_size: int, inside: bool = False) -> Tensor:
    """bool (N, C, H, W), False in the block of each seed (N, C, H - b + 1, W - b + 1). `inside` is as in `Disout`."""
    if len(size) == 1:  # a map of one row, as padding and pooling of one side forget where the channels lie
        return keep_mask(seeds[:, :, None], (1, *size), block_size, inside)[:, :, 0]
    block = cut_block(block_size, size)
    padding = []  # before and after a side, the last side first
    for b in reversed(block):
        before = b - 1 + first_row(b, block, size, inside)
        padding += [before, 2 * (b - 1) - before]
    pool = F.max_pool2d if len(size) == 2 else F.max_pool3d
    return pool(F.pad(seeds.float(), padding), block, stride=1) == 0


def draw_signs(next_weight: Tensor, x: Tensor) -> Tensor:
    """+1 or -1, each as often, for `strength`: int64 (C, k, k)."""
    return torch.randint(0, 2, (x.shape[1], *next_weight.shape[2:]), device=x.device) * 2 - 1


def strength(next_weight: Tensor, signs: Tensor, groups: int | None = None) -> Tensor:
    """How strongly the next layer reads each channel, with a random sign: s_c = mean over k x k of
    (signs * max over out of W), the signed maximum; a tenth of it where k = 1. No gradient flows into the weight.

    Args:
        next_weight: (out, C/groups, k, k), or (out, C) of a linear layer, which counts as k = 1.
        signs: +1 or -1, (C, k, k), or (C,) for a linear layer.
        groups: as in `Disout.forward`.

    Returns: float32 (C,). In a grouped layer the maximum is over the outputs of the channel's own group.
    Source: the authors' code; equation 15 of the paper, simplified. Theirs takes no linear layer: its tenth is ours.
    """
    channels, shape = signs.shape[0], tuple(next_weight.shape)
    if groups is None:
        groups = channels // shape[1] if len(shape) > 2 and shape[1] else 1
    elif not isinstance(groups, Integral) or groups < 1:
        raise ValueError(f"groups must be a whole number of at least 1, not {groups!r}")
    on_meta = next_weight.is_meta and not signs.is_meta
    fits = len(shape) >= (3 if groups > 1 else 2) and groups * shape[1] == channels and shape[0] % groups == 0
    if not fits or 0 in shape or on_meta:
        expected = f"(out, C/groups, k, k) or (out, C) for C = {channels} and groups = {groups}"
        raise ValueError(f"next_weight must be {expected}, not {shape}{' on meta' if on_meta else ''}")
    weight = whole_weight(next_weight).float()
    # To the map's device, should the network be split between the two.
    largest = weight.view(groups, -1, *shape[1:]).amax(dim=1).reshape(channels, -1).to(signs.device)
    s = (largest * signs.reshape(channels, -1)).mean(dim=1)
    return 0.1 * s if largest.shape[1] == 1 else s


def whole_weight(weight: Tensor) -> Tensor:
    """weight, without gradient, gathered from all processes where fully_shard (FSDP2) has split it among them."""
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def distort(x: Tensor, keep: Tensor, noise: Tensor, strength: Tensor | float, alpha: float) -> tuple[Tensor, Tensor]:
    """y = (keep * x + (1 - keep) * d) / mean(keep), with d = alpha * strength * std(x) * noise.

    Args:
        x: (N, C, H, W), or of one or three sides.
        keep: bool, the shape of x. y has its layout.
        noise: standard normal, the shape of x, or one number.
        strength: (C,), or one number for all channels.
        alpha: intensity.
    Returns: y of x's shape and dtype, and mean(keep). The mean is over the whole batch, and y is divided by 1 where
    nothing is kept. std(x), float32 at least and unbiased over the whole batch, takes no gradient, so the gradient is
    keep / mean(keep), and only the mask and one number are saved for it. Source: the authors' code.
    """
    kept_share = keep.sum().float() / keep.numel()
    if alpha:
        std = deviation(x.detach()).view([1] * x.dim())  # so that a float64 map has noise of float64
        s = strength.view(-1, *[1] * (x.dim() - 2)) if isinstance(strength, Tensor) else strength
        d = (alpha * std * s * noise).to(x.dtype)
    else:
        d = x.new_zeros(())
    return torch.where(keep, x, d) / torch.where(kept_share > 0, kept_share, 1.0), kept_share


def deviation(x: Tensor) -> Tensor:
    """std(x), in float32 at least; 0 of one element."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).std(correction=min(1, x.numel() - 1))


# The form for CPUs: the same distribution in few passes over the map, for its deviation, the mask and the division by
# mean(keep). Only seeds are drawn, and noise for their blocks: always as many as chance can bring at the largest rate,
# so that no shape depends on what was drawn.


def cpu_distorted_map(
    layer: Disout, x: Tensor, next_weight: Tensor | None, groups: int | None
) -> tuple[Tensor, Tensor]:
    """y and mean(keep) for a map that is contiguous, or has its channels last."""
    rate, valid = seed_rate(layer._dist_prob, x.shape[2:], layer.block_size)
    places = x.shape[0] * x.shape[1] * math.prod(valid)
    most = cpu_most_seeds(seed_rate(float(layer._bound), x.shape[2:], layer.block_size)[0], places)
    seeds, no_seed = cpu_draw_seeds(rate, places, most)
    elements, channel = cpu_block_elements(seeds, x, layer.block_size, layer.inside)
    keep = cpu_keep_mask(elements, no_seed, x)
    s: Tensor | float = NO_READER_STRENGTH
    if next_weight is not None:
        s = strength(next_weight, draw_signs(next_weight, x), groups).index_select(0, channel)[:, None]
    noise = torch.randn(elements.shape, dtype=torch.float32, device=x.device) if layer.alpha else rate.new_zeros(())
    return cpu_distort(x, keep, elements, noise, s, layer.alpha)


def cpu_most_seeds(rate: float, places: int) -> int:
    """A number of seeds that chance exceeds with a probability below 1e-12 (Bernstein's inequality). A symbol where
    `places` is one, as torch.export has it; torch.compile follows Python's own functions, in torch 2.11 these alone."""
    of_symbols: Any = torch.sym_sqrt, torch.sym_min, torch.sym_max
    sqrt, least, largest = of_symbols if isinstance(places, torch.SymInt) else (math.sqrt, min, max)
    mean, log_chance = rate * places, math.log(1e12)
    above = log_chance / 3 + sqrt((log_chance / 3) ** 2 + 2 * log_chance * mean * (1 - rate))
    most: int = largest(1, least(places, math.ceil(mean + above)))
    return most


def cpu_draw_seeds(rate: Tensor, places: int, most: int) -> tuple[Tensor, Tensor]:
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


def cpu_block_elements(seeds: Tensor, x: Tensor, block_size: int, inside: bool = False) -> tuple[Tensor, Tensor]:
    """The elements of each seed's block.

    Args:
        seeds: int64 (S,), numbers of places in the regions (H - b + 1, W - b + 1) of all maps (N, C), in this order.
        x: (N, C, H, W), or of one or three sides; contiguous, or with C last in memory.
        block_size, inside: as in `Disout`.
    Returns: int64 (S, b * b), where the elements lie in the memory of x (a block that the map's edge cuts names some
    twice; b is cut to the map, per side), and int64 (S,), the channel that each block is in.
    """
    _, channels, *size = x.shape
    block = cut_block(block_size, size)
    along = []  # (S, b) a side, the last side first: what its rows add to an element's place in memory
    for side, b, stride in list(zip(size, block, x.stride()[2:], strict=True))[::-1]:
        seeds, row = seeds // (side - b + 1), seeds % (side - b + 1)
        first = first_row(b, block, size, inside)
        rows = _cpu_once(row)[:, None] + torch.arange(first, first + b, device=seeds.device)
        along.append((rows.clamp_(max=side - 1) if first else rows).mul_(stride))
    n, channel = seeds // channels, seeds % channels
    elements = _cpu_once(n * x.stride(0) + channel * x.stride(1))[:, None]
    for rows in reversed(along):
        elements = (elements[:, :, None] + rows[:, None, :]).flatten(1)
    return _cpu_once(elements), channel


def cpu_keep_mask(elements: Tensor, no_seed: Tensor, x: Tensor) -> Tensor:
    """uint8 (N * C * H * W,), in the order of x's memory: 0 for the elements in a seed's block, else 1. `elements` is
    of `cpu_block_elements`, `no_seed` of `cpu_draw_seeds`. (A bool mask multiplies more slowly on a CPU.)"""
    keep = torch.ones(x.numel(), dtype=torch.uint8, device=x.device)
    return keep.scatter_(0, elements.flatten(), no_seed.to(torch.uint8).expand(elements.numel()))


def cpu_distort(
    x: Tensor, keep: Tensor, elements: Tensor, noise: Tensor, strength: Tensor | float, alpha: float
) -> tuple[Tensor, Tensor]:
    """What `distort` returns; only the mask and one number are saved for the gradient here, too.

    Args:
        x: (N, C, H, W), contiguous or channels_last.
        keep: uint8, from `cpu_keep_mask`.
        elements: int64 (S, b * b), from `cpu_block_elements`: where keep is 0. If it is 0 nowhere, any of one block.
        noise: standard normal, (S, b * b), or one number. Where blocks overlap, any of them gives an element its noise.
        strength: (S, 1), or one number for all channels.
        alpha: intensity.
    Returns: as `distort`.
    """
    kept_share = _cpu_count(keep).float() / keep.numel()
    divisor = torch.where(kept_share > 0, kept_share, 1.0)
    # Without a seed all blocks are the first one, and it stays as it is.
    untouched = _cpu_once(keep[elements[0, :1]] == 1)
    features = _cpu_in_memory(x.detach())[elements[0]].to(torch.promote_types(x.dtype, torch.float32))
    scale = (alpha * cpu_deviation(x.detach()) / divisor).view(1) * strength if alpha else divisor.new_zeros(1)
    features, scale = torch.where(untouched, features, 0.0), torch.where(untouched, 0.0, scale)
    values = torch.addcmul(_cpu_once(features), noise, _cpu_once(scale))
    return _CpuReplaced.apply(x, keep, divisor, elements, values), kept_share


class _CpuReplaced(torch.autograd.Function):
    """x / divisor, with `values` in place of its `elements`, where keep is 0."""

    @staticmethod
    def forward(x: Tensor, keep: Tensor, divisor: Tensor, elements: Tensor, values: Tensor) -> Tensor:
        values = values.to(x.dtype).expand(elements.shape).flatten()
        size = math.prod(x.shape[1:])
        if torch.compiler.is_compiling() and not torch.fx.experimental.symbolic_shapes.has_static_value(size):
            # Inductor cannot put the strides of a view in order where they are symbols, so y must not be one, though
            # that costs a pass.
            replaced = torch.empty_like(x)
            _cpu_in_memory(replaced).index_put_((elements.flatten(),), values)
            return torch.where(_cpu_as_map(keep, x.shape, x.is_contiguous()) == 1, x / divisor, replaced)
        y = x / divisor
        _cpu_in_memory(y).scatter_(0, elements.flatten(), values)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.contiguous = inputs[0].is_contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep, divisor = ctx.saved_tensors
        grad_x = _cpu_as_map(keep.to(grad.dtype), grad.shape, ctx.contiguous)
        where_kept = torch.ops.aten.threshold_backward  # also of an infinite gradient, at five times the speed of where
        try:
            where_kept.grad_input(grad, grad_x, 0, grad_input=grad_x)
        except RuntimeError:  # gradients with a graph of their own, or many for the one mask, as vmap has them
            grad_x = where_kept.default(grad, grad_x, 0)
        return grad_x.div_(divisor), None, None, None, None


def cpu_deviation(x: Tensor) -> Tensor:
    """What `deviation` returns, to 0.05 %, from sums in float32, which are faster, where these are as good: rows of few
    terms, no mean far from 0, no squares too large or too small. Compiled, it is `deviation`."""
    if torch.compiler.is_compiling() or x[0].numel() > 2**20:
        return deviation(x)
    rows = _cpu_in_memory(x.to(torch.promote_types(x.dtype, torch.float32))).view(x.shape[0], -1)
    squares = torch.linalg.vector_norm(rows, dim=1).square().sum()
    centred = squares - rows.sum(1).sum().square() / x.numel()
    try:
        good = bool(1e-30 * x.numel() < squares < 16 * centred)
    except RuntimeError:  # traced, without values
        good = False
    return torch.sqrt(centred / max(x.numel() - 1, 1)) if good else deviation(x)


def _cpu_count(keep: Tensor) -> Tensor:
    """How many of these zeros and ones, uint8 in one dimension, are one: int64. Adds words of eight bytes, 64 of them,
    as a CPU does well."""
    if torch.compiler.is_exporting():  # words would tie the number of elements to the example's
        return keep.sum(dtype=torch.int64)
    whole = keep.numel() // 512 * 512
    words = keep[:whole].view(torch.int64).view(64, whole // 512).sum(0)
    return words.view(torch.uint8).sum(dtype=torch.int64) + keep[whole:].sum(dtype=torch.int64)


def _cpu_in_memory(x: Tensor) -> Tensor:
    """The elements of a map that is contiguous, or has its channels last, in the order of memory, as a view."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).view(-1)


def _cpu_as_map(elements: Tensor, shape: Sequence[int], contiguous: bool) -> Tensor:
    """The other way round: a map (N, C, H, W) of elements in the order of memory, as a view."""
    n, channels, *size = shape
    return elements.view(shape) if contiguous else elements.view(n, *size, channels).movedim(-1, 1)


def _cpu_once(x: Tensor) -> Tensor:
    """x. as_strided wants memory, so a compiled network computes x once, not again wherever it is read."""
    return x.as_strided(x.shape, x.stride())
