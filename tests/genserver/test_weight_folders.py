"""Folders of weights that are checked, held open, and compared with what a model computes."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from knapsack_genserver.engines.vllm.checkpoint import Checkpoint, CheckpointError
from knapsack_genserver.engines.vllm.proof import WrongWeights, prove

torch.manual_seed(0)
TENSORS = {
    "embed.weight": torch.randn(10, 8),
    "mlp.gate_proj.weight": torch.randn(6, 8),
    "mlp.up_proj.weight": torch.randn(6, 8),
    "norm.weight": torch.randn(8),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tensors on disk."""
    made = tmp_path / "weights"
    made.mkdir()
    save_file(TENSORS, made / "model.safetensors")
    return made


def open_files(folder: Path) -> list[str]:
    """Return the files of a folder that this process has open, deleted ones too."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return [path for path in found if path.startswith(f"{folder}/")]


def test_a_folder_is_read_after_it_was_deleted(folder: Path) -> None:
    """Its files are held open, and none of them is left open when it is closed."""
    checkpoint = Checkpoint(folder)
    assert open_files(folder)
    fingerprint = checkpoint.fingerprint()
    shutil.rmtree(folder)
    found = dict(checkpoint.tensors())
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert checkpoint.fingerprint() == fingerprint
    checkpoint.close()
    assert not open_files(folder)


def test_a_file_that_was_overwritten_is_not_read(folder: Path) -> None:
    """Half of one set and half of another would be neither. One that was replaced is."""
    checkpoint = Checkpoint(folder)
    path = folder / "model.safetensors"
    path.rename(folder / "old")
    shutil.copy(folder / "old", path)
    assert dict(checkpoint.tensors()).keys() == TENSORS.keys()
    checkpoint.close()
    checkpoint = Checkpoint(folder)
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="written to"):
        list(checkpoint.tensors())
    checkpoint.close()


def test_fingerprints_tell_weights_apart(folder: Path, tmp_path: Path) -> None:
    """One number in one tensor, the type, the name; not the file that a tensor is in."""

    def of(tensors: dict[str, torch.Tensor], *files: list[str]) -> str:
        place = tmp_path / "other"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for at, names in enumerate(files or [list(tensors)]):
            save_file({name: tensors[name] for name in names}, place / f"{at}.safetensors")
        checkpoint = Checkpoint(place)
        found = checkpoint.fingerprint()
        checkpoint.close()
        return found

    same = of(TENSORS)
    names = list(TENSORS)
    assert of(TENSORS, names[2:], names[:2]) == same
    large = {**TENSORS, "large": torch.zeros(300_000)}
    changed = {**TENSORS, "large": torch.zeros(300_000)}
    changed["large"][123_457] = 1e-30
    swapped = {**TENSORS, names[1]: TENSORS[names[2]], names[2]: TENSORS[names[1]]}
    half = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    all_of = [same, of(large), of(changed), of(swapped), of(half)]
    assert len(set(all_of)) == len(all_of)


class Packed(torch.nn.Module):
    """As vLLM packs a matrix for the CPU: multiplied by a function, the plain one empty."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.cpu_linear = lambda x: x @ matrix.T
        self.quant_method = UnquantizedMethod()


class UnquantizedMethod:
    """As vLLM's: asks the module's packed matrix."""

    def apply(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the product with the packed matrix."""
        product: torch.Tensor = module.cpu_linear(x)
        return product


def model_of(gate_up: torch.Tensor, norm: torch.Tensor | None = None) -> torch.nn.Module:
    """Return a model like vLLM's: a padded embedding, a stacked and packed matrix, a norm."""
    model = torch.nn.Module()
    model.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # type: ignore[assignment]
    model.embed = torch.nn.Embedding(16, 8)
    model.embed.weight.data[:10] = TENSORS["embed.weight"]
    model.mlp = torch.nn.Module()
    model.mlp.gate_up_proj = Packed(gate_up)
    model.norm = torch.nn.LayerNorm(8, bias=False)
    model.norm.weight.data = TENSORS["norm.weight"] if norm is None else norm
    return model


def test_a_model_is_compared_number_by_number() -> None:
    """Stacked and packed ones too; one number that differs a little is found."""
    gate_up = torch.cat([TENSORS["mlp.gate_proj.weight"], TENSORS["mlp.up_proj.weight"]])
    proof = prove(model_of(gate_up), TENSORS.items())
    assert (proof.proven, proof.unproven) == (4, [])
    stale = gate_up.clone()
    stale[9, 3] *= 1 + 1e-6
    with pytest.raises(WrongWeights, match=r"gate_proj.*packed for the CPU"):
        prove(model_of(stale), TENSORS.items())
    norm = TENSORS["norm.weight"].clone()
    norm[5] += 1e-6
    with pytest.raises(WrongWeights, match="norm"):
        prove(model_of(gate_up, norm), TENSORS.items())


def test_what_cannot_be_compared_is_said() -> None:
    """Tensors without a place, and halves of a stack."""
    gate_up = torch.cat([TENSORS["mlp.gate_proj.weight"], TENSORS["mlp.up_proj.weight"]])
    tensors = {**TENSORS, "elsewhere.weight": torch.zeros(1)}
    del tensors["mlp.up_proj.weight"]
    proof = prove(model_of(gate_up), tensors.items())
    assert proof.unproven == ["elsewhere.weight", "mlp.gate_proj.weight"]
