"The viewer in a real JupyterLab, driven by a real Chromium: keys, pictures, opacity, classes, refusals; and the twin under papermill."
import json, shutil

import numpy as np
import papermill
import pytest
from browser import CHROMIUM, changed_by, chromium, jupyterlab, message, quiet, run_bench, slider, turn, write_notebook

from htlab.backbone import load_backbone
from htlab.dataset import ImageSet, world_prompts
from htlab.manifest import Manifest
from htlab.viewer import Viewer

if not CHROMIUM: pytest.skip("no chromium on this machine (Debian and Ubuntu: sudo apt install chromium)", allow_module_level=True)

CELL = """
from htlab.backbone import load_backbone
from htlab.dataset import ImageSet, world_prompts
from htlab.manifest import Manifest
from htlab.viewer import Viewer
data = ImageSet(Manifest.load("phantom").split("test"), 112, progress=False)
Viewer((load_backbone("tiny"), world_prompts("label")), data, ("input_x_gradient", "grad_cam", "relevance"), cases=range(12), contour="off", options={"grad_cam": {"block": -1}})
"""
MAPS = {"input_x_gradient", "relevance"}  # grad_cam is asked for the last block, where it has nothing to say


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "The viewer on the screen, between two cells."
    if not shutil.which("make"): pytest.skip("no make on this machine")
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    write_notebook(folder / "viewer.ipynb", CELL, "1", "2")
    with jupyterlab(home, folder) as lab, chromium() as browser: yield run_bench(browser, lab, "viewer.ipynb")


@pytest.fixture
def page(opened):
    "The viewer as it was at first, with the focus: tests may run in any order, and in several workers."
    opened.click(".htlab-reset")
    quiet(opened)
    opened.select_option(".htlab-contour select", label="off")
    quiet(opened)
    opened.click("img.htlab-image")
    return opened


@pytest.fixture(scope="module")
def data(): return ImageSet(Manifest.load("phantom").split("test"), 112, progress=False)


def pixels(page, name):
    "Red of every pixel of a picture, as the browser has it, at the size of the data set."
    red = page.evaluate("""name => { const e = htlab_pictures()[name], canvas = Object.assign(document.createElement('canvas'), {width: e.naturalWidth, height: e.naturalHeight}), c = canvas.getContext('2d')
        c.drawImage(e, 0, 0); return [canvas.height, ...c.getImageData(0, 0, canvas.width, canvas.height).data.filter((v, i) => i % 4 == 0)] }""", name)
    if isinstance(red, dict): red = [red[str(i)] for i in range(len(red))]
    return np.array(red[1:]).reshape(red[0], -1)[::2, ::2]


def call(page): return page.inner_text(".htlab-call")
def active_cell(page): return page.evaluate("[...document.querySelectorAll('.jp-Notebook .jp-Cell')].findIndex(e => e.classList.contains('jp-mod-active'))")
def press(page, *keys):
    def action():
        for k in keys: page.keyboard.press(k, delay=0)
    return changed_by(page, action)


def test_arrows_change_the_case_and_leave_the_notebook_alone(page, data):
    assert np.array_equal(pixels(page, "image"), data.pixels(0)[0])
    assert active_cell(page) == 0
    assert press(page, "ArrowRight") >= {"image"} | MAPS and np.array_equal(pixels(page, "image"), data.pixels(1)[0])
    press(page, "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")
    assert np.array_equal(pixels(page, "image"), data.pixels(5)[0]), "four presses, the kernel busy: none is lost"
    press(page, "ArrowLeft")
    assert np.array_equal(pixels(page, "image"), data.pixels(4)[0]) and ", case=4" in call(page) and "computed: " in message(page)
    assert active_cell(page) == 0


def test_up_and_down_change_the_class_that_is_explained(page):
    press(page, "ArrowDown", "ArrowDown")
    assert "target='benign'" in call(page)
    benign = {m: pixels(page, m) for m in MAPS}
    assert MAPS <= press(page, "ArrowDown") and "target='malignant'" in call(page) and "explained" in page.inner_text(".htlab-classes tr:has-text('malignant')")
    assert all(not np.array_equal(pixels(page, m), benign[m]) for m in MAPS)
    assert "image" not in press(page, "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp") and "target" not in call(page), "the first class is the end"
    assert active_cell(page) == 0


def test_opacity_changes_the_maps_without_a_new_attribution(page, data):
    assert changed_by(page, lambda: turn(page, "opacity", wait_for=MAPS)) == MAPS
    assert set(message(page).split("; ")[0].removeprefix("changed: ").split(", ")) == MAPS and message(page).endswith("computed: nothing")
    case = int(page.inner_text(".htlab-case .widget-readout"))
    slider(page, "opacity").press("Home")                               # 0: the image shines through
    quiet(page)
    for m in MAPS: assert np.array_equal(pixels(page, m)[:112], data.pixels(case)[0])


def test_a_slider_keeps_its_own_arrows(page):
    before = int(page.inner_text(".htlab-case .widget-readout"))
    slider(page, "opacity").press("ArrowRight")
    quiet(page)
    assert int(page.inner_text(".htlab-case .widget-readout")) == before and "opacity=0.75" in call(page)
    slider(page, "case").press("ArrowRight")
    quiet(page)
    assert int(page.inner_text(".htlab-case .widget-readout")) == before + 1


def test_a_refusal_stands_in_its_own_panel(page):
    title = page.locator(".widget-vbox:has(> .htlab-grad_cam) small").inner_text()
    assert title.startswith("grad cam: ") and "block" in title and page.locator("img.htlab-grad_cam").count() == 1
    for m in MAPS: assert "±" in (said := page.locator(f".widget-vbox:has(> .htlab-{m}) small").inner_text()) or "0 to" in said


def test_a_filter_and_the_buttons(page, data):
    page.select_option(".htlab-show select", label="malignant")
    malignant, seen = [i for i in range(12) if data.rows[i]["label"] == "malignant"], []
    for _ in malignant:
        quiet(page)
        seen.append(int(page.inner_text(".htlab-case .widget-readout")))
        page.click(".htlab-next")
    assert seen == malignant


def test_the_file_is_turned_over_by_arrows(page, data, tmp_path):
    Viewer((load_backbone("tiny"), world_prompts("label")), data, (), cases=[3, 7, 8]).to_html(tmp_path / "cases.html", progress=False)
    file = page.context.browser.new_page()
    file.goto((tmp_path / "cases.html").as_uri())
    shown = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        (now,) = [i for i in file.locator("img").all() if i.is_visible()]
        shown.append(now.get_attribute("alt").split(":")[0])
        file.keyboard.press(key)
    assert shown == [data.rows[i]["id"] for i in (3, 7, 8, 8)] and file.inner_text("b") == "2 of 3"
    file.close()


def test_under_papermill_the_static_twin_stands_in_its_place(tmp_path):
    write_notebook(tmp_path / "in.ipynb", CELL)
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False)
    done = json.loads((tmp_path / "out.ipynb").read_text())
    (output,) = done["cells"][0]["outputs"]
    assert set(output["data"]) == {"text/plain", "image/png"} and "widgets" not in done["metadata"]
