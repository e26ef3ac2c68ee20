"""Widgets of the notebooks' explore cells: live in JupyterLab, the static default in a batch run."""

import os
from collections.abc import Callable


def live() -> bool:
    """Whether a person is in front of the notebook (JupyterLab sets the variable; papermill and nbval do not)."""
    return "JPY_SESSION_NAME" in os.environ


def interact(show: Callable, **choices):
    """``ipywidgets.interact`` over ``choices`` (lists, or (low, high) ranges); without a reader, ``show`` of each first
    choice.
    """
    if not live():
        return show(**{name: choice[0] for name, choice in choices.items()})
    from ipywidgets import interact as widgets

    widgets(show, **choices)
