"Laws of the importers: each data set as it really is, complete or absent; nothing a stranger's file holds is trusted."
import errno, gzip, io, json, os, re, shutil, subprocess, sys, zipfile
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from PIL import Image, ImageDraw

from htlab.importers import IMPORTERS, TIRADS, fill_outline, fill_polygons, import_busi, import_ddti, read_case, read_mask, read_svg
from htlab.manifest import Manifest, ManifestError, assign_splits, check_files
from htlab.source import BadFile, read_image
from test_source import archive, claims, nifti, tree

REPO = Path(__file__).parents[1]
digest = lambda b: sha256(b).hexdigest()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


# ---- small data sets in the exact layouts

def noise(seed, h=20, w=30): return np.random.default_rng(seed).integers(0, 255, (h, w), dtype=np.uint8)
def save(path, array, **kw): path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(array).save(path, **kw)
def box(x=3, y=2, w=6, h=4, shape=(20, 30)): a = np.zeros(shape, bool); a[y:y + h, x:x + w] = True; return a


def make_busi(src):
    "The official folder and its table."
    top, rows = src / "Dataset_BUSI_with_GT", []
    for k, (label, number, modes) in enumerate([("benign", 1, ["1", "RGBA", "1"]), ("benign", 2, ["1"]), ("malignant", 1, ["RGB"]), ("normal", 1, ["RGB"])]):
        name = f"{label} ({number})"; save(top / label / f"{name}.png", np.stack([noise(k)] * 3, -1))
        files = [f"{name}_mask{f'_{i}' if i else ''}.png" for i in range(len(modes))]
        for i, (f, mode) in enumerate(zip(files, modes)): Image.fromarray(box(y=2 + 5 * i) & (label != "normal")).convert(mode).save(top / label / f)
        rows.append(dict(id=f"{label}-{number}", image=f"images/{label}-{number}.png", mask="" if label == "normal" else f"masks/{label}-{number}.png", label=label, group=f"{label}-{number}", split="train",
            sha256=digest((top / label / f"{name}.png").read_bytes()), width=30, height=20, source=f"{label}/{name}.png", source_masks=";".join(files), source_masks_sha256=";".join(digest((top / label / f).read_bytes()) for f in files)))
    return partial(import_busi, table=Manifest(pd.DataFrame(rows), "busi"))


def region(points, kind="freehand"): return {"points": [{"x": x, "y": y} for x, y in points], "annotation": {}, "regionType": kind}
SQUARE, OTHER, ARROW = region([(3, 2), (9, 2), (9, 8), (3, 8)]), region([(15, 10), (20, 10), (20, 15), (15, 15)]), region([(1, 1), (25, 18)], "arrow")
def case_xml(number, marks, **facts): # as published: one line, no declaration
    facts = dict.fromkeys("age sex composition echogenicity margins calcifications tirads reportbacaf reporteco".split(), "") | facts
    return "".join([f"<case><number>{number}</number>", *(f"<{k}>{v}</{k}>" for k, v in facts.items()), *(f"<mark><image>{k}</image><svg>{s}</svg></mark>" for k, s in marks), "</case>"])


def make_ddti(src):
    "Every trap: cut strings, empty ones, arrows, several regions, several marks, copies across cases, all categories and none."
    src.mkdir(parents=True, exist_ok=True)
    whole = json.dumps([SQUARE, OTHER])
    late = whole[:whole.rindex('"annotation"') + 20] # all points of the second region are there
    early = whole[:whole.rindex('{"x": 15, "y": 15}') + 9] # cut within its last point
    for n, marks, facts in [
        (1, [(1, json.dumps([SQUARE])), (2, json.dumps([SQUARE, OTHER]))], {}), (2, [(1, json.dumps([SQUARE, ARROW]))], dict(tirads="2", age="40", sex="F", composition="solid")), (3, [(1, late)], dict(tirads="4a")), (4, [(1, early)], dict(tirads="5")),
        (5, [(1, json.dumps([OTHER])), (2, ""), (3, json.dumps([SQUARE]))], dict(tirads="4b", margins="ill- defined")), (6, [(2, json.dumps([SQUARE]))], dict(tirads="3")), (7, [(1, json.dumps([region([(-5, 5), (12, -9), (40, 30)])]))], dict(tirads="4c"))]:
        (src / f"{n}.xml").write_text(case_xml(n, marks, **facts))
        for k, _ in marks: save(src / f"{n}_{k}.jpg", np.stack([noise(5 if (n, k) in ((1, 1), (6, 2)) else 10 * n + k)] * 3, -1)) # 1_1 = 6_2
    return partial(import_ddti, table=None)


def make_tn3k(src):
    for part, n in (("trainval", 11), ("test", 4)):
        for k in range(n):
            save(src / f"tn3k/{part}-image/{k:04d}.jpg", noise(100 * (part == "test") + k)); save(src / f"tn3k/{part}-mask/{k:04d}.jpg", box().astype(np.uint8) * 255, quality=60)
        (src / f"tn3k/label4{part}.csv").write_text("".join(f"{k:04d}.jpg,{k % 2}\n" for k in range(n)))
    return IMPORTERS["tn3k"]


def make_prostate(src):
    top = src / "Micro_Ultrasound_Prostate_Segmentation_Dataset"
    for part, n, others in (("train", 5, ["non_expert"]), ("test", 2, ["master_student", "medical_student", "clinician"])):
        for k in range(1, n + 1):
            gland = np.zeros((30, 20, 9), np.uint8); gland[5:15, 4:12, 3:6] = 1
            def put(name, v): p = top / part / name; p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(gzip.compress(nifti(v, (.05, .05, 1.))))
            put(f"micro_ultrasound_scans/microUS_{part}_{k:02d}.nii.gz", np.random.default_rng(k).integers(0, 255, gland.shape).astype(np.uint8) + (part == "test"))
            put(f"expert_annotations/expert_annotation_{part}_{k:02d}.nii.gz", gland)
            for who in others: put(f"{who}_annotations/{who.replace('_', '')}_annotation_{part}_{k:02d}.nii.gz", np.roll(gland, 2, 0))
    return IMPORTERS["prostate"]


