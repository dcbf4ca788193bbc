"""The command line: knapsack-genserver serve, and replicas."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from importlib.metadata import version
from pathlib import Path

# gRPC's core writes lines of its own to stderr, among our log and our error messages.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

try:
    from knapsack_genserver import fleet_flags, logs, replicas_command
    from knapsack_genserver.admission import AdmissionLimits
    from knapsack_genserver.engine import Engine
    from knapsack_genserver.errors import ConfigError, EngineDied, GeneratorError
    from knapsack_genserver.feeder import Feeding
    from knapsack_genserver.helptext import ShownDefaults
    from knapsack_genserver.server import ServerOptions, serve
    from knapsack_genserver.session import Patience
    from knapsack_genserver.wire import Limits
except ModuleNotFoundError as error:
    sys.exit(
        f"knapsack-genserver: {error.name} is not installed; pip install 'knapsack-rl[genserver]'"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exits with 0, 1 if the engine died, or 2 if it cannot be done."""
    options = _parsed(sys.argv[1:] if arguments is None else arguments)
    try:
        code = options.run(options)
    except (ConfigError, GeneratorError) as error:
        print(f"knapsack-genserver: {error}", file=sys.stderr)
        code = 2
    except EngineDied as error:
        print(f"knapsack-genserver: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    if code:
        sys.exit(code)


def _serve(options: argparse.Namespace) -> int:
    logs.configure(options.log_level, options.log_format)
    server = ServerOptions(
        listen=options.listen,
        admin_listen=options.admin_listen,
        health_listen=options.health_listen,
        insecure=options.insecure,
        weights_root=options.weights_root,
        limits=Limits(options.max_prompts, options.max_group_rollouts),
        admission=AdmissionLimits(
            options.max_waiting_rollouts,
            options.max_call_rollouts,
            options.max_prompt_tokens,
            options.max_calls,
        ),
        patience=Patience(idle_seconds=options.idle_seconds),
        feeding=Feeding(
            options.chunk_rollouts, options.max_unread_rollouts, options.max_unread_tokens
        ),
        seed=options.seed,
        keepalive_seconds=options.keepalive_seconds,
        drain_seconds=options.drain_seconds,
        http_listen=_http_listen(options),
        rl_routes=_RL_ROUTES[options.rl_routes],
    )
    asyncio.run(serve(_engine(options), server))
    return 0


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, flags = parser.parse_known_args(arguments)
    options.engine_flags = flags
    options.arguments = arguments
    if flags and "vllm" not in (
        getattr(options, "engine", ""),
        getattr(options, "replica_engine", ""),
    ):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return options


def engine_of(arguments: list[str]) -> Engine:
    """Return the engine, not started, that a command line asks for.

    Raises:
        ConfigError: it names an engine that is not installed, or lacks what it needs.
    """
    return _engine(_parsed(arguments))


def _engine(options: argparse.Namespace) -> Engine:
    update_mode = _update_mode(options)
    if options.engine == "fake":
        from knapsack_genserver.engines.fake import FakeEngine

        return FakeEngine(weight_version=options.weight_version)
    if options.engine in fleet_flags.ENGINES:
        return fleet_flags.engine(options)
    if options.model is None:
        raise ConfigError("model: is needed; --model DIR names a folder with a causal model")
    # Nothing is fetched: the model is on this disk or the server does not start.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.engine == "vllm":
        return _vllm_engine(options)
    try:
        from knapsack_genserver.engines.transformers import TransformersEngine, TransformersOptions
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine = 'transformers': {error.name} is not installed; "
            "pip install 'knapsack-rl[genserver]'"
        ) from None
    return TransformersEngine(
        TransformersOptions(
            options.model,
            getattr(options, "dtype", "float32"),
            options.device,
            options.threads,
            options.max_batch_rollouts,
            options.max_batch_tokens,
            options.weight_version,
            options.prefix_tokens,
            update_mode,
        )
    )


def _vllm_engine(options: argparse.Namespace) -> Engine:
    from knapsack_genserver.engines.vllm.engine import VllmEngine, VllmOptions

    dtype = [f"--dtype={options.dtype}"] if hasattr(options, "dtype") else []
    return VllmEngine(
        VllmOptions(
            options.model,
            [*options.engine_flags, *dtype],
            options.weight_version,
            options.weights_root,
            _update_mode(options),
            options.update_patience,
            options.log_level,
            options.log_format,
        )
    )


_UPDATE_MODES = {
    "vllm": ("keep", "wait", "abort"),
    "transformers": ("wait", "abort"),
    "remote": ("keep",),
}
"""What an engine can do with rollouts under way when weights change, the default first."""


def _update_mode(options: argparse.Namespace) -> str:
    engine = options.replica_engine if options.engine == "ray" else options.engine
    modes = _UPDATE_MODES.get(engine, ("keep",))
    mode = str(options.update_mode or modes[0])
    if mode not in modes:
        raise ConfigError(f"update_mode = {mode!r}: with the engine {engine} it is {_or(modes)}")
    return mode


def _or(words: tuple[str, ...]) -> str:
    return " or ".join(words)


_RL_ROUTES = {"auto": None, "on": True, "off": False}


