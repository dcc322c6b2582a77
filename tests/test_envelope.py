"Laws of the envelope page: densities, nesting, equivariance, intervals, the test of fit, compression."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats

from htlab.envelope import (LAWS, Compression, Fit, _covariance, _expected, _statistics, decompress, envelope_cdf, envelope_pdf, envelope_sample, estimate_compression, fit_all, fit_envelope,
                            show_fits)
from htlab.speckle import log_compress

SCALE = {law: names[-1] for law, names in LAWS.items()}
PARAMS = {"rayleigh": dict(sigma=st.floats(.1, 10)), "rician": dict(k=st.floats(0, 8), power=st.floats(.1, 10)), "nakagami": dict(m=st.floats(.5, 8), omega=st.floats(.1, 10)),
          "k": dict(alpha=st.floats(.6, 120), power=st.floats(.1, 10)), "homodyned-k": dict(alpha=st.floats(.6, 120), k=st.floats(0, 5), power=st.floats(.1, 10))}
ANY = st.sampled_from(sorted(LAWS)).flatmap(lambda law: st.tuples(st.just(law), st.fixed_dictionaries(PARAMS[law])))
RNG = np.random.default_rng


def power(law, p): return 2 * p["sigma"]**2 if law == "rayleigh" else p[SCALE[law]]


@given(ANY)
@settings(max_examples=40, deadline=None)
def test_density_and_distribution_function_belong_together(case):
    law, p = case
    unit = power(law, p)**.5
    x = np.linspace(0, 12, 2401)[1:] * unit
    density, cdf = envelope_pdf(law, x, **p), envelope_cdf(law, x, **p)
    assert (density >= 0).all() and (np.diff(cdf) > -1e-7).all() and cdf[-1] == pytest.approx(1, abs=1e-4)
    away = 40   # near 0, and near the steady echo of a homodyned K with alpha below 1, the density is steep
    if p.get("alpha", 1) >= 1 or not p.get("k"): assert integrate.simpson(density[away:], x=x[away:]) == pytest.approx(1 - cdf[away], abs=2e-3)
    assert envelope_pdf(law, x * 3, **p | {SCALE[law]: p[SCALE[law]] * (3 if law == "rayleigh" else 9)}) == pytest.approx(density / 3)
    assert envelope_pdf(law, np.array([-unit, 0.]), **p)[0] == 0


@pytest.mark.parametrize("law,p", [("rayleigh", dict(sigma=2.)), ("rician", dict(k=2., power=3.)), ("nakagami", dict(m=.6, omega=3.)), ("k", dict(alpha=1.5, power=3.)), ("k", dict(alpha=90., power=1.)),
                                   ("homodyned-k", dict(alpha=1., k=1., power=3.)), ("homodyned-k", dict(alpha=.4, k=3., power=1.)), ("homodyned-k", dict(alpha=np.inf, k=1., power=1.))])
def test_draws_follow_the_distribution_function(law, p):
    a = envelope_sample(law, 4000, RNG(0), **p)
    assert stats.kstest(a, lambda x: envelope_cdf(law, x, **p)).pvalue > .001
    assert (a**2).mean() == pytest.approx(power(law, p), rel=.15)
    assert envelope_sample(law, (3, 5), RNG(0), **p).shape == (3, 5)


