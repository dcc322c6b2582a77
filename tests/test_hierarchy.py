"""Intervals over seeds and cases hold what they promise; verdicts, ranks and critical differences are those of the books."""
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy.stats import studentized_range, t as student, ttest_1samp

from htlab.evaluate import paired_pooled, summarise_pooled
from htlab.hierarchy import _ends, _error, critical_difference, friedman, hierarchical, hierarchical_paired, verdict

laws = settings(max_examples=25, deadline=None, derandomize=True)


def frames(y, metric="score", groups=None, **more):
    "One frame of cases for each row of y (seeds, cases)."
    who = dict(id=[f"c{i}" for i in range(y.shape[1])], group=np.arange(y.shape[1]) if groups is None else groups, policy="diagonal")
    return [pd.DataFrame(who | more | {metric: v}) for v in y]


def values(seed, seeds=3, cases=30, sd_seed=.03): # (seeds, cases), true mean 0.7
    rng = np.random.default_rng(seed)
    return .7 + .15 * rng.standard_normal(cases) + sd_seed * rng.standard_normal((seeds, 1)) + .05 * rng.standard_normal((seeds, cases))


def probabilities(seed, seeds=3, n=40):
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    p = 1 / (1 + np.exp(-(label * rng.uniform(.5, 1.5, (seeds, 1)) + rng.standard_normal(n) + .3 * rng.standard_normal((seeds, n)))))
    return [pd.DataFrame(dict(id=np.arange(n).astype(str), group=np.arange(n), label=np.where(label, "malignant", "benign"), y=label, p_0=1 - q, p_1=q, pred=(q > .5).astype(int))) for q in p]


# the interval

@laws
@given(seed=st.integers(0, 999), seeds=st.integers(2, 5), shift=st.floats(-3, 3), scale=st.floats(.1, 9))
def test_the_interval_moves_and_stretches_with_the_values(seed, seeds, shift, scale):
    y = values(seed, seeds)
    a, b = (hierarchical(frames(v), "score", n_boot=200) for v in (y, shift + scale * y))
    for k in ("value", "lo", "hi"): assert b[k] == pytest.approx(shift + scale * a[k], abs=1e-9)
    for k in ("seed_sd", "case_sd"): assert b[k] == pytest.approx(scale * a[k])
    down = hierarchical(frames(-y), "score", n_boot=200)
    assert (down["lo"], down["hi"]) == pytest.approx((-a["hi"], -a["lo"])), "no side is preferred"


@laws
@given(seed=st.integers(0, 999), seeds=st.integers(2, 5), order=st.randoms())
def test_order_of_seeds_and_of_cases_decides_nothing(seed, seeds, order):
    runs = frames(values(seed, seeds))
    mixed = [r if i == 0 else r.sample(frac=1, random_state=seed) for i, r in enumerate(runs)]
    first, rest = mixed[0], mixed[1:]; order.shuffle(rest)
    assert hierarchical([first, *rest], "score", n_boot=100) == pytest.approx(hierarchical(runs, "score", n_boot=100))


@laws
@given(seed=st.integers(0, 999), more=st.floats(1.5, 5))
def test_more_spread_over_seeds_widens_and_none_leaves_the_cases(seed, more):
    y = values(seed)
    wide = y + (more - 1) * (y.mean(1, keepdims=True) - y.mean())
    alike = np.repeat(y[:1], 3, 0)
    a, b, same, one = (hierarchical(frames(v), "score", n_boot=200) for v in (y, wide, alike, y[:1]))
    assert b["hi"] - b["lo"] > a["hi"] - a["lo"] and b["value"] == pytest.approx(a["value"]) and b["seed_sd"] == pytest.approx(more * a["seed_sd"])
    assert (same["lo"], same["hi"]) == pytest.approx((one["lo"], one["hi"])) and one["over"] == "cases" and math.isnan(one["seed_sd"]) and same["over"] == "cases and seeds"


def test_the_two_parts_are_those_of_the_books():
    y = values(4, 4, 200, .05)
    h = hierarchical(frames(y), "score", n_boot=20_000)
    half = (h["hi"] - h["lo"]) / 2
    by_cases = student.ppf(.975, 199) * y.mean(0).std(ddof=1) / math.sqrt(200)   # the bootstrap, expanded, comes near the t interval
    by_seeds = student.ppf(.975, 3) * y.mean(1).std(ddof=1) / 2
    assert half == pytest.approx(math.hypot(by_cases, by_seeds), rel=.02)
    few = hierarchical(frames(values(1, 1, 8)), "score", n_boot=50_000)
    v = values(1, 1, 8)[0]
    assert (few["hi"] - few["lo"]) / 2 == pytest.approx(student.ppf(.975, 7) * v.std(ddof=1) / math.sqrt(8), rel=.12), "expanded: also for 8 groups"
    ordinary = summarise_pooled(frames(values(1, 1, 8)), ["score"]).loc["score"]
    assert few["hi"] - few["lo"] > ordinary.hi - ordinary.lo


