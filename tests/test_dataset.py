"Laws of scenes and image sets: determinism, size independence, letterbox round trip, augmentation, errors."
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from htlab.backbone import tiny_vocab
from htlab.dataset import (LABELS, ODDS, ORGANS, STRONG, ImageSet, augmented, caption, clean_caption, draw_attributes, draw_scenes, draws, parse_recipe, phantom_table, scene,
                           world_prompts)
from htlab.manifest import Manifest, ManifestError, measure
from htlab.store import fit_box


@pytest.fixture(scope="module")
def phantom(): return Manifest.load("phantom")


@pytest.fixture
def files(tmp_path):
    "A manifest of two files: a wide image with a mask, a tall one without"
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir(); (tmp_path / "masks").mkdir()
    wide, tall = rng.integers(0, 255, (60, 120), np.uint8), rng.integers(0, 255, (90, 45), np.uint8)
    mask = np.zeros((60, 120), np.uint8); mask[20:40, 30:90] = 255
    for name, a in {"images/wide": wide, "images/tall": tall, "masks/wide": mask}.items(): Image.fromarray(a).save(tmp_path / f"{name}.png")
    rows = [dict(id=n, image=f"images/{n}.png", mask=f"masks/{n}.png" if n == "wide" else "", label=l, group=n, split="train") for n, l in (("wide", "benign"), ("tall", "malignant"))]
    measure(pd.DataFrame(rows), tmp_path).to_csv(tmp_path / "two.csv", index=False)
    return Manifest.load(tmp_path / "two.csv", root=tmp_path)


