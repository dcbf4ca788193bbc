"""Weights from a folder: read whole, checked against the model, and only then taken.

Nothing of the model is touched before every tensor has been found right, so an update
that fails leaves the old weights. Copying in place keeps tied parameters tied.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from knapsack_genserver.errors import FailedPrecondition

Tensors = dict[str, torch.Tensor]


def read_folder(folder: Path) -> Tensors:
    """Return every tensor of a folder's safetensors files, by name.

    Follows ``model.safetensors.index.json`` where there is one.

    Raises:
        FailedPrecondition: no such folder, no weights in it, or a file that is not whole.
    """
    if not folder.is_dir():
        raise FailedPrecondition(f"path = {str(folder)!r}: is not a folder on the server's disk")
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FailedPrecondition(f"path = {str(folder)!r}: holds no *.safetensors")
        tensors: Tensors = {}
        for file in files:
            tensors.update(load_file(file))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FailedPrecondition(f"path = {str(folder)!r}: cannot be read: {error}") from error
    return tensors


Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors of a model, each with what is to be copied into it."""


def checked(model: torch.nn.Module, tensors: Tensors) -> Copies:
    """Return what is to be copied where, all of the model's tensors; touches nothing.

    Args:
        model: whose tensors are replaced.
        tensors: by the names of the model's state dict; of parameters that share
            memory one name is enough, and all that are given must be equal.

    Raises:
        FailedPrecondition: a tensor is missing, unknown, of another shape, not of
            numbers, or not finite; names it.
    """
    state = dict(model.state_dict(keep_vars=False))
    unknown = sorted(set(tensors) - set(state))
    if unknown:
        raise FailedPrecondition(f"{unknown[0]}: the model has no tensor of that name")
    chosen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, target in state.items():
        given = tensors.get(name)
        if given is None:
            continue
        _check(name, given, target)
        before = chosen.get(target.data_ptr())
        if before is not None and not torch.equal(before[1], given):
            raise FailedPrecondition(
                f"{name}: the model ties it to {before[0]}, and the two differ"
            )
        chosen[target.data_ptr()] = (name, given)
    for name, target in state.items():
        if target.numel() and target.data_ptr() not in chosen:
            raise FailedPrecondition(f"{name}: is missing in the folder")
    return [(state[name], given) for name, given in chosen.values()]


def copy(copies: Copies) -> None:
    """Replace a model's tensors by what ``checked`` has found right."""
    with torch.no_grad():
        for target, given in copies:
            target.copy_(given)


def _check(name: str, given: torch.Tensor, target: torch.Tensor) -> None:
    if given.shape != target.shape:
        raise FailedPrecondition(
            f"{name}: has shape {tuple(given.shape)}, the model's is {tuple(target.shape)}"
        )
    if given.is_floating_point() != target.is_floating_point():
        raise FailedPrecondition(f"{name}: is of {given.dtype}, the model's is of {target.dtype}")
    if given.is_floating_point() and not bool(torch.isfinite(given).all()):
        raise FailedPrecondition(f"{name}: holds numbers that are not finite")


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of every weight, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return digest.hexdigest()
