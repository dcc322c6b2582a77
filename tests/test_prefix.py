"""Laws of htlab.prefix: the short way gives the numbers of the long one, and what could make it lie is refused."""
import copy, pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from htlab.backbone import load_backbone
from htlab.dataset import ImageSet
from htlab.evaluate import evaluate_classification, evaluate_segmentation
from htlab.head import LinearHead, SegmentHead, UpsampleHead
from htlab.inject import adapt, restore
from htlab.manifest import Manifest
from htlab.prefix import PrefixSet, blank, frozen_blocks, prefix_tokens, resumed
from htlab.store import stores
from htlab.task import Classify, Contrast, PromptSegment, Segment
from htlab.train import TrainConfig, fit, seed_everything

TABLE = Manifest.load("phantom")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("HTLAB_CACHE", str(tmp_path / "cache"))


def images(n=12, **kw): return ImageSet(replace(TABLE, df=TABLE.df.iloc[:n]), 112, progress=False, **kw)
def tower(adapter="hybrid", blocks="4,5", name="tiny", **kw):
    seed_everything(0)
    return adapt(load_backbone(name, **kw), adapter, blocks=blocks, dropout=0, init="reference")


def both(task, batch, kept):
    "Loss, output and gradients of a task on the long way and on the short one."
    out = []
    for b in (batch, kept):
        task.zero_grad()
        got = task(b)
        got["loss"].backward()
        out.append((got["loss"].detach(), got["output"].detach(), [p.grad.clone() for p in task.parameters() if p.grad is not None]))
    return out


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_the_short_way_is_the_long_way(data):
    "Whatever learns, wherever the head reads: the same loss, outputs and gradients, bit for bit; and the tower's own blocks are back."
    first = data.draw(st.integers(1, 5))
    way = data.draw(st.sampled_from(["hybrid", "mona", "lora", "hybrid-ring", "none"]))
    kind = data.draw(st.sampled_from(["segment", "classify", "contrast", "text"]))
    t = tower(way, "" if way == "none" else ",".join(map(str, range(first, 6))))
    taps = sorted(data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=3) if way == "none" else st.sets(st.integers(0, 5), max_size=2).map(lambda s: s | {5})))
    task = {"segment": lambda: Segment(t, SegmentHead(128, len(taps), hidden=16), taps), "classify": lambda: Classify(t, LinearHead(t.embed_dim)), "contrast": lambda: Contrast(t),
            "text": lambda: PromptSegment(t, dict(background=["ultrasound image"], lesion=["a lesion"]))}[kind]().train()
    if way == "none" and kind in ("contrast", "text"): return  # nothing learns
    d = images(5)
    batch = d.finish(d.batch([0, 1, 2, 3, 4]))
    k = min(frozen_blocks(t), taps[-1] + 1 if kind == "segment" else 6)
    assert k == (first if way != "none" else min(6, taps[-1] + 1 if kind == "segment" else 6))
    keep = sorted({b for b in taps if b < k - 1} | {k - 1}) if kind == "segment" else [k - 1]
    own = list(t.blocks)
    long, short = both(task, batch, {n: v for n, v in batch.items() if n != "image"} | dict(prefix=prefix_tokens(t, batch["image"], keep)))
    assert torch.equal(long[0], short[0]) and torch.equal(long[1], short[1]) and len(long[2]) == len(short[2]) > 0
    for a, b in zip(long[2], short[2]): assert torch.equal(a, b)
    assert all(a is b for a, b in zip(own, t.blocks))


@pytest.mark.parametrize("name", ["ViT-B-32", "vit_tiny_patch16_224"])
def test_towers_of_other_builders(name):
    "open_clip's own and timm's, with images that are not square where the builder allows it."
    size = (96, 160) if name == "ViT-B-32" else None
    t = load_backbone(name, "random", text=False, size=size)
    n = len(t.blocks)
    adapt(t, "hybrid", blocks=[n - 1], dropout=0, init="reference")
    x = torch.rand(2, 3, *t.size)
    kept = prefix_tokens(t, x, [1, n - 2])
    with torch.no_grad(), resumed(t, kept): short = t.embed_image(blank(t, kept)), t.features(blank(t, kept), [1, n - 1])
    with torch.no_grad(): long = t.embed_image(x), t.features(x, [1, n - 1])
    torch.testing.assert_close(short[0], long[0], rtol=0, atol=0)
    for a, b in zip(short[1], long[1]): torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_stands_before_the_blocks_counts():
    assert frozen_blocks(tower("full", "4,5")) == 0 and frozen_blocks(tower("last-2", "")) == 4 and frozen_blocks(restore(tower())) == 6
    assert frozen_blocks(load_backbone("resnet18", "random")) == 0


