"""Does the audit find copies, does it cry wolf, and does it take minutes?

    python benchmarks/audit.py                          # 2000 planted copies among 6000 scenes of three simulated scanners
    python benchmarks/audit.py --images FOLDER          # the same with copies of the PNG and JPEG files there
    python benchmarks/audit.py --scale 100000           # seconds for 5000, 20 000, ... images, and the slope

A copy is mirrored (every second one), cropped by up to 10 % at each side, rescaled by 0.5 to 1.5, changed in brightness and contrast (30 % each) and gamma (0.7 to 1.4), and saved as JPEG of
quality 30 to 95. It counts as found when it comes into one cluster with its image; a listed pair of two different images is false. What is one cluster among the files of FOLDER before anything is
planted is the data set's own, and no false pair. With --scale the images are simulated thumbnails, one in a hundred planted as above; what the one pass over the pixels costs is measured on images of 480 x 600.
"""
import argparse, io, os, resource, time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
for name, default, text in (("n", 2000, "planted copies"), ("scenes", 6000, "simulated images among which they hide"), ("size", 192, "pixels along each side of a scene"),
                            ("scale", 0, "time the search for up to so many images"), ("workers", os.cpu_count(), "threads, and processes that simulate"), ("seed", 0, "of everything")):
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
parser.add_argument("--images", help="plant copies of the images in this folder instead")
args = parser.parse_args()
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(args.workers)} # before numpy, which needs no threads of its own; those of OpenMP are for faiss

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from PIL import Image
from scipy import stats

from htlab.audit import KINDS, SIDE, _look, _parts, _resize, audit, find_copies, near_pairs
from htlab.manifest import Manifest
from htlab.speckle import SCANNERS, bmode


def changed(g, rng, mirror):
    "What happens to an image on its way through hospitals, papers and repositories"
    if mirror: g = g[:, ::-1]
    (h, w), (l, r, t, b) = g.shape[:2], rng.uniform(0, .1, 4)
    g = np.ascontiguousarray(g[round(t * h):h - round(b * h), round(l * w):w - round(r * w)])
    s = rng.uniform(.5, 1.5)
    v = (np.asarray(Image.fromarray(g).resize([max(8, round(n * s)) for n in g.shape[1::-1]], Image.BICUBIC)) / 255)**rng.uniform(.7, 1.4)
    v = ((v - v.mean()) * rng.uniform(.7, 1.3) + v.mean()) * rng.uniform(.7, 1.3)
    Image.fromarray((np.clip(v, 0, 1) * 255 + .5).astype(np.uint8)).save(f := io.BytesIO(), "jpeg", quality=int(rng.integers(30, 96)))
    return np.asarray(Image.open(f))


def table(n): # a manifest of n images that exist in memory only
    ids = [f"i{k}" for k in range(n)]
    return Manifest(pd.DataFrame({"id": ids, "image": [f"sim:{args.seed}/{k}" for k in range(n)], "mask": "", "label": "x", "group": ids, "split": "train",
                                  "sha256": [f"{k:064x}" for k in range(n)], "width": 1, "height": 1}), "planted")


def listed(images): # pairs of numbers that the audit lists
    a = audit(table(len(images)), lambda row: (images[int(row["id"][1:])], None), progress=False, workers=args.workers)
    p = a.pairs[a.pairs.kind.isin(KINDS)]
    return sorted(tuple(sorted((int(i[1:]), int(j[1:])))) for i, j in zip(p.a, p.b))


def scenes(first, n):
    from htlab.dataset import scene
    return [scene(4000 + args.seed, first + i, args.size).bmode() for i in range(n)]


