"""ResNet-50 in torchvision's layout and with its state-dict names (stride in the 3x3), with places for a regularizer in
groups 3 and 4, as the authors of Disout train it on ImageNet. The regularizer adds no entry to the state dict."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .regularizers import Regularizer

BLOCKS = (3, 4, 6, 3)
SCALES = (None, None, 0.25, 1.0)  # of the rate in each group; nothing acts in the first two


class ResNet50(nn.Module):
    """Input (N, 3, H, W), output logits (N, num_classes); 25,557,032 parameters with 1,000 classes.

    Args:
        num_classes: number of logits.
        regularizer: gives the layers for groups 3 and 4, or None for none: see models/regularizers.py.

    Source: places, quarter rate and initialisation (last batch norm of a block at zero) are the authors' code.
    """

    def __init__(self, num_classes: int = 1000, regularizer: Regularizer | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for group, (blocks, scale) in enumerate(zip(BLOCKS, SCALES, strict=True)):
            width, stride = 64 * 2**group, 1 if group == 0 else 2
            acts = regularizer if scale else None
            first = Bottleneck(inputs, width, stride, acts, scale)
            rest = [Bottleneck(4 * width, width, 1, acts, scale) for _ in range(blocks - 1)]
            self.add_module(f"layer{group + 1}", nn.ModuleList([first, *rest]))
            inputs = 4 * width
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        blocks = [*self.layer1, *self.layer2, *self.layer3, *self.layer4]
        readers = [block.conv1.weight for block in blocks[1:]] + [None]  # no convolution reads the last block's output
        for block, next_weight in zip(blocks, readers, strict=True):
            x = block(x, next_weight)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Bottleneck(nn.Module):
    """conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN, plus the input (projected where the shape changes), ReLU. The
    regularizer acts after the first two ReLUs ('inner', read by conv2 and conv3), after bn3 ('branch') and on the
    shortcut ('shortcut'); these two are read by the first convolution of the block after this one."""

    def __init__(
        self, inputs: int, width: int, stride: int, regularizer: Regularizer | None, scale: float | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))
        self.inner1 = regularizer("inner", scale) if regularizer else None
        self.inner2 = regularizer("inner", scale) if regularizer else None
        self.branch = regularizer("branch", scale) if regularizer else None
        self.shortcut = regularizer("shortcut", scale) if regularizer else None

    def forward(self, x: Tensor, next_weight: Tensor | None) -> Tensor:
        inputs = x
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.inner1:
            x = self.inner1(x, self.conv2.weight, groups=1)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        if self.inner2:
            x = self.inner2(x, self.conv3.weight, groups=1)
        x = self.bn3(self.conv3(x))
        if self.branch:
            x = self.branch(x, next_weight, groups=1)
        shortcut = self.downsample(inputs) if self.downsample else inputs
        if self.shortcut:
            shortcut = self.shortcut(shortcut, next_weight, groups=1)
        return F.relu(x.add_(shortcut), inplace=True)
