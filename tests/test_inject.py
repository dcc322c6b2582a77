"Laws of adapters inside towers, on small random towers of timm and open_clip: CLS, registers, no prefix, square and not."
import copy
import json
import os
from types import SimpleNamespace

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from open_clip.transformer import Transformer, VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from htlab import __version__
from htlab.adapter import OPS, Adapter
from htlab.backbone import Backbone
from htlab.adapter import from_released
from htlab.inject import (Adapted, adapt, adapter_state, adapters, add_adapters, disabled, load_adapters, load_released_adapters, merge, method, restore,
                          save_adapters, trainable)

def vit(size=(32, 32), **kw):
    return timm.create_model('vit_tiny_patch16_224', img_size=size, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=0, **kw)

def clip(size=(32, 32)): return VisionTransformer(size, 8, 24, 3, 2, 2., output_dim=10)

BUILD = {'cls': vit, 'wide': lambda: vit((24, 56)), 'registers': lambda: vit((40, 24), reg_tokens=4),
         'no-prefix': lambda: vit(class_token=False, global_pool='avg'), 'open_clip': clip, 'open_clip-wide': lambda: clip((24, 40))}
MADE = {}
TAPS = [0, 1, 2]

def tower(name='cls', seed=0):
    "A fresh copy of a small frozen tower."
    if (name, seed) not in MADE:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            MADE[name, seed] = Backbone(BUILD[name](), f'toy-{name}')
    return copy.deepcopy(MADE[name, seed])

def adapted(name='cls', op='hybrid', **kw): return add_adapters(tower(name), op, **{'bottleneck': 8, 'init': 'reference', **kw})
def images(b, n=2): return torch.rand(n, 3, *b.size)

@torch.no_grad()
def look(b, x): return [*b.features(x, TAPS), b.embed_image(x)]
def equal(a, b): return all(torch.equal(i, j) for i, j in zip(a, b, strict=True))

every = pytest.mark.parametrize('name', BUILD)
every_op = pytest.mark.parametrize('op', OPS)
laws = settings(max_examples=6, deadline=None, derandomize=True)
some_blocks = st.sets(st.integers(0, 2), min_size=1).map(sorted)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

@every
@every_op
def test_identity_at_start_and_off_equals_base(name, op):
    b = tower(name)
    x, blocks = images(b), list(b.blocks)
    base = look(b, x)
    assert add_adapters(b, op, 8) is b and equal(look(b, x), base)
    restore(b), add_adapters(b, op, 8, init='reference')
    on = look(b, x)
    assert not any(torch.equal(i, j) for i, j in zip(on, base))
    with disabled(b) as same: assert same is b and equal(look(b, x), base) and all(i is j for i, j in zip(b.blocks, blocks))
    assert equal(look(b, x), on)

@every
@every_op
def test_only_adapters_learn(name, op):
    b = adapted(name, op)
    b.train()
    before = {k: v.clone() for k, v in b.state_dict().items()}
    inside = {id(p) for a in adapters(b).values() for p in a.parameters()}
    assert {id(p) for p in trainable(b)} == inside
    opt = torch.optim.AdamW(trainable(b), 1e-2)
    b.embed_image(images(b)).square().sum(1).add(b.features(images(b), [2])[0].square().mean()).sum().backward()
    opt.step()
    after = b.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {k for k in before if '.adapter.' in k}
    base = restore(b).state_dict()
    assert all(torch.equal(v, base[k]) for k, v in MADE[name, 0].state_dict().items()) and not trainable(b)

