"""Which images an image folder holds."""

import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from utils.image_list import ImageList


@pytest.fixture
def folder(photographs_folder, tmp_path):
    """A copy of train/, with images in folders within a class, too."""
    copy = shutil.copytree(photographs_folder / "train", tmp_path / "copied")
    for inner in ("red/b", "red-/b", "red/a/c"):
        shutil.copytree(copy / "blue", copy / inner)
    return copy


def test_it_is_that_of_torchvision(folder):
    listed, theirs = ImageList(folder), ImageFolder(folder)
    assert listed.classes == theirs.classes == ["blue", "red", "red-"]
    assert list(listed) == theirs.samples and len(listed) == len(theirs.samples) == 51


def test_it_has_no_object_an_image(folder):
    """Counting references writes to memory that forked workers would share."""
    fields = [value for value in vars(ImageList(folder)).values() if hasattr(value, "__len__") and len(value) > 9]
    assert {type(value) for value in fields} == {bytes, str, np.ndarray}
    assert all(value.dtype == np.int64 for value in fields if isinstance(value, np.ndarray))
    assert list(pickle.loads(pickle.dumps(ImageList(folder)))) == list(ImageList(folder))


def test_the_fingerprint_is_of_classes_and_names_wherever_they_lie(folder, tmp_path):
    first = ImageList(folder).fingerprint
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    same = {ImageList(path).fingerprint for path in (folder, tmp_path / "link", tmp_path / "elsewhere")}
    assert same == {first}

    seen = {first}
    for change in (
        lambda: shutil.copy(folder / "red/00.jpg", folder / "red/99.jpg"),
        lambda: (folder / "red/99.jpg").rename(folder / "red/98.jpg"),
        lambda: (folder / "red/98.jpg").rename(folder / "blue/98.jpg"),
        lambda: shutil.copytree(folder / "red", folder / "yellow"),
        lambda: (folder / "yellow").rename(folder / "green"),
    ):
        change()
        seen.add(ImageList(folder).fingerprint)
    assert len(seen) == 6


def test_hidden_files_and_folders_are_passed_over(photographs_folder, tmp_path):
    folder = shutil.copytree(photographs_folder / "train", tmp_path / ".hidden/copied")  # what lies above counts not
    (folder / "red/._00.jpg").write_bytes(b"a Mac's")
    (folder / ".DS_Store").touch()
    for hidden in (".ipynb_checkpoints", "red/.AppleDouble"):
        shutil.copytree(folder / "blue", folder / hidden)
    listed = ImageList(folder)
    assert (listed.fingerprint, listed.passed_over) == (ImageList(photographs_folder / "train").fingerprint, [])


def test_folders_that_systems_leave_are_passed_over_and_named(photographs_folder, tmp_path):
    folder = shutil.copytree(photographs_folder / "train", tmp_path / "copied")
    left = ["@eaDir", "__MACOSX", "lost+found", "$Recycle.Bin", "$RECYCLE.BIN", "System Volume Information"]
    for name in left:
        (folder / name).mkdir()
        shutil.copytree(folder / "blue", folder / "red/within" / name)
    listed = ImageList(folder)
    assert listed.fingerprint == ImageList(photographs_folder / "train").fingerprint
    assert sorted(listed.passed_over) == sorted(left * 2)


def test_a_folder_without_classes_or_a_class_without_images_is_named(folder):
    (folder / "green/deeper").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="copied has no image of the class green"):
        ImageList(folder)
    with pytest.raises(FileNotFoundError, match="copied/green/deeper has no folder of a class"):
        ImageList(folder / "green/deeper")


def test_a_folder_that_cannot_be_listed_is_no_empty_one(folder, monkeypatch):
    scandir = os.scandir

    def fail_in_b(path):
        if str(path).endswith("red/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", fail_in_b)
    with pytest.raises(PermissionError, match="red/b"):
        ImageList(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_a_name_that_is_no_text_is_one_all_the_same(folder):
    name = os.fsencode(folder / "red") + b"/\xff.jpg"
    shutil.copy(folder / "red/00.jpg", name)
    assert os.fsdecode(name) in [path for path, _ in ImageList(folder)]
