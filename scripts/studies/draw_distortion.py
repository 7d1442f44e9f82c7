"""Draws what Disout does to a feature map, beside dropout and DropBlock.

The map is that of the first evaluated image, after the first convolution of the trained network's last group: its four
channels of the largest deviation, each under one draw of each method. Rate 0.3 and blocks of 3 x 3, unlike in training,
so that a single map shows something.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # scripts, and the repository

from runs import load_trained

from disout import Disout
from utils.data import test_batches
from utils.failures import run_script
from utils.files import replacing
from utils.flags import Parser, file_path

RATE, BLOCK = 0.3, 3
CHANNELS = 4


@torch.no_grad()
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "run", type=file_path, metavar="RUN", help="a run of train.py with its checkpoint: results/NAME"
    )
    parser.add_argument("file", type=file_path, metavar="FILE.png", help="to write")
    args = parser.parse_args(argv)
    _, model, (_, test, mean, std) = load_trained(Path(args.run))
    model.eval()
    block, maps = model.layer3[0], []
    block.conv1.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    images, _ = next(test_batches(test, mean, std))
    model(images)
    [x] = maps
    methods = {
        "feature map": nn.Identity(),
        "dropout": nn.Dropout(RATE),
        "DropBlock": Disout(RATE, BLOCK, alpha=0.0),
        "Disout, alpha 5": Disout(RATE, BLOCK, alpha=5.0),
        "Disout, alpha 20": Disout(RATE, BLOCK, alpha=20.0),
    }
    columns = {}
    for title, layer in methods.items():
        torch.manual_seed(0)  # the same blocks
        columns[title] = layer(x, block.conv2.weight) if isinstance(layer, Disout) else layer(x)
    channels = x[0].std(dim=(1, 2)).argsort(descending=True)[:CHANNELS].tolist()

    figure = Figure(figsize=(2 * len(columns) + 1.2, 2 * CHANNELS + 0.3), layout="constrained")
    grid = figure.subplots(CHANNELS, len(columns))
    for axes_of_row, channel in zip(grid, channels, strict=True):
        limit = float(x[0, channel].abs().max()) * 1.3
        for axes, (title, distorted) in zip(axes_of_row, columns.items(), strict=True):
            shown = axes.imshow(distorted[0, channel].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
            if channel == channels[0]:
                axes.set_title(title)
        axes_of_row[0].set_ylabel(f"channel {channel}")
        figure.colorbar(shown, ax=axes_of_row, shrink=0.9)
    figure.get_layout_engine().set(w_pad=0.1)
    with replacing(Path(args.file)) as partial:
        figure.savefig(partial, format="png", dpi=80)


if __name__ == "__main__":
    run_script("draw_distortion.py", main, sys.argv[1:])
