import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.ao import quantization
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint_sequential

from disout import strength
from disout_attach import Hook, attach
from models.cnn import CNN
from models.regularizers import make_regularizer, regularizer_layers
from models.resnet_cifar import ResNet
from models.resnet_imagenet import ResNet50

models = torchvision.models


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        states, _ = self.lstm(x)
        return self.fc(states[:, -1])


# Network, input, where, and the reader of some of the maps.
NETWORKS = {
    "resnet50": (
        models.resnet50,
        (2, 3, 64, 64),
        ["layer[34].*.conv?", "layer4.*.bn3", "layer4.0.downsample"],
        {
            "layer3.0.conv1": "layer3.0.conv2",
            "layer3.5.conv3": "layer4.0.conv1 (first of 2)",
            "layer4.0.downsample": "layer4.1.conv1 (first of 3)",
            "layer4.0.bn3": "layer4.1.conv1 (first of 3)",
            "layer4.2.conv3": "fc",
        },
    ),
    "densenet121": (
        models.densenet121,
        (2, 3, 64, 64),
        ["features.denseblock4.*.conv2", "features.conv0"],
        {
            "features.conv0": "features.denseblock1.denselayer1.conv1 (first of 7)",
            "features.denseblock4.denselayer15.conv2": "features.denseblock4.denselayer16.conv1 (first of 2)",
            "features.denseblock4.denselayer16.conv2": "classifier",
        },
    ),
    "vgg16_bn": (
        lambda: models.vgg16_bn(num_classes=10),
        (2, 3, 64, 64),
        ["features.3[47]", "features.43"],
        {"features.34": "features.37", "features.37": "features.40", "features.43": "classifier.0"},
    ),
    "mobilenet_v2": (
        models.mobilenet_v2,
        (2, 3, 64, 64),
        ["features.1[67].conv.*"],
        {
            "features.16.conv.0": "features.16.conv.1.0",  # depthwise
            "features.16.conv.1": "features.16.conv.2",
            "features.16.conv.3": "features.17.conv.0.0",
        },
    ),
    "efficientnet_b0": (
        models.efficientnet_b0,
        (2, 3, 64, 64),
        ["features.6.*.block.1", "features.6.*.block.3", "features.8"],
        {
            "features.6.1.block.1": "features.6.1.block.3.0",  # not the gate between them
            "features.6.1.block.3": "features.6.2.block.0.0 (first of 3)",
            "features.8": "classifier.1",
        },
    ),
    "convnext_tiny": (
        models.convnext_tiny,
        (2, 3, 64, 64),
        ["features.7.*.block.*", "features.7.2"],
        {
            "features.7.0.block.0": "features.7.0.block.3",  # through a permutation
            "features.7.0.block.4": "features.7.0.block.5",
            "features.7.0.block.5": "features.7.1.block.0 (first of 3)",
            "features.7.2": "classifier.2",
        },
    ),
    "timm resnet26": (
        lambda: timm.create_model("resnet26", num_classes=7),
        (2, 3, 64, 64),
        ["layer4.*.conv?", "layer4.0"],
        {"layer4.0.conv2": "layer4.0.conv3", "layer4.0": "layer4.1.conv1 (first of 2)", "layer4.1.conv3": "fc"},
    ),
    "MLP": (mlp, (4, 12), ["0", "4"], {"0": "3", "4": "5"}),
    "LSTM": (Recurrent, (4, 6, 5), "lstm", {"lstm": "fc"}),
    "1-D": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 5, 3)),
        (2, 4, 20),
        ["0", "2"],
        {"0": "3", "2": "3"},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, shape, where, readers = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    names, x = list(model.state_dict()), torch.randn(shape)
    handle = attach(model, where, dist_prob=0.5, block_size=3, alpha=5.0)
    lines = dict(line.split(" -> ") for line in str(handle).splitlines())
    assert lines.keys() == handle.layers.keys()
    assert {place: lines[place] for place in readers} == readers
    assert list(model.state_dict()) == names
    model.train()(x).float().sum().backward()
    assert all(0.05 < layer.distorted < 0.95 for layer in handle.layers.values())
    handle.remove()
    assert not regularizer_layers(model) and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "places", "count"),
    [
        (lambda made: ResNet(56, 10, made), {"inner": "{}.conv1", "branch": "{}.conv2"}, 17),
        (
            lambda made: ResNet50(10, made),
            {"inner1": "{}.bn1", "inner2": "{}.bn2", "branch": "{}.bn3", "shortcut": "{}.downsample"},
            28,
        ),
        (lambda made: CNN(10, made), {"hidden1": "relu1", "hidden2": "relu2"}, 2),
    ],
)
def test_the_readers_are_those_of_our_own_wiring(make, places, count):
    """Of every map that a module returns; a shortcut without a projection is none."""
    wired = make(make_regularizer("disout", 0.1, 3, 1.0, False))
    parameters = {id(parameter): name.removesuffix(".weight") for name, parameter in wired.named_parameters()}
    read = {}

    def note(to, _layer, inputs, _output):
        if inputs[1] is not None:
            read[to] = parameters[id(inputs[1])]

    for name, module in wired.named_modules():
        block, _, place = name.rpartition(".")
        if place in places and (place != "shortcut" or wired.get_submodule(block).downsample):
            module.register_forward_hook(partial(note, places[place].format(block)))
    wired.train()(torch.randn(2, 3, 32, 32))
    assert len(read) == count
    handle = attach(make(None), list(read), 0.1)
    assert {line.split(" -> ")[0]: line.split(" -> ")[1].split(" (")[0] for line in str(handle).splitlines()} == read


