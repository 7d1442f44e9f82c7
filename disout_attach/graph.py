"""A network's graph, or that of a part of it, by torch.fx, for readers.py."""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from disout import Disout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
LAYERS = (nn.Linear, *CONVOLUTIONS, *RECURRENT)  # which can be a reader

LOOKS = {"size", "dim"}  # at the shape, not at the map
ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def as_it_is(x: Tensor) -> Tensor:
    """What a named module returns goes through it in the graph, so that it has a node of its own."""
    return x


class Tracer(fx.Tracer):
    """Notes what the named modules return."""

    def __init__(self, names: list[str], prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.returned: dict[str, list[fx.Node | None]] = {name: [] for name in names}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Disout, *LAYERS)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        name = self.prefix + self.path_of_module(m)
        if name in self.returned:
            one = isinstance(output, fx.Proxy)
            if one and not isinstance(m, RECURRENT):
                output = self.create_proxy("call_function", as_it_is, (output,), {})
            self.returned[name].append(output.node if one else None)
        return output


class Graph:
    """A network, or the part of it that is called `within`, as torch.fx sees it in training, called without its
    optional arguments.

    Raises:
        ValueError: it cannot be traced.
    """

    def __init__(self, model: nn.Module, names: list[str], within: str = "") -> None:
        self.within, self.prefix = within, f"{within}." if within else ""
        part = model.get_submodule(within)
        self.modules = {f"{self.prefix}{name}": module for name, module in part.named_modules()}
        tracer = Tracer(names, self.prefix)
        try:
            with undone(part):
                self.nodes = list(tracer.trace(part.train(), defaults(part)).nodes)
        except Exception as error:  # whatever the network's code does with a proxy
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"torch.fx cannot trace the network ({reason})") from None
        self.returned = tracer.returned

    def module(self, node: fx.Node) -> Any:
        return self.modules[f"{self.prefix}{node.target}"] if node.op == "call_module" else None

    def is_layer(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), LAYERS)

    def kind(self, node: fx.Node) -> str:
        """The name of a node's module class, function or method."""
        module = self.module(node)
        return type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))

    def only_looks(self, node: fx.Node) -> bool:
        """At the shape of a map, or at what a recurrent layer returns beside it."""
        if self.kind(node) == "getattr":
            return node.args[1] in ATTRIBUTES
        of_recurrent = isinstance(self.module(node.all_input_nodes[0]), RECURRENT)
        return self.kind(node) in LOOKS or (of_recurrent and node.args[1:] == (1,))

    def place_of(self, node: fx.Node) -> str:
        """In words for who knows the network but not its graph."""
        if node.op == "call_module":
            return f"{self.prefix}{node.target}"
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        place = f"{self.prefix}{paths[-1]}" if paths else self.prefix.removesuffix(".") or "the forward of the network"
        return f"{getattr(node.target, '__name__', node.target)} in {place}"


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Leaves modes and buffers as they were, and random numbers undrawn. A network that draws some while it is traced
    takes another way through its code in each step.

    Raises:
        ValueError: it does.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states = torch.get_rng_state(), random.getstate()
    try:
        yield
        if not torch.equal(states[0], torch.get_rng_state()) or states[1] != random.getstate():
            raise ValueError("its code draws random numbers")
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.data.copy_(before)
        torch.set_rng_state(states[0])
        random.setstate(states[1])


def defaults(model: nn.Module) -> dict[str, Any]:
    """The optional arguments of the network's forward, after its first, with their values."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    plain = (type(None), bool, int, float, str)
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, plain)}


def concatenated(node: fx.Node) -> tuple[Any, Any]:
    """What a concatenation joins, and along which dimension."""
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    return parts, node.args[1] if node.args[1:] else node.kwargs.get("dim", node.kwargs.get("axis", 0))


def is_constant(node: fx.Node) -> bool:
    """Whether it is made from parameters and buffers alone."""
    return all(source.op not in ("placeholder", "call_module") for source in ancestors([node]))


def ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they are made from."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found
