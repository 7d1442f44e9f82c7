"""The plain CNN of the paper's Table 1, whose fully connected layers are regularized.

The authors published no code of it; the layers are those of a third party's code (github.com/jiahy0825/Disout), batch
norm after the convolutions among them. The code of RDdrop, Table 1's strongest other method, has none
(github.com/kzhai/Lasagne), and ours is better without a regularizer than the paper's with Disout: so it cannot tell
whether the paper's gain is there. The regularizer adds no entry to the state dict.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .regularizers import Regularizer

WIDTH = 2048


class CNN(nn.Module):
    """Input (N, 3, 32, 32), output logits (N, num_classes).

    Three times conv5x5-BN-ReLU-maxpool3x3 (stride 2), twice linear-ReLU, and the classifier. The regularizer acts after
    the ReLU of the two linear layers ('hidden', features (N, 2048)); the next linear layer reads what it returns.

    Args:
        num_classes: number of logits (10: 10,072,042 parameters).
        regularizer: gives the two layers, or None for none: see models/regularizers.py.
    """

    def __init__(self, num_classes: int = 10, regularizer: Regularizer | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(96)
        self.conv2 = nn.Conv2d(96, 128, 5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm2d(128)
        self.conv3 = nn.Conv2d(128, 256, 5, padding=2, bias=False)
        self.bn3 = nn.BatchNorm2d(256)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.fc1 = nn.Linear(256 * 3 * 3, WIDTH)
        self.relu1 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(WIDTH, WIDTH)
        self.relu2 = nn.ReLU(inplace=True)
        self.fc3 = nn.Linear(WIDTH, num_classes)
        self.hidden1 = regularizer("hidden", 1.0) if regularizer else None
        self.hidden2 = regularizer("hidden", 1.0) if regularizer else None
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.pool(F.relu(bn(conv(x)), inplace=True))
        x = self.relu1(self.fc1(x.flatten(1)))
        if self.hidden1:
            x = self.hidden1(x, self.fc2.weight, groups=1)
        x = self.relu2(self.fc2(x))
        if self.hidden2:
            x = self.hidden2(x, self.fc3.weight, groups=1)
        return self.fc3(x)
