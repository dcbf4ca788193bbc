"""Page tokens: where the next page begins, opaque to callers.

A token holds the last key of the page before, so pages stay right while rows are added.
"""

from __future__ import annotations

import base64
import binascii

from knapsack_scheduler import validation
from knapsack_scheduler.errors import InvalidArgument

_MARK = b"k1:"


def page_size(value: int, default: int, most: int) -> int:
    """Return how many rows a page holds; InvalidArgument if negative."""
    validation.within("page_size", value, 0, validation.LARGEST_INT32)
    return min(value or default, most)


def token_after(key: str) -> str:
    """Return the token of the page after ``key``."""
    return base64.urlsafe_b64encode(_MARK + key.encode("utf-8", "surrogatepass")).decode()


def key_before(token: str) -> str:
    """Return the key that a token's page begins after; empty for the first page."""
    if not token:
        return ""
    try:
        data = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        if data.startswith(_MARK):
            return data[len(_MARK) :].decode("utf-8", "surrogatepass")
    except (binascii.Error, UnicodeError, ValueError):
        pass
    raise InvalidArgument("page_token", token, "must be the next_page_token of another page")
