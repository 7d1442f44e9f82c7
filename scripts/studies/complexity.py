"""Does distortion lower the complexity of the layer that reads the map, and the gap to training, as the paper claims?

Writes complexity.csv into FOLDER, a row a run, of the network after its last epoch, in evaluation mode: accuracy on its
own training images and on the images that the run was evaluated on, their difference (the gap), and the complexity.
That is the term which the paper's bound adds up over layers, as an empirical Rademacher average of the trained network:

    1/n E_sigma max over k of |sum over i of sigma_i f_k(x_i)|

for the n evaluated images x_i, random signs sigma_i, and the outputs f_k of a convolution that reads a map which Disout
distorts; the mean over 100 draws of the signs, over the positions of the map, and over all such convolutions. Weights
before a batch norm have an arbitrary scale, so it is given relative to the outputs' root mean square too. The column
distortion is the size of the distortion that the trained weights give, the deviation of d relative to that of the map:
alpha times the root mean square of the strength over channels and signs, the mean over these convolutions.

It then draws complexity.png: the accuracy over rate and alpha, and complexity and gap over alpha; alpha 0 is DropBlock
with the block size of Disout.
"""

import csv
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # scripts, and the repository

from runs import load_trained

from disout import strength
from models.resnet_cifar import ResNet
from utils.data import test_batches
from utils.engine import evaluate
from utils.failures import run_script
from utils.files import replacing
from utils.flags import Parser, UsageError, file_path

DRAWS = 100
SETTINGS = ("method", "dist_prob", "block_size", "alpha", "augment", "seed")
MEASURED = ("train_top1", "test_top1", "gap", "complexity", "relative_complexity", "distortion")


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    about = "complete runs of train.py with their checkpoints: results/small_grid"
    parser.add_argument("folder", type=file_path, metavar="FOLDER", help=about)
    folder = Path(parser.parse_args(argv).folder)
    runs = [summary.parent for summary in sorted(folder.glob("*/summary.json"))]
    runs = [run for run in runs if (run / "checkpoint.pt").exists()]
    if not runs:
        raise UsageError(f"no complete run with its checkpoint in {folder}/NAME")
    rows = []
    for run in runs:
        rows.append(measure(run))
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="  ", flush=True)
    with replacing(folder / "complexity.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("run", *SETTINGS, *MEASURED))
        writer.writeheader()
        writer.writerows(rows)
    draw(folder / "complexity.png", rows)


def measure(run: Path) -> dict[str, object]:
    """The row of one run."""
    config, model, (train, test, mean, std) = load_trained(run)
    train_top1 = evaluate(model, test_batches(train, mean, std))["test_top1"]
    with Complexity(readers(model), len(test.labels)) as complexity:
        test_top1 = evaluate(model, test_batches(test, mean, std))["test_top1"]
    absolute, relative = complexity.result()
    distortion = config["alpha"] * sum(size_of_strength(layer.weight) for layer in readers(model)) / len(readers(model))
    figures = (train_top1, test_top1, train_top1 - test_top1, absolute, relative, distortion)
    measured = dict(zip(MEASURED, figures, strict=True))
    settings = {name: config[name] for name in SETTINGS}
    return {"run": run.name} | settings | {name: f"{value:.6g}" for name, value in measured.items()}


def readers(model: ResNet) -> list[nn.Module]:
    """The convolutions that read a map of the places where Disout acts."""
    second = [block.conv2 for block in model.layer3]
    return second + [block.conv1 for block in list(model.layer3)[1:]]


def size_of_strength(weight: Tensor) -> float:
    """Root mean square over the channels, and over draws of the signs."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (DRAWS, *weight.shape[1:]), generator=generator) * 2 - 1
    return float(torch.stack([strength(weight, draw) for draw in signs]).square().mean().sqrt())


class Complexity:
    """Sums, while it is entered, signs times outputs over the images that pass through `layers`, in batches of all of
    `images`."""

    def __init__(self, layers: list[nn.Module], images: int) -> None:
        self.layers, self.images = layers, images
        self.signs = torch.randint(0, 2, (DRAWS, images), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self.sums = [0.0] * len(layers)
        self.squares = [0.0] * len(layers)

    def __enter__(self) -> "Complexity":
        self.hooks = [
            layer.register_forward_hook(lambda _module, _inputs, output, place=place: self.add(place, output))
            for place, layer in enumerate(self.layers)
        ]
        self.seen = [0] * len(self.layers)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def add(self, place: int, outputs: Tensor) -> None:
        start = self.seen[place]
        self.seen[place] = end = start + len(outputs)
        self.sums[place] += torch.einsum("dn,nchw->dchw", self.signs[:, start:end], outputs)
        self.squares[place] += outputs.square().mean().item() * len(outputs)

    def result(self) -> tuple[float, float]:
        """The complexity, and relative to the outputs' root mean square, both a mean over the layers."""
        complexities = [float((sums / self.images).abs().amax(dim=1).mean()) for sums in self.sums]
        relative = [c / (s / self.images) ** 0.5 for c, s in zip(complexities, self.squares, strict=True)]
        return sum(complexities) / len(complexities), sum(relative) / len(relative)


def draw(path: Path, rows: list[dict[str, object]]) -> None:
    """A heat map of the accuracy over rate and alpha; complexity and gap over alpha, a line a rate."""
    disout = [row for row in rows if row["method"] == "disout"]
    blocks = {row["block_size"] for row in disout}
    disout += [row for row in rows if row["method"] == "dropblock" and row["block_size"] in blocks]
    cells = {(row["dist_prob"], row["alpha"]): row for row in disout}
    rates, alphas = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    heat, *panels = figure.subplots(1, 3)

    grid = [[float(cells[p, a]["test_top1"]) if (p, a) in cells else float("nan") for a in alphas] for p in rates]
    figure.colorbar(heat.imshow(grid, origin="lower", cmap="viridis"), shrink=0.6)
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            heat.text(x, y, f"{value:.1f}", ha="center", va="center", color="white", backgroundcolor="#00000060")
    heat.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    heat.set(ylabel="dist_prob", title="accuracy after the last epoch, %")

    titles = {"gap": "training minus evaluated accuracy, %", "complexity": "complexity of the next layer"}
    plain = [row for row in rows if row["method"] == "none" and row["augment"] == rows[0]["augment"]]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for rate in rates:
            line = [(x, float(cells[rate, a][name])) for x, a in enumerate(alphas) if (rate, a) in cells]
            axes.plot(*zip(*line, strict=True), "o-", label=f"dist_prob {rate:g}")
        for row in plain[:1]:
            axes.axhline(float(row[name]), color="black", linestyle="--", label="none")
        axes.set(title=title)
        axes.grid(alpha=0.3)
    for axes in (heat, *panels):
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set(xlabel="alpha")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rates) + 1)
    figure.suptitle("one run a setting, in evaluation mode")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


if __name__ == "__main__":
    run_script("complexity.py", main, sys.argv[1:])
