"""Laws of 04_backbone: what goes in is normalised once, what comes out is the tower's own, and nothing loads by halves."""
import json
import socket
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file, save_file
from torch import nn

from htlab import backbone as module
from htlab.backbone import ASSET, TOWERS, Backbone, build_tiny, list_backbones, load_backbone, save_tiny, tiny_tokenizer, tiny_vocab

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
    "BiomedCLIP's layout: timm trunk, Hugging Face text tower whose files are not here."
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
    refused("not a plain vision transformer", "test_convnext", "random")
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


# the towers by name, each a small random model in the files of the real one

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "benign", "malignant", "mass", "with", "margin", "##s", "."]
TEXTS = ["a benign mass", "a malignant mass with margins."]
OPENAI = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
IMAGENET = ((.485, .456, .406), (.229, .224, .225))
PUBMED = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
PREPROCESSOR = dict(do_normalize=True, image_mean=IMAGENET[0], image_std=IMAGENET[1], resample=2, size=dict(height=64, width=64))


def wordpiece(d):
    "The tokenizer files of BiomedBERT, with few words."
    d.mkdir(exist_ok=True)
    (d / "vocab.txt").write_text("\n".join(WORDS))
    (d / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="BertTokenizer", do_lower_case=True, model_max_length=512)))
    return open_clip.tokenizer.HFTokenizer(str(d), context_length=16)


def bpe(d):
    "The tokenizer files of CLIP in transformers: letters, no merges."
    letters = [c + e for c in "abcdefghijklmnopqrstuvwxyz." for e in ("", "</w>")]
    (d / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}))
    (d / "merges.txt").write_text("#version: 0.2\n")
    (d / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="CLIPTokenizer", model_max_length=77, unk_token="<|endoftext|>", bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")))
    return open_clip.tokenizer.HFTokenizer(str(d), context_length=40)


def clip_with_bert(d, vision, heads=1, **kw):
    "What open_clip builds when the hub answers: here the answer lies in a folder."
    from transformers import BertConfig
    config = BertConfig(vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=96, max_position_embeddings=48)
    config.save_pretrained(d)
    text = dict(hf_model_name=str(d), hf_tokenizer_name=PUBMED, hf_proj_type="mlp", hf_pooler_type="cls_last_hidden_state_pooler", context_length=16)
    return CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=text | dict(hf_model_pretrained=False), **kw).eval(), text | dict(hf_model_name=PUBMED)


def state_of(model): return {k: v.clone().contiguous() for k, v in model.state_dict().items()}


