"Laws of embeddings: they are what the tower gives, are found by content, and are believed only when they are whole."
import copy, multiprocessing, os, shutil, signal, time
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from open_clip.transformer import VisionTransformer
from safetensors.numpy import save_file

from htlab import store as S
from htlab.backbone import Backbone, load_backbone
from htlab.dataset import ImageSet
from htlab.embed import Embeddings, block_features, embed_images, embed_patches, embed_texts, tower_key
from htlab.inject import adapt, adapters, disabled, merge, restore
from htlab.manifest import Manifest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/stores"


def vit(size=(32, 32), **kw): return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=0, **kw)

BUILD = {"cls": vit, "wide": lambda: vit((40, 56)), "registers": lambda: vit((56, 32), reg_tokens=4), "no-prefix": lambda: vit(class_token=False, global_pool="avg"),
         "open_clip": lambda: VisionTransformer((48, 48), 8, 24, 3, 2, 2., output_dim=10), "open_clip-wide": lambda: VisionTransformer((32, 48), 8, 24, 3, 2, 2., output_dim=10)}
MADE = {}

def tower(name="cls"):
    "A fresh copy of a small frozen tower."
    if name not in MADE:
        torch.manual_seed(0)
        MADE[name] = Backbone(timm.create_model("resnet10t", num_classes=0) if name == "resnet" else BUILD[name](), f"toy-{name}")
    return copy.deepcopy(MADE[name])

every = pytest.mark.parametrize("name", BUILD)
laws = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

