"Laws of the audit: what is planted is found, what is not there is not, in any order; nothing is lost in a repair or half-written in a report."
import io, re, struct, subprocess, sys, zlib
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, stats

from htlab import audit as A
from htlab.audit import Audit, agreement, align, audit, candidates, describe, drift, find_copies, find_marks, mask_faults, near_pairs, verify
from htlab.manifest import Manifest, measure
from htlab.speckle import SCANNERS, bmode

quick = settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SPLITS = ("train", "valid", "test")


@cache
def tissue(seed, h=150, w=190, scanner="A", mm=.2): # a random scene; do not write into it
    rng = np.random.default_rng(seed)
    echo = sum(a * ndimage.zoom(rng.standard_normal((k, k)), (h / k, w / k), order=3) for k, a in ((4, 5), (9, 3)))
    z, x = np.mgrid[:h, :w]
    mask = ((z - rng.uniform(.35, .65) * h) / (.14 * h))**2 + ((x - rng.uniform(.3, .7) * w) / (.14 * w))**2 < 1
    g = bmode(10**((echo - 15 * mask) / 20), SCANNERS[scanner], mm, rng)
    g.flags.writeable = mask.flags.writeable = False
    return g, mask


def scenes(first, n): return [tissue(first + s, scanner="ABC"[s % 3])[0] for s in range(n)]
def small(images): return np.stack([A._resize(A._grey(g)) for g in images])
def jpeg(g, quality): Image.fromarray(g).save(f := io.BytesIO(), "jpeg", quality=quality); return np.asarray(Image.open(f))


def changed(g, mirror=False, crop=(0, 0, 0, 0), scale=1., bright=1., contrast=1., gamma=1., quality=0):
    if mirror: g = g[:, ::-1]
    (h, w), (l, r, t, b) = g.shape, crop
    g = np.ascontiguousarray(g[round(t * h):h - round(b * h), round(l * w):w - round(r * w)])
    if scale != 1: g = np.asarray(Image.fromarray(g).resize([max(8, round(n * scale)) for n in g.shape[::-1]], Image.BICUBIC))
    v = (g / 255)**gamma; v = ((v - v.mean()) * contrast + v.mean()) * bright
    g = (np.clip(v, 0, 1) * 255 + .5).astype(np.uint8)
    return jpeg(g, quality) if quality else g


def ways(rng): # within what is promised
    return dict(mirror=bool(rng.integers(2)), crop=tuple(rng.uniform(0, .1, 4)), scale=rng.uniform(.5, 1.5), bright=rng.uniform(.7, 1.3), contrast=rng.uniform(.7, 1.3), gamma=rng.uniform(.7, 1.4), quality=int(rng.integers(30, 96)))


def table(images, labels=None, splits=None, **more): # a manifest of images in memory, and the function that reads them
    ids = [f"i{k}" for k in range(len(images))]
    df = pd.DataFrame({"id": ids, "image": [f"sim:0/{k}" for k in range(len(ids))], "mask": "", "label": labels or "x", "group": ids, "split": splits or "train", "sha256": [f"{k:064x}" for k in range(len(ids))], "width": 1, "height": 1, **more})
    return Manifest(df, "memory"), lambda row: (images[int(row["id"][1:])], None)


def look(images, labels=None, splits=None, more={}, **kw): m, read = table(images, labels, splits, **more); return audit(m, read, progress=False, workers=2, **kw)
def both(a, b): return {frozenset((int(i), int(j))) for i, j in zip(a, b)}


# ---- copies

def test_import_is_light():
    code = "import sys, htlab.audit; print([m for m in ('torch', 'faiss', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_same_pixels_in_other_files_are_identical(tmp_path):
    g, h = tissue(1)[0], tissue(2)[0]
    for name, im in {"a.png": g, "b.bmp": g, "c.tif": g, "d.png": np.stack([g] * 3, -1), "e.png": h, "f.png": g[:, :-1]}.items(): Image.fromarray(im).save(tmp_path / name)
    rows = pd.DataFrame([dict(id=n[0], image=n, mask="", label="x", group=n[0], split="train") for n in sorted(p.name for p in tmp_path.iterdir())])
    a = audit(Manifest(measure(rows, tmp_path), "files", tmp_path), progress=False)
    p = a.pairs[a.pairs.kind.eq("identical")]
    assert set(zip(p.a, p.b)) == {("a", "b"), ("a", "c"), ("a", "d")} and set(p.seen) == {"same pixels"}
    assert a.clusters.ids.tolist() == ["a b c d f"], "one column less is a crop of it"


