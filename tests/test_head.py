"""Laws of 07_head: the release's recorded outputs, the commuted read-out, the rule of ten prompts."""
from copy import deepcopy
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

from htlab.backbone import Backbone, load_backbone
from htlab.head import CLINICAL_PROMPTS, PROMPTS, SEGMENT_PROMPTS, ClassifyHead, CoOp, LinearHead, SegmentHead, UNetHead, UpsampleHead, ZeroShot, from_released, zero_shot

GOLDEN = Path(__file__).parent / "golden"


def recorded(task):
    with safe_open(GOLDEN / f"head_{task}.safetensors", "pt") as f:
        t, h = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    grid = tuple(map(int, h["grid"].split("x")))
    maps = [t[f"activation.{i}"][:, int(h["prefix_tokens"]):].mT.unflatten(2, grid) for i in range(3)]
    return {k.removeprefix("param."): v for k, v in t.items() if k.startswith("param.")}, maps, t["output"]


def run(head, maps, size=(32, 32)): return head(maps, size) if isinstance(head, SegmentHead) else head(maps)


def plain(head, maps, size):
    "The release's order: enlarge all channels, then the 1 x 1 convolution."
    total = sum(b(r(m.movedim(1, -1))) for r, b, m in zip(head.reduces, head.blocks, maps)).movedim(-1, 1)
    return F.conv2d(F.interpolate(total, size=size, mode="bilinear", align_corners=False), head.readout.weight[..., None, None], head.readout.bias)


@pytest.mark.parametrize("task", ["seg", "cls"])
def test_recorded_tensors(task):
    state, maps, want = recorded(task)
    head = from_released(state)
    assert type(head) is dict(seg=SegmentHead, cls=ClassifyHead)[task] and not head.training
    assert (run(head, maps) - want).abs().max() < 1e-5
    nested = {"mona": {"x": torch.zeros(1)}}
    for k, v in state.items(): nested.setdefault(k.split(".")[0], {})[k.split(".", 1)[1]] = v
    assert torch.equal(run(from_released(nested), maps), run(head, maps)), "the layout of a task checkpoint"
    assert (run(head, maps[::-1]) - want).abs().max() > .1, "the order of the taps matters"


def test_recorded_segment_gradients_are_those_of_the_release_order():
    "The recorded files hold no gradients: they are those of the release's own order of operations, which gives its recorded output."
    state, maps, want = recorded("seg")
    head = from_released(state)
    maps = [m.requires_grad_() for m in maps]
    slow = plain(head, maps, (32, 32))
    assert (slow - want).abs().max() < 1e-5
    g, inputs = torch.randn_like(want), [*head.parameters(), *maps]
    for a, b in zip(torch.autograd.grad(run(head, maps), inputs, g), torch.autograd.grad(slow, inputs, g)):
        assert (a - b).abs().max() < 1e-5 * (1 + b.abs().max())


@pytest.mark.parametrize("kind", [SegmentHead, ClassifyHead])
def test_gradients_against_finite_differences(kind):
    torch.manual_seed(0)
    head = kind(3, taps=2, classes=2, hidden=4).double().eval()
    maps = [torch.randn(1, 3, 2, 3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *m: run(head, list(m), (5, 4)), maps)
    params = list(head.parameters())
    assert torch.autograd.gradcheck(lambda *p: torch.func.functional_call(head, dict(zip(dict(head.named_parameters()), p)), ([m.detach() for m in maps], (5, 4)) if kind is SegmentHead else ([m.detach() for m in maps],)), params)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 21), st.integers(1, 21), st.integers(1, 4), st.integers(1, 4))
def test_reading_out_first_changes_nothing(h, w, H, W, taps, classes):
    head = SegmentHead(6, taps, classes, hidden=8)
    maps = [torch.randn(2, 6, h, w) for _ in range(taps)]
    out = head(maps, (H, W))
    assert out.shape == (2, classes, H, W) and torch.allclose(out, plain(head, maps, (H, W)), atol=1e-5)


