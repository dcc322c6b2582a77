"""A study pairs what belongs together, says what it leaves out, and its numbers are those of the floors below."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from htlab.evaluate import holm
from htlab.hierarchy import hierarchical, hierarchical_paired
from htlab.report import REQUIRED, RunFolder, external
from htlab.study import Study, _front


def made_up(folder, name, values, test="t1", metric="dice", ids=None, metrics=None, config=None, cases=None, **parameters):
    "A finished run folder with these values, one patient each."
    path = Path(folder) / name; path.mkdir(parents=True)
    ids = ids or [f"c{i}" for i in range(len(values))]
    (cases if cases is not None else pd.DataFrame({"id": ids, "group": ids, "label": "benign", metric: values, "policy": "diagonal"})).to_csv(path / "cases.csv", index=False)
    for f in REQUIRED[3:]: (path / f).write_text("epoch\n1\n" if f.endswith("csv") else "{}")
    (path / "metrics.json").write_text(json.dumps(metrics or {metric: {"value": float(np.mean(values)), "n": len(values), "groups": len(values), "policy": "diagonal"}}))
    (path / "config.json").write_text(json.dumps({"template": "segment", "parameters": {"adapter": "none", "seed": 1} | parameters, "split_hash": test} | (config or {})))
    return RunFolder(path)


def dice(adapter, seed, n=20, gain=.1):
    rng = np.random.default_rng([seed, *adapter.encode()])
    return .5 + .1 * np.random.default_rng(9).standard_normal(n) + gain * (adapter != "none") + .005 * rng.standard_normal() + .02 * rng.standard_normal(n)


@pytest.fixture
def grid(tmp_path): # 3 adapters x 2 sizes x 3 seeds
    for i, a in enumerate(("none", "mona", "hybrid")):
        for shots in (4., 0.):
            for s in (3, 1, 2): made_up(tmp_path / "runs", f"{a}-{shots}-{s}", dice(a, s) + .02 * (shots == 0), adapter=a, shots=shots, seed=s,
                                        config=dict(images=dict(train=100 if shots == 0 else 8), learned_parameters=10 ** (3 + i), timings=dict(total=10. * (i + 1)), resources=dict(peak_memory_mb=100. + i)))
    return tmp_path / "runs"


def test_numbers_are_those_of_hierarchy(grid):
    (grid / ".partial").mkdir(); (grid / "unfinished").mkdir(); made_up(grid, "zz", dice("x", 1), config=dict(template="compare"))
    s = Study(grid, reference="adapter=none", n_boot=300)
    assert len(s.runs) == 18 and len(s.arms) == 6 and s.metric == "dice" and s.better == "higher" and set(s.table.seeds) == {3} and len(s.paired) == 4
    of = {(r.parameters["adapter"], r.parameters["shots"], r.parameters["seed"]): r.cases for r in s.runs}
    for name, row in s.table.iterrows():
        h = hierarchical([of[row.adapter, row.shots, k] for k in (1, 2, 3)], "dice", n_boot=300)
        assert [row[k] for k in ("value", "lo", "hi", "seed_sd", "n", "groups")] == pytest.approx([h[k] for k in ("value", "lo", "hi", "seed_sd", "n", "groups")])
    for _, r in s.paired.iterrows():
        a, b = s.table.loc[r["arm"]], s.table.loc[r["from"]]
        assert b.adapter == "none" and a.shots == b.shots, "the reference is else the same"
        h = hierarchical_paired([of[a.adapter, a.shots, k] for k in (1, 2, 3)], [of["none", a.shots, k] for k in (1, 2, 3)], "dice", n_boot=600)
        assert [r[k] for k in ("diff", "lo", "hi", "p", "p_cases")] == pytest.approx([h[k] for k in ("diff", "lo", "hi", "p", "p_cases")]) and r.better == "supported"
    assert list(s.paired.p_holm) == pytest.approx(list(holm(s.paired.p))) and list(s.paired.p_cases_holm) == pytest.approx(list(holm(s.paired.p_cases)))
    assert s.table.seconds[s.table.adapter == "mona"].eq(20).all() and s.table.memory_mb.max() == 102 and s.table.parameters.min() == 1000
    assert list(s.cases) == ["arm", "id", "group", "dice"] and s.cases.groupby("arm").dice.mean().sub(s.table.value).abs().max() < 1e-12
    assert not any("one seed" in n for n in s.notes)


def test_all_that_it_leaves(grid, tmp_path):
    s = Study(grid, reference="adapter=none", n_boot=100)
    assert list(s.figures()) == ["intervals", "curves", "cost", "critical"]
    page = s.save(tmp_path / "out/study.html").read_text(encoding="utf-8")
    assert not external(page) and page.count("<img") == 4 and "p_cases_holm" in page and "adapter=hybrid, shots=4.0" in page
    for f, t in zip(s.to_csv(tmp_path / "out"), (s.table, s.paired, s.cases)): assert len(pd.read_csv(f)) == len(t)
    assert s.to_latex().count(r"\toprule") == 2 and r"95\%" in s.to_latex() and "p_holm" not in s.to_latex().replace(r"p\_holm", "")
    assert "p_holm" in str(s) and s._repr_html_().count("<table") == 2
    lines = s.curves().axes[0].get_lines()
    assert len(lines) == 3 and all(list(l.get_xdata()) == [8, 100] for l in lines)


@given(points=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pareto_front(points):
    cost, quality = zip(*points)
    front = _front(cost, quality)
    beats = lambda p, q: p[0] <= q[0] and p[1] >= q[1] and p != q
    assert list(front) == [not any(beats(p, q) for p in points) for q in points] and front.any()


def test_pareto_of_a_distance_takes_the_lower(tmp_path):
    runs = [made_up(tmp_path, a, np.arange(5.) + v, metric="hd95", adapter=a, config=dict(timings=dict(total=t))) for a, v, t in (("none", 9, 1), ("mona", 3, 2), ("hybrid", 5, 3))]
    s = Study(runs, n_boot=50)
    assert s.better == "lower" and s.pareto() == ["none", "mona"] and list(s.paired.better) == ["supported"] * 2 and s.paired["diff"].lt(0).all()
    assert any("one seed only" in n for n in s.notes) and s.critical().ranks.index[0] == "mona" and s._shown["memory, MB"].eq("–").all()
    with pytest.raises(ValueError, match="no run recorded its peak memory"): s.pareto("memory_mb")
    with pytest.raises(ValueError, match="cost='euro'"): s.pareto("euro")


def test_other_test_splits_never_share_a_difference(grid):
    for a in ("none", "mona"):
        for k in (1, 2): made_up(grid, f"other-{a}-{k}", dice(a, k), test="t2", ids=[f"z{i}" for i in range(20)], adapter=a, shots=4., seed=k, rows="scanner=C")
    s = Study(grid, reference="adapter=none", n_boot=50)
    tests = {a.name: a.test for a in s.arms}
    assert set(s.paired["test split"]) == {"t1", "t2"} and all(tests[r["arm"]] == tests[r["from"]] == r["test split"] for _, r in s.paired.iterrows())
    assert len(s._pairs_shown) == 2 and s.to_latex().count(r"\toprule") == 3 and len(s.table) == 8
    for split, d in s.paired.groupby("test split"): assert list(d.p_holm) == pytest.approx(list(holm(d.p)))
    assert "cost" not in s.figures() and s.critical("t1").n == 20
    with pytest.raises(ValueError, match="2 methods"): s.critical("t2")
    first = Study(s.runs, n_boot=50)
    assert set(first.paired["test split"]) == {"t1"} and any("different test splits" in n for n in first.notes)


def test_same_split_but_other_cases(tmp_path):
    runs = [made_up(tmp_path, "a", dice("none", 1), adapter="none"), made_up(tmp_path, "b", dice("mona", 1)[:10], adapter="mona")]
    s = Study(runs, n_boot=50)
    assert s.paired.empty and len([n for n in s.notes if "different cases" in n]) == 1 and len(s.table) == 2 and s.to_latex() and s._repr_html_()


def test_seeds_are_paired_only_where_they_are_the_same(tmp_path):
    runs = [made_up(tmp_path, f"{a}{k}", dice(a, k), adapter=a, seed=k) for a, seeds in (("none", (1, 2, 3)), ("mona", (3, 2, 1)), ("hybrid", (4, 5, 6))) for k in seeds]
    s = Study(runs, n_boot=300)
    cases = {r.name: r.cases for r in runs}
    for arm, seeds, same in (("adapter=mona", (1, 2, 3), True), ("adapter=hybrid", (4, 5, 6), False)):
        d = hierarchical_paired([cases[f"{arm[8:]}{k}"] for k in seeds], [cases[f"none{k}"] for k in (1, 2, 3)], "dice", n_boot=300, same_seeds=same)
        r = s.paired.set_index("arm").loc[arm]
        assert (r.lo, r.hi) == pytest.approx((d["lo"], d["hi"]))


def test_classification(tmp_path):
    def run(a, k, d):
        rng = np.random.default_rng(k); y = np.arange(30) % 2
        p = 1 / (1 + np.exp(-(d * y + rng.standard_normal(30))))
        cases = pd.DataFrame(dict(id=range(30), group=range(30), label=np.where(y, "malignant", "benign"), y=y, p_0=1 - p, p_1=p, pred=(p > .5).astype(int)))
        return made_up(tmp_path, f"{a}{k}", [0], cases=cases, metrics=dict(auroc=dict(value=.5), accuracy=dict(value=.5)), adapter=a, seed=k, config=dict(template="classify"))
    runs = [run(a, k, d) for a, d in (("none", 0), ("mona", 1), ("hybrid", 3)) for k in (1, 2)]
    s = Study(runs, n_boot=100)
    assert s.metric == "auroc" and s.cases.auroc.isna().all() and "critical" not in s.figures()
    with pytest.raises(ValueError, match="no value of a single patient"): s.critical()
    assert Study(runs, "accuracy", n_boot=100).critical().n == 30


@pytest.mark.parametrize("call, says", [
    (lambda g: Study([]), "two finished runs or more, got 0"), (lambda g: Study(g, metric="auroc"), "auroc needs the probabilities"), (lambda g: Study(g, metric="hd95"), "no metric 'hd95'"),
    (lambda g: Study(g, reference="adapter=lora"), "no run has adapter 'lora'; there are"), (lambda g: Study([made_up(g, "u", [.1], metric="dice"), made_up(g, "v", [.1], metric="iou")]), "no metric is in all"),
    (lambda g: Study([r for r in Study(g, n_boot=9).runs if r.parameters["shots"] == 0], n_boot=9).curves(), "one training size")])
def test_errors_in_one_line(grid, call, says):
    with pytest.raises(ValueError, match=says) as e: call(grid)
    assert "\n" not in str(e.value)


def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match="no folder of runs 'nowhere'"): Study("nowhere")
