"""The generation server: unequal numbers of rollouts per prompt from one language model.

Started with ``knapsack-genserver serve``.
"""
