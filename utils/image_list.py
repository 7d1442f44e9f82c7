"""Which images a folder of one subfolder a class holds, however many, and whether they are those of another time."""

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import is_image_file

# Folders that systems leave in others, in lower case: Synology's and QNAP's of thumbnails and of what was removed, a
# Mac's in an archive and on a server, a Linux file system's, Windows', and of a NetApp and a Synology the snapshots.
LEFT_BY_SYSTEMS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@__thumb", "__macosx", "network trash folder", "temporary items"),
    *("lost+found", "$recycle.bin", "recycler", "system volume information", "~snapshot"),
}


class ImageList:
    """The images CLASS/.../NAME of `folder`, in the order of torchvision's ImageFolder. Hidden files and folders, and
    folders that systems leave, are passed over. Item `index` is an image's path and its label, the number of its class.

    The names lie in one `bytes`, and where each ends in an array: a million of Python's own objects, whose references
    are counted, would be copied, page by page, into every worker that looks at them.

    Attributes:
        classes: names of the folders, sorted.
        fingerprint: how many images there are, and a hash of their classes and names, wherever the folder lies.
        passed_over: names of the folders that systems left.

    Raises:
        FileNotFoundError: there is no class, or a class has no image.
        OSError: a folder cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.passed_over: list[str] = []
        folders = (entry for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if entry.is_dir())
        self.classes = [entry.name for entry in folders if not self._passed_over(entry.name)]
        if not self.classes:
            raise FileNotFoundError(f"{folder} has no folder of a class")
        names, ends, labels = bytearray(), array("q", [0]), array("q")
        for label, name in enumerate(self.classes):
            for path in self._images_in(name):
                names += os.fsencode(path)
                ends.append(len(names))
                labels.append(label)
            if not labels or labels[-1] != label:
                raise FileNotFoundError(f"{folder} has no image of the class {name}")
        self._names, self._ends, self._labels = bytes(names), np.asarray(ends), np.asarray(labels)
        content = self._names + self._ends.astype("<i8").tobytes()  # ab, c is not a, bc
        self.fingerprint = len(self), hashlib.blake2b(content, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[str, int]:
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return f"{self.folder}/{os.fsdecode(name)}", int(self._labels[index])

    def _images_in(self, name: str) -> Iterator[str]:
        """Paths within the folder, with / on every system."""
        found = []
        for place, inner, files in os.walk(Path(self.folder, name), followlinks=True, onerror=fail):
            inner[:] = [folder for folder in inner if not self._passed_over(folder)]
            images = [file for file in files if is_image_file(file) and not file.startswith(".")]
            found.append((place, sorted(images)))
        for place, images in sorted(found):
            within = Path(place).relative_to(self.folder).as_posix()
            yield from (f"{within}/{image}" for image in images)

    def _passed_over(self, name: str) -> bool:
        by_system = name.lower() in LEFT_BY_SYSTEMS
        if by_system:
            self.passed_over.append(name)
        return by_system or name.startswith(".")


def fail(error: OSError) -> None:
    raise error
