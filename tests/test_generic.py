"Laws of importing one's own data: every layout comes back as drawn, no patient's name gets out, a bad file is one clear line and leaves nothing behind."
import base64, contextlib, gzip, io, json, os, re, shutil, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from PIL import Image

from htlab.generic import OWN, decode_rle, detect_kind, import_own, own_options, read_json, read_lesion
from htlab.importers import fill_polygons
from htlab.manifest import Manifest, check_files
from htlab.source import BadFile, read_image
from test_dicom import CLEAN, H, PERSON, W, dicom, noise, region, traces

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
SOME = dict(deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def box(x=3, y=2, w=6, h=4): a = np.zeros((H, W), bool); a[y:y + h, x:x + w] = True; return a
def png(a): Image.fromarray(a).save(out := io.BytesIO(), "png"); return out.getvalue()
def put(path, a): path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(a if isinstance(a, bytes) else a.encode() if isinstance(a, str) else png(a)); return path
def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} if folder.exists() else None
def drawn(m, i): return np.asarray(Image.open(m.root / m.df.set_index("id")["mask"][i])) > 0
def pixels(m, i): return np.asarray(Image.open(m.root / m.df.set_index("id").image[i]))
def at(m, column): return m.df.set_index("id")[column].to_dict()
def problems(m): return (m.root / "problems.csv").read_text()


def nifti(v, zooms=(.1, .1, 1)):
    import nibabel as nib
    image = nib.Nifti1Image(v, np.eye(4)); image.header.set_zooms((*zooms, 1)[:v.ndim]); return image.to_bytes()


def make_folder(src):
    for k, c in enumerate(["benign", "benign", "malignant", "malignant"]):
        put(src / f"images/{c}/p{k} a.png", noise(k)); k == 3 or put(src / f"masks/{c}/p{k} a_mask.png", box(k + 1).astype("uint8") * 255)
    put(src / "masks/benign/p0 a_mask_2.png", box(20, 10))

def make_csv(src):
    for k in range(4): put(src / f"pics/{k}.png", noise(10 + k)); put(src / f"lesions/{k}.png", box(k + 2))
    put(src / "table.csv", "file,mask,diagnosis,patient_id,split,Age\n" + "".join(f"pics/{k}.png,lesions/{k}.png,{'ab'[k % 2]},p{k},{['train', 'val', 'test', 'train'][k]},{50 + k}\n" for k in range(4)))

def make_dicom(src):
    for k in range(3): put(src / f"st/IM{k}", dicom(noise(20 + k), **CLEAN | dict(PatientID=f"HTL-77{k // 2}"), SequenceOfUltrasoundRegions=[region()])); put(src / f"st/IM{k}.png", box(k + 3))
    put(src / "loop.dcm", dicom(np.stack([noise(30 + k) for k in range(6)]), **CLEAN))

def make_nifti(src):
    for k in range(3):
        v = np.stack([noise(40 + 10 * k + z) for z in range(7)], -1); m = np.zeros_like(v); m[4:9, 5:11 + k, 2:4] = 2
        put(src / f"imagesTr/case_{k}_0000.nii.gz", gzip.compress(nifti(v))); put(src / f"labelsTr/case_{k}.nii.gz", gzip.compress(nifti(m)))

RECT = [3, 2, 8, 2, 8, 5, 3, 5] # corners of box(), whose last pixels are 8 and 5
def coco(**change):
    runs = [H * 3 + 2, 4] + [H - 4, 4] * 5; runs.append(H * W - sum(runs))
    return {"images": [dict(id=k, file_name=f"{k}.png", width=W, height=H) for k in range(4)], "categories": [dict(id=1, name="cyst"), dict(id=7, name="mass")],
            "annotations": [dict(id=1, image_id=0, category_id=1, segmentation=[RECT], area=24, iscrowd=0), dict(id=2, image_id=1, category_id=7, segmentation=dict(size=[H, W], counts=runs), iscrowd=1),
                            dict(id=3, image_id=2, category_id=7, segmentation=[RECT, [20, 10, 25, 10, 25, 14, 20, 14]]), dict(id=4, image_id=2, category_id=1, segmentation=[[0, 0, 2, 0, 2, 2]])]} | change
def make_coco(src):
    for k in range(4): put(src / f"photos/{k}.png", noise(70 + k))
    put(src / "annotations.json", json.dumps(coco()))

def labelme(k=0, path="IMG", data=None, shapes=None, **change):
    square = dict(label="cyst", shape_type="polygon", points=[[x, y] for x, y in zip(RECT[::2], RECT[1::2])])
    return json.dumps(dict(version="5", flags={}, shapes=[square] if shapes is None else shapes, imagePath=f"{k}.png" if path == "IMG" else path, imageData=data, imageHeight=H, imageWidth=W) | change)
def make_labelme(src):
    for k in range(3): put(src / f"{k}.json", labelme(k))
    for k in range(2): put(src / f"{k}.png", noise(80 + k))
    put(src / "2.json", labelme(2, data=base64.b64encode(png(noise(82))).decode(), shapes=[dict(label="mass", shape_type="rectangle", points=[[8, 5], [3, 2]]), dict(label="cyst", shape_type="circle", points=[[20, 10], [23, 10]]), dict(label="x", shape_type="point", points=[[1, 1]])]))

MAKE = {"folder": make_folder, "csv": make_csv, "dicom": make_dicom, "nifti": make_nifti, "coco": make_coco, "labelme": make_labelme}


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("HTLAB_DATA", str(tmp_path / "data"))
    def f(kind=""): kind and MAKE[kind](tmp_path / "src"); return tmp_path / "src", lambda src=tmp_path / "src", kind=kind, **kw: import_own("mine", src, kind, **dict(progress=False) | kw)
    return f


# ---- all kinds

