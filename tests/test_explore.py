"""Widgets: static without a reader; in JupyterLab one output that is drawn again in place, errors
as one line.
"""

from datetime import datetime

import ipywidgets
import pytest
from IPython.core.interactiveshell import InteractiveShell
from small import SMALL, Pictures, small
from tqdm import tqdm
from traitlets.config import Config

from companion import explore, protocol
from fungi_core import extract, filling

DISPLAYED = []


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    monkeypatch.setattr(explore, "display", DISPLAYED.append)
    DISPLAYED.clear()


@pytest.fixture
def batch(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)


def widgets(kind):
    """Controls of one kind on the page shown last."""
    page = next(x for x in reversed(DISPLAYED) if isinstance(x, ipywidgets.VBox))
    found, stack = [], [page]
    while stack:
        one = stack.pop(0)
        found += [one] if isinstance(one, kind) else []
        stack += list(getattr(one, "children", ()))
    return found


def test_a_batch_run_shows_the_first_of_each_list_and_the_start_of_each_slider(batch):
    asked = dict(a=["x", "y"], b=(1, 9, 4), c=(2, 5), d=lambda: (0, 3, 3), e="typed")
    assert explore.interact(lambda **values: values, **asked) == {
        "a": "x",
        "b": 4,
        "c": 2,
        "d": 3,
        "e": "typed",
    }
    with pytest.raises(ZeroDivisionError):
        explore.interact(lambda k: 1 / 0, k=[1])


def test_a_reader_gets_controls_and_what_they_choose(live):
    calls = []
    explore.interact(lambda a, b: calls.append((a, b)), a=["x", "y"], b=(1, 9, 4))
    (menu,), (slider,) = widgets(ipywidgets.Dropdown), widgets(ipywidgets.IntSlider)
    menu.value, slider.value = "y", 7
    assert calls == [("x", 4), ("y", 4), ("y", 7)]
    assert not slider.continuous_update and len(widgets(ipywidgets.Output)) == 1


def test_a_text_is_edited_and_drawn_when_it_is_entered(live):
    calls = []
    explore.interact(lambda sentence: calls.append(sentence), sentence="one two")
    (box,) = widgets(ipywidgets.Text)
    box.value = "three"
    assert calls == ["one two", "three"] and not box.continuous_update


def test_an_error_is_one_line_and_the_next_choice_works(live, capsys):
    def show(k):
        if k == 2:
            raise ValueError("no such\nneighbours")
        return k

    explore.interact(show, k=[1, 2, 3])
    (menu,) = widgets(ipywidgets.Dropdown)
    menu.value = 2
    assert "ValueError: no such neighbours\n" in capsys.readouterr().out
    menu.value = 3
    assert DISPLAYED[-1] == 3


def test_cells_follow_what_they_watch_and_ask_for_their_choices_again(live, capsys):
    mine, calls = explore.Watched(), []
    explore.interact(
        lambda one: calls.append(one), on=mine, one=lambda: (0, len(mine.value) - 1, 0)
    )
    assert calls == []  # nothing chosen yet
    mine.value = "abc"
    (slider,) = widgets(ipywidgets.IntSlider)
    assert calls == [0] and slider.max == 2
    slider.value = 2
    mine.value = "abcdef"
    (slider,) = widgets(ipywidgets.IntSlider)
    assert calls == [0, 2, 0] and slider.max == 5

    def stopped():
        raise KeyboardInterrupt

    controls = []
    kinds = (ipywidgets.IntSlider, ipywidgets.Label)
    mine.renew(lambda: controls.extend(map(type, sum(map(widgets, kinds), []))) or "gh")
    assert controls == [ipywidgets.Label] and mine.value == "gh"  # nothing of the last, and a word
    assert "still the last" not in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        mine.renew(stopped)
    assert mine.value == "gh" and widgets(ipywidgets.IntSlider)
    assert capsys.readouterr().out.endswith("what is shown below is still the last choice's\n")


def test_the_stop_button_is_one_line_in_any_cell(monkeypatch, capsys):
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    monkeypatch.setattr(explore, "get_ipython", lambda: shell)
    explore.stop_in_a_line()
    done = shell.run_cell("print('begun'); raise KeyboardInterrupt")
    assert capsys.readouterr().out == "begun\nstopped; run again to resume\n"
    assert isinstance(done.error_in_exec, KeyboardInterrupt)  # so "run all" goes no further
    shell.run_cell("1 / 0")
    assert "ZeroDivisionError" in capsys.readouterr().out  # other errors are as they were


