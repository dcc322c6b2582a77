"Laws of the manifest: a table is checked or refused, groups stay whole, an import is complete or absent."
import errno, json, os, re, shutil, stat, subprocess, sys, zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from htlab import manifest as M
from htlab.manifest import Manifest, ManifestError, assign_splits, check_table, import_busi, measure, read_table

REPO = Path(__file__).parents[1]
digest = lambda b: sha256(b).hexdigest()
quick = settings(max_examples=20, deadline=None)


def table(n=12, groups=None, labels=("benign", "malignant"), split=None):
    ids = [f"i{k}" for k in range(n)]
    d = pd.DataFrame({"id": ids, "image": [f"images/{i}.png" for i in ids], "mask": "", "label": [labels[k % len(labels)] for k in range(n)],
                      "group": groups or ids, "split": "", "sha256": [digest(i.encode()) for i in ids], "width": 8, "height": 6})
    return d.assign(split=assign_splits(d, (.6, .2, .2)) if split is None else split)


@st.composite
def tables(draw):
    n = draw(st.integers(3, 60))
    d = table(n, groups=[f"g{draw(st.integers(0, n // 2))}" for _ in range(n)], split="train")
    d["label"] = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=n, max_size=n))
    return d.assign(split=assign_splits(d, (.6, .2, .2), draw(st.integers(0, 9))))


# ---- the table

@pytest.mark.parametrize("field,value,word", [
    ("id", "i0", "duplicate"), ("id", "I0", "duplicate"), ("id", "", "empty"), ("id", "a/b", "file name"), ("image", "images/i0.png", "another row"),
    ("image", "", "empty"), ("label", None, "empty"), ("group", float("nan"), "empty"), ("split", "dev", "unknown split"), ("split", "", "unknown split"),
    ("sha256", "abc", "sha256"), ("sha256", "A" * 64, "sha256"), ("sha256", "", "empty"), ("width", "8.5", "whole number"), ("height", "", "empty"),
    ("height", "-6", "whole number"), ("group", "i0", "two sides"), ("sha256", digest(b"i0"), "another group"), ("mask", "sim:1/2", "simulated"),
    ("spacing_mm", "-1", "positive"), ("spacing_mm", "inf", "positive"), ("text", "two\nlines", "line break"), ("mask_sha256", "x", "sha256")])
def test_every_schema_error_names_file_row_field_value_and_remedy(field, value, word):
    d = table(split=["train"] * 6 + ["test"] * 6).astype(object)
    if field not in d: d[field] = ""
    d.loc[7, field] = value
    with pytest.raises(ValueError) as e: check_table(d, "mine.csv")
    assert str(e.value).startswith("mine.csv, row 8 (id ") and f"field '{field}'" in str(e.value) and word in str(e.value)
    assert ";" in str(e.value) and len(e.value.lines) == 1


@pytest.mark.parametrize("field", ["image", "mask"])
@given(path=st.one_of(st.sampled_from(["../a.png", "a/../../b.png", "/etc/passwd", "~/a.png", "C:/a.png", "C:a.png", "a\\b.png", "..", "\\\\host\\a", "http://x/a.png", "sim:1", "sim:a/b"]),
                      st.builds("/".join, st.lists(st.sampled_from(["a", "..", "b.png"]), min_size=1).filter(lambda p: ".." in p))))
@quick
def test_paths_cannot_leave_the_folder(field, path):
    d = table(); d.loc[3, field] = path
    with pytest.raises(ManifestError, match=rf"row 4 .*'{field}'.*(leaves the data folder|simulated)"): check_table(d)


@given(st.lists(st.from_regex(r"[a-z0-9 ()._-]{1,12}", fullmatch=True).filter(lambda p: p.strip() and p.strip() not in ("..", "~") and ".." != p.strip()), min_size=1, max_size=4))
@quick
def test_what_is_accepted_stays_inside(parts):
    d = table(); d.loc[0, "image"] = "/".join(p.strip() for p in parts)
    assert (Path("/root") / check_table(d).image[0]).resolve().is_relative_to("/root")


