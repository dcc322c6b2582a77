"""What is drawn is what was handed over."""
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import subprocess, sys
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from htlab.show import TRUE, show_curves, show_heat, show_image, show_intervals, show_row, show_scatter, show_spectrum

IMG = np.linspace(0, 1, 12 * 16).reshape(12, 16)


@settings(max_examples=25, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_contours_enclose_the_mask_exactly(mask):
    fig, ax = plt.subplots()
    show_image(np.zeros(mask.shape), mask, ax=ax)
    paths = [p for c in ax.collections for p in c.get_paths()]
    polys = [q for p in paths for q in p.to_polygons(closed_only=True)]
    plt.close(fig)
    if not mask.any(): assert not polys; return
    yx = np.argwhere(np.ones_like(mask))
    inside = sum(matplotlib.path.Path(q).contains_points(yx[:, ::-1]).astype(int) for q in polys) % 2  # even-odd: holes count
    assert (inside.reshape(mask.shape).astype(bool) == mask).all()


def test_same_grey_everywhere_and_no_open_figures():
    before = plt.get_fignums()
    for img in (IMG, IMG * .1, (IMG * 255).astype(np.uint8), np.stack([IMG] * 3), IMG > .5):
        im = show_image(img).axes[0].images[0]
        assert im.get_clim() == (0, 1) and im.get_array().shape[:2] == (12, 16)
    assert plt.get_fignums() == before, "a figure left open is shown twice in Jupyter"


def test_torch_tensors_with_gradient():
    torch = pytest.importorskip("torch")
    t = torch.tensor(IMG, requires_grad=True)
    a = show_image(t, t > .5).axes[0].images[0].get_array()
    assert np.allclose(a, IMG)
    show_image(torch.rand(3, 8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("call, says", [
    (lambda: show_image(IMG * 3), "0 to 3;"), (lambda: show_image(IMG - 1), "-1"), (lambda: show_image(IMG * np.nan), "nan"),
    (lambda: show_image(IMG, IMG.T > .5), r"mask has shape \(16, 12\)"), (lambda: show_image(IMG, pred=IMG[:3]), "pred has shape"),
    (lambda: show_image(IMG[None, None]), "shape"), (lambda: show_image(np.zeros((0, 3))), "shape"), (lambda: show_image("a.png"), "not numbers"),
    (lambda: show_row([]), "no images"), (lambda: show_row([IMG], ["a", "b"]), "2 titles for 1"),
    (lambda: show_spectrum(np.zeros((2, 2, 2))), "power_db"), (lambda: show_scatter(np.zeros((3, 3))), "xy"),
    (lambda: show_scatter(np.zeros((3, 2)), ["a"]), "1 labels for 3"), (lambda: show_heat([[1, 2]], ["a", "b"]), "2 names for 1 rows"),
    (lambda: show_curves(pd.DataFrame({"loss": [1.]}), ["dice"]), "no column 'dice'; the table has loss"),
    (lambda: show_curves(pd.DataFrame({"name": ["a"]})), "no columns"), (lambda: show_intervals(["a"], [1], [0], [2, 3]), "intervals|names"),
])
def test_refuses_in_one_line(call, says):
    with pytest.raises(ValueError, match=says) as e: call()
    assert "\n" not in str(e.value)


def test_rows_curves_and_numbers_arrive():
    fig = show_row([IMG] * 5, masks=[None, IMG > .5, None, None, None], cols=2)
    assert len([a for a in fig.axes if a.images]) == 5 and len(fig.axes) == 6
    assert [len(a.collections) for a in fig.axes] == [0, 1, 0, 0, 0, 0]
    assert matplotlib.colors.to_hex(fig.axes[1].collections[0].get_edgecolor()[0]) == TRUE
    h = pd.DataFrame({"epoch": [1, 2, 3], "loss": [3., 2, 1], "valid_loss": [3., np.nan, 2], "dice": [np.nan, np.nan, .5], "lr": [1., 1, 1]})
    fig = show_curves(h)
    assert [[l.get_label() for l in a.lines] for a in fig.axes] == [["loss", "valid_loss"], ["dice"]]
    assert list(fig.axes[0].lines[1].get_xdata()) == [1, 3]
    texts = [t.get_text() for t in show_intervals(["a", "b"], [1, 2], [0, 1], [2, 3]).axes[0].texts]
    assert texts == ["1.000 [0.000, 2.000]", "2.000 [1.000, 3.000]"]


def test_needs_no_torch():
    code = "import sys, htlab.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_later_figures_still_show_in_a_notebook():
    "A figure drawn with plain pyplot after one of ours must appear: the backend may not be loaded inside our style"
    import nbformat
    from nbclient import NotebookClient
    cells = ["import numpy as np, matplotlib.pyplot as plt\nfrom htlab.show import show_row", "show_row([np.zeros((8, 8))])", "plt.plot([1, 2]);"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    before = os.environ.pop("MPLBACKEND", None)
    try: NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    finally:
        if before: os.environ["MPLBACKEND"] = before
    assert all(any("image/png" in o.get("data", {}) for o in c.outputs) for c in nb.cells[1:])