@pytest.mark.parametrize("seeds, ratio", [(2, 0), (2, 1), (2, 3), (3, 1), (5, 1), (5, 3)])
def test_coverage(seeds, ratio):
    "95 % hold the truth, and not so without the seeds where they vary."
    rng, draws, hits = np.random.default_rng(seeds), np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), 300), []
    for _ in range(400):
        y = values(rng, seeds, 30, ratio * .15 * math.sqrt(seeds / 30))
        boot = draws @ y.mean(0) / 30
        hits.append([lo <= .7 <= hi for lo, hi in (_ends(y.mean(), boot, errors, 30, .95) for errors in (_error(y.mean(1)), []))])
    both, cases = np.mean(hits, 0)
    assert both >= .95 - 2.5 * math.sqrt(.95 * .05 / 400)
    assert ratio == 0 or cases < .92


@pytest.mark.parametrize("metric", ["auroc", "f1", "accuracy", "brier"])
def test_metrics_of_the_whole_set(metric):
    runs = probabilities(0)
    h, s = hierarchical(runs, metric), summarise_pooled(runs, [metric]).loc[metric]
    assert h["value"] == pytest.approx(s.value) and h["seed_sd"] == pytest.approx(s.seed_sd) and h["n"] == 40
    assert 0 <= h["lo"] <= s.lo < h["value"] < s.hi <= h["hi"] <= 1, "wider than the interval over cases, and within 0 and 1"


def test_unscored_cases_and_groups():
    y = values(0, 2, 6, .01); y[1, 0] = np.nan
    h = hierarchical(frames(y, groups=[0, 0, 1, 1, 2, 2]), "score")
    assert (h["n"], h["groups"]) == (5, 3) and h["value"] == pytest.approx(y[:, 1:].mean())
    alone = hierarchical(frames(y, groups=[0] * 6), "score")
    assert math.isnan(alone["lo"]) and math.isnan(alone["hi"]) and alone["value"] == h["value"], "one group: nothing is known about others"
    assert hierarchical(frames(np.full((2, 5), 3.), "hd95"), "hd95")["lo"] == 3 and hierarchical(frames(np.array([[0., 9, 1, 2], [8, 9, 1, 0]]), "hd95"), "hd95")["lo"] == 0, "no distance below 0"


@pytest.mark.parametrize("call, says", [
    (lambda r: hierarchical([], "score"), "no cases"), (lambda r: hierarchical(r, "auroc"), "needs the probabilities"), (lambda r: hierarchical(r, "nope"), "no metric 'nope'"),
    (lambda r: hierarchical([r[0], r[1][1:]], "score"), "differ in 1 id"), (lambda r: hierarchical(r, "score", level=95), "level=95: give a number between 0 and 1"), (lambda r: hierarchical(r, "score", n_boot=0), "n_boot=0"),
    (lambda r: hierarchical([r[0].assign(score=np.nan), r[1]], "score"), "no case is scored"), (lambda r: hierarchical_paired(r, [], "score"), "one of the two lists is empty"),
    (lambda r: hierarchical_paired(r, r[:1], "score", same_seeds=True), "same_seeds=True, but there are 3 and 1 runs"), (lambda r: verdict(0, -1, 1, better="more"), "better='more'"), (lambda r: verdict(2, -1, 1), "outside of its interval"),
    (lambda r: friedman(pd.DataFrame(np.eye(3)[:, :2])), "3 rows and 2 methods"), (lambda r: critical_difference(pd.DataFrame(np.eye(3)), alpha=5), "alpha=5"), (lambda r: friedman(pd.DataFrame([[1, 2, np.nan]] * 3)), "row 0 has a value")])
def test_errors_in_one_line(call, says):
    with pytest.raises(ValueError, match=says) as e: call(frames(values(0)))
    assert "\n" not in str(e.value)


# two methods

@laws
@given(seed=st.integers(0, 999), seeds=st.integers(1, 4), effect=st.floats(-.2, .2))
def test_a_minus_b_is_minus_b_minus_a_and_p_says_what_the_interval_says(seed, seeds, effect):
    y = values(seed, seeds); z = effect + y + .02 * np.random.default_rng(seed + 1).standard_normal(y.shape) + .01 * np.random.default_rng(seed + 2).standard_normal((seeds, 1))
    a, b = frames(y), frames(z)
    d, back = hierarchical_paired(a, b, "score", n_boot=300), hierarchical_paired(b, a, "score", n_boot=300)
    assert (d["diff"], d["lo"], d["hi"]) == pytest.approx((-back["diff"], -back["hi"], -back["lo"])) and d["p"] == pytest.approx(back["p"], rel=1e-3) and d["diff"] == pytest.approx(d["a"] - d["b"])
    for level in (.5, .8, .95):
        wide = hierarchical_paired(a, b, "score", level=level, n_boot=300)
        assume(abs(d["p"] - (1 - level)) > 1e-6)
        assert (d["p"] < 1 - level) == (not wide["lo"] <= 0 <= wide["hi"])
    pooled = paired_pooled(a, b, "score", n_boot=300)
    assert d["p_cases"] == pooled["p"] and d["diff"] == pytest.approx(pooled["diff"]) and d["seeds"] == seeds and d["test"] == ("cases and seeds" if seeds > 1 else "cases")


