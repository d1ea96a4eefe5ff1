"""Converts nested state dicts, and the state of every random number generator, to tensors and plain JSON. No pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

Tree = Any
"""Nested dicts (with text or integer keys), lists and tuples of tensors, numbers, text, booleans and None."""


def pack(tree: Tree) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a tree into its tensors and a JSON skeleton that says where each of them goes.

    Returns:
        The tensors, named "0", "1" and so on, contiguous and on the CPU (a tensor that is so already is not copied);
        and the skeleton. A tensor that is in the tree twice is stored once, and :func:`unpack` puts one object in both
        places (bitsandbytes shares its quantization maps in this way).

    Raises:
        TypeError: the tree holds an object of another type than :data:`Tree` allows.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}

    def visit(node: Tree) -> Any:
        if isinstance(node, torch.Tensor):
            if id(node) not in seen:
                seen[id(node)] = str(len(tensors))
                tensors[seen[id(node)]] = _plain(node)
            return {"tensor": seen[id(node)]}
        if isinstance(node, dict):
            return {"dict": [[_key(key), visit(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return {type(node).__name__: [visit(item) for item in node]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return {"value": node}
        raise TypeError(f"state holds a {type(node).__name__}, which a checkpoint cannot keep")

    return tensors, visit(tree)


def unpack(tensors: dict[str, torch.Tensor], skeleton: Any) -> Tree:
    """Put together the tree that :func:`pack` has split. It holds the given tensors, not copies."""
    ((kind, body),) = skeleton.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "dict":
        return {key: unpack(tensors, value) for key, value in body}
    if kind in ("list", "tuple"):
        items = [unpack(tensors, item) for item in body]
        return tuple(items) if kind == "tuple" else items
    return body


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.detach().cpu().contiguous()
    # safetensors would write the whole storage of a view, or refuse it because it shares that storage.
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


def _key(key: object) -> str | int:
    if isinstance(key, (str, int)):
        return key
    raise TypeError(f"state has the key {key!r}, which a checkpoint cannot keep")


def random_state() -> Tree:
    """Return the state of every generator that training may use: Python's, numpy's, torch's, and that of each GPU."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(tree: Tree) -> None:
    """Set every generator to the state that :func:`random_state` returned.

    If the state has more GPUs than there are now, the others are ignored: a run uses one GPU, so they drew no numbers.
    """
    python, legacy = tree["python"], tree["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    keys = legacy["keys"].numpy().astype(np.uint32)
    np.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"]))
    torch.set_rng_state(tree["torch"])
    for index, state in enumerate(tree["cuda"][: torch.cuda.device_count() if torch.cuda.is_available() else 0]):
        torch.cuda.set_rng_state(state, index)


def seed_everything(seed: int) -> None:
    """Seed every generator whose state :func:`random_state` returns."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
