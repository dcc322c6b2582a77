"""Laws of 08_task: the loss is what it says, gradients go where something learns, modes are kept."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from htlab.backbone import load_backbone
from htlab.head import PROMPTS, ClassifyHead, CoOp, LinearHead, SegmentHead, zero_shot
from htlab.inject import adapter_state, add_adapters, adapters, disabled, trainable
from htlab.task import Classify, Contrast, PromptSegment, Segment, Task, dice_ce, load_released
from htlab.train import TrainConfig, fit


def make(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(n, 3, 112, 112, generator=g)
    return dict(image=image, mask=(image[:, 0] > .7).long(), label=torch.arange(n) % 2, text=[PROMPTS["breast"]["benign"][i % 10] for i in range(n)], id=[str(i) for i in range(n)])


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
                        (lambda: PromptSegment(bb, dict(lesion=["a mass"])), "two classes"), (lambda: PromptSegment(bb, dict(a=["x"], b="a mass")), "list of sentences"),
                        (lambda: PromptSegment(load_backbone("tiny", "random", text=False), dict(a=["x"], b=["y"])), "text tower"),
                        (lambda: Classify(bb, nn.Linear(4, 2), taps=[8]), "taps"), (lambda: Contrast(bb, 0), "temperature"), (lambda: Contrast(bb, repeats="x"), "repeats"),
                        (lambda: Contrast(load_backbone("tiny", "random", text=False)), "text tower"),
                        (lambda: Classify(bb, LinearHead(bb.embed_dim))(make() | dict(label=torch.tensor([0, 1, -1]))), "label has values from -1 to 1"),
                        (lambda: Segment(bb)(make() | dict(mask=make()["mask"] * 255)), "mask has values from 0 to 255")):
        with pytest.raises(ValueError, match=match): call()


# ---- accumulation keeps the negatives ------------------------------------------------------------------------------

SENTENCES = [t for organ in PROMPTS.values() for c in organ.values() for t in c]


def split(batch, sizes):
    at = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [{k: v[a:b] for k, v in batch.items()} for a, b in zip(at, at[1:])]


def gradient(task, losses):
    task.zero_grad()
    for loss in losses: loss.backward()
    return torch.cat([p.grad.flatten() for p in trainable(task)])


@pytest.fixture
def contrast(bb): return Contrast(add_adapters(bb, bottleneck=4, init="reference", dropout=.3))


@pytest.mark.parametrize("repeats", ["negative", "ignore"])
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (5, 1, 3)])
def test_joint_batches_are_one_large_batch(contrast, repeats, sizes):
    n = sum(sizes)
    batch, contrast.repeats = make(n) | dict(text=[SENTENCES[i % 7] for i in range(n)]), repeats
    contrast.eval()
    whole = contrast(batch)["loss"]
    want, parts = gradient(contrast, [whole]), split(batch, sizes)
    losses = [contrast(b)["loss"] for b in contrast.joint(parts)]
    for loss in losses: torch.testing.assert_close(loss, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient(contrast, losses), want, rtol=0, atol=1e-5 * want.norm().item())
    naive = gradient(contrast, [contrast(b)["loss"] * len(b["id"]) / n for b in parts])
    assert (naive - want).norm() > 1e-3 * want.norm()


def test_joint_batches_draw_the_same_dropout_twice(contrast):
    batch, sizes = make(12) | dict(text=SENTENCES[:12]), (4, 4, 4)
    contrast.train()
    torch.manual_seed(3)
    e = torch.cat([contrast.images(b) for b in split(batch, sizes)])
    after = torch.rand(2)
    want = gradient(contrast, [contrast.loss(e @ contrast.captions(batch["text"]).T / contrast.temperature, batch)])
    torch.manual_seed(3)
    got = gradient(contrast, (contrast(b)["loss"] for b in contrast.joint(split(batch, sizes))))
    assert torch.equal(torch.rand(2), after), "the generator stands where one pass would have left it"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.norm().item())


def test_joint_under_autocast_learns(contrast):
    parts = split(make(6) | dict(text=SENTENCES[:6]), (3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        each = contrast.eval().joint(parts)
        got = gradient(contrast, (contrast(b)["loss"] for b in each))
    want = gradient(contrast, (contrast(b)["loss"] for b in contrast.joint(parts)))
    assert F.cosine_similarity(got, want, 0) > .95, "no weight is cached without its graph"


class Pairs(list):
    "Items of a batch as a data set."
    def __init__(self, batch): super().__init__([{k: v[i] for k, v in batch.items()} for i in range(len(batch["id"]))])


def test_fit_accumulates_contrast_as_one_large_batch(tmp_path):
    out = {}
    for name, how in dict(whole=dict(batch_size=8), parts=dict(batch_size=2, accumulate=4)).items():
        torch.manual_seed(0)
        task = Contrast(add_adapters(load_backbone("tiny", "random"), bottleneck=4, dropout=0., blocks=[0, 5]))
        history = fit(task, Pairs(make(12) | dict(text=SENTENCES[:12])), None, TrainConfig(epochs=2, lr=1e-3, device="cpu", **how), tmp_path / name, progress=False)
        out[name] = history.train_loss, torch.cat([p.detach().flatten() for p in trainable(task)])
    assert out["whole"][0].sub(out["parts"][0]).abs().max() < 1e-4
    assert (out["whole"][1] - out["parts"][1]).norm() < 1e-3 * out["whole"][1].norm()


# ---- segmentation by words, guided heads, towers of several widths ---------------------------------------------------

class Fake(nn.Module):
    "A tower whose patch maps are known: the t-th map of an image is t times its first channel, every eighth pixel."
    has_text, name, width, depth, taps_default, kind, widths = True, "fake", 3, 2, [0, 1], "conv", [3, 5]
    def __init__(self):
        super().__init__()
        self.tower = nn.Conv2d(3, 3, 1)
        self.register_buffer("_mean", torch.zeros(1))
    def embed_text(self, texts, normalize=True): return torch.tensor([[float(t)] for t in texts])
    def text_maps(self, x, texts): return torch.stack([t * self.tower(x)[:, 0, ::8, ::8] for t in texts[:, 0]], 1)
    def check_taps(self, taps=None): return self.taps_default if taps is None else list(taps)
    def features(self, x, taps=None): return [self.tower(x)[:, :1].expand(-1, self.widths[t], -1, -1)[..., ::2 ** (t + 1), ::2 ** (t + 1)] for t in self.check_taps(taps)]


def test_prompt_segment_averages_the_sentences_of_a_class():
    bb, batch = Fake(), make()
    task = PromptSegment(bb, dict(background=["1", "3"], lesion=["2"], gland=["-1", "0", "7"]))
    out = task(batch)["output"]
    one = F.interpolate(bb.text_maps(batch["image"], bb.embed_text(["2"])), (112, 112), mode="bilinear", align_corners=False)
    assert torch.allclose(out, one.expand(-1, 3, -1, -1), atol=1e-5), "the mean of each class is 2"
    assert len(list(task.parameters())) == len(list(bb.parameters())) and task.classes == ["background", "lesion", "gland"]
    assert torch.allclose(task.predict(batch), torch.full((3, 3, 112, 112), 1 / 3), atol=1e-5)
    bb.requires_grad_(False)
    assert not task(batch)["loss"].requires_grad
    bb.tower.requires_grad_(True)
    PromptSegment(bb, dict(a=["1"], b=["2"]))(batch)["loss"].backward()
    assert bb.tower.weight.grad.abs().sum() > 0


def test_classify_takes_learned_sentences(bb):
    task = Classify(bb, CoOp(bb, ["benign lesion", "malignant lesion"], "ultrasound of a"))
    task.train()(make())["loss"].backward()
    assert {id(p) for p in task.parameters() if p.grad is not None} == {id(task.head.context)}
    with pytest.raises(ValueError, match="leave taps out"): Classify(bb, task.head, taps=[1])


def test_a_guided_head_is_given_the_image():
    class Guided(nn.Module):
        guided, widths = True, [3, 5]
        def forward(self, maps, size, image): return torch.stack([image[:, 0], maps[0].mean((1, 2, 3)).view(-1, 1, 1).expand(-1, *size)], 1)
    batch, head = make(), Guided()
    assert torch.equal(Segment(Fake(), head).output(batch)[:, 0], batch["image"][:, 0])
    head.widths = [3, 4]
    with pytest.raises(ValueError, match=r"2 maps of width 3, 4, backbone 'fake' gives 2 maps of width 3, 5 at taps \[0, 1\]"): Segment(Fake(), head)
    with pytest.raises(ValueError, match="gives 1 maps of width 5"): Segment(Fake(), head, taps=[1])


# ---- the release's checkpoints ---------------------------------------------------------------------------------------

NAMES = {"down": "project1", "up": "project2", "norm": "norm", "gamma": "gamma", "gamma_x": "gammax", "op.filter.gain": "adapter_conv.freq_filter", "op.dw3": "adapter_conv.conv1",
         "op.dw5": "adapter_conv.conv2", "op.dw7": "adapter_conv.conv3", "op.mix": "adapter_conv.projector", "op.weigh": "adapter_conv.noise_estimator"}


def release(task):
    "A task's tensors under the names of the released code."
    def theirs(name):
        block, name = name.split(".", 1)
        mine = next(m for m in NAMES if f"{name}.".startswith(f"{m}."))
        return f"visual.transformer.resblocks.{block}.mona.clip_mona.{NAMES[mine]}{name[len(mine):]}"
    h, out = task.head, task.head.readout
    last = dict(seg_head={"1.weight": out.weight.detach()[..., None, None], "1.bias": out.bias.detach()}) if isinstance(task, Segment) else dict(cls_head={"3.weight": out.weight.detach(), "3.bias": out.bias.detach()})
    return dict(reduces=h.reduces.state_dict(), blocks=h.blocks.state_dict(), mona={theirs(k): v for k, v in adapter_state(task.backbone).items()}) | last


@pytest.fixture(params=["segment", "classify"])
def author(request, bb):
    add_adapters(bb, {"segment": "hybrid", "classify": "gain"}[request.param], bottleneck=8, init="reference")
    return Segment(bb, SegmentHead(bb.width, hidden=8)) if request.param == "segment" else Classify(bb, ClassifyHead(bb.width, classes=3, hidden=8))


def test_released_checkpoint_round_trip(author, tmp_path):
    torch.save(release(author), tmp_path / "task.pth")
    ours = load_released(load_backbone("tiny", "random"), tmp_path / "task.pth")
    assert type(ours) is type(author) and not ours.training and ours.taps == author.taps
    assert torch.equal(ours.predict(make()), author.predict(make()))
    assert ours.train()(make())["loss"].requires_grad


@pytest.mark.parametrize("spoil, match", [
    (lambda s: s.pop("reduces"), "lacks reduces"), (lambda s: s.update(epoch=torch.tensor(3)), "left over are epoch"), (lambda s: s.pop("mona"), "lacks mona"),
    (lambda s: [s.pop(k, 0) for k in ("seg_head", "cls_head")], "seg_head or cls_head, one of them"), (lambda s: s["mona"].popitem(), "missing"),
    (lambda s: s["mona"].update({"visual.x": torch.ones(1)}), "no adapter parameter"), (lambda s: s["blocks"].popitem(), "does not fit")])
def test_a_spoilt_checkpoint_is_explained_and_nothing_is_touched(author, tmp_path, spoil, match):
    spoil(state := release(author))
    torch.save(state, tmp_path / "task.pth")
    fresh = load_backbone("tiny", "random")
    with pytest.raises(ValueError, match=match): load_released(fresh, tmp_path / "task.pth")
    assert not adapters(fresh)


def test_a_released_file_runs_no_code(tmp_path):
    import os
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "boom"),)
    torch.save(dict(mona=Bomb()), tmp_path / "task.pth")
    fresh = load_backbone("tiny", "random")
    for name, error in (("task.pth", ValueError), ("none.pth", FileNotFoundError)):
        with pytest.raises(error): load_released(fresh, tmp_path / name)
    assert not (tmp_path / "boom").exists()
    state = release(Segment(add_adapters(fresh, bottleneck=8), SegmentHead(fresh.width, hidden=8)))
    for name, state, taps, match in (("adapters.pth", state["mona"], None, "load_released_adapters"), ("whole.pth", state, [1], "taps")):
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=match): load_released(load_backbone("tiny", "random"), tmp_path / name, taps)
