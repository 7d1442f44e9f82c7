import csv
import json
import pkgutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import disout
import disout_cpu
import train
from utils.failures import run_script


@pytest.fixture
def x():
    return torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["plain", "cpu"])
def form(request, monkeypatch):
    """The layer's form, on this CPU: both, one after the other."""
    monkeypatch.setattr(disout.Disout, "plain", request.param == "plain")
    return request.param


@pytest.fixture
def default_dtype():
    """Sets torch's default dtype for one test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def run(tmp_path):
    """Runs train.py in this process, on the digits, on the CPU with the smallest ResNet unless told; returns the run's
    folder."""

    def run_train(*flags: str, name: str = "run") -> Path:
        network = [] if "--model" in flags else ["--depth", "8"]
        train.main(
            ["--dataset", "digits", "--device", "cpu", *network, "--output", str(tmp_path), "--name", name, *flags]
        )
        return tmp_path / name

    return run_train


@pytest.fixture
def refused(run, capsys):
    """Runs train.py with flags that it must refuse: exit code 2, one line on stderr, which is returned."""

    def run_refused(*flags: str, **kwargs: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script("train.py", lambda argv: run(*argv, **kwargs), list(flags))
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.count("\n") == 1
        return message

    return run_refused


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that torch.compile makes, and runs them as they are, without a compiler."""
    torch._dynamo.reset()
    counter, compile_for_real = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_for_real(*args, backend=counter, **kwargs))
    return counter


@pytest.fixture(scope="session")
def photographs_folder(tmp_path_factory) -> Path:
    """JPEGs of several sizes in two classes, one reddish and one bluish, a grey and a CMYK one among them: 21 to train
    on, 11 to evaluate on."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 21), ("val", 11)):
        for index in range(count):
            label, width, height = index % 2, 40 + 7 * (index % 5), 40 + 5 * (index % 3)
            pixels = torch.randint(0, 128, (height, width, 3), dtype=torch.uint8, generator=generator)
            pixels[:, :, 2 * label] += 127
            image = Image.fromarray(pixels.numpy())
            image = image.convert({4: "L", 5: "CMYK"}.get(index, "RGB"))
            target = folder / part / ("red", "blue")[label] / f"{index:02}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target, quality=95)
    return folder


def in_training(x, layer, *args):
    torch.manual_seed(0)
    return layer.train()(x, *args)


class Dtypes(TorchDispatchMode):
    """Notes the dtype of whatever an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {tensor.dtype for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)}
        return result


def keep_of(seeds, x, block_size, inside=False):
    """The mask, bool, of seeds (N, C, H - b + 1, W - b + 1), in the form that is set."""
    if disout.Disout.plain:
        return disout.keep_mask(seeds, x.shape[2:], block_size, inside)
    elements, _ = block_elements(seeds, x, block_size, inside)
    keep = disout_cpu.keep_mask(elements, torch.tensor([False]), x).bool()
    return torch.empty_like(x, dtype=torch.bool).as_strided_scatter(keep, keep.shape, (1,))


def block_elements(seeds, x, block_size, inside):
    block = disout.cut_block(block_size, x.shape[2:])
    offsets = [disout.block_offset(b, block, x.shape[2:], inside) for b in block]
    return disout_cpu.block_elements(seeds.flatten().nonzero().flatten(), x, block, offsets)


def distorted(x, seeds, noise, strength, alpha, block_size, inside=False):
    """The mask, bool, y and mean(keep) of what would be drawn, in the form that is set: at least one of `seeds`, noise
    (N, C, H, W) and strength (C,)."""
    keep = keep_of(seeds, x, block_size, inside)
    if disout.Disout.plain:
        return keep, *disout.distort(x, keep, noise, strength, alpha)
    elements, channel = block_elements(seeds, x, block_size, inside)
    noise = torch.empty_like(x, dtype=torch.float32).copy_(noise).as_strided((x.numel(),), (1,))[elements]
    mask = disout_cpu.keep_mask(elements, torch.tensor([False]), x)
    return keep, *disout_cpu.replace(x, mask, elements, noise, strength[channel, None], alpha)


def stop_at(monkeypatch, function, call):
    """The next run is stopped at this call, counted from 1, of a function."""
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == call:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return original(*args)

    original = pkgutil.resolve_name(function)
    monkeypatch.setattr(function, stop)


def metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def without_times(rows):
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in rows
    ]


def same(a, b):
    """Bit for bit, through a checkpoint's dictionaries and lists, but for the times."""
    if isinstance(a, dict):
        names = a.keys() - {"seconds", "images_per_second"}
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in names)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
