"""What a step, an epoch and an evaluation cost, each against a plain route or a bound measured in the same run. `make bench` prints the table.

    python benchmarks/speed.py                      # ViT-B/16, 224 pixels, batch 8, at most ten minutes on two cores
    python benchmarks/speed.py --only step,heads    # these parts
    python benchmarks/speed.py --device cuda        # images a second, memory and utilisation by batch size, bf16, compiled or not; and whether Dice suffers

The plain routes compute what the released code computes, as METHOD describes it: the gain behind a Fourier transform and back, three convolutions one after the other, blocks behind the last tap, 512 channels
enlarged before the 1 x 1 convolution, the text of every step encoded anew, attention as open_clip's tower has it from PyTorch. They share the weights of the fast route, and both are first shown to give the same outputs and gradients.
Routes take turns, and the median counts. Memory is that of a process of its own which makes two steps, less what it held before the first.
"""
import argparse, copy, math, os, platform, re, statistics, subprocess, sys, time, warnings
from pathlib import Path

PARTS = ("step", "segment", "contrast", "prefix", "epoch", "images", "cases", "heads", "start", "slopes")
GPU = ("throughput", "dice")  # what --device cuda measures; they run on a CPU too, if named
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--only", default="", help=f"parts, with commas: {', '.join(PARTS + GPU)} (on a CPU all but the last two, on a GPU these)")
for name, default, text in (("batch", 8, "images in a step"), ("rounds", 3, "turns of each route"), ("threads", os.cpu_count(), "of PyTorch")):
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
parser.add_argument("--tower", default="ViT-B-16", help="of open_clip, with random weights (ViT-B-16)")
parser.add_argument("--device", default="cpu")
parser.add_argument("--batches", default="32,64,128,256,512", help="batch sizes of throughput (32,64,128,256,512)")
parser.add_argument("--images", type=int, default=320, help="training images of dice (320)")
parser.add_argument("--epochs", type=int, default=15, help="of dice (15)")
parser.add_argument("--memory", default="", help=argparse.SUPPRESS)  # a child: make two steps of this route, print megabytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def megabytes():
    import psutil
    return psutil.Process().memory_info().rss / 1e6


def peak():
    "The most this process has held. Not ru_maxrss on Linux: it begins with what the parent held."
    if sys.platform == "linux": return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def build(args, task, adapter="hybrid", blocks=None):
    "A task on the tower with HT adapters, and a batch; always the same."
    import torch
    from htlab.backbone import load_backbone
    from htlab.head import SegmentHead
    from htlab.inject import adapt
    from htlab.task import Contrast, Segment
    from htlab.train import seed_everything
    seed_everything(0)
    tower = load_backbone(args.tower, "random", text=False)
    adapt(tower, adapter, blocks=blocks, init="reference", dropout=0)
    n, (h, w) = args.batch, tower.size
    batch = dict(image=torch.rand(n, 3, h, w), mask=torch.randint(0, 2, (n, h, w)), text=[f"ultrasound of a lesion, image {i}" for i in range(n)], label=torch.arange(n) % 2)
    if task == "segment": made = Segment(tower, SegmentHead(tower.width, len(tower.taps_default), hidden=512))
    else:
        tower.model = Pair(tower.model)
        tower.tokenizer = lambda texts: torch.randint(5, 30000, (len(texts), 256), generator=torch.Generator().manual_seed(len(texts[0])))
        made = Contrast(tower)
    return made.to(args.device).train(), {k: v.to(args.device) if torch.is_tensor(v) else v for k, v in batch.items()}


def Pair(visual):
    "An image tower and a frozen text tower of the size of PubMedBERT."
    import torch
    from torch import nn
    from transformers import BertConfig, BertModel
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.bert, self.project = visual, BertModel(BertConfig(), add_pooling_layer=False), nn.Linear(768, visual.output_dim, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))
            self.requires_grad_(False)
            for b in visual.transformer.resblocks:
                if hasattr(b, "adapter"): b.adapter.requires_grad_(True)
        def encode_text(self, ids, normalize=True):
            e = self.project(self.bert(ids).last_hidden_state[:, 0])
            return nn.functional.normalize(e, dim=-1) if normalize else e
    return Both()


