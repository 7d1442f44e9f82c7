"""Disout in a plain MLP on handwritten digits: element-wise, as features without spatial dimensions want it."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from disout_attach import attach

digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, test = slice(0, 1000), slice(1000, None)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
handle = attach(model, ["1", "3"], dist_prob=0.2, block_size=1, alpha=5.0)  # after the activations
print(handle)  # 1 -> 2, 3 -> 4

steps = 200
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for step in range(steps):
    handle.set_dist_prob(0.2 * step / (steps - 1))
    batch = torch.randint(1000, (128,))
    loss = F.cross_entropy(model(images[train][batch]), labels[train][batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

correct = model.eval()(images[test]).argmax(1) == labels[test]
print(f"accuracy on {len(correct)} test images: {100 * correct.float().mean():.1f} %")