def make_busbra(src):
    src = src / "BUSBRA"; rows, ids = [], [f"bus_{c:04d}-{s}" for c in range(1, 13) for s in ("l", "r", "s")[:1 + c % 3]]
    for k, i in enumerate(ids):
        save(src / f"Images/{i}.png", noise(k)); save(src / f"Masks/mask_{i[4:]}.png", box())
        rows.append(f'{i},{int(i[4:8])},fibroadenoma,{("benign", "malignant")[int(i[4:8]) % 2]},4,GE Logiq 7 @10-14MHz,30,20,left,"[3,2,6,4]"')
    (src / "bus_data.csv").write_text("\n".join(["ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX", *rows]))
    for n in (5, 10): (src / f"{n}-fold-cv.csv").write_text("\n".join(["ID,Pathology,kFold," + ",".join(f"valid_{j}" for j in range(1, n + 1)), *(f"{i}.png,benign,{int(i[4:8]) % n + 1}," + ",".join(["1.0"] * n) for i in ids)]))
    return IMPORTERS["busbra"]


def ellipse(shape=(54, 80), at=(40, 27), axes=(25, 18), width=1, gap=None):
    im = Image.new("L", shape[::-1]); ImageDraw.Draw(im).ellipse([at[0] - axes[0], at[1] - axes[1], at[0] + axes[0], at[1] + axes[1]], outline=255, width=width)
    a = np.array(im)
    if gap: a[gap] = 0
    return a


def make_hc18(src):
    names = ["000_HC", "001_HC", "010_HC", "010_2HC", "010_3HC", "011_HC"]
    for k, n in enumerate(names): save(src / f"training_set/{n}.png", noise(k, 54, 80)); save(src / f"training_set/{n}_Annotation.png", ellipse())
    save(src / "test_set/000_HC.png", noise(99, 54, 80))
    (src / "training_set_pixel_size_and_HC.csv").write_text("\n".join(["filename,pixel size(mm),head circumference (mm)", *(f"{n}.png,0.0691358041432,{44 + k}.3" for k, n in enumerate(names))]))
    return IMPORTERS["hc18"]


def make_ln(src, name="ln-int"):
    for k in range(10): save(src / f"all/images/node {k}.png", noise(k)); save(src / f"all/masks/node {k}.png", box())
    for task in ("classification", "segmentation"):
        for centre in ("LN-INT", "LN-EXT"):
            d = src / task / centre; d.mkdir(parents=True)
            for part, ks in (("train", range(0, 5)), ("val", range(5, 7)), ("test", range(7, 10))): (d / f"{part}.txt").write_text("".join(f"node {9 - k if task == 'segmentation' else k}.png\n" for k in ks))
    for centre in ("LN-INT", "LN-EXT"): (src / f"classification/{centre}/labels.csv").write_text("".join(f"node {k}.png,{k % 2}\n" for k in range(10)))
    return IMPORTERS[name]


MAKE = {"busi": make_busi, "ddti": make_ddti, "tn3k": make_tn3k, "prostate": make_prostate, "busbra": make_busbra, "hc18": make_hc18, "ln-int": make_ln, "ln-ext": partial(make_ln, name="ln-ext")}


@pytest.fixture
def made(tmp_path):
    def f(name): bring = MAKE[name](tmp_path / "src"); return tmp_path / "src", lambda src=tmp_path / "src", dest=tmp_path / "data" / name, **kw: bring(src, dest, **dict(progress=False) | kw)
    return f
def shown(m, i, what="mask"): return np.asarray(Image.open(m.root / m.df.set_index("id")[what][i])) > 0


# ---- all of them

def test_every_importer_is_tried_here(): assert set(MAKE) == set(IMPORTERS)


@pytest.mark.parametrize("name", MAKE)
def test_a_set_imports_verifies_and_is_the_same_from_every_package(made, tmp_path, monkeypatch, name):
    src, bring = made(name)
    m = bring(); first = tree(m.root); check_files(m.df, m.root)
    assert (m.df.groupby("group").split.nunique() == 1).all() and ("organ" in m.df or name == "busi")
    assert m.root == tmp_path / "data" / name and os.listdir(tmp_path / "data") == [name]
    if name != "busi":
        monkeypatch.setenv("HTLAB_DATA", str(tmp_path / "data"))
        again = Manifest.load(m.root / f"{name}.csv").verify()
        assert again.data_hash == m.data_hash and again.split_hash == m.split_hash and (m.df.mask_px.astype(int) > 0).eq(m.df["mask"].ne("")).all()
    shutil.copytree(src, tmp_path / "deep/er/src")
    for other in (tmp_path / "deep/er", archive(src, tmp_path / "a.zip"), archive(src, tmp_path / "b.zip", "packed/"), archive(src, tmp_path / "a.tar.gz")):
        shutil.rmtree(m.root); assert bring(other).data_hash == m.data_hash and tree(m.root) == first
    bring(); assert tree(m.root) == first # over the old one
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as z: z.writestr("__MACOSX/packed/._x.png", b"x"); z.writestr("packed/.DS_Store", b"x")
    assert bring(tmp_path / "b.zip").data_hash == m.data_hash
    shutil.copytree(src, tmp_path / "twice/a"); shutil.copytree(src, tmp_path / "twice/b")
    if name in ("ddti", "hc18", "ln-int", "ln-ext"): # the others' top is one level further down
        with pytest.raises(ValueError, match="there 2 times"): bring(tmp_path / "twice")
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="void: no .* in it .*give the folder that holds"): bring(tmp_path / "void")
    with pytest.raises(FileNotFoundError, match="no such folder"): bring(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="holds other files"): bring(src, src)
    assert tree(m.root) == first


def one_of_each(src, name): # a file of each folder and kind, tables all
    kinds = {}
    for p in sorted(src.rglob("*")):
        mine = "all" in p.parts or name[3:] in p.as_posix().lower() if name[:2] == "ln" else "test_set" not in p.parts
        if p.is_file() and mine: kinds.setdefault((p.parent.name + p.name * (p.suffix in (".csv", ".txt")), p.suffix, "mask" in p.name.lower()), p)
    return list(kinds.values())


