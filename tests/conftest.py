"""What every test file shares: where the repository is, which files are its own, and a quiet, offline, repeatable environment."""
import os, shutil, signal, subprocess, sys
from pathlib import Path

import pytest
from browser import jupyterlab
from hypothesis import settings

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

# kernels and commands started by tests inherit these
os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's python3 kernel, not the user's
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that wait in a loop take the core from the other worker
os.environ.setdefault("MPLBACKEND", "Agg")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores Ctrl-C for all below, and some tests send it

settings.register_profile("htlab", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("htlab")


def repo_files():
    "Paths, relative to the root, of every file that is or would be committed; without git, of every file git would not ignore."
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True) if (ROOT / ".git").exists() and shutil.which("git") else None
    if git and git.returncode == 0: names = [Path(name) for name in git.stdout.decode().split("\0") if name]
    else:
        ours = ("htlab", "nbs", "tests", "benchmarks", "data_manifests", ".ci")
        names = [p.relative_to(ROOT) for top in ours for p in (ROOT / top).rglob("*")] + [p.relative_to(ROOT) for p in ROOT.glob("*")]
        hidden = {"__pycache__", ".ipynb_checkpoints", "_scratch", "runs"}
        names = [n for n in names if not hidden & set(n.parts) and n.name not in (".last_checked", ".DS_Store")]
    return sorted({n for n in names if (ROOT / n).is_file()})


@pytest.fixture
def copy(tmp_path):
    "A copy of the repository's files as they are now, committed or not: tools and pages may write in it, nobody's work is touched."
    for name in repo_files():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The Makefile's own command, run with this environment's programs; what the server says of itself."
    if not shutil.which("make"): pytest.skip("no make on this machine")
    with jupyterlab(tmp_path_factory.mktemp("jupyter")) as facts: yield facts