@pytest.mark.parametrize("kind", OWN)
def test_a_collection_is_recognised_imports_and_is_the_same_from_every_package(made, tmp_path, capsys, kind):
    assert set(MAKE) == set(OWN)
    src, bring = made(kind)
    assert detect_kind(src) == kind
    m = bring(kind="", progress=True); first = tree(m.root)
    assert f"mine: taken as {kind}" in capsys.readouterr().out and m.root == tmp_path / "data/mine" and os.listdir(tmp_path / "data") == ["mine"]
    assert Manifest.load("mine").verify().data_hash == m.data_hash and (m.df.groupby("group").split.nunique() == 1).all() and m.df.source.ne("").all()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: [z.write(p, "packed/" + p.relative_to(src).as_posix()) for p in sorted(src.rglob("*")) if p.is_file()]
    again = bring(tmp_path / "a.zip")
    assert sorted(m.df.sha256) == sorted(again.df.sha256) and sorted(m.df["mask_sha256"]) == sorted(again.df["mask_sha256"]) and sorted(m.df.label) == sorted(again.df.label)
    bring(); assert tree(m.root) == first
    with pytest.raises(ValueError, match=f"unknown option 'colour' of {kind}; it has .*="): bring(colour=1)
    (tmp_path / "void").mkdir()
    for k in ("", kind):
        with pytest.raises((FileNotFoundError, ValueError), match="void: "): bring(tmp_path / "void", kind=k)
    with pytest.raises(FileNotFoundError, match="no such folder"): bring(tmp_path / "nowhere")
    assert tree(m.root) == first


def test_names_kinds_and_options_are_checked_first(made, tmp_path):
    src, bring = made("folder")
    for name, word in [("../up", "cannot be the name"), ("a/b", "cannot be"), ("", "cannot be"), ("x.csv", "cannot be"), ("busi", "is the name of a known data set"), ("phantom", "known data set")]:
        with pytest.raises(ValueError, match=word): import_own(name, src, progress=False)
    for kw, word in [(dict(kind="video"), "there are folder, csv"), (dict(group="("), "no regular expression"), (dict(group="p1"), "no part in parentheses"), (dict(group="(z)"), "finds no patient"), (dict(positive="x"), "whole numbers"),
                     (dict(kind="nifti", every="0"), "every=0"), (dict(kind="nifti", axis=3), "axis=3"), (dict(kind="nifti", margin="few"), "margin='few': give a whole number"), (dict(kind="coco", boxes="maybe"), "give 1 or 0"), (dict(kind="dicom", frames="last"), "first, middle, all")]:
        with pytest.raises(ValueError, match=word) as e: bring(**dict(kind="folder") | kw)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "data").exists() and own_options("nifti")["every"] == 1
    put(src / "a.nii", b""); put(src / "b.dcm", b"")
    with pytest.raises(ValueError, match="looks like dicom and nifti; say which with kind=KIND .*: folder, csv, dicom"): bring(kind="")


# ---- folder

@pytest.mark.parametrize("image, mask", [
    ("images/{}.png", "masks/{}.png"), ("images/{}.png", "masks/{}_mask.png"), ("Images/img_{}.png", "Masks/mask_{}.png"), ("{}.png", "{}_mask.png"), ("{}.png", "{}_seg.png"), ("{} a.png", "{} a-GT.png"), ("{}_image.png", "{}_label.png"), ("all/image/{}.png", "all/ground truth/{}.png"),
    ("{}/image.png", "{}/mask.png"), ("imagesTr/{}.png", "labelsTr/{}.png"), ("benign/{}.png", "masks/{}.png"), ("images/{}.bmp", "masks/{}.png"), ("train_images/{}.png", "train_masks/{}.png"), ("images/label {}.png", "masks/label {}.png")])
def test_usual_layouts_find_their_masks(made, tmp_path, image, mask):
    src, bring = made()
    for k in range(3): Image.fromarray(noise(k)).save(put(src / image.format(f"p{k}"), b"")); put(src / mask.format(f"p{k}"), box(k + 1).astype("uint8") * 255)
    m = bring()
    got = {r.source: r.id for r in m.df.itertuples()}
    for k in range(3): assert (drawn(m, got[image.format(f"p{k}")]) == box(k + 1)).all() and (pixels(m, got[image.format(f"p{k}")]) == noise(k)).all()
    assert len(m) == 3


def test_folders_give_labels_patients_and_splits(made):
    src, bring = made("folder")
    m = bring(group=r"/(p\d+) ")
    assert at(m, "label") == {"benign-p0-a": "benign", "benign-p1-a": "benign", "malignant-p2-a": "malignant", "malignant-p3-a": "malignant"} and set(m.df.group) == {"p0", "p1", "p2", "p3"}
    assert (drawn(m, "benign-p0-a") == box(1) | box(20, 10)).all() and m.df.set_index("id")["mask"]["malignant-p3-a"] == "" and "1 image of 4 without a mask" in problems(m) and "benign 2, malignant 2" in problems(m)
    assert set(bring(label="lesion").df.label) == {"lesion"} and "each is its own group" in problems(bring())
    shutil.rmtree(src)
    for k, s in enumerate(["train", "val", "test", "Training"]): put(src / s / "images" / f"{k}.png", noise(k)); put(src / s / "masks" / f"{k}.png", box(k))
    assert at(bring(), "split") == {"train-0": "train", "val-1": "valid", "test-2": "test", "Training-3": "train"} and set(bring().df.label) == {"unknown"}


def test_ids_are_valid_different_and_do_not_depend_on_company(made):
    src, bring = made()
    names = ["a b.png", "a-b.png", "ä.png", "ö.png", "A-B.jpg", "-.png", "x" * 120 + ".png", "x" * 121 + ".png", "deep/er/a b.png"]
    for k, n in enumerate(names): Image.fromarray(noise(k)).save(put(src / n, b""))
    m = bring(label="x")
    assert sorted(m.df.source) == sorted(names) and m.df.id.str.lower().is_unique and m.df.id.str.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}").all()
    old = {r.source: r.id for r in m.df.itertuples()}; (src / "ö.png").unlink()
    assert all(old[r.source] == r.id for r in bring(label="x").df.itertuples() if r.source != "ä.png")