@every
@laws
@given(blocks=some_blocks, op=st.sampled_from(list(OPS)))
def test_removal_leaves_no_trace(name, blocks, op):
    b = tower(name)
    x, modules, keys, tree = images(b), list(b.blocks), list(b.state_dict()), [id(m) for m in b.modules()]
    base = look(b, x)
    add_adapters(b, op, 8, blocks=blocks, init='reference')
    assert sorted(adapters(b)) == blocks and all((m is b.blocks[i]) == (i not in blocks) for i, m in enumerate(modules))
    with pytest.raises(RuntimeError, match='boom'):
        with disabled(b): raise RuntimeError('boom')
    assert sorted(adapters(b)) == blocks
    restore(b)
    assert all(i is j for i, j in zip(b.blocks, modules)) and [id(m) for m in b.modules()] == tree and list(b.state_dict()) == keys
    assert equal(look(b, x), base) and not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m) for m in b.modules())
    assert restore(b) is b                                     # nothing there: nothing to do

@every
@laws
@given(blocks=some_blocks)
def test_intermediates_are_the_adapted_features(name, blocks):
    "What forward_intermediates returns is what the wrapped block put out; adapters are felt at and behind their block only."
    b = adapted(name, blocks=blocks)
    x, seen = images(b), {}
    hooks = [m.register_forward_hook(lambda m, i, o, k=k: seen.setdefault(k, o)) for k, m in enumerate(b.blocks)]
    on = look(b, x)[:3]
    for h in hooks: h.remove()
    with disabled(b): off = look(b, x)[:3]
    for i in TAPS:
        assert torch.equal(seen[i][:, b.prefix:].transpose(1, 2).unflatten(2, b.grid), on[i])
        assert torch.equal(on[i], off[i]) == (i < blocks[0])

@every
def test_adapter_matches_by_hand(name):
    "A wrapped block is adapter(block(x)) with the tower's own grid and prefix."
    b = adapted(name)
    x = torch.randn(2, b.prefix + b.grid[0] * b.grid[1], b.width)
    w = b.blocks[1]
    assert torch.equal(w(x), w.adapter(w.base(x)))
    assert w.adapter.config['grid'] == b.grid and w.adapter.config['prefix'] == b.prefix

@every
def test_deepcopy_is_independent(name):
    a = adapted(name)
    x, c = images(a), copy.deepcopy(a)
    before = look(a, x)
    assert equal(look(c, x), before) and not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in c.parameters()}
    with torch.no_grad(): [p.zero_() for p in c.parameters()]
    assert equal(look(a, x), before) and not equal(look(c, x), before)
    restore(c)
    assert len(adapters(a)) == 3 and not adapters(c)

@every
def test_checkpointing_gives_the_same_gradients(name):
    b, grads = adapted(name), []
    x = images(b)
    for on in (False, True):
        b.tower.set_grad_checkpointing(on)
        b.train(), b.zero_grad(), torch.manual_seed(1)                     # dropout on, the same one
        sum(f.square().mean() for f in b.features(x, TAPS)).backward()
        grads.append([p.grad.clone() for p in trainable(b)])
    for g, h in zip(*grads): torch.testing.assert_close(g, h)
    assert all(g.abs().sum() > 0 for g in grads[1][:5])

@pytest.mark.parametrize('name,op', [('registers', 'hybrid'), ('open_clip', 'hybrid-ring')])
def test_compile(name, op):
    b = adapted(name, op, blocks=[0, 2])
    x, close = images(b), dict(atol=1e-5, rtol=1e-4)
    run = torch.compile(b.features, backend='aot_eager')
    def learn(features):
        b.zero_grad()
        y = features(x, TAPS)
        sum(f.square().mean() for f in y).backward()
        return [*y, *(p.grad.clone() for p in trainable(b))]
    torch.testing.assert_close(learn(run), learn(b.features), **close)
    with disabled(b), torch.no_grad(): torch.testing.assert_close(run(x, TAPS), tower(name).features(x, TAPS), **close)

def header(file):
    with safe_open(file, 'pt') as f: return json.loads(f.metadata()['htlab'])

