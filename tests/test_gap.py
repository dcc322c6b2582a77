"Laws of the gap measures: known Gaussians, invariances, chance, patients, and two routes to one number."
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy import linalg, stats
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from htlab.gap import GapEstimate, alignment, change, cka, cka_matrix, domain_classifier, frechet, knn_purity, mmd, modality_gap, semantics_or_centres, silhouette, uniformity

laws = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 999)

def normal(seed, *shape): return np.random.default_rng(seed).standard_normal(shape)
def rotation(seed, d): return np.linalg.qr(normal(seed, d, d))[0]
def patients(n, each=2): return np.repeat(np.arange(n // each), each)
def labelled(seed, n=60, d=5, signal=1.):
    y = np.random.default_rng(seed).integers(0, 2, n)
    return normal(seed + 1, n, d) + signal * np.outer(2 * y - 1, np.eye(d)[0]), y
def ends(e): return np.array([e.value, e.lo, e.hi])


# two sets

@laws
@given(seed=seeds, n=st.integers(5, 40), m=st.integers(5, 40), d=st.integers(1, 6))
def test_mmd_is_the_unbiased_estimate_of_gretton(seed, n, m, d):
    x, y = normal(seed, n, d), normal(seed + 1, m, d) + .5
    k = lambda a, b: np.exp(-((a[:, None] - b)**2).sum(-1) / (2 * 1.5**2))
    by_hand = (k(x, x).sum() - n) / (n * (n - 1)) + (k(y, y).sum() - m) / (m * (m - 1)) - 2 * k(x, y).mean()
    e = mmd(x, y, bandwidth=1.5, permutations=20)
    assert np.isclose(e.value, by_hand) and e.lo <= e.value <= e.hi and 0 < e.p <= 1
    assert np.allclose(ends(e), ends(mmd(x @ (q := rotation(seed, d)) + 3, y @ q + 3, bandwidth=1.5, permutations=20)))        # rotation and shift of the space

def test_mmd_and_frechet_reach_the_closed_forms():
    x, y = normal(0, 2500, 4), normal(1, 2500, 4) + .5
    for e, truth in ((frechet(x, y, permutations=5), 4 * .25), (frechet(x, 2 * y - 1, permutations=5), 4.)): assert abs(e.value - truth) < .1 * truth and truth in e
    x, y = x[:500], y[:500]
    assert 2 * (4 / 6)**2 * (1 - np.exp(-1 / 12)) in mmd(x, y, bandwidth=2., permutations=5)

@laws
@given(seed=seeds, d=st.integers(1, 6))
def test_plain_frechet_is_the_formula(seed, d):
    "In the note of the estimate stands the value without remedy: scipy's square root gives the same."
    x, y = normal(seed, 60, d), normal(seed + 1, 50, d) * 1.5 + 1
    a, b = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    truth = ((x.mean(0) - y.mean(0))**2).sum() + np.trace(a + b - 2 * np.real(linalg.sqrtm(a @ b)))
    assert f"plain value {truth:.4g}," in frechet(x, y, components=d, permutations=1).policy

def test_equal_sets_average_to_nothing():
    "Unbiased, patients with several images included; and patients exchanged keep the level of the test."
    found = [(mmd(*(sides := (normal(s, 60, 4) + normal(s + 500, 15, 4)[patients(60, 4)], normal(s + 100, 40, 4) + normal(s + 900, 10, 4)[patients(40, 4)], patients(60, 4), 100 + patients(40, 4))), bandwidth=2., permutations=100),
              frechet(*sides, components=4, permutations=1), modality_gap(*(np.sign(s + .5) * v for v in sides[:2]), *sides[2:])) for s in range(60)]
    for which in (0, 1):
        v = np.array([f[which].value for f in found])
        assert abs(v.mean()) < 4 * v.std() / np.sqrt(len(v)) and (v < 0).any()
        assert np.mean([0 in f[which] for f in found]) >= .9
    assert stats.binom.sf(sum(f[0].p < .05 for f in found) - 1, 60, .05) > .001
    assert np.mean([f[2].value == 0 for f in found]) > .3 and all(f[2].lo >= 0 for f in found)

@laws
@given(seed=seeds, scale=st.floats(.1, 10))
def test_modality_gap_sees_directions_only(seed, scale):
    x, y = normal(seed, 30, 5) + 1, normal(seed + 1, 30, 5) - 1
    assert np.allclose(ends(modality_gap(x, y)), ends(modality_gap(scale * x @ (q := rotation(seed, 5)), y @ q)))
    opposite = modality_gap(np.tile(x[:1], (10, 1)), np.tile(-x[:1], (10, 1)))
    assert np.allclose(ends(opposite), 2)

def test_a_patient_on_both_sides_is_swapped_not_shuffled():
    "A small shift of every patient: seen when partners are known, lost in the spread of patients otherwise."
    x = 5 * normal(0, 40, 3)
    y, g = x + .3 + .1 * normal(1, 40, 3), np.arange(40)
    assert mmd(x, y, g, g, permutations=200).p < .02 < mmd(x, y, permutations=200).p

def test_classifier():
    v, y = labelled(0, 240, 6, 0)
    far = v + 3. * y[:, None]
    assert .5 in domain_classifier(v, y) and .5 not in domain_classifier(far, y) and 0 in domain_classifier(v, y, metric="a_distance")
    assert domain_classifier(far, y).value > .99 and domain_classifier(far, y, metric="a_distance").value > 1.9
    three = domain_classifier(v + 3 * np.eye(6)[np.arange(240) % 3], np.arange(240) % 3)
    assert three.value > .9 and three.null == .5
    g = patients(240, 8)                                   # domain drawn per patient, vectors are the patient: nothing to learn but who it is
    per, domain = normal(3, 30, 6)[g] + .01 * v, np.random.default_rng(4).permutation(np.arange(30) % 2)[g]
    assert domain_classifier(per, domain).value > .65 and .5 in domain_classifier(per, domain, g)


# neighbours

@laws
@given(seed=seeds, k=st.integers(1, 8), metric=st.sampled_from(["cosine", "euclidean"]))
def test_purity_is_what_scikit_learn_counts(seed, k, metric):
    v, y = labelled(seed)
    near = NearestNeighbors(n_neighbors=k + 1, metric=metric).fit(v).kneighbors(v, return_distance=False)[:, 1:]
    e = knn_purity(v, y, k, metric=metric)
    assert np.allclose(e.cases.purity, (y[near] == y[:, None]).mean(1)) and np.isclose(e.value, e.cases.purity.mean())
    size = np.bincount(y)[y]
    assert np.allclose(e.cases.chance, (size - 1) / (len(y) - 1)) and 0 <= e.lo <= e.value <= e.hi <= 1

@laws
@given(seed=seeds, each=st.integers(1, 5), k=st.integers(1, 6))
def test_no_neighbour_from_the_own_group(seed, each, k):
    "All images of a patient at one point, one label per patient: the own group must not be found. And the replicates are those of data without the block."
    g = np.repeat(np.arange(24), each)
    v, y = normal(seed, 24, 4)[g] + 1e-9 * normal(seed + 1, 24 * each, 4), np.arange(24)[g]
    e = knn_purity(v, y, k, g)
    assert e.value == 0 and e.null == 0
    y = np.random.default_rng(seed).integers(0, 2, 24 * each)
    v += normal(seed + 2, *v.shape)
    e = knn_purity(v, y, k, g, metric="euclidean")
    b = seed % (e.block.max() + 1)
    keep = e.block != b
    assert np.isclose(e.left[b], knn_purity(v[keep], y[keep], k, g[keep], metric="euclidean").value)

@laws
@given(seed=seeds, share=st.floats(.1, .9))
def test_random_labels_get_their_share(seed, share):
    rng = np.random.default_rng(seed)
    y = rng.random(200) < share
    assume(20 < y.sum() < 180)
    e = knn_purity(rng.standard_normal((200, 3)), y)
    assert abs(e.value - e.null) < .12 and abs(e.null - ((y.mean())**2 + (1 - y.mean())**2)) < .01

def test_queries_and_pool_are_kept_apart():
    v, y = labelled(3, 90)
    q, p = np.arange(90) < 30, np.arange(90) >= 30
    d = np.argsort(((v[q][:, None] - v[p])**2).sum(-1), 1)[:, :5]
    e = knn_purity(v, y, 5, queries=q, pool=np.flatnonzero(p), metric="euclidean")
    assert np.allclose(e.cases.purity, (y[p][d] == y[q][:, None]).mean(1)) and e.n == 30 and list(e.cases.row) == list(range(30))

@laws
@given(seed=seeds, labels=st.integers(2, 4), metric=st.sampled_from(["cosine", "euclidean"]))
def test_silhouette_is_the_textbooks(seed, labels, metric):
    v, y = normal(seed, 40, 4), np.arange(40) % labels
    v[:, 0] += y
    assert np.isclose(silhouette(v, y, metric=metric).value, silhouette_score(v, y, metric=metric))
    lonely = np.where(np.arange(40) == 0, 9, y)             # alone with its label: 0
    assert silhouette(v, lonely).cases.silhouette[0] == 0

def test_silhouette_leaves_the_patient_out():
    g = patients(120, 4)
    v, y = normal(0, 30, 8)[g] + .1 * normal(1, 120, 8), np.random.default_rng(2).integers(0, 2, 30)[g]
    assert silhouette(v, y).value > silhouette(v, y, g).value + .02 and 0 in silhouette(v, y, g)


# similarity

@laws
@given(seed=seeds, d=st.integers(2, 40), scale=st.floats(.01, 100), debiased=st.booleans())
def test_cka_does_not_see_rotation_scale_shift_or_order(seed, d, scale, debiased):
    x, y = normal(seed, 30, d), normal(seed + 1, 30, 3)
    y[:, 0] += x[:, 0]
    mine = cka_matrix([x], [y], debiased)[0, 0]
    again = np.random.default_rng(seed).permutation(30)
    assert np.isclose(mine, cka_matrix([scale * x @ rotation(seed, d) + 2], [y], debiased)[0, 0]) and np.isclose(mine, cka_matrix([x[again]], [y[again]], debiased)[0, 0])
    assert np.isclose(cka_matrix([x], [x], debiased)[0, 0], 1) and mine <= 1 + 1e-9

def test_cka_against_its_definitions():
    "Features route of Kornblith, and the unbiased HSIC as Song et al. write it."
    x, y = normal(0, 25, 4), normal(1, 25, 6)
    y[:, :4] += x
    a, b = x - x.mean(0), y - y.mean(0)
    assert np.isclose(cka_matrix([x], [y], False)[0, 0], np.linalg.norm(b.T @ a)**2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b))
    def hsic(k, l):
        k, l, n, one = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), len(k), np.ones(len(k))
        return (np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3))
    k, l = x @ x.T, y @ y.T
    assert np.isclose(cka(x, y).value, hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)))
    assert np.allclose(cka_matrix([x, y], [y, x, x]), np.array([[0, 1, 1], [1, 0, 0]]) + cka(x, y).value * np.array([[1, 0, 0], [0, 1, 1]]))