def test_nearly_all_planted_copies_are_found_and_nothing_else():
    images, rng = scenes(0, 150), np.random.default_rng(0)
    thumbs = small(images + [changed(g, **ways(rng)) for g in images])
    p, score, boxes, flip = find_copies(thumbs, workers=2)
    own = p[:, 0] % 150 == p[:, 1] % 150
    assert own.sum() >= 148 and own.all() and len(both(*p.T)) == len(p) and (score >= A.LEVELS[-1][-1]).all() and boxes.shape == (len(p), 4)


POOL = scenes(0, 24)


@given(st.integers(0, 23), st.booleans(), st.tuples(*[st.floats(0, .1)] * 4), st.sampled_from(["nothing", "scale", "light", "jpeg"]), st.floats(0, 1), st.floats(0, 1))
@quick
def test_a_crop_mirrored_or_not_with_any_one_other_change_is_found(i, mirror, crop, other, u, v):
    how = {"nothing": {}, "scale": dict(scale=.5 + u), "light": dict(bright=.7 + .6 * u, gamma=.7 + .7 * v), "jpeg": dict(quality=30 + int(65 * u))}[other]
    p, _, box, flip = find_copies(small([*POOL, changed(POOL[i], mirror, crop, **how)]), workers=1)
    assert both(*p.T) == {frozenset((i, 24))} and flip[0] == mirror
    if p[0, 0] == i: # the copy lies in the image, where it was cut out
        l, r, t, b = crop; l, r = (r, l) if mirror else (l, r) # cut after the mirror, told before it ...
        l, r = (r, l) if mirror else (l, r) # ... and the box is of the mirrored image
        assert np.abs(box[0] - np.array([l, 1 - r, t, 1 - b])).max() < .02


@given(st.integers(0, 10**6))
@quick
def test_pairs_do_not_depend_on_the_order(seed):
    rng = np.random.default_rng(5)
    thumbs = small(POOL[:12] + [changed(g, **ways(rng)) for g in POOL[:6]])
    o = np.random.default_rng(seed).permutation(len(thumbs))
    p = find_copies(thumbs[o], workers=1)[0]
    assert both(o[p[:, 0]], o[p[:, 1]]) == {frozenset((i, i + 12)) for i in range(6)}


def test_different_scenes_are_never_paired():
    thumbs = small(scenes(20_000, 240))
    assert not len(find_copies(thumbs, workers=2)[0]) and not len(near_pairs(thumbs)[0])


def test_a_copy_inside_a_frame_or_with_text_over_it_is_found():
    g, images = tissue(3, 300, 380)[0], scenes(100, 30)
    framed = np.zeros((420, 600), np.uint8); framed[50:350, 110:490] = g
    over = Image.fromarray(g); ImageDraw.Draw(over).text((20, 250), "LT AXILLA 9", 230, ImageFont.load_default(24))
    a = look([g, framed, np.asarray(over), *images])
    assert {frozenset(p) for p in zip(a.pairs.a, a.pairs.b)} >= {frozenset(("i0", "i1")), frozenset(("i0", "i2"))} and set(a.pairs.a) | set(a.pairs.b) == {"i0", "i1", "i2"}
    assert a.pairs.seen.str.contains("framed").any()


def test_a_thousand_copies_of_one_image_are_one_cluster_and_few_pairs():
    a = look([tissue(4)[0]] * 1000 + [tissue(5)[0]])
    assert len(a.pairs) == 999 and a.clusters.n.tolist() == [1000]


