"""Disout: feature map distortion, from "Beyond Dropout: Feature Map Distortion to Regularize Deep Neural Networks"
(AAAI 2020, arXiv 2002.11022). This file is the whole method and imports torch only: copy it into your project.

Where the paper's formula went
    The paper bounds the generalization gap by the Rademacher complexity of the next layer and asks for the distortion
    of the feature map that makes this bound small. Neither the authors' code nor this one solves that problem in each
    step. Both take the simplified gradient of the complexity term (the paper's section "Optimization of the
    Distortion", equation 15) as the size of the distortion and draw its direction at random:

    how the next layer's weight enters it      strength()    s_c = mean over k x k of (random signs * max over out of W)
    the distortion, relative to the features   distort()     d = alpha * s_c * std(x) * n, n standard normal
    the elements that are distorted            draw_seeds()  at seed_rate(), and block_elements() around them
    the distorted map                          distort()     y = (keep * x + (1 - keep) * d) / mean(keep)

    alpha = 0 is DropBlock; block_size = 1 is the paper's element-wise "Feature Map Distortion".

What it costs
    The whole map is passed over for its deviation, for the division by mean(keep) and for the mask. Seeds are few, so
    only they are drawn, and noise only for their blocks: always as many as chance can bring at the largest rate, so
    that no tensor's shape depends on what was drawn. Nothing waits for the device, and a network with these layers
    compiles to one graph.
"""

import math
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# What takes the place of strength() where no layer reads the map next (authors' code).
NO_READER_STRENGTH = 0.01
Rate = TypeVar("Rate", Tensor, float)


class Disout(nn.Module):
    """In training, replaces random blocks of a feature map by noise whose size comes from the weight that reads the map
    next. The identity in evaluation.

    Args:
        dist_prob: share of the elements to distort, 0 to 1. Settable, so that a schedule can let it grow; give the
            final one here, as a compiled network compiles anew for a larger one than any before.
        block_size: side of a block, at least 1; cut to the map, per side, where the map is smaller.
        alpha: intensity of the distortion, at least 0.
        inside: keep even blocks wholly inside the map. The authors place the block of a seed in row i, for an even
            block_size b, in rows i - b/2 + 1 to i + b/2, but allow the seeds b/2 to H - b/2 (columns likewise), so the
            first row is never distorted and the last block is cut. Their accuracies are those of this code, hence the
            default. Odd blocks, and blocks that cover the whole map, lie inside either way.

                rows of an 8-row map          0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7
                block_size 6, as the authors  . # # # # # # .   . . # # # # # #   . . . # # # # #
                block_size 6, inside          # # # # # # . .   . # # # # # # .   . . # # # # # #

            On 8 x 8 at dist_prob 0.09, 7.61 % of the elements are distorted on average as the authors place blocks, and
            8.57 % inside (9 % but for overlaps).
        features_last: the features are the last dimension of the input, as linear and recurrent layers leave them, not
            the second.

    Attributes:
        distorted: 0-dim tensor, the share of elements distorted in the last training forward.

    Raises:
        ValueError: naming the argument and its value, where it makes no sense.

    Source: the authors' code; the paper for the element-wise case. `inside` and `features_last` are ours.
    """

    block_size: int
    alpha: float
    inside: bool
    features_last: bool
    distorted: Tensor
    _dist_prob: Tensor
    _prob: float
    _largest_prob: float

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
        self.block_size = block_size
        self.alpha = float(alpha)
        self.inside = inside
        self.features_last = features_last
        # A tensor, so that a compiled network does not recompile with every rate; not in the state dict, so that the
        # layer can be put into a trained network and taken out again.
        self.register_buffer("_dist_prob", torch.zeros(()), persistent=False)
        self.register_buffer("distorted", torch.zeros(()), persistent=False)
        self._largest_prob = 0.0  # set so far: bounds the number of seeds
        self.dist_prob = dist_prob

    @property
    def dist_prob(self) -> float:
        return self._prob

    @dist_prob.setter
    def dist_prob(self, value: float) -> None:
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"dist_prob must be a number from 0 to 1, not {value!r}")
        self._prob = float(value)
        self._dist_prob.fill_(self._prob)
        self._largest_prob = max(self._largest_prob, self._prob)

    def forward(self, x: Tensor, next_weight: Tensor | None = None) -> Tensor:
        """Args:
            x: feature map (N, C, H, W), (N, C, L), or features (N, F), which count as maps of 1 x 1; with
                `features_last` (N, H, W, C) and (N, L, F). Any floating-point dtype.
            next_weight: weight of the convolution (out, C/groups, k, k) or linear layer (out, C) that reads `x` next.
                It takes no gradient. None where nothing reads it: the strength is then 0.01.

        Returns: tensor of x's shape and dtype; in evaluation x itself.
        """
        if x.dim() not in (2, 3, 4) or not x.is_floating_point():
            raise ValueError(f"x must be floating-point, of 2, 3 or 4 dimensions, not {x.dtype} {tuple(x.shape)}")
        if not self.training or x.numel() == 0:
            return x
        maps = x.movedim(-1, 1) if self.features_last else x
        maps = maps[(...,) + (None,) * (4 - x.dim())]
        if not maps.is_contiguous(memory_format=torch.channels_last):
            maps = maps.contiguous()
        n, channels, *sides = maps.shape
        size = (sides[0], sides[1])

        # What is distorted
        rate, valid = seed_rate(self._dist_prob, size, self.block_size)
        places = n * channels * valid[0] * valid[1]
        most = most_seeds(seed_rate(self._largest_prob, size, self.block_size)[0], places)
        seeds, no_seed = draw_seeds(rate, places, most)
        elements, channel = block_elements(seeds, maps, self.block_size, self.inside)
        keep = keep_mask(elements, no_seed, maps)

        # By what
        s: Tensor | float = NO_READER_STRENGTH
        if next_weight is not None:
            signs = torch.randint(0, 2, (channels, *next_weight.shape[2:]), device=x.device) * 2 - 1
            s = strength(next_weight, signs).index_select(0, channel)[:, None]
        noise = torch.randn(elements.shape, device=x.device) if self.alpha else torch.zeros((), device=x.device)
        y, kept_share = distort(maps, keep, elements, noise, s, self.alpha)
        self.distorted.copy_(1 - kept_share)
        y = y.view(y.shape[: x.dim()])
        return y.movedim(1, -1) if self.features_last else y

    def extra_repr(self) -> str:
        more = "".join(f", {name}=True" for name in ("inside", "features_last") if getattr(self, name))
        return f"dist_prob={self.dist_prob:g}, block_size={self.block_size}, alpha={self.alpha:g}{more}"