def test_unrelated_tables():
    found = [(cka(normal(s, 40, 60), normal(s + 500, 40, 80)), cka_matrix([normal(s, 40, 60)], [normal(s + 500, 40, 80)], False)[0, 0]) for s in range(30)]
    v = np.array([e.value for e, _ in found])
    assert abs(v.mean()) < 4 * v.std() / np.sqrt(30) and np.mean([0 in e for e, _ in found]) > .85 and min(b for _, b in found) > .4

@laws
@given(seed=seeds, scale=st.floats(.1, 10))
def test_alignment_and_uniformity(seed, scale):
    x, y = normal(seed, 40, 6), normal(seed + 1, 40, 6)
    u, w = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    a, f = alignment(scale * x, y), uniformity(scale * x)
    d = ((u[:, None] - w)**2).sum(-1)
    assert np.isclose(a.value, np.trace(d) / 40) and np.isclose(a.null, d[~np.eye(40, dtype=bool)].mean())
    between = ((u[:, None] - u)**2).sum(-1)[np.triu_indices(40, 1)]
    assert np.isclose(f.value, np.log(np.exp(-2 * between).mean()))
    assert np.isclose(alignment(x, x).value, 0) and np.isclose(alignment(x, -x).value, 4)

def test_even_on_the_sphere():
    "The closed form against vectors drawn evenly."
    for d in (2, 3, 20): assert abs((e := uniformity(normal(d, 1500, d))).value - e.null) < .03


