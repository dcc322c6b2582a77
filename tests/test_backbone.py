"""Laws of 04_backbone: what goes in is normalised once, what comes out is the tower's own, and nothing loads by halves."""
import json
import socket
from copy import deepcopy

import open_clip
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import nn

from htlab.backbone import ASSET, Backbone, build_tiny, load_backbone, save_tiny, tiny_tokenizer, tiny_vocab

TIMM = ["test_vit", "test_vit3", "test_vit_relpos", "vit_tiny_patch16_224"]  # CLS and average, attention pooling, no prefix token, the usual
CLIP_CFG = dict(embed_dim=24, quick_gelu=True, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16),
                text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))
TRUNK_CFG = dict(embed_dim=24, vision_cfg=dict(image_size=160, timm_model_name="test_vit", timm_pool="", timm_proj="linear"), text_cfg=CLIP_CFG["text_cfg"])
PRE = dict(mean=[.1, .2, .3], std=[.4, .5, .6], interpolation="bilinear")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Untrained models in the formats in which real ones are published."
    d = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    clip = CLIP(**deepcopy(CLIP_CFG)).eval()
    for name, cfg, model in (("clip", CLIP_CFG, clip), ("trunk", TRUNK_CFG, CLIP(**deepcopy(TRUNK_CFG)).eval())):
        (d / name).mkdir()
        (d / name / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=PRE)))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, d / name / "open_clip_model.safetensors")
    (d / "clip_bin").mkdir()
    (d / "clip_bin" / "open_clip_config.json").write_text((d / "clip" / "open_clip_config.json").read_text())
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}, "epoch": 3}, d / "clip_bin" / "open_clip_pytorch_model.bin")
    vit = timm.create_model("test_vit").eval()
    (d / "vit").mkdir()
    (d / "vit" / "config.json").write_text(json.dumps(dict(architecture="test_vit", num_classes=1000, pretrained_cfg=PRE | dict(input_size=[3, 160, 160], classifier="head"))))
    save_file(vit.state_dict(), d / "vit" / "model.safetensors")
    save_file({k: v.half() for k, v in vit.state_dict().items()}, d / "vit.fp16.safetensors", {"architecture": "timm test_vit"})
    save_file({k: v.half().float() for k, v in vit.state_dict().items()}, d / "vit.fp32.safetensors")
    torch.save(vit.state_dict(), d / "vit.pt")
    return d, clip, vit


def towers(files): return [load_backbone("tiny", "random"), *(load_backbone(n, "random") for n in TIMM), load_backbone(files[0] / "clip"), load_backbone(files[0] / "trunk")]


def test_features_are_the_blocks_own_output_on_the_normalised_image(files):
    for bb in towers(files):
        x, seen = torch.rand(2, 3, *bb.size), {}
        hooks = [b.register_forward_hook(lambda m, i, o, k=k: seen.__setitem__(k, o)) for k, b in enumerate(bb.blocks)]
        taps = [0, bb.depth - 2]
        maps = bb.features(x, taps)
        assert sorted(seen) == list(range(bb.depth - 1)), f"{bb}: stops behind the last tap"
        for t, m in zip(taps, maps):
            assert m.shape == (2, bb.width, *bb.grid)
            assert torch.equal(m.flatten(2).mT, seen[t][:, bb.prefix:])
        stem = getattr(getattr(bb.tower, "trunk", bb.tower), "patch_embed", None) or bb.tower.conv1
        inputs = []
        hooks.append(stem.register_forward_hook(lambda m, i, o: inputs.append(i[0])))
        e = bb.embed_image(x)
        mean, std = torch.tensor(bb.mean).view(3, 1, 1), torch.tensor(bb.std).view(3, 1, 1)
        assert torch.allclose(inputs[0], (x - mean) / std, atol=1e-6), f"{bb}: normalised once"
        assert e.shape == (2, bb.embed_dim) and torch.allclose(e.norm(dim=1), torch.ones(2), atol=1e-5)
        for h in hooks: h.remove()


