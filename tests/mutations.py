"""What fuzzers change of a message: the values of a field, or bytes on the wire."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def changed_values(draw: random.Random, values: Sequence[Any], odd: Sequence[Any]) -> list[Any]:
    """Return the values of a repeated field with none, twice as many, one less, or an odd one."""
    changed = list(values)
    action = draw.randrange(5)
    if action == 0:
        return []
    if action == 1:
        return changed * 2
    if action == 2 and changed:
        changed.pop(draw.randrange(len(changed)))
    elif action == 3 and changed:
        changed[draw.randrange(len(changed))] = draw.choice(odd)
    else:
        changed.append(draw.choice(odd))
    return changed


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """Return bytes of which one to three places were flipped, cut off, filled in or repeated."""
    changed = bytearray(data or b"\n")
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = draw.randbytes(draw.randrange(1, 9))
            case _:
                changed += changed[at:]
        changed = changed or bytearray(b"\xff")
    return bytes(changed)
