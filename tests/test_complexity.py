import csv
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import train

sys.path.insert(0, str(Path(train.__file__).parent / "scripts/studies"))
import complexity
import draw_distortion

from utils.flags import UsageError


def measured(layer, images, batch_size):
    with complexity.Complexity([layer], len(images)) as sums:
        for batch in images.split(batch_size):
            layer(batch)
    return sums.result()


def test_the_complexity_is_the_rademacher_average_of_the_outputs(monkeypatch):
    """Against every sign vector there is, for the outputs of a convolution."""
    layer, images = nn.Conv2d(3, 4, 1), torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    outputs = layer(images).detach()
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)))
    expected = torch.einsum("dn,nchw->dchw", every, outputs).abs().amax(1).mean() / 6
    monkeypatch.setattr(complexity, "DRAWS", 20_000)
    with torch.no_grad():
        absolute, relative = measured(layer, images, 6)
    assert absolute == pytest.approx(expected.item(), rel=0.02)
    assert relative == pytest.approx(absolute / outputs.square().mean().sqrt().item())


@torch.no_grad()
def test_it_does_not_depend_on_the_batches_and_grows_with_the_weights():
    layer, images = nn.Conv2d(3, 4, 3), torch.randn(20, 3, 5, 5)
    whole = measured(layer, images, 20)
    assert measured(layer, images, 6) == pytest.approx(whole)
    layer.weight *= 2
    layer.bias *= 2
    assert measured(layer, images, 20) == pytest.approx((2 * whole[0], whole[1]))


def test_the_size_of_the_distortion_is_the_root_mean_square_of_the_strength():
    weight = torch.randn(5, 40, 3, 3, generator=torch.Generator().manual_seed(0))
    # independent signs: the mean of the square is the mean of the squares of the channel's maxima, over 9
    expected = (weight.amax(0).square().mean() / 9).sqrt().item()
    assert complexity.size_of_strength(weight) == pytest.approx(expected, rel=0.05)


def test_of_runs_it_writes_a_row_each_and_the_picture(run):
    small = ["--train_size", "100", "--holdout", "50", "--epochs", "1", "--augment", "none"]
    run(*small, "--method", "none", name="none")
    run(*small, "--method", "dropblock", name="dropblock")
    folder = run(*small, "--alpha", "2", name="disout").parent
    complexity.main([str(folder)])
    with (folder / "complexity.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"none", "dropblock", "disout"}
    assert (rows["disout"]["dist_prob"], rows["disout"]["alpha"]) == ("0.09", "2.0")
    for row in rows.values():
        assert float(row["gap"]) == pytest.approx(float(row["train_top1"]) - float(row["test_top1"]), abs=1e-3)
        assert float(row["train_top1"]) <= 100 and float(row["complexity"]) > 0
        assert (float(row["distortion"]) > 0) == (row["method"] == "disout")
    assert (folder / "complexity.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (complexity.main, ["{tmp}"], "no complete run with its checkpoint"),
        (draw_distortion.main, ["{tmp}/missing", "{tmp}/maps.png"], "is no run"),
        (draw_distortion.main, ["{published}/small_study/disout-s0", "{tmp}/maps.png"], "published runs have none"),
    ],
)
def test_without_a_run_it_says_so(main, argv, says, tmp_path):
    published = Path(complexity.__file__).parents[2] / "results/published"
    with pytest.raises(UsageError, match=says):
        main([argument.format(tmp=tmp_path, published=published) for argument in argv])


def test_the_distortion_of_a_trained_network_is_drawn(run, tmp_path):
    folder = run("--train_size", "20", "--epochs", "1")
    draw_distortion.main([str(folder), str(tmp_path / "maps.png")])
    assert (tmp_path / "maps.png").stat().st_size > 10_000
