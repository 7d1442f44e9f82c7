"""The network of Table 1, and train.py with it."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import metrics, read_json, same, without_times
from torch import nn

import train
from disout import strength
from models.cnn import CNN
from models.regularizers import make_regularizer, regularizer_layers
from utils import data
from utils.checkpoint import load_weights
from utils.engine import evaluate
from utils.flags import UsageError

sys.path.insert(0, str(Path(train.__file__).parent / "scripts/studies"))
import noise_size

SHORT = ("--model", "cnn", "--train_size", "20", "--holdout", "20", "--batch_size", "10", "--epochs", "2")


@pytest.mark.parametrize("classes", [10, 100])
def test_parameters_and_shapes(classes):
    convolutions = 3 * 25 * 96 + 96 * 25 * 128 + 128 * 25 * 256 + 2 * (96 + 128 + 256)  # with batch norm
    linear = (256 * 3 * 3 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * classes  # 32, 15, 7, 3 wide after the pools
    model = CNN(classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + linear
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)
    assert not regularizer_layers(model)


def test_it_starts_as_kaiming_says():
    model = CNN()
    for layer, fan_in in ((model.conv2, 96 * 25), (model.fc1, 2304), (model.fc2, 2048)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
    assert not model.fc1.bias.any()


@pytest.mark.parametrize(("place", "share"), [("fc2", 0.05), ("fc3", 0.03)])
def test_the_noise_of_the_authors_alpha_is_small_at_first(place, share):
    """As results/README.md says: relative to the features' standard deviation."""
    weight = getattr(CNN(), place).weight
    assert 5 * strength(weight, torch.ones(2048)).square().mean().sqrt().item() == pytest.approx(share, abs=0.005)


class Spy(nn.Module):
    """Takes the place of a regularizer's layer and keeps what it is handed."""

    def forward(self, x, next_weight=None, groups=None):
        self.x, self.reader, self.groups = x, next_weight, groups
        return x


def test_places_and_readers():
    asked = []
    model = CNN(10, lambda place, scale: asked.append((place, scale)) or Spy())
    model(torch.randn(2, 3, 32, 32))
    assert asked == [("hidden", 1.0)] * 2
    for layer, weight in ((model.hidden1, model.fc2.weight), (model.hidden2, model.fc3.weight)):
        assert layer.reader is weight and layer.groups == 1
        assert layer.x.shape == (2, 2048) and layer.x.min() == 0  # after the ReLU


def logits(alpha, weight_scale=1.0, training=True):
    """Of one network, batch and draw."""
    torch.manual_seed(0)
    model = CNN(10, make_regularizer("disout", 0.5, 1, alpha, False)).train(training)
    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    with torch.no_grad():
        features = []
        model.hidden1.register_forward_hook(lambda _module, _inputs, output: features.append(output))
        model.fc2.weight *= weight_scale
        out = model(x)
    return out, features[0]


def test_the_strength_of_the_next_weight_reaches_the_output_in_training_alone():
    (out, features), (_, plain), (stronger, _) = logits(50.0), logits(0.0), logits(500.0)
    assert not torch.equal(out, stronger)
    distortion = features - plain  # what is kept is the same
    assert (distortion != 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    twice = logits(50.0, weight_scale=2.0)[1] - plain
    assert torch.allclose(twice, 2 * distortion, rtol=1e-3, atol=1e-5)
    assert torch.equal(logits(50.0, training=False)[0], logits(0.0, training=False)[0])


@pytest.mark.parametrize("method", ["dropout", "disout"])
def test_traced_in_evaluation_it_is_the_same_and_distorts_in_training(method):
    model, x = CNN(10, make_regularizer(method, 0.4, 1, 5.0, False)).eval(), torch.randn(4, 3, 32, 32)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    outputs = []
    for network in (model, traced):
        torch.manual_seed(0)
        outputs.append(network.train()(x))
    assert torch.equal(*outputs)
    assert [layer.distorted.item() for layer in regularizer_layers(traced)] == pytest.approx([0.4] * 2, abs=0.03)


@pytest.mark.parametrize("method", ["dropout", "disout"])
def test_methods_act_on_single_features_and_add_no_entry(method):
    model = CNN(10, make_regularizer(method, 0.4, 1, 0.0, False)).train()
    assert model.state_dict().keys() == CNN().state_dict().keys()
    x, layer = torch.ones(500, 40), model.hidden1
    y = layer(x, torch.randn(3, 40))
    assert (y == 0).float().mean().item() == pytest.approx(layer.distorted.item()) == pytest.approx(0.4, abs=0.02)
    assert y.max().item() == pytest.approx(1 / 0.6, rel=0.03)
    assert ((y == 0).any(0) & (y != 0).any(0)).all() and ((y == 0).any(1) & (y != 0).any(1)).all()
    assert layer.eval()(x) is x


def test_its_defaults_are_its_own_and_flags_still_count():
    args, settings, defaults = train.parse_arguments(["--model", "cnn"])
    assert {name: settings[name] for name in train.CNN_RECIPE} == train.CNN_RECIPE
    assert (args.name, settings["depth"], settings["alpha"]) == ("cifar10-cnn-disout-s0", 0, 500.0)
    assert defaults["model"] == "resnet"  # that a run had whose config.json does not say
    _, settings, _ = train.parse_arguments(["--lr", "0.3", "--model", "cnn", "--method", "dropout", "--epochs", "7"])
    assert [settings[name] for name in ("lr", "epochs", "block_size", "alpha")] == [0.3, 7, 0, 0]
    assert train.parse_arguments(["--model", "resnet"])[1] == train.parse_arguments([])[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--depth", "20"), ("--depth", "ResNet")),
        (("--depth", "56"), ("--depth", "ResNet")),
        (("--method", "dropblock"), ("--method", "dropblock", "disout")),
        (("--method", "spatial_dropout"), ("--method", "dropout")),
        (("--method", "drop_path"), ("--method", "none")),
        (("--block_size", "6"), ("--block_size", "1")),
        (("--method", "dropout", "--block_size", "2"), ("--block_size",)),
        (("--inside",), ("--inside",)),
        (("--method", "dropout", "--compile"), ("--compile",)),
    ],
)
def test_what_makes_no_sense_for_it_is_refused(refused, tmp_path, flags, words):
    message = refused(*SHORT, *flags)
    assert all(word in message for word in words)
    assert not list(tmp_path.iterdir())