@pytest.mark.parametrize("name", MAKE)
def test_whatever_file_is_lost_is_named_and_absence_can_be_allowed(made, name):
    src, bring = made(name)
    m = bring(); first = tree(m.root)
    for f in one_of_each(src, name):
        keep, old = f.read_bytes(), tree(m.root); f.unlink()
        try: got = bring()
        except (ValueError, OSError) as e:
            assert "\n" not in str(e) and (f.name in str(e) or f.stem in str(e)) and tree(m.root) == old, (f, e)
            try: fewer = bring(allow_missing=True)
            except (ValueError, OSError) as e: assert f.suffix in (".csv", ".txt") and f.name in str(e) and tree(m.root) == old, (f, e)
            else: assert 0 < len(fewer) < len(m) and set(fewer.df.id) < set(m.df.id)
        else: # what an import can do without is told
            assert len(got) == len(m) and re.fullmatch(r"label4.*.csv|labels.csv|\d+-fold-cv.csv|(nonexpert|\w+student|clinician)_annotation_.*", f.name)
            assert (f.stem if f.suffix == ".csv" else f.stem.split("_annotation")[0].replace("expert", "_expert").replace("student", "_student")) in (m.root / "problems.csv").read_text()
        f.write_bytes(keep)
    bring(); assert tree(m.root) == first and os.listdir(m.root.parent) == [name]


# ---- bad inputs

HARMS = {
    "empty": lambda b: b"", "half": lambda b: b[:len(b) // 2], "head": lambda b: b[:33], "all but 30 bytes": lambda b: b[:-30], "text": lambda b: b"Dear colleague, the images follow", "zeros": lambda b: bytes(len(b)), "huge png": lambda b: claims(30_000, 30_000),
    "other size": lambda b: _png(noise(3, 9, 9)), "gzip bomb": lambda b: BOMB, "nan volume": lambda b: nifti(np.full((30, 20, 9), np.nan, np.float32)), "huge volume": lambda b: gzip.compress(nifti(np.zeros((30, 20, 9), np.uint8), dim=[3, 30_000, 30_000, 30_000, 1, 1, 1, 1])),
    "xml bomb": lambda b: BILLION, "latin-1": lambda b: "Müller,é\n".encode("latin-1") + b, "utf-16": lambda b: "a,b\n1,2".encode("utf-16"), "ragged": lambda b: b.rstrip() + b"\nx,y,z,1,2,3,4,5,6,7,8,9,0,1,2,3,4\n", "zero byte": lambda b: b[:9] + b"\0" + b[9:], "twice": lambda b: b + b,
    "an absolute path": lambda b: b.replace(b"0000.jpg", b"/etc/passwd").replace(b"bus_0001", b"/etc/passwd").replace(b"node 1", b"/etc/passwd").replace(b"000_HC", b"/etc/passwd"),
    "a climbing path": lambda b: b.replace(b"0000.jpg", b"../../x.jpg").replace(b"bus_0001", b"../../bus_0001").replace(b"node 1", b"../../../node 1").replace(b"000_HC", b"../000_HC"), "one label": lambda b: b.replace(b",1\n", b",7\n"), "no header": lambda b: b.split(b"\n", 1)[-1],
    "other header": lambda b: b.replace(b"ID,Case", b"Id,Patient").replace(b"filename,pixel size", b"file,spacing").replace(b"kFold", b"k")}
BILLION = ('<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol">' + "".join(f'<!ENTITY lol{i} "{f"&lol{i - 1 or str()};" * 10}">' for i in range(1, 10)) + "]><case><age>&lol9;</age></case>").encode()
BOMB = gzip.compress(bytes(80 << 20))
def _png(a): Image.fromarray(a).save(out := io.BytesIO(), "png"); return out.getvalue()


def law(bring, root, harmed, before, **kw):
    "A bad input is a clear line that names the file, or is no fault; nothing is written outside; what was imported before stays until a whole set takes its place."
    data = root / "data"; old, outside = tree(data), {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and not p.is_relative_to(data)}
    try: m = bring(**kw)
    except (ValueError, OSError) as e:
        told = str(e)
        assert not isinstance(e, UnicodeError) and "\n" not in told and len(told) < 2000 and tree(data) == old, told
        assert any(w in told for w in harmed) or re.search(r"src: no .* in it", told), (harmed, told)
    else:
        check_files(m.df, m.root); assert set(m.df.id) <= set(before.df.id) or len(m) <= len(before)
        assert {p.relative_to(m.root).as_posix() for p in m.root.rglob("*.*") if p.parent != m.root} == {f for f in [*m.df.image, *m.df["mask"]] if f}
        for f in [*m.df.image, *m.df["mask"]]: f and read_image((m.root / f).read_bytes(), f)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and not p.is_relative_to(data)} == outside and set(os.listdir(data)) <= {p.name for p in data.iterdir() if p.is_dir() and not p.name.endswith(".partial")}


ANY, IMAGE, VOLUME, TEXT = ["empty", "half", "text"], ["head", "all but 30 bytes", "zeros", "huge png", "other size"], ["all but 30 bytes", "zeros", "gzip bomb", "nan volume", "huge volume"], ["latin-1", "utf-16", "ragged", "zero byte", "twice"]
FITS = {".png": ANY + IMAGE, ".jpg": ANY + IMAGE, ".gz": ANY + VOLUME, ".xml": ANY + TEXT + ["xml bomb"], ".txt": ANY + TEXT + ["an absolute path", "a climbing path"], ".csv": ANY + TEXT + ["an absolute path", "a climbing path", "one label", "no header", "other header"]}
TRIED = []


