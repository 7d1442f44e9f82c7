"""CIFAR-10, CIFAR-100 and handwritten digits as one uint8 tensor on the training device, and their batches.

No workers and no PIL in the loop: a batch is shuffled, cropped, flipped, rotated and normalised by index arithmetic on
the device. Order and augmentation are a function of (seed, epoch) alone.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from utils.files import LOCK, fcntl
from utils.schedules import seed_for

SIZE = 32
PADDING = 4
PADDED = SIZE + 2 * PADDING
MAX_ANGLE = 15.0
CUTOUT = 16  # side of the square; our choice, as the paper gives none
TEST_BATCH = 500

AUGMENTS = ("none", "standard", "cutout")

# --dataset -> (classes, training images)
DATASETS = {"cifar10": (10, 50_000), "cifar100": (100, 50_000), "digits": (10, 1_437)}

# Of CIFAR-10, in the authors' code; CIFAR-100 is the same recipe with 100 classes (our choice, nothing is published).
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


class Images(NamedTuple):
    pixels: Tensor  # uint8 (N, 32, 32, 3)
    labels: Tensor  # int64 (N,)

    def take(self, index: Tensor | slice) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


class Augmentation(NamedTuple):
    """What happens to each of N images: crop, flip and rotation, in this order; cutout after normalising."""

    shift: Tensor  # int64 (N, 2), row and column of the crop's corner in the padded image, 0 to 2 * PADDING
    flip: Tensor  # bool (N,)
    angle: Tensor  # float32 (N,), degrees, counter-clockwise
    centre: Tensor  # int64 (N, 2), row and column of the cut-out square's centre

    def take(self, index: Tensor | slice) -> "Augmentation":
        return Augmentation(*(field[index] for field in self))


def load(dataset: str, root: str | Path) -> tuple[Images, Images]:
    """Training and test images of `dataset`, on the CPU.

    CIFAR comes through torchvision, which checks MD5 and downloads what is missing; the digits are embedded in
    scikit-learn.

    Raises:
        FileNotFoundError: the files are not in `root` and could not be downloaded; says what to put where.
    """
    if dataset == "digits":
        return load_digit_images()
    made = not Path(root).exists()
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    try:
        try:
            parts = [cls(root, train=train) for train in (True, False)]
        except RuntimeError:  # they are not there, or not intact
            with locked(Path(root)):
                parts = [cls(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if made and Path(root).is_dir() and not any(Path(root).iterdir()):
            Path(root).rmdir()  # torchvision made it for the download
        raise FileNotFoundError(
            f"{dataset}: no intact files in {root} and no download ({error}): put the python version's folder "
            f"{cls.base_folder} from https://www.cs.toronto.edu/~kriz/cifar.html there, or name the folder that holds "
            "it with --data_root"
        ) from None
    train, test = (Images(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts)
    return train, test


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder. Of several runs that start together one downloads into it and the others wait, where its file
    system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with suppress(OSError):
            if fcntl:
                descriptor = os.open(folder, os.O_RDONLY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            else:
                held.enter_context(FileLock(folder / LOCK))
        yield


def load_parts(
    dataset: str, root: str | Path, train_size: int, holdout: int, device: torch.device
) -> tuple[Images, Images, Tensor, Tensor]:
    """What a run works on, on its device: the images to train on (`train_size`, 0: all that are not held out), those to
    evaluate on (`holdout` of the training images, 0: the test images), and each channel's mean and deviation, (3,)."""
    train, test = load(dataset, root)
    mean, std = channel_statistics(dataset, train)
    if train_size or holdout:
        train, held_out = split(train, train_size, holdout)
        test = held_out if holdout else test
    return train.to(device), test.to(device), mean.to(device), std.to(device)


def load_digit_images() -> tuple[Images, Images]:
    """scikit-learn's 1,797 handwritten digits (8 x 8, 17 greys) scaled to 32 x 32, split 1,437 / 360, stratified."""
    digits = load_digits()
    small = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    pixels = F.interpolate(small, (SIZE, SIZE), mode="bilinear", antialias=False).round().to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    images = Images(pixels, torch.from_numpy(digits.target))
    train, test = train_test_split(np.arange(len(pixels)), test_size=360, random_state=0, stratify=digits.target)
    return images.take(torch.from_numpy(train)), images.take(torch.from_numpy(test))


def split(train: Images, train_size: int, holdout: int) -> tuple[Images, Images]:
    """The first `train_size` images (0: all but the held-out ones) of a fixed shuffle, and the `holdout` that follow.

    The shuffle is the same for every seed and goes through the classes in rounds, so that any part of it is balanced
    to within one image, as long as no class has run out.
    """
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    labels = train.labels[order]
    rank = torch.empty_like(labels)  # how many of its class come before it
    for label in labels.unique():
        of_class = labels == label
        rank[of_class] = torch.arange(int(of_class.sum()))
    order = order[rank.argsort(stable=True)]
    size = train_size or len(order) - holdout
    return train.take(order[:size]), train.take(order[size : size + holdout])


