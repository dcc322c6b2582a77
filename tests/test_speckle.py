"Laws of the simulator: speckle statistics against theory, determinism, physics of shadow and enhancement, knobs."
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from htlab.speckle import (RAYLEIGH_SNR, SCANNERS, Scanner, attenuation_db, bmode, contrast_to_noise, draw_looks, echo_envelope, lesion_map,
                           log_compress, power_spectrum, radial_spectrum, resolution_cell, speckle_snr)

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


# the knobs

@given(st.integers(0, 2**31), st.sampled_from(sorted(SCANNERS)), st.integers(16, 60), st.floats(.05, .4))
@settings(max_examples=20, deadline=None)
def test_knobs_at_rest_change_no_pixel(seed, name, n, spacing):
    echo, s = np.random.default_rng(seed).random((n, n + 3)), SCANNERS[name]
    draw = lambda s, **kw: echo_envelope(echo, s, spacing, np.random.default_rng(seed), **kw)
    for lateral in (spacing, np.full(n, spacing)): assert np.allclose(draw(s), draw(s, lateral_mm=lateral), rtol=1e-4, atol=1e-5)
    looks = list(draw_looks(s, echo.shape, spacing, np.random.default_rng(seed)))
    if s.interference: assert np.array_equal(draw(s), draw(replace(s, tone=looks[0].interference[:2])))


def test_the_pictures_of_before():
    "Drawn by the simulator before it had knobs; the phantom sets pin thousands more."
    echo, atten = np.random.default_rng(1).random((24, 20)), np.random.default_rng(2).random((24, 20))
    for name, sums in {"A": [28035, 28408], "B": [27388, 27904], "C": [30452, 29405]}.items():
        im = bmode(echo, SCANNERS[name], .17, np.random.default_rng(0), atten)
        assert [int(im[:, :10].sum()), int(im[:, 10:].sum())] == pytest.approx(sums, abs=2)   # another FFT may round a pixel the other way


@pytest.mark.parametrize("density", [1, 4])
def test_sparse_scatterers_keep_the_power_and_raise_the_moment(density):
    s, mm = replace(PLAIN, density=density), .07
    images = np.stack([echo_envelope(np.ones((128, 128)), s, mm, np.random.default_rng(i)) for i in range(60)]).astype(float)
    power, fourth = (images**2).mean((1, 2)), (images**4).mean((1, 2))
    assert power.mean() == pytest.approx(2, abs=4 * power.std() / 60**.5)
    cell = resolution_cell(s, (np.arange(128) + .5) * mm, 128 * mm)[1] / resolution_cell(s, 0, 0)[1]
    excess = fourth / power.mean()**2 - 2
    assert excess.mean() == pytest.approx(8 * np.log(2) / np.pi / density * (1 / cell).mean(), abs=4 * excess.std() / 60**.5)
    assert speckle_snr(images) < RAYLEIGH_SNR - .1


def test_dense_scatterers_are_fully_developed():
    env = envelopes(replace(PLAIN, density=300))
    assert speckle_snr(env) == pytest.approx(RAYLEIGH_SNR, rel=.02) and (env**2).mean() == pytest.approx(2, rel=.03)


@given(st.floats(2, 15), st.floats(.2, 1.5), st.floats(1, 6), st.floats(.1, .9))
@settings(max_examples=50, deadline=None)
def test_resolution_cell(frequency, bandwidth, f_number, focus):
    s, depth = Scanner("s", frequency=frequency, bandwidth=bandwidth, f_number=f_number, focus=focus), np.linspace(0, 40, 41)
    axial, lateral = resolution_cell(s, depth, 40)
    assert axial == pytest.approx(1.54 / frequency / 2 / bandwidth)
    assert lateral.min() >= 1.54 / frequency * f_number * .9999 and abs(depth[lateral.argmin()] - focus * 40) <= .5001
    assert resolution_cell(s, 40 * focus + 8 * 1.54 / frequency * f_number**2, 40)[1] == pytest.approx(2**.5 * resolution_cell(s, 0, 0)[1])


def test_wide_pixels_make_a_narrow_cell():
    "Rows of twice the pixel size: the same cell in mm is half as many pixels."
    def lag_one(lateral):
        i = np.concatenate([echo_envelope(np.ones((64, 256)), PLAIN, .1, np.random.default_rng(s), lateral_mm=lateral) for s in range(10)])**2
        i = i - i.mean()
        return (i[:, 1:] * i[:, :-1]).mean() / (i * i).mean()
    sigma = resolution_cell(PLAIN, (np.arange(64) + .5) * .1, 6.4)[1] / 2.355
    for mm in (.1, .2): assert lag_one(np.full(64, mm)) == pytest.approx(np.exp(-.5 * (mm / sigma)**2).mean(), abs=.02)
    mixed = np.where(np.arange(64) < 32, .1, .2)
    assert lag_one(.2) < lag_one(mixed) < lag_one(.1)


@given(st.floats(.1, .8), st.floats(-.5, .5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_tone_shows_at_twice_its_frequency(down, across, seed):
    im = bmode(np.ones((128, 128)), replace(PLAIN, interference=1, tone=(down, across), dynamic_range=80), .25, np.random.default_rng(seed))
    f = (np.array(np.unravel_index(power_spectrum(im).argmax(), im.shape)) - 64) / 128 / .25
    assert min(abs(f - s * 2 * np.array([down, across])).max() for s in (1, -1)) <= 1.01 / 128 / .25


@given(st.floats(-30, 10), st.floats(1, 6), st.floats(.1, 2))
@settings(max_examples=30, deadline=None)
def test_lesion_map_is_a_disc(contrast, radius, attenuation):
    echo, atten, mask = lesion_map((160, 200), .1, (8, 9), radius, contrast, attenuation)
    assert mask.sum() * .01 == pytest.approx(np.pi * radius**2, rel=.1) and echo.dtype == atten.dtype == np.float32
    assert np.allclose(20 * np.log10(echo[mask]), contrast, atol=1e-4) and (echo[~mask] == 1).all() and np.allclose(atten[mask], attenuation) and (atten[~mask] == .5).all()
    assert np.argwhere(mask).mean(0) == pytest.approx([79.5, 89.5], abs=.1)


@pytest.mark.parametrize("change,words", [(dict(density=0), "density must be positive"), (dict(frequency=-1), "frequency must be positive"), (dict(looks=0), "looks must be positive"),
                                          (dict(density=float("nan")), "density must be positive"), (dict(tone=.4), "down, across")])
def test_bad_knobs_are_named(change, words):
    with pytest.raises(ValueError, match=f"scanner plain: .*{words}"): replace(PLAIN, **change)


@pytest.mark.parametrize("lateral", [0, -1., np.ones(3), np.ones((4, 4)), np.array([1., 1, 0, 1])])
def test_bad_lateral_size_is_named(lateral):
    with pytest.raises(ValueError, match="lateral_mm must be positive, one number or one per row"): echo_envelope(np.ones((4, 4)), PLAIN, .2, np.random.default_rng(0), lateral_mm=lateral)


def test_a_lesion_off_the_map_is_refused():
    with pytest.raises(ValueError, match="no pixel"): lesion_map((64, 64), .2, (6, 15), 1, -12)
