"Laws of spectra of features, learned responses and noise weights, on small random towers of timm and open_clip."
import copy

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from open_clip.transformer import VisionTransformer
from torch import nn

from htlab.adapter import OPS, Gain
from htlab.backbone import Backbone
from htlab.inject import adapt, adapters, disabled
from htlab.response import FeatureSpectra, feature_spectra, learned_response, map_spectrum, noise_correlation, noise_weights
from htlab.speckle import power_spectrum

def vit(size=(32, 32), **kw):
    return timm.create_model('vit_tiny_patch16_224', img_size=size, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=0, **kw)

BUILD = {'cls': vit, 'wide': lambda: vit((40, 56)), 'registers': lambda: vit((56, 32), reg_tokens=4), 'no-prefix': lambda: vit(class_token=False, global_pool='avg'),
         'open_clip': lambda: VisionTransformer((48, 48), 8, 24, 3, 2, 2., output_dim=10), 'open_clip-wide': lambda: VisionTransformer((32, 48), 8, 24, 3, 2, 2., output_dim=10)}
MADE = {}

def tower(name='cls'):
    "A fresh copy of a small frozen tower."
    if name not in MADE:
        torch.manual_seed(0)
        MADE[name] = Backbone(BUILD[name](), f'toy-{name}')
    return copy.deepcopy(MADE[name])

every = pytest.mark.parametrize('name', BUILD)
laws = settings(max_examples=12, deadline=None, derandomize=True)
FILTERS, WEIGHED = ('gain', 'ring', 'spectral'), ('noise', 'hybrid', 'hybrid-ring', 'hybrid-spectral')

def adapted(name='cls', op='hybrid', blocks=None, init='reference'):
    torch.manual_seed(0)
    return adapt(tower(name), op, bottleneck=8, blocks=blocks, init=init)
def images(b, n=3): return torch.rand(n, 3, *b.size, generator=torch.Generator().manual_seed(1))
def hooks(b): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in b.modules())


# spectra

@laws
@given(h=st.integers(4, 20), w=st.integers(4, 20), scale=st.floats(.1, 10), shift=st.floats(-5, 5), seed=st.integers(0, 9))
def test_spectrum_is_a_variance(h, w, scale, shift, seed):
    "White noise of variance v has power v; a constant has none; power grows with the square."
    u = torch.randn(400, 3, h, w, generator=torch.Generator().manual_seed(seed))
    freq, power = map_spectrum(u)
    assert power.shape == (400, len(freq)) and len(freq) == min(h, w) // 2 and np.allclose(freq, np.arange(1, len(freq) + 1) / min(h, w))
    assert np.allclose(power.mean(0)[1:], 1, atol=.25)                     # the lowest ring loses to the mean that is subtracted
    assert np.allclose(map_spectrum(u * scale + shift)[1], power * scale**2, rtol=1e-2, atol=1e-4)
    assert map_spectrum(torch.full((1, h, w), 3.))[1].max() < 1e-9

@laws
@given(n=st.integers(12, 24), k=st.integers(3, 5), across=st.booleans())
def test_a_wave_peaks_at_its_frequency(n, k, across):
    wave = torch.cos(2 * torch.pi * k / n * torch.arange(n))
    freq, power = map_spectrum((wave[None] if across else wave[:, None]).expand(1, n, n))
    assert freq[power.argmax()] == k / n

def test_the_same_spectrum_as_of_images():
    "Up to the peak it is relative to, it is the spectrum of htlab.speckle, averaged over rings."
    u = np.random.default_rng(0).standard_normal((16, 16))
    freq, power = map_spectrum(torch.tensor(u)[None])
    p = 10**(np.fft.ifftshift(power_spectrum(u)) / 10)
    radius = np.hypot(np.fft.fftfreq(16)[:, None], np.fft.fftfreq(16))
    rings = np.array([p[np.abs(radius - f) < .5 / 16].mean() for f in freq])
    assert np.allclose(power / power.max(), rings / rings.max(), rtol=1e-3)

@every
def test_three_states_are_what_they_say(name):
    b = adapted(name, blocks=[0, 2])
    x, seen = images(b), {}
    s = feature_spectra(b, x)
    assert list(s.power) == ['off', 'before', 'on'] and s.blocks == [0, 1, 2] and all(p.shape == (3, 3, len(s.frequency)) for p in s.power.values())
    with torch.no_grad():
        b.eval()
        on = b.features(x, [0, 1, 2])
        with disabled(b): off = b.features(x, [0, 1, 2])
        handle = b.blocks[2].adapter.register_forward_hook(lambda m, i, o: seen.update(tokens=i[0]))
        b.features(x, [2]); handle.remove()
    for i in range(3):
        assert np.allclose(s.power['on'][:, i], map_spectrum(on[i])[1]) and np.allclose(s.power['off'][:, i], map_spectrum(off[i])[1])
    before = seen['tokens'][:, b.prefix:].transpose(1, 2).unflatten(2, b.grid)
    assert np.allclose(s.power['before'][:, 2], map_spectrum(before)[1])
    assert np.array_equal(s.power['before'][:, 1], s.power['on'][:, 1])    # no adapter there
    assert np.allclose(s.power['before'][:, 0], s.power['off'][:, 0])      # none before it
    assert not np.allclose(s.power['before'][:, 2], s.power['on'][:, 2])

