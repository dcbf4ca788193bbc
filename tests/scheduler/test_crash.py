"""kill -9 at any moment: every acknowledged rollout is counted, and counted once."""

from __future__ import annotations

import signal
import threading
from typing import Any

import grpc

from knapsack_proto.v1 import scheduler_pb2 as pb

WORKERS, REPORTS, KILLS = 4, 60, 5


def test_acknowledged_reports_survive_kill_9_exactly_once(start_scheduler) -> None:
    """Workers report under ids of their own and repeat what was not answered."""
    scheduler = start_scheduler("--auto-create-runs")
    stub = scheduler.stub
    wrong: list[Any] = []
    half_done = threading.Semaphore(0)

    def report_all(worker: int) -> None:
        for number in range(REPORTS):
            request = pb.ReportRequest(
                run_id="run",
                report_id=f"{worker}-{number}",
                step=number,
                prompt_ids=[f"w{worker}", "shared"],
                prompt_indices=[0, 1],
                num_rewards=[2, 1],
                rewards=[1.0, 0.0, float(number % 2)],
            )
            while True:
                try:
                    answer = stub.Report(request, timeout=20, wait_for_ready=True)
                except grpc.RpcError as error:
                    if error.code() not in (
                        grpc.StatusCode.UNAVAILABLE,
                        grpc.StatusCode.DEADLINE_EXCEEDED,
                    ):
                        wrong.append(error)
                        return
                    continue
                if answer.accepted_rollouts != 3:
                    wrong.append(answer)
                break
            half_done.release()

    workers = [threading.Thread(target=report_all, args=(i,)) for i in range(WORKERS)]
    for worker in workers:
        worker.start()
    for _ in range(KILLS):
        for _ in range(WORKERS * REPORTS // (KILLS + 1)):
            assert half_done.acquire(timeout=300)
        assert scheduler.end(signal.SIGKILL) == -signal.SIGKILL
        scheduler.start()
    for worker in workers:
        worker.join(300)
        assert not worker.is_alive()

    assert not wrong
    page = stub.ListPromptStats(pb.ListPromptStatsRequest(run_id="run"), wait_for_ready=True)
    counted = dict(zip(page.prompt_ids, page.total_rollouts, strict=True))
    assert counted == {"shared": WORKERS * REPORTS} | {f"w{i}": 2 * REPORTS for i in range(WORKERS)}
    assert scheduler.end() == 0


def test_an_answered_call_is_answered_the_same_after_kill_9(start_scheduler, calls) -> None:
    """Allocation, wave and report are what they were, to the bit."""
    scheduler = start_scheduler("--auto-create-runs")
    stub = scheduler.stub
    allocate = calls.allocate(["a", "b", "c"], 30, wave_fraction=0.5)
    first = stub.Allocate(allocate)
    rewards = [[float(i == 0)] * n for i, n in enumerate(first.num_rollouts)]
    report = calls.report(first.allocation_id, rewards)
    reported = stub.Report(report)
    extend = calls.extend(first.allocation_id)
    second = stub.Extend(extend)
    run = stub.GetRun(pb.GetRunRequest(run_id="run"))

    scheduler.end(signal.SIGKILL)
    scheduler.start()

    assert stub.Extend(extend, wait_for_ready=True) == second
    assert stub.Allocate(allocate) == first
    assert stub.Report(report) == reported
    assert stub.GetRun(pb.GetRunRequest(run_id="run")) == run
