import ast
import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Dtypes, distorted, in_training, keep_of
from torch import nn

import disout
import disout_cpu
from disout import Disout, seed_rate, strength

# Every test here runs in both forms.
pytestmark = pytest.mark.usefixtures("form")


def seeds_at(places, size, block_size):
    """Of one map (1, 1, H, W), at these places of the valid region."""
    seeds = torch.zeros(1, 1, *seed_rate(0.0, size, block_size)[1], dtype=torch.bool)
    for place in places:
        seeds[(0, 0, *place)] = True
    return seeds


def mask_of(places, size, block_size, inside=False):
    """'#' where an element is distorted, a string a row, for a map with seeds at these places of the valid region."""
    keep = keep_of(seeds_at(places, size, block_size), torch.zeros(1, 1, *size), block_size, inside)[0, 0]
    return ["".join(".#"[not kept] for kept in row) for row in keep.tolist()]


# Masks


def test_blocks_overlap():
    assert mask_of([(0, 0), (1, 2)], (6, 6), 3) == ["###...", "#####.", "#####.", "..###.", "......", "......"]


def test_even_block_is_one_lower_and_further_right_and_cut_at_the_edge():
    assert mask_of([(0, 0)], (6, 6), 4) == ["......", ".####.", ".####.", ".####.", ".####.", "......"]
    assert mask_of([(2, 2)], (6, 6), 4) == ["......", "......", "......", "...###", "...###", "...###"]


def test_even_block_inside():
    assert mask_of([(0, 0)], (6, 6), 4, inside=True) == ["####..", "####..", "####..", "####..", "......", "......"]
    assert mask_of([(2, 2)], (6, 6), 4, inside=True) == ["......", "......", "..####", "..####", "..####", "..####"]


def test_odd_block_at_the_edge():
    assert mask_of([(2, 3)], (5, 6), 3) == ["......", "......", "...###", "...###", "...###"]


def test_block_one_is_the_seeds():
    assert mask_of([(0, 2), (1, 1)], (2, 3), 1) == ["..#", ".#."]


@pytest.mark.parametrize("block_size", [4, 7])
def test_block_that_covers_the_map_is_not_shifted(block_size):
    assert mask_of([(0, 0)], (4, 4), block_size) == ["####"] * 4


def test_block_is_cut_to_the_map_per_side_and_an_even_side_is_shifted():
    assert mask_of([(0, 0)], (2, 6), 4) == ["......", ".####."]
    assert mask_of([(0, 0)], (3, 6), 4) == [".####."] * 3
    assert mask_of([(0, 0)], (2, 6), 4, inside=True) == ["####.."] * 2


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(5,), (4, 6), (4, 3, 5), (2, 4, 4), (4, 4, 4)])
def test_blocks_of_any_number_of_sides_are_those_of_the_definition(size, block_size, inside):
    """Element by element, for every seed, in both layouts of memory."""
    maps = torch.zeros(2, 3, *size)
    block = [min(block_size, side) for side in size]
    shifts = [int(b % 2 == 0 and not inside and block != list(size)) for b in block]
    places = list(
        itertools.product(range(2), range(3), *(range(side - b + 1) for side, b in zip(size, block, strict=True)))
    )
    for x in (maps, maps.movedim(1, -1).contiguous().movedim(-1, 1)):
        for n, channel, *corner in places:
            expected = torch.ones_like(maps)
            for offset in itertools.product(*map(range, block)):
                at = [place + shift + step for place, shift, step in zip(corner, shifts, offset, strict=True)]
                if all(place < side for place, side in zip(at, size, strict=True)):
                    expected[(n, channel, *at)] = 0
            seeds = torch.zeros(2, 3, *seed_rate(0.0, size, block_size)[1], dtype=torch.bool)
            seeds[(n, channel, *corner)] = True
            assert torch.equal(keep_of(seeds, x, block_size, inside), expected.bool())


# Rates


