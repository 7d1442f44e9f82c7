"""What two processes do together against what one does alone."""

import os
import signal
import socket
import time
from itertools import chain

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import train
import train_imagenet
from disout import Disout, strength
from disout_attach import attach
from models.resnet_cifar import ResNet
from utils import loader
from utils.engine import Schedule, evaluate, train_epoch
from utils.failures import run_script
from utils.interruptions import Interruptions, Stopped
from utils.processes import LAUNCHED, join, largest, leave

IMAGES, BATCH = 11, 7  # steps of 7 and 4 images: of the first, one process has 4, the other 3


def network():
    """A ResNet whose batch norms are frozen."""
    torch.manual_seed(0)
    model = ResNet(8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda _mode=True: None
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.arange(IMAGES) % 10


def indices(rank, world):
    """Of this process's batches in an epoch."""
    sampler = loader.EpochSampler([BATCH, IMAGES - BATCH], 1, 0, rank, world)
    sampler.epoch = 3
    return [[index for _, index in keys] for keys in sampler]


def trained(model, batches, sizes, layers=(), first_step=0, **how):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = Schedule(lambda _: 0.0, list(layers), total_steps=100, seed=0)
    scores = train_epoch(model, batches, sizes, optimizer, schedule, first_step, **how)
    return scores, [parameter.grad.numpy() for parameter in model.parameters()]


def counted(reductions, bucket):
    """A hook of DistributedDataParallel that averages as it does without, and counts."""
    reductions.append(bucket.index())
    return allreduce_hook(None, bucket)


def work(rank, world, port, results, first_has_saved):
    """All that this process has to show."""
    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
    join(torch.device("cpu"))
    images, labels = data()
    found = {"indices": indices(rank, world)}

    model = network()
    keys = loader.test_keys(IMAGES, 3, rank, world)
    found["evaluated"] = evaluate(model, [(images[part], labels[part]) for part in ([i for _, i in k] for k in keys)])
    batches = [(images[part], labels[part]) for part in found["indices"]]
    parallel = DistributedDataParallel(model) if world > 1 else model
    found["trained"], found["gradient"] = trained(parallel, batches[:1], [BATCH])

    if world > 1:  # the same batch in two parts
        halves = zip(*(of_batch.tensor_split(2) for of_batch in batches[0]), strict=True)
        reductions = []
        parallel.register_comm_hook(reductions, counted)
        _, found["gradient of parts"] = trained(parallel, halves, [BATCH], accumulate_steps=2)
        found["reductions"] = len(reductions)

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), Disout(0.5))
    outputs = []
    layer[2].register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach() == 0))
    for _ in range(2):
        trained(layer, [(images[:4], labels[:4])], [4], [(layer[2], 0.5)], first_step=90)
        found["draws"] = [*found.get("draws", []), layer[2].distorted.item()]

    def happen():
        for step in range(9):
            if step == 2 and rank == world - 1:  # one of them alone
                os.kill(os.getpid(), signal.SIGTERM)
            yield images[:4], labels[:4]

    saved = []
    with Interruptions(60) as interruptions:

        def save(step, _totals):
            saved.append(step)
            if rank == 0:
                time.sleep(0.5)
                first_has_saved.set()
            interruptions.after_saving()

        try:
            trained(model, happen(), [4] * 9, save_is_due=interruptions.save_is_due, save=save)
        except Stopped as stop:
            found["stopped"] = saved, stop.exit_code, first_has_saved.is_set()

    # A loss that is bad in one process alone
    bad = images[:4] * (float("nan") if rank == world - 1 else 1)
    try:
        trained(model, [(images[:4], labels[:4]), (bad, labels[:4])], [4 * world] * 2)
    except Exception as error:
        found["diverged"] = str(error)
    # A weight that is another one in one process alone, by one bit
    model = network()
    if rank:
        next(model.parameters()).view(torch.int32).flatten()[3] ^= 1
    try:
        trained(model, [(images[:4], labels[:4])], [4 * world])
    except Exception as error:
        found["apart"] = str(error)
    found["largest"] = largest(rank, 10 - rank)
    leave()
    results.put((rank, found))


