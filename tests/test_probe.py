"Laws of probes: geometry, there and back, where a point lands, what interpolation does, burned-in marks."
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from htlab.probe import KINDS, Probe, burn_in, probe_scan, scan_convert, to_beams
from htlab.speckle import RAYLEIGH_SNR, SCANNERS, Scanner, bmode, speckle_snr

QUIET = Scanner("quiet", frequency=6, noise=-200)
probes = st.one_of(st.builds(Probe, st.just("linear"), lines=st.integers(16, 160)),
                   st.builds(Probe, st.just("convex"), st.floats(20, 80), st.floats(20, 70), st.integers(32, 160)),
                   st.builds(Probe, st.just("sector"), angle_deg=st.floats(30, 120), lines=st.integers(32, 160)))


@given(probes, st.integers(60, 90), st.integers(60, 90), st.floats(.25, .5))
@settings(max_examples=40, deadline=None)
def test_every_sample_is_found_again(probe, h, w, spacing):
    "beams and pixels are inverse to each other: asked for the place of a sample, pixels names that sample"
    z, x, apart = probe.beams((h, w), spacing)
    assert z.shape == x.shape == (len(apart), probe.lines) and (apart > 0).all() and z.max() <= h * spacing and z.min() >= -1e-9
    assert np.allclose(np.hypot(np.diff(z, axis=1), np.diff(x, axis=1)), apart[:, None], rtol=1e-3) and np.allclose(np.hypot(np.diff(z, axis=0), np.diff(x, axis=0)), spacing)
    row, line, inside = probe.pixels((h, w), spacing)
    for name, truth, steps in (("row", row, z), ("line", line, x)):
        back = to_beams(truth, probe, spacing)
        # interpolating a smooth coordinate is exact to second order; away from the edges, where the map ends, and from the apex, where the angle jumps
        keep = (z > 4) & (z < (h - 1) * spacing) & (x > spacing) & (x < (w - 1) * spacing)
        wanted = np.broadcast_to(np.arange(z.shape[0])[:, None] if name == "row" else np.arange(probe.lines)[None], z.shape)
        assert np.allclose(back[keep], wanted[keep], atol=.15)
    assert inside.any() and (row[inside] >= -.5).all() and (row[inside] < z.shape[0]).all() and (abs(line[inside] - (probe.lines - 1) / 2) <= probe.lines / 2 + 1e-6).all()


def test_angles_are_right():
    "A ray at 20 degrees is one column of the beams; beams are symmetric; the arc's ends are level with the skin."
    p, mm = Probe("sector", angle_deg=80, lines=80), .1
    z, x = (np.mgrid[:300, :300] + .5) * mm
    ray = np.exp(-.5 * ((np.degrees(np.arctan2(x - 15, z)) - 20.5) / .8)**2)
    assert (to_beams(ray, p, mm)[40:].mean(0).argmax() - 40) == 20     # line 60 runs at 20.5 degrees
    for p in (Probe("convex", 40, 60), Probe("sector"), Probe("linear")):
        zb, xb, _ = p.beams((200, 200), .2)
        assert np.allclose(zb, zb[:, ::-1]) and np.allclose(xb + xb[:, ::-1], 40)
    z0, x0, _, step = Probe("convex", 40, 60)._fan((200, 200), .2)
    assert z0 + 40 * np.cos(np.radians(30)) == pytest.approx(0) and x0 == 20 and step == pytest.approx(np.radians(60) / 128)


