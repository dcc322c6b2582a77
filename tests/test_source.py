"Laws of the two doors: nothing is read outside, a damaged file is one clear line, an imported set is complete or absent."
import contextlib, errno, gzip, io, os, re, shutil, stat, struct, subprocess, sys, tarfile, zipfile, zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from htlab import source as S
from htlab.manifest import Manifest, ManifestError, assign_splits
from htlab.source import BadFile, Row, Source, commit, gunzip, read_csv, read_image, read_nifti, to_uint8

REPO = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL") # Pillow tells what it thinks of a damaged TIFF
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def packed(array, kind="png", **kw): Image.fromarray(array).save(out := io.BytesIO(), kind, **kw); return out.getvalue()
def grey(seed=0, h=20, w=30): return np.random.default_rng(seed).integers(0, 255, (h, w), dtype=np.uint8)
def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} if folder.exists() else None


def nifti(volume, zooms=(.1, .1, 1), **header):
    import nibabel as nib
    image = nib.Nifti1Image(volume, np.eye(4)); image.header.set_zooms((*zooms, 1)[:volume.ndim])
    data = image.to_bytes(); h = nib.Nifti1Header(data[:348], check=False)
    for k, v in header.items(): h[k] = v # whatever it may claim
    return h.binaryblock + data[348:]


# ---- images

def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
def claims(w, h, bits=8): return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def saved(mode, kind): # an image file of this mode and format; None where there is none
    im = Image.fromarray(grey().astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(grey()).convert("RGB").convert(mode) if mode not in ("I", "F", "PA", "LA") else Image.fromarray(grey()).convert(mode if mode != "PA" else "LA").convert(mode)
    try: im.save(out := io.BytesIO(), kind)
    except (OSError, ValueError, KeyError): return None
    return out.getvalue()


@pytest.mark.parametrize("mode, kind", [(m, k) for m in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F") for k in ("png", "jpeg", "bmp", "tiff", "gif", "webp") if saved(m, k)])
def test_every_mode_and_format_becomes_grey_or_rgb_bytes(mode, kind):
    a = read_image(saved(mode, kind))
    assert a.dtype == np.uint8 and a.shape in ((20, 30), (20, 30, 3)) and np.ptp(a) > 0


@given(st.sampled_from(["png", "jpeg", "bmp", "tiff"]), st.floats(0, .999), st.booleans())
@quick
def test_an_image_cut_anywhere_is_refused_by_name(kind, share, colour):
    data = packed(np.stack([grey()] * 3, -1) if colour else grey(), kind)
    cut = data[:min(int(share * len(data)), len(data) - 8)] # a JPEG without its last marker, a PNG without its end chunk hold all pixels
    try: a = read_image(cut, "a/b.png")
    except BadFile as e: assert e.file == "a/b.png" and str(e).startswith("a/b.png: ") and "\n" not in str(e) and e.kind == "damaged"
    else: assert kind in ("png", "tiff") and (a == read_image(data)).all(), "accepted only if all pixels are there"


@given(st.sampled_from(["png", "jpeg", "bmp", "tiff", "gif"]), st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 255)), min_size=1, max_size=20))
@quick
def test_flipped_bytes_never_crash(kind, flips):
    data = bytearray(packed(grey(), kind))
    for at, value in flips: data[at % len(data)] = value
    try: a = read_image(bytes(data), "x.img")
    except BadFile as e: assert str(e).startswith("x.img: ")
    else: assert a.dtype == np.uint8 and a.shape[0] * a.shape[1] <= S.MAX_PIXELS


@given(st.binary(max_size=300))
@quick
def test_noise_is_no_image(data):
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00", b"GIF89a", b"RIFF\x00\x00\x00\x00WEBP"):
        with pytest.raises(BadFile, match="^n: "): read_image(head + data, "n")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("w, h", [(30_000, 30_000), (60_000, 2_000), (2 ** 31 - 1, 2 ** 31 - 1), (12_000, 12_000), (1, 100_000_000), (0, 5)])
