"""vLLM's own command line behind ours."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from knapsack_genserver.engines.vllm import platform
from knapsack_genserver.errors import ConfigError
from knapsack_genserver.tokenizers import has_tokenizer

EXTENSION = "knapsack_genserver.engines.vllm.worker.WorkerExtension"

_OURS = {
    "host": "--http-listen HOST:PORT says where HTTP listens",
    "port": "--http-listen HOST:PORT says where HTTP listens",
    "uds": "--http-listen HOST:PORT says where HTTP listens",
    "worker_extension_cls": "this server extends the workers itself",
    "grpc": "this server has a gRPC API of its own; see --listen",
    "headless": "is for vLLM's own launcher",
    "api_server_count": "is for vLLM's own launcher; there is one server on the engine",
}
"""Flags of vLLM that would undo what this server does."""


def parse(model: Path, flags: Sequence[str], log_format: str) -> argparse.Namespace:
    """Return what vLLM's own parser makes of the flags that ours does not know.

    Args:
        model: folder of the model.
        flags: as given on the command line.
        log_format: json or text.

    Raises:
        ConfigError: a flag that vLLM does not know either, or a value it does not take.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        """Raises where vLLM's would print its whole usage and exit."""

        def error(self, message: str) -> NoReturn:
            unknown = message.removeprefix("unrecognized arguments: ")
            if unknown != message:
                raise ConfigError(f"{unknown}: neither knapsack-genserver nor vLLM knows this flag")
            raise ConfigError(f"vLLM: {message}")

    parser = make_arg_parser(Parser(prog="knapsack-genserver serve --engine vllm"))
    own = [
        f"--model={model}",
        f"--logging-config.formatter={log_format}",
        "--logging-config.configure_logging=true",
        *platform.default_flags(),
    ]
    try:
        arguments: argparse.Namespace = parser.parse_args([*own, *flags])
        for name, why in _OURS.items():
            if getattr(arguments, name, None) != parser.get_default(name):
                raise ConfigError(f"--{name.replace('_', '-')}: {why}")
        validate_parsed_serve_args(arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"vLLM: {error}") from error
    if arguments.model_tag is not None:
        raise ConfigError(f"{arguments.model_tag}: is no flag; --model DIR names the model")
    arguments.worker_extension_cls = EXTENSION
    alone = arguments.tensor_parallel_size == arguments.pipeline_parallel_size == 1
    if arguments.distributed_executor_backend is None and alone and platform.is_cpu():
        # The worker inside the engine core: one large process less, and faster.
        arguments.distributed_executor_backend = "uni"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not has_tokenizer(model):
        arguments.skip_tokenizer_init = True
    return arguments