@pytest.mark.parametrize(("inside", "expected"), [(False, 0.0761), (True, 0.0857)])
def test_rate_and_its_map_over_positions(inside, expected):
    layer = Disout(0.09, block_size=6, alpha=0.0, inside=inside)
    maps = 512 * 64
    y = in_training(torch.ones(512, 64, 8, 8), layer)
    measured = (y == 0).float().mean(dim=(0, 1))

    gamma = 0.09 * 64 / 36 / 9
    first = 0 if inside else 1
    covering = torch.tensor([sum(0 <= row - first - seed < 6 for seed in range(3)) for row in range(8)])
    predicted = 1 - (1 - gamma) ** (covering[:, None] * covering[None, :])
    assert predicted.mean().item() == pytest.approx(expected, abs=5e-5)
    assert layer.distorted.item() == pytest.approx(expected, abs=0.003)
    assert ((measured - predicted).abs() <= 5 * (predicted * (1 - predicted) / maps).sqrt()).all()


def test_whole_maps_are_distorted_at_the_rate_itself():
    layer = Disout(0.3, block_size=7, alpha=0.0)
    y = in_training(torch.ones(200, 50, 7, 7), layer).flatten(2)
    gone = (y == 0).all(-1)
    assert torch.equal(gone, (y == 0).any(-1))
    assert gone.float().mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 10_000))


@pytest.mark.parametrize(("inside", "rows", "expected"), [(False, [0, 1], 0.0476), (True, [1, 1], 0.0957)])
def test_rate_where_a_block_covers_one_side(inside, rows, expected):
    """As the authors place it, it is shifted there too, so one row of two is never distorted."""
    x = torch.ones(1000, 20, 2, 40, requires_grad=True)
    in_training(x, Disout(0.1, block_size=6, inside=inside)).sum().backward()
    gamma = 0.1 * 80 / (2 * 6) / (1 * 35)
    covering = torch.tensor([min(6, i - (not inside) + 1, 40 - max(5, i - (not inside))) for i in range(40)])
    predicted = torch.tensor(rows)[:, None] * (1 - (1 - gamma) ** covering)
    assert predicted.mean().item() == pytest.approx(expected, abs=5e-5)
    measured = (x.grad == 0).float().mean((0, 1))
    assert ((measured - predicted).abs() <= 5 * (predicted * (1 - predicted) / 20_000).sqrt()).all()
    assert f"{100 * expected:.2f} %" in Disout.__doc__


def test_features_are_distorted_one_by_one_whatever_the_block():
    layer = Disout(0.2, block_size=6, alpha=0.0)
    y = in_training(torch.ones(1000, 20), layer, torch.ones(5, 20))
    assert y.shape == (1000, 20)
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 20_000))


def test_rate_and_blocks_of_a_volume():
    layer = Disout(0.2, block_size=3, alpha=5.0)
    x = torch.randn(200, 20, 4, 6, 5, requires_grad=True)
    y = in_training(x, layer, torch.randn(4, 20, 3, 3, 3))
    y.sum().backward()
    gone = x.grad == 0
    # An element lies in as many blocks as there are seeds in reach, along each side.
    reach = [[1 + min(i, 2, side - 3, side - 1 - i) for i in range(side)] for side in (4, 6, 5)]
    covering = torch.tensor([[[a * b * c for c in reach[2]] for b in reach[1]] for a in reach[0]])
    predicted = 1 - (1 - 0.2 * 120 / 27 / (2 * 4 * 3)) ** covering
    spread = (predicted * (1 - predicted) / 4000).sqrt()
    assert ((gone.float().mean((0, 1)) - predicted).abs() <= 5 * spread).all()
    assert y.shape == x.shape and layer.distorted.item() == pytest.approx(gone.float().mean().item(), abs=1e-6)


# Strength and distortion


def test_strength_is_the_mean_of_signed_maxima():
    weight = torch.zeros(2, 1, 2, 2)
    weight[:, 0, 0] = torch.tensor([[1.0, -5.0], [3.0, -4.0]])  # maxima over the outputs: 3 and -4, then 0 and 0
    assert strength(weight, torch.tensor([[[1, -1], [1, 1]]])).item() == pytest.approx((3 + 4) / 4)


def test_strength_of_a_linear_layer_is_that_of_a_1x1_convolution():
    weight, signs = torch.randn(7, 5), torch.tensor([1, -1, 1, 1, -1])
    s = strength(weight, signs)
    torch.testing.assert_close(s, 0.1 * signs * weight.max(0).values)
    assert torch.equal(s, strength(weight[:, :, None, None], signs[:, None, None]))


