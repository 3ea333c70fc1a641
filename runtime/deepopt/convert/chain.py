"""A model as a chain of layers, whichever way its layers were found.

A model says what its layers are by being an `nn.Sequential` or by `deepopt_layers()`; any other model
is recorded (`record`, `split`). Either way a layer is a module that maps tensors to tensors, and every
parameter has a name: that of the model's `state_dict`, or, for a further use of a parameter in a later
layer, that name and `#` and the layer's index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from deepopt.convert.replay import RecordedLayer
from deepopt.convert.split import LayerProgram
from deepopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLayer:
    """One layer of a chain.

    Args:
        name: path of its module in the model.
        kind: class name of that module.
        module: maps tensors to tensors.
        names: name of a parameter or buffer in `module` -> its name in the chain.
        repeated: names in the chain that are no names of the model's `state_dict`: further uses.
        flops: floating-point operations of one forward with the example inputs; None where there
            were none.
    """

    name: str
    kind: str
    module: torch.nn.Module
    names: Mapping[str, str]
    repeated: frozenset[str] = frozenset()
    flops: int | None = None

    def parameters(self, *, remove_duplicate: bool = True) -> dict[str, torch.nn.Parameter]:
        """Its parameters by their names in the chain."""
        pairs = self.module.named_parameters(remove_duplicate=remove_duplicate)
        return {self.names[local]: parameter for local, parameter in pairs}

    def buffers(self, module: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
        """Its persistent buffers by their names in the chain, further uses left out.

        Args:
            module: a copy of the layer's module; None: the module itself.
        """
        module = module or self.module
        persistent = module.state_dict(keep_vars=True).keys()
        return {
            self.names[local]: buffer
            for local, buffer in module.named_buffers()
            if local in persistent and self.names[local] not in self.repeated
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A model and its layers in the order of the forward.

    Args:
        model: as it was given.
        layers: the chain.
        ties: name of a parameter -> name of the earlier parameter that is the same object.
        programs: what the layers of a recorded model do; None where the model named its layers.
        unused: parameters that the forward does not touch.
    """

    model: torch.nn.Module
    layers: tuple[ChainLayer, ...]
    ties: Mapping[str, str]
    programs: tuple[LayerProgram, ...] | None = None
    unused: tuple[str, ...] = ()
    owners: Mapping[str, int] = field(default_factory=dict)

    def is_tied_elsewhere(self, name: str, index: int) -> bool:
        """Whether a layer's parameter is the same as one of an earlier layer."""
        return name in self.ties and self.owners[self.ties[name]] != index


