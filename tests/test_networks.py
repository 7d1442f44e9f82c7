import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from models.regularizers import make_regularizer, regularizer_layers
from models.resnet_cifar import ResNet
from models.resnet_imagenet import ResNet50


class Spy(nn.Module):
    """Takes the place of a regularizer's layer and keeps the weight that it is handed."""

    def forward(self, x, next_weight=None, groups=None):
        self.reader, self.channels, self.groups = next_weight, x.shape[1], groups
        return x


def disout_network(depth):
    return ResNet(depth, 10, make_regularizer("disout", 0.09, 6, 5.0, False))


@pytest.mark.parametrize(("depth", "classes", "count"), [(56, 10, 855_578), (56, 100, 861_428), (20, 10, 272_282)])
def test_parameter_counts(depth, classes, count):
    assert sum(parameter.numel() for parameter in ResNet(depth, classes).parameters()) == count


def test_state_dict_names_are_the_authors_and_the_regularizer_adds_none():
    names = set(disout_network(14).state_dict())
    assert names == set(ResNet(14).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv.weight", "fc.weight", "fc.bias", *(f"bn.{entry}" for entry in norm)}
    for group in (1, 2, 3):
        for block in (0, 1):
            layer = f"layer{group}.{block}"
            expected |= {f"{layer}.conv1.weight", f"{layer}.conv2.weight"}
            expected |= {f"{layer}.{bn}.{entry}" for bn in ("bn1", "bn2") for entry in norm}
    assert names == expected | {"layer2.0.downsample.weight", "layer3.0.downsample.weight"}


def test_places_and_readers():
    asked = []
    model = ResNet(20, 10, lambda place, scale: asked.append((place, scale)) or Spy())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert asked == [("inner", 1.0), ("branch", 1.0)] * 3
    assert not any(isinstance(module, Spy) for group in (model.layer1, model.layer2) for module in group.modules())
    first, second, third = model.layer3
    readers = [layer.reader for block in model.layer3 for layer in (block.inner, block.branch)]
    expected = [first.conv2.weight, second.conv1.weight, second.conv2.weight, third.conv1.weight, third.conv2.weight]
    assert all(reader is weight for reader, weight in zip(readers, [*expected, None], strict=True))
    assert all(layer.groups == 1 for layer in model.modules() if isinstance(layer, Spy))


def test_disout_acts_in_the_whole_last_group_and_only_in_training():
    model, x = disout_network(20), torch.randn(4, 3, 32, 32)
    layers = regularizer_layers(model)
    assert [layer.dist_prob for layer in layers] == pytest.approx([0.09] * 6)
    plain = ResNet(20)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert all(layer.distorted == 0 for layer in layers)
    model.train()(x)
    assert all(layer.distorted > 0 for layer in layers)


def test_methods():
    assert regularizer_layers(ResNet(8, 10, make_regularizer("none", 0, 0, 0, False))) == []
    dropblock = make_regularizer("dropblock", 0.1, 4, 5.0, True)("branch", 0.25)
    assert (dropblock.alpha, dropblock.block_size, dropblock.inside) == (0, 4, True)
    assert dropblock.dist_prob == pytest.approx(0.025)


def test_convolutions_start_with_the_authors_deviation():
    conv = ResNet(56).layer3[4].conv1
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)


@pytest.mark.parametrize("depth", [2, 9, 55])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=str(depth)):
        ResNet(depth)


def test_resnet50_is_torchvisions():
    ours, theirs = ResNet50(), torchvision.models.resnet50()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 25_557_032
    x = torch.randn(2, 3, 64, 64)
    for source, target in ((theirs, ours), (ours, theirs)):
        for parameter in source.parameters():
            nn.init.normal_(parameter, std=0.05)
        target.load_state_dict(source.state_dict())
        for model in (source.train(), target.train()):
            model(x)  # moves the batch-norm statistics of both
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_places_and_readers_in_resnet50():
    """Groups 3 and 4 only, the third at a quarter of the rate; the next weight crosses the border between them."""
    asked = []
    model = ResNet50(10, lambda place, scale: asked.append((place, scale)) or Spy())
    model(torch.randn(2, 3, 64, 64))
    places = ("inner", "inner", "branch", "shortcut")
    assert asked == [(place, 0.25) for _ in range(6) for place in places] + [(p, 1.0) for _ in range(3) for p in places]
    assert not any(isinstance(module, Spy) for group in (model.layer1, model.layer2) for module in group.modules())
    blocks = [*model.layer3, *model.layer4]
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        outer = following.conv1.weight if following else None
        expected = [block.conv2.weight, block.conv3.weight, outer, outer]
        layers = [block.inner1, block.inner2, block.branch, block.shortcut]
        assert all(layer.reader is weight for layer, weight in zip(layers, expected, strict=True))
        assert all(layer.groups == 1 for layer in layers)


def test_resnet50_with_disout_has_its_rates_and_no_more_entries():
    model = ResNet50(10, make_regularizer("disout", 0.08, 7, 1.0, False))
    assert [layer.dist_prob for layer in regularizer_layers(model)] == pytest.approx([0.02] * 24 + [0.08] * 12)
    assert model.state_dict().keys() == ResNet50(10).state_dict().keys()


# What each method drops as a whole, of a map (N, C, H, W): the dimensions that its mask varies over.
@pytest.mark.parametrize(("method", "dims"), [("dropout", 4), ("spatial_dropout", 2), ("drop_path", 1)])
def test_dropping_methods(method, dims):
    layer = make_regularizer(method, 0.6, 0, 0, False)("branch", 0.5)
    torch.manual_seed(0)
    x = torch.ones(400, 50, 2, 2)
    y = layer(x, torch.ones(3, 50, 1, 1))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    units = y.flatten(dims).flatten(0, dims - 1) if dims < 4 else y.flatten()[:, None]
    assert ((units == 0).all(1) == (units == 0).any(1)).all()
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / len(units)) ** 0.5)
    assert layer.distorted.item() == pytest.approx((y == 0).float().mean().item())
    layer.dist_prob = 0.0
    assert torch.equal(layer(x), x)
    assert layer.eval()(x) is x


def test_drop_path_acts_on_branches_alone():
    regularizer = make_regularizer("drop_path", 0.1, 0, 0, False)
    assert regularizer("inner", 1.0) is regularizer("shortcut", 1.0) is None


@pytest.mark.parametrize("method", ["disout", "dropblock", "dropout", "spatial_dropout", "drop_path"])
def test_a_feature_extractor_gives_the_networks_features_and_distorts_in_training(method):
    model, x = ResNet(14, 10, make_regularizer(method, 0.5, 3, 5.0, False)), torch.randn(4, 3, 32, 32)
    extractor = create_feature_extractor(model.eval(), ["layer3"])
    features = extractor(x)["layer3"]
    wanted = model(x)
    torch.testing.assert_close(model.fc(model.bn(features).relu().mean((2, 3))), wanted)
    layers = regularizer_layers(extractor.train())
    assert len(layers) == len(regularizer_layers(model)) and all(layer.distorted == 0 for layer in layers)
    assert not torch.equal(*(extractor(x)["layer3"] for _ in range(2)))
    assert all(layer.distorted > 0 for layer in layers)


def test_resnet50_is_traced_in_training_and_distorts():
    traced = torch.fx.symbolic_trace(ResNet50(10, make_regularizer("disout", 0.5, 3, 1.0, False)).train())
    traced(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(regularizer_layers(traced)) == 36 and all(layer.distorted > 0 for layer in regularizer_layers(traced))