def test_a_header_is_believed_within_bounds(w, h):
    with pytest.raises(BadFile, match="^bomb.png: "): read_image(claims(w, h), "bomb.png")


def test_numbers_become_bytes_and_nan_does_not():
    assert (to_uint8(np.array([[0., 1, 2]])) == [[0, 128, 255]]).all() and (to_uint8(np.full((2, 2), 7)) == 0).all() and to_uint8(grey()).base is None
    assert to_uint8(np.array([[-5, 5]], np.int16)).tolist() == [[0, 255]] and to_uint8(np.zeros((0, 3))).shape == (0, 3)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(BadFile, match="f.tif: holds 1 values that are NaN or infinite"): to_uint8(np.array([[0., bad]]), "f.tif")
        with pytest.raises(BadFile, match="f.tif: holds 1 values"): read_image(packed(np.array([[0, bad]], np.float32), "tiff"), "f.tif")


# ---- tables and volumes

@pytest.mark.parametrize("data, word", [
    (b"", "is empty"), (b"\n\n", "is empty"), ("name\nMüller".encode("latin-1"), "not UTF-8"), ("a,b\n1,2".encode("utf-16"), "not UTF-8"), ("a,b\n1,2".encode("utf-16-le"), "zero bytes"), (b"a,b\n1\n", "line 2 has 1 fields where 2"),
    (b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields"), (b"a,a\n1,2\n", "column 'a' twice"), (b'a,b\n"1,2\n', "not a csv"), (b"PK\x03\x04" + bytes(20), "zero bytes|not UTF-8"), (b'a\n"' + b"x" * 200_000 + b'"\n', "not a csv")])
def test_a_table_is_read_strictly_or_refused_with_its_name(data, word):
    with pytest.raises(BadFile, match=f"^t.csv: .*({word})"): read_csv(data, "t.csv")


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\n", exclude_categories=["Cs", "Cc"]), max_size=8), min_size=2, max_size=2), min_size=1, max_size=6), st.sampled_from(",;"))
@quick
def test_what_a_csv_writer_writes_is_read_back(rows, sep):
    import csv
    out = io.StringIO(); w = csv.writer(out, delimiter=sep, quoting=csv.QUOTE_ALL); w.writerow(["one", "two"]); w.writerows(rows)
    want = [[c.strip() for c in r] for r in rows if any(c.strip() for c in r)]
    assert read_csv(out.getvalue().encode("utf-8-sig")).values.tolist() == want
    assert read_csv(b"0001.jpg,0\n0002.jpg,1\n", columns=["name", "label"]).name.tolist() == ["0001.jpg", "0002.jpg"]


@given(st.binary(max_size=400))
@quick
def test_noise_is_no_table_no_volume_no_gzip(data):
    for read in (read_csv, read_nifti, gunzip):
        for d in (data, b"\x1f\x8b\x08\x00" + data, b"\x5c\x01\x00\x00" + data, b"\x1c\x02\x00\x00" + data):
            try: read(d, "n")
            except BadFile as e: assert str(e).startswith("n: ") and "\n" not in str(e)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("gz", [True, False])
def test_a_volume_comes_back(dtype, gz):
    v = (np.arange(5 * 4 * 3).reshape(5, 4, 3) % 200).astype(dtype)
    data = nifti(v, (.1, .2, 3.))
    got, zooms = read_nifti(gzip.compress(data) if gz else data)
    assert (got == v).all() and zooms == pytest.approx((.1, .2, 3.)) and read_nifti(nifti(v[:, :, 0]))[0].shape == (5, 4) and read_nifti(nifti(v[..., None], (1, 1, 1, 1)))[0].shape == (5, 4, 3)


@given(st.floats(0, .999), st.booleans())
@quick
def test_a_volume_cut_anywhere_is_refused(share, gz):
    data = nifti(np.random.default_rng(0).integers(0, 255, (9, 8, 7), dtype=np.uint8)); data = gzip.compress(data) if gz else data
    with pytest.raises(BadFile, match="^v.nii.gz: "): read_nifti(data[:int(share * len(data))], "v.nii.gz")


@pytest.mark.parametrize("header", [dict(datatype=0), dict(pixdim=[1, -1, .1, 1, 0, 0, 0, 0]), dict(bitpix=3), dict(qform_code=99)])
def test_what_nibabel_finds_odd_is_not_printed(header, capfd):
    import nibabel as nib
    before = nib.imageglobals.logger.disabled, list(nib.imageglobals.logger.handlers)
    with contextlib.suppress(BadFile): read_nifti(nifti(np.zeros((5, 4, 3), np.uint8), **header), "v.nii")
    assert capfd.readouterr() == ("", "") and (nib.imageglobals.logger.disabled, nib.imageglobals.logger.handlers) == before


@pytest.mark.parametrize("data, word", [
    (lambda: nifti(np.full((4, 4, 4), np.nan, np.float32)), "holds 64 values that are NaN"), (lambda: nifti(np.full((4, 4, 4), np.inf)), "infinite"), (lambda: nifti(np.ones((4, 4, 4), np.complex64)), "complex64 where numbers"),
    (lambda: nifti(np.zeros((2, 2, 2, 3), np.uint8)), "has the shape"), (lambda: nifti(np.zeros((4, 4, 4), np.uint8), dim=[3, 30_000, 30_000, 30_000, 1, 1, 1, 1]), "truncated: its header claims 30000 x 30000 x 30000"),
    (lambda: nifti(np.zeros((4, 4, 4), np.uint8), dim=[3, -4, 4, 4, 1, 1, 1, 1]), "shape|no NIfTI"), (lambda: nifti(np.zeros((4, 4, 4), np.uint8), dim=[3, 0, 4, 4, 1, 1, 1, 1]), "shape"), (lambda: nifti(np.zeros((4, 4), np.uint8), datatype=9999), "no NIfTI"),
    (lambda: nifti(np.ones((4, 4, 4), np.uint8), scl_slope=np.inf), ""), (lambda: nifti(np.ones((4, 4, 4), np.uint8), vox_offset=np.nan), "no NIfTI|truncated"), (lambda: b"", "no NIfTI"), (lambda: packed(grey()), "no NIfTI")])
def test_bad_volumes_are_named(data, word):
    if word:
        with pytest.raises(BadFile, match=f"^v.nii: .*({word})"): read_nifti(data(), "v.nii")
    else:
        try: assert np.isfinite(read_nifti(data(), "v.nii")[0]).all()
        except BadFile as e: assert str(e).startswith("v.nii")


def test_a_gzip_bomb_stops_at_the_limit():
    bomb = gzip.compress(bytes(20 << 20))
    with pytest.raises(BadFile, match="z.nii.gz: unpacks to an absurd size"): gunzip(bomb, "z.nii.gz", 1 << 20)
    assert len(gunzip(bomb)) == 20 << 20 and gunzip(b"plain") == b"plain"
    with pytest.raises(BadFile, match="z: is a damaged gzip"): gunzip(bomb[:-50], "z")
    with pytest.raises(BadFile, match="z: is a damaged gzip"): gunzip(gzip.compress(gzip.compress(b"x"))[:-1], "z")


# ---- the reading door

def folder(tmp_path, names=("a.png", "sub/b.png", ".DS_Store", "__MACOSX/._a.png")):
    for n in names: (tmp_path / "src" / n).parent.mkdir(parents=True, exist_ok=True); (tmp_path / "src" / n).write_bytes(n.encode())
    return tmp_path / "src"


def archive(src, path, prefix=""):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for p in sorted(src.rglob("*")): p.is_file() and z.write(p, prefix + p.relative_to(src).as_posix())
    else:
        with tarfile.open(path, {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}[path.suffix]) as t:
            for p in sorted(src.rglob("*")): p.is_file() and t.add(p, prefix + p.relative_to(src).as_posix())
    return path


@pytest.mark.parametrize("kind", ["", "a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
@pytest.mark.parametrize("prefix", ["", "top/", "./"])
def test_folder_zip_and_tar_are_one(tmp_path, kind, prefix):
    src = folder(tmp_path)
    if kind: src = archive(src, tmp_path / kind, prefix)
    with Source(src) as s:
        top = prefix if kind and prefix == "top/" else "./" if prefix == "./" and kind == "a.zip" else ""
        assert [n.removeprefix(top) for n in s.names] == ["a.png", "sub/b.png"] and len(s) == 2 and "2 files" in s._repr_html_()
        assert [s.read(n) for n in s.names] == [b"a.png", b"sub/b.png"]
        with pytest.raises(BadFile, match="c.png: is missing") as e: s.read("c.png")
        assert e.value.kind == "missing"
        with pytest.raises(BadFile): s.read("../src/a.png")


@pytest.mark.parametrize("src, error, word", [("nowhere", FileNotFoundError, "no such folder or archive"), ("/dev/null", ValueError, "neither a folder nor a file")])
def test_what_is_no_source(src, error, word):
    with pytest.raises(error, match=word): Source(src)


@pytest.mark.parametrize("where", ["/etc/passwd", "../outside", "/etc", ".."])
def test_links_out_of_a_folder_are_refused_and_links_inside_are_not(tmp_path, where):
    src = folder(tmp_path); (tmp_path / "outside").write_text("secret")
    (src / "inside.png").symlink_to("a.png")
    with Source(src) as s: assert s.read("inside.png") == b"a.png"
    (src / "sub/link.png").symlink_to(where if where[0] == "/" else Path("..") / where)
    with pytest.raises(ValueError, match="sub/link.png is a link that leads out"): Source(src)


def test_pipes_dangling_links_loops_and_locked_files(tmp_path):
    src = folder(tmp_path); os.mkfifo(src / "pipe.png"); (src / "loop").symlink_to("."); (src / "dangling.png").symlink_to("a2.png")
    with Source(src) as s: assert s.names == ["a.png", "sub/b.png"]
    with Source(src) as s:
        (src / "a.png").unlink()
        with pytest.raises(BadFile, match="a.png: cannot be read"): s.read("a.png")
    (src / os.fsdecode(b"b\xff.png")).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the file name 'b\\udcff.png' is not UTF-8.*rename"): Source(src)


def link(name): i = zipfile.ZipInfo(name); i.external_attr = (stat.S_IFLNK | 0o777) << 16; return i
HOSTILE = [("../benign/x.png", b"x", "leaves"), ("a/../../x", b"x", "leaves"), ("/etc/x", b"x", "leaves"), ("C:/x", b"x", "leaves"), ("..\\x", b"x", "leaves"), ("~/.bashrc", b"x", "leaves"), ("a\x1b[2Jb", b"x", "control characters"),
    (link("sub/link.png"), b"/etc/passwd", "link"), ("bomb", b"\0" * (8 << 20), "absurd"), ("a.png", b"x", "twice")]


@pytest.mark.parametrize("entry, data, word", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_zips_are_refused_whole(tmp_path, entry, data, word):
    path = archive(folder(tmp_path), tmp_path / "a.zip"); before = {p for p in tmp_path.rglob("*")}
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as z: z.writestr(entry, data)
    with pytest.raises(ValueError, match=f"a.zip: entry .* {word}"): Source(path)
    assert {p for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, "climbs", "absolute", "twice", "bomb"])
@pytest.mark.parametrize("end", ["tar", "tar.gz"])
def test_hostile_tars_are_refused_whole(tmp_path, kind, end):
    with tarfile.open(path := tmp_path / f"a.{end}", "w:gz" if end[-1] == "z" else "w") as t:
        i = tarfile.TarInfo({"climbs": "a/../../x", "absolute": "/etc/x"}.get(kind, "x.png")); data = bytes(8 << 20) if kind == "bomb" else b"x"
        if isinstance(kind, bytes): i.type, i.linkname, data = kind, "/etc/passwd", b""
        i.size = len(data)
        for _ in range(1 + (kind == "twice")): t.addfile(i, io.BytesIO(data))
    if kind == "bomb" and end == "tar": Source(path).__exit__(); return # it is as large as it says
    with pytest.raises(ValueError, match=rf"a.{end}: entry .* (leaves|is a link or a device|twice|absurd)"): Source(path)


def test_a_bomb_in_a_tar_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    with gzip.open(path := tmp_path / "a.tar.gz", "wb", 9) as f:
        i = tarfile.TarInfo("big.png"); i.size = 40 << 30
        f.write(i.tobuf()); f.write(bytes(1 << 20)) # claims 40 GB
    with pytest.raises(ValueError, match="absurd size"): Source(path)


@given(st.lists(st.sampled_from(["..", ".", "benign", "benign (1).png", "", "a", "c:", "~"]), min_size=1, max_size=5).filter(any), st.sampled_from(["zip", "tar"]))
@quick
def test_no_entry_escapes(tmp_path_factory, parts, kind):
    t = tmp_path_factory.mktemp("z"); name = "/".join(parts)
    if kind == "zip":
        with zipfile.ZipFile(t / "a.zip", "w") as z: z.writestr(name, b"x")
    else:
        with tarfile.open(t / "a.tar", "w") as z: i = tarfile.TarInfo(name); i.size = 1; z.addfile(i, io.BytesIO(b"x"))
    try:
        with Source(t / f"a.{kind}") as s: assert all((t / n).resolve().is_relative_to(t) for n in s._files)
        assert ".." not in parts and not name.startswith("/")
    except ValueError as e: assert "leaves" in str(e) and f"a.{kind}: entry" in str(e)


@given(st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 255)), min_size=1, max_size=12), st.floats(0.05, 1), st.sampled_from(["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"]))
@quick
def test_damaged_archives_never_crash(tmp_path_factory, flips, share, kind):
    t = tmp_path_factory.mktemp("d"); path = archive(folder(t), t / kind)
    data = bytearray(path.read_bytes()); data = data[:max(int(share * len(data)), 1)]
    for at, value in flips: data[at % len(data)] = value
    path.write_bytes(bytes(data))
    try:
        with Source(path) as s:
            for n in s.names:
                try: s.read(n)
                except BadFile as e: assert e.file == n
    except (ValueError, FileNotFoundError) as e: assert "a." in str(e)


# ---- the writing door

def rows(n=6, **columns): return [Row(dict(id=f"i{k}", label="ab"[k % 2], group=f"i{k}") | {c: v[k] for c, v in columns.items()}, lambda k=k: packed(grey(k)), lambda k=k: grey(k) > 128, f"i{k}.png") for k in range(n)]
def put(r, dest, **kw): return commit("tiny", r, dest, progress=False, **kw)


def test_a_set_is_written_loaded_and_verified(tmp_path, monkeypatch):
    m = put(rows(20), tmp_path / "tiny"); first = tree(m.root)
    assert first["images/i3.png"] == packed(grey(3)) and (np.asarray(Image.open(m.root / "masks/i3.png")) == (grey(3) > 128) * 255).all() and set(first) >= {"tiny.csv", "imported.json", "problems.csv"}
    assert (assign_splits(m.df, (.7, .1, .2), 0) == m.df.split).all()
    monkeypatch.setenv("HTLAB_DATA", str(tmp_path))
    assert Manifest.load("tiny").verify().data_hash == m.data_hash
    put(rows(20), tmp_path / "tiny"); assert tree(m.root) == first and os.listdir(tmp_path) == ["tiny"]


@pytest.mark.parametrize("kind, mode, suffix", [("png", "L", ".png"), ("png", "RGB", ".png"), ("jpeg", "L", ".jpg"), ("bmp", "L", ".bmp"), ("tiff", "L", ".png"), ("jpeg", "CMYK", ".png"), ("gif", "L", ".png"), ("png", "I;16", ".png")])
def test_what_every_reader_understands_keeps_its_bytes(tmp_path, kind, mode, suffix):
    im = Image.fromarray(grey().astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(grey()).convert(mode)
    im.save(out := io.BytesIO(), kind)
    m = put([Row(dict(id="a", label="x", group="a"), lambda: out.getvalue())], tmp_path / "t")
    assert m.df.image[0] == f"images/a{suffix}" and m.df["mask"][0] == "" and ((m.root / m.df.image[0]).read_bytes() == out.getvalue()) == (suffix != ".png" or kind == "png" and mode != "I;16")
    assert (read_image((m.root / m.df.image[0]).read_bytes()) == read_image(out.getvalue())).all()


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "a/b", "/etc/x", "C:x", "a\\b", "a b", "ä", "-x", ".x", "x" * 101, "a\nb", "a\x00b", "con?", "~"])
def test_an_id_that_cannot_be_a_file_name_is_refused_before_anything_is_written(tmp_path, bad):
    r = rows(3); r[1].columns["id"] = bad
    with pytest.raises(ValueError, match=r"tiny: i1.png would get the id .* cannot be a file name"): put(r, tmp_path / "d/t", allow_missing=True)
    assert not (tmp_path / "d").exists()
    r = rows(3); r[1].columns["id"] = "I0"
    with pytest.raises(ValueError, match=r"twice \(i0.png, i1.png\)"): put(r, tmp_path / "d/t")


def test_a_column_with_a_line_break_leaves_nothing(tmp_path):
    with pytest.raises(ManifestError, match="row 2 .*line break"): put(rows(3, note=["", "a\nb", ""]), tmp_path / "t")
    assert os.listdir(tmp_path) == []


def test_all_faults_are_told_at_once_and_only_absence_is_forgiven(tmp_path):
    def raising(e):
        def f(): raise e
        return f
    r = rows(6)
    r[1].image, r[2].image, r[3].mask = raising(BadFile("i1.png", "is missing", "missing")), lambda: packed(grey())[:200], lambda: np.ones((3, 3), bool)
    with pytest.raises(FileNotFoundError) as e: put(r, tmp_path / "t")
    assert all(w in str(e.value) for w in ("3 of 6 images", "i1.png (is missing)", "i2.png (is truncated", "its mask is 3 x 3 pixels, the image 30 x 20", "--allow-missing")) and "\n" not in str(e.value) and os.listdir(tmp_path) == []
    m = put(r, tmp_path / "t", allow_missing=True)
    assert list(m.df.id) == ["i0", "i4", "i5"] and sorted(p.name for p in (m.root / "images").iterdir()) == ["i0.png", "i4.png", "i5.png"]
    told = pd.read_csv(m.root / "problems.csv"); assert list(told.file) == ["i1.png", "i2.png", "i3.png"] and list(told.kind) == ["missing", "damaged", "damaged"]
    r[4].image = raising(BadFile("i4.png", "other bytes", "differs"))
    old = tree(m.root)
    with pytest.raises(ValueError, match=r"1 file not as published: i4.png \(other bytes\); also 3 of 6 images"): put(r, tmp_path / "t", allow_missing=True)
    assert tree(m.root) == old and os.listdir(tmp_path) == ["t"]
    for x in r: x.image = raising(BadFile("x", "is missing", "missing"))
    with pytest.raises(FileNotFoundError, match="6 of 6"): put(r, tmp_path / "t", allow_missing=True)
    with pytest.raises(FileNotFoundError, match="no image in it that tiny could use"): put([], tmp_path / "u", allow_missing=True)


def test_a_published_table_holds_bytes_and_masks(tmp_path):
    d = put(rows(6), tmp_path / "a").df
    table = Manifest(d, "tiny")
    assert put(rows(6), tmp_path / "b", table=table).data_hash == table.data_hash
    r = rows(6); r[2].image = lambda: packed(grey(9)); r[3].mask = lambda: np.zeros((20, 30), bool)
    with pytest.raises(ValueError, match=r"2 files not as published: i2.png \(other bytes than published.*i3.png \(its mask is empty"): put(r, tmp_path / "c", table=table, allow_missing=True)
    with pytest.raises(FileNotFoundError, match=r"1 of 6 images missing or damaged \(i5"): put(rows(5), tmp_path / "c", table=table)
    m = put(rows(5), tmp_path / "c", table=table, allow_missing=True)
    assert len(m) == 5 and m.total == 6
    with pytest.raises(FileNotFoundError, match=r"1 of 6"): put(rows(5), tmp_path / "e", table=table, problems=[BadFile("i5.png", "left out", "note")]) # a note is no excuse
    assert not (tmp_path / "e").exists()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.sampled_from(["", "", "train", "valid", "test"])), min_size=4, max_size=24))
