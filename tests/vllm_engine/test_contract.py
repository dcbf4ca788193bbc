"""The promises that every engine keeps, kept by vLLM."""

from __future__ import annotations

import pytest

import test_engines
from test_engines import *  # noqa: F403
from vllm_models import tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="session")

# The tests make other weights for the engine's model.
test_engines.small_model = tiny_model