@pytest.mark.parametrize("name", MAKE)
def test_damaged_files_of_each_kind(made, tmp_path, monkeypatch, name):
    monkeypatch.setattr("htlab.source.MAX_FILE", 50 << 20) # so that a bomb of 80 MB is one
    src, bring = made(name); before = bring()
    for p in one_of_each(src, name):
        keep = p.read_bytes()
        for harm in FITS[p.suffix]:
            p.write_bytes(HARMS[harm](keep)); TRIED.append((name, p.name, harm))
            law(bring, tmp_path, [p.name, p.stem, p.name.split(".")[0], *["etc/passwd", "../"] * ("path" in harm)], before, allow_missing=len(TRIED) % 2 == 0)
        p.write_bytes(keep)


def test_that_was_enough(): assert not TRIED or len(TRIED) >= 200 or {n for n, *_ in TRIED} != set(MAKE)


@pytest.mark.parametrize("name", MAKE)
@given(data=st.data())
@settings(max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_flipped_cut_and_replaced_bytes(tmp_path_factory, name, data):
    root = tmp_path_factory.mktemp("f"); bring = MAKE[name](root / "src")
    call = lambda **kw: bring(root / "src", root / "data" / name, progress=False, **kw)
    before = call(); files = sorted(p for p in (root / "src").rglob("*") if p.is_file() and "test_set" not in p.parts)
    p = data.draw(st.sampled_from(files), label="file"); b = bytearray(p.read_bytes())
    if data.draw(st.booleans(), label="cut"): b = b[:data.draw(st.integers(0, len(b)))]
    for at, v in data.draw(st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 255)), max_size=6), label="flips"):
        if b: b[at % len(b)] = v
    if data.draw(st.integers(0, 9), label="noise") == 0: b = data.draw(st.binary(max_size=200))
    p.write_bytes(bytes(b))
    try: law(call, root, [p.name, p.stem, p.name.split(".")[0]], before, allow_missing=data.draw(st.booleans(), label="allow"))
    finally: shutil.rmtree(root)


@pytest.mark.parametrize("name", MAKE)
def test_links_out_and_folders_in_place_of_files(made, tmp_path, name):
    src, bring = made(name)
    before = bring(); old = tree(tmp_path / "data")
    p = sorted(x for x in src.rglob("*") if x.suffix in (".png", ".jpg", ".gz") and "test_set" not in x.parts and "annotations" not in x.parent.name)[0]; keep = p.read_bytes(); p.unlink()
    (tmp_path / "secret").write_bytes(keep); p.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link that leads out of the folder"): bring(allow_missing=True)
    p.unlink(); p.mkdir(); law(bring, tmp_path, [p.name, p.stem, p.name.split(".")[0]], before)
    p.rmdir(); os.mkfifo(p); law(bring, tmp_path, [p.name, p.stem, p.name.split(".")[0]], before)
    assert tree(tmp_path / "data") == old


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("at", [0, 5])
def test_a_full_disk_keeps_the_old_state(made, tmp_path, monkeypatch, name, at):
    _, bring = made(name)
    bring(); old, count, original = tree(tmp_path / "data"), [0], Path.write_bytes
    def full(*a):
        count[0] += 1
        if count[0] > at: raise OSError(errno.ENOSPC, "No space left on device")
        return original(*a)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="nothing was kept"): bring()
    monkeypatch.undo(); assert tree(tmp_path / "data") == old and os.listdir(tmp_path / "data") == [name]


# ---- BUSI

def test_busi_keeps_bytes_and_unites_masks(made, tmp_path, monkeypatch):
    src, bring = made("busi"); m = bring(); rows = m.df
    for r in rows.itertuples(): assert (m.root / r.image).read_bytes() == (src / "Dataset_BUSI_with_GT" / r.source).read_bytes()
    want = np.zeros((20, 30), bool); want[2:16, 3:9] = True; want[[6, 11]] = False
    assert (shown(m, "benign-1") == want).all() and not (m.root / "masks/normal-1.png").exists() and len(m) == 4
    rows.to_csv(tmp_path / "busi.csv", index=False); monkeypatch.setenv("HTLAB_DATA", str(tmp_path / "data"))
    assert Manifest.load("busi", folder=tmp_path).verify().data_hash == m.data_hash


@pytest.mark.parametrize("harm, kind, words", [
    (lambda t: (t / "benign/benign (2).png").unlink(), FileNotFoundError, ["1 of 4 images", "benign/benign (2).png (is missing)", "--allow-missing"]),
    (lambda t: (t / "benign/benign (1)_mask_2.png").unlink(), FileNotFoundError, ["1 of 4 images", "benign (1)_mask_2.png"]),
    (lambda t: (t / "benign/benign (2).png").write_text("text"), ValueError, ["1 file not", "benign/benign (2).png (is no image)"]),
    (lambda t: Image.new("1", (9, 9)).save(t / "benign/benign (2)_mask.png"), ValueError, ["benign (2)_mask.png (9 x 9 px instead of 30 x 20)"]),
    (lambda t: Image.new("RGB", (30, 20)).save(t / "malignant/malignant (1).png"), ValueError, ["other bytes than published"]),
    (lambda t: Image.new("RGB", (30, 20), 9).save(t / "normal/normal (1)_mask.png"), ValueError, ["normal (1)_mask.png (other bytes than published"]),
    (lambda t: shutil.rmtree(t), FileNotFoundError, ["no folder benign, malignant, normal"])])
@pytest.mark.parametrize("before", [True, False])
def test_a_failed_busi_is_one_clear_line_and_leaves_the_old_state(made, tmp_path, harm, kind, words, before):
    src, bring = made("busi")
    if before: bring()
    old = tree(tmp_path / "data"); harm(src / "Dataset_BUSI_with_GT")
    with pytest.raises(kind) as e: bring()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words) and tree(tmp_path / "data") in (old, {})
    assert not (tmp_path / "data").exists() or os.listdir(tmp_path / "data") == ["busi"] * before