@settings(max_examples=25, deadline=None)
def test_copies_come_together_and_an_official_test_split_is_never_added_to(tmp_path_factory, what):
    "what: which picture, which patient, which official side"
    t = tmp_path_factory.mktemp("c")
    r = [Row(dict(id=f"i{k}", label="x", group=f"g{g}", split=s), lambda p=p: packed(grey(p)), None, f"i{k}") for k, (p, g, s) in enumerate(what)]
    m = put(r, t / "t"); d = m.df.set_index("id")
    assert sorted(p.name for p in (m.root / "images").iterdir()) == sorted(Path(f).name for f in d.image), "no orphans"
    assert (d.groupby("sha256").group.nunique() == 1).all() and (d.groupby("group").split.nunique() == 1).all()
    official = {f"i{k}": s for k, (*_, s) in enumerate(what)}
    side = lambda s: {p for p, _, x in what if x == s}
    assert {i for i in official if official[i] == "test"} <= set(d.index[d.split.eq("test")]), "whoever was in the official test stays there"
    assert not {i for i in d.index if official[i] != "test" and what[int(i[1:])][0] in side("test")}, "copies of test images are gone"
    told = pd.read_csv(m.root / "problems.csv", keep_default_na=False)
    if "test" in official.values():
        moved = [i for i in d.index if d.split[i] == "test" and official[i] != "test"]
        assert bool(moved) == told.problem.str.startswith("moved").any() or not moved
    assert set(told.kind) <= {"note"}


