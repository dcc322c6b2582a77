"Laws of spectra and of the detectors: Parseval, units, planted tones, false alarms, and what is refused."
import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import stats

from htlab.spectrum import LocalSpectra, Spectrum, find_blocks, find_peaks, local_spectra, radial, spectrum_2d
from htlab.speckle import SCANNERS, bmode

QUIET = replace(SCANNERS["C"], interference=0)
Z, X = np.mgrid[:128, :128]


def speckle(seed, shape=(128, 128)): return bmode(np.ones(shape), QUIET, .2, np.random.default_rng(seed)).astype(float)
def tone(f, amplitude, phase=0., shape=(128, 128)):
    z, x = np.mgrid[:shape[0], :shape[1]]
    return amplitude * np.cos(2 * np.pi * (f[0] * z + f[1] * x) + phase)


@given(st.integers(0, 1000), st.integers(16, 70), st.integers(16, 70), st.floats(.1, 50))
@settings(max_examples=25, deadline=None)
def test_parseval(seed, h, w, sd):
    s = spectrum_2d(np.random.default_rng(seed).normal(5, sd, (h, w)))
    assert s.power.mean() == pytest.approx(sd**2, rel=.5) and s.power.shape == (h, w) == (len(s.down), len(s.across)) and s.unit == "cycles per pixel" and np.isfinite(s.db).all()


def test_a_real_image_has_a_symmetric_spectrum_and_axes_in_mm():
    s = spectrum_2d(speckle(0), (.2, .1))
    assert np.allclose(s.power[1:, 1:], s.power[1:, 1:][::-1, ::-1], rtol=1e-3)
    assert s.down[0] == pytest.approx(-2.5) and s.across[0] == pytest.approx(-5) and s.unit == "cycles per mm"
    peak = spectrum_2d(tone((.125, 0), 1), .25)
    at = np.unravel_index(peak.power.argmax(), peak.power.shape)
    assert abs(peak.down[at[0]]) == pytest.approx(.5) and peak.across[at[1]] == pytest.approx(0)


@given(st.floats(.05, .45), st.sampled_from([None, .1, .3]))
@settings(max_examples=20, deadline=None)
def test_radial_finds_a_grating(f, spacing):
    r, p = radial(tone((0, f), 1), spacing)
    assert r[p.argmax()] * (spacing or 1) == pytest.approx(f, abs=1 / 60) and len(r) == len(p) == 32


def test_radial_rings_are_equal_in_mm():
    wide, (z, x) = (.2, .1), np.mgrid[:128, :128]
    for image in (np.cos(2 * np.pi * 1.5 * .2 * z), np.cos(2 * np.pi * 1.5 * .1 * x)):   # 1.5 cycles per mm, down and across
        r, p = radial(image, wide)
        assert r[p.argmax()] == pytest.approx(1.5, abs=.06)
    assert np.array_equal(radial(spectrum_2d(image, wide))[1], p)


def test_local_spectra_tell_halves_apart():
    rng = np.random.default_rng(0)
    white = rng.normal(size=(96, 192)); smooth = np.apply_along_axis(lambda r: np.convolve(r, np.ones(5) / 5, "same"), 1, white)
    s = local_spectra(np.where(np.arange(192) < 96, smooth, white), 32, 32, spacing_mm=.5)
    assert isinstance(s, LocalSpectra) and s.power.shape[:2] == s.centroid.shape == s.bandwidth.shape[:2] == (3, 6) and s.unit == "mm"
    assert s.rows[0] == 8 and s.cols[-1] == (160 + 16) * .5 and s.bandwidth[:, :2, 1].mean() < .7 * s.bandwidth[:, :2, 0].mean()