def test_near_is_what_it_says():
    rng = np.random.default_rng(0)
    t = np.repeat(rng.integers(0, 256, (40, 1, 128, 128)), 2, 1).reshape(80, 128, 128).astype(float)
    t = ndimage.gaussian_filter(t, (0, 5, 5)); t = (t - t.min((1, 2), keepdims=True)) / np.ptp(t, (1, 2))[:, None, None] * 200 + 20
    t[1::2] += np.linspace(0, 20, 40)[:, None, None] * rng.standard_normal((40, 128, 128)) # from equal to noisy
    t = np.clip(t, 0, 255).astype(np.uint8)
    r = np.corrcoef(t.repeat(3, 1).repeat(3, 2).reshape(80, 48, 8, 48, 8).mean((2, 4)).reshape(80, -1)) # area means, the plain way
    p, found = near_pairs(t)
    sure = {frozenset((i, j)) for i, j in np.argwhere(np.triu(r > A.NEAR + 1e-5, 1))}
    assert 5 < len(sure) < 40 and sure <= both(*p.T) <= {frozenset((i, j)) for i, j in np.argwhere(np.triu(r > A.NEAR - 1e-5, 1))}
    assert np.abs(found - r[p[:, 0], p[:, 1]]).max() < 1e-5


def test_the_descriptor_of_a_crop_is_that_of_the_cut_thumbnail():
    g = tissue(6, 256, 256)[0]
    whole = A._resize(g)[None]
    for l, r in ((0, .1), (.05, .05), (.1, 0)):
        w = 256; cut = A._resize(g[:, round(l * w):w - round(r * w)])[None]
        one = describe(whole, [(0, 0), (l, r)])[0, 1] # all of the height, part of the width
        assert one @ describe(cut)[0, 0] > .99 and describe(whole)[0, 0] @ describe(whole[:, :, ::-1])[0, 0] < one @ describe(cut)[0, 0]
    assert np.allclose(describe(whole[:, :, ::-1])[0, 0], describe(whole)[0, 0] * A._FLIP, atol=1e-5)


@given(st.tuples(*[st.floats(-.03, .03)] * 4))
@quick
def test_alignment_finds_the_part_again(off):
    g, true = tissue(7, 256, 256, mm=.1)[0], np.array([.06, .94, .04, .97])
    a = A._shrink(A._resize(g)[None], 64); b = A._shrink(A._resize(g, box=tuple((true * 256)[[0, 2, 1, 3]]))[None], 64)
    for n in (16, 32): # from coarse to fine, as `verify` does
        box = align(A._shrink(a, n), A._shrink(b, n), (true + off)[None].astype(np.float32) if n == 16 else box)
    box = align(a, b, box)
    assert np.abs(box - true).max() < .01 and agreement(a, b, box)[0] > .6 > .3 > agreement(a, b[:, ::-1], box)[0]


# ---- what follows from pairs

faults = st.lists(st.tuples(st.integers(0, 4), st.sampled_from("ab"), st.sampled_from(SPLITS)), min_size=3, max_size=9) # which scene, label, split


def expected(rows): # brute force: clusters of equal scenes
    clusters = {}
    for i, (s, *_) in enumerate(rows): clusters.setdefault(s, []).append(i)
    return [c for c in clusters.values() if len(c) > 1]


@given(faults)
@quick
def test_conflicts_crossings_and_clusters_exactly_where_planted(rows):
    a = look([POOL[s] for s, *_ in rows], [l for _, l, _ in rows], [s for *_, s in rows])
    clusters = expected(rows); name = lambda c: " ".join(f"i{i}" for i in c)
    assert sorted(a.clusters.ids) == sorted(map(name, clusters))
    assert sorted(a.crossings.ids) == sorted(name(c) for c in clusters if len({rows[i][2] for i in c}) > 1)
    assert {frozenset(p) for p in zip(a.conflicts.a, a.conflicts.b)} == {frozenset((f"i{c[0]}", f"i{i}")) for c in clusters for i in c if rows[i][1] != rows[c[0]][1]}
    assert a.counts()["clusters"] == len(clusters) and a.counts()["images"] == len(rows)