def test_busi_forgives_absence_but_no_difference(made, tmp_path, monkeypatch):
    src, bring = made("busi"); top = src / "Dataset_BUSI_with_GT"
    (top / "normal/normal (1).png").unlink(); (top / "benign/benign (1)_mask_1.png").unlink()
    m = bring(allow_missing=True)
    assert list(m.df.id) == ["benign-2", "malignant-1"] and m.total == 4 and m.classes == ["benign", "malignant", "normal"]
    table = MAKE["busi"](tmp_path / "again").keywords["table"]; table.df.to_csv(tmp_path / "busi.csv", index=False); monkeypatch.setenv("HTLAB_DATA", str(tmp_path / "data"))
    again = Manifest.load("busi", folder=tmp_path)
    assert again.data_hash == m.data_hash and again.classes == m.classes and "2 of 4" in repr(again)
    (m.root / "masks/benign-2.png").unlink() # lost after the import: no silent shrinking
    with pytest.raises(ManifestError, match="'mask'.*is not in"): Manifest.load("busi", folder=tmp_path)
    (top / "benign/benign (1)_mask.png").write_bytes(b"x") # differs, in a row that is incomplete anyway
    with pytest.raises(ValueError, match=r"benign \(1\)_mask.png \(is no image; benign/benign \(1\)_mask_1.png: is missing\)"): bring(allow_missing=True)
    for f in top.rglob("*.png"): f.unlink()
    (top / "benign/other.png").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="4 of 4"): bring(allow_missing=True)


def test_a_correct_hash_does_not_excuse_a_mask_of_another_size(made, tmp_path):
    bring = make_busi(tmp_path / "src"); mask = tmp_path / "src/Dataset_BUSI_with_GT/benign/benign (2)_mask.png"; Image.new("1", (9, 9)).save(mask)
    d = bring.keywords["table"].df.copy(); d.loc[1, "source_masks_sha256"] = digest(mask.read_bytes())
    with pytest.raises(ValueError, match="9 x 9 px instead of 30 x 20"): import_busi(tmp_path / "src", tmp_path / "d", progress=False, table=Manifest(d, "busi"))