def tower(name, d):
    "-> how it is loaded, and what the library's own model says: image, text, preprocessing, weights file."
    torch.manual_seed(0)
    d.mkdir()
    clip = lambda m, tok: dict(image=lambda x: m.encode_image(x, normalize=True), text=lambda: m.encode_text(tok(TEXTS), normalize=True))
    if name in ("biomedclip", "biomedclip-config"):
        model, text = clip_with_bert(d.parent / f"{name}-bert", dict(timm_model_name="test_vit", timm_pool="", timm_proj="linear", image_size=160), heads=4 if "config" in name else 1)
        (d / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=dict(embed_dim=24, vision_cfg=dict(timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="", timm_proj="linear", image_size=160), text_cfg=text),
                                                                 preprocess_cfg=dict(mean=OPENAI[0], std=OPENAI[1]))))
        if "config" in name: (d / "config.json").write_bytes((d.parent / f"{name}-bert" / "config.json").read_bytes())
        torch.save(state_of(model) | {"text.transformer.embeddings.position_ids": torch.arange(48)[None]}, d / "open_clip_pytorch_model.bin")
        return dict(load=("biomedclip", d), pre=OPENAI, file="open_clip_pytorch_model.bin", **clip(model, wordpiece(d)))
    if name == "unimedclip":
        model, _ = clip_with_bert(d.parent / f"{name}-bert", dict(image_size=32, patch_size=8, width=128, layers=2), quick_gelu=True)
        state = {"module." + k.replace("text.", "text_encoder.", 1): v for k, v in state_of(model).items()}
        torch.save(dict(epoch=3, state_dict=state, optimizer=dict(state={}, param_groups=[dict(lr=1e-4)]), best_acc=np.float64(.5)), d / "unimed_clip_vit_b16.pt")
        return dict(load=("unimedclip", d / "unimed_clip_vit_b16.pt"), pre=OPENAI, file="unimed_clip_vit_b16.pt", **clip(model, wordpiece(d / "BiomedNLP-BiomedBERT-base-uncased-abstract")))
    if name in ("fetalclip", "fetalclip-file"):
        cfg = dict(embed_dim=24, vision_cfg=dict(image_size=28, layers=2, width=64, patch_size=14), text_cfg=dict(context_length=30, vocab_size=49408, width=64, heads=1, layers=2))
        model = CLIP(**deepcopy(cfg)).eval()
        (d / "FetalCLIP_config.json").write_text(json.dumps(cfg))
        torch.save(dict(state_dict={f"module.{k}": v for k, v in state_of(model).items()}), d / "FetalCLIP_weights.pt")
        return dict(load=("fetalclip", d / "FetalCLIP_weights.pt" if name.endswith("file") else d), pre=OPENAI, file="FetalCLIP_weights.pt", **clip(model, open_clip.SimpleTokenizer(context_length=30)))
    if name == "clipseg":
        from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
        small = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=3)
        config = CLIPSegConfig(text_config=small | dict(vocab_size=56, max_position_embeddings=40, eos_token_id=55, bos_token_id=54, pad_token_id=55), vision_config=small | dict(image_size=48, patch_size=16),
                               projection_dim=24, reduce_dim=16, extract_layers=[0, 1, 2], decoder_num_attention_heads=2, decoder_intermediate_size=32, use_complex_transposed_convolution=True)
        model = CLIPSegForImageSegmentation(config).eval()
        model.save_pretrained(d)
        (d / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        tok = bpe(d)
        unit = lambda out: nn.functional.normalize(out.pooler_output, dim=-1)
        return dict(load=("clipseg", d), pre=IMAGENET, file="model.safetensors", model=model, tok=tok, image=lambda x: unit(model.clip.get_image_features(x)), text=lambda: unit(model.clip.get_text_features(tok(TEXTS))))
    if name == "metaclip":      # timm's tower from open_clip's file, as on the hub
        model = CLIP(**(CLIP_CFG | dict(vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2)))).eval()
        (d / "config.json").write_text(json.dumps(dict(architecture="vit_base_patch16_clip_quickgelu_224", num_classes=24, model_args=dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1),
                                                       pretrained_cfg=dict(tag="metaclip_400m", mean=OPENAI[0], std=OPENAI[1], input_size=[3, 32, 32], classifier="head", notes=["natively QuickGELU"]))))
        save_file(state_of(model), d / "open_clip_model.safetensors")
        return dict(load=(d,), pre=OPENAI, file="open_clip_model.safetensors", clip=model)
    arch = dict(dinov2="vit_base_patch14_reg4_dinov2", resnet18="test_resnet")[name]
    args = dict(img_size=28, embed_dim=32, depth=4, num_heads=2) if name == "dinov2" else {}
    model = timm.create_model(arch, **args).eval()
    (d / "config.json").write_text(json.dumps(dict(architecture=arch, num_classes=model.num_classes, model_args=args, pretrained_cfg=dict(mean=IMAGENET[0], std=IMAGENET[1], input_size=[3, 28, 28] if args else [3, 160, 160], classifier="head" if args else "fc"))))
    save_file(state_of(model), d / "model.safetensors")
    return dict(load=(d,), pre=IMAGENET, file="model.safetensors", model=model, image=lambda x: nn.functional.normalize(model.forward_head(model.forward_features(x), pre_logits=True), dim=-1))


NAMES = ["biomedclip", "biomedclip-config", "unimedclip", "fetalclip", "fetalclip-file", "clipseg", "metaclip", "dinov2", "resnet18"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {n: SimpleNamespace(dir=root / n, **({"image": None, "text": None} | tower(n, root / n))) for n in NAMES}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*a, **k): raise AssertionError("the network was asked")
    for f in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, f, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", NAMES)