def test_own_blocks_are_back_after_an_error():
    t, d = tower(), images(2)
    own, kept = list(t.blocks), prefix_tokens(t, torch.stack([d[i]["image"] for i in range(2)]), [3])
    with pytest.raises(RuntimeError, match="inside"):
        with resumed(t, kept): raise RuntimeError("inside")
    assert all(a is b for a, b in zip(own, t.blocks))


def trained(folder, train, valid, epochs=3):
    task = Classify(tower(), LinearHead(128)).train()
    history = fit(task, train, valid, TrainConfig(epochs=epochs, batch_size=5, lr=.01, validate_every=1, device="cpu", patience=0), folder, progress=False)
    return history.drop(columns="seconds"), task


def test_training_and_evaluation_are_those_of_the_long_way(tmp_path):
    d, v = images(12), images(6)
    kept = [PrefixSet(x, tower(), progress=False) for x in (d, v)]
    (a, long), (b, short) = trained(tmp_path / "long", d, v), trained(tmp_path / "short", *kept)
    np.testing.assert_allclose(b, a, rtol=1e-5)
    for (n, p), q in zip(long.state_dict().items(), short.state_dict().values()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=n)
    one, two = (evaluate_classification(long, x, batch_size=4, progress=False) for x in (v, kept[1]))
    np.testing.assert_allclose(two[["p_0", "p_1"]], one[["p_0", "p_1"]], atol=1e-5)
    s = Segment(tower(), SegmentHead(128, 2, hidden=16), [1, 5])
    one, two = (evaluate_segmentation(s, x, progress=False) for x in (v, PrefixSet(v, s.backbone, [1, 5], progress=False)))
    assert one.equals(two), "masks, native grids and ids are those of the data set"


def test_views_are_the_draws_of_the_epochs(tmp_path):
    d = images(8, augment=True, seed=3)
    kept = PrefixSet(d, t := tower(), [2, 5], views=2, progress=False)
    for epoch in (1, 2, 3, 4):
        kept.set_epoch(epoch)
        got = kept.finish(kept.batch([5, 0, 3]))
        d.set_epoch((epoch - 1) % 2 + 1)
        want = d.finish(d.batch([5, 0, 3]))
        assert torch.equal(got["mask"], want["mask"]) and got["id"] == want["id"] and torch.equal(got["label"], want["label"])
        for b, tokens in prefix_tokens(t, want["image"], [2, 3]).items(): torch.testing.assert_close(got["prefix"][b], tokens, rtol=0, atol=1e-5)
    assert d.epoch == 2 and kept.augment, "the data set is where it was set; a set of views is not for evaluation"
    with pytest.raises(ValueError, match="augments"): evaluate_classification(Classify(t, LinearHead(128)), kept, progress=False)


def test_found_again_by_content_and_only_then(monkeypatch):
    passed = []
    import htlab.prefix as module
    real = module.prefix_tokens
    monkeypatch.setattr(module, "prefix_tokens", lambda b, x, k: passed.append(len(x)) or real(b, x, k))
    def made(*a, **kw): passed.clear(); PrefixSet(*a, progress=False, **kw); return sum(passed)
    t = tower()
    assert made(images(6), t) == 6 and made(images(6), t) == 0 and made(images(9), t) == 3, "more images: only those"
    assert made(images(6), tower("mona", "4,5")) == 0, "what learns behind the prefix does not count"
    assert made(images(6), tower("mona", "5")) == 6, "a longer prefix is another one"
    assert made(images(6), t, half=True) == 6 and made(images(6), t, [1, 5]) == 6
    assert made(images(6), adapt(load_backbone("tiny", mean=.4), "hybrid", blocks="4,5")) == 6, "another preprocessing"
    assert made(images(6, augment=True), t, views=1) == 6 and made(images(6, augment=True), t, views=2) == 6 and made(images(6, augment=True, seed=9), t, views=1) == 6
    for seed in (1, 2):  # adapters that learned once, and are frozen now
        frozen = tower(blocks="0").requires_grad_(False)
        torch.manual_seed(seed)
        torch.nn.init.normal_(frozen.blocks[0].adapter.up.weight)
        assert frozen_blocks(frozen) == 6 and made(images(6), frozen) == 6 and made(images(6), frozen) == 0
    other = load_backbone("tiny", "random")
    other.name = "tiny"
    assert made(images(6), adapt(other, "hybrid", blocks="4,5")) == 6, "other weights"
    assert stores().name.str.startswith("prefix-tiny").any(), "listed and cleared with the other stores"


