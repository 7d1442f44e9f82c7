"""The method against figures of the authors' layer, run once on fixed inputs and draws (disout_reference.npz, made by
make_reference.py).

Whoever feeds the authors' layer what a case holds can check the figures: config (block, p, alpha, side of the next
kernel, 0 for none), x, next_weight, and what it drew: uniform (for the seeds), sign_uniform (+1 from 0.5 on, else -1)
and noise. What came out: keep, y, and for grad_out the gradient grad_x.
"""

from pathlib import Path

import make_reference
import numpy as np
import pytest
import torch
from conftest import distorted
from torch import nn

from disout import NO_READER_STRENGTH, seed_rate, strength

FIGURES = np.load(Path(__file__).parent / "disout_reference.npz")
CASES = sorted({name.split("/")[0] for name in FIGURES.files})


def authors_case(name):
    """Hands the authors' draws to our functions. Returns their tensors, and our keep, y and gradient."""
    theirs = {key.split("/")[1]: torch.from_numpy(FIGURES[key]) for key in FIGURES.files if key.startswith(f"{name}/")}
    block_size, p, alpha, k = theirs["config"].tolist()
    block_size, size = int(block_size), tuple(theirs["x"].shape[2:])
    rate, (rows, columns) = seed_rate(torch.tensor(p, dtype=torch.float32), size, block_size)
    first = block_size // 2
    seeds = theirs["uniform"][:, :, first : first + rows, first : first + columns] < rate
    x = theirs["x"].clone().requires_grad_()
    s = torch.full((x.shape[1],), NO_READER_STRENGTH, dtype=torch.float32)
    if k:
        s = strength(theirs["next_weight"], (theirs["sign_uniform"][0] >= 0.5) * 2 - 1)
    keep, y, _ = distorted(x, seeds, theirs["noise"], s, alpha, block_size)
    y.backward(theirs["grad_out"])
    return theirs, keep, y.detach(), x.grad


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_mask_output_and_gradient_are_the_authors_under_any_default_dtype(name, dtype, default_dtype):
    default_dtype(dtype)
    theirs, keep, y, grad = authors_case(name)
    assert torch.equal(keep, theirs["keep"].bool())
    assert 0 < keep.float().mean() < 1
    torch.testing.assert_close(y, theirs["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, theirs["grad_x"], rtol=1e-5, atol=1e-5)


class StandIn(nn.Module):
    """Draws what the authors' layer draws, in its order, for our functions."""

    def __init__(self, p, block_size, alpha):
        super().__init__()
        self.p, self.block_size, self.alpha, self.weight_behind = p, block_size, alpha, None

    def forward(self, x):
        rate, (rows, columns) = seed_rate(torch.tensor(self.p), x.shape[2:], self.block_size)
        first, s = self.block_size // 2, torch.full((x.shape[1],), NO_READER_STRENGTH)
        seeds = torch.rand(x.shape)[:, :, first : first + rows, first : first + columns] < rate
        if self.weight_behind is not None:
            s = strength(self.weight_behind, (torch.rand(1, *self.weight_behind.shape[1:])[0] >= 0.5) * 2 - 1)
        return distorted(x, seeds, torch.randn(x.shape), s, self.alpha, self.block_size)[1]


@pytest.mark.parametrize(("seed", "case"), list(enumerate(make_reference.CASES, 100)))
def test_the_figures_are_of_the_script_that_is_said_to_have_made_them(seed, case):
    """All but the authors' layer: what their layer gets is bit for bit that of the file."""
    name, *settings = case
    found = make_reference.figures(StandIn, seed, *settings)
    theirs = {key.split("/")[1]: FIGURES[key] for key in FIGURES.files if key.startswith(f"{name}/")}
    assert found.keys() == theirs.keys()
    for key, figure in theirs.items():
        exact = key in ("config", "x", "next_weight", "keep")
        np.testing.assert_allclose(found[key].reshape(figure.shape), figure, *((0, 0) if exact else (1e-5, 1e-5)))
