"""What a cell of a sweep costs beyond its own work: forked kernels against kernels started anew, and memory over many cells, in one run.

    python benchmarks/grid.py                       # 500 trivial cells on two workers
    python benchmarks/grid.py --cells 60 --workers 1

The cell imports torch, open_clip and what a template imports, and then writes a run folder: its own work is next to nothing, so its time is overhead.
Overhead is (time of the sweep) x workers / cells, with the start of the cluster in it. Exit code 1 if it is over two seconds, or if memory grew by more than a tenth
from the second quarter of the cells to the last (the first one fills caches).
"""
import argparse, json, os, statistics, sys, tempfile, threading, time
from pathlib import Path

import nbformat
import psutil

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
for name, default, text in (("cells", 500, "trivial cells"), ("cold", 8, "cells with kernels started anew"), ("workers", 2, "workers")):
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
CODE = """import torch, open_clip, matplotlib.pyplot, sklearn.linear_model
import numpy as np, pandas as pd
from htlab.task import Segment
from htlab.train import fit
from htlab.report import Run
run = Run(run_dir)
cases = pd.DataFrame({"id": ["a", "b"], "group": [1, 2], "dice": [.7, .5]})
run.save(cases, pd.DataFrame({"epoch": [1]}), {"dice": {"value": .6, "lo": 0., "hi": 1., "n": 2, "groups": 2, "policy": "diagonal"}})"""


def megabytes():
    "What the driver, its workers and their fork servers hold, shared pages counted once (a kernel lives for less than a second, and is not counted)."
    total = 0
    for p in [(me := psutil.Process()), *me.children(recursive=True)]:
        try: total += p.memory_full_info().pss if time.time() - p.create_time() > 5 else 0
        except psutil.Error: pass
    return total / 1e6


def timed(cells, workers, warm, runs):
    from htlab.grid import load_sweep, run_sweep
    sweep, held, over = load_sweep(dict(template="toy.ipynb", seeds=list(range(cells))), runs), [], threading.Event()
    def watch():
        while not over.wait(1): held.append((len(list(Path(runs).glob("*/report.html"))), megabytes(), time.perf_counter()))
    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    run_sweep(sweep, workers=workers, warm=warm, progress=False)
    took = time.perf_counter() - began
    over.set()
    return took * workers / cells, held


if __name__ == "__main__":  # Dask's workers import this file
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        cell = nbformat.v4.new_code_cell
        nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, cells=[
            nbformat.v4.new_markdown_cell("# Toy"), cell("seed = 0\nrun_dir = ''", metadata={"tags": ["parameters"]}), cell(CODE)]), "toy.ipynb")
        cold, _ = timed(args.cold, args.workers, False, "cold")
        warm, held = timed(args.cells, args.workers, True, "warm")
        seen = lambda a, b: [h for h in held if a * args.cells <= h[0] <= b * args.cells] or [(0, float("nan"), 0)]
        quarters = [seen(.25, .5), seen(.75, 1)]
        early, late = (statistics.median(m for _, m, _ in q) for q in quarters)
        ends = [(q[0], next(h for h in q if h[0] == q[-1][0])) for q in quarters]  # the last number is seen again while all closes down
        pace = [(b[2] - a[2]) * args.workers / max(b[0] - a[0], 1) for a, b in ends]
        os.chdir("/")
    print(f"{args.workers} workers, {psutil.cpu_count()} cores\nstarted anew ({args.cold} cells)  {cold:6.2f} s per cell\nforked ({args.cells} cells)        {warm:6.2f} s per cell   {cold / warm:.1f} times less")
    print(f"a cell of the second quarter took {pace[0]:.2f} s, one of the last {pace[1]:.2f} s: {pace[1] / pace[0] if pace[0] else float('nan'):.2f} times (1 is linear)")
    print(f"memory of driver, workers and servers: {early:.0f} MB in the second quarter of the cells, {late:.0f} MB in the last ({late / early - 1:+.1%})")
    sys.exit(warm > 2 or late > 1.1 * early)
