"""Scores of explanations have known values on models whose explanation is known: linear ones, and ones that do not look at the image."""
import numpy as np
import pandas as pd
import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from hypothesis import given, settings, strategies as st
from torch import nn

from htlab.attribute import attribute
from htlab.backbone import load_backbone
from htlab.dataset import ImageSet, world_prompts
from htlab.evaluate import summarise
from htlab.faithfulness import (CaliperTest, by_method, caliper_test, deletion_insertion, edges, evaluate_attributions, infidelity, mass_inside, pointing_game, randomisation, remove_marks,
                                score_cases, scorecard, scores, sensitivity)
from htlab.head import LinearHead, zero_shot
from htlab.inject import adapt
from htlab.manifest import Manifest
from htlab.probe import burn_in
from htlab.task import Classify, Segment

SIZE = 8
seeds = st.integers(0, 10**6)


class Linear(nn.Module):
    "Two logits, w . x and its negative, of the mean over channels"
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float32))
    def forward(self, x): return torch.stack([s := (x.mean(1) * self.w).sum((1, 2)), -s], 1)


def pictures(rng, n=2, size=SIZE): return torch.from_numpy(rng.random((n, 1, size, size), dtype=np.float32)).expand(-1, 3, -1, -1).contiguous()
def linear(seed, positive=True, n=2):
    "Model, images, and the exact heat w (x - baseline) for a black baseline"
    rng = np.random.default_rng(seed)
    w = rng.random((SIZE, SIZE)) if positive else rng.standard_normal((SIZE, SIZE))
    x = pictures(rng, n)
    return Linear(w), x, (x.mean(1).numpy() * w).astype(np.float32)


@pytest.fixture(scope="module")
def tower(): return load_backbone("tiny")

@pytest.fixture(scope="module")
def phantom(): return ImageSet(Manifest.load("phantom").split("test"), 112, progress=False)

@pytest.fixture(scope="module")
def words(tower): return Classify(tower, zero_shot(tower.embed_text, world_prompts("label"), tower.logit_scale))


# place

@given(seeds)
def test_a_flat_map_has_chance_and_the_mask_itself_is_perfect(seed):
    mask = np.random.default_rng(seed).random((1, 9, 7)) < .4
    if not mask.any(): return
    for heat, hit in ((np.ones(mask.shape), mask.mean()), (mask.astype(float), 1)):
        p, m = pointing_game(heat, mask).iloc[0], mass_inside(heat, mask).iloc[0]
        assert p.hit == pytest.approx(hit) and m.mass == pytest.approx(hit) and p.chance == m.chance == pytest.approx(mask.mean()) and m.ratio == pytest.approx(hit / mask.mean())


def test_tolerance_is_a_distance_in_pixels():
    mask, heat = np.zeros((20, 20), bool), np.zeros((20, 20))
    mask[10, 10], heat[10, 14] = True, 1
    assert [pointing_game(heat, mask, t).hit[0] for t in (0, 3.9, 4)] == [0, 0, 1]
    assert pointing_game(heat, mask, 1).chance[0] == 5 / 400


def test_no_lesion_is_not_scored_and_negative_heat_does_not_count():
    heat, mask = np.array([[-1., 1], [-3, 1]]), np.array([[1, 1], [0, 0]])
    assert mass_inside(heat, mask).mass[0] == .5
    assert pointing_game(heat, mask * 0).isna().all(axis=None) and mass_inside(heat, mask * 0).isna().all(axis=None)
    assert np.isnan(mass_inside(-np.ones((2, 2)), mask).mass[0])


@pytest.mark.parametrize("heat, mask, say", [(np.ones((4, 4)), np.ones((4, 5)), "one size"), (np.full((4, 4), np.nan), np.ones((4, 4)), "finite"), (np.ones((4, 4)), np.full((4, 4), 255), "0 or 1")])
def test_maps_that_do_not_fit_are_refused(heat, mask, say):
    for f in (pointing_game, mass_inside):
        with pytest.raises(ValueError, match=say): f(heat, mask)


# deletion and insertion

