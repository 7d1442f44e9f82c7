import numpy as np
import pytest

from utils.schedules import CIFAR_DECAY, IMAGENET_DECAY, dist_prob_at, lr_at, step_sizes

STEPS = 391  # an epoch of CIFAR at batch 128


def recipe_lr(step):
    return lr_at(step, STEPS, epochs=200, base_lr=0.1, warmup_epochs=1, decay=CIFAR_DECAY)


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
    rates = [lr_at(epoch, 1, epochs=10, base_lr=1.0, warmup_epochs=0, decay=CIFAR_DECAY) for epoch in range(10)]
    assert rates == pytest.approx([1.0] * 3 + [0.2] * 3 + [0.04] * 2 + [0.008] * 2)
    assert lr_at(0, 1, epochs=1, base_lr=1.0, warmup_epochs=0, decay=CIFAR_DECAY) == 1.0


def test_imagenet_decays_where_the_authors_do_without_warm_up():
    rates = [lr_at(epoch, 1, epochs=540, base_lr=0.4, warmup_epochs=0, decay=IMAGENET_DECAY) for epoch in range(540)]
    expected = [0.4] * 243 + [0.04] * (400 - 243) + [0.004] * (503 - 400) + [0.0004] * (540 - 503)
    assert rates == pytest.approx(expected)


def test_step_sizes():
    assert step_sizes(50_000, 128) == [128] * 390 + [80]
    assert step_sizes(256, 128) == [128, 128]
    assert step_sizes(257, 128, smallest=2) == [128, 129]
    assert step_sizes(5, 128, smallest=8) == [5]


@pytest.mark.parametrize("total", [1, 2, 7, 78_200])
def test_dist_prob_is_linspace(total):
    expected = np.linspace(0, 0.09, total)
    for step in {0, total // 3, total - 1}:
        assert dist_prob_at(step, total, 0.09) == pytest.approx(expected[step], abs=1e-12)


@pytest.mark.parametrize("final", [0.1, 0.09, 0.07])
def test_dist_prob_is_largest_in_the_last_step_and_then_what_was_asked_for(final):
    for total in range(2, 3000):
        assert dist_prob_at(0, total, final, constant=True) == final
        assert dist_prob_at(total - 2, total, final) <= dist_prob_at(total - 1, total, final) == final
