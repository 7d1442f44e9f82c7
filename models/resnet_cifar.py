"""Pre-activation ResNet for 32 x 32 images (He et al. 2016), depth 6n + 2, as the authors of Disout train it.

State-dict names and initialisation are those of the authors' code; the regularizer adds no entry to the state dict.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .regularizers import Regularizer


class ResNet(nn.Module):
    """Input (N, 3, 32, 32), output logits (N, num_classes).

    Args:
        depth: 6n + 2, at least 8 (56: 855,578 parameters with 10 classes).
        num_classes: number of logits.
        regularizer: gives the layers for the last group, or None for none: see models/regularizers.py.

    Raises:
        ValueError: where depth is not 6n + 2.
    """

    def __init__(self, depth: int = 56, num_classes: int = 10, regularizer: Regularizer | None = None) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ..., 56, ...), not {depth}")
        n = (depth - 2) // 6
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = make_group(n, 16, 16, stride=1)
        self.layer2 = make_group(n, 16, 32, stride=2)
        self.layer3 = make_group(n, 32, 64, stride=2, regularizer=regularizer)
        self.bn = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        blocks = [*self.layer1, *self.layer2, *self.layer3]
        readers = [block.conv1.weight for block in blocks[1:]] + [None]  # no convolution reads the last block's output
        for block, next_weight in zip(blocks, readers, strict=True):
            x = block(x, next_weight)
        x = F.relu(self.bn(x), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3, plus the input; where the shape changes, the shortcut is a bare 1x1 convolution
    of the raw input. The regularizer acts after conv1 ('inner', read by conv2) and after conv2, before the addition
    ('branch', read by the first convolution of the block after this one)."""

    def __init__(self, inputs: int, channels: int, stride: int, regularizer: Regularizer | None) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != channels
        self.downsample = nn.Conv2d(inputs, channels, 1, stride, bias=False) if changes else None
        self.inner = regularizer("inner", 1.0) if regularizer else None
        self.branch = regularizer("branch", 1.0) if regularizer else None

    def forward(self, x: Tensor, next_weight: Tensor | None) -> Tensor:
        shortcut = self.downsample(x) if self.downsample else x
        x = self.conv1(F.relu(self.bn1(x), inplace=True))
        if self.inner:
            x = self.inner(x, self.conv2.weight, groups=1)
        x = self.conv2(F.relu(self.bn2(x), inplace=True))
        if self.branch:
            x = self.branch(x, next_weight, groups=1)
        return x.add_(shortcut)


def make_group(
    blocks: int, inputs: int, channels: int, stride: int, regularizer: Regularizer | None = None
) -> nn.ModuleList:
    """Only the first block changes the number of channels and the size."""
    first = Block(inputs, channels, stride, regularizer)
    return nn.ModuleList([first, *(Block(channels, channels, 1, regularizer) for _ in range(blocks - 1))])