@settings(deadline=None, max_examples=15)
@given(seeds)
def test_no_order_beats_the_exact_heat_of_a_linear_model(seed):
    "With a black baseline the score falls by w x for each pixel, whatever else is gone: the largest first is the steepest order"
    f, x, heat = linear(seed)
    exact = deletion_insertion(f, x, heat, 0, steps=16, baseline="black", output="logit", random=4, seed=seed)
    other = deletion_insertion(f, x, np.random.default_rng(seed).random(heat.shape), 0, steps=16, baseline="black", output="logit", seed=seed)
    e, o = exact.table(), other.table()
    assert (exact.hottest <= exact.random.min(1) + 1e-4).all() and (exact.coldest >= exact.random.max(1) - 1e-4).all()
    assert (e.deletion < o.deletion).all() and (e.deletion < e.chance).all() and (e.chance < e.insertion).all()
    y = (x.mean(1) * f.w).sum((1, 2)).detach().numpy()
    assert np.allclose(exact.hottest[:, 0], y, rtol=1e-4) and np.allclose(exact.hottest[:, -1], 0, atol=1e-4)


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_inverse_heat_swaps_deletion_and_insertion(seed):
    f, x, heat = linear(seed, positive=False)
    a, b = (deletion_insertion(f, x, h, 0, steps=8, seed=seed).table() for h in (heat, -heat))
    assert np.allclose(a.deletion, b.insertion) and np.allclose(a.insertion, b.deletion)


def test_by_hand():
    "Four patches worth 4, 3, 2, 1 of 10: the curve is 10, 6, 3, 1, 0"
    w = np.kron([[4, 1], [3, 2]], np.ones((4, 4))) / 16
    f, x = Linear(w), torch.ones(1, 3, 8, 8)
    c = deletion_insertion(f, x, w[None], 0, steps=4, baseline="black", grid=(2, 2), output="logit")
    assert c.hottest[0] == pytest.approx([10, 6, 3, 1, 0], abs=1e-5) and c.coldest[0] == pytest.approx([10, 9, 7, 4, 0], abs=1e-5)
    t = c.table().iloc[0]
    assert t.deletion == pytest.approx((5 + 6 + 3 + 1) / 4) and t.insertion == pytest.approx((5 + 9 + 7 + 4) / 4)
    assert deletion_insertion(f, x, w[None], 0, steps=4, baseline="black", grid=(2, 2)).hottest[0, -1] == pytest.approx(.5)


# infidelity, sensitivity

@settings(deadline=None, max_examples=10)
@given(seeds)
def test_exact_heat_of_a_linear_model_has_no_infidelity(seed):
    f, x, heat = linear(seed, positive=False)
    assert infidelity(f, x, heat, 0, baseline="black", scale=False, seed=seed) == pytest.approx(0, abs=1e-6)
    assert infidelity(f, x, 7 * heat, 0, baseline="black", seed=seed) == pytest.approx(0, abs=1e-6)      # one factor is free
    v = infidelity(f, x, np.random.default_rng(seed).standard_normal(heat.shape), 0, baseline="black", seed=seed)
    assert ((v > .05) & (v <= 1)).all()


