"""A run is repeated from its record: the same question or none, the old run untouched, and agreement is not claimed lightly."""
import contextlib, json, os, re, shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from test_report import fake, template

from htlab import report, rerun as module
from htlab.cli import main
from htlab.report import RunFolder, ledger
from htlab.rerun import Rerun, rerun

CODE = """import os, numpy as np, pandas as pd
from htlab.report import Run
run = Run(run_dir)
{look}
dice = np.random.default_rng({seed}).uniform(.4, .9, 9)
cases = pd.DataFrame({{"id": [f"{{i:03d}}" for i in range(9)], "group": [1, 1, 1, 2, 2, 3, 3, 4, 5], "dice": dice, "lesion": ["a", "b", None] * 3}})
run.log(threads_seen=os.environ.get("OMP_NUM_THREADS"), value_seen=value)
run.save(cases, pd.DataFrame({{"epoch": [1], "loss": [.1]}}), {{"dice": {{"value": dice.mean(), "lo": dice.mean() - .1, "hi": dice.mean() + .1, "n": 9, "groups": 5, "policy": "diagonal"}}, "empty": {{"value": None, "n": 0}}}})"""
HEAD = "id,image,mask,label,group,split,sha256,width,height\n"


def write(path="toy.ipynb", seed="seed", look="", defaults=""):
    return template(path, CODE.format(seed=seed, look=look), f"value = .7\nseed = 0\n{defaults}run_dir = ''")


def table(test="test"): Path("m.csv").write_text(HEAD + "".join(f"{i},sim:1/{i},,{'benign' if i % 2 else 'malignant'},g{i},{s},{i:064x},0,0\n" for i, s in enumerate(["train", "train", "valid", "test", test])))


@pytest.fixture
def here(tmp_path, monkeypatch):
    "Notebooks run in this process (the page runs them in kernels)."
    monkeypatch.chdir(tmp_path)
    def runs(source, out, params, progress, kernels=None):
        code = "\n".join(c.source for c in source.cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", []))
        exec(code, report.template_parameters(_written(source)) | params)
        nb = nbformat.from_dict(json.loads(json.dumps(source)))
        nb.cells.insert(2, nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in params.items()), metadata={"tags": ["injected-parameters"]}))
        nbformat.write(nb, out)
        return nb
    def _written(source): nbformat.write(source, "kernel.ipynb"); return "kernel.ipynb"
    monkeypatch.setattr(report, "_papermill", runs)
    return tmp_path


def made(params=None, **kw): return report.execute(write(**kw), params, progress=False)
def content(folder): return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file()}


# the same question

def test_an_untouched_run_agrees_bit_for_bit_and_is_only_read(here):
    run = made({"seed": 3, "value": .8}); old = content(run.path)
    both = rerun(run.name[:8], progress=False)
    assert both.verdict == "bit for bit" and both.agrees and (both.table.difference.dropna() == 0).all() and not both.cases.differ.any()
    assert content(run.path) == old and both.now.path == Path("runs/rerun") / run.name and both.now.config["rerun_of"] == str(run.path)
    assert not set(both.differs.what) - {"commit", "dirty"}, "others may commit meanwhile"
    assert json.loads((both.now.path / "rerun.json").read_text())["verdict"] == "bit for bit" and "bit for bit" in str(both) and "bit for bit" in both._repr_html_()
    assert report.find_runs(run.name[:8])[0].path == run.path and [r.path for r in [report.find_run(run.name[:6])]] == [run.path], "the repeat is no second run of that name"
    (run.path / "cases.csv").write_text((run.path / "cases.csv").read_text().replace("001,1,0", "001,1,1"))
    assert rerun(run, progress=False).verdict == "differs", "a forged case"


def test_another_name_of_the_folder_and_a_repeat_of_a_repeat(here):
    run = made(); moved = shutil.move(run.path, "archive-of-mine")
    both = rerun(moved, progress=False)
    assert both.agrees and both.now.path.parent == Path("rerun")
    assert rerun(both.now, progress=False).verdict == "bit for bit"