def test_folders_and_files_give_the_published_model(files):
    d, clip, vit = files
    bb = load_backbone(d / "clip")
    x = torch.rand(2, 3, 32, 32)
    norm = (x - torch.tensor(PRE["mean"]).view(3, 1, 1)) / torch.tensor(PRE["std"]).view(3, 1, 1)
    words = ["a benign mass", "a malignant mass"]
    with torch.no_grad():
        assert torch.allclose(bb.embed_image(x), clip.encode_image(norm, normalize=True), atol=1e-6)
        assert torch.allclose(bb.embed_text(words), clip.encode_text(open_clip.SimpleTokenizer()(words), normalize=True), atol=1e-6)
    assert bb.interpolation == "bilinear" and abs(bb.logit_scale - 1 / .07) < 1e-3
    other = load_backbone("open_clip", d / "clip_bin")
    alone = load_backbone("open_clip", d / "clip_bin", text=False)
    assert bb.name == "clip" and load_backbone("timm/test_vit", "random").name == load_backbone(d / "vit").name == "test_vit"
    assert bb.hash == other.hash == alone.hash and not alone.has_text and sum(p.numel() for p in alone.parameters()) < 60_000

    x = torch.rand(1, 3, 160, 160)
    want = nn.functional.normalize(vit.forward_head(vit.forward_features((x - .5) / .5), pre_logits=True), dim=-1)
    for weights in (d / "vit.pt", d / "vit.fp32.safetensors"): assert torch.allclose(load_backbone("test_vit", weights).embed_image(x), want, atol=1e-2)
    folder = load_backbone("timm", d / "vit")
    assert folder.mean == tuple(PRE["mean"]) and folder.hash == load_backbone("timm/test_vit", d / "vit.pt").hash
    assert load_backbone(d / "vit", mean=.5, std=[.5, .5, .5], interpolation="bicubic").mean == (.5, .5, .5)


def test_a_text_tower_that_cannot_be_built_does_not_block_the_image_tower(files, tmp_path):
    "BiomedCLIP's layout: timm trunk, Hugging Face text tower (transformers is not installed, or its files are not here)."
    for f in (files[0] / "trunk").iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=TRUNK_CFG | dict(text_cfg=dict(hf_model_name=str(tmp_path / "absent"), hf_tokenizer_name="x")), preprocess_cfg=PRE)))
    with pytest.raises(ValueError, match="text=False"): load_backbone(tmp_path)
    assert load_backbone(tmp_path, text=False).hash == load_backbone(files[0] / "trunk").hash


def test_hash_is_the_identity_of_the_weights(files):
    d, _, _ = files
    a, b = load_backbone("test_vit", d / "vit.fp16.safetensors"), load_backbone("test_vit", d / "vit.fp32.safetensors")
    assert a.hash == b.hash and next(a.parameters()).dtype == torch.float32, "stored precision does not count"
    assert load_backbone("test_vit", d / "vit.fp16.safetensors", size=(96, 128)).hash == a.hash, "nor does the image size"
    assert load_backbone("test_vit", d / "vit.pt").hash != a.hash and load_backbone("tiny", "random", seed=1).hash != load_backbone("tiny", "random").hash


@pytest.mark.parametrize("which", ["tiny", "vit", "clip", "trunk"])
def test_other_sizes(files, which):
    d = files[0]
    load = lambda **kw: load_backbone("tiny", "random", **kw) if which == "tiny" else load_backbone(d / which, **kw)
    base = load()
    p = base.size[0] // base.grid[0]
    bb = load(size=(4 * p, 6 * p))
    assert bb.grid == (4, 6) and bb.features(torch.rand(1, 3, 4 * p, 6 * p))[0].shape[2:] == (4, 6)
    same = load(size=base.size[0])
    x = torch.rand(1, 3, *base.size)
    assert torch.equal(same.embed_image(x), base.embed_image(x))
    with pytest.raises(ValueError, match="multiple of the patch"): load(size=4 * p + 1)
    with pytest.raises(ValueError, match="size"): load(size=0)


def test_a_replaced_block_takes_part_and_a_copy_is_a_copy(files):
    class Off(nn.Module):
        def __init__(self, base): super().__init__(); self.base, self.up = base, nn.Parameter(torch.zeros(1))
        def forward(self, x, *a, **k): return self.base(x, *a, **k) + self.up
        def get_weight_dtype(self): return self.base.get_weight_dtype()
    for bb in towers(files):
        x = torch.rand(1, 3, *bb.size)
        f, e, h = bb.features(x, [1])[0], bb.embed_image(x), bb.hash
        copy = deepcopy(bb)
        bb.blocks[1] = Off(bb.blocks[1])
        with torch.no_grad(): bb.blocks[1].up += 1
        assert torch.allclose(bb.features(x, [1])[0], f + 1, atol=1e-6) and not torch.equal(bb.embed_image(x), e) and bb.hash == h
        assert torch.equal(copy.embed_image(x), e)
        bb.embed_image(x)[0, 0].backward()
        assert [n for n, p in bb.named_parameters() if p.grad is not None] == [n for n, p in bb.named_parameters() if n.endswith(".up")], "all else is frozen"