def plain(task):
    "The task, from now on computed as the release does, with the same weights."
    import torch
    import torch.nn.functional as F
    from htlab.adapter import MapOp
    from htlab.inject import adapters
    from htlab.task import Segment
    class PlainOp(MapOp):
        def forward(self, u):
            f = torch.fft.irfft2(torch.fft.rfft2(u) * self.filter.gain[:, None, None], s=u.shape[-2:])
            w = self.weigh(f)
            v = w[:, 0:1] * self.dw3(f) + w[:, 1:2] * self.dw5(f) + w[:, 2:3] * self.dw7(f) + u
            return v + self.mix(v)
    for a in adapters(task.backbone).values(): a.op.__class__ = PlainOp
    for m in task.backbone.modules():
        if isinstance(m, torch.nn.MultiheadAttention): m.__class__ = torch.nn.MultiheadAttention
    if isinstance(task, Segment):
        def output(batch):
            b = task.backbone
            maps = b.tower.forward_intermediates(b._normalise(batch["image"]), indices=task.taps)["image_intermediates"]
            mixed = F.interpolate(task.head.mix(maps).permute(0, 3, 1, 2), batch["image"].shape[-2:], mode="bilinear", align_corners=False)
            return F.conv2d(mixed, task.head.readout.weight[..., None, None], task.head.readout.bias)
        task.output = output
    else:
        def captions(texts):
            with torch.no_grad(): return task.backbone.embed_text(texts).float()
        task.captions = captions
    return task


def updates(task, batch):
    "A function that makes one step."
    import torch
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-6, fused=True)
    def step():
        optimiser.zero_grad()
        task(batch)["loss"].backward()
        optimiser.step()
    return step


def same(a, b, batch, batch_b=None, tolerance=2e-4):
    "Largest difference of outputs and gradients, relative to the largest value of each; fails above the tolerance."
    import torch
    worst = 0
    got = []
    for task, x in ((a, batch), (b, batch_b or batch)):
        task.zero_grad()
        out = task(x)
        out["loss"].backward()
        got.append([out["output"].detach(), *(p.grad.clone() for p in task.parameters() if p.grad is not None and p.grad.abs().max() > 0)])
        task.zero_grad()
    assert len(got[0]) == len(got[1]), "other parameters get a gradient"
    largest = max(x.abs().max() for x in got[0][1:])
    for i, (x, y) in enumerate(zip(*got)): worst = max(worst, ((x - y).abs().max() / (x.abs().max() if i == 0 else largest)).item())
    assert worst < tolerance, f"the routes differ by {worst:.1e}"
    return worst


def turns(rounds, **routes):
    "Median seconds of each route; they take turns, after one to warm up. A GPU is waited for. `ratio` is the median over turns, which a machine that slows down does not move."
    import torch
    spent = {k: [] for k in routes}
    for r in range(rounds + 1):
        for k, f in routes.items():
            began = time.perf_counter(); f()
            if torch.cuda.is_initialized(): torch.cuda.synchronize()
            if r: spent[k].append(time.perf_counter() - began)
    class Medians(dict):
        def ratio(self, a, b): return statistics.median(x / y for x, y in zip(spent[a], spent[b]))
    return Medians({k: statistics.median(v) for k, v in spent.items()})