def test_all_errors_at_once_and_the_missing_column_with_its_nearest_name():
    d = table().astype(object); d.loc[0, "label"] = ""; d.loc[5, "image"] = "/x"; d.loc[9, "sha256"] = "z"
    with pytest.raises(ManifestError) as e: check_table(d)
    assert [int(re.search(r"row (\d+)", line)[1]) for line in e.value.lines] == [1, 6, 10] and "3 errors in all" in str(e.value).splitlines()[0]
    with pytest.raises(ManifestError, match="header, field 'label'.*rename 'lable'"): check_table(table().rename(columns={"label": "lable"}))
    with pytest.raises(ManifestError, match="no rows"): check_table(table()[:0])


@given(tables())
@quick
def test_checking_twice_changes_nothing(d):
    once = check_table(d.assign(spacing_mm="0.25", note="x"))
    pd.testing.assert_frame_equal(once, check_table(once))
    assert once.width.dtype.kind == "i" and (once.spacing_mm == .25).all()


def test_csv_is_read_strictly(tmp_path):
    p = tmp_path / "x.csv"
    for text, word in [("id,id\n1,2\n", "twice"), ("id,label\na,b\nc\n", "row 2"), ("id,label\na,b,c\n", "row 1"), ('id\n"a', "not a csv"), ("", "column is missing")]:
        p.write_text(text)
        with pytest.raises(ValueError, match=f"x.csv.*{word}"): check_table(read_table(p), p.name)
    p.write_bytes(b"\xff\xfe\x00i\x00d")
    with pytest.raises(ValueError, match="x.csv: not a text file"): read_table(p)
    p.write_bytes("\ufeffid,label\n007,NA\n".encode())
    assert read_table(p).to_dict("records") == [{"id": "007", "label": "NA"}] # nothing guessed


def test_phantom_rows_need_no_file(tmp_path):
    d = table(); d["image"] = [f"sim:1/{k}" for k in range(12)]; d["sha256"] = d.image.map(lambda s: digest(s.encode()))
    d = d.assign(width="", height=0, mask=d.image, organ="breast", scanner="linear", text="a breast scan", attributes='{"shape": "oval"}')
    d.to_csv(tmp_path / "phantom.csv", index=False)
    m = Manifest.load("phantom", folder=tmp_path)
    assert len(m) == 12 and (m.df.width == 0).all() and len(m.where(organ="breast", scanner=["linear"])) == 12 and len(m.verify()) == 12


# ---- splits and shots

@given(tables(), st.integers(0, 99))
@quick
def test_splits_are_group_safe_shared_out_and_independent_of_row_order(d, seed):
    s = assign_splits(d, (.5, .2, .3), seed)
    assert set(s) <= set(M.SPLITS) and (s.groupby(d.group).nunique() == 1).all()
    assert (assign_splits(d.sample(frac=1, random_state=seed), (.5, .2, .3), seed).sort_index() == s).all()
    pure = d[d.groupby("group").label.transform("nunique") == 1]
    for _, c in pure.groupby("label"):
        t = assign_splits(c, (.5, .2, .3), seed).value_counts(); largest = c.groupby("group").size().max()
        assert all(abs(t.get(k, 0) - f * len(c)) <= largest for k, f in zip(M.SPLITS, (.5, .2, .3)))


def test_split_fractions_are_checked():
    for bad in [(.7, .3), (.7, .2, .2), (1.2, -.1, -.1)]:
        with pytest.raises(ValueError, match="fractions"): assign_splits(table(), bad)
    assert set(assign_splits(table(), (.5, 0, .5))) == {"train", "test"}


