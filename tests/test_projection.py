"Laws of maps: what they keep is counted, the same seed draws the same map, and stored coordinates come back."
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sklearn.datasets import make_blobs
from sklearn.manifold import trustworthiness

from htlab.embed import Embeddings
from htlab.projection import Projection, neighbour_overlap, neighbours_of, project

laws = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOBS, WHICH = make_blobs(90, 12, centers=3, cluster_std=1., random_state=0)
def quiet(*a, **kw): return project(*a, progress=False, **kw)
def vectors(seed, n, e): return np.random.default_rng(seed).normal(size=(n, e)).astype(np.float32)


# neighbours

@laws
@given(st.integers(0, 99), st.integers(3, 40), st.integers(1, 6), st.data())
def test_neighbours_are_the_nearest_others(seed, n, e, data):
    x = vectors(seed, n, e); k = data.draw(st.integers(1, n - 1))
    d = ((x[:, None] - x) ** 2).sum(-1); np.fill_diagonal(d, np.inf)
    found = neighbours_of(x, k)
    assert found.shape == (n, k) and not (found == np.arange(n)[:, None]).any()
    assert np.allclose(np.sort(np.take_along_axis(d, found, 1)), np.sort(d)[:, :k], atol=1e-4)
    some = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    assert np.array_equal(np.sort(neighbours_of(x, k, some)), np.sort(found[some]))


@laws
@given(st.integers(2, 30), st.data())
def test_copies_are_neighbours_and_nobody_is_its_own(n, data):
    x = np.zeros((n, 3), np.float32); k = data.draw(st.integers(1, n - 1))
    found = neighbours_of(x, k)
    assert all(i not in row and len(set(row)) == k for i, row in enumerate(found))


@laws
@given(st.integers(0, 99), st.integers(6, 40), st.data())
def test_overlap_is_a_share(seed, n, data):
    k = data.draw(st.integers(1, n - 1))
    a, b = (neighbours_of(vectors(s, n, 3), k) for s in (seed, seed + 1))
    want = np.mean([len(set(p) & set(q)) / k for p, q in zip(a, b)])
    assert np.isclose(neighbour_overlap(a, b), want) and np.isclose(neighbour_overlap(b, a), want) and neighbour_overlap(a, a) == 1
    assert np.isclose(neighbour_overlap(a, neighbours_of(vectors(seed, n, 3) * 3 + 1, k)), 1)
    if k == n - 1: assert want == 1


def test_random_maps_keep_what_chance_gives():
    space = neighbours_of(vectors(0, 200, 30), 10)
    kept = [neighbour_overlap(space, neighbours_of(vectors(s, 200, 2), 10)) for s in range(1, 40)]
    assert abs(np.mean(kept) - 10 / 199) < 4 * np.std(kept) / 39 ** .5


# maps

@laws
@given(st.integers(0, 99), st.integers(40, 70), st.integers(2, 8))
def test_pca_is_the_plane_of_largest_variance(seed, n, e):
    x = vectors(seed, n, e) * np.arange(1, e + 1)
    p = quiet(x)
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert p.xy.shape == (1, n, 2) and p.seeds == (0,) and np.isnan(p.agreement)
    assert np.allclose(np.abs(p.xy[0]), np.abs((x - x.mean(0)) @ vt[:2].T), atol=1e-3) and np.allclose(p.settings["variance"], s[:2] ** 2 / (s ** 2).sum(), atol=1e-5)
    if e == 2: assert p.overlap[0] > .99 and p.trustworthiness[0] > .999


@pytest.mark.parametrize("method, kw", [("tsne", dict(perplexity=10)), ("umap", {})])
def test_a_seed_draws_one_map_and_blobs_stay_apart(method, kw):
    p, again, other = quiet(BLOBS, method, seeds=(3, 4), **kw), quiet(BLOBS, method, seeds=[4], **kw), quiet(BLOBS, method, seeds=7, **kw)
    assert np.allclose(p.xy[1], again.xy[0]) and not np.allclose(p.xy[0], p.xy[1]) and other.seeds == (7,)
    assert (p.trustworthiness > .8).all() and (p.overlap > 2 * p.chance).all() and p.chance == 15 / 89
    for xy, t, o in zip(p.xy, p.trustworthiness, p.overlap):
        near = neighbours_of(xy, 5)
        assert (WHICH[near] == WHICH[:, None]).mean() > .95
        assert np.isclose(t, trustworthiness(BLOBS, xy, n_neighbors=15), atol=1e-6) and np.isclose(o, neighbour_overlap(neighbours_of(BLOBS.astype("f4"), 15), neighbours_of(xy, 15)))
    assert np.isclose(p.agreement, neighbour_overlap(*(neighbours_of(xy, 15) for xy in p.xy)))