class Pictures:
    "Random images and masks; it counts how often one is asked for."
    def __init__(self, size, n=5, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.x, self.mask = torch.rand(n, 3, *size, generator=g), (torch.rand(n, *size, generator=g) < .3).long()
        self.rows = [dict(id=f"n{i}", label="ab"[i % 2], spacing_mm=float("nan") if i else .1, ok=bool(i % 2)) for i in range(n)]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return dict(image=self.x[i], mask=self.mask[i])

class Part:
    def __init__(self, of, at): self.of, self.at, self.rows = of, list(at), [of.rows[i] for i in at]
    def __len__(self): return len(self.at)
    def __getitem__(self, i): return self.of[self.at[i]]

def asked(b, f):
    "How many images go through the tower while f runs, the blank one left out; and what f gives."
    n = []
    hook = b.blocks[0].register_forward_hook(lambda m, x, y: n.append(len(x[0])))
    try: out = f()
    finally: hook.remove()
    return sum(n) - 1, out

def quiet(f, *a, **kw): return f(*a, progress=False, **kw)


# what is computed

@every
@pytest.mark.parametrize("kept", [False, True])
def test_they_are_what_the_tower_gives(name, kept):
    b = tower(name); data = Pictures(b.size, 7)
    with torch.no_grad():
        want, maps = b.embed_image(data.x), b.features(data.x, [1])[0].permute(0, 2, 3, 1)
        blocks = torch.stack([m.flatten(2).mean(2) for m in b.features(data.x, [0, 1, 2])])
    for _ in range(2):
        e = quiet(embed_images, b, data, cache=kept, batch_size=3)
        assert np.allclose(e.vectors, want, atol=1e-5) and e.vectors.dtype == np.float32 and list(e.rows.id) == [r["id"] for r in data.rows] and np.allclose((e.vectors ** 2).sum(1), 1, atol=1e-5)
        p = quiet(embed_patches, b, data, block=1, cache=kept, batch_size=3)
        assert np.allclose(p.vectors, maps.reshape(-1, b.width), atol=1e-4) and len(p) == 7 * b.grid[0] * b.grid[1]
        assert np.allclose(quiet(block_features, b, data, cache=kept, batch_size=3), blocks, atol=1e-4)


@every
def test_the_prefix_token_is_the_first(name):
    b = tower(name); data = Pictures(b.size)
    if not b.prefix:
        with pytest.raises(ValueError, match="no prefix token"): quiet(block_features, b, data, "prefix")
        return
    seen = []
    hook = b.blocks[2].register_forward_hook(lambda m, x, y: seen.append(y))
    with torch.no_grad(): b.features(data.x, [2])
    hook.remove()
    assert np.allclose(quiet(block_features, b, data, "prefix")[2], seen[0][:, 0], atol=1e-5)
    assert not any(m._forward_hooks for m in b.modules())


def test_a_resnet_has_images_and_patches_but_no_stack_of_blocks():
    b = tower("resnet"); data = Pictures(b.size, 3)
    assert quiet(embed_images, b, data).vectors.shape == (3, b.embed_dim)
    for tap in (2, 4):
        p = quiet(embed_patches, b, data, block=tap)
        assert p.vectors.shape[1] == b.widths[tap] and len(p) == 3 * (b.size[0] // 2 ** (tap + 1)) ** 2
    with pytest.raises(ValueError, match="stages of widths"): quiet(block_features, b, data)


@every
def test_every_patch_knows_its_place_and_its_share_of_the_lesion(name):
    b = tower(name); data = Pictures(b.size)
    p, (h, w) = quiet(embed_patches, b, data), b.grid
    share = data.mask.reshape(5, h, 8, w, 8).float().mean((2, 4)).numpy()
    assert np.allclose(p.rows.inside, share[p.rows.case, p.rows.row, p.rows.col], atol=1e-6) and (p.rows.id == "n" + p.rows.case.astype(str)).all()


@laws
@given(st.integers(1, 16), st.integers(0, 3))
def test_drawn_patches_are_some_of_all_and_do_not_depend_on_the_others(k, seed):
    b = tower(); data = Pictures(b.size)
    every, some = quiet(embed_patches, b, data), quiet(embed_patches, b, data, per_image=k, seed=seed)
    assert (some.rows.groupby("case").size() == k).all()
    where = (some.rows.case * 16 + some.rows.row * 4 + some.rows.col).to_numpy()
    assert len(set(where)) == len(where) and np.allclose(some.vectors, every.vectors[where], atol=1e-5)
    assert quiet(embed_patches, b, Part(data, [0, 1]), per_image=k, seed=seed).rows.equals(some.rows[some.rows.case < 2])


def test_sentences_lie_where_the_text_tower_puts_them():
    b = load_backbone("tiny")
    e = embed_texts(b, {"one": ["a lesion", "a mass"], "two": ["a nodule"]})
    assert np.allclose(e.vectors, b.embed_text(["a lesion", "a mass", "a nodule"]), atol=1e-6) and list(e.rows.label) == ["one", "one", "two"] and e.kind == "text"
    with pytest.raises(ValueError, match="no text tower"): embed_texts(tower(), {"one": ["a lesion"]})


def test_mode_gradient_and_modules_stay_as_they_were():
    b = adapt(tower(), "mona", bottleneck=8); b.train(); data = Pictures(b.size)
    b.blocks[1].adapter.dropout.eval()
    was = [m.training for m in b.modules()]
    one, two = quiet(embed_images, b, data, cache=False), quiet(embed_images, b, data, cache=False)
    assert [m.training for m in b.modules()] == was and any(was) and np.array_equal(one.vectors, two.vectors)     # no dropout inside
    class Broken(Pictures):
        def __getitem__(self, i): raise RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"): quiet(embed_images, b, Broken(b.size))
    assert [m.training for m in b.modules()] == was and torch.is_grad_enabled() and all(p.grad is None for p in b.parameters())


# the key

def towers():
    "Ten towers with one base, each of which computes something else."
    yield tower()
    for op in ("mona", "hybrid", "gain", "ring"):
        torch.manual_seed(0); b = adapt(tower(), op, bottleneck=8, init="reference")
        with torch.no_grad(): [p.add_(.2 * torch.randn_like(p)) for p in b.blocks[0].adapter.parameters()]
        yield b
    for how in ("lora", "rslora"):
        b = tower(); torch.manual_seed(0); adapt(b, how, rank=4)
        for n, p in b.named_parameters():
            if "lora_B" in n: torch.nn.init.constant_(p, .1)
        yield b
    for how in ("last-1", "full"):
        b = adapt(tower(), how)
        with torch.no_grad(): (b.blocks[-1].mlp.fc2 if how == "last-1" else b.tower.patch_embed.proj).weight.mul_(1.5)
        yield b
    b = tower()
    with torch.no_grad(): b.tower.pos_embed.mul_(9)
    yield b


def test_what_computes_otherwise_has_another_key_and_what_computes_alike_the_same():
    made, x = list(towers()), Pictures((32, 32)).x
    with torch.no_grad(): out = [b.embed_image(x) for b in made]
    keys = [tower_key(b) for b in made]
    for (i, a), (j, b) in combinations(enumerate(out), 2): assert not torch.allclose(a, b, atol=1e-5) and keys[i] != keys[j], (i, j)
    for b, k in zip(made, keys):
        assert tower_key(copy.deepcopy(b)) == k == tower_key(b.train())
        with disabled(b):
            if b is not made[-1]: assert tower_key(b) == keys[0]
        assert tower_key(b) == k
        if b is not made[-1]: assert tower_key(restore(b)) == keys[0]
    learned = list(towers())[8]; k = tower_key(learned); merge(learned)
    assert tower_key(learned) == k                                             # merged into the tower, it computes the same


def test_preprocessing_is_part_of_the_key():
    keys = {tower_key(Backbone(copy.deepcopy(MADE["cls"].model if "cls" in MADE else tower().model), "toy", **kw)) for kw in ({}, dict(mean=0), dict(std=(.5, .5, .4)))}
    assert len(keys) == 3 and tower_key(tower("wide")) not in keys


def test_adapted_and_plain_never_mix(cache):
    b = tower(); data = Pictures(b.size)
    plain = quiet(embed_images, b, data)
    torch.manual_seed(0); adapt(b, "hybrid", bottleneck=8, init="reference")
    n, on = asked(b, lambda: quiet(embed_images, b, data))
    assert n == 5 and not np.allclose(on.vectors, plain.vectors, atol=1e-3) and on.model == "toy-cls + hybrid" and plain.model == "toy-cls"
    with disabled(b):
        off = quiet(embed_images, b, data)
        assert off.key == plain.key
    with torch.no_grad(): adapters(b)[0].up.bias += .1
    assert not np.allclose(quiet(embed_images, b, data).vectors, on.vectors, atol=1e-4)


# what is kept

@laws
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=10), min_size=1, max_size=4))
def test_each_image_is_computed_once_in_whatever_order(parts):
    S.clear()
    b = tower(); data, seen = Pictures(b.size, 8), set()
    whole = quiet(embed_images, b, data, cache=False).vectors
    for at in parts:
        n, e = asked(b, lambda: quiet(embed_images, b, Part(data, at), batch_size=3))
        assert n == len(set(at) - seen) and np.allclose(e.vectors, whole[at], atol=1e-5) and [r["id"] for r in Part(data, at).rows] == list(e.rows.id)
        seen |= set(at)


