"""A run folder is complete or absent, its name is its configuration, and what cannot be compared is not compared."""
import json, os, re, shutil, signal, subprocess, sys, threading, time
from collections import Counter
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import BIN, ROOT
from filelock import FileLock
from hypothesis import given, strategies as st
from safetensors.numpy import load_file

from htlab import report
from htlab.manifest import Manifest
from htlab.report import LEDGER, RECIPES, REQUIRED, Run, RunFailed, RunFolder, check_parameters, compare, execute, external, find_run, find_runs, find_template, ledger, plan, sweep, to_html

CODE = """import sys, numpy as np, pandas as pd
from htlab.report import Run
run = Run(run_dir)
sys.stderr.write("\\r 50%|#####     | 1/2 [00:01<00:01, 1.0it/s]\\r100%|##########| 2/2\\nlook here\\n")
if fail: raise ValueError("told to fail\\nsecond line")
run.log(executable=sys.executable)
cases = pd.DataFrame({"id": ["a", "b"], "group": [1, 2], "dice": [value, .5]})
run.save(cases, pd.DataFrame({"epoch": [1], "loss": [.1]}), {"dice": {"value": cases.dice.mean(), "lo": 0., "hi": 1., "n": 2, "groups": 2, "policy": "diagonal"}})"""
DEFAULTS = "value = .7\nseed = 0\nfail = False\nname = 'x'\nrun_dir = ''"


def template(path, code=CODE, defaults=DEFAULTS):
    cell = nbformat.v4.new_code_cell
    meta = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(metadata=meta, cells=[nbformat.v4.new_markdown_cell("# Toy"), cell(defaults, metadata={"tags": ["parameters"]}), cell(code)]), path)
    return path


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return template(tmp_path / "toy.ipynb")


def finished(runs="runs"): return sorted(p.name for p in Path(runs).iterdir() if p.is_dir() and not p.name.startswith("."))


# parameters

@given(value=st.floats(-1e6, 1e6), seed=st.integers(-10**6, 10**6), fail=st.booleans(), name=st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=9))
def test_values_typed_as_text_or_given_as_python_are_the_same(tmp_path_factory, value, seed, fail, name):
    path = tmp_path_factory.getbasetemp() / "typed.ipynb"
    if not path.exists(): template(path)
    given = dict(value=value, seed=seed, fail=fail, name=name)
    a, b = check_parameters(path, given), check_parameters(path, {k: str(v) for k, v in given.items()})
    assert a == b == given | {"run_dir": ""} and [type(v) for v in a.values()] == [float, int, bool, str, str]


@pytest.mark.parametrize("wrong, says", [
    ({"vlaue": 1}, "unknown parameter 'vlaue'; did you mean 'value'"), ({"zzz": 1}, "toy has value, seed, fail, name$"), ({"run_dir": "x"}, "unknown parameter 'run_dir'"),
    ({"seed": "1.5"}, "seed='1.5': expected a whole number"), ({"seed": True}, "whole number"), ({"seed": ""}, "whole number"), ({"value": "nan"}, "finite number"),
    ({"value": True}, "finite"), ({"fail": "2"}, "true or false"), ({"fail": None}, "true or false"), ({"name": 3}, "expected text")])
def test_wrong_parameters_are_refused_in_one_line(toy, wrong, says):
    with pytest.raises(ValueError, match=says) as e: check_parameters(toy, wrong)
    assert "\n" not in str(e.value)


@given(given=st.dictionaries(st.sampled_from(["lr", "epochs", "head", "value"]), st.integers(1, 9)), recipe=st.sampled_from(["", *RECIPES]), name=st.sampled_from(["toy", "contrast"]))
def test_explicit_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path_factory, given, recipe, name):
    folder = tmp_path_factory.getbasetemp() / "recipes"; folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    if not path.exists(): template(path, defaults="lr = .5\nepochs = 3\nhead = 'x'\nvalue = 1\nrecipe = 'htlab'\nrun_dir = ''")
    given = given | ({"head": "mine"} if "head" in given else {}) | ({"recipe": recipe} if recipe else {})
    preset = {} if recipe in ("", "htlab") else RECIPES[recipe][""] | RECIPES[recipe].get(name, {})
    for k, v in check_parameters(path, given).items(): assert v == given.get(k, preset.get(k, {"lr": .5, "epochs": 3, "head": "x", "value": 1, "recipe": "htlab", "run_dir": ""}[k])), k


def test_recipes_fit_the_templates_and_unknown_ones_are_refused(toy):
    for own in [RECIPES["paper"][k] for k in ("", "contrast")]: assert own["lr"] == 1e-4 if "lr" in own else own["epochs"] == 32
    template(toy, defaults=DEFAULTS + "\nrecipe = 'htlab'")
    with pytest.raises(ValueError, match="recipe='papr' is unknown; did you mean 'paper'"): check_parameters(toy, {"recipe": "papr"})
    assert plan(toy, {"recipe": "paper"})["parameters"] == plan(toy)["parameters"] | {"recipe": "paper"}, "a preset sets only what the template has"