@pytest.fixture(scope="module")
def found():
    """What one process found, and what each of two did."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    of = {}
    for world in (1, 2):
        results, first_has_saved = context.Queue(), context.Event()
        children = [
            context.Process(target=work, args=(rank, world, port, results, first_has_saved)) for rank in range(world)
        ]
        for child in children:
            child.start()
        of[world] = dict(results.get(timeout=120) for _ in children)
        for child in children:
            child.join()
    return of[1][0], of[2][0], of[2][1]


def test_two_evaluate_what_one_does(found):
    one, *two = (result["evaluated"] for result in found)
    assert two[0] == two[1]
    assert all(one[name] == two[0][name] for name in one if name != "test_loss")
    assert two[0]["test_loss"] == pytest.approx(one["test_loss"], rel=1e-6)


def test_two_see_every_training_image_once_in_the_steps_of_one(found):
    one, *two = (result["indices"] for result in found)
    assert sorted(chain(*one)) == list(range(IMAGES))
    assert [sorted(chain(*step)) for step in zip(*two, strict=True)] == [sorted(step) for step in one]
    assert [len(step) for step in two[0]] == [4, 2] and [len(step) for step in two[1]] == [3, 2]


def test_the_averaged_gradient_of_uneven_shards_is_that_of_one_process(found):
    one, *two = found
    for result in two:
        for ours, theirs in zip(result["gradient"], one["gradient"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert result["trained"]["train_images"] == one["trained"]["train_images"] == BATCH
        assert result["trained"]["train_top1"] == one["trained"]["train_top1"]
        assert result["trained"]["train_loss"] == pytest.approx(one["trained"]["train_loss"], rel=1e-6)


def test_the_parts_of_a_batch_are_reduced_once_to_the_same_gradient(found):
    one, *two = found
    for result in two:
        assert result["reductions"] == 1
        for ours, theirs in zip(result["gradient of parts"], one["gradient"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_disout_draws_differently_in_each_and_the_same_again(found):
    draws = [result["draws"] for result in found[1:]]
    assert all(first == again for first, again in draws)
    assert draws[0][0] != draws[1][0]
    assert found[0]["draws"] == draws[0]  # the first process draws what one process does


def test_they_stop_together_after_the_same_step_when_the_first_has_saved(found):
    assert [result["stopped"] for result in found] == [([3], 143, True)] * 3


def test_a_loss_that_is_bad_in_one_stops_both(found):
    assert all("loss is not finite in epoch 1, step 2 of 2" in result["diverged"] for result in found)


def test_weights_that_differ_end_both(found):
    assert "apart" not in found[0]
    assert all("other weights after epoch 1, step 1 of 1" in result["apart"] for result in found[1:])


def test_largest_is_of_all(found):
    assert [result["largest"] for result in found] == [[0, 10], [1, 10], [1, 10]]


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({"WORLD_SIZE": "4"}, 1),  # as a scheduler leaves it
        ({"WORLD_SIZE": "abc"}, 1),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}, 1),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "29500", "MASTER_ADDR": "localhost"}, 4),
    ],
)
def test_several_processes_are_those_of_a_launcher_that_says_all(monkeypatch, environment, world):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args, settings, _ = train_imagenet.parse_arguments([])
    assert args.processes == settings["processes"] == world
    if world == 1:
        assert join(torch.device("cpu")) == torch.device("cpu") and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "abc"), ("RANK", "4"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "x")]
)
@pytest.mark.parametrize("script", [train, train_imagenet])
def test_what_a_launcher_cannot_have_said_is_one_line(monkeypatch, capsys, name, value, script):
    environment = dict(zip(LAUNCHED, ("0", "0", "2", "29500", "localhost"), strict=True))
    for each in environment:
        monkeypatch.setenv(each, (environment | {name: value})[each])
    with pytest.raises(SystemExit) as stop:
        run_script("a script", script.main, [])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and name in message


def test_train_is_for_one_process(monkeypatch, refused):
    for name, value in zip(LAUNCHED, ("1", "1", "2", "29500", "localhost"), strict=True):
        monkeypatch.setenv(name, value)
    assert "train.py is for one process" in refused()


def sharded(rank, folder):
    """A step of a network with Disout layers that fully_shard splits between two processes."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/together", rank=rank, world_size=2)
    torch.manual_seed(0)
    head = (nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    model, read = nn.Sequential(nn.Conv2d(3, 4, 3), *head), []
    expected = [model[2].weight.detach().clone(), model[5].weight.detach().view(5, 6, 4).clone()]
    handle = attach(model, ["0", "2"], 0.5, 3)
    for layer in handle.layers.values():
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model[5], model):
        fully_shard(part, mesh=mesh)
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    assert hasattr(read[0], "full_tensor")
    for weight, whole in zip(read, expected, strict=True):
        signs = torch.ones(whole.shape[1:])
        assert torch.equal(strength(weight, signs), strength(whole, signs))
    assert all(layer.distorted > 0 for layer in handle.layers.values())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    handle.set_dist_prob(0.3)
    torch.distributed.destroy_process_group()


def test_the_weight_of_a_sharded_reader_is_the_whole_one(tmp_path):
    mp.spawn(sharded, (str(tmp_path),), 2)
