"""The commands: knapsack-scheduler serve, check, migrate, backup, restore, export, import."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

# gRPC's core writes lines of its own to stderr, among our log and our error messages.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

try:
    from pydantic.fields import FieldInfo

    from knapsack_scheduler.config import ENVIRONMENT, Settings, as_json, load_settings, secret_of
    from knapsack_scheduler.errors import ConfigError, SchedulerError
except ModuleNotFoundError as error:
    sys.exit(
        f"knapsack-scheduler: {error.name} is not installed; pip install 'knapsack-rl[scheduler]'"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exits with 0, 1 (check found something) or 2 (could not start)."""
    options = _parser().parse_args(arguments)
    command = options.command
    flags = {key: value for key, value in vars(options).items() if key in Settings.model_fields}
    hidden = secret_of("")
    try:
        settings = load_settings(flags, options.config)
        hidden = secret_of(settings.store)
        sys.exit(command(settings, options))
    except (ConfigError, SchedulerError) as error:
        print(f"knapsack-scheduler: {str(error).replace(*hidden)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader, such as head, has seen enough.
        sys.stderr.close()
        sys.exit(0)


def _serve(settings: Settings, _options: argparse.Namespace) -> int:
    from knapsack_scheduler import logs, server

    logs.configure(settings.log_level, settings.log_format, secret_of(settings.store))
    try:
        asyncio.run(server.serve(settings))
    finally:
        # Before the message of what ended it.
        logging.shutdown()
    return 0


def _check(settings: Settings, options: argparse.Namespace) -> int:
    if options.store is None:
        from knapsack_scheduler.server import secrets_of

        _, certificates = secrets_of(settings)
        print(as_json(settings))
        ended = certificates is not None and _say_ends(certificates.ends().ends)
        if not ended:
            print("settings are right; --store URL checks a store too", file=sys.stderr)
        return int(ended)
    from knapsack_scheduler.inspection import check_store

    report = check_store(settings.store)
    for line in report.lines:
        print(line)
    for line in report.faults:
        print(f"fault: {line}", file=sys.stderr)
    if not report.faults:
        print("no fault found", file=sys.stderr)
    return 1 if report.faults else 0


def _say_ends(ends: Mapping[str, float]) -> bool:
    """Say how long certificates are good; returns whether one is not any more."""
    from knapsack_scheduler.expiry import in_words

    now = time.time()
    for name, end in ends.items():
        days = f"{abs(end - now) / 86400:.1f} days"
        if end > now:
            print(f"{name}: good until {in_words(end)}, {days} from now", file=sys.stderr)
        else:
            print(f"fault: {name}: ended on {in_words(end)}, {days} ago", file=sys.stderr)
    return any(end <= now for end in ends.values())


def _migrate(settings: Settings, _options: argparse.Namespace) -> int:
    from knapsack_scheduler.journal.journal import Journal

    journal = Journal(settings.store)
    journal.open()
    journal.close()
    print("the schema is up to date")
    return 0


def _backup(settings: Settings, options: argparse.Namespace) -> int:
    from knapsack_scheduler.journal.backup import back_up

    size = back_up(settings.store, options.to)
    print(f"{options.to}: {size:,} bytes, checked")
    return 0


def _restore(settings: Settings, options: argparse.Namespace) -> int:
    from knapsack_scheduler.journal.restore import restore

    old = restore(settings.store, options.file)
    print("restored" + (f"; what was there is {old}" if old else ""))
    return 0


def _import(settings: Settings, options: argparse.Namespace) -> int:
    from knapsack_scheduler.inspection import read_run_file

    run = read_run_file(settings.store, options.file, options.run)
    print(f"run {run.run_id!r}: imported up to entry {run.last_seq}")
    return 0


def _export(settings: Settings, options: argparse.Namespace) -> int:
    from knapsack_scheduler.inspection import export_run, write_run_file

    if options.to is not None and options.what is not None:
        raise ConfigError("--what is written to stdout, --to is a run file: give one of them")
    if options.to is not None:
        size = write_run_file(settings.store, options.run, options.to)
        print(f"{options.to}: {size:,} bytes")
        return 0
    for line in export_run(settings.store, options.run, options.what or "journal"):
        print(json.dumps(line))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knapsack-scheduler",
        description="Divides a budget of rollouts among prompts where it teaches most.",
        epilog=f"Every setting can also be given in the environment ({ENVIRONMENT}LISTEN ...) or "
        "in the file of --config; flags win over the environment, and it over the file.",
    )
    parser.add_argument("--version", action="version", version=version("knapsack-rl"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve the API until SIGTERM",
        description="Serve the API, and a page to read on the admin address, until SIGTERM. The "
        "first line on stdout, one JSON object, says which addresses; the log goes to stderr.",
        epilog="The exit code is 0 after a drain, 143 if told to end before it served, or 2 after "
        "a line that says why it does not start.",
    )
    _add_settings(serve, list(Settings.model_fields))
    serve.set_defaults(command=_serve)
    check = commands.add_parser(
        "check",
        help="check settings, and with --store a store",
        description="Without --store: show what flags, environment and file come to, refuse what "
        "cannot be, and say how long certificates are good. With --store: say whether the store "
        "is whole, also while a scheduler uses it, and sum up its runs.",
        epilog="The exit code is 0, 1 after lines of fault (a damaged store, a certificate that "
        "has ended), or 2 if it could not look.",
    )
    _add_settings(check, list(Settings.model_fields))
    check.set_defaults(command=_check)
    migrate = commands.add_parser(
        "migrate",
        help="bring a store's schema up to date",
        description="Bring a store's schema up to date, as serve does too; the scheduler is "
        "stopped. There is no way back but a copy from before: see backup.",
    )
    _add_settings(migrate, ["store"])
    migrate.set_defaults(command=_migrate)
    backup = commands.add_parser(
        "backup",
        help="copy a SQLite store, also while a scheduler writes to it",
        description="Copy a SQLite store as of one moment, also while a scheduler writes to it, "
        "and check the copy. Of PostgreSQL use pg_dump.",
    )
    _add_settings(backup, ["store"])
    backup.add_argument("--to", type=Path, required=True, metavar="FILE", help="new file to write")
    backup.set_defaults(command=_backup)
    restored = commands.add_parser(
        "restore",
        help="put a backup in the place of a SQLite store; the scheduler is stopped",
        description="Put a checked copy of a backup in the place of a SQLite store; the scheduler "
        "is stopped. What was there is kept as FILE.replaced, and one of an earlier restore is "
        "to be moved away first.",
    )
    _add_settings(restored, ["store"])
    restored.add_argument(
        "--from", type=Path, required=True, dest="file", metavar="FILE", help="backup to read"
    )
    restored.set_defaults(command=_restore)
    export = commands.add_parser(
        "export",
        help="write a run as one file, or as JSON lines",
        description="With --to: write a run as one file with a checksum, for import. Without: its "
        "recorded calls or statistics as JSON lines on stdout. Also while a scheduler uses the "
        "store.",
    )
    _add_settings(export, ["store"])
    export.add_argument("--run", required=True, help="run to export")
    export.add_argument(
        "--what",
        choices=("journal", "prompts"),
        help="as JSON lines on stdout: every recorded call that is not compacted, or the "
        "statistics of every prompt (default: journal)",
    )
    export.add_argument(
        "--to", type=Path, metavar="FILE", help="new file to write the run to, for import"
    )
    export.set_defaults(command=_export)
    imported = commands.add_parser(
        "import",
        help="store a run from the file of an export",
        description="Store a run from the file of an export, whole or not at all. A scheduler on "
        "a SQLite store is stopped; one on PostgreSQL may go on.",
    )
    _add_settings(imported, ["store"])
    imported.add_argument(
        "--from", type=Path, required=True, dest="file", metavar="FILE", help="file to read"
    )
    imported.add_argument("--run", help="another name for the run (default: its own)")
    imported.set_defaults(command=_import)
    return parser


def _add_settings(parser: argparse.ArgumentParser, names: list[str]) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings as YAML or TOML (default: none)"
    )
    for name in names:
        field = Settings.model_fields[name]
        if name == "run_defaults":
            continue
        flag = "--" + name.replace("_", "-")
        shown = "off" if field.default is False else field.default
        text = f"{field.description} (default: {'none' if shown is None else shown})"
        if field.annotation is bool:
            parser.add_argument(
                flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            parser.add_argument(
                flag, dest=name, type=_kind(field), default=None, help=text, metavar=_word(name)
            )


def _kind(field: FieldInfo) -> Any:
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    return kinds[0] if kinds else field.annotation


def _word(name: str) -> str:
    words = {"store": "URL", "listen": "ADDRESS", "seconds": "SECONDS", "level": "LEVEL"}
    last = name.rsplit("_", 1)[-1]
    return words.get(last, "FILE" if last in ("cert", "key", "ca", "file") else last.upper())


if __name__ == "__main__":
    main()
