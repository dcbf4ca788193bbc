"""Whether a model in vLLM computes with the weights of a folder: compared number by number.

Runs inside a worker. vLLM stacks some tensors into one module, packs matrices for the CPU
and then throws the plain ones away; its own checksums see none of what was packed. So a
module's plain weight is compared with the source where it is there, and a packed matrix is
asked for single columns: multiplied with a unit vector it must give the source's column,
bit for bit, since the other products are zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

_COLUMNS = 16
"""Columns of a packed matrix that are asked for, spread evenly; the last is one of them."""


class WrongWeights(Exception):
    """A module does not compute with the weights of the source; names the tensor."""


@dataclass(slots=True)
class Proof:
    """What was found.

    Attributes:
        proven: tensors of the source that were found in the model.
        unproven: those that could not be looked for: quantised, or cut over several GPUs.
    """

    proven: int = 0
    unproven: list[str] = field(default_factory=list)


def prove(model: torch.nn.Module, source: Iterable[tuple[str, torch.Tensor]]) -> Proof:
    """Compare every tensor of the source with what the model computes with.

    Args:
        model: as vLLM's worker holds it, after loading.
        source: (name, tensor) of the checkpoint.

    Raises:
        WrongWeights: the first difference.
    """
    modules = dict(model.named_modules())
    stacks: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    proof = Proof()
    waiting: dict[tuple[str, str], dict[int, tuple[str, torch.Tensor]]] = {}
    with torch.inference_mode():
        for name, tensor in source:
            place = _place(name, modules, stacks)
            if place is None:
                proof.unproven.append(name)
                continue
            path, leaf, part, parts = place
            pieces = waiting.setdefault((path, leaf), {})
            pieces[part] = (name, tensor)
            if len(pieces) == parts:
                del waiting[path, leaf]
                names = [pieces[at][0] for at in range(parts)]
                whole = torch.cat([pieces[at][1] for at in range(parts)])
                if _compare(names[0], modules[path], leaf, whole):
                    proof.proven += parts
                else:
                    proof.unproven.extend(names)
        for pieces in waiting.values():
            proof.unproven.extend(name for name, _ in pieces.values())
        for path, module in modules.items():
            if _is_head(module) and not _cut(module) and _plain(module):
                _compare_packed(f"{path}.weight", module, module.weight)
    return proof


def _place(
    name: str, modules: dict[str, Any], stacks: dict[str, list[str]]
) -> tuple[str, str, int, int] | None:
    """Return (module, parameter, position, of how many) that a tensor is served in."""
    path, _, leaf = name.rpartition(".")
    if isinstance(getattr(modules.get(path), leaf, None), torch.Tensor):
        return path, leaf, 0, 1
    parent, _, last = path.rpartition(".")
    for stack, members in stacks.items():
        stacked = f"{parent}.{stack}" if parent else stack
        if last in members and hasattr(modules.get(stacked), leaf):
            return stacked, leaf, members.index(last), len(members)
    return None


def _compare(name: str, module: Any, leaf: str, source: torch.Tensor) -> bool:
    """Compare one parameter; returns whether it could be."""
    served = getattr(module, leaf)
    if _cut(module) or not _plain(module):
        return False
    if served.numel():
        # Vocabularies are padded to a round number of rows.
        rows = served[: source.shape[0]] if source.ndim else served
        expected = source.to(device=served.device, dtype=served.dtype)
        if rows.shape != expected.shape or not torch.equal(rows, expected):
            raise WrongWeights(f"{name}: the model serves other numbers")
    if leaf == "weight" and source.ndim == 2:
        packed = _compare_packed(name, module, source)
        return packed or bool(served.numel())
    return bool(served.numel())


def _compare_packed(name: str, module: Any, source: torch.Tensor) -> bool:
    """Compare columns of a matrix packed for the CPU; returns whether there is one."""
    if not hasattr(module, "cpu_linear"):
        return False
    dtype = module.params_dtype if hasattr(module, "params_dtype") else module.weight.dtype
    size = source.shape[1]
    columns = torch.unique(torch.linspace(0, size - 1, min(_COLUMNS, size)).round().long())
    units = torch.zeros(len(columns), size, dtype=dtype)
    units[torch.arange(len(columns)), columns] = 1
    answer = module.quant_method.apply(module, units)[:, : source.shape[0]]
    if not torch.equal(answer.T, source.to(dtype)[:, columns]):
        raise WrongWeights(f"{name}: the matrix packed for the CPU is of other weights")
    return True


def _cut(module: Any) -> bool:
    return int(getattr(module, "tp_size", 1)) > 1


def _plain(module: Any) -> bool:
    method = getattr(module, "quant_method", None)
    return method is None or type(method).__name__.startswith("Unquantized")


def _is_head(module: Any) -> bool:
    return type(module).__name__ == "ParallelLMHead" and module.weight.numel() > 0
