"""A reader's JupyterLab: a real browser runs notebooks from top to bottom, moves a widget and sees
the picture change.

Needs Chromium and the extra ``browser``. Screenshots go to the folder that BROWSER_SHOTS names,
else to pytest's.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from companion import paper, paths, run
from fungi_core.seeds import generator

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PLAIN = {"windowingMode": "none"}  # every cell is in the page, seen or not
pytestmark = pytest.mark.slow


def git_in(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def checkout(folder: Path) -> Path:
    """Copy what git tracks, as it is now, into a repository of its own."""
    git_in(paths.ROOT, "checkout-index", "--all", f"--prefix={folder}/")
    changed = git_in(paths.ROOT, "diff", "--name-only", "--diff-filter=d").split()
    for name in changed:  # not committed yet
        shutil.copyfile(paths.ROOT / name, folder / name)
    scenes = folder / "notebooks" / "05_scene_understanding.ipynb"  # fewer images: minutes less
    text = scenes.read_text()
    assert "limit: int = 32" in text
    scenes.write_text(text.replace("limit: int = 32", "limit: int = 8"))
    git_in(folder, "init", "-q")
    git_in(folder, "add", "-A")
    author = ("-c", "user.name=a reader", "-c", "user.email=reader@example.org")
    git_in(folder, *author, "commit", "-qm", "a checkout")
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """What `make lab` starts, over a checkout and on a port of its own: (address, folder)."""
    folder = checkout(tmp_path_factory.mktemp("lab"))
    home = tmp_path_factory.mktemp("home")
    (settings := home / "settings" / "@jupyterlab" / "notebook-extension").mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps(PLAIN))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "RUNTIME")
    }
    env |= {
        f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")
    }
    env |= {"FUNGI_STORE": str(paths.store_dir()), "PYTHONPATH": f"{folder}:{folder / 'notebooks'}"}
    env.pop("FUNGI_FIGURES", None)  # a run writes to the checkout's own figures/mini
    asked = subprocess.run(
        ["make", "-n", "lab"], cwd=paths.ROOT, capture_output=True, text=True, check=True
    ).stdout.replace(str(paths.ROOT), str(folder))
    line = next(line for line in asked.splitlines() if "jupyter lab" in line)
    setting, _, _, *options, _ = shlex.split(line)  # VARIABLE=value jupyter lab --option notebook
    env |= dict([setting.split("=", 1)])
    command = [sys.executable, "-m", "jupyterlab", *options, "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token="]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder
        )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (home / "lab.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (extra 'browser')"
    )
    with sync.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )  # no sandbox for root
        yield chromium
        chromium.close()


@pytest.fixture
def started(browser, lab, tmp_path, request):
    """A function: slug -> the page with that notebook, which runs from top to bottom."""
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.set_default_timeout(60_000)

    def start(slug: str):
        space = f"{request.node.name}-{slug}"  # of its own: no other tabs
        page.goto(f"{lab[0]}/lab/workspaces/{space}/tree/notebooks/{slug}.ipynb")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(
            state="attached"
        )
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=180_000)
        outputs = page.locator(".jp-CodeCell .jp-OutputArea-output")
        menu(page, "Edit", "Clear Outputs of All Cells", lambda: outputs.count() == 0)
        menu(
            page,
            "Run",
            "Run All Cells",
            lambda: page.locator(".jp-InputPrompt", has_text="*").count() > 0,
        )
        return page

    yield start
    shot(page, request.node.name, tmp_path)
    end_kernels(page)
    page.close()


def end_kernels(page) -> None:
    """Shut down all kernels, each of which holds a gigabyte."""
    page.evaluate("""async () => {
        const token = document.cookie.match(/_xsrf=([^;]*)/)[1];
        for (const { id } of await (await fetch("/api/sessions")).json())
            await fetch(`/api/sessions/${id}`, {
                method: "DELETE", headers: { "X-XSRFToken": token }
            });
    }""")


@pytest.fixture
def notebook(started):
    """A function: slug -> the page with that notebook, run from top to bottom without an error."""

    def finished(slug: str):
        page = started(slug)
        last = page.locator(".jp-CodeCell").last.locator(".jp-OutputArea-output")
        errors(page).or_(last).first.wait_for(state="attached", timeout=900_000)
        assert not errors(page).all_inner_texts()
        return page

    return finished


def menu(page, name: str, entry: str, done) -> None:
    """Choose an entry until it is ``done``: while the page settles a click can close the menu
    again.
    """
    for _ in range(20):
        if (
            select := page.get_by_role("button", name="Select Kernel")
        ).count():  # of a slow machine, asked too early
            select.first.click()
        page.locator(".lm-MenuBar-item", has_text=name).first.click()
        page.wait_for_timeout(500)
        item = page.locator(".lm-Menu-item", has=page.get_by_text(entry, exact=True))
        if item.count():
            item.first.click()
        for _ in range(30):
            page.wait_for_timeout(200)
            if done():
                return
        page.keyboard.press("Escape")
    raise AssertionError(f"{name} > {entry} had no effect")


def shot(page, name: str, folder: Path) -> None:
    """The whole notebook as one picture."""
    folder = Path(os.environ.get("BROWSER_SHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    page.keyboard.press("Escape")
    heights = page.locator(".jp-WindowedPanel-outer").evaluate_all(
        "all => all.map(one => one.scrollHeight)"
    )
    page.set_viewport_size({"width": 1360, "height": min(max(heights, default=800) + 200, 16_000)})
    page.locator(".jp-WindowedPanel-outer").evaluate_all(
        "all => all.forEach(one => one.scrollTop = 0)"
    )
    page.wait_for_timeout(1000)
    page.screenshot(path=folder / f"{name}.png")


def errors(page):
    """Locate tracebacks; JupyterLab shows them as what goes to stderr."""
    kind = '[data-mime-type="application/vnd.jupyter.stderr"]'
    return page.locator(kind, has_text="Traceback (most recent call last)")


def cell_with(page, text: str):
    return page.locator(".jp-CodeCell", has_text=text)


def shown(cell) -> list[str]:
    """What a cell shows: its pictures, or the text of its tables where it has none."""
    pictures = [image.get_attribute("src") for image in cell.locator(".jp-OutputArea img").all()]
    return pictures or cell.locator(".jp-OutputArea-output table").all_inner_texts()


def changes(page, cell, act, seconds: float = 60) -> float:
    """Do ``act`` and wait until the cell shows something else, as many pictures as before; the
    seconds it took.
    """
    before, start = shown(cell), time.monotonic()
    assert before, "nothing shown"
    act()
    while shown(cell) == before or len(shown(cell)) != len(before):
        assert time.monotonic() - start < seconds, "the cell shows what it showed"
        page.wait_for_timeout(50)
    took = time.monotonic() - start
    page.wait_for_timeout(500)
    assert len(shown(cell)) == len(before), "pictures pile up"
    return took


def slide(cell, index: int = 0, steps: int = 1):
    handle = cell.locator(".noUi-handle").nth(index)
    handle.focus()
    for _ in range(steps):
        handle.press("ArrowRight")


def choose(cell, index: int, option: int):
    cell.locator("select").nth(index).select_option(index=option)


def upload(page, files) -> None:
    """Choose files, as a reader does in the dialogue of the browser."""
    with page.expect_file_chooser() as chooser:
        cell_with(page, "explore.chooser(").get_by_role("button", name="files").click()
    chooser.value.set_files(files)


def test_a_newcomers_first_minutes(started, notebook, tmp_path):
    """From the first page to a picture, to one's own photographs and to what holds; printed."""
    start = time.monotonic()
    passed = lambda what: print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
    verdicts = ".jp-OutputArea-output table >> text=agrees"
    page = started("00_start_here")
    page.locator(".jp-OutputArea img").first.wait_for()
    passed("first picture")
    page.locator(verdicts).first.wait_for()
    passed("six claims with their verdicts")
    page.get_by_role("link", name="20_your_own_data").first.click()
    page.locator(".lm-TabBar-tabLabel", has_text="20_your_own_data.ipynb").first.wait_for()
    passed("the page of one's own photographs is open")
    page = notebook("20_your_own_data")
    passed("its demonstration has run")
    cell = cell_with(page, "explore.interact(neighbours")
    files = photographs(tmp_path, 12)
    changes(page, cell, lambda: upload(page, files), 300)
    passed("neighbours of twelve own photographs")
    notebook("19_scoreboard").locator(verdicts).first.wait_for()
    passed("what holds and what does not, claim by claim")