def test_strength_of_a_grouped_convolution_stays_in_the_group():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    signs = torch.randint(0, 2, (4, 3, 3)) * 2 - 1
    parts = [strength(conv.weight[:3], signs[:2]), strength(conv.weight[3:], signs[2:])]
    torch.testing.assert_close(strength(conv.weight, signs), torch.cat(parts))
    last = conv.weight.to(memory_format=torch.channels_last)
    torch.testing.assert_close(strength(last, signs), torch.cat(parts))


@pytest.mark.parametrize(("weight", "groups"), [((6, 8, 3, 3), 1), ((6, 4, 3, 3), 2), ((8, 1, 3, 3), 8), ((6, 8), 1)])
def test_groups_that_are_said_are_those_that_are_guessed(x, weight, groups):
    weight, layer = torch.randn(weight), Disout(0.3, 3, 5.0)
    assert torch.equal(in_training(x, layer, weight, groups), in_training(x, layer, weight))


def test_distortion_has_the_size_of_strength_times_std():
    """Through the layer: each channel's distorted elements are alpha * |s_c| * std(x) * normal / mean(keep)."""
    x = 3 * torch.randn(512, 4, 8, 8) + 1
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None, None]  # 1 x 1, so the sign does not change the size
    layer = Disout(0.5, block_size=1, alpha=2.0)
    y = in_training(x.requires_grad_(), layer, weight)
    y.sum().backward()
    for channel in range(4):
        noise = y[:, channel][x.grad[:, channel] == 0]
        expected = 2.0 * 0.1 * (channel + 1) * x.std().item() / (1 - layer.distorted.item())
        assert noise.std().item() == pytest.approx(expected, rel=0.05)
        assert noise.mean().item() == pytest.approx(0, abs=0.05 * expected)


def test_signs_are_drawn_anew_at_every_forward(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        disout, "strength", lambda weight, signs, groups: drawn.append(signs) or strength(weight, signs)
    )
    layer, x = Disout(0.1), torch.randn(2, 4, 8, 8)
    for _ in range(2):
        layer(x, torch.randn(6, 4, 3, 3))
    assert drawn[0].shape == (4, 3, 3)
    assert all(set(signs.unique().tolist()) == {-1, 1} for signs in drawn)
    assert not torch.equal(*drawn)


def test_no_reader_is_the_constant_strength(x):
    y = in_training(x, Disout(0.5, block_size=1, alpha=5.0))
    share = (y / x - 1 / 0.5).abs() > 0.1  # kept elements are x / mean(keep), about 2 x
    assert y[share].std().item() == pytest.approx(5.0 * 0.01 * x.std().item() / 0.5, rel=0.1)


def test_gradient_is_the_mask_over_its_mean_and_the_weight_takes_none(x):
    weight = nn.Parameter(torch.randn(6, 8, 3, 3))
    layer = Disout(0.3, block_size=3, alpha=5.0)
    in_training(x.requires_grad_(), layer, weight).sum().backward()
    kept = x.grad != 0
    torch.testing.assert_close(x.grad, kept / kept.float().mean())
    assert layer.distorted.item() == pytest.approx(1 - kept.float().mean().item(), abs=1e-6)
    assert weight.grad is None


def test_backward_keeps_one_byte_an_element(x):
    saved = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    )
    with hooks:
        in_training(x.requires_grad_(), Disout(0.1), torch.randn(6, 8, 3, 3))
    assert 0 < sum(saved.values()) <= x.numel() + 64


def test_alpha_zero_is_dropblock(x):
    y = in_training(x, Disout(0.3, block_size=3, alpha=0.0), torch.randn(6, 8, 3, 3))
    kept = y != 0
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(y, x * kept / kept.float().mean())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_alpha_zero_drops_to_zero_also_where_a_value_is_not_finite(x, value):
    x[:, 0, 0, 0] = value
    x.requires_grad_()
    y = in_training(x, Disout(0.3, block_size=3, alpha=0.0), torch.full((6, 8, 3, 3), value))
    kept = torch.autograd.grad(y.sum(), x)[0] != 0
    assert (y[~kept] == 0).all() and not kept.all() and not y.isfinite().all()
    torch.testing.assert_close(y[kept], (x / kept.float().mean())[kept], equal_nan=True)