def test_busi_with_a_damaged_archive(made, tmp_path):
    src, bring = made("busi"); path = archive(src, tmp_path / "a.zip"); good = path.read_bytes()
    path.write_bytes(good[:len(good) // 2])
    with pytest.raises(ValueError, match="neither a folder nor a zip"): bring(path)
    with zipfile.ZipFile(path, "w") as z: # stored, then a byte of the first image flipped: the CRC disagrees
        for p in sorted(src.rglob("*.png")): z.write(p, p.relative_to(src).as_posix())
        at = z.infolist()[0].header_offset + 150
    raw = bytearray(path.read_bytes()); raw[at] ^= 255; path.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=r"1 file not as published: benign/benign \(1\).png"): bring(path)


def test_busi_says_what_it_did(made, capsys):
    src, bring = made("busi"); (src / "Dataset_BUSI_with_GT/benign/benign (77).png").write_bytes(b"x")
    bring(progress=True); out = capsys.readouterr().out
    assert "4 images" in out and "complete" in out and "ignored 1 file unknown to the table: benign/benign (77).png" in out


# ---- DDTI

def test_ddti_every_trap(made):
    src, bring = made("ddti"); m = bring(); d = m.df.set_index("id")
    assert list(m.df.id) == ["1_1", "1_2", "2_1", "3_1", "4_1", "5_1", "5_3", "6_2", "7_1"]
    one, two = box(3, 2, 7, 7), box(15, 10, 6, 6)
    assert (shown(m, "1_1") == one).all() and (shown(m, "1_2") == one | two).all(), "several regions are united, their outline included"
    assert (shown(m, "2_1") == one).all(), "an arrow is no nodule"
    assert (shown(m, "3_1") == one | two).all() and d.cut["3_1"] == "1", "cut after its last point: nothing is lost"
    corner = fill_polygons([[(15, 10), (20, 10), (20, 15)]], (20, 30))
    assert (shown(m, "4_1") == one | corner).all() and d.cut["4_1"] == "1" and 0 < corner.sum() < two.sum(), "cut within a point: closed after the last whole one"
    assert d.cut.eq("1").sum() == 2 and d.regions.to_dict()["1_2"] == "2"
    assert d.label.to_dict() == {"1_1": "unknown", "1_2": "unknown", "2_1": "benign", "3_1": "malignant", "4_1": "malignant", "5_1": "malignant", "5_3": "malignant", "6_2": "benign", "7_1": "malignant"}
    assert d.group["1_1"] == d.group["1_2"] == d.group["6_2"] == "case-1" and d.group["5_1"] == d.group["5_3"] == "case-5", "a case is a patient; identical images join two of them"
    assert d.loc["2_1", ["tirads", "age", "sex", "composition", "organ"]].tolist() == ["2", "40", "F", "solid", "thyroid"] and d.margins["5_1"] == "ill- defined"
    assert shown(m, "7_1").any() and (m.root / "images/2_1.jpg").read_bytes() == (src / "2_1.jpg").read_bytes()
    told = pd.read_csv(m.root / "problems.csv").astype(str)
    assert set(told.kind) == {"note"} and set(told.file) == {"3_1.jpg", "4_1.jpg", "5_2.jpg", "1_1 = 6_2"} and "no outline" in told.problem[told.file.eq("5_2.jpg")].item() and told.problem.str.contains("cut off").sum() == 2
    assert m.where(classes=["benign", "malignant"]).classes == ["benign", "malignant"]


def test_ddti_is_held_to_its_published_table(tmp_path):
    bring = make_ddti(tmp_path / "src"); src = tmp_path / "src"
    table = Manifest(bring(src, tmp_path / "d", progress=False).df.drop(columns="mask_sha256"), "ddti")
    call = lambda **kw: import_ddti(src, tmp_path / "e", progress=False, table=table, **kw)
    assert call().data_hash == table.data_hash
    def harmed(name, change, word):
        keep = (src / name).read_bytes(); (src / name).write_bytes(change(keep))
        with pytest.raises(ValueError, match=word): call(allow_missing=True)
        (src / name).write_bytes(keep)
    harmed("2.xml", lambda b: b.replace(b"<tirads>2", b"<tirads>5"), "2.xml .says tirads '5' for image 2_1 where the published one says '2'")
    harmed("1.xml", lambda b: b.replace(b'"y": 8', b'"y": 18'), "1.xml .its outline of image 1_1 covers 119 pixels where the published one covers 49")
    harmed("2_1.jpg", lambda b: (src / "3_1.jpg").read_bytes(), "2_1.jpg .other bytes than published")
    keep = (src / "6.xml").read_bytes(); (src / "6.xml").write_text(case_xml(6, [(2, "")], tirads="3")) # an outline taken away is no note
    with pytest.raises(FileNotFoundError, match="1 of 9 images missing or damaged .6_2"): call()
    (src / "6.xml").write_bytes(keep); save(src / "8_1.jpg", noise(8)); (src / "8.xml").write_text(case_xml(8, [(1, json.dumps([SQUARE]))]))
    assert len(call()) == 9, "what the table does not know is not imported"


@given(st.integers(0, 10 ** 4), st.lists(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=3, max_size=9), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_whatever_the_cut_all_complete_points_are_kept(at, polygons):
    text = json.dumps([region(p) for p in polygons] + [ARROW]); cut = text[:at % (len(text) + 1)]
    got, was_cut = read_svg(cut)
    assert was_cut == (cut != text)
    left = cut.count("}") and len(re.findall(r'\{"x": \d+, "y": \d+\}', cut)); kept = []
    for p in polygons: kept.append([tuple(map(float, q)) for q in p[:left]]); left -= len(kept[-1])
    assert got == [p for p in kept if len(p) > 2]


@pytest.mark.parametrize("xml, word", [
    (b"", "is empty"), (b"<case><mark>", "no XML, or damaged"), (b"<html></html>", "is no case of DDTI"), (BILLION, "document type or an entity"), ("<case/>".encode("utf-16")[:7], "no XML, or damaged"), (b"\xff\xd8\xff", "no XML"), (b"<case>\x00</case>", "no XML"),
    (b'<!DOCTYPE case SYSTEM "http://127.0.0.1:9/x.dtd"><case/>', "document type"), (b'<!DOCTYPE c [<!ENTITY x SYSTEM "file:///etc/passwd">]><case><age>&x;</age></case>', "document type"), (b'<!DOCTYPE c [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]><case/>', "document type"),
    (b"<case><age>&undefined;</age></case>", "no XML"), ("<case><age>é</age></case>".encode("latin-1"), "no XML"), (b'<?xml version="1.0" encoding="klingon"?><case/>', "no XML"), (b"<case>" + b"<a>" * 100_000, "no XML"), (b"<case><mark><image>../../x</image><svg>[]</svg></mark></case>", "no number"),
    (b"<case><mark><image>99999999</image></mark></case>", "no number"), (b"<case><mark></mark></case>", "no number")])
def test_hostile_xml_is_refused_by_name(xml, word):
    with pytest.raises(BadFile, match=f"^7.xml: .*{word}"): read_case(xml, "7.xml")


@pytest.mark.parametrize("svg", ["{}", "7", "null", '"text"', "[7]", "[null]", '[{"points": 7}]', '[{"points": [7]}]', '[{"points": [{"x": 1}]}]', '[{"points": [{"x": "a", "y": 1}]}]', '[{"points": [{"x": null, "y": 1}]}]', '[{"points": [{"x": NaN, "y": 1}]}]',
    '[{"points": [{"x": Infinity, "y": 1}]}]', '[{"points": [{"x": 1e999, "y": 1}]}]', '[{"points": [{"x": 1e9, "y": 1}, {"x": 2, "y": 1}, {"x": 2, "y": 3}]}]', "[" * 100_000 + "]" * 100_000, '[{"regionType": "freehand"}]', '[{"points": [{"x": ' + "9" * 5000 + ', "y": 1}]}]', '[{"points": [[1, 2], [3, 4], [5, 6]]}]'])
def test_odd_outlines_are_refused_by_name_or_hold_nothing(svg):
    try: polygons, _ = read_svg(svg, "7.xml")
    except BadFile as e: assert str(e).startswith("7.xml: ")
    else: assert polygons == []


@given(st.text(max_size=200), st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda s: st.lists(s, max_size=4) | st.dictionaries(st.sampled_from(["points", "x", "y", "regionType"]), s, max_size=4), max_leaves=20))
@settings(max_examples=100, deadline=None)
def test_any_text_is_outlines_or_a_clear_line(text, value):
    for t in (text, json.dumps(value), json.dumps([value]), '"points"' + text):
        try: assert all(len(p) > 2 and all(np.isfinite(q).all() for q in p) for p in read_svg(t, "7.xml")[0])
        except BadFile as e: assert str(e).startswith("7.xml: ")


def test_the_committed_ddti_is_what_its_card_says():
    m = Manifest.load(REPO / "data_manifests/ddti.csv", files=False); d = m.df
    assert (assign_splits(d.drop(columns="split"), (.7, .1, .2), seed=0) == d.split).all() and len(d) == 474
    assert d.tirads.value_counts().to_dict() == {"": 126, "4a": 96, "4b": 79, "4c": 67, "5": 45, "2": 42, "3": 19} and (d.label == d.tirads.map(TIRADS).fillna("unknown")).all()
    assert list(d.id[d.cut.eq("1")]) == ["54_1", "127_1", "165_1", "166_1", "176_1", "197_1", "203_1", "205_1"] and not set(d.id) & {"62_3", "120_1", "142_2", "213_2", "230_2", "389_1"}
    assert d[d.id.isin(["150_1", "233_2", "323_1", "326_1", "349_1"])].agg({"sha256": "nunique", "group": "nunique"}).tolist() == [1, 1] and d.mask_px.astype(int).min() > 0
    for c, row in m.counts().loc[m.classes, ["train", "valid", "test"]].iterrows(): assert f"| {c} | {' | '.join(map(str, row))} |" in m.card


# ---- TN3K

def test_tn3k_masks_folds_and_official_test(made):
    src, bring = made("tn3k"); m = bring(); d = m.df.set_index("id")
    assert len(m) == 15 and (d.split.eq("test") == d.index.str.startswith("test-")).all() and {"train", "valid", "test"} == set(d.split)
    assert (shown(m, "trainval-0003") == box()).all() and len(np.unique(Image.open(src / "tn3k/trainval-mask/0003.jpg"))) > 2, "JPEG has fringes"
    assert [d.fold5[f"trainval-{k:04d}"] for k in range(11)] == list("12345123451") and set(d.fold5[d.split.eq("test")]) == {""} and d.label["test-0001"] == "malignant"
    p = m.protocol("column=fold5:2").df.set_index("id"); assert set(p.index[p.split.eq("valid")]) == {"trainval-0001", "trainval-0006"} and set(p.index[p.split.eq("test")]) == {f"test-{k:04d}" for k in range(4)}
    (src / "tn3k/label4test.csv").unlink(); assert set(bring().df.set_index("id").label[lambda s: s.index.str.startswith("test")]) == {"unknown"}
    for text, word in [("0000.jpg,0\n0000.jpg,1\n", "line 2 names '0000.jpg' again"), ("0000.jpg,2\n", "line 1 gives '0000.jpg' the label '2'"), ("0000.jpg\n", "line 1 has 1 fields"), ("0000.jpg,0\n../../etc/passwd,0\n", "passwd.jpg .is missing, but named in label4test.csv")]:
        (src / "tn3k/label4test.csv").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=word): bring()