def test_what_counts_as_lesion():
    v = np.zeros((H, W), np.uint8); v[2:6, 3:9] = 1; v[10:12, 3:9] = 2
    assert (read_lesion(png(v)) == (v > 0)).all() and (read_lesion(png(v), values=[2]) == (v == 2)).all() and (read_lesion(png(v.astype(np.uint16)), values=[1]) == (v == 1)).all() and (read_lesion(png(v.astype(np.uint16))) == (v > 0)).all()
    assert (read_lesion(png(box())) == box()).all() and not read_lesion(png(v * 0)).any() and (read_lesion(png(box().astype(np.uint16) * 65535)) == box()).all()
    red = np.zeros((H, W, 3), np.uint8); red[..., 0] = box() * 255
    assert (read_lesion(png(red)) == box()).all(), "luminance of red is 76"
    p = Image.fromarray(v, "P"); p.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0]); p.save(out := io.BytesIO(), "png")
    assert (read_lesion(out.getvalue()) == (v > 0)).all() and (read_lesion(out.getvalue(), values=[2]) == (v == 2)).all()
    Image.fromarray(box().astype("uint8") * 255).resize((300, 200), 0).save(out := io.BytesIO(), "jpeg", quality=40)
    assert (read_lesion(out.getvalue()) == np.kron(box(), np.ones((10, 10), bool))).all()
    with pytest.raises(BadFile, match="looks like a picture"): read_lesion(png(noise(0)))


@pytest.mark.parametrize("harm, word", [
    (lambda s: put(s / "masks/benign/p9 a_mask.png", box()), r"p9 a_mask.png \(is a mask by its name or folder, and has no image"), (lambda s: put(s / "masks/benign/p1 a_mask.png", np.ones((5, 5), bool)), "is 5 x 5 pixels, the image 30 x 20"),
    (lambda s: put(s / "masks/benign/p0 a_mask.png", np.zeros((5, 5), bool)), "differ in size"), (lambda s: put(s / "masks/benign/p1 a_mask.png", noise(1)), "looks like a picture"), (lambda s: put(s / "images/benign/p1 a.png", b""), "p1 a.png .is empty"),
    (lambda s: put(s / "images/benign/p1 a.png", png(noise(1))[:99]), "truncated or damaged"), (lambda s: put(s / "images/benign/p1 a.jpg", noise(9)), "is the mask of which image"), (lambda s: put(s / "masks/benign/p1 a_mask.png", b"text"), "is no image"),
    (lambda s: (s / "images/benign/p9.png").symlink_to(s.parent / "secret.png"), "link that leads out"), (lambda s: [put(s / f"images/c{k}/x.png", noise(k)) for k in range(31)], "33 folders .* would become classes"), (lambda s: shutil.rmtree(s / "images"), "has no image of that name")])
def test_bad_folders_are_one_clear_line(made, tmp_path, harm, word):
    src, bring = made("folder"); put(tmp_path / "secret.png", noise(5)); harm(src)
    with pytest.raises((ValueError, OSError), match=word) as e: bring(kind="folder")
    assert "\n" not in str(e.value) and not tree(tmp_path / "data")


# ---- csv

def test_a_table_gives_everything(made):
    src, bring = made("csv"); m = bring()
    assert at(m, "label") == {f"pics-{k}": "ab"[k % 2] for k in range(4)} and at(m, "split") == dict(zip([f"pics-{k}" for k in range(4)], ["train", "valid", "test", "train"])) and at(m, "Age")["pics-2"] == "52" and at(m, "group")["pics-3"] == "p3"
    assert all((drawn(m, f"pics-{k}") == box(k + 2)).all() for k in range(4)) and len(bring(src / "table.csv")) == 4
    put(src / "table.csv", "Nr;Bild;id;caption;spacing_mm;pixels\n1;0;x;\"round, dark\";0.07;9\n2;1;y;;;8\n") # semicolons, names without folder and ending, own names; masks by layout
    os.rename(src / "lesions", src / "masks"); m = bring(kind="csv", image="Bild")
    assert at(m, "text") == {"pics-0": "round, dark", "pics-1": ""} and at(m, "spacing_mm")["pics-0"] == .07 and list(m.df.given_id) == ["x", "y"] and (drawn(m, "pics-1") == box(3)).all() and len(m) == 2 and "Nr" in m.df


@pytest.mark.parametrize("table, word", [
    ("file\n/etc/passwd\n", "line 2: '/etc/passwd' leads out"), ("file\n../secret.png\n", "leads out"), ("file\npics/../../secret.png\n", "leads out"), ("file\n~/x.png\n", "leads out"), ("file\nC:\\x.png\n", "leads out"), ("file\n..\\..\\x.png\n", "leads out"), ("file,mask\npics/0.png,../x.png\n", "leads out"),
    ("file\npics/9.png\n", "pics/9.png .is missing, but named in table.csv, line 2"), ("file,mask\npics/0.png,lesions/9.png\n", "lesions/9.png .is missing"), ("file\npics/0.png\npics/0.png\n", "line 3: names 'pics/0.png' again, which line 2 does"), ("file\npics/0.png\n0.png\n", "is which file"),
    ("file,label\n,a\n", "line 2: the column 'file' is empty"), ("file,split\npics/0.png,tuning\n", "line 2: unknown split 'tuning'"), ("name_of,label\n0,a\n", "no column of image files .*image=COLUMN"), ("file,spacing_mm\npics/0.png,-1\n", "spacing '-1'"), ("file,spacing_mm\npics/0.png,\"0,1\"\n", "spacing '0,1'"), ("file,spacing_mm\npics/0.png,nan\n", "spacing 'nan'"),
    ("file,label\npics/0.png\n", "line 2 has 1 fields"), ("file,label\npics/0.png,Ä\n".encode("latin-1"), "not UTF-8"), ("file\npics/0.png\n".encode("utf-16"), "not UTF-8"), (b"", "is empty"), ("file\npics/0\0.png\n", "zero bytes"), ("file,file\na,b\n", "twice"), ("file\ntable.csv\n", "no image"), ("file\nx.dcm\n", "import those as dicom"), ("file\n" + "x" * 300 + "\n", "is missing")])
def test_bad_tables_are_one_clear_line(made, tmp_path, table, word):
    src, bring = made("csv"); put(tmp_path / "secret.png", noise(5)); put(src / "table.csv", table); put(src / "x.dcm", b"")
    with pytest.raises((ValueError, OSError), match=word) as e: bring(kind="csv")
    assert "\n" not in str(e.value) and not tree(tmp_path / "data")


