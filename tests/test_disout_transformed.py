"""The layer under torch.func, torch.compile and torch.export."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import in_training
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from disout import Disout, strength

# torch.func


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)
        self.disout = Disout(0.3, 3, 5.0)

    def forward(self, x):
        x = self.disout(self.conv1(x).relu(), self.conv2.weight)
        return self.fc(self.conv2(x).mean((2, 3)))


@pytest.mark.usefixtures("form")
def test_functional_gradients_are_those_of_backward(x):
    network, labels = Network(), torch.arange(16) % 3
    loss = lambda weights, x: F.cross_entropy(functional_call(network, weights, (x,)), labels)  # noqa: E731
    torch.manual_seed(0)
    gradients = torch.func.grad(loss)({name: weight.detach() for name, weight in network.named_parameters()}, x)
    assert network.disout.distorted == 0  # a transformed function changes nothing
    torch.manual_seed(0)
    F.cross_entropy(network(x), labels).backward()
    assert network.disout.distorted > 0
    for name, weight in network.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad)


@pytest.mark.usefixtures("form")
def test_many_gradients_at_once_are_those_of_a_loop(x):
    """Of a batch that torch.autograd.grad takes, of torch.func.jacrev, and with a graph of their own."""
    network, x = Network(), x.clone().requires_grad_()
    logits = in_training(x, network)[:2].flatten()
    one_by_one = torch.stack([torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in logits])
    for graph in (False, True):
        rows = torch.eye(len(logits))
        (batched,) = torch.autograd.grad(logits, x, rows, is_grads_batched=True, retain_graph=True, create_graph=graph)
        torch.testing.assert_close(batched, one_by_one)
    torch.manual_seed(0)
    jacobian = torch.func.jacrev(lambda x: network(x)[:2].flatten())(x.detach())
    torch.testing.assert_close(jacobian, one_by_one)
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    torch.manual_seed(0)
    of_weights = torch.func.jacrev(lambda weights: functional_call(network, weights, (x,))[:2].flatten())(weights)
    (expected,) = torch.autograd.grad(logits[1], network.conv1.weight)
    torch.testing.assert_close(of_weights["conv1.weight"][1], expected)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_is_refused_in_a_sentence(x, randomness):
    layer = Disout(0.3)
    with pytest.raises(RuntimeError, match=r"not under torch.func.vmap"):
        torch.func.vmap(layer, randomness=randomness)(x[:, None])
    layer(x)


@pytest.mark.usefixtures("form")
def test_traced_without_values(x):
    """As tools that estimate memory do it, and torch.fx by what is called."""
    with FakeTensorMode():
        layer = Disout(0.3, 3)
        assert layer(torch.randn(4, 8, 8, 8), torch.randn(6, 8, 3, 3)).shape == (4, 8, 8, 8)
    traced = make_fx(Disout(0.3, 3, 5.0))(x)
    assert traced(x).shape == x.shape


# Compilation


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("backend", "layout"), [("eager", torch.contiguous_format), ("aot_eager", torch.channels_last)]
)
def test_compiles_to_one_graph_a_shape_while_the_rate_moves(x, backend, layout):
    """And computes what it computes without, with the same draws."""
    weight, x = torch.randn(6, 8, 3, 3), x.to(memory_format=layout)
    graphs = CompileCounterWithBackend(backend)
    layer, reference = Disout(0.3, 3, 5.0), Disout(0.3, 3, 5.0)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=graphs)
    for step, batch in enumerate([x, x, x, x[:5]] * 3):
        layer.dist_prob = reference.dist_prob = 0.3 * step / 11
        ours, theirs = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        in_training(ours, compiled, weight).square().sum().backward()
        in_training(theirs, reference, weight).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(layer.distorted, reference.distorted)
    assert graphs.frame_count == 2


EVER_LARGER = [0, 0.001, 0.02, 0.05, 0.09, 0.1, 0.2, 0.26, 0.5, 0.51, 1.0]


@pytest.mark.parametrize(
    ("rates", "dynamic", "batches", "compilations"),
    [
        (EVER_LARGER, None, (16,), 7),
        ([0.0, 0.0, *EVER_LARGER], None, (16, 5, 9), 8),
        ([0.09, 0.1, 0.11], True, (16, 5), 2),
    ],
)
def test_a_rate_raised_above_all_before_compiles_few_times(x, rates, dynamic, batches, compilations):
    """Once more where the first step's batch counted as the only one."""
    torch._dynamo.reset()
    weight, graphs = torch.randn(6, 8, 3, 3), CompileCounterWithBackend("aot_eager")
    layer, reference = Disout(rates[0], 3, 5.0), Disout(rates[0], 3, 5.0)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=graphs)
    for step, rate in enumerate(rates):
        layer.dist_prob = reference.dist_prob = rate
        ours = x[: batches[step % len(batches)]].clone().requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        in_training(ours, compiled, weight).square().sum().backward()
        in_training(theirs, reference, weight).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(layer.distorted, reference.distorted)
    assert graphs.frame_count == compilations


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")