def _http_listen(options: argparse.Namespace) -> str | None:
    if options.engine != "vllm" or options.http_listen == "off":
        return None
    return str(options.http_listen)


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _count(least: int) -> type:
    class Count(int):
        """A whole number with a least value."""

        def __new__(cls, text: str) -> Count:
            """Read it from the command line."""
            value = super().__new__(cls, text)
            if value < least:
                raise ValueError
            return value

    Count.__name__ = f"whole number of at least {least}"
    return Count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knapsack-genserver",
        description="Generates unequal numbers of rollouts per prompt and streams them back.",
    )
    parser.add_argument("--version", action="version", version=version("knapsack-rl"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "serve",
        help="serve the API until SIGTERM",
        description="Serve the API until SIGTERM. With --engine vllm every flag that is not "
        "listed here is vLLM's own, as of vllm serve.",
        formatter_class=ShownDefaults,
        # An abbreviation of ours might be a flag of vLLM's.
        allow_abbrev=False,
    )
    default = ServerOptions()
    add = command.add_argument
    add(
        "--engine",
        choices=("transformers", "vllm", *fleet_flags.ENGINES, "fake"),
        default="transformers",
        help="what generates; fake has no model and is for tests",
    )
    add("--model", type=Path, metavar="DIR", help="folder with a causal language model")
    add("--listen", default=default.listen, metavar="ADDRESS", help="address of the API")
    add(
        "--admin-listen",
        default=default.admin_listen,
        metavar="ADDRESS",
        help="address of /metrics, /healthz and /readyz",
    )
    add(
        "--health-listen",
        default=default.health_listen,
        metavar="ADDRESS",
        help="address of plaintext gRPC health checks, for probes",
    )
    add("--insecure", action="store_true", help="allow an API that others can reach")
    add("--weights-root", type=Path, metavar="DIR", help="folder that weights must lie in")
    add("--weight-version", type=_count(0), default=0, help="version of the model folder's weights")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=argparse.SUPPRESS,
        help="of weights; float32 by default, and with vLLM what suits the machine",
    )
    add(
        "--http-listen",
        default="127.0.0.1:8000",
        metavar="ADDRESS",
        help="address of vLLM's own HTTP API, of the engine vllm; or off",
    )
    add(
        "--rl-routes",
        choices=tuple(_RL_ROUTES),
        default="auto",
        help="HTTP routes that pause, change weights and call workers, asking nobody who they "
        "are; auto has them if only this machine can reach --http-listen",
    )
    add(
        "--update-mode",
        choices=("keep", "wait", "abort"),
        help="what UpdateWeights does with rollouts under way: let them go on with the new weights "
        "(the engine vllm does unless told otherwise), let them end first (the engine "
        "transformers does), or give them up",
    )
    add(
        "--update-patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after this an update over HTTP that was begun and left alone is ended",
    )
    add("--device", default="cpu", help="device of the model, such as cuda:0")
    add("--threads", type=_count(0), default=0, help="threads on the CPU; 0 is torch's choice")
    add("--max-batch-rollouts", type=_count(1), default=1024, help="rollouts decoded at once")
    add("--max-batch-tokens", type=_count(1), default=65_536, help="tokens in a batch's cache")
    add(
        "--prefix-tokens",
        type=_count(0),
        default=16_384,
        metavar="N",
        help="prompt tokens kept for further rollouts of the same prompts",
    )
    add(
        "--max-waiting-rollouts",
        type=_count(1),
        default=default.admission.waiting_rollouts,
        help="rollouts admitted and not finished, of all calls; more are refused",
    )
    _add_limits(command.add_argument_group("limits, and how the engine is fed"), default)
    add("--seed", type=_count(0), help="of requests that name no seed; none draws one")
    add(
        "--idle-seconds",
        type=_positive,
        default=default.patience.idle_seconds,
        metavar="S",
        help="after which a session that has nothing under way and asks for nothing is ended",
    )
    add(
        "--keepalive-seconds",
        type=float,
        default=default.keepalive_seconds,
        metavar="S",
        help="after which a silent client is asked whether it is there; it has as long to answer",
    )
    add(
        "--drain-seconds",
        type=float,
        default=default.drain_seconds,
        help="how long calls under way may take to end after SIGTERM",
    )
    add(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="of logs"
    )
    add("--log-format", choices=("json", "text"), default="json", help="of logs")
    fleet_flags.add_flags(command, _count(1), _positive)
    command.set_defaults(run=_serve)
    replicas_command.add_command(commands)
    return parser


def _add_limits(group: argparse._ArgumentGroup, default: ServerOptions) -> None:
    """Add the flags of what a call may ask for and how the engine is fed."""
    admission, limits, feeding = default.admission, default.limits, default.feeding
    for flag, value, text in (
        ("--max-call-rollouts", admission.call_rollouts, "unfinished rollouts of one call"),
        ("--max-group-rollouts", limits.group, "rollouts of one prompt in a call"),
        ("--max-prompts", limits.prompts, "prompts of one call"),
        ("--max-prompt-tokens", admission.prompt_tokens, "prompt tokens held, of all calls"),
        ("--max-calls", admission.calls, "calls that generate at once"),
        (
            "--chunk-rollouts",
            feeding.chunk_rollouts,
            "rollouts of a prompt that the engine is given at once; larger groups are cut",
        ),
        (
            "--max-unread-rollouts",
            feeding.unread_rollouts,
            "finished rollouts that a caller may leave unread before its work is held",
        ),
        ("--max-unread-tokens", feeding.unread_tokens, "tokens of such rollouts"),
    ):
        group.add_argument(flag, type=_count(1), default=value, metavar="N", help=text)


if __name__ == "__main__":
    main()