def test_named_columns_and_tables_must_exist(made, tmp_path):
    src, bring = made("csv")
    for kw, word in [(dict(group="Patient"), "no column 'Patient', which group= names"), (dict(image="x"), "which image= names"), (dict(table="other.csv"), "no other.csv in it")]:
        with pytest.raises((ValueError, OSError), match=word): bring(**kw)
    shutil.copy(src / "table.csv", src / "again.csv")
    with pytest.raises(ValueError, match="which table. again.csv, table.csv; name one with table="): bring()
    assert len(bring(table="again.csv")) == 4


# ---- DICOM

def test_the_patient_gets_into_no_file_and_no_message(made, tmp_path, capfd):
    src, bring = made(); uid = "1.2.826.0.1.3680043.8.498.12345"
    put(src / "KOWALCZYK_Zdzislawa/1948-03-17/a.dcm", dicom(noise(0), **PERSON)); put(src / "KOWALCZYK_Zdzislawa/550123.png", box()); put(src / "study/ID-550123.dcm", dicom(noise(1), **PERSON, BurnedInAnnotation="YES"))
    put(src / "study/ID-550123_mask.png", box()); put(src / f"study/{uid}", dicom(noise(2), **PERSON | dict(SOPInstanceUID=uid))); put(src / "study/Zdzislawa.dcm", dicom(noise(3), **PERSON)[:900]); put(src / "study/b.dcm", dicom(noise(4), **CLEAN | dict(PatientID="OTHER")))
    put(src / "l.csv", "file,label,patient\na,benign,Kowalczyk\nID-550123.dcm,malignant,\nb.dcm,benign,g1\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 5 images missing or damaged \(study/x-\w+.dcm") as e: bring(kind="dicom")
    m = bring(kind="dicom", allow_missing=True, progress=True, labels="l.csv"); out = capfd.readouterr()
    told = str(e.value).replace(str(tmp_path), "") + out.out + out.err + "".join(tree(m.root)) + m.df.to_csv() + repr(m)
    for p in m.root.rglob("*"):
        if p.is_file(): told += p.read_bytes().decode("latin-1") if p.suffix != ".png" else "".join(map(str, Image.open(p).info.values())) + re.sub(rb"[^\x20-\x7e]", b"", p.read_bytes()).decode()
    assert not traces(told) and uid not in told
    assert len(m) == 4 and set(m.df.group[m.df.label.eq("unknown") | m.df.source.str.contains("x-")]) == {m.df.group[0]} and m.df.group.str.match("group-[0-9a-f]{10}$|g1$").all() and m.df.group.nunique() == 2 and sorted(m.df.label) == ["benign", "benign", "malignant", "unknown"]
    assert "3 files: the header holds a patient's name" in told and "1 file: text is burned into the pixels" in told and "2 files: the header does not say whether text is burned in" in told and (m.df["mask"].ne("").sum()) == 1
    one, two = bring(kind="dicom", allow_missing=True, salt="s"), bring(kind="dicom", allow_missing=True, salt="t")
    assert set(one.df.group) & set(two.df.group) == set() and set(one.df.group) == set(bring(kind="dicom", allow_missing=True, salt="s").df.group)


@pytest.mark.parametrize("where", ["KOWALCZYK/a.dcm", "Kowalczyk^Zdzislawa.dcm", "x/Zdzis\u0142awa Kowalczyk", "id_550123_a.dcm", "1948.03.17/a.dcm", "acc4711.dcm", "old9981.ima"])
@pytest.mark.parametrize("size", [-99, None])
def test_a_name_in_a_path_is_not_repeated(made, tmp_path, where, size):
    src, bring = made(); put(src / where, dicom(noise(0), **PERSON)[:size]); put(src / "other/b.dcm", dicom(noise(1), **CLEAN)); put(src / f"{where}.txt", "report")
    if size:
        with pytest.raises(FileNotFoundError, match="1 of 2 images missing or damaged .*x-[0-9a-f]{10}.*is truncated") as e: bring(kind="dicom")
        assert not traces(str(e.value).replace(str(tmp_path), ""))
    m = bring(kind="dicom", allow_missing=True)
    assert len(m) == 2 - bool(size) and not traces(m.df.to_csv() + problems(m) + "".join(tree(m.root)))


def test_a_header_that_pydicom_warns_of_is_not_quoted(made, capfd, recwarn):
    src, bring = made(); bad = dicom(noise(0), **PERSON).replace(b"19480317", b"Kowalcz ").replace(b"1.2.3.2.", b"Zdzisla.")
    put(src / "a.dcm", bad); bring(kind="dicom", progress=True, salt="s"); out = capfd.readouterr()
    assert "Kowalcz" not in out.out + out.err and not recwarn.list


def test_patients_studies_and_nobody_make_groups(made):
    src, bring = made(); study = dict(StudyInstanceUID="1.2.3.4.5")
    for k, tags in enumerate([dict(PatientID="A1"), dict(PatientID=" A1 "), study, study, dict(PatientID="ANONYMOUS") | study, dict(PatientID="000"), dict(StudyInstanceUID="")]): put(src / f"{k}.dcm", dicom(noise(k), **CLEAN | tags))
    g = at(bring(), "group")
    assert g["0"] == g["1"] and g["2"] == g["3"] == g["4"] and len({g["0"], g["2"], g["5"], g["6"]}) == 4 and g["6"] == "6"


def test_frames_are_chosen_and_find_their_masks(made):
    src, bring = made(); loop = np.stack([noise(30 + k) for k in range(6)])
    put(src / "a.dcm", dicom(loop, **CLEAN)); put(src / "a-f0003.png", box(4)); put(src / "a.png", box(9))
    for frames, want in [("first", [0]), ("middle", [3]), ("all", range(6)), ("4", [0, 4]), (2, [0, 2, 4])]:
        m = bring(kind="dicom", frames=frames)
        assert list(m.df.id) == [f"a-f{k:04d}" for k in want] and all((pixels(m, f"a-f{k:04d}") == loop[k]).all() for k in want) and m.df.group.nunique() == 1 and list(m.df.frame) == [str(k) for k in want]
        assert {i for i in m.df.id if at(m, "mask")[i]} == {"a-f0003"} & set(m.df.id) and "is called X-f0007.png" in problems(m)
    assert (drawn(bring(kind="dicom"), "a-f0003") == box(4)).all()


