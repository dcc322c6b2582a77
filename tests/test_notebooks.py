"""Every notebook runs from top to bottom, each under its own name, in a copy of the repository."""
import json
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from conftest import ROOT

from htlab.grid import imports, kernels

# Long pages and templates run with these instead of their own numbers; the stored outputs come from their own.
SMOKE = {
    "api/01c_envelope": dict(seeds=60),
    "api/01d_quality": dict(seeds=20),
    "api/01e_spectrum": dict(seeds=20),
    "api/06a_response": dict(epochs=1, trained=16, scenes=6, draws=50),
    "api/10a_hierarchy": dict(times=200),
    "api/11_embed": dict(scenes=40),
    "api/11a_projection": dict(scenes=100, seeds=2),
    "api/11b_gap": dict(seeds=12),
    "api/12_attribute": dict(epochs=2, shots=10, cases=4),
    "api/12a_faithfulness": dict(cases=3, seeds=2, scenes=100, tested=24),
    "api/15a_explorer": dict(pairs=10, epochs=1),
    "api/15b_viewer": dict(shots=30, limit=8, masks=5),
    "lessons/00_adapt_clip": dict(scenes=40, pairs=10, epochs=1),
    "lessons/01_what_is_speckle": dict(patterns=4),
    "lessons/02_seeing_spectra": dict(patterns=4),
    "lessons/03_what_clip_sees": dict(scenes=24, tissues=6, pairs=10, epochs=1),
    "lessons/04_filter_or_gain": dict(images=16, tested=40, epochs=1, seeds="1,2"),
    "lessons/05_adapters_without_surgery": dict(updates=2),
    "lessons/06_few_and_zero_shot": dict(seeds=2, many=12, draws=100, adapted="4", adapted_seeds=1, updates=2),
    "lessons/07_maps_that_mislead": dict(points=120, images=120, shots=4, updates=2, methods="tsne", draws=50),
    "lessons/08_reading_attributions": dict(scenes=100, tested=30, explained=3, draws=100),
    "lessons/10_your_own_adapter": dict(limit=4, epochs=1, templates="segment,contrast,zero_shot"),
    "lessons/11_the_published_recipe": dict(shots=3, limit=3, epochs=1, seeds="1", changes="no normalisation,paper"),
    "lessons/12_small_lesions": dict(limit=6, epochs=1, seeds="1"),
    "lessons/09_the_data_set_is_the_experiment": dict(scenes=40, repeats=2),
    "experiments/segment": dict(limit=4, epochs=1),
    "experiments/classify": dict(limit=4, epochs=1),
    "experiments/contrast": dict(limit=4, epochs=1),
    "experiments/zero_shot": dict(limit=4),
    "experiments/retrieve": dict(limit=4),
    "experiments/ablation": dict(adapters="none,mona", seeds="1,2", shots="0", limit=4, epochs=1),
    "experiments/claims": dict(claims="5b", seeds="1,2", limit=4, epochs=1),
    "experiments/demo": dict(limit=16, pair_epochs=1, epochs=1, frozen_epochs=1),
    "experiments/speckle": dict(limit=2),
    "experiments/attribute": dict(limit=4, epochs=1, explain=4, steps=3, checked=3),
    "experiments/embed": dict(limit=10, k=2, epochs=1, projection="pca"),
    "experiments/tiny": dict(images=128, check=40, dial_images=0, out=""),
}

ORDER = ["api", "lessons", "experiments"]
PAGES = sorted((p for kind in ORDER for p in (ROOT / "nbs" / kind).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts),
               key=lambda p: (ORDER.index(p.relative_to(ROOT / "nbs").parts[0]), p.name))
NAMES = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in PAGES]


def source(cell): return "".join(cell["source"])


@pytest.fixture(scope="module")
def warm():
    "Kernels forked from a process that has imported, once, what any of the pages imports: each page still has a process of its own."
    return kernels(imports(SimpleNamespace(cells=[c for p in PAGES for c in nbformat.read(p, 4).cells])))


@pytest.mark.parametrize("name", NAMES)
def test_page_runs(name, copy, warm, monkeypatch):
    path = copy / "nbs" / f"{name}.ipynb"
    nb = json.loads(path.read_text(encoding="utf-8"))
    if any("- skip_exec: true" in source(c) for c in nb["cells"][:1]): pytest.skip("the page says skip_exec")
    nb["cells"] = [c for c in nb["cells"] if "#| eval: false" not in source(c)]
    path.write_text(json.dumps(nb), encoding="utf-8")
    unknown = set(SMOKE.get(name, {})) - set(papermill.inspect_notebook(path))
    assert not unknown, f"SMOKE[{name!r}] sets {unknown}, which the page's cell tagged 'parameters' does not have"
    monkeypatch.delenv("MPLBACKEND")  # the kernel draws into the page
    monkeypatch.setenv("HTLAB_DATA", str(copy / "no-data"))  # the same on every machine, whatever was imported there
    papermill.execute_notebook(path, copy / "out.ipynb", SMOKE.get(name, {}), cwd=path.parent, kernel_name="python3", kernel_manager_class=warm, progress_bar=False, execution_timeout=900)


def test_smoke_names_pages():
    assert not set(SMOKE) - set(NAMES), "SMOKE names pages that do not exist"


def test_templates_take_the_same_parameters():
    "One command line, seven templates: the names and kinds of the parameters, in one order; defaults may differ, and two have some of their own before the last."
    from htlab.report import template_parameters
    one, *others = ([(k, type(v)) for k, v in template_parameters(t).items()] for t in ("segment", "classify", "contrast", "zero_shot", "retrieve", "embed", "attribute"))
    assert len(one) > 30 and all(o[:len(one) - 1] + o[-1:] == one and (len(o) == len(one)) == (i < 4) for i, o in enumerate(others))