def test_infidelity_is_captums():
    "The same sets of pixels through captum.metrics.infidelity; with `scale`, what a straight line leaves unexplained"
    f, x, _ = linear(3, positive=False, n=1)
    heat, n = np.random.default_rng(5).standard_normal((1, SIZE, SIZE)), 24
    off = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(SIZE * SIZE) < 16, (n, 1)), axis=1)).view(n, 1, SIZE, SIZE).expand(-1, 3, -1, -1).float()
    perturb = lambda inputs: (off, inputs * (1 - off))                      # heat is a sum over channels: a third on each
    spread = torch.as_tensor(heat, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 3
    theirs = captum_infidelity(f, perturb, x, spread, target=0, n_perturb_samples=n)
    assert infidelity(f, x, heat, 0, samples=n, baseline="black", scale=False) == pytest.approx(theirs.detach().numpy(), rel=1e-3)
    lost, told = (f(x)[:, 0] - f(x * (1 - off))[:, 0]).detach().numpy(), (off[:, 0].numpy() * heat).sum((1, 2))
    assert infidelity(f, x, heat, 0, samples=n, baseline="black")[0] == pytest.approx(1 - np.corrcoef(told, lost)[0, 1]**2, rel=1e-3)
    assert infidelity(f, x, np.ones_like(heat), 0, baseline="black")[0] == 1


def test_sensitivity_is_zero_where_the_heat_stands_still_and_grows_with_the_noise():
    f, x, _ = linear(1)
    assert not sensitivity(f, x, lambda task, images, target: np.ones((len(images), SIZE, SIZE)), 0).any()
    product = lambda task, images, target: images.mean(1) * task.w
    small, large = (sensitivity(f, x, product, 0, radius=r, samples=8) for r in (.01, .1))
    assert (0 < small).all() and large == pytest.approx(10 * small, rel=1e-3)
    assert np.array_equal(small, sensitivity(f, x, product, 0, radius=.01, samples=8))


# randomisation

class Small(nn.Module):
    "Heat of the layers is known: |w| of the last one"
    def __init__(self, size=16):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(size * size, size * size), nn.Linear(size * size, 3)
        self.norm = nn.Parameter(torch.ones(1))
    def forward(self, x): return self.last(self.first(x.mean(1).flatten(1)))


def of_the_first(task, images, target): return task.first.weight.detach().sum(0).view(1, 16, 16).expand(len(images), -1, -1)
def of_the_image(task, images, target): return images.mean(1)


def test_model_heat_passes_and_image_heat_fails():
    x, f = pictures(np.random.default_rng(0), 12, 16), Small()
    a, b = (randomisation(f, x, m) for m in (of_the_first, of_the_image))
    assert a.stages == ["last", "first"] and a.verdict == "passes" and a.cases["last"].to_numpy() == pytest.approx(1) and abs(a.cases["first"]).max() < .25
    assert b.verdict == "fails" and b.cases["first"].to_numpy() == pytest.approx(1) and b.cases["two random models"].to_numpy() == pytest.approx(1) and abs(b.summary.value["another image"]) < .2
    assert randomisation(f, x[:1], of_the_image).verdict == "undecided"     # one image has no interval


def test_edge_detector_fails_on_a_tower(words, phantom):
    images = phantom.finish(phantom.batch(list(range(6))))["image"]
    r = randomisation(words, images, edges, stages=2)
    assert r.verdict == "fails" and r.stages[-1] == "all" and len(r.stages) == 2 and "edges" in r._repr_html_()


@pytest.mark.parametrize("broken", [False, True])
def test_weights_come_back(broken, tower, phantom):
    task = Classify(adapt(load_backbone("tiny", text=False), "hybrid"), LinearHead(128, 2)).train()
    nn.init.normal_(task.head.readout.weight)
    images, seen = phantom.finish(phantom.batch([0, 1]))["image"], []
    before, ways = {k: v.clone() for k, v in task.state_dict().items()}, {k: (p.requires_grad, id(p)) for k, p in task.named_parameters()}
    def method(task, images, target):
        seen.append([not torch.equal(v, before[k]) for k, v in task.state_dict().items()])
        if broken and len(seen) == 4: raise KeyboardInterrupt
        return images.mean(1)
    try: randomisation(task, images, method)
    except KeyboardInterrupt: assert broken
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items()) and task.training
    assert ways == {k: (p.requires_grad, id(p)) for k, p in task.named_parameters()} and all(p.grad is None for p in task.parameters())
    count = [sum(s) for s in seen]
    assert count[0] == 0 and all(a < b for a, b in zip(count, count[1:-1])), "each stage shuffles more"


# marks

def test_marks_are_filled_from_around_them():
    y, x = np.mgrid[:40, :50]
    ramp = (2 * y + 3 * x).astype(np.uint8)
    drawn = burn_in(ramp, [((10, 10), (30, 40))], "D 1", (2, 2), size=8)
    marks = drawn != ramp
    assert np.array_equal(remove_marks(drawn, marks), ramp)                  # linear images come back exactly, also in a batch
    both = remove_marks(np.stack([drawn / 255., drawn / 510.]), marks)
    assert both == pytest.approx(np.stack([ramp / 255., ramp / 510.]))
    assert np.array_equal(remove_marks(drawn, marks * False), drawn)
    with pytest.raises(ValueError, match="whole image"): remove_marks(drawn, np.ones_like(marks))


def marked(rng, n, size=16):
    clean = pictures(rng, n, size) * .5
    marks = np.zeros((n, size, size), bool)
    marks[:, 3, 3:8] = True
    return torch.where(torch.from_numpy(marks)[:, None], torch.ones(()), clean), marks, clean