@given(tables(), st.lists(st.one_of(st.integers(1, 8), st.floats(.01, 1)), min_size=2, max_size=4), st.integers(0, 3))
@quick
def test_shots_are_nested_exact_and_leave_the_test_alone(d, ks, seed):
    m = Manifest(d)
    n = m.counts().loc[m.classes]
    draws = []
    for k in ks:
        if isinstance(k, int) and k > n.train.min():
            with pytest.raises(ValueError, match="fewer shots"): m.shots(k, seed)
            continue
        f = m.shots(k, seed); c = f.counts().loc[m.classes]
        assert (c.test == n.test).all() and (c.valid >= np.minimum(n.valid, 1)).all() and f.classes == m.classes
        if isinstance(k, int):
            assert (c.train == k).all()
            assert all(abs(c["valid"][x] - n["valid"][x] * k / n.train[x]) <= 1 for x in m.classes)
        assert (f.df.groupby("group").split.nunique() == 1).all()
        draws.append((k, n.train * k if isinstance(k, float) else n.train * 0 + k, set(f.df.id)))
    for _, a, x in draws:
        for _, b, y in draws:
            if (a <= b).all(): assert x <= y


def test_shots_take_another_group_before_another_of_the_same():
    d = table(20, groups=["same"] * 10 + [f"g{k}" for k in range(10)], labels=("a",), split="train")
    assert Manifest(d).shots(11).df.group.nunique() == 11
    assert set(Manifest(d).shots(5, 0).df.id) != set(Manifest(d).shots(5, 1).df.id)
    for bad in (0, -1, 1.5, 0.0, "5", True):
        with pytest.raises(ValueError, match="shots"): Manifest(d).shots(bad)


@given(tables())
@quick
def test_hashes_see_what_matters_and_nothing_else(d):
    m = Manifest(d)
    same = Manifest(d.sample(frac=1, random_state=0)[d.columns[::-1]])
    assert (same.data_hash, same.split_hash) == (m.data_hash, m.split_hash)
    relabelled = Manifest(d.assign(label=["x", *d.label[1:]]))
    assert relabelled.data_hash != m.data_hash and relabelled.split_hash == m.split_hash
    moved = Manifest(d.assign(split=d.split.replace({"train": "test", "test": "train"})))
    assert moved.data_hash == m.data_hash and moved.split_hash != m.split_hash
    assert sum(len(m.split(s)) for s in set(d.split)) == len(m) and "<table" in m._repr_html_()


@given(tables(), st.sampled_from(["", "a", "a,b", " b , c,"]), st.sampled_from(["", "site=x", "site=x|y", " site = y | x ; id = i1|i2|i3 "]),
       st.sampled_from([0., .3, 1., 2.]), st.integers(0, 3), st.integers(0, 3))
@quick
def test_pick_narrows_what_is_learned_from_and_never_what_is_tested(d, classes, rows, shots, seed, limit):
    d = d.assign(site=["xyz"[k % 3] for k in range(len(d))]); m = Manifest(d)
    names = [c.strip() for c in classes.split(",") if c.strip()]
    try: got = m.pick(classes, rows, shots, seed, limit)
    except ValueError as e:
        assert re.match(r"(rows|classes)=.*(leaves no|no row has)|.*fewer shots|.*no row is", str(e)); return
    of = m.where(classes=names) if names else m
    whole = of.pick(rows=rows) if rows else of
    assert got.classes == of.classes and set(got.df.id) <= set(whole.df.id) and list(whole.df.id[whole.df.split.eq("test")]) == list(of.df.id[of.df.split.eq("test")])
    learned = whole.df[whole.df.split.ne("test")]
    if rows: assert set(learned.site) <= {"x", "y"}
    if ";" in rows: assert set(learned.id) <= {"i1", "i2", "i3"}
    assert set(got.df.label[got.df.split.eq("train")]) == set(of.df.label[of.df.split.eq("train")]), "no class is lost on the way"
    few = whole.shots((shots if shots < 1 else int(shots)) or None, seed).df
    assert list(got.df.id) == list((few.groupby(["split", "label"]).head(limit) if limit else few).id)
    if not limit and (of.df.split == "test").any():
        t = m.tested(classes=classes); assert list(t.df.id) == list(got.df.id[got.df.split.eq("test")]) and t.classes == got.classes


