"""Puts Disout into a network that knows nothing of it, and takes it out again.

    handle = attach(torchvision.models.resnet50(), "layer[34].*.conv?", dist_prob=0.07, block_size=7, alpha=1.0)
    print(handle)  # what reads each map
    ...
    handle.set_dist_prob(0.07 * step / (steps - 1))  # before each training step
    ...
    handle.remove()

The strength of the distortion comes from the weight that reads the map next, so `attach` follows the map through the
network, with torch.fx, to the layer that reads it first. It does not guess: where it cannot tell, it says so, and how
to name the reader.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import chain, count
from typing import Any, Literal, cast

from torch import Tensor, fx, nn

from disout import Disout, whole_weight
from disout_attach.graph import CONVOLUTIONS, LAYERS, RECURRENT
from disout_attach.readers import Parts, Piece, Reader, by_hand

# Networks are trained with these frozen, by eval(): neither their mode nor that of what is in them says anything.
BATCH_NORMS = (nn.modules.batchnorm._NormBase,)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, Disout)


class Hook:
    """A forward hook that distorts what its module returns. An object, so that a deep copy of the network reads the
    copy's weights.

    `readers` are the layers that read its map, and `pieces` which part of it each reads: for one that the user named,
    and that the map cannot be followed to, why. `parent` is the module that holds a batch norm, None for all others.
    """

    def __init__(
        self, layer: Disout, readers: list[Any], pieces: list[Piece | str], names: str, parent: nn.Module | None
    ) -> None:
        self.layer, self.readers, self.pieces, self.names, self.parent = layer, readers, pieces, names, parent

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        # The layer itself stays in training where the module that hosts it has been exchanged for another.
        if not (self.parent or module).training:
            return output
        if isinstance(module, RECURRENT):
            return (self.through_layer(output[0]), *output[1:])
        return self.through_layer(output)

    def through_layer(self, x: Any) -> Any:
        if isinstance(x, fx.Proxy):  # a second `attach` follows its maps
            return x
        if isinstance(x, Tensor) and x.is_quantized:  # converted for use, though such modules say that they train
            return x
        if not isinstance(x, Tensor):
            raise ValueError(f"{self.names}: only a map can be distorted, not a {type(x).__name__}")
        return self.layer(x, *self.weight_for(x)) if self.readers else self.layer(x)

    def weight_for(self, x: Tensor) -> tuple[Tensor, int]:
        """The weight, (out, C/groups, ...) or of its largest over out, that reads the C channels of x, and groups."""
        last = self.layer.features_last or x.dim() == 2
        channels = x.shape[-1] if last else x.shape[1]
        weights = []
        for reader, piece in zip(self.readers, self.pieces, strict=True):
            weight: Any = weight_of(reader)
            groups = getattr(reader, "groups", 1)
            reads = weight.shape[1] * groups
            if isinstance(piece, Piece) and piece.columns is not None:
                # Of the outputs, or those of a group, only the largest weights count.
                weight = whole_weight(weight)
                weight = weight.view(groups, -1, *weight.shape[1:]).amax(1).flatten(0, 1)[None]
                weight, groups = weight[:, [*chain(*piece.columns)]], 1
                if len(piece.columns[0]) > 1:
                    weight = weight.unflatten(1, (len(piece.columns), -1)) * (0.1 if piece.tenth else 1)
            elif reads != channels:
                # A linear layer that reads a flattened map is a convolution whose kernel is the whole map.
                if not isinstance(piece, Piece) or reads % channels or not isinstance(reader, nn.Linear):
                    problem = f"{self.names}: the map has {channels} channels, and this layer reads {reads}"
                    why = f"; which of them cannot be told ({piece}): {by_hand('it')}" if isinstance(piece, str) else ""
                    raise ValueError(problem + why)
                weight = whole_weight(weight).view(weight.shape[0], channels, -1)
            weights.append(weight)
        return (cast(Tensor, weights[0]), groups) if len(weights) == 1 else (joined(weights, self.pieces), 1)


def weight_of(reader: Any) -> Any:
    return reader.weight_ih_l0 if isinstance(reader, RECURRENT) else reader.weight


def joined(weights: list[Tensor], pieces: list[Any]) -> Tensor:
    """One weight, (1, C, K), that reads each channel as strongly as the layer of its piece does (see disout.strength),
    though these have kernels of different sizes."""
    largest = [
        weight.detach().float().amax(0).reshape(len(piece.channels), -1)
        for weight, piece in zip(weights, pieces, strict=True)
    ]
    most = max(weight.shape[1] for weight in largest)
    whole = largest[0].new_zeros(1, sum(map(len, largest)), most)
    for weight, piece in zip(largest, pieces, strict=True):
        size = weight.shape[1]
        tenth = 0.1 if size == 1 < most else 1.0
        whole[0, list(piece.channels), :size] = weight * (tenth * most / size)
    return whole


class Handle:
    """What `attach` put into a network. As a context manager it takes it out at the end. copy.deepcopy((model, handle))
    copies both together.

    Attributes:
        layers: the Disout layers under the names of the modules that they follow.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, Disout] = {}
        self._model = model
        self._readers: dict[str, str] = {}
        self._hooks: list[tuple[Hook, nn.Module, str]] = []

    def set_dist_prob(self, dist_prob: float) -> None:
        """Raises RuntimeError where modules were exchanged for others without their hooks, so that nothing distorts, or
        where a reader was exchanged for one with another weight, so that the strength comes from the old one."""
        there = {id(hook) for module in self._model.modules() for hook in module._forward_hooks.values()}
        read = {*map(id, self._model.modules()), *map(id, self._model.parameters())}
        hooks = {name: hook for name, (hook, *_) in zip(self.layers, self._hooks, strict=True)}
        gone = [name for name, hook in hooks.items() if id(hook) not in there]
        if gone:
            raise RuntimeError(
                f"the hooks of {', '.join(gone)} are gone, as these modules were exchanged: remove(), and attach again"
            )
        for name, hook in hooks.items():
            # A parametrized weight is computed, and spectral_norm's changes, whenever it is asked for.
            if any(id(reader) not in read and id(weight_of(reader)) not in read for reader in hook.readers):
                raise RuntimeError(
                    f"what reads {name}, {self._readers[name]}, was exchanged: remove(), and attach again"
                )
        for layer in self.layers.values():
            layer.dist_prob = dist_prob

    def remove(self) -> None:
        """The network is as it was. A second time it does nothing."""
        hooks = [hook for hook, *_ in self._hooks]
        for module in self._model.modules():  # not only where they were put: some exchanges take them along
            for key, hook in list(module._forward_hooks.items()):
                if any(hook is ours for ours in hooks):
                    del module._forward_hooks[key]
        for _, host, name in self._hooks:
            delattr(host, name)
        self._hooks.clear()
        self.layers.clear()
        self._readers.clear()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return "\n".join(f"{name} -> {reader}" for name, reader in self._readers.items())


