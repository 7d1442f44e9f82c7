import os
import threading

import pytest
import torch
import torchvision
import torchvision.transforms.functional as F
from PIL import Image

from utils import data


@pytest.fixture
def images():
    """300 random images of 10 classes, each marked with its index in its first two pixels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return data.Images(pixels, torch.randint(0, 10, (300,), generator=generator))


@pytest.fixture
def batches(images):
    def make(batch_size=128, augmentation="standard", seed=0, epoch=0):
        statistics = data.channel_statistics("cifar10", images)
        return list(data.train_batches(images, *statistics, batch_size, augmentation, seed, epoch))

    return make


def pil_augment(image, top_left, flip, angle, _):
    """The authors' transforms, in their order, as torchvision applies them to one image."""
    pil = F.pad(Image.fromarray(image.numpy()), [data.PADDING])
    pil = F.crop(pil, *top_left.tolist(), 32, 32)
    pil = F.hflip(pil) if flip else pil
    return F.pil_to_tensor(F.rotate(pil, angle.item())).permute(1, 2, 0)


def test_augmentation_equals_torchvision_on_pil_images(images):
    _, how = data.draw_epoch(300, seed=0, epoch=0)
    expected = torch.stack([pil_augment(*args) for args in zip(images.pixels, *how, strict=True)])
    wrong = (data.augment(images.pixels, how) != expected).any(-1)
    assert wrong.float().mean() <= 0.001


def test_crop_and_flip_alone_are_exact(images):
    _, how = data.draw_epoch(300, seed=0, epoch=0)
    how = how._replace(angle=torch.zeros(300))
    expected = torch.stack([pil_augment(*args) for args in zip(images.pixels, *how, strict=True)])
    assert torch.equal(data.augment(images.pixels, how), expected)


def test_augmentation_covers_its_ranges():
    order, how = data.draw_epoch(20_000, seed=3, epoch=5)
    assert torch.equal(order.sort().values, torch.arange(20_000))
    assert how.shift.unique().tolist() == list(range(9))
    assert how.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert -15 <= how.angle.min() < -14.9 and 14.9 < how.angle.max() <= 15


def test_cutout_zeroes_a_square_cut_at_the_edges():
    images = data.cutout(torch.ones(2, 3, 32, 32), torch.tensor([[16, 20], [0, 31]]))
    expected = torch.ones(2, 3, 32, 32)
    expected[0, :, 8:24, 12:28] = 0
    expected[1, :, 0:8, 23:32] = 0
    assert torch.equal(images, expected)


def test_cutout_comes_after_the_standard_augmentation(batches):
    plain, cut = (batches(augmentation=name)[0][0] for name in ("standard", "cutout"))
    changed = plain != cut
    assert (cut[changed] == 0).all()
    assert 0.1 < changed.float().mean() < 0.25


def test_normalising_equals_torchvision(images):
    ours = data.normalise(images.pixels, *data.channel_statistics("cifar10", images))
    theirs = torch.stack([F.to_tensor(image.numpy()) for image in images.pixels])
    torch.testing.assert_close(ours, F.normalize(theirs, data.CIFAR_MEAN, data.CIFAR_STD))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_has_every_image_once_and_drops_none(images, batches):
    parts = batches(augmentation="none")
    assert [len(labels) for _, labels in parts] == [128, 128, 44]
    seen = torch.cat([pixels for pixels, _ in parts]).flatten(1)
    expected = data.normalise(images.pixels, *data.channel_statistics("cifar10", images)).flatten(1)
    order, _ = data.draw_epoch(300, seed=0, epoch=0)
    assert torch.equal(seen, expected[order])
    assert torch.equal(torch.cat([labels for _, labels in parts]), images.labels[order])


def test_batches_are_a_function_of_seed_and_epoch(batches):
    first = batches(seed=1, epoch=2)[1][0]
    torch.manual_seed(123)  # the default generator does not matter
    assert torch.equal(batches(seed=1, epoch=2)[1][0], first)
    assert not torch.equal(batches(seed=2, epoch=2)[1][0], first)
    assert not torch.equal(batches(seed=1, epoch=3)[1][0], first)


def test_split_is_balanced_disjoint_and_in_a_fixed_order(images):
    train, held_out = data.split(images, 103, 57)
    for part in (train, held_out):
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    pixels = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    assert len(pixels) == len(pixels.unique(dim=0)) == 160
    longer, _ = data.split(images, 160, 0)
    assert torch.equal(longer.pixels.flatten(1), pixels)


def test_train_size_zero_leaves_only_the_held_out_images(images):
    train, held_out = data.split(images, 0, 40)
    assert len(train.labels) == 260 and len(held_out.labels) == 40


def test_digits():
    train, test = data.load("digits", "unused")
    assert train.pixels.shape == (1437, 32, 32, 3) and test.pixels.shape == (360, 32, 32, 3)
    assert train.pixels.dtype == torch.uint8 and train.pixels.max() == 255
    shares = [part.labels.bincount() / len(part.labels) for part in (train, test)]
    torch.testing.assert_close(*shares, rtol=0, atol=0.005)


def test_missing_files_without_a_network_say_what_to_put_where(tmp_path, monkeypatch):
    def no_network(self):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar100", tmp_path)
    assert all(word in str(error.value) for word in (str(tmp_path), "cifar-100-python", "--data_root"))


def test_a_second_run_waits_for_the_download_of_the_first(tmp_path, monkeypatch):
    downloads = []

    def download(self):
        downloads.append(self.root)
        raise OSError("no route to host")

    def load():
        with pytest.raises(FileNotFoundError):
            data.load("cifar10", tmp_path)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    second = threading.Thread(target=load)
    with data.locked(tmp_path):
        second.start()
        second.join(0.5)
        assert second.is_alive() and not downloads
    second.join(60)
    assert len(downloads) == 1


@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT does not name the folder of the CIFAR files")
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_files(dataset):
    classes, size = data.DATASETS[dataset]
    train, test = data.load(dataset, os.environ["CIFAR_ROOT"])
    assert train.pixels.shape == (size, 32, 32, 3) and test.pixels.shape == (10_000, 32, 32, 3)
    assert train.labels.bincount().tolist() == [size // classes] * classes
    if dataset == "cifar10":
        mean = train.pixels.flatten(0, 2).double().mean(0) / 255
        torch.testing.assert_close(mean, torch.tensor(data.CIFAR_MEAN).double(), rtol=0, atol=2e-4)