def test_each_tower_says_what_its_own_library_says(published, name, no_network):
    t = published[name]
    bb = load_backbone(*t.load)
    x = torch.rand(2, 3, *bb.size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in t.pre)
    assert bb.mean == pytest.approx(t.pre[0]) and bb.std == pytest.approx(t.pre[1])
    with torch.no_grad():
        if t.image: assert torch.allclose(bb.embed_image(x), t.image((x - mean) / std), atol=1e-5)
        assert bb.has_text == bool(t.text)
        if t.text: assert torch.allclose(bb.embed_text(TEXTS), t.text(), atol=1e-5)
        if name == "metaclip": assert torch.allclose(bb.features(x, [1])[0], t.clip.visual.forward_intermediates((x - mean) / std, indices=[1])["image_intermediates"][0], atol=1e-5)
        assert all(f.shape[:2] == (2, bb.widths[i]) for f, i in zip(bb.features(x), bb.check_taps()))
    if t.text:
        assert bb.name == t.load[0] and load_backbone(*t.load, text=False).hash == bb.hash
    silent = load_backbone(*t.load, mean=0, std=1)
    assert torch.allclose(silent.embed_image(x), bb.embed_image((x * std + mean).clip(-.4, 1.4)), atol=.1) and silent.mean == (0, 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_is_missing_or_left_over(published, name, tmp_path):
    t = published[name]
    for how in ("missing", "unexpected"):
        d = tmp_path / how
        d.mkdir()
        for f in t.dir.rglob("*"):
            if f.is_file(): (d / f.relative_to(t.dir)).parent.mkdir(exist_ok=True); (d / f.relative_to(t.dir)).write_bytes(f.read_bytes())
        state, _ = module._read(t.dir / t.file)
        victim = next(k for k in state if k.endswith(("norm1.weight", "ln_1.weight", "bn1.weight")) and ("visual" in k or "vision" in k or name in ("dinov2", "resnet18")))
        state = {k: v for k, v in state.items() if k != victim} if how == "missing" else state | {victim + "x": torch.zeros(1)}
        save_file(state, d / t.file) if t.file.endswith("safetensors") else torch.save(state, d / t.file)
        load = [d / p.relative_to(t.dir) if isinstance(p, type(d)) else p for p in t.load]
        with pytest.raises(ValueError, match=f"1 {how} ") as e: load_backbone(*load)
        assert "\n" not in str(e.value)
    if not t.file.endswith("safetensors"):
        torch.save(nn.Linear(2, 2), d / t.file)
        with pytest.raises(ValueError, match="plain tensors"): load_backbone(*load)


def test_quickgelu_goes_with_the_weights(published, tmp_path):
    copies = {n: tmp_path / n for n in ("unimedclip", "fetalclip", "clipseg")}
    for n, d in copies.items():
        d.mkdir()
        for f in published[n].dir.glob("*.*"): (d / f.name).write_bytes(f.read_bytes())
    cfg = json.loads((copies["fetalclip"] / "FetalCLIP_config.json").read_text())
    (copies["fetalclip"] / "FetalCLIP_config.json").write_text(json.dumps(cfg | dict(quick_gelu=True)))
    (copies["unimedclip"] / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=CLIP_CFG | dict(quick_gelu=False))))
    seg = json.loads((copies["clipseg"] / "config.json").read_text())
    seg["vision_config"]["hidden_act"] = "gelu"
    (copies["clipseg"] / "config.json").write_text(json.dumps(seg))
    for n, d in copies.items():
        with pytest.raises(ValueError, match="trained with (Quick)?GELU"): load_backbone(n, d)
    for arch, n, text in (("ViT-B-16", "unimedclip", False), ("ViT-L-14-quickgelu", "fetalclip", False)):
        with pytest.raises(ValueError, match="trained with (Quick)?GELU"): load_backbone(arch, published[n].dir / published[n].file, text=text)
    (tmp_path / "renamed.pt").write_bytes((published["unimedclip"].dir / "unimed_clip_vit_b16.pt").read_bytes())
    with pytest.raises(ValueError, match="UniMed-CLIP.*QuickGELU"): load_backbone("ViT-B-16", tmp_path / "renamed.pt", text=False)
    assert load_backbone("vit_base_patch16_clip_quickgelu_224.metaclip_400m", "random", size=32).kind == "vit"