@given(probes, st.floats(6, 12), st.floats(0, 6))
@settings(max_examples=30, deadline=None)
def test_a_smooth_map_returns(probe, period, phase):
    shape, mm = (80, 80), .4
    z, x = (np.mgrid[:80, :80] + .5) * mm
    smooth = np.sin(2 * np.pi * z / period + phase) + np.cos(2 * np.pi * x / period)
    widest = probe.beams(shape, mm)[2].max()
    assume(widest < period / 6)
    back, inside = scan_convert(to_beams(smooth, probe, mm), probe, shape, mm), probe.pixels(shape, mm)[2]
    assert not back[~inside].any()
    deep = inside & (np.arange(80)[:, None] < 76) & (np.arange(80) > 3) & (np.arange(80) < 76)
    # linear interpolation twice: at most (2 pi step / period)^2 / 8 of the amplitude 2 each, plus half a line at the edges
    assert np.quantile(abs(back - smooth)[deep], .9) <= 2 * ((2 * np.pi * max(widest, mm) / period)**2 / 8) * 2 + .02


@pytest.mark.parametrize("probe", [Probe("linear"), Probe("convex", 40), Probe("sector", angle_deg=80)], ids=lambda p: p.kind)
def test_a_ball_lands_where_it_is(probe):
    mm, z, x = .2, *((np.mgrid[:200, :200] + .5) * .2)
    for d, a in ((15, 20), (25, 27), (32, 12)):
        echo = np.where(np.hypot(z - d, x - a) < .5, 20, 1e-3)
        power = np.mean([10**(probe_scan(echo, probe, Scanner("p", noise=-90, dynamic_range=70), mm, np.random.default_rng(i)).image / 255. * 7) for i in range(6)], 0)
        near = np.hypot(z - d, x - a) < 2.5
        assert np.hypot((power * z)[near].sum() / power[near].sum() - d, (power * x)[near].sum() / power[near].sum() - a) < .3


def test_beams_are_rayleigh_and_their_pixels_are_not():
    scans = [probe_scan(np.ones((160, 160)), Probe("sector", lines=64), QUIET, .25, np.random.default_rng(i)) for i in range(12)]
    beams = np.stack([s.envelope[40:] for s in scans])
    assert speckle_snr(beams) == pytest.approx(RAYLEIGH_SNR, rel=.02) and (beams**2).mean() == pytest.approx(2, rel=.03)
    pixels = np.stack([s.image[100:150, 60:100] for s in scans]) / 255
    assert speckle_snr(10**(pixels * QUIET.dynamic_range / 20)) > 1.1 * RAYLEIGH_SNR


def test_a_linear_probe_with_a_line_per_column_is_the_simulator():
    "Nothing is interpolated, so every pixel is a sample of a beam."
    s = probe_scan(np.random.default_rng(0).random((60, 64)), Probe("linear", lines=64), SCANNERS["B"], .2, np.random.default_rng(1))
    assert s.inside.all() and np.array_equal(s.image, s.beam) and s.beam.shape == (60, 64)
    wide = np.stack([probe_scan(np.ones((60, 64)), Probe("linear", lines=64), QUIET, .2, np.random.default_rng(i)).image for i in range(30)])
    plain = np.stack([bmode(np.ones((60, 64)), QUIET, .2, np.random.default_rng(i)) for i in range(30)])
    assert wide.mean() == pytest.approx(plain.mean(), abs=1) and wide.std() == pytest.approx(plain.std(), rel=.03)


@given(st.integers(0, 2**31), probes, st.sampled_from(sorted(SCANNERS)))
@settings(max_examples=15, deadline=None)
def test_deterministic_black_outside_and_shadows_follow_the_beam(seed, probe, name):
    tissue = np.random.default_rng(seed).random((70, 80))
    a, b = (probe_scan(tissue, probe, SCANNERS[name], .5, np.random.default_rng(seed), np.full((70, 80), .5)) for _ in range(2))
    assert np.array_equal(a.image, b.image) and not a.image[~a.inside].any() and a.image.shape == a.inside.shape == (70, 80) and a.image.dtype == a.beam.dtype == np.uint8
    assert a.envelope.shape == a.beam.shape and a.beam.shape[1] == probe.lines