@given(st.integers(0, 1000), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_scene_is_a_function_of_seed_and_index(seed, index):
    a, b = scene(seed, index, 64), scene(seed, index, 64)
    assert a.attributes == b.attributes and a.caption == b.caption
    assert np.array_equal(a.bmode(), b.bmode()) and np.array_equal(a.clean(), b.clean()) and np.array_equal(a.mask, b.mask)
    big = scene(seed, index, 160)
    assert big.attributes == a.attributes and big.caption == a.caption and abs(big.mask.mean() - a.mask.mean()) < .01
    assert 0 < a.mask.mean() < .4 and np.isfinite(a.echogenicity).all()


def test_same_in_another_process():
    code = "import hashlib; from htlab.dataset import scene; s = scene(1, 5, 112); print(hashlib.sha256(s.bmode().tobytes() + s.caption.encode()).hexdigest())"
    out = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": str(k)}).stdout for k in (1, 2)}
    assert len(out) == 1


def test_attributes_follow_their_odds():
    rng = np.random.default_rng(0)
    drawn = pd.DataFrame([draw_attributes(rng) for _ in range(6000)])
    for k, odds in ODDS.items():
        for j, label in enumerate(LABELS):
            share = drawn[drawn.label == label][k].value_counts(normalize=True)
            for value, p in odds.items(): assert share.get(value, 0) == pytest.approx(p[j], abs=.035)
            assert sum(p[j] for p in odds.values()) == pytest.approx(1)


def test_captions_say_only_what_is_true():
    for i in range(60):
        s = scene(4, i, 16)
        words = s.caption
        assert s.attributes["organ"] in words or "an ultrasound image of" in words
        for label in LABELS: assert label not in re.findall(r"\w+", words) or label == s.attributes["label"]
        for value in ODDS["margin"]: assert value not in words or value == s.attributes["margin"]


@pytest.mark.parametrize("attribute", ["organ", "label", *ODDS])
def test_prompts_use_the_words_of_captions(attribute):
    known = set(tiny_vocab([scene(0, i, 16).caption for i in range(1500)]))
    prompts = world_prompts(attribute)
    assert set(prompts) == set({"organ": ORGANS, "label": LABELS}.get(attribute, ODDS.get(attribute)))
    assert set(tiny_vocab([t for ts in prompts.values() for t in ts])) <= known


def test_attenuation_shows_in_the_clean_drawing():
    for i in range(20):
        s = scene(8, i, 112, posterior="shadowing", organ="breast")
        t = scene(8, i, 112, posterior="enhancement", organ="breast")
        below = (np.cumsum(s.mask, 0) > 0) & ~s.mask & (np.cumsum(s.mask, 0) >= s.mask.sum(0))
        assert s.clean()[below].mean() < t.clean()[below].mean()


def test_phantom_is_what_its_function_makes(phantom):
    assert phantom.df.astype(str).equals(phantom_table().astype(str)[list(phantom.df)])


@given(st.integers(10, 900), st.integers(10, 900), st.sampled_from([(112, 112), (224, 224), (64, 96)]))
@settings(max_examples=60, deadline=None)
def test_letterbox_fits_and_keeps_the_aspect(h, w, size):
    top, left, bh, bw = fit_box(h, w, size)
    assert 0 <= top and top + bh <= size[0] and 0 <= left and left + bw <= size[1] and (bh == size[0] or bw == size[1])
    if min(bh, bw) > 10: assert bw / bh == pytest.approx(w / h, rel=.1)


def test_files_letterbox_and_native_round_trip(files):
    ds = ImageSet(files, 64)
    wide, tall = ds[0], ds[1]
    assert wide["image"].shape == (3, 64, 64) and wide["image"].dtype == torch.float32 and 0 <= wide["image"].min() and wide["image"].max() <= 1
    assert torch.equal(wide["image"][0], wide["image"][2]) and wide["mask"].dtype == torch.int64
    assert (wide["image"][:, :16] == 0).all() and (tall["image"][:, :, :16] == 0).all()    # padding, not stretching
    assert tall["mask"].sum() == 0 and not ds.native_mask(1).any()
    back = ds.to_native(wide["mask"].float(), 0) > .5
    assert back.shape == (60, 120) and (back.numpy() == ds.native_mask(0)).mean() > .97
    assert (wide["label"], tall["label"]) == (0, 1) and ds.row(0)["spacing_mm"] is None
    assert ds.to_native(torch.rand(2, 64, 64), 1).shape == (2, 90, 45)


def test_simulated_rows_know_their_spacing(phantom):
    ds = ImageSet(phantom.split("valid"), 80, progress=False)
    assert ds.row(0)["spacing_mm"] == pytest.approx(.5)
    assert torch.equal(ds.to_native(ds[0]["mask"].float(), 0) > .5, torch.from_numpy(ds.native_mask(0)))


def test_augmentation_is_a_function_of_seed_epoch_and_id(phantom):
    part = phantom.shots(6, 0).split("train")
    a, b = (ImageSet(part, 48, augment=True, seed=s, progress=False) for s in (0, 0))
    b.set_epoch(3); [b[i] for i in range(5)]; a.set_epoch(2); b.set_epoch(2); torch.rand(11)
    state = torch.get_rng_state()
    assert all(torch.equal(a[i]["image"], b[i]["image"]) and torch.equal(a[i]["mask"], b[i]["mask"]) for i in range(len(a)))
    assert torch.equal(state, torch.get_rng_state())     # the caller's generator is left alone
    b.set_epoch(4)
    assert any(not torch.equal(a[i]["image"], b[i]["image"]) for i in range(len(a)))
    plain = ImageSet(part, 48, progress=False)
    changed = sum(not torch.equal(plain[i]["image"], a[i]["image"]) for a_ in [a] for e in range(20) for i in [0] if a_.set_epoch(e) is None)
    assert 4 <= changed <= 16      # half of the images


def weak(seed, n): # numbers that move every image and leave its grey values
    u = draws(seed, 0, list(map(str, range(n)))).copy(); u[:, :3] = 0, 0, .5
    return u


@given(st.integers(0, 2**31), st.sampled_from([(64, 64), (48, 80)]))
@settings(max_examples=25, deadline=None)
def test_image_and_mask_move_together(seed, size):
    x = torch.zeros(3, 2, *size, dtype=torch.uint8); x[:, :, 15:40, 10:50] = torch.tensor([255, 1]).view(2, 1, 1)
    image, mask = augmented(x, weak(seed, 3))
    assert ((image[:, 0] > .5) == (mask > 0)).float().mean() > .97 and set(mask.unique().tolist()) <= {0, 1}


@given(st.integers(0, 2**31), st.integers(1, 12), st.randoms())
@settings(max_examples=25, deadline=None)
def test_an_image_is_the_same_alone_in_a_batch_and_in_any_order(seed, n, random):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 2, 33, 40), np.uint8)); x[:, 1] //= 128
    u, order = draws(seed, 1, list(map(str, range(n)))), random.sample(range(n), n)
    image, mask = augmented(x, u)
    again, moved = augmented(x[order], u[order])
    assert torch.equal(again, image[order]) and torch.equal(moved, mask[order])
    for i in range(n):
        one, m = augmented(x[i:i + 1], u[i:i + 1])
        assert torch.equal(one[0], image[i]) and torch.equal(m[0], mask[i])
        if u[i, 0] >= .5: assert torch.equal(one[0, 0], x[i, 0].float() / 255) and torch.equal(m[0], x[i, 1].long())  # left alone


def test_strong_transformations_are_torchvisions():
    from torchvision.transforms.v2 import functional as v2F
    x, u = torch.from_numpy(np.stack([scene(0, i, 64).bmode()[None] for i in range(8)])), torch.linspace(0, .999, 8).view(-1, 1, 1, 1)
    theirs = {"brightness": lambda x, u: v2F.adjust_brightness(x, .75 + .5 * u), "contrast": lambda x, u: v2F.adjust_contrast(x, .75 + .5 * u), "blur": lambda x, u: v2F.gaussian_blur(x, 3, .1 + .9 * u),
              "sharpness": lambda x, u: v2F.adjust_sharpness(x, 2), "posterise": lambda x, u: v2F.posterize(x, 5), "solarise": lambda x, u: v2F.solarize(x, .9), "equalise": lambda x, u: v2F.equalize(x)}
    assert set(theirs) == set(STRONG)
    for name, f in STRONG.items():
        a, b = f(x, u).int(), torch.stack([theirs[name](one, float(k)) for one, k in zip(x, u.flatten())]).int()
        assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 1e-3, name


