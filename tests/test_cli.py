"""Every mistake is one line, and nothing heavy is imported before it is needed."""
import os, subprocess, sys
from pathlib import Path

import pytest
from test_report import fake, instant, template

from htlab.cli import main, parse_assignments, parse_each


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HTLAB_DEBUG", raising=False)
    return template(tmp_path / "toy.ipynb").name


def fails(capsys, code, *words):
    assert main(list(words)) == code
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert lines[-1].startswith("htlab: ") and "Traceback" not in err, err
    return lines


@pytest.mark.parametrize("words, code, says", [
    (["rum"], 2, "did you mean 'run'"), (["run"], 2, "required"), (["run", "absent.ipynb"], 2, "no such notebook"), (["run", "segmnet"], 2, "did you mean 'segment'"),
    (["run", "toy.ipynb", "-p", "sede=1"], 2, "did you mean 'seed'"), (["run", "toy.ipynb", "-p", "seed=x"], 2, "whole number"), (["run", "toy.ipynb", "-p", "seed"], 2, "name=value"),
    (["run", "toy.ipynb", "-p", "seed=1", "-p", "seed=2"], 2, "twice"), (["run", "toy.ipynb", "--agian"], 2, "--agian"),
    (["run", "toy.ipynb", "--each", "seed=1,x"], 2, "seed='x'"), (["run", "toy.ipynb", "--each", "sede=1"], 2, "did you mean 'seed'"), (["run", "toy.ipynb", "--each", "seed"], 2, "--each seed: expected name=value"),
    (["run", "toy.ipynb", "--each", "seed=1", "-p", "seed=1"], 2, "by -p and by --each"), (["run", "toy.ipynb", "--each", "seed=1", "--again"], 2, "--again"), (["run", "toy.ipynb", "--each", "seed=1,1"], 1, "the same run"),
    (["compare", "sweep-1"], 1, "no sweep 'sweep-1'"), (["compare", "a", "b", "--base"], 2, "--base"),
    (["run", "segment", "-p", "manifest=absent"], 1, "absent"), (["run", "segment", "-p", "manifest=phantmo"], 1, "phantom"),
    (["compare", "a"], 2, "two runs"), (["compare", "a", "b"], 1, "no run 'a'"), (["data"], 2, "required|COMMAND"), (["data", "import", "bsui", "x"], 2, "did you mean 'busi'"),
    (["data", "import", "busi", "absent"], 1, "absent"), (["data", "import", "mine", "x"], 2, "your own images need --as KIND"), (["data", "import", "busi", "x", "-o", "a=1"], 2, "--as"),
    (["data", "import", "mine", "x", "--as", "folder", "-o", "dest=/tmp/y"], 2, "-o dest: is no option.*HTLAB_DATA"), (["data", "import", "mine", "x", "--as", "folder", "-o", "src=y"], 2, "-o src: is no option"),
    (["data", "import", "mine", "x", "--as", "dicomm"], 2, "there are folder, csv, dicom"), (["data", "import", "mine", "absent", "--as", "folder"], 1, "absent"), (["data", "fetch", "mine"], 2, "no importer"),
    (["data", "audit", "bsui"], 1, "did you mean 'busi'"), (["data", "audit", "phantom", "--drop-conflicts"], 2, "--repair"), (["data", "audit", "phantom", "--protocol", "fold=9/3"], 1, "protocol='fold=9/3'"),
    (["data", "card", "bsui"], 1, "did you mean 'busi'"), (["data", "cache", "--clear", "absent"], 1, "no store 'absent'")])
def test_mistakes_are_one_line(toy, capsys, words, code, says):
    import re
    lines = fails(capsys, code, *words)
    assert len(lines) == 1 and re.search(says, lines[0])
    assert not Path("runs").exists() or not any(Path("runs").iterdir()), "nothing half-written"


def test_a_run_from_the_command_line(toy, capsys):
    assert main(["run", toy, "-p", "value=0.9"]) == 0
    out, err = capsys.readouterr()
    report = Path(out.strip().splitlines()[-1].removeprefix("report: "))
    assert report.is_file() and "0.700 [0.000, 1.000]" in out and "Toy" in err and "%|" not in err
    assert main(["run", toy, "-p", "value=0.9"]) == 0 and "finished before" in capsys.readouterr().out
    lines = fails(capsys, 1, "run", toy, "-p", "fail=yes")
    assert "told to fail" in lines[-1] and "second line" not in lines[-1]
    assert main(["run", toy, "--parameters"]) == 0 and capsys.readouterr().out.splitlines() == ["value = 0.7", "seed = 0", "fail = False", "name = 'x'"]


def test_debug_shows_everything(toy, monkeypatch):
    monkeypatch.setenv("HTLAB_DEBUG", "1")
    with pytest.raises(FileNotFoundError): main(["compare", "a", "b"])


def test_compare_prints_and_writes(toy, capsys):
    fake("aa-one", [.1, .2, .3]); fake("bb-two", [.3, .4, .5])
    assert main(["compare", "aa", "bb"]) == 0
    out = capsys.readouterr().out
    assert "+0.200 [+0.200, +0.200]" in out and Path(out.strip().splitlines()[-1].removeprefix("report: ")).is_file()