def memory(route, args):
    "Megabytes that two steps of a route take, in a process of its own."
    out = subprocess.run([sys.executable, __file__, "--memory", route, "--batch", str(args.batch), "--threads", str(args.threads), "--tower", args.tower], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def child(args):
    kind, how = args.memory.split("/")
    task, batch = build(args, kind)
    if how == "plain": task = plain(task)
    step, before = updates(task, batch), megabytes()
    step(); step()
    print(peak() - before)


def part_step(args, say):
    "A step of the contrastive kind, adapters in every block, against what nobody can go below: frozen forward and backward through the activations."
    import torch
    task, batch = build(args, "contrast")
    bare, _ = build(args, "contrast", adapter="none")
    x = batch["image"].clone().requires_grad_()
    def bound():
        bare.backbone.embed_image(x).square().sum().backward()
        x.grad = None
    def forward():
        with torch.no_grad(): bare.backbone.embed_image(batch["image"])
    t = turns(max(args.rounds, 7), bound=bound, step=updates(task, batch), forward=forward)  # a ratio near one wants more turns
    say("step, adapters in every block", "bound: frozen forward + backward through activations", t["bound"], t["step"], f"frozen forward alone {t['forward']:.2f} s", t.ratio("step", "bound"))


def against_release(args, say, kind, what, against):
    task, batch = build(args, kind)
    slow = plain(copy.deepcopy(task))
    apart = same(slow, task, batch)
    t = turns(args.rounds, plain=updates(slow, batch), fast=updates(task, batch))
    m = {how: memory(f"{kind}/{how}", args) for how in ("plain", "fast")}
    say(what, against, t["plain"], t["fast"], f"memory {m['plain'] / 1e3:.2f} -> {m['fast'] / 1e3:.2f} GB ({m['fast'] / m['plain']:.2f}); equal to {apart:.0e}")


def part_segment(args, say): against_release(args, say, "segment", "segmentation step", "as released")
def part_contrast(args, say): against_release(args, say, "contrast", "contrastive step", "as released, text encoded in every step")


def part_prefix(args, say):
    from htlab.prefix import prefix_tokens
    every, batch = build(args, "contrast")
    n = len(every.backbone.blocks)
    for last in (4, 2):
        task, _ = build(args, "contrast", blocks=list(range(n - last, n)))
        kept = {k: v for k, v in batch.items() if k != "image"} | dict(prefix=prefix_tokens(task.backbone, batch["image"], [n - last - 1]))
        apart = same(task, task, batch, kept)
        t = turns(args.rounds, every=updates(every, batch), uncached=updates(task, batch), kept=updates(task, kept))
        say(f"step, last {last} blocks, prefix kept", "adapters in every block", t["every"], t["kept"], f"last {last} without the kept prefix {t['uncached']:.2f} s; equal to it to {apart:.0e}")


def part_epoch(args, say):
    "A whole epoch of `fit`, files and all, with adapters in the last four blocks: from images, and from a kept prefix."
    import tempfile
    from dataclasses import replace
    from htlab.dataset import ImageSet
    from htlab.head import LinearHead
    from htlab.manifest import Manifest
    from htlab.prefix import PrefixSet
    from htlab.task import Classify
    from htlab.train import TrainConfig, fit
    n = len(build(args, "segment")[0].backbone.blocks)
    tower = build(args, "segment", blocks=list(range(n - 4, n)))[0].backbone
    table = Manifest.load("phantom")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HTLAB_CACHE"] = folder
        images = ImageSet(replace(table, df=table.df.iloc[:3 * args.batch]), tower.size, progress=False)
        kept = PrefixSet(images, tower, progress=False)
        task, config = Classify(tower, LinearHead(tower.embed_dim)), TrainConfig(epochs=1, batch_size=args.batch, device=args.device)
        def epoch(data):
            with tempfile.TemporaryDirectory() as run: fit(task, data, None, config, run, progress=False)
        t = turns(args.rounds, plain=lambda: epoch(images), kept=lambda: epoch(kept))
    say(f"epoch of {3 * args.batch} images, last 4 blocks, prefix kept", "the same from images", t["plain"], t["kept"], "read from disk; filled once before, which is not counted")


def part_images(args, say):
    "An epoch of augmented batches from files: PIL and torchvision item by item, against the store."
    out = subprocess.run([sys.executable, Path(__file__).with_name("store.py"), "--n", "100", "--threads", str(args.threads), "--rounds", str(args.rounds)], capture_output=True, text=True, check=True).stdout
    line = next(l for l in out.splitlines() if l.startswith("cpu, augmented"))
    *others, store = [float(v) for v in re.findall(r"([\d.]+) images/s", line)]
    say("100 images of about 500 x 600, augmented", "PIL and torchvision, the faster of with and without workers", 100 / max(others), 100 / store, "decoded once into the store, which is not counted")


def part_cases(args, say):
    "Dice, HD95 and ASD of 1000 masks against MONAI, case by case; and a whole evaluation at the size of the files, the network apart."
    import tempfile
    import numpy as np
    import pandas as pd
    import torch
    import torch.nn.functional as F
    from joblib import Parallel, delayed
    from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
    from PIL import Image
    from scipy.ndimage import gaussian_filter
    warnings.simplefilter("ignore")  # MONAI's of itself
    from htlab.dataset import ImageSet
    from htlab.evaluate import case_metrics, evaluate_segmentation
    from htlab.manifest import Manifest, measure
    rng, names = np.random.default_rng(0), ("dice", "hd95", "asd")
    def blob(shape, at, radius):
        z, x = np.ogrid[:shape[0], :shape[1]]
        return np.hypot(z - at[0], x - at[1]) + 6 * gaussian_filter(rng.standard_normal(shape), 8) * 30 < radius
    def monai(p, t):
        a, b = (torch.from_numpy(m)[None, None].float() for m in (p, t))
        return [compute_dice(a, b).item(), compute_hausdorff_distance(a, b, include_background=True, percentile=95).item(), compute_average_surface_distance(a, b, include_background=True, symmetric=True).item()]
    square = (224, 224)
    pairs = [(blob(square, at + rng.normal(0, 4, 2), r + rng.normal(0, 3)), blob(square, at, r)) for at, r in ((rng.uniform(70, 150, 2), rng.uniform(15, 55)) for _ in range(1000))]
    pairs = [(p, t) for p, t in pairs if p.any() and t.any()]
    def ours(): return np.array([[m[k] for k in names] for m in (case_metrics(p, t) for p, t in pairs)])
    apart = np.abs(np.array([monai(p, t) for p, t in pairs]) - ours()).max()
    assert apart < 1e-4, f"the routes differ by {apart:.1e} (pixels)"
    t = turns(1, monai=lambda: [monai(p, t) for p, t in pairs], ours=ours, many=lambda: Parallel(args.threads)(delayed(case_metrics)(p, t) for p, t in pairs))
    say(f"Dice, HD95, ASD of {len(pairs)} masks of 224 x 224", "MONAI, case by case", t["monai"], t["ours"], f"equal to {apart:.0e} pixels; in {args.threads} processes that run already {t['many']:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HTLAB_CACHE"], root = f"{folder}/cache", Path(folder)
        for kind in ("images", "masks"): (root / kind).mkdir()
        ids = [f"{i:03d}" for i in range(100)]
        for i in ids:
            h, w = rng.integers((460, 560), (541, 621))
            Image.fromarray(rng.integers(0, 256, (h, w), np.uint8)).save(root / f"images/{i}.png")
            Image.fromarray(blob((h, w), (h / 2, w / 2), rng.uniform(60, 150)).astype(np.uint8) * 255).save(root / f"masks/{i}.png")
        table = measure(pd.DataFrame(dict(id=ids, image=[f"images/{i}.png" for i in ids], mask=[f"masks/{i}.png" for i in ids], label="lesion", group=ids, split="test")), root)
        data = ImageSet(Manifest(table, "benchmark", root), 224, progress=False)
        class Shifted(torch.nn.Module):
            "Answers with the masks, moved and blurred"
            def predict(self, batch):
                p = F.avg_pool2d(batch["mask"].roll((4, 5), (1, 2))[:, None].float(), 9, 1, 4)
                return torch.cat([1 - p, p], 1)
        task = Shifted()
        said = torch.cat([task.predict(dict(mask=data[i]["mask"][None])) for i in range(len(ids))])
        def plain():
            rows = []
            for i, p in zip(ids, said):
                image, mask = (np.asarray(Image.open(root / f"{k}/{i}.png").convert("L")) for k in ("images", "masks"))
                (h, w), k = image.shape, 224 / max(image.shape)
                h, w = round(h * k), round(w * k)
                top, left = (224 - h) // 2, (224 - w) // 2
                native = F.interpolate(p[None, :, top:top + h, left:left + w], image.shape, mode="bilinear", align_corners=False)[0]
                rows.append(monai((native.argmax(0) == 1).numpy(), mask > 127))
            return np.array(rows)
        def fast(): return evaluate_segmentation(task, data, progress=False)[list(names)].to_numpy()
        apart = np.abs(plain() - fast()).max()
        assert apart < 1e-4, f"the routes differ by {apart:.1e} (pixels)"
        t = turns(args.rounds, plain=plain, fast=fast)
    say(f"evaluation of {len(ids)} files of about 500 x 600, the network apart", "PIL, argmax, MONAI, case by case", t["plain"], t["fast"], f"equal to {apart:.0e} pixels")


def part_heads(args, say):
    "Heads on kept embeddings against the same linear probe with the images passing the tower in every epoch."
    import numpy as np
    import torch
    from htlab.backbone import load_backbone
    from htlab.fewshot import HEADS, fit_head
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 500)
    x = rng.standard_normal((500, 512)) + .3 * y[:, None]
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    tower = load_backbone(args.tower, "random", text=False)
    images = torch.rand(args.batch, 3, *tower.size)
    def pass_():
        with torch.no_grad(): tower.embed_image(images)
    one = turns(1, pass_=pass_)["pass_"] / args.batch
    for name in HEADS:
        t = turns(args.rounds, fit=lambda: fit_head(name, x, y, 2))["fit"]
        say(f"{name} head, 500 images", "one pass of the images through the tower", 500 * one, t, "")


