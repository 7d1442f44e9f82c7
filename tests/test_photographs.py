import errno
import os
import re
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features
from torchvision.transforms import v2

from utils import loader, photographs
from utils.files import ImageError
from utils.loader import EpochSampler


@pytest.fixture
def load(photographs_folder):
    def load_both(augmentation="standard", size=32, seed=0, skip_corrupt=False, folder=photographs_folder):
        return photographs.load(folder, augmentation, size, seed, skip_corrupt)

    return load_both


@pytest.fixture
def broken_folder(photographs_folder, tmp_path):
    """The same photographs, one of them cut short."""
    folder = shutil.copytree(photographs_folder, tmp_path / "broken")
    content = (folder / "train/red/06.jpg").read_bytes()
    (folder / "train/red/06.jpg").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_broken_avif_is_an_image_that_cannot_be_read(photographs_folder, load, tmp_path):
    """Under the name that it has in a folder of JPEGs; its decoder raises RuntimeError, not OSError."""
    folder = shutil.copytree(photographs_folder, tmp_path / "broken")
    path = folder / "train/red/06.jpg"
    Image.open(path).save(tmp_path / "whole.avif")
    content = (tmp_path / "whole.avif").read_bytes()
    path.write_bytes(content[:96] + b"\xff" * 8 + content[104:])
    with pytest.raises(RuntimeError), Image.open(path) as image:
        image.load()
    broken = next(index for index, (name, _) in enumerate(load()[0].images) if name.endswith("red/06.jpg"))
    with pytest.raises(ImageError, match=r"red/06.jpg cannot be read \(.+\); --resume --skip_corrupt"):
        load(folder=folder)[0][0, broken]
    assert load(folder=folder, skip_corrupt=True)[0][0, broken][1] == photographs.SKIPPED


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), EOFError(), KeyError("tag"), struct.error("unpack")])
def test_whatever_a_decoder_raises_is_one_line_but_not_what_we_raise(load, monkeypatch, error):
    def fail(*_):
        raise error

    train, _ = load()
    with monkeypatch.context() as patch, pytest.raises(ImageError) as caught:
        patch.setattr(ImageFile.ImageFile, "load", fail)
        train[0, 0]
    assert "\n" not in str(caught.value) and (str(error).split()[:1] or ["EOFError"])[0] in str(caught.value)
    monkeypatch.setattr(train, "transform", fail)
    with pytest.raises(type(error)):
        train[0, 0]


def test_colours_that_pillow_cannot_convert_are_an_image_that_cannot_be_read():
    with pytest.raises(ImageError, match="conversion from La"):
        photographs.to_rgb(Image.new("La", (40, 40)))


def epoch_of(photographs_set, sizes, workers=0, epoch=0, accumulate_steps=1, rank=0, world=1):
    sampler = EpochSampler(sizes, accumulate_steps, 0, rank, world)
    sampler.epoch = epoch
    return list(loader.make_loader(photographs_set, sampler, workers, torch.device("cpu")))


def test_every_mode_becomes_three_channels(load, photographs_folder):
    modes = {Image.open(path).mode for path in photographs_folder.rglob("*.jpg")}
    assert modes == {"RGB", "L", "CMYK"}
    train, test = load()
    for images in (train, test):
        for index in range(len(images)):
            image, label = images[0, index]
            assert (image.shape, image.dtype, label in (0, 1)) == ((3, 32, 32), torch.uint8, True)


@pytest.mark.parametrize("augmentation", photographs.AUGMENTS)
def test_a_sample_is_a_function_of_seed_epoch_and_index(load, augmentation):
    train, _ = load(augmentation)
    first = train[3, 5][0]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(train[3, 5][0], first)
    assert torch.equal(torch.get_rng_state(), before)
    others = [train[4, 5][0], load(augmentation, seed=1)[0][3, 5][0]]
    assert all(torch.equal(other, first) == (augmentation == "none") for other in others)


