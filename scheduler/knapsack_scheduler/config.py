"""Settings of the server: flags over environment over one file over defaults."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import wire
from knapsack_scheduler.errors import ConfigError, InvalidArgument
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.store import safe_url, store_query
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.loadedruns import LOADED_BYTES
from knapsack_scheduler.runconfig import RunConfig

ENVIRONMENT = "KNAPSACK_SCHEDULER_"
# What Kubernetes puts into every pod beside a Service named knapsack-scheduler, or
# knapsack-scheduler-ANYTHING: an address each, and no setting.
_SERVICE_LINK = re.compile(
    ENVIRONMENT + r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://")
_DEFAULT = RunConfig()


class RunDefaults(BaseModel):
    """Config of runs that are created without one; see RunConfig of the contract."""

    model_config = ConfigDict(extra="forbid")

    policy: str = _DEFAULT.policy
    objective: str = _DEFAULT.objective
    success_threshold: float = _DEFAULT.success_threshold
    min_rollouts: int = _DEFAULT.min_rollouts
    max_rollouts: int = _DEFAULT.max_rollouts
    visit_discount: float = _DEFAULT.visit_discount
    version_discount: float = _DEFAULT.version_discount
    evidence_cap: float = _DEFAULT.evidence_cap
    reward_levels: bool = _DEFAULT.reward_levels


class Settings(BaseSettings):
    """Everything the server can be told."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, extra="forbid")

    listen: str = Field("127.0.0.1:50051", description="address of the API, HOST:PORT")
    admin_listen: str = Field(
        "127.0.0.1:9464", description="address of /metrics, /healthz, /readyz and the live page"
    )
    health_listen: str = Field(
        "127.0.0.1:50052", description="address of plaintext gRPC health checks, for probes"
    )
    store: str = Field(
        "sqlite:///stats.db",
        description="database URL: sqlite:///FILE or postgresql://USER@HOST/DATABASE",
    )
    rewind_horizon: int = Field(
        Retention().horizon,
        gt=0,
        description="recorded steps behind the newest one that a rewind may at least go back to",
    )
    journal_calls: int = Field(
        Retention().max_calls,
        gt=0,
        description="recorded calls of a run after which the journal is cut short of the horizon",
    )
    preload_runs: int = Field(
        8, ge=0, description="runs loaded before the server is ready, those written to last"
    )
    auto_create_runs: bool = Field(False, description="create unknown runs as they are used")
    insecure: bool = Field(
        False, description="allow an API that others can reach without TLS and without tokens"
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain of the API")
    tls_key: Path | None = Field(None, description="PEM private key of the certificate")
    tls_client_ca: Path | None = Field(
        None, description="PEM authorities; clients must show a certificate of one of them"
    )
    token_file: Path | None = Field(
        None, description="file of accepted bearer tokens: a token and a run prefix per line"
    )
    max_prompts: int = Field(Limits().prompts, gt=0, description="most prompts of one call")
    max_jump: int = Field(
        Limits().jump,
        gt=0,
        description="how far a step or policy version may be beyond the newest one of its run",
    )
    max_concurrent_calls: int = Field(
        Limits().concurrent_calls, gt=0, description="calls served at once"
    )
    max_connections: int = Field(
        Limits().connections, gt=0, description="open connections of the API"
    )
    max_message_bytes: int = Field(
        Limits().message_bytes, ge=16 * 2**20, description="bytes of one request"
    )
    max_inflight_bytes: int = Field(
        Limits().inflight_bytes,
        gt=0,
        description="bytes of requests and answers in memory at once",
    )
    max_loaded_bytes: int = Field(
        LOADED_BYTES,
        gt=0,
        description="bytes of runs in memory; beyond them those unused for longest are read "
        "again when they are asked for",
    )
    drain_seconds: float = Field(
        10.0, ge=0, description="how long calls under way may take to end after SIGTERM"
    )
    log_level: str = Field("info", description="debug, info, warning or error")
    log_format: str = Field("json", description="json or text")
    tracing: bool = Field(
        False,
        description="send OpenTelemetry spans where OTEL_EXPORTER_OTLP_ENDPOINT says; needs "
        "knapsack-rl[otel]",
    )
    run_defaults: RunDefaults = Field(default_factory=RunDefaults)


def load_settings(flags: dict[str, Any], file: Path | None) -> Settings:
    """Return the settings; flags that were not given are None.

    Raises:
        ConfigError: names every key at fault and what happens because of it.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    from_file = _read(file) if file else {}
    _refuse_unknown(os.environ)
    try:
        # Environment variables win over the file, flags over both.
        environment = Settings().model_dump(exclude_unset=True)
        settings = Settings(**{**from_file, **environment, **given})
    except ValidationError as error:
        lines = [
            _no_setting([str(name) for name in e["loc"]])
            if e["type"] == "extra_forbidden"
            else f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}"
            for e in error.errors()
        ]
        raise ConfigError("the scheduler does not start: " + "; ".join(lines)) from None
    check(settings)
    return settings


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    """Raise ConfigError for a variable of ours that is no setting: a typing error is none."""
    for name, value in environment.items():
        key = name.removeprefix(ENVIRONMENT).lower()
        if _SERVICE_LINK.fullmatch(name) or (name.endswith("PORT") and _SERVICE_PORT.match(value)):
            continue
        if name.startswith(ENVIRONMENT) and key not in Settings.model_fields:
            near = get_close_matches(key, Settings.model_fields, 1)
            hint = f"; did you mean {ENVIRONMENT}{near[0].upper()}?" if near else ""
            raise ConfigError(f"the scheduler does not start: {name}: is no setting{hint}")


def _no_setting(names: Sequence[str]) -> str:
    """Return what to say of a key of the file, or of a section in it, that is no setting."""
    fields = (Settings if len(names) == 1 else RunDefaults).model_fields
    near = get_close_matches(names[-1], fields, 1)
    hint = f"; did you mean {'.'.join([*names[:-1], near[0]])}?" if near else ""
    return f"{'.'.join(names)}: is no setting{hint}"


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config = {str(file)!r}: cannot be read: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config = {str(file)!r}: must hold keys and values")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def check(settings: Settings) -> None:
    """Raise ConfigError for settings that are each right but not together."""
    for key in ("listen", "admin_listen", "health_listen"):
        host_and_port(key, getattr(settings, key))
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigError("tls_cert and tls_key must be given together; TLS needs both")
    if settings.tls_client_ca and not settings.tls_cert:
        raise ConfigError("tls_client_ca needs tls_cert and tls_key; client certificates need TLS")
    for key in ("tls_cert", "tls_key", "tls_client_ca", "token_file"):
        path = getattr(settings, key)
        if path is not None and not path.is_file():
            raise ConfigError(f"{key} = {str(path)!r}: no such file")
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(
            f"log_level = {settings.log_level!r}: must be debug, info, warning or error"
        )
    if settings.log_format not in ("json", "text"):
        raise ConfigError(f"log_format = {settings.log_format!r}: must be json or text")
    if settings.max_inflight_bytes < 2 * settings.max_message_bytes:
        raise ConfigError(
            f"max_inflight_bytes = {settings.max_inflight_bytes}: must be at least twice "
            f"max_message_bytes, {2 * settings.max_message_bytes}; no request could be received"
        )
    for key in ("password", "sslpassword"):
        if key in store_query(settings.store):
            raise ConfigError(
                f"store: no {key} may stand behind the @ of the URL, where it would be shown; "
                "the user's stands before it, of a key in none"
            )
    _check_reach(settings)
    default_config(settings)


def _check_reach(settings: Settings) -> None:
    """Refuse addresses that others can reach without proving who they are."""
    if settings.insecure:
        return
    host, _ = host_and_port("listen", settings.listen)
    if not is_loopback(host):
        if not settings.tls_cert:
            raise ConfigError(
                f"listen = {settings.listen!r}: others can reach this address, and without "
                "tls_cert and tls_key they can read every call, tokens among it; give them, or "
                "--insecure if the network is yours alone"
            )
        if not (settings.tls_client_ca or settings.token_file):
            raise ConfigError(
                f"listen = {settings.listen!r}: others can reach this address, and without "
                "tls_client_ca or token_file anybody could change a training run; give one of "
                "them, or --insecure if the network is yours alone"
            )
    host, _ = host_and_port("admin_listen", settings.admin_listen)
    if not (is_loopback(host) or settings.token_file):
        raise ConfigError(
            f"admin_listen = {settings.admin_listen!r}: others can reach this address, and "
            "without token_file anybody could read the names and figures of every run; give it, "
            "or --insecure if the network is yours alone"
        )


def default_config(settings: Settings) -> RunConfig:
    """Return the config of runs created without one; ConfigError names the key."""
    try:
        return wire.parse_config(pb.RunConfig(**settings.run_defaults.model_dump()))
    except InvalidArgument as error:
        field = error.field.replace("config.", "run_defaults.")
        raise ConfigError(f"{field} = {error.value!r}: {error.allowed}") from None


def host_and_port(key: str, address: str) -> tuple[str, int]:
    """Return the parts of HOST:PORT; ConfigError naming the key otherwise."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{key} = {address!r}: must be HOST:PORT with a port from 0 to 65535")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def as_json(settings: Settings) -> str:
    """Return the settings for people to read, the store's password hidden."""
    shown = json.loads(settings.model_dump_json())
    shown["store"] = safe_url(settings.store)
    return json.dumps(shown, indent=2)


def secret_of(store: str) -> tuple[str, str]:
    """Return the password in a store's URL, as it stands there, and what to show in its place.

    With its colon and its @, so that a short password is not cut out of other words. Where
    there is none, both are a text that stands nowhere.
    """
    before, at, _ = store.rpartition("@")
    password = before.split("://", 1)[-1].partition(":")[2]
    return (f":{password}@", ":***@") if at and password else ("\x00", "\x00")
