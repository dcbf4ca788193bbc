"""A store of any released schema is brought up to date and answers as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import wire
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.inspection import check_store
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.store import _alembic, migrate, open_engine, revisions
from knapsack_scheduler.runconfig import RunConfig

REVISIONS = [
    script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()
][::-1]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres").new_store()
    return f"sqlite:///{tmp_path / 's.db'}"


def calls() -> list[tuple[str, str, int, bytes, bytes]]:
    """Return a run's calls as kind, key, step, request and answer."""
    config = wire.config_message(RunConfig())
    del config
    allocate = pb.AllocateRequest(
        run_id="run", step=3, request_id="first", prompt_ids=["a", "b"], total_rollouts=4
    )
    # The name of an allocation as the first release made it: of the run's key.
    name = wire.allocation_id(1, 0, "first")
    answer = pb.Allocation(allocation_id=name, run_id="run", step=3, wave=1, num_rollouts=[2, 2])
    report = pb.ReportRequest(
        run_id="run", allocation_id=name, report_id="done", prompt_indices=[0], num_rewards=[2],
        rewards=[1.0, 0.0],
    )  # fmt: skip
    reported = pb.ReportResponse(accepted_rollouts=2)
    return [
        ("allocate", "first", 3, allocate.SerializeToString(), answer.SerializeToString()),
        ("report", "done", 3, report.SerializeToString(), reported.SerializeToString()),
    ]


def fill(url: str, revision: str) -> None:
    """Make a store of that revision with a run, in columns that every revision has."""
    engine = open_engine(url)
    migrate(engine, revision)
    with engine.begin() as connection:
        runs = sa.Table("runs", sa.MetaData(), autoload_with=connection)
        entries = sa.Table("entries", sa.MetaData(), autoload_with=connection)
        config = wire.config_message(RunConfig()).SerializeToString(deterministic=True)
        later = {"identity": 1} if "identity" in runs.c else {}
        connection.execute(
            sa.insert(runs).values(
                run_key=1, run_id="run", config=config, create_time=5, last_seq=2, branch=0, **later
            )
        )
        for seq, (kind, key, step, payload, answer) in enumerate(calls(), 1):
            digest = wire.digest_of(payload)
            connection.execute(
                sa.insert(entries).values(
                    run_key=1, seq=seq, kind=kind, key=key, branch=0, step=step, digest=digest,
                    payload=payload, answer=answer,
                )
            )  # fmt: skip
    engine.dispose()


@pytest.mark.parametrize("revision", REVISIONS)
async def test_a_store_of_every_release_goes_on(url: str, revision: str) -> None:
    """Its counts, its open allocation and its calls are known; it can be compacted later."""
    fill(url, revision)
    async with open_service(url) as service:
        run = await service.get_run(pb.GetRunRequest(run_id="run"))
        assert (run.total_rollouts, run.known_prompts, run.create_time.nanos) == (2, 1, 5)
        for kind, _, _, payload, answer in calls():
            request = {"allocate": pb.AllocateRequest, "report": pb.ReportRequest}[kind]
            again = await getattr(service, kind)(request.FromString(payload))
            assert again.SerializeToString() == answer
        rest = pb.ReportRequest(
            run_id="run", allocation_id=wire.allocation_id(1, 0, "first"), report_id="rest",
            prompt_indices=[1], num_rewards=[2], rewards=[1.0, 1.0],
        )  # fmt: skip
        assert (await service.report(rest)).accepted_rollouts == 2


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_a_run_of_every_release_is_guarded_from_then_on(url: str, revision: str) -> None:
    """The check finds nothing in what was brought up to date, and what is changed afterwards."""
    fill(url, revision)
    engine = open_engine(url)
    migrate(engine)
    assert check_store(url).faults == []
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE runs SET identity = identity + 1"))
    engine.dispose()
    (fault,) = check_store(url).faults
    assert "run 'run': its row is damaged" in fault


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_looking_at_an_old_store_changes_nothing(url: str, revision: str) -> None:
    """The message says what brings it up to date."""
    fill(url, revision)
    with pytest.raises(ConfigError, match="run knapsack-scheduler migrate"):
        Journal(url, read_only=True).open()


def test_a_store_of_a_newer_version_is_refused_unchanged(url: str) -> None:
    """Whoever opens it is told what it is and what to do, so a rollback finds it whole."""
    fill(url, "head")
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    for read_only in (False, True):
        with pytest.raises(ConfigError, match="schema revision 9999 is of a newer version"):
            Journal(url, read_only=read_only).open()
    assert revisions(engine)[0] == "9999"
    engine.dispose()
