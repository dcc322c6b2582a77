"Laws of the manifest: a table is checked or refused, groups stay whole."
import re, subprocess, sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from htlab import manifest as M
from htlab.manifest import Manifest, ManifestError, assign_splits, check_table, measure, read_table

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
    assert {p.suffix for p in (REPO / "data_manifests").rglob("*") if p.is_file()} <= {".csv", ".md"}


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


def test_manifest_needs_no_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, htlab.manifest; assert 'torch' not in sys.modules"], cwd=REPO).returncode == 0