@every
@every_op
def test_save_and_load(name, op, tmp_path):
    a = adapted(name, op, blocks=[0, 2], dropout=.2)
    x, file = images(a), save_adapters(a, tmp_path / 'a.safetensors')
    assert list(tmp_path.iterdir()) == [file]
    b = load_adapters(tower(name), file)
    assert equal(look(b, x), look(a, x)) and not any(m.training for m in b.blocks.modules())
    assert {i: m.config for i, m in adapters(b).items()} == {i: m.config for i, m in adapters(a).items()}
    with torch.no_grad(): [p.zero_() for p in trainable(b)]
    ids = [id(p) for p in trainable(b)]
    assert load_adapters(b, file) is b and equal(look(b, x), look(a, x)) and [id(p) for p in trainable(b)] == ids    # an optimiser keeps its parameters
    head = header(file)
    assert head['base'] == f'toy-{name}' and head['hash'] == a.hash and head['adapter']['op'] == op and head['version'] == __version__
    assert head['preprocessing'] == dict(size=list(a.size), mean=list(a.mean), std=list(a.std), interpolation='bicubic')
    assert save_adapters(b, tmp_path / 'b.safetensors').read_bytes() == file.read_bytes()
    assert load_file(file).keys() == adapter_state(a).keys() == {f'{i}.{k}' for i in (0, 2) for k in Adapter(24, 8, op).state_dict()}

def test_state_dict_of_the_whole_model():
    a, b = adapted(), adapted()
    x = images(a)
    assert not equal(look(a, x), look(b, x))
    b.load_state_dict(a.state_dict())
    assert equal(look(a, x), look(b, x))

def test_adapters_take_another_image_size(tmp_path):
    file = save_adapters(adapted('cls'), tmp_path / 'a.safetensors')
    big = tower('cls')
    big.model.set_input_size((64, 64))
    big = Backbone(big.model, 'toy-cls')
    assert load_adapters(big, file).features(images(big), TAPS)[0].shape[-2:] == (8, 8)

def loud(f, says, kind=ValueError):
    with pytest.raises(kind, match=says) as e: f()
    assert '\n' not in str(e.value)

def test_add_is_refused_before_anything_is_touched():
    b = tower()
    x, tree = images(b), [id(m) for m in b.modules()]
    base = look(b, x)
    for kw, says in [(dict(op='hybird'), "'hybrid'"), (dict(blocks=[]), 'at least one'), (dict(blocks=[1, 3]), '0 to 2'), (dict(blocks=[-1]), '0 to 2'), (dict(blocks=[1, 1]), 'once'),
                     (dict(blocks=['1']), '0 to 2'), (dict(bottleneck=2), 'at least 4'), (dict(init='zero'), 'init'), (dict(dropout=3.), 'dropout')]:
        loud(lambda: add_adapters(b, **kw), says)
        assert [id(m) for m in b.modules()] == tree and equal(look(b, x), base)
    add_adapters(b, blocks=[1])
    loud(lambda: add_adapters(b, blocks=[2]), r'adapted already \(hybrid, blocks \[1\]\): call restore first')
    assert list(adapters(b)) == [1]

def test_sequence_first_blocks_are_refused():
    blocks = Transformer(24, 2, 2, batch_first=False).resblocks
    b = SimpleNamespace(blocks=blocks, width=24, prefix=1, grid=(4, 4), name='old', training=False)
    loud(lambda: add_adapters(b), 'batch_first=True')

def test_adding_inside_disabled_is_refused_and_undone():
    b = adapted()
    kept, on = adapters(b), look(b, x := images(b))
    with pytest.raises(RuntimeError, match='inside disabled'):
        with disabled(b): add_adapters(b, 'mona', 8, blocks=[1])
    assert adapters(b) == kept and equal(look(b, x), on)
    with disabled(b), disabled(b): assert not adapters(b)
    assert adapters(b) == kept

def test_mode_and_device_set_while_disabled_reach_the_adapters():
    b = adapted()
    b.train()
    assert all(a.training for a in adapters(b).values()) and not any(w.base.training for w in b.blocks)
    with disabled(b): b.eval()
    assert not any(a.training for a in adapters(b).values())
    with disabled(b): b.to('meta')
    assert all(p.is_meta for p in trainable(b))

