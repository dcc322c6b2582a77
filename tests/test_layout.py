"""The house keeps its shape: floors, names, no orphans, no diff after export and clean, nothing that does not belong."""
import ast, json, re, shutil, subprocess, sys
from configparser import ConfigParser

import pytest
from conftest import BIN, ROOT, repo_files
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Which modules the exported cells of a module may import. Demonstrations may use any smaller floor.
IMPORTS = {m: set(names.split()) for m, names in {
    "show": "", "speckle": "", "probe": "speckle", "differentiable": "speckle", "envelope": "", "quality": "", "spectrum": "", "manifest": "", "source": "manifest", "importers": "manifest source", "dicom": "source", "generic": "manifest source importers dicom", "fetch": "manifest source",
    "audit": "show manifest source", "store": "manifest", "dataset": "manifest speckle store", "backbone": "", "adapter": "", "inject": "backbone adapter", "response": "speckle spectrum backbone adapter inject", "prefix": "backbone store",
    "head": "", "task": "inject backbone head prefix", "pace": "", "train": "pace", "evaluate": "", "embed": "backbone store", "fewshot": "embed", "projection": "embed", "gap": "quality evaluate", "attribute": "backbone inject task", "faithfulness": "evaluate attribute",
    "launch": "train", "hierarchy": "evaluate", "record": "", "report": "show manifest train evaluate record", "study": "show evaluate hierarchy report", "rerun": "evaluate report", "grid": "report"}.items()}
ANYTHING = {"widgets", "explorer", "viewer", "classroom", "cli"}

FILES = repo_files()
PAGES = [f for f in FILES if f.suffix == ".ipynb" and f.parts[0] == "nbs"]
API = [f for f in PAGES if f.parts[1] == "api"]
FLOOR = {m[2]: m[1] for f in API if (m := re.fullmatch(r"(\d\d[a-z]?)_([a-z_]+)", f.stem))}  # 02 < 02a < 03: letters are mezzanines
MODULES = [f for f in FILES if f.parts[0] == "htlab" and f.suffix == ".py" and not f.name.startswith("_")]


def pages(of): return pytest.mark.parametrize("page", of, ids=lambda f: f.relative_to("nbs").with_suffix("").as_posix())
def read(page): return json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def code(page): return [source(c) for c in read(page) if c["cell_type"] == "code"]
def exported(text): return re.search(r"^#\|\s*export", text, re.M)


def imported(text):
    "Modules of htlab that a cell imports, wherever in it the import stands."
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(text))):
        if isinstance(node, ast.Import): yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("htlab."))
        if isinstance(node, ast.ImportFrom):
            package, *module = ("htlab." * bool(node.level) + (node.module or "")).rstrip(".").split(".")
            if package == "htlab": yield from module[:1] or (a.name for a in node.names if not a.name.startswith("__"))


def texts(page):
    "What a reader of the stored outputs sees, as text; pictures left out."
    for cell in read(page):
        for out in cell.get("outputs", []):
            yield "".join(out.get("text", ""))
            for kind, data in out.get("data", {}).items():
                if kind.startswith("text/") or kind.endswith("svg+xml"): yield re.sub(r"base64,[\w+/=\s]+", "", "".join(data))


# floors and names

@pages(API)
def test_stairs_only_go_down(page):
    assert re.fullmatch(r"\d\d[a-z]?_[a-z_]+\.ipynb", page.name), "a page of nbs/api is called NN_module.ipynb, on a mezzanine NNa_module.ipynb"
    name = page.stem.split("_", 1)[1]
    assert name in IMPORTS or name in ANYTHING, f"{name} is a new room: add it to IMPORTS in this test"
    assert re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code(page)), re.M) == [name], f"{page} exports to {name}, once"
    for text in code(page):
        for other in imported(text):
            assert other in FLOOR, f"htlab.{other} has no page"
            assert FLOOR[other] < FLOOR[name], f"{page} imports {other}, which is not on a lower floor"
            assert not exported(text) or name in ANYTHING or other in IMPORTS[name], f"exported cells of {name} may import {sorted(IMPORTS[name])}, not {other}"


def test_one_page_per_floor_and_no_orphan_modules():
    assert len(set(FLOOR.values())) == len(API), "two pages share a floor"
    assert {f.stem for f in MODULES} == set(FLOOR), "htlab/*.py and nbs/api/*.ipynb differ (a renamed default_exp leaves its old .py behind)"


@pages([p for p in PAGES if p not in API])
def test_lessons_and_experiments_export_nothing(page):
    assert not [t for t in code(page) if exported(t) or re.search(r"^#\|\s*default_exp", t, re.M)]


# what a page is