def test_grey_images_are_known_by_their_grey_values():
    b = load_backbone("tiny", text=False)
    m = Manifest.load("phantom").split("test")
    data = ImageSet(Manifest(m.df.iloc[:6], "phantom", m.root), b.size, progress=False)
    whole = quiet(embed_images, b, data)
    n, items = asked(b, lambda: quiet(embed_images, b, [data[i] for i in range(6)]))
    assert n == 0 and np.array_equal(items.vectors, whole.vectors) and set(m.df) == set(whole.rows) and len(quiet(embed_images, b, [data[0], data[0]])) == 2


@pytest.mark.parametrize("harm", ["cut", "scribble", "index", "gone"])
def test_a_damaged_cache_is_noticed_and_made_anew(cache, harm):
    b = tower(); data = Pictures(b.size, 40)
    was = quiet(embed_images, b, data)
    (file,) = cache.glob("embed-*.u8")
    raw = file.read_bytes()
    if harm == "cut": file.write_bytes(raw[:1000])
    if harm == "scribble": file.write_bytes(raw[:1301] + bytes([raw[1301] ^ 255]) + raw[1302:])      # one byte of row 13, which no spread of sixteen need meet
    if harm == "index": file.with_suffix(".json").write_text('{"a": ')
    if harm == "gone": file.unlink()
    with pytest.warns(UserWarning, match="anew"): n, again = asked(b, lambda: quiet(embed_images, b, data))
    assert n == 40 and np.allclose(again.vectors, was.vectors, atol=1e-6)
    assert asked(b, lambda: quiet(embed_images, b, data))[0] == 0


def test_a_full_disk_ends_in_one_line_and_hurts_nothing(cache, monkeypatch):
    b = tower(); data = Pictures(b.size)
    was = quiet(embed_images, b, Part(data, [0, 1]))
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda p: type("", (), dict(free=10)))
        with pytest.raises(OSError, match="free some space") as e: quiet(embed_images, b, data)
        assert "\n" not in str(e.value)
        assert np.array_equal(quiet(embed_images, b, Part(data, [1])).vectors, was.vectors[1:])
        assert len(quiet(embed_images, b, data, cache=False)) == 5
    n, e = asked(b, lambda: quiet(embed_images, b, data))
    assert n == 3 and np.array_equal(e.vectors[:2], was.vectors)


def work(tell, slow):
    torch.set_num_threads(1)
    b = tower(); data, real = Pictures(b.size, 700), b.embed_image
    def embed(x): time.sleep(slow); tell.send(len(x)); return real(x)
    b.embed_image = embed
    quiet(embed_images, b, data, batch_size=16)
    tell.send("done")

def start(slow=0.):
    "A process of its own that embeds 700 images and tells of every batch."
    tower()
    here, there = fork.Pipe(duplex=False)
    p = fork.Process(target=work, args=(there, slow)); p.start(); there.close()
    return p, here

fork = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
forks = pytest.mark.skipif(fork is None, reason="no fork on this system")

