import numpy as np
import pytest

from utils.schedules import dist_prob_at, lr_at

STEPS = 391  # an epoch of CIFAR at batch 128


def recipe_lr(step):
    return lr_at(step, STEPS, epochs=200, base_lr=0.1, warmup_epochs=1)


def test_learning_rate_turns_where_the_recipe_does():
    assert recipe_lr(0) == pytest.approx(0.1 / 391)
    assert recipe_lr(195) == pytest.approx(0.1 * 196 / 391)
    assert recipe_lr(390) == recipe_lr(391) == pytest.approx(0.1)  # the first step after a resume in epoch 2 is full
    for epoch, before, after in ((60, 0.1, 0.02), (120, 0.02, 0.004), (160, 0.004, 0.0008)):
        first = (epoch - 1) * STEPS
        assert recipe_lr(first - 1) == pytest.approx(before)
        assert recipe_lr(first) == pytest.approx(after)
    assert recipe_lr(200 * STEPS - 1) == pytest.approx(0.0008)


def test_short_runs_keep_the_shape():
    rates = [lr_at(epoch, 1, epochs=10, base_lr=1.0, warmup_epochs=0) for epoch in range(10)]
    assert rates == pytest.approx([1.0] * 3 + [0.2] * 3 + [0.04] * 2 + [0.008] * 2)
    assert lr_at(0, 1, epochs=1, base_lr=1.0, warmup_epochs=0) == 1.0


@pytest.mark.parametrize("total", [1, 2, 7, 78_200])
def test_dist_prob_is_linspace(total):
    expected = np.linspace(0, 0.09, total)
    for step in {0, total // 3, total - 1}:
        assert dist_prob_at(step, total, 0.09) == pytest.approx(expected[step], abs=1e-12)
