"""Laws of 07_head: the release's recorded outputs, the commuted read-out, the rule of ten prompts."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

from htlab.head import PROMPTS, ClassifyHead, LinearHead, SegmentHead, ZeroShot, from_released, zero_shot

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


@pytest.mark.parametrize("call, match", [
    (lambda: SegmentHead(8, 2)([torch.rand(1, 8, 2, 2)], (4, 4)), "2 maps"), (lambda: ClassifyHead(8, 1)([torch.rand(1, 7, 2, 2)]), "8, h, w"), (lambda: ClassifyHead(8, 1)([torch.rand(1, 4, 8)]), "maps"),
    (lambda: SegmentHead(8, hidden=0), "hidden"), (lambda: SegmentHead(8, classes=1.5), "classes"), (lambda: ZeroShot({"a": torch.rand(2, 3)}), "two classes"),
    (lambda: zero_shot(lambda t: torch.rand(len(t), 3), {"a": [], "b": ["x"]}), "'a'"), (lambda: from_released({}), "not a released head"),
    (lambda: from_released({k: v for k, v in recorded("cls")[0].items() if "blocks.1" not in k}), "does not fit")])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match): call()