def test_a_sweep_from_the_command_line_and_its_comparison(instant, capsys):
    toy, _ = instant
    assert main(["run", toy, "--each", "value=.5,.9", "--each", "seed=1,2", "-p", "name=y"]) == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith(f"{i} of 4  ") and "computed in" in line for i, line in enumerate(lines, 1)) and last.startswith("htlab compare sweep-")
    assert main(["run", toy, "--each", "value=.5,.9", "--each", "seed=1,2", "-p", "name=y"]) == 0 and capsys.readouterr().out.count("found") == 4
    assert main([*last.split()[1:], "--base", "value=0.5"]) == 0
    out = capsys.readouterr().out
    assert "value=0.9" in out and "+0.200" in out and "the same run with value=0.5" in out and Path(out.strip().splitlines()[-1].removeprefix("report: ")).is_file()
    assert "1 of 2 runs failed" in fails(capsys, 1, "run", toy, "--each", "fail=yes,no", "-p", "value=.9", "-p", "name=y", "-p", "seed=1")[-1]
    assert parse_each(["a=1, 2", "b=1,2;3", "c="]) == {"a": ["1", "2"], "b": ["1,2", "3"], "c": [""]}


def test_backbones_are_listed(toy, capsys):
    assert main(["backbones"]) == 0 and "tiny" in capsys.readouterr().out


def drawn(folder, n=8):
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for d in ("images", "masks"): (folder / d).mkdir(parents=True)
    for i in range(n):
        image, mask = rng.rayleigh(60, (150, 180)).clip(0, 255).astype("uint8"), np.zeros((150, 180), "uint8"); mask[40:90, 50:110] = 255
        if i == n - 1: image = np.asarray(Image.open(folder / "images/p0_0.png"))
        Image.fromarray(image).save(folder / f"images/p{i}_{i % 3}.png"); Image.fromarray(mask).save(folder / f"masks/p{i}_{i % 3}.png")


def test_own_images_are_imported_audited_repaired_and_listed(toy, capsys, tmp_path, monkeypatch):
    from htlab.manifest import Manifest
    monkeypatch.setenv("HTLAB_DATA", str(tmp_path / "data")); monkeypatch.setenv("HTLAB_CACHE", str(tmp_path / "cache")); drawn(tmp_path / "pictures")
    assert main(["data", "import", "mine", "pictures", "--as", "folder", "-o", "label=lesion", "-o", "group=(p[0-9]+)_"]) == 0
    assert "wrong" not in capsys.readouterr().out and main(["data", "audit", "mine", "--embed", "tiny", "--repair", "majority"]) == 0
    out = capsys.readouterr().out
    assert "identical pairs" in out and Path("audit-mine/audit.html").is_file()
    fixed = Manifest.load(out.strip().splitlines()[-1].removeprefix("repaired: -p manifest=")).verify()
    assert len(fixed) == 8 and fixed.df.groupby("sha256").group.nunique().max() == 1
    assert main(["data", "list"]) == 0 and "mine" in capsys.readouterr().out
    assert main(["data", "cache"]) == 0 and "no stores" in capsys.readouterr().out


def test_what_cannot_be_fetched_is_explained(toy, capsys):
    for name in ("ln-int", "busi"):
        assert main(["data", "fetch", name]) == 1
        out, err = capsys.readouterr()
        assert f"htlab data import {name} " in out and len(err.strip().splitlines()) == 1
    assert main(["data", "card", "ddti"]) == 0 and "TI-RADS" in capsys.readouterr().out


def test_a_fetched_set_is_imported(toy, capsys, tmp_path, monkeypatch):
    from htlab import fetch, importers
    done = []
    monkeypatch.setattr(fetch, "fetch", lambda name, **kw: done.append((name, kw)) or tmp_path / "x.zip"); monkeypatch.setitem(importers.IMPORTERS, "busbra", lambda src: done.append(src))
    assert main(["data", "fetch", "busbra", "--mirror", "https://a.example/x"]) == 0 == main(["data", "fetch", "busbra", "--only", "--accept-licence"])
    assert done == [("busbra", dict(accept=False, mirrors=["https://a.example/x"])), tmp_path / "x.zip", ("busbra", dict(accept=True, mirrors=[]))]


def test_the_ledger_is_listed_and_checked(toy, capsys):
    from htlab.manifest import Manifest
    from htlab.report import Run
    assert main(["ledger"]) == 0 and "no look" in capsys.readouterr().out
    for i in range(2): Run(f"runs/.partial/r{i}").look(Manifest.load("phantom"))
    assert main(["ledger"]) == 0 and "phantom" in capsys.readouterr().out
    p = Path("runs/test_ledger.csv"); p.write_text(p.read_text().replace("phantom", "phantasm", 1))
    assert "line 2" in fails(capsys, 1, "ledger")[-1]


def test_small_commands(toy, capsys):
    assert main(["version"]) == 0 == main(["--version"]) and len(set(capsys.readouterr().out.split())) == 1
    assert main([]) == 2 and "commands" in capsys.readouterr().out
    assert main(["data", "list"]) == 0 and "phantom" in capsys.readouterr().out
    assert parse_assignments(["a=b=c", " d = "]) == {"a": "b=c", "d": ""}


@pytest.mark.parametrize("words", [["--help"], ["version"], ["run", "--help"], ["rum"], ["run", "segment", "--parameters"], ["run", "segmnt"]])
def test_nothing_heavy_for_light_commands(words):
    code = f"import sys\nfrom htlab.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\nassert not {{'torch', 'monai', 'matplotlib'}} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert run.returncode == 0, run.stderr