def named_layers(model: torch.nn.Module) -> tuple[tuple[str, torch.nn.Module], ...] | None:
    """(name, module) of the layers that a model names itself; None when it names none.

    Raises:
        InputError: `deepopt_layers()` does not fit the model.
    """
    own = getattr(model, "deepopt_layers", None)
    if callable(own):
        layers = tuple(own())
    elif type(model).forward is torch.nn.Sequential.forward:
        # named_children() would leave out a module that stands at a second place.
        layers = tuple((name, model.get_submodule(name)) for name in model._modules)
    else:
        return None
    if not layers:
        raise InputError(f"{type(model).__name__} is a model without layers")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in layers:
        if modules.get(name) is not module:
            raise InputError(
                f"deepopt_layers() names a layer {name!r}, "
                "but the model has no such module at that path"
            )
    held = {id(p) for _, module in layers for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            raise InputError(
                f"parameter {name} belongs to none of the {len(layers)} layers",
                remedy="put it into one of the layers that deepopt_layers() returns",
            )
    return layers


def chain_of_named(
    model: torch.nn.Module, layers: Sequence[tuple[str, torch.nn.Module]]
) -> Chain:
    """The chain of a model that names its layers.

    Args:
        model: the model.
        layers: as `named_layers` gave them.
    """
    return _chain(
        model,
        [
            ChainLayer(
                name=name,
                kind=type(module).__name__,
                module=module,
                names={local: f"{name}.{local}" for local in _local_names(module)},
            )
            for name, module in layers
        ],
    )


def chain_of_recorded(model: torch.nn.Module, programs: Sequence[LayerProgram]) -> Chain:
    """The chain of a recorded model.

    Args:
        model: the model, or another copy of the one that was recorded.
        programs: of its layers.

    Raises:
        InputError: a buffer that the forward writes to is used by several layers.
    """
    homes, unused = _left_over(model, programs)
    seen: set[str] = set()
    layers = []
    for index, program in enumerate(programs):
        module = RecordedLayer(program, model, extra=homes.get(index, ()))
        locals_ = _local_names(module)
        again = seen & set(locals_)
        names = {local: f"{local}#{index}" if local in again else local for local in locals_}
        written = sorted(again & program.written)
        if written:
            raise InputError(
                f"buffer {written[0]} is written to by several uses of a module",
                remedy="use a module of its own for each place",
            )
        seen.update(locals_)
        first = next(node for node in program.nodes if node.is_layer)
        assert first.module is not None, "a layer is a module"
        layers.append(
            ChainLayer(
                name=program.name,
                kind=type(model.get_submodule(first.module)).__name__,
                module=module,
                names=names,
                repeated=frozenset(names[local] for local in again),
                flops=sum(node.flops for node in program.nodes),
            )
        )
    return _chain(model, layers, programs=tuple(programs), unused=unused)


def evaluate_recorded(chain: Chain, programs: Sequence[LayerProgram]) -> None:
    """Tell the layers of a recorded model what they do in eval mode.

    Args:
        chain: of the model.
        programs: of its layers in eval mode.

    Raises:
        InputError: in eval mode the model calls other layers than in train mode.
    """
    found, expected = [p.name for p in programs], [layer.name for layer in chain.layers]
    if found != expected:
        odd = sorted(set(found) ^ set(expected)) or expected
        raise InputError(
            f"in eval mode the forward of {type(chain.model).__name__} calls other layers than in "
            f"train mode: {odd[0]}",
            remedy="let both modes call the same modules, or leave evaluation out",
        )
    for layer, program in zip(chain.layers, programs, strict=True):
        assert isinstance(layer.module, RecordedLayer), "a recorded model has recorded layers"
        layer.module.evaluate_with(program, chain.model)


def _left_over(
    model: torch.nn.Module, programs: Sequence[LayerProgram]
) -> tuple[dict[int, tuple[str, ...]], tuple[str, ...]]:
    """Names that no layer's calls touch: the layer that holds the same tensor, or the first one,
    shall hold them, so that nothing of the `state_dict` is lost; and which parameters those are."""
    holder: dict[int, int] = {}
    covered: set[str] = set()
    for index, program in enumerate(programs):
        module = RecordedLayer(program, model)
        covered.update(_local_names(module))
        for tensor in (*module.parameters(), *module.buffers()):
            holder.setdefault(id(tensor), index)
    homes: dict[int, list[str]] = {}
    unused = []
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if name not in covered:
            homes.setdefault(holder.get(id(tensor), 0), []).append(name)
            if id(tensor) not in holder and isinstance(tensor, torch.nn.Parameter):
                unused.append(name)
    return {index: tuple(names) for index, names in homes.items()}, tuple(unused)


def _chain(
    model: torch.nn.Module,
    layers: Sequence[ChainLayer],
    *,
    programs: tuple[LayerProgram, ...] | None = None,
    unused: tuple[str, ...] = (),
) -> Chain:
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    owners: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.parameters(remove_duplicate=False).items():
            source = first.setdefault(id(parameter), name)
            owners.setdefault(name, index)
            if source != name:
                ties[name] = source
    return Chain(
        model=model,
        layers=tuple(layers),
        ties=ties,
        programs=programs,
        unused=unused,
        owners=owners,
    )


def _local_names(module: torch.nn.Module) -> list[str]:
    return [
        *(name for name, _ in module.named_parameters(remove_duplicate=False)),
        *(name for name, _ in module.named_buffers(remove_duplicate=False)),
    ]