def plant():
    start, kin = time.time(), None
    if args.images:
        files = sorted(p for p in Path(args.images).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp") and "mask" not in p.stem)
        images = [np.asarray(Image.open(p).convert("L")) for p in files]
        kin = _parts(len(images), known := listed(images))
        print(f"{len(images)} files; among them {len(known)} pairs before anything is planted")
    else: images = sum(Parallel(args.workers)(delayed(scenes)(i, min(100, args.scenes - i)) for i in range(0, args.scenes, 100)), [])
    rng, n = np.random.default_rng(args.seed), min(args.n, len(images))
    which = rng.permutation(len(images))[:n]
    copies = [changed(images[i], rng, k % 2) for k, i in enumerate(which)]
    print(f"{len(images)} images, {n} copies planted ({time.time() - start:.0f} s)")
    start, own = time.time(), np.r_[np.arange(len(images)), which]
    pairs = listed([*images, *copies])
    took, part, kin = time.time() - start, _parts(len(own), pairs), own if kin is None else kin[own]
    found = int((part[which] == part[len(images):]).sum())
    false = [(a, b) for a, b in pairs if kin[a] != kin[b]]
    low, high = stats.binomtest(found, n).proportion_ci(method="exact")
    print(f"found {found} of {n}: {found / n:.2%} (95 % Clopper-Pearson {low:.2%} to {high:.2%})")
    print(f"false pairs {len(false)} of {len(own)} images: {1000 * len(false) / len(own):.2f} per 1000 (at most {1000 * stats.chi2.ppf(.975, 2 * len(false) + 2) / 2 / len(own):.2f}, 95 % Poisson)")
    if args.images:
        name = lambda i: files[own[i]].relative_to(args.images).as_posix() + " (copy)" * (i >= len(images))
        for a, b in false[:20]: print("  ", name(a), "=", name(b))
    print(f"audit: {took:.0f} s, {1000 * took / len(own):.1f} ms per image, {args.workers} workers")


def tissue(rng, h, w, mm): # simulated tissue below a skin line
    u, v = (np.cos(np.pi * np.outer(np.arange(10), (np.arange(n) + .5) / n)).astype(np.float32) for n in (h, w))
    echo = u.T @ (rng.standard_normal((10, 10), dtype=np.float32) * 6 / (1 + np.add.outer(range(10), range(10)))) @ v
    echo += (8 * np.exp(-np.arange(h) * (20 / h)) - 10 * np.arange(h) / h)[:, None]
    return bmode(10**(echo / 20), SCANNERS["ABC"[rng.integers(3)]], mm, rng)


def thumbnails(first, n): # and of each hundredth that of a copy
    out, copies = np.empty((n, SIDE, SIDE), np.uint8), {}
    for k in range(n):
        rng = np.random.default_rng((args.seed, first + k))
        g = tissue(rng, 160, 160, .25); out[k] = _resize(g)
        if (first + k) % 100 == 0: copies[first + k] = _resize(changed(g, rng, k % 200 == 0))
    return out, copies


def scale():
    sizes = sorted({*(n for n in (5000, 20000, 50000) if n < args.scale), args.scale})
    start, total = time.time(), np.empty((sizes[-1] + sizes[-1] // 100 + 1, SIDE, SIDE), np.uint8) # originals, then the copies
    at, copies = 0, {}
    for t, c in Parallel(args.workers, return_as="generator")(delayed(thumbnails)(i, min(500, sizes[-1] - i)) for i in range(0, sizes[-1], 500)):
        total[at:at + len(t)] = t; at += len(t); copies |= c
    print(f"simulated {sizes[-1]} thumbnails in {time.time() - start:.0f} s", flush=True)
    images = [tissue(np.random.default_rng(i), 480, 600, .08) for i in range(40)]
    start = time.process_time()
    for g in images: _look(lambda row: (g, None), {}, True)
    each = (time.process_time() - start) / len(images)
    print(f"one pass over the pixels: {1000 * each:.1f} ms of one core per image of 480 x 600, decoding not counted: {each * sizes[-1] / args.workers:.0f} s for {sizes[-1]} images on {args.workers} cores")
    print(f"{'images':>8} {'copies':>8} {'near':>8} {'seconds':>8} {'cpu':>8} {'slope':>6} {'found':>14} {'false':>6} {'GiB':>6}")
    before = None
    for n in sizes:
        mine = [i for i in copies if i < n]
        thumbs = np.concatenate([total[:n], np.stack([copies[i] for i in mine])]) if n < sizes[-1] else total[:n + len(mine)]
        thumbs[n:] = [copies[i] for i in mine]
        own = np.r_[np.arange(n), mine]
        c0, t0 = time.process_time(), time.time(); p = find_copies(thumbs, workers=args.workers)[0]
        t1 = time.time(); q = near_pairs(thumbs)[0]
        t2, cpu = time.time(), time.process_time() - c0 # of all threads; the slope is of this one, which other people's processes change less
        pairs = {tuple(sorted(x)) for x in [*p.tolist(), *q.tolist()]}
        good = {(own[a], b) for a, b in pairs if own[a] == own[b]}
        slope = f"{np.log(cpu / before[1]) / np.log(n / before[0]):.2f}" if before else ""
        print(f"{n:>8} {t1 - t0:>8.1f} {t2 - t1:>8.1f} {t2 - t0:>8.1f} {cpu:>8.1f} {slope:>6} {len(good):>6} of {len(mine):<5} {len(pairs) - len(good):>5} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:>6.1f}", flush=True)
        before = n, cpu


scale() if args.scale else plant()
