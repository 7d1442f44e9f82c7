"""Disout: feature map distortion, from "Beyond Dropout: Feature Map Distortion to Regularize Deep Neural Networks"
(AAAI 2020, arXiv 2002.11022). This file is the whole method and imports torch only: copy it into your project.

Where the paper's formula went
    The paper bounds the generalization gap by the Rademacher complexity of the next layer and asks for the distortion
    of the feature map that makes this bound small. Neither the authors' code nor this one solves that problem in each
    step. Both take the simplified gradient of the complexity term (the paper's section "Optimization of the
    Distortion", equation 15) as the size of the distortion and draw its direction at random:

    how the next layer's weight enters it      strength()    s_c = mean over k x k of (random signs * max over out of W)
    the distortion, relative to the features   distort()     d = alpha * s_c * std(x) * n, n standard normal
    the elements that are distorted            block_mask()  blocks around seeds, drawn at seed_rate()
    the distorted map                          distort()     y = (keep * x + (1 - keep) * d) / mean(keep)

    alpha = 0 is DropBlock; block_size = 1 is the paper's element-wise "Feature Map Distortion".
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

# What takes the place of strength() where no layer reads the map next (authors' code).
NO_READER_STRENGTH = 0.01


class Disout(nn.Module):
    """In training, replaces random blocks of a feature map by noise whose size comes from the weight that reads the map
    next. The identity in evaluation.

    Args:
        dist_prob: share of the elements to distort, 0 to 1. Settable, so that a schedule can let it grow.
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

    Attributes:
        distorted: 0-dim tensor, the share of elements distorted in the last training forward.

    Raises:
        ValueError: naming the argument and its value, where it makes no sense.

    Source: the authors' code; the paper for the element-wise case. `inside` is ours.
    """

    def __init__(self, dist_prob: float, block_size: int = 6, alpha: float = 1.0, inside: bool = False) -> None:
        super().__init__()
        if not isinstance(block_size, Integral) or block_size < 1:
            raise ValueError(f"block_size must be a whole number of at least 1, not {block_size!r}")
        if not isinstance(alpha, Real) or not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be a finite number of at least 0, not {alpha!r}")
        self.block_size = block_size
        self.alpha = float(alpha)
        self.inside = inside
        # Tensors, so that a compiled network does not recompile as the rate grows; not in the state dict, so that the
        # layer can be put into a trained network and taken out again.
        self.register_buffer("_dist_prob", torch.zeros(()), persistent=False)
        self.register_buffer("distorted", torch.zeros(()), persistent=False)
        self.dist_prob = dist_prob

    @property
    def dist_prob(self) -> float:
        return self._dist_prob.item()

    @dist_prob.setter
    def dist_prob(self, value: float) -> None:
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"dist_prob must be a number from 0 to 1, not {value!r}")
        self._dist_prob.fill_(value)

    def forward(self, x: Tensor, next_weight: Tensor | None = None) -> Tensor:
        """Args:
            x: feature map (N, C, H, W), or features (N, F), which count as maps of 1 x 1. Any floating-point dtype.
            next_weight: weight of the convolution (out, C/groups, k, k) or linear layer (out, C) that reads `x` next.
                It takes no gradient. None where nothing reads it: the strength is then 0.01.

        Returns: tensor of x's shape and dtype.
        """
        if x.dim() not in (2, 4) or not x.is_floating_point():
            raise ValueError(f"x must be floating-point, (N, C, H, W) or (N, F), not {x.dtype} {tuple(x.shape)}")
        if not self.training or x.numel() == 0:
            return x
        maps = x if x.dim() == 4 else x[:, :, None, None]
        n, c, height, width = maps.shape

        rate, valid = seed_rate(self._dist_prob, (height, width), self.block_size)
        seeds = torch.rand(n, c, *valid, device=x.device) < rate
        keep = block_mask(seeds, (height, width), self.block_size, self.inside)
        self.distorted.copy_(1 - keep.sum() / keep.numel())

        if next_weight is None:
            s = NO_READER_STRENGTH
        else:
            signs = torch.randint(0, 2, (c, *next_weight.shape[2:]), device=x.device) * 2 - 1
            s = strength(next_weight, signs)
        # Drawn contiguous: for a channels_last map randn_like takes eight times as long on a CPU.
        noise = torch.randn(maps.shape, device=x.device) if self.alpha else torch.zeros((), device=x.device)
        return distort(maps, keep, noise, s, self.alpha).view_as(x)

    def extra_repr(self) -> str:
        inside = ", inside=True" if self.inside else ""
        return f"dist_prob={self.dist_prob:g}, block_size={self.block_size}, alpha={self.alpha:g}{inside}"


def seed_rate(dist_prob: Tensor, size: tuple[int, int], block_size: int) -> tuple[Tensor, tuple[int, int]]:
    """The probability of a seed, gamma = p * H * W / b^2 / ((H - b + 1)(W - b + 1)), and the size
    (H - b + 1, W - b + 1) of the region that seeds are drawn in, whose first row is row b // 2 of the map.

    Source: the authors' code, after DropBlock (arXiv 1810.12890).
    """
    (height, width), (block_h, block_w) = size, _cut(block_size, size)
    valid = (height - block_h + 1, width - block_w + 1)
    return dist_prob * (height * width / (block_h * block_w * valid[0] * valid[1])), valid


def block_mask(seeds: Tensor, size: tuple[int, int], block_size: int, inside: bool = False) -> Tensor:
    """The elements to keep: those in no seed's block.

    Args:
        seeds: bool (N, C, H - b + 1, W - b + 1), on the region of `seed_rate`.
        size: (H, W) of the map.
        block_size, inside: as in `Disout`.

    Returns: bool (N, C, H, W), False where an element is distorted.
    """
    block_h, block_w = _cut(block_size, size)
    # The authors shift an even side by one, but not in a block that covers the whole map.
    inside = inside or (block_h, block_w) == tuple(size)
    rows = _reach(size[0], block_h, inside, seeds.device)
    columns = _reach(size[1], block_w, inside, seeds.device)
    hits = torch.einsum("hi,ncix->nchx", rows, seeds.float() @ columns.T)
    return hits < 0.5


def strength(next_weight: Tensor, signs: Tensor) -> Tensor:
    """How strongly the next layer reads each channel: s_c = mean over k x k of (signs * max over out of W), the signed
    maximum; a tenth of it where k = 1. No gradient flows into the weight.

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