def test_the_map_does_not_depend_on_turning_the_space():
    turned = BLOBS @ np.linalg.qr(vectors(0, 12, 12))[0]
    assert np.allclose(np.abs(quiet(turned).xy), np.abs(quiet(BLOBS).xy), atol=1e-3)


def test_scores_of_a_sample_come_near_those_of_all():
    x = vectors(0, 1500, 6)
    few, full = quiet(x, sample=500), quiet(x, sample=1500)
    assert few.settings["sample"] == 500 and abs(few.overlap[0] - full.overlap[0]) < .02 and np.array_equal(few.xy, full.xy) and np.array_equal(few.overlap, quiet(x, sample=500).overlap)
    assert "500 points drawn" in few._repr_html_() and "drawn" not in full._repr_html_()


def test_embeddings_leave_their_key():
    e = Embeddings(BLOBS, pd.DataFrame({"id": map(str, range(90))}), "image", "toy")
    assert quiet(e).settings["embeddings"] == e.key and np.array_equal(quiet(e).xy, quiet(e.vectors).xy) and "embeddings" not in quiet(BLOBS).settings


# the object

@pytest.mark.parametrize("labels", [None, list("abc") * 30, np.arange(90), np.linspace(0, 1, 90), [f"n{i}" for i in range(90)], [None, "a", "b"] * 30], ids=["none", "names", "whole", "numbers", "many", "missing"])
def test_the_picture_carries_the_scores(labels):
    p = quiet(BLOBS, "tsne", seeds=(0, 1), perplexity=5)
    fig = p.figure(labels, "title")
    said = [a.get_title() for a in fig.axes if a.get_title()]
    assert len(said) == 2 and all(f"{t:.2f}" in s and f"{o:.2f}" in s and f"{p.chance:.2f}" in s for s, t, o in zip(said, p.trustworthiness, p.overlap)) and f"{p.agreement:.2f}" in fig.get_suptitle()
    fig.canvas.draw()


def test_colours_belong_to_their_points():
    p = quiet(BLOBS)
    drawn = p.figure(WHICH.astype(str)).axes[0].collections[0]
    where, colour = drawn.get_offsets().data, drawn.get_facecolors()
    for x, c in zip(where, colour):
        i = np.flatnonzero(np.isclose(p.xy[0], x).all(1))[0]
        assert np.allclose(c[:3], [(.122, .467, .706), (1, .498, .055), (.173, .627, .173)][WHICH[i]], atol=2e-3)


def test_stored_coordinates_come_back_and_damage_is_noticed(tmp_path):
    p = quiet(BLOBS, "tsne", seeds=(0, 1), perplexity=5)
    path = p.save(tmp_path / "p.safetensors")
    q = Projection.load(path)
    assert np.array_equal(p.xy, q.xy) and p.seeds == q.seeds and np.array_equal(p.overlap, q.overlap) and np.array_equal(p.trustworthiness, q.trustworthiness) and p.agreement == q.agreement and p.settings == q.settings and p.method == q.method
    assert p._repr_html_() == q._repr_html_() and np.isnan(Projection.load(quiet(BLOBS).save(tmp_path / "q.safetensors")).agreement) and not list(tmp_path.glob(".*"))
    raw = path.read_bytes()
    for bad in (raw[:-1], raw[:-5] + b"xxxxx", b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="project again"): Projection.load(path)


@pytest.mark.parametrize("message, x, kw", [
    ("method='mds'", BLOBS, dict(method="mds")), ("init='spectral'", BLOBS, dict(method="tsne", init="spectral")), ("seeds is empty", BLOBS, dict(method="tsne", seeds=())),
    ("neighbours=45 .* give 1 to 44", BLOBS, dict(neighbours=45)), ("neighbours=15 .* give 1 to 9", BLOBS[:20], {}), ("take more images", BLOBS[:1], {}), ("neighbours=0", BLOBS, dict(neighbours=0)),
    ("perplexity=30 .* give 1 to 29", BLOBS, dict(method="tsne", perplexity=30)), ("finite", np.where(BLOBS > 9, np.nan, BLOBS), {}), (r"got shape \(90, 1\)", BLOBS[:, :1], {}), (r"got shape \(90,\)", BLOBS[:, 0], {})], ids=str)
def test_bad_input_ends_in_one_line(message, x, kw):
    with pytest.raises(ValueError, match=message) as e: quiet(x, **kw)
    assert "\n" not in str(e.value)


def test_labels_are_one_each():
    with pytest.raises(ValueError, match="3 labels for 90"): quiet(BLOBS).figure(list("abc"))
    with pytest.raises(ValueError, match="give 1 to 89"): neighbours_of(BLOBS, 90)