def test_copies_of_test_images_do_not_enter_by_the_free_rows(tmp_path):
    r = [Row(dict(id=f"i{k}", label="x", group=f"i{k}", split="test" if k < 3 else ""), lambda k=k: packed(grey(k % 9)), None) for k in range(12)]
    m = put(r, tmp_path / "t")
    assert set(m.df.id[m.df.split.eq("test")]) == {"i0", "i1", "i2"} and not {"i9", "i10", "i11"} & set(m.df.id) and set(m.df.split) == {"train", "valid", "test"}


def test_a_folder_that_is_no_import_is_never_replaced(tmp_path):
    (tmp_path / "t").mkdir(); (tmp_path / "t/thesis.txt").write_text("do not delete"); (tmp_path / "t.old").mkdir(); (tmp_path / "t.old/mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="other files"): put(rows(), tmp_path / "t")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError): put(rows(), tmp_path / "file")
    put(rows(), tmp_path / "u"); put(rows(), tmp_path / "u")
    assert tree(tmp_path / "t") == {"thesis.txt": b"do not delete"} and sorted(os.listdir(tmp_path)) == ["file", "t", "t.old", "u"] and (tmp_path / "t.old/mine.txt").exists()


def test_two_imports_at_once_are_one_clear_line(tmp_path):
    r = rows(); errors = []
    def nested():
        try: put(rows(), tmp_path / "t")
        except OSError as e: errors.append(str(e))
        return packed(grey())
    r[0].image = nested; put(r, tmp_path / "t")
    assert len(errors) == 1 and "another import into" in errors[0] and os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError, lambda: OSError(errno.EIO, "Input/output error")])