@given(st.floats(.1, .45), st.floats(-80, 80), st.floats(0, 6.28), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_strong_tone_is_measured(f, direction, phase, seed):
    f = f * np.array([np.cos(np.radians(direction)), np.sin(np.radians(direction))])
    p = find_peaks(speckle(seed) + tone(f, 25, phase), most=1).iloc[0]
    assert (p.down, p.across) == pytest.approx(tuple(f), abs=1e-3) and p.direction == pytest.approx(direction, abs=1) and p.amplitude == pytest.approx(25, abs=4)


def test_intervals_hold_planted_tones():
    f, hits = (.13, .07), []
    for seed in range(60):
        p = find_peaks(speckle(seed) + tone(f, 9, seed), .2, most=1).iloc[0]
        hits.append([p.frequency_lo <= np.hypot(*f) / .2 <= p.frequency_hi, p.direction_lo <= np.degrees(np.arctan2(f[1], f[0])) <= p.direction_hi, p.amplitude_lo <= 9 <= p.amplitude_hi])
    assert all(stats.binomtest(int(h), 60, .95).pvalue > 1e-4 for h in np.sum(hits, 0))


def test_clean_images_and_edges_raise_no_alarm():
    edges = np.ones((128, 128)); edges[Z < 12] = 10; edges[Z > 90 - .3 * X] = .1
    alarms = [len(find_peaks(bmode(e, QUIET, .2, np.random.default_rng(s)))) > 0 for s in range(30) for e in (np.ones((128, 128)), edges)]
    assert sum(alarms) <= 4   # 0.6 expected at most


def test_several_tones_each_once_strongest_over_the_hill_first():
    p = find_peaks(speckle(1) + tone((.2, .1), 40) + tone((.1, -.3), 20) + tone((.35, 0), 12))
    assert len(p) == 3 and (p.harmonic == 1).all() and np.allclose(p[["down", "across"]], [(.1, -.3), (.2, .1), (.35, 0)], atol=.002) and p.strength.is_monotonic_decreasing


def test_harmonics_are_named():
    p = find_peaks(speckle(2) + tone((.11, .02), 15) + tone((.22, .04), 12) + tone((.33, .06), 10), .2)
    first = p[p.harmonic == 1]
    assert sorted(p.harmonic) == [1, 2, 3] and len(first) == 1 and (p.of == first.index[0]).all() and first.period.iloc[0] == pytest.approx(.2 / np.hypot(.11, .02), rel=.01)


def test_frequencies_follow_the_spacing():
    im = speckle(3) + tone((.1, .05), 30)
    a, b = find_peaks(im).iloc[0], find_peaks(im, (.2, .4)).iloc[0]
    assert a.frequency == pytest.approx(np.hypot(.1, .05), abs=1e-3) and b.frequency == pytest.approx(np.hypot(.5, .125), abs=5e-3)
    assert b.direction == pytest.approx(np.degrees(np.arctan2(.125, .5)), abs=.5) and (a.amplitude, a.strength) == pytest.approx((b.amplitude, b.strength))


@given(st.floats(.2, 5), st.floats(-100, 100))
@settings(max_examples=10, deadline=None)
def test_gain_changes_amplitudes_only(gain, offset):
    im = speckle(4) + tone((.2, -.1), 20)
    a, b = find_peaks(im).iloc[0], find_peaks(gain * im + offset).iloc[0]
    assert b.amplitude == pytest.approx(gain * a.amplitude, rel=1e-3) and (b.down, b.across, b.strength) == pytest.approx((a.down, a.across, a.strength), rel=1e-3)


@pytest.mark.parametrize("cut", [0, 3])
def test_jpeg_leaves_blocks(cut):
    Image.fromarray(speckle(5).astype(np.uint8)).save(f := io.BytesIO(), "JPEG", quality=60)
    found = find_blocks(np.asarray(Image.open(f))[cut:, cut:]).loc["across"]   # along depth speckle itself is as rough
    assert found.phase == -cut % 8 and found.false_alarm < 1e-3 and found.excess > .05


def test_no_blocks_without_jpeg():
    assert sum(find_blocks(speckle(s)).false_alarm.min() < .01 for s in range(60)) <= 5   # 1.2 expected


@pytest.mark.parametrize("call,words", [(lambda: find_peaks(np.ones((8, 8))), "at least 32"), (lambda: find_peaks(speckle(0), -1), "must be positive"), (lambda: find_peaks(speckle(0), false_alarm=0), "between 0 and 1"),
                                        (lambda: spectrum_2d(np.ones((3, 32, 32))), "one grey image"), (lambda: spectrum_2d(np.full((32, 32), np.nan)), "not finite"), (lambda: radial(speckle(0), rings=1), "at least 2"),
                                        (lambda: local_spectra(speckle(0), 400), "window=400"), (lambda: find_blocks(np.ones((64, 64))), "four blocks"), (lambda: find_blocks(speckle(0), 1), "at least 2")])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_a_constant_image_has_no_peaks(): assert len(find_peaks(np.full((64, 64), 7.))) == 0


def test_spectra_show_themselves():
    s = spectrum_2d(speckle(0), .2)
    assert isinstance(s, Spectrum) and "base64" in s._repr_html_() and "cycles per mm" in s._repr_html_() and local_spectra(speckle(0)).show().axes
