"""Which weight reads a feature map next, found in a network's graph, for hooks.py."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import fx, nn

from disout_attach.graph import RECURRENT, Graph, ancestors, concatenated, is_constant
from disout_attach.values import CONCATENATIONS, PRODUCTS, REARRANGEMENTS, SQUEEZES, Values, is_flat

Channels = dict[fx.Node, tuple[int, ...]]  # of each node that a map comes to, which channels of the map it has


class Piece(NamedTuple):
    """Some channels of a map, and the layer that reads them first."""

    name: str
    channels: tuple[int, ...]  # of the map
    columns: tuple[tuple[int, ...], ...] | None  # of the weight, of each of them; None: all of the map, in this order
    tenth: bool = False  # whether the columns of a channel are several times one feature, not one flattened kernel


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


def by_hand(name: str) -> str:
    return f"leave {name} out, and place a Disout layer by hand, with the part of the weight that reads its map"


def how_to_name(name: str) -> str:
    return f'name it, readers={{"{name}": "..."}}, or None where nothing reads it'


class Part:
    """A network, or the part of it that is called `within`, in which maps are followed to their readers.

    Raises:
        ValueError: it cannot be traced.
    """

    def __init__(self, model: nn.Module, names: list[str], within: str = "") -> None:
        self.graph = Graph(model, names, within)
        self.values = Values(self.graph)

    def is_features_last(self, name: str) -> bool | None:
        """None where the graph does not show it."""
        nodes = self.graph.returned[name]
        value = self.values.known.get(nodes[0]) if nodes and nodes[0] else None
        return value.layout == "last" if value else None

    def named_reader(self, name: str, named: str) -> Reader | str:
        """How the layer that is `named` reads the map of `name`, or why the map cannot be followed to it.

        Raises:
            ValueError: the layer reads the map in another way than channel by channel, or not all of it.
        """
        nodes = self.graph.returned[name]
        if len(nodes) != 1:
            return f"{name} is called {len(nodes)} times in a forward"
        if nodes[0] not in self.values.known:
            return f"the channels of what {name} returns cannot be told"
        readers, unknown, parts = self.follow(nodes[0], named)
        if any(f"{self.graph.prefix}{node.target}" == named for node in unknown):
            raise ValueError(f"{name} -> {named}: not read channel by channel, in order; {by_hand(name)}")
        if not readers and unknown:
            return f"{name} goes to {self.graph.place_of(unknown[0])}, which is not understood"
        if not readers:
            return f"{named} does not read it"
        pieces, _ = self.pieces(readers, nodes[0], parts)
        channels, read = self.values.known[nodes[0]].channels, sum(len(piece.channels) for piece in pieces)
        if read < channels:
            text = f"the map has {channels} channels, and this layer reads {read} of them"
            raise ValueError(f"{name} -> {named}: {text}; {by_hand(name)}")
        return Reader(tuple(pieces), 1, self.graph.within)

    def first_reader(self, name: str) -> Reader:
        """Follows the map to the layer that reads it first."""
        nodes = self.graph.returned[name]
        if len(nodes) > 1:
            raise ValueError(
                f"{name} is called {len(nodes)} times in a forward: leave it out of `where`, or {how_to_name(name)}"
            )
        if not nodes or nodes[0] is None:
            raise ValueError(f"{name} is not called, or returns no single map: leave it out")
        start = nodes[0]
        if start not in self.values.known:
            raise ValueError(f"the channels of what {name} returns cannot be told: {how_to_name(name)}")
        readers, unknown, parts = self.follow(start)
        value = self.values.known[start]
        pieces, last = self.pieces(readers, start, parts)
        left = value.channels - sum(len(piece.channels) for piece in pieces)
        if unknown and (left or self.graph.nodes.index(unknown[0]) < last):
            self.refuse_gate(name, start, unknown[0])
            raise ValueError(
                f"{name} goes to {self.graph.place_of(unknown[0])}, which is not understood: {how_to_name(name)}"
            )
        if not readers:
            raise ValueError(f"no convolution or linear layer was found that reads {name}: {how_to_name(name)}")
        if left:
            raise ValueError(f"nothing reads {left} of the {value.channels} channels of {name}: {how_to_name(name)}")
        return Reader(tuple(pieces), len(readers), self.graph.within)

    def follow(self, start: fx.Node, named: str | None = None) -> tuple[list[fx.Node], list[fx.Node], Channels]:
        """Follows a map through the nodes in the order of use. Returns the nodes that read it, only those of the layer
        that is `named` if one is, those that are not understood, and which of its channels come to each node."""
        value = self.values.known[start]
        # Which channel of the map each channel is; -1: none of it. And where a rearrangement begins that is under way.
        parts: Channels = {start: tuple(range(value.channels))}
        begun: dict[fx.Node, fx.Node] = {}
        readers: list[fx.Node] = []
        unknown: list[fx.Node] = []
        for node in self.graph.nodes[self.graph.nodes.index(start) + 1 :]:
            effect, what = self.effect(node, start, parts, begun)
            if effect == "read":
                if named in (None, f"{self.graph.prefix}{node.target}"):
                    readers.append(node)
            elif effect == "rearranging":
                begun[node] = what
            elif effect == "unknown":
                unknown.append(what)
            elif effect:
                parts[node] = what
            if effect == "multiplied":  # by gates made from the map itself: what reads it for them alone does not count
                for gate in self.gates(node, parts):
                    alone = self.only_for_gate(gate, node, start)
                    readers = [reader for reader in readers if reader not in alone]
                    unknown = [stranger for stranger in unknown if stranger not in alone]
        return readers, unknown, parts

    def effect(
        self, node: fx.Node, start: fx.Node, parts: Channels, begun: dict[fx.Node, fx.Node]
    ) -> tuple[str | None, Any]:
        """What a node does with the channels that come to it, and: of 'passed' (rearranged and joined ones too) and
        'multiplied', its channels; of 'rearranging', which is not over, where that begins; of 'unknown', which node is
        not understood. 'read' ends there; None: they do not come to it, or it only looks at them."""
        sources = [source for source in node.all_input_nodes if source in parts or source in begun]
        if not sources or node.op == "output" or self.graph.only_looks(node):
            return None, None
        if node in self.values.moved:
            origin, channels = self.values.moved[node]
            return "passed", tuple(parts[origin][channel] for channel in channels)
        kind, layer = self.graph.kind(node), self.graph.is_layer(node)
        under_way = [begun[source] for source in sources if source in begun]
        if under_way or not (node in self.values.known or layer):
            return "rearranging" if kind in REARRANGEMENTS else "unknown", under_way[0] if under_way else node
        if layer:
            return ("read", None) if self.fits(node, sources, start, parts) else ("unknown", node)
        if kind in CONCATENATIONS:
            joined = [parts.get(part, (-1,) * self.values.known[part].channels) for part in concatenated(node)[0]]
            return "passed", tuple(channel for part in joined for channel in part)
        if len({parts[source] for source in sources}) > 1:  # channels are mixed
            return "unknown", node
        if kind not in PRODUCTS:
            return "passed", parts[sources[0]]
        gates = [gate for gate in self.gates(node, parts) if not is_constant(gate)]
        of_map_alone = all(start in ancestors([gate]) for gate in gates)
        return ("multiplied", parts[sources[0]]) if of_map_alone else ("unknown", node)

    def gates(self, product: fx.Node, parts: Channels) -> list[fx.Node]:
        """What the map is multiplied by."""
        return [other for other in product.all_input_nodes if other not in parts]

    def pieces(self, readers: list[fx.Node], start: fx.Node, parts: Channels) -> tuple[list[Piece], int]:
        """Each channel's first reader, and the place among the nodes of the last of them."""
        value, pieces, last = self.values.known[start], [], 0
        left = set(range(value.channels))
        for reader in readers:
            source = next(source for source in reader.all_input_nodes if source in parts)
            each = self.columns_each(reader, source)
            # Which channel of the map each column of the weight reads.
            read = parts[source] * each
            if self.values.known[source].layout == "flat":
                read = tuple(channel for channel in parts[source] for _ in range(each))
            places: dict[int, list[int]] = {channel: [] for channel in sorted(left.intersection(read))}
            for column, channel in enumerate(read):
                if channel in places:
                    places[channel].append(column)
            if places:
                columns = tuple(map(tuple, places.values()))
                in_order = [*chain(*columns)] == [*range(len(read))] and len(columns[0]) == each
                # Where several features of the map itself are one channel here, the weight reads them in their order.
                whole = (len(places) == value.channels and in_order) or (is_flat(value) and each > 1)
                tenth = len(columns[0]) > each == 1
                pieces.append(
                    Piece(f"{self.graph.prefix}{reader.target}", tuple(places), None if whole else columns, tenth)
                )
                left, last = left - places.keys(), self.graph.nodes.index(reader)
        return pieces, last

    def refuse_gate(self, name: str, start: fx.Node, product: fx.Node) -> None:
        """Raises ValueError where what the module returns multiplies a map that it is made from."""
        others = [other for other in product.all_input_nodes if start not in ancestors([other])]
        if self.graph.kind(product) in PRODUCTS and others and ancestors([start]).issuperset(others):
            raise ValueError(
                f"{name} is a gate: what it returns multiplies a map ({self.graph.place_of(product)}), and no layer "
                "reads it as a feature map: leave it out of `where`"
            )

    def only_for_gate(self, gate: fx.Node, product: fx.Node, start: fx.Node) -> set[fx.Node]:
        """What makes a gate (1 x 1, as in squeeze-and-excitation) from a map and does nothing else."""
        behind, reached = ancestors([gate]), {start}
        for node in self.graph.nodes:  # without a squeeze
            if reached.intersection(node.all_input_nodes) and self.graph.kind(node) not in SQUEEZES:
                reached.add(node)
        if gate in reached:
            return set()
        elsewhere = set(self.graph.nodes) - behind - {product}
        for node in reversed(self.graph.nodes):
            if node in behind and elsewhere.intersection(node.users):
                elsewhere.add(node)
        return behind - elsewhere

    def fits(self, node: fx.Node, sources: list[fx.Node], start: fx.Node, parts: Channels) -> bool:
        """Whether the layer reads the channels of its input one by one, and all of them as often. A recurrent layer's
        state is none."""
        arguments: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), arguments.append)
        if sources != [node.args[0] if node.args else node.kwargs.get("input")] or arguments.count(sources[0]) > 1:
            return False
        module, flat = self.graph.module(node), is_flat(self.values.known[start])
        counts = Counter(channel for channel in parts[sources[0]] if channel >= 0)
        each, times = self.columns_each(node, sources[0]), set(counts.values())
        if flat and each > 1 and self.values.known[sources[0]].layout != self.values.known[start].layout:
            return False
        return each > 0 and (times <= {1} or (len(times) == 1 and isinstance(module, nn.Linear)))

    def columns_each(self, node: fx.Node, source: fx.Node) -> int:
        """How many columns of the layer's weight read each channel of its source, one by one; 0 if it does not."""
        module, value = self.graph.module(node), self.values.known[source]
        if isinstance(module, nn.Linear):
            each, rest = divmod(module.in_features, value.channels)
            fits = not rest and (value.layout in ("flat", "flat last") or (each == 1 and value.layout != "first"))
            return each if fits else 0
        if isinstance(module, RECURRENT):
            return int(value.layout == "last" and value.rank in (3, None) and module.input_size == value.channels)
        return int(value.layout == "first" and module.in_channels == value.channels)