# intervals

def test_left_out_blocks_are_whole_patients_and_every_side_is_dealt():
    x, y = normal(0, 90, 3), normal(1, 36, 3)
    e = mmd(x, y, patients(90, 3), 1000 + patients(36, 3), bandwidth=2., permutations=1)
    g = np.r_[patients(90, 3), 1000 + patients(36, 3)]
    assert pd.Series(e.block).groupby(g).nunique().max() == 1 and e.block.max() + 1 == 12 == len(e.left)
    assert set(e.block[:90]) == set(e.block[90:]) == set(range(12)) and e.groups == 42
    b = e.block == 3
    assert np.isclose(e.left[3], mmd(x[~b[:90]], y[~b[90:]], patients(90, 3)[~b[:90]], 1000 + patients(36, 3)[~b[90:]], bandwidth=2., permutations=1).value)

@pytest.mark.parametrize("measure", [lambda v, y, g: knn_purity(v, y, 5, g), lambda v, y, g: silhouette(v, y, g), lambda v, y, g: alignment(v, v + normal(int(1000 * v[0, 0]) % 99, *v.shape), g), lambda v, y, g: uniformity(v + 1, g)])
def test_coverage(measure):
    found = [measure(labelled(s)[0] + normal(s + 7000, 30, 5)[patients(60)], labelled(s)[1], patients(60)) for s in range(60)]
    truth = np.mean([e.value for e in found])
    assert stats.binom.cdf(sum(truth in e for e in found), 60, .95) > .001