def test_whatever_interrupts_leaves_the_old_state(tmp_path, before, error):
    if before: put(rows(4), tmp_path / "t")
    old = tree(tmp_path / "t"); r = rows()
    def stop(): raise error()
    r[3].image = stop
    with pytest.raises((KeyboardInterrupt, MemoryError, RuntimeError, OSError)): put(r, tmp_path / "t")
    assert tree(tmp_path / "t") == old and os.listdir(tmp_path) == ["t"] * before


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", range(8))
def test_full_disk_at_any_moment_keeps_the_old_state(tmp_path, monkeypatch, before, at):
    if before: put(rows(2), tmp_path / "t")
    old, count = tree(tmp_path / "t"), [0]
    def full(original):
        def f(*a, **k):
            count[0] += 1
            if count[0] > at: raise OSError(errno.ENOSPC, "No space left on device")
            return original(*a, **k)
        return f
    for owner, name in [(Path, "write_bytes"), (Path, "write_text"), (pd.DataFrame, "to_csv")]: monkeypatch.setattr(owner, name, full(getattr(owner, name)))
    with pytest.raises(OSError) as e: put(rows(3), tmp_path / "t")
    monkeypatch.undo()
    assert e.value.errno == errno.ENOSPC and "nothing was kept" in str(e.value) and tree(tmp_path / "t") == old and os.listdir(tmp_path) == ["t"] * before


