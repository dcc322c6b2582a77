"Laws of the store: it gives what the plain route gives, is found by content, and is whole after every accident."
import errno, json, os, pickle, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from htlab import store as S
from htlab.manifest import Manifest, ManifestError, measure
from htlab.store import clear, fit_box, keep, letterbox, open_store, read_grey, read_mask, stores

REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/stores"


@pytest.fixture
def files(tmp_path):
    "Nine files of several sizes and modes; every third has no mask"
    rng, rows = np.random.default_rng(0), []
    for d in ("images", "masks"): (tmp_path / d).mkdir()
    for i in range(9):
        h, w = rng.integers(30, 90, 2)
        a = rng.integers(0, 256, (h, w, 3), np.uint8)
        Image.fromarray(a if i % 2 else a[..., 0]).save(tmp_path / f"images/{i}.png")
        if i % 3: Image.fromarray((rng.random((h, w)) < .4).astype(np.uint8) * 255).save(tmp_path / f"masks/{i}.png")
        rows.append(dict(id=f"n{i}", image=f"images/{i}.png", mask=f"masks/{i}.png" if i % 3 else "", label="ab"[i % 2], group=f"n{i}", split="train"))
    return Manifest(measure(pd.DataFrame(rows), tmp_path), "nine", tmp_path)


def plain(m, i, size, interpolation="bicubic"): # PIL alone
    r = m.df.iloc[i]; im = Image.open(m.root / r["image"]).convert("L")
    top, left, h, w = fit_box(im.height, im.width, size)
    out = np.zeros((2, *size), np.uint8)
    out[0, top:top + h, left:left + w] = im.resize((w, h), Image.Resampling[interpolation.upper()])
    if r["mask"]: out[1, top:top + h, left:left + w] = np.asarray(Image.open(m.root / r["mask"]).resize((w, h), Image.Resampling.NEAREST)) > 127
    return out


def part(m, rows): return Manifest(m.df.iloc[rows], m.name, m.root)
def no_decoding(monkeypatch): monkeypatch.setattr(S, "letterbox", lambda *a: pytest.fail("decoded again"))


@pytest.mark.parametrize("size", [32, (24, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_it_gives_what_pil_gives(files, size, interpolation):
    s = open_store(files, size, interpolation, progress=False); s.verify()
    shape = (size, size) if isinstance(size, int) else size
    for i in range(9): assert np.array_equal(s[i], plain(files, i, shape, interpolation))
    assert s[[3, 1]].shape == (2, 2, *shape) and np.array_equal(s[[3, 1]][1], s[1]) and len(s) == 9 and s.nbytes == 9 * 2 * np.prod(shape) and not s[0].flags.writeable


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_in_any_order_finds_or_adds_its_rows(files, parts):
    clear()
    for rows in parts:
        s = open_store(part(files, rows), 24, progress=False)
        assert all(np.array_equal(s[k], plain(files, i, (24, 24))) for k, i in enumerate(rows))
    assert int(stores().images[0]) == len({i for rows in parts for i in rows})


def test_what_is_there_is_not_decoded_and_what_changed_is(files, monkeypatch):
    old = open_store(files, 24, progress=False)
    with monkeypatch.context() as m: no_decoding(m); open_store(part(files, [8, 0, 4]), 24, progress=False)
    Image.fromarray(255 - np.asarray(Image.open(files.root / "masks/4.png"))).save(files.root / "masks/4.png")
    with pytest.raises(ManifestError, match="'n4'.*field 'mask'.*other bytes"): open_store(files, 24, progress=False)
    again = Manifest(measure(files.df, files.root), files.name, files.root)
    s = open_store(again, 24, progress=False)
    assert np.array_equal(s[4], plain(again, 4, (24, 24))) and not np.array_equal(s[4], old[4]) and int(stores().images[0]) == 10


def test_a_file_that_keeps_its_size_and_time_is_still_seen_through_ctime(files):
    open_store(files, 24, progress=False)
    p = files.root / "images/2.png"; raw, s = bytearray(p.read_bytes()), os.stat(p)
    raw[-20] ^= 1; p.write_bytes(bytes(raw)); os.utime(p, ns=(s.st_atime_ns, s.st_mtime_ns))
    with pytest.raises(ManifestError, match="'n2'"): open_store(files, 24, progress=False)


@pytest.mark.parametrize("harm, word", [
    (lambda p, j: p.write_bytes(p.read_bytes()[:-1]), "ends before row"), (lambda p, j: p.write_bytes(b""), "empty|mmap"),
    (lambda p, j: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]), "not those that were stored"),
    (lambda p, j: j.write_text("{"), "Expecting"), (lambda p, j: j.write_text("[]"), "no table of keys"), (lambda p, j: j.write_text('{"a": 1}'), "."), (lambda p, j: p.unlink(), "No such file")])
def test_a_damaged_store_is_made_anew_and_said_so(files, harm, word):
    s = open_store(files, 24, progress=False); want = np.array(s[list(range(9))]); path = s.path; del s
    harm(path, path.with_suffix(".json"))
    with pytest.warns(UserWarning, match=f"damaged and is made anew: .*({word})"): again = open_store(files, 24, progress=False)
    again.verify(); assert np.array_equal(again[list(range(9))], want)


def test_without_its_index_a_file_is_begun_anew(files):
    path = open_store(files, 24, progress=False).path; path.with_suffix(".json").unlink()
    s = open_store(files, 24, progress=False); s.verify()
    assert np.array_equal(s[8], plain(files, 8, (24, 24))) and path.stat().st_size == s.nbytes


def rows_of(n, size=8): return [np.full((2, size, size), i, np.uint8) for i in range(n)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError("row 5 is bad")])
def test_what_is_finished_is_kept_when_it_is_interrupted(error):
    def make(missing):
        for i in missing:
            if i == 5 and error: raise error
            yield rows_of(9)[i]
    keys = [f"k{i}" for i in range(9)]
    with pytest.raises(type(error) if isinstance(error, Exception) else error): keep("x", (8, 8), keys, make, progress=False)
    assert int(stores().images[0]) == 5
    seen = []
    s = keep("x", (8, 8), keys, lambda missing: (seen.append(i) or rows_of(9)[i] for i in missing), progress=False)
    assert seen == [5, 6, 7, 8] and [int(s[i][0, 0, 0]) for i in range(9)] == list(range(9)); s.verify()


