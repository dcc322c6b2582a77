"Laws of the explorer, without a browser: the lasso, columns as colours, whose picture is shown, what becomes of a selection, and what a file holds."
import base64, io, json, re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.path import Path as Polygon
from PIL import Image

from htlab.explorer import Explorer, _column, in_outline
from htlab.manifest import Manifest

N = 40
EVIL = "</script><script>window.hacked = 1</script>"


class Pictures:
    "A data set of N known images; `rows` and `manifest` like an ImageSet's"
    def __init__(self, manifest=None):
        self.manifest, self.rows = manifest, (manifest.df.to_dict("records") if manifest else [dict(id=f"c{i}") for i in range(N)])
    def pixels(self, i):
        mask = np.zeros((16, 16), np.uint8); mask[4:12, 4:12] = 1
        return np.stack([np.full((16, 16), 5 * i, np.uint8), mask])


ROWS = pd.DataFrame(dict(id=[f"c{i}" for i in range(N)], label=["benign", "malignant"] * (N // 2), size=np.arange(N) / 2, text=EVIL))
XY = np.random.default_rng(0).normal(size=(N, 2))
def grey(png): return int(np.asarray(Image.open(io.BytesIO(png)))[0, 0, 0])
def payload(path): return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


# the lasso

coordinates = st.lists(st.tuples(*[st.floats(-5, 5, allow_subnormal=False)] * 2), min_size=3, max_size=12)


@given(coordinates, st.integers(0, 2**32 - 1), st.integers(0, 11))
def test_lasso_does_not_depend_on_where_the_pen_starts_or_which_way_it_goes(outline, seed, start):
    points = np.random.default_rng(seed).uniform(-5, 5, (50, 2))
    inside = in_outline(points, outline)
    assert (in_outline(points, np.roll(outline, start, 0)) == inside).all()
    assert (in_outline(points, outline[::-1]) == inside).all()


@given(st.integers(0, 2**32 - 1), st.integers(3, 30))
def test_lasso_agrees_with_matplotlib_where_nothing_crosses(seed, corners):
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    outline, points = rng.uniform(.5, 3, (corners, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1), rng.uniform(-3, 3, (200, 2))  # a star around the middle, or a part of one
    assert (in_outline(points, outline) == Polygon(outline).contains_points(points)).all()


def test_two_rings_leave_a_hole():
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    both = np.concatenate([2 * square, 2 * square[:1], square, square[:1]])
    assert in_outline([(0, 0), (1.5, 0), (3, 0)], both).tolist() == [False, True, False]


@given(st.lists(st.integers(-1, N)))
def test_select_takes_rows_in_order_and_refuses_others(rows):
    e = Explorer(XY, ROWS).select([1])
    if all(0 <= r < N for r in rows):
        assert e.select(rows).selected.tolist() == sorted(set(rows)) and e.table["id"].tolist() == [f"c{i}" for i in sorted(set(rows))]
        assert e.select(np.isin(np.arange(N), rows)).selected.tolist() == sorted(set(rows))
    else:
        with pytest.raises(ValueError, match="is no row"): e.select(rows)
        assert e.selected.tolist() == [1]


# columns

@given(st.lists(st.one_of(st.none(), st.text("abc ", max_size=3), st.integers(0, 30).map(str)), min_size=1, max_size=80))
def test_every_value_keeps_its_name_and_every_name_has_a_colour(values):
    c = _column("x", values)
    if "numbers" in c: assert np.array_equal(c["numbers"], [float(v) if v and v.strip() else np.nan for v in values], equal_nan=True)
    else:
        assert [c["names"][k] for k in c["codes"]] == [(v or "").strip() or "(empty)" for v in values]
        assert len(set(c["names"])) == len(c["names"]) == len(c["slots"]) and max(c["slots"]) < len(c["labels"]) == len(c["colors"]) <= 20
        if len(c["names"]) <= 20: assert [c["labels"][s] for s in c["slots"]] == c["names"] and len(set(c["colors"])) == len(c["colors"])


def test_numbers_become_a_bar_and_infinity_does_not_stretch_it():
    c = _column("x", [*range(20), np.inf, None])
    assert (c["low"], c["high"]) == (0, 19) and np.isnan(c["numbers"][-2:]).all()
    assert "names" in _column("x", [True, False] * 20) and "names" in _column("fold", list(range(5)) * 9)
    assert _column("fold", ["10", "9", "2"])["names"] == ["2", "9", "10"], "numbers stand in their order"


# pictures

@given(st.permutations(range(N)), st.integers(1, N))
@settings(max_examples=20)
def test_the_picture_belongs_to_the_id_in_any_order_and_part(order, part):
    some = list(order)[:part]
    e = Explorer(XY[some], ROWS.iloc[some], Pictures())
    assert [grey(e.picture(k)) for k in range(part)] == [5 * i for i in some]


def test_rows_without_ids_are_matched_by_position_only_if_they_are_as_many():
    class Bare:
        def __len__(self): return N
        pixels = Pictures().pixels
    assert grey(Explorer(XY, ROWS.drop(columns="id"), Bare()).picture(7)) == 35
    with pytest.raises(ValueError, match="40 images for 39 rows"): Explorer(XY[1:], ROWS.iloc[1:].drop(columns="id"), Bare())
    with pytest.raises(ValueError, match="id 'c99' is not in the data set"): Explorer(XY, ROWS.replace({"id": {"c3": "c99"}}), Pictures())


# a selection becomes a manifest

@pytest.fixture(scope="module")
def phantom():
    m = Manifest.load("phantom").split("test")
    return replace(m, df=m.df.head(N))


@pytest.mark.parametrize("given_dataset", [True, False])
def test_manifest_of_a_selection_loads_again(phantom, tmp_path, given_dataset):
    rows = phantom.df.assign(score=np.arange(N), row=0) if given_dataset else phantom.df
    e = Explorer(XY, rows, Pictures(phantom) if given_dataset else None).select([5, 3, 20])
    part = e.to_manifest(tmp_path / "some.csv")
    again = Manifest.load(tmp_path / "some.csv")
    assert list(again.df.id) == list(phantom.df.id.iloc[[3, 5, 20]]) == list(part.df.id) and again.df.equals(phantom.df.iloc[[3, 5, 20]].reset_index(drop=True))
    before = (tmp_path / "some.csv").read_bytes()
    with pytest.raises(FileExistsError, match="some.csv is there already"): e.select([1]).to_manifest(tmp_path / "some.csv")
    assert (tmp_path / "some.csv").read_bytes() == before and {p.suffix for p in tmp_path.iterdir()} <= {".csv", ".md"}


def test_patches_select_their_images_once(phantom, tmp_path):
    patches = phantom.df.iloc[[0, 0, 1, 1]].assign(case=[0, 0, 1, 1])
    for dataset in (Pictures(phantom), None):
        e = Explorer(XY[:4], patches, dataset).select([2, 3])
        assert list(e.to_manifest(tmp_path / f"{dataset is None}.csv").df.id) == [phantom.df.id[1]]


# twins

def test_a_projection_stands_for_its_first_seed_with_its_scores():
    from htlab.projection import project
    p = project(np.random.default_rng(0).normal(size=(N, 5)), progress=False)
    e = Explorer({"a": p}, ROWS)
    assert np.allclose(e.maps["a"], p.xy[0]) and e.notes["a"] == f"pca, trustworthiness {p.trustworthiness[0]:.2f}, neighbours kept {p.overlap[0]:.2f}"



def test_static_twin_draws_every_point_and_fades_what_is_not_selected():
    e = Explorer({"a": XY, "b": -XY}, ROWS, Pictures(), texts={"b": {"one": (0, 0)}}).select([1, 2])
    fig = e.static()
    maps = [ax for ax in fig.axes if ax.get_title() in ("a", "b")]
    for ax, xy in zip(maps, (XY, -XY)):
        faint, bold = ax.collections[:2]
        assert np.allclose(bold.get_offsets(), xy[[1, 2]]) and len(faint.get_offsets()) == N - 2 and faint.get_alpha() < bold.get_alpha()
    assert [t.get_text() for t in maps[1].texts] == ["one"] and len(fig.axes) == 4, "two maps, two pictures"
    assert set(e._repr_mimebundle_()) == {"text/plain", "image/png"}


def test_file_holds_the_maps_and_the_pictures_and_runs_no_text(tmp_path):
    e = Explorer({"a": XY, "b": XY[::-1]}, ROWS, Pictures(), texts={"a": {EVIL: (0, 0)}}, notes={"a": EVIL})
    path = e.to_html(tmp_path / "e.html", progress=False)
    text, data = path.read_text(encoding="utf-8"), payload(path)
    assert text.count("<script") == text.count("</script") == 3 + len(re.findall("<script", base_scripts())) and "connect-src" not in text and "default-src 'none'" in text
    assert np.array_equal(np.stack([np.frombuffer(base64.b64decode(data["maps"][1][k]["bytes"])) for k in "xy"], 1), XY[::-1])
    sheet, outline = (Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in data["sheets"][0])
    lines = np.asarray(outline.convert("RGBA"))
    for i, k in enumerate(data["tile"]):
        r, c = divmod(k, 16)
        at = slice(64 * r, 64 * r + 64), slice(64 * c, 64 * c + 64)
        assert abs(np.asarray(sheet)[at].mean() - 5 * i) < 2 and set(map(tuple, lines[at].reshape(-1, 4))) == {(0, 0, 0, 0), (0, 230, 118, 255)}
    assert [p.name for p in tmp_path.iterdir()] == ["e.html"]


def base_scripts():
    from htlab.explorer import PLOTLY
    return PLOTLY.read_text(encoding="utf-8")


@pytest.mark.parametrize("limit", [.0005, .002, 8])
def test_pictures_keep_their_limit_and_say_so(tmp_path, limit):
    path = Explorer(XY, ROWS, Pictures()).to_html(tmp_path / "e.html", limit_mb=limit, progress=False)
    data, text = payload(path), path.read_text(encoding="utf-8")
    kept = sum(k >= 0 for k in data["tile"])
    assert (kept == N) == ("points only" not in text) and kept > 0 and (kept == N or limit < 8)
    assert not payload(Explorer(XY, ROWS, Pictures()).to_html(tmp_path / "none.html", thumbnails=0))["sheets"]


# what is refused

@pytest.mark.parametrize("wrong, says", [
    (dict(maps=XY[1:]), "maps['map'] has shape (39, 2), rows has 40 rows"), (dict(maps={"a": XY.T}), "maps['a'] has shape (2, 40)"), (dict(maps={}), "0 maps of 40 rows"),
    (dict(maps={"a": np.where(XY == XY[3], np.inf, XY)}), "maps['a'], row 3: [inf, inf] (1 such rows)"), (dict(colour="organ"), "colour: 'organ' is no column; choose from id, label, size, text"),
    (dict(columns=["nothing"]), "columns: 'nothing' is no column"), (dict(texts={"after": {"x": (0, 0)}}), "texts: 'after' is no map; maps are map"), (dict(texts={"map": {"x": (0, np.nan)}}), "texts['map'], 'x'"),
    (dict(texts={"map": pd.DataFrame(dict(x=[0], y=[0]))}), "texts['map'] has no column 'name'"), (dict(notes={"after": "x"}), "notes: 'after' is no map")])
def test_what_does_not_fit_is_named(wrong, says):
    with pytest.raises(ValueError) as error: Explorer(**dict(maps=XY, rows=ROWS) | wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_selection_that_cannot_be_a_manifest_is_refused(tmp_path):
    e = Explorer(XY, ROWS)
    for wrong, says in ((lambda: e.to_manifest(tmp_path / "a.csv"), "nothing is selected"), (lambda: e.select([1]).to_manifest(tmp_path / "a.csv"), "no column 'image'"), (lambda: e.to_manifest(tmp_path / "a.txt"), "a manifest is a .csv"),
                        (lambda: e.lasso("other", XY), "maps are map"), (lambda: e.lasso("map", XY[:2]), "at least three corners"), (lambda: e.select([True]), "a bool for each"), (lambda: e.picture(0), "dataset=None")):
        with pytest.raises(ValueError, match=says): wrong()
    assert not list(tmp_path.iterdir())