def attach(
    model: nn.Module,
    where: str | list[str],
    dist_prob: float,
    block_size: int = 6,
    alpha: float = 1.0,
    readers: Literal["auto"] | Mapping[str, str | None] | None = "auto",
    features_last: bool | None = None,
) -> Handle:
    """Distorts, in training, what modules of `model` return. Its code, parameters and state dict stay as they are.

    Args:
        model: any network, as it will be trained: before it is compiled or wrapped for several processes, and after a
            layer of it is exchanged. It distorts where the Disout layer and the module that it follows are in training;
            for a batch norm, which is often frozen, the module that holds it counts in its place. Forward hooks
            distort, which torch.fx drops and torch.jit.script refuses, and nn.DataParallel shares between devices.
            Under fully_shard (FSDP2), each forward gathers the reader's whole weight once more, so all ranks must call
            the same layers. The modules that host a Disout layer have a child from then on, so tools that take
            childless modules for layers (FLOP counters) come first. A weight under `prune` or the old `weight_norm` is
            read one step late, as it is computed when its layer is called.
        where: names of modules, or globs such as "layer[34].*.conv?". Each must be called once in a forward, and
            return a map (N, C, ...), or (N, ..., C) as linear and recurrent layers do.
        dist_prob, block_size, alpha: of each Disout.
        readers: "auto" finds the weight that reads each map: that of the first convolution, linear or recurrent layer
            in the order of use in training, with the defaults of the forward's optional arguments; where a channel
            shuffle or a chunk hands the channels to several layers, each channel's first. Where torch.fx cannot trace
            the network, it looks within the largest part that it can trace and that holds the module. A depthwise or
            grouped convolution reads each channel with the kernels of its own group alone. A linear layer that reads a
            flattened map counts as a convolution whose kernel is the whole map. A recurrent layer reads with
            weight_ih_l0 its input, not its state. A channel that a linear layer reads several times, as behind two
            pools, counts with the mean. A mapping names the readers of some maps, {"layer4.2.conv1": "layer4.2.conv2"},
            which read the columns that the graph shows; where it does not show them, all of the map's channels in
            order. None, for all of them or for one, is the authors' constant where nothing reads the map.
        features_last: whether the maps are (N, ..., C). None: as the network's graph, or the module's class, shows.

    Returns: a handle that sets the rate of all layers, lists map -> reader when printed, and takes the layers out.

    Raises:
        ValueError: nothing has such a name, or the reader or the layout cannot be told; says why, and how to name it.
            Also where a named reader reads only a part of the map, or not channel by channel; in the first forward,
            where the map cannot be followed to it and has another number of channels.
    """
    if type(model).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        raise ValueError("model: attach to the network itself, before DistributedDataParallel or a compiler takes it")
    modules = dict(model.named_modules())
    patterns = [where] if isinstance(where, str) else list(where)
    names = [name for name in modules if name and any(fnmatchcase(name, pattern) for pattern in patterns)]
    for pattern in patterns or [""]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"where: no module of the network is called {pattern!r}")
    given = named_readers(readers, names, modules)
    parts = Parts(model, names)
    found = parts.readers(given)

    handle = Handle(model)
    try:
        for name in names:
            if isinstance(modules[name], RECURRENT) and not modules[name].batch_first and block_size > 1:
                raise ValueError(f"{name} is not batch_first, so blocks would lie across samples: say block_size=1")
            last = is_features_last(name, modules[name], parts) if features_last is None else features_last
            read = found.get(name)
            pieces: list[Any] = [*read.pieces] if isinstance(read, Reader) else [read] if read else []
            layers = [modules[piece.name if isinstance(piece, Piece) else str(given[name])] for piece in pieces]
            reader = str(given[name] or "no reader") if name in given else str(read)
            layer = Disout(dist_prob, block_size, alpha, features_last=last).train(model.training)
            devices = [device_of(module) for module in (modules[name], *layers, model)]
            layer.to(next(filter(None, devices), None))
            parent = modules[name.rpartition(".")[0]]
            batch_norm = isinstance(modules[name], BATCH_NORMS)
            host = host_of(modules[name], parent, model)
            attribute = next(free for free in map("disout{}".format, count()) if not hasattr(host, free))
            host.add_module(attribute, layer)
            hook = Hook(layer, layers, pieces, f"{name} -> {reader}", parent if batch_norm else None)
            modules[name].register_forward_hook(hook)
            handle._hooks.append((hook, host, attribute))
            handle.layers[name] = layer
            handle._readers[name] = reader
    except ValueError:
        handle.remove()
        raise
    return handle