def test_adding_freezes_the_base():
    b = tower()
    b.requires_grad_(True)
    add_adapters(b, blocks=[1])
    assert {id(p) for p in trainable(b)} == {id(p) for p in adapters(b)[1].parameters()}

def test_load_refuses(tmp_path):
    a = adapted(blocks=[0, 2])
    file = save_adapters(a, tmp_path / 'a.safetensors')
    head, state = header(file), load_file(file)
    def variant(drop=(), add={}, meta={}, **changes):
        "The file with tensors dropped or added, and the header changed."
        tensors = {k: v for k, v in state.items() if k not in drop} | add
        save_file(tensors, tmp_path / 'b.safetensors', metadata=meta or {'htlab': json.dumps(head | changes)})
        return tmp_path / 'b.safetensors'
    other = tower(seed=1)
    loud(lambda: load_adapters(other, file), f'toy-cls.*{a.hash[:12]}.*{other.hash[:12]}')
    other = tower(); other.name = 'quick'
    loud(lambda: load_adapters(other, file), "set backbone.name = 'toy-cls'")
    loud(lambda: load_adapters(Backbone(tower().model, 'toy-cls', mean=.4), file), 'mean')
    b = tower()
    tree = [id(m) for m in b.modules()]
    loud(lambda: load_adapters(b, variant(drop=['2.up.bias'])), '2.up.bias')
    loud(lambda: load_adapters(b, variant(add={'1.up.bias': torch.zeros(24)})), '1.up.bias')
    loud(lambda: load_adapters(b, variant(add={'0.up.bias': torch.zeros(23)})), '0.up.bias')
    loud(lambda: load_adapters(b, variant(meta={'format': 'pt'})), 'header')
    loud(lambda: load_adapters(b, variant(adapter=[])), 'header')
    loud(lambda: load_adapters(b, variant(meta={'htlab': '{'})), 'header')
    loud(lambda: load_adapters(b, variant(adapter=head['adapter'] | {'op': 'later'})), 'later')
    loud(lambda: load_adapters(b, tmp_path / 'none.safetensors'), 'none.safetensors', FileNotFoundError)
    loud(lambda: load_adapters(b, tmp_path), 'no such file', FileNotFoundError)
    (tmp_path / 'cut.safetensors').write_bytes(file.read_bytes()[:999])
    loud(lambda: load_adapters(b, tmp_path / 'cut.safetensors'), 'complete')
    assert [id(m) for m in b.modules()] == tree
    for kw in (dict(op='mona', blocks=[0, 2]), dict(bottleneck=16, blocks=[0, 2]), dict(blocks=[0, 1])):
        c = adapted(**kw)
        before = look(c, x := images(c))
        loud(lambda: load_adapters(c, file), 'call restore first')
        assert equal(look(c, x), before)

def test_save_is_whole_or_absent(tmp_path, monkeypatch):
    a, file = adapted(), tmp_path / 'a.safetensors'
    loud(lambda: save_adapters(tower(), file), 'no adapters')
    loud(lambda: save_adapters(a, tmp_path / 'no' / 'a.safetensors'), 'no folder', FileNotFoundError)
    save_adapters(a, file)
    old = file.read_bytes()
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        with pytest.raises(OSError, match='space'): save_adapters(adapted('cls', 'mona'), file)
    assert file.read_bytes() == old and os.listdir(tmp_path) == ['a.safetensors']

@pytest.mark.parametrize('name', ['wide', 'open_clip'])
@every_op
def test_bf16(name, op):
    "Under autocast, and float32 adapters behind a bfloat16 tower."
    b = adapted(name, op)
    x = images(b)
    want = look(b, x)
    with torch.autocast('cpu', torch.bfloat16): low = look(b, x)
    half = tower(name).bfloat16()
    add_adapters(half, op, 8)
    for i, a in adapters(half).items(): a.load_state_dict(adapters(b)[i].state_dict())
    for got in (low, look(half, x.bfloat16())):
        for f, w in zip(got, want): assert (f.float() - w).norm() < .05 * w.norm()

