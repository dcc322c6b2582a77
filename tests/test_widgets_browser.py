"""Benches in a real JupyterLab, turned by a real Chromium: which pictures change on the screen, what an error and a fast drag do, and what is left of it all in a saved file."""
import json, shutil

import chaos
import papermill
import pytest
from browser import CHROMIUM, NOTEBOOKS, changed_by, chromium, get, jupyterlab, message, open_notebook, quiet, run_bench, run_first, slider, turn, write_notebook

if not CHROMIUM: pytest.skip("no chromium on this machine (Debian and Ubuntu: sudo apt install chromium)", allow_module_level=True)

BENCHES = NOTEBOOKS | {"shots": """
import numpy as np, pandas as pd
from htlab.classroom import ShotsBench
from htlab.embed import Embeddings
def drawn(n, seed):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return Embeddings(rng.standard_normal((n, 16)) + .5 * y[:, None], pd.DataFrame(dict(id=[f"{seed}-{i}" for i in range(n)], label=np.array(["benign", "malignant"])[y])), "image", "toy")
ShotsBench(drawn(80, 0), drawn(100, 1))
""", "own": """
from htlab.widgets import Bench, Knob, PlotPicture
class Own(Bench):
    count = 0
    knobs = {"n": Knob("n", 1, 0, 100, 1)}
    pictures = {"line": PlotPicture()}
    def compute(self, n):
        if n == 5: raise ValueError("n=5: <five> is refused")
        Own.count += 1
        return {"line": dict(traces={"n": dict(x=[0, 1], y=[0, n], kind="line")}, title=f"{Own.count} computed", ylim=(0, 100))}
Own()
"""}


@pytest.fixture(scope="module")
def open_bench(tmp_path_factory):
    "Opens the notebook of a bench, run; server, browser and folder are its attributes."
    if not shutil.which("make"): pytest.skip("no make on this machine")
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    for name, text in BENCHES.items(): write_notebook(folder / f"{name}.ipynb", text)
    with jupyterlab(home, folder) as lab, chromium() as browser:
        def go(name): return run_bench(browser, lab, f"{name}.ipynb")
        go.folder, go.lab, go.browser = folder, lab, browser
        yield go


OTHER = {"preset": "low pass", "truth": "none", "head": "prototype"}
# bench: {knob: the pictures that it changes}; all others stay as they are
TURNS = {"speckle": {"dynamic_range": {"image", "grey", "spectrum"}, "gain": {"image", "grey", "spectrum"}, "frequency": {"image", "envelope", "grey", "spectrum"}},
         "filter": {"block": {"tokens"}, "preset": {"response", "image", "spectrum", "tokens", "mask"}},
         "drift": {"tgc": {"image", "frozen", "adapted", "table"}},
         "metric": {"across": {"masks", "distances", "table"}, "tolerance": {"distances", "table"}, "truth": {"masks", "distances", "table"}},
         "shots": {"shots": {"curve", "answers"}, "head": {"curve", "answers"}}}


@pytest.mark.parametrize("name", TURNS)
def test_a_knob_changes_its_pictures_and_no_other(open_bench, name):
    page = open_bench(name)
    for knob, expected in TURNS[name].items():
        def action():
            if slider(page, knob).count(): turn(page, knob, wait_for=expected)
            else: page.select_option(f".htlab-{knob} select", label=OTHER[knob])
        assert changed_by(page, action) == expected, knob
        assert set(message(page).removeprefix("changed: ").split(", ")) == expected, "the bench says itself what changed"
    page.close()


def test_error_drag_and_reset(open_bench):
    page = open_bench("own")
    for _ in range(3): turn(page, "n", wait_for=["line"])
    assert not changed_by(page, lambda: turn(page, "n"))                       # 5 is refused
    assert "ValueError: n=5: <five> is refused" in message(page)
    assert changed_by(page, lambda: turn(page, "n", wait_for=["line"])) == {"line"} and message(page) == "changed: line"

    slider(page, "n").focus()
    for _ in range(40): page.keyboard.press("ArrowRight", delay=0)
    quiet(page, 1200)
    assert page.inner_text(".htlab-call") == "Own(n=46)" and page.inner_text(".htlab-n .widget-readout") == "46"
    assert page.evaluate("document.querySelector('.js-plotly-plot').data[0].y[1]") == 46
    assert changed_by(page, lambda: page.click(".htlab-reset")) == {"line"} and page.inner_text(".htlab-call") == "Own()"
    page.close()


def test_the_saved_file_reads_on_its_own(open_bench):
    page = open_bench("metric")
    page.keyboard.press("Control+s")
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    (output,) = json.loads((open_bench.folder / "metric.ipynb").read_text())["cells"][0]["outputs"]
    assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(output["data"])
    page.close()
    for session in json.loads(get(open_bench.lab["url"] + "api/sessions", open_bench.lab["token"])[2]): get(open_bench.lab["url"] + f"api/sessions/{session['id']}", open_bench.lab["token"], "DELETE")
    page = open_notebook(open_bench.browser, open_bench.lab, "metric.ipynb")    # the widget's kernel is gone: another reader, another day
    page.wait_for_selector(".jp-OutputArea img[src^='data:image/png']")
    assert not page.locator(".htlab-bench").count() and "Error" not in page.inner_text(".jp-Notebook")
    page.close()


@pytest.mark.parametrize("name", ["speckle", "metric"])
def test_under_papermill_the_static_twin_stands_in_its_place(tmp_path, name):
    write_notebook(tmp_path / "in.ipynb", BENCHES[name])
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False)
    done = json.loads((tmp_path / "out.ipynb").read_text())
    (output,) = done["cells"][0]["outputs"]
    assert "image/png" in output["data"] and not [k for k in output["data"] if "widget" in k]
    assert "widgets" not in done["metadata"]


def test_a_sweep_shows_how_far_it_is(open_bench):
    "The table of `run_sweep` in JupyterLab: what runs while it runs, and all cells done at the end."
    chaos.notebook(open_bench.folder / "toy.ipynb", chaos.CODE, "seed = 0\npause = 3\nrun_dir = ''")
    write_notebook(open_bench.folder / "sweep.ipynb", "from htlab.grid import run_sweep\nlen(run_sweep(dict(template='toy.ipynb', seeds=[1, 2]), workers=1))")
    page = run_first(open_bench.browser, open_bench.lab, "sweep.ipynb", ".jp-OutputArea table td:has-text('running')")
    assert "toy-" in page.inner_text(".jp-OutputArea table")
    page.wait_for_selector(".jp-OutputArea-executeResult:has-text('2')")
    names, counts = ([e.inner_text() for e in page.query_selector_all(f".jp-OutputArea table tr >> nth={row} >> {cell}")] for row, cell in ((0, "th"), (1, "td")))
    assert dict(zip(names, counts)) == dict(cells="2", done="2", found="0", running="0", failed="0", waiting="0", left="")
    page.close()