@pytest.mark.parametrize("ask, says", [
    (dict(classes="cyst"), "classes='cyst'.*known: benign, malignant"), (dict(rows="site"), "rows='site': write column=value"), (dict(rows="=x"), "write column=value"), (dict(rows="sight=x"), "no column 'sight'; columns: id"),
    (dict(rows="site=q"), "rows='site=q'.*known: x, y"), (dict(rows="site=x"), "leaves no train image of class 'malignant'; take more rows, or classes='benign'"), (dict(rows="width=9"), "known: 8"),
    (dict(rows="split=train"), "leaves no valid image"), (dict(shots=1.5), "shots=1.5"), (dict(shots=-.1), "shots=-0.1"), (dict(shots=float("nan")), "shots=nan"), (dict(limit=-1), "limit=-1")])
def test_pick_names_the_parameter_and_what_is_known(ask, says):
    m = Manifest(table(split=["train"] * 6 + ["valid"] * 4 + ["test"] * 2).assign(site=["x", "y"] * 6))
    with pytest.raises(ValueError, match=says): m.pick(**ask)


def test_tested_takes_another_data_set_and_never_what_was_learned(tmp_path):
    m = Manifest(table(12, split=["train"] * 6 + ["valid"] * 3 + ["test"] * 3).assign(site="x"), "mine")
    def other(split="test", **columns):
        d = table(9, labels=("benign", "cyst", "malignant"), split=split).assign(**dict(sha256=[digest(f"o{k}".encode()) for k in range(9)], image=[f"sim:1/{k}" for k in range(9)]) | columns)
        d.to_csv(tmp_path / "other.csv", index=False)
        return f"{tmp_path}/other.csv"
    t = m.tested(other(site="abc" * 3), "", "", 2)
    assert list(t.df.label) == ["benign", "malignant"] * 2 and t.classes == m.classes == ["benign", "malignant"], "a class that was not learned is not tested, and numbers do not move"
    assert len(m.tested(other("train") + ":all")) == 6 and set(m.tested(other("train") + ":all").df.split) == {"test"}
    with pytest.raises(ValueError, match="no test split; .*other.csv:all tests on all of it"): m.tested(other("train"))
    with pytest.raises(ValueError, match="no row of class 'malignant'.*known: benign, cyst"): m.tested(other(label=["benign", "cyst"] * 4 + ["cyst"]))
    with pytest.raises(ValueError, match="test_rows='site=q'.*known: a, b"): m.tested(other(site=list("abb" * 3)), "site=q")
    own = [digest(f"o{k}".encode()) for k in range(8)]
    assert len(m.tested(other())) == 6, "i0 of another hospital is another patient"
    with pytest.raises(ValueError, match="1 of 6 rows .*'i0'"): m.tested(other(sha256=[digest(b"i3"), *own], group=[f"h{k}" for k in range(9)]))
    with pytest.raises(ValueError, match="6 of 6 rows"): m.tested(other(sha256=[*own, digest(b"i11")])) # one origin: i0 is i0
    with pytest.raises(ValueError, match="test_rows='id=i0': no such row in the test split"): m.tested(test_rows="id=i0")


def test_where_and_split_refuse_the_unknown():
    m = Manifest(table())
    assert m.where(classes="benign").classes == ["benign"]
    for ask, word in [(lambda: m.where(classes=["cyst"]), "cyst"), (lambda: m.where(organ="x"), "organ"), (lambda: m.split("dev"), "dev"),
                      (lambda: m.where(classes=[]), "no row")]:
        with pytest.raises(ValueError, match=word): ask()


# ---- files

def own(tmp_path):
    d = table(4, split="train")
    for f in d.image:
        (tmp_path / f).parent.mkdir(exist_ok=True); Image.effect_noise((8, 6), 40).save(tmp_path / f)
    d = measure(d.assign(mask=[d.image[0], "", "", ""]), tmp_path)
    d.to_csv(tmp_path / "own.csv", index=False)
    return tmp_path / "own.csv"


def test_own_csv_is_measured_loaded_and_verified(tmp_path):
    m = Manifest.load(own(tmp_path)).verify()
    assert m.root == tmp_path and m.name == "own" and len(m) == 4
    Image.new("L", (8, 6)).save(tmp_path / "images/i1.png")
    assert len(Manifest.load(tmp_path / "own.csv")) == 4
    with pytest.raises(ManifestError, match="own.csv, row 2 .*'image'.*other bytes"): m.verify()


