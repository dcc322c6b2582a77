"""A sweep loses nothing and does nothing twice, whoever is killed; what goes wrong in a cell stays in it."""
import json, os, re, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import chaos
import nbformat
import pandas as pd
import psutil
import pytest
from conftest import BIN
from hypothesis import given, strategies as st

from htlab import grid
from htlab.grid import RETRIES, Board, find_gpus, imports, kernels, load_sweep, read_ledger, run_sweep, smaller
from htlab.report import RunFailed, RunFolder, find_runs

MODES = """import multiprocessing, os, signal, time
from pathlib import Path
import numpy as np, pandas as pd
from htlab.report import Run
run = Run(run_dir)
mark = Path(f"mark-{mode}")
first = not mark.exists(); mark.touch()
Path(f"seen-{os.environ.get('CUDA_VISIBLE_DEVICES')}-{os.getppid()}").touch()
if mode == "fail": raise ValueError("told to fail\\nsecond line")
if mode == "memory" and batch_size > 4: raise MemoryError("out of memory")
if mode == "died" and first: os.kill(os.getpid(), signal.SIGKILL)
if mode == "rank" and first: raise type("LaunchFailed", (RuntimeError,), {})("process 1 was killed by signal 9 (SIGKILL)")
if mode == "slow" and first: time.sleep(100)
run.log(trim=os.environ.get("MALLOC_TRIM_THRESHOLD_"), starts=multiprocessing.get_start_method(), pid=os.getpid(), random=float(np.random.rand()), clean="leak" not in globals(), effective=batch_size * accumulate)
leak = 1
cases = pd.DataFrame({"id": ["a", "b"], "group": [1, 2], "dice": [.7, .5]})
run.save(cases, pd.DataFrame({"epoch": [1]}), {"dice": {"value": .6, "lo": 0., "hi": 1., "n": 2, "groups": 2, "policy": "diagonal"}})"""
DEFAULTS = "mode = 'ok'\nseed = 0\nbatch_size = 12\naccumulate = 2\nrun_dir = ''"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return chaos.notebook(tmp_path / "toy.ipynb", MODES, DEFAULTS)


# the file

def test_cells_are_the_list_crossed_with_the_grid(toy):
    Path("s.yaml").write_text("template: toy.ipynb\nparameters: {accumulate: 3}\nseeds: [1, 2]\nlist: [{batch_size: 4}, {batch_size: 6}]\ngrid: {mode: [ok, fail]}\ntimeout: 60\nretries: {memory: 0}")
    s = load_sweep("s.yaml")
    assert [(p["parameters"]["batch_size"], p["parameters"]["seed"], p["parameters"]["mode"]) for p in s.cells] == [(b, x, m) for b in (4, 6) for x in (1, 2) for m in ("ok", "fail")]
    assert all(p["parameters"]["accumulate"] == 3 for p in s.cells) and s.timeout == 60 and s.retries == RETRIES | {"memory": 0}
    assert list(s.table.columns) == ["mode", "seed", "batch_size", "state"] and set(s.table.state) == {"to do"} and "not known" in str(s)


@pytest.mark.parametrize("text, says", [
    ("temlate: x", "unknown key 'temlate'"), ("seeds: [1]", "names no template"), ("- a", "expected lines like"), ("template: [", "is no YAML"), ("template: tyo.ipynb", "no such notebook"),
    ("template: toy.ipynb\nparameters: {sede: 1}", "unknown parameter 'sede'; did you mean 'seed'"), ("template: toy.ipynb\nparameters: {seed: x}", "expected a whole number"),
    ("template: toy.ipynb\nseeds: 3", "seeds: expected a list"), ("template: toy.ipynb\nseeds: []", "no values"), ("template: toy.ipynb\nseeds: [1, 1]", "two combinations are the same run"),
    ("template: toy.ipynb\nseeds: [1]\ngrid: {seed: [2]}", "given by seeds and by grid"), ("template: toy.ipynb\nparameters: {mode: ok}\ngrid: {mode: [ok]}", "given by grid and by parameters"),
    ("template: toy.ipynb\nlist: [{mode: ok}]\ngrid: {mode: [ok]}", "given by grid and by list"), ("template: toy.ipynb\nlist: []", "expected entries"), ("template: toy.ipynb\nlist: [3]", "expected entries"),
    ("template: toy.ipynb\ntimeout: soon", "timeout: expected a number"), ("template: toy.ipynb\ntimeout: -1", "seconds from 0"), ("template: toy.ipynb\nretries: {memroy: 1}", "retries, memroy"),
    ("template: toy.ipynb\nretries: {memory: true}", "whole number from 0"), ("template: !!python/object/apply:os.getcwd []", "is no YAML")])