def test_templates_are_found_and_checked(toy, tmp_path):
    assert find_template("segment").name == "segment.ipynb"
    with pytest.raises(FileNotFoundError, match="did you mean 'classify'"): find_template("clasify")
    with pytest.raises(FileNotFoundError, match="no such notebook"): find_template("absent.ipynb")
    for text, says in [("not json", "is not a notebook"), (nbformat.writes(nbformat.v4.new_notebook()), "no cell tagged 'parameters'")]:
        (tmp_path / "bad.ipynb").write_text(text)
        with pytest.raises(ValueError, match=says): check_parameters("bad.ipynb", {})
    with pytest.raises(ValueError, match="only lines like"): check_parameters(template(tmp_path / "f.ipynb", defaults="x = f()"), {})
    with pytest.raises(ValueError, match="no parameter run_dir"): plan(template(tmp_path / "g.ipynb", defaults="x = 1"))
    for name in ("segment", "classify"):  # what the command line promises
        p = report.template_parameters(name)
        assert {"manifest", "classes", "backbone", "weights", "adapter", "shots", "seed", "epochs", "size", "device", "precision", "limit", "run_dir"} <= set(p)


# the name

def test_the_name_is_the_configuration(toy, tmp_path):
    name = plan(toy)["name"]
    assert re.fullmatch(r"[0-9a-f]{8}-toy-s0", name) and plan(toy, {"value": "0.70"})["name"] == name
    assert len({name, plan(toy, {"value": .71})["name"], plan(toy, {"seed": 1})["name"], plan(toy, {"name": "y"})["name"]}) == 4
    nb = nbformat.read(toy, 4); nb.cells[0].source = "# other words"; nbformat.write(nb, toy)
    assert plan(toy)["name"] == name, "prose decides nothing"
    assert plan(template(toy, CODE + "\n1"))["name"] != name, "code does"
    old = plan(template(toy, defaults=DEFAULTS + "\nweights = 'w.bin'"))["name"]
    Path("w.bin").write_bytes(b"weights"); new = plan(toy)["name"]; Path("w.bin").write_bytes(b"weightz")
    assert len({old, new, plan(toy)["name"]}) == 3, "other weights, another run"


def test_data_and_split_are_part_of_the_name(toy):
    template(toy, defaults=DEFAULTS + "\nmanifest = 'm.csv'")
    head = "id,image,mask,label,group,split,sha256,width,height\n"
    rows = [f"{i},sim:1/{i},,{'benign' if i % 2 else 'malignant'},g{i},{s},{i:064x},0,0\n" for i, s in enumerate(["train", "train", "valid", "test"])]
    Path("m.csv").write_text(head + "".join(rows)); a = plan(toy)
    Path("m.csv").write_text(head + "".join(reversed(rows))); assert plan(toy)["hash"] == a["hash"], "the order of the rows decides nothing"
    Path("m.csv").write_text(head + "".join(rows).replace("test", "train")); b = plan(toy)
    Path("m.csv").write_text(head + "".join(rows[:3])); c = plan(toy)
    assert a["split_hash"] != b["split_hash"] and a["data_hash"] == b["data_hash"] != c["data_hash"] and len({p["hash"] for p in (a, b, c)}) == 3
    assert a["name"].endswith("-toy-m-s0")


def test_files_named_by_parameters_are_known_by_what_is_in_them(toy):
    template(toy, defaults=DEFAULTS + "\nadapter_file = ''\nplugin = ''\nprompts = ''\nrecipe = 'htlab'")
    none = plan(toy)["name"]
    for k in ("adapter_file", "plugin", "prompts"):
        for folder, text in [("a", "one"), ("b", "one"), ("c", "two")]: Path(folder).mkdir(exist_ok=True); Path(folder, "f.txt").write_text(text)
        a, b, c = (plan(toy, {k: f"{folder}/f.txt"})["name"] for folder in "abc")
        assert a == b and len({a, c, none}) == 3, k
        Path("a/f.txt").write_text("three"); assert plan(toy, {k: "a/f.txt"})["name"] not in (a, c), k
    assert plan(toy, {"prompts": "a sentence, " * 200})["parameters"]["prompts"].startswith("a sentence"), "words are no file"
    with pytest.raises(FileNotFoundError, match="plugin='mine.py'"): plan(toy, {"plugin": "mine.py"})
    run = fake("abc-one", [.5]); (run / "adapter.safetensors").write_text("one"); fake("abd-two", [.5])
    p = plan(toy, {"adapter_file": "abc"})
    assert Path(p["parameters"]["adapter_file"]) == run / "adapter.safetensors" and p["name"] == plan(toy, {"adapter_file": str(run)})["name"] == plan(toy, {"adapter_file": "b/f.txt"})["name"]
    for odd, says in [("ab", "beginning of 2 runs"), ("abd", "abd-two holds no adapter.safetensors"), ("nowhere", "adapter_file='nowhere': no such file")]:
        with pytest.raises(FileNotFoundError, match=says): plan(toy, {"adapter_file": odd})


