"""vLLM in this process: its engine, its own HTTP API on that engine, and weights from folders.

- ``engine``: the server's ``Engine`` interface on vLLM's AsyncLLM.
- ``flags``, ``platform``: vLLM's command line and what a machine without a GPU needs.
- ``gate``: AsyncLLM whose weights change behind one gate, whichever door is used.
- ``rollouts``: vLLM's stream of deltas as finished rollouts.
- ``http``: vLLM's OpenAI and RL routes on the same engine.
- ``worker``, ``proof``, ``plugin``: what runs inside vLLM's workers: a folder's weights taken
  and compared with their source. ``checkpoint`` is the folder itself.
"""
