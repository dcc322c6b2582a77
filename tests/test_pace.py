"Laws of htlab.pace: counting agrees with theory, measuring leaves nothing behind, the choice is the cheapest, a profile accounts for all."
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from htlab import pace
from htlab.backbone import load_backbone
from htlab.head import LinearHead, SegmentHead
from htlab.inject import adapt
from htlab.pace import compiled, fastest, peak_flops, step_flops, step_seconds, where_time_goes
from htlab.task import Classify, Contrast, Segment

torch.set_num_threads(1)


def tower(text=False): return load_backbone("tiny", "random", text=text, size=(48, 64))
def batch(n=2): return dict(image=torch.rand(n, 3, 48, 64), label=torch.arange(n) % 2, mask=torch.randint(0, 2, (n, 48, 64)), text=[f"image {i}" for i in range(n)])
def classify(op="hybrid", **kw): return Classify(adapt(tower(), op, **kw), LinearHead(128))


def test_a_forward_pass_is_that_of_the_formula():
    "Blocks and head by hand; what is left is the convolutional stem, counted apart."
    b = tower(); task, x = Classify(b, LinearHead(128)), batch(3)
    n, d = 1 + b.grid[0] * b.grid[1], b.width
    with pace._counting() as stem, torch.no_grad(): b.tower._embeds(x["image"])
    head = 2 * d * 128 + 2 * 128 * 2                                   # projection to the embedding, and the linear head
    assert step_flops(task, x)["forward"] == 3 * (b.depth * (24 * n * d**2 + 4 * n**2 * d) + head) + stem.get_total_flops()


@given(c=st.sampled_from([2, 4]), groups=st.sampled_from([1, 2]), k=st.sampled_from([1, 3]), stride=st.integers(1, 2), up=st.booleans(), frozen=st.booleans(), first=st.booleans())
@settings(max_examples=40, deadline=None)
def test_convolutions_cost_back_what_they_cost_there(c, groups, k, stride, up, frozen, first):
    "Once for what went in, if that is asked for, and once for the weights, if they learn; of either direction, in groups or not."
    conv = (nn.ConvTranspose2d if up else nn.Conv2d)(c, 2 * c, k, stride, groups=groups).requires_grad_(not frozen)
    x = torch.rand(2, c, 7, 6, requires_grad=not first or frozen)
    with pace._counting() as counter: y = conv(x).sum()
    there = counter.get_total_flops()
    with counter: y.backward()
    assert counter.get_total_flops() == there * ((not frozen) + (not first or frozen))


def test_the_bound_falls_with_the_blocks():
    n = 6
    back = [step_flops(classify(blocks=list(range(n - k, n))), batch())["backward"] for k in (1, 2, 4, 6)]
    assert back == sorted(set(back)) and step_flops(classify("none"), batch())["backward"] < back[0] and back[-1] < step_flops(classify("full"), batch())["backward"]
    steps = [b - a for a, b in zip(back, back[1:])]
    assert steps[2] == steps[1] == 2 * steps[0]                       # every block the same


@pytest.mark.parametrize("make", [classify, lambda: Segment(adapt(tower(), "mona"), SegmentHead(128, 3, hidden=32)), lambda: Contrast(adapt(tower(True), "lora")), lambda: Classify(adapt(load_backbone("resnet18", "random", size=32), "full"), LinearHead(512))], ids=["hybrid", "mona", "lora", "batchnorm"])
@pytest.mark.parametrize("measure", [step_flops, step_seconds, where_time_goes, lambda t, b: fastest(t, b, 10, steps=1)], ids=["flops", "seconds", "profile", "fastest"])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_nothing_behind(make, measure, training):
    task, x = make().train(training), batch()
    if task.backbone.kind == "conv": x["image"] = x["image"][..., :32, :32]
    learning = [p for p in task.parameters() if p.requires_grad]
    learning[0].grad = torch.ones_like(learning[0])
    def state(): return ({k: v.clone() for k, v in task.state_dict().items()}, [p.grad is None for p in task.parameters()], [m.training for m in task.modules()],
                         [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in task.modules()], torch.get_rng_state())
    before = state()
    measure(task, x)
    for a, b in zip(before, state()):
        if isinstance(a, dict): assert all(torch.equal(v, b[k]) for k, v in a.items())
        elif torch.is_tensor(a): assert torch.equal(a, b)
        else: assert a == b
    assert torch.equal(learning[0].grad, torch.ones_like(learning[0]))


class Interrupted(Classify):
    def loss(self, output, batch): raise KeyboardInterrupt


@pytest.mark.parametrize("measure", [step_flops, step_seconds, where_time_goes])
def test_an_interrupt_leaves_nothing_behind(measure):
    task = Interrupted(adapt(tower(), "hybrid"), LinearHead(128)).eval()
    x, dice = batch(), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt): measure(task, x)
    assert not task.training and torch.equal(dice, torch.get_rng_state()) and not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


class Clocked(nn.Module):
    "A task whose steps take what a table says, by a clock of its own."
    def __init__(self, monkeypatch, first, each):
        super().__init__()
        self.w, self.now, self.first, self.each, self.done = nn.Parameter(torch.ones(())), 0., first, each, {}
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.now)
        self.way = None
        real = pace.compiled
        def noted(task, on=True): self.way = on; return real(task, False)
        monkeypatch.setattr(pace, "compiled", noted)
    def forward(self, batch):
        if not torch.is_grad_enabled(): return                          # what is common to all ways
        way = "bf16" if torch.is_autocast_enabled("cpu") else "fp32", bool(self.way)
        self.done[way] = self.done.get(way, 0) + 1
        self.now += self.first[way] if self.done[way] == 1 else self.each[way]
        if math.isinf(self.each[way]): raise RuntimeError("no compiler here\nand a long story")
        return dict(loss=self.w * 2, output=self.w)