def test_open_clip_seams():
    "get_cast_dtype asks block 0; attention masks pass through, by position (checkpointing) and by name."
    b = adapted('open_clip')
    t = b.tower.transformer
    assert t.get_cast_dtype() is torch.float32
    x, n = torch.randn(2, 17, 24), 17
    mask = torch.full((n, n), float('-inf')).triu(1)
    w = t.resblocks[0]
    want = w.adapter(w.base(x, attn_mask=mask))
    assert torch.equal(w(x, attn_mask=mask), want) and torch.equal(w(x, None, None, mask), want) and not torch.allclose(w(x), want)
    assert t(x, attn_mask=mask).shape == x.shape

def test_trainable_is_by_structure():
    b, head = adapted(blocks=[1]), nn.Linear(3, 3)
    b.adapter_like_name = nn.Linear(2, 2).requires_grad_(False)                         # a name that would fool a substring
    both = nn.ModuleList([b, head])
    assert {id(p) for p in trainable(both)} == {id(p) for m in (b.blocks[1].adapter, head) for p in m.parameters()}
    assert isinstance(b.blocks[1], Adapted) and not any(p.requires_grad for p in b.blocks[1].base.parameters())


# the other ways to adapt: LoRA, the last blocks, the whole tower

def residual(): return Backbone(timm.create_model('resnet18', num_classes=0), 'toy-resnet')

OTHERS = ['lora', 'rslora', 'last-2', 'full']
every_way = pytest.mark.parametrize('way', OTHERS)
close = dict(atol=2e-6, rtol=1e-5)       # a LoRA computes attention from its four projections: another rounding

def learnt(b, x, lr=1e-2):
    "One step on a loss that reaches all blocks."
    b.train()
    opt = torch.optim.AdamW(trainable(b), lr)
    (b.embed_image(x).square()[:, 0].sum() + sum(f.square().mean() for f in b.features(x, TAPS))).backward()
    opt.step(), opt.zero_grad()
    return b.eval()

@every
@every_way
def test_other_ways_obey_the_same_laws(name, way, tmp_path):
    b = tower(name)
    x, tree, keys, weights = images(b), [id(m) for m in b.modules()], list(b.state_dict()), {k: v.clone() for k, v in b.state_dict().items()}
    base = look(b, x)
    assert adapt(b, way, rank=4) is b and method(b)['op'] == way
    torch.testing.assert_close(look(b, x), base, **close)                                       # identity at start
    learn = {id(p) for p in trainable(b)}
    learnt(b, x)
    on = look(b, x)
    assert all(not torch.allclose(i, j, **close) for i, j in zip(on, base)) or way == 'last-2'
    with disabled(b): assert equal(look(b, x), base) and not method(b)                          # off equals base
    assert equal(look(b, x), on) and {id(p) for p in trainable(b)} == learn
    c = copy.deepcopy(b)
    assert equal(look(c, x), on) and not {p.data_ptr() for p in trainable(b)} & {p.data_ptr() for p in trainable(c)}
    file = save_adapters(b, tmp_path / 'a.safetensors')                                         # save, load, load again over other numbers
    other = load_adapters(tower(name), file)
    torch.testing.assert_close(look(other, x), on, **close)
    learnt(other, x, .1), load_adapters(other, file)
    torch.testing.assert_close(look(other, x), on, **close)
    assert header(file)['adapter'] == method(b) and load_file(file).keys() == adapter_state(b).keys()
    m = merge(c)                                                                                # the same function in plain weights
    torch.testing.assert_close(look(m, x), on, **close)
    assert not trainable(m) and not method(m) and list(m.state_dict()) == keys and m.hash != b.hash and type(m.blocks[2]) is type(tower(name).blocks[2])
    restore(b)
    assert [id(i) for i in b.modules()] == tree and list(b.state_dict()) == keys and not trainable(b) and not method(b)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in weights.items()) and equal(look(b, x), base)