@needs_compiler
def test_a_network_compiled_to_machine_code_takes_a_raised_rate(x):
    torch._dynamo.reset()
    network = Network()
    compiled = torch.compile(network)
    for rate, expected in ((0.3, 0.25), (0.9, 0.6)):  # blocks overlap
        network.disout.dist_prob = rate
        compiled(x).sum().backward()
        assert network.disout.distorted.item() == pytest.approx(expected, abs=0.07)
    assert network.conv1.weight.grad.isfinite().all()


@needs_compiler
@pytest.mark.usefixtures("form")
def test_compiles_to_machine_code_with_sizes_that_are_symbols():
    torch._dynamo.reset()
    layer = Disout(0.3, 3)
    network = nn.Sequential(nn.Conv2d(8, 6, 3), layer, nn.Conv2d(6, 4, 3))
    compiled = torch.compile(network, dynamic=True)
    for n, height, width, rate in ((16, 12, 11, 0.3), (5, 9, 10, 0.9)):
        layer.dist_prob = rate
        compiled(torch.randn(n, 8, height, width)).sum().backward()
        assert 0.15 < layer.distorted < 0.7
    assert network[0].weight.grad.isfinite().all()


@needs_compiler
def test_compiled_to_machine_code_it_keeps_and_distorts_what_it_says(x):
    """Not compared bit by bit, as a compiler may change the order of the draws (torch 2.11's does)."""
    torch._dynamo.reset()
    layer, weight, x = Disout(0.3, 3, 5.0), torch.randn(6, 8, 3, 3), x.clone().requires_grad_()
    y = in_training(x, torch.compile(layer, fullgraph=True), weight)
    y.sum().backward()
    kept_share = 1 - layer.distorted
    assert kept_share.item() == pytest.approx(0.75, abs=0.05)
    kept = x.grad != 0
    assert kept.float().mean() == pytest.approx(kept_share.item(), abs=1e-6)
    torch.testing.assert_close(x.grad, kept / kept_share)
    torch.testing.assert_close(y[kept], x[kept] / kept_share)
    signs = torch.randint(0, 2, (8, 3, 3)) * 2 - 1
    expected = 5 * strength(weight, signs).square().mean().sqrt() * x.std() / kept_share
    assert 0.5 < y[~kept].std() / expected < 2


@pytest.mark.usefixtures("form")
def test_exported_in_training_the_batch_stays_dynamic(x):
    """As torch.export does it: without torch._dynamo, which is less strict about what makes a constant."""
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Network().train(), (x,), dynamic_shapes=({0: batch},)).module()
    for n in (2, 16, 9):
        assert exported(x[:n]).shape == (n, 3)
    draws = torch.stack([exported(x) for _ in range(2)])
    assert not torch.equal(*draws)
