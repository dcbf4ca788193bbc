"""What is read of verl's queue."""

from __future__ import annotations

from knapsack_trainer_client.integrations.verl_rewards import final_keys, split_key


def test_the_last_output_of_a_rollout_is_read() -> None:
    """An agent's rollout may have several outputs, and its reward is with the last."""
    tags = {key: {} for key in ("u_0_0", "u_0_10", "u_0_9", "u_1_0", "v_0_0")}

    assert final_keys(tags, {"u"}) == ["u_0_10", "u_1_0"]


def test_a_key_that_is_no_rollout_is_passed_over() -> None:
    """A prompt that was cleared while it ran leaves a key of its uid alone behind it."""
    assert final_keys({"u": {}, "u_3_0": {}}, {"u"}) == ["u_3_0"]
    assert split_key("u") == ("u", -1, -1)
    assert split_key("a_b_3_1") == ("a_b", 3, 1)
