import ast
import copy
import itertools
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import disout
from disout import Disout, block_elements, deviation, distort, draw_seeds, keep_mask, most_seeds, seed_rate, strength


def keep_of(seeds, x, block_size, inside=False):
    """The mask, and the elements, of seeds with these numbers."""
    elements, _ = block_elements(seeds, x, block_size, inside)
    return keep_mask(elements, torch.tensor([False]), x), elements


def mask_of(seeds, size, block_size, inside=False):
    """'#' where an element is distorted, a string a row, for a map with seeds at these places of the valid region."""
    columns = seed_rate(0.0, size, block_size)[1][1]
    numbers = torch.tensor([row * columns + column for row, column in seeds])
    keep = keep_of(numbers, torch.zeros(1, 1, *size), block_size, inside)[0][0, 0]
    return ["".join(".#"[not kept] for kept in row) for row in keep.tolist()]


def in_training(x, layer, *args):
    torch.manual_seed(0)
    return layer.train()(x, *args)


@pytest.fixture
def x():
    return torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(1))


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
        for number, (n, channel, *corner) in enumerate(places):
            expected = torch.ones_like(maps)
            for offset in itertools.product(*map(range, block)):
                at = [place + shift + step for place, shift, step in zip(corner, shifts, offset, strict=True)]
                if all(place < side for place, side in zip(at, size, strict=True)):
                    expected[(n, channel, *at)] = 0
            assert torch.equal(keep_of(torch.tensor([number]), x, block_size, inside)[0], expected.to(torch.uint8))


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


def test_features_are_distorted_one_by_one_whatever_the_block():
    layer = Disout(0.2, block_size=6, alpha=0.0)
    y = in_training(torch.ones(1000, 20), layer, torch.ones(5, 20))
    assert y.shape == (1000, 20)
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 20_000))


# Seeds


def test_seeds_are_independent_draws_at_the_rate():
    rate, places, draws = 0.05, 400, 4000
    counts, hits, neighbours = [], torch.zeros(places), torch.zeros(places - 1)
    torch.manual_seed(0)
    for _ in range(draws):
        seeds, no_seed = draw_seeds(torch.tensor(rate), places, most_seeds(rate, places))
        hit = torch.zeros(places).index_fill(0, seeds, float(not no_seed))
        counts.append(hit.sum())
        hits += hit
        neighbours += hit[1:] * hit[:-1]
    counts = torch.stack(counts)
    spread = math.sqrt(rate * (1 - rate))
    assert counts.mean().item() == pytest.approx(rate * places, abs=5 * spread * math.sqrt(places / draws))
    assert counts.var().item() == pytest.approx(places * spread**2, rel=5 * math.sqrt(2 / draws))
    assert ((hits / draws - rate).abs() < 5 * spread / math.sqrt(draws)).all()
    assert neighbours.mean().item() / draws == pytest.approx(rate**2, rel=0.05)


def test_rate_zero_has_no_seed_and_rate_one_every_place():
    seeds, no_seed = draw_seeds(torch.tensor(0.0), 10, 4)
    assert no_seed and seeds.min() >= 0 and seeds.max() < 10
    seeds, no_seed = draw_seeds(torch.tensor(1.0), 10, most_seeds(1.0, 10))
    assert not no_seed and seeds.tolist() == list(range(10))


@pytest.mark.parametrize(("rate", "places"), [(0.0, 50), (1e-6, 1000), (0.01, 300), (0.2, 1000), (0.9, 2000), (1.0, 7)])
def test_more_seeds_than_there_is_room_for_are_all_but_impossible(rate, places):
    most = most_seeds(rate, places)
    assert 1 <= most <= places
    assert binom.sf(most, places, rate) < 1e-12


def test_the_room_for_seeds_follows_the_largest_rate_set():
    layer = Disout(0.01, block_size=1, alpha=0.0)
    layer.dist_prob = 0.9
    y = in_training(torch.ones(100, 10, 8, 8), layer)
    assert (y == 0).float().mean().item() == pytest.approx(0.9, abs=0.01)


def test_the_room_is_exact_for_the_rate_given_first_and_rounded_up_for_larger_ones(x, monkeypatch):
    asked, layer = [], Disout(0.09, block_size=1)
    monkeypatch.setattr(disout, "most_seeds", lambda rate, places: asked.append(rate) or most_seeds(rate, places))
    rounded = 0.09 * 3 / 3
    assert rounded > 0.09
    for rate in (0.0, rounded, 0.1, 0.01, 0.126, 1.0):
        layer.dist_prob = rate
        layer(x)
    assert asked == [0.09, 0.09, 1 / 8, 1 / 8, 1 / 4, 1.0]


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


# When it does nothing