def seed_rate(dist_prob: Rate, size: tuple[int, int], block_size: int) -> tuple[Rate, tuple[int, int]]:
    """The probability of a seed, gamma = p * H * W / b^2 / ((H - b + 1)(W - b + 1)), and the size
    (H - b + 1, W - b + 1) of the region that seeds are drawn in, whose first row is row b // 2 of the map.

    Source: the authors' code, after DropBlock (arXiv 1810.12890).
    """
    (height, width), (block_h, block_w) = size, _cut(block_size, size)
    valid = (height - block_h + 1, width - block_w + 1)
    return dist_prob * (height * width / (block_h * block_w * valid[0] * valid[1])), valid


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
    gaps = torch.rand(most, dtype=torch.float64, device=rate.device).log_().div_(torch.log1p(-rate.double()))
    seeds = gaps.ceil_().clamp_(1, places + 1).cumsum(0, dtype=torch.int64).sub_(1)
    first = seeds[:1]
    return seeds.where(seeds < places, first.clamp(max=places - 1)), first >= places


def block_elements(seeds: Tensor, x: Tensor, block_size: int, inside: bool = False) -> tuple[Tensor, Tensor]:
    """The elements of each seed's block.

    Args:
        seeds: int64 (S,), numbers of places in the regions (H - b + 1, W - b + 1) of all maps (N, C), in this order.
        x: (N, C, H, W), contiguous or channels_last.
        block_size, inside: as in `Disout`.

    Returns: int64 (S, b * b), where the elements lie in the memory of x (a block that the map's edge cuts names some
    twice; b is cut to the map, per side), and int64 (S,), the channel that each block is in.
    """
    _, channels, *sides = x.shape
    size, device = (sides[0], sides[1]), seeds.device
    block_h, block_w = _cut(block_size, size)
    valid_h, valid_w = size[0] - block_h + 1, size[1] - block_w + 1
    maps, rest = _divide(seeds, valid_h * valid_w)
    n, channel = _divide(maps, channels)
    row, column = _divide(rest, valid_w)
    # The authors shift an even side by one, but not in a block that covers the whole map.
    shifted = not inside and (block_h, block_w) != size
    first_h, first_w = int(shifted and block_h % 2 == 0), int(shifted and block_w % 2 == 0)
    rows = row[:, None] + torch.arange(first_h, first_h + block_h, device=device)
    columns = column[:, None] + torch.arange(first_w, first_w + block_w, device=device)
    rows, columns = rows.clamp(max=size[0] - 1) * x.stride(2), columns.clamp(max=size[1] - 1) * x.stride(3)
    rows += (n * x.stride(0)).add(channel, alpha=x.stride(1))[:, None]
    return (rows[:, :, None] + columns[:, None, :]).flatten(1), channel


