"""Which modules of a model nobody here wrote are kept whole.

A module is opened when its children are worth being layers of their own: the model itself, lists of
modules, and what contains a list of repeated blocks. All others are kept whole: with parameters
they are layers, without any they are calls inside one.
"""

from __future__ import annotations

import torch

_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


def modules_kept_whole(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path -> module of what is kept whole, in the model's order; a shared module has each of its
    paths.

    Args:
        model: any module.
    """
    whole: dict[str, torch.nn.Module] = {}
    _collect(model, "", whole, in_list=False, is_root=True)
    return whole


def _collect(
    module: torch.nn.Module,
    path: str,
    whole: dict[str, torch.nn.Module],
    *,
    in_list: bool,
    is_root: bool = False,
) -> None:
    is_list = isinstance(module, _LISTS)
    opened = is_root or is_list or (not in_list and _contains_blocks(module))
    if not opened:
        whole[path] = module
        return
    for name, child in module.named_children():
        _collect(child, f"{path}.{name}" if path else name, whole, in_list=is_list)


def _contains_blocks(module: torch.nn.Module) -> bool:
    """Whether it contains a list of blocks: modules with parts and parameters of their own."""
    for part in module.modules():
        if isinstance(part, _LISTS):
            blocks = [
                child
                for child in part.children()
                if next(child.children(), None) is not None
                and next(child.parameters(), None) is not None
            ]
            if len(blocks) >= (1 if isinstance(part, torch.nn.ModuleList) else 2):
                return True
    return False
