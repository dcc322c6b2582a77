"Laws of the simulator: speckle statistics against theory, determinism, physics of shadow and enhancement."
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from htlab.speckle import (RAYLEIGH_SNR, SCANNERS, Scanner, attenuation_db, bmode, contrast_to_noise, echo_envelope, log_compress,
                           power_spectrum, radial_spectrum, speckle_snr)

PLAIN = Scanner("plain", noise=-200)


def envelopes(scanner, seeds=12, size=160, spacing=.2, echo=1.0):
    return np.concatenate([echo_envelope(np.full((size, size), echo), scanner, spacing, np.random.default_rng(s)) for s in range(seeds)], axis=1)


@pytest.mark.parametrize("frequency,f_number", [(5, 3), (7.5, 2), (12, 1.5)])
def test_fully_developed_speckle_is_rayleigh_at_every_depth(frequency, f_number):
    env = envelopes(replace(PLAIN, frequency=frequency, f_number=f_number), 30)
    assert speckle_snr(env) == pytest.approx(RAYLEIGH_SNR, rel=.02)
    for rows in np.array_split(env, 4): assert speckle_snr(rows) == pytest.approx(RAYLEIGH_SNR, rel=.04)
    # a Rayleigh law has kurtosis-like moment E[r^4] / E[r^2]^2 = 2
    assert (env**4).mean() / (env**2).mean()**2 == pytest.approx(2, rel=.05)


def test_power_is_kept_and_scales_with_echogenicity():
    base = (envelopes(PLAIN)**2).mean()
    assert base == pytest.approx(2, rel=.03)
    assert (envelopes(PLAIN, echo=3.0)**2).mean() == pytest.approx(9 * base, rel=1e-4)


@pytest.mark.parametrize("looks", [2, 4])
def test_compounding_raises_snr_by_the_square_root(looks):
    assert speckle_snr(envelopes(replace(PLAIN, looks=looks))) == pytest.approx(RAYLEIGH_SNR * looks**.5, rel=.03)


@given(st.floats(2, 15), st.floats(.1, 1), st.floats(.05, .4))
@settings(max_examples=25, deadline=None)
def test_matched_tgc_cancels_attenuation(frequency, tissue, spacing):
    s = Scanner("s", frequency=frequency, tgc=tissue)
    assert np.allclose(attenuation_db(np.full((50, 4), tissue, np.float32), s, spacing), 0, atol=1e-3)
    more = attenuation_db(np.full((50, 4), tissue + .1, np.float32), s, spacing)
    assert more[-1, 0] == pytest.approx(2 * frequency * .1 * 50 * spacing / 10, rel=1e-2) and (np.diff(more[:, 0]) > 0).all()


def test_shadow_and_enhancement_follow_from_attenuation():
    atten = np.full((160, 160), .5, np.float32)
    atten[40:70, 20:50], atten[40:70, 110:140] = .05, 1.5
    im = bmode(np.ones((160, 160)), replace(PLAIN, frequency=7), .25, np.random.default_rng(0), atten).astype(float)
    assert im[90:, 25:45].mean() > im[90:, 70:90].mean() + 10 > im[90:, 115:135].mean() + 20
    assert abs(im[:35, 25:45].mean() - im[:35, 115:135].mean()) < 6   # nothing above the lesion changes


@given(st.integers(0, 2**31), st.sampled_from(sorted(SCANNERS)), st.integers(16, 80), st.integers(16, 80))
@settings(max_examples=20, deadline=None)
def test_deterministic_in_the_seed_and_any_shape(seed, name, h, w):
    draw = lambda s: bmode(np.ones((h, w)), SCANNERS[name], .3, np.random.default_rng(s))
    a, b, c = draw(seed), draw(seed), draw(seed + 1)
    assert a.shape == (h, w) and a.dtype == np.uint8 and np.array_equal(a, b) and not np.array_equal(a, c)


@given(st.floats(1e-4, 1e3), st.floats(20, 90))
@settings(max_examples=50, deadline=None)
def test_log_compression_is_monotone_and_bounded(x, dr):
    lo, hi = log_compress(np.array([[x, 2 * x]], np.float32), dr)[0]
    assert 0 <= lo <= hi <= 255


def test_a_grating_is_a_peak_at_its_frequency():
    y, x = np.mgrid[:128, :128]
    f, p = radial_spectrum(np.sin(2 * np.pi * .25 * x))
    assert f[np.argmax(p)] == pytest.approx(.25, abs=.02)
    assert power_spectrum(np.sin(2 * np.pi * .25 * x)).max() == pytest.approx(0, abs=1e-6)
    # doubling the resolution cell narrows the spectrum of speckle
    wide, narrow = (radial_spectrum(envelopes(replace(PLAIN, frequency=fr), 4)[:, :160])[1][20:].mean() for fr in (12, 4))
    assert wide > narrow + 3


def test_cnr_by_hand():
    assert contrast_to_noise(np.array([0., 2.]), np.array([4., 6.])) == pytest.approx(4 / np.sqrt(2))


@pytest.mark.parametrize("kw,words", [(dict(echogenicity=np.ones((2, 4, 4))), "one image at a time"), (dict(echogenicity=np.ones((4, 4)), spacing_mm=0), "spacing_mm must be positive"),
                                      (dict(echogenicity=np.ones((4, 4)), attenuation=np.ones((2, 2))), "same grid")])
def test_bad_input_is_named(kw, words):
    with pytest.raises(ValueError, match=words): bmode(**{"scanner": PLAIN, "spacing_mm": .2, "rng": np.random.default_rng(0)} | kw)