def patched(old, new):
    def f(): b = dicom(noise(0), **PERSON); assert old in b; return b.replace(old, new)
    return f
def us(v): return int(v).to_bytes(2, "little")
ROWS, COLS = b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x11\x00US\x02\x00"

@pytest.mark.parametrize("data, word", [
    (lambda: b"", "is empty|no DICOM"), (lambda: b"text", "the mark DICM is missing"), (lambda: dicom(noise(0))[132:], "the mark DICM is missing"), (lambda: bytes(128) + b"DICM", "its pixels are missing"), (lambda: dicom(noise(0), **PERSON)[:-99], "is truncated: its header claims 600 bytes of pixels, 501"), (lambda: dicom(noise(0), **PERSON)[:500], "is truncated|is damaged"),
    (lambda: dicom(noise(0), Rows=65535, Columns=65535), "claims 65535 x 65535 pixels"), (lambda: dicom(noise(0), Rows=5000, Columns=5000), "truncated: its header claims 25,000,000"), (lambda: dicom(noise(0), Rows=0), "claims 30 x 0"), (lambda: dicom(noise(0), NumberOfFrames=2_000_000_000), "2000000000 frames"), (lambda: dicom(noise(0), NumberOfFrames=99), "truncated: its header claims 59,400"),
    (patched(ROWS + us(H), ROWS + us(H + 1)), "truncated: its header claims 630"), (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.70", encapsulated=[b"\xff\xd8" + bytes(90)]), "JPEG Lossless.*no decoder is installed: pip install pylibjpeg pylibjpeg-libjpeg"),
    (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.80", encapsulated=[bytes(90)]), "JPEG-LS.*pip install"), (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.102", encapsulated=[bytes(90)]), "MPEG.*cannot be decoded"), (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.1.99"), "is deflated"),
    (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.50", encapsulated=[b"\xff\xd8" + bytes(90)]), "damaged"), (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.50", encapsulated=[_jpeg(50, 60)]), "claims 30 x 20 pixels, the picture in it 60 x 50"), (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.50", encapsulated=[_jpeg(H, W)], NumberOfFrames=3), "claims 3 frames, 1 are there"),
    (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.5", encapsulated=[bytes(200)]), "damaged"), (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.90", encapsulated=[b"\xff\x4f\xff\x51" + bytes(90)]), "damaged"), (lambda: dicom(noise(0), syntax="1.2.840.10008.1.2.4.90", encapsulated=[_jpeg(H, W, "jpeg2000").replace(b"jp2h", b"jp2x").replace(b"\0\0\0-jp2x", b"\0\0\0\0jp2x")]), "a damaged JPEG 2000"), (lambda: dicom(noise(0), PhotometricInterpretation="PALETTE COLOR"), "damaged"), (lambda: dicom(noise(0), SamplesPerPixel=2, Rows=10, PlanarConfiguration=0), "damaged|holds an array"),
    (lambda: dicom(noise(0), BitsAllocated=7), "damaged"), (lambda: _without("PixelData"), "its pixels are missing"), (lambda: _without("PixelData", "Rows"), "its pixels are missing"), (lambda: _without("PixelData", "Rows", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"), "a.dcm: left out: no image"), (lambda: dicom(noise(0), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"), "a.dcm: left out: a DICOM segmentation")])
def test_bad_dicom_is_one_clear_line_without_the_patient(made, tmp_path, data, word):
    src, bring = made(); put(src / "a.dcm", data())
    with pytest.raises((ValueError, OSError), match=word) as e: bring(kind="dicom")
    assert "\n" not in str(e.value) and not traces(str(e.value).replace(str(tmp_path), "")) and not tree(tmp_path / "data") and "a.dcm" in str(e.value)


def _jpeg(h, w, kind="jpeg"): Image.fromarray(noise(0, h, w)).save(out := io.BytesIO(), kind); return out.getvalue()
def _without(*tags, **kw):
    import pydicom
    ds = pydicom.dcmread(io.BytesIO(dicom(noise(0), **PERSON)))
    for t in tags: delattr(ds, t)
    for k, v in kw.items(): setattr(ds, k, v)
    ds.save_as(out := io.BytesIO()); return out.getvalue()


@pytest.mark.parametrize("table, word", [("file,label\nIM9,a\n", "line 2: names a file that is not there"), ("file,label\nIM1,a\nst/IM1,b\n", "line 3: names a file again"), ("file\nIM1\n", "no column 'label'"), ("file,label\n/etc/passwd,a\n", "line 2: the name of the file leads out"), ("label\nx\n", "no column of image files"), (None, "no such csv")])
def test_bad_labels_are_one_clear_line(made, tmp_path, table, word):
    src, bring = made("dicom")
    for p in src.rglob("*.png"): p.unlink()
    if table: put(src / "l.csv", table)
    with pytest.raises((ValueError, OSError), match=word) as e: bring(labels="l.csv")
    assert "\n" not in str(e.value) and not tree(tmp_path / "data")


def test_labels_may_lie_beside_the_archive(made, tmp_path):
    src, bring = made("dicom"); put(tmp_path / "l.csv", "file,label,group\nIM0,a,g\nst/IM1,b,\nloop.dcm,c,\n")
    m = bring(labels=str(tmp_path / "l.csv"))
    assert at(m, "label") == {"st-IM0": "a", "st-IM1": "b", "st-IM2": "unknown", "loop-f0003": "c"} and at(m, "group")["st-IM0"] == "g" and "1 file: has no line in the table of labels" in problems(m)
    assert all((drawn(m, f"st-IM{k}") == box(k + 3)).all() for k in range(3)) and at(m, "spacing_mm")["st-IM1"] == .1


# ---- NIfTI

