"""What only the form for CPUs does: seeds drawn by their gaps, as many as there is room for, and its sums."""

import math

import pytest
import torch
from conftest import Dtypes, in_training
from scipy.stats import binom

import disout_cpu
from disout import Disout
from disout_cpu import deviation, draw_seeds, most_seeds


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
    monkeypatch.setattr(disout_cpu, "most_seeds", lambda rate, places: asked.append(rate) or most_seeds(rate, places))
    rounded = 0.09 * 3 / 3
    assert rounded > 0.09
    for rate in (0.0, rounded, 0.1, 0.01, 0.126, 1.0):
        layer.dist_prob = rate
        layer(x)
    assert asked == [0.09, 0.09, 1 / 8, 1 / 8, 1 / 4, 1.0]


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("shape", [(128, 64, 8, 8), (2, 64, 56, 56), (4, 8), (1, 16, 256, 256), (1, 64, 512, 512)])
def test_deviation_is_that_of_the_whole_batch(shape, mean):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + mean
    assert deviation(x).item() == pytest.approx(x.double().std().item(), rel=5e-4)


@pytest.mark.parametrize("rest", [0, 3])
def test_the_kept_are_counted_in_int64_as_a_map_may_have_more_than_int32_holds(rest):
    """Without memory, by the dtype of every sum; then the numbers."""
    with Dtypes() as dtypes:
        count = disout_cpu._count(torch.ones(2**32 + rest, dtype=torch.uint8, device="meta"))
    assert count.dtype == torch.int64 and dtypes.seen == {torch.uint8, torch.int64}
    assert disout_cpu._count((torch.arange(5120 + rest) % 5 > 0).to(torch.uint8)) == 4096 + max(rest - 1, 0)
