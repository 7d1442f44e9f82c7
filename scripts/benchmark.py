"""What the layer, bfloat16 and augmentation cost in a training step, and how many images a second both scripts train.

usage: python scripts/benchmark.py [--device DEVICE] [--threads N] [--eager] [--data FOLDER] [--json FILE]

What is compared runs in turn, in one process; a ratio is the median of those of the single turns, with their quartiles.
On a CPU, the steps of ResNet-56 run on one thread and on all, bfloat16 where the CPU has instructions for it. Compiling
takes most of the time, some ten minutes; --eager leaves it out, and it is left out where there is no C++ compiler. The
targets are of a CPU. The loader reads generated photographs unless --data names a folder of train/CLASS and val/CLASS.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import drop_block2d
from torchvision.transforms.v2.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disout import Disout
from models.regularizers import make_regularizer, regularizer_layers
from models.resnet_cifar import ResNet
from models.resnet_imagenet import ResNet50
from utils import data, photographs
from utils.engine import Schedule, train_epoch
from utils.failures import run_script
from utils.flags import Parser, file_path, number, usable_device
from utils.loader import make_loader
from utils.record import device_name, git_commit, write_json
from utils.speed import set_up

WORKERS = 2
PHOTOGRAPHS = 192


class Row(NamedTuple):
    what: str
    median: float
    quartiles: tuple[float, float]
    at_most: float | None  # the target, where there is one
    at_least: float | None


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=number(int, 1), help="of operations on the CPU")
    parser.add_argument("--eager", action="store_true", help="no compiled training steps")
    parser.add_argument("--data", type=file_path, help="photographs for the loader (default: generated ones)")
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    set_up(args.threads, deterministic=False, compiled_for_cpu=not args.eager and args.device.type == "cpu")
    device = args.device
    machine = f"{device_name(device)}, torch {torch.__version__}"
    machine += f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    print(machine)

    compiler = device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++"))
    compiled = not args.eager and bool(compiler)
    rows = [*training_steps(device, compiled), *layer(device), *augmentation(device)]
    if device.type == "cpu":
        rows += forms(device, compiled)
    with tempfile.TemporaryDirectory() as folder:
        rows += loader(args.data or generate_photographs(Path(folder)))
    if args.json:
        write_json(
            Path(args.json), {"machine": machine, "commit": git_commit(), "rows": [row._asdict() for row in rows]}
        )


def training_steps(device: torch.device, compiled: bool) -> list[Row]:
    """Of both scripts' networks, with what sets them apart."""
    rows, large, all_threads = [], device.type == "cuda", torch.get_num_threads()
    float32 = "float32 (TF32 convolutions)" if large and torch.backends.cudnn.allow_tf32 else "float32"
    precisions = [float32, "bfloat16"] if large or torch.ops.mkldnn._is_mkldnn_bf16_supported() else [float32]
    for threads in [all_threads] if large else sorted({1, all_threads}):
        torch.set_num_threads(threads)
        where = "" if large else f", threads: {threads}"
        for precision in precisions:
            rows += cifar_steps(
                device, precision == "bfloat16", f"ResNet-56 step, batch 128, {precision}{where}", compiled
            )
    batch = 256 if large else 8
    for precision in precisions:
        times = interleave({"steps": imagenet_step(device, batch, precision == "bfloat16")}, 3)
        what = f"ResNet-50 step, batch {batch}, 224 x 224, {precision}, Disout: images a second"
        rows.append(report(what, images_a_second(times["steps"], batch, device)))
    return rows


def cifar_steps(device: torch.device, amp: bool, name: str, compiled: bool) -> list[Row]:
    """Disout against no regularizer, eager and compiled; bfloat16 against float32."""
    turns, cpu = 9, device.type == "cpu"
    steps = {method: cifar_step(device, method, amp) for method in ("disout", "none")}
    if amp:
        steps["float32"] = cifar_step(device, "none", False)
    times = interleave(steps, turns)
    rows = [
        report(f"{name}: Disout / none", ratios(times, "disout", "none"), (1.08 if amp else 1.06) if cpu else None),
        report(f"{name}, Disout: images a second", images_a_second(times["disout"], 128, device)),
    ]
    if amp:
        rows.append(
            report(f"{name}: float32 / bfloat16", ratios(times, "float32", "none"), at_least=1.5 if cpu else None)
        )
    if compiled:
        fast = {method: cifar_step(device, method, amp, compiled=True) for method in ("disout", "none")}
        start = time.perf_counter()
        fast["disout"]()
        first = time.perf_counter() - start
        times = interleave({**fast, "eager": steps["disout"]}, turns)
        rows += [
            report(f"{name}, compiled: Disout / none", ratios(times, "disout", "none"), 1.08 if cpu else None),
            report(f"{name}, compiled, Disout: images a second", images_a_second(times["disout"], 128, device)),
            report(f"{name}, Disout: compiled / eager", ratios(times, "disout", "eager")),
            report(f"{name}, compiled, Disout: seconds until the first step is done", [first]),
        ]
    return rows


