"""Puts a recorder between a model and its parts while one forward runs; afterwards all is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from deepopt.errors import InputError

CallModule = Callable[[str, torch.nn.Module, Callable[..., Any], Any, Any], Any]
ApplyFunction = Callable[[type[torch.autograd.Function], Callable[..., Any], Any], Any]


@contextmanager
def intercepted_modules(
    modules: Mapping[str, torch.nn.Module], call_module: CallModule
) -> Iterator[None]:
    """Let calls of some modules go through `call_module(path, module, call, args, kwargs)`.

    The whole call is caught, with its hooks and with what a subclass does around it: the module's
    class is replaced by a subclass of it for a while. A module with several paths gets the first of
    them for its first call, the second for its second.

    Args:
        modules: path -> module.
        call_module: makes the call, or does without it.

    Raises:
        InputError: the class of a module cannot be replaced (TorchScript).
    """
    classes: dict[type, type] = {}
    originals: list[tuple[torch.nn.Module, type]] = []
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    calls: dict[int, int] = {}

    def path_of(module: torch.nn.Module) -> str:
        names = paths[id(module)]
        count = calls.get(id(module), 0)
        calls[id(module)] = count + 1
        return names[min(count, len(names) - 1)]

    def subclass(kind: type) -> type:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                return kind.__call__(self, *given, **named)

            return call_module(path_of(self), self, call, args, kwargs)

        names = {"__call__": __call__, "__module__": kind.__module__, "__doc__": kind.__doc__}
        made = type(kind.__name__, (kind,), names)
        made.__qualname__ = kind.__qualname__
        return made

    try:
        for path, module in modules.items():
            kind = type(module)
            if any(module is done for done, _ in originals):
                continue
            try:
                if kind not in classes:
                    classes[kind] = subclass(kind)
                object.__setattr__(module, "__class__", classes[kind])
            except (TypeError, RuntimeError) as error:
                raise InputError(
                    f"calls of {path} ({kind.__name__}) cannot be followed: {error}",
                    remedy="give the model as Python modules, not as TorchScript",
                ) from error
            originals.append((module, kind))
        yield
    finally:
        for module, kind in originals:
            object.__setattr__(module, "__class__", kind)


@contextmanager
def patched_functions(apply_function: ApplyFunction) -> Iterator[None]:
    """Let `apply` of custom autograd Functions go through `apply_function(kind, apply, args)`.

    Args:
        apply_function: makes the call, or does without it.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(kind: type[torch.autograd.Function], *args: Any) -> Any:
        def call(*given: Any) -> Any:
            return original.__get__(None, kind)(*given)

        return apply_function(kind, call, args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