def test_evaluation_is_the_identity(x):
    layer = Disout(0.5).eval()
    assert layer(x) is x
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
    seeds = (torch.rand(low.shape, generator=generator) < 0.3).flatten().nonzero().flatten()
    keep, elements = keep_of(seeds, low, 1)
    noise = torch.randn(elements.shape, generator=generator)
    y, share = distort(low, keep, elements, noise, 0.01, 5.0)
    d = noise[:, 0] * (5.0 * 0.01 * low.float().std() / share)
    torch.testing.assert_close(y.flatten()[seeds], d.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(y * keep, low / share * keep)


def test_autocast(x):
    conv, layer = nn.Conv2d(8, 8, 3), Disout(0.3)
    with torch.autocast("cpu", torch.bfloat16):
        maps = conv(x)
        y = in_training(maps, layer, conv.weight)
    assert y.dtype == maps.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_channels_last_gives_the_same_and_keeps_its_layout(x):
    weight = torch.randn(6, 8, 3, 3)
    y = in_training(x, Disout(0.3), weight)
    last = in_training(x.to(memory_format=torch.channels_last), Disout(0.3), weight)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


def test_the_result_can_be_changed_in_place(x):
    weight = torch.randn(6, 8, 3, 3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    in_training(ours, Disout(0.3), weight).add_(ours).relu_().square().sum().backward()
    (in_training(theirs, Disout(0.3), weight) + theirs).relu().square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("shape", [(128, 64, 8, 8), (2, 64, 56, 56), (4, 8)])
def test_deviation_is_that_of_the_whole_batch(shape, mean):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + mean
    expected = x.double().std().item()
    assert deviation(x).item() == pytest.approx(expected, rel=1e-2 if mean > 10 else 1e-4)


class Dtypes(TorchDispatchMode):
    """Notes the dtype of whatever an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {tensor.dtype for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)}
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_is_float64_as_not_every_device_has_it(x, dtype):
    layer, low = Disout(0.3, 3, 5.0), x.to(dtype).requires_grad_()
    with Dtypes() as dtypes:
        in_training(low, layer, torch.randn(6, 8, 3, 3)).backward(torch.ones_like(low))
        layer.dist_prob = 0.1
    assert dtype in dtypes.seen and torch.float64 not in dtypes.seen


@pytest.mark.parametrize("rest", [0, 3])
def test_the_kept_are_counted_in_int64_as_a_map_may_have_more_than_int32_holds(rest):
    """Without memory, by the dtype of every sum; then the numbers."""
    with Dtypes() as dtypes:
        count = disout._count(torch.ones(2**32 + rest, dtype=torch.uint8, device="meta"))
    assert count.dtype == torch.int64 and dtypes.seen == {torch.uint8, torch.int64}
    assert disout._count((torch.arange(5120 + rest) % 5 > 0).to(torch.uint8)) == 4096 + max(rest - 1, 0)


# torch.func


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)
        self.disout = Disout(0.3, 3, 5.0)

    def forward(self, x):
        x = self.disout(self.conv1(x).relu(), self.conv2.weight)
        return self.fc(self.conv2(x).mean((2, 3)))


def test_functional_gradients_are_those_of_backward(x):
    network, labels = Network(), torch.arange(16) % 3
    loss = lambda weights, x: F.cross_entropy(functional_call(network, weights, (x,)), labels)  # noqa: E731
    torch.manual_seed(0)
    gradients = torch.func.grad(loss)({name: weight.detach() for name, weight in network.named_parameters()}, x)
    assert network.disout.distorted == 0  # a transformed function changes nothing
    torch.manual_seed(0)
    F.cross_entropy(network(x), labels).backward()
    assert network.disout.distorted > 0
    for name, weight in network.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad)


def test_many_gradients_at_once_are_those_of_a_loop(x):
    """Of a batch that torch.autograd.grad takes, of torch.func.jacrev, and with a graph of their own."""
    network, x = Network(), x.clone().requires_grad_()
    logits = in_training(x, network)[:2].flatten()
    one_by_one = torch.stack([torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in logits])
    for graph in (False, True):
        rows = torch.eye(len(logits))
        (batched,) = torch.autograd.grad(logits, x, rows, is_grads_batched=True, retain_graph=True, create_graph=graph)
        torch.testing.assert_close(batched, one_by_one)
    torch.manual_seed(0)
    jacobian = torch.func.jacrev(lambda x: network(x)[:2].flatten())(x.detach())
    torch.testing.assert_close(jacobian, one_by_one)
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    torch.manual_seed(0)
    of_weights = torch.func.jacrev(lambda weights: functional_call(network, weights, (x,))[:2].flatten())(weights)
    (expected,) = torch.autograd.grad(logits[1], network.conv1.weight)
    torch.testing.assert_close(of_weights["conv1.weight"][1], expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_is_refused_in_a_sentence(x, randomness):
    layer = Disout(0.3)
    with pytest.raises(RuntimeError, match=r"not under torch.func.vmap"):
        torch.func.vmap(layer, randomness=randomness)(x[:, None])
    layer(x)


# Compilation


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph_a_shape_while_the_rate_moves(x, backend):
    """And computes what it computes without, with the same draws."""
    weight = torch.randn(6, 8, 3, 3)
    graphs = CompileCounterWithBackend(backend)
    layer, reference = Disout(0.3, 3, 5.0), Disout(0.3, 3, 5.0)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=graphs)
    for step, batch in enumerate([x, x, x, x[:5]] * 3):
        layer.dist_prob = reference.dist_prob = 0.3 * step / 11
        ours, theirs = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        in_training(ours, compiled, weight).square().sum().backward()
        in_training(theirs, reference, weight).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(layer.distorted, reference.distorted)
    assert graphs.frame_count == 2


EVER_LARGER = [0, 0.001, 0.02, 0.05, 0.09, 0.1, 0.2, 0.26, 0.5, 0.51, 1.0]


@pytest.mark.parametrize(
    ("rates", "dynamic", "batches", "compilations"),
    [
        (EVER_LARGER, None, (16,), 7),
        ([0.0, 0.0, *EVER_LARGER], None, (16, 5, 9), 8),
        ([0.09, 0.1, 0.11], True, (16, 5), 2),
    ],
)
def test_a_rate_raised_above_all_before_compiles_few_times(x, rates, dynamic, batches, compilations):
    """Once more where the first step's batch counted as the only one."""
    torch._dynamo.reset()
    weight, graphs = torch.randn(6, 8, 3, 3), CompileCounterWithBackend("aot_eager")
    layer, reference = Disout(rates[0], 3, 5.0), Disout(rates[0], 3, 5.0)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=graphs)
    for step, rate in enumerate(rates):
        layer.dist_prob = reference.dist_prob = rate
        ours = x[: batches[step % len(batches)]].clone().requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        in_training(ours, compiled, weight).square().sum().backward()
        in_training(theirs, reference, weight).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(layer.distorted, reference.distorted)
    assert graphs.frame_count == compilations


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")


@needs_compiler
def test_a_network_compiled_to_machine_code_takes_a_raised_rate(x):
    torch._dynamo.reset()
    network = Network()
    compiled = torch.compile(network)
    for rate, expected in ((0.3, 0.25), (0.9, 0.6)):  # blocks overlap
        network.disout.dist_prob = rate
        compiled(x).sum().backward()
        assert network.disout.distorted.item() == pytest.approx(expected, abs=0.07)
    assert network.conv1.weight.grad.isfinite().all()


@needs_compiler
def test_compiled_to_machine_code_it_keeps_and_distorts_what_it_says(x):
    """Not compared bit by bit, as a compiler may change the order of the draws (torch 2.11's does)."""
    torch._dynamo.reset()
    layer, weight, x = Disout(0.3, 3, 5.0), torch.randn(6, 8, 3, 3), x.clone().requires_grad_()
    y = in_training(x, torch.compile(layer, fullgraph=True), weight)
    y.sum().backward()
    kept_share = 1 - layer.distorted
    assert kept_share.item() == pytest.approx(0.75, abs=0.05)
    kept = x.grad != 0
    assert kept.float().mean() == pytest.approx(kept_share.item(), abs=1e-6)
    torch.testing.assert_close(x.grad, kept / kept_share)
    torch.testing.assert_close(y[kept], x[kept] / kept_share)
    signs = torch.randint(0, 2, (8, 3, 3)) * 2 - 1
    expected = 5 * strength(weight, signs).square().mean().sqrt() * x.std() / kept_share
    assert 0.5 < y[~kept].std() / expected < 2


def test_exported_in_training_the_batch_stays_dynamic(x):
    """As torch.export does it: without torch._dynamo, which is less strict about what makes a constant."""
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Network().train(), (x,), dynamic_shapes=({0: batch},)).module()
    for n in (2, 16, 9):
        assert exported(x[:n]).shape == (n, 3)
    draws = torch.stack([exported(x) for _ in range(2)])
    assert not torch.equal(*draws)


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
    expected = first(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, weight)
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


def test_the_file_can_be_copied_alone():
    tree = ast.parse(Path(disout.__file__).read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports <= {"collections.abc", "math", "numbers", "typing", "torch"}


def test_distort_leaves_its_arguments_alone(x):
    before = x.clone()
    keep, elements = keep_of(torch.tensor([3, 50]), x, 3)
    distort(x, keep, elements, torch.randn(elements.shape), 0.01, 5.0)
    assert torch.equal(x, before)


def test_a_layer_made_on_the_meta_device_takes_its_rate_again(x):
    with torch.device("meta"):
        layer = Disout(0.3, block_size=1)
    layer.to_empty(device="cpu").dist_prob = 0.3
    in_training(x, layer)
    assert layer.distorted.item() == pytest.approx(0.3, abs=0.05)