def test_change_is_paired():
    "A model against itself: exactly nothing. Against a better one: a narrower interval than that of two strangers."
    v, y = labelled(0, 120)
    a, b = knn_purity(v, y), knn_purity(v + np.outer(2 * y - 1, np.eye(5)[1]), y)
    assert np.all(ends(change(a, a)) == 0)
    c = change(a, b)
    assert np.isclose(c.value, b.value - a.value) and c.lo > 0 and c.hi - c.lo < np.hypot(a.hi - a.lo, b.hi - b.lo)

@pytest.mark.parametrize("level", [.5, .8, .99])
def test_level(level):
    v, y = labelled(1)
    wide, narrow = silhouette(v, y), silhouette(v, y, level=level)
    assert ((narrow.hi - narrow.lo) < (wide.hi - wide.lo)) == (level < .95) and f"{level:.0%}" in narrow.policy


# semantics or centres

def planted(seed, before, after, n=180, d=6):
    rng = np.random.default_rng(seed)
    y, c, noise = rng.integers(0, 2, n), np.arange(n) % 3, rng.standard_normal((n, d))
    make = lambda semantic, centre: noise + np.outer(2 * y - 1, np.eye(d)[0]) * semantic + np.outer(c - 1, np.eye(d)[1]) * centre
    return make(*before), make(*after), y, c, np.arange(n)

@pytest.mark.parametrize("seed", range(3))
def test_planted_answers_both_ways(seed):
    forth, back = semantics_or_centres(*planted(seed, (.2, 3), (1.5, .2))[:4], 2), semantics_or_centres(*planted(seed, (1.5, .2), (.2, 3))[:4], 2)
    assert forth.table.loc["class, across centres", "change_lo"] > 0 > forth.table.loc["centre", "change_hi"]
    assert back.table.loc["class, across centres", "change_hi"] < 0 < back.table.loc["centre", "change_lo"]
    assert np.allclose(forth.table.change, -back.table.change) and "rose" in forth.verdict and "fell" in back.verdict
    same = semantics_or_centres(*planted(seed, (1, 1), (1, 1))[:4], 2)
    assert (same.table[["change", "change_lo", "change_hi"]] == 0).all().all() and same.verdict.count("cannot be told") == 2