def test_a_wrong_file_is_refused_before_anything_runs(toy, text, says):
    Path("s.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(says)) as e: load_sweep("s.yaml")
    assert str(e.value).startswith("s.yaml") and "\n" not in str(e.value) and not Path("runs").exists()


def test_an_edit_runs_again_only_what_it_touches(toy):
    a, b = load_sweep(dict(template="toy.ipynb", seeds=[1, 2])), load_sweep(dict(template="toy.ipynb", seeds=[2, 3]))
    assert a.names[1] == b.names[0] and len({*a.names, *b.names}) == 3
    assert not {*a.names} & {*load_sweep(dict(template="toy.ipynb", seeds=[1, 2], parameters=dict(batch_size=4))).names}


@given(b=st.integers(1, 512), a=st.integers(1, 64))
def test_a_smaller_batch_leaves_the_update_as_it_was(b, a):
    less = smaller(dict(batch_size=b, accumulate=a))
    if b == 1: assert less is None
    else: assert less["batch_size"] * less["accumulate"] == a * b and less["batch_size"] <= b / 2
    assert smaller(dict(epochs=3)) is None


def test_imports_are_those_of_the_code():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(t) for t in ("import a.b, c\nfrom d.e import f", "%matplotlib inline\nimport g", "from . import h")] + [nbformat.v4.new_markdown_cell("import z")])
    assert imports(nb)[-3:] == ["a.b", "c", "d.e"] and "htlab.report" in imports(nb)


# the ledger

@given(cut=st.integers(1, 60))
def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("ledger")
    path = chaos.notebook(folder / "toy.ipynb", MODES, DEFAULTS)
    board = Board(load_sweep(dict(template=str(path), seeds=[1, 2, 3]), folder / "runs"), folder / "l.jsonl", 2)
    for n in board.sweep.names: board.enter(n, "done", seconds=2.)
    whole = (folder / "l.jsonl").read_bytes()
    (folder / "l.jsonl").write_bytes(whole[:-cut])  # the machine went down
    kept = len(read_ledger(folder / "l.jsonl"))
    assert kept == 2 + (cut == 1)
    board.enter(board.sweep.names[0], "failed", cause="error", said="x", seconds=1., attempt=1)
    again = read_ledger(folder / "l.jsonl")
    assert len(again) == kept + 1 and again.state.iloc[-1] == "failed"


def test_the_board_counts_and_tells_the_time_left(toy):
    s = load_sweep(dict(template="toy.ipynb", seeds=[1, 2, 3, 4, 5]))
    board = Board(s, "l.jsonl", 2)
    assert "unknown left" in str(board)
    board.enter(s.names[0], "running"); board.enter(s.names[0], "done", seconds=10.); board.enter(s.names[1], "running"); board.enter(s.names[2], "failed", cause="error", said="<b>bad</b>", seconds=1., attempt=1)
    assert board.counts == dict(cells=5, done=1, found=0, running=1, failed=1, waiting=2) and "15 s left" in str(board)  # three cells of 10 s in two workers
    assert "&lt;b&gt;" in board._repr_html_() and s.names[1] in board._repr_html_() and board.__rich__()


# running

