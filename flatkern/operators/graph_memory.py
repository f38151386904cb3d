"""How many bytes an autograd graph keeps alive."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["graph_bytes"]

_saved_names: dict[type, tuple[str, ...]] = {}


def graph_bytes(roots: Iterable[Tensor], owned: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that the graph behind ``roots`` has saved, without those of ``owned``.

    The saved tensors are read from the nodes afterwards; hooks at the time of saving would stay in a kept
    graph and slow every later pass down.
    """
    roots = list(roots)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in roots}
    stack = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    for t in owned:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _saved(node: Node) -> list[Tensor]:
    kind = type(node)
    if kind not in _saved_names:
        _saved_names[kind] = tuple(n for n in dir(node) if n.startswith("_saved_") or n == "saved_tensors")
    found: list[Tensor] = []
    for name in _saved_names[kind]:
        try:
            value = getattr(node, name)
        except RuntimeError:  # freed, or changed in place: nothing to count
            continue
        values = value if isinstance(value, (tuple, list)) else (value,)
        found.extend(v for v in values if isinstance(v, Tensor))
    return found