def test_full_tmpfs(tmp_path):
    disk = tmp_path / "disk"; disk.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("needs the right to mount")
    try:
        with pytest.raises(OSError, match="no space left"): put(rows(30), disk / "t")
        assert os.listdir(disk) == []
    finally: subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("at", range(6))
def test_a_killed_import_leaves_nothing_half_written(tmp_path, at):
    dest = tmp_path / "t"; put(rows(3), dest); old = tree(dest)
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(REPO / 'tests')!r})
from test_source import put, rows
count, name = [0], {'rename' if at < 2 else 'write_bytes'!r}
def dying(original):
    def f(*a):
        count[0] += 1
        if count[0] > {at if at < 2 else at - 2}: os.kill(os.getpid(), signal.SIGKILL)
        return original(*a)
    return f
setattr(Path, name, dying(getattr(Path, name)))
put(rows(5), Path({str(dest)!r}))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPO).returncode == -9
    assert tree(dest) in (old, None) # None: between the two renames; the old import then lies beside it, whole
    if not dest.exists(): assert tree(dest.with_name(".t.old")) == old
    r = rows(3); r[0].image = lambda: b"x"
    with pytest.raises(FileNotFoundError): put(r, dest)
    assert tree(dest) == old and os.listdir(tmp_path) == ["t"] # the next import, even a failing one, puts all in order