@pytest.mark.parametrize("name", ["unimedclip", "fetalclip", "clipseg", "metaclip", "dinov2"])
def test_position_embeddings_follow_the_size(published, name):
    t = published[name]
    bb = load_backbone(*t.load)
    p = bb.size[0] // bb.grid[0]
    wide = load_backbone(*t.load, size=(3 * p, 5 * p))
    assert wide.grid == (3, 5) and wide.hash == bb.hash and wide.features(torch.rand(1, 3, 3 * p, 5 * p), [1])[0].shape[2:] == (3, 5)
    with pytest.raises(ValueError, match="multiple of the patch"): load_backbone(*t.load, size=4 * p + 1)


def test_clipseg_masks_are_the_librarys(published):
    t = published["clipseg"]
    bb = load_backbone(*t.load)
    x = torch.rand(2, 3, 64, 64)
    norm = (x - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
    with torch.no_grad():
        maps = bb.text_maps(x, TEXTS)
        for k, text in enumerate(TEXTS):
            want = t.model(input_ids=t.tok([text]).repeat(2, 1), pixel_values=norm).logits
            assert torch.allclose(maps[:, k], want, atol=1e-5)
        assert torch.allclose(bb.text_maps(x, bb.embed_text(TEXTS, normalize=False)), maps, atol=1e-6)
    assert bb.size == (64, 64) and bb.interpolation == "bilinear" and bb.blocks is bb.model.visual.vision.encoder.layers
    wide = load_backbone(*t.load, size=(32, 80))
    x = torch.rand(1, 3, 32, 80, requires_grad=True)
    assert wide.text_maps(x, TEXTS).shape == (1, 2, 32, 80)
    wide.text_maps(x, TEXTS).sum().backward()
    assert x.grad.abs().sum() > 0, "adapters in the tower get a gradient"
    (t.dir / "preprocessor_config.json").rename(t.dir / "aside")
    with pytest.raises(FileNotFoundError, match="preprocessor_config"): load_backbone(*t.load)
    (t.dir / "aside").rename(t.dir / "preprocessor_config.json")


@pytest.mark.parametrize("name", ["biomedclip", "unimedclip", "fetalclip"])
def test_text_maps_of_a_clip_are_cosines_of_patches(published, name):
    bb = load_backbone(*published[name].load)
    x = torch.rand(2, 3, *bb.size)
    with torch.no_grad():
        maps = bb.text_maps(x, TEXTS)
        assert maps.shape == (2, 2, *bb.grid) and maps.abs().max() <= bb.logit_scale * 1.001
        t, seen = bb.tower, []
        norm = t.trunk.norm if hasattr(t, "trunk") else t.ln_post
        hook = norm.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
        e = bb.embed_image(x)
        hook.remove()
        before, after = seen[0]
        cls = after[:, 0] if after.ndim == 3 else after
        way = lambda z: nn.functional.normalize(t.head(z) if hasattr(t, "trunk") else z @ t.proj, dim=-1)
        assert torch.allclose(way(cls), e, atol=1e-5), "the pooled token goes this way"
        if after.ndim == 3: assert torch.allclose(maps.flatten(2).mT, bb.logit_scale * way(after[:, bb.prefix:]) @ bb.embed_text(TEXTS).T, atol=1e-3), "and so do the patches"


def test_text_maps_need_text_and_a_way():
    with pytest.raises(ValueError, match="no text tower"): load_backbone("test_vit", "random").text_maps(torch.rand(1, 3, 160, 160), TEXTS)
    with pytest.raises(ValueError, match="no text tower"): load_backbone("test_vit", "random").text_maps(torch.rand(1, 3, 160, 160), torch.rand(2, 64))
    bb = load_backbone("tiny", "random")
    x = torch.rand(1, 3, 112, 112)
    for b in bb.blocks: b.register_forward_hook(lambda m, i, o: o + 1)      # what stands in the blocks' place takes part
    assert not torch.equal(bb.text_maps(x, TEXTS), load_backbone("tiny", "random").text_maps(x, TEXTS))


def test_a_resnet_gives_five_strides(published):
    bb = load_backbone(*published["resnet18"].load)
    x = torch.rand(2, 3, 160, 160)
    assert bb.kind == "conv" and bb.prefix == 0 and len(bb.blocks) == 4 and bb.blocks[3] is bb.tower.layer4 and bb.taps_default == [0, 1, 2, 3, 4] and bb.grid == (5, 5)
    maps = bb.features(x)
    assert [m.shape for m in maps] == [(2, w, 160 // s, 160 // s) for w, s in zip(bb.widths, (2, 4, 8, 16, 32))]
    assert torch.equal(bb.features(x, "1,3")[1], maps[3]) and bb.embed_dim == bb.width == bb.widths[4]
    assert load_backbone(*published["resnet18"].load, size=(64, 96)).features(torch.rand(1, 3, 64, 96))[4].shape[2:] == (2, 3)
    for size in (100, (64, 80)):
        with pytest.raises(ValueError, match="multiple"): load_backbone(*published["resnet18"].load, size=size)
    with pytest.raises(ValueError, match="0 to 4"): bb.features(x, [5])
    assert "strides" in bb._repr_html_() and "stages" in repr(bb)
    before = bb.tower.bn1.running_mean.clone()
    bb.train()
    bb.features(x)
    assert torch.equal(bb.tower.bn1.running_mean, before), "what is frozen keeps its statistics"
    assert load_backbone("vit_tiny_patch16_224", "random").widths == [192] * 12


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, unique=True).map(sorted), st.sampled_from([",", ", ", " ,"]))
def test_taps_are_a_list_or_text(taps, comma):
    bb = SimpleNamespace(taps_default=[1, 3, 4], widths=[8] * 6)
    assert Backbone.check_taps(bb, taps) == Backbone.check_taps(bb, comma.join(map(str, taps))) == taps
    assert Backbone.check_taps(bb, "") == Backbone.check_taps(bb) == [1, 3, 4]
    for bad in ("a", "1;2", "3,1", "6", ",", "1.5", [1.5], 3, ["x"]):
        with pytest.raises(ValueError, match="taps"): Backbone.check_taps(bb, bad)


def test_short_names_lead_to_the_published_weights(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(module, "_open_clip", lambda arch, weights, path, *a: asked.append((arch, weights)) or 1 / 0)
    monkeypatch.setattr(module, "_timm", lambda arch, weights, path, *a: asked.append((arch, weights)) or 1 / 0)
    monkeypatch.setattr(module, "_snapshot", lambda name: asked.append(TOWERS[name].hub) or tmp_path)
    for name, want in (("openai", [("ViT-B-16-quickgelu", "openai")]), ("metaclip", [("ViT-B-16-quickgelu", "metaclip_400m")]), ("dinov2", [("vit_base_patch14_dinov2.lvd142m", None)]),
                       ("biomedclip", ["microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", ("biomedclip", tmp_path)]), ("resnet18", [("resnet18", None)])):
        asked.clear()
        with pytest.raises(ZeroDivisionError): load_backbone(name)
        assert asked == want


def test_a_hub_cache_is_enough(published, monkeypatch, tmp_path):
    "The files lie where huggingface_hub puts them: that is a folder like any other."
    def unknown(*a): raise socket.gaierror("no such host")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("htlab.backbone.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="weights=FILE or FOLDER"): load_backbone("clipseg")
    with pytest.raises(FileNotFoundError, match="on no hub"): load_backbone("fetalclip")
    assert list_backbones().set_index("name")["files here"]["clipseg"] == "no"
    home = tmp_path / "models--CIDAS--clipseg-rd64-refined"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots").mkdir()
    (home / "snapshots" / ("0" * 40)).symlink_to(published["clipseg"].dir)
    here = list_backbones().set_index("name")["files here"]
    assert here["clipseg"] == "yes" and here["biomedclip"] == "no" and here["tiny"] == ("yes" if ASSET.is_file() else "no")
    assert load_backbone("clipseg").hash == load_backbone("clipseg", published["clipseg"].dir).hash


def test_the_table_is_true():
    "Sizes are those of the published architectures, built without memory."
    from transformers import BertConfig, CLIPSegConfig, CLIPSegForImageSegmentation
    table = list_backbones()
    assert list(table) == ["name", "what", "parameters M", "licence", "text tower", "prefix tokens", "size px", "files here"] and list(table["name"]) == list(TOWERS)
    with torch.device("meta"):
        for name, t in TOWERS.items():
            if name == "tiny": model = build_tiny(vocab_size=1)
            elif name == "clipseg": model = CLIPSegForImageSegmentation(CLIPSegConfig(vision_config=dict(patch_size=16), use_complex_transposed_convolution=True))
            elif t.text == "none": model = timm.create_model((t.arch or name).split(".")[0], num_classes=0)
            else: model = module._clip(deepcopy(module.OWN.get(name) or open_clip.get_model_config(t.arch)), True, BertConfig() if "BERT" in t.text else None)
            n = sum(p.numel() for p in model.parameters()) / 1e6
            assert abs(n - t.params) < (.3 if name == "tiny" else .06), name
            if t.text == "none" and t.prefix: assert model.num_prefix_tokens == t.prefix and model.patch_embed.img_size[0] == t.size
            if t.text == "none": assert t.hub.split("/")[1].startswith(name if not t.arch else t.arch) and timm.get_pretrained_cfg(t.arch or name).license.lower() == t.licence.lower()
    for name in ("openai", "metaclip"): assert open_clip.get_pretrained_cfg(TOWERS[name].arch, TOWERS[name].weights)["hf_hub"].rstrip("/") == TOWERS[name].hub


def test_text_towers_that_do_not_fit_are_explained(published, tmp_path):
    for f in published["biomedclip"].dir.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS + ["extra"]))
    with pytest.raises(ValueError, match="tokenizer has 14 entries, the text tower 13.*text=False"): load_backbone("biomedclip", tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="tokenizer.*text=False") as e: load_backbone("biomedclip", tmp_path)
    assert "\n" not in str(e.value)
    assert not load_backbone("biomedclip", tmp_path, text=False).has_text
    (tmp_path / "second.bin").write_bytes(b"")
    (tmp_path / "open_clip_pytorch_model.bin").rename(tmp_path / "first.bin")
    with pytest.raises(FileNotFoundError, match="several weights files"): load_backbone("biomedclip", tmp_path)


@given(batch=st.integers(1, 3), tokens=st.integers(1, 9), heads=st.sampled_from([1, 2, 4]), bias=st.booleans(), frozen=st.booleans(), training=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_attention_in_one_product_is_pytorch_s(batch, tokens, heads, bias, frozen, training, seed):
    "The same numbers, there and back, whatever learns; the same names."
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(8, heads, bias=bias, batch_first=True).requires_grad_(not frozen).train(training)
    mine = deepcopy(theirs)
    mine.__class__ = module._SelfAttention
    x, grad = torch.randn(batch, tokens, 8), torch.randn(batch, tokens, 8)
    found = []
    for m in (theirs, mine):
        z = x.clone().requires_grad_()
        out, weights = m(z, z, z, need_weights=False)
        out.backward(grad)
        found.append([out.detach(), z.grad, *(p.grad for p in m.parameters() if not frozen)])
        assert weights is None
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert list(theirs.state_dict()) == list(mine.state_dict()) and isinstance(mine, nn.MultiheadAttention)


@pytest.mark.parametrize("how", [dict(need_weights=True), dict(attn_mask=torch.triu(torch.ones(5, 5), 1).bool()), dict(key_padding_mask=torch.tensor([[False] * 4 + [True]] * 2)), dict(other=True), dict(batch_first=False), dict(add_zero_attn=True), dict(dropout=.5)], ids=str)
def test_any_other_attention_is_left_to_pytorch(how):
    built = {k: how[k] for k in ("batch_first", "add_zero_attn", "dropout") if k in how}
    theirs = nn.MultiheadAttention(8, 2, **dict(batch_first=True) | built)
    mine, x = deepcopy(theirs), torch.randn(2, 5, 8)
    mine.__class__ = module._SelfAttention
    other = torch.randn(2, 5, 8) if how.get("other") else x
    called = dict(need_weights=False) | {k: v for k, v in how.items() if k not in built and k != "other"}
    out = []
    for m in (theirs, mine):
        torch.manual_seed(0)                                             # of the dropout
        out.append(m(x, other, other, **called))
    torch.testing.assert_close(*(o[0] for o in out), atol=0, rtol=0)
    assert called["need_weights"] == (out[1][1] is not None)


def test_every_block_of_open_clip_computes_so():
    b = load_backbone("ViT-B-32", "random", text=True)
    inside = lambda m: [type(c) for c in m.modules() if isinstance(c, nn.MultiheadAttention)]
    assert inside(b.tower) == [module._SelfAttention] * 12 and set(inside(b.model)) == {module._SelfAttention}     # its text tower passes a mask, and is PyTorch's as before
