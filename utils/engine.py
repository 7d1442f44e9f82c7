"""One epoch of training, one evaluation. Knows neither the data set, nor the network, nor the method."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.schedules import dist_prob_at
from utils.seeds import seed_for

Batches = Iterable[tuple[Tensor, Tensor]]


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    lr_at_step: Callable[[int], float],
    layers: list[tuple[nn.Module, float]],
    first_step: int,
    total_steps: int,
    seed: int,
    rank: int = 0,
) -> dict[str, float]:
    """One pass over `batches`, an optimizer step each.

    Args:
        lr_at_step: learning rate of a step.
        layers: the regularizer's layers, each with the rate that it grows to.
        first_step: steps before this epoch, out of `total_steps` in the whole run.
        seed, rank: with the step, they seed the layers' draws, so that any step can be replayed.

    Returns: train_loss, train_top1 (%), lr and distorted (mean over layers, 0 without any) of the last step.
    """
    model.train()
    totals = None  # loss, top1 and images, summed on the device: no wait for it before the epoch's end
    for step, (images, labels) in enumerate(batches, first_step):
        lr = lr_at_step(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for layer, final in layers:
            layer.dist_prob = dist_prob_at(step, total_steps, final)
        torch.manual_seed(seed_for("step", seed, step, rank))

        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        sums = batch_sums(logits.detach(), labels, ks=(1,))
        totals = sums if totals is None else totals + sums
    loss_sum, top1, count = totals.tolist()
    distorted = float(torch.stack([layer.distorted for layer, _ in layers]).mean()) if layers else 0.0
    return {"train_loss": loss_sum / count, "train_top1": 100 * top1 / count, "lr": lr, "distorted": distorted}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> dict[str, float]:
    """test_loss, test_top1 and test_top5 (%) over all images of `batches`."""
    model.eval()
    totals = sum(batch_sums(model(images), labels, ks=(1, 5)) for images, labels in batches)
    loss_sum, top1, top5, count = totals.tolist()
    return {"test_loss": loss_sum / count, "test_top1": 100 * top1 / count, "test_top5": 100 * top5 / count}


def batch_sums(logits: Tensor, labels: Tensor, ks: tuple[int, ...]) -> Tensor:
    """The cross-entropy summed over the batch, for each k the images whose label is among the k largest logits, and
    the number of images, float32."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    largest = logits.topk(max(ks)).indices == labels[:, None]
    return torch.stack([loss, *(largest[:, :k].sum() for k in ks), loss.new_tensor(len(labels))])