def test_training_mode_reaches_only_what_learns():
    bb = load_backbone("tiny", "random")
    bb.tower.patch_dropout = nn.Dropout(.5)
    lora = nn.ModuleDict(dict(base=nn.Linear(4, 4).requires_grad_(False), drop=nn.Dropout(.5), a=nn.Linear(4, 2)))  # the shape of PEFT's layers
    adapter = nn.Sequential(nn.Linear(4, 4), nn.Dropout(.1))
    bb.blocks[0].extra, bb.blocks[1].extra = lora, adapter
    assert bb.train() is bb and bb.training
    assert adapter.training and adapter[1].training and lora["a"].training and lora["drop"].training
    assert not (bb.tower.patch_dropout.training or bb.blocks[2].training or lora["base"].training or bb.blocks[0].attn.training)
    assert not any(m.training for m in bb.eval().modules())
    bb.requires_grad_(True).train()
    assert all(m.training for m in bb.modules()), "fine-tuning everything trains everything"


@pytest.mark.parametrize("x, error", [(torch.rand(1, 3, 100, 112), ValueError), (torch.rand(3, 112, 112), ValueError), (torch.rand(1, 1, 112, 112), ValueError),
                                      (torch.randint(0, 255, (1, 3, 112, 112), dtype=torch.uint8), TypeError), (torch.rand(1, 3, 112, 112) * 255, ValueError),
                                      (torch.rand(1, 3, 112, 112) * 4 - 2, ValueError), (torch.full((1, 3, 112, 112), torch.nan), ValueError)])
def test_images_out_of_range_are_refused(x, error):
    bb = load_backbone("tiny", "random")
    with pytest.raises(error, match="images"): bb.features(x)
    with pytest.raises(error, match="images"): bb.embed_image(x)


@pytest.mark.parametrize("taps", [[], [1, 1], [3, 1], [-1], [6], [1.5]])
def test_taps_rise(taps):
    with pytest.raises(ValueError, match="taps"): load_backbone("tiny", "random").features(torch.rand(1, 3, 112, 112), taps)


def test_gradients_pass_through_to_the_image():
    x = torch.rand(1, 3, 112, 112, requires_grad=True)
    load_backbone("tiny", "random").features(x)[-1].square().sum().backward()
    assert x.grad.abs().sum() > 0


VOCAB = tiny_vocab(["a benign mass with oval shape, circumscribed margin", "not parallel"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=200), min_size=1, max_size=4))
def test_any_text_has_tokens(texts):
    ids = tiny_tokenizer(VOCAB)(texts)
    length = (ids != 0).sum(1)
    assert ids.shape == (len(texts), 56) and ids.min() >= 0 and ids.max() < len(VOCAB)
    assert (ids[:, 0] == 2).all() and (ids.argmax(1) == length - 1).all() and (ids.max(1).values == len(VOCAB) - 1).all(), "the end token is the largest and the last"


def test_known_words_keep_their_order_and_unknown_ones_are_marked():
    tok = tiny_tokenizer(VOCAB)
    words = lambda t: [VOCAB[i] for i in tok([t])[0] if i][1:-1]
    assert words("Oval  mass") == ["oval</w>", "mass</w>"]
    assert set(words("zygomatic")) == {"<unk>"} and words("a zebra mass")[::2] == ["a</w>", "mass</w>"]
    assert tiny_vocab(["b a", "a"]) == tiny_vocab(["a", "b"]), "the table depends on the words alone"
    for bad in (VOCAB[1:], VOCAB + ["x"], VOCAB[:4] + VOCAB[3:]):
        with pytest.raises(ValueError, match="tiny_vocab"): tiny_tokenizer(bad)