def cifar_step(
    device: torch.device, method: str, amp: bool, compiled: bool = False, depth: int = 56, plain: bool = False
) -> Callable[[], None]:
    """Training steps of train.py at the end of the schedule, where the rate is the full one."""
    model = ResNet(depth, 10, make_regularizer(method, 0.09, 6, 5.0, False))
    for module in regularizer_layers(model):
        module.plain = plain
    if compiled:
        model.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")
    return training(model, device, 128, 32, amp, nesterov=False)


def imagenet_step(device: torch.device, batch: int, amp: bool) -> Callable[[], None]:
    model = ResNet50(1000, make_regularizer("disout", 0.07, 7, 1.0, False))
    return training(model, device, batch, 224, amp, nesterov=True)


def training(
    model: nn.Module, device: torch.device, batch: int, size: int, amp: bool, nesterov: bool
) -> Callable[[], None]:
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, fused=True)
    images = torch.randn(batch, 3, size, size).to(device, memory_format=torch.channels_last)
    steps = steps_in_a_row(device)
    batches = [(images, torch.arange(batch, device=device) % 10)] * steps
    layers = [(layer, layer.dist_prob) for layer in regularizer_layers(model)]
    schedule = Schedule(lambda step: 1e-3, layers, total_steps=100_000, seed=0)
    first = schedule.total_steps - steps
    return lambda: train_epoch(model, batches, [batch] * steps, optimizer, schedule, first, amp=amp)


def images_a_second(times: list[float], batch: int, device: torch.device) -> list[float]:
    return [steps_in_a_row(device) * batch / seconds for seconds in times]


def steps_in_a_row(device: torch.device) -> int:
    """Before anything waits for the device, as in an epoch: a GPU is still at work on one when the next is begun."""
    return 20 if device.type == "cuda" else 1


def layer(device: torch.device) -> list[Row]:
    """Forward and backward of one layer against dropout and torchvision's DropBlock on the same tensor."""
    rows, cpu = [], device.type == "cpu"
    for shape, rate, block, alpha, kernel in (
        ((128, 64, 8, 8), 0.09, 6, 5.0, 3),
        ((32, 1024, 14, 14), 0.07, 7, 1.0, 1),
    ):
        x = torch.randn(shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(shape[1] if kernel == 3 else 256, shape[1], kernel, kernel, device=device)
        grad = torch.randn_like(x)
        disout = Disout(rate, block, alpha).to(device)
        odd = block - (block + 1) % 2
        calls = {
            "disout": lambda x=x, weight=weight, disout=disout: disout(x, weight),
            "dropout": lambda x=x, rate=rate: F.dropout(x, rate),
            "dropblock": lambda x=x, rate=rate, odd=odd: drop_block2d(x, rate, odd),
        }
        steps = {
            name: lambda call=call, x=x, grad=grad: finish(torch.autograd.grad(call(), x, grad)[0])
            for name, call in calls.items()
        }
        name, turns = f"layer, {shape}, block {block}", 100 if shape[1] == 64 else 12
        for other, what, target in (("dropout", "F.dropout", 0.5), ("dropblock", f"drop_block2d, block {odd}", 0.35)):
            times = interleave({which: steps[which] for which in ("disout", other)}, turns)
            rows.append(report(f"{name}: Disout / {what}", ratios(times, "disout", other), target if cpu else None))
        kept = bytes_kept(calls["disout"]) / x.numel()
        rows.append(report(f"{name}: bytes kept for backward, an element", [kept], 1.001))
    return rows


def forms(device: torch.device, compiled: bool) -> list[Row]:
    """What disout_cpu.py is worth: layer and step with its form and with the plain one, on one thread."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(128, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight, grad = torch.randn(64, 64, 3, 3), torch.randn_like(x)
    for how in ("eager", "compiled") if compiled else ("eager",):
        layers = {name: Disout(0.09, 6, 5.0) for name in ("cpu", "plain")}
        layers["plain"].plain = True
        if how == "compiled":
            for module in layers.values():
                module.compile(fullgraph=True, dynamic=False)
        calls = {
            name: lambda module=module: torch.autograd.grad(module(x, weight), x, grad)
            for name, module in layers.items()
        }
        name = f"layer, {tuple(x.shape)}, threads: 1, {how}"
        rows.append(report(f"{name}: plain form / form for CPUs", ratios(interleave(calls, 100), "plain", "cpu")))
        steps = {
            "none": cifar_step(device, "none", False, how == "compiled"),
            "cpu": cifar_step(device, "disout", False, how == "compiled"),
            "plain": cifar_step(device, "disout", False, how == "compiled", plain=True),
        }
        times = interleave(steps, 15)
        for form, what in (("cpu", "form for CPUs"), ("plain", "plain form")):
            rows.append(
                report(f"ResNet-56 step, float32, threads: 1, {how}: {what} / none", ratios(times, form, "none"))
            )
    torch.set_num_threads(threads)
    return rows


def bytes_kept(call: Callable[[], object]) -> int:
    """By autograd, each block of memory once."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    del result
    return sum(kept.values())


def augmentation(device: torch.device) -> list[Row]:
    """A batch, from the training images to the network's input, against a training step of ResNet-20."""
    images = data.Images(torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8), torch.zeros(50_000).long())
    images, mean, std = images.to(device), *(torch.tensor(s).to(device) for s in (data.CIFAR_MEAN, data.CIFAR_STD))
    batches = data.train_batches(images, mean, std, 128, "standard", 0, 0)
    next(batches)  # draws the whole epoch
    steps, target = steps_in_a_row(device), 0.02 if device.type == "cpu" else None
    calls = {
        "augment": lambda: finish([next(batches)[0] for _ in range(steps)][-1]),
        "step": cifar_step(device, "none", amp=False, depth=20),
    }
    times = interleave(calls, 15)
    return [report("augmenting a batch of 128 / ResNet-20 step", ratios(times, "augment", "step"), target)]