def bright(x): return (x[:, 0] > .9).float().mean((1, 2))
def logits(score): return lambda x: torch.stack([0 * x[:, 0, 0, 0], score(x)], 1)


def test_a_detector_of_marks_is_detected_and_one_of_brightness_is_not():
    images, marks, clean = marked(np.random.default_rng(0), 40)
    where = lambda task, images, target: images[:, 0]
    a, b, c = (caliper_test(logits(f), images, marks, clean, method=where, labels=["a", "b"] * 20) for f in (
        lambda x: 40 * (bright(x) - .01) + x[:, 0].mean((1, 2)), lambda x: 9 * (x[:, 0, 8:].clamp(max=.5).mean((1, 2)) - .25), lambda x: x[:, 0, 3, 3:8].mean(1)))
    assert a.verdict == "shortcut" and a.summary.value["towards"] == 1 and {"in_place, a", "in_place, b"} <= set(a.summary.index)
    assert b.summary.value["in_place"] == pytest.approx(0, abs=1e-6) and not b.summary.value["changed"] and b.verdict == "no shortcut"
    assert b.heat_sees and b.summary.value["excess"] > 0                     # heat on marks is no proof
    assert c.summary.lo["in_place"] > 1 and c.verdict == "no shortcut"       # it looks at the place, not at marks
    away = caliper_test(logits(lambda x: 40 * bright(x) + x[:, 0].mean((1, 2))), images, marks, clean, target=0)
    assert away.verdict == "shortcut" and away.summary.value["in_place"] < 0 and away.heat_sees is None


def test_without_a_clean_copy_marks_are_removed():
    images, marks, clean = marked(np.random.default_rng(1), 12)
    assert caliper_test(logits(lambda x: 40 * bright(x) + x[:, 0].mean((1, 2))), images, marks).verdict == "shortcut"


def test_moved_marks_are_the_same_marks_off_the_lesion():
    images, marks, clean = marked(np.random.default_rng(2), 5)
    lesion, seen = np.zeros_like(marks), []
    lesion[:, :8] = True
    def f(x): seen.append(x.clone()); return logits(lambda x: x[:, 0].mean((1, 2)))(x)
    caliper_test(f, images, marks, clean, lesion)
    moved = (seen[2] != seen[0])[:, 0].numpy()
    assert (moved.sum((1, 2)) == marks.sum((1, 2))).all() and not (moved & lesion).any() and (seen[2][:, 0].numpy()[moved] == 1).all()


@pytest.mark.parametrize("other", ["moved", "in_place"])
def test_false_alarms_at_the_margin_are_as_rare_as_said(other):
    "200 samples of 40 cases of which one true mean shift is exactly the margin and the other far beyond: accused in 2.5 % of the tests, up to the bootstrap's error"
    rng, n, alarms = np.random.default_rng(0), 40, 0
    for _ in range(200):
        at, beyond = .2 + .6 * rng.standard_normal((2, n)) + np.array([[0], [3]])
        cases = pd.DataFrame(dict(id=range(n), group=range(n), policy="", **dict(zip(("in_place", "moved") if other == "moved" else ("moved", "in_place"), (beyond, at)))))
        alarms += CaliperTest("x", cases, .2, summarise(cases, ["in_place", "moved"], n_boot=500)).verdict == "shortcut"
    assert alarms <= 12                                                       # P(more | 2.5 %) is 0.2 %


@pytest.mark.parametrize("change, say", [(dict(marks=np.zeros((4, 16, 16), bool)), "image 0 has no marks"), (dict(marks=np.ones((3, 16, 16), bool)), "marks have shape"), (dict(target=2), "target=2"),
                                         (dict(task=lambda x: torch.zeros(len(x), 2)), "same score"), (dict(task=lambda x: torch.zeros(len(x), 2, 16, 16)), "two classes or more")])
def test_caliper_tests_that_cannot_be_made_are_refused(change, say):
    images, marks, clean = marked(np.random.default_rng(0), 4)
    kw = dict(task=lambda x: torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1), images=images, marks=marks, clean=clean) | change
    with pytest.raises(ValueError, match=say): caliper_test(**kw)


# cases, cards, data sets

