"""One epoch of training, one evaluation. Knows neither the data set, nor the network, nor the method."""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.processes import processes, summed
from utils.schedules import dist_prob_at
from utils.seeds import seed_for

Batches = Iterable[tuple[Tensor, Tensor]]


def train_epoch(
    model: nn.Module,
    batches: Batches,
    step_sizes: list[int],
    optimizer: torch.optim.Optimizer,
    *,
    lr_at_step: Callable[[int], float],
    layers: list[tuple[nn.Module, float]],
    first_step: int,
    total_steps: int,
    seed: int,
    accumulate_steps: int = 1,
    label_smoothing: float = 0.0,
    amp: bool = False,
) -> dict[str, float]:
    """One pass over `batches`, an optimizer step each, or one in `accumulate_steps` of them.

    Args:
        batches: this process's images (B, 3, H, W) and labels (B,); a label of -100 does not count.
        step_sizes: the images of each step, of all batches and processes together.
        lr_at_step: learning rate of a step.
        layers: the regularizer's layers, each with the rate that it grows to.
        first_step: steps before this epoch, out of `total_steps` in the whole run.
        amp: the network computes in bfloat16 where autocast says so; loss, weights and optimizer are float32.
        seed: with the step and the process's rank, it seeds the layers' draws, so that any step can be replayed.

    Returns: train_loss (cross-entropy without label smoothing), train_top1 (%), train_images that counted and
    train_skipped that did not; lr and distorted (mean over layers, 0 without any) of the last step.
    """
    model.train()
    rank, world = processes()
    batches = iter(batches)
    totals = 0.0  # loss, top1 and images, summed on the device: no wait for it before the epoch's end
    for step, size in enumerate(step_sizes, first_step):
        lr = lr_at_step(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for layer, final in layers:
            layer.dist_prob = dist_prob_at(step, total_steps, final)
        torch.manual_seed(seed_for("step", seed, step, rank))

        optimizer.zero_grad()
        for images, labels in islice(batches, accumulate_steps):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
            (loss * (world / size)).backward()  # processes average their gradients
            totals = totals + batch_sums(logits.detach(), labels, ks=(1,))
        optimizer.step()

    loss_sum, top1, count, skipped = summed(totals).tolist()
    distorted = float(torch.stack([layer.distorted for layer, _ in layers]).mean()) if layers else 0.0
    return {
        "train_loss": loss_sum / count,
        "train_top1": 100 * top1 / count,
        "train_images": int(count),
        "train_skipped": int(skipped),
        "lr": lr,
        "distorted": distorted,
    }


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
    return {
        "test_loss": loss_sum / count,
        "test_top1": 100 * top1 / count,
        "test_top5": 100 * top5 / count,
        "test_images": int(count),
        "test_skipped": int(skipped),
    }


def batch_sums(logits: Tensor, labels: Tensor, ks: tuple[int, ...]) -> Tensor:
    """The cross-entropy summed over the batch, for each k the images whose label is among the k largest logits, and
    the numbers of images that count and that do not (label -100), float32."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    largest = logits.topk(min(max(ks), logits.shape[1])).indices == labels[:, None]
    return torch.stack([loss, *(largest[:, :k].sum() for k in ks), (labels >= 0).sum(), (labels < 0).sum()])