def test_tiny_is_an_open_clip_model_and_survives_its_file(tmp_path):
    model = build_tiny(3, len(VOCAB)).eval()
    state = torch.get_rng_state()
    again = build_tiny(3, len(VOCAB))
    assert torch.equal(state, torch.get_rng_state()) and isinstance(model, CLIP) and model.training is False and again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    save_tiny(model, VOCAB, tmp_path / "t.safetensors", recipe=dict(steps=7), dtype=torch.float32)
    bb = load_backbone("tiny", tmp_path / "t.safetensors")
    x = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.allclose(bb.embed_image(x), model.encode_image((x - .5) / .5, normalize=True), atol=1e-6)
        assert torch.allclose(bb.embed_text(["a benign mass"]), model.encode_text(tiny_tokenizer(VOCAB)(["a benign mass"]), normalize=True), atol=1e-6)
        cut, long = bb.embed_text(["oval " * 54, "oval " * 90])
        assert torch.allclose(cut, long, atol=1e-6), "a long text is cut"
    save_tiny(model, VOCAB, tmp_path / "t.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"] and (tmp_path / "t.safetensors").stat().st_size < 4.5e6
    with pytest.raises(OSError): save_tiny(model, VOCAB, tmp_path / "absent" / "t.safetensors")
    save_file(load_file(tmp_path / "t.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="save_tiny"): load_backbone("tiny", tmp_path / "bare.safetensors")


@pytest.mark.skipif(not ASSET.is_file(), reason="nbs/experiments/tiny.ipynb makes it")
def test_the_packaged_tiny():
    assert ASSET.stat().st_size <= 8e6
    bb = load_backbone()
    assert (bb.name, bb.grid, bb.width, bb.depth, bb.has_text) == ("tiny", (14, 14), 128, 6, True)
    assert (bb.tokenizer(["ultrasound of the thyroid: a benign mass with oval shape, spiculated margin"]) != 1).all(), "no word of its world is unknown"
    assert "tiny.safetensors" in bb._repr_html_()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_mismatches_are_refused_with_their_names(files, tmp_path, monkeypatch):
    d = files[0]
    def refused(match, *a, error=ValueError, **k):
        with pytest.raises(error, match=match) as e: load_backbone(*a, **k)
        assert "\n" not in str(e.value)
    state = load_file(d / "vit.fp32.safetensors")
    save_file({k: v for k, v in state.items() if "blocks.3" not in k} | {"extra.weight": torch.zeros(1)}, tmp_path / "holes.safetensors")
    refused(r"12 missing \(blocks.3.*1 unexpected \(extra.weight\)", "test_vit", tmp_path / "holes.safetensors")
    save_file(state | {"norm.weight": torch.zeros(7)}, tmp_path / "shape.safetensors")
    refused(r"norm.weight \(7,\) for \(64,\)", "test_vit", tmp_path / "shape.safetensors")
    refused("holds timm test_vit, not test_vit2", "test_vit2", d / "vit.fp16.safetensors")
    refused("holds test_vit, not test_vit2", "test_vit2", d / "vit")
    refused("is of timm, not of open_clip", "ViT-B-32", d / "vit")
    refused("is of open_clip, not of timm", "test_vit", d / "clip")
    refused("embed_dim is 24, not 512.*more", "ViT-B-32", d / "clip")
    refused("nearest", "ViT-B-15", "random")
    refused("timm knows no model", "timm/nothing", "random")
    refused("not a plain vision transformer", "resnet10t", "random")
    refused("ResNet tower", "RN50", "random")
    refused("QuickGELU.*take 'ViT-B-32-quickgelu'", "ViT-B-32", "openai")
    refused("with GELU.*take 'ViT-B-32'", "open_clip/ViT-B-32-quickgelu", "laion2b_s34b_b79k")
    refused("quickgelu_224.openai|quickgelu_224.metaclip_400m", "timm/vit_base_patch32_clip_224.metaclip_400m", d / "vit.pt")
    save_file({"input_resolution": torch.tensor(224)}, tmp_path / "downloaded.safetensors")
    refused("OpenAI's weights", "ViT-B-32", tmp_path / "downloaded.safetensors")
    refused("not found", "test_vit", tmp_path / "absent.pt", error=FileNotFoundError)
    refused("no tag of", "ViT-B-32", "no-such-tag", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused("neither an open_clip_config.json", "ViT-B-32", tmp_path / "empty", error=FileNotFoundError)
    (tmp_path / "empty" / "config.json").write_text('{"architecture": "test_vit"}')
    refused("no weights", "test_vit", tmp_path / "empty", error=FileNotFoundError)
    (tmp_path / "empty" / "config.json").write_text("{")
    refused("not JSON", "test_vit", tmp_path / "empty")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    refused("plain tensors", "test_vit", tmp_path / "pickle.pt")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)), tmp_path / "script.pt")
    refused("TorchScript", "test_vit", tmp_path / "script.pt")
    (tmp_path / "junk.bin").write_bytes(b"junk")
    refused("plain tensors", "test_vit", tmp_path / "junk.bin")
    for kw, match in ((dict(mean="a"), "mean"), (dict(mean=[.5, .5]), "mean"), (dict(std=0), "std"), (dict(interpolation="best"), "interpolation")): refused(match, "tiny", "random", **kw)
    monkeypatch.setattr("htlab.backbone.ASSET", tmp_path / "tiny.safetensors")
    refused("nbs/experiments/tiny.ipynb", error=FileNotFoundError)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("nbs/experiments/tiny.ipynb", "tiny", error=FileNotFoundError)  # a name is a name, even beside a folder of that name
    with pytest.raises(ValueError, match="no text tower"): load_backbone("tiny", "random", text=False).embed_text(["a"])
    with pytest.raises(ValueError, match="at least one"): load_backbone("tiny", "random").embed_text([])


def test_offline_is_one_line_with_the_remedy(monkeypatch, tmp_path):
    def unknown(*a): raise socket.gaierror("no such host")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("htlab.backbone.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, weights in (("test_vit", None), ("ViT-B-32", "laion2b_s34b_b79k")):
        with pytest.raises(ConnectionError, match="weights=FILE or FOLDER") as e: load_backbone(name, weights)
        assert "\n" not in str(e.value)
