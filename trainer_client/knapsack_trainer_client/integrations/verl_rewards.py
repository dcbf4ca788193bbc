"""Finished rollouts in verl's TransferQueue -> groups with their rewards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import transfer_queue

from knapsack_trainer_client.errors import refused
from knapsack_trainer_client.integrations.verl_groups import FinishedGroup

IDENTITY = ("raw_prompt", "extra_info", "index", "data_source")
"""Columns of a batch that name a prompt."""


def final_keys(tags: Mapping[str, Any], uids: Collection[str]) -> list[str]:
    """Return the key of the last output of every rollout of the groups.

    A key is ``uid_session_output``; an agent's rollout may have several outputs, and the
    last one has the reward.
    """
    last: dict[tuple[str, int], tuple[int, str]] = {}
    for key in tags:
        uid, session, output = split_key(key)
        if session >= 0 and uid in uids and last.get((uid, session), (-1, ""))[0] < output:
            last[uid, session] = (output, key)
    return [key for _, key in last.values()]


def split_key(key: str) -> tuple[str, int, int]:
    """Return uid, session and output of a trajectory's key; of another key, it and -1, -1.

    A prompt that was cleared while it ran comes back as a key without a mark.
    """
    parts = key.rsplit("_", 2)
    if len(parts) != 3:
        return key, -1, -1
    return parts[0], int(parts[1]), int(parts[2])


def read_groups(
    partition_id: str, tags: Mapping[str, Any], uids: Collection[str]
) -> list[FinishedGroup]:
    """Return the groups with what they have finished; those with nothing are left out.

    Args:
        partition_id: of the queue.
        tags: of the partition's trajectories, by key.
        uids: of the groups.

    Raises:
        InvalidRequest: rollouts have no reward yet.
    """
    keys = final_keys(tags, uids)
    if not keys:
        return []
    data = transfer_queue.kv_batch_get(
        keys=keys, partition_id=partition_id, select_fields=["rm_scores"]
    )
    if "rm_scores" not in data:
        raise refused(
            "rm_scores",
            None,
            "must be there when rollouts are sampled; the reward function or the agent loop "
            "must score them, not the trainer afterwards",
        )
    groups: dict[str, FinishedGroup] = {}
    for key, scores in zip(keys, data["rm_scores"], strict=True):
        uid, session, _ = split_key(key)
        tag = tags[key]
        group = groups.setdefault(uid, FinishedGroup(uid))
        group.sessions.append(session)
        group.rewards.append(float(scores.sum()))
        group.completion_tokens.append(int(tag["response_len"]))
        group.step = int(tag["global_steps"])
        version = tag.get("min_global_steps")
        # Rollouts of a step are made with the weights of the step before.
        made_by = max(group.step - 1, 0) if version is None else int(version)
        is_first = len(group.sessions) == 1
        group.policy_version = made_by if is_first else min(group.policy_version, made_by)
    return list(groups.values())


def read_identity(partition_id: str, keys: list[str]) -> dict[str, list[Any] | None]:
    """Return the columns that name the prompts of trajectories, by name; None if missing."""
    data = transfer_queue.kv_batch_get(keys=keys, partition_id=partition_id)
    return {name: columns(data, name) for name in IDENTITY}


def columns(data: Any, name: str) -> list[Any] | None:
    """Return a column of a TensorDict as a list of Python values; None if it has none."""
    if name not in data:
        return None
    values = data[name]
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return [
        getattr(value, "data", value) if type(value).__name__ == "NonTensorData" else value
        for value in listed
    ]
