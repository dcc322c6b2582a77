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
    (["data", "import", "busi", "absent"], 1, "absent")])
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
