"""What changes over training, as pure functions of the step or epoch (both counted from 0)."""

from collections.abc import Sequence

# CIFAR recipe of the authors' code: x 0.2 from epochs 60, 120 and 160 of 200, counted from 1.
CIFAR_MILESTONES = (59 / 200, 119 / 200, 159 / 200)
CIFAR_DECAY = 0.2


def dist_prob_at(step: int, total_steps: int, final: float) -> float:
    """linspace(0, final, total_steps)[step]: the first step is the identity, the last uses `final` (authors' code)."""
    return final * step / (total_steps - 1) if total_steps > 1 else 0.0


def lr_at(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    base_lr: float,
    warmup_epochs: int,
    milestones: Sequence[float] = CIFAR_MILESTONES,
    decay: float = CIFAR_DECAY,
) -> float:
    """Linear warm-up over the first `warmup_epochs`, step t of T at base_lr * (t + 1) / T, and a decay at the start of
    each milestone's epoch. Milestones are shares of all epochs, so that a short run keeps the recipe's shape.
    """
    epoch = step // steps_per_epoch
    # The margin keeps 59/200 * 200 at 59 whatever the rounding.
    lr = base_lr * decay ** sum(epoch >= milestone * epochs - 1e-6 for milestone in milestones)
    warmup_steps = warmup_epochs * steps_per_epoch
    return lr * (step + 1) / warmup_steps if step < warmup_steps else lr