def draw_epoch(size: int, seed: int, epoch: int) -> tuple[Tensor, Augmentation]:
    """The order of `size` images in an epoch, and the augmentation of the image at each place of that order."""
    generator = torch.Generator().manual_seed(seed_for("epoch", seed, epoch))
    order = torch.randperm(size, generator=generator)
    shift = torch.randint(0, 2 * PADDING + 1, (size, 2), generator=generator)
    flip = torch.rand(size, generator=generator) < 0.5
    angle = (torch.rand(size, generator=generator) * 2 - 1) * MAX_ANGLE
    centre = torch.randint(0, SIZE, (size, 2), generator=generator)
    return order, Augmentation(shift, flip, angle, centre)


def augment(pixels: Tensor, how: Augmentation) -> Tensor:
    """Crops 32 x 32 out of the image with 4 zeros of padding, flips, and rotates (nearest, zeros outside), as
    torchvision's RandomCrop, RandomHorizontalFlip and RandomRotation do on PIL images with the same parameters.

    Goes backwards from each pixel of the result to the pixel that it comes from, so that all three are one gather.
    Pixels are uint8 (N, 32, 32, 3). Source: the authors' CIFAR recipe.
    """
    shift, flip, angle = how.shift[:, :, None, None], how.flip[:, None, None], how.angle[:, None, None].deg2rad()
    grid = torch.arange(SIZE, device=pixels.device) - (SIZE - 1) / 2  # of pixel centres, about the image's centre
    y, x = grid[:, None], grid[None, :]
    column = (angle.cos() * x - angle.sin() * y + SIZE / 2).floor()
    row = (angle.sin() * x + angle.cos() * y + SIZE / 2).floor()
    within = in_image(row) & in_image(column)
    column = torch.where(flip, SIZE - 1 - column, column) + shift[:, 1]
    row = row + shift[:, 0]
    index = (row * PADDED + column).where(within, 0).long()  # the padded image's corner is 0
    index += PADDED**2 * torch.arange(len(pixels), device=pixels.device)[:, None, None]
    padded = F.pad(pixels, (0, 0, *(PADDING,) * 4))
    return padded.view(-1, 3).index_select(0, index.flatten()).view_as(pixels)


def cutout(images: Tensor, centre: Tensor) -> Tensor:
    """Zeroes a 16 x 16 square, cut at the edges, of normalised images (N, 3, 32, 32) (arXiv 1708.04552)."""
    offset = torch.arange(SIZE, device=images.device) - centre[:, :, None]  # (N, 2, 32), from the square's centre
    covered = (offset >= -CUTOUT // 2) & (offset < CUTOUT // 2)
    return images.masked_fill((covered[:, 0, :, None] & covered[:, 1, None, :])[:, None], 0)


def in_image(position: Tensor) -> Tensor:
    return (position >= 0) & (position < SIZE)


def channel_statistics(dataset: str, train: Images) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (3,), of pixels from 0 to 1: the recipe's for CIFAR, those of all
    training images for the digits."""
    if dataset == "digits":
        pixels = train.pixels.flatten(0, 2).float() / 255
        return pixels.mean(0), pixels.std(0)
    return torch.tensor(CIFAR_MEAN), torch.tensor(CIFAR_STD)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, 32, 32, 3) to float32 (N, 3, 32, 32) in channels_last memory format."""
    mean, std = mean.repeat(SIZE**2), std.repeat(SIZE**2)  # arithmetic over rows of 3 takes far longer
    return ((pixels.flatten(1) / 255 - mean) / std).view_as(pixels).permute(0, 3, 1, 2)


def train_batches(
    train: Images,
    mean: Tensor,
    std: Tensor,
    batch_size: int,
    augmentation: str,
    seed: int,
    epoch: int,
    first_batch: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The shuffled batches of an epoch from `first_batch` on (float32 (B, 3, 32, 32), int64 (B,)). The last may be
    smaller. `augmentation` is one of AUGMENTS.
    """
    device = train.pixels.device
    order, how = draw_epoch(len(train.labels), seed, epoch)
    order, *how = (drawn.to(device, non_blocking=True) for drawn in (order, *how))
    how = Augmentation(*how)
    for start in range(first_batch * batch_size, len(order), batch_size):
        part = slice(start, start + batch_size)
        pixels, labels = train.take(order[part])
        if augmentation != "none":
            pixels = augment(pixels, how.take(part))
        images = normalise(pixels, mean, std)
        if augmentation == "cutout":
            images = cutout(images, how.centre[part])
        yield images, labels


def test_batches(images: Images, mean: Tensor, std: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images.labels), TEST_BATCH):
        pixels, labels = images.take(slice(start, start + TEST_BATCH))
        yield normalise(pixels, mean, std), labels