class Resized(Dataset):
    """The least that a loader of photographs must do."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return pil_to_tensor(image.convert("RGB").resize((224, 224)))


def loader(folder: str | Path) -> list[Row]:
    """train_imagenet.py's loader against plain decoding and resizing, an epoch each of about 192 photographs."""
    train, _ = photographs.load(folder, "standard", 224, seed=0, skip_corrupt=False)
    indices = range(len(train))[:: max(len(train) // PHOTOGRAPHS, 1)]
    keys = [[(0, index) for index in indices[start : start + 32]] for start in range(0, len(indices), 32)]
    ours = make_loader(train, keys, WORKERS, torch.device("cpu"))
    paths = [train.images[index][0] for index in indices]
    plain = DataLoader(Resized(paths), 32, num_workers=WORKERS, persistent_workers=True)
    times = interleave({"ours": lambda: sum(1 for _ in ours), "plain": lambda: sum(1 for _ in plain)}, 5)
    name = f"loader, {WORKERS} workers"
    return [
        report(f"{name}: images a second", [len(indices) / seconds for seconds in times["ours"]]),
        report(f"{name}: against decoding and resizing", ratios(times, "plain", "ours"), at_least=0.9),
    ]


def generate_photographs(folder: Path) -> Path:
    """JPEGs of 500 x 375, smooth with some grain."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", PHOTOGRAPHS), ("val", 1)):
        (folder / part / "class").mkdir(parents=True)
        for index in range(count):
            small = torch.rand(1, 3, 12, 16, generator=generator)
            pixels = F.interpolate(small, (375, 500), mode="bicubic") + 0.05 * torch.randn(
                375, 500, generator=generator
            )
            image = torchvision.transforms.functional.to_pil_image(pixels[0].clamp(0, 1))
            image.save(folder / part / "class" / f"{index}.jpg", quality=90)
    return folder


def finish(tensor: torch.Tensor) -> None:
    """Waits for the device."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def interleave(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each call in each turn, after two turns that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]], a: str, b: str) -> list[float]:
    return [one / other for one, other in zip(times[a], times[b], strict=True)]


def report(what: str, values: list[float], at_most: float | None = None, at_least: float | None = None) -> Row:
    """The row of these values, printed."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    row, verdict = Row(what, statistics.median(values), (low, high), at_most, at_least), ""
    if at_most is not None:
        verdict = f"at most {at_most:g}: {'met' if row.median <= at_most else 'MISSED'}"
    if at_least is not None:
        verdict = f"at least {at_least:g}: {'met' if row.median >= at_least else 'MISSED'}"
    print(f"{what:80} {row.median:7.3g}  ({low:.3g} to {high:.3g})  {verdict}".rstrip(), flush=True)
    return row


if __name__ == "__main__":
    run_script("benchmark.py", main, sys.argv[1:])