def named_readers(
    readers: str | Mapping[str, str | None] | None, names: list[str], modules: dict[str, nn.Module]
) -> dict[str, str | None]:
    """Those that the user names."""
    if readers is None:
        return dict.fromkeys(names)
    if isinstance(readers, str):
        if readers != "auto":
            raise ValueError(f'readers: must be "auto", None or a mapping, not {readers!r}')
        return {}
    for name, reader in readers.items():
        if name not in names:
            raise ValueError(f"readers: {name!r} is not among the modules that `where` names")
        if reader is not None and not isinstance(modules.get(reader), LAYERS):
            raise ValueError(f"readers: {reader!r} is no convolution, linear or recurrent layer of the network")
    return dict(readers)


def is_features_last(name: str, module: nn.Module, parts: Parts) -> bool:
    """Whether the features are the last dimension of what a module returns."""
    graph = parts.of(name)
    shown = graph.is_features_last(name) if graph else None
    if shown is not None:
        return shown
    if isinstance(module, (nn.Linear, nn.Embedding, *RECURRENT)):
        return True
    if isinstance(module, (*CONVOLUTIONS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return False
    raise ValueError(f"{name}: say features_last=False if it returns (N, C, ...), or True if (N, ..., C)")


def host_of(module: nn.Module, parent: nn.Module, model: nn.Module) -> nn.Module:
    """Where a layer can be a submodule without being called: networks and containers may call all that is in them, but
    a layer of torch.nn has nothing in it to call."""
    for inner in [*module.modules(), *parent.modules(), *model.modules()]:
        if isinstance(inner, BATCH_NORMS):
            continue
        inside = [child for child in inner.children() if not isinstance(child, Disout)]
        if type(inner).__module__.startswith("torch.nn.modules.") and not inside and not isinstance(inner, CONTAINERS):
            return inner
    return module


def device_of(module: nn.Module) -> Any:
    return next((parameter.device for parameter in module.parameters()), None)