@pytest.mark.parametrize('name, op', [*((n, 'hybrid') for n in BUILD), *(('registers', op) for op in OPS if op != 'hybrid')])
def test_identity_at_start_leaves_the_spectra(name, op):
    b = adapted(name, op, init='identity')
    p = feature_spectra(b, images(b)).power
    assert np.array_equal(p['off'], p['before']) and np.array_equal(p['off'], p['on'])

def test_batches_do_not_matter_and_images_stay_apart():
    b = adapted()
    x = images(b, 5)
    whole, parts, alone = feature_spectra(b, x), feature_spectra(b, x, batch_size=2), feature_spectra(b, x[3:4])
    for k in whole.power: assert np.allclose(whole.power[k], parts.power[k], rtol=1e-4) and np.allclose(whole.power[k][3], alone.power[k][0], rtol=1e-4)
    w = noise_weights(b, x)
    assert np.allclose(w, noise_weights(b, x, batch_size=2), atol=1e-6)

def test_any_way_to_adapt():
    assert list(feature_spectra(tower(), images(tower())).power) == ['off']
    b = adapt(tower(), 'lora', rank=2)
    assert list(feature_spectra(b, images(b)).power) == ['off', 'on']
    assert feature_spectra(b, images(b), blocks=[1]).blocks == [1]

@pytest.mark.parametrize('ask', [feature_spectra, noise_weights])
@pytest.mark.parametrize('fails', [False, True])
def test_nothing_is_left_behind(ask, fails):
    "Hooks, modes and modules are as before, also when the tower fails inside."
    b = adapted()
    b.train()
    b.blocks[1].adapter.dropout.eval()                                     # a mode of its own
    before, blocks = [(m, m.training) for m in b.modules()], list(b.blocks)
    handle = b.blocks[2].base.register_forward_hook(lambda *_: 1 / 0) if fails else None
    try: ask(b, images(b))
    except ZeroDivisionError: assert fails
    else: assert not fails
    if handle: handle.remove()
    assert hooks(b) == 0 and all(m.training == was for m, was in before) and all(i is j for i, j in zip(b.blocks, blocks)) and len(adapters(b)) == 3
    assert all(p.grad is None for p in b.parameters())

def test_change_is_paired():
    "The interval is that of differences: what all images share does not widen it."
    rng = np.random.default_rng(0)
    level = 10**rng.uniform(-2, 2, (40, 1, 1))
    s = FeatureSpectra('toy', np.array([.1, .2]), [0], dict(off=level * np.ones((40, 1, 2)), on=level * 2 * np.exp(.1 * rng.standard_normal((40, 1, 2)))))
    value, lo, hi = s.change()
    assert np.allclose(value, 10 * np.log10(2), atol=.25) and (lo < value).all() and (value < hi).all() and (hi - lo < .4).all()
    back = s.change('on', 'off')
    assert np.allclose(back[0], -value)
    assert np.allclose(s.change('off', 'off', s)[0], 0)

def test_objects_show_themselves():
    b = adapted(op='hybrid')
    for o in (feature_spectra(b, images(b)), learned_response(b)):
        assert o._repr_html_().startswith('<table>') and o.show().axes and 'array' not in repr(o)
    assert len(feature_spectra(b, images(b)).show(2.5).axes) == 3 and len(learned_response(adapted(op='mona')).show().axes) == 1


# responses