def test_a_batch_is_its_items(files):
    ds = ImageSet(files, 64, augment=True, seed=3, progress=False)
    for epoch in range(4):
        ds.set_epoch(epoch)
        whole = ds.finish(ds.batch([1, 0, 1]))
        for k, i in enumerate([1, 0, 1]):
            item = ds[i]
            assert all(torch.equal(whole[c][k], item[c]) for c in ("image", "mask")) and (whole["id"][k], whole["text"][k], int(whole["label"][k])) == (item["id"], item["text"], item["label"])


def test_a_subclass_that_changes_items_is_not_passed_by():
    class Louder(ImageSet):
        def __getitem__(self, i): return super().__getitem__(i) | {"image": super().__getitem__(i)["image"] * 2}
    class Renamed(ImageSet): pass
    assert Louder.batch is None and Renamed.batch is not None


@pytest.mark.parametrize("damage, error, words", [
    (lambda r: (r / "images/wide.png").unlink(), FileNotFoundError, "wide: image .* is missing"),
    (lambda r: (r / "images/wide.png").write_text("not an image"), ManifestError, "row 1 .id 'wide'.*field 'image'.* is not an image"),
    (lambda r: Image.new("L", (120, 60)).save(r / "images/wide.png"), ManifestError, "row 1 .id 'wide'.* has other bytes than the table says"),
    (lambda r: Image.new("L", (50, 50)).save(r / "masks/wide.png"), ManifestError, "field 'mask'.* is 50 x 50 px where width and height say 120 x 60")])
def test_bad_files_are_named(files, damage, error, words):
    damage(files.root)
    with pytest.raises(error, match=words): ImageSet(files, 64, progress=False)


@pytest.mark.parametrize("call,words", [(lambda: scene(0, 0, shape="square"), "shape='square': one of oval"), (lambda: scene(0, 0, colour="red"), "no attribute 'colour'"),
                                        (lambda: parse_recipe("sim:1"), "write sim:SEED/INDEX"), (lambda: scene(0, 0, 8), "at least 16")])
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_scenes_are_kept_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HTLAB_CACHE", str(tmp_path))
    first = draw_scenes(["sim:3/1", "sim:3/2"], 32, progress=False)
    assert first[[0, 1]].shape == (2, 2, 32, 32) and np.array_equal(first[1][0], scene(3, 2, 32).bmode())
    more = draw_scenes(["sim:3/5", "sim:3/2"], 32, progress=False)
    assert more.path == first.path and list(more.at) == [2, 1] and np.array_equal(more[1], first[1])
    assert draw_scenes(["sim:3/1"], 32, clean=True, progress=False).path != first.path != draw_scenes(["sim:3/1"], 48, progress=False).path


@pytest.mark.parametrize("raw, clean", [
    ("Figure 1. Transverse view of a hypoechoic mass (arrow) [3, 12-14].", "Transverse view of a hypoechoic mass."), ("Fig 2b: Thyroid nodule with comet-tail artefacts", "Thyroid nodule with comet-tail artefacts"),
    ("(A) Axillary node with fatty hilum; (B, C) Doppler of the node (Figs. 3a and 4)", "Axillary node with fatty hilum; Doppler of the node"), ("A simple cyst (see Fig. 3) behind the nipple", "A simple cyst behind the nipple"),
    ("<p>H<sub>2</sub>O-filled&nbsp;lesion &lt; 10 mm &amp;amp; more</p>", "H2O-filled lesion < 10 mm & more"), ("Irregular mass (Smith et al., 2019) with shadow (Lee and Kim, 2020)", "Irregular mass with shadow"),
    ("Irregular\x00 mass\u200b\n\twith   posterior\u00a0shadowing", "Irregular mass with posterior shadowing"), ("Irregular mass, see https://doi.org/10.1/x.y for more", "Irregular mass, see for more"),
    ("A hypoechoic lesion of 12 mm in image 3 cm deep", "A hypoechoic lesion of 12 mm in image 3 cm deep")])
def test_captions_are_cleaned(raw, clean): assert clean_caption(raw) == clean


def test_short_captions_are_none():
    assert clean_caption("Figure 4. (A) Ultrasound.") == clean_caption(None) == clean_caption(float("nan")) == clean_caption("") == ""
    assert clean_caption("x" * 20) == "" and clean_caption("x" * 21) == "x" * 21 and clean_caption("short", 4) == "short"


@given(st.text(max_size=80) | st.lists(st.sampled_from(["Fig. 2b", "(A)", "[1, 2]", "<b>", "&lt;", "&amp;", "(", ")", "a", "mass", " ", ".", ":", "Figure", "3", "(arrow)", "\u200b", "et al.", ", 2019)", "see "]), max_size=14).map("".join))
@settings(max_examples=150, deadline=None)
def test_cleaning_twice_is_cleaning_once(text):
    once = clean_caption(text, 0)
    assert clean_caption(once, 0) == once and once == once.strip() and "  " not in once and not set(once) & set("\x00\x07\n\t\u200b")


def test_simulated_captions_need_no_cleaning(phantom): assert all(clean_caption(t) == t for t in phantom.df.text)