@every
@every_way
def test_other_ways_change_only_what_learns(name, way):
    b = adapt(tower(name), way, rank=4, blocks=[0, 2] if way == 'full' else None)
    names = {k for k, p in b.named_parameters() if p.requires_grad}
    before = {k: v.clone() for k, v in b.state_dict().items()}
    learnt(b, images(b))
    changed = {k for k, v in b.state_dict().items() if not torch.equal(before[k], v)}
    assert changed and changed <= names
    if way == 'full': assert not any('blocks.1.' in k for k in names)
    if way == 'last-2': assert names == {k for k in names if 'blocks.1.' in k or 'blocks.2.' in k}

@pytest.mark.parametrize('name', ['registers', 'open_clip'])
@every_way
def test_other_ways_checkpoint_and_bf16(name, way):
    b, grads = adapt(tower(name), way, rank=4), []
    learnt(b, x := images(b))
    for on in (False, True):
        b.tower.set_grad_checkpointing(on)
        b.train(), b.zero_grad(), torch.manual_seed(1)
        sum(f.square().mean() for f in b.features(x, TAPS)).backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable(b)])
    for g, h in zip(*grads): torch.testing.assert_close(g, h)
    want = look(b.eval(), x)
    with torch.autocast('cpu', torch.bfloat16): low = look(b, x)
    for f, w in zip(low, want): assert (f.float() - w).norm() < .05 * w.norm()

def test_lora_is_on_q_k_v_and_o():
    "Four pairs of matrices in an open_clip block (its attention taken apart), qkv and proj in a timm block; scaling alpha / rank or alpha / sqrt(rank)."
    for name, n in (('open_clip', 4), ('cls', 2)):
        b = adapt(tower(name), 'lora', rank=4, blocks=[1])
        assert sum('lora_A' in k for k in adapter_state(b)) == n and all(k.startswith('1.attn.') for k in adapter_state(b))
    scale = lambda way, rank: next(m.scaling['default'] for m in adapt(tower(), way, rank=rank).modules() if hasattr(m, 'scaling'))
    assert scale('lora', 4) == scale('lora', 9) == 2 and scale('rslora', 4) == 4 and scale('rslora', 9) == 6