def part_start(args, say):
    def run(*line): return lambda: subprocess.run(line, capture_output=True, check=True)
    t = turns(args.rounds, torch=run(sys.executable, "-c", "import torch"), package=run(sys.executable, "-c", "import htlab"), cli=run(Path(sys.executable).with_name("htlab"), "--help"))
    say("import htlab", "import torch", t["torch"], t["package"], "")
    say("htlab --help", "import torch", t["torch"], t["cli"], "")


def part_slopes(args, say):
    "How a step grows; 1 is linear, in log against log."
    import numpy as np
    import torch
    from htlab.backbone import load_backbone
    from htlab.evaluate import case_metrics
    from htlab.head import SegmentHead
    from htlab.inject import adapt
    from htlab.task import Segment
    def seconds(size=112, n=8, blocks=6):
        torch.manual_seed(0)
        tower = adapt(load_backbone("tiny", size=size), "hybrid", blocks=list(range(6 - blocks, 6)))
        batch = dict(image=torch.rand(n, 3, size, size), mask=torch.randint(0, 2, (n, size, size)))
        return turns(args.rounds, step=updates(Segment(tower, SegmentHead(128, 1), [5]).train(), batch))["step"]
    def cases(n):
        a, b = np.zeros((2, 224, 224), bool)
        a[40:120, 50:140] = b[50:130, 45:130] = True
        return turns(args.rounds, cases=lambda: [case_metrics(a, b) for _ in range(n)])["cases"]
    def slope(f, at): return np.polyfit(np.log(at), np.log([f(v) for v in at]), 1)[0]
    print(f"slopes (log seconds against log): images in a step {slope(lambda n: seconds(n=n), (4, 8, 16, 32)):.2f}, pixels {slope(lambda s: seconds(size=s), (112, 168, 224)) / 2:.2f}, "
          f"cases of an evaluation {slope(cases, (50, 100, 200)):.2f}; a step over one with adapters in all six blocks of tiny: " + ", ".join(f"last {b}: {seconds(blocks=b) / seconds():.2f}" for b in (1, 2, 4)), flush=True)


