"""What vLLM needs on a machine without a GPU, and how it logs. Set before vLLM starts.

Nothing that the user has set is changed. On a GPU vLLM's own defaults are right.
"""

from __future__ import annotations

import os


def prepare_logging(level: str) -> None:
    """Keep vLLM's log off stdout, which is the server's own; before vLLM is imported."""
    _default("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    _default("VLLM_LOGGING_LEVEL", level.upper())
    # Until the engine is configured, vLLM's records go through the server's own handler.
    _default("VLLM_CONFIGURE_LOGGING", "0")
    _default("VLLM_NO_USAGE_STATS", "1")


def is_cpu() -> bool:
    """Whether vLLM runs on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def prepare_processes() -> None:
    """Start vLLM's processes afresh: they must not inherit sockets and threads."""
    _default("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if is_cpu():
        # GiB of KV cache. vLLM's own choice is nearly all of the machine's memory.
        _default("VLLM_CPU_KVCACHE_SPACE", "1")
        # The sampler's helpers would be compiled by g++ at the first request.
        _default("TORCHDYNAMO_DISABLE", "1")
        # The engine core has threads of its own; one core stays for this process.
        _default("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))


def default_flags() -> list[str]:
    """Return flags of vLLM that stand before the user's, which win."""
    flags = [
        "--scheduling-policy=priority",
        # The contract's logprobs are of the distribution that tokens are drawn from.
        "--logprobs-mode=processed_logprobs",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
    ]
    if is_cpu():
        flags += [
            "--enforce-eager",
            f"--dtype={'bfloat16' if _has_fast_bfloat16() else 'float32'}",
            # Prompts shorter than a block never hit the prefix cache; vLLM's default is 128.
            "--block-size=32",
            '--weight-transfer-config={"backend": "safetensors"}',
        ]
    return flags


def _has_fast_bfloat16() -> bool:
    import torch

    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def _default(name: str, value: str) -> None:
    os.environ.setdefault(name, value)