def test_classify_ignores_where_and_drops_only_in_training():
    torch.manual_seed(0)
    head = ClassifyHead(6, taps=2, hidden=64).eval()
    maps = [torch.randn(2, 6, 4, 5) for _ in range(2)]
    shuffle = torch.randperm(20)
    assert torch.allclose(head(maps), head([m.flatten(2)[..., shuffle].unflatten(2, (4, 5)) for m in maps]), atol=1e-5)
    assert torch.equal(head(maps), head(maps)) and not torch.equal(head.train()(maps), head(maps))


def test_linear_head():
    head = LinearHead(16, 3)
    x = F.normalize(torch.randn(5, 16), dim=-1)
    assert head(x).shape == (5, 3) and not head(x).any(), "all classes alike at the start"
    F.cross_entropy(head(x), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert head.readout.weight.grad.abs().sum() > 0


def test_prompts():
    assert set(PROMPTS) == {"breast", "thyroid", "lymph node", "prostate"}
    for organ, classes in PROMPTS.items():
        assert list(classes) == ["benign", "malignant"], "the order of a manifest's classes"
        for label, sentences in classes.items():
            assert len(set(sentences)) == 10 and all(organ in s and label in s for s in sentences)
    assert len({s for c in PROMPTS.values() for p in c.values() for s in p}) == 80


def test_zero_shot_is_the_mean_of_cosines():
    torch.manual_seed(0)
    table = {}
    def embed(texts): return F.normalize(torch.stack([table.setdefault(t, torch.randn(12)) for t in texts]), dim=-1)
    reader = zero_shot(embed, PROMPTS["prostate"], scale=7.)
    x = torch.randn(4, 12)
    for k, label in enumerate(reader.classes):
        want = torch.stack([F.cosine_similarity(x, table[s][None]) for s in PROMPTS["prostate"][label]]).mean(0) * 7
        assert torch.allclose(reader(x)[:, k], want, atol=1e-5)
    p = reader.predict(x)
    assert torch.allclose(p.sum(1), torch.ones(4)) and torch.allclose(reader.predict(3 * x), p, atol=1e-6), "the length of an embedding does not count"
    assert not list(reader.parameters()), "sentences do not learn"
    uneven = zero_shot(embed, {"a": ["one"], "b": ["one", "two", "three"]})
    assert uneven(x).shape == (4, 2)


# learned enlargement

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 33), st.integers(1, 33), st.integers(1, 4), st.booleans())
def test_upsampling_starts_as_bilinear_on_any_grid_and_size(h, w, H, W, steps, guided):
    torch.manual_seed(0); plain_head = SegmentHead(6, 2, 3, hidden=8)
    torch.manual_seed(0); head = UpsampleHead(6, 2, 3, hidden=8, channels=4, steps=steps, guided=guided)
    maps, image = [torch.randn(2, 6, h, w) for _ in range(2)], torch.rand(2, 3, H, W)
    out = head(maps, (H, W), image) if guided else head(maps, (H, W))
    assert head.guided == guided and torch.equal(out, plain_head(maps, (H, W)))
    missing = head.load_state_dict(plain_head.state_dict(), strict=False)
    assert not missing.unexpected_keys, "a trained SegmentHead can be refined"


def test_upsampling_learns_and_looks():
    torch.manual_seed(0)
    head, maps, image = UpsampleHead(6, 1, hidden=8), [torch.randn(2, 6, 4, 4)], torch.rand(2, 3, 32, 32)
    target, optimiser = (image.mean(1) > .5).long(), torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(2):
        loss = F.cross_entropy(head(maps, (32, 32), image), target)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    F.cross_entropy(head(maps, (32, 32), image), target).backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters()), "after the first step everything learns"
    assert not torch.equal(head(maps, (32, 32), image), head(maps, (32, 32), 1 - image))
    assert sum(p.numel() for n, p in UpsampleHead(768).named_parameters() if not n.startswith(("reduces", "blocks"))) < 100_000


