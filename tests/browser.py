"""A real JupyterLab and a real Chromium for tests and benchmarks of widgets: start both, run a notebook, turn a knob, say what changed on the screen and when."""
import contextlib, json, os, shutil, socket, subprocess, time
import urllib.error, urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

# One bench each; the models have learned nothing, which is as fast as if they had.
NOTEBOOKS = {
    "speckle": "from htlab.widgets import SpeckleBench\nSpeckleBench()",
    "metric": "from htlab.widgets import MetricBench\nMetricBench()",
    "filter": "import torch\nfrom htlab.backbone import load_backbone\nfrom htlab.head import SegmentHead\nfrom htlab.task import Segment\nfrom htlab.widgets import FilterBench\ntorch.manual_seed(0)\ntask = Segment(load_backbone('tiny'), SegmentHead(128, 3, hidden=96))\nFilterBench(task)",
    "drift": "from htlab.backbone import load_backbone\nfrom htlab.inject import add_adapters\nfrom htlab.widgets import DriftBench\nDriftBench(add_adapters(load_backbone('tiny'), 'hybrid', init='reference'))"}

# What is on the screen: pixels of an image, paths and texts of a plot, text of a table. `htlab_watch` notes for each picture how long after the next key or click its new state is painted.
SCRIPT = """
window.htlab_pictures = () => Object.fromEntries([...document.querySelectorAll('.htlab-bench .htlab-picture')].map(e => [[...e.classList].find(c => c.startsWith('htlab-') && c != 'htlab-picture').slice(6), e]))
window.htlab_state = (e) => {
    if (e.tagName == 'IMG') {
        if (!e.complete || !e.naturalWidth) return null
        const canvas = Object.assign(document.createElement('canvas'), {width: e.naturalWidth, height: e.naturalHeight}), c = canvas.getContext('2d', {willReadFrequently: true})
        c.drawImage(e, 0, 0)
        let sum = 0; for (const v of c.getImageData(0, 0, canvas.width, canvas.height).data) sum = (sum * 31 + v) | 0
        return sum
    }
    const plot = e.querySelector('.main-svg .cartesianlayer')
    return plot ? plot.innerHTML : e.querySelector('.js-plotly-plot') ? null : e.innerHTML
}
window.htlab_look = () => Object.fromEntries(Object.entries(htlab_pictures()).map(([k, e]) => [k, htlab_state(e)]))
window.htlab_watch = (names) => {
    const before = htlab_look(), ms = {}
    window.htlab_seen = new Promise(done => {
        let start = null
        for (const kind of ['keydown', 'pointerdown']) document.addEventListener(kind, e => { start ??= e.timeStamp }, {capture: true, once: true})
        const frame = () => {
            for (const [k, e] of Object.entries(htlab_pictures())) if (!(k in ms)) { const now = htlab_state(e); if (now !== null && now !== before[k]) ms[k] = null }
            requestAnimationFrame(t => {   // what was in the page at that frame is painted at this one
                for (const k in ms) ms[k] ??= performance.now() - start
                names.every(k => ms[k] != null) || start && performance.now() - start > 20000 ? done(ms) : frame()
            })
        }
        requestAnimationFrame(frame)
    })
}
"""


LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url, token=None, method="GET"):
    "Status, address and body of an answer, redirects followed."
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"} if token else {}, method=method)
    try:
        with LOCAL.open(request, timeout=20) as answer: return answer.status, answer.url, answer.read().decode()
    except urllib.error.HTTPError as e: return e.code, url, ""


@contextlib.contextmanager
def jupyterlab(home, folder="nbs"):
    "`make lab` as typed, with this environment's programs and nobody's settings; what the server says of itself."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    recipe = subprocess.run(["make", "-n", "-o", ".venv/.ready", "lab", f"LABFLAGS=--no-browser --port {port} --ServerApp.port_retries=0"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = "exec " + recipe[recipe.index("jupyter lab"):].splitlines()[0].replace("--notebook-dir nbs", f"--notebook-dir {folder}")
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER_")} | {k: str(home / k) for k in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    log = (home / "log").open("w")
    server = subprocess.Popen(["sh", "-c", command], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if (facts := next((home / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json"), None)) and facts.read_text().rstrip().endswith("}") or server.poll() is not None: break  # a file half written is none
            time.sleep(0.25)
        assert facts, f"JupyterLab did not start:\n{command}\n{(home / 'log').read_text()[-3000:]}"
        yield json.loads(facts.read_text())
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def chromium():
    "A headless browser that knows nobody."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try: yield browser
        finally: browser.close()


def write_notebook(path, *cells):
    "A notebook of code cells."
    cells = [dict(cell_type="code", id=f"cell{i:04d}", metadata={}, source=text, outputs=[], execution_count=None) for i, text in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")), nbformat=4, nbformat_minor=5)), encoding="utf-8")


def open_notebook(browser, lab, name, timeout=120):
    "A notebook in the lab, not run."
    page = browser.new_page(viewport=dict(width=1700, height=1100))
    page.set_default_timeout(timeout * 1000)
    page.goto(f"{lab['url']}lab/tree/{name}?token={lab['token']}&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    return page


def run_first(browser, lab, name, shows):
    "Open a notebook of one cell, run it, and wait until what it `shows` (a selector), or an error, is on the screen."
    page = open_notebook(browser, lab, name)
    page.evaluate(SCRIPT)
    for _ in range(240):  # a cell that is run before its kernel is there asks for one, in a dialog
        kernels = [s["kernel"] for s in json.loads(get(lab["url"] + "api/sessions", lab["token"])[2]) if s["path"] == name]
        if any(k["execution_state"] == "idle" and k["connections"] for k in kernels): break
        page.wait_for_timeout(250)
    for _ in range(20):  # a lab that is still settling takes the focus away, and the keys go nowhere
        if (dialog := page.locator(".jp-Dialog .jp-mod-accept")).count(): dialog.click()
        page.click(".jp-Notebook .jp-Cell .cm-content >> nth=0")
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(2000)
        if page.inner_text(".jp-Notebook .jp-InputPrompt >> nth=0").strip() != "[ ]:": break
    page.wait_for_selector(f"{shows}, .jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']")
    return page


def run_bench(browser, lab, name):
    "The page of a notebook with a bench, when the bench is there and quiet."
    page = run_first(browser, lab, name, ".htlab-bench .htlab-picture")
    quiet(page)
    return page


def quiet(page, ms=1000):
    "Wait until nothing has changed on the screen for a while; its state."
    state, since = None, time.time()
    while time.time() - since < ms / 1000 or None in state.values() or not state:
        now = page.evaluate("htlab_look()")
        if now != state: state, since = now, time.time()
        page.wait_for_timeout(60)
    return state


def slider(page, knob): return page.locator(f".htlab-knob.htlab-{knob} [role=slider]")
def message(page): return page.inner_text(".htlab-message")


def turn(page, knob, key="ArrowRight", wait_for=()):
    "Press a key on a knob: milliseconds from the key to the painted picture, for each picture that changed until all of `wait_for` had."
    slider(page, knob).focus()
    page.evaluate("names => htlab_watch(names)", list(wait_for))
    page.keyboard.press(key)
    return page.evaluate("htlab_seen")


def changed_by(page, action):
    "Names of the pictures that look different after `action`, when all is quiet again."
    before = quiet(page)
    action()
    page.wait_for_timeout(400)
    after = quiet(page)
    return {k for k in before if before[k] != after[k]}
