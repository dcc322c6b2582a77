"Laws of the figures of merit: planted truth inside the intervals, invariances, and what is refused."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from htlab.quality import CellSize, cell_size, cnr, cnr_map, effective_samples, gcnr, snr, snr_map
from htlab.speckle import RAYLEIGH_SNR, Scanner, echo_envelope, log_compress, resolution_cell

PLAIN, SIZE, SPACING = Scanner("plain", frequency=7.5, f_number=2.4, noise=-200), 96, .12
Z, X = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
DISC, RING = np.hypot(Z, X) < 20, (np.hypot(Z, X) > 26) & (np.hypot(Z, X) < 44)


def tissue(seed, db=0, scanner=PLAIN): return 10**(db / 20) * echo_envelope(np.ones((SIZE, SIZE)), scanner, SPACING, np.random.default_rng(seed))
def lesion(seed, db): return np.where(np.hypot(Z, X) < 23, tissue((seed, 1), db), tissue((seed, 2)))
def rayleigh_gcnr(db): return 0. if db == 0 else (R := 10**(abs(db) / 10))**(-1 / (R - 1)) - R**(-R / (R - 1))


def covers(hits): return stats.binomtest(sum(hits), len(hits), .95).pvalue > 1e-4


@pytest.mark.parametrize("looks", [1, 2])
def test_snr_holds_the_truth(looks):
    scanner = Scanner("s", frequency=7.5, f_number=2.4, noise=-200, looks=looks)
    assert covers([RAYLEIGH_SNR * looks**.5 in snr(tissue(s, 0, scanner), DISC) for s in range(60)])


@pytest.mark.parametrize("db", [0, -2, -8, -18])
def test_contrast_holds_the_truth(db):
    a = 10**(db / 20)
    both = [(RAYLEIGH_SNR * (a - 1) / np.sqrt(1 + a * a) in cnr(im, DISC, RING), rayleigh_gcnr(db) in gcnr(im, DISC, RING)) for im in (lesion(s, db) for s in range(60))]
    assert covers([h for h, _ in both]) and covers([h for _, h in both])


@pytest.mark.parametrize("values,shown", [("envelope", lambda e: e), ("intensity", lambda e: e**2), ("log", lambda e: log_compress(e, 70))])
def test_cell_holds_the_truth_whatever_the_pixels_hold(values, shown):
    wide = Scanner("wide", frequency=7.5, f_number=5, noise=-200)   # so long a focus that the cell is the same at all depths
    axial, lateral = resolution_cell(wide, SIZE * SPACING / 2, SIZE * SPACING)
    found = [cell_size(shown(tissue(s, 0, wide)), spacing_mm=SPACING, values=values) for s in range(40)]
    assert covers([axial in c.axial_mm for c in found]) and covers([lateral in c.lateral_mm for c in found])


def test_correlated_pixels_are_worth_fewer_and_independent_ones_all():
    wide = Scanner("wide", frequency=7.5, f_number=5, noise=-200)
    worth = np.mean([effective_samples(tissue(s, 0, wide), DISC) for s in range(40)])
    actual = 4 / np.var([np.mean(tissue(s, 0, wide)[DISC]**2) for s in range(300)])   # an intensity of mean 2 has variance 4
    assert .75 < worth / actual < 1.3 and worth < DISC.sum() / 4
    assert effective_samples(tissue(0), DISC, cell=(.1, .1)) == pytest.approx(DISC.sum())
    white = np.random.default_rng(0).rayleigh(size=(64, 64))
    assert snr(white).n_eff > .6 * white.size and RAYLEIGH_SNR in snr(white)


@given(st.floats(.01, 100), st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_units_do_not_matter(scale, seed):
    e = lesion(seed, -4)
    for f in (lambda e: snr(e, DISC), lambda e: cnr(e, DISC, RING), lambda e: gcnr(e, DISC, RING), lambda e: cell_size(e, RING).lateral):
        a, b = f(e), f(e * scale)
        assert (b.value, b.lo, b.hi) == pytest.approx((a.value, a.lo, a.hi), rel=1e-6)


@given(st.integers(0, 20), st.floats(-10, 3))
@settings(max_examples=15, deadline=None)
def test_gcnr_is_of_ranks_and_symmetric(seed, db):
    e = lesion(seed, db)
    a, b, c = gcnr(e, DISC, RING), gcnr(np.log(e), DISC, RING), gcnr(e, RING, DISC)
    assert a.value == pytest.approx(b.value, abs=1e-9) and a.value == pytest.approx(c.value, abs=.02)
    assert 0 <= a.lo <= a.value <= a.hi <= 1 and cnr(e, DISC, RING).value == pytest.approx(-cnr(e, RING, DISC).value)


def test_gcnr_sees_a_difference_of_spread_that_cnr_does_not():
    rng = np.random.default_rng(0)
    e = np.where(DISC, rng.normal(0, 3, DISC.shape), rng.normal(0, 1, DISC.shape))
    assert cnr(e, DISC, RING).lo < 0 < cnr(e, DISC, RING).hi and gcnr(e, DISC, RING).lo > .3


def test_a_plane_is_no_speckle():
    e = tissue(0)
    flat, sloped = cell_size(e), cell_size(e + .05 * Z + .03 * X)
    assert sloped.lateral.value == pytest.approx(flat.lateral.value, rel=1e-6) and isinstance(flat, CellSize)


def test_maps_agree_with_regions():
    e = tissue(0)
    box = np.zeros(e.shape, bool); box[30:51, 40:61] = True
    assert snr_map(e, 21)[40, 50] == pytest.approx(snr(e, box).value)
    assert cnr_map(e, 21, reference=RING)[40, 50] == pytest.approx(cnr(e, box, RING).value)
    frame = np.zeros(e.shape, bool); frame[17:80, 17:80] = True; frame[38:59, 38:59] = False
    middle = np.zeros(e.shape, bool); middle[38:59, 38:59] = True
    assert cnr_map(e, 21)[48, 48] == pytest.approx(cnr(e, middle, frame).value)
    assert np.isnan(snr_map(np.ones((32, 32)), 5)).all()


@pytest.mark.parametrize("call,words", [(lambda: snr(np.ones((3, 8, 8))), "one grey image"), (lambda: snr(np.full((32, 32), np.inf)), "not finite"), (lambda: snr(tissue(0), DISC[:9]), "same grid"),
                                        (lambda: snr(np.ones((32, 32))), "one value only"), (lambda: snr(tissue(0), np.hypot(Z, X) < 2), "at least 16"), (lambda: snr(tissue(0), np.hypot(Z, X) < 3), "larger region"),
                                        (lambda: cnr(tissue(0), DISC, DISC & False), "outside holds 0"), (lambda: cell_size(tissue(0), values="dB"), "one of intensity"), (lambda: cell_size(tissue(0), spacing_mm=0), "must be positive"),
                                        (lambda: effective_samples(tissue(0), cell=(1, -1)), "two positive"), (lambda: snr_map(tissue(0), 1), "at least 2")])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_estimates_show_themselves():
    e = cell_size(tissue(0), spacing_mm=SPACING)
    assert "mm" in e._repr_html_() and "independent samples" in e._repr_html_() and float(e.axial) in e.axial and "[" in str(e.axial)