@pytest.fixture
def network():
    """A small network with a map that a convolution reads through a batch norm, and one that a linear layer reads."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def drawn(model, x):
    """What the model gives for x with the draws of one seed."""
    torch.manual_seed(3)
    return model(x)


def test_the_distortion_is_that_of_the_readers_weight(network, x):
    handle = attach(network, ["0", "3"], 0.5, 3, 5.0)
    found = {}
    for name, layer in handle.layers.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: (*inputs, output)}))
    drawn(network, x)
    for name, reader in (("0", network[3]), ("3", network[6])):
        assert found[name][1] is reader.weight
        assert (found[name][2] != found[name][0]).any()


def test_a_part_of_a_concatenation_and_a_flattened_map_read_their_part_of_the_weight():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Conv2d(9, 2, 3)
            self.fc = nn.Linear(2 * 16, 3)

        def forward(self, x):
            return self.fc(self.c(torch.cat([self.a(x), self.b(x).relu()], 1)).flatten(1))

    model, weights = Joined(), {}
    handle = attach(model, ["a", "b", "c"], 0.5, 3)
    for name, layer in handle.layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: weights.update({name: inputs[1]}))
    model(torch.randn(2, 3, 8, 8))
    largest = model.c.weight.amax(0, keepdim=True)
    assert torch.equal(weights["a"], largest[:, :4]) and torch.equal(weights["b"], largest[:, 4:])
    assert torch.equal(weights["c"], model.fc.weight.view(3, 2, 16))


def test_evaluation_and_removal_leave_the_network_as_it_was(network, x):
    before = drawn(network.train(), x)
    with attach(network, "0", 0.5) as handle:
        assert not torch.equal(drawn(network, x), before)
        network.eval()
        assert not handle.layers["0"].training
        assert torch.equal(network(x), network(x))
        network.train()
    assert torch.equal(drawn(network, x), before)
    handle.remove()
    assert len(list(network.children())) == 7


def test_a_layer_left_behind_in_an_exchanged_module_does_not_distort_in_evaluation():
    model = models.resnet18(num_classes=4).train()
    handle = attach(model, "layer4.1", 0.5, 3, 5.0)
    model.layer4[1].conv1 = nn.Conv2d(512, 512, 3, padding=1, bias=False)  # which hosted it
    x = torch.randn(2, 3, 64, 64)
    model(x)
    assert handle.layers["layer4.1"].training and handle.layers["layer4.1"].distorted > 0
    model.eval()
    assert torch.equal(model(x), model(x))
    handle.set_dist_prob(0.3)
    handle.remove()


@pytest.mark.filterwarnings("ignore")  # torch's, that it moves to torchao
def test_quantization_aware_training_takes_the_hooks_along(network, x):
    network.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    handle = attach(network, ["0", "3"], 0.5, 3, 5.0)
    quantization.prepare_qat(network, inplace=True)
    network(x).sum().backward()
    assert all(layer.distorted > 0 for layer in handle.layers.values())
    handle.set_dist_prob(0.3)
    for layer in handle.layers.values():
        layer.distorted.zero_()
    network.eval()(x)  # in which the observers move on, so two outputs differ
    assert not any(layer.distorted for layer in handle.layers.values())
    handle.remove()
    left = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    assert not any(isinstance(hook, Hook) for hook in left)


@pytest.mark.filterwarnings("ignore")  # torch's, that it moves to torchao
def test_a_network_fused_and_converted_for_use_does_not_distort(x):
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    network = nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub()).train()
    handle = attach(network, "3", 0.5, 3, 5.0)
    quantization.fuse_modules_qat(network, ["1", "2", "3"], inplace=True)
    network.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(network, inplace=True)
    network(x)
    assert handle.layers["3"].distorted > 0
    converted = quantization.convert(network.eval())
    assert converted[1].training  # as convert() makes it
    assert torch.equal(converted(x), converted(x))


def test_asking_whether_readers_were_exchanged_computes_no_weight(x):
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 3)))
    handle = attach(network.train(), "0", 0.5, 3, 5.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    handle.set_dist_prob(0.3)  # each time that the weight is computed changes spectral_norm's buffers
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_after_a_module_without_weights_is_on_its_readers_device():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    network[2].to("meta")  # a network that is split behind its first layer
    [layer] = attach(network, "1", 0.5).layers.values()
    assert layer.distorted.device.type == "meta"


def test_layers_can_be_switched_off_on_their_own(network, x):
    handle = attach(network.train(), ["0", "3"], 0.5, 3, 5.0)
    for layer in handle.layers.values():
        layer.eval()
    before = drawn(network, x)
    handle.remove()
    assert torch.equal(drawn(network, x), before)


def test_a_frozen_batch_norm_is_distorted_as_its_parent_trains():
    """Its own mode says nothing, nor does it host any layer, not that of a block that begins with one either."""
    model = models.densenet121(num_classes=4).train()
    names = ["features.denseblock4.denselayer1.norm2", "features.denseblock4.denselayer2", "features.norm5"]
    handle = attach(model, names, 0.5, 3, 5.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 64, 64)
    model(x)
    assert all(layer.distorted > 0 for layer in handle.layers.values())
    model.eval()
    assert torch.equal(model(x), model(x))


def test_hooks_that_are_gone_are_said(network, x):
    handle = attach(network, ["0", "1"], 0.5, 3)
    network[1] = nn.SyncBatchNorm.convert_sync_batchnorm(network[1])
    with pytest.raises(RuntimeError, match=r"hooks of 1 are gone.*attach again"):
        handle.set_dist_prob(0.3)
    handle.remove()
    with attach(network, ["0", "1"], 0.5, 3) as handle:
        handle.set_dist_prob(0.3)
    copied, its_handle = copy.deepcopy((network, attach(network, ["0", "1"], 0.5, 3)))
    its_handle.set_dist_prob(0.1)
    copied[0] = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(RuntimeError, match="hooks of 0 are gone"):
        its_handle.set_dist_prob(0.1)


def test_a_reader_that_is_exchanged_is_said_but_not_one_that_keeps_its_weight(network):
    handle = attach(network, "0", 0.5, 3)
    kept, network[3] = network[3], nn.Conv2d(8, 4, 3)
    with pytest.raises(RuntimeError, match=r"reads 0, 3, was exchanged.*attach again"):
        handle.set_dist_prob(0.3)
    network[3].weight = kept.weight
    handle.set_dist_prob(0.3)
    nn.utils.parametrizations.weight_norm(network[3])
    _, its_handle = copy.deepcopy((network, attach(network, "0", 0.5, 3)))
    its_handle.set_dist_prob(0.1)


def test_the_rate_of_all_layers_is_set_at_once(network):
    handle = attach(network, ["0", "3"], 0.5)
    handle.set_dist_prob(0.25)
    assert [layer.dist_prob for layer in handle.layers.values()] == [0.25, 0.25]
    with pytest.raises(ValueError, match="dist_prob"):
        handle.set_dist_prob(2)


def test_a_deep_copy_reads_its_own_weights(network, x):
    attach(network, "0", 0.5, 3, 5.0)
    copied = copy.deepcopy(network)
    expected = drawn(copied, x).detach()
    network[3].weight.data.zero_()
    assert torch.equal(drawn(copied, x), expected)
    copied[3].weight.data *= 2
    assert not torch.equal(drawn(copied, x), expected)


def test_the_state_dict_goes_to_a_network_with_and_without(network, x, tmp_path):
    attach(network, "0", 0.5)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    plain = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    plain.load_state_dict(weights)
    assert torch.equal(plain.eval()(x), network.eval()(x))
    network.load_state_dict(plain.state_dict())


def test_compiled_it_is_one_graph_while_the_rate_moves(network, x, graphs):
    handle = attach(network, ["0", "3"], 0.5, 3)
    compiled = torch.compile(network, fullgraph=True)
    for rate in (0.1, 0.3, 0.5):
        handle.set_dist_prob(rate)
        compiled(x).sum().backward()
    assert graphs.frame_count == 1


def test_autocast(network, x):
    handle = attach(network, ["0", "3"], 0.5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(layer.distorted > 0 for layer in handle.layers.values())


def test_an_averaged_model(network, x):
    attach(network, "0", 0.5, 3)
    averaged = AveragedModel(network)
    averaged.update_parameters(network)
    assert torch.equal(averaged.eval()(x), network.eval()(x))
    network[3].weight.data.zero_()
    averaged.train()(x)
    assert len(regularizer_layers(averaged)) == 1


def test_activation_checkpointing_draws_the_same_again(network, x):
    attach(network, ["0", "3"], 0.5, 3, 5.0)
    gradients = []
    for run in (network, lambda x: checkpoint_sequential(network, 2, x, use_reentrant=False)):
        network.zero_grad()
        drawn(run, x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_network_used_twice_in_a_step(network, x):
    attach(network, "0", 0.5, 3, 5.0)
    (network(x) - network(x + 1)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_ddp(network, x, tmp_path):
    attach(network, ["0", "3"], 0.5, 3, 5.0)
    drawn(network, x).square().sum().backward()
    alone = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/together", rank=0, world_size=1)
    try:
        drawn(nn.parallel.DistributedDataParallel(network), x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(alone, network.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours)


def test_readers_can_be_named(network, x):
    handle = attach(network, ["0", "3"], 0.5, 3, readers={"0": "6", "3": None})
    assert str(handle) == "0 -> 6\n3 -> no reader"
    with pytest.raises(ValueError, match="0 -> 6: the map has 8 channels, and this layer reads 6"):
        network(x)
    handle.remove()
    assert str(attach(network, ["0", "3"], 0.5, readers={"0": "3"})) == "0 -> 3\n3 -> 6"
    assert str(attach(network, "0", 0.5, readers=None)) == "0 -> no reader"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.relu(self.conv(self.relu(x))).mean((2, 3)))


class Branches(Twice):
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3))) if x.sum() > 0 else self.fc(x.mean((2, 3)))


class Shuffled(Twice):
    def forward(self, x):
        return self.fc(self.conv(x).unflatten(1, (3, 1)).flatten(1)[:, :3])


@pytest.mark.parametrize(
    ("model", "where", "how", "words"),
    [
        (Twice(), "relu", {}, ("relu", "2 times")),
        (Branches(), "conv", {}, ("cannot trace", "readers=")),
        (Shuffled(), "conv", {}, ("conv", "unflatten", "readers=")),
        (Twice(), "fc", {}, ("fc", "no convolution or linear layer", "readers=")),
        (Twice(), "conv7", {}, ("where", "conv7")),
        (Twice(), "", {}, ("where",)),
        (Twice(), [], {}, ("where",)),
        (Twice(), "conv", {"readers": {"relu": "fc"}}, ("readers", "'relu'")),
        (Twice(), "conv", {"readers": {"conv": "relu"}}, ("readers", "'relu'")),
        (Twice(), "conv", {"readers": {"conv": "nowhere"}}, ("readers", "'nowhere'")),
        (Twice(), "conv", {"dist_prob": 2.0}, ("dist_prob", "2.0")),
        (Twice(), "conv", {"block_size": 0}, ("block_size",)),
    ],
)
def test_what_cannot_be_told_is_one_sentence_and_changes_nothing(model, where, how, words):
    with pytest.raises(ValueError) as error:
        attach(model, where, **{"dist_prob": 0.1} | how)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message
    assert not regularizer_layers(model) and not any(module._forward_hooks for module in model.modules())
    named = attach(model, "conv", 0.1, readers={"conv": "fc"})  # as the sentence says
    assert model.train()(torch.randn(2, 3, 4, 4)).shape == (2, 2) and named.layers["conv"].distorted >= 0


def net(forward, **modules):
    """A network of these modules and this forward, a function of the network and its input."""
    network = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(network, name, module)
    return network


def optional(network, x, mask=None, twice=False):
    y = network.a(x)
    if mask is not None:
        y = y + network.c(y) * mask
    return network.b(network.b(y)) if twice else network.b(y)


class Same(nn.Module):
    def forward(self, x):
        return x


conv, conv1d, linear = partial(nn.Conv2d, kernel_size=1), partial(nn.Conv1d, kernel_size=1), nn.Linear
lstm, ones = partial(nn.LSTM, batch_first=True), torch.ones

# What is attached to, and the reader; None where it must be refused rather than guessed.
FORWARDS = {
    "linear over the last side of a map": (net(lambda n, x: n.b(n.a(x)), a=conv1d(3, 16), b=linear(64, 10)), "a", None),
    "view that mixes samples": (net(lambda n, x: n.b(n.a(x).view(32, -1)), a=conv(3, 16), b=linear(64, 10)), "a", None),
    "view": (net(lambda n, x: n.b(n.a(x).view(x.size(0), -1)), a=conv(3, 16), b=linear(64, 10)), "a", "b"),
    "mean over features": (net(lambda n, x: n.b(n.a(x).mean(2)), a=linear(8, 16), b=linear(16, 3)), "a", None),
    "pooled features": (
        net(lambda n, x: n.b(n.pool(n.a(x))), a=linear(8, 16), b=linear(16, 3), pool=nn.AvgPool1d(3, 1, 1)),
        "a",
        None,
    ),
    "mean over time": (net(lambda n, x: n.b(n.a(x).mean(1)), a=linear(8, 16), b=linear(16, 3)), "a", "b"),
    "flattened states": (net(lambda n, x: n.b(n.a(x)[0].flatten(1)), a=lstm(8, 16), b=linear(128, 3)), "a", "b"),
    "permuted and flattened": (
        net(lambda n, x: n.b(n.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 16), b=linear(64, 3)),
        "a",
        "b",
    ),
    "flattened beside other features": (
        net(
            lambda n, x, t: n.b(torch.cat([n.a(x).flatten(1), n.c(t)], 1)),
            a=conv(3, 16),
            b=linear(320, 3),
            c=linear(4, 64),
        ),
        "a",
        None,
    ),
    "pooled beside itself": (
        net(lambda n, x: n.b(torch.cat([y := n.a(x), y.relu()], 1)), a=conv(3, 4), b=conv(8, 3)),
        "a",
        None,
    ),
    "chosen channels": (net(lambda n, x: n.b(n.a(x)[:, [1, 0, 2]]), a=conv(3, 3), b=conv(3, 3)), "a", "b"),
    "channels that nothing reads": (net(lambda n, x: n.b(n.a(x)[:, :2]), a=conv(3, 3), b=conv(2, 3)), "a", None),
    "a channel that is read twice": (
        net(lambda n, x: n.b(n.a(x)[:, [0, 1, 0]]), a=conv(3, 2), b=conv(3, 3)),
        "a",
        None,
    ),
    "half times the other half": (
        net(lambda n, x: n.b((y := n.a(x).chunk(2, 1))[0] * y[1].sigmoid()), a=conv(3, 8), b=conv(4, 3)),
        "a",
        None,
    ),
    "pixels for channels": (
        net(lambda n, x: n.b((y := n.a(x)).view(y.size(0), y.size(2), y.size(1), -1)), a=conv(3, 8), b=conv(8, 3)),
        "a",
        None,
    ),
    "a shuffle of samples": (net(lambda n, x: n.b(n.a(x).view(-1, 4, 2, 2)), a=conv(3, 8), b=conv(4, 3)), "a", None),
    "an unfinished shuffle": (
        net(lambda n, x: n.b(n.a(x).unflatten(1, (2, 4)).mean(1)), a=conv(3, 8), b=conv(4, 3)),
        "a",
        None,
    ),
    "a transposed map": (
        net(lambda n, x: n.b((y := n.a(x)) + n.c(y.mT).mT), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)),
        "a",
        None,
    ),
    "a module that returns its input": (
        net(lambda n, x: n.c(n.b(y := n.a(x)) + n.same(y)), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3), same=Same()),
        "same",
        "c",
    ),
    "an empty container": (
        net(
            lambda n, x: n.c(n.b(y := n.a(x)) + n.empty(y)),
            a=conv(3, 3),
            b=conv(3, 3),
            c=conv(3, 3),
            empty=nn.Sequential(),
        ),
        "empty",
        "c",
    ),
    "features that were a map": (
        net(lambda n, x: n.b(n.drop(n.a(x).flatten(1))), a=conv(3, 4), b=linear(64, 3), drop=nn.Dropout()),
        "drop",
        "b",
    ),
    "a transposed sequence": (net(lambda n, x: n.b(n.a(x).transpose(1, 2)), a=conv1d(3, 8), b=linear(8, 3)), "a", "b"),
    "a gate": (net(lambda n, x: n.b(n.a(x) * n.c(x)), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)), "a", None),
    "squeeze and excitation": (
        net(lambda n, x: n.b((y := n.a(x)) * n.c(y.mean((2, 3), True))), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)),
        "a",
        "b",
    ),
    "a gate as large as the map": (
        net(lambda n, x: n.b((y := n.a(x)) * n.c(y)), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)),
        "a",
        "c",
    ),
    "a gate that is read too": (
        net(
            lambda n, x: n.b((y := n.a(x)) * (z := n.c(y.mean((2, 3), True))) + z),
            a=conv(3, 3),
            b=conv(3, 3),
            c=conv(3, 3),
        ),
        "a",
        "c",
    ),
    "a scale": (
        net(lambda n, x: n.b(n.a(x) * n.g.reshape(1, -1, 1, 1)), a=conv(3, 4), b=conv(4, 3), g=nn.Parameter(ones(4))),
        "a",
        "b",
    ),
    "a recurrent reader": (
        net(lambda n, x: n.c(n.b(n.a(x)[0])[0]), a=lstm(8, 16), b=lstm(16, 16), c=linear(16, 3)),
        "a",
        "b",
    ),
    "a state": (
        net(lambda n, x, z: n.b(n.e(x), n.a(z))[1], e=nn.Embedding(9, 4), a=linear(3, 4), b=nn.GRU(4, 4)),
        "a",
        None,
    ),
    "an input that is the state too": (
        net(lambda n, x: n.b(y := n.a(x), y[:1])[1], a=linear(4, 4), b=nn.GRU(4, 4)),
        "a",
        None,
    ),
    "an input beside a state": (net(lambda n, x, z: n.b(n.a(x), z)[1], a=linear(3, 4), b=nn.GRU(4, 4)), "a", "b"),
    "an embedding": (net(lambda n, x: n.b(n.a(x))[0], a=nn.Embedding(9, 4), b=nn.GRU(4, 3)), "a", "b"),
    "a partly flattened map": (net(lambda n, x: n.b(n.a(x).flatten(1, 2)), a=conv(1, 4), b=linear(8, 3)), "a", None),
    "a map that is stretched to another": (
        net(lambda n, x: n.b(n.a(x) + n.c(x)), a=conv(3, 1), b=conv(8, 3), c=conv(3, 8)),
        "a",
        None,
    ),
    "a map that is stretched to something unknown": (
        net(lambda n, x: n.b((n.a(x) + x).flatten(1)), a=conv(8, 1), b=linear(128, 3)),
        "a",
        None,
    ),
    "named arguments of a concatenation": (
        net(lambda n, x: n.b(torch.concat(tensors=[x, n.a(x)], axis=1)), a=conv(3, 4), b=conv(7, 3)),
        "a",
        None,  # the channels of the input are not known
    ),
    "an optional argument": (net(optional, a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)), "a", "b"),
    "a choice by chance": (
        net(
            lambda n, x: n.b(n.a(x)) if torch.rand(()) > 0.5 else n.c(n.a(x)), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)
        ),
        "a",
        None,
    ),
    "a tuple": (net(lambda n, x: n.b(n.a(x)[0]), a=net(lambda n, x: (x, x)), b=conv(3, 3)), "a", None),
}


def shuffled(x):
    n, channels, height, width = x.shape
    return x.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(n, channels, height, width)


SHUFFLES = {
    "by hand": shuffled,
    "unflatten": lambda x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
    "torch's": lambda x: nn.functional.channel_shuffle(x, 2),
    "torch's module": nn.ChannelShuffle(2),
    "chosen": lambda x: x[:, [0, 3, 1, 4, 2, 5]],
    "chunks": lambda x: torch.cat([x[:, channel : channel + 1] for channel in (0, 3, 1, 4, 2, 5)], 1),
}


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("how", SHUFFLES)
def test_a_shuffled_map_reads_the_weight_in_its_own_order(how, groups):
    model = net(
        lambda n, x: n.b(n.shuffle(n.a(x))), a=conv(3, 6), b=nn.Conv2d(6, 12, 3, groups=groups), shuffle=SHUFFLES[how]
    )
    layer, weights = attach(model, "a", 0.5, 3).layers["a"], []
    layer.register_forward_pre_hook(lambda _, inputs: weights.append(inputs[1]))
    model(torch.randn(2, 3, 8, 8))
    largest = model.b.weight.view(groups, 12 // groups, 6 // groups, 3, 3).amax(1).reshape(6, 3, 3)  # as they are read
    assert torch.equal(weights[0].amax(0), largest[[0, 2, 4, 1, 3, 5]])


def test_each_channel_of_a_shuffle_network_is_read_by_the_layer_that_it_reaches_first():
    """That whose input is the first to change with the channel."""
    model, place, x = models.shufflenet_v2_x0_5().eval(), "stage2.0.branch2.7", torch.randn(2, 3, 64, 64)

    def inputs(channel):
        seen = []
        change = lambda _module, _inputs, y: y + (torch.arange(24) == channel)[:, None, None]  # noqa: E731
        hooks = [model.get_submodule(place).register_forward_hook(change)]
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                hooks.append(module.register_forward_pre_hook(lambda module, given: seen.append((module, given[0]))))
        model(x)
        for hook in hooks:
            hook.remove()
        return seen

    expected, plain, readers = [], inputs(-1), set()
    for channel in range(24):
        pairs = zip(plain, inputs(channel), strict=True)
        changes = ((reader, (before != after).any(0).any(-1).any(-1)) for (reader, before), (_, after) in pairs)
        reader, changed = next((reader, changed) for reader, changed in changes if changed.any())
        [column], weight = changed.nonzero().flatten().tolist(), reader.weight.detach()
        expected.append(weight[column].mean() if reader.groups > 1 else 0.1 * weight[:, column].max())
        readers.add(reader)
    assert {reader.groups > 1 for reader in readers} == {True, False} and len(readers) == 4

    handle, weights = attach(model, place, 0.5), []
    handle.layers[place].register_forward_pre_hook(lambda _, given: weights.append(given[1]))
    model.train()(x)
    torch.testing.assert_close(strength(weights[0], torch.ones(24, 9)), torch.stack(expected))
    assert str(handle).endswith("stage3.0.branch1.0 (12 + 6 + 3 + 3 channels)")


def halves(network, x):
    left, right = network.a(x).chunk(2, 1)
    return network.d(left) + network.e(right)


def test_two_halves_are_read_by_two_layers_whose_kernels_differ():
    model = net(halves, a=conv(3, 8), d=nn.Conv2d(4, 4, 3, padding=1, groups=4), e=conv(4, 4))
    handle, weights = attach(model, "a", 0.5, 3), []
    assert str(handle) == "a -> d + e (4 + 4 channels)"
    handle.layers["a"].register_forward_pre_hook(lambda _, inputs: weights.append(inputs[1]))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    of_halves = [model.d.weight.mean((1, 2, 3)), 0.1 * model.e.weight.amax((0, 2, 3))]
    torch.testing.assert_close(strength(weights[0], torch.ones(8, 9)), torch.cat(of_halves).detach())


def test_a_gate_is_called_one():
    with pytest.raises(ValueError, match=r"se\.fc2 is a gate: what it returns multiplies a map .* leave it out"):
        attach(models.regnet_y_400mf(), "*block4-0.f.se.fc2", 0.5)


class Untraceable(nn.Module):
    """Around a network."""

    def __init__(self, body, fc):
        super().__init__()
        self.body, self.fc = body, fc

    def forward(self, x):
        if x.sum() > 1e9:
            raise ValueError("too large")
        return self.fc(self.body(x).mean((2, 3)))


def test_of_an_untraceable_network_the_largest_part_that_can_be_traced_is_looked_at(x):
    group = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8))
    model = Untraceable(nn.Sequential(group, conv(8, 4)), linear(4, 2))
    handle = attach(model, ["body.0.0", "body.0.2"], 0.5)
    assert str(handle) == "body.0.0 -> body.0.2 (within body)\nbody.0.2 -> body.1 (within body)"
    model(x).sum().backward()
    assert all(layer.distorted > 0 for layer in handle.layers.values())
    handle.remove()
    with pytest.raises(ValueError, match=r'reads body\.1: name it, readers=\{"body\.1": "\.\.\."\}'):
        attach(model, "body.1", 0.5)
    assert str(attach(model, "body.1", 0.5, readers={"body.1": "fc"})) == "body.1 -> fc"
    outer = Untraceable(nn.Sequential(Untraceable(group, nn.Identity()), conv(8, 4)), linear(4, 2))
    assert str(attach(outer, "body.0.body.0", 0.5)) == "body.0.body.0 -> body.0.body.2 (within body.0.body)"
    with pytest.raises(ValueError, match=r"nor a part of it that holds body\.1: name it"):
        attach(outer, "body.1", 0.5)


def test_a_detector():
    detector = models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    handle = attach(detector, ["backbone.body.layer4.*.conv2", "backbone.body.layer4.2.conv3"], 0.1)
    assert str(handle).splitlines() == [
        *(
            f"backbone.body.layer4.{block}.conv2 -> backbone.body.layer4.{block}.conv3 (within backbone)"
            for block in (0, 1, 2)
        ),
        "backbone.body.layer4.2.conv3 -> backbone.fpn.inner_blocks.3.0 (within backbone)",
    ]


def test_the_readers_of_maps_with_three_sides():
    model = models.video.r3d_18()
    handle = attach(model, ["stem", "layer4.1.conv?", "layer4.1.conv1.1"], 0.1, block_size=3)
    lines = dict(line.split(" -> ") for line in str(handle).splitlines())
    assert lines == {
        "stem": "layer1.0.conv1.0 (first of 4)",
        "layer4.1.conv1": "layer4.1.conv2.0",
        "layer4.1.conv1.1": "layer4.1.conv2.0",
        "layer4.1.conv2": "fc",
    }
    assert not any(layer.features_last for layer in handle.layers.values())
    model(torch.randn(2, 3, 8, 32, 32)).sum().backward()  # a step of training
    assert handle.layers["stem"].distorted > 0 and model.stem[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_what_a_map_passes_is_known_whatever_the_number_of_its_sides(sides):
    make = {
        name: getattr(nn, f"{name}{sides}d") for name in ("Conv", "BatchNorm", "MaxPool", "AdaptiveAvgPool", "Dropout")
    }
    model = nn.Sequential(
        *(make["Conv"](2, 3, 1), make["BatchNorm"](3), make["MaxPool"](2), make["Dropout"](0.1), make["Conv"](3, 4, 1)),
        *(make["AdaptiveAvgPool"](1), nn.Flatten(), nn.Linear(4, 2)),
    )
    assert str(attach(model, ["0", "1", "4"], 0.1)) == "0 -> 4\n1 -> 4\n4 -> 7"
    last = (0, *range(2, 2 + sides), 1)

    def forward(n, x):
        y = n.drop(n.pool(torch.cat([n.a(x), n.a2(x)], 1)).relu())
        return n.b(y.transpose(1, 2) if sides == 1 else y.permute(last))

    functions = {"pool": f"adaptive_max_pool{sides}d", "drop": f"dropout{sides}d"}
    functions = {name: partial(getattr(nn.functional, function)) for name, function in functions.items()}
    functions["pool"] = partial(functions["pool"], output_size=2)
    model = net(forward, a=make["Conv"](2, 3, 1), a2=make["Conv"](2, 4, 1), b=linear(7, 2), **functions)
    assert str(attach(model, "a2", 0.1)) == "a2 -> b"


@pytest.mark.parametrize("name", FORWARDS)
def test_no_reader_is_guessed(name):
    model, where, reader = FORWARDS[name]
    if reader is None:
        with pytest.raises(ValueError, match=r"readers=|leave it out") as error:
            attach(model, where, 0.5)
        assert "\n" not in str(error.value)
    else:
        with attach(model, where, 0.5) as handle:
            assert str(handle).split(" -> ")[1].split(" (")[0] == reader
    assert not regularizer_layers(model)


def test_the_layout_of_a_named_readers_map_is_that_of_the_graph():
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4))
    for how in ({}, {"features_last": True}):
        with attach(model, "1", 0.5, readers={"1": "2"}, **how) as handle:
            model(torch.randn(2, 17, 8)).sum().backward()
            assert handle.layers["1"].features_last
    assert not attach(model, "1", 0.5, readers=None, features_last=False).layers["1"].features_last


def test_the_graph_is_that_of_training_and_the_modes_stay():
    model = net(lambda n, x: n.b(x) if n.training else n.c(n.a(x)), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)).eval()
    with pytest.raises(ValueError, match="a is not called"):
        attach(model, "a", 0.5)
    assert not any(module.training for module in model.modules())


def test_all_names_that_cannot_be_told_are_said():
    with pytest.raises(ValueError, match=r"fc2.*nor can be told: features\.7\.0"):
        attach(models.efficientnet_b0(), ["features.6.0.block.2.fc2", "features.7.0.block.2.fc2"], 0.5)


def test_model_and_handle_can_be_copied_together(network):
    handle = attach(network, "0", 0.5)
    copied, its_handle = copy.deepcopy((network, handle))
    its_handle.remove()
    assert not regularizer_layers(copied) and len(regularizer_layers(network)) == 1
    handle.remove()
    assert str(handle) == "" and not handle.layers


def test_a_map_whose_layout_nothing_shows_asks_for_it():
    """The network draws by chance, so its graph cannot be told, and only the reader is named."""
    model = net(lambda n, x: n.b(n.norm(x)) * torch.rand(()).item(), norm=nn.LayerNorm(16), b=linear(16, 3))
    with pytest.raises(ValueError, match=r"norm: say features_last=False .* or True"):
        attach(model, "norm", 0.5, readers={"norm": "b"})
    assert not regularizer_layers(model)
    attach(model, "norm", 0.5, readers={"norm": "b"}, features_last=True)
    model(torch.randn(2, 16, 16))


def pooled(y):
    return nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)


def two_pools(y):
    return torch.cat([nn.functional.adaptive_max_pool2d(y, 1), nn.functional.adaptive_avg_pool2d(y, 1)], 1).flatten(1)


# Ways from a map of 4 channels to a linear layer, and which columns of its weight read each channel.
HEADS = {
    "two maps": (lambda n, x: n.fc(torch.cat([pooled(n.a(x)), pooled(n.b(x))], 1)), 8, [[0], [1], [2], [3]]),
    "the second": (lambda n, x: n.fc(torch.cat([pooled(n.b(x)), pooled(n.a(x))], 1)), 8, [[4], [5], [6], [7]]),
    "beside features": (lambda n, x: n.fc(torch.cat([n.g(x[:, 0, 0]), pooled(n.a(x))], 1)), 6, [[2], [3], [4], [5]]),
    "two pools": (lambda n, x: n.fc(two_pools(n.a(x))), 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    "two reductions": (
        lambda n, x: n.fc(torch.cat([(y := n.a(x)).amax((2, 3)), y.mean((2, 3))], 1)),
        8,
        [[0, 4], [1, 5], [2, 6], [3, 7]],
    ),
    "a permutation": (
        lambda n, x: n.fc(n.a(x)[..., :1, :2].permute(0, 2, 3, 1).flatten(1)),
        8,
        [[0, 4], [1, 5], [2, 6], [3, 7]],
    ),
    "flattened": (lambda n, x: n.fc(n.a(x)[..., :1, :2].flatten(1)), 8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    "another order": (lambda n, x: n.fc(pooled(n.a(x)[:, [2, 0, 3, 1]])), 4, [[1], [3], [0], [2]]),
}


@pytest.mark.parametrize("readers", ["auto", {"a": "fc"}])
@pytest.mark.parametrize("way", HEADS)
def test_a_linear_layer_reads_with_the_columns_that_the_map_comes_to(way, readers):
    """A tenth where each column reads a number of its own, not one of a flattened map."""
    forward, features, columns = HEADS[way]
    model = net(forward, a=conv(3, 4), b=conv(3, 4), g=linear(8, 2), fc=linear(features, 5))
    layer, weights = attach(model, "a", 0.5, readers=readers).layers["a"], []
    layer.register_forward_pre_hook(lambda _, inputs: weights.append(inputs[1]))
    model(torch.randn(2, 3, 8, 8))
    largest = [max(model.fc.weight[:, column].tolist()) for column in range(features)]
    kernel = way in ("a permutation", "flattened")
    expected = [sum(largest[column] for column in of) / len(of) * (1 if kernel else 0.1) for of in columns]
    signs = torch.ones(4, *weights[0].shape[2:])
    assert strength(weights[0], signs).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("forward", "features"),
    [
        (lambda n, x: n.fc(torch.cat([n.a(x).flatten(1), n.b(x).flatten(1)], 1)), 512),  # which may differ in size
        (lambda n, x: n.fc(torch.cat([n.a(x), n.b(x)], 1).sort(1)[0].flatten(1)), 512),
        (lambda n, x: n.fc(n.a(x).flatten(1)) if x.sum() < 1e9 else x, 256),  # which cannot be traced
        (lambda n, x: n.fc(torch.cat([pooled(n.a(x)), pooled(n.a(x))], 1)), 8),
        (lambda n, x: n.fc(n.a(x)), 8),  # a side of the map
        (lambda n, x: n.fc(torch.cat([pooled(n.a(x)[:, :2]), pooled(n.b(x)[:, :2])], 1)), 4),  # half of each
    ],
)
def test_a_named_reader_that_the_map_cannot_be_followed_to_reads_no_view_that_fits(forward, features):
    model = net(forward, a=conv(3, 4), b=conv(3, 4), fc=linear(features, 5))
    with pytest.raises(ValueError, match=r"a -> fc: .* place a Disout layer by hand") as error:
        attach(model, "a", 0.5, readers={"a": "fc"})
        model.train()(torch.randn(2, 3, 8, 8))
    assert "\n" not in str(error.value)


def test_a_named_reader_does_not_read_a_state():
    model = net(lambda n, x, z: n.b(n.e(x), n.a(z))[1], e=nn.Embedding(9, 4), a=linear(3, 4), b=nn.GRU(4, 4))
    with pytest.raises(ValueError, match="a -> b: not read channel by channel"):
        attach(model, "a", 0.5, readers={"a": "b"})


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (net(lambda n, x: n.b(torch.cat([n.a(x), n.a(x)], 1)), a=linear(4, 8), b=linear(16, 3)), (2, 4)),
        (net(lambda n, x: n.b(n.a(x).chunk(2, 1)[0]), a=conv(3, 8), b=conv(4, 3)), (2, 3, 4, 4)),
    ],
)
def test_a_named_reader_that_does_not_fit_is_said_in_the_first_forward_at_the_latest(model, x):
    with pytest.raises(ValueError, match="a -> b: the map has 8 channels, and this layer reads"):
        attach(model, "a", 0.5, readers={"a": "b"})
        model(torch.randn(x))


def test_attaching_draws_no_random_number_and_leaves_buffers():
    model = timm.create_model("efficientnet_b0", num_classes=3)
    by_chance = net(lambda n, x: n.a(x) * torch.rand(()).item(), a=conv(3, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    attach(model, "blocks.1.0.conv_pw", 0.1)
    attach(by_chance, "a", 0.1, readers=None)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_module_that_calls_all_that_is_in_it_does_not_call_the_layer():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            for module in self.children():
                x = module(x)
            return x

    model, calls = nn.Sequential(All(), nn.Conv2d(3, 2, 1)), []
    attach(model, "0", 0.5).layers["0"].register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 4, 4))
    assert len(calls) == 1


def test_a_wrapped_network_is_refused(network):
    with pytest.raises(ValueError, match="attach to the network itself"):
        attach(torch.compile(network), "0", 0.5)


def test_a_recurrent_reader_reads_with_its_input_weight():
    model = net(lambda n, x: n.b(n.a(x)[0])[0], a=lstm(8, 16), b=lstm(16, 4, bidirectional=True))
    weights = []
    layer = attach(model, "a", 0.5, 1).layers["a"]
    layer.register_forward_pre_hook(lambda _, inputs: weights.append(inputs[1]))
    model(torch.randn(2, 5, 8))
    assert weights[0] is model.b.weight_ih_l0


def test_blocks_across_samples_are_refused():
    model = net(lambda n, x: n.b(n.a(x)[0]), a=nn.GRU(4, 8), b=linear(8, 2))
    with pytest.raises(ValueError, match="a is not batch_first"):
        attach(model, "a", 0.5, block_size=2)
    assert str(attach(model, "a", 0.5, block_size=1)) == "a -> b"
