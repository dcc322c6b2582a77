"Laws of the map operations and the token bottleneck around them."
import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from htlab.adapter import OPS, Adapter, Gain, MapOp, Ring, Spectral, from_released

GOLDEN = Path(__file__).parent / 'golden'
RELEASED = dict(mona='baseline', noise='noise_aware', gain='freq_enhanced', hybrid='hybrid')
laws = settings(max_examples=8, deadline=None, derandomize=True)
every_op = pytest.mark.parametrize('op', OPS)
shapes = dict(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), prefix=st.integers(0, 5), batch=st.integers(1, 3))

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def adapter(op, width=12, bottleneck=4, init='reference', **kw):
    "A small adapter whose filters are not at their start."
    a = Adapter(width, bottleneck, op, init=init, **kw)
    for m in a.modules():
        if isinstance(m, (Gain, Ring)): [torch.nn.init.uniform_(p, .3, 1.7) for p in m.parameters()]
        if isinstance(m, Spectral): torch.nn.init.uniform_(m.delta, -.7, .7)
    return a

@pytest.mark.parametrize('op', RELEASED)
def test_release_is_reproduced(op):
    t = load_file(GOLDEN / f'adapter_{RELEASED[op]}.safetensors')
    part = lambda start: from_released({k.removeprefix(start): v for k, v in t.items() if k.startswith(start)})
    a = Adapter(24, 8, op, grid=(5, 7)).eval()
    a.load_state_dict(part('param.'))
    x = t['input'].requires_grad_()
    out = a(x)
    (out * t['grad_output']).sum().backward()
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(out, t['output'], **close)
    torch.testing.assert_close(x.grad, t['grad_input'], **close)
    grads = part('grad.')
    assert grads.keys() == dict(a.named_parameters()).keys()
    for name, p in a.named_parameters(): torch.testing.assert_close(p.grad, grads[name], **close)

@pytest.mark.parametrize('place', ['visual.trunk.blocks.3.mona.clip_mona.', 'visual.transformer.resblocks.3.mona.clip_mona.', 'visual.transformer.resblocks.3.mona.'])
def test_released_checkpoint_names(place):
    one = {k.removeprefix('param.'): v for k, v in load_file(GOLDEN / 'adapter_hybrid.safetensors').items() if k.startswith('param.')}
    renamed = from_released({place + k: v for k, v in one.items()})
    assert renamed.keys() == {f'3.{k}' for k in Adapter(24, 8, 'hybrid').state_dict()}
    with pytest.raises(ValueError, match='project9'): from_released({place + 'project9.weight': one['norm.weight']})

@every_op
@laws
@given(**shapes)
def test_identity_at_start_is_exact(op, grid, prefix, batch):
    a = Adapter(12, 4, op, prefix=prefix, grid=grid)
    x = torch.randn(batch, prefix + math.prod(grid), 12)
    for mode in (a.train(), a.eval()): assert torch.equal(mode(x), x)
    assert torch.equal(a(x.bfloat16()), x.bfloat16())

@every_op
@laws
@given(**shapes)
def test_prefix_tokens_pass_the_map_by(op, grid, prefix, batch):
    "Prefix outputs do not depend on the patches, nor the patches on the prefix, and images not on each other."
    a = adapter(op, prefix=prefix, grid=grid).eval()
    x = torch.randn(batch, prefix + math.prod(grid), 12)
    other = torch.randn_like(x)
    mixed = torch.cat([x[:, :prefix], other[:, prefix:]], 1)
    torch.testing.assert_close(a(mixed)[:, :prefix], a(x)[:, :prefix])
    torch.testing.assert_close(a(mixed)[:, prefix:], a(other)[:, prefix:])
    torch.testing.assert_close(a(x), torch.cat([a(x[i:i + 1]) for i in range(batch)]), atol=1e-5, rtol=1e-5)

@laws
@given(**shapes)
def test_patch_order_is_rows_then_columns(grid, prefix, batch):
    "A Dirac kernel in one corner of DW3 moves the map by one row and one column."
    op = MapOp(4)
    for p in op.parameters(): torch.nn.init.zeros_(p)
    op.dw3.weight.data[:, :, 0, 0] = 3                          # reads the neighbour above and to the left
    a = Adapter(4, 4, 'mona', prefix=prefix, grid=grid)
    a.op = op
    u = torch.randn(batch, 4, *grid)
    seen = []
    op.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    x = torch.cat([torch.randn(batch, prefix, 4), u.flatten(2).transpose(1, 2)], 1)
    torch.nn.init.eye_(a.down.weight), torch.nn.init.zeros_(a.down.bias)
    a(x)
    into, out = seen[0]
    torch.testing.assert_close(into, u, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[..., 1:, 1:], (into[..., 1:, 1:] + into[..., :-1, :-1]))

