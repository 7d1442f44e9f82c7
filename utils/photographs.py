"""ImageNet, or any other folder of one subfolder a class, through workers that decode and augment.

A sample's augmentation is a function of (seed, epoch, index) alone, which the sampler hands to the data set: it is the
same whatever the number of workers and processes.
"""

import errno
import io
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from utils.files import ImageError
from utils.image_list import ImageList
from utils.printing import say
from utils.processes import is_first
from utils.schedules import seed_for

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GREY = tuple(round(255 * mean) for mean in MEAN)  # what normalising turns into 0
SKIPPED = -100  # label of an image that could not be read: no loss and no accuracy counts it

# What a network file system fails with in passing, and the seconds before each further try
PASSING, PAUSES = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}, (0.2, 1.0, 3.0)

AUGMENTS = ("none", "standard", "cutout", "autoaugment")


class Photographs(Dataset):
    """Under the key (epoch, index): uint8 (3, size, size) and the label.

    Raises:
        ImageError: naming the file that holds no image. With `skip_corrupt` a grey image takes its place in the batch,
            under the label SKIPPED.
        OSError: naming the file that the file system does not give.
    """

    def __init__(self, folder: Path, transform: v2.Transform, seed: int, skip_corrupt: bool) -> None:
        self.images = ImageList(folder)
        self.transform, self.seed, self.skip_corrupt = transform, seed, skip_corrupt

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        path, label = self.images[index]
        content = read_bytes(path)
        try:
            image = to_rgb(decoded(content))
        except ImageError as error:
            if not self.skip_corrupt:
                raise ImageError(
                    f"{path} cannot be read ({error}); --resume --skip_corrupt goes on without it"
                ) from None
            image, label = Image.new("RGB", (224, 224), GREY), SKIPPED
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for("photograph", self.seed, epoch, index))
            return self.transform(image), label


def read_bytes(path: str) -> bytes:
    """What the file holds. What a network file system fails with in passing is tried again for some seconds.

    Raises:
        OSError: naming the file. None of OSError's own subclasses, which a loader's worker raises as it dies.
    """
    for pause in (*PAUSES, None):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            if pause is None or error.errno not in PASSING:
                raise OSError(f"{path} cannot be read ({error.strerror}): --resume goes on when it can") from None
            time.sleep(pause)


def decoded(content: bytes) -> Image.Image:
    """Raises ImageError, in one line, whatever the decoder raises: on broken bytes Pillow's raise RuntimeError (AVIF),
    SyntaxError (PNG), EOFError and struct.error, too. Where memory runs out, MemoryError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of EXIF that is broken, which nothing reads
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return image
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette and CMYK images too. Of 16-bit grey the higher 8 bits, as Pillow itself takes of 16-bit colour.

    Raises:
        ImageError: its greys have no known scale, or Pillow cannot convert it.
    """
    if image.mode.startswith("I"):  # I;16 and its kin; I, 32 bits, is what older Pillows make of a 16-bit PNG
        grey = np.asarray(image)
        if grey.min() >= 0 and grey.max() < 2**16:
            return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"its greys have no known scale, as it is of mode {image.mode}: save it with 8 or 16 bits")
    try:
        return image.convert("RGB")
    except ValueError as error:  # La, for one
        raise ImageError(str(error)) from None


class Cutout(torch.nn.Module):
    """Greys a square of uint8 (3, S, S), half as wide as the image, around a random centre, cut at the edges.

    Source: arXiv 1708.04552; the size is our choice (112 of 224).
    """

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[-1]
        row, column = torch.randint(0, size, (2,)).tolist()
        rows, columns = (slice(max(centre - size // 4, 0), centre + size // 4) for centre in (row, column))
        image[:, rows, columns] = torch.tensor(GREY, dtype=torch.uint8)[:, None, None]
        return image


def load(
    data: str | Path, augmentation: str, size: int, seed: int, skip_corrupt: bool
) -> tuple[Photographs, Photographs]:
    """Training and test images of the folder `data`: train/CLASS/* and val/CLASS/*.

    Raises:
        FileNotFoundError: as `load_part`; or the classes of train/ and val/ differ.
    """
    train = load_part(data, "train", train_transform(augmentation, size), seed, skip_corrupt)
    test = load_part(data, "val", test_transform(size), seed, skip_corrupt)
    if apart := sorted(set(train.images.classes) ^ set(test.images.classes)):
        raise FileNotFoundError(
            f"{data}: train/ and val/ must have the same folders of classes, and {apart[0]} is in one"
        )
    return train, test


def load_part(data: str | Path, part: str, transform: v2.Transform, seed: int, skip_corrupt: bool) -> Photographs:
    """The images of `data`/`part`. The first process says which folders of other programs were passed over.

    Raises:
        FileNotFoundError: the folder, or a class in it, or a class's image is missing.
    """
    folder = Path(data, part)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: --data names the one that holds train/CLASS and val/CLASS"
        )
    photographs = Photographs(folder, transform, seed, skip_corrupt)
    if (left := photographs.images.passed_over) and is_first():
        names = ", ".join(sorted(set(left)))
        folders = "folder" if len(left) == 1 else "folders"
        say(f"{folder}: passed over {len(left)} {folders} that a system left there ({names})", sys.stderr)
    return photographs


def train_transform(augment: str, size: int) -> v2.Transform:
    """Random-resized crop and flip (authors' code), and what `augment` adds to them; 'none' is the test transform."""
    if augment == "none":
        return test_transform(size)
    policy = [v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)] if augment == "autoaugment" else []
    cutout = [Cutout()] if augment == "cutout" else []
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *policy, v2.PILToTensor(), *cutout])


def test_transform(size: int) -> v2.Transform:
    """Resize to 256/224 of `size`, centre crop (authors' code)."""
    return v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])