def test_rows_are_those_of_purity_and_ready_for_a_run():
    a, b, y, c, _ = planted(5, (.5, 1), (1, .5))
    found = semantics_or_centres(a, b, y, c, 1, patients(180), k=7)
    there = c == 1
    for q, what, queries, pool in (("class, across centres", y, there, ~there), ("class, within the unseen centre", y, there, there), ("centre", c, None, None)):
        for side, v in (("before", a), ("after", b)):
            e = knn_purity(v, what, 7, patients(180), queries, pool)
            assert np.isclose(found.table.loc[q, side], e.value) and np.isclose(found.table.loc[q, "chance"], e.null) and np.allclose(found.cases.loc[e.cases.row, f"{q}: {side}"], e.cases.purity)
    r = found.table.loc["centre"]
    assert np.isclose(found.table.loc["centre, above chance", "after"], (r.after - r.chance) / (1 - r.chance), atol=1e-3)
    m = found.to_metrics()
    assert len(m) == 12 and all({"value", "lo", "hi", "n", "groups", "null", "policy"} == set(x) and x["lo"] <= x["value"] <= x["hi"] for x in m.values())
    assert found.cases["class, across centres: before"].notna().sum() == there.sum() and len(found.figure().axes) == 2 and "class, across centres" in found._repr_html_()


# refusals and faces

V, Y = labelled(0)
@pytest.mark.parametrize("ask, says", [
    (lambda: mmd(V, V[:, :2]), "one space"), (lambda: mmd(V[0], V), "table"), (lambda: mmd(V * np.nan, V), "not finite"), (lambda: mmd(V, V, np.arange(60)), "give both"), (lambda: mmd(V, V[:2]), "3 at least"),
    (lambda: mmd(0 * V, 0 * V), "bandwidth"), (lambda: frechet(V, V[:8], components=5), "components=5"), (lambda: modality_gap(V, 0 * V), "length 0"), (lambda: knn_purity(V, Y, 60), "k=60"), (lambda: knn_purity(V, Y, 0), "k=0"),
    (lambda: knn_purity(V, Y[:9]), "labels"), (lambda: knn_purity(V, [None, *Y[1:]]), "empty"), (lambda: knn_purity(V, Y, metric="l1"), "l1"), (lambda: knn_purity(V, Y, queries=np.zeros(60, bool)), "picks no"), (lambda: knn_purity(V, Y, pool=np.ones(3, bool)), "pool"),
    (lambda: knn_purity(V, Y, groups=0 * Y), "2 at least"), (lambda: silhouette(V, 0 * Y), "two"), (lambda: domain_classifier(V, 0 * Y), "two"), (lambda: domain_classifier(V, Y, patients(60, 20)), "folds"), (lambda: domain_classifier(V, Y, metric="f1"), "f1"),
    (lambda: cka(V, V[:9]), "same images"), (lambda: cka_matrix([V[:3]], [V[:3]]), "needs 4"), (lambda: cka(V, 0 * V), "equal"), (lambda: alignment(V, V[:9]), "pairs"), (lambda: uniformity(V, 0 * Y), "3 at least"), (lambda: silhouette(V, Y, level=95), "level"),
    (lambda: change(knn_purity(V, Y), silhouette(V, Y)), "one measure"), (lambda: change(knn_purity(V, Y), knn_purity(V, Y, seed=1)), "no pairs"), (lambda: semantics_or_centres(V, V, Y, Y, 7), "7"), (lambda: semantics_or_centres(V, V[:9], Y, Y, 1), "same order")])
def test_refusals_name_the_field(ask, says):
    with pytest.raises(ValueError, match=says) as e: ask()
    assert "\n" not in str(e.value)

def test_faces():
    e = knn_purity(V, Y)
    assert isinstance(e, GapEstimate) and float(e) == e.value and e.value in e and "p" not in e.to_dict() and "p" in mmd(V, V + 1, permutations=9).to_dict()
    assert f"{e.value:.3f}" in e._repr_html_() and f"{e.null:.3f}" in str(e) and all(isinstance(x, (int, float, str)) for x in e.to_dict().values())
