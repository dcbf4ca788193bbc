"""Several vLLM servers as one engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from knapsack_genserver.engines.remote.engine import RemoteEngine, RemoteOptions
from knapsack_genserver.errors import ConfigError
from knapsack_genserver.member import PoolOptions
from knapsack_genserver.replicas import ReplicaPool
from knapsack_genserver.tokenizers import load_tokenizer


def remote_pool(
    urls: Sequence[str], options: RemoteOptions, pool: PoolOptions, model: Path | None = None
) -> ReplicaPool:
    """Return an engine of the servers at some addresses.

    Args:
        urls: of the servers, which serve one model.
        options: how each is used; its address is replaced.
        pool: how they are used together.
        model: folder with the model's tokenizer and configuration, if texts are to be
            generated from.

    Raises:
        ConfigError: an address is none, or is given twice; or the folder is no model's.
    """
    if not urls:
        raise ConfigError("remote: is needed; --remote http://HOST:PORT names a vLLM server")
    seen: set[str] = set()
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"remote = {url!r}: must be http://HOST:PORT")
        if url.rstrip("/") in seen:
            raise ConfigError(f"remote = {url!r}: is given twice")
        seen.add(url.rstrip("/"))
    tokenizer = None
    if model is not None:
        options = replace(options, vocabulary_size=_vocabulary_size(model))
        tokenizer = load_tokenizer(model)
    served: dict[str, str] = {}
    engines = [RemoteEngine(replace(options, url=url), served) for url in urls]
    return ReplicaPool("remote", engines, pool, tokenizer)


def _vocabulary_size(model: Path) -> int:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"model = {str(model)!r}: is not a model folder (no config.json with a vocab_size)"
        ) from None
