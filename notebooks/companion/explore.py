"""What a notebook does with its kernel: widgets are live in JupyterLab and static in a batch run,
and a notebook that lacks what it needs ends early.
"""

# ipywidgets is imported where a reader gets widgets: a batch run has no use for it.
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from IPython import get_ipython
from IPython.display import display
from traitlets import Any, HasTraits

from companion.messages import one_line

STOPPED = "stopped; run again to resume"


def live() -> bool:
    """Tell whether a person is there: JupyterLab sets the variable, papermill and nbval do not."""
    return "JPY_SESSION_NAME" in os.environ


class Watched(HasTraits):
    """A value that cells look at: ``interact(show, on=watched)`` draws again when it is set."""

    value = Any()

    def renew(self, make: Callable):
        """Set the value to what ``make`` returns. Until then it is None, and where ``make`` fails
        or is stopped the last one comes back, with a line that says so.
        """
        last, self.value = self.value, None
        try:
            self.value = make()
        finally:
            if self.value is None and last is not None:
                self.value = last
                print("what is shown below is still the last choice's")


def interact(show: Callable, *, on: Watched | None = None, **choices):
    """Show a menu or slider for each of ``choices``, and below them what ``show`` returns, drawn
    again in place at a change.

    A choice is a list (menu), integers (low, high) or (low, high, start) (slider), a str to edit
    (Enter draws), or a function that gives one of these, asked again when ``on`` changes. What
    ``show`` raises is shown as one line. Without a reader: ``show`` of each list's first, each
    slider's start and each str, and errors are errors.
    """

    def asked() -> dict:
        return {name: choice() if callable(choice) else choice for name, choice in choices.items()}

    if not live():
        return show(**{name: _start(choice) for name, choice in asked().items()})
    from ipywidgets import HBox, Label, Layout, VBox, interactive_output

    page = VBox()

    def build(_=None):
        if on is not None and on.value is None:
            page.children = [Label("shown when the choice above is made")]
            return
        controls = {name: _control(name, choice) for name, choice in asked().items()}
        output = interactive_output(lambda **values: _attempt(show, **values), controls)
        row = HBox(list(controls.values()), layout=Layout(flex_flow="row wrap"))
        page.children = [row, output] if controls else [output]

    build()
    if on is not None:
        on.observe(build, "value")
    display(page)


def _start(choice):
    """Return the value that a choice starts with."""
    if isinstance(choice, str):
        return choice
    return choice[2] if isinstance(choice, tuple) and len(choice) == 3 else choice[0]


def _control(name: str, choice):
    """Return the widget of a choice; a slider and a text answer when they are let go."""
    from ipywidgets import Layout, interactive

    short = choice[:2] if isinstance(choice, tuple) else choice  # of (low, high, start)
    control = interactive.widget_from_abbrev(short, _start(choice))
    width = {tuple: "24em", str: "40em"}.get(type(choice), "max-content")
    control.description, control.style.description_width = name.replace("_", " "), "initial"
    control.layout = Layout(width=width, max_width="40em")
    control.continuous_update = False
    return control


def _attempt(show: Callable, *values, **named) -> None:
    """Show what a function returns, or what it raises as one line: a reader's choice that cannot
    be drawn, or the stop button, is no reason for a page of traceback.
    """
    try:
        result = show(*values, **named)
    except KeyboardInterrupt:
        print(STOPPED)
    except Exception as error:
        print(f"{type(error).__name__}: {one_line(error)}")
    else:
        if result is not None:
            display(result)


def chooser(load: Callable, *, folder: str, backbone: str, backbones: Sequence[str]):
    """Show a panel for one's own images: files (a zip, too) or a folder, a backbone, a button. It
    runs ``load(files, folder, backbone)`` at once, at each click, when files are chosen and when a
    folder is entered, with its progress below. Without a reader: ``load((), folder, backbone)``.

    ``files``: (name, bytes) pairs, empty at the start; ``backbones``: names, a remark behind some.
    """
    if not live():
        return load((), folder, backbone)
    from ipywidgets import Button, Combobox, FileUpload, HBox, Layout, Output, Text, VBox

    wide = {"layout": Layout(width="34em"), "style": {"description_width": "6em"}}
    narrow = {"layout": Layout(width="10em")}
    files = FileUpload(accept="image/*,.zip", multiple=True, description="files", **narrow)
    nested = "a sub-folder per class, or files only"
    place = Text(folder, description="or a folder", placeholder=nested, **wide)
    name = Combobox(description="backbone", ensure_option=False, options=list(backbones), **wide)
    # a hint, no value: a browser offers only names that hold what is typed
    name.placeholder = f"{backbone}, or any timm name"
    button = Button(description="extract", button_style="primary", **narrow)
    output = Output()

    def click(_=None):
        button.disabled = True
        output.clear_output()
        path = place.value.strip()
        chosen = () if path else files.value
        contents = [(file["name"], bytes(file["content"])) for file in chosen]
        with output:
            _attempt(load, contents, path, (name.value.split() or [backbone])[0])
        button.disabled = False

    def dropped(change):
        if change["new"]:
            place.value = ""  # what was chosen last counts
            click()

    button.on_click(click)
    files.observe(dropped, "value")
    # Enter starts; leaving the box does not, since the backbone may be chosen next.
    place.on_msg(lambda _, said, __: said.get("event") == "submit" and click())
    display(VBox([HBox([files, place]), HBox([button, name]), output]))
    click()


def stop_in_a_line() -> None:
    """Make the stop button end any cell with one line in place of a traceback."""
    get_ipython().set_custom_exc((KeyboardInterrupt,), lambda *_, **__: print(STOPPED))


def end(message: str) -> NoReturn:
    """End the notebook at this cell with one line, as a success: later cells do not run, papermill
    exits with 0.

    Papermill takes an error that says SystemExit 0 for a success. IPython's own is three lines
    about tracebacks and how to quit, so in a kernel an error of that name shows ``message`` in
    their place. Outside a kernel it is SystemExit(0).
    """
    if not hasattr(get_ipython(), "kernel"):
        print(message)
        raise SystemExit(0)
    raise type("SystemExit", (Exception,), {"_render_traceback_": lambda _: [message]})("0")