def test_an_edited_template_is_named_and_the_runs_own_is_used(here):
    run = made({"seed": 1}); write(seed="seed + 1")
    both = rerun(run, progress=False)
    assert both.verdict == "bit for bit" and list(both.differs.query("what == 'template'").now) == ["edited since; the run's own is used"]
    Path("toy.ipynb").unlink()
    assert "not found" in rerun(run, progress=False).differs.query("what == 'template'").now.item()


def test_chance_without_a_seed_is_found(here):
    both = rerun(made(seed=""), progress=False)
    assert both.verdict == "differs" and not both.agrees and both.cases.differ["dice"] == 9 and both.cases.differ[["id", "group", "lesion"]].sum() == 0
    assert not both.table.agrees["dice"] and both.table.agrees["empty"] and (both.table.tolerance == 0).all()


@pytest.mark.parametrize("change, says", [(lambda: table("train"), "split_hash"), (lambda: Path("m.csv").write_text(Path("m.csv").read_text().replace(f"{4:064x}", f"{9:064x}")), "data_hash"),
                                          (lambda: Path("w.bin").write_bytes(b"other"), "weights_hash"), (lambda: Path("p.py").write_text("other"), "files.plugin"), (lambda: Path("w.bin").unlink(), "weights_hash")])
def test_another_experiment_is_refused_by_name(here, change, says):
    table(); Path("w.bin").write_bytes(b"weights"); Path("p.py").write_text("plugin")
    run = made(defaults="manifest = 'm.csv'\nweights = 'w.bin'\nplugin = 'p.py'\n"); old = content(run.path)
    assert rerun(run, progress=False).agrees
    change()
    with pytest.raises(ValueError, match=f"{says}.*another experiment.*anyway") as e: rerun(run, progress=False)
    assert "\n" not in str(e.value)
    both = rerun(run, anyway=True, progress=False)
    assert says in set(both.differs.what) and both.now.name != run.name and content(run.path) == old


def test_a_file_that_is_gone_is_said(here):
    Path("p.py").write_text("plugin"); run = made(defaults="plugin = 'p.py'\n"); Path("p.py").unlink()
    for anyway in (False, True):
        with pytest.raises(FileNotFoundError, match="plugin='p.py'.*no such file any more"): rerun(run, anyway=anyway, progress=False)


@pytest.mark.parametrize("wrong, error, says", [(dict(run="zz"), FileNotFoundError, "no run 'zz'"), (dict(tolerance=-1), ValueError, "tolerance=-1"), (dict(tolerance=float("nan")), ValueError, "tolerance=nan")])
def test_mistakes_are_one_line(here, wrong, error, says):
    with pytest.raises(error, match=says): rerun(**dict(run="." if "run" in wrong else made()) | wrong, progress=False)


# around it