def test_scores_of_one_case_are_those_of_the_batch(words, phantom):
    item = phantom.finish(phantom.batch([0, 1, 2]))
    a = attribute(words, item["image"], "occlusion", window=56)
    table = score_cases(words, item["image"], item["mask"], a, steps=4, samples=8)
    one = scores(words, item["image"][0], item["mask"][0], a.heat[0], target=int(a.target[0]), steps=4, samples=8)
    assert one["mass"] == pytest.approx(table["mass"][0]) and one["pointing"] == table["pointing"][0] and one["deletion"] == pytest.approx(table["deletion"][0], abs=.05)
    known = {}
    again = [score_cases(words, item["image"], item["mask"], h, a.target, steps=4, samples=8, known=known) for h in (edges(words, item["image"]), a)][1]
    pd.testing.assert_frame_equal(again, table, check_exact=False, atol=1e-5)                      # what is remembered from another heat changes nothing
    assert table.notna().all(axis=None) and (table["target"] == a.target).all()


def test_evaluate_a_data_set(words, phantom):
    cases = evaluate_attributions(words, phantom, ("occlusion", edges), cases=[3, 5, 8, 9], options=dict(occlusion=dict(window=56)), steps=3, samples=4, progress=False)
    assert cases.groupby("method").size().to_dict() == {"occlusion": 4, "edges": 4} and cases.id.is_unique
    assert cases[cases.method == "edges"].case.tolist() == [phantom.row(i)["id"] for i in (3, 5, 8, 9)]
    t = by_method(cases)
    assert t.loc["edges"].loc["mass"].value == pytest.approx(summarise(cases[cases.method == "edges"], ["mass"]).value["mass"]) and (t.lo <= t.value).all() and (t.value <= t.hi).all()


def test_a_segmentation_is_asked_about_its_own_pixels(phantom):
    task = Segment(load_backbone("tiny", text=False))
    item = phantom.finish(phantom.batch([0, 1]))
    with torch.no_grad(): p = task.eval().output(item).softmax(1)
    found = (p.argmax(1) == 1).flatten(1).any(1)
    if not found.all():
        with pytest.raises(ValueError, match="nothing to explain"): deletion_insertion(task, item["image"], np.ones((2, 112, 112)), steps=2)
        with torch.no_grad(): task.head.readout.bias += torch.tensor([-5., 5.])
        p = task.predict(item)
    c = deletion_insertion(task, item["image"], np.ones((2, 112, 112)), steps=2)
    assert c.hottest[:, 0] == pytest.approx(((p[:, 1] * (p.argmax(1) == 1)).sum((1, 2)) / (p.argmax(1) == 1).sum((1, 2))).numpy(), abs=1e-5)


def test_a_card_says_what_it_is_worth(words, phantom):
    item = phantom.finish(phantom.batch([0]))
    card = scorecard(words, item["image"][0], item["mask"][0], ("occlusion", edges), options=dict(occlusion=dict(window=56)), classes=["benign", "malignant"], steps=3, samples=4)
    assert list(card.table.index) == ["occlusion", "edges"] and "infidelity" in card._repr_html_() and "probability" in card.title
    assert len(card.figure().axes) == 3


@pytest.mark.parametrize("call, say", [
    (lambda f, x, h: deletion_insertion(f, x, h[:1]), "heat has shape"), (lambda f, x, h: deletion_insertion(f, x[0], h), "tensor"), (lambda f, x, h: deletion_insertion(f, x, h, 5), "classes 0 to 1"),
    (lambda f, x, h: deletion_insertion(f, x, h, steps=1), "at least 2 steps"), (lambda f, x, h: deletion_insertion(f, x, h, grid=(9, 9)), "grid"), (lambda f, x, h: deletion_insertion(f, x, h, output="margin"), "output"),
    (lambda f, x, h: deletion_insertion(lambda x: f(x)[:, :1], x, h), "one column"), (lambda f, x, h: infidelity(f, x, h, samples=1), "at least 2 sets"), (lambda f, x, h: sensitivity(f, x, "grad-cam"), "one of"),
    (lambda f, x, h: sensitivity(f, x, edges, radius=0), "radius"), (lambda f, x, h: randomisation(lambda x: f(x), x, edges), "no weights"), (lambda f, x, h: randomisation(f, x, edges, stages=0), "stages=0"),
    (lambda f, x, h: pointing_game(h, h > 0, -1), "tolerance")])
def test_what_makes_no_sense_is_refused(call, say):
    with pytest.raises(ValueError, match=say): call(*linear(0))