def test_a_gradcheck_in_double():
    for op in (*OPS, 'lora'):
        b = adapt(tower('open_clip-wide').double(), op, 8, rank=2, blocks=[1], init='reference', dropout=0.)
        if op == 'lora': [nn.init.normal_(p, std=.1) for p in trainable(b)]
        for p in trainable(b): p.data = p.data.double()
        w, n = b.blocks[1], b.prefix + b.grid[0] * b.grid[1]
        x = torch.randn(1, n, b.width, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(w, (x,), fast_mode=True)

def test_convolutional_towers_are_tuned_or_refused():
    b = residual()
    x, state = images(b), {k: v.clone() for k, v in b.state_dict().items()}
    for way in ('hybrid', 'lora'): loud(lambda: adapt(b, way), 'take none, last-1 or full')
    with torch.no_grad(): base = b.embed_image(x)
    for way in ('full', 'last-1'):
        adapt(b, way)
        b.train(), b.embed_image(x)                                     # a batch norm that learns also keeps statistics
        b.eval()
        with torch.no_grad(): assert not torch.equal(b.embed_image(x), base)
        with disabled(b), torch.no_grad(): assert torch.equal(b.embed_image(x), base)
        restore(b)
        assert all(torch.equal(v, state[k]) for k, v in b.state_dict().items())

def test_adapt_is_one_door():
    b = tower()
    assert adapt(b, 'none') is b and not trainable(b) and not method(b)
    assert method(adapt(b, 'ring', 8, blocks='0, 2')) == method(add_adapters(tower(), 'ring', 8, [0, 2]))
    loud(lambda: adapt(b, 'lora'), 'adapted already')
    loud(lambda: merge(b), 'not linear')
    restore(b)
    for kw, says in [(dict(adapter='lorra'), "'lora'"), (dict(adapter='last-9'), '3 blocks'), (dict(adapter='lora', rank=0), 'rank'), (dict(adapter='full', blocks=[7]), '0 to 2'), (dict(adapter='full', blocks='1;2'), '0 to 2')]:
        loud(lambda: adapt(b, **kw), says)
        assert not method(b) and not trainable(b)
    loud(lambda: save_adapters(b, 'x.safetensors'), 'call adapt first')

def test_a_block_that_returns_more_than_tokens():
    class Pair(nn.Module):
        def forward(self, x): return x + 1, 'attention'
    a = Adapter(24, 8, 'mona', grid=(4, 4), init='reference').eval()
    x = torch.randn(1, 17, 24)
    y, extra = Adapted(Pair(), a)(x)
    assert extra == 'attention' and torch.equal(y, a(x + 1))


# released checkpoints

PLACES = ['visual.trunk.blocks.{}.mona.clip_mona.', 'visual.transformer.resblocks.{}.mona.clip_mona.', 'visual.transformer.resblocks.{}.mona.']
KINDS = dict(mona='baseline', noise='noise_aware', gain='freq_enhanced', hybrid='hybrid')

def released(kind, place=PLACES[0], blocks=(0, 1, 2)):
    one = {k.removeprefix('param.'): v for k, v in load_file(f'{os.path.dirname(__file__)}/golden/adapter_{KINDS[kind]}.safetensors').items() if k.startswith('param.')}
    return {place.format(i) + k: v * (1 + i / 10) for i in blocks for k, v in one.items()}

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_released_adapters_load(kind, place, ending, tmp_path):
    state, file = released(kind, place, (0, 2)), tmp_path / f'adapter.{ending}'
    torch.save(state, file) if ending == 'pth' else save_file(state, file)
    b = load_released_adapters(tower(), file)
    assert {i: a.config['op'] for i, a in adapters(b).items()} == {0: kind, 2: kind} and method(b)['bottleneck'] == 8
    assert all(torch.equal(v, adapter_state(b)[k]) for k, v in from_released(state).items()) and len(state) == len(adapter_state(b))
    assert equal(look(b, x := images(b)), look(load_released_adapters(tower(), dict(mona=state)), x))

def test_released_adapters_are_accounted_for(tmp_path):
    good = released('hybrid')
    key = lambda part: next(k for k in good if part in k and 'blocks.1.' in k)
    wrong = [({k: v for k, v in good.items() if k != key('project2.bias')}, r'block 1.*missing: up.bias'), ({k: v for k, v in good.items() if k != key('freq_filter')}, 'several kinds'),
             (good | {key('norm.weight'): torch.zeros(7)}, 'another shape: norm.weight'), (good | {'visual.trunk.blocks.1.mona.clip_mona.project3.bias': torch.zeros(1)}, 'project3'),
             (good | {'visual.trunk.norm.weight': torch.zeros(1)}, 'visual.trunk.norm.weight'), ({}, 'no adapters'), (released('hybrid', blocks=(0, 3)), '0 to 2'),
             ({k.split('mona.clip_mona.')[1]: v for k, v in good.items()}, 'no block number|no adapter parameter')]
    for state, says in wrong:
        b = tower()
        loud(lambda: load_released_adapters(b, state), says)
        assert not method(b)
    loud(lambda: load_released_adapters(tower('open_clip', 1).double(), tmp_path / 'no.pth'), 'no such file', FileNotFoundError)
    class Code:
        def __reduce__(self): return os.system, ('true',)
    torch.save(dict(x=Code()), tmp_path / 'code.pth')
    loud(lambda: load_released_adapters(tower(), tmp_path / 'code.pth'), 'plain tensors')
    wide = Backbone(timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=3, embed_dim=48, num_heads=2, num_classes=0), 'wide')
    loud(lambda: load_released_adapters(wide, good), 'width 24.*has 48')