@pages(API)
def test_page_opens_with_title_and_description(page):
    assert re.match(r"# \S.*\n+> \S", source(read(page)[0])), "the first cell is '# Title' and '> one line that describes'"


@pages(PAGES)
def test_page_is_ready_to_read(page):
    outputs = [o for c in read(page) for o in c.get("outputs", [])]
    assert outputs, "no stored outputs: a page is read before it is run"
    assert not [o for o in outputs if o["output_type"] == "error"], "a stored error: show failures with try/except"
    assert not ["".join(o["text"])[:200] for o in outputs if o.get("name") == "stderr"], "warnings or progress bars are stored"
    assert (ROOT / page).stat().st_size < 1.5e6, "larger than 1.5 MB: lower the figures' dpi"
    for text in [*map(source, read(page)), *texts(page)]:
        found = re.search(r"(?<![\w.])/(work|tmp|root|home|Users)/[\w.-]*|\b[A-Z]:\\\\?Users", text)
        assert not found, f"a path of one machine: {found[0]}"


@pytest.mark.parametrize("module", MODULES, ids=lambda f: f.stem)
def test_public_names_have_docstrings(module):
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    assert not [n.name for n in public if not ast.get_docstring(n)]


def test_no_star_imports():
    cells = [(f, t) for f in PAGES for t in code(f)] + [(f, (ROOT / f).read_text(encoding="utf-8")) for f in FILES if f.suffix == ".py"]
    assert not [(str(f), m[0]) for f, t in cells if (m := re.search(r"^\s*from \S+ import \*.*", t, re.M))]


# what the tree holds

def test_export_and_clean_leave_no_diff(copy):
    def state(): return {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".last_checked" and "__pycache__" not in p.parts}
    before = state()
    for tool in ("nbdev_export", "nbdev_clean"): subprocess.run([shutil.which(tool, path=str(BIN))], cwd=copy, check=True)
    after = state()
    differ = sorted(f for f in before | after if before.get(f) != after.get(f))
    assert not differ, "nbdev_export and nbdev_clean change these; run both and commit: " + ", ".join(differ)


def test_nothing_that_does_not_belong():
    "No pixels, no pickles, nothing large; weights only as safetensors in the package and as golden tensors of tests."
    for f in FILES:
        size = (ROOT / f).stat().st_size
        assert size <= 8e6, f"{f}: {size / 1e6:.1f} MB"
        assert f.suffix not in {".pkl", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".mat", ".zip", ".gz", ".dcm", ".nii"}, f"{f} has no place here"
        assert f.suffix != ".safetensors" or f.parts[:2] in {("htlab", "assets"), ("tests", "golden")}, f"{f}: weights live in htlab/assets"
        if f.suffix in {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"}:
            assert f.parts[:2] == ("nbs", "images") or size < 4e3, f"{f}: figures for the README go to nbs/images, images of data sets nowhere"
    assert all(f.suffix in {".csv", ".md"} for f in FILES if f.parts[0] == "data_manifests")


def test_the_repository_stands_alone():
    "Nothing of one machine, no folder beside the clone, no registry by its host name."
    banned = re.compile("|".join(["\\.\\./" + "shared", "/work" + "/", "py" + r"pi\.org", "python" + r"hosted\.org", "download\\.py" + r"torch\.org", "ana" + r"conda\.org"]))
    for f in FILES:
        try: text = (ROOT / f).read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        if f.suffix == ".ipynb": text = "\n".join([*map(source, read(f)), *texts(f)])
        assert not (found := banned.search(text)), f"{f} names {found[0]}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_documents_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert not [x for x in links if "://" not in x and not (ROOT / x).exists()]


def test_lock_fits_settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    lock = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"\w", line)]
    for want in map(Requirement, (ini["DEFAULT"]["requirements"] + " " + ini["DEFAULT"]["dev_requirements"]).split()):
        pins = [r for r in lock if canonicalize_name(r.name) == canonicalize_name(want.name)]
        assert pins, f"{want.name} is not in requirements.lock: make lock"
        for pin in pins: assert want.specifier.contains(str(pin.specifier).removeprefix("==")), f"the lock has {pin}, settings.ini wants {want}: make lock"


# the package

@pytest.mark.parametrize("what", ["import htlab", "import htlab.cli; sys.argv = ['htlab', '--help']\ntry: htlab.cli.main()\nexcept SystemExit: pass"], ids=["import", "help"])
def test_starts_without_torch(what):
    run = subprocess.run([sys.executable, "-c", f"import sys\n{what}\nassert 'torch' not in sys.modules, 'torch was imported'"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_help_is_a_command():
    run = subprocess.run([shutil.which("htlab", path=str(BIN)), "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "run" in run.stdout