class Parts:
    """The graph of a network, or where it cannot be traced of the largest parts of it that can be and hold the named
    modules: what reads a map first in a part does so in the network."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        self.traced: dict[str, Part | str] = {}  # each part's graph, or why there is none

    def of(self, name: str) -> Part | None:
        """Where this module's map is followed."""
        for end in [0, *(index for index, letter in enumerate(name) if letter == ".")]:
            within = name[:end]
            if within not in self.traced:
                inside = [other for other in self.names if other.startswith(f"{within}." if within else "")]
                try:
                    self.traced[within] = Part(self.model, inside, within)
                except ValueError as error:
                    self.traced[within] = str(error)
            graph = self.traced[within]
            if isinstance(graph, Part):
                return graph
        return None

    def readers(self, given: Mapping[str, str | None]) -> dict[str, Reader | str]:
        """Of what each module that `where` names returns, where it is not given as None: of a layer that is given and
        cannot be followed to, why.

        Raises:
            ValueError: one cannot be told; says why, how to name it, and for which others too.
        """
        found: dict[str, Reader | str] = {}
        problems: dict[str, str] = {}
        for name in self.names:
            try:
                graph, named = self.of(name), given.get(name)
                if named:
                    found[name] = graph.named_reader(name, named) if graph else str(self.traced[""])
                elif name not in given:
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