@every_op
@laws
@given(k=st.integers(1, 4), shape=st.sampled_from([(1, 1), (2, 3), (3, 2), (5, 7)]), prefix=st.integers(0, 5))
def test_other_grid_of_same_aspect(op, k, shape, prefix):
    "An adapter set up for one grid computes on another of the same shape what one set up for that grid computes."
    big = tuple(k * s for s in shape)
    a, b = adapter(op, grid=shape, prefix=prefix).eval(), Adapter(12, 4, op, grid=big, prefix=prefix).eval()
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, prefix + math.prod(big), 12)
    assert torch.equal(a(x), b(x)) and a.grid_of(x.shape[1]) == big

@pytest.mark.parametrize('grid,prefix,n', [((14, 14), 1, 196), ((14, 14), 1, 51), ((5, 7), 0, 36), ((5, 7), 4, 4), ((5, 7), 4, 2)])
def test_wrong_number_of_tokens(grid, prefix, n):
    with pytest.raises(ValueError, match=f'{n} tokens'): Adapter(12, 4, grid=grid, prefix=prefix)(torch.randn(1, n, 12))

@pytest.mark.parametrize('kw,says', [(dict(op='hybird'), "'hybrid'"), (dict(op='zzz'), 'mona, noise'), (dict(init='identiy'), "'identity'"), (dict(bottleneck=3), 'at least 4'),
                                     (dict(width=0), 'width=0'), (dict(prefix=-1), 'prefix=-1'), (dict(grid=(0, 4)), 'grid rows=0'), (dict(bottleneck=8.), 'bottleneck=8.0'), (dict(dropout=2.), 'dropout')])
def test_wrong_settings(kw, says):
    with pytest.raises(ValueError, match=says) as e: Adapter(**{'width': 12, 'bottleneck': 4, **kw})
    assert '\n' not in str(e.value)

def test_wrong_width():
    with pytest.raises(ValueError, match=r'\(B, N, 12\)'): Adapter(12, 4)(torch.randn(1, 197, 13))

@every_op
def test_gradcheck(op):
    a = adapter(op, width=5, grid=(3, 4)).double().eval()
    x = torch.randn(2, 13, 5, dtype=torch.double, requires_grad=True)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in a.named_parameters()))
    call = lambda x, *p: torch.func.functional_call(a, dict(zip(names, p)), (x,))
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)

@every_op
@pytest.mark.parametrize('how', ['autocast', 'weights', 'input'])
def test_bf16_close_to_fp32(op, how):
    "Under autocast, with everything in bfloat16, and as a float32 adapter behind a bfloat16 tower; gradients included."
    torch.manual_seed(0)
    a = adapter(op, width=32, bottleneck=16, grid=(6, 5))
    a.eval()
    x = torch.randn(2, 31, 32)
    b = copy.deepcopy(a)
    if how == 'weights': b.bfloat16()
    low = x if how == 'autocast' else x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'): out = b(low)
    assert out.dtype == low.dtype
    want = a(x)
    assert (out.float() - want).norm() < .02 * want.norm()
    want.square().sum().backward(), out.float().square().sum().backward()
    for (n, p), q in zip(a.named_parameters(), b.parameters()):
        assert q.grad.isfinite().all() and (q.grad.float() - p.grad).norm() < .1 * p.grad.norm() + 1e-3, n

@laws
@given(h=st.integers(1, 20), w=st.integers(1, 20), value=st.floats(-3, 3))
def test_ring_answers_a_constant_alike_on_any_grid(h, w, value):
    ring = Ring(1)
    torch.nn.init.normal_(ring.rings)
    torch.testing.assert_close(ring(torch.full((1, 1, h, w), value)), torch.full((1, 1, h, w), value) * ring.rings[0].detach(), atol=1e-5, rtol=1e-5)

@laws
@given(p=st.integers(2, 6), q=st.integers(2, 6), a=st.tuples(st.integers(1, 3), st.integers(1, 3)), b=st.tuples(st.integers(1, 3), st.integers(1, 3)), data=st.data())
def test_ring_answers_a_frequency_alike_on_any_grid(p, q, a, b, data):
    "A grating of fy = i/p, fx = j/q cycles per token is scaled by the same factor on all grids that hold whole periods of it."
    i, j = data.draw(st.integers(0, p - 1)), data.draw(st.integers(0, q - 1))
    ring = Ring(1, rings=data.draw(st.integers(2, 9)))
    torch.nn.init.normal_(ring.rings)
    f = math.hypot((i / p + .5) % 1 - .5, (j / q + .5) % 1 - .5) / math.sqrt(.5) * (len(ring.rings) - 1)
    lo = min(int(f), len(ring.rings) - 2)
    want = torch.lerp(ring.rings[lo], ring.rings[lo + 1], f - lo)
    for kh, kw in (a, b):
        r, c = torch.meshgrid(torch.arange(p * kh), torch.arange(q * kw), indexing='ij')
        wave = torch.cos(2 * math.pi * (i * r / p + j * c / q))[None, None]
        torch.testing.assert_close(ring(wave), want * wave, atol=2e-5, rtol=1e-4)