@pytest.mark.parametrize("harm,word", [(lambda p: p.unlink(), "is not in"), (lambda p: p.write_text("hello"), "not an image"), (lambda p: Image.new("L", (9, 6)).save(p), "9 x 6 px")])
def test_a_bad_file_is_named(tmp_path, harm, word):
    path = own(tmp_path); harm(tmp_path / "images/i2.png")
    with pytest.raises(ManifestError, match=f"own.csv, row 3 .*field 'image'.*{word}"): Manifest.load(path)


def test_load_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HTLAB_DATA", str(tmp_path)); monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="htlab data import busi FOLDER_OR_ZIP"): Manifest.load("busi")
    with pytest.raises(FileNotFoundError, match="did you mean 'busi'"): Manifest.load("bussi")
    with pytest.raises(FileNotFoundError, match="nothere.csv"): Manifest.load("nothere.csv")
    (tmp_path / "data_manifests").mkdir(); table().to_csv(tmp_path / "data_manifests/busi.csv", index=False)
    assert len(Manifest.load("busi", files=False)) == 12 # the one here comes first


# ---- what is committed

@pytest.mark.parametrize("path", sorted((REPO / "data_manifests").glob("*.csv")), ids=lambda p: p.stem)
def test_committed_manifests_are_sound_and_have_a_card(path):
    m = Manifest.load(path, files=False)
    assert [f"## {s}" in m.card for s in ("Source", "Licence", "Citation", "Patients", "Known problems", "Recommended split")] == [True] * 6
    assert set(m.df.split) == set(M.SPLITS)


def test_no_pixel_is_committed():
    assert {p.suffix for p in (REPO / "data_manifests").iterdir()} <= {".csv", ".md"}


def test_busi_split_is_made_again_from_the_csv_and_the_card_tells_the_truth():
    m = Manifest.load(REPO / "data_manifests/busi.csv", files=False); d = m.df
    assert (assign_splits(d.drop(columns="split"), (.7, .1, .2), seed=0) == d.split).all()
    assert (pd.crosstab(d.label, d.split, normalize="index")[list(M.SPLITS)] - [.7, .1, .2]).abs().max(axis=None) < .02
    assert len(m) == 780 and m.counts()["all"].tolist() == [437, 210, 133, 780] and d["mask"].eq("").eq(d.label.eq("normal")).all()
    for c, row in m.counts().loc[m.classes, list(M.SPLITS)].iterrows(): assert f"| {c} | {' | '.join(map(str, row))} |" in m.card
    size = d.groupby("group").size()
    assert f"{len(size)} groups, {(size > 1).sum()} of them with more than one image ({size[size > 1].sum()} images)" in m.card
    mixed = d[d.groupby("group").label.transform("nunique") > 1]
    assert mixed.group.nunique() == 5 and {"benign-433", "malignant-145"} <= set(mixed.id)
    for f in mixed.source: assert Path(f).stem in m.card.split("Contradicting labels")[1]


# ---- the importer

@pytest.fixture
def busi(tmp_path):
    "A small BUSI in the official layout, and its table."
    top, rng, rows = tmp_path / "src" / "Dataset_BUSI_with_GT", np.random.default_rng(0), []
    for label, k, modes in [("benign", 1, ["1", "RGBA", "1"]), ("benign", 2, ["1"]), ("malignant", 1, ["RGB"]), ("normal", 1, ["RGB"])]:
        (top / label).mkdir(parents=True, exist_ok=True); name = f"{label} ({k})"
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(top / label / f"{name}.png")
        files = [f"{name}_mask{f'_{i}' if i else ''}.png" for i in range(len(modes))]
        for i, (f, mode) in enumerate(zip(files, modes)):
            a = np.zeros((20, 30), bool); a[2 + 5 * i:6 + 5 * i, 3:9] = label != "normal"
            Image.fromarray(a).convert(mode).save(top / label / f)
        sums = [digest((top / label / f).read_bytes()) for f in files]
        rows.append(dict(id=f"{label}-{k}", image=f"images/{label}-{k}.png", mask="" if label == "normal" else f"masks/{label}-{k}.png", label=label, group=f"{label}-{k}",
            split="train", sha256=digest((top / label / f"{name}.png").read_bytes()), width=30, height=20, source=f"{label}/{name}.png", source_masks=";".join(files), source_masks_sha256=";".join(sums)))
    return tmp_path / "src", tmp_path / "data" / "busi", pd.DataFrame(rows)


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} if folder.exists() else None