# U-Net

@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40)])
def test_unet_takes_a_resnet_s_maps_at_any_size(size):
    import timm
    tower = timm.create_model("resnet18", features_only=True, pretrained=False).eval()
    head = UNetHead(tower.feature_info.channels(), classes=3).eval()
    with torch.no_grad(): maps = tower(torch.rand(2, 3, *size))
    maps = [m.requires_grad_() for m in maps]
    out = head(maps, size)
    assert out.shape == (2, 3, *size)
    out.sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps), "every map is read"


def test_unet_of_fewer_maps():
    head = UNetHead([4, 8])
    assert head([torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)], (16, 16)).shape == (2, 2, 16, 16)


# prompt tuning

NAMES = ["benign lesion", "malignant lesion"]


def towers(kind):
    "Small random towers with each layout of open_clip's text side."
    if kind == "tiny": return load_backbone("tiny")
    vision = dict(image_size=16, patch_size=8, width=32, layers=1, head_width=16)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "hugging face":
            from open_clip.hf_model import HFTextEncoder
            from transformers import BertConfig
            model = open_clip.CustomTextCLIP(24, vision, text)
            enc = HFTextEncoder.__new__(HFTextEncoder)
            config = BertConfig(vocab_size=49408, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=0)
            bert(enc, config, 24)
            model.text = enc
        else: model = dict(clip=open_clip.CLIP, custom=open_clip.CustomTextCLIP)[kind](24, vision, text)
    return Backbone(model, kind, tokenizer=open_clip.get_tokenizer("ViT-B-32"))


def bert(enc, config, out):
    "open_clip's own text encoder around a random BERT; its constructor would look for the config on a hub or in a folder."
    from open_clip.hf_model import ClsPooler
    from transformers import BertModel
    torch.nn.Module.__init__(enc)
    enc.output_tokens, enc.output_dim, enc.config = False, out, config
    enc.transformer, enc.pooler, enc.proj = BertModel(config, add_pooling_layer=False), ClsPooler(use_pooler_output=False), torch.nn.Linear(config.hidden_size, out, bias=False)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "clip", "custom", "hugging face"])
def test_context_from_words_is_zero_shot_and_only_it_learns(kind, per_class):
    backbone = towers(kind)
    words = "an ultrasound image of a"
    head = CoOp(backbone, NAMES, context=words, per_class=per_class)
    x = F.normalize(torch.randn(5, backbone.embed_dim), dim=-1)
    want = zero_shot(backbone.embed_text, {c: [f"{words} {c}"] for c in NAMES}, backbone.logit_scale)
    assert head.scale == pytest.approx(backbone.logit_scale) and (head(x) - want(x)).abs().max() < 1e-5 * head.scale
    before = deepcopy(backbone.state_dict())
    F.cross_entropy(head(x), torch.tensor([0, 1, 1, 0, 1])).backward()
    assert [k for k, _ in head.named_parameters()] == list(head.state_dict()) == ["context"] and head.context.grad.abs().sum() > 0
    assert all(p.grad is None for p in backbone.parameters()) and head.context.shape[:-1] == ((2, 5) if per_class else (5,))
    with torch.no_grad(): head.context += torch.randn_like(head.context)
    moved = head(x)
    assert (moved - want(x)).abs().max() > 1e-4
    again = CoOp(backbone, NAMES, context=5, per_class=per_class)
    assert not torch.allclose(again(x), moved)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(x), moved), "another placeholder, the same vectors"
    assert torch.allclose(want(x), zero_shot(backbone.embed_text, {c: [f"{words} {c}"] for c in NAMES}, backbone.logit_scale)(x)), "no hook stays"
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_copy_borrows_the_copied_tower():
    net = torch.nn.ModuleDict(dict(backbone=towers("clip")))
    net["head"] = CoOp(net["backbone"], NAMES, context=4)
    twin = deepcopy(net)
    assert twin["head"]._borrowed[0] is twin["backbone"] and len(net["head"].state_dict()) == 1
    with torch.no_grad(): twin["backbone"].model.token_embedding.weight.zero_(); twin["backbone"].model.positional_embedding.add_(torch.randn(77, 32))
    x = torch.randn(3, 24)
    assert not torch.allclose(twin["head"](x), net["head"](x))


