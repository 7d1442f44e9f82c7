"""Disout in torchvision's ResNet-50, whose code stays as it is; a few steps on handwritten digits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.models import resnet50

from disout_attach import attach

model = resnet50(num_classes=10)
handle = attach(model, "layer[34].*.conv?", dist_prob=0.07, block_size=7, alpha=1.0)
print(handle)  # what reads each map: layer3.0.conv1 -> layer3.0.conv2, ...

digits = load_digits()
images = F.interpolate(torch.tensor(digits.images)[:, None].float() / 16, size=64).expand(-1, 3, -1, -1)
labels, steps = torch.tensor(digits.target), 12
optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
for step in range(steps):
    handle.set_dist_prob(0.07 * step / (steps - 1))  # grows linearly, as in the authors' code
    batch = torch.randint(len(images), (32,))
    loss = F.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss:.3f}")

handle.remove()  # for whoever uses the network next; in evaluation Disout does nothing anyway