def zipped(src, path, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for p in sorted(src.rglob("*.png")): z.write(p, prefix + p.relative_to(src).as_posix())
    return path


def bring(busi, src=None, **kw): return import_busi(src or busi[0], busi[1], manifest=busi[2], progress=False, **kw)


def test_import_keeps_bytes_unites_masks_and_is_idempotent(busi, monkeypatch):
    src, dest, rows = busi
    m = bring(busi); first = tree(dest)
    for r in rows.itertuples(): assert first[r.image] == (src / "Dataset_BUSI_with_GT" / r.source).read_bytes()
    mask = np.asarray(Image.open(dest / "masks/benign-1.png"))
    want = np.zeros((20, 30), np.uint8); want[2:16, 3:9] = 255; want[6], want[11] = 0, 0
    assert (mask == want).all() and mask.dtype == np.uint8 and "masks/normal-1.png" not in first and len(m) == 4
    bring(busi); assert tree(dest) == first and os.listdir(dest.parent) == ["busi"]
    rows.to_csv(dest.parent / "busi.csv", index=False); monkeypatch.setenv("HTLAB_DATA", str(dest.parent))
    assert Manifest.load("busi", folder=dest.parent).verify().data_hash == m.data_hash


@pytest.mark.parametrize("form", ["flat", "nested", "zip", "zip flat", "zip nested", "zip backslash", "zip mac"])
def test_import_takes_every_layout(busi, tmp_path, form):
    src, _, rows = busi; bring(busi); want = tree(busi[1])
    if form == "flat": src = src / "Dataset_BUSI_with_GT"
    if form == "nested": src = tmp_path / "up"; shutil.copytree(busi[0], src / "archive")
    if form.startswith("zip"): src = zipped(src / "Dataset_BUSI_with_GT", tmp_path / "a.zip", {"zip": "Dataset_BUSI_with_GT/", "zip flat": "", "zip nested": "archive/Dataset_BUSI_with_GT/",
                                                                                                "zip backslash": "Dataset_BUSI_with_GT\\", "zip mac": "Dataset_BUSI_with_GT/"}[form])
    if form == "zip mac":
        with zipfile.ZipFile(src, "a") as z: z.writestr("__MACOSX/Dataset_BUSI_with_GT/benign/._benign (1).png", b"x")
    shutil.rmtree(busi[1]); bring(busi, src)
    assert tree(busi[1]) == want


@pytest.mark.parametrize("harm,kind,words", [
    (lambda t: (t / "benign/benign (2).png").unlink(), FileNotFoundError, ["1 of 4 images", "benign/benign (2).png", "--allow-missing"]),
    (lambda t: (t / "benign/benign (1)_mask_2.png").unlink(), FileNotFoundError, ["1 of 4 images", "benign (1)_mask_2.png"]),
    (lambda t: (t / "benign/benign (2).png").write_text("text"), ValueError, ["1 file not", "benign/benign (2).png (not an image)"]),
    (lambda t: Image.new("1", (9, 9)).save(t / "benign/benign (2)_mask.png"), ValueError, ["benign (2)_mask.png (9 x 9 px instead of 30 x 20)"]),
    (lambda t: Image.new("RGB", (30, 20)).save(t / "malignant/malignant (1).png"), ValueError, ["other bytes than published"]),
    (lambda t: shutil.rmtree(t), FileNotFoundError, ["no folder benign, malignant, normal"])])
@pytest.mark.parametrize("before", [True, False])
def test_a_failed_import_is_one_clear_line_and_leaves_the_old_state(busi, harm, kind, words, before):
    if before: bring(busi)
    old = tree(busi[1]); harm(busi[0] / "Dataset_BUSI_with_GT")
    with pytest.raises(kind) as e: bring(busi)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words) and tree(busi[1]) == old
    assert not busi[1].parent.exists() or os.listdir(busi[1].parent) == ["busi"] * before


