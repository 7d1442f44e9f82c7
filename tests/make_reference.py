"""How disout_reference.npz was made: runs the authors' layer on inputs of fixed seeds, and keeps them, what it drew and
what came out.

usage: python tests/make_reference.py AUTHORS_FOLDER OUT.npz

AUTHORS_FOLDER is a checkout of https://github.com/huawei-noah/Disout; test_golden.py says what each figure is.
"""

import sys
from unittest import mock

import numpy as np
import torch

# name, (N, C, H, W), block, p, alpha, side of the next kernel (0: nothing reads the map)
CASES = (
    ("even_block", (4, 3, 8, 8), 6, 0.30, 5.0, 3),
    ("odd_block", (3, 4, 9, 9), 3, 0.25, 5.0, 3),
    ("whole_map", (4, 5, 7, 7), 7, 0.40, 1.0, 1),
    ("layer3_pointwise", (2, 4, 14, 14), 7, 0.20, 1.0, 1),
    ("single_element", (3, 4, 6, 6), 1, 0.20, 2.0, 3),
    ("no_next_layer", (3, 4, 8, 8), 5, 0.30, 5.0, 0),
    ("not_square", (3, 4, 10, 7), 4, 0.30, 5.0, 3),
)


def noting(function, drawn):
    """`function`, which also appends what it draws."""

    def draw(*args, **kwargs):
        drawn.append(function(*args, **kwargs))
        return drawn[-1]

    return draw


def figures(layer_class, seed, shape, block, p, alpha, kernel):
    torch.manual_seed(seed)
    x = (torch.randn(shape) * 1.7 + 0.3).requires_grad_()
    layer, found = layer_class(p, block, alpha).train(), {}
    if kernel:
        found["next_weight"] = layer.weight_behind = torch.randn(6, shape[1], kernel, kernel) * 0.2
    drawn = []
    with mock.patch("torch.rand", noting(torch.rand, drawn)), mock.patch("torch.randn", noting(torch.randn, drawn)):
        y = layer(x)
    grad_out = torch.randn(shape)
    y.backward(grad_out)
    if kernel:
        found["sign_uniform"] = drawn[1]
    found |= {"x": x, "uniform": drawn[0], "noise": drawn[-1], "keep": (x.grad != 0).float(), "y": y}
    found |= {"grad_out": grad_out, "grad_x": x.grad}
    return {"config": np.array([block, p, alpha, kernel], dtype=np.float64)} | {
        name: tensor.detach().numpy() for name, tensor in found.items()
    }


def main(folder, out):
    sys.path.insert(0, folder)
    from disout import Disout

    found = {
        f"{name}/{key}": figure
        for seed, (name, *case) in enumerate(CASES, 100)
        for key, figure in figures(Disout, seed, *case).items()
    }
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
