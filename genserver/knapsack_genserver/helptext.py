"""Help of commands that shows the defaults there are."""

from __future__ import annotations

import argparse


class ShownDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says what a flag is if it is not given, unless that is nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A switch that is off and a flag without a value say so by not being there.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)
