"""Which weight reads a feature map next, found in a network's graph by torch.fx, for disout_attach.py."""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from disout import Disout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
LAYERS = (nn.Linear, *CONVOLUTIONS, *RECURRENT)  # which can be a reader

# What a map passes with its channels in their places: modules by the file of torch.nn that has them, or by name;
# functions and methods by name. Whatever stands nowhere here may mix the channels, so nothing is known behind it.
FILES = {"activation", "batchnorm", "dropout", "instancenorm", "normalization", "padding", "pooling", "upsampling"}
MODULES = {"Identity", "StochasticDepth", "Disout"}
SIDES = {"padding", "pooling", "upsampling"}  # which work on the last dimensions
NOT_MODULES = {"GLU", "MultiheadAttention"}
FUNCTIONS = {
    *("relu", "relu_", "relu6", "gelu", "silu", "elu", "leaky_relu", "hardswish", "hardtanh", "hardsigmoid"),
    *("sigmoid", "tanh", "softplus", "mish", "batch_norm", "layer_norm", "group_norm", "instance_norm"),
    *("dropout", "dropout1d", "dropout2d", "stochastic_depth", "boolean_dispatch", "max_pool1d", "max_pool2d"),
    *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("interpolate", "contiguous", "clone", "float", "add", "add_", "iadd", "sub", "truediv", "neg", "as_it_is"),
}
PRODUCTS = {"mul", "mul_", "imul"}
CONCATENATIONS = {"cat", "concat", "concatenate"}
LOOKS = {"size", "dim"}  # at the shape, not at the map
ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
# From a map to one number a channel.
SQUEEZES = {"mean", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
PERMUTATIONS = {(0, 2, 3, 1): ("first", "last"), (0, 3, 1, 2): ("last", "first")}  # of maps with two sides
SWAPS = {(1, 2), (2, 1), (0, 2, 1)}  # of sequences


class Reader(NamedTuple):
    name: str
    first: int  # channel of the map among those that it reads
    total: int | None  # channels that it reads; None where it reads features that have been a map
    channels: int | None  # of the map
    of: int  # readers of this map


def how_to_name(*names: str) -> str:
    others = f" (and so for {len(names) - 1} more)" if len(names) > 1 else ""
    return f'name it, readers={{"{names[0]}": "..."}}, or None where nothing reads it{others}'


def as_it_is(x: Tensor) -> Tensor:
    """What a named module returns goes through it in the graph, so that it has a node of its own."""
    return x


class Tracer(fx.Tracer):
    """Notes what the named modules return."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.returned: dict[str, list[fx.Node | None]] = {name: [] for name in names}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Disout, *LAYERS)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        if name in self.returned:
            one = isinstance(output, fx.Proxy)
            if one and not isinstance(m, RECURRENT):
                output = self.create_proxy("call_function", as_it_is, (output,), {})
            self.returned[name].append(output.node if one else None)
        return output


class Value(NamedTuple):
    """What is known of a value in the graph."""

    layout: str  # where its channels are: "first" (N, C, ...), "last" (N, ..., C), or "flat": (N, C * H * W)
    rank: int | None  # its dimensions; None: not known
    channels: int


class Part(NamedTuple):
    """The channels of a value that are the map's."""

    first: int
    channels: int


class Graph:
    """A network as torch.fx sees it in training, called without its optional arguments.

    Raises:
        ValueError: it cannot be traced.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.modules = dict(model.named_modules())
        tracer = Tracer(names)
        try:
            with undone(model):
                self.nodes = list(tracer.trace(model.train(), defaults(model)).nodes)
        except Exception as error:  # whatever the network's code does with a proxy
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"torch.fx cannot trace the network ({reason}): {how_to_name(*names)}") from None
        self.returned = tracer.returned
        self.values: dict[fx.Node, Value] = {}
        for node in self.nodes:
            if value := self.value_of(node):
                self.values[node] = value

    def is_features_last(self, name: str) -> bool | None:
        """None where the graph does not show it."""
        nodes = self.returned[name]
        value = self.values.get(nodes[0]) if nodes and nodes[0] else None
        return value.layout == "last" if value else None

    def first_readers(self, names: list[str]) -> dict[str, Reader]:
        """Of what each of these modules returns.

        Raises:
            ValueError: one cannot be told; says why, how to name it, and for which others too.
        """
        found, problems = {}, {}
        for name in names:
            try:
                found[name] = self.first_reader(name)
            except ValueError as error:
                problems[name] = str(error)
        if problems:
            first, *more = problems
            others = f" (nor can be told: {', '.join(more[:5])}{', ...' * (len(more) > 5)})" if more else ""
            raise ValueError(f"{problems[first]}{others}")
        return found

    def first_reader(self, name: str) -> Reader:
        """Follows the map through the nodes in the order of use."""
        nodes = self.returned[name]
        if len(nodes) > 1:
            raise ValueError(
                f"{name} is called {len(nodes)} times in a forward: leave it out of `where`, or {how_to_name(name)}"
            )
        if not nodes or nodes[0] is None:
            raise ValueError(f"{name} is not called, or returns no single map: leave it out")
        start = nodes[0]
        if start not in self.values:
            raise ValueError(f"the channels of what {name} returns cannot be told: {how_to_name(name)}")
        value = self.values[start]
        parts = {start: Part(0, value.channels)}
        readers: list[fx.Node] = []
        unknown: list[fx.Node] = []
        for node in self.nodes[self.nodes.index(start) + 1 :]:
            sources = [source for source in node.all_input_nodes if source in parts]
            if not sources or node.op == "output" or self.only_looks(node):
                continue
            source = sources[0]
            if self.is_layer(node):
                fits = self.fits(node, source, parts[source], flat=value.layout == "flat")
                (readers if fits else unknown).append(node)
            elif self.kind(node) in PRODUCTS and node in self.values:
                gates = [other for other in node.all_input_nodes if other not in parts]
                if all(start in ancestors([gate]) for gate in gates if not is_constant(gate)):
                    for gate in gates:  # made from the map itself
                        alone = self.only_for_gate(gate, node, start)
                        readers = [reader for reader in readers if reader not in alone]
                        unknown = [stranger for stranger in unknown if stranger not in alone]
                    parts[node] = parts[source]
                else:
                    unknown.append(node)
            elif node in self.values and self.kind(node) in CONCATENATIONS:
                joined = concatenated(node)[0]
                before = sum(self.values[part].channels for part in joined[: joined.index(source)])
                if len(sources) == 1 and joined.count(source) == 1:
                    parts[node] = Part(before + parts[source].first, parts[source].channels)
                else:
                    unknown.append(node)
            elif node in self.values:
                parts[node] = parts[source]
            else:
                unknown.append(node)
        order = {node: index for index, node in enumerate(self.nodes)}
        if unknown and (not readers or order[unknown[0]] < order[readers[0]]):
            raise ValueError(f"{name} goes to {place_of(unknown[0])}, which is not understood: {how_to_name(name)}")
        if not readers:
            raise ValueError(f"no convolution or linear layer was found that reads {name}: {how_to_name(name)}")
        source = next(source for source in readers[0].all_input_nodes if source in parts)
        whole = value.layout == "flat"
        total, channels = (None, None) if whole else (self.values[source].channels, parts[source].channels)
        return Reader(str(readers[0].target), parts[source].first, total, channels, len(readers))

    def only_for_gate(self, gate: fx.Node, product: fx.Node, start: fx.Node) -> set[fx.Node]:
        """What makes a gate (1 x 1, as in squeeze-and-excitation) from a map and does nothing else."""
        behind, reached = ancestors([gate]), {start}
        for node in self.nodes:  # without a squeeze
            if reached.intersection(node.all_input_nodes) and self.kind(node) not in SQUEEZES:
                reached.add(node)
        if gate in reached:
            return set()
        elsewhere = set(self.nodes) - behind - {product}
        for node in reversed(self.nodes):
            if node in behind and elsewhere.intersection(node.users):
                elsewhere.add(node)
        return behind - elsewhere

    def fits(self, node: fx.Node, source: fx.Node, part: Part, flat: bool) -> bool:
        """Whether the layer reads the channels of its source one by one."""
        module, value = self.module(node), self.values[source]
        if isinstance(module, nn.Linear):
            if flat:  # the map is features already, and all of them are read
                return value.layout == "flat"
            exact = module.in_features == value.channels
            return (
                exact if value.layout == "last" else value.layout == "flat" and module.in_features % value.channels == 0
            )
        if isinstance(module, RECURRENT):
            return value.layout == "last" and value.rank in (3, None) and module.input_size == part.channels
        whole = part.channels == value.channels or module.groups == 1
        return value.layout == "first" and module.in_channels == value.channels and whole

    def value_of(self, node: fx.Node) -> Value | None:
        """From the node's inputs; None where nothing is known."""
        module, inputs = self.module(node), [self.values.get(source) for source in node.all_input_nodes]
        known = next((value for value in inputs if value), None)
        if isinstance(module, CONVOLUTIONS):
            return Value("first", 3 if isinstance(module, nn.Conv1d) else 4, module.out_channels)
        if isinstance(module, nn.Linear):
            rank = known.rank if known and known.layout == "last" else 2 if known and known.layout == "flat" else None
            return Value("last", rank, module.out_features)
        if isinstance(module, nn.Embedding):
            return Value("last", None, module.embedding_dim)
        if isinstance(module, RECURRENT):
            directions = 2 if module.bidirectional else 1
            return Value("last", 3, directions * (module.proj_size or module.hidden_size))
        if known is None:
            return None
        if self.kind(node) in CONCATENATIONS:
            return self.joined(node)
        alike = all(value is None or value[::2] == known[::2] for value in inputs)
        if not alike or (known.channels == 1 and len(inputs) > 1):  # maps that are stretched to each other
            return None
        return known if self.kind(node) in PRODUCTS else self.passed(node, known)

    def joined(self, node: fx.Node) -> Value | None:
        """A concatenation of channels."""
        parts, dim = concatenated(node)
        values = [self.values.get(part) for part in parts]
        first = values[0]
        if first is None or any(value is None or value.layout != first.layout for value in values):
            return None
        dims: dict[tuple[str, int | None], tuple[int, ...]]
        dims = {("first", 4): (1, -3), ("first", 3): (1, -2), ("last", 2): (1, -1)}
        if dim not in dims.get((first.layout, first.rank), (-1,) if first.layout == "last" else ()):
            return None
        return first._replace(channels=sum(value.channels for value in values if value))

    def passed(self, node: fx.Node, value: Value) -> Value | None:
        """What comes out of a node with one input of interest."""
        module, what, dims = self.module(node), self.kind(node), self.dims(node)
        if what in ("Permute", "permute", "transpose"):
            if dims in PERMUTATIONS and value.rank in (4, None) and PERMUTATIONS[dims][0] == value.layout:
                return value._replace(layout=PERMUTATIONS[dims][1], rank=4)
            swaps = dims in SWAPS and value.rank == 3 and value.layout != "flat"
            return value._replace(layout="last" if value.layout == "first" else "first") if swaps else None
        if what in ("Flatten", "flatten", "view", "reshape"):
            if what in ("Flatten", "flatten"):
                ends = getattr(module, "end_dim", node.kwargs.get("end_dim", node.args[2] if node.args[2:] else -1))
                whole = dims[:1] == (1,) and ends in (-1, value.rank and value.rank - 1)
            else:
                whole = node.args[2:] == (-1,) and is_length(node.args[1])
            return value._replace(layout="flat" if value.layout == "first" else value.layout, rank=2) if whole else None
        if what == "mean":
            return mean(value, dims, bool(node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])))
        if what == "getitem":
            index: Any = node.args[1]
            if isinstance(self.module(node.all_input_nodes[0]), RECURRENT):
                return value if index == 0 else None
            a_step = isinstance(index, tuple) and index[:1] == (slice(None),) and [type(i) for i in index[1:]] == [int]
            return value._replace(rank=2) if a_step and value.layout == "last" and value.rank == 3 else None
        *package, file = type(module).__module__.split(".") if module is not None else ("", "")
        if value.layout != "first" and (file in SIDES or what == "interpolate" or "_pool" in what):
            return None  # over the channels
        of_torch = package == ["torch", "nn", "modules"] and file in FILES and what not in NOT_MODULES
        return value if of_torch or what in (FUNCTIONS if module is None else MODULES) else None

    def dims(self, node: fx.Node) -> tuple[int, ...]:
        """That a permutation, flattening or mean names."""
        module = self.module(node)
        named: Any = node.kwargs.get("dim", node.kwargs.get("start_dim", node.args[1:]))
        if module is not None:
            named = getattr(module, "dims", getattr(module, "start_dim", ()))
        named = named if isinstance(named, (tuple, list)) else (named,)
        named = named[0] if named and isinstance(named[0], (tuple, list)) else named
        return tuple(dim for dim in named if isinstance(dim, int) and not isinstance(dim, bool))

    def module(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)] if node.op == "call_module" else None

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