@pytest.mark.parametrize("have", [0, 3])
@pytest.mark.parametrize("at", ["space", "write", "index"])
def test_a_full_disk_keeps_what_was_finished(monkeypatch, have, at):
    keys, make = [f"k{i}" for i in range(9)], lambda missing: (rows_of(9)[i] for i in missing)
    if have: keep("x", (8, 8), keys[:have], make, progress=False)
    full = OSError(errno.ENOSPC, "No space left on device")
    def fails(*a, **k): raise full
    def writes(missing):
        yield rows_of(9)[missing[0]]
        raise full
    with monkeypatch.context() as m:
        if at == "space": m.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(1, 1, 0))
        if at == "index": m.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="No space left.*free some space.*HTLAB_CACHE") as e: keep("x", (8, 8), keys, writes if at == "write" else make, progress=False)
    assert e.value.errno == errno.ENOSPC and stores().images.sum() == have + (at == "write")  # one more was finished
    s = keep("x", (8, 8), keys, make, progress=False); s.verify(); assert len(s) == 9


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_killed_build_goes_on_or_begins_anew(files, at):
    files.df.to_csv(files.root / "nine.csv", index=False)
    code = f"""
import os, signal
from htlab import store as S
from htlab.manifest import Manifest
count, real = [0], S._sum
def dying(p):
    count[0] += 1
    if count[0] > {at}: os.kill(os.getpid(), signal.SIGKILL)
    return real(p)
S._sum = dying
S.open_store(Manifest.load({str(files.root / 'nine.csv')!r}), 24, progress=False)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True).returncode == -signal.SIGKILL
    s = open_store(files, 24, progress=False); s.verify()
    assert all(np.array_equal(s[i], plain(files, i, (24, 24))) for i in range(9)) and not list(s.path.parent.glob(".*.partial"))


def test_two_processes_build_one_store(files):
    files.df.to_csv(files.root / "nine.csv", index=False)
    code = f"from htlab.store import open_store; from htlab.manifest import Manifest; s = open_store(Manifest.load({str(files.root / 'nine.csv')!r}), 24, progress=False); s.verify(); print(len(s), s.path.stat().st_size)"
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {p.communicate(timeout=120)[0] for p in both} == {f"9 {9 * 2 * 24 * 24}\n"}


def test_a_worker_gets_the_file_and_not_its_bytes(files):
    s = open_store(files, 24, progress=False); sent = pickle.dumps(s)
    assert len(sent) < 3000 and np.array_equal(pickle.loads(sent)[7], s[7])
    s.path.rename(s.path.with_suffix(".moved"))
    with pytest.raises(FileNotFoundError, match="open it again"): pickle.loads(sent)


def test_stores_are_listed_and_cleared(files):
    open_store(files, 24, progress=False); open_store(files, 32, progress=False); keep("other", (8, 8), ["k"], lambda m: iter(rows_of(1)), progress=False)
    assert list(stores().images) == [9, 9, 1] and stores().megabytes.is_monotonic_decreasing
    with pytest.raises(ValueError, match="no store 'nin-x'; there are: nine"): clear("nin-x")
    clear("nine"); assert list(stores().images) == [1]
    clear(); assert stores().empty and clear() == 0 and len(open_store(files, 24, progress=False)) == 9


@pytest.mark.parametrize("call, error, words", [
    (lambda m: open_store(m, 24, "cubic"), ValueError, "interpolation must be 'bicubic' or 'bilinear'"),
    (lambda m: ((m.root / "images/3.png").unlink(), open_store(m, 24)), FileNotFoundError, "n3: image .*3.png is missing: import the data set again"),
    (lambda m: read_grey(m.root, {"id": "n3", "image": "images/gone.png"}), FileNotFoundError, "n3: image .*gone.png is missing"),
    (lambda m: read_grey(m.root, {"id": "n3", "image": "images/3.png"}, digest="0" * 64), ValueError, "n3: image .* changed while it was being read"),
    (lambda m: read_mask(m.root, {"id": "n4", "mask": "masks/4.png"}, (5, 6)), ValueError, "n4: mask masks/4.png is .* but the image is 6 x 5")])
def test_mistakes_are_named(files, call, error, words):
    with pytest.raises(error, match=words): call(files)


def test_store_needs_no_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, htlab.store; assert 'torch' not in sys.modules"], cwd=REPO).returncode == 0