def test_volumes_become_slices(made):
    src, bring = made("nifti"); m = bring(margin=1, label="lesion", empty="none"); first = {f"Tr-case_0_0000-{z:03d}": z for z in (1, 2, 3, 4)}
    assert list(m.df.id[:4]) == list(first) and list(m.df.label[:4]) == ["none", "lesion", "lesion", "none"] and m.df.group.nunique() == 3 and m.df.spacing_mm.eq(.1).all()
    assert all(pixels(m, i).shape == (W, H) for i in first) and drawn(m, "Tr-case_0_0000-002").sum() == 30 and drawn(m, "Tr-case_2_0000-003")[5:13, 4:9].all() # shown transposed
    v = np.stack([noise(40 + z) for z in range(7)], -1); scaled = ((v.astype(float) - v.min()) * 255 / np.ptp(v) + .5).astype(np.uint8) if v.dtype != np.uint8 else v
    assert (pixels(m, "Tr-case_0_0000-003") == scaled[:, :, 3].T).all()
    assert len(bring()) == 3 * 6 and len(bring(margin=-1)) == 21 and list(bring(margin="-1", every="3").df.slice[:3]) == ["0", "3", "6"] and len(bring(axis=0, margin=0)) == 15 and bring(axis=0, margin=0).df.spacing_mm.isna().all()
    assert set(bring(positive=2).df.mask_sha256) == set(bring().df.mask_sha256) and set(bring(group=r"(case_\d)").df.group) == {"case_0", "case_1", "case_2"}
    with pytest.raises(FileNotFoundError, match="no image in it"): bring(positive=1) and None
    shutil.rmtree(src / "labelsTr"); m = bring()
    assert len(m) == 21 and m.df["mask"].eq("").all()


def test_volumes_beside_their_masks_and_flat_ones(made):
    src, bring = made()
    for k in range(3): put(src / f"x{k}.nii", nifti(noise(k).T.copy(), (.2, .2))); put(src / f"x{k}_seg.nii", nifti(box(k + 1).T.astype(np.uint8)))
    m = bring(axis=0)
    assert all((pixels(m, f"x{k}-000") == noise(k)).all() and (drawn(m, f"x{k}-000") == box(k + 1)).all() for k in range(3)) and m.df.spacing_mm.eq(.2).all()


@pytest.mark.parametrize("harm, word", [
    (lambda s: put(s / "imagesTr/case_0_0000.nii.gz", nifti(np.full((H, W, 7), np.nan, np.float32))), "holds 4200 values that are NaN"), (lambda s: put(s / "labelsTr/case_0.nii.gz", nifti(np.full((H, W, 7), np.inf, np.float32))), "infinite"), (lambda s: put(s / "labelsTr/case_1.nii.gz", nifti(np.ones((H, W, 6), np.uint8))), "is 7 x 30 x 20 voxels .*its mask 6 x 30 x 20"),
    (lambda s: put(s / "labelsTr/case_9.nii.gz", b"x"), "has no image of that name"), (lambda s: put(s / "imagesTr/case_0_0000.nii.gz", b"text"), "no NIfTI"), (lambda s: put(s / "labelsTr/case_0.nii.gz", b""), "no NIfTI"), (lambda s: put(s / "labelsTr/case_0_mask.nii.gz", nifti(np.ones((H, W, 7), np.uint8))), "has several masks"),
    (lambda s: put(s / "imagesTr/case_0_0000.nii.gz", nifti(np.zeros((H, W, 7, 3), np.uint8))), "two or three dimensions"), (lambda s: put(s / "imagesTr/case_0_0000.nii.gz", gzip.compress(nifti(noise(1))[:500])), "truncated"), (lambda s: put(s / "imagesTr/case_0_0000.nii.gz", gzip.compress(nifti(noise(1)))[:80]), "damaged gzip")])
def test_bad_volumes_are_one_clear_line(made, tmp_path, harm, word):
    src, bring = made("nifti"); harm(src)
    with pytest.raises((ValueError, OSError), match=word) as e: bring()
    assert "\n" not in str(e.value) and len(str(e.value)) < 900 and not tree(tmp_path / "data")


# ---- COCO and LabelMe

def test_coco_outlines_and_run_lengths(made):
    src, bring = made("coco"); m = bring()
    assert at(m, "label") == {"photos-0": "cyst", "photos-1": "mass", "photos-2": "mass", "photos-3": "unknown"} and (drawn(m, "photos-0") == box()).all() and (drawn(m, "photos-1") == box()).all()
    assert (drawn(m, "photos-2") == fill_polygons([list(zip(p[::2], p[1::2])) for p in (RECT, [20, 10, 25, 10, 25, 14, 20, 14], [0, 0, 2, 0, 2, 2])], (H, W))).all() and "1 image: outlines of several categories" in problems(m)
    assert at(bring(empty="normal", label="tumour"), "label") == dict(zip(m.df.id, ["tumour", "tumour", "tumour", "normal"]))
    d = coco(); d["annotations"].append(dict(id=9, image_id=3, category_id=1, bbox=[3, 2, 5, 3])); put(src / "annotations.json", json.dumps(d))
    assert len(bring()) == 3 and "left out: a box without outline" in problems(bring()) and (drawn(bring(boxes="1"), "photos-3") == box()).all() and len(bring(src / "annotations.json")) == 3
    os.remove(src / "annotations.json"); one = coco()
    for part, keep in (("train", [0, 1]), ("val", [2]), ("test", [3])): put(src / f"instances_{part}2017.json", json.dumps(one | dict(images=[one["images"][k] for k in keep], annotations=[a for a in one["annotations"] if a["image_id"] in keep])))
    assert at(bring(), "split") == {"photos-0": "train", "photos-1": "train", "photos-2": "valid", "photos-3": "test"}


def encoded(runs): # the text of pycocotools, written from its description
    out = ""
    for i, x in enumerate(runs):
        if i > 2: x -= runs[i - 2]
        more = True
        while more:
            c, x = x & 31, x >> 5; more = x != -1 if c & 16 else x != 0
            out += chr(c + 48 + 32 * more)
    return out


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_run_lengths_come_back(h, w, data):
    m = np.array(data.draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))).reshape(h, w)
    flat = np.r_[False, m.T.ravel()]; cuts = np.flatnonzero(flat[1:] != flat[:-1]); runs = np.diff(np.r_[0, cuts, h * w]).tolist()
    assert (decode_rle(runs, (h, w)) == m).all() and (decode_rle(encoded(runs), (h, w)) == m).all()
    with pytest.raises(BadFile): decode_rle(runs, (h, w + 1))


