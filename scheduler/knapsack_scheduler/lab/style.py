"""How plots look: one palette, one colour per arm everywhere, ink that follows the page.

Needs matplotlib; only files that draw import this one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from knapsack_scheduler.lab.report import shown

INK = "#010203"
"""Text and lines; becomes the text colour of the page, light or dark."""

COLOURS = {
    "uniform": "#8a8a8a",
    "paper": "#d55e00",
    "posterior": "#56b4e9",
    "posterior-2-waves": "#2f86c6",
    "posterior-3-waves": "#009e73",
    "oracle": "#e69f00",
}
"""Of each arm: hues of Okabe and Ito, told apart by colour-blind people, and light enough
and dark enough to be seen on white and on black."""

MARKERS = {
    "uniform": "o",
    "paper": "s",
    "posterior": "^",
    "posterior-2-waves": "D",
    "posterior-3-waves": "v",
    "oracle": "*",
}
"""Of each arm: colour is never the only difference."""

BANDS = ("#0072b2", "#56b4e9", "#b8b8b8", "#e69f00", "#d55e00")
"""From solved to unsolved."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.axisbelow": True,
    # Names of users are text, not mathematics.
    "text.parse_math": False,
    # Text stays text: it can be read aloud, searched and copied.
    "svg.fonttype": "none",
    "svg.hashsalt": "knapsack-rl",
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of that many inches, in the style of the reports."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(drawn: Figure) -> str:
    """Return the figure as an ``<svg>`` element to stand in a page; call within ``figure``.

    The same figure gives the same text: no date, no random names. Nothing of it has a
    background, and what has the colour ``INK`` takes the colour of the page's text.
    """
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several figures stand in one page: names that nothing refers to would stand there twice.
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", text)
    # The page's font, not the list of those that were measured with.
    text = re.sub(r"""font-family: [^;"]*(; )?""", "", text)
    return text.replace(INK, "currentColor")


def label(text: str) -> str:
    """Return a user's name fit for a plot: one short line of what can be shown."""
    line = shown(text)
    return line if len(line) <= 40 else line[:37] + "..."


def colour_of(arm: str) -> str:
    """Return the colour of an arm, a neutral one for arms without."""
    return COLOURS.get(arm, "#cc79a7")


def marker_of(arm: str) -> str:
    """Return the marker of an arm."""
    return MARKERS.get(arm, "P")


def bare(axes: Axes, axis: Literal["both", "x", "y"] = "y") -> None:
    """Give the axes a light grid along one axis."""
    axes.grid(axis=axis)
    axes.tick_params(length=3)
