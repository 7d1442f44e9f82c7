"""One epoch of training, one evaluation. Knows neither the data set nor the network, and of the method only that its
layers have a rate, `dist_prob`, and say what share they `distorted`."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.files import ImageError
from utils.processes import Failure, gathered, largest, processes, summed
from utils.schedules import dist_prob_at, seed_for

Batches = Iterable[tuple[Tensor, Tensor]]


class Diverged(Failure):
    """A loss, or a weight, that is not finite; or weights that are not the same in all processes."""

    of_all = True


class Schedule(NamedTuple):
    """What a run does in each of its steps, counted from 0."""

    lr_at_step: Callable[[int], float]
    layers: list[tuple[nn.Module, float]]  # of the regularizer, each with the rate that it grows to
    total_steps: int
    seed: int  # with the step and the process's rank, it seeds the layers' draws, so that any step can be replayed
    constant_prob: bool = False  # the layers have their rate from the first step on


def train_epoch(
    model: nn.Module,
    batches: Batches,
    step_sizes: list[int],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    first_step: int,
    *,
    accumulate_steps: int = 1,
    label_smoothing: float = 0.0,
    amp: bool = False,
    totals: Tensor | None = None,
    save_is_due: Callable[[], bool] = lambda: False,
    save: Callable[[int, Tensor], None] | None = None,
) -> dict[str, float]:
    """One pass over `batches`, an optimizer step for every `accumulate_steps` of them.

    Args:
        batches: this process's images (B, 3, H, W) and labels (B,), from `first_step` on; a label of -100 does not
            count.
        step_sizes: the images of each step of the epoch, of all batches and processes together.
        schedule: of the run.
        first_step: the step to begin with. Where it lies within an epoch, this goes on with that epoch.
        totals: what `save` got at that step, where it lies within an epoch.
        amp: the network computes in bfloat16 where autocast says so; loss, weights and optimizer are float32.
        save_is_due: asked after every step; where it says so, `save` gets the number of finished steps and the totals,
            a row a process.

    Returns: train_loss (cross-entropy without label smoothing) and train_top1 (%), both in training mode while the
    weights change; train_images that counted and train_skipped that did not; lr and distorted (mean over layers, 0
    without any) of the last step.

    Raises:
        Diverged: a loss or weight is not finite, or the processes' weights differ, which is looked at before saving
            and at the end.
    """
    lr_at_step, layers, total_steps, seed, constant = schedule
    model.train()
    rank, world = processes()
    batches = iter(batches)
    epoch, done = divmod(first_step, len(step_sizes))
    last_step = first_step - done + len(step_sizes) - 1
    device = next(model.parameters()).device
    totals = torch.zeros(4, device=device) if totals is None else totals[rank].to(device)
    # Loss, top1 and images are summed on the device, and the first bad step is noted there: no wait for it.
    bad_step = torch.full((), total_steps, device=device)

    def check(step: int) -> None:
        if found := first_trouble(bad_step, model, step):
            bad, what = found
            rate = dist_prob_at(bad, total_steps, max((final for _, final in layers), default=0.0), constant)
            where = f"epoch {epoch + 1}, step {bad % len(step_sizes) + 1} of {len(step_sizes)}"
            if not what:
                raise Diverged(
                    f"the processes have other weights after {where}: what was saved before it stays; do all machines "
                    "have the same code and versions?"
                )
            raise Diverged(
                f"a {what} is not finite in {where} (lr {lr_at_step(bad):g}, dist_prob {rate:g}): what was saved "
                "before it stays; try a smaller --lr under another --name"
            )

    for step, size in enumerate(step_sizes[done:], first_step):
        lr = lr_at_step(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for layer, final in layers:
            layer.dist_prob = dist_prob_at(step, total_steps, final, constant)
        torch.manual_seed(seed_for("step", seed, step, rank))

        optimizer.zero_grad()
        for part, (images, labels) in enumerate(islice(batches, accumulate_steps), 1):
            # Processes average their gradients, once a step: with its last part.
            alone = isinstance(model, DistributedDataParallel) and part < accumulate_steps
            with model.no_sync() if alone else nullcontext():
                with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
                (loss * (world / size)).backward()
            totals = totals + batch_sums(logits.detach(), labels, ks=(1,))
            bad_step = bad_step.where(loss.detach().isfinite(), bad_step.clamp(max=step))
        optimizer.step()
        if step < last_step and save_is_due():  # the last is saved with its epoch
            check(step)
            save(step + 1, gathered(totals))

    check(last_step)
    loss_sum, top1, count, skipped = summed(totals).tolist()
    if not count:
        raise no_image("train")
    distorted = float(torch.stack([layer.distorted for layer, _ in layers]).mean()) if layers else 0.0
    return {
        "train_loss": loss_sum / count,
        "train_top1": 100 * top1 / count,
        "train_images": int(count),
        "train_skipped": int(skipped),
        "lr": lr,
        "distorted": distorted,
    }


def first_trouble(bad_step: Tensor, model: nn.Module, step: int) -> tuple[int, str] | None:
    """The step, and 'loss' or 'weight': where the loss was not finite first, in any of the processes (`bad_step` is
    this one's, beyond `step` where there is none), or `step`, where a weight is not finite, or, with '', where their
    weights differ. All processes agree."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    same = checksum(model)
    bad, bad_weight, most, least = largest(-int(bad_step), int(not finite), same, -same)
    if -bad <= step:
        return -bad, "loss"
    if bad_weight:
        return step, "weight"
    return None if most == -least else (step, "")


def checksum(model: nn.Module) -> int:
    """Of the bits of all weights, float32: whole numbers, whose sum no order changes. 0 in one process."""
    if processes()[1] == 1:
        return 0
    sums = [weight.detach().view(torch.int32).sum(dtype=torch.int64) for weight in model.parameters()]
    return int(torch.stack(sums).sum()) % 2**62


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, amp: bool = False) -> dict[str, float]:
    """test_loss, test_top1, test_top5 (%), test_images and test_skipped over all processes' `batches`."""
    model.eval()
    totals = torch.zeros(5, device=next(model.parameters()).device)
    for images, labels in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        totals += batch_sums(logits, labels, ks=(1, 5))
    loss_sum, top1, top5, count, skipped = summed(totals).tolist()
    if not count:
        raise no_image("evaluate")
    return {
        "test_loss": loss_sum / count,
        "test_top1": 100 * top1 / count,
        "test_top5": 100 * top5 / count,
        "test_images": int(count),
        "test_skipped": int(skipped),
    }


def no_image(to: str) -> ImageError:
    """What all processes raise, as none of them has one."""
    error = ImageError(f"none of the images to {to} on can be read")
    error.of_all = True
    return error


def batch_sums(logits: Tensor, labels: Tensor, ks: tuple[int, ...]) -> Tensor:
    """The cross-entropy summed over the batch, for each k the images whose label is among the k largest logits, and
    the numbers of images that count and that do not (label -100), float32."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    hits = logits.topk(min(max(ks), logits.shape[1])).indices == labels[:, None]
    return torch.stack([loss, *(hits[:, :k].sum() for k in ks), (labels >= 0).sum(), (labels < 0).sum()])