def test_long_and_short_run_lengths():
    m = np.zeros((20, 30), bool); m[2:6, 3:9] = True
    assert (decode_rle(encoded([62, 4] + [16, 4] * 5 + [434]), (20, 30)) == m).all() and decode_rle(encoded([10 ** 6, 5, 2 * 10 ** 6 - 5]), (1000, 3000)).sum() == 5


@given(st.one_of(st.text(max_size=40), st.lists(st.integers(-5, 10 ** 9), max_size=8), st.lists(st.one_of(st.floats(), st.text(max_size=2)), max_size=3), st.none(), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)))
@settings(max_examples=80, deadline=None)
def test_whatever_is_no_run_length_is_refused(counts):
    try: assert decode_rle(counts, (5, 7), "n").shape == (5, 7)
    except BadFile as e: assert str(e).startswith("n: ") and "\n" not in str(e)


def change(**kw): return lambda: json.dumps(coco(**kw))
def annotated(**kw): return lambda: json.dumps(coco(annotations=[dict(id=1, image_id=0, category_id=1, segmentation=[RECT]) | kw]))
IM = dict(id=0, file_name="0.png", width=W, height=H)

@pytest.mark.parametrize("data, word", [
    (lambda: b"", "is empty"), (lambda: b"{", "no JSON"), (lambda: b"[" * 200_000, "nested absurdly"), (lambda: '{"images": NaN, "annotations": []}', "holds NaN"), (lambda: "\ud800".encode("utf-8", "surrogatepass"), "no JSON"), (lambda: b"[]", "no json with images and annotations"), (lambda: b'{"images": 1, "annotations": 2}', "images are no list"), (lambda: b"\xff\xfe" + bytes(9), "no JSON"),
    (change(images=[IM, IM]), "there twice"), (change(images=[dict(file_name="0.png")]), "id 'None': missing"), (change(images=[IM | dict(id=[1])]), "missing, or"), (change(images=[IM | dict(file_name=7)]), "has no file_name"), (change(images=[IM, IM | dict(id=1)], annotations=[]), "names 'photos/0.png' again"), (change(images=[IM], annotations=[dict(image_id=5)]), "unknown image '5'"),
    (annotated(image_id=[0]), "unknown image"), (annotated(category_id=99), "unknown category '99'"), (annotated(category_id={}), "unknown category"), (change(categories=[dict(id=1), dict(id=1)]), "a category has the id '1'"), (change(categories="x"), "categories are no list"), (change(annotations=[3]), "annotations are no list"),
    *[(change(images=[IM | dict(file_name=p)], annotations=[]), "leads out") for p in ("/etc/passwd", "../secret.png", "photos/../../secret.png", "C:/x.png", "~/x", "..\\..\\x.png", "a\0.png")], (change(images=[IM | dict(file_name="9.png")], annotations=[]), "9.png .is missing, but named in annotations.json"), (change(images=[IM | dict(width=9)]), "is 30 x 20 pixels, annotations.json describes one of 9 x 20|unknown image"),
    (annotated(segmentation="x"), "neither outlines"), (annotated(segmentation=[[1, 2, 3]]), "is no list x1, y1"), (annotated(segmentation=[[1, 2, "a", 4, 5, 6]]), "no list of points"), (annotated(segmentation=[[1, 2, 1e9, 4, 5, 6]]), "within 100 000"), (lambda: json.dumps(coco()).replace("[3, 2, 8", "[1e999, 2, 8"), "within 100 000"), (annotated(segmentation=[3]), "is no list x1"),
    (annotated(segmentation=dict(size=[H, W], counts=[1, 2])), "do not make up"), (annotated(segmentation=dict(size=[H, W], counts="zz\u00e9")), "damaged"), (annotated(segmentation=dict(size=[W, H], counts=[H * W])), "a mask in annotations.json 20 x 30"), (annotated(segmentation=dict(size=[10 ** 6, 10 ** 6], counts=[10 ** 12])), "two whole numbers"), (annotated(segmentation=dict(counts=[])), "two whole numbers"), (annotated(segmentation=dict(size=[H, W])), "no list of whole")])
def test_bad_coco_is_one_clear_line(made, tmp_path, data, word):
    src, bring = made("coco"); put(tmp_path / "secret.png", noise(5)); put(src / "annotations.json", data())
    with pytest.raises((ValueError, OSError), match=word) as e: bring()
    assert "\n" not in str(e.value) and "\0" not in str(e.value) and not tree(tmp_path / "data")


def test_labelme_shapes_and_embedded_images(made):
    src, bring = made("labelme"); m = bring(); t = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    assert at(m, "label") == {"0": "cyst", "1": "cyst", "2": "cyst"} and (drawn(m, "0") == box()).all() and (pixels(m, "2") == noise(82)).all() and at(m, "source")["2"] == "2.json"
    assert (drawn(m, "2") == (box() | fill_polygons([list(zip(20 + 3 * np.cos(t), 10 + 3 * np.sin(t)))], (H, W)))).all() and abs(drawn(m, "2").sum() - 24 - 9 * np.pi) < 12 and "1 shape left out" in problems(m) and "shapes of several labels" in problems(m)
    put(src / "in/3.json", labelme(path="..\\pics\\3.png", shapes=[])); put(src / "pics/3.png", noise(83))
    assert at(bring(empty="normal"), "label")["in-3"] == "normal" and bring().df.set_index("id")["mask"]["in-3"] == ""


def shaped(**kw): return labelme(shapes=[dict(label="a", shape_type="polygon", points=[[1, 1], [5, 1], [5, 5]]) | kw])
@pytest.mark.parametrize("data, word", [
    (b"", "is empty"), (b"{]", "no JSON"), (b"[" * 200_000, "nested absurdly"), *[(labelme(path=p), "leads out") for p in ("/etc/passwd", "../secret.png", "C:\\x.png", "..\\secret.png", "~/x.png", "a/../../secret.png")], (labelme(path="9.png"), "'9.png' is missing, and there is no imageData"), (labelme(path=None), "'' is missing"), (labelme(path=5), "imagePath is no text"),
    (labelme(path="9.png", data="####"), "imageData is damaged|no image"), (labelme(path="9.png", data=base64.b64encode(b"text").decode()), "is no image"), (labelme(shapes="x"), "shapes are no list"), (labelme(shapes=[1]), "shapes are no list"), (labelme(imageWidth=9), "0.json describes one of 9 x 20"), (labelme(path="1.png"), "1.json: describes '1.png' again, which 0.json does"),
    (shaped(points="x"), "no list of points"), (shaped(points=[[1]]), "no list of points"), (shaped(points=[[1, None]]), "no list of points"), (shaped(points=[[True, 1]] * 3), "no list of points"), (shaped(points=[[1e300, 1]] * 3), "within 100 000"), (shaped().replace("[1, 1]", "[NaN, 1]"), "holds NaN")])