def keep_mask(elements: Tensor, no_seed: Tensor, x: Tensor) -> Tensor:
    """uint8 (N, C, H, W) in the memory format of x: 0 for the elements in a seed's block, else 1.

    `elements` is that of `block_elements`, `no_seed` that of `draw_seeds`. (A bool mask takes four times as long to
    multiply with on a CPU.)
    """
    keep = torch.ones_like(x, dtype=torch.uint8)
    _in_memory(keep).scatter_(0, elements.flatten(), no_seed.view(torch.uint8).expand(elements.numel()))
    return keep


def strength(next_weight: Tensor, signs: Tensor) -> Tensor:
    """How strongly the next layer reads each channel, with a random sign: s_c = mean over k x k of
    (signs * max over out of W), the signed maximum; a tenth of it where k = 1. No gradient flows into the weight.

    Args:
        next_weight: (out, C/groups, k, k), or (out, C) of a linear layer, which counts as k = 1.
        signs: +1 or -1, (C, k, k), or (C,) for a linear layer.

    Returns: float32 (C,). In a grouped layer the maximum is over the outputs of the channel's own group.
    Source: the authors' code; equation 15 of the paper, simplified.
    """
    channels, shape = signs.shape[0], tuple(next_weight.shape)
    groups = channels // shape[1] if len(shape) > 2 and shape[1] else 1
    if len(shape) < 2 or groups * shape[1] != channels or shape[0] % groups:
        raise ValueError(f"next_weight must be (out, C/groups, k, k) or (out, C) for C = {channels}, not {shape}")
    weight = next_weight.detach().float()
    largest = weight.view(groups, -1, *shape[1:]).amax(dim=1).reshape(channels, -1)
    s = (largest * signs.reshape(channels, -1)).mean(dim=1)
    return 0.1 * s if largest.shape[1] == 1 else s


def distort(
    x: Tensor, keep: Tensor, elements: Tensor, noise: Tensor, strength: Tensor | float, alpha: float
) -> tuple[Tensor, Tensor]:
    """y = (keep * x + (1 - keep) * d) / mean(keep), with d = alpha * strength * std(x) * noise.

    Args:
        x: (N, C, H, W), contiguous or channels_last.
        keep: uint8, the shape and memory format of x, from `keep_mask`.
        elements: int64 (S, b * b), from `block_elements`: those where keep is 0. If it is 0 nowhere, any of one block.
        noise: standard normal, (S, b * b), or one number. Where blocks overlap, any of them gives an element its noise.
        strength: (S, 1), or one number for all channels.
        alpha: intensity.

    Returns: y of x's shape and dtype, and mean(keep); the statistics are float32 at least. The mean is over the whole
    batch, and y is divided by 1 where nothing is kept. std(x), unbiased over the whole batch, takes no gradient, so the
    gradient is keep / mean(keep), and only the mask and one number are kept for the backward pass.
    Source: the authors' code.
    """
    kept_share = keep.sum(dtype=torch.int32) / keep.numel()
    divisor = torch.where(kept_share > 0, kept_share, 1.0)
    # Without a seed all blocks are the first one, which is kept.
    kept, features = (_in_memory(tensor)[elements[0]] for tensor in (keep, x.detach()))
    scale = alpha * deviation(x.detach()) / divisor * strength * (1 - kept[:1])
    values = torch.addcmul(kept * features.to(noise.dtype), noise, scale)
    return _Replaced.apply(x, keep, divisor, elements, values), kept_share


class _Replaced(torch.autograd.Function):
    """x / divisor, with `values` in place of its `elements`, where keep is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, divisor: Tensor, elements: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(keep, divisor)
        y = x / divisor
        _in_memory(y).scatter_(0, elements.flatten(), values.to(y.dtype).expand(elements.shape).flatten())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep, divisor = ctx.saved_tensors
        return keep.to(grad.dtype).mul_(grad).div_(divisor), None, None, None, None


def deviation(x: Tensor) -> Tensor | float:
    """std(x), in float32 at least. On a CPU this takes a quarter of the time of std()."""
    if x.numel() == 1:
        return 0.0
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(x - x.mean(), dim=(1, 2, 3))  # one a sample: few terms, for precision
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm / math.sqrt(x.numel() - 1)


def _in_memory(x: Tensor) -> Tensor:
    """The elements of a contiguous or channels_last map in the order of memory, as a view."""
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).view(-1)


def _divide(numbers: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder."""
    quotient = numbers // divisor
    return quotient, numbers.sub(quotient, alpha=divisor)


def _cut(block_size: int, size: tuple[int, int]) -> tuple[int, int]:
    return min(block_size, size[0]), min(block_size, size[1])