def test_what_the_run_was_computed_with_is_used_again(here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3"); monkeypatch.setattr(module, "environment", lambda: report.environment() | dict(threads=5))
    run = made(); forge(run, threads=3, ran_with=dict(value=.1)); monkeypatch.setenv("OMP_NUM_THREADS", "7")
    both = rerun(run, progress=False)
    assert both.now.config["threads_seen"] == "3" and os.environ["OMP_NUM_THREADS"] == "7" and "threads" not in set(both.differs.what)
    assert both.now.config["value_seen"] == .1 and both.now.name == run.name, "smaller batches, as when the memory ran out"


def forge(run, **facts): (run.path / "config.json").write_text(json.dumps(run.config | facts)); run.config |= facts


@pytest.mark.parametrize("facts, what, exact", [(dict(commit="abc"), "commit", True), (dict(lock_hash="abc"), "lock_hash", False), (dict(machine={"cpu": "another"}), "machine.cpu", False),
                                                (dict(versions={"torch": "0.1"}), "versions.torch", False), (dict(lock_differs={"numpy": ["1", "2"]}), "lock_differs.numpy", False), (dict(gpus=["H100"]), "", False)])
def test_equality_is_asked_for_where_it_may_be(here, facts, what, exact):
    run = made(); forge(run, **facts)
    both = rerun(run, progress=False)
    assert (not what or what in set(both.differs.what)) and both.verdict == "bit for bit"
    assert both.table.tolerance["dice"] == pytest.approx(0 if exact else .2 / 20)
    assert (rerun(run, tolerance=.5, progress=False).table.tolerance == .5).all()


def test_a_record_of_an_older_version_says_what_it_lacks(here):
    run = made(); config = {k: v for k, v in run.config.items() if k not in ("machine", "lock_hash", "lock_differs", "threads", "resources")}
    (run.path / "config.json").write_text(json.dumps(config))
    both = rerun(RunFolder(run.path), progress=False)
    assert both.verdict == "bit for bit" and set(both.differs[both.differs.then == "not recorded"].what) >= {"lock_hash", "machine.cpu"}


def test_the_look_is_entered_where_the_run_belongs(here):
    table(); run = made(defaults="manifest = 'm.csv'\n", look="from htlab.manifest import Manifest; run.look(Manifest.load(manifest))")
    both = [rerun(run, progress=False) for _ in range(2)]
    assert list(ledger().run) == [run.name, f"rerun of {run.name}", f"rerun of {run.name}"] and both[1].now.config["test_look"] == 3
    assert not Path("runs/rerun/test_ledger.csv").exists() and both[1].verdict == "bit for bit"


# agreement

def pair(tmp_path, a, b, **kw):
    with contextlib.chdir(tmp_path):
        shutil.rmtree("runs", ignore_errors=True)
        one, two = (RunFolder((tmp_path / fake(name, x))) for name, x in (("one", a), ("two", b)))
    return Rerun(one, two, pd.DataFrame(columns=["what", "then", "now"]), **kw)


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(1e-9, .05), tolerance=st.sampled_from([0., 1e-3, .02]))
def test_a_shift_agrees_up_to_its_tolerance(tmp_path_factory, shift, tolerance):
    a = np.linspace(.2, .8, 7)
    both = pair(tmp_path_factory.getbasetemp(), a, a + shift, tolerance=tolerance)
    far = both.table.difference["dice"]
    assert far == pytest.approx(shift, abs=1e-12) and both.agrees == (0 < tolerance >= far) and both.verdict != "bit for bit"
    assert both.cases.largest["dice"] == pytest.approx(shift, abs=1e-12) and both.cases.differ["id"] == 0


def test_other_cases_never_agree(tmp_path):
    both = pair(tmp_path, [.1, .2, .3], [.1, .2, .3, .2], tolerance=9)
    assert both.verdict == "differs" and both.cases.empty and "not the same cases" in str(both)


# the command

def test_the_command_says_whether_they_agree(here, capsys):
    run = made()
    assert main(["rerun", run.name[:8]]) == 0 and "bit for bit" in (out := capsys.readouterr().out) and Path(out.strip().splitlines()[-1].removeprefix("report: ")).is_file()
    loose = made(seed="")
    assert main(["rerun", loose.name]) == 1
    out, err = capsys.readouterr(); assert "differs" in out and err.strip().splitlines()[-1] == f"htlab: {loose.name}: its repeat does not agree"
    assert main(["rerun", loose.name, "--tolerance", "1"]) == 0 and "within tolerance" in capsys.readouterr().out
    for words, code, says in [(["rerun"], 2, "required"), (["rerun", "zz"], 1, "no run 'zz'"), (["rerun", run.name, "--tolerance", "-1"], 2, "--tolerance -1"), (["rerun", run.name, "--tolerance", "x"], 2, "invalid float")]:
        assert main(words) == code and re.search(says, capsys.readouterr().err)
