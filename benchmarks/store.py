"""Images per second: the plain route (PIL open, convert, resize, augment per item) against the store, in one run.

    python benchmarks/store.py                      # 300 simulated B-mode images of about 500 x 600 in a temporary folder
    python benchmarks/store.py --n 1000 --size 336 --threads 4

Both routes give the same: `image` (B, 3, H, W) float in [0, 1] and `mask` (B, H, W) int64, in shuffled batches, on the device. Plain is the usual torch data set with torchvision v2,
on the CPU, without workers and again with as many workers as threads; the store augments whole batches where the model is. The ratio is against the faster plain one.
Rounds alternate, so that both meet the same machine, and the median of each counts.
"""
import argparse, os, tempfile, time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
for name, default, text in (("n", 300, "images"), ("size", 224, "pixels along each side"), ("batch", 32, "images in a batch"), ("threads", 1, "of PyTorch, and workers of the plain route"), ("rounds", 5, "epochs of each route")):
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from htlab.dataset import ImageSet, scene
from htlab.manifest import Manifest, measure
from htlab.store import fit_box

torch.set_num_threads(args.threads)


def write(root, first):
    "Ten cuts of one simulated scene, each as a scanner would save it: about 500 x 600 pixels, PNG, and its mask"
    rng, s = np.random.default_rng(first), scene(9, first, 640)
    image, mask = s.bmode(), s.mask.astype(np.uint8) * 255
    for i in range(first, min(first + 10, args.n)):
        h, w = rng.integers((460, 560), (541, 621))
        y, x = rng.integers((641 - h, 641 - w))
        for kind, a in (("images", image), ("masks", mask)): Image.fromarray(a[y:y + h, x:x + w]).save(root / f"{kind}/{i:04d}.png")


class Plain(Dataset):
    "The route everybody writes first; the recipe of the release as torchvision v2 has it"
    def __init__(self, data, size, augment):
        self.root, self.rows, self.size = data.root, data.df.to_dict("records"), (size, size)
        strong = [v2.ColorJitter(brightness=.25), v2.ColorJitter(contrast=.25), v2.GaussianBlur(3, (.1, 1.0)), v2.RandomAdjustSharpness(2, p=1), v2.RandomPosterize(5, p=1), v2.RandomSolarize(.9, p=1), v2.RandomEqualize(p=1)]
        weak = [v2.RandomHorizontalFlip(), v2.RandomAffine(0, translate=(.05, .05), scale=(.8, 1.2), interpolation=v2.InterpolationMode.BILINEAR)]
        self.augment = v2.RandomApply([v2.RandomChoice(strong), *weak], p=.5) if augment else None

    def __len__(self): return len(self.rows)

    def __getitem__(self, i):
        r = self.rows[i]
        image, mask = (Image.open(self.root / r[c]).convert("L") for c in ("image", "mask"))
        top, left, h, w = fit_box(image.height, image.width, self.size)
        boxed = np.zeros((2, *self.size), np.uint8)
        boxed[0, top:top + h, left:left + w] = image.resize((w, h), Image.Resampling.BICUBIC)
        boxed[1, top:top + h, left:left + w] = np.asarray(mask.resize((w, h), Image.Resampling.NEAREST)) > 127
        image, mask = tv_tensors.Image(boxed[:1]), tv_tensors.Mask(boxed[1])
        if self.augment: image, mask = self.augment(image, mask)
        return {"image": torch.as_tensor(image).float().div(255).expand(3, -1, -1), "mask": torch.as_tensor(mask).long(), "label": 0, "id": r["id"]}


def plain(data, device, workers):
    loader = DataLoader(data, args.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0, pin_memory=device == "cuda")
    def epoch(e):
        for b in loader: b["image"].to(device), b["mask"].to(device)
    return epoch


def stored(data, device):
    def epoch(e):
        data.set_epoch(e)
        order = torch.randperm(len(data)).tolist()
        for i in range(0, len(order), args.batch):
            b = data.batch(order[i:i + args.batch])
            out = data.finish(b | {"pixels": b["pixels"].to(device)})
            assert out["image"].shape[1:] == (3, args.size, args.size)
    return epoch


def images_per_second(routes, device):
    "name -> median over the rounds; the first, which starts workers and warms caches, does not count"
    taken = {name: [] for name in routes}
    for e in range(args.rounds + 1):
        for name, epoch in routes.items():
            start = time.perf_counter(); epoch(e)
            if device == "cuda": torch.cuda.synchronize()
            if e: taken[name].append(args.n / (time.perf_counter() - start))
    return {name: float(np.median(v)) for name, v in taken.items()}


with tempfile.TemporaryDirectory() as home:
    os.environ["HTLAB_CACHE"] = f"{home}/cache"
    root = Path(home) / "set"
    for d in ("images", "masks"): (root / d).mkdir(parents=True)
    start = time.perf_counter()
    Parallel(n_jobs=-1)(delayed(write)(root, i) for i in range(0, args.n, 10))
    ids = [f"{i:04d}" for i in range(args.n)]
    data = Manifest(measure(pd.DataFrame(dict(id=ids, image=[f"images/{i}.png" for i in ids], mask=[f"masks/{i}.png" for i in ids], label="lesion", group=ids, split="train")), root), "benchmark", root)
    size = sum(p.stat().st_size for p in root.rglob("*.png")) / args.n
    print(f"n={args.n} PNG of {data.df.height.mean():.0f} x {data.df.width.mean():.0f} pixels, {size / 1e3:.0f} kB with mask, to {args.size} x {args.size}; batch={args.batch} threads={args.threads} of {os.cpu_count()} cores, median of {args.rounds} rounds"
          f" (written in {time.perf_counter() - start:.0f} s)")
    start = time.perf_counter()
    ImageSet(data, args.size, progress=False)
    print(f"built the store once: {args.n / (time.perf_counter() - start):.0f} images/s")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for augment in (False, True):
            usual = Plain(data, args.size, augment)
            routes = {"plain": plain(usual, device, 0), f"plain, {args.threads} worker{'s' * (args.threads > 1)}": plain(usual, device, args.threads), "store": stored(ImageSet(data, args.size, augment=augment, progress=False), device)}
            rate = images_per_second(routes, device)
            best = max(v for k, v in rate.items() if k != "store")
            print(f"{device}, {'augmented' if augment else 'not augmented'}: " + "; ".join(f"{k} {v:.0f} images/s" for k, v in rate.items()) + f"; store / best plain = {rate['store'] / best:.1f}")
