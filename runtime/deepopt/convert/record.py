"""Records one forward of a user's model: the user's own code runs once, with its own values.

Modules that `units` keeps whole are one call each, whatever happens inside; between them every torch
function is a call. On the meta device this takes milliseconds and no memory: inputs keep their
values, so that masks and branches on them are real, and only what layers make has none. Reading
such a value into Python is refused with its place; a value that depends on the inputs is noted, and
compared in training.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from deepopt.convert.capture import PartOutputs
from deepopt.convert.graph import (
    Ambient,
    Capture,
    Constant,
    HereRef,
    Node,
    Recording,
    StateRef,
    ValueRef,
    ValueSpec,
    name_of,
)
from deepopt.convert.hidden import checked_objects
from deepopt.convert.interception import intercepted_modules, patched_functions
from deepopt.convert.places import failure, where
from deepopt.convert.shortcuts import REMEDY as MASK_REMEDY
from deepopt.convert.shortcuts import asks_whether_a_mask_is_needed
from deepopt.convert.structure import leaves, put_together, take_apart, template_leaves
from deepopt.convert.watch import Watch
from deepopt.errors import DeepoptError, InputError

CPU, META = torch.device("cpu"), torch.device("meta")

# They bring a tensor's values into Python.
_READS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__",
        "__array__", "item", "tolist", "numpy", "equal", "allclose", "is_nonzero",
    )
) | {torch.equal, torch.allclose, torch.is_nonzero}  # fmt: skip

# They act on a tensor and give no new one: a layer does the same.
_EFFECTS = frozenset([torch.Tensor.register_hook])
# They go back through what layers compute, which lies on other devices.
_BACKWARDS = frozenset([torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward])

_BY_INPUT, _BY_LAYER, _BY_STATE, _BY_CHANCE = "input", "layer", "state", "chance"


def record(
    model: torch.nn.Module,
    *,
    whole: Mapping[str, torch.nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Recording:
    """Run a model's forward once and say what it did. Buffers that it writes to stay written.

    Args:
        model: on one device, or on `meta`; as it trains (train mode, dtype).
        whole: path -> module of what is one call, from `units.modules_kept_whole`.
        args: of the forward; tensors inside are the inputs, in their order.
        kwargs: of the forward.

    Raises:
        InputError: the forward raised, or does what a chain of layers cannot do.
    """
    return _Recorder(model, whole).run(args, dict(kwargs))


class _Recorder(TorchFunctionMode):
    def __init__(self, model: torch.nn.Module, whole: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        self._model = model
        self._whole = whole
        self._is_meta = any(p.is_meta for p in model.parameters())
        self._inside = False  # a call is being made: what happens in it is its own
        self._watch = Watch()
        self._nodes: list[Node] = []
        self._values: list[ValueSpec] = []
        self._sources: list[frozenset[str]] = []  # of each value
        self._numbers: dict[int, int] = {}  # id of a tensor -> its value
        self._kept: list[torch.Tensor] = []  # so that ids stay those of one tensor
        self._parts = PartOutputs()
        self._captures: dict[int, list[Capture]] = {}  # of each call
        self._states = _named_tensors(model)
        self._num_layers = 0

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Recording:
        def copied(leaf: Any) -> Any:
            return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = put_together(take_apart((tuple(args), kwargs), copied), lambda x: x)
        for tensor in leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._add_value(tensor, node=None, sources=frozenset([_BY_INPUT]))
        num_inputs = len(self._values)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(intercepted_modules(self._whole, self._call_module))
            stack.enter_context(patched_functions(self._apply_function))
            stack.enter_context(self._watch)
            stack.enter_context(self)
            try:
                output = self._model(*args, **kwargs)
            except DeepoptError:
                raise
            except Exception as error:  # the user's code may raise anything
                raise failure(self._model, error) from error
        template = take_apart(output, self._to_leaf)
        del output
        self._refuse_kept()
        return Recording(
            num_inputs=num_inputs,
            nodes=tuple(
                replace(node, captures=tuple(self._captures.get(number, ())))
                for number, node in enumerate(self._nodes)
            ),
            values=tuple(self._values),
            output=template,
        )

    # What the forward calls. -------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._inside:
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return self._home(func(*args))
        if func in _READS:
            return self._read(func, tuple(args), kwargs)
        if func in _BACKWARDS:
            raise InputError(
                f"{where()}: the forward of {type(self._model).__name__} computes gradients "
                f"({name_of(func)}) through what its layers made",
                remedy="move that into a layer's own module, or into the loss",
            )
        if func in _EFFECTS:
            self._nodes.append(
                Node(
                    function=func,
                    module=None,
                    inputs=take_apart((tuple(args), kwargs), self._to_leaf),
                    is_effect=True,
                    position=self._num_layers,
                    where=where(),
                )
            )
            return func(*args, **kwargs)
        return self._call(func, tuple(args), kwargs, run=func)

    def _apply_function(
        self, kind: type[torch.autograd.Function], apply: Callable[..., Any], args: Any
    ) -> Any:
        """A custom autograd Function: one call, with its own backward."""
        if self._inside:
            return apply(*args)
        if kind is CheckpointFunction:  # recomputes what is inside: the layers stay layers
            return args[0](*args[2:])

        def later(*given: Any) -> Any:
            return kind.apply(*given)  # type: ignore[no-untyped-call]

        return self._call(later, args, {}, run=apply)

    def _call_module(
        self,
        path: str,
        module: torch.nn.Module,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        takes_code = any(
            isinstance(leaf, torch.nn.Module) or callable(leaf)
            for leaf in leaves((args, kwargs))
        )
        if self._inside or takes_code:
            return call(*args, **kwargs)
        with checked_objects((args, kwargs), known=self._numbers, module=path):
            return self._call(None, args, kwargs, run=call, module=path, owner=module)

    def _call(
        self,
        func: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        run: Callable[..., Any],
        module: str | None = None,
        owner: torch.nn.Module | None = None,
    ) -> Any:
        """Make a call, and note it if it made or changed a tensor."""
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        held = [] if owner is None else [*owner.parameters(), *owner.buffers()]
        on_meta = any(t.is_meta for t in (*given, *held))
        versions = [tensor._version for tensor in given]
        ambient = _ambient()
        number = len(self._nodes)
        self._inside = True
        try:
            made_args, made_kwargs = self._on_meta(args, kwargs) if on_meta else (args, kwargs)
            self._watch.begin(module)
            with self._parts.noted(owner, node=number):
                result = run(*made_args, **made_kwargs)
        finally:
            self._inside = False
            drew, flops = self._watch.end()
        changed = {
            id(t): t
            for t, version in zip(given, versions, strict=True)
            if t._version != version
        }
        if func is torch.Tensor.detach_:  # leaves the version as it is
            changed[id(args[0])] = args[0]
        if on_meta and func is not None and _writes_first(func) and made_args[0] is not args[0]:
            # It wrote to a copy of its first argument; the user's code goes on with the argument.
            changed[id(args[0])] = args[0]
            result = args[0] if result is made_args[0] else result
        made = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
        new = [tensor for tensor in made if id(tensor) not in self._numbers]
        if not (new or changed or module):
            return result
        # A norm or a scale alone is no layer: it goes with the one before.
        is_layer = owner is not None and any(p.dim() > 1 for p in owner.parameters())
        self._num_layers += is_layer
        template = take_apart((args, kwargs), self._to_leaf)
        sources = self._sources_of(template)
        sources |= {_BY_LAYER} if any(p.numel() for p in held) else set()
        sources |= {_BY_CHANCE} if drew else set()
        rebound, writes_state = self._rebind(list(changed.values()), number, sources)
        outputs = tuple(
            None
            if id(tensor) in self._numbers
            else self._add_value(tensor, node=number, sources=sources)
            for tensor in made
        )
        self._nodes.append(
            Node(
                function=func,
                module=module,
                inputs=template,
                outputs=outputs,
                rebound=rebound,
                writes_state=writes_state,
                is_random=drew,
                is_layer=is_layer,
                position=self._num_layers,
                ambient=ambient,
                flops=flops,
                where=where(),
            )
        )
        return result

    def _read(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A value goes into Python, most often into a branch."""
        template = take_apart((args, kwargs), self._to_leaf)
        sources = self._sources_of(template)
        on_meta = any(isinstance(x, torch.Tensor) and x.is_meta for x in leaves((args, kwargs)))
        if on_meta or sources & {_BY_LAYER, _BY_STATE}:
            makers = {
                self._nodes[node].name
                for leaf in template_leaves(template)
                if isinstance(leaf, ValueRef)
                and (node := self._values[leaf.index].node) is not None
            }
            what = ", ".join(sorted(makers)) or "a parameter or buffer"
            raise InputError(
                f"{where()}: the forward of {type(self._model).__name__} reads a value that is "
                f"known only in training ({name_of(func)} of the result of {what})",
                remedy="a branch or a size must not depend on what layers compute: use torch.where "
                "or move the branch into a layer's own module",
            )
        value = func(*args, **kwargs)
        skips_mask = asks_whether_a_mask_is_needed()
        if skips_mask and value is False:
            return value
        if sources & {_BY_INPUT, _BY_CHANCE}:
            self._nodes.append(
                Node(
                    function=func,
                    module=None,
                    inputs=template,
                    reads=True,
                    expected=_comparable(value),
                    position=self._num_layers,
                    where=where(),
                    remedy=MASK_REMEDY if skips_mask else None,
                )
            )
        return value

    # Values. -----------------------------------------------------------------------------------

    def _add_value(
        self, tensor: torch.Tensor, *, node: int | None, sources: frozenset[str] | set[str]
    ) -> int:
        number = len(self._values)
        self._numbers[id(tensor)] = number
        self._kept.append(tensor)
        self._sources.append(frozenset(sources))
        self._values.append(
            ValueSpec(
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                requires_grad=tensor.requires_grad,
                node=node,
                storage=tensor.untyped_storage()._cdata,
            )
        )
        return number

    def _rebind(
        self, changed: Sequence[torch.Tensor], node: int, sources: set[str]
    ) -> tuple[tuple[tuple[int, int], ...], bool]:
        """Give tensors that a call wrote to new numbers."""
        rebound = []
        writes_state = False
        for tensor in {id(t): t for t in changed}.values():
            if id(tensor) in self._states:
                writes_state = True
                continue
            old = self._numbers.get(id(tensor))
            if old is None:
                raise InputError(
                    f"{where()}: the forward writes to a tensor that is neither a buffer of the "
                    "model nor made in this forward",
                    remedy="register it with register_buffer()",
                )
            new = self._add_value(
                tensor, node=node, sources=frozenset(sources) | self._sources[old]
            )
            rebound.append((old, new))
        return tuple(rebound), writes_state

    def _to_leaf(self, leaf: Any) -> Any:
        """What stands for a leaf of a call's arguments."""
        if isinstance(leaf, torch.device):
            return HereRef() if self._home(leaf) == self._home(META) else Constant(leaf)
        if not isinstance(leaf, torch.Tensor):
            return Constant(leaf)
        number = self._numbers.get(id(leaf))
        if number is not None:
            return ValueRef(number)
        name = self._states.get(id(leaf))
        if name is not None:
            return StateRef(name)
        captured = self._parts.find(leaf, value=len(self._values))
        if captured is not None:
            node, capture = captured
            self._captures.setdefault(node, []).append(capture)
            return ValueRef(self._add_value(leaf, node=node, sources=frozenset([_BY_LAYER])))
        maker = self._watch.maker_of(leaf)
        if maker is not None or leaf.requires_grad:
            inside = f"inside {maker}, which did not return it" if maker else "out of sight"
            raise InputError(
                f"{where()}: the forward uses a tensor {list(leaf.shape)} that was made {inside}",
                remedy="let the module return it; what is computed in hooks, torch.vmap and numpy "
                "cannot be followed between layers",
            )
        return Constant(leaf)

    def _refuse_kept(self) -> None:
        """What a hook goes on holding would fill the memory: in a replay nobody empties it."""
        captured = [(c, node) for node, captures in self._captures.items() for c in captures]
        tensors = [self._kept[capture.value] for capture, _ in captured]
        if not any(self._holders(tensors)):
            return
        gc.collect()
        for (_, number), tensor in zip(captured, tensors, strict=True):
            if any(holder is not tensors for holder in self._holders([tensor])):
                node = self._nodes[number]
                raise InputError(
                    f"{node.where}: a hook or attribute goes on holding a tensor "
                    f"{list(tensor.shape)} that was made inside {node.name}, which did not return it",
                    remedy="let the module return it, or let the hook forget it at the end of the "
                    "model's own forward",
                )

    def _holders(self, tensors: list[torch.Tensor]) -> Iterator[Any]:
        for holder in gc.get_referrers(*tensors) if tensors else ():
            ours = holder is self._kept or holder is tensors or isinstance(holder, FrameType)
            if not ours:
                yield holder

    def _sources_of(self, template: Any) -> set[str]:
        sources: set[str] = set()
        for leaf in template_leaves(template):
            if isinstance(leaf, ValueRef):
                sources |= self._sources[leaf.index]
            elif isinstance(leaf, StateRef):
                sources.add(_BY_STATE)
        return sources

    def _home(self, device: torch.device) -> torch.device:
        """The device that the user's code is told: what it makes there has values."""
        return CPU if self._is_meta and device.type == "meta" else device

    def _on_meta(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def moved(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                return leaf.to(META)
            return META if isinstance(leaf, torch.device) else leaf

        both: tuple[Any, Any] = put_together(take_apart((args, kwargs), moved), lambda x: x)
        return both


def _named_tensors(model: torch.nn.Module) -> dict[int, str]:
    """id -> path of each tensor that a module of the model holds."""
    named: dict[int, str] = {}
    pairs: list[tuple[str, torch.Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        pairs += [
            (prefix + name, value)
            for name, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        ]
    for name, tensor in pairs:
        named.setdefault(id(tensor), name)
    return named


def _writes_first(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (
        name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    )


def _ambient() -> Ambient:
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            return Ambient(
                grad=torch.is_grad_enabled(), autocast=(kind, torch.get_autocast_dtype(kind))
            )
    return Ambient(grad=torch.is_grad_enabled())


def _comparable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
