"""The plain form and that for CPUs: one method. And what the plain form costs, counted on the meta device."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import distorted, in_training
from torch.utils._python_dispatch import TorchDispatchMode

import disout
import disout_cpu
from disout import Disout, seed_rate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 4, 9])
@pytest.mark.parametrize("size", [(1,), (9,), (9, 4), (4, 4), (5, 4, 9)])
def test_both_forms_give_the_same_of_the_same_draws(monkeypatch, size, block_size, inside, dtype):
    x = torch.randn(6, 4, *size).to(dtype).requires_grad_()
    seeds, noise = torch.rand(6, 4, *seed_rate(0.0, size, block_size)[1]) < 0.2, torch.randn(x.shape)
    results = []
    for plain in (True, False):
        monkeypatch.setattr(Disout, "plain", plain)
        keep, y, share = distorted(
            x, seeds, noise, torch.rand(4, generator=torch.Generator().manual_seed(0)), 5.0, block_size, inside
        )
        results.append((keep, share, y.float(), torch.autograd.grad(y.sum(), x)[0]))
    assert 0 < results[0][1] < 1
    for plain, cpu in zip(*results, strict=True):
        torch.testing.assert_close(
            plain, cpu, rtol=torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


def test_a_cpu_has_its_form_unless_told_and_no_other_device_has(x, monkeypatch):
    draw_blocks, used = disout_cpu.draw_blocks, []
    monkeypatch.setattr(disout_cpu, "draw_blocks", lambda *args: used.append(1) or draw_blocks(*args))
    layer = Disout(0.3)
    layer(x)
    assert used == [1]
    layer.plain = True
    layer(x)
    Disout(0.3).to("meta")(x.to("meta"))
    assert used == [1]


def test_the_file_alone_is_the_method(tmp_path):
    """As one copies it into a project; with forward-mode differentiation, which the form for CPUs has not."""
    shutil.copy(disout.__file__, tmp_path / "disout.py")
    code = """
import sys, torch, disout
assert disout.disout_cpu is None and "disout_cpu" not in sys.modules
torch.manual_seed(0)
layer, conv, x = disout.Disout(0.3, 3, alpha=5.0), torch.nn.Conv2d(8, 4, 3), torch.randn(16, 8, 8, 8)
layer.dist_prob = 0.6
y = layer(x, conv.weight)
conv(y).sum().backward()
assert 0.3 < layer.distorted < 0.7 and (y != x).any()
torch.func.jvp(lambda x: layer(x, conv.weight), (x,), (x,))
assert torch.equal(layer.eval()(x), x)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": ""})


class Kernels(TorchDispatchMode):
    """Notes every call but views and empty*."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and not function.name().startswith(("aten::empty", "aten::detach")):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 30), (torch.bfloat16, 32)])
@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 9), (4, 8, 9, 8), (4, 8, 9, 8, 7)])
def test_few_kernels_wait_for_a_device_and_layouts_are_kept_there(shape, dtype, most):
    """As autocast has it, the map is in half precision and the weight is not."""
    for last in (False, True):
        x = torch.randn(shape, dtype=dtype, device="meta")
        x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).requires_grad_()
        weight = torch.randn(6, 8, *[3] * (len(shape) - 2), device="meta")
        layer = Disout(0.3, 4, 5.0).to("meta")
        with Kernels() as forward:
            y = in_training(x, layer, weight)
        gradient = torch.ones_like(y)
        with Kernels() as backward:
            y.backward(gradient)
        assert 20 < len(forward.names) <= most, forward.names
        assert 0 < len(backward.names) <= 6, backward.names
        assert y.stride() == x.stride()
        assert x.grad.stride() == x.stride()


def test_without_the_private_name_of_torch_the_transforms_are_still_seen(monkeypatch):
    monkeypatch.setattr(Disout, "plain", True)  # the other form's Function needs that name itself
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    layer, x = Disout(0.3, 3), torch.randn(16, 8, 8, 8)
    in_training(x, layer)
    share = layer.distorted.clone()
    assert share > 0
    gradient = torch.func.grad(lambda x: in_training(x, layer).sum())(x)
    assert torch.equal(layer.distorted, share)
    assert (gradient == 0).float().mean() == share
    with pytest.raises(RuntimeError, match=r"not under torch.func.vmap"):
        torch.func.vmap(layer, randomness="same")(x[:, None])
