"""What is known of the values in a network's graph: where their channels are, and of which value they are a
rearrangement. For readers.py."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from disout_attach.graph import ATTRIBUTES, CONVOLUTIONS, LOOKS, RECURRENT, Graph, concatenated

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
REDUCTIONS = {"mean", "sum", "amax", "amin"}
# From a map to one number a channel.
SQUEEZES = {
    *REDUCTIONS,
    *(f"{pool}{sides}d" for pool in ("AdaptiveAvgPool", "adaptive_avg_pool") for sides in (1, 2, 3)),
}
PERMUTATIONS = {  # of maps with two or three sides
    (0, 2, 3, 1): ("first", "last"),
    (0, 3, 1, 2): ("last", "first"),
    (0, 2, 3, 4, 1): ("first", "last"),
    (0, 4, 1, 2, 3): ("last", "first"),
}
SWAPS = {(1, 2), (2, 1), (0, 2, 1)}  # of sequences


class Value(NamedTuple):
    """What is known of a value in the graph."""

    # Where its channels are: "first" (N, C, ...), "last" (N, ..., C), "flat" (N, C * H * W), "flat last"
    # (N, H * W * C), or "flat parts": such ones, of sizes that are not known, one after the other.
    layout: str
    rank: int | None  # its dimensions; None: not known
    channels: int


class Values:
    """What is known of the values in `graph`.

    Attributes:
        known: what is known of a node; a node that is not here mixes channels, or nobody knows what it does.
        moved: of a node that puts channels into another order, or chooses some: from which node, and which of its
            channels each of its own is.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[fx.Node, Value] = {}
        self.moved: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = {}
        for node in graph.nodes:
            value = self.value_of(node)
            if value is None and (moved := self.rearranged(node)):
                self.moved[node] = moved
                value = self.known[moved[0]]._replace(channels=len(moved[1]))
            if value:
                self.known[node] = value

    def value_of(self, node: fx.Node) -> Value | None:
        """From the node's inputs; None where nothing is known."""
        module, inputs = self.graph.module(node), [self.known.get(source) for source in node.all_input_nodes]
        known = next((value for value in inputs if value), None)
        if isinstance(module, CONVOLUTIONS):
            return Value("first", 2 + len(module.kernel_size), module.out_channels)
        if isinstance(module, nn.Linear):
            rank = known.rank if known and known.layout == "last" else 2 if known and is_flat(known) else None
            return Value("last", rank, module.out_features)
        if isinstance(module, nn.Embedding):
            return Value("last", None, module.embedding_dim)
        if isinstance(module, RECURRENT):
            directions = 2 if module.bidirectional else 1
            return Value("last", 3, directions * (module.proj_size or module.hidden_size))
        if known is None:
            return None
        if self.graph.kind(node) in CONCATENATIONS:
            return self.joined(node)
        alike = all(value is None or value[::2] == known[::2] for value in inputs)
        if not alike or (known.channels == 1 and len(inputs) > 1):  # maps that are stretched to each other
            return None
        return known if self.graph.kind(node) in PRODUCTS else self.passed(node, known)

    def joined(self, node: fx.Node) -> Value | None:
        """A concatenation of channels."""
        parts, dim = concatenated(node)
        values = [self.known.get(part) for part in parts]
        first = values[0]
        features = all(value and value.layout != "first" and value.rank in (2, None) for value in values)
        if features and dim in (1, -1) and any(value and is_flat(value) for value in values):  # all have two dimensions
            return Value("flat parts", 2, sum(value.channels for value in values if value))
        if first is None or any(value is None or value.layout != first.layout for value in values):
            return None
        dims: dict[tuple[str, int | None], tuple[int, ...]]
        dims = {("first", 5): (1, -4), ("first", 4): (1, -3), ("first", 3): (1, -2), ("last", 2): (1, -1)}
        if dim not in dims.get((first.layout, first.rank), (-1,) if first.layout == "last" else ()):
            return None
        return first._replace(channels=sum(value.channels for value in values if value))

    def passed(self, node: fx.Node, value: Value) -> Value | None:
        """What comes out of a node with one input of interest."""
        module, what, dims = self.graph.module(node), self.graph.kind(node), self.dims(node)
        if what in ("Permute", "permute", "transpose"):
            if dims in PERMUTATIONS and value.rank in (len(dims), None) and PERMUTATIONS[dims][0] == value.layout:
                return value._replace(layout=PERMUTATIONS[dims][1], rank=len(dims))
            swaps = dims in SWAPS and value.rank == 3 and not is_flat(value)
            return value._replace(layout="last" if value.layout == "first" else "first") if swaps else None
        if what in ("Flatten", "flatten", "view", "reshape"):
            if what in ("Flatten", "flatten"):
                ends = getattr(module, "end_dim", node.kwargs.get("end_dim", node.args[2] if node.args[2:] else -1))
                whole = dims[:1] == (1,) and ends in (-1, value.rank and value.rank - 1)
            else:
                whole = node.args[2:] == (-1,) and is_length(node.args[1])
            if not whole or is_flat(value) or value[:2] == ("last", 2):
                return value if whole else None
            return value._replace(layout="flat" if value.layout == "first" else "flat last", rank=2)
        if what in REDUCTIONS:
            return mean(value, dims, bool(node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])))
        if what == "getitem":
            index: Any = node.args[1]
            if isinstance(self.graph.module(node.all_input_nodes[0]), RECURRENT):
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
        module = self.graph.module(node)
        named: Any = node.kwargs.get("dim", node.kwargs.get("start_dim", node.args[1:]))
        if module is not None:
            named = getattr(module, "dims", getattr(module, "start_dim", ()))
        named = named if isinstance(named, (tuple, list)) else (named,)
        named = named[0] if named and isinstance(named[0], (tuple, list)) else named
        return tuple(dim for dim in named if isinstance(dim, int) and not isinstance(dim, bool))

    def rearranged(self, node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
        """Of which value this is a rearrangement, and which of its channels each channel is. None where it is none, or
        not of whole channels, or where some lie elsewhere than in the value."""
        source: Any = node
        while source not in self.known:
            if self.graph.kind(source) not in REARRANGEMENTS or not isinstance(next(iter(source.args), None), fx.Node):
                return None
            source = source.args[0]
        value = self.known[source]
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
        value, module, what = self.known.get(node), self.graph.module(node), self.graph.kind(node)
        if value and value.rank and not is_flat(value) and not isinstance(module, RECURRENT):
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


def is_flat(value: Value) -> bool:
    """Whether a channel may be several features."""
    return value.layout.startswith("flat")


def mean(value: Value, dims: tuple[int, ...], keeps: bool) -> Value | None:
    """Or another reduction, over all sides of a map, over some that stay, or over the steps of a sequence."""
    rank = value.rank
    if value.layout == "first" and rank and all(dim > 1 or 2 - rank <= dim < 0 for dim in dims):
        return value if keeps else Value("last", 2, value.channels) if len(dims) == rank - 2 else None
    if value.layout == "last" and set(dims) in ({1}, {-2}, {1, 2}, {-2, -3}, {1, 2, 3}, {-2, -3, -4}) and not keeps:
        return value._replace(rank=rank and rank - len(dims))
    return None


def is_length(argument: Any) -> bool:
    """x.size(0) or x.shape[0] as the first argument of a view."""
    if not isinstance(argument, fx.Node):
        return False
    return argument.args[1:] == (0,) and argument.op != "call_module"