@given(faults, st.sampled_from(["majority", "reassign"]), st.sampled_from(["keep", "drop"]), st.integers(0, 3))
@quick
def test_a_repair_leaves_no_leak(rows, splits, conflicts, seed):
    a = look([POOL[s] for s, *_ in rows], [l for _, l, _ in rows], [s for *_, s in rows])
    torn = [c for c in expected(rows) if len({rows[i][1] for i in c}) > 1]; gone = {f"i{i}" for c in torn for i in c} if conflicts == "drop" else set()
    if len(gone) == len(rows):
        with pytest.raises(ValueError, match="no image is left"): a.repaired(splits, conflicts, seed=seed)
        return
    d = a.repaired(splits, conflicts, seed=seed)
    m = Manifest(d, "repaired").df.set_index("id")
    assert set(m.index) == {f"i{k}" for k in range(len(rows))} - gone
    for c in expected(rows):
        left = m[m.index.isin([f"i{i}" for i in c])]
        assert left.group.nunique() <= 1 and left.split.nunique() <= 1
        if len(left) and splits == "majority":
            votes = [rows[i][2] for i in c]; most = max(map(votes.count, SPLITS))
            assert left.split.iloc[0] == next(s for s in ("test", "valid", "train") if votes.count(s) == most), "a tie goes to the sealed side"
    alone = [k for k, (s, *_) in enumerate(rows) if [r[0] for r in rows].count(s) == 1]
    if splits == "majority": assert all(m.split[f"i{k}"] == rows[k][2] and m.group[f"i{k}"] == f"i{k}" for k in alone), "the others are left alone"
    if conflicts == "keep": assert set(m.index[m.get("audit", pd.Series("", m.index)).ne("")]) == {x for p in zip(a.conflicts.a, a.conflicts.b) for x in p}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b", "unknown", "Unknown"])), min_size=3, max_size=9))
@quick
def test_no_label_contradicts_nothing_and_hides_nothing(rows):
    a = look([POOL[s] for s, _ in rows], [l for _, l in rows])
    torn = {i for c in expected(rows) if len({rows[i][1] for i in c} & {"a", "b"}) > 1 for i in c}
    assert not {"unknown", "Unknown"} & {*a.conflicts.label_a, *a.conflicts.label_b} and a.conflicts.label_a.ne(a.conflicts.label_b).all()
    names = {x for p in zip(a.conflicts.a, a.conflicts.b) for x in p}
    for c in expected(rows): assert bool(names & {f"i{i}" for i in c}) == bool(torn & {*c}), "a cluster with two labels is a conflict, though they may meet only over an image without one"
    if len(torn) < len(rows): assert set(a.repaired(conflicts="drop").id) == {f"i{i}" for i in range(len(rows)) if i not in torn}
    assert a.counts()["label conflicts"] == len(a.conflicts) and all(kind in a.html(0) for kind in a.conflicts.kind)


def test_reassign_keeps_the_proportions_and_the_seed():
    images = scenes(300, 60); labels = ["ab"[k % 2] for k in range(90)]; splits = ["train"] * 54 + ["valid"] * 18 + ["test"] * 18
    a = look(images + images[:30], labels, splits)
    d = a.repaired("reassign", seed=1)
    assert len(a.crossings) and d.groupby("group").split.nunique().max() == 1 and all(abs(d.split.eq(s).sum() - n) <= 3 for s, n in (("train", 54), ("valid", 18), ("test", 18)))
    assert d.split.equals(a.repaired("reassign", seed=1).split) and not d.split.equals(a.repaired("reassign", seed=2).split)


def test_repair_refuses_unknown_words():
    a = look(POOL[:3])
    for kw, word in ((dict(splits="random"), "majority"), (dict(conflicts="ignore"), "drop"), (dict(kinds=("twins",)), "twins")):
        with pytest.raises(ValueError, match=word): a.repaired(**kw)


def test_embeddings_are_hints_only():
    twins = np.random.default_rng(0).standard_normal((9, 6)); twins[1] = twins[0] + .01
    a = look(POOL[:9], ["a", "b"] + ["a"] * 7, embed=lambda images: twins)
    assert a.pairs[["kind", "a", "b"]].values.tolist() == [["embedding", "i0", "i1"]] and a.pairs.score[0] > .95
    assert not len(a.clusters) and not len(a.conflicts) and a.repaired().group.tolist() == a.manifest.df.group.tolist()
    assert a.repaired(kinds=("embedding",)).group.nunique() == 8
    with pytest.raises(ValueError, match=r"embed gave \(2, 6\) for 9 images"): look(POOL[:9], embed=lambda images: twins[:2])


def test_embeddings_come_in_blocks_that_belong_to_their_images():
    images = scenes(500, 150)
    seen = []
    def embed(block): seen.append(len(block)); return np.stack([np.r_[g.mean(), g.std(), g[::10, ::10].ravel()] for g in block])
    a = look(images + [images[140]], embed=embed)
    assert sum(seen) == 151 and max(seen) <= 64
    assert a.pairs.kind.tolist().count("identical") == 1 and not a.pairs[a.pairs.kind.eq("embedding")].apply(lambda r: {r.a, r.b} == {"i140", "i150"}, axis=1).any(), "what is proved is no hint"