@given(st.floats(.3, 40), st.floats(.05, 6), st.floats(.2, 5))
@settings(max_examples=40, deadline=None)
def test_laws_are_nested(alpha, k, omega):
    x = np.linspace(.02, 4, 60) * omega**.5
    same = lambda a, b: np.testing.assert_allclose(envelope_pdf(a[0], x, **a[1]), envelope_pdf(b[0], x, **b[1]), rtol=2e-3, atol=1e-6)
    rayleigh = "rayleigh", dict(sigma=(omega / 2)**.5)
    same(("rician", dict(k=0, power=omega)), rayleigh)
    same(("nakagami", dict(m=1, omega=omega)), rayleigh)
    same(("k", dict(alpha=np.inf, power=omega)), rayleigh)
    same(("homodyned-k", dict(alpha=np.inf, k=k, power=omega)), ("rician", dict(k=k, power=omega)))
    same(("homodyned-k", dict(alpha=alpha, k=0, power=omega)), ("k", dict(alpha=alpha, power=omega)))
    # the limits are approached, not only written down
    np.testing.assert_allclose(envelope_pdf("homodyned-k", x, alpha=max(alpha, 1), k=1e-4, power=omega), envelope_pdf("k", x, alpha=max(alpha, 1), power=omega), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(envelope_pdf("k", x, alpha=5000, power=omega), envelope_pdf(*rayleigh[:1], x, **rayleigh[1]), rtol=.05, atol=1e-3)


@given(st.floats(.1, 5), st.floats(0, 6), st.floats(.5, 6))
@settings(max_examples=30, deadline=None)
def test_scipy_has_the_same_three(sigma, k, m):
    x = np.linspace(.01, 4, 50)
    np.testing.assert_allclose(envelope_pdf("rayleigh", x, sigma=sigma), stats.rayleigh.pdf(x, scale=sigma), atol=1e-12)
    np.testing.assert_allclose(envelope_cdf("rician", x, k=k, power=sigma**2 * (2 + k**2)), stats.rice.cdf(x, k, scale=sigma), atol=1e-9)
    np.testing.assert_allclose(envelope_pdf("nakagami", x, m=m, omega=sigma**2), stats.nakagami.pdf(x, m, scale=sigma), atol=1e-12)


@pytest.mark.parametrize("law,shape", [("rayleigh", {}), ("rician", dict(k=.7)), ("rician", dict(k=5.)), ("nakagami", dict(m=.6)), ("k", dict(alpha=2.)), ("homodyned-k", dict(alpha=3., k=1.)), ("homodyned-k", dict(alpha=30., k=4.))])
def test_means_and_covariances_of_the_statistics_are_those_of_draws(law, shape):
    scale = dict(sigma=.5**.5) if law == "rayleigh" else {SCALE[law]: 1.}
    t = _statistics(envelope_sample(law, (1500, 1000), RNG(0), **shape, **scale))
    error = (np.diag(_covariance(**shape)) / 1000)**.5
    assert (abs(t.mean(0) - [0, *np.log(_expected(**shape))]) < .2 * error).all()   # 1500 means scatter by 0.026, the bias in samples of 1000 is smaller than a tenth
    root = np.linalg.cholesky(_covariance(**shape) / 1000)
    whitened = np.linalg.solve(root, (t - t.mean(0)).T)
    np.testing.assert_allclose(whitened @ whitened.T / 1500, np.eye(3), atol=.2)    # scatter of a variance: (2 / 1500)^1/2 = 0.037; heavy tails more


@pytest.mark.parametrize("seed", range(3))
def test_fits_agree_with_the_maximum_likelihood_of_scipy(seed):
    a = envelope_sample("rician", 2000, RNG(seed), k=1.5, power=5.)
    fit = fit_all(a, laws=("rayleigh", "nakagami", "rician"), intervals=False)
    assert fit["rayleigh"].params["sigma"] == pytest.approx(stats.rayleigh.fit(a, floc=0)[1], rel=1e-3)
    m, _, scale = stats.nakagami.fit(a, floc=0)
    assert fit["nakagami"].params["m"] == pytest.approx(m, rel=1e-3) and fit["nakagami"].params["omega"] == pytest.approx(scale**2, rel=1e-3)
    k, _, sigma = stats.rice.fit(a, floc=0)   # ours is not maximum likelihood here, but nearly as good
    assert fit["rician"].params["k"] == pytest.approx(k, rel=.05)
    assert stats.rice.logpdf(a, k, 0, sigma).sum() - 1 < fit["rician"].loglik <= stats.rice.logpdf(a, k, 0, sigma).sum() + 1e-6


@given(st.sampled_from(sorted(LAWS)), st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_gain_changes_the_scale_and_nothing_else(law, gain, seed):
    a = envelope_sample("homodyned-k", 120, RNG(seed), alpha=3., k=.8, power=1.)
    one, two = fit_envelope(a, law, 80, simulations=0), fit_envelope(a * gain, law, 80, simulations=0)
    for name in LAWS[law]:
        factor = 1 if name != SCALE[law] else gain if law == "rayleigh" else gain**2
        np.testing.assert_allclose([two.params[name], *two.interval[name]], np.multiply([one.params[name], *one.interval[name]], factor), rtol=1e-4, atol=1e-4)
    assert two.ks == pytest.approx(one.ks, abs=1e-6)


@given(st.sampled_from(sorted(LAWS)), st.integers(10, 400), st.integers(0, 9999), st.floats(.3, 30), st.floats(0, 4))
@settings(max_examples=40, deadline=None)
def test_estimates_lie_in_their_intervals_which_narrow_with_n_eff(law, n, seed, alpha, k):
    a = envelope_sample("homodyned-k", n, RNG(seed), alpha=alpha, k=k, power=1.)
    try: one = fit_envelope(a, law, simulations=0)
    except ValueError as e: assert "hardly vary" in str(e); return
    for name, value in one.params.items(): assert one.interval[name][0] <= value <= one.interval[name][1]
    fewer = fit_envelope(a, law, 10, simulations=0)
    for name in one.params:   # up to the grid of the search
        (a1, b1), (a2, b2) = one.interval[name], fewer.interval[name]
        assert a2 <= a1 * 1.02 + .01 and b2 >= b1 * .98 - .01
    assert fewer.params == one.params and fewer.loglik == one.loglik and fewer.n_eff == 10


@pytest.mark.parametrize("law,p", [("rayleigh", dict(sigma=2.)), ("rician", dict(k=2., power=1.)), ("nakagami", dict(m=.8, omega=1.)), ("k", dict(alpha=2., power=1.)), ("homodyned-k", dict(alpha=2., k=1., power=1.))])
def test_estimates_converge_and_intervals_cover(law, p):
    large = fit_envelope(envelope_sample(law, 200_000, RNG(1), **p), law, simulations=0)
    for name, value in p.items():
        assert large.params[name] == pytest.approx(value, rel=.06)
        assert large.interval[name][1] - large.interval[name][0] < .2 * value
    seeds = 40
    found = [fit_envelope(envelope_sample(law, 150, RNG([s, 3]), **p), law, simulations=0) for s in range(seeds)]
    for name, value in p.items():
        inside = sum(f.interval[name][0] <= value <= f.interval[name][1] for f in found)
        assert stats.binom.cdf(inside, seeds, .95) > 1e-3


def test_open_ends_are_open():
    rayleigh = envelope_sample("rayleigh", 400, RNG(2), sigma=1.)
    k, rice = fit_envelope(rayleigh, "k", simulations=0), fit_envelope(rayleigh, "rician", simulations=0)
    assert k.interval["alpha"][0] > 3 and k.interval["alpha"][1] == np.inf and rice.interval["k"][0] == 0
    assert fit_envelope(envelope_sample("rician", 400, RNG(2), k=3., power=1.), "k", simulations=0).params["alpha"] == np.inf


def test_p_is_uniform_under_the_law_and_small_under_another():
    true = [fit_envelope(envelope_sample("rayleigh", 60, RNG([s, 1]), sigma=1.), "rayleigh", simulations=99).p for s in range(150)]
    assert stats.kstest(true, "uniform").pvalue > .001
    false = [fit_envelope(envelope_sample("k", 300, RNG([s, 1]), alpha=1., power=1.), "rayleigh", simulations=99).p for s in range(10)]
    assert max(false) <= .05
    a = envelope_sample("homodyned-k", 200, RNG(5), alpha=2., k=1., power=1.)
    assert fit_envelope(a, "homodyned-k").p > .01 and fit_envelope(a, "homodyned-k").p == fit_envelope(a, "homodyned-k").p


def test_what_a_fit_shows():
    fits = fit_all(envelope_sample("k", 200, RNG(0), alpha=2., power=1.), 150, laws=("rayleigh", "k"), simulations=19)
    html = fits._repr_html_() + fits["k"]._repr_html_()
    assert all(word in html for word in ("alpha", "sigma", "KS", "150", "95 %")) and html.index("k</td>") < html.index("rayleigh")
    bare = fit_envelope(envelope_sample("k", 200, RNG(0), alpha=2., power=1.), "k", intervals=False)
    assert np.isnan(bare.interval["alpha"]).all() and np.isnan(bare.p) and "–" in bare._repr_html_()
    ax = show_fits(np.ones(20) + np.arange(20) / 20, fits)
    assert [line.get_label() for line in ax.lines] == ["rayleigh", "k"]
    assert isinstance(fits["k"], Fit) and fits["k"].cdf(np.array([0., 1e3])) == pytest.approx([0, 1])


GOOD = np.linspace(.1, 2, 50)


@pytest.mark.parametrize("samples,kw,words", [
    (np.full(50, 2.), {}, "hardly vary"), (np.zeros(50), {}, "50 zeros"), (-GOOD, {}, "magnitude"), (np.r_[GOOD, np.nan, np.inf], {}, "2 values that are not finite"), (GOOD[:9], {}, "at least 10"),
    (GOOD, dict(n_eff=51), "n_eff must be between 10"), (GOOD, dict(n_eff=3), "n_eff must be between 10"), (GOOD, dict(law="nakagmi"), "did you mean 'nakagami'"), (GOOD, dict(law="weibull"), "choose from")])
def test_bad_samples_are_named(samples, kw, words):
    with pytest.raises(ValueError, match=words): fit_envelope(**dict(samples=samples, law="k") | kw)


@pytest.mark.parametrize("law,p,words", [("k", dict(alpha=1.), "alpha, power"), ("k", dict(alpha=0., power=1.), "must be positive"), ("rician", dict(k=-1., power=1.), "positive or 0"),
                                         ("rician", dict(k=np.inf, power=1.), "must be positive"), ("nakagami", dict(m=np.nan, omega=1.), "must be positive"), ("rayleigh", {}, "got none")])
def test_bad_parameters_are_named(law, p, words):
    for f in (envelope_pdf, envelope_cdf):
        with pytest.raises(ValueError, match=words): f(law, 1., **p)
    with pytest.raises(ValueError, match=words): envelope_sample(law, 3, RNG(0), **p)


@given(st.floats(25, 110), st.floats(-20, 20), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_decompress_undoes_log_compress_within_half_a_grey_value(dynamic_range, gain, seed):
    a = envelope_sample("rayleigh", 400, RNG(seed), sigma=1.)
    grey = log_compress(a, dynamic_range, gain)
    back, inside = decompress(grey, dynamic_range, gain), (grey > 0) & (grey < 255)
    assert np.array_equal(np.isnan(back), ~inside) and back.shape == a.shape
    assert (abs(20 * np.log10(back[inside] / a[inside])) <= dynamic_range / 255 / 2 * 1.01 + 1e-3).all()


def grey(dynamic_range, gain=0., n=3000, seed=0): return log_compress(envelope_sample("rayleigh", n, RNG(seed), sigma=1.), dynamic_range, gain)


@given(st.floats(30, 90), st.floats(-.5, .3), st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_dynamic_range_is_found_clipped_or_not(dynamic_range, gain, seed):
    g = grey(dynamic_range, gain * dynamic_range, seed=seed)   # at the extremes 39 % are black, 13 % white
    c = estimate_compression(g)
    half = (c.interval[1] - c.interval[0]) / 2
    assert c.interval[0] < c.dynamic_range < c.interval[1] and abs(c.dynamic_range - dynamic_range) < 3 * half < .2 * dynamic_range   # six standard errors
    assert sum(c.clipped) == pytest.approx(np.isin(g, [0, 255]).mean())
    wide = estimate_compression(g, 300)
    assert wide.dynamic_range == pytest.approx(c.dynamic_range) and wide.interval[1] - wide.interval[0] == pytest.approx(2 * 10**.5 * half, rel=.15)


def test_its_interval_covers():
    inside = sum(c.interval[0] <= 50 <= c.interval[1] for c in (estimate_compression(grey(50, n=150, seed=s)) for s in range(60)))
    assert stats.binom.cdf(inside, 60, .95) > 1e-3


def test_regions_share_a_slope_or_say_that_they_do_not():
    same = estimate_compression([grey(60, -10, seed=1), grey(60, 10, seed=2)], [2000, 2000])
    other = estimate_compression([grey(60, -10, seed=1), grey(45, 10, seed=2)])
    assert same.agree > .01 > 1e-6 > other.agree and len(other.regions) == 2 and other.regions[0] > 55 > 48 > other.regions[1]
    assert isinstance(same, Compression) and "p that they agree" in same._repr_html_() and same.n == 6000 and same.n_eff == 4000


@pytest.mark.parametrize("kw,words", [(dict(grey=GOOD), "whole numbers"), (dict(grey=np.zeros(50, int)), "100% of a region"), (dict(grey=np.full(50, 7)), "1 different"), (dict(grey=np.arange(5)), "at least 10"),
                                      (dict(grey=np.arange(100, 150), n_eff=90), "n_eff must be"), (dict(grey=[np.arange(50)] * 2, n_eff=20), "1 numbers for 2"), (dict(grey=np.full(50, np.nan)), "whole numbers")])
def test_bad_grey_values_are_named(kw, words):
    with pytest.raises(ValueError, match=words): estimate_compression(**kw)


@pytest.mark.parametrize("dynamic_range", [0, -3, np.inf, np.nan])
def test_a_dynamic_range_is_positive(dynamic_range):
    with pytest.raises(ValueError, match="dynamic_range must be positive"): decompress(np.zeros(3), dynamic_range)