def test_the_folder_says_what_it_is_and_another_network_does_not_go_on_with_it(run, refused):
    folder = run(*SHORT, "--method", "disout")
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    assert [config[name] for name in ("model", "depth", "block_size")] == ["cnn", 0, 1]
    assert (summary["model"], summary["depth"], summary["parameters"]) == ("cnn", 0, 10_072_042)
    assert metrics(folder)[-1]["distorted"] == pytest.approx(train.CNN_RECIPE["dist_prob"], abs=0.02)
    message = refused(*SHORT[2:], "--resume")
    assert "model: cnn -> resnet" in message


def test_resumed_equals_uninterrupted_and_evaluate_gives_the_recorded_accuracy(run, monkeypatch, capsys):
    whole = run(*SHORT, name="whole")
    evaluate, calls = train.evaluate, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*SHORT, name="stopped")
    monkeypatch.undo()
    stopped = run(*SHORT, "--resume", name="stopped")
    assert "going on after epoch 1" in capsys.readouterr().out
    assert without_times(metrics(stopped)) == without_times(metrics(whole))
    assert same(*(torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (stopped, whole)))
    run(*SHORT, "--evaluate", str(whole / "best.pt"))
    assert f"top1 {read_json(whole / 'summary.json')['best_top1']:.2f} %" in capsys.readouterr().out


def test_the_rate_grows_unless_it_is_constant(run):
    flags = (*SHORT, "--method", "dropout", "--dist_prob", "0.4")
    grown, constant = run(*flags, name="grown"), run(*flags, "--constant_prob", name="constant")
    assert [row["dist_prob"] for row in metrics(grown)] == pytest.approx([0.4 / 3, 0.4], rel=1e-4)
    assert [row["dist_prob"] for row in metrics(constant)] == [0.4, 0.4]
    assert metrics(constant)[0]["distorted"] == pytest.approx(0.4, abs=0.02)
    assert read_json(constant / "config.json")["constant_prob"] is True


def test_the_summary_has_the_training_accuracy_of_the_last_weights_without_distortion(run, monkeypatch):
    """Which no row of a run with a rate has."""
    whole = run(*SHORT, "--method", "disout", "--dist_prob", "0.9", name="whole")
    config, summary = read_json(whole / "config.json"), read_json(whole / "summary.json")
    model = CNN()
    load_weights(whole / "checkpoint.pt", model)
    train_images, _, mean, std = data.load_parts(config["dataset"], config["data_root"], 20, 20, torch.device("cpu"))
    top1 = evaluate(model, data.test_batches(train_images, mean, std))["test_top1"]
    assert summary["learned_top1"] == pytest.approx(top1)
    assert "learned_top1" not in metrics(whole)[-1]


def test_the_size_of_the_noise_in_trained_networks_is_that_of_the_layer(run, tmp_path):
    folder = run(*SHORT, "--method", "disout", "--alpha", "50", name="disout").parent
    run(*SHORT, "--method", "none", name="none")
    noise_size.main([str(folder)])
    rows = (folder / "noise_size.csv").read_text().splitlines()
    assert [row.rsplit(",", 1)[0] for row in rows] == ["run,alpha,layer", *(f"disout,50.0,hidden{i}" for i in (1, 2))]
    model = CNN(10, make_regularizer("disout", 0.5, 1, 50.0, False)).train()
    load_weights(folder / "disout/checkpoint.pt", model)
    x = torch.randn(500, 2048)
    for row, layer, weight in zip(rows[1:], (model.hidden1, model.hidden2), (model.fc2, model.fc3), strict=True):
        y = layer(x, weight.weight)
        kept = (y * (1 - layer.distorted) - x).abs() < 1e-5
        noise = (y * (1 - layer.distorted))[~kept].std() / x.std()
        assert float(row.rsplit(",", 1)[1]) == pytest.approx(noise.item(), rel=0.02)
    with pytest.raises(UsageError, match="no complete run"):
        noise_size.main([str(tmp_path / "none")])


def test_compiled_training_gives_the_same(run, graphs):
    compiled, eager = run(*SHORT, "--compile", name="compiled"), run(*SHORT, name="eager")
    assert graphs.frame_count == 2  # training, evaluation
    for ours, theirs in zip(metrics(compiled), metrics(eager), strict=True):
        assert without_times([ours])[0] == pytest.approx(without_times([theirs])[0], rel=1e-3)