def test_pairing_of_seeds():
    shared = np.array([[.1], [-.1], [0]])
    y = values(0, 3, 40, 0) + shared
    a, b = frames(y + .05), frames(y)
    paired, loose, uneven = hierarchical_paired(a, b, "score"), hierarchical_paired(a, b, "score", same_seeds=False), hierarchical_paired(a, b[:2], "score")
    assert paired["seed_sd"] == pytest.approx(0) and paired["diff"] == pytest.approx(.05) and (paired["lo"], paired["hi"]) == pytest.approx((.05, .05))
    assert loose["hi"] - loose["lo"] > .3 and math.isnan(loose["seed_sd"]) and uneven["seeds"] == 2 and math.isnan(uneven["seed_sd"])
    whole = hierarchical_paired(probabilities(0), probabilities(0)[::-1], "auroc", same_seeds=False)
    assert whole["diff"] == pytest.approx(0, abs=1e-12) and whole["p"] == pytest.approx(1) and whole["test_cases"] == "bootstrap"


def test_of_few_seeds_it_agrees_with_the_t_test_where_cases_do_not_vary():
    y = np.random.default_rng(0).normal(.05, .04, (5, 1)) + np.zeros((5, 20))
    d = hierarchical_paired(frames(.7 + y), frames(.7 + 0 * y), "score", n_boot=4000)
    assert d["p"] == pytest.approx(ttest_1samp(y[:, 0], 0).pvalue, rel=.01)


# verdicts

@given(diff=st.floats(-1, 1), down=st.floats(0, 1), up=st.floats(0, 1), margin=st.floats(-1, 1))
def test_verdicts(diff, down, up, margin):
    lo, hi = diff - down, diff + up
    said = verdict(diff, lo, hi, margin)
    assert said == ("supported" if lo > margin else "not supported" if hi <= margin else "undecided")
    assert said == verdict(-diff, -hi, -lo, margin, better="lower"), "a lower distance is a better one"
    assert verdict(diff, math.nan, math.nan, margin) == "undecided"


# ranks

def test_friedman_and_nemenyi_by_hand():
    perfect = pd.DataFrame(np.tile([.9, .8, .7], (10, 1)), columns=list("abc"))
    f, c = friedman(perfect), critical_difference(perfect)
    assert f["ranks"] == dict(a=1, b=2, c=3) and f["chi2"] == pytest.approx(20) and math.isinf(f["f"])     # 12 n / (k (k + 1)) (1 + 4 + 9 - 12) = 20
    assert c.cd == pytest.approx(2.343 * math.sqrt(12 / 60), abs=1e-3)   # q of three methods: Demsar's table 5
    assert c.cliques == (("a", "b"), ("b", "c")), "neighbours are one rank apart, less than the critical difference of 1.05"
    many = critical_difference(pd.concat([perfect] * 4))
    assert many.cliques == () and "none" in many._repr_html_()
    alike = friedman(pd.DataFrame(np.ones((5, 3))))
    assert (alike["chi2"], alike["p"]) == (0, 1) and list(alike["ranks"].values()) == [2, 2, 2]
    assert critical_difference(perfect, better="lower").ranks.index[0] == "c"


@laws
@given(seed=st.integers(0, 999), n=st.integers(2, 30), k=st.integers(3, 7))
def test_ranks_are_ranks(seed, n, k):
    t = pd.DataFrame(np.random.default_rng(seed).integers(0, 6, (n, k)), columns=[f"m{i}" for i in range(k)])
    c = critical_difference(t)
    assert c.ranks.sum() == pytest.approx(k * (k + 1) / 2) and c.ranks.is_monotonic_increasing and 0 <= c.p <= 1
    assert critical_difference(np.exp(t)).ranks.equals(c.ranks), "only the order within a row counts"
    together = {(a, b) for q in c.cliques for a in q for b in q}
    for a in t:
        for b in t: assert a == b or ((a, b) in together) == (abs(c.ranks[a] - c.ranks[b]) <= c.cd)
    assert not any(set(q) < set(r) for q in c.cliques for r in c.cliques)
    assert c.cd == pytest.approx(studentized_range.ppf(.95, k, np.inf) * math.sqrt(k * (k + 1) / (12 * n)))
    words = [x.get_text() for x in c.figure().axes[0].texts]
    assert all(any(m in w for w in words) for m in t)