# sentences

def test_clinical_prompts():
    assert set(CLINICAL_PROMPTS) == set(PROMPTS)
    tokens = open_clip.get_tokenizer("ViT-B-32")
    for organ, classes in CLINICAL_PROMPTS.items():
        assert list(classes) == ["benign", "malignant"]
        for label, sentences in classes.items():
            assert len(set(sentences)) == 10 and all(s.startswith(organ) and label in s and not ({"benign", "malignant"} - {label}) & set(s.split()) for s in sentences)
            assert (tokens(sentences)[:, -1] == 0).all(), "no sentence is cut by CLIP"
    findings = {s.removeprefix(organ) for organ, c in CLINICAL_PROMPTS.items() for p in c.values() for s in p}
    assert len(findings) == 80, "each organ has its own"


def test_prompts_of_the_embedded_model_are_in_its_words():
    tokenizer = load_backbone("tiny").tokenizer
    assert list(SEGMENT_PROMPTS) == ["background", "lesion"] and not set(SEGMENT_PROMPTS["background"]) & set(SEGMENT_PROMPTS["lesion"])
    for s in [*sum(SEGMENT_PROMPTS.values(), []), *(s for c in PROMPTS.values() for p in c.values() for s in p)]: assert 1 not in tokenizer([s])[0], s


@pytest.mark.parametrize("call, match", [
    (lambda: SegmentHead(8, 2)([torch.rand(1, 8, 2, 2)], (4, 4)), "2 maps"), (lambda: ClassifyHead(8, 1)([torch.rand(1, 7, 2, 2)]), "8, h, w"), (lambda: ClassifyHead(8, 1)([torch.rand(1, 4, 8)]), "maps"),
    (lambda: SegmentHead(8, hidden=0), "hidden"), (lambda: SegmentHead(8, classes=1.5), "classes"), (lambda: ZeroShot({"a": torch.rand(2, 3)}), "two classes"),
    (lambda: UpsampleHead(8, 1)([torch.rand(1, 8, 2, 2)], (4, 4)), "head.maps, size, image"), (lambda: UpsampleHead(8, 1)([torch.rand(1, 8, 2, 2)], (4, 4), torch.rand(1, 3, 4, 5)), "1, 3, 4, 5"), (lambda: UpsampleHead(8, steps=0), "steps"),
    (lambda: UNetHead([4, 8])([torch.rand(1, 4, 8, 8)], (16, 16)), "4, 8"), (lambda: UNetHead([]), "one to five"), (lambda: UNetHead([4] * 6), "one to five"), (lambda: UNetHead([4, 8], decoder=[4]), "decoder"),
    (lambda: CoOp(load_backbone("tiny", text=False), NAMES), "no text tower"), (lambda: CoOp(towers("tiny"), NAMES, context=54), "56 tokens"), (lambda: CoOp(towers("tiny"), NAMES, context=0), "context"),
    (lambda: CoOp(towers("tiny"), ["x", "x"]), "different"), (lambda: CoOp(towers("tiny"), "benign"), "names"), (lambda: CoOp(towers("tiny"), NAMES, context=""), "do not fit"),
    (lambda: zero_shot(lambda t: torch.rand(len(t), 3), {"a": [], "b": ["x"]}), "'a'"), (lambda: from_released({}), "not a released head"),
    (lambda: from_released({k: v for k, v in recorded("cls")[0].items() if "blocks.1" not in k}), "does not fit")])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match): call()
