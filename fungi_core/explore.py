"""What a notebook does with its kernel: widgets live in JupyterLab and static in a batch run, and an early end."""

import os
from collections.abc import Callable
from typing import NoReturn

from IPython import get_ipython


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


class _End(Exception):
    """Ends a notebook; IPython shows what its handler shows."""


def end(message: str) -> NoReturn:
    """End the notebook at this cell with one line, as a success: later cells do not run, papermill exits with 0.

    Papermill takes an error that says SystemExit 0 for a success. IPython's own is three lines about tracebacks and how
    to quit, so the kernel sends that error with ``message`` in their place. Outside a kernel it is SystemExit(0).
    """
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        print(message)
        raise SystemExit(0)
    content = {"ename": "SystemExit", "evalue": "0", "traceback": [message]}
    shell.set_custom_exc((_End,), lambda *_, **__: None)
    shell.kernel.send_response(shell.kernel.iopub_socket, "error", content)
    raise _End(message)
