"""Trains a ResNet on CIFAR with Disout, or with what it is compared to.

The authors' recipe, for which they report 94.50 +- 0.15 % (best epoch) on CIFAR-10:

    python train.py --dist_prob 0.09 --alpha 5.0 --block_size 6

which is also what `python train.py` does: ResNet-56, 200 epochs. @TIME@
The rows that it is compared to (93.95 and 94.18 %) are --method none and --method dropblock; element-wise distortion is
--block_size 1. A first look in a minute, without a download: bash scripts/quickstart.sh
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from models.regularizers import METHODS, make_regularizer, regularizer_layers
from models.resnet_cifar import ResNet
from utils import data, record
from utils.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint, save_weights
from utils.engine import evaluate, train_epoch
from utils.flags import Parser, folder_name, number, resnet_depth, usable_device
from utils.schedules import dist_prob_at, lr_at


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=data.DATASETS, default="cifar10")
    add("--data_root", default="data", help="folder that holds the data set, or that it is downloaded to")
    add("--depth", type=resnet_depth, default=56, help="of the ResNet, 6n + 2")
    add("--method", choices=METHODS, default="disout")
    add("--dist_prob", type=number(float, 0, 1), default=0.09, help="share of a map to distort, at the end of training")
    add("--alpha", type=number(float, 0), default=5.0, help="intensity of the distortion")
    add("--block_size", type=number(int, 1), default=6, help="side of a block; 1: element-wise")
    add("--inside", action="store_true", help="keep even blocks wholly inside the map (see disout.py)")
    add("--augment", choices=("none", "standard"), default="standard", help="standard: crop, flip, rotation")
    add("--epochs", type=number(int, 1), default=200)
    add("--batch_size", type=number(int, 1), default=128)
    add("--lr", type=number(float, above=0), default=0.1)
    add("--momentum", type=number(float, 0, below=1), default=0.9)
    add("--weight_decay", type=number(float, 0), default=5e-4)
    add("--warmup_epochs", type=number(int, 0), default=1)
    add("--seed", type=number(int, 0), default=0)
    add("--device", type=usable_device, default=None, help="default: cuda where there is one, else cpu")
    add("--train_size", type=number(int, 0), default=0, help="train on so many images, balanced over classes; 0: all")
    add(
        "--holdout",
        type=number(int, 0),
        default=0,
        help="evaluate on so many further training images, not the test set",
    )
    add("--output", default="results", help="parent of the run's folder")
    add("--name", type=folder_name, default=None, help="the run's folder; default: DATASET-resnetDEPTH-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the last finished epoch; start where there is none")
    add("--evaluate", metavar="FILE", default=None, help="only evaluate a checkpoint or a state dict such as best.pt")
    args = parser.parse_args(argv)

    images = data.DATASETS[args.dataset][1]
    if args.train_size + args.holdout > images or args.holdout == images:
        parser.error(f"--train_size and --holdout: {args.dataset} has {images} training images for both together")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.name = args.name or f"{args.dataset}-resnet{args.depth}-{args.method}-s{args.seed}"
    for flag in {"dist_prob", "block_size", "alpha", "inside"} - set(METHODS[args.method].settings):
        setattr(args, flag, 0)

    folder, settings = Path(args.output, args.name), run_settings(args)
    if args.evaluate:
        if not Path(args.evaluate).is_file():
            parser.error(f"argument --evaluate: there is no file {args.evaluate}")
    elif not args.resume and folder.is_dir() and any(folder.iterdir()):
        parser.error(f"{folder} holds a run already: add --resume to go on with it, or give another --name")
    elif changed := record.changed_settings(folder, settings):
        parser.error(f"{folder} was started with other settings ({', '.join(changed)}): give another --name")
    return args


def run_settings(args: argparse.Namespace) -> dict[str, object]:
    """What config.json holds: every flag that says what the run is, and where."""
    settings = {flag: value for flag, value in vars(args).items() if flag not in ("resume", "evaluate")}
    return settings | {"device": str(args.device)}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    folder = Path(args.output, args.name)
    if args.resume and not args.evaluate and (folder / "summary.json").exists():
        print(f"{folder} is complete:\n{(folder / 'summary.json').read_text()}", end="")
        return

    # Data, on the device as a whole
    train, test = data.load(args.dataset, args.data_root)
    mean, std = (statistic.to(args.device) for statistic in data.channel_statistics(args.dataset, train))
    evaluated_on = "holdout" if args.holdout else "test"
    if args.train_size or args.holdout:
        train, held_out = data.split(train, args.train_size, args.holdout)
        test = held_out if args.holdout else test
    train, test = train.to(args.device), test.to(args.device)

    # Network
    torch.manual_seed(args.seed)
    regularizer = make_regularizer(args.method, args.dist_prob, args.block_size, args.alpha, args.inside)
    model = ResNet(args.depth, data.DATASETS[args.dataset][0], regularizer)
    model.to(args.device, memory_format=torch.channels_last)

    if args.evaluate:
        load_weights(Path(args.evaluate), model)
        scores = evaluate(model, data.test_batches(test, mean, std))
        print(f"{args.evaluate}: top1 {scores['test_top1']:.2f} %, top5 {scores['test_top5']:.2f} % ({evaluated_on})")
        return

    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    steps_per_epoch = math.ceil(len(train.labels) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    lr_at_step = partial(
        lr_at,
        steps_per_epoch=steps_per_epoch,
        epochs=args.epochs,
        base_lr=args.lr,
        warmup_epochs=args.warmup_epochs,
    )
    layers = [(layer, layer.dist_prob) for layer in regularizer_layers(model)]

    # Run folder, new or to go on with
    folder.mkdir(parents=True, exist_ok=True)
    step, rows = 0, []
    if (folder / "checkpoint.pt").exists():
        step, rows = load_checkpoint(folder / "checkpoint.pt", model, optimizer)
        print(f"{folder}: going on after epoch {len(rows)}")
    if not (folder / "config.json").exists():
        record.write_config(folder, run_settings(args), args.device, ["train.py", *argv])
    record.write_metrics(folder, rows)
    events = record.start_events(folder, rows)

    # Loop
    for epoch in range(len(rows), args.epochs):
        start = time.perf_counter()
        batches = data.train_batches(train, mean, std, args.batch_size, args.augment == "standard", args.seed, epoch)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps_per_epoch, leave=False, disable=None)
        scores = train_epoch(model, bar, optimizer, lr_at_step, layers, step, total_steps, args.seed)
        images_per_second = len(train.labels) / (time.perf_counter() - start)
        scores |= evaluate(model, data.test_batches(test, mean, std))
        step += steps_per_epoch
        row = {
            "epoch": epoch + 1,
            "dist_prob": dist_prob_at(step - 1, total_steps, args.dist_prob),
            **scores,
            "seconds": time.perf_counter() - start,
            "images_per_second": images_per_second,
        }
        rows.append(row)
        print(record.epoch_line(row, args.epochs, evaluated_on), flush=True)

        # In this order a kill between two of them costs nothing: what follows the checkpoint is written from its rows.
        if record.best_epoch(rows) == epoch + 1:
            save_weights(folder / "best.pt", model)
        save_checkpoint(folder / "checkpoint.pt", model, optimizer, step, rows)
        record.write_metrics(folder, rows)
        record.write_events(events, row)

    # Summary
    events.close()
    record.draw_curve(folder, rows, args.name, evaluated_on)
    facts = {flag: getattr(args, flag) for flag in ("method", "dataset", "depth", "seed", "epochs")} | {
        "evaluated_on": evaluated_on,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": record.device_name(args.device),
    }
    record.write_summary(folder, facts, rows)
    print(f"{folder}:\n{(folder / 'summary.json').read_text()}", end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, CheckpointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print(
            "train.py: stopped; the same command with --resume goes on after the last finished epoch", file=sys.stderr
        )
        sys.exit(130)
