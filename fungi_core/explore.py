"""What a notebook does with its kernel: widgets live in JupyterLab and static in a batch run, and an early end."""

import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from IPython import get_ipython


def live() -> bool:
    """Whether a person is in front of the notebook (JupyterLab sets the variable; papermill and nbval do not)."""
    return "JPY_SESSION_NAME" in os.environ


def interact(show: Callable, **choices):
    """``ipywidgets.interact`` over ``choices``: lists, (low, high) ranges or sliders (low, high, start).

    Without a reader, ``show`` of each first choice, or each slider's start.
    """
    sliders = {name: choice for name, choice in choices.items() if isinstance(choice, tuple) and len(choice) == 3}
    if not live():
        return show(**{name: choice[2 if name in sliders else 0] for name, choice in choices.items()})
    from ipywidgets import IntSlider
    from ipywidgets import interact as widgets

    slide = lambda low, high, start: IntSlider(min=low, max=high, value=start, continuous_update=False)
    widgets(show, **choices | {name: slide(*choice) for name, choice in sliders.items()})


def listen(clips: Sequence, rate: int) -> None:
    """A player for each waveform (n,), in front of a person only: sound is never kept in a saved notebook."""
    if live():
        from IPython.display import Audio, display

        for clip in clips:
            display(Audio(clip, rate=rate))


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