# When it does nothing


def test_evaluation_is_the_identity(x):
    layer = Disout(0.5).eval()
    assert layer(x) is x
    whole = torch.arange(8)  # as maps are in a quantized network
    assert layer(whole) is whole
    assert layer.distorted == 0


def test_rate_zero_is_the_identity_in_training(x):
    layer = Disout(0.0, alpha=5.0)
    assert torch.equal(in_training(x, layer, torch.randn(6, 8, 3, 3)), x)
    assert layer.distorted == 0


# Edges


@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (1, 1, 1, 1), (2, 5), (1, 1), (2, 3, 4, 9)])
def test_finite_where_everything_is_distorted(shape):
    layer = Disout(1.0, block_size=7, alpha=5.0)
    x = torch.randn(shape, requires_grad=True)
    y = in_training(x, layer, torch.randn(4, shape[1]))
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", ["one of 1e20", "all of 1e30", "all of 1e-30", "a mean of 1e4"])
def test_noise_has_its_size_whatever_that_of_the_values(x, values, dtype):
    if values == "one of 1e20":
        x[0, 0, 0, 0] = 1e20
    else:
        x = x * float(values.split()[-1]) if "all" in values else x + 1e4
    x, seeds, noise = x.to(dtype), torch.zeros(x.shape, dtype=torch.bool), torch.randn(x.shape)
    seeds[0, :, 1] = True
    _, y, share = distorted(x, seeds, noise, torch.full((8,), 0.5), 2.0, 1)
    expected = (noise * (2.0 * 0.5 * x.double().std() / share)).to(dtype)
    assert y.isfinite().all() and expected[seeds].any()
    torch.testing.assert_close(y[seeds], expected[seeds], rtol=1e-3, atol=0)
    assert torch.equal(y[~seeds], (x / share)[~seeds])


@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_a_seed_what_is_not_finite_stays_where_it_is(x, where, value):
    weight = torch.randn(6, 8, 3, 3)
    (x if where == "x" else weight)[:, :, 0, 0] = value
    torch.testing.assert_close(in_training(x, Disout(0.0, 3, 5.0), weight), x, rtol=0, atol=0, equal_nan=True)


def test_an_infinite_gradient_at_a_distorted_element_is_none(x):
    x = x.abs().requires_grad_()
    y = in_training(x, Disout(0.3, 3, 0.0))
    y.sqrt().sum().backward()  # whose gradient at 0 is infinite
    assert (y == 0).any() and (x.grad[y == 0] == 0).all()
    assert x.grad.isfinite().all()