@every
@pytest.mark.parametrize('op', FILTERS)
def test_the_filter_is_read_back(name, op):
    "What an impulse says is what the module says of itself, on any grid."
    b = adapted(name, op, blocks=[1])
    f, (h, w) = adapters(b)[1].op.filter, b.grid
    with torch.no_grad():
        for p in f.parameters(): p.add_(torch.randn(p.shape) * .3)
        half = f.gain.detach()[:, None, None].expand(-1, h, w // 2 + 1) if op == 'gain' else f.response(h, w).expand(8, h, w // 2 + 1)
    r = learned_response(b)
    read = np.fft.ifftshift(r.filter[0], (-2, -1))
    assert r.blocks == [1] and read.shape == (8, h, w)
    inner = slice(1, (w + 1) // 2)                                         # columns whose mirror image is another column
    assert np.allclose(read[..., inner], half.numpy()[..., inner], atol=1e-4)
    mirrored = half[:, (-torch.arange(h)) % h]
    assert np.allclose(read[..., 0], ((half + mirrored) / 2).numpy()[..., 0], atol=1e-4)      # a real map has one factor for f and -f
    mean, lo, hi = r.curves()
    assert mean.shape == lo.shape == (1, len(r.frequency)) and (lo <= hi).all()
    if h == w: assert np.isclose(mean[0, 0], read[:, 0, 0].mean())
    if op == 'gain': assert np.ptp(mean) < 1e-4

def test_an_empty_operation_passes_everything():
    b = adapted(op='mona')
    for a in adapters(b).values():
        for conv in (a.op.dw3, a.op.dw5, a.op.dw7, a.op.mix): nn.init.zeros_(conv.weight)
    r = learned_response(b)
    assert r.filter is None and np.allclose(r.whole, 1)                    # biases add, they do not filter

@every
def test_a_gain_is_absorbed_by_the_convolutions(name):
    "The released filter and kernels multiplied by it are one and the same response."
    b, twin = adapted(name, 'gain'), adapted(name, 'mona')
    with torch.no_grad():
        for a, t in zip(adapters(b).values(), adapters(twin).values()):
            a.op.filter.gain.copy_(torch.randn(8))
            t.op.load_state_dict({k: v for k, v in a.op.state_dict().items() if 'filter' not in k})
            for conv in (t.op.dw3, t.op.dw5, t.op.dw7): conv.weight.mul_(a.op.filter.gain[:, None, None, None])
    assert np.allclose(learned_response(b).whole, learned_response(twin).whole, atol=1e-5)

@pytest.mark.parametrize('op', OPS)
def test_white_noise_comes_out_with_the_response(op):
    "The power of what an operation makes of white noise (on a map without borders) is the square of its response."
    b = adapted(op=op, blocks=[0])
    o = adapters(b)[0].op.eval()
    for m in o.modules():
        if isinstance(m, nn.Conv2d): m.padding_mode = 'circular'
    u = torch.randn(3000, 8, 4, 4)
    with torch.no_grad():
        w = o.weigh(o.filter(u)).flatten(1).mean(0).numpy() if o.weigh else None
        if o.weigh: o.weigh = type(o.weigh)(*o.weigh[:-2], _Constant(w))      # keeps being a module, says the mean
        v = o(u) - o(torch.zeros_like(u[:1]))
    whole = learned_response(b, None if w is None else w.reshape(1, 1, 3)).whole[0]
    measured = (torch.fft.fft2(v).abs().square().mean(0) / 16).sum(0).div(8).sqrt()
    assert np.allclose(np.fft.ifftshift(whole), measured, rtol=.05)

class _Constant(nn.Module):
    def __init__(self, w): super().__init__(); self.w = torch.tensor(w)
    def forward(self, u): return self.w.view(1, 3, 1, 1).expand(len(u), 3, 1, 1)

def test_measuring_changes_nothing():
    b = adapted()
    before = {k: v.clone() for k, v in b.state_dict().items()}
    x = images(b)
    with torch.no_grad(): y = b.embed_image(x)
    learned_response(b), noise_weights(b, x), feature_spectra(b, x)
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    with torch.no_grad(): assert torch.equal(b.embed_image(x), y)


# noise

@pytest.mark.parametrize('name, op', [*((n, 'hybrid') for n in BUILD), *(('wide', op) for op in WEIGHED if op != 'hybrid')])
def test_weights_are_shares(name, op):
    b = adapted(name, op, blocks=[0, 2])
    x = images(b, 4)
    w = noise_weights(b, x)
    assert w.shape == (4, 2, 3) and np.allclose(w.sum(2), 1, atol=1e-5) and (w > 0).all() and w.std(0).max() > 0
    for a in adapters(b).values(): nn.init.zeros_(a.op.weigh[3].weight), nn.init.zeros_(a.op.weigh[3].bias)
    assert np.allclose(noise_weights(b, x), 1 / 3)

def planted(scenes, levels, slope, seed, scatter=1., wobble=.3):
    "Weights (n, 1, 3) that follow the level by `slope`, on top of each scene's own value."
    rng = np.random.default_rng(seed)
    scene, level = np.repeat(np.arange(scenes), levels), np.tile(np.arange(levels), scenes)
    w = np.asarray(slope) * level[:, None] + scatter * rng.standard_normal((scenes, 3))[scene] + wobble * rng.standard_normal((len(scene), 3))
    return w[:, None], level, scene

@laws
@given(seed=st.integers(0, 99), within=st.booleans())
def test_ranks_count(seed, within):
    "Units of the noise, a monotone scale and the names of scenes do not matter; the other direction turns the sign."
    w, x, s = planted(8, 4, (.3, 0, -.5), seed)
    t = noise_correlation(w, x, s, within, draws=60)
    other = noise_correlation(w, np.exp(3. * x) - 7, 100 - s, within, draws=60)
    assert np.allclose(t.rho, other.rho) and ((t.lo <= t.rho) & (t.rho <= t.hi)).all() and t.p.between(1 / 61, 1).all()
    assert np.allclose(noise_correlation(w, -x, s, within, draws=60).rho, -t.rho)

def test_within_a_scene_sees_what_scenes_hide():
    w, x, s = planted(20, 5, (.2, 0, -.2), 0, scatter=3, wobble=.05)
    inside, across = (noise_correlation(w, x, s, k) for k in (True, False))
    assert inside.rho.iloc[0] > .9 and inside.rho.iloc[2] < -.9 and across.rho.abs().max() < .5 and inside.p.iloc[0] < .01
    assert np.allclose(inside.moves.iloc[[0, 2]], (.8, -.8), atol=.1)
    constant = noise_correlation(np.full((100, 2, 3), 1 / 3), x, s)
    assert (constant.rho == 0).all() and (constant.p == 1).all()

@pytest.mark.parametrize('within', [False, True])
def test_chance_is_rarely_called_noise(within):
    "Without any dependence, scenes differing a lot: the smallest p of a table is below 0.1 in about a tenth of the tables, and intervals rarely miss 0."
    found = [noise_correlation(*planted(10, 4, (0, 0, 0), seed)[:2], planted(10, 4, 0, seed)[2], within, draws=99, seed=seed) for seed in range(60)]
    alarms, missed = sum(t.p.min() < .1 for t in found), sum(((t.lo > 0) | (t.hi < 0)).any() for t in found)
    assert alarms <= 14 and missed <= 9                                    # of 60: 5.4 and 3 expected; more happens once in a thousand times

def test_intervals_hold_the_truth():
    "All three at once, at correlations that are not 0; the truth from very many scenes."
    slope = (.15, .4, -.8)
    truth = noise_correlation(*planted(4000, 4, slope, 1), draws=2).rho
    held = [((t.lo <= truth) & (truth <= t.hi)).all() for t in (noise_correlation(*planted(20, 4, slope, seed), draws=150, seed=seed) for seed in range(2, 62))]
    assert sum(held) >= 51                                                 # of 60, 57 wanted


# refusals

def refuses(match, f, *args, **kw):
    with pytest.raises(ValueError, match=match) as e: f(*args, **kw)
    assert '\n' not in str(e.value)

def test_refusals():
    bare, mona, lora = tower(), adapted(op='mona'), adapt(tower(), 'lora', rank=2)
    x = images(bare)
    for f in (learned_response, lambda b: noise_weights(b, x)):
        refuses('no adapters behind its blocks: call', f, bare)
        refuses('lora has no map operation', f, lora)
    refuses("'mona' has no noise module", noise_weights, mona, x)
    refuses("'mona' has no filter", learned_response(mona).curves)
    refuses("choose 'filter' or 'whole'", learned_response(mona).curves, 'all')
    refuses('tensor', feature_spectra, bare, x.numpy())
    refuses('at least one image', feature_spectra, bare, x[:0])
    refuses('takes images', feature_spectra, bare, x[..., :-8])
    refuses('taps must be rising', feature_spectra, bare, x, [2, 1])
    refuses('at least 4 x 4', map_spectrum, torch.rand(2, 3, 9))
    s = feature_spectra(bare, x)
    refuses("state 'on'", s.change)
    refuses('needs at least 2', feature_spectra(bare, x[:1]).change, 'off', 'off')
    refuses('the same images', s.change, 'off', 'off', feature_spectra(bare, x[:2]))

def test_refuses_what_is_not_linear(monkeypatch):
    class Squared(nn.Module):
        def __init__(self, channels): super().__init__()
        def forward(self, u): return u * u
    monkeypatch.setitem(OPS, 'squared', Squared)
    refuses("block 1: op 'squared' is not linear", learned_response, adapted(op='squared', blocks=[1]))
    monkeypatch.setitem(OPS, 'only gain', Gain)                            # an operation that is a filter and nothing else
    b = adapted(op='only gain')
    adapters(b)[0].op.gain.data.fill_(-2)
    r = learned_response(b)
    assert np.allclose(r.filter[0], -2) and np.allclose(r.whole[0], 2) and np.allclose(r.whole[1], 1)

def test_correlation_refuses():
    w, x, s = planted(5, 3, 0, 0)
    refuses('with the same n', noise_correlation, w, x[:-1], s)
    refuses('with the same n', noise_correlation, w[..., :2], x, s)
    refuses('at least 3 scenes and 2 levels', noise_correlation, w, x, s % 2)
    refuses('at least 3 scenes and 2 levels', noise_correlation, w, 0 * x, s)
    refuses('one level of noise only', noise_correlation, w, x, None, within=True)