def test_allow_missing_forgives_absence_but_no_difference(busi, monkeypatch):
    top = busi[0] / "Dataset_BUSI_with_GT"
    (top / "normal/normal (1).png").unlink(); (top / "benign/benign (1)_mask_1.png").unlink()
    m = bring(busi, allow_missing=True)
    assert list(m.df.id) == ["benign-2", "malignant-1"] and m.total == 4 and m.classes == ["benign", "malignant", "normal"]
    busi[2].to_csv(busi[1].parent / "busi.csv", index=False); monkeypatch.setenv("HTLAB_DATA", str(busi[1].parent))
    again = Manifest.load("busi", folder=busi[1].parent)
    assert again.data_hash == m.data_hash and again.classes == m.classes and "2 of 4" in repr(again)
    (busi[1] / "masks/benign-2.png").unlink() # lost after the import: no silent shrinking
    with pytest.raises(ManifestError, match="'mask'.*is not in"): Manifest.load("busi", folder=busi[1].parent)
    (top / "benign/benign (1)_mask.png").write_bytes(b"x") # differs, in a row that is incomplete anyway
    with pytest.raises(ValueError, match=r"benign \(1\)_mask.png \(not an image\)"): bring(busi, allow_missing=True)
    for f in top.rglob("*.png"): f.unlink()
    (top / "benign/other.png").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="4 of 4"): bring(busi, allow_missing=True)


def test_a_correct_hash_does_not_excuse_a_mask_of_another_size(busi):
    mask = busi[0] / "Dataset_BUSI_with_GT/benign/benign (2)_mask.png"; Image.new("1", (9, 9)).save(mask)
    busi[2].loc[1, "source_masks_sha256"] = digest(mask.read_bytes())
    with pytest.raises(ValueError, match="9 x 9 px instead of 30 x 20"): bring(busi)


def link(name): i = zipfile.ZipInfo(name); i.external_attr = (stat.S_IFLNK | 0o777) << 16; return i
@pytest.mark.parametrize("entry,data,word", [("../benign/benign (1).png", b"x", "leaves"), ("a/../../x", b"x", "leaves"), ("/etc/x", b"x", "leaves"), ("C:/x", b"x", "leaves"), ("..\\x", b"x", "leaves"),
    (link("benign/benign (9).png"), b"/etc/passwd", "link"), ("bomb", b"\0" * (8 << 20), "absurd"), ("Dataset_BUSI_with_GT/benign/benign (1).png", b"x", "twice")])
def test_hostile_zips_are_refused_whole(busi, tmp_path, entry, data, word):
    path = zipped(busi[0], tmp_path / "a.zip"); before = {p for p in tmp_path.rglob("*")}
    with pytest.warns(UserWarning) if word == "twice" else zipfile.ZipFile(path) as _:
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as z: z.writestr(entry, data)
    with pytest.raises(ValueError, match=f"a.zip: entry .* {word}|a.zip: entry .*{word} "): bring(busi, path, allow_missing=True)
    assert {p for p in tmp_path.rglob("*")} == before


@given(st.lists(st.sampled_from(["..", ".", "benign", "benign (1).png", "", "a"]), min_size=1, max_size=5).filter(any))
@quick
def test_no_zip_name_escapes(tmp_path_factory, parts):
    t = tmp_path_factory.mktemp("z"); name = "/".join(parts)
    with zipfile.ZipFile(t / "a.zip", "w") as z: z.writestr(name, b"x")
    with zipfile.ZipFile(t / "a.zip") as z:
        if ".." in parts or name.startswith("/"):
            with pytest.raises(ValueError, match="leaves"): M._zip_names(z, "a.zip")
        else: assert all((t / n).resolve().is_relative_to(t) for n in M._zip_names(z, "a.zip"))