def test_rows_that_are_not_to_be_had_are_errors_before_anything_runs(toy):
    template(toy, defaults=DEFAULTS + "\nmanifest = 'phantom'\nclasses = ''\nrows = ''\nshots = 0.\nlimit = 0\ntest_manifest = ''\ntest_rows = ''\nprotocol = ''\nmeasure_on = 'test'")
    for wrong, says in [({"rows": "scaner=A"}, "rows='scaner=A'.*no column"), ({"test_rows": "scanner=Z"}, "known: A, B, C"), ({"shots": 1e4}, "fewer shots"), ({"classes": "cyst"}, "known: benign"), ({"test_manifest": "phantom:all"}, "to train or validate on"),
                        ({"protocol": "fold=6/5"}, "protocol='fold=6/5'"), ({"measure_on": "train"}, "use test, or valid"), ({"measure_on": "valid", "test_manifest": "phantom"}, "read as a test")]:
        with pytest.raises(ValueError, match=says): plan(toy, wrong)
    plans = [plan(toy, w) for w in ({}, {"protocol": "seed=5"}, {"protocol": "leave=scanner:C"}, {"measure_on": "valid"})]
    assert len({p["hash"] for p in plans}) == 4 and len({p["split_hash"] for p in plans}) == 3 and len({p["data_hash"] for p in plans}) == 1
    assert set(plans[0]["cards"]["phantom"]) == {"Licence", "Citation"}
    table = pd.read_csv(ROOT / "data_manifests/phantom.csv", dtype=str, keep_default_na=False).head(20).assign(id=lambda d: "x" + d.id, group=lambda d: "x" + d.id, sha256=[f"{i:064x}" for i in range(20)])
    table.to_csv("other.csv", index=False); a = plan(toy, {"test_manifest": "other.csv:all"})
    table.assign(label=list(reversed(table.label))).to_csv("other.csv", index=False)
    assert a["name"] != plan(toy, {"test_manifest": "other.csv:all"})["name"], "other test data, another run"


# complete or absent

