"""What only a CUDA device can show; skipped where there is none."""

import pytest
import torch
from conftest import metrics, same
from test_train import LEARNS
from torch._dynamo.utils import counters

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


@pytest.mark.parametrize("precision", [(), ("--amp",)])
@pytest.mark.parametrize("method", ["none", "dropblock", "disout"])
def test_compiled_training_learns_and_all_of_it_is_in_cuda_graphs(run, method, precision):
    torch._dynamo.reset()
    counters.clear()
    rows = metrics(run(*LEARNS, "--method", method, "--device", "cuda", "--compile", *precision))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert (rows[-1]["distorted"] > 0.05) == (method != "none")


def test_disout_has_on_the_device_the_rate_and_the_kept_elements_that_it_has_on_the_cpu():
    x = torch.randn(512, 64, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    layer = Disout(0.09, 6, 5.0).cuda()
    y = layer(x, torch.randn(64, 64, 3, 3, device="cuda"))
    assert layer.distorted.item() == pytest.approx(0.0761, abs=0.003)
    kept = (y * (1 - layer.distorted) - x).abs() < 1e-4
    assert 1 - kept.float().mean().item() == pytest.approx(0.0761, abs=0.003)
