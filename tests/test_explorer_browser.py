"""The explorer in a real JupyterLab and its html twin from a file, moved over and lassoed in a real Chromium: which picture is shown, which rows are selected, what runs and what is requested."""
import base64, io, json, shutil

import numpy as np
import pytest
from browser import CHROMIUM, NOTEBOOKS, chromium, jupyterlab, quiet, run_bench, write_notebook
from matplotlib.path import Path as Polygon
from PIL import Image

if not CHROMIUM: pytest.skip("no chromium on this machine (Debian and Ubuntu: sudo apt install chromium)", allow_module_level=True)

SETUP = """
import time
import numpy as np, pandas as pd
from htlab.explorer import Explorer
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
class Pictures:
    wait, asked = 0, []
    def __init__(self, n): self.rows = [dict(id=f"case-{i}") for i in range(n)]
    def pixels(self, i):
        self.asked.append(i)
        time.sleep(self.wait)
        mask = np.zeros((48, 48), np.uint8); mask[10:30, 8 + i % 9:35] = 1
        return np.stack([np.random.default_rng(i).integers(0, 256, (48, 48), dtype=np.uint8), mask])
def explorer(n):
    rng = np.random.default_rng(n)
    rows = pd.DataFrame(dict(id=[f"case-{i}" for i in range(n)], label=rng.choice(["benign", "malignant"], n), scanner=rng.choice(list("ABC"), n), size=rng.uniform(2, 9, n), text=EVIL))
    before = rng.normal(size=(n, 2))
    return Explorer({"before": before, "after": before[:, ::-1] * [3, -1] + rng.normal(size=(n, 2)) / 4}, rows, Pictures(n), texts={"after": {EVIL: (0, 0)}}, notes={"before": EVIL})
"""
ASK = "import json; print(json.dumps(dict(selected=e.selected.tolist(), outline=e.outline and [e.outline[0], e.outline[1].tolist()], colour=e.colour, asked=len(e.dataset.asked))))"
here = {}
exec(SETUP, here)


def at(page, k, points):
    "Where on the screen points of map k are."
    return page.evaluate("""([k, points]) => { const gd = document.querySelector('.js-plotly-plot'); gd.scrollIntoView({block: 'nearest'}); const l = gd._fullLayout, s = k ? k + 1 : '', x = l['xaxis' + s], y = l['yaxis' + s], b = gd.getBoundingClientRect()
        return points.map(([u, v]) => [b.left + x._offset + x.d2p(u), b.top + y._offset + y.d2p(v)]) }""", [k, np.asarray(points).tolist()])


