"""From a key on a slider to the painted picture: every bench in a real JupyterLab, turned by headless Chromium.

    python benchmarks/widgets.py                # all benches, 15 moves of each knob
    python benchmarks/widgets.py speckle drift --moves 30

For each knob and each picture that it changes: median and quartiles in ms, from the key press to the frame after the one in which the picture was new: browser, network, kernel and all. The images are
224 x 224 (112 x 112 where a model looks). Ends with an error where a median is above --limit. The floor is a bench that computes nothing.
"""
import argparse, os, sys, tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
from browser import CHROMIUM, NOTEBOOKS, chromium, jupyterlab, run_bench, turn, write_notebook

FLOOR = """
from htlab.widgets import Bench, Knob, ImagePicture, PlotPicture
import numpy as np
class Floor(Bench):
    knobs = {"seed": Knob("seed", 0, 0, 99, 1)}
    pictures = {"image": ImagePicture(), "line": PlotPicture()}
    def compute(self, seed):
        noise = np.random.default_rng(seed).integers(0, 256, (224, 224), dtype=np.uint8)
        return {"image": dict(image=noise), "line": dict(traces={"row": dict(x=np.arange(50), y=noise[0, :50], kind="bar")})}
Floor()"""
BENCHES = {  # knobs to turn, with the pictures that follow
    "floor": {"seed": ("image", "line")},
    "speckle": {"frequency": ("image", "envelope", "grey", "spectrum"), "dynamic_range": ("image", "grey", "spectrum"), "looks": ("image", "envelope", "grey", "spectrum")},
    "metric": {"across": ("masks", "distances", "table"), "tolerance": ("distances", "table")},
    "filter": {"ring_1": ("response", "image", "spectrum"), "interference": ("image", "spectrum", "tokens", "mask")},
    "drift": {"tgc": ("image", "frozen", "adapted", "table"), "frequency": ("image", "frozen", "adapted", "table")}}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("benches", nargs="*", choices=[*BENCHES, []], help="which (all)")
    parser.add_argument("--moves", type=int, default=15, help="of each knob (15)")
    parser.add_argument("--limit", type=float, default=300, help="ms that no median may exceed (300)")
    args = parser.parse_args()
    if not CHROMIUM: sys.exit("no chromium on this machine (Debian and Ubuntu: sudo apt install chromium)")
    slow = []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        names = args.benches or list(BENCHES)
        for name in names: write_notebook(home / f"{name}.ipynb", (NOTEBOOKS | {"floor": FLOOR})[name])
        with jupyterlab(home, home) as lab, chromium() as browser:
            print("bench    knob           picture     quartile  median  quartile (ms)")
            for name in names:
                page = run_bench(browser, lab, f"{name}.ipynb")
                for knob, pictures in BENCHES[name].items():
                    moves = []
                    for i in range(args.moves):
                        moves.append(turn(page, knob, "ArrowRight" if i % 10 < 5 else "ArrowLeft", pictures))
                        page.wait_for_timeout(150)
                    for picture in pictures:
                        q = np.percentile([m.get(picture) or np.inf for m in moves], (25, 50, 75), method="higher")  # a picture that did not change took for ever
                        print(f"{name:8} {knob:14} {picture:11} {q[0]:8.0f} {q[1]:7.0f} {q[2]:9.0f}", flush=True)
                        if q[1] > args.limit: slow.append(f"{name}/{knob}/{picture}")
                page.close()
    if slow: sys.exit(f"median above {args.limit:g} ms: {', '.join(slow)}")
