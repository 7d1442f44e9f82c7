"""What changes over training, as pure functions of the step or epoch (both counted from 0), seeds included: so no
generator's state needs saving."""

import hashlib

# The authors' recipes, as (shares of all epochs, factor), so that a short run keeps the shape:
# CIFAR, x 0.2 from epochs 60, 120 and 160 of 200, counted from 1; ImageNet, x 0.1 from 243, 400 and 503 of 540, from 0.
CIFAR_DECAY = ((59 / 200, 119 / 200, 159 / 200), 0.2)
IMAGENET_DECAY = ((0.45, 0.74, 0.93), 0.1)


def dist_prob_at(step: int, total_steps: int, final: float, constant: bool = False) -> float:
    """linspace(0, final, total_steps)[step]: the first step is the identity, the last uses `final` (authors' code).
    No step has a larger one, not by rounding either, as a compiled network would be compiled anew for it. If
    `constant`, `final` in every step."""
    if constant:
        return final
    return final * (step / (total_steps - 1)) if total_steps > 1 else 0.0


def step_sizes(images: int, batch_size: int, smallest: int = 1) -> list[int]:
    """The images of each step of an epoch. What is left after the last whole batch is a step of its own; if it is fewer
    than `smallest`, it joins the step before."""
    sizes = [batch_size] * (images // batch_size)
    rest = images - sum(sizes)
    if sizes and 0 < rest < smallest:
        return [*sizes[:-1], batch_size + rest]
    return [*sizes, rest] if rest else sizes


def lr_at(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    base_lr: float,
    warmup_epochs: int,
    decay: tuple[tuple[float, ...], float],
) -> float:
    """Linear warm-up over the first `warmup_epochs`, step t of T at base_lr * (t + 1) / T, and a decay from the first
    epoch at or after each milestone (authors' code)."""
    epoch = step // steps_per_epoch
    milestones, factor = decay
    # The margin keeps 59/200 * 200 at 59 whatever the rounding.
    lr = base_lr * factor ** sum(epoch >= milestone * epochs - 1e-6 for milestone in milestones)
    warmup_steps = warmup_epochs * steps_per_epoch
    return lr * (step + 1) / warmup_steps if step < warmup_steps else lr


def seed_for(*purpose: str | int) -> int:
    """A 63-bit seed that depends on the whole of `purpose` alone: seed_for("order", seed, epoch)."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest(), "little") >> 1
