"""From running the cell to a map that answers: the explorer in a real JupyterLab and headless Chromium.

    python benchmarks/explorer.py                       # 10 000 and 50 000 points, before and after, five times each
    python benchmarks/explorer.py --points 2000 --times 9

For each number of points, median and quartiles in ms: `drawn`, from Shift+Enter on the cell that makes the explorer to the frame after plotly's first drawing (two maps, plotly.js itself included); `hover`, from the
mouse on a point to its picture; `interactive`, both; `lasso`, from letting go of the mouse to both maps and the table drawn anew. Every time in a page and a kernel of its own. Ends with an error where `interactive`
for 10 000 points or less is above --limit. WebGL is Chromium's software renderer here: a graphics card is faster.
"""
import argparse, os, sys, tempfile, time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
from browser import CHROMIUM, chromium, jupyterlab, run_bench, write_notebook

# the first cell makes data, and says so in the words that run_bench waits for
SETUP = """
import numpy as np, pandas as pd
from IPython.display import HTML
from htlab.explorer import Explorer
n, rng = {n}, np.random.default_rng(0)
class Pictures:
    rows = [dict(id=f"case-{{i}}") for i in range(n)]
    def pixels(self, i): return np.stack([np.random.default_rng(i).integers(0, 256, (224, 224), dtype=np.uint8), np.pad(np.ones((60, 90), np.uint8), ((80, 84), (70, 64)))])
rows = pd.DataFrame(dict(id=[r["id"] for r in Pictures.rows], label=rng.choice(["benign", "malignant"], n), scanner=rng.choice(list("ABC"), n), organ=rng.choice(["breast", "thyroid"], n), group=rng.integers(0, n // 3, n).astype(str), size=rng.uniform(2, 9, n)))
before = rng.normal(size=(n, 2))
before[0], before[1:][np.hypot(*(before[1:] - (0, 3.5)).T) < .5] = (0, 3.5), 0
HTML('<div class="htlab-bench"><div class="htlab-picture htlab-ready">ready</div></div>')"""
EXPLORER = """Explorer({"before": before, "after": before[:, ::-1] + rng.normal(size=(n, 2)) / 3}, rows, Pictures())"""

# `drawn`: the map has its canvas and its points; each promise ends in the frame after the one in which that was so
WATCH = """
window.seen = (ready) => new Promise((done, fail) => { setTimeout(() => fail(new Error(`not seen in 30 s: ${ready}`)), 30000); const look = () => ready() ? requestAnimationFrame(() => done(performance.now())) : requestAnimationFrame(look); look() })
window.plot = () => document.querySelector('.js-plotly-plot')
window.start = new Promise(done => document.addEventListener('keydown', e => e.key == 'Enter' && done(e.timeStamp), {capture: true}))
window.drawn = seen(() => plot()?.calcdata?.length >= 2 && plot()._fullLayout?.xaxis?._length && plot().querySelector('.gl-canvas-context, .point'))
0   // evaluate() would wait for a promise
"""


def measure(browser, lab, name):
    page = run_bench(browser, lab, name)
    page.evaluate(WATCH)
    page.keyboard.press("Shift+Enter")                                         # the second cell, where the first one left the cursor
    start, drawn = page.evaluate("Promise.all([start, drawn])")
    x, y = page.evaluate("(() => { const l = plot()._fullLayout, b = plot().getBoundingClientRect(); return [b.left + l.xaxis._offset + l.xaxis.d2p(0), b.top + l.yaxis._offset + l.yaxis.d2p(3.5)] })()")
    page.mouse.move(x + 30, y)
    page.evaluate("window.moved = new Promise(done => document.addEventListener('mousemove', e => done(e.timeStamp), {capture: true, once: true})); window.shown = seen(() => document.querySelector('.htlab-card img').dataset.row == '0'); 0")
    began = time.time()
    while page.evaluate("document.querySelector('.htlab-card img').dataset.row != '0'") and time.time() - began < 20:   # a map that is still busy may miss a movement
        page.mouse.move(x + 1, y); page.mouse.move(x, y)
        page.wait_for_timeout(20)
    moved, shown = page.evaluate("Promise.all([moved, shown])")
    page.evaluate("window.up = new Promise(done => document.addEventListener('mouseup', e => done(e.timeStamp), {capture: true, once: true})); window.chosen = seen(() => document.querySelector('.htlab-table tr') && plot().data[1].selectedpoints?.length); 0")
    page.mouse.move(x - 60, y - 10); page.mouse.down()
    for dx, dy in ((60, -10), (60, 120), (-60, 120)): page.mouse.move(x + dx, y + dy, steps=4)
    page.mouse.up()
    up, chosen = page.evaluate("Promise.all([up, chosen])")
    page.close()
    return dict(drawn=drawn - start, hover=shown - moved, interactive=drawn - start + shown - moved, lasso=chosen - up)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, nargs="+", default=[10000, 50000], help="in each map (10000 50000)")
    parser.add_argument("--times", type=int, default=5, help="repetitions (5)")
    parser.add_argument("--limit", type=float, default=2000, help="ms that the median of `interactive` may not exceed up to 10 000 points (2000)")
    args = parser.parse_args()
    if not CHROMIUM: sys.exit("no chromium on this machine (Debian and Ubuntu: sudo apt install chromium)")
    slow = []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        for n in args.points:
            for k in range(args.times): write_notebook(home / f"{n}-{k}.ipynb", SETUP.format(n=n), EXPLORER)
        with jupyterlab(home, home) as lab, chromium() as browser:
            print("points  what        quartile  median  quartile (ms)")
            for n in args.points:
                times = [measure(browser, lab, f"{n}-{k}.ipynb") for k in range(args.times)]
                for what in times[0]:
                    q = np.percentile([t[what] for t in times], (25, 50, 75))
                    print(f"{n:6}  {what:11} {q[0]:8.0f} {q[1]:7.0f} {q[2]:9.0f}", flush=True)
                    if what == "interactive" and n <= 10000 and q[1] > args.limit: slow.append(f"{n} points: {q[1]:.0f} ms")
    if slow: sys.exit(f"interactive above {args.limit:g} ms: {', '.join(slow)}")
