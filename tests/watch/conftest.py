"""Programs that end with the test that started them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from programs import Program


@pytest.fixture(scope="module")
def begin() -> Iterator[Callable[[Program], Program]]:
    """A function that starts a program, which is ended with the module."""
    begun: list[Program] = []

    def start(program: Program) -> Program:
        begun.append(program)
        program.start()
        return program

    yield start
    for program in reversed(begun):
        program.close()
