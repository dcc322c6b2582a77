"""Laws of 08_task: the loss is what it says, gradients go where something learns, modes are kept."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from htlab.backbone import load_backbone
from htlab.head import PROMPTS, ClassifyHead, LinearHead, SegmentHead, zero_shot
from htlab.inject import add_adapters, adapters, disabled, trainable
from htlab.task import Classify, Contrast, Segment, Task, dice_ce


def make(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(n, 3, 112, 112, generator=g)
    return dict(image=image, mask=(image[:, 0] > .7).long(), label=torch.arange(n) % 2, text=[PROMPTS["breast"]["benign"][i] for i in range(n)], id=[str(i) for i in range(n)])


@pytest.fixture
def bb(): return load_backbone("tiny", "random")


@pytest.fixture
def adapted(bb): return add_adapters(bb, bottleneck=4, blocks=range(5))


def all_tasks(bb):
    return [Segment(bb, SegmentHead(bb.width, hidden=8)), Classify(bb, ClassifyHead(bb.width, hidden=8)), Classify(bb, LinearHead(bb.embed_dim)),
            Classify(bb, zero_shot(bb.embed_text, PROMPTS["breast"], 20.)), Contrast(bb)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 6), st.integers(1, 6), st.floats(.1, 30), st.integers(0, 9))
def test_dice_ce_is_monais(b, c, h, w, sharp, seed):
    from monai.losses import DiceCELoss
    g = torch.Generator().manual_seed(seed)
    logits, mask = sharp * torch.randn(b, c, h, w, generator=g), torch.randint(0, c, (b, h, w), generator=g)
    want = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True)(logits, mask[:, None])
    assert torch.allclose(dice_ce(logits, mask), want, rtol=1e-5, atol=1e-6)


def test_dice_ce_by_hand():
    mask = torch.tensor([[[0, 1], [1, 1]]])
    right = F.one_hot(mask, 2).movedim(-1, 1) * 60.
    assert dice_ce(right, mask) < 1e-6 and dice_ce(1 - right, mask) > 50
    zero = torch.zeros(1, 2, 2, 2)  # p = 1/2 everywhere; Dice of background 2(.5)/(4/4 + 1), of lesion 2(1.5)/(1 + 3)
    assert torch.allclose(dice_ce(zero, mask), 1 - torch.tensor([.5, .75]).mean() + torch.tensor(2.).log(), atol=1e-4)


def test_shapes_losses_and_probabilities(adapted):
    batch, shapes = make(), [(3, 2, 112, 112), (3, 2), (3, 2), (3, 2), (3, 3)]
    for task, shape in zip(all_tasks(adapted), shapes):
        out = task(batch)
        assert isinstance(task, Task) and out["output"].shape == shape and out["loss"].ndim == 0 and out["loss"].isfinite()
        p = task.predict(batch)
        assert torch.allclose(p, out["output"].softmax(1), atol=1e-5) or task.training, type(task).__name__
        assert torch.allclose(p.sum(1), torch.ones_like(p.sum(1)), atol=1e-5) and not p.requires_grad


def test_gradients_reach_what_learns_and_nothing_else(adapted):
    for task in all_tasks(adapted):
        task.zero_grad()
        task.train()(make())["loss"].backward()
        got = {id(p) for p in task.parameters() if p.grad is not None}
        assert got <= {id(p) for p in trainable(task)}
        mine = [p for a in adapters(adapted).values() for p in a.parameters()] + list(task.head.parameters() if task.head else [])
        assert got == {id(p) for p in mine}, f"{type(task).__name__}: every adapter before the last tap, and the head"


def test_an_adapter_behind_the_last_tap_gets_no_gradient(bb):
    task = Segment(add_adapters(bb, bottleneck=4), SegmentHead(bb.width, hidden=8), taps=[0, 1, 2])
    task.train()(make())["loss"].backward()
    assert [i for i, a in adapters(bb).items() if any(p.grad is not None for p in a.parameters())] == [0, 1, 2]


def test_a_frozen_tower_leaves_no_graph(bb):
    seen = []
    task = Segment(bb, SegmentHead(bb.width, hidden=8))
    task.head.register_forward_pre_hook(lambda m, i: seen.append((i[0][0].requires_grad, torch.is_grad_enabled())))
    bb.blocks[0].register_forward_hook(lambda m, i, o: seen.append(torch.is_grad_enabled()))
    task(make())["loss"].backward()
    assert seen == [False, (False, True)]
    x = make()["image"].requires_grad_()  # attribution asks for gradients of the image through a frozen tower
    task(make() | dict(image=x))["loss"].backward()
    assert x.grad.abs().sum() > 0


def test_modes(adapted):
    task = Segment(adapted, SegmentHead(adapted.width, hidden=8))
    frozen = [m for b in adapted.blocks for m in getattr(b, "base", b).modules()]
    task.train()
    assert task.head.training and all(a.training for a in adapters(adapted).values()) and not any(m.training for m in frozen)
    p = task.predict(make())
    assert task.training and all(a.training for a in adapters(adapted).values()) and not any(m.training for m in frozen), "predict restores the mode"
    assert torch.equal(p, task.predict(make()))
    task.eval()
    task.predict(make())
    assert not any(m.training for m in task.modules())
    with pytest.raises(ValueError): task.train().predict(make() | dict(image=make()["image"] * 9))
    assert task.training, "after an error too"


def test_identity_adapters_change_no_prediction(adapted):
    for task in all_tasks(adapted):
        p = task.predict(make())
        with disabled(adapted): assert torch.equal(p, task.predict(make()))


def test_contrast_is_info_nce(adapted):
    task, batch = Contrast(adapted, temperature=.1), make()
    s = adapted.embed_image(batch["image"]) @ adapted.embed_text(batch["text"]).T / .1
    want = -(s.log_softmax(1).diag().mean() + s.log_softmax(0).diag().mean()) / 2
    assert torch.allclose(task(batch)["loss"], want, atol=1e-5)
    order = [2, 0, 1]
    other = {k: v[order] if torch.is_tensor(v) else [v[i] for i in order] for k, v in batch.items()}
    assert torch.allclose(task(other)["loss"], want, atol=1e-5), "the order of a batch does not matter"


def test_contrast_embeds_each_caption_once(adapted, monkeypatch):
    calls, embed = [], adapted.embed_text
    monkeypatch.setattr(adapted, "embed_text", lambda t: calls.append(list(t)) or embed(t))
    task, batch = Contrast(adapted), make()
    twice = batch | dict(text=[batch["text"][0], *batch["text"][:2]])
    assert torch.equal(task.output(batch), task.output(batch))
    task(twice)
    assert calls == [batch["text"]] and not [k for k in task.state_dict() if "_texts" in k]


def test_identical_captions():
    bb = load_backbone("tiny", "random")
    s = torch.randn(3, 3)
    distinct, same = dict(text=["a", "b", "c"]), dict(text=["a", "b", "a"])
    negative, ignore = Contrast(bb), Contrast(bb, repeats="ignore")
    assert negative.loss(s, same) == negative.loss(s, distinct) == ignore.loss(s, distinct) > ignore.loss(s, same)
    assert ignore.loss(s, dict(text=["a"] * 3)) == 0


def test_a_toy_task_learns(adapted):
    torch.manual_seed(0)
    batch = make(4)
    batch["image"] = torch.where(batch["label"].view(-1, 1, 1, 1) == 1, .8, .3) + .05 * batch["image"]
    task = Classify(adapted, LinearHead(adapted.embed_dim)).train()
    opt, before = torch.optim.AdamW(trainable(task), 1e-2), task(batch)["loss"].item()
    for _ in range(8):
        opt.zero_grad(); task(batch)["loss"].backward(); opt.step()
    assert task(batch)["loss"].item() < .5 * before and (task.predict(batch).argmax(1) == batch["label"]).all()


def test_bf16_autocast(adapted):
    for task in all_tasks(adapted):
        with torch.autocast("cpu", torch.bfloat16): out = task.train()(make())
        out["loss"].backward()
        assert out["loss"].dtype == torch.float32 and out["loss"].isfinite()


def test_wrong_pieces_are_refused_at_once(bb):
    for call, match in ((lambda: Segment(bb, SegmentHead(64)), "width 64"), (lambda: Segment(bb, taps=[1, 9]), "taps"), (lambda: Classify(bb, ClassifyHead(bb.width, taps=2)), "2 maps"),
                        (lambda: Classify(bb, LinearHead(7)), "length 7"), (lambda: Classify(bb, LinearHead(bb.embed_dim), taps=[1]), "leave taps out"),
                        (lambda: Classify(bb, nn.Linear(4, 2), taps=[8]), "taps"), (lambda: Contrast(bb, 0), "temperature"), (lambda: Contrast(bb, repeats="x"), "repeats"),
                        (lambda: Contrast(load_backbone("tiny", "random", text=False)), "text tower"),
                        (lambda: Classify(bb, LinearHead(bb.embed_dim))(make() | dict(label=torch.tensor([0, 1, -1]))), "label has values from -1 to 1"),
                        (lambda: Segment(bb)(make() | dict(mask=make()["mask"] * 255)), "mask has values from 0 to 255")):
        with pytest.raises(ValueError, match=match): call()
