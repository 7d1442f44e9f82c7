"""Disout in a recurrent network: digits as sequences of eight rows."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from disout import Disout

digits = load_digits()
rows, labels = torch.tensor(digits.images).float() / 16, torch.tensor(digits.target)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm1, self.lstm2 = nn.LSTM(8, 64, batch_first=True), nn.LSTM(64, 64, batch_first=True)
        self.fc = nn.Linear(64, 10)
        self.disout = Disout(dist_prob=0.1, block_size=1, alpha=5.0, features_last=True)  # (N, L, F)

    def forward(self, x):
        states, _ = self.lstm1(x)
        states, _ = self.lstm2(self.disout(states, self.lstm2.weight_ih_l0))  # the weight that reads them: (4 * 64, 64)
        return self.fc(states[:, -1])


model, steps = Reader(), 300
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for step in range(steps):
    model.disout.dist_prob = 0.1 * step / (steps - 1)
    batch = torch.randint(1000, (128,))
    loss = F.cross_entropy(model(rows[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

correct = model.eval()(rows[1000:]).argmax(1) == labels[1000:]
print(f"accuracy on {len(correct)} test images: {100 * correct.float().mean():.1f} %")