def test_a_run_is_made_found_again_and_made_anew(toy, monkeypatch):
    # a kernel called python3 that is another Python must not be taken
    spec = Path("jupyter/kernels/python3"); spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(Path("jupyter").resolve())); monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    a = execute(toy, {"value": .9}, progress=False)
    assert not a.found and sorted(REQUIRED) == sorted(p.name for p in a.path.iterdir()) and finished() == [a.name]
    assert a.config["executable"] == sys.executable and a.metrics["dice"]["value"] == pytest.approx(.7) and list(a.cases.id) == ["a", "b"]
    for k in ("versions", "commit", "dirty", "parameters", "hash", "data_hash", "split_hash", "timings", "platform"): assert k in a.config
    assert a.config["versions"]["torch"] and a.config["parameters"] == {"value": .9, "seed": 0, "fail": False, "name": "x"}
    assert "0.700 [0.000, 1.000]" in a._repr_html_()
    said = ["".join(o.text) for c in nbformat.read(a.path / "notebook.ipynb", 4).cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert said == ["look here"], "bars go, warnings stay"
    assert not external((a.path / "report.html").read_text())
    born = (a.path / "config.json").stat().st_mtime_ns
    b = execute(str(toy), {"value": "0.90"}, progress=False)
    assert b.found and b.path == a.path and (b.path / "config.json").stat().st_mtime_ns == born
    (a.path / "mark").touch()
    c = execute(toy, {"value": .9}, again=True, progress=False)
    assert not c.found and c.path == a.path and not (c.path / "mark").exists() and finished() == [a.name]
    assert not list(Path("runs/.partial").glob("*/")), "nothing is left in work"


def test_a_failed_run_is_no_run(toy):
    with pytest.raises(RunFailed, match="^told to fail .ValueError in cell") as e: execute(toy, {"fail": True}, progress=False)
    assert "\n" not in str(e.value) and finished() == []
    work = Path(re.search(r"runs/\.partial/\S+?\.ipynb", str(e.value).replace(os.sep, "/"))[0])
    assert "told to fail" in work.read_text(), "the traceback is kept"
    with pytest.raises(FileNotFoundError): find_run(work.parent.name)
    with pytest.raises(RunFailed, match="without writing config.json"): execute(template(toy, "pass"), progress=False)
    with pytest.raises(RunFailed, match="process died"): execute(template(toy, "import os; os.kill(os.getpid(), 9)"), progress=False)
    assert finished() == []


def test_two_processes_do_not_run_the_same_cell(toy):
    name = plan(toy)["name"]
    Path("runs/.partial").mkdir(parents=True)
    with FileLock(f"runs/.partial/{name}.lock"):
        with pytest.raises(RuntimeError, match="being run by another process"): execute(toy, progress=False)
    assert finished() == []


def fake(name, dice, split="s1", ids=None, **config):
    path = Path("runs") / name; path.mkdir(parents=True)
    ids = ids or [f"c{i}" for i in range(len(dice))]
    pd.DataFrame({"id": ids, "group": ids, "label": "benign", "dice": dice, "policy": "diagonal"}).to_csv(path / "cases.csv", index=False)
    (path / "history.csv").write_text("epoch\n1\n"); (path / "notebook.ipynb").write_text("{}"); (path / "report.html").write_text("")
    (path / "config.json").write_text(json.dumps({"template": "segment", "parameters": {"adapter": name, "seed": 0}, "split_hash": split} | config))
    (path / "metrics.json").write_text(json.dumps({"dice": {"value": float(np.mean(dice)), "lo": 0., "hi": 1., "n": len(dice), "groups": len(dice), "policy": "diagonal"}}))
    return path


@pytest.mark.parametrize("file", REQUIRED)
def test_a_folder_that_lacks_a_file_is_no_run(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    path = fake("whole", [.5, .6])
    assert RunFolder(path).metrics["dice"]["n"] == 2
    shutil.copytree(path, "runs/.partial/whole2")
    with pytest.raises(ValueError, match="in work"): RunFolder("runs/.partial/whole2")
    (path / file).unlink()
    with pytest.raises(ValueError, match=f"lacks {file}"): RunFolder(path)


def test_runs_are_found_by_the_beginning_of_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake("abc-one", [.5]); fake("abd-two", [.5])
    assert find_run("abc").name == find_run("runs/abc-one").name == "abc-one"
    with pytest.raises(FileNotFoundError, match="beginning of 2 runs"): find_run("ab")
    for odd in ("x", "../runs", "*", ""):
        with pytest.raises((FileNotFoundError, ValueError)): find_run(odd)


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"): report._write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_run_by_hand_leaves_nothing_and_json_has_no_nan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run()
    run.log(a=np.float32(1), b=Path("x"), c=(np.int64(1), np.nan), d=np.arange(2))
    run.save(pd.DataFrame({"id": ["a"]}), pd.DataFrame({"epoch": [1]}), {"hd95": {"value": np.inf}})
    folder = run.folder
    got = json.loads((folder / "config.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert (got["a"], got["b"], got["c"], got["d"]) == (1, "x", [1, None], [0, 1])
    del run
    assert not folder.exists() and not list(tmp_path.iterdir())


def looked(n=4): # a manifest of n rows, the last two to be tested
    ids = [chr(97 + i) for i in range(n)]
    return pd.DataFrame({"id": ids, "image": [f"sim:1/{i}" for i in range(n)], "mask": "", "label": "benign", "group": ids, "split": ["train"] * (n - 3) + ["valid", "test", "test"], "sha256": [f"{i:064x}" for i in range(n)], "width": 0, "height": 0})


def test_each_look_at_the_test_split_is_a_line_and_the_sealed_one_none(tmp_path):
    table = looked()
    m, less, n = Manifest(table, "m, by hand"), Manifest(table[1:], "m, by hand"), Manifest(table[:3], "n")
    looks = [Run(tmp_path / f"runs/.partial/r{i}").look(x) for i, x in enumerate([m, less, n, m.split("valid"), m.split("test")])]  # fewer training images: the same test split
    said = ledger(tmp_path / "runs")
    assert looks == [1, 2, 1, 0, 3] and list(said.n) == ["2", "2", "1", "2"] and said.test.nunique() == 2 and tuple(said) == LEDGER
    run = Run(tmp_path / "runs/.partial/r9"); run.look(m.split("valid")); assert run.config["test_hash"] == m.split("valid").split_hash and "sealed" in run.card(m)
    run.look(m); assert run.config["test_look"] == 4 and run.config["test_seal"] == ledger(tmp_path / "runs").seal.iloc[-1] and "look 4" in run.card(m)
    run.look(m.split("valid")); assert "look 4" in run.card(m) and run.config["measured_on"] == "test", "a split that was read is sealed no more"


@pytest.fixture(scope="module")
def six_looks(tmp_path_factory):
    home = tmp_path_factory.mktemp("looks")
    for i in range(6): Run(home / f".partial/r{i}").look(Manifest(looked(4 + i % 2), "m"))
    assert len(ledger(home)) == 6
    return home, (home / "test_ledger.csv").read_text()


@given(at=st.integers(0, 4), how=st.sampled_from(["change", "drop", "double", "swap", "column"]), field=st.integers(0, 5))
def test_a_ledger_that_was_edited_says_where(six_looks, at, how, field):
    home, text = six_looks; path = home / "test_ledger.csv"; head, *lines = text.splitlines()
    if how == "change": cells = lines[at].split(","); cells[field] += "1"; lines[at] = ",".join(cells)
    if how == "drop": del lines[at]
    if how == "double": lines.insert(at, lines[at])
    if how == "swap": lines[at], lines[at + 1] = lines[at + 1], lines[at]
    if how == "column": head = head.replace("seal", "sael")
    path.write_text("\n".join([head, *lines]) + "\n")
    where = 1 if how == "column" else at + 3 if how == "double" else at + 2
    with pytest.raises(ValueError, match=rf"test_ledger.csv, line {where}\b.*say so where you report"): ledger(home)


def test_a_full_disk_leaves_the_ledger_whole(six_looks, monkeypatch):
    home, text = six_looks; path = home / "test_ledger.csv"; path.write_text(text); run = Run(home / ".partial/r8")
    def full(*a): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"): run.look(Manifest(looked(), "m"))
    assert path.read_text() == text and not list(home.glob("*.tmp")) and run.look(Manifest(looked(), "m")) == 4


def test_nothing_is_entered_behind_an_edit(six_looks):
    home, text = six_looks; path = home / "test_ledger.csv"; path.write_text(text.replace(",m,", ",n,", 1)); edited = path.read_text()
    with pytest.raises(ValueError, match="test_ledger.csv, line 2"): Run(home / ".partial/r9").look(Manifest(looked(), "m"))
    assert path.read_text() == edited


def test_looks_of_many_processes_are_all_there(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_report import looked, Run, Manifest\nfor i in range(10): Run({str(tmp_path)!r} + '/runs/.partial/r' + sys.argv[1] + str(i)).look(Manifest(looked(), 'm'))"
    both = [subprocess.Popen([sys.executable, "-c", code, str(k)]) for k in range(3)]
    assert [p.wait(timeout=120) for p in both] == [0, 0, 0] and len(ledger(tmp_path / "runs")) == 30


def test_a_report_names_licence_citation_protocol_and_look(tmp_path):
    m = Manifest.load("phantom"); run = Run(tmp_path / "runs/.partial/r"); run.log(**plan(find_template("segment"), {"protocol": "leave=scanner:C"})); p = m.protocol("leave=scanner:C"); run.look(p)
    said = run.card(p, Manifest(looked(), "other"))
    for words in ("Apache-2.0", "Cite HTLab", "leave=scanner:C", p.split_hash[:8], m.data_hash[:8], "the first", "other, 4 rows. Its card names neither"): assert words in said


# sweep

@pytest.fixture
def instant(toy, monkeypatch):
    "The template's code without a kernel; counts what was computed."
    made, one = Counter(), threading.Lock()
    def papermill(source, out, params, progress, kernels=None):
        made[Path(params["run_dir"]).name] += 1
        try:
            with one: exec(source.cells[-1].source, dict(params))
        except ValueError as e: raise RunFailed(str(e).splitlines()[0]) from None
        nbformat.write(source, out)
        return source
    monkeypatch.setattr(report, "_papermill", papermill)
    return toy, made


def test_a_sweep_is_the_product_in_order_and_computes_nothing_twice(instant, capsys):
    toy, made = instant
    each = {"name": ["x", "y"], "seed": ["1", 2]}
    runs = sweep(toy, {"value": .9}, each)
    assert [(r.parameters["name"], r.parameters["seed"]) for r in runs] == list(product("xy", [1, 2])) and all(r.parameters["value"] == .9 for r in runs)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in out[:4]] == [[str(i + 1), "of", "4"] for i in range(4)] and all(f"{r.name}  computed in " in line for r, line in zip(runs, out))
    file, = Path("runs").glob("sweep-*.json")
    assert out[4] == f"htlab compare {file.stem}" and json.loads(file.read_text())["runs"] == [r.name for r in runs] == [r.name for r in find_runs(file.stem[:10])]
    again = sweep(toy, {"value": "0.90"}, each, progress=False)
    assert [r.name for r in again] == [r.name for r in runs] and all(r.found for r in again) and set(made.values()) == {1} and len(list(Path("runs").glob("sweep-*"))) == 1
    wider = sweep(toy, {"value": .9}, {"seed": range(1, 4), "name": "x"}, progress=False)
    assert [r.found for r in wider] == [True, True, False] and sum(made.values()) == 5


def test_one_failure_does_not_stop_a_sweep(instant, capsys):
    toy, made = instant
    with pytest.raises(RunFailed, match="^1 of 3 runs failed, the others are finished; the first: .*told to fail") as e: sweep(template(toy, CODE.replace("if fail", "if seed == 2")), {}, {"seed": [1, 2, 3]})
    assert "\n" not in str(e.value) and [r.parameters["seed"] for r in map(RunFolder, (Path("runs") / n for n in finished()))] in ([1, 3], [3, 1])
    lines = capsys.readouterr().out.splitlines()
    assert "failed: told to fail" in lines[1] and "computed" in lines[2]
    name, = (p.stem for p in Path("runs").glob("sweep-*"))
    assert len(find_runs(name)) == 2 and any("2 of 3 runs are finished" in n for n in compare(*find_runs(name)).notes)


@pytest.mark.parametrize("params, each, says", [
    ({}, {"seed": [1, 2, "x"]}, "seed='x'"), ({}, {"sede": [1]}, "did you mean 'seed'"), ({"seed": 1}, {"seed": [1, 2]}, "seed is given for all runs and for each"), ({}, {"seed": []}, "seed: no values"), ({}, {"seed": [1, "1"]}, "the same run")])
def test_a_sweep_is_checked_before_it_starts(instant, params, each, says):
    with pytest.raises(ValueError, match=says): sweep(instant[0], params, each)
    assert not instant[1] and not Path("runs").exists()


def test_two_sweeps_side_by_side_share_the_work(instant):
    toy, made = instant
    slow = template(toy, CODE.replace("run = Run(run_dir)", "run = Run(run_dir); import time; time.sleep(.05)"))
    got = [None, None]
    def work(i): got[i] = sweep(slow, {}, {"seed": [1, 2, 3, 4]}, progress=False)
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(finished()) == 4 and set(made.values()) == {1} and [r.name for r in got[0]] == [r.name for r in got[1]]


@pytest.mark.parametrize("dies", [False, True])
def test_a_run_of_another_process_is_passed_over_and_looked_for_at_the_end(instant, monkeypatch, capsys, dies):
    toy, made = instant
    first = execute(toy, {"seed": 1}, runs="elsewhere", progress=False)
    Path("runs/.partial").mkdir(parents=True)
    other = FileLock(f"runs/.partial/{first.name}.lock"); other.acquire()
    def sleep(seconds):
        if seconds != 1: return  # somebody else's: subprocess polls
        if not dies: shutil.copytree(first.path, Path("runs") / first.name)
        other.release()
    monkeypatch.setattr(report.time, "sleep", sleep)
    runs = sweep(toy, {}, {"seed": [1, 2]})
    said = [line.split("  ")[2] for line in capsys.readouterr().out.splitlines()[:3]]
    assert [r.found for r in runs] == [not dies, False] and said[0] == "elsewhere" and said[2].startswith("computed" if dies else "found")


def test_a_template_edited_during_a_sweep_changes_nothing(instant, monkeypatch):
    toy, made = instant
    papermill = report._papermill
    def edits(*a): template(toy, "raise SystemExit"); return papermill(*a[:4])
    monkeypatch.setattr(report, "_papermill", edits)
    assert len(sweep(toy, {}, {"seed": [1, 2]}, progress=False)) == 2


# compare

def arm(adapter, shots, seeds, dice): return [fake(f"{adapter}-{shots}-{s}", dice + s / 100, parameters={"adapter": adapter, "shots": shots, "seed": s}) for s in seeds]


def test_seeds_are_pooled_and_their_spread_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0); a = rng.uniform(.2, .6, 30); b = a + rng.normal(.05, .05, 30)
    runs = arm("none", 0, [1, 2, 3], a) + arm("mona", 0, [3, 1], b)
    both = compare(*runs)
    assert list(both.table.index) == ["adapter=none", "adapter=mona"] and list(both.table.seeds) == [3, 2] and list(both.table.columns) == ["adapter", "seeds", "test cases", "dice"]
    assert both.table.dice.iloc[0].startswith(f"{a.mean() + .02:.3f} [") and both.table.dice.iloc[0].endswith("±0.010") and both.table["test cases"].tolist() == [30, 30]
    alone = compare(fake("a", a + .02), fake("b", b + .02))
    assert both.paired.drop(columns="run").equals(alone.paired.drop(columns="run")), "of the mean of each case"
    assert set(compare(*reversed(runs)).table.index) == set(both.table.index)
    one = compare(*runs[:3])
    assert one.paired.empty and one.table.seeds.tolist() == [3] and "±0.010" in str(one)
    twin = compare(runs[0], shutil.copytree(runs[0], "runs/twin"))
    assert len(twin.table) == 2 and "+0.000" in twin.paired["difference [95 % interval]"][0], "the same seed twice is not two seeds"


def test_p_of_all_comparisons_are_corrected_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1); a = rng.uniform(.2, .6, 25)
    got = compare(*[fake(f"run{i}", a + rng.normal(shift, .06, 25)) for i, shift in enumerate([0, .01, .03, .02])]).paired
    p, h = got.p.astype(float).to_numpy(), got.p_holm.astype(float).to_numpy()
    order = np.argsort(p)
    assert np.allclose(h[order], np.minimum(np.maximum.accumulate(p[order] * [3, 2, 1]), 1), rtol=.06)
    assert "3 comparisons of each metric" in str(compare("runs/run0", "runs/run1", "runs/run2", "runs/run3")) and list(compare("runs/run0", "runs/run1").paired.p) == list(compare("runs/run0", "runs/run1").paired.p_holm)


def test_each_is_compared_with_its_own_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = np.random.default_rng(0).uniform(.2, .6, 20)
    runs = [r for k in (0, 20) for i, x in enumerate(["none", "mona", "gain"]) for r in arm(x, k, [1, 2], a + i / 10 - k / 100)]
    both = compare(*runs, base="adapter=none")
    d = both.paired.set_index("run")
    assert len(d) == 4 and all(d["from"][n] == n.replace("mona", "none").replace("gain", "none") for n in d.index)
    assert all(d["difference [95 % interval]"][n].startswith("+0.100" if "mona" in n else "+0.200") for n in d.index) and "the same run with adapter=none" in str(both)
    assert not external(both.save("c.html").read_text()) and both.hash != compare(*runs).hash
    assert any("gain, shots=20: there is no run with adapter=none" in n for n in compare(*runs[:6], *runs[10:], base="adapter=none").notes)
    for odd, says in [("adapter=lora", "there are none, mona, gain"), ("seed=1", "what differs: adapter, shots"), ("adapter", "no run has adapter ''")]:
        with pytest.raises(ValueError, match=says): compare(*runs, base=odd)


def test_many_arms_stay_readable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = np.random.default_rng(0).uniform(.2, .6, 12)
    runs = [r for k in range(2) for x in range(12) for r in arm(f"adapter{x}", k, [1, 2], a)]
    both = compare(*runs, base="adapter=adapter0")
    page = both.save("c.html").read_text()
    rows = re.findall(r"<th>(adapter=adapter\d+, shots=\d)</th>", page)
    assert rows == [f"adapter=adapter{x}, shots={k}" for k in range(2) for x in range(12)] and both.figure().get_size_inches()[1] > 8 and "base64" in page


def test_words_stand_for_runs_or_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in ("aa-one", "bb-two"): fake(n, [.5, .6])
    for h, names in [("11", ["bb-two", "aa-one"]), ("12", ["cc-three"])]: Path(f"runs/sweep-{h}.json").write_text(json.dumps({"runs": names}))
    assert [[r.name for r in find_runs(w)] for w in ("aa", "sweep-11", "runs/sweep-11.json")] == [["aa-one"], ["bb-two", "aa-one"], ["bb-two", "aa-one"]]
    for odd, says in [("sweep-1", "beginning of 2 sweeps: sweep-11, sweep-12"), ("sweep-12", "none of its 1 runs is finished"), ("sweep-2", "no sweep 'sweep-2' in runs"), ("zz", "no run 'zz'")]:
        with pytest.raises(FileNotFoundError, match=says): find_runs(odd)


def test_paired_differences_are_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = np.random.default_rng(0).uniform(.2, .8, 30)
    one, two = fake("one", a), fake("two", a + .1)
    shuffled = fake("three", (a - .05)[::-1], ids=[f"c{i}" for i in range(30)][::-1])
    both = compare(one, two, shuffled)
    d = both.paired.set_index("run")["difference [95 % interval]"]
    assert d["two"] == "+0.100 [+0.100, +0.100]" and d["three"] == "-0.050 [-0.050, -0.050]" and not both.notes
    assert (both.paired.p.astype(float) < 1e-5).all() and list(both.paired.pairs) == [30, 30] and set(both.paired.test) == {"wilcoxon"}
    assert list(both.table.columns) == ["adapter", "test cases", "dice"], "only what differs, and the metrics"
    page = both.save("deep/compare.html").read_text()
    assert not external(page) and "+0.100" in page and "base64" in page
    assert "+0.100" in str(both) and "+0.100" in both._repr_html_()


def test_the_folds_of_a_cross_validation_are_one_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); rng = np.random.default_rng(0)
    def fold(adapter, i, k=3, seed=0, more=0.):
        ids = [f"c{j}" for j in range(i * 10, i * 10 + 10)]
        return fake(f"{adapter}-{seed}-{i}", np.clip(.5 + more + rng.normal(0, .1, 10), 0, 1), split=f"s{i}", ids=ids, test_hash=f"t{i}", parameters={"adapter": adapter, "seed": seed, "protocol": f"fold={i}/{k}"})
    a, b = ([fold(x, i, seed=s, more=m) for s in (0, 1) for i in (1, 2, 3)] for x, m in (("none", 0), ("mona", .2)))
    both = compare(*a, *b)
    assert len(both.table) == 2 and list(both.table["test cases"]) == [30, 30] and list(both.table.seeds) == [2, 2] and not {"split", "test split"} & set(both.table)
    d = np.mean([np.concatenate([RunFolder(p).cases.dice for p in x]) for x in (b,)]) - np.mean([np.concatenate([RunFolder(p).cases.dice for p in x]) for x in (a,)])
    assert both.paired["difference [95 % interval]"][0].startswith(f"{d:+.3f}") and int(both.paired.pairs[0]) == 30 and any("the folds are read as one result, 30 cases" in n for n in both.notes)
    assert len(compare(*a[:2], *b[:2]).table) == 4, "an incomplete set stays apart"
    with pytest.raises(ValueError, match="folds of one cross-validation"): compare(*a[:3])
    same = [fake(f"{x}-out-{i}", [.1, .2, .3], split=f"s{i}", test_hash="t", parameters={"adapter": x, "seed": 0, "protocol": f"fold={i}/3"}) for x in ("none", "mona") for i in (1, 2, 3)]
    assert len(compare(*same).table) == 6, "all folds tested on the same rows of another data set: nobody is tested once"


def test_different_protocols_stand_in_a_column_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); cards = dict(cards={"busi": {"Licence": "CC0", "Citation": "Al-Dhabyani 2020"}})
    a, b = fake("a", [.1, .2, .3], test_hash="t1" * 32, **cards), fake("b", [.2, .3, .4], test_hash="t1" * 32)
    assert not {"split", "test split"} & set(compare(a, b).table)
    c, d = fake("c", [.2, .3, .4], split="s2", test_hash="t2" * 32), fake("d", [.2, .3, .4], split="s2", test_hash="t1" * 32)
    two = compare(a, c)
    assert list(two.table["split"]) == ["s1", "s2"] and list(two.table["test split"]) == ["t1t1t1t1", "t2t2t2t2"] and any("different test splits" in n for n in two.notes) and two.paired.empty
    labels = [t.get_text() for ax in two.figure().axes for t in ax.get_yticklabels()]; assert any("t1t1t1t1" in t for t in labels) and any("t2t2t2t2" in t for t in labels)
    same = compare(a, d)
    assert "test split" not in same.table and "split" in same.table and any("learned by different protocols" in n for n in same.notes) and len(same.paired)
    page = two.save("c.html").read_text(); assert "t2t2t2t2" in page and "CC0" in page and "Al-Dhabyani" in page and "CC0" in str(two)


