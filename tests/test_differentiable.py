"The torch simulator against numpy's pixel by pixel, and its derivatives against finite differences."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck

from htlab.differentiable import KNOBS, knobs_of, torch_bmode, torch_envelope
from htlab.speckle import SCANNERS, Scanner, bmode, draw_looks, echo_envelope

ALL = {n: replace(s, reverberation=.7, interference=.1) for n, s in SCANNERS.items()}


def maps(h, w, seed=0): return (np.random.default_rng((seed, i)).uniform(.2, 1.2, (h, w)) for i in range(2))
def t(a): return torch.tensor(a, dtype=torch.float64)
def looks_of(s, shape, spacing, seed=0, lateral=None): return list(draw_looks(s, shape, spacing, np.random.default_rng(seed), lateral))


@given(st.sampled_from(sorted(ALL)), st.integers(1, 2), st.floats(2, 14), st.floats(.15, 1.2), st.floats(1, 5), st.floats(0, 1), st.floats(.2, 1), st.floats(-20, 20),
       st.floats(30, 90), st.floats(-80, -30), st.sampled_from([float("inf"), 4.]), st.integers(8, 40), st.integers(8, 40), st.floats(.05, .4), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_agrees_with_numpy(name, looks, frequency, bandwidth, f_number, focus, tgc, gain, dynamic_range, noise, density, h, w, spacing, fan, seed):
    s = replace(ALL[name], looks=looks, frequency=frequency, bandwidth=bandwidth, f_number=f_number, focus=focus, tgc=tgc, gain=gain, dynamic_range=dynamic_range, noise=noise, density=density)
    echo, atten = maps(h, w, seed)
    lateral = np.linspace(.5, 2, h) * spacing if fan else None
    expected = echo_envelope(echo, s, spacing, np.random.default_rng(seed), atten, lateral)
    drawn = looks_of(s, (h, w), spacing, seed, lateral)
    mine = torch_envelope(t(echo), knobs_of(s), spacing, drawn, t(atten), lateral).numpy()
    scale = np.sqrt((expected**2).mean(1, keepdims=True))   # rounding is relative to what interferes, not to what is left of it
    assert (abs(mine - expected) <= 2e-4 * scale + 1e-6).all()
    grey = (torch_bmode(t(echo), knobs_of(s), spacing, drawn, t(atten), lateral) + .5).floor().numpy()
    image = bmode(echo, s, spacing, np.random.default_rng(seed), atten, lateral)
    assert abs(grey - image).max() <= 1 and (grey != image).sum() <= max(3, .002 * image.size)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("looks", [1, 2])
def test_grey_values_are_equal(name, looks):
    s, (echo, atten) = replace(ALL[name], looks=looks), maps(160, 160)
    grey = (torch_bmode(t(echo), knobs_of(s), .2, looks_of(s, (160, 160), .2), t(atten)) + .5).floor().numpy()
    assert (grey == bmode(echo, s, .2, np.random.default_rng(0), atten)).mean() > .999


def test_float32_and_maps_without_attenuation():
    s, (echo, _) = SCANNERS["B"], maps(64, 64)
    grey = torch_bmode(torch.tensor(echo, dtype=torch.float32), knobs_of(s), .2, looks_of(s, (64, 64), .2))
    assert grey.dtype == torch.float32 and (((grey + .5).floor().numpy() != bmode(echo, s, .2, np.random.default_rng(0)))).mean() < .005


SMOOTH = replace(ALL["B"], frequency=4, dynamic_range=200, gain=-10)   # no pulse below 0.3 pixels, no pixel clipped


@pytest.mark.parametrize("wrt", [*KNOBS, "echogenicity", "attenuation"])
def test_gradcheck(wrt):
    s = replace(SMOOTH, looks=2)
    inputs = dict(zip(("echogenicity", "attenuation"), map(t, maps(8, 7)))) | knobs_of(s)
    drawn = looks_of(s, (8, 7), .05)
    def image(v):
        i = inputs | {wrt: v}
        return torch_bmode(i["echogenicity"], {k: i[k] for k in KNOBS}, .05, drawn, i["attenuation"])
    value = inputs[wrt].clone().requires_grad_()
    assert 0 < image(value).min() and image(value).max() < 255
    assert gradcheck(image, [value])
    assert torch.autograd.grad(image(value).square().sum(), value)[0].abs().max() > 0   # and it is not checked where nothing moves


def test_gradcheck_with_lines_that_diverge():
    lateral, (echo, atten) = np.linspace(.03, .08, 8), map(t, maps(8, 7))
    drawn = looks_of(SMOOTH, (8, 7), .05, 0, lateral)
    for wrt in ("frequency", "f_number", "interference"):
        knobs = knobs_of(SMOOTH, learn=[wrt])
        assert gradcheck(lambda v: torch_bmode(echo, knobs | {wrt: v}, .05, drawn, atten, lateral), [knobs[wrt]])


def test_clipped_pixels_have_no_derivative():
    s = replace(SMOOTH, gain=200)
    knobs = knobs_of(s, learn=["gain"])
    image = torch_bmode(torch.ones(8, 8, dtype=torch.float64), knobs, .05, looks_of(s, (8, 8), .05))
    assert (image == 255).all() and torch.autograd.grad(image.sum(), knobs["gain"])[0] == 0


def test_a_batch_is_its_images():
    s, (echo, atten) = ALL["A"], map(t, maps(24, 20))
    drawn, values = looks_of(s, (24, 20), .1), dict(frequency=t([4., 7, 11]), gain=t([0., 3, -3]), dynamic_range=t([50., 60, 70]))
    batch = torch_bmode(echo, knobs_of(s) | values, .1, drawn, atten)
    assert batch.shape == (3, 24, 20)
    for i in range(3): assert torch.allclose(batch[i], torch_bmode(echo, knobs_of(s) | {k: v[i] for k, v in values.items()}, .1, drawn, atten))
    assert torch.allclose(torch_bmode(torch.stack([echo, 2 * echo]), knobs_of(s), .1, drawn, atten)[1], torch_bmode(2 * echo, knobs_of(s), .1, drawn, atten))


def test_the_looks_are_not_used_up():
    "The same looks give the same image again: numpy's route scales its own draws in place, this one must not."
    s, echo = ALL["C"], torch.ones(16, 16, dtype=torch.float64)
    drawn = looks_of(s, (16, 16), .2)
    assert torch.equal(torch_bmode(echo, knobs_of(s), .2, drawn), torch_bmode(echo, knobs_of(s), .2, drawn))


PLAIN = Scanner("plain")


@pytest.mark.parametrize("call,words", [
    (lambda: knobs_of(PLAIN, learn=["density"]), "no knob 'density'.*set in the Scanner"), (lambda: knobs_of(PLAIN, learn=["looks"]), "no knob 'looks'"),
    (lambda: torch_bmode(torch.ones(8, 8), knobs_of(PLAIN) | {"tone": t([.1, .2])}, .2, looks_of(PLAIN, (8, 8), .2)), "no knob 'tone'"),
    (lambda: torch_bmode(torch.ones(8, 8), {"gain": t(0.)}, .2, looks_of(PLAIN, (8, 8), .2)), "knobs lack .*start from knobs_of"),
    (lambda: torch_bmode(torch.ones(8), knobs_of(PLAIN), .2, looks_of(PLAIN, (8, 8), .2)), "must be \\(..., H, W\\)"),
    (lambda: torch_bmode(torch.ones(9, 8), knobs_of(PLAIN), .2, looks_of(PLAIN, (8, 8), .2)), "same grid"),
    (lambda: torch_bmode(torch.ones(8, 8), knobs_of(PLAIN) | {"reverberation": t(.5)}, .2, looks_of(PLAIN, (8, 8), .2)), "drawn without reverberation"),
    (lambda: torch_bmode(torch.ones(8, 8), knobs_of(PLAIN, learn=["interference"]), .2, looks_of(PLAIN, (8, 8), .2)), "drawn without interference")])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words): call()