def test_batches_are_the_same_whatever_the_number_of_workers(load):
    train, _ = load()
    for one, two in zip(epoch_of(train, [8, 8, 5]), epoch_of(train, [8, 8, 5], workers=2), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_processes_share_out_the_same_steps():
    whole = list(EpochSampler([8, 8, 5], 1, 0, rank=0, world=1))
    assert sorted(index for step in whole for _, index in step) == list(range(21))
    shares = [list(EpochSampler([8, 8, 5], 2, 0, rank, world=2)) for rank in range(2)]
    assert all(len(share) == 6 and all(share) for share in shares)
    for step, keys in enumerate(whole):
        parts = [key for share in shares for part in share[2 * step : 2 * step + 2] for key in part]
        assert sorted(parts) == sorted(keys)


def test_order_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler([21], 1, seed=0, rank=0, world=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.epoch = 1
    assert [index for _, index in next(iter(sampler))] != [index for _, index in first[0]]


def test_evaluation_has_every_image_in_one_process():
    shares = [loader.test_keys(11, 2, rank, 3) for rank in range(3)]
    keys = [key for share in shares for batch in share for key in batch]
    assert sorted(keys) == [(0, index) for index in range(11)]
    assert max(len(batch) for share in shares for batch in share) == 2


def test_cutout_greys_a_square_of_half_the_side(load):
    image = photographs.Cutout()(torch.full((3, 32, 32), 255, dtype=torch.uint8))
    grey = (image == torch.tensor(photographs.GREY)[:, None, None]).all(0)
    assert 8 * 8 <= grey.sum() <= 16 * 16
    assert ((image == 255).all(0) | grey).all()


def test_normalised_grey_is_zero(load):
    batch = torch.tensor(photographs.GREY, dtype=torch.uint8)[None, :, None, None].expand(2, 3, 4, 4), torch.zeros(2)
    images, _ = next(loader.on_device([batch], torch.device("cpu")))
    assert images.abs().max() < 0.01
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_broken_image_is_named_or_skipped_and_counted(load, broken_folder):
    train, _ = load(folder=broken_folder)
    for workers in (0, 1):
        with pytest.raises(ImageError, match=r"red/06\.jpg.*--skip_corrupt"):
            epoch_of(train, [21], workers=workers)
    [(images, labels)] = epoch_of(load(folder=broken_folder, skip_corrupt=True)[0], [21])
    assert (labels == photographs.SKIPPED).sum() == 1
    assert (images[labels == photographs.SKIPPED][0] == torch.tensor(photographs.GREY)[:, None, None]).all()


def test_an_image_that_is_too_large_to_trust_is_one_that_cannot_be_read(load, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ImageError, match=r"cannot be read.*decompression bomb"):
        epoch_of(load()[0], [21])


def test_what_the_file_system_does_not_give_is_no_corrupt_image(load, monkeypatch):
    train, _ = load(skip_corrupt=True)
    path, tries, pauses = train.images[0][0], [], []
    monkeypatch.setattr(photographs.time, "sleep", pauses.append)
    read_bytes = Path.read_bytes

    def fail(code, times):
        def fail_first(path):
            tries.append(path)
            if len(tries) <= times:
                raise OSError(code, os.strerror(code))  # of read(), which does not name the file
            return read_bytes(path)

        tries.clear()
        monkeypatch.setattr(Path, "read_bytes", fail_first)

    for code in (errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.ENOENT, errno.ENODEV):
        fail(code, 1)
        with pytest.raises(OSError, match=re.escape(f"{path} cannot be read ({os.strerror(code)})")) as caught:
            train[0, 0]
        assert type(caught.value) is OSError and "skip_corrupt" not in str(caught.value)
    assert not pauses
    for code in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT):
        fail(code, 2)
        assert train[0, 0][1] != photographs.SKIPPED and len(tries) == 3
        fail(code, 99)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            train[0, 0]
        assert 3 < len(tries) < 9
    assert 2 < sum(pauses) / 3 < 20


def test_memory_that_runs_out_makes_no_image_corrupt(load, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        load(skip_corrupt=True)[0][0, 0]


def test_folders_that_a_system_left_are_counted_in_one_line(load, photographs_folder, tmp_path, capsys):
    folder = shutil.copytree(photographs_folder, tmp_path / "copied")
    load(folder=folder)
    assert capsys.readouterr().err == ""
    for name in ("__MACOSX", "red/@eaDir", "blue/@eaDir"):
        shutil.copytree(folder / "val/red", folder / "train" / name)
    assert [len(part) for part in load(folder=folder)] == [21, 11]
    assert capsys.readouterr().err == (
        f"{folder}/train: passed over 3 folders that a system left there (@eaDir, __MACOSX)\n"
    )


@pytest.fixture
def one_image(tmp_path):
    """A data set of one array that Pillow saves as it is, at its own size."""

    def make(grey, suffix):
        (tmp_path / "one/grey").mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(tmp_path / f"one/grey/image{suffix}")
        return photographs.Photographs(tmp_path / "one", v2.PILToTensor(), 0, skip_corrupt=False)

    return make


@pytest.mark.parametrize(
    ("kind", "suffix", "modes"),
    [("<u2", ".png", {"I;16", "I"}), ("<u2", ".tiff", {"I;16"}), (">u2", ".tiff", {"I;16B"}), ("<i4", ".tiff", {"I"})],
)
def test_16_bit_grey_is_scaled_to_8_bits(one_image, tmp_path, kind, suffix, modes):
    ramp = 256 * np.arange(256).reshape(16, 16) + np.arange(16)
    images = one_image(ramp.astype(kind), suffix)
    with Image.open(tmp_path / f"one/grey/image{suffix}") as image:
        assert image.mode in modes
    expected = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(3, 16, 16)
    assert torch.equal(images[0, 0][0], expected)


@pytest.mark.parametrize(("kind", "value", "mode"), [("f4", 0.5, "F"), ("i4", 2**16, "I"), ("i4", -1, "I")])
def test_grey_without_a_known_scale_is_an_image_that_cannot_be_read(one_image, kind, value, mode):
    images = one_image(np.full((9, 9), value, kind), ".tiff")
    with pytest.raises(ImageError, match=rf"image\.tiff cannot be read .*scale.*mode {mode}"):
        images[0, 0]


def test_broken_exif_is_not_spoken_of(load, photographs_folder, tmp_path):
    folder, exif = shutil.copytree(photographs_folder, tmp_path / "exif"), Image.Exif()
    exif[0x010E] = "a description" * 9
    for path in (folder / "train").rglob("*.jpg"):
        Image.open(path).save(path, exif=exif.tobytes()[:60])
    with pytest.warns(UserWarning, match="Tag data"):
        Image.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(load(folder=folder)[0], [21])


def test_classes_of_both_parts_must_agree(load, broken_folder):
    (broken_folder / "val/red").rename(broken_folder / "val/green")
    with pytest.raises(FileNotFoundError, match="same folders"):
        load(folder=broken_folder)
