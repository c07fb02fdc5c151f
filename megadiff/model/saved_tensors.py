"""Bytes that autograd keeps between a forward pass and its backward pass, counted and not estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], *, apart_from: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors saved for the backward pass of `forward`, each storage once.

    Storages are looked at after the forward pass, so that what was freed meanwhile (a norm's output that is computed
    again, for example) counts as nothing. They may be on the meta device, where no two share an address either.

    Args:
        apart_from: tensors that are there anyway, such as parameters.
    """
    known = {tensor.untyped_storage()._cdata for tensor in apart_from}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    storages = {}
    for tensor in saved:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage._cdata not in known:
            storages[storage._cdata] = storage.nbytes()
    del result
    return sum(storages.values())