def distort(x: Tensor, keep: Tensor, noise: Tensor, strength: Tensor | float, alpha: float) -> Tensor:
    """y = (keep * x + (1 - keep) * d) / mean(keep), with d = alpha * strength * std(x) * noise.

    Args:
        x: (N, C, H, W).
        keep: bool, the shape of x.
        noise: standard normal, the shape of x.
        strength: (C,), or one number for all channels.
        alpha: intensity.

    Returns: x's shape and dtype; the statistics are float32 at least. The mean is over the whole batch, and 1 in place
    of 0 where nothing is kept. std(x), unbiased over the whole batch, takes no gradient, so the gradient is
    keep / mean(keep), and only the mask and one number are kept for the backward pass.
    Source: the authors' code.
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    if isinstance(strength, Tensor):
        strength = strength.view(-1, 1, 1)
    std = x.detach().to(precision).std() if x.numel() > 1 else 0.0
    d = (noise * (alpha * std * strength)).to(x.dtype)
    share = keep.sum() / keep.numel()
    keep = torch.empty_like(x, dtype=torch.bool).copy_(keep)  # in x's memory format, which y then has too
    return torch.where(keep, x, d) / torch.where(share > 0, share, 1.0)


def _cut(block_size: int, size: tuple[int, int]) -> tuple[int, int]:
    return min(block_size, size[0]), min(block_size, size[1])


def _reach(side: int, block: int, inside: bool, device: torch.device) -> Tensor:
    """float (side, side - block + 1): 1 where the block of a seed covers a row of the map."""
    shift = int(block % 2 == 0 and not inside)
    distance = torch.arange(side, device=device)[:, None] - torch.arange(side - block + 1, device=device) - shift
    return ((distance >= 0) & (distance < block)).float()
