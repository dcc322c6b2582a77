"""Known answers of attribution methods, laws on small random towers of every kind, and that nothing stays behind."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from hypothesis import given, settings, strategies as st
from open_clip.transformer import VisionTransformer
from torch import nn

from htlab import attribute as module
from htlab.attribute import BASELINES, METHODS, adapter_ablation, adapter_conductance, attribute, baseline_of, per_case, scorer, text_scorer
from htlab.backbone import Backbone, _Vision, load_backbone
from htlab.evaluate import summarise
from htlab.head import ClassifyHead, LinearHead, SegmentHead, zero_shot
from htlab.inject import Adapted, adapt, disabled
from htlab.task import Classify, Contrast, PromptSegment, Segment

def vit(size=(32, 32), **kw):
    return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=0, **kw)

def hugging():
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
    small = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    model = CLIPSegForImageSegmentation(CLIPSegConfig(text_config=small, vision_config=small | dict(image_size=48, patch_size=16), projection_dim=16, extract_layers=[0, 1, 2], reduce_dim=8, decoder_num_attention_heads=2, decoder_intermediate_size=16))
    return _Vision(model.clip, (32, 64))

BUILD = {"cls": vit, "wide": lambda: vit((40, 56)), "registers": lambda: vit((56, 32), reg_tokens=4), "mean": lambda: vit((32, 48), class_token=False, global_pool="avg"),
         "map": lambda: vit(class_token=False, global_pool="map"), "open_clip": lambda: VisionTransformer((32, 48), 8, 24, 3, 2, 2., output_dim=10), "hugging": hugging}
MADE = {}

def tower(name="cls"):
    "A fresh copy of a small frozen tower."
    if name not in MADE:
        torch.manual_seed(0)
        MADE[name] = Backbone(BUILD[name](), f"toy-{name}")
    return copy.deepcopy(MADE[name])

def classifier(b, classes=3):
    torch.manual_seed(1)
    head = LinearHead(b.embed_dim, classes)
    nn.init.normal_(head.readout.weight)
    return Classify(b, head)

def images(b, n=3, seed=1): return torch.rand(n, 3, *getattr(b, "size", b), generator=torch.Generator().manual_seed(seed))

every = pytest.mark.parametrize("name", BUILD)
QUICK = {"integrated_gradients": dict(steps=4), "occlusion": dict(window=16)}


# known answers

@settings(max_examples=15, deadline=None)
@given(h=st.integers(4, 9), w=st.integers(4, 9), n=st.integers(1, 4), columns=st.integers(1, 3), window=st.integers(1, 4), baseline=st.sampled_from([*BASELINES]), size=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_linear_model_is_explained_by_its_weights(h, w, n, columns, window, baseline, size, seed):
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(columns, 3, h, w, generator=g), torch.rand(n, 3, h, w, generator=g)
    target = torch.randint(columns, (n,), generator=g)
    f = lambda x: x.flatten(1) @ weight.flatten(1).T + 3
    away = (weight[target] * (x - baseline_of(x, baseline))).sum(1).numpy()
    ask = lambda method, **options: attribute(f, x, method, target, batch_size=size, **options)
    a = ask("integrated_gradients", baseline=baseline, steps=3)
    assert np.allclose(a.heat, away, atol=1e-5) and np.abs(a.options["gap"]).max() < 1e-4 and np.allclose(a.score, f(x).gather(1, target[:, None])[:, 0]) and a.classes == tuple(map(str, range(columns)))
    assert np.allclose(ask("input_x_gradient").heat, (weight[target] * x).sum(1), atol=1e-5)
    o = ask("occlusion", baseline=baseline, window=window)
    for i in range(0, h, window):
        for j in range(0, w, window): assert np.allclose(o.heat[:, i:i + window, j:j + window], away[:, i:i + window, j:j + window].sum((1, 2), keepdims=True), atol=1e-4)
    assert np.allclose(o.coarse, o.heat[:, ::window, ::window]) and o.signed and a.coarse is None


class Look(nn.Module):
    "Tokens (B, 5, 4) of red, green, blue and what was read: attention in proportion to green brings red minus blue."
    def forward(self, t):
        one, key, value = torch.ones_like(t[:, None, :, 1:2]), t[:, None, :, 1:2].log(), t[:, None, :, :1] - t[:, None, :, 2:3]
        return t + F.pad(F.scaled_dot_product_attention(one, key, value, scale=1.)[:, 0], (3, 0))

class Glimpse(nn.Module):
    image_size = grid_size = (2, 2)
    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.cls = nn.ModuleList(blocks), nn.Parameter(torch.tensor([[[0., .1, 0., 0.]]]))
    def forward(self, x):
        t = torch.cat([self.cls.expand(len(x), -1, -1), F.pad(x.flatten(2).mT, (0, 1))], 1)
        for b in self.blocks: t = b(t)
        return torch.stack([t[:, 0, 3], torch.ones(len(x))], 1)
    def forward_intermediates(self, x, indices, **_): self(x); return []

class Read(nn.Module):
    def forward(self, e): return torch.stack([e[:, 0] / e[:, 1], -e[:, 0] / e[:, 1]], 1)

class Add(nn.Module):
    def __init__(self, a): super().__init__(); self.a = a
    def forward(self, t): return t + self.a * torch.tensor([0., 0, 0, 1])

class Grow(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, t): return t * (1 + self.m * torch.tensor([0., 0, 0, 1]))

def paper(*blocks): return Classify(Backbone(Glimpse(*blocks), "paper", mean=0, std=1), Read())

share, signed = st.floats(.05, 1), st.floats(-1, 1)

@settings(max_examples=25, deadline=None)
@given(green=st.lists(share, min_size=4, max_size=4), value=st.lists(signed, min_size=4, max_size=4), a=signed, m=signed)
def test_a_tower_that_can_be_worked_out_on_paper(green, value, a, m):
    green, value = torch.tensor(green), torch.tensor(value)
    x = torch.stack([value.clamp(min=0), green, -value.clamp(max=0)]).view(1, 3, 2, 2)
    part = green / (green.sum() + .1)                                    # attention; 0.1 for the class token, which brings nothing
    s = (part * value).sum()
    heat = lambda task, method, target=0, **o: torch.from_numpy(attribute(task, x, method, target, **o).heat.ravel())
    close = lambda u, v: torch.allclose(u, v, atol=1e-5)
    one, two = paper(Look()), paper(Look(), Look())
    if not value.any(): return                                           # a score that is 0 whatever is looked at
    for task, roll, factor in ((one, .5, 1), (two, .75, 2)):
        assert close(heat(task, "rollout"), roll * part) and close(heat(task, "rollout", 1), roll * part)
        assert close(heat(task, "relevance"), factor * part * value.clamp(min=0)) and close(heat(task, "relevance", 1), factor * part * (-value).clamp(min=0))
    assert close(heat(one, "occlusion", baseline="black"), s - (s - part * value) / (1 - part))
    both, s2 = paper(Adapted(Look(), Add(a)), Adapted(Look(), Grow(m))), 2 * s.item()
    falls, shares = adapter_ablation(both, x, 0), adapter_conductance(both, x, 0, steps=4)
    assert np.allclose(falls.effect, [a * (1 + m), m * (s2 + a)], atol=1e-5) and np.allclose(shares.conductance, [a * (1 + m / 2), m * (s2 + a / 2)], atol=1e-5)
    for t in (falls, shares): assert np.allclose(t.together, (s2 + a) * (1 + m) - s2, atol=1e-5) and np.allclose(t.score, (s2 + a) * (1 + m), atol=1e-5)


def test_grad_cam_of_maps():
    filters = nn.Conv2d(3, 2, 1, bias=False)
    filters.weight.data = torch.tensor([[1., 0, 0], [0, 0, 1]]).view(2, 3, 1, 1)
    net = nn.Sequential(filters, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1, bias=False))
    net[3].weight.data = torch.tensor([[4., -8.]])
    x = images((2, 2))
    assert np.allclose(attribute(net, x, "grad_cam", 0, layer=filters).heat, (x[:, 0] - 2 * x[:, 2]).clamp(min=0), atol=1e-6)
    conv = Classify(load_backbone("resnet18", "random", size=(64, 96)), ClassifyHead(512, 1, hidden=8), taps=[4])
    x = images(conv.backbone, 2)
    for stage in (3, 2):
        a = attribute(conv, x, "grad_cam", 1, block=stage)
        want = LayerGradCam(scorer(conv.eval()), conv.backbone.blocks[stage]).attribute(x.clone().requires_grad_(), 1, relu_attributions=True)[:, 0]
        assert np.allclose(a.coarse, want.detach(), atol=1e-6) and a.heat.shape == (2, 64, 96)
    assert attribute(conv, x, "grad_cam", 1).options["block"] == 3


# towers

@every
def test_grad_cam_on_tokens_is_the_formula(name):
    "Weights of channels: mean gradient over the patches. The last block is refused where nobody reads its patches."
    b = tower(name); task, x = classifier(b).eval(), images(b)
    kept = []
    hook = b.blocks[1].register_forward_hook(lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o))
    y = task.output(dict(image=x.clone().requires_grad_()))[:, 2].sum()
    hook.remove()
    t, g = (v[:, b.prefix:] for v in (kept[0], torch.autograd.grad(y, kept[0])[0]))
    want = (g.mean(1, keepdim=True) * t).sum(2).relu().unflatten(1, b.grid).detach().numpy()
    a = attribute(task, x, "grad_cam", 2, block=-2)
    assert np.allclose(a.coarse, want, atol=1e-6) and a.coarse.any() and a.options["block"] == 1 and not a.signed
    assert np.array_equal(a.heat[:, ::b.size[0] // b.grid[0], ::b.size[1] // b.grid[1]], a.coarse)
    pooled = name in ("mean", "map")
    assert attribute(task, x, "grad_cam", 2).options["block"] == 1 + pooled
    if pooled: assert attribute(task, x, "grad_cam", 2, block=2).heat.any()
    else:
        with pytest.raises(ValueError, match=r"block=2: no gradient reaches.*\(CLS\) alone: take block=-2"): attribute(task, x, "grad_cam", 2, block=2)
    with pytest.raises(ValueError, match="from 0 to 2, or from the end"): attribute(task, x, "grad_cam", block=3)


@every
def test_attention_is_spelled_out_and_nothing_else_changes(name):
    b = tower(name); x = images(b)
    plain = b.embed_image(x)
    with torch.no_grad(), module._Spelled(b.blocks) as spelled: said = b.embed_image(x)
    n = b.prefix + b.grid[0] * b.grid[1]
    assert torch.allclose(plain, said, atol=1e-5) and [*spelled.seen] == [0, 1, 2]
    for a in spelled.seen.values(): assert a.shape == (3, 2, n, n) and torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5) and a.min() >= 0


def test_attention_is_that_of_pytorch_and_of_lora():
    "open_clip's own modules, asked for their weights; LoRA stands in their place and starts as they are."
    b = tower("open_clip"); task, x = classifier(b), images(b)
    seen = []
    def ask(m, args, kwargs): seen.append(type(m).forward(m, *args, need_weights=True, average_attn_weights=False)[1])
    hooks = [m.register_forward_pre_hook(ask, with_kwargs=True) for m in b.modules() if isinstance(m, nn.MultiheadAttention)]
    with torch.no_grad(): b.embed_image(x)
    for h in hooks: h.remove()
    with torch.no_grad(), module._Spelled(b.blocks) as spelled: b.embed_image(x)
    for mine, theirs in zip(spelled.seen.values(), seen, strict=True): assert torch.allclose(mine, theirs, atol=1e-6)
    before = [attribute(task, x, m, 1).heat for m in METHODS]
    adapt(b, "lora", rank=2)
    for m, was in zip(METHODS, before): assert np.allclose(attribute(task, x, m, 1).heat, was, atol=1e-5), m
    r = np.eye(seen[0].shape[-1])
    for a in seen: r = (a.mean(1).numpy() + np.eye(r.shape[-1])) / 2 @ r
    assert np.allclose(attribute(task, x, "rollout").coarse.reshape(3, -1), r[:, 0, 1:], atol=1e-6)


@every
def test_a_patch_that_is_read_is_found(name):
    "A head that reads one patch of the map: rollout is hottest there, so rows, columns and prefix are where they should be."
    b = tower(name)
    class At(nn.Module):
        def __init__(self, r, c): super().__init__(); self.at = r, c
        def forward(self, maps): return torch.stack([maps[0][:, 0, self.at[0], self.at[1]], maps[0][:, 1, self.at[0], self.at[1]]], 1)
    for at in ((0, 1), (b.grid[0] - 1, b.grid[1] - 2)):
        coarse = attribute(Classify(b, At(*at), taps=[1]), images(b), "rollout").coarse
        assert all(np.unravel_index(c.argmax(), c.shape) == at for c in coarse)
    with pytest.raises(ValueError, match="needs blocks 0 to 1 only"): attribute(Classify(b, At(0, 0), taps=[1]), images(b), "grad_cam", block=2)


@every
@pytest.mark.parametrize("method", METHODS)
def test_nothing_stays_behind(name, method):
    "As captum's test_hook_removal, with more to look at: after success, after an error in the model, and when somebody presses stop."
    b = adapt(tower(name), "mona", bottleneck=4); task, x = classifier(b), images(b, 2)
    task.train(); task.head.eval()                                      # a mixture that train() alone would not bring back
    task.head.readout.weight.grad = torch.ones_like(task.head.readout.weight)
    b.blocks[0].adapter.up.bias.grad = torch.ones(b.width)
    def state():
        return ([(id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), "forward" in vars(m), getattr(m, "fused_attn", None)) for m in task.modules()],
                [(id(p), p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in task.parameters()], x.requires_grad, x.grad, torch.is_grad_enabled())
    before, options = state(), QUICK.get(method, {})
    want = attribute(task, x, method, 1, **options)
    assert state() == before
    with torch.no_grad(): assert np.array_equal(attribute(task, x, method, 1, **options).heat, want.heat)
    with torch.inference_mode(): assert np.array_equal(attribute(task, images(b, 2), method, 1, **options).heat, want.heat)
    with torch.autocast("cpu", torch.bfloat16): assert np.array_equal(attribute(task, x, method, 1, **options).heat, want.heat)
    assert state() == before
    for error in (RuntimeError, KeyboardInterrupt):
        for block, calls in ((1, 0), (2, 1)):                            # at once, and inside the method's own pass
            left = [calls]
            def fail(*_):
                if not left[0]: raise error("stop")
                left[0] -= 1
            hook = b.blocks[block].register_forward_hook(fail)
            with pytest.raises(error, match="stop"): attribute(task, x, method, 1, **options)
            hook.remove()
            assert state() == before


@every
def test_batches_and_targets_do_not_meet(name):
    b = tower(name); task, x, target = classifier(b), images(b, 5), torch.tensor([0, 1, 2, 1, 0])
    for method in METHODS:
        together, small = (attribute(task, x, method, target, batch_size=k, **QUICK.get(method, {})) for k in (5, 2))
        alone = np.concatenate([attribute(task, x[i:i + 1], method, int(t), **QUICK.get(method, {})).heat for i, t in enumerate(target)])
        scale = np.abs(alone).max()
        assert np.allclose(together.heat, alone, atol=1e-4 * scale) and np.allclose(small.heat, alone, atol=1e-4 * scale), method
        assert together.heat.dtype == np.float32 and together.heat.shape == (5, *b.size) and list(together.target) == target.tolist()
    assert all(len(v) == 5 for v in (small.score, attribute(task, x, "integrated_gradients", steps=2, batch_size=2).options["gap"], attribute(task, x, "rollout", batch_size=2).options["on_prefix"]))


def test_integrated_gradients_are_complete():
    b = tower("wide"); task, x = classifier(b), images(b)
    f = scorer(task.eval())
    for baseline in BASELINES:
        a = attribute(task, x, "integrated_gradients", 2, baseline=baseline, steps=64)
        rise = (f(x) - f(baseline_of(x, baseline)))[:, 2].detach().numpy()
        assert np.allclose(a.heat.sum((1, 2)) - rise, a.options["gap"], atol=1e-5) and np.abs(a.options["gap"]).max() < .02 * np.abs(rise).max()


# what is explained

def test_a_segmentation_is_asked_about_the_pixels_it_found():
    b = tower("wide"); torch.manual_seed(0)
    task, x = Segment(b, SegmentHead(b.width, 1, hidden=8), taps=[1]), images(b)
    y = task.eval().output(dict(image=x)).detach()
    task.head.readout.bias.data[1] -= (y[:, 1] - y[:, 0]).median()       # about half of the pixels
    y = task.output(dict(image=x)).detach()
    found = y.argmax(1)
    want = torch.stack([v[1][m == 1].mean() for v, m in zip(y, found)])
    assert 0 < found.float().mean() < 1
    f = scorer(task, x)
    twice = f(torch.cat([x, x.flip(1)]))                                 # copies, changed: still the pixels of x
    other = task.output(dict(image=x.flip(1)))
    assert torch.allclose(twice[:3, 1], want, atol=1e-5) and torch.allclose(twice[3:, 1], torch.stack([v[1][m == 1].mean() for v, m in zip(other, found)]), atol=1e-5)
    for method in METHODS:
        a = attribute(task, x, method, **QUICK.get(method, {}))
        assert np.allclose(a.score, want, atol=1e-5) and (a.target == 1).all() and a.classes == ("background", "lesion") and np.isfinite(a.heat).all() and a.heat.any()
    task.head.readout.bias.data[1] = -100
    assert torch.isnan(scorer(task)(x)[:, 1]).all() and torch.isfinite(scorer(task)(x)[:, 0]).all()
    with pytest.raises(ValueError, match="image 0: no pixel is predicted as class 1"): attribute(task, x, "occlusion")
    assert attribute(task, x, "input_x_gradient", 0).heat.any()         # NaN of the other column does not leak into the gradient


def test_sentences_are_a_zero_shot_classifier():
    b, words = load_backbone("tiny"), dict(benign=["a benign mass", "a benign lesion"], malignant=["a malignant mass"])
    x, head = images(b, 2), zero_shot(b.embed_text, words, b.logit_scale)
    assert torch.allclose(text_scorer(b, words)(x), head(b.embed_image(x)), atol=1e-4)
    for method in ("relevance", "grad_cam"):
        said, task = attribute((b, words), x, method), attribute(Classify(b, head), x, method)
        assert said.classes == task.classes == ("benign", "malignant") and list(said.target) == list(task.target) and np.allclose(said.heat, task.heat, atol=1e-5)
    listed = attribute((b, words["benign"]), x, "relevance", [0, 1])
    assert listed.classes == tuple(words["benign"]) and len(listed.heat) == 2
    finder = PromptSegment(b, dict(background=["tissue"], lesion=["a lesion"]))
    assert attribute(finder, x[:1], "input_x_gradient", int(finder.predict(dict(image=x[:1])).argmax(1).mode().values.mode().values)).classes == ("background", "lesion")
    one, two = (attribute((b, words), x, "relevance", k).heat for k in range(2))
    assert not np.allclose(one, two) and np.array_equal(*(attribute((b, words), x, "rollout", k).heat for k in range(2)))
    with pytest.raises(ValueError, match="sentences of 'benign' must be a list"): text_scorer(b, dict(benign="a benign mass"))
    with pytest.raises(ValueError, match="give .task.backbone"): scorer(Contrast(b))


# adapters

@pytest.mark.parametrize("name", ["wide", "hugging"])
def test_adapters_one_by_one(name):
    torch.manual_seed(0)
    b = adapt(tower(name), "hybrid", bottleneck=4, blocks=[0, 2], init="reference"); task, x = classifier(b), images(b, 5)
    target, f = torch.tensor([0, 1, 2, 0, 1]), scorer(task.eval())
    on = f(x).gather(1, target[:, None])[:, 0].detach().numpy()
    with disabled(b), torch.no_grad(): off = f(x).gather(1, target[:, None])[:, 0].numpy()
    falls, shares = adapter_ablation(task, x, target, batch_size=2), adapter_conductance(task, x, target, steps=24, batch_size=2)
    for t in (falls, shares):
        assert list(t.case) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and list(t.block) == [0, 2] * 5
        assert np.allclose(t.groupby("case").together.first(), on - off, atol=1e-4)
    assert np.allclose(shares.groupby("case").conductance.sum(), on - off, atol=1e-3) and np.allclose(shares["sum"], shares.together, atol=1e-3)
    kept, b.blocks[2] = b.blocks[2], b.blocks[2].base
    with torch.no_grad(): without = f(x).gather(1, target[:, None])[:, 0].numpy()
    b.blocks[2] = kept
    assert np.allclose(falls[falls.block == 2].effect, on - without, atol=1e-4)
    for p in b.parameters(): p.requires_grad_(False)                     # frozen adapters have a conductance, too
    assert np.allclose(adapter_conductance(task, x, target, steps=24).conductance, shares.conductance, atol=1e-4)
    table = summarise(per_case(falls, groups=["a", "a", "b", "b", "c"]), ["block 0", "block 2", "together", "sum"])
    assert np.isclose(table.value["block 2"], falls[falls.block == 2].effect.mean()) and table.groups["sum"] == 3
    with pytest.raises(ValueError, match="ids: 2 for 5 cases"): per_case(falls, ids=["a", "b"])
    for other in (adapt(tower(name), "lora", rank=2), tower(name)):
        with pytest.raises(ValueError, match="no adapters behind its blocks"): adapter_ablation(classifier(other), x)


# refusals and pictures

def test_refusals_name_the_remedy():
    b = tower(); task, x = classifier(b), images(b)
    f = lambda x: x.mean((2, 3))
    for message, ask in {"method 'saliency': one of integrated_gradients": lambda: attribute(task, x, "saliency"),
                         "grad_cam has no option 'steps': it knows block, layer": lambda: attribute(task, x, "grad_cam", steps=3),
                         "a function has no attention": lambda: attribute(f, x, "relevance"), "layer=MODULE": lambda: attribute(f, x, "grad_cam"),
                         "classes 0 to 2": lambda: attribute(task, x, "rollout", 3), "one for each of 3 images": lambda: attribute(task, x, "rollout", [0, 1]),
                         "divide by 255": lambda: attribute(task, (x * 255).byte(), "rollout"), r"must be a tensor \(B, C, H, W\)": lambda: attribute(task, x[0], "rollout"),
                         "baseline 'white': one of mean, black, blur": lambda: attribute(task, x, "occlusion", baseline="white"), "1 <= stride <= window": lambda: attribute(task, x, "occlusion", window=4, stride=5),
                         "steps=0": lambda: attribute(task, x, "integrated_gradients", steps=0), "batch_size=0": lambda: attribute(task, x, "rollout", batch_size=0),
                         "it must give logits": lambda: attribute(lambda x: x.mean((1, 2, 3)), x, "occlusion")}.items():
        with pytest.raises(ValueError, match=message): ask()
    flat = Classify(b, LinearHead(b.embed_dim))                         # zero at the start: no score depends on anything
    for method in ("grad_cam", "rollout", "relevance"):
        with pytest.raises(ValueError, match="is the head trained"): attribute(flat, x, method)
    class Eager(nn.Module):
        def forward(self, t): return t + (t @ t.mT).softmax(-1) @ t
    with pytest.raises(ValueError, match="attention of block 0 of 'paper' cannot be seen"): attribute(paper(Eager()), images((2, 2), 1), "rollout")


def test_an_attribution_shows_itself():
    b = tower("wide"); a = attribute(classifier(b), images(b, 12), "occlusion", window=8)
    assert a._repr_html_().count("<tr>") == 12 and "12 in all" in a._repr_html_()
    fig = attribute(classifier(b), images(b, 2), "relevance").figure(images(b, 2), torch.ones(2, *b.size, dtype=torch.bool))
    assert len(fig.axes) == 4