def test_empty_batch(x):
    assert in_training(x[:0], Disout(0.5)).shape == (0, 8, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_a_seed_it_is_the_identity_to_the_last_bit(dtype):
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64).to(dtype)
    assert torch.equal(Disout(0.0, 3, 5.0)(x, torch.randn(6, 8, 3, 3)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_statistics_are_float32(x, dtype):
    weight = torch.randn(6, 8, 3, 3)
    reference, layer = Disout(0.3, 3, 5.0), Disout(0.3, 3, 5.0)
    expected = in_training(x.to(dtype).float(), reference, weight)
    y = in_training(x.to(dtype), layer, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3)
    assert torch.equal(layer.distorted, reference.distorted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_result_is_rounded_to_half_precision(x, dtype):
    generator = torch.Generator().manual_seed(2)
    low = (100 * x).to(dtype)
    seeds, noise = torch.rand(x.shape, generator=generator) < 0.3, torch.randn(x.shape, generator=generator)
    keep, y, share = distorted(low, seeds, noise, torch.full((8,), 0.01), 5.0, 1)
    d = noise * (5.0 * 0.01 * low.float().std() / share)
    torch.testing.assert_close(y[seeds], d[seeds].to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(y * keep, low / share * keep)


def test_autocast(x):
    conv, layer = nn.Conv2d(8, 8, 3), Disout(0.3)
    with torch.autocast("cpu", torch.bfloat16):
        maps = conv(x)
        y = in_training(maps, layer, conv.weight)
    assert y.dtype == maps.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 8, 9), (4, 8, 8, 7), (4, 8, 8, 7, 6)])
def test_layout_in_is_layout_out_and_changes_nothing_else(shape):
    x, noise = torch.randn(shape), torch.randn(shape)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert in_training(x, Disout(0.3, 4)).stride() == x.stride()
    assert in_training(last, Disout(0.3, 4)).stride() == last.stride() != x.stride()
    seeds = torch.rand(4, 8, *seed_rate(0.0, shape[2:], 4)[1]) < 0.1
    contiguous = distorted(x, seeds, noise, torch.ones(8), 5.0, 4)[1]
    seeds = seeds.movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(distorted(last, seeds, noise, torch.ones(8), 5.0, 4)[1], contiguous)


def test_the_result_can_be_changed_in_place(x):
    weight = torch.randn(6, 8, 3, 3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    in_training(ours, Disout(0.3), weight).add_(ours).relu_().square().sum().backward()
    (in_training(theirs, Disout(0.3), weight) + theirs).relu().square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_is_float64_as_not_every_device_has_it(x, dtype):
    layer, low = Disout(0.3, 3, 5.0), x.to(dtype).requires_grad_()
    with Dtypes() as dtypes:
        in_training(low, layer, torch.randn(6, 8, 3, 3)).backward(torch.ones_like(low))
        layer.dist_prob = 0.1
    assert dtype in dtypes.seen and torch.float64 not in dtypes.seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(x, default_dtype, dtype):
    weight = torch.randn(6, 8, 3, 3)
    for alpha in (5.0, 0.0):
        before = Disout(0.09, 3, alpha)
        expected = in_training(x, before, weight)
        default_dtype(dtype)
        layer = Disout(0.09, 3, alpha)
        assert torch.equal(in_training(x, layer, weight), expected)
        assert torch.equal(layer.distorted, before.distorted) and layer.distorted.dtype == torch.float32
        default_dtype(torch.float32)


# State


def test_state_dict_is_empty_and_dist_prob_is_one_tensor(x):
    layer = Disout(0.1)
    assert not layer.state_dict()
    buffers = {name: tensor.data_ptr() for name, tensor in layer.named_buffers()}
    layer.dist_prob = 0.25
    in_training(x, layer)
    assert layer.dist_prob == 0.25
    assert layer.distorted > 0 and not layer.distorted.requires_grad
    assert {name: tensor.data_ptr() for name, tensor in layer.named_buffers()} == buffers
    assert copy.deepcopy(layer).dist_prob == 0.25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Disout(1.5), ("dist_prob", "1.5")),
        (lambda: Disout(-0.1), ("dist_prob", "-0.1")),
        (lambda: Disout(math.nan), ("dist_prob", "nan")),
        (lambda: Disout("0.1"), ("dist_prob", "'0.1'")),
        (lambda: setattr(Disout(0.1), "dist_prob", 2), ("dist_prob", "2")),
        (lambda: Disout(0.1, block_size=0), ("block_size", "0")),
        (lambda: Disout(0.1, block_size=2.5), ("block_size", "2.5")),
        (lambda: Disout(0.1, alpha=-1), ("alpha", "-1")),
        (lambda: Disout(0.1, alpha=math.inf), ("alpha", "inf")),
        (lambda: Disout(0.1)(torch.zeros(2)), ("x", "(2,)")),
        (lambda: Disout(0.1)(torch.zeros(2, 3, 4, 4, 4, 4)), ("x", "(2, 3, 4, 4, 4, 4)")),
        (lambda: Disout(0.1)(torch.zeros(2, 3, 4, 4, dtype=torch.int64)), ("x", "int64")),
        (lambda: Disout(0.1)(torch.zeros(2, 3, 8, 8), torch.zeros(6, 4, 3, 3)), ("next_weight", "(6, 4, 3, 3)")),
        (lambda: Disout(0.1)(torch.zeros(2, 3, 8, 8), torch.zeros(6)), ("next_weight", "(6,)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6), torch.zeros(5, 3)), ("next_weight", "(5, 3)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6, 8, 8), torch.zeros(0, 6, 3, 3)), ("next_weight", "(0, 6, 3, 3)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6), torch.zeros(0, 6)), ("next_weight", "(0, 6)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6, 8, 8), torch.zeros(5, 6, 0, 0)), ("next_weight", "(5, 6, 0, 0)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6), torch.zeros(5, 6, device="meta")), ("next_weight", "(5, 6) on meta")),
        (lambda: Disout(0.1)(torch.zeros(2, 6, 8, 8), torch.zeros(4, 3, 3, 3), 1), ("groups = 1", "(4, 3, 3, 3)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6, 8, 8), torch.zeros(4, 6, 3, 3), 2), ("groups = 2", "(4, 6, 3, 3)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6, 8, 8), torch.zeros(5, 3, 3, 3), 2), ("groups = 2", "(5, 3, 3, 3)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6), torch.zeros(4, 3), 2), ("groups = 2", "(4, 3)")),
        (lambda: Disout(0.1)(torch.zeros(2, 6), torch.zeros(5, 6), 0), ("groups", "0")),
        (lambda: Disout(0.1)(torch.zeros(2, 6), torch.zeros(5, 6), 1.0), ("groups", "1.0")),
    ],
)
def test_nonsense_is_a_value_error_that_names_argument_and_value(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("shape", [(64, 10, 30), (64, 10, 5, 5), (64, 10)])
def test_features_last_are_the_same_in_another_order(shape):
    weight = torch.randn(7, 10)
    first, last = Disout(0.3, 3, 5.0), Disout(0.3, 3, 5.0, features_last=True)
    x = torch.randn(shape)
    torch.manual_seed(0)
    expected = first(x.movedim(1, -1).contiguous().movedim(-1, 1), weight)
    torch.manual_seed(0)
    y = last(x.movedim(1, -1).contiguous(), weight)
    assert torch.equal(y.movedim(-1, 1), expected)
    assert y.shape == x.movedim(1, -1).shape and last.distorted == first.distorted > 0


def test_blocks_of_a_sequence_are_stretches_of_one_feature():
    x = torch.ones(1000, 4, 12)
    layer = Disout(0.1, 3, 0.0)
    dropped = layer(x) == 0
    covered = torch.tensor([1, 2, *[3] * 8, 2, 1])  # the blocks that an element can be in
    assert dropped.float().mean() == pytest.approx((1 - (1 - 0.1 * 12 / 3 / 10) ** covered).mean().item(), abs=0.01)
    runs = F.pad(dropped, (1, 1)).float().diff().abs().sum() / 2
    assert dropped.sum() / runs >= 3
    assert dropped.any(2).sum() < dropped.any(2).numel() / 2


def test_the_files_import_torch_alone():
    imports = set()
    for file in (disout.__file__, disout_cpu.__file__):
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        imports |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports == {"collections.abc", "disout_cpu", "math", "numbers", "typing", "torch", "torch.nn.functional"}


def test_distort_leaves_its_arguments_alone(x):
    before, seeds = x.clone(), torch.rand(16, 8, 6, 6) < 0.1
    distorted(x, seeds, torch.randn(x.shape), torch.full((8,), 0.01), 5.0, 3)
    assert torch.equal(x, before)


def test_a_layer_left_on_another_device_is_said(x):
    with pytest.raises(ValueError, match=r"the layer is on cpu, x on meta: move the layer with \.to\(\)"):
        Disout(0.3)(x.to("meta"))


def test_a_weight_on_another_device_than_the_map_is_read(monkeypatch):
    monkeypatch.setattr(Disout, "plain", True)  # as on any other device
    x, layer = torch.zeros(2, 8, 6, 6, device="meta"), Disout(0.3).to("meta")
    assert layer(x, torch.randn(4, 8, 3, 3)).device == x.device


def test_a_layer_made_on_the_meta_device_takes_its_rate_again(x):
    with torch.device("meta"):
        layer = Disout(0.3, block_size=1)
    layer.to_empty(device="cpu").dist_prob = 0.3
    in_training(x, layer)
    assert layer.distorted.item() == pytest.approx(0.3, abs=0.05)
