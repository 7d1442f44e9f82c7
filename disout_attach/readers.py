"""Which weight reads a feature map next, found in a network's graph, for hooks.py."""

from typing import Any, NamedTuple

from torch import fx, nn

from disout_attach.graph import RECURRENT, Graph, ancestors, concatenated, is_constant
from disout_attach.values import CONCATENATIONS, PRODUCTS, REARRANGEMENTS, SQUEEZES, Values

Channels = dict[fx.Node, tuple[int, ...]]  # of each node that a map comes to, which channels of the map it has


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

    def first_reader(self, name: str) -> Reader:
        """Follows the map through the nodes in the order of use."""
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
        value = self.values.known[start]
        # Which channel of the map each channel is; -1: none of it. And where a rearrangement begins that is under way.
        parts: Channels = {start: tuple(range(value.channels))}
        begun: dict[fx.Node, fx.Node] = {}
        readers: list[fx.Node] = []
        unknown: list[fx.Node] = []
        for node in self.graph.nodes[self.graph.nodes.index(start) + 1 :]:
            effect, what = self.effect(node, start, parts, begun)
            if effect == "read":
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
            of_map = [channel for channel in parts[sources[0]] if channel >= 0]
            once = len(set(of_map)) == len(of_map)
            flat = self.values.known[start].layout == "flat"
            return ("read", None) if once and self.fits(node, sources[0], flat) else ("unknown", node)
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
            places = {channel: column for column, channel in enumerate(parts[source]) if channel in left}
            if places:
                channels = tuple(sorted(places))
                columns = tuple(places[channel] for channel in channels)
                total = None if value.layout == "flat" else self.values.known[source].channels
                pieces.append(Piece(f"{self.graph.prefix}{reader.target}", channels, columns, total))
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

    def fits(self, node: fx.Node, source: fx.Node, flat: bool) -> bool:
        """Whether the layer reads the channels of its source one by one."""
        module, value = self.graph.module(node), self.values.known[source]
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
