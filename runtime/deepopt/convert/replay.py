"""Runs one layer of a recorded forward: the user's own modules, and the calls between them.

`RecordedLayer` holds the modules and parameters of its layer under the paths that they have in the
model, so that names stay those of the original's `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from deepopt.convert.capture import captured
from deepopt.convert.graph import Constant, HereRef, Node, StateRef, ValueRef
from deepopt.convert.split import LayerProgram
from deepopt.convert.structure import leaves, put_together
from deepopt.errors import InputError, TrainingError


class RecordedLayer(torch.nn.Module):
    """One layer of the chain of a recorded model.

    Args:
        program: what it does.
        model: whose modules and parameters it takes; they are shared, not copied.
        extra: further paths of modules and parameters that it holds without using them.
    """

    def __init__(
        self, program: LayerProgram, model: torch.nn.Module, *, extra: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self._program = program
        self._evaluation = program  # in eval mode; see evaluate_with
        self._extra: dict[str, Any] = {}  # tensors that are neither parameter nor buffer
        paths = [node.module for node in program.nodes if node.module is not None]
        for path in dict.fromkeys((*paths, *extra)):
            self._hold(model, path)
        for name in dict.fromkeys(name for node in program.nodes for name in node.states_in()):
            self._hold(model, name)

    def evaluate_with(self, program: LayerProgram, model: torch.nn.Module) -> None:
        """Do something else in eval mode: what is computed between layers may differ.

        Args:
            program: of this layer in eval mode.
            model: as for the constructor.

        Raises:
            InputError: it would use parameters of another layer.
        """
        held = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        paths = [node.module for node in program.nodes if node.module is not None]
        states = [name for node in program.nodes for name in node.states_in()]
        for path in dict.fromkeys((*paths, *states)):
            self._hold(model, path)
        for name, _ in self.named_parameters(remove_duplicate=False):
            if name not in held:
                raise InputError(
                    f"in eval mode layer {program.name} uses {name}, which in train mode belongs to "
                    "another layer",
                    remedy="let both modes call the same modules, or leave evaluation out",
                )
        self._evaluation = program

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The values alive at the cut before to those alive at the cut behind.

        Args:
            tensors: in the order of `program.takes`.

        Returns:
            A tuple in the order of `program.gives`; of the last layer, a tuple of the model's
            output alone, whatever it is.

        Raises:
            TrainingError: the forward would have gone another way than when it was recorded.
        """
        program = self._program if self.training else self._evaluation
        assert len(tensors) == len(program.takes), f"{len(tensors)} tensors for {program.takes}"
        values: dict[int, Any] = dict(zip(program.takes, tensors, strict=True))
        here = self._device(tensors)

        def resolve(leaf: Any) -> Any:
            if type(leaf) is ValueRef:
                return values[leaf.index]
            if type(leaf) is Constant:
                constant = leaf.value
                return constant.to(here) if isinstance(constant, torch.Tensor) else constant
            if type(leaf) is StateRef:
                return self._state(leaf.name)
            assert type(leaf) is HereRef, f"{leaf!r} stands for nothing"
            return here

        for node in program.nodes:
            args, kwargs = put_together(node.inputs, resolve)
            if node.is_effect and not args[0].requires_grad:  # a run without gradients
                continue
            with captured(node, self, values):
                result = self._run(node, args, kwargs)
            if node.reads:
                _compare(node, result)
                continue
            made = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
            if len(made) != len(node.outputs):
                raise TrainingError(
                    f"{node.where}: {node.name} gave {len(made)} tensors, {len(node.outputs)} when "
                    "the model was converted",
                    remedy="let its forward return the same number of tensors each time",
                )
            named = zip(node.outputs, made, strict=True)
            values.update((index, tensor) for index, tensor in named if index is not None)
            values.update((new, values[old]) for old, new in node.rebound)
        if program.output is not None:
            return (put_together(program.output, resolve),)
        return tuple(values[index] for index in program.gives)

    def _run(self, node: Node, args: Any, kwargs: Any) -> Any:
        call: Callable[..., Any] | None = node.function
        if node.module is not None:
            call = self.get_submodule(node.module)
        assert call is not None, f"{node} calls nothing"
        ambient = node.ambient
        if ambient.grad and ambient.autocast is None:
            return call(*args, **kwargs)
        modes: list[AbstractContextManager[Any]] = []
        if not ambient.grad:
            modes.append(torch.no_grad())
        if ambient.autocast is not None:
            kind, dtype = ambient.autocast
            modes.append(torch.autocast(kind, dtype))
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return call(*args, **kwargs)

    def _state(self, name: str) -> Any:
        if name in self._extra:
            return self._extra[name]
        owner, _, attribute = name.rpartition(".")
        return getattr(self.get_submodule(owner), attribute)

    def _device(self, tensors: tuple[torch.Tensor, ...]) -> torch.device:
        for held in (self.parameters(), self.buffers(), iter(tensors)):
            if (first := next(held, None)) is not None:
                return first.device
        return torch.device("cpu")

    def _hold(self, model: torch.nn.Module, path: str) -> None:
        """Register what lies at a path of the model at the same path here."""
        owner_path, _, name = path.rpartition(".")
        source: torch.nn.Module = model
        owner: torch.nn.Module = self
        for part in owner_path.split(".") if owner_path else ():
            source = source.get_submodule(part)
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
            if owner is source:  # a module held whole: all of it is here
                return
        if name in source._modules:
            owner._modules[name] = source._modules[name]
        elif name in source._parameters:
            owner.register_parameter(name, source._parameters[name])
        elif name in source._buffers:
            persistent = name not in source._non_persistent_buffers_set
            owner.register_buffer(name, source._buffers[name], persistent=persistent)
        else:
            self._extra[path] = getattr(source, name)


def _compare(node: Node, result: Any) -> None:
    value = result.tolist() if hasattr(result, "tolist") else result
    if value != node.expected:
        raise TrainingError(
            f"{node.where}: the forward would go another way on this micro-batch: {node.name} gives "
            f"{value}, {node.expected} with the inputs that the model was converted with",
            remedy=node.remedy
            or "let all micro-batches agree here (padding, masks), or compute the branch with torch.where",
        )