def test_a_grey_mask_falls_on_the_nearer_side():
    a = np.tile(np.arange(256, dtype=np.uint8), (2, 1))
    assert (read_mask(_png(a)) == (a > 127)).all() and (read_mask(_png((a > 99).astype(np.uint8))) == (a > 99)).all() and not read_mask(_png(a * 0)).any()
    assert (read_mask(_png(np.stack([a, a, a, a * 0], -1))) == (a > 127)).all(), "an alpha channel says nothing"


# ---- prostate

def test_prostate_slices_patients_annotators_and_spacing(made):
    src, bring = made("prostate"); m = bring(); d = m.df.set_index("id")
    assert sorted(i for i in d.index if i.startswith("train-03")) == [f"train-03-{z:03d}" for z in range(1, 8)], "gland on 3 to 5, and two slices on either side"
    assert (d.label.eq("gland") == d["mask"].ne("")).all() and d.label.value_counts().to_dict() == {"none": 28, "gland": 21} and d.group.nunique() == 7
    assert (d.split.eq("test") == d.official.eq("test")).all() and set(d.split) == {"train", "valid", "test"} and (d.spacing_mm == .05).all()
    import nibabel as nib
    v = nib.Nifti1Image.from_bytes(gzip.decompress((src / "Micro_Ultrasound_Prostate_Segmentation_Dataset/train/micro_ultrasound_scans/microUS_train_03.nii.gz").read_bytes())).get_fdata()
    assert (np.asarray(Image.open(m.root / d.image["train-03-004"])) == v[:, :, 4].T).all() and (shown(m, "train-03-004") == box(5, 4, 10, 8)).all(), "x to the right, y down"
    assert float(d.dice_non_expert["train-03-004"]) == .8 and d.dice_clinician["train-03-004"] == "" and float(d.dice_clinician["test-01-003"]) == .8 and float(d.dice_non_expert["train-03-001"]) == 1
    assert len(bring(margin=0)) == 21 and len(bring(margin=-1)) == 63


def test_prostate_volumes_that_do_not_fit(made):
    src, bring = made("prostate"); top = src / "Micro_Ultrasound_Prostate_Segmentation_Dataset/train"; scan, expert = top / "micro_ultrasound_scans/microUS_train_02.nii.gz", top / "expert_annotations/expert_annotation_train_02.nii.gz"
    keep = {p: p.read_bytes() for p in (scan, expert)}
    for p, v, zooms, word in [(scan, np.zeros((30, 20, 4), np.uint8), (1, 1, 1), "microUS_train_02.nii.gz .is 30 x 20 x 4 voxels, its outlines 30 x 20 x 9"), (scan, np.full((30, 20, 9), np.nan, np.float32), (1, 1, 1), "NaN"), (expert, np.zeros((3, 2, 4), np.uint8), (1, 1, 1), "another shape than the expert's")]:
        p.write_bytes(gzip.compress(nifti(v, zooms)))
        with pytest.raises(FileNotFoundError, match=word): bring()
        fewer = bring(allow_missing=True); assert not fewer.df.group.eq("train-02").any() and fewer.df.group.nunique() == 6
        p.write_bytes(keep[p])
    expert.write_bytes(gzip.compress(nifti(np.zeros((30, 20, 9), np.uint8)))); m = bring()
    assert not m.df.group.eq("train-02").any() and "no gland" in (m.root / "problems.csv").read_text(); expert.write_bytes(keep[expert])
    v = np.random.default_rng(0).normal(size=(30, 20, 9)).astype(np.float32); scan.write_bytes(gzip.compress(nifti(v, (.05, .1, 1)))); m = bring()
    assert m.df.spacing_mm[m.df.group.eq("train-02")].isna().all() and "no pixel size: its header says 0.05 x 0.1 mm" in (m.root / "problems.csv").read_text()
    a = np.asarray(Image.open(m.root / "images/train-02-004.png")); assert (a == ((v - v.min()) * (255 / np.ptp(v)) + .5).astype(np.uint8)[:, :, 4].T).mean() > .99, "grey values belong to the volume, not to the slice"


# ---- BUS-BRA, HC18, LN