def test_the_panel_loads_at_once_then_files_or_a_folder_whichever_came_last(live, capsys):
    calls = []

    def load(files, folder, backbone):
        calls.append((files, folder, backbone))
        if folder == "bad":
            raise ValueError("bad is no folder")
        if folder == "long":
            raise KeyboardInterrupt  # the stop button

    explore.chooser(load, folder="", backbone="a", backbones=["a", "b (not here: 1 GB)"])
    (upload,), (button,) = widgets(ipywidgets.FileUpload), widgets(ipywidgets.Button)[-1:]
    place = next(w for w in widgets(ipywidgets.Text) if not isinstance(w, ipywidgets.Combobox))
    (name,) = widgets(ipywidgets.Combobox)
    name.value = "b (not here: 1 GB)"  # as the menu has it
    enter = lambda: place._handle_custom_msg({"event": "submit"}, [])
    place.value = "bad"
    assert len(calls) == 1  # typed, and left for another box: nothing runs yet
    enter()
    assert "ValueError: bad is no folder\n" in capsys.readouterr().out and not button.disabled
    place.value = "long"
    enter()
    assert "stopped; run again to resume\n" in capsys.readouterr().out and not button.disabled
    file = {
        "name": "x.jpg",
        "type": "",
        "size": 1,
        "content": memoryview(b"1"),
        "last_modified": datetime.now(),
    }
    upload.set_trait("value", (file,))
    button.click()  # another backbone, say: the files are still there
    assert calls == [
        ([], "", "a"),
        ([], "bad", "b"),
        ([], "long", "b"),
        ([("x.jpg", b"1")], "", "b"),
        ([("x.jpg", b"1")], "", "b"),
    ]


def test_the_panel_of_a_batch_run_loads_and_raises(batch):
    assert explore.chooser(lambda *asked: asked, folder="f", backbone="a", backbones=[]) == (
        (),
        "f",
        "a",
    )
    with pytest.raises(ValueError):
        explore.chooser(lambda *asked: int("x"), folder="", backbone="a", backbones=[])


def test_bars_are_for_people_and_quiet_in_batch_logs(monkeypatch, capsys):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert list(protocol.each(range(3), "three")) == [0, 1, 2]
    assert filling.progress(3, "views").disable
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    for module in (protocol, filling):
        monkeypatch.setattr(module, "tqdm", tqdm)  # text, not a widget
    bar = protocol.each(range(3), "three")
    assert not bar.disable and bar.delay == 2 and list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # done before the third second
    with filling.progress(2, "photographs") as bar:
        bar.update(1)
        bar.refresh()
        assert " 50%" in (shown := capsys.readouterr().err) and "1/2" in shown
    assert not capsys.readouterr().err.strip()  # gone: several would look like one that hangs


@pytest.mark.parametrize("kept", [2**30, 0])
def test_one_bar_counts_the_views_of_all_objectives(kept, tmp_path, monkeypatch):
    """Whether what the trunk says is kept, 1 + 4 + 9 views an image; then also each row made of it.
    A second extraction has nothing left, one with a file lost that file."""
    bars = []

    class Watched(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})
            self.total, self.n = kwargs["total"], 0
            bars.append(self)

        def update(self, n=1):
            self.n += n

    monkeypatch.setattr(filling, "tqdm", Watched)
    monkeypatch.setattr(extract, "_KEPT", kept)
    data = Pictures("train", tuple(range(300)))  # two files of the store
    run = lambda: extract.extract(data, small(), SMALL, root=tmp_path)
    views = sum(one.views.count(small().inputs) for one in SMALL)
    a_row = views + 3 if kept else views
    first = run()
    shown = [bar for bar in bars if bar.total]
    assert [(bar.total, bar.n) for bar in shown] == [(300 * a_row, 300 * a_row)]
    bars.clear()
    run()
    assert not any(bar.total for bar in bars)
    for key in first.keys:
        for file in (tmp_path / key).glob("000000256-*"):
            file.unlink()
    run()
    left = 44 * (3 if kept else views)
    assert [(bar.total, bar.n) for bar in bars if bar.total] == [(left, left)]
