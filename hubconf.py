"""torch.hub.load(REPO, NAME, source="local"), where NAME is a function of this file."""

# Modules only are imported, no classes, as torch.hub.list() takes all that can be called for networks.
import importlib.util
import itertools
import pathlib
import sys
import types

import torch

ROOT = pathlib.Path(__file__).resolve().parent


def _own_module(name: str, file: str) -> types.ModuleType:
    folder = [str((ROOT / file).parent)] if file.endswith("__init__.py") else None
    spec = importlib.util.spec_from_file_location(name, ROOT / file, submodule_search_locations=folder)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# Under names of their own, as whoever loads this may have a `disout` and a package `models` as well, or another version
# of ours. The networks import `disout`, and that `disout_cpu`, so these names are ours while they are imported.
PACKAGE = next(name for n in itertools.count(1) if (name := f"disout_hub_{n}") not in sys.modules)
_own_module(PACKAGE, "models/__init__.py")
THEIRS = {name: sys.modules.pop(name, None) for name in ("disout_cpu", "disout")}
try:
    for name in THEIRS:
        sys.modules[name] = _own_module(f"{PACKAGE}.{name}", f"{name}.py")
    cnn, regularizers, resnet_cifar = (
        importlib.import_module(f"{PACKAGE}.{name}") for name in ("cnn", "regularizers", "resnet_cifar")
    )
finally:
    for name, module in THEIRS.items():
        sys.modules.pop(name, None)
        if module:
            sys.modules[name] = module

dependencies = ["torch", "torchvision"]


def resnet56_disout(
    pretrained: bool = False,
    num_classes: int = 10,
    dist_prob: float = 0.09,
    block_size: int = 6,
    alpha: float = 5.0,
) -> resnet_cifar.ResNet:
    """ResNet-56 for 32 x 32 images with Disout in its last group, as train.py trains it; the defaults are the authors'
    for CIFAR-10.

    Raises:
        FileNotFoundError: pretrained weights are asked for, and none are published for so many classes.
    """
    regularizer = regularizers.make_regularizer("disout", dist_prob, block_size, alpha, inside=False)
    model = resnet_cifar.ResNet(56, num_classes, regularizer)
    if pretrained:
        path = ROOT / f"results/published/weights/cifar{num_classes}-resnet56-disout.pt"
        if not path.exists():
            raise FileNotFoundError(f"there are no published weights for {num_classes} classes: {path}")
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def cnn_disout(num_classes: int = 10, dist_prob: float = 0.3, alpha: float = 500.0) -> cnn.CNN:
    """The plain CNN for 32 x 32 images with Disout after its two hidden linear layers, as train.py --model cnn trains
    it. There are no pretrained weights.
    """
    return cnn.CNN(num_classes, regularizers.make_regularizer("disout", dist_prob, 1, alpha, inside=False))