# ---- masks

SOUND = tissue(8)[1]
MASKS = {
    "sound": (SOUND, []), "ones": (SOUND.astype(np.uint8), []), "rgb": (np.stack([SOUND * np.uint8(255)] * 3, -1), []), "none": (None, []),
    "empty": (SOUND & False, ["empty"]), "full": (SOUND | True, ["full"]), "size": (SOUND[:-3], ["size"]), "blurred": (ndimage.gaussian_filter(SOUND * 255., 2).astype(np.uint8), ["not binary"]),
    "missing": ("missing", ["missing"]), "damaged": ("unreadable: truncated", ["unreadable"]), "four": (np.zeros((2, 2, 2, 2)), ["unreadable"]),
}


@pytest.mark.parametrize("name", MASKS)
def test_each_fault_of_a_mask(name):
    mask, want = MASKS[name]
    assert [f for f, _ in mask_faults(mask, SOUND.shape)] == want
    if not isinstance(mask, str) and mask is not None and mask.shape[:2] == SOUND.shape: # without a lesion it is the other way round
        assert ("not empty" in [f for f, _ in mask_faults(mask, SOUND.shape, lesion=False)]) == bool(np.any(mask))


@given(st.integers(1, 12), st.integers(0, 10**6))
@quick
def test_specks_are_counted(n, seed):
    m, rng = SOUND.copy(), np.random.default_rng(seed)
    free = np.argwhere(~ndimage.binary_dilation(SOUND, iterations=3)[::5, ::5]) * 5
    for y, x in free[rng.permutation(len(free))[:n]]: m[y, x] = True
    assert mask_faults(m, m.shape) == [("specks", f"{n} of {n + 1} parts are smaller than 9 px")]


def test_a_mask_of_another_image_and_one_that_is_not_there():
    m, read = table(POOL[:4], ["a", "a", "a", "normal"], mask=["m0.png", "m1.png", "", ""])
    a = audit(m, lambda row: (read(row)[0], SOUND if row["mask"] else None), progress=False)
    assert a.masks[["id", "fault"]].values.tolist() == [["i2", "missing"], ["i1", "shared"]], "a normal image needs none"
    same, read = table([POOL[0], POOL[0]], mask=["m0.png", "m1.png"])
    assert not len(audit(same, lambda row: (read(row)[0], SOUND), progress=False).masks), "the same image twice has the same mask"


# ---- marks

def stamp(g, kind, seed): # a caliper or text that stands out, and its pixels
    rng = np.random.default_rng(seed)
    while True:
        im = Image.fromarray(g); d = ImageDraw.Draw(im); grey, r, w = (int(v) for v in rng.integers((210, 6, 1), (256, 11, 4)))
        x, y = int(rng.integers(15, g.shape[1] - 110)), int(rng.integers(15, g.shape[0] - 30))
        if kind == "cross": d.line((x - r, y, x + r, y), grey, w); d.line((x, y - r, x, y + r), grey, w)
        elif kind == "x": d.line((x - r, y - r, x + r, y + r), grey, w); d.line((x - r, y + r, x + r, y - r), grey, w)
        else: d.fontmode = "1" if kind == "text" else "L"; d.text((x, y), "LT AXILLA", grey, ImageFont.load_default(int(rng.integers(12, 22))))
        out = np.asarray(im); on = out != g
        if grey - g[ndimage.binary_dilation(on, iterations=4) & ~on].mean() > 70: return out, on


@pytest.mark.parametrize("kind, least", [("cross", 27), ("x", 28), ("text", 28), ("smooth text", 26)])
def test_marks_are_found_where_they_are(kind, least):
    hit = 0
    for s in range(30):
        g = tissue(9000 + s, 240, 320, "ABC"[s % 3], .1)[0]
        image, on = stamp(g, kind, s)
        found = find_marks(image)
        hit += any(k == "text or caliper" and on[y0:y1, x0:x1].any() for k, (x0, y0, x1, y1), _ in found)
        for k, (x0, y0, x1, y1), n in found: assert 0 <= x0 < x1 <= 320 and 0 <= y0 < y1 <= 240 and 0 < n <= (x1 - x0) * (y1 - y0)
    assert hit >= least