def test_it_says_what_it_did(tmp_path, capsys):
    commit("tiny", rows(4), tmp_path / "t", [BadFile("x.png", "an odd thing", "note")], unknown=["z.txt"])
    out = capsys.readouterr().out
    assert "4 images" in out and "a 2, b 2" in out and "complete" in out and "note: x.png: an odd thing" in out and "ignored 1 file unknown" in out and "z.txt" in out


def test_source_needs_no_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, htlab.source; assert not {'torch', 'nibabel', 'scipy'} & set(sys.modules)"], cwd=REPO).returncode == 0


@pytest.mark.parametrize("claimed", [100, 5_000_000])
def test_a_zip_whose_directory_lies_costs_no_memory(tmp_path, claimed):
    import struct, tracemalloc
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("x.png", bytes(200 << 20))
    raw = bytearray((tmp_path / "a.zip").read_bytes()); at = raw.rindex(b"PK\1\2"); raw[at + 24:at + 28] = struct.pack("<I", claimed)
    (tmp_path / "a.zip").write_bytes(bytes(raw))
    with Source(tmp_path / "a.zip") as s:
        tracemalloc.start()
        with pytest.raises(BadFile, match="x.png"): s.read("x.png")
        assert tracemalloc.get_traced_memory()[1] < 40 << 20; tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_inflate_in_one_go_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as z: z.writestr("x.png", b"x" * 1000)
    with Source(tmp_path / "a.zip") as s, pytest.raises(BadFile, match="ordinary zip"): s.read("x.png")


def test_an_empty_mask_of_another_size_is_refused_too(tmp_path):
    rows = [Row(dict(id=f"i{k}", label="a", group=f"i{k}"), lambda: grey(), lambda: np.zeros((20, 31), bool), f"i{k}.png", mask_file="m.png") for k in range(3)]
    with pytest.raises((ValueError, FileNotFoundError), match="its mask m.png is 31 x 20 pixels, the image 30 x 20"): commit("x", rows, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