@laws
@given(h=st.integers(1, 12), w=st.integers(1, 12))
def test_filters_start_as_identity(h, w):
    u = torch.randn(2, 4, h, w)
    for f in (Gain(4), Ring(4), Spectral(4)): torch.testing.assert_close(f(u), u)

@laws
@given(h=st.integers(1, 9), w=st.integers(1, 9))
def test_gain_is_the_released_fft(h, w):
    gain, u = Gain(4), torch.randn(2, 4, h, w)
    torch.nn.init.normal_(gain.gain)
    fft = torch.fft.irfft2(torch.fft.rfft2(u) * gain.gain[:, None, None], s=(h, w))
    torch.testing.assert_close(gain(u), fft, atol=1e-5, rtol=1e-5)

@laws
@given(h=st.integers(1, 12), w=st.integers(1, 12), nodes=st.tuples(st.integers(1, 6), st.integers(2, 6)))
def test_spectral_is_a_real_filter_on_any_grid(h, w, nodes):
    "Its kernel is real and even, so it shifts nothing; a constant is scaled by 1 + H(0) on every grid; channels do not meet."
    f = Spectral(2, nodes)
    torch.nn.init.normal_(f.delta)
    u = torch.randn(1, 2, h, w)
    torch.testing.assert_close(f(torch.ones(1, 2, h, w)), (1 + f.delta[None, :, :1, :1]).expand(1, 2, h, w).detach(), atol=1e-5, rtol=1e-5)
    turned = lambda m: m.flip(-1, -2).roll((1, 1), (-2, -1))                   # u(-y, -x)
    half = f.delta.data.roll(-1, 1).flip(1)                                    # H(-fy): the filter seen in a mirror
    mirror = Spectral(2, nodes)
    mirror.delta.data = half
    torch.testing.assert_close(f(u.flip(-2).roll(1, -2)), mirror(u).flip(-2).roll(1, -2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(f(turned(u)), turned(f(u)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(f(u * torch.tensor([1., 0]).view(1, 2, 1, 1))[:, 1], torch.zeros(1, h, w))

def test_spectral_nodes_are_the_frequencies_of_its_own_grid():
    f = Spectral(3, (14, 8))
    torch.nn.init.normal_(f.delta)
    torch.testing.assert_close(f.response(14, 14), 1 + f.delta, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f.response(28, 28)[:, ::2, ::2], 1 + f.delta, atol=1e-5, rtol=1e-5)

def test_gain_holds_no_fft_and_ring_sees_all_channels_alike():
    assert Ring(64).rings.numel() == Ring(4).rings.numel() == 8
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profile: adapter('hybrid', grid=(4, 4))(torch.randn(1, 17, 12))
    assert not [e.key for e in profile.key_averages() if 'fft' in e.key]

@every_op
def test_noise_weights_are_one_triple_per_image(op):
    a = adapter(op, grid=(4, 5))
    if a.op.weigh:
        w = a.op.weigh(torch.randn(3, 4, 4, 5))
        assert w.shape == (3, 3, 1, 1) and torch.allclose(w.sum(1), torch.ones(3, 1, 1))
    assert bool(a.op.weigh) == (op in ('noise', 'hybrid', 'hybrid-ring', 'hybrid-spectral'))

@every_op
def test_every_parameter_learns(op):
    "With the reference start every parameter gets a gradient; from the identity the first step wakes the up-projection, the second all."
    x, y = torch.randn(4, 21, 12), torch.randn(4, 21, 12)
    a = adapter(op, bottleneck=32, grid=(4, 5))
    (a(x) * y).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in a.named_parameters())
    b = Adapter(12, 32, op, grid=(4, 5))         # wide enough that no estimator is born dead
    opt = torch.optim.SGD(b.parameters(), 1e-2)
    for awake in ({'up.weight', 'up.bias'}, set(dict(b.named_parameters()))):
        opt.zero_grad(); (b(x) * y).sum().backward(); opt.step()
        assert {n for n, p in b.named_parameters() if p.grad.abs().sum() > 0} == awake

def test_reference_start_is_not_the_identity_and_dropout_acts_in_training_only():
    a, x = Adapter(12, 4, grid=(4, 5), init='reference', dropout=.5), torch.randn(2, 21, 12)
    assert not torch.equal(a(x), a(x)) and torch.equal(a.eval()(x), a(x)) and not torch.allclose(a(x), x)

def test_html():
    html = Adapter(12, 4)._repr_html_()
    assert 'hybrid' in html and f'{sum(p.numel() for p in Adapter(12, 4).parameters())}' in html