@pytest.mark.parametrize("other, says", [(dict(split="s2"), "different test splits"), (dict(ids=list("abc")), r"different cases \(0 in common of 3 and 3\)")])
def test_what_is_not_the_same_is_not_paired(tmp_path, monkeypatch, other, says):
    monkeypatch.chdir(tmp_path)
    both = compare(fake("one", [.1, .2, .3]), fake("two", [.2, .3, .4], **other))
    assert both.paired.empty and len(both.table) == 2 and re.search(says, both.notes[0]) and re.search(says, str(both)) and re.search(says, both._repr_html_())


def test_commits_are_noted_and_one_run_is_not_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = fake("one", [.1, .2], commit="a", dirty=False)
    notes = compare(one, fake("two", [.1, .2], commit="b", dirty=True)).notes
    assert "different versions or commits" in notes[0] and "uncommitted changes" in notes[1]
    with pytest.raises(ValueError, match="twice"): compare(one, one)
    with pytest.raises(ValueError, match="two runs"): compare(one)


# the page

@pytest.mark.parametrize("text, loads", [
    ('<script src="https://a/b.js"></script>', 1), ("<link rel=stylesheet href=//a/b.css>", 1), ('<img alt="" src=\'http://a/b.png\'>', 1), ("<style>@import url(https://a/b.css)</style>", 1),
    ('<p style="background:url(https://a)">', 1), ('<a href="https://doi.org/x">x</a>', 0), ('<img src="data:image/png;base64,AAAA">', 0), ("<p>see https://doi.org/x</p>", 0)])