def part_throughput(args, say):
    "Images a second of whole steps against the plain route in float32 on the same device; operations over seconds over what one large product reaches there."
    import torch
    from htlab.pace import PRECISIONS, peak_flops, step_flops, step_seconds
    cuda = args.device.startswith("cuda")
    peak = {p: peak_flops(args.device, p) for p in PRECISIONS}
    print("one large product: " + ", ".join(f"{p} {v / 1e12:.1f} TFLOP/s" for p, v in peak.items()) + "\n\n| task | batch | way | images/s | times plain | GB | utilisation |\n|---|---|---|---|---|---|---|", flush=True)
    for kind in ("segment", "contrast"):
        for n in map(int, args.batches.split(",")):
            task, batch = build(argparse.Namespace(**vars(args) | dict(batch=n)), kind)
            ways = {"plain, fp32": (plain(copy.deepcopy(task)), "fp32", False)} | {p + ", compiled" * c: (task, p, c) for c in (False, True)[:1 + cuda] for p in PRECISIONS}
            with torch.no_grad(): task(batch)  # captions are encoded once, which is no part of a step
            operations, base = sum(step_flops(task, batch).values()), math.nan
            for name, (model, precision, compile) in ways.items():
                try: took = step_seconds(model, batch, precision, compile, args.rounds)
                except torch.OutOfMemoryError: print(f"| {kind} | {n} | {name} | out of memory | | | |", flush=True); continue
                finally: cuda and torch.cuda.empty_cache()
                if model is not task: base = took["step"]
                gb = f"{took['gb']:.1f}" if cuda else ""
                used = f"{operations / took['step'] / peak[precision]:.2f}" if model is task else ""    # the plain route computes more than that
                print(f"| {kind} | {n} | {name} | {n / took['step']:.0f} | {base / took['step']:.2f} | {gb} | {used} |", flush=True)
            del task, batch, ways, model
    print(flush=True)


