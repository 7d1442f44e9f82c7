"""What only a CUDA device can show; skipped where there is none."""

import pytest
import torch
from conftest import same

from disout import Disout
from models.regularizers import METHODS, make_regularizer, regularizer_layers
from models.resnet_cifar import ResNet
from utils import data, engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device_within_an_epoch(monkeypatch, method, amp):
    train, _ = data.load("digits", "")
    mean, std = (statistic.cuda() for statistic in data.channel_statistics("digits", train))
    train = train.take(slice(200)).to("cuda")
    model = ResNet(8, 10, make_regularizer(method, 0.1, 6, 5.0, False)).to("cuda", memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    layers = [(layer, layer.dist_prob) for layer in regularizer_layers(model)]

    first_not_finite = engine.first_not_finite

    def after_the_last_step(*args):
        torch.cuda.set_sync_debug_mode("default")
        return first_not_finite(*args)

    monkeypatch.setattr(engine, "first_not_finite", after_the_last_step)

    def train_epoch(epoch):
        batches = data.train_batches(train, mean, std, 128, "standard", 0, epoch)
        schedule = engine.Schedule(lambda _: 0.1, layers, total_steps=4, seed=0)
        return engine.train_epoch(model, batches, [128, 72], optimizer, schedule, first_step=2 * epoch, amp=amp)

    train_epoch(0)  # libraries may wait when they are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert train_epoch(1)["train_images"] == 200
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", [(), ("--amp",)])
def test_deterministic_training_gives_the_same_bits(run, precision):
    flags = ("--train_size", "300", "--epochs", "2", "--device", "cuda", "--deterministic", *precision)
    states = [torch.load(run(*flags, name=name) / "checkpoint.pt", weights_only=True) for name in ("first", "again")]
    assert same(*states)


def test_disout_has_on_the_device_the_rate_and_the_kept_elements_that_it_has_on_the_cpu():
    x = torch.randn(512, 64, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    layer = Disout(0.09, 6, 5.0).cuda()
    y = layer(x, torch.randn(64, 64, 3, 3, device="cuda"))
    assert layer.distorted.item() == pytest.approx(0.0761, abs=0.003)
    kept = (y * (1 - layer.distorted) - x).abs() < 1e-4
    assert 1 - kept.float().mean().item() == pytest.approx(0.0761, abs=0.003)
