"""Programs that are asked to end: from their first moment on, and whatever hangs in them.

Process 1 of a container does not end by itself, so SIGTERM must always find a handler.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import grpc
import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc

WAITING = "import signal\nprint('here', flush=True)\nsignal.pause()\n"
BEGINNING = "print('here', flush=True)\ninput()\n"
SLOW_START = """
import asyncio
from knapsack_scheduler.service import SchedulerService

async def preload(self, count):
    print("here", flush=True)
    await asyncio.Event().wait()

SchedulerService.preload = preload
from knapsack_scheduler.program import main
main()
"""

HANGING_STORE = """
import threading
from knapsack_scheduler import server
from knapsack_scheduler.journal.journal import Journal

def hang(self, *arguments):
    print("here", flush=True)
    threading.Event().wait()

Journal.writing = Journal.append = hang
server.CLOSING_SECONDS = 0.1
from knapsack_scheduler.program import main
main()
"""


def ended(*arguments: str, path: str | None = None) -> int:
    """Return the exit code of a program that is asked to end once it says where it is."""
    program = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": ":".join([*([path] if path else []), *sys.path])},
    )  # fmt: skip
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "here\n"
        program.send_signal(signal.SIGTERM)
        return program.wait(60)
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


@pytest.mark.parametrize("package", ["knapsack_scheduler", "knapsack_genserver"])
def test_sigterm_during_the_imports_ends_it(package: str, tmp_path: Path) -> None:
    """By its own handler, 143: the system's own doing, -15, would not reach process 1."""
    (tmp_path / "grpc.py").write_text(WAITING)
    program = f"{package}.program"
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert f"{program}:main" in scripts.values()
    assert ended("-m", program, "serve", path=str(tmp_path)) == 143


@pytest.mark.parametrize("first", [False, True], ids=["some process", "process 1"])
@pytest.mark.parametrize("package", ["knapsack_scheduler", "knapsack_genserver"])
def test_sigterm_while_python_begins_is_kept(package: str, first: bool, tmp_path: Path) -> None:
    """As the images start it: blocked until the program handles it, and then it ends with 143."""
    (tmp_path / "sitecustomize.py").write_text(BEGINNING)
    (tmp_path / "grpc.py").write_text("raise SystemExit('SIGTERM was lost')")
    alone = ["unshare", "--fork", "--pid", "--kill-child"] if first else []
    if first and subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process 1 can be made here")
    started = [*alone, "env", "--block-signal=TERM", sys.executable, "-m", f"{package}.program"]
    program = subprocess.Popen(
        [*started, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
    )  # fmt: skip
    with program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "here\n"
            number = program.pid
            if first:
                children = Path(f"/proc/{number}/task/{number}/children")
                number = int(children.read_text())
            os.kill(number, signal.SIGTERM)
            program.communicate("go on\n", timeout=60)
        finally:
            program.kill()
    assert program.returncode == 143


def test_sigterm_ends_a_scheduler_whose_store_hangs(tmp_path: Path) -> None:
    """Calls under way get the time to drain and no more; nothing was answered of them."""
    flags = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
    flags += [f"--store=sqlite:///{tmp_path / 'stats.db'}", "--drain-seconds=0.1"]
    program = subprocess.Popen(
        [sys.executable, "-c", HANGING_STORE, "serve", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert program.stdout is not None
        address = json.loads(program.stdout.readline())["listen"]
        with grpc.insecure_channel(address) as channel:
            stub = rpc.BudgetSchedulerStub(channel)  # type: ignore[no-untyped-call]
            stub.CreateRun(pb.CreateRunRequest(run_id="run"))
            request = pb.AllocateRequest(
                run_id="run", request_id="x", prompt_ids=["a", "b"], total_rollouts=8
            )
            hanging = stub.Allocate.future(request)
            assert program.stdout.readline() == "here\n"
            program.send_signal(signal.SIGTERM)
            assert program.wait(60) == 0
            assert hanging.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def test_sigterm_while_runs_are_loaded_ends_it(tmp_path: Path) -> None:
    """A large run takes long, and nobody waits for an answer."""
    flags = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
    store = f"--store=sqlite:///{tmp_path / 'stats.db'}"
    assert ended("-c", SLOW_START, "serve", store, *flags) == 143