def test_what_goes_wrong_in_a_cell_is_dealt_with_by_its_cause(toy, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    Path("s.yaml").write_text("template: toy.ipynb\nlist: [{mode: fail}, {mode: memory}, {mode: died}, {mode: slow}, {mode: rank}, {mode: ok}, {mode: ok, seed: 1}, {mode: ok, seed: 2}]\ntimeout: 12")
    s = load_sweep("s.yaml")
    with pytest.raises(RunFailed, match="1 of 8 cells failed.*told to fail"): run_sweep(s, workers=2)
    out = capsys.readouterr().out
    done = {n: RunFolder(Path("runs") / n) for n in s.names[1:]}
    events = read_ledger(next(Path("runs").glob("sweep-*.jsonl")))
    assert Counter(events[events.state == "done"].run) == Counter(s.names[1:])
    assert {(r.cause, s.names.index(r.run)) for r in events[events.state == "again"].itertuples()} == {("memory", 1), ("died", 2), ("timeout", 3), ("died", 4)}
    less = done[s.names[1]].config
    assert less["parameters"]["batch_size"] == 12 and less["ran_with"] == {"batch_size": 3, "accumulate": 8} and {r.config["effective"] for r in done.values()} == {24}
    assert "told to fail" in Path(f"runs/.partial/{s.names[0]}/notebook.ipynb").read_text() and "about" in out and "htlab compare sweep-" in out
    assert sorted(p.name.split("-")[1] for p in Path().glob("seen-*")) == ["5", "6"], "two workers, each with a GPU and a server of its own"
    assert {r.config["trim"] for r in done.values()} == {None}, "Dask's setting for its workers, which halves the speed of a training, stays with them"
    assert len({r.config["pid"] for r in done.values()}) == len({r.config["random"] for r in done.values()}) == 7 and all(r.config["clean"] for r in done.values()), "a process of its own for each"
    assert set(s.table.state) == {"begun", "finished"} and "1 to do, about" in str(s)
    born = {n: (r.path / "config.json").stat().st_mtime_ns for n, r in done.items()}
    toy.write_text(toy.read_text().replace('if mode == \\"fail\\"', 'if False'))
    with pytest.raises(FileNotFoundError): find_runs("sweep-none")
    assert len(find_runs(next(Path("runs").glob("sweep-*.json")))) == 7
    runs = run_sweep(load_sweep(dict(template="toy.ipynb", list=[{"mode": "ok"}])), workers=1, progress=False)  # edited code is another run
    assert runs[0].name not in done and born == {n: (RunFolder(Path("runs") / n).path / "config.json").stat().st_mtime_ns for n in done}


def test_a_warm_kernel_computes_what_a_cold_one_does(toy):
    a = run_sweep(dict(template="toy.ipynb"), "warm", workers=1, progress=False)[0]
    b = run_sweep(dict(template="toy.ipynb"), "cold", workers=1, warm=False, progress=False)[0]
    assert a.name == b.name and not a.found and a.cases.equals(b.cases) and a.metrics == b.metrics and a.config["starts"] == b.config["starts"]
    assert run_sweep(dict(template="toy.ipynb"), "cold", progress=False)[0].found


def test_workers_of_a_scheduler_started_by_hand_take_cells(toy):
    chaos.notebook(toy, chaos.CODE.replace("run.save", "import os; run.log(parent=os.getppid()); run.save"), "seed = 0\npause = .5\nrun_dir = ''")
    env, procs = os.environ | {"DASK_LOGGING__DISTRIBUTED": "info"}, []
    try:
        procs.append(subprocess.Popen([BIN / "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", "s.json"], env=env, stderr=subprocess.DEVNULL, start_new_session=True))
        until = time.time() + 60
        while not Path("s.json").exists() and time.time() < until: time.sleep(.2)
        address = json.loads(Path("s.json").read_text())["address"]
        for _ in range(2): procs.append(subprocess.Popen([BIN / "dask", "worker", address, "--nthreads", "1", "--no-dashboard"], env=env, stderr=subprocess.DEVNULL, start_new_session=True))
        from distributed import Client
        with Client(address, set_as_default=False) as client: client.wait_for_workers(2, timeout=60)
        runs = run_sweep(dict(template="toy.ipynb", seeds=list(range(8))), scheduler=address, progress=False)
        assert len({r.config["parent"] for r in runs}) == 2 and len(runs) == 8, "both took cells"
    finally:
        for p in procs: os.killpg(p.pid, signal.SIGTERM)
        for p in procs: p.wait(30)
    with pytest.raises(OSError, match="no Dask scheduler answers at tcp://127.0.0.1:1"): run_sweep(dict(template="toy.ipynb", seeds=[99]), scheduler="tcp://127.0.0.1:1", progress=False)


def test_workers_of_a_batch_system(toy):
    Path("c.yaml").write_text("kind: local\njobs: 1\noptions: {cores: 1, memory: 2GB}")
    assert not run_sweep(dict(template="toy.ipynb"), cluster="c.yaml", progress=False)[0].found
    for text, says in [("kind: slurmm", "expected kind"), ("kind: slurm\njobs: many", "jobs"), ("kind: local\noptions: {coers: 1}", "options"), ("[", "no YAML")]:
        Path("c.yaml").write_text(text)
        with pytest.raises(ValueError, match=says): run_sweep(dict(template="toy.ipynb", seeds=[9]), cluster="c.yaml", progress=False)


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(toy):
    Path("s.yaml").write_text("template: toy.ipynb\nlist: [{mode: ok}, {mode: slow}, {mode: ok, seed: 2}]\n")
    driver = psutil.Popen([BIN / "htlab", "sweep", "s.yaml", "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.time() + 90
    while not Path("mark-slow").exists() and time.time() < until: time.sleep(.1)
    mine = driver.children(recursive=True)
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "stopped; the same command goes on" in err and "Traceback" not in err
    gone, alive = psutil.wait_procs(mine, timeout=20)
    assert mine and not alive and not list(Path("runs/.partial").glob("stop-*"))
    again = subprocess.run([BIN / "htlab", "sweep", "s.yaml", "--workers", "1"], capture_output=True, text=True)
    assert again.returncode == 0 and "3 cells" in again.stdout, again.stderr


def test_the_table_lives_in_a_notebook(toy):
    from nbclient import NotebookClient
    code = "from htlab.grid import run_sweep\nruns = run_sweep(dict(template='toy.ipynb', seeds=[1, 2]), workers=1)\nlen(runs)"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=120).execute()
    shown = "".join(o["data"]["text/html"] for o in nb.cells[0].outputs if "text/html" in o.get("data", {}))
    assert "<td>2</td>" in shown and "done in" in shown and nb.cells[0].outputs[-1]["data"]["text/plain"] == "2"


def test_killed_at_random_nothing_is_lost_and_nothing_done_twice(tmp_path):
    wild, calm = tmp_path / "wild", tmp_path / "calm"
    wild.mkdir(); calm.mkdir()
    chaos.undisturbed(calm, 8)
    killed = chaos.chaos(wild, 8, 3, say=lambda text: None)
    assert killed["driver"] == killed["worker"] == killed["kernel"] == 1 and killed["starts"] == 2
    chaos.check(wild, calm, 8)


def test_gpus_are_those_this_process_may_use(monkeypatch):
    for said, found in [("0,2", ["0", "2"]), ("", []), ("-1", []), ("GPU-ab", ["GPU-ab"])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert find_gpus() == found