def test_damaged_or_locked_archives(busi, tmp_path):
    path = zipped(busi[0], tmp_path / "a.zip"); good = path.read_bytes()
    path.write_bytes(good[:len(good) // 2])
    with pytest.raises(ValueError, match="neither a folder nor a zip"): bring(busi, path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: # stored, then a byte of the first image flipped: the CRC disagrees
        for p in sorted(busi[0].rglob("*.png")): z.write(p, p.relative_to(busi[0]).as_posix())
        at = z.infolist()[0].header_offset + 150
    raw = bytearray(path.read_bytes()); raw[at] ^= 255; path.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=r"1 file not as published: benign/benign \(1\).png"): bring(busi, path)
    with pytest.raises(FileNotFoundError, match="no such folder or zip"): bring(busi, tmp_path / "nowhere")
    shutil.copytree(busi[0], tmp_path / "twice/a"); shutil.copytree(busi[0], tmp_path / "twice/b")
    with pytest.raises(ValueError, match="there 2 times"): bring(busi, tmp_path / "twice")


def test_a_folder_that_is_no_import_is_never_replaced(busi):
    busi[1].mkdir(parents=True); (busi[1] / "thesis.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="other files"): bring(busi)
    with pytest.raises(FileExistsError): import_busi(busi[0], busi[0], manifest=busi[2], progress=False)
    assert (busi[1] / "thesis.txt").exists()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", range(6))
def test_full_disk_at_any_moment_keeps_the_old_state(busi, monkeypatch, before, at):
    if before: bring(busi)
    old, count = tree(busi[1]), [0]
    def full(original):
        def f(*a, **k):
            count[0] += 1
            if count[0] > at: raise OSError(errno.ENOSPC, "No space left on device")
            return original(*a, **k)
        return f
    for owner, name in [(Path, "write_bytes"), (Path, "write_text"), (Image.Image, "save")]: monkeypatch.setattr(owner, name, full(getattr(owner, name)))
    with pytest.raises(OSError, match="no space left .*nothing was kept") as e: bring(busi)
    monkeypatch.undo()
    assert e.value.errno == errno.ENOSPC and tree(busi[1]) == old and os.listdir(busi[1].parent) == ["busi"] * before


def test_full_tmpfs(busi, tmp_path):
    disk = tmp_path / "disk"; disk.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("needs the right to mount")
    try:
        with pytest.raises(OSError, match="no space left"): import_busi(busi[0], disk / "busi", manifest=busi[2], progress=False)
        assert os.listdir(disk) == []
    finally: subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("at", range(4))
def test_a_killed_import_leaves_nothing_half_written(busi, tmp_path, at):
    src, dest, rows = busi; rows.to_csv(tmp_path / "t.csv", index=False)
    bring(busi); old = tree(dest)
    code = f"""
import os, signal, sys, pandas as pd
from pathlib import Path
from htlab import manifest as M
count = [0]
def dying(original):
    def f(*a):
        count[0] += 1
        if count[0] > {at}: os.kill(os.getpid(), signal.SIGKILL)
        return original(*a)
    return f
Path.{'rename' if at < 2 else 'write_bytes'} = dying(Path.{'rename' if at < 2 else 'write_bytes'})
M.import_busi({str(src)!r}, {str(dest)!r}, manifest=pd.read_csv({str(tmp_path / 't.csv')!r}, dtype=str), progress=False)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPO).returncode == -9
    assert tree(dest) in (old, None) # None: between the two renames; the old import then lies beside it, whole
    if not dest.exists(): assert tree(dest.with_name(".busi.old")) == old
    (src / "Dataset_BUSI_with_GT/benign/benign (1).png").write_bytes(b"x")
    with pytest.raises(ValueError): bring(busi)
    assert tree(dest) == old and os.listdir(dest.parent) == ["busi"] # the next import, even a failing one, puts all in order


def test_import_says_what_it_did(busi, capsys):
    (busi[0] / "Dataset_BUSI_with_GT/benign/benign (77).png").write_bytes(b"x")
    import_busi(busi[0], busi[1], manifest=busi[2])
    out = capsys.readouterr().out
    assert "4 images" in out and "complete" in out and "ignored 1 file unknown to the table: benign/benign (77).png" in out


def test_manifest_needs_no_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, htlab.manifest; assert 'torch' not in sys.modules"], cwd=REPO).returncode == 0