def test_busbra_patients_and_folds(made):
    src, bring = made("busbra"); m = bring(); d = m.df.set_index("id")
    assert len(m) == 24 and d.group.nunique() == 12 and d.group["bus_0002-l"] == d.group["bus_0002-s"] == "case-2" and (d.groupby("group").fold5.nunique() == 1).all() and set(d.fold10) == set(map(str, range(1, 11)))
    assert d.loc["bus_0001-l", ["label", "birads", "device", "side", "histology", "bbox", "organ"]].tolist() == ["malignant", "4", "GE Logiq 7 @10-14MHz", "left", "fibroadenoma", "[3,2,6,4]", "breast"] and (shown(m, "bus_0001-l") == box()).all()
    p = m.protocol("column=fold5:2").df; assert set(p.group[p.split.eq("test")]) == {"case-1", "case-6", "case-11"}
    (src / "BUSBRA/10-fold-cv.csv").unlink(); m = bring(); assert "fold10" not in m.df and "no column fold10" in (m.root / "problems.csv").read_text()
    table = src / "BUSBRA/bus_data.csv"; text = table.read_text()
    for change, word in [(lambda t: t.replace("ID,Case", "ID,Patient"), "bus_data.csv: has no column 'Case' .columns: ID, Patient"), (lambda t: t.replace("bus_0003-l,3", "bus_0003-l,"), "'bus_0003-l' has no Case"), (lambda t: t + "\n" + t.split("\n")[1], "gives 'bus_0001-[lr]' again"),
                         (lambda t: t + '\n../../x,1,f,benign,4,G,1,1,left,"[]"', "5-fold-cv.csv: has no fold for '../../x'"), (lambda t: t + "\n1,2,3", "line 26 has 3 fields")]:
        table.write_text(change(text))
        with pytest.raises(ValueError, match=word): bring(allow_missing=True)
    table.write_text(text.replace("malignant", "?")); assert set(bring().df.label) == {"benign", "unknown"}


def test_hc18_outlines_examinations_and_pixel_size(made):
    src, bring = made("hc18"); m = bring(); d = m.df.set_index("id")
    im = Image.new("1", (80, 54)); ImageDraw.Draw(im).ellipse([15, 9, 65, 45], fill=1)
    assert (shown(m, "000_HC") == np.asarray(im)).all() and d.group["010_HC"] == d.group["010_2HC"] == d.group["010_3HC"] != d.group["011_HC"]
    assert d.spacing_mm["000_HC"] == pytest.approx(.0691358041432) and d.hc_mm["001_HC"] == "45.3" and len(m) == 6
    (src / "training_set_pixel_size_and_HC.csv").rename(src / "training_set/training_set_pixel_size_and_HC.csv"); assert len(bring()) == 6
    t = src / "training_set/training_set_pixel_size_and_HC.csv"; t.write_text(t.read_text().replace("001_HC.png,0.0691358041432", "001_HC.png,nan")); assert bring().df.set_index("id").spacing_mm.isna().to_dict()["001_HC"]
    t.unlink()
    with pytest.raises(FileNotFoundError, match="no training_set_pixel_size_and_HC.csv"): bring()


@pytest.mark.parametrize("at, axes, gap", [((40, 27), (25, 18), None), ((40, 27), (25, 18), np.s_[7:12, 38:42]), ((40, 10), (25, 18), None), ((70, 27), (25, 18), None), ((40, 50), (30, 20), None), ((40, 27), (60, 20), None), ((40, 27), (38, 25), None)])
@pytest.mark.parametrize("width", [1, 3])
def test_outlines_closed_with_a_gap_or_leaving_the_picture_are_filled(at, axes, gap, width):
    im = Image.new("1", (80, 54)); ImageDraw.Draw(im).ellipse([at[0] - axes[0], at[1] - axes[1], at[0] + axes[0], at[1] + axes[1]], fill=1); want = np.asarray(im)
    got = fill_outline(ellipse(at=at, axes=axes, gap=gap, width=width) > 0)
    assert 2 * (got & want).sum() / (got.sum() + want.sum()) > .98


@pytest.mark.parametrize("outline", [np.zeros((54, 80), bool), np.eye(54, 80, dtype=bool), ellipse(gap=np.s_[:27]) > 0, ellipse(gap=np.s_[:, 50:]) > 0, box(3, 3, 1, 1, (54, 80)), box(3, 3, 1, 20, (54, 80)), (ellipse() > 0) & (np.arange(80) < 40)])
def test_an_open_outline_is_refused(outline):
    with pytest.raises(BadFile, match="^a.png: (shows no outline|its outline is open)"): fill_outline(outline, "a.png")


def test_ln_lists_labels_and_names(made):
    src, bring = made("ln-int"); m = bring(); d = m.df.set_index("id")
    assert list(d.index) == [f"node-{k}" for k in range(10)] and d.split.value_counts().to_dict() == {"train": 5, "test": 3, "valid": 2} and d.label["node-1"] == "malignant" and d.split["node-0"] == "train" and d.split_segmentation["node-0"] == "test"
    other = bring(lists="segmentation").df.set_index("id"); assert other.split["node-0"] == "test" and other.split_classification["node-0"] == "train"
    with pytest.raises(ValueError, match="lists='x'"): bring(lists="x")
    lists = src / "classification/LN-INT"
    for file, text, word in [("val.txt", "node 0.png\n", "val.txt: line 1 names 'node 0', which is in a list of classification already"), ("val.txt", "node 5.png\n../../../etc/passwd\n", "passwd.png .is missing, but named in classification/LN-INT/val.txt, line 2"), ("val.txt", "node 5.png\n\x01.png\n", "cannot be a file name|is missing"), ("labels.csv", "node 1.png,benign\n", "labels.csv: line 1 gives")]:
        keep = (lists / file).read_text(); (lists / file).write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=word): bring()
        (lists / file).write_text(keep)
    save(src / "all/images/node_0!.png", noise(50)); save(src / "all/images/node-0.png", noise(51)); save(src / "all/masks/node-0.png", box())
    (lists / "val.txt").write_text("node-0.png\nnode 5.png\nnode 6.png\n")
    with pytest.raises(ValueError, match=r"twice \(all/images/node 0.png, all/images/node-0.png\)"): bring()
    shutil.move(src / "classification/LN-INT", src / "classification/other")
    with pytest.raises(FileNotFoundError, match=r"0 folders of ln-int in classification/ \(there: LN-EXT, other\)"): bring()


def test_importers_need_no_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, htlab.importers; assert not {'torch', 'nibabel', 'scipy', 'defusedxml'} & set(sys.modules)"], cwd=REPO).returncode == 0
