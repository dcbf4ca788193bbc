"""The demo: GRPO on a small transformer, uniform against knapsack at equal rollouts."""