def test_half_precision_is_near():
    d, t = images(6), tower()
    one, two = (PrefixSet(d, t, half=h, progress=False) for h in (False, True))
    a, b = (s.finish(s.batch([0, 1]))["prefix"][3] for s in (one, two))
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() <= 1e-3 * a.abs().max()
    assert "2 images" not in repr(two) and "6 images behind blocks [3]" in repr(two)


def test_refusals():
    t, d = tower(), images(6)
    for kw, says in ((dict(views=2), "there is one view"), (dict(limit_gb=1e-4), "limit_gb=0.0001"), (dict(taps=[7]), "taps")):
        with pytest.raises(ValueError, match=says): PrefixSet(d, t, progress=False, **kw)
    with pytest.raises(ValueError, match="views=8"): PrefixSet(images(6, augment=True), t, progress=False)
    with pytest.raises(ValueError, match="no frozen block.*blocks=\"4,5\""): PrefixSet(d, tower(blocks=""), progress=False)
    class Inverted(ImageSet):
        def __getitem__(self, i): return super().__getitem__(i)
    with pytest.raises(ValueError, match="Inverted has no batch"): PrefixSet(Inverted(d.manifest, 112, progress=False), t, progress=False)
    kept = PrefixSet(d, tower(blocks="5"), [1, 5], progress=False)
    with pytest.raises(ValueError, match="UpsampleHead looks at the image"): Segment(tower(blocks="5"), UpsampleHead(128, 2), [1, 5])(kept.finish(kept.batch([0])))


def test_copies_and_workers_read_the_same_file():
    kept = PrefixSet(images(6), tower(), progress=False)
    for other in (copy.copy(kept), pickle.loads(pickle.dumps(kept))):
        assert torch.equal(other.batch([2])["tokens"], kept.batch([2])["tokens"]) and len(other) == 6 and other.classes == kept.classes
    with pytest.raises(AttributeError, match="no_such"): kept.no_such


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("way", ["hybrid", "lora", "full"])
def test_checkpointing_changes_no_number(way, kept):
    "Gradients bit for bit, dropout included, alone and behind a kept prefix; nothing is recomputed in evaluation."
    if way == "full" and kept: return  # no prefix
    seed_everything(0)
    task = Classify(adapt(load_backbone("tiny"), way, blocks="" if way == "full" else "3,4,5", init="reference"), LinearHead(128)).train()
    torch.nn.init.normal_(task.head.readout.weight)
    d = images(5)
    batch = d.finish(d.batch([0, 1, 2, 3, 4]))
    if kept: batch["prefix"] = prefix_tokens(task.backbone, batch.pop("image"), [2])
    got, passes = [], []
    for task.checkpoint in (False, True):
        with_hook = task.backbone.blocks[5].register_forward_pre_hook(lambda *_: passes.append(task.checkpoint))
        seed_everything(1)
        task.zero_grad()
        task(batch)["loss"].backward()
        task.predict(batch)
        with_hook.remove()
        got.append([p.grad.clone() for p in task.parameters() if p.grad is not None])
    assert len(got[0]) == len(got[1]) > 0 and all(torch.equal(a, b) for a, b in zip(*got))
    assert passes.count(False) == 2 and passes.count(True) == 3, "forward, again in the backward pass, and once in evaluation"


def test_a_template_keeps_the_prefix_and_its_numbers(tmp_path):
    from htlab.report import execute
    given = dict(limit=3, epochs=2, blocks="4,5", taps="1,3,5", augment=False)
    long, short = (execute("segment", given | more, tmp_path, progress=False) for more in ({}, dict(keep_gb=1., checkpoint=True)))
    assert np.allclose(long.cases.dice, short.cases.dice, atol=2e-3) and list(long.cases.id) == list(short.cases.id) and long.name != short.name