def test_start_here_links_every_notebook_and_shows_a_notebooks_claims(notebook, tmp_path):
    page = notebook("00_start_here")
    cell = cell_with(page, "explore.interact(show")
    print(f"menu: {changes(page, cell, lambda: choose(cell, 0, 3)):.1f} s")
    shot(page, "00_start_here", tmp_path)
    table = cell_with(page, "paper.overview").locator(".jp-OutputArea-output table")
    link = table.get_by_role("link", name="02_complementarity").first
    link.click()
    page.locator(".lm-TabBar-tabLabel", has_text="02_complementarity.ipynb").first.wait_for()


def test_complementarity_shows_the_images_of_another_class(notebook):
    page = notebook("02_complementarity")
    cell = cell_with(page, "explore.interact(show")
    print(f"slider: {changes(page, cell, lambda: slide(cell)):.1f} s")
    print(f"menu: {changes(page, cell, lambda: choose(cell, 1, 2)):.1f} s")


def test_scenes_show_the_neighbours_of_another_patch(notebook):
    page = notebook("05_scene_understanding")
    cell = cell_with(page, "explore.interact(show")
    print(f"slider: {changes(page, cell, lambda: slide(cell, 1)):.1f} s")


def photographs(folder: Path, count: int) -> list[Path]:
    """Write pictures of coloured clouds, each another one in any folder; return their files."""
    files = []
    for i in range(count):
        pixels = generator("browser", folder, i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        files.append(folder / f"photo{i:02d}.jpg")
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(files[-1])
    return files


def test_own_photographs_from_the_first_click_to_a_file(notebook, lab, tmp_path):
    page = notebook("20_your_own_data")
    cell = cell_with(page, "explore.interact(neighbours")
    print(f"slider: {changes(page, cell, lambda: slide(cell)):.1f} s")
    files = photographs(tmp_path, 12)
    (tmp_path / "broken.jpg").write_bytes(files[0].read_bytes()[:300])
    chosen = [*files, tmp_path / "broken.jpg"]
    print(f"upload: {changes(page, cell, lambda: upload(page, chosen), 300):.1f} s")
    chooser = cell_with(page, "explore.chooser(")
    chooser.get_by_text("12 images, no classes").wait_for()
    chooser.get_by_text("left out: broken.jpg").wait_for()
    with page.expect_download() as download:
        cell_with(page, "explore.interact(keep").get_by_role(
            "link", name="own_features.npz"
        ).click()
    kept = np.load(download.value.path())
    assert (lab[1] / "figures" / "own" / "own_features.npz").is_file()  # not the profile's
    assert kept["name"].tolist() == [file.name for file in files] and kept["fungi"].shape == (
        12,
        4 * 192,
    )


def test_a_zip_keeps_its_folders_as_classes(notebook, tmp_path):
    files = photographs(tmp_path, 12)
    with zipfile.ZipFile(tmp_path / "album.zip", "w") as album:
        for i, file in enumerate(files):
            album.write(file, f"{'dusk' if i % 2 else 'dawn'}/{file.name}")
    page = notebook("20_your_own_data")
    upload(page, tmp_path / "album.zip")
    done = cell_with(page, "explore.chooser(").get_by_text("12 images, 2 classes")
    done.wait_for(timeout=300_000)
    table = cell_with(page, "explore.interact(accuracy").locator(".jp-OutputArea-output table")
    assert "E+K+D+S" in table.inner_text()


def test_wrong_choices_are_one_line(notebook):
    """A folder that is not there, and a network of the hub, which these tests cannot reach."""
    page = notebook("20_your_own_data")
    cell = cell_with(page, "explore.chooser(")
    cell.get_by_placeholder("a sub-folder per class, or files only").fill("no/such/folder")
    cell.get_by_role("button", name="extract").click()
    cell.get_by_text("no/such/folder is no folder").wait_for()
    cell.get_by_placeholder("a sub-folder per class, or files only").fill("")
    name = "vit_small_patch16_224.augreg_in1k"
    cell.get_by_placeholder("or any timm name").fill(name)
    start = time.monotonic()
    cell.get_by_role("button", name="extract").click()
    cell.get_by_text(f"{name} needs").wait_for(timeout=20_000)
    print(f"a hub that is not reached: {time.monotonic() - start:.1f} s")
    assert errors(page).count() == 0


def test_the_stop_button_stops_any_extraction_and_the_next_click_resumes(started, lab, tmp_path):
    """The first extraction is the cell's own, later ones are a button's: stopped in the kernel's
    main thread all the same.
    """
    photographs(tmp_path, 24)
    source = lab[1] / "notebooks" / "20_your_own_data.ipynb"
    given = {'folder: str = \\"\\"': f'folder: str = \\"{tmp_path}\\"'}
    given['\\"vit_mini.sup_tin100\\"  #'] = '\\"random:vit_tiny_patch16_224\\"  #'
    text = source.read_text()
    for old, new in given.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (stopped := source.with_name("stopped.ipynb")).write_text(text)
    page = started("stopped")
    cell = cell_with(page, "explore.chooser(")
    presses = [lambda: None, *2 * [cell.get_by_role("button", name="extract").click]]
    # 24 images x (1 + 12 + 49 views, and 3 rows made of them); or KL's are there already.
    left = re.compile(r"\d+/(1560|1512)\s\[\d\d:\d\d<\d\d:\d\d,")
    for press in presses:
        press()
        cell.get_by_text("own train, dino").first.wait_for()
        cell.get_by_text(left).wait_for()  # one bar, with the time left; two would be an error
        start = time.monotonic()
        page.get_by_title("Interrupt the kernel").first.click()
        cell.get_by_text("stopped; run again to resume").wait_for(timeout=60_000)
        print(f"stopped after {time.monotonic() - start:.1f} s")
    cell.get_by_role("button", name="extract").click()
    cell.get_by_text("24 images, no classes, random:vit_tiny").wait_for(timeout=600_000)
    assert errors(page).count() == 0
    stopped.unlink()


def test_the_scoreboard_shows_the_committed_results_before_any_run(notebook, lab):
    page = notebook("19_scoreboard")
    assert not (lab[1] / "figures" / "mini" / "claims_03_image_classification.csv").exists()
    table = cell_with(page, "figures.show_table(table, 2)").locator("table")
    assert table.locator("tbody tr").count() == len(paper.claims())
    assert "nan" not in table.inner_text().lower() and "agrees" in table.inner_text()


def test_reading_every_notebook_leaves_the_checkout_clean(notebook, lab):
    for slug in run.notebooks():
        start = time.monotonic()
        end_kernels(notebook(slug))
        print(f"{slug}: {time.monotonic() - start:.0f} s", flush=True)
    assert git_in(lab[1], "status", "--porcelain") == ""
