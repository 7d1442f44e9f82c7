"""Disout: feature map distortion, from "Beyond Dropout: Feature Map Distortion to Regularize Deep Neural Networks"
(AAAI 2020, arXiv 2002.11022). This file is the whole method and needs torch only: copy it into your project.

Where the paper's formula went
    The paper bounds the generalization gap by the Rademacher complexity of the next layer and asks for the distortion
    of the feature map that makes this bound small. The authors' code does not solve that problem in each step, nor does
    this one. Both take the simplified gradient of the complexity term (section "Optimization of the Distortion",
    equation 15) as the size of the distortion and draw its direction at random:

    how the next layer's weight enters it      strength()   s_c = mean over k x k of (random signs * max over out of W),
                                                            a tenth of it where k = 1
    the distortion, relative to the features   distort()    d = alpha * s_c * std(x) * n, n standard normal
    the elements that are distorted            draw_seeds() at seed_rate(), and keep_mask() of the blocks around them
    the distorted map                          distort()    y = (keep * x + (1 - keep) * d) / mean(keep)

    alpha = 0 is DropBlock; block_size = 1 is the paper's element-wise "Feature Map Distortion".

Two forms
    This file is the readable form: about 30 kernels, and one byte an element kept for the backward pass. If
    disout_cpu.py can be imported, CPU tensors take its form, which draws the same distribution with less work. Neither
    form waits for the device. A network with these layers compiles to one graph, under torch.func.grad to several.
    Compiled for several threads of a CPU, the same seed gives the same bits only with
    torch.use_deterministic_algorithms(True), because overlapping blocks are written in no fixed order.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

try:
    import disout_cpu
except ModuleNotFoundError as error:
    if error.name != "disout_cpu":
        raise
    disout_cpu = None  # type: ignore[assignment]

# The strength where no next_weight is given (authors' code).
NO_READER_STRENGTH = 0.01
Rate = TypeVar("Rate", Tensor, float)


class Disout(nn.Module):
    """In training, replaces random blocks of a feature map by noise, whose size comes from the weight that reads the
    map next, and divides the map by the share that is kept. Each sample and each channel has blocks of its own, as in
    DropBlock. The identity in evaluation.

    Args:
        dist_prob: target share of the elements to distort, 0 to 1, before blocks overlap. It can be set later, for a
            schedule. Give its largest value here: on a CPU it sizes what is drawn, and the graph of a compiled network.
            A rate above it is rounded up for this to 1/32, 1/16, ... 1, so that up to twice as much is drawn, and a
            compiled network compiles anew when a rate first passes one of these. Module.half() and bfloat16() round
            the rate that the layer draws with; set it again after Module.to_empty().
        block_size: side of a block, at least 1; cut to the map, per side, where the map is smaller.
        alpha: intensity of the distortion, at least 0.
        inside: whether blocks of even size stay wholly inside the map. For an even block_size b, the authors place the
            block of a seed in row i in rows i - b/2 + 1 to i + b/2, but allow the seeds b/2 to H - b/2 (columns
            likewise), so the first row is never distorted and the last block is cut. The published results have this
            placement, so it is the default. Odd blocks lie inside either way, as does a block that covers the map along
            each side. An even one that covers one side alone is still shifted and cut there: of maps 2 x 40, at
            block_size 6 and dist_prob 0.1, the first row is never distorted, and 4.76 % of the elements are (9.57 %
            inside).
                the three places (#) of a block along an 8-row map:
                rows                          0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7
                block_size 6, as the authors  . # # # # # # .   . . # # # # # #   . . . # # # # #
                block_size 6, inside          # # # # # # . .   . # # # # # # .   . . # # # # # #
            On 8 x 8 at dist_prob 0.09, 7.61 % of the elements are distorted on average as the authors place blocks, and
            8.57 % inside (9 % but for overlaps).
        features_last: the features are the input's last dimension, as linear and batch-first recurrent layers have it.

    Attributes:
        plain: if True, CPU tensors take the form of this file, too. It supports what disout_cpu.py does not, such as
            forward-mode differentiation. Set it on the class, or on a layer before it is compiled.
        distorted: 0-dim tensor, the share of elements distorted in the last training forward outside torch.func.

    Raises:
        ValueError: naming an argument that is invalid, and its value.

    Source: the authors' code; the paper for single elements. `inside`, `features_last`, and maps of one and of three
    dimensions are ours. torch.jit.script is not supported: use `eval()` and torch.jit.trace, or torch.export.
    """

    plain = False
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
        self._bound = ""
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
        if disout_cpu:
            self._bound = disout_cpu.bound(self._prob, self._bound)

    def forward(self, x: Tensor, next_weight: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Distorts `x` in training.

        Args:
            x: feature map (N, C, H, W), (N, C, L) or (N, C, D, H, W), or features (N, F), which count as maps of one
                element; with `features_last`, C or F comes last. Any floating-point dtype.
            next_weight: weight of the convolution (out, C/groups, k, k; a transposed one's as .transpose(0, 1)) or
                linear layer (out, C) that reads `x` next. No gradient flows into it. None where nothing reads `x`:
                strength 0.01. A weight that fully_shard (FSDP2) has split is gathered in each forward, so all ranks
                must call the same layers.
            groups: of the layer that reads, 1 for a linear or transposed one; catches a wrong weight whose shape
                happens to fit. None: C over the weight's second dimension.
        Returns: tensor of x's shape and dtype; in evaluation x itself.
        Raises:
            ValueError: x, or next_weight with these groups, has an unsupported shape; next_weight has no elements, or
                is on meta; in training, x is on another device than the layer (move the layer with .to()).
            RuntimeError: it is called under torch.func.vmap, in training.
        """
        return disout_forward(self, x, next_weight, groups)

    def extra_repr(self) -> str:
        more = "".join(f", {name}=True" for name in ("inside", "features_last") if getattr(self, name))
        return f"dist_prob={self.dist_prob:g}, block_size={self.block_size}, alpha={self.alpha:g}{more}"


# A leaf for torch.fx, so that a network with this layer can be traced, in evaluation and in training.
@fx.wrap
def disout_forward(layer: Disout, x: Tensor, next_weight: Tensor | None, groups: int | None) -> Tensor:
    """Does what `Disout.forward` says."""
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
    # The channels stay where they are, first or last in memory; any other layout is copied.
    if not maps.movedim(1, -1).is_contiguous():
        maps = maps.contiguous()

    # torch.export may have a symbol for a size, which disout_cpu would fix to the example's; torch.compile has none.
    exported = isinstance(maps.numel(), torch.SymInt)
    use_cpu_form = disout_cpu and x.device.type == "cpu" and not layer.plain and not exported
    if use_cpu_form:
        blocks = cpu_blocks(layer, maps)
    else:
        seeds = draw_seeds(layer._dist_prob, maps, layer.block_size)
        keep = keep_mask(seeds, maps.shape[2:], layer.block_size, layer.inside)
    s = NO_READER_STRENGTH if next_weight is None else strength(next_weight, draw_signs(next_weight, maps), groups)
    if use_cpu_form:
        y, kept_share = disout_cpu.distort(maps, blocks, s, layer.alpha)
    else:
        noise = torch.randn_like(maps, dtype=torch.float32) if layer.alpha else layer._dist_prob.new_zeros(())
        y, kept_share = distort(maps, keep, noise, s, layer.alpha)

    if not transformed:  # torch.func forbids changes in place to tensors that are not returned
        layer.distorted.copy_(1 - kept_share)
    y = y.view(y.shape[: x.dim()])  # features again, if x was
    return y.movedim(1, -1) if layer.features_last else y


def cpu_blocks(layer: Disout, x: Tensor) -> "disout_cpu.Blocks":
    """Draws blocks in the form for CPUs, with room for as many as the layer's largest rate can bring."""
    size = x.shape[2:]
    block = cut_block(layer.block_size, size)
    offsets = [block_offset(b, block, size, layer.inside) for b in block]
    rate, _ = seed_rate(layer._dist_prob, size, layer.block_size)
    largest_rate, _ = seed_rate(float(layer._bound), size, layer.block_size)
    return disout_cpu.draw_blocks(x, rate, largest_rate, block, offsets)


def under_torch_func(x: Tensor) -> bool:
    """Whether a transform of torch.func is active, by torch's private flag if there is one, else by whether x is
    wrapped."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active() if active else torch.func.debug_unwrap(x, recurse=True) is not x


def cut_block(block_size: int, size: Sequence[int]) -> list[int]:
    """The sides of a block, each cut to the map's. min() is avoided: with sizes that are symbols to a compiler it would
    end up in every shape."""
    return [side if side < block_size else block_size for side in size]


def seed_rate(dist_prob: Rate, size: Sequence[int], block_size: int) -> tuple[Rate, list[int]]:
    """The probability of a seed, gamma = p * H * W / b^2 / ((H - b + 1)(W - b + 1)), and the size
    (H - b + 1, W - b + 1) of the region that seeds are drawn in, which begins at row b // 2 and column b // 2 of the
    map. The same for maps of one and of three dimensions. Source: the authors' code, after DropBlock (arXiv
    1810.12890).
    """
    block = cut_block(block_size, size)
    valid = [side - b + 1 for side, b in zip(size, block, strict=True)]
    return dist_prob * (math.prod(size) / (math.prod(block) * math.prod(valid))), valid


def block_offset(b: int, block: Sequence[int], size: Sequence[int], inside: bool) -> int:
    """Along one dimension, in which a block is b wide: where the block of the region's first seed begins in the map.
    The authors shift a block of even size by one, but not one that covers the whole map."""
    return int(b % 2 == 0 and not inside and list(block) != list(size))


def draw_seeds(dist_prob: Tensor, x: Tensor, block_size: int) -> Tensor:
    """Draws each place of the region as a seed, independently, with the probability of `seed_rate`: bool
    (N, C, H - b + 1, W - b + 1), in the layout of x."""
    rate, valid = seed_rate(dist_prob, x.shape[2:], block_size)
    region = x.detach()[(slice(None), slice(None), *(slice(side) for side in valid))]
    return torch.rand_like(region, dtype=torch.float32) < rate


def keep_mask(seeds: Tensor, size: Sequence[int], block_size: int, inside: bool = False) -> Tensor:
    """bool (N, C, H, W), False in the block of each seed (N, C, H - b + 1, W - b + 1). `inside` is as in `Disout`."""
    if len(size) == 1:  # as a map of one row, since padding and pooling in one dimension lose channels-last layouts
        return keep_mask(seeds[:, :, None], (1, *size), block_size, inside)[:, :, 0]
    block = cut_block(block_size, size)
    # A max pool of side b over the seeds makes a block of each, once they are padded to H + b - 1. Pairs of before and
    # after, the last dimension first, as F.pad wants them.
    padding = []
    for b in reversed(block):
        before = b - 1 + block_offset(b, block, size, inside)
        padding += [before, 2 * (b - 1) - before]
    pool = F.max_pool2d if len(size) == 2 else F.max_pool3d
    return pool(F.pad(seeds.float(), padding), block, stride=1) == 0


def draw_signs(next_weight: Tensor, x: Tensor) -> Tensor:
    """Random signs for `strength`, +1 or -1 with equal probability: int64 (C, k, k)."""
    return torch.randint(0, 2, (x.shape[1], *next_weight.shape[2:]), device=x.device) * 2 - 1


def strength(next_weight: Tensor, signs: Tensor, groups: int | None = None) -> Tensor:
    """How strongly the next layer reads each channel, with a random sign: s_c = mean over k x k of
    (signs * max over out of W); a tenth of it where k = 1. The maximum is of W itself, not of its size. No gradient
    flows into the weight.

    Args:
        next_weight: (out, C/groups, k, k), or (out, C) of a linear layer, which counts as k = 1.
        signs: +1 or -1, (C, k, k), or (C,) for a linear layer.
        groups: as in `Disout.forward`.

    Returns: float32 (C,). In a grouped layer the maximum is over the outputs of the channel's own group.
    Source: the authors' code, signs and tenth included; equation 15 of the paper, simplified. For a linear layer, which
    theirs does not take, the tenth is our choice.
    """
    channels, shape = signs.shape[0], tuple(next_weight.shape)
    if groups is None:
        groups = max(channels // shape[1], 1) if len(shape) > 2 and shape[1] else 1
    elif not isinstance(groups, Integral) or groups < 1:
        raise ValueError(f"groups must be a whole number of at least 1, not {groups!r}")
    on_meta = next_weight.is_meta and not signs.is_meta
    fits = len(shape) >= (3 if groups > 1 else 2) and groups * shape[1] == channels and shape[0] % groups == 0
    if not fits or 0 in shape or on_meta:
        expected = f"(out, C/groups, k, k) or (out, C) for C = {channels} and groups = {groups}"
        raise ValueError(f"next_weight must be {expected}, not {shape}{' on meta' if on_meta else ''}")
    weight = whole_weight(next_weight).float()
    # The weight may lie on another device than the map.
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
        x: (N, C, H, W), or of one or three dimensions.
        keep: bool, the shape of x. y has the layout of keep.
        noise: standard normal, the shape of x, or one number.
        strength: (C,), or one number for all channels.
        alpha: intensity.
    Returns: y of x's shape and dtype, and mean(keep). The mean is over the whole batch; noise is divided, too, and
    where nothing is kept, y is divided by 1. std(x) is unbiased, over the whole batch, in float32 or higher, and counts
    as a constant, so the gradient is keep / mean(keep), and only the mask and one number are saved for it. Source: the
    authors' code.
    """
    kept_share = keep.sum().float() / keep.numel()
    if alpha:
        std = x.detach().to(torch.promote_types(x.dtype, torch.float32)).std(correction=min(1, x.numel() - 1))
        std = std.view([1] * x.dim())  # a tensor without dimensions would leave the noise float32 where x is float64
        s = strength.view(-1, *[1] * (x.dim() - 2)) if isinstance(strength, Tensor) else strength
        d = (alpha * std * s * noise).to(x.dtype)
    else:
        d = x.new_zeros(())
    return torch.where(keep, x, d) / torch.where(kept_share > 0, kept_share, 1.0), kept_share