def test_bad_labelme_is_one_clear_line(made, tmp_path, data, word):
    src, bring = made("labelme"); put(tmp_path / "secret.png", noise(5)); put(src / "0.json", data)
    with pytest.raises((ValueError, OSError), match=word) as e: bring()
    assert "\n" not in str(e.value) and not tree(tmp_path / "data")


def test_a_json_has_a_size():
    with pytest.raises(BadFile, match="big.json: has 2 MB; more than 1"): read_json(b" " * (2 << 20), "big.json", 1 << 20)


# ---- whatever the bytes

@pytest.mark.parametrize("kind", OWN)
@given(data=st.data())
@settings(max_examples=12, **SOME)
def test_flipped_cut_and_replaced_bytes(tmp_path_factory, kind, data):
    root = tmp_path_factory.mktemp("f"); src = root / "src"; MAKE[kind](src); put(root / "secret.png", noise(5))
    ends = dict(csv=(".csv",), coco=(".json",), labelme=(".json",), folder=(".png",), nifti=(".gz",), dicom=("", ".dcm"))[kind]
    p = data.draw(st.sampled_from(sorted(p for p in src.rglob("*") if p.is_file() and p.suffix in ends)), label="file"); b = bytearray(p.read_bytes())
    if kind == "nifti" and data.draw(st.booleans(), label="plain"): b = bytearray(gzip.decompress(b)) # else every flip is a wrong checksum
    if data.draw(st.booleans(), label="cut"): b = b[:data.draw(st.integers(0, len(b)))]
    reach = min(len(b), 1200) if data.draw(st.booleans(), label="header") else len(b) # most of a file is pixels
    for i, v in data.draw(st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 255)), max_size=6), label="flips"):
        if b: b[i % reach] = v
    if data.draw(st.integers(0, 9), label="noise") == 0: b = data.draw(st.binary(max_size=200))
    p.write_bytes(bytes(b)); outside = tree(root); allow = data.draw(st.booleans(), label="allow")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try: m = import_own("mine", src, data.draw(st.sampled_from([kind, ""]), label="kind"), root / "data/mine", allow_missing=allow, progress=False)
        except (ValueError, OSError) as e: assert not isinstance(e, UnicodeError) and "\n" not in str(e) and len(str(e)) < 2000 and not (root / "data/mine").exists() and not list((root / "data").glob("*") if (root / "data").exists() else [])
        else:
            check_files(m.df, m.root); Manifest.load(m.root / "mine.csv").verify()
            for f in [*m.df.image, *m.df["mask"]]: f and read_image((m.root / f).read_bytes(), f)
            assert os.listdir(root / "data") == ["mine"]
    assert err.getvalue() == "" and {k: v for k, v in tree(root).items() if not k.startswith("data/")} == outside
    shutil.rmtree(root)


VALUE = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-3, 10 ** 12), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5), st.sampled_from(["../secret.png", "0.png", "/etc/passwd", "polygon"])), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["id", "counts", "size", "points", "name"]), x, max_size=2), max_leaves=5)

@pytest.mark.parametrize("kind", ["coco", "labelme"])
@given(data=st.data())
@settings(max_examples=20, **SOME)
def test_whatever_value_stands_anywhere_in_a_json(tmp_path_factory, kind, data):
    root = tmp_path_factory.mktemp("j"); src = root / "src"; MAKE[kind](src); put(root / "secret.png", noise(5))
    p = src / ("annotations.json" if kind == "coco" else "2.json"); whole = node = json.loads(p.read_text())
    while True:
        k = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))), label="key")
        if not isinstance(node[k], (dict, list)) or not node[k] or data.draw(st.integers(0, 3), label="here") == 0: break
        node = node[k]
    if data.draw(st.integers(0, 4), label="drop") == 0: del node[k]
    else: node[k] = data.draw(VALUE, label="value")
    p.write_text(json.dumps(whole)); outside = tree(root)
    try: m = import_own("mine", src, kind, root / "data/mine", allow_missing=data.draw(st.booleans()), progress=False)
    except (ValueError, OSError) as e: assert not isinstance(e, UnicodeError) and "\n" not in str(e) and not (root / "data/mine").exists()
    else: Manifest.load(m.root / "mine.csv").verify()
    assert {k: v for k, v in tree(root).items() if not k.startswith("data/")} == outside
    shutil.rmtree(root)


CELL = st.one_of(st.text(st.characters(codec="utf-8"), max_size=8), st.sampled_from(["pics/0.png", "0", "lesions/1.png", "../secret.png", "train", "=1+1", "0.1", "pics\\2.png", "a;b"]))

@given(st.lists(st.lists(CELL, min_size=4, max_size=4), min_size=1, max_size=4), st.permutations(["image", "mask", "label", "split", "patient", "spacing_mm", "text", "id", "sha256", "x y"]))
@settings(max_examples=25, **SOME)
def test_whatever_stands_in_a_table(tmp_path_factory, rows, columns):
    root = tmp_path_factory.mktemp("t"); src = root / "src"; make_csv(src); put(root / "secret.png", noise(5))
    pd.DataFrame(rows, columns=columns[:4]).to_csv(src / "table.csv", index=False); outside = tree(root)
    try: m = import_own("mine", src, "csv", root / "data/mine", allow_missing=True, progress=False)
    except (ValueError, OSError) as e: assert not isinstance(e, UnicodeError) and "\n" not in str(e) and not (root / "data/mine").exists()
    else: Manifest.load(m.root / "mine.csv").verify()
    assert {k: v for k, v in tree(root).items() if not k.startswith("data/")} == outside
    shutil.rmtree(root)