def test_clean_images_have_no_marks():
    clean = [tissue(9000 + s, 240, 320, "ABC"[s % 3], .1)[0] for s in range(60)]
    assert sum(bool(find_marks(g)) + bool(find_marks(jpeg(g, 75))) for g in clean) <= 1


def test_an_echo_and_a_stroke_of_the_same_size(): # lying, peaked or blurred is an echo; upright, flat and sharp is a stroke
    g = np.full((120, 160), 60, np.uint8)
    stroke = g.copy(); stroke[40:60, 80:83] = 230
    lying = g.copy(); lying[50:53, 60:100] = 230
    y, x = np.mgrid[:120, :160]; peak = (60 + 170 * np.exp(-((x - 80) / 2)**2 - ((y - 50) / 8)**2)).astype(np.uint8)
    soft = ndimage.gaussian_filter(stroke, 2); wide = g.copy(); wide[30:70, 60:90] = 230
    assert find_marks(stroke) == [("text or caliper", (80, 40, 83, 60), 60)]
    assert [find_marks(i) for i in (g, lying, peak, soft, wide)] == [[]] * 5
    cross = lying.copy(); cross[40:62, 79:82] = 230
    assert find_marks(cross) == [("text or caliper", (60, 40, 100, 62), 3 * 40 + 3 * 19 - 9)], "the lying arm of a cross belongs to it, less the middle, which is thin in no direction"


@given(st.integers(0, 10**6))
@quick
def test_colour_is_an_overlay_and_a_tint_of_jpeg_is_not(seed):
    rng = np.random.default_rng(seed)
    g = np.stack([tissue(9)[0]] * 3, -1); y, x = int(rng.integers(0, 120)), int(rng.integers(0, 150)); h, w = (int(v) for v in rng.integers(4, 25, 2))
    assert find_marks(jpeg(g, int(rng.integers(30, 96)))) == [] # grey saved as colour
    g[y:y + h, x:x + w] = rng.permutation([230, 200, 20])
    assert find_marks(g) == [("colour", (x, y, x + w, y + h), h * w)]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["zeros", "white", "noise", "board", "bars"]), st.booleans())