@forks
def test_what_was_done_before_a_kill_is_found_again(cache):
    p, here = start(.02)
    for _ in range(25): here.recv()          # a blank one, then 24 batches of 16: in the second portion of 256
    os.kill(p.pid, signal.SIGKILL); p.join()
    b = tower(); data = Pictures(b.size, 700)
    want = quiet(embed_images, b, data, cache=False).vectors
    n, e = asked(b, lambda: quiet(embed_images, b, data))
    assert n == 700 - 256 and np.allclose(e.vectors, want, atol=1e-5)


@forks
def test_two_processes_at_once_compute_no_image_twice(cache):
    two, told = [start(.005), start(.005)], []
    for p, here in two:
        while (x := here.recv()) != "done": told.append(x)
        p.join()
    b = tower(); data = Pictures(b.size, 700)
    n, e = asked(b, lambda: quiet(embed_images, b, data))
    assert n == 0 and sum(told) == 700 + 2 and S.stores().images.sum() == 700 and np.allclose(e.vectors, quiet(embed_images, b, data, cache=False).vectors, atol=1e-5)


# the object

@laws
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_save_and_load_give_the_same(tmp_path, n, width, seed):
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(dict(id=[f"é{i}" for i in range(n)], x=rng.normal(size=n), k=range(n), hole=[np.nan if i % 2 else .1 for i in range(n)], yes=rng.random(n) < .5))
    e = Embeddings(rng.normal(size=(n, width)), rows, "image", "toy")
    back = Embeddings.load(e.save(tmp_path / "e.safetensors"))
    assert back.key == e.key and back.rows.equals(e.rows) and np.array_equal(back.vectors, e.vectors) and back.kind == "image" and back.model == "toy" and not list(tmp_path.glob(".*"))
    keep = rng.random(n) < .5
    part = e.where(keep)
    assert np.array_equal(part.vectors, e.vectors[keep]) and list(part.rows.id) == list(rows.id[keep]) and list(part.rows.index) == list(range(keep.sum()))
    assert e.where(np.flatnonzero(keep)).key == part.key and (part.key == e.key) == keep.all()
    assert "Embeddings" in e._repr_html_() and "<script" not in Embeddings(e.vectors, rows.assign(label="<script>"), "image", "<script>")._repr_html_()


def test_another_file_is_refused(tmp_path):
    e, path = Embeddings(np.ones((4, 3)), pd.DataFrame({"id": list("abcd")}), "image", "toy"), tmp_path / "e.safetensors"
    raw = e.save(path).read_bytes()
    for at in range(len(raw) - 60, len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
        with pytest.raises(ValueError, match="compute them again"): Embeddings.load(path)
    for bad in (raw[:-1], b"", b"{}"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="compute them again"): Embeddings.load(path)
    save_file({"vectors": np.ones((2, 2), np.float32), "rows": np.ones(2, np.uint8)}, path)
    with pytest.raises(ValueError, match="another format"): Embeddings.load(path)
    with pytest.raises(FileNotFoundError): Embeddings.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("message, f", {
    "augments": lambda b, d: quiet(embed_images, b, type("A", (Pictures,), dict(augment=True))(b.size)),
    "is empty": lambda b, d: quiet(embed_images, b, Part(d, [])),
    "HTLAB_CACHE": lambda b, d: quiet(embed_images, b, d, cache="/somewhere"),
    "batch_size=0": lambda b, d: quiet(embed_images, b, d, batch_size=0),
    "block=3": lambda b, d: quiet(embed_patches, b, d, block=3),
    "per_image=17": lambda b, d: quiet(embed_patches, b, d, per_image=17),
    "per_image=0": lambda b, d: quiet(embed_patches, b, d, per_image=0),
    "pool='max'": lambda b, d: quiet(block_features, b, d, "max"),
    "kind='audio'": lambda b, d: Embeddings(np.ones((1, 2)), pd.DataFrame({"id": ["a"]}), "audio", "toy"),
    "1 rows that are not finite": lambda b, d: Embeddings([[1, np.nan], [1, 1]], pd.DataFrame({"id": list("ab")}), "image", "toy"),
    "2 vectors but 1 rows": lambda b, d: Embeddings(np.ones((2, 2)), pd.DataFrame({"id": ["a"]}), "image", "toy"),
    "mask has shape": lambda b, d: Embeddings(np.ones((2, 2)), pd.DataFrame({"id": list("ab")}), "image", "toy").where([True])}.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_ends_in_one_line(message, f):
    b = tower()
    with pytest.raises(ValueError, match=message) as e: f(b, Pictures(b.size))
    assert "\n" not in str(e.value)


def test_weights_that_give_no_number_are_named_and_not_kept(cache):
    b = tower()
    with torch.no_grad(): b.tower.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="image 0 .* not finite"): quiet(embed_images, b, Pictures(b.size))
    assert S.stores().images.sum() == 0
