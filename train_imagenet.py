"""Trains ResNet-50 on ImageNet, or another folder of photographs, with Disout, or with what it is compared to.

The authors' recipe, for which they report 78.76 +- 0.05 % top-1 and 94.33 +- 0.03 % top-5 (best epoch):

    python train_imagenet.py --dist_prob 0.07 --alpha 1.0 --block_size 7

which is also what `python train_imagenet.py` does: 540 epochs of batch 1024 on data/imagenet/{train,val}/CLASS/*. We
have not run it. On the GPUs of one machine: torchrun --nproc_per_node=8 train_imagenet.py; where a process's share of a
batch does not fit its memory, --accumulate_steps takes it in parts. What it is compared to: scripts/table3_imagenet.sh
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.regularizers import make_regularizer, regularizer_layers
from models.resnet_imagenet import ResNet50
from utils import loader, photographs
from utils.agreement import Parts, agree
from utils.checkpoint import Checkpoints, Progress, has_checkpoint, load_weights
from utils.engine import Schedule, evaluate, train_epoch
from utils.failures import run_script
from utils.files import lock_folder
from utils.flags import Parser, UsageError, add_shared_flags, check_folder, file_path, launch, number, run_settings
from utils.interruptions import Interruptions, save_within_epoch
from utils.processes import first_does, is_first, join, leave, processes, share
from utils.record import Recorder, epoch_row, say_complete
from utils.schedules import IMAGENET_DECAY, dist_prob_at, lr_at, step_sizes
from utils.speed import set_up

LARGEST_BATCH = 64  # GB, of images alone: what a network makes of them takes many times as much


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, object], dict[str, object]]:
    """The flags, the run's settings as config.json holds them, and their defaults."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--data",
        type=file_path,
        default="data/imagenet",
        help="folder of train/CLASS and val/CLASS (default: data/imagenet)",
    )
    add("--workers", type=number(int, 0, 1024), default=8, help="that decode, of each process (default: 8)")
    add("--image_size", type=number(int, 32), default=224, help="side of the images, at least 32 (default: 224)")
    add("--augment", choices=photographs.AUGMENTS, default="standard", help="standard (default): crop and flip")
    add("--accumulate_steps", type=number(int, 1), default=1, help="parts of a process's share of a batch (default: 1)")
    add("--skip_corrupt", action="store_true", help="go on without images that cannot be read, and count them")
    add_shared_flags(parser)
    parser.set_defaults(dist_prob=0.07, alpha=1.0, block_size=7)
    parser.set_defaults(epochs=540, batch_size=1024, lr=0.4, weight_decay=1e-4, warmup_epochs=0)
    args = parser.parse_args(argv)
    args.dataset, args.depth = Path(args.data).absolute().name, 50
    args.processes = launch()[1]  # batch norm and Disout see a process's share of a batch
    if args.batch_size < 2 * args.processes * args.accumulate_steps:
        parser.error("--batch_size: batch norm needs two images in each process and each of --accumulate_steps")
    images = -(-args.batch_size // (args.processes * args.accumulate_steps))
    if (size := 4 * 3 * args.image_size**2 * images / 1e9) > LARGEST_BATCH:
        parser.error(
            f"--image_size: {images} images of {args.image_size} x {args.image_size}, a process's part of a batch, are "
            f"{size:,.0f} GB, and {LARGEST_BATCH} are the most: a smaller --image_size or --batch_size, or more "
            "--accumulate_steps"
        )
    return args, *run_settings(args, parser)


def find(args: argparse.Namespace, settings: dict[str, object], defaults: dict[str, object]) -> Parts | None:
    """Looks at the files: the images of train/ and val/, or, to evaluate, of val/; None where the run is complete."""
    if is_first():  # it alone reads and writes the run's folder
        folder = check_folder(args, settings, defaults)
        if args.resume and not args.evaluate and (folder / "summary.json").exists():
            return None
    if args.evaluate:
        transform = photographs.test_transform(args.image_size)
        return {"val": photographs.load_part(args.data, "val", transform, args.seed, args.skip_corrupt)}
    train, test = photographs.load(args.data, args.augment, args.image_size, args.seed, args.skip_corrupt)
    if len(train) < (least := 2 * args.processes * args.accumulate_steps):
        raise UsageError(f"--data: {len(train)} training images are fewer than two a part of a batch ({least // 2})")
    return {"train": train, "val": test}


def evaluate_file(args: argparse.Namespace, test: photographs.Photographs, device: torch.device) -> None:
    """--evaluate: prints the accuracy on val/, whose folders are the classes."""
    model = ResNet50(len(test.images.classes))
    model.to(device, memory_format=torch.channels_last)
    first_does(partial(load_weights, Path(args.evaluate), model))
    share(model.state_dict().values())
    scores = evaluate(model, loader.on_device(make_test_loader(args, test, device), device), args.amp)
    if is_first():
        print(f"{args.evaluate}: top1 {scores['test_top1']:.2f} %, top5 {scores['test_top5']:.2f} % (test)")


def make_test_loader(args: argparse.Namespace, test: photographs.Photographs, device: torch.device) -> DataLoader:
    batch_size = max(args.batch_size // (args.processes * args.accumulate_steps), 1)
    keys = loader.test_keys(len(test), batch_size, *processes())
    return loader.make_loader(test, keys, args.workers, device)


def main(argv: list[str]) -> None:
    args, settings, defaults = parse_arguments(argv)
    folder = Path(args.output, args.name)
    device = join(args.device)
    rank, world = processes()
    set_up(args.threads, args.deterministic, args.compile and device.type == "cpu")

    # Data
    found = agree(partial(find, args, settings, defaults), vars(args), folder)
    if found is None:
        first_does(partial(say_complete, folder))
        return leave()
    if args.evaluate:
        evaluate_file(args, found["val"], device)
        return leave()
    train, test = found["train"], found["val"]
    sizes = step_sizes(len(train), args.batch_size, smallest=2 * world * args.accumulate_steps)
    sampler = loader.EpochSampler(sizes, args.accumulate_steps, args.seed, rank, world)
    train_loader = loader.make_loader(train, sampler, args.workers, device)
    test_loader = make_test_loader(args, test, device)

    # Network
    torch.manual_seed(args.seed)
    regularizer = make_regularizer(args.method, args.dist_prob, args.block_size, args.alpha, args.inside)
    model = ResNet50(len(train.images.classes), regularizer)
    model.to(device, memory_format=torch.channels_last)
    if args.init:  # DistributedDataParallel hands the first process's weights to all
        first_does(lambda: has_checkpoint(folder) or load_weights(Path(args.init), model))

    # Optimizer and schedules
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
        fused=True,
    )
    total_steps = args.epochs * len(sizes)
    lr_at_step = partial(
        lr_at,
        steps_per_epoch=len(sizes),
        epochs=args.epochs,
        base_lr=args.lr,
        warmup_epochs=args.warmup_epochs,
        decay=IMAGENET_DECAY,
    )
    layers = [(layer, layer.dist_prob) for layer in regularizer_layers(model)]
    schedule = Schedule(lr_at_step, layers, total_steps, args.seed, args.constant_prob)
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)

    # Loop; the first process writes
    lock = first_does(partial(lock_folder, folder))
    checkpoints = Checkpoints(folder, settings, defaults, {part: found[part].images.fingerprint for part in found})
    progress = checkpoints.load(model, optimizer)
    command = ["train_imagenet.py", *argv]
    recorder = first_does(lambda: Recorder(folder, settings, command, device, "test", checkpoints, progress))
    trained_model = DistributedDataParallel(model) if world > 1 else model
    interruptions = Interruptions(args.save_minutes)

    with interruptions:
        for epoch in range(len(progress.rows), args.epochs):
            start = time.perf_counter() - progress.seconds
            done = progress.step - epoch * len(sizes)
            sampler.epoch, sampler.first_step = epoch, done
            batches = loader.on_device(train_loader, device)
            of_epoch = {"total": len(sizes) * args.accumulate_steps, "initial": done * args.accumulate_steps}
            bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", **of_epoch, leave=False, disable=rank > 0 or None)
            scores = train_epoch(
                trained_model,
                bar,
                sizes,
                optimizer,
                schedule,
                progress.step,
                accumulate_steps=args.accumulate_steps,
                label_smoothing=args.label_smoothing,
                amp=args.amp,
                totals=progress.totals,
                save_is_due=interruptions.save_is_due,
                save=partial(save_within_epoch, checkpoints, interruptions, model, optimizer, progress.rows, start),
            )
            trained = time.perf_counter()
            share(model.buffers())  # batch norm's statistics: all evaluate the same network
            scores |= evaluate(model, loader.on_device(test_loader, device), args.amp)
            step = (epoch + 1) * len(sizes)
            dist_prob = dist_prob_at(step - 1, total_steps, args.dist_prob, args.constant_prob)
            row = epoch_row(epoch, dist_prob, scores, len(train), start, trained)
            progress = Progress(step, (*progress.rows, row))
            if recorder:
                recorder.add_epoch(model, optimizer, progress)
    if recorder:
        recorder.finish(progress.rows, model)
        lock.close()
    leave()


if __name__ == "__main__":
    run_script("train_imagenet.py", main, sys.argv[1:])