WAYS = [(p, c) for c in (False, True) for p in pace.PRECISIONS]

@given(first=st.lists(st.floats(1, 100), min_size=4, max_size=4), each=st.lists(st.floats(.01, 10), min_size=4, max_size=4), updates=st.integers(2, 1000), broken=st.sets(st.sampled_from(range(4)), max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_way_taken_is_over_soonest(first, each, updates, broken):
    "Start and steps added up, for however many there are; what fails says why and is never taken."
    with pytest.MonkeyPatch.context() as patch:
        each = [math.inf if i in broken else e for i, e in enumerate(each)]
        task = Clocked(patch, dict(zip(WAYS, first)), dict(zip(WAYS, each)))
        table = fastest(task, {}, updates, ways=WAYS)
    total = {w: math.inf if math.isinf(e) else f + e + (updates - 2) * e for w, f, e in zip(WAYS, first, each)}      # also for two updates, where none is left to pay for
    best = (table.precision[0], bool(table.torch_compile[0]))
    assert total[best] == pytest.approx(min(total.values())) and table.total[0] == pytest.approx(total[best])
    assert sorted(table.why) == sorted(["RuntimeError: no compiler here"] * len(broken) + [""] * (4 - len(broken)))


def test_nothing_works_is_said(monkeypatch):
    task = Clocked(monkeypatch, dict.fromkeys(WAYS, 1.), dict.fromkeys(WAYS, math.inf))
    for updates in (1, 2, 10):
        with pytest.raises(RuntimeError, match=r"no way .* fp32: RuntimeError: no compiler here; bf16, compiled: "): fastest(task, {}, updates, ways=[("fp32", False), ("bf16", True)])
    with pytest.raises(ValueError, match="precision='half': there are fp32, bf16"): step_seconds(classify(), batch(), "half")


def test_off_the_gpu_nothing_is_compiled(): assert set(fastest(classify(), batch(), 10, steps=1).torch_compile) == {False}


def test_compiled_blocks_give_the_same_and_are_gone_afterwards(monkeypatch):
    "Without the C++ compiler, which takes half a minute; adapters through it: test_inject.test_compile."
    monkeypatch.setattr(nn.Module, "compile", lambda m: setattr(m, "_compiled_call_impl", torch.compile(m._call_impl, backend="aot_eager")))
    task, x = classify("hybrid", blocks=[4, 5]), batch()
    names, plain = list(task.state_dict()), task(x)["loss"]
    with compiled(task):
        assert all(b._compiled_call_impl is not None for b in task.backbone.blocks)
        loss = task.eval()(x)["loss"]
        loss.backward()
        assert list(task.state_dict()) == names and all(p.grad is not None for p in task.head.parameters())
    torch.testing.assert_close(loss, task.eval()(x)["loss"], atol=1e-5, rtol=1e-5)
    assert all(b._compiled_call_impl is None for b in task.backbone.blocks) and plain.isfinite()
    whole = nn.Linear(2, 2)
    with compiled(whole): assert whole._compiled_call_impl is not None
    with compiled(whole, False): assert whole._compiled_call_impl is None


def test_a_profile_accounts_for_all():
    seen = where_time_goes(Segment(adapt(tower(), "hybrid"), SegmentHead(128, 3, hidden=32)), batch())
    assert seen.share.sum() == pytest.approx(1) and (seen.seconds > 0).all() and not seen.duplicated(["part", "phase", "kind"]).any()
    at = set(zip(seen.part, seen.phase, seen.kind))
    for part, phase, kind in itertools.product(["tower", "learns in the tower", "head"], ["forward", "backward"], ["matrix products"]): assert (part, phase, kind) in at
    assert {p for p, _, k in at if k == "attention"} == {"tower"} and ("learns in the tower", "backward", "convolutions") in at and set(seen.kind) <= {*pace.KINDS, "number by number"}
    head = where_time_goes(classify("none"), batch())                  # nothing of the tower learns, so no way back leads into it
    assert not set(head[head.phase == "backward"].part) & {"tower", "learns in the tower"}


def test_a_task_without_a_tower():
    class Bare(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(4, 4)
        def forward(self, batch): y = self.layer(batch["image"]); return dict(loss=y.square().sum(), output=y)
    x = dict(image=torch.rand(3, 4))
    assert step_flops(Bare(), x) == dict(forward=2 * 3 * 16, backward=2 * 3 * 16) and set(where_time_goes(Bare(), x).part) == {"the rest"}


def test_peak_is_a_rate():
    small, large = (peak_flops(size=n) for n in (64, 512))
    assert 1e7 < small < 1e14 and 1e9 < large < 1e14


def test_the_bench_for_a_gpu_runs_on_a_cpu():
    "What it says, for a tower of no size."
    run = subprocess.run([sys.executable, Path(__file__).parents[1] / "benchmarks/speed.py", *"--tower tiny --batch 2 --batches 2 --rounds 1 --images 8 --epochs 1 --threads 1 --only throughput,dice".split()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in run.stdout.splitlines() if line.startswith("|")]
    assert [r[:3] for r in rows if r[0] in ("segment", "contrast")] == [[task, "2", way] for task in ("segment", "contrast") for way in ("plain, fp32", "fp32", "bf16")]
    assert all(float(r[3]) > 0 and float(r[4]) > 0 for r in rows if r[0] in ("segment", "contrast"))
    found = {r[0]: r[-1] for r in rows}
    assert re.search(r"Dice [\d.]+ plain, [\d.]+: difference .* n = 8$", found["training, 1 epochs of 8 images"])