def lonely(page, e, k, n=8):
    "Rows that no other point of map k, nor a text, is near to on the screen, some of them."
    xy = np.array(at(page, k, list(e.maps.values())[k]))
    far = [i for i in range(len(xy)) if np.sort(np.hypot(*(xy - xy[i]).T))[1] > 9 and np.hypot(*(xy[i] - at(page, k, [[0, 0]])[0])) > 30]
    return far[:: max(1, len(far) // n)][:n], xy


def drag(page, corners, key=None):
    if key: page.keyboard.down(key)
    page.mouse.move(*corners[0]); page.mouse.down()
    for c in corners[1:]: page.mouse.move(*c, steps=4)
    page.mouse.up()
    if key: page.keyboard.up(key)
    page.wait_for_timeout(300)


def hover(page, xy, row):
    page.mouse.move(xy[0] + 2, xy[1]); page.mouse.move(*xy)
    page.wait_for_function(f"document.querySelector('.htlab-card img').dataset.row == '{row}'", timeout=8000)
    assert page.inner_text(".htlab-card dd >> nth=0") == f"case-{row}"
    png = page.evaluate("""() => { const i = document.querySelector('.htlab-card img'), c = Object.assign(document.createElement('canvas'), {width: i.naturalWidth, height: i.naturalHeight})
        c.getContext('2d').drawImage(i, 0, 0); return c.toDataURL() }""")
    return np.array(Image.open(io.BytesIO(base64.b64decode(png.split(",")[1]))).convert("RGB")).astype(int)


def said(page): return int(page.inner_text(".htlab-said").split(" of ")[0])
def drawn(page): return page.evaluate("[...document.querySelector('.js-plotly-plot').data.filter(t => t.mode == 'markers').map(t => [...(t.selectedpoints ?? [])])]")
def inside(xy, outline): return np.flatnonzero(Polygon(outline).contains_points(xy))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if not shutil.which("make"): pytest.skip("no make on this machine")
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    for n in (300, 3000): write_notebook(folder / f"{n}.ipynb", f"{SETUP}\ne = explorer({n})\ne", ASK, "e.select(range(5)); e.dataset.wait = .15")
    with jupyterlab(home, folder) as facts, chromium() as browser:
        def go(n): return run_bench(browser, facts, f"{n}.ipynb")
        go.browser = browser
        yield go


def run_cell(page, k):
    "Run a cell below the explorer; what it printed."
    cell = page.locator(".jp-Notebook .jp-Cell").nth(k)
    count = cell.locator(".jp-InputPrompt").inner_text()
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("([k, was]) => { const t = document.querySelectorAll('.jp-Notebook .jp-Cell')[k].querySelector('.jp-InputPrompt').innerText; return t != was && /\\d/.test(t) }", arg=[k, count])
    page.wait_for_timeout(200)
    return cell.locator(".jp-OutputArea-output").all_inner_texts()


def kernel(page): return json.loads(run_cell(page, 1)[-1])


@pytest.mark.parametrize("n", [300, 3000], ids=["svg", "webgl"])
def test_hover_and_lasso_in_jupyterlab(lab, n):
    page, e = lab(n), here["explorer"](n)
    rows, xy = lonely(page, e, 0)
    assert len(rows) > 3
    for i in rows:                                                               # the picture is that of the point, pixel by pixel
        png = hover(page, xy[i], i)
        grey, mask = e.dataset.pixels(i)
        zoom = len(png) // 48
        line = png.max(2) != png.min(2)
        assert (png[~line] == grey.repeat(zoom, 0).repeat(zoom, 1)[~line][:, None]).all() and line.any() and (mask.repeat(zoom, 0).repeat(zoom, 1)[line] == 1).all()
    rows, xy = lonely(page, e, 1)
    hover(page, xy[rows[0]], rows[0])

    for k, name in enumerate(e.maps):
        centre, spread = e.maps[name].mean(0), e.maps[name].std(0)
        star = [centre + 1.5 * spread * (np.sin(t), np.cos(t)) for t in np.arange(5) * 4 * np.pi / 5 + .1]
        for corners in (star[:2] + star[3:4], star)[n == 300:]:
            drag(page, at(page, k, corners))
            got = kernel(page)
            where, outline = got["outline"]
            assert where == name and np.abs(np.array(at(page, k, outline))[:, None] - at(page, k, corners)).max(2).min(0).max() < 4, "the outline is where the mouse was"
            if len(corners) == 3: assert got["selected"] == inside(e.maps[name], outline).tolist()       # nothing crosses itself: matplotlib's rule agrees
            assert got["selected"] == e.lasso(name, outline).selected.tolist() and 0 < len(got["selected"]) < n
            assert drawn(page) == [got["selected"]] * 2 and said(page) == len(got["selected"]), "both maps show it"
    if n == 300: return page.close()

    before = set(got["selected"])
    triangle = [centre - spread, centre + (0, 2) * spread, centre + (1.5, 0) * spread]
    drag(page, at(page, k, triangle), "Shift")
    more = kernel(page)
    assert set(more["selected"]) == before | set(e.lasso(name, more["outline"][1]).selected.tolist()) > before
    drag(page, at(page, k, triangle), "Alt")
    assert set(kernel(page)["selected"]) == set(more["selected"]) - set(e.selected.tolist())

    page.select_option(".htlab-bar select", "scanner")                           # hidden categories are not selected
    page.locator(".htlab-legend input").nth(1).uncheck()
    drag(page, at(page, 0, [(-1, -1), (1, -1), (1, 1), (-1, 1)]))
    got = kernel(page)
    assert got["colour"] == "scanner" and got["selected"] == [i for i in e.lasso("before", got["outline"][1]).selected if e.rows.scanner[i] != "B"] != []
    page.select_option(".htlab-bar select", "size")
    assert page.locator(".htlab-ramp").count() == 1
    page.click(".htlab-clear")
    assert kernel(page)["selected"] == [] and said(page) == 0 and page.evaluate("window.hacked") is None

    run_cell(page, 2)                                                            # from Python; and now pictures are slow
    page.wait_for_function("document.querySelector('.htlab-said').innerText.startsWith('5 ')")
    assert drawn(page) == [[0, 1, 2, 3, 4]] * 2
    asked = kernel(page)["asked"]
    rows, xy = lonely(page, e, 1, 40)
    for i in rows: page.mouse.move(*xy[i])
    hover(page, xy[rows[-1]], rows[-1])
    page.wait_for_timeout(700)
    assert page.get_attribute(".htlab-card img", "data-row") == str(rows[-1]), "the last point's picture stays"
    assert kernel(page)["asked"] - asked < len(rows) / 2, "and not every point on the way was asked for"
    page.close()


def test_html_twin_from_a_file(lab, tmp_path):
    e = here["explorer"](300)
    path = e.to_html(tmp_path / "twin.html", progress=False)
    page, requests = lab.browser.new_page(viewport=dict(width=1500, height=900)), []
    page.on("request", lambda r: requests.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    page.wait_for_timeout(500)
    rows, xy = lonely(page, e, 0, 4)
    for i in rows:
        shown = hover(page, xy[i], i)
        alike = [np.corrcoef(shown[..., 0].ravel(), np.asarray(Image.fromarray(e.dataset.pixels(j)[0]).resize((64, 64))).ravel())[0, 1] for j in range(300)]
        assert np.argmax(alike) == i and alike[i] > .8, "the picture is that of the point, as well as a small JPEG can show it"
        assert ((shown[..., 1] - shown[..., 0]) > 150).sum() > 50, "with its outline"
    page.evaluate("document.querySelector('.js-plotly-plot').on('plotly_selected', s => { if (s?.lassoPoints) window.outline = Object.values(s.lassoPoints) })")
    drag(page, at(page, 1, e.maps["after"].mean(0) + e.maps["after"].std(0) * [(-1, -1), (1, 0), (0, 1)]))
    selected = inside(e.maps["after"], np.transpose(page.evaluate("outline"))).tolist()
    assert drawn(page) == [selected] * 2 and len(selected) > 5
    with page.expect_download() as download: page.click(".htlab-said a")
    assert download.value.path().read_text().splitlines() == ["row,id", *(f"{i},case-{i}" for i in selected)]
    page.select_option(".htlab-bar select", "text")
    assert page.inner_text(".htlab-legend").startswith(here["EVIL"]) and page.evaluate("window.hacked") is None, "texts are shown, not run"
    assert not [u for u in requests if not u.startswith(("file:///", "data:", "blob:"))]
    assert page.evaluate("fetch('http://127.0.0.1:1/x').then(() => 'sent', e => e.name)") == "TypeError", "the page's own policy forbids requests"
    page.close()