def mean(value: Value, dims: tuple[int, ...], keeps: bool) -> Value | None:
    """Over all sides of a map, over some that stay, or over the steps of a sequence."""
    rank = value.rank
    if value.layout == "first" and rank and all(dim > 1 or 2 - rank <= dim < 0 for dim in dims):
        return value if keeps else Value("last", 2, value.channels) if len(dims) == rank - 2 else None
    if value.layout == "last" and set(dims) in ({1}, {-2}, {1, 2}, {-2, -3}) and not keeps:
        return value._replace(rank=rank and rank - len(dims))
    return None


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


def place_of(node: fx.Node) -> str:
    """In words for who knows the network but not its graph."""
    if node.op == "call_module":
        return str(node.target)
    modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    return (
        f"{getattr(node.target, '__name__', node.target)} in {modules[-1] if modules else 'the forward of the network'}"
    )


def is_constant(node: fx.Node) -> bool:
    """Whether it is made from parameters and buffers alone."""
    return all(source.op not in ("placeholder", "call_module") for source in ancestors([node]))


def is_length(argument: Any) -> bool:
    """x.size(0) or x.shape[0] as the first argument of a view."""
    if not isinstance(argument, fx.Node):
        return False
    return argument.args[1:] == (0,) and argument.op != "call_module"


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
