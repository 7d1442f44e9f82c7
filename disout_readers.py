"""Which weight reads a feature map next, found in a network's graph by torch.fx, for disout_attach.py."""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from disout import Disout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "boolean_dispatch"),
    *(f"{pool}_pool{sides}d" for pool in ("max", "avg", "adaptive_max", "adaptive_avg") for sides in (1, 2, 3)),
    *("interpolate", "contiguous", "clone", "float", "add", "add_", "iadd", "sub", "truediv", "neg", "as_it_is"),
}
PRODUCTS = {"mul", "mul_", "imul"}
CONCATENATIONS = {"cat", "concat", "concatenate"}
# What may put the channels of a map into another order, or choose some: found by doing it to numbered channels.
REARRANGEMENTS = {
    *("view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "permute", "movedim", "contiguous"),
    *("chunk", "split", "tensor_split", "narrow", "getitem", "channel_shuffle"),
    *("Flatten", "Unflatten", "ChannelShuffle"),
}
SIZES = (2, 3, 5, 7)  # batch and sides of the numbered channels
ARITHMETIC = {"floordiv", "mul", "add", "sub"}  # of sizes
LOOKS = {"size", "dim"}  # at the shape, not at the map
ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
# From a map to one number a channel.
SQUEEZES = {"mean", *(f"{pool}{sides}d" for pool in ("AdaptiveAvgPool", "adaptive_avg_pool") for sides in (1, 2, 3))}
PERMUTATIONS = {  # of maps with two or three sides
    (0, 2, 3, 1): ("first", "last"),
    (0, 3, 1, 2): ("last", "first"),
    (0, 2, 3, 4, 1): ("first", "last"),
    (0, 4, 1, 2, 3): ("last", "first"),
}
SWAPS = {(1, 2), (2, 1), (0, 2, 1)}  # of sequences


class Piece(NamedTuple):
    """Some channels of a map, and the layer that reads them first."""

    name: str
    channels: tuple[int, ...]  # of the map
    columns: tuple[int, ...]  # where the layer has them among those that it reads
    total: int | None  # channels that it reads; None where it reads features that have been a map


class Reader(NamedTuple):
    pieces: tuple[Piece, ...]  # several where a channel shuffle hands the channels to several layers
    of: int  # layers that read this map
    within: str  # the part of the network that was looked at; "": all of it

    def __str__(self) -> str:
        names = " + ".join(piece.name for piece in self.pieces)
        sizes = " + ".join(str(len(piece.channels)) for piece in self.pieces)
        notes = [f"{sizes} channels"] if len(self.pieces) > 1 else [f"first of {self.of}"] if self.of > 1 else []
        notes += [f"within {self.within}"] if self.within else []
        return f"{names} ({', '.join(notes)})" if notes else names


def how_to_name(name: str) -> str:
    return f'name it, readers={{"{name}": "..."}}, or None where nothing reads it'


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


class Value(NamedTuple):
    """What is known of a value in the graph."""

    layout: str  # where its channels are: "first" (N, C, ...), "last" (N, ..., C), or "flat": (N, C * H * W)
    rank: int | None  # its dimensions; None: not known
    channels: int


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
        self.values: dict[fx.Node, Value] = {}
        self.moved: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = {}  # from where, and which of its channels
        for node in self.nodes:
            value = self.value_of(node)
            if value is None and (moved := self.rearranged(node)):
                self.moved[node] = moved
                value = self.values[moved[0]]._replace(channels=len(moved[1]))
            if value:
                self.values[node] = value

    def is_features_last(self, name: str) -> bool | None:
        """None where the graph does not show it."""
        nodes = self.returned[name]
        value = self.values.get(nodes[0]) if nodes and nodes[0] else None
        return value.layout == "last" if value else None

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
        # Which channel of the map each channel is; -1: none of it. And where a rearrangement begins that is under way.
        parts = {start: tuple(range(value.channels))}
        begun: dict[fx.Node, fx.Node] = {}
        readers: list[fx.Node] = []
        unknown: list[fx.Node] = []
        for node in self.nodes[self.nodes.index(start) + 1 :]:
            sources = [source for source in node.all_input_nodes if source in parts or source in begun]
            if not sources or node.op == "output" or self.only_looks(node):
                continue
            source = sources[0]
            if node in self.moved:
                origin, channels = self.moved[node]
                parts[node] = tuple(parts[origin][channel] for channel in channels)
            elif any(other in begun for other in sources) or not (node in self.values or self.is_layer(node)):
                first = next((begun[other] for other in sources if other in begun), node)
                if self.kind(node) in REARRANGEMENTS:
                    begun[node] = first
                else:
                    unknown.append(first)
            elif self.is_layer(node):
                of_map = [channel for channel in parts[source] if channel >= 0]
                once = len(set(of_map)) == len(of_map)
                fits = once and self.fits(node, source, flat=value.layout == "flat")
                (readers if fits else unknown).append(node)
            elif self.kind(node) in CONCATENATIONS:
                joined = [parts.get(part, (-1,) * self.values[part].channels) for part in concatenated(node)[0]]
                parts[node] = tuple(channel for part in joined for channel in part)
            elif len({parts[other] for other in sources}) > 1:  # channels are mixed
                unknown.append(node)
            elif self.kind(node) in PRODUCTS:
                gates = [other for other in node.all_input_nodes if other not in parts]
                if all(start in ancestors([gate]) for gate in gates if not is_constant(gate)):
                    for gate in gates:  # made from the map itself
                        alone = self.only_for_gate(gate, node, start)
                        readers = [reader for reader in readers if reader not in alone]
                        unknown = [stranger for stranger in unknown if stranger not in alone]
                    parts[node] = parts[source]
                else:
                    unknown.append(node)
            else:
                parts[node] = parts[source]
        order = {node: index for index, node in enumerate(self.nodes)}
        pieces, left, last = [], set(range(value.channels)), 0
        for reader in readers:
            source = next(source for source in reader.all_input_nodes if source in parts)
            places = {channel: column for column, channel in enumerate(parts[source]) if channel in left}
            if places:
                channels = tuple(sorted(places))
                columns = tuple(places[channel] for channel in channels)
                total = None if value.layout == "flat" else self.values[source].channels
                pieces.append(Piece(f"{self.prefix}{reader.target}", channels, columns, total))
                left, last = left - places.keys(), order[reader]
        if unknown and (left or order[unknown[0]] < last):
            self.refuse_gate(name, start, unknown[0])
            raise ValueError(
                f"{name} goes to {place_of(unknown[0], self.prefix)}, which is not understood: {how_to_name(name)}"
            )
        if not readers:
            raise ValueError(f"no convolution or linear layer was found that reads {name}: {how_to_name(name)}")
        if left:
            raise ValueError(
                f"nothing reads {len(left)} of the {value.channels} channels of {name}: {how_to_name(name)}"
            )
        return Reader(tuple(pieces), len(readers), self.within)

    def refuse_gate(self, name: str, start: fx.Node, product: fx.Node) -> None:
        """Raises ValueError where what the module returns multiplies a map that it is made from."""
        others = [other for other in product.all_input_nodes if start not in ancestors([other])]
        if self.kind(product) in PRODUCTS and others and ancestors([start]).issuperset(others):
            raise ValueError(
                f"{name} is a gate: what it returns multiplies a map ({place_of(product, self.prefix)}), and no layer "
                "reads it as a feature map: leave it out of `where`"
            )

    def rearranged(self, node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
        """Of which value this is a rearrangement, and which of its channels each channel is. None where it is none, or
        not of whole channels, or where some lie elsewhere than in the value."""
        source: Any = node
        while source not in self.values:
            if self.kind(source) not in REARRANGEMENTS or not isinstance(next(iter(source.args), None), fx.Node):
                return None
            source = source.args[0]
        value = self.values[source]
        try:
            numbers = self.numbers(node)
        except Exception:  # whatever torch says of sizes that do not fit
            return None
        if not isinstance(numbers, Tensor) or numbers.dim() != value.rank or len(numbers) != SIZES[0]:
            return None
        channels = numbers.movedim(1 if value.layout == "first" else -1, 0).flatten(1)
        whole = channels.numel() and bool((channels == channels[:, :1]).all())
        return (source, tuple(int(channel) for channel in channels[:, 0])) if whole else None

    def numbers(self, node: fx.Node) -> Any:
        """What the network's code makes of a map that has each channel's number everywhere, of some size."""
        value, module, what = self.values.get(node), self.module(node), self.kind(node)
        if value and value.rank and value.layout != "flat" and not isinstance(module, RECURRENT):
            sides = SIZES[1 : value.rank - 1]
            numbers = torch.arange(float(value.channels)).view(-1, *[1] * len(sides)).expand(SIZES[0], -1, *sides)
            return numbers if value.layout == "first" else numbers.movedim(1, -1)
        looks = what in LOOKS or (what == "getattr" and node.args[1] in ATTRIBUTES)
        if value or not (looks or what in REARRANGEMENTS or what in ARITHMETIC):
            raise ValueError(what)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.numbers)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = module or node.target
        return function(*args, **kwargs)

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

    def fits(self, node: fx.Node, source: fx.Node, flat: bool) -> bool:
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
            return value.layout == "last" and value.rank in (3, None) and module.input_size == value.channels
        return value.layout == "first" and module.in_channels == value.channels

    def value_of(self, node: fx.Node) -> Value | None:
        """From the node's inputs; None where nothing is known."""
        module, inputs = self.module(node), [self.values.get(source) for source in node.all_input_nodes]
        known = next((value for value in inputs if value), None)
        if isinstance(module, CONVOLUTIONS):
            return Value("first", 2 + len(module.kernel_size), module.out_channels)
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
        dims = {("first", 5): (1, -4), ("first", 4): (1, -3), ("first", 3): (1, -2), ("last", 2): (1, -1)}
        if dim not in dims.get((first.layout, first.rank), (-1,) if first.layout == "last" else ()):
            return None
        return first._replace(channels=sum(value.channels for value in values if value))

    def passed(self, node: fx.Node, value: Value) -> Value | None:
        """What comes out of a node with one input of interest."""
        module, what, dims = self.module(node), self.kind(node), self.dims(node)
        if what in ("Permute", "permute", "transpose"):
            if dims in PERMUTATIONS and value.rank in (len(dims), None) and PERMUTATIONS[dims][0] == value.layout:
                return value._replace(layout=PERMUTATIONS[dims][1], rank=len(dims))
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


class Graphs:
    """The graph of a network, or where it cannot be traced of the largest parts of it that can be and hold the named
    modules: what reads a map first in a part does so in the network."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        self.traced: dict[str, Graph | str] = {}  # each part's graph, or why there is none

    def of(self, name: str) -> Graph | None:
        """Where this module's map is followed."""
        for end in [0, *(index for index, letter in enumerate(name) if letter == ".")]:
            within = name[:end]
            if within not in self.traced:
                inside = [other for other in self.names if other.startswith(f"{within}." if within else "")]
                try:
                    self.traced[within] = Graph(self.model, inside, within)
                except ValueError as error:
                    self.traced[within] = str(error)
            graph = self.traced[within]
            if isinstance(graph, Graph):
                return graph
        return None

    def first_readers(self, names: list[str]) -> dict[str, Reader]:
        """Of what each of these modules returns.

        Raises:
            ValueError: one cannot be told; says why, how to name it, and for which others too.
        """
        found, problems = {}, {}
        for name in names:
            try:
                graph = self.of(name)
                if not graph:
                    raise ValueError(f"{self.traced['']}, nor a part of it that holds {name}: {how_to_name(name)}")
                found[name] = graph.first_reader(name)
            except ValueError as error:
                problems[name] = str(error)
        if problems:
            first, *more = problems
            others = f" (nor can be told: {', '.join(more[:5])}{', ...' * (len(more) > 5)})" if more else ""
            raise ValueError(f"{problems[first]}{others}")
        return found


def mean(value: Value, dims: tuple[int, ...], keeps: bool) -> Value | None:
    """Over all sides of a map, over some that stay, or over the steps of a sequence."""
    rank = value.rank
    if value.layout == "first" and rank and all(dim > 1 or 2 - rank <= dim < 0 for dim in dims):
        return value if keeps else Value("last", 2, value.channels) if len(dims) == rank - 2 else None
    if value.layout == "last" and set(dims) in ({1}, {-2}, {1, 2}, {-2, -3}, {1, 2, 3}, {-2, -3, -4}) and not keeps:
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


def place_of(node: fx.Node, prefix: str) -> str:
    """In words for who knows the network but not its graph."""
    if node.op == "call_module":
        return f"{prefix}{node.target}"
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    place = f"{prefix}{paths[-1]}" if paths else prefix.removesuffix(".") or "the forward of the network"
    return f"{getattr(node.target, '__name__', node.target)} in {place}"


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