@quick
def test_no_image_is_too_odd(h, w, what, rgb):
    v = {"zeros": np.zeros((h, w)), "white": np.full((h, w), 255), "noise": np.random.default_rng(h).integers(0, 256, (h, w)), "board": np.indices((h, w)).sum(0) % 2 * 255, "bars": np.indices((h, w))[1] // 2 % 3 * 120}[what].astype(np.uint8)
    for k, (x0, y0, x1, y1), n in find_marks(np.stack([v] * 3, -1) if rgb else v): assert k == "text or caliper" and x1 <= w and y1 <= h
    assert len(look([v, POOL[0]]).facts) == 2


# ---- drift

def facts(n, rng, shift=0.): return pd.DataFrame(rng.standard_normal((2 * n, 4)) + np.repeat([[0], [shift]], n, 0), columns=A.MEASURES).assign(scanner=["A"] * n + ["B"] * n)


def test_no_difference_is_rarely_one():
    rng = np.random.default_rng(0)
    false = sum(drift(facts(20, rng), ["scanner"]).p_holm.min() < .05 for _ in range(200))
    assert false <= stats.binom.ppf(.9999, 200, .05), "over all questions asked, not each of them"


def test_a_shift_is_found_and_measured():
    rng = np.random.default_rng(1)
    ds = [drift(facts(40, rng, 1.5), ["scanner"]) for _ in range(30)]
    assert all((d.p_holm < .05).all() for d in ds) and abs(np.mean([d.smd[d.source.eq("B")].mean() for d in ds]) - 1.5) < .1
    d = ds[0]; p = np.sort(d.p); m = len(p)
    assert np.allclose(d.p_holm, [min(1, max((m - j) * p[j] for j in range(i + 1))) for i in range(m)]) and (d.p_holm >= d.p).all() # Holm's own formula


def test_drift_needs_two_sources_of_five():
    rng = np.random.default_rng(2)
    assert not len(drift(facts(20, rng).assign(scanner="A"), ["scanner"])) and not len(drift(facts(4, rng), ["scanner"]))
    d = drift(facts(20, rng).assign(width=500), ["scanner"])
    assert d.smd[d.measure.eq("width")].tolist() == [0, 0] and d.p[d.measure.eq("width")].tolist() == [1, 1]


def test_the_source_is_a_column():
    images = [tissue(s, scanner="AB"[s % 2])[0] for s in range(30)]
    a = look(images, more=dict(probe=[f"p{s % 2}" for s in range(30)]), source="probe")
    assert set(a.drift.column) == {"probe", "label", "split"} - ({"label"} if a.manifest.df.label.nunique() < 2 else set()) - ({"split"} if a.manifest.df.split.nunique() < 2 else set())
    assert a.drift.query("measure == 'contrast'").p_holm.max() < .01
    with pytest.raises(ValueError, match="no column 'hospital'"): look(images, source="hospital")


# ---- files

def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_is_listed_and_the_rest_is_audited(tmp_path):
    root = tmp_path / "set"; root.mkdir()
    for i in range(6): Image.fromarray(tissue(i)[0]).save(root / f"{i}.png")
    Image.fromarray(tissue(0)[0]).save(tmp_path / "outside.png")
    rows = measure(pd.DataFrame([dict(id=f"i{i}", image=f"{i}.png", mask="", label="x", group=f"i{i}", split="train") for i in range(6)]), root)
    (root / "0.png").write_bytes((root / "0.png").read_bytes()[:500])
    (root / "1.png").write_text("no image")
    (root / "2.png").unlink(); (root / "2.png").symlink_to(tmp_path / "outside.png")
    (root / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 12000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(root / "4.tif"); (root / "4.png").write_bytes((root / "4.tif").read_bytes())
    a = audit(m := Manifest(rows, "set", root), progress=False)
    assert a.files.id.tolist() == ["i0", "i1", "i2", "i3", "i4"] and a.facts.id.tolist() == ["i5"]
    for word, problem in zip(("truncated", "is no image", "leads out", "claims 12000 x 12000", "NaN"), a.files.problem): assert word in problem
    assert a.repaired().id.tolist() == ["i5"] and a.thumbnail("i1") == "" and a.thumbnail("i5").startswith("<img")
    (root / "5.png").unlink()
    with pytest.raises(FileNotFoundError, match="none of 6 images"): audit(m, progress=False)
    with pytest.raises(FileNotFoundError, match="import the data set first"): audit(Manifest(rows, "set", tmp_path / "nowhere"), progress=False)
    with pytest.raises(ValueError, match="pass read="): audit(table(POOL[:2])[0], progress=False)


def test_a_mask_that_is_not_there_is_told_from_one_that_cannot_be_read(tmp_path):
    (root := tmp_path / "set").mkdir()
    for i in range(6): Image.fromarray(tissue(i)[0]).save(root / f"{i}.png"); Image.fromarray(tissue(i)[1]).save(root / f"{i}m.png")
    rows = measure(pd.DataFrame([dict(id=f"i{i}", image=f"{i}.png", mask=f"{i}m.png", label="x", group=f"i{i}", split="train") for i in range(6)]), root)
    (root / "0m.png").unlink(); (root / "1m.png").write_bytes((root / "1m.png").read_bytes()[:60]); (root / "2m.png").unlink(); (root / "2m.png").symlink_to(tmp_path / "elsewhere.png"); Image.fromarray(tissue(2)[1]).save(tmp_path / "elsewhere.png")
    (root / "3m.png").unlink(); (root / "3m.png").mkdir(); (root / "4m.png").unlink(); (root / "4m.png").symlink_to(root / "4m.png")
    a = audit(Manifest(rows, "set", root), progress=False)
    assert dict(zip(a.masks.id, a.masks.fault)) == {"i0": "missing", "i1": "unreadable", "i2": "unreadable", "i3": "missing", "i4": "unreadable"} and not len(a.files) and len(a.facts) == 6
    (root / "5.png").unlink(); a = audit(Manifest(rows, "set", root), progress=False)
    assert a.files.values.tolist() == [["i5", "5.png: is missing"]], "no path of this machine"


@pytest.mark.parametrize("image", [np.zeros((3, 4)), np.zeros((3, 4, 4), np.uint8), np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8), "image.png", None])
def test_what_is_no_image_is_listed(image):
    a = look([image, POOL[0]])
    assert a.files.id.tolist() == ["i0"] and "expected uint8" in a.files.problem[0]


# ---- the report

@pytest.fixture
def report():
    images = [POOL[0], POOL[0], stamp(tissue(9000, 240, 320, "A", .1)[0], "cross", 0)[0], POOL[3]]
    return look(images, ["<script>alert(1)</script>", "b & c", "b & c", "b & c"], ["train", "test", "train", "train"], embed=lambda i: np.eye(4))


def test_the_page_is_whole_in_itself_and_escapes(report):
    page = report.html()
    assert not re.search(r"<script|<link|@import|href", page) and all(s.startswith('"data:image/jpeg;base64,') for s in re.findall(r"src=(.{30})", page))
    assert "&lt;script&gt;" in page and "b &amp; c" in page
    assert page.count("<img") == 3 and "label conflicts" in page and len(report.html(most=0)) < len(page)
    assert "<script" not in report._repr_html_() and "identical" in repr(report)


@pytest.mark.parametrize("card, there, absent", [
    ("# x\n\n## Licence\nCC BY <4.0>\nfor all\n\n## Patients\nsecret\n\n## Citation\nA & B, 2020", ["<h2>Licence</h2>", "CC BY &lt;4.0&gt;\nfor all", "<h2>Citation</h2>", "A &amp; B, 2020"], ["secret", "neither", "<4.0>"]),
    ("## Citation\n<script>alert(2)</script>", ["<h2>Citation</h2>", "&lt;script&gt;alert(2)"], ["neither", "<script", "<h2>Licence"]),
    ("", ["memory: the card names neither licence nor citation"], ["<h2>Citation"]), ("## Licence\n\n## Citation\n", ["the card names neither licence nor citation"], ["<h2>Citation"])])
def test_the_page_ends_with_licence_and_citation(report, card, there, absent):
    report.manifest.card = card; page = report.html()
    end = page[page.rindex("<h2>Pairs</h2>"):]
    assert all(x in end for x in there) and not any(x in page for x in absent) and end.index(there[0]) > end.rindex("</table>")


def test_save_writes_all_of_it_and_again(report, tmp_path):
    out = report.save(tmp_path / "a/report")
    names = {p.name for p in out.iterdir()}
    assert names == {"audit.html", "facts.csv", *(f"{t}.csv" for t in Audit.TABLES)} and [p.name for p in out.parent.iterdir()] == ["report"]
    for t in (*Audit.TABLES, "facts"): assert len(pd.read_csv(out / f"{t}.csv")) == len(getattr(report, t))
    (out / "audit.html").write_text("old"); assert report.save(out) == out and "Audit of memory" in (out / "audit.html").read_text(encoding="utf-8")


def test_save_is_all_or_nothing(report, tmp_path, monkeypatch):
    out = report.save(tmp_path / "report"); before = {p.name: p.read_bytes() for p in out.iterdir()}
    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, "to_csv", lambda *a, **k: 1 / 0)
        for place in (out, tmp_path / "new"):
            with pytest.raises(ZeroDivisionError): report.save(place)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["report"]


def test_save_refuses_a_folder_of_others(report, tmp_path):
    (tmp_path / "thesis").mkdir(); (tmp_path / "thesis/audit.html").write_text("mine"); (tmp_path / "thesis/chapter.txt").write_text("years"); (tmp_path / "file").write_text("x")
    for place in ("thesis", "file"):
        with pytest.raises(FileExistsError, match="give an empty or a new folder"): report.save(tmp_path / place)
    assert (tmp_path / "thesis/audit.html").read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {"thesis", "file"}
    (tmp_path / "empty").mkdir(); assert (report.save(tmp_path / "empty") / "pairs.csv").is_file()


def test_an_unknown_label_says_nothing_about_a_lesion():
    on, off = np.pad(np.ones((9, 9), bool), 20), np.zeros((49, 49), bool)
    seen = {(m, l): [f for f, _ in mask_faults({"on": on, "off": off}[m], on.shape, l)] for m in ("on", "off") for l in (True, False, None)}
    assert seen == {("on", True): [], ("off", True): ["empty"], ("on", False): ["not empty"], ("off", False): [], ("on", None): [], ("off", None): []}
