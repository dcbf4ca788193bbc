"""What a disk may hold after a loss of power, from a trace of what was written to it.

Run as a program it is what is traced: a service on ``FOLDER/stats.db`` that compacts, rewinds
and is closed and opened, and that writes a line to ``FOLDER/answered`` after every answer.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.journal.compaction import Retention

TRACER = ("strace", "-f", "-y", "-xx", "-s", "70000", "-qq")
TRACED = "-etrace=pwrite64,write,fdatasync,fsync,ftruncate,unlink"
PROMPTS = [f"prompt-{i}" for i in range(300)]
SECTOR = 512

_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\)\s+= \d+")
_TEXT = re.compile(r'[<"]((?:\\x..)*)[>"]')


@dataclass
class File:
    """A file as the disk surely has it, and what has been written to it since it was synced."""

    surely: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        """Bring what is pending to the disk."""
        for change in self.pending:
            _apply(self.surely, *change)
        self.pending = []

    def after_loss(self, draw: random.Random | None) -> bytes:
        """Return what may be left of it: of what is pending nothing, or whatever is drawn."""
        left = bytearray(self.surely)
        for at, data in self.pending if draw else ():
            fate = draw.choice(["lost", "whole", "torn"])
            if fate == "whole" or data is None:
                _apply(left, at, data)
            elif fate == "torn":
                for start in range(0, len(data), SECTOR):
                    if draw.random() < 0.5:
                        _apply(left, at + start, data[start : start + SECTOR])
        return bytes(left)


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    """Write at a place, or cut there."""
    if data is None:
        del content[at:]
    content.extend(bytes(max(at + len(data or b"") - len(content), 0)))
    if data is not None:
        content[at : at + len(data)] = data


def replayed(trace: Path, folder: Path) -> Iterator[tuple[dict[str, File], list[str]]]:
    """Yield, after every call in the trace, the store's files and the lines of ``answered``."""
    files = {"stats.db": File(), "stats.db-wal": File()}
    answered: list[str] = []
    for name, texts, numbers in _calls(trace):
        path = Path(texts[0].decode())
        if path.parent != folder or path.name not in (*files, "answered"):
            continue
        if path.name == "answered":
            answered.append(texts[1].decode().strip())
        elif name == "pwrite64":
            files[path.name].pending.append((numbers[-1], texts[1]))
        elif name in ("ftruncate", "unlink"):
            files[path.name].pending.append((numbers[-1] if name == "ftruncate" else 0, None))
        else:
            files[path.name].sync()
        yield files, answered


def _calls(trace: Path) -> Iterator[tuple[str, list[bytes], list[int]]]:
    """Yield the name, the texts and the numbers of every call that has ended well."""
    begun: dict[str, str] = {}
    with trace.open() as lines:
        for line in lines:
            thread, _, call = line.strip().partition(" ")
            call = call.strip()
            if call.endswith(_UNFINISHED):
                begun[thread] = call.removesuffix(_UNFINISHED)
                continue
            resumed = _RESUMED.match(call)
            if resumed:
                call = begun.pop(thread) + resumed[1]
            ended = _CALL.match(call)
            if ended:
                texts = [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(ended[2])]
                numbers = [int(each) for each in re.findall(r", (\d+)", ended[2])]
                if texts:
                    yield ended[1], texts, numbers


async def live(folder: Path) -> None:
    """Train, note what was answered, and begin anew in the middle."""
    answered = os.open(folder / "answered", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for first in (0, 20):
        store = f"sqlite:///{folder / 'stats.db'}"
        async with open_service(store, retention=Retention(6, 10**9, 7)) as service:
            for step in range(first, first + 20):
                made = await service.allocate(
                    pb.AllocateRequest(
                        run_id="run", step=step, request_id=f"{step}", prompt_ids=PROMPTS,
                        total_rollouts=2400,
                    )
                )  # fmt: skip
                os.write(answered, f"allocate {step}\n".encode())
                report = pb.ReportRequest(
                    run_id="run", allocation_id=made.allocation_id, report_id=f"{step}",
                    prompt_indices=range(len(PROMPTS)), num_rewards=made.num_rollouts,
                    rewards=[float(i % 3 == 0) for i in range(2400)],
                )  # fmt: skip
                await service.report(report)
                os.write(answered, f"report {step}\n".encode())
                if step % 13 == 12:
                    rewind = pb.RewindRunRequest(run_id="run", step=step - 2, request_id=f"{step}")
                    await service.rewind_run(rewind)
                    os.write(answered, f"rewind {step}\n".encode())


if __name__ == "__main__":
    asyncio.run(live(Path(sys.argv[1])))