def part_dice(args, say):
    "The same training by the plain route in float32, and as `precision='auto'` has it: is Dice the same?"
    import tempfile
    from dataclasses import replace
    from htlab.dataset import ImageSet
    from htlab.evaluate import evaluate_segmentation, paired
    from htlab.manifest import Manifest
    from htlab.train import TrainConfig, fit
    task, _ = build(args, "segment")
    table, size = Manifest.load("phantom"), task.backbone.size[0]
    part = lambda split, n: ImageSet(replace(s := table.split(split), df=s.df.iloc[:n]), size, progress=False)
    train, test = part("train", args.images), part("test", args.images)
    cases, took = {}, {}
    for name, model, precision in (("plain", plain(copy.deepcopy(task)), "fp32"), ("fast", task, "auto")):
        with tempfile.TemporaryDirectory() as folder: history = fit(model, train, None, TrainConfig(epochs=args.epochs, batch_size=min(32, len(train)), lr=1e-3, device=args.device.split(":")[0], precision=precision, patience=0), folder, progress=False)
        cases[name], took[name] = evaluate_segmentation(model, test, progress=False), history.seconds.sum()
    d = paired(cases["fast"], cases["plain"], "dice")
    say(f"training, {args.epochs} epochs of {len(train)} images", "plain, fp32", took["plain"], took["fast"], f"{history.attrs['precision']}{', compiled' * history.attrs['torch_compile']}; Dice {d['b']:.3f} plain, {d['a']:.3f}: difference {d['diff']:+.4f} [{d['lo']:+.4f}, {d['hi']:+.4f}], n = {d['n']}")


if __name__ == "__main__":
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else GPU if args.device.startswith("cuda") else PARTS
    if unknown := set(chosen) - set(PARTS + GPU): parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS + GPU)}")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    torch.set_num_threads(args.threads)
    if args.memory: child(args); sys.exit()
    import htlab
    def say(what, against, base, ours, note, value=None):
        print(f"| {what} | {against} | {base:.3g} s | {ours:.3g} s | {f'{value:.2f} of it' if value else f'{base / ours:.1f} times'} | {note} |", flush=True)
    began = time.perf_counter()
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()) if sys.platform == "linux" else platform.processor()
    if args.device.startswith("cuda"): cpu = torch.cuda.get_device_name(args.device)
    print(f"{args.tower}, batch {args.batch}, {args.threads} threads; {cpu}, {os.cpu_count()} cores; torch {torch.__version__}, htlab {htlab.__version__}; median of {args.rounds}\n")
    if "throughput" in chosen: part_throughput(args, say)
    if set(chosen) - {"throughput"}: print("| what | against | that | HTLab | ratio | |\n|---|---|---|---|---|---|")
    for name in PARTS + GPU[1:]:
        if name in chosen: globals()[f"part_{name}"](args, say)
    print(f"\n{time.perf_counter() - began:.0f} s in all")
