"""How large is Disout's noise after the linear layers of trained networks, relative to the features it replaces?

Writes noise_size.csv into FOLDER, a row a run of Disout and layer, of the network after its last epoch: `noise` is the
deviation of the distortion d = alpha * s_c * std(x) * n over all channels, divided by std(x), so alpha times the root
mean square of the strength s_c, whose sign is all that is drawn where a linear layer reads the features.
"""

import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from disout import strength
from models.cnn import CNN
from utils.checkpoint import load_weights
from utils.data import DATASETS
from utils.failures import run_script
from utils.files import replacing
from utils.flags import Parser, UsageError, file_path
from utils.record import read_json


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    about = "complete runs of train.py --model cnn with their checkpoints: results/small_table1"
    parser.add_argument("folder", type=file_path, metavar="FOLDER", help=about)
    folder = Path(parser.parse_args(argv).folder)
    rows = []
    for summary in sorted(folder.glob("*/summary.json")):
        run = summary.parent
        config = read_json(run / "config.json")
        if config["method"] == "disout" and config.get("model") == "cnn" and (run / "checkpoint.pt").exists():
            rows += measure(run, config)
    if not rows:
        raise UsageError(f"no complete run of --model cnn --method disout with its checkpoint in {folder}/NAME")
    with replacing(folder / "noise_size.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(run: Path, config: dict) -> list[dict[str, object]]:
    """The rows of one run."""
    model = CNN(DATASETS[config["dataset"]][0])
    load_weights(run / "checkpoint.pt", model)
    rows = []
    for layer, reader in (("hidden1", model.fc2), ("hidden2", model.fc3)):
        noise = config["alpha"] * strength(reader.weight, torch.ones(reader.in_features)).square().mean().sqrt().item()
        rows.append({"run": run.name, "alpha": config["alpha"], "layer": layer, "noise": f"{noise:.4g}"})
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="  ")
    return rows


if __name__ == "__main__":
    run_script("noise_size.py", main, sys.argv[1:])