def test_a_shadow_points_away_from_the_apex():
    mm, z, x = .2, *((np.mgrid[:200, :200] + .5) * .2)
    stone = np.hypot(z - 14, x - 26) < 2
    image = np.mean([probe_scan(np.ones((200, 200)), Probe("sector"), QUIET, mm, np.random.default_rng(i), np.where(stone, 4, .5)).image for i in range(6)], 0)
    angle, r = np.degrees(np.arctan2(x - 20, z)), np.hypot(z, x - 20)
    behind = (abs(angle - np.degrees(np.arctan2(6, 14))) < 3) & (r > 22) & (r < 36)
    below = (abs(x - 26) < 1) & (z > 30) & (z < 38)
    assert image[behind].mean() < image[below].mean() - 15


# marks

@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 59), st.integers(0, 79))] * 2), max_size=3), st.sampled_from("+x"), st.integers(1, 255))
@settings(max_examples=40, deadline=None)
def test_marks_are_where_they_were_set_and_nowhere_else(calipers, mark, grey):
    image = np.zeros((60, 80), np.uint8)
    out = burn_in(image, calipers, mark=mark, grey=grey)
    assert not image.any() and set(np.unique(out)) <= {0, grey}
    for ends in calipers:
        for r, c in ends: assert out[r, c] == grey
    if calipers:
        rows, cols = np.nonzero(out)
        marks = np.array([e for ends in calipers for e in ends])
        assert (rows.min() >= marks[:, 0].min() - 3) and (rows.max() <= marks[:, 0].max() + 3) and (cols.min() >= marks[:, 1].min() - 3) and (cols.max() <= marks[:, 1].max() + 3)
    else: assert not out.any()


def test_text_is_drawn_once_and_where_asked():
    out = burn_in(np.zeros((60, 160), np.uint8), text="RT 10:00", at=(20, 30))
    rows, cols = np.nonzero(out)
    assert 20 <= rows.min() and rows.max() < 40 and 29 <= cols.min() and cols.max() < 110


# refusals

@pytest.mark.parametrize("make,words", [
    (lambda: Probe("curved"), "one of linear, convex, sector"), (lambda: Probe("linear", radius_mm=5), "leave it out"), (lambda: Probe("sector", radius_mm=5), "leave it out"),
    (lambda: Probe("convex", -3), "positive radius_mm"), (lambda: Probe("sector", angle_deg=180), "below 180"), (lambda: Probe(lines=1), "at least 2"),
    (lambda: probe_scan(np.ones((40, 200)), Probe("convex"), QUIET, .2, np.random.default_rng(0)), "dips 8.0 mm"),
    (lambda: probe_scan(np.ones((40, 40)), Probe(), QUIET, .2, np.random.default_rng(0), np.ones((4, 4))), "same grid"),
    (lambda: probe_scan(np.ones((40, 40)), Probe(), QUIET, 0, np.random.default_rng(0)), "spacing_mm must be positive"),
    (lambda: probe_scan(np.ones((2, 40, 40)), Probe(), QUIET, .2, np.random.default_rng(0)), "one image at a time"),
    (lambda: scan_convert(np.ones((4, 4)), Probe(), (64, 64), .2), "takes \\(64, 128\\)"),
    (lambda: burn_in(np.ones((8, 8))), "uint8"), (lambda: burn_in(np.ones((8, 8), np.uint8), [((0, 0), (8, 8))]), "outside the image"), (lambda: burn_in(np.ones((8, 8), np.uint8), mark="*"), "'\\+' or 'x'")])
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_kinds_have_defaults_and_a_scan_shows_itself():
    for kind, (radius, angle) in KINDS.items(): assert (Probe(kind).radius_mm, Probe(kind).angle_deg) == (radius, angle)
    html = probe_scan(np.ones((60, 60)), Probe("sector"), QUIET, .5, np.random.default_rng(0))._repr_html_()
    assert "data:image/png;base64," in html and "sector probe, 128 lines: image 60 x 60 of 0.50 mm" in html