def test_loads_from_elsewhere_are_seen(text, loads): assert len(external(text)) == loads


def test_a_report_that_loads_something_is_refused():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("![x](https://elsewhere.example/x.png)")])
    with pytest.raises(ValueError, match="elsewhere.example"): to_html(nb, "x")


# killed

@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_in_mid_training_and_started_again_is_the_same(tmp_path):
    "The whole command, on a small phantom: SIGKILL after some epochs, then again; the metrics are those of a run left alone."
    words = [str(BIN / "htlab"), "run", str(ROOT / "nbs/experiments/segment.ipynb")] + [w for p in
             ("manifest=small.csv", "limit=4", "epochs=20", "batch_size=4", "head_width=16", "bottleneck=8", "validate_every=5") for w in ("-p", p)]
    table = pd.read_csv(ROOT / "data_manifests/phantom.csv", dtype=str, keep_default_na=False)
    table.groupby(["split", "label"]).head(4).to_csv(tmp_path / "small.csv", index=False)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    kw = dict(cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    alone, first = (subprocess.Popen([*words, "--runs", d], **kw) for d in ("alone", "killed"))  # side by side: time is not measured
    deadline = time.time() + 300
    while time.time() < deadline and first.poll() is None:
        h = list((tmp_path / "killed").glob(".partial/*/history.csv"))
        if h and h[0].read_text().count("\n") > 2: break
        time.sleep(.02)
    assert first.poll() is None, first.communicate()
    everyone = [first, *psutil.Process(first.pid).children(recursive=True)]  # the command and the notebook's process
    for p in everyone: p.send_signal(signal.SIGKILL)
    first.communicate()
    assert len(pd.read_csv(h[0])) < 20, "killed in the middle, not after the end"
    assert not [p for p in (tmp_path / "killed").iterdir() if p.is_dir() and p.name != ".partial"]
    again = subprocess.run([*words, "--runs", "killed"], **kw)
    said = alone.communicate()[1]
    assert again.returncode == alone.returncode == 0, again.stderr + said
    assert "goes on from its checkpoint" in again.stderr and "goes on" not in said
    (a,), (b,) = ([p for p in (tmp_path / d).iterdir() if p.is_dir() and p.name != ".partial"] for d in ("killed", "alone"))
    assert a.name == b.name
    for f in ("metrics.json", "cases.csv"): assert (a / f).read_bytes() == (b / f).read_bytes(), f
    for f in ("adapter.safetensors", "task.safetensors"):
        x, y = load_file(a / f), load_file(b / f)
        assert x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x), f
    assert pd.read_csv(a / "history.csv").drop(columns="seconds").equals(pd.read_csv(b / "history.csv").drop(columns="seconds"))
