"""Real schedulers, outboxes apart for every test, and no GPU."""

from __future__ import annotations

import os

from real_scheduler import outbox_folder, scheduler, shared_scheduler

__all__ = ["outbox_folder", "scheduler", "shared_scheduler"]

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
