"""Kill the driver, the workers and the kernels of a sweep, start it again, and see what is left. `python tests/chaos.py --cells 60 --kills 20` prints it."""
import argparse, json, os, random, signal, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path

import nbformat
import psutil

HTLAB = Path(sys.executable).with_name("htlab")
CODE = """import time
import numpy as np, pandas as pd
from htlab.report import Run
run = Run(run_dir)
dice = np.random.default_rng(seed).random(20)
for _ in range(4): time.sleep(pause / 4)
cases = pd.DataFrame({"id": [f"c{i}" for i in range(20)], "group": range(20), "dice": dice})
run.save(cases, pd.DataFrame({"epoch": [1]}), {"dice": {"value": dice.mean(), "lo": dice.min(), "hi": dice.max(), "n": 20, "groups": 20, "policy": "diagonal"}})"""


def notebook(path, code, defaults):
    def cell(text, **kw): return nbformat.v4.new_code_cell(text, **kw)
    meta = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(metadata=meta, cells=[nbformat.v4.new_markdown_cell("# Toy"), cell(defaults, metadata={"tags": ["parameters"]}), cell(code)]), path)
    return Path(path)


def processes(driver) -> dict:  # of a running driver: kind -> processes
    "Workers are the children of the driver that have started a fork server, kernels are its forks."
    found = {"driver": [driver], "worker": [], "kernel": []}
    try:
        for p in driver.children(recursive=True):
            if "multiprocessing.forkserver" in " ".join(p.cmdline()):
                kind = "kernel" if "multiprocessing.forkserver" in " ".join(p.parent().cmdline()) else "worker"
                found[kind].append(p if kind == "kernel" else p.parent())
    except (psutil.Error, AttributeError): pass  # gone meanwhile
    return found


def chaos(folder, cells=60, kills=20, seed=0, pause=.4, say=print) -> dict:  # what was killed, and how often the driver was started
    "Run a sweep in `folder`, and kill by SIGKILL at random, each kind in turn, until `kills` are done; then let it finish."
    rng, killed, starts, due = random.Random(seed), Counter(), 0, 1
    notebook(folder / "toy.ipynb", CODE, f"seed = 0\npause = {pause}\nrun_dir = ''")
    (folder / "sweep.yaml").write_text(f"template: toy.ipynb\nseeds: {list(range(cells))}\nretries: {{died: 9, worker: 9}}\n")
    while True:
        starts += 1
        with open(folder / f"driver-{starts}.log", "w") as log:
            driver = psutil.Popen([HTLAB, "sweep", "sweep.yaml", "--workers", "2"], cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        while driver.poll() is None:
            time.sleep(.05)
            if killed.total() >= kills or len(finished(folder)) < due: continue  # spread over the whole sweep
            kind = min(("kernel", "worker", "driver"), key=lambda k: (killed[k], k))
            victims = processes(driver)[kind]
            if not victims: continue
            try: rng.choice(victims).send_signal(signal.SIGKILL)
            except psutil.Error: continue
            killed[kind] += 1
            say(f"{killed.total()} killed: {kind}; finished {len(finished(folder))} of {cells}")
            due = cells * (killed.total() + rng.random()) / (kills + 1)
        if driver.wait() == 0: return dict(killed, starts=starts)
        if driver.returncode != -signal.SIGKILL: raise AssertionError(f"the driver failed by itself: {(folder / f'driver-{starts}.log').read_text()[-2000:]}")


def finished(folder): return sorted(p.parent.name for p in (folder / "runs").glob("[!.]*/report.html"))


def check(folder, calm, cells):
    "Every cell exactly once, nothing half-made, and the numbers of an undisturbed sweep."
    names = json.loads(next((calm / "runs").glob("sweep-*.json")).read_text())["runs"]
    assert finished(folder) == finished(calm) == sorted(names) and len(names) == cells
    for n in names:
        for f in ("metrics.json", "cases.csv"): assert (folder / "runs" / n / f).read_bytes() == (calm / "runs" / n / f).read_bytes(), (n, f)
    events = [json.loads(l) for l in next((folder / "runs").glob("sweep-*.jsonl")).read_text().splitlines()]
    done = Counter(e["run"] for e in events if e["state"] == "done")
    assert max(done.values()) == 1, "a cell was finished twice"
    left = [p for p in (folder / "runs/.partial").iterdir() if p.is_dir()]
    assert not left, f"half-made: {left}"
    return Counter(e["cause"] for e in events if e.get("cause"))


def undisturbed(folder, cells, pause=.4):
    notebook(folder / "toy.ipynb", CODE, f"seed = 0\npause = {pause}\nrun_dir = ''")
    (folder / "sweep.yaml").write_text(f"template: toy.ipynb\nseeds: {list(range(cells))}\n")
    subprocess.run([HTLAB, "sweep", "sweep.yaml", "--workers", "2"], cwd=folder, check=True, capture_output=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    for name, default in (("cells", 60), ("kills", 20), ("seed", 0)): p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        wild, calm = Path(d, "wild"), Path(d, "calm")
        wild.mkdir(); calm.mkdir()
        began = time.time(); undisturbed(calm, a.cells); print(f"undisturbed: {a.cells} cells in {time.time() - began:.0f} s")
        began = time.time(); print(chaos(wild, a.cells, a.kills, a.seed)); print(f"with {a.kills} kills: {time.time() - began:.0f} s; tried again for: {dict(check(wild, calm, a.cells))}")
        print("every cell exactly once, metrics equal")
