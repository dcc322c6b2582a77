"""The claims notebook: its sweep files, the rule that turns differences into verdicts, and what it says where data are missing."""
import ast
import json
import math

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings, strategies as st

from htlab import report
from htlab.grid import load_sweep
from htlab.hierarchy import hierarchical_paired

FOLDER = ROOT / "nbs/experiments/claims"
CLAIMS = {c["id"]: c for c in yaml.safe_load((FOLDER / "claims.yaml").read_text(encoding="utf-8"))}
CELLS = ["".join(c["source"]) for c in json.loads((FOLDER.parent / "claims.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def page(**names):
    "The functions of the notebook, without what it runs."
    of = [n for cell in CELLS for n in ast.parse(cell).body if isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    exec(compile(ast.Module(of, []), "claims.ipynb", "exec"), names)
    return names


P = page()


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    "All sweeps of both scales, planned as if all data were here: (scale, claim) -> Sweep"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, "_data_hashes", lambda *items: dict(data_hash="d", split_hash="s", cards={}))
        return {(s, i): load_sweep(FOLDER / s / f"{i}.yaml", tmp_path_factory.mktemp("runs")) for s in ("laptop", "paper") for i in CLAIMS}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_sweep_files_plan_and_hold_the_arms_of_their_claim(scale, claim, plans):
    s = plans[scale, claim]
    assert len(s.cells) == P["cells_of"](s.said) == len(set(s.names))
    runs = [type("R", (), dict(parameters=p["parameters"])) for p in s.cells]
    arms = P["arms_of"](runs)
    assert {len(rs) for rs in arms.values()} == {len(s.said["seeds"])}, "every arm has every seed"
    for pair in CLAIMS[claim]["pairs"]:
        for name in set(pair) - {"rest", "logistic"}: assert {c for c, a in arms if a == name} == {c for c, _ in arms}, f"{name} is missing in a condition"
    if "logistic" in str(CLAIMS[claim]["pairs"]): assert s.template.stem == "classify"
    if scale == "paper": assert all(p["parameters"]["recipe"] == "paper" and p["parameters"]["lr"] == 1e-4 for p in s.cells)
    else: assert all(p["parameters"]["manifest"] == "phantom" and p["parameters"]["backbone"] == "tiny" for p in s.cells), "a laptop has these"


@pytest.mark.parametrize("claim", ["2", "3"])
def test_laptop_files_plan_on_the_phantom_itself(claim, tmp_path):
    said = yaml.safe_load((FOLDER / f"laptop/{claim}.yaml").read_text(encoding="utf-8")) | dict(seeds=[1])
    s = load_sweep(said, tmp_path)
    assert len({(p["data_hash"], p["split_hash"]) for p in s.cells}) == 1 and s.cells[0]["data_hash"]


def test_tuning_never_reads_the_test_split_and_uses_a_seed_of_its_own(plans, tmp_path):
    used = {s for i in CLAIMS for s in plans["laptop", i].said["seeds"]}
    for f in (FOLDER / "tuning").glob("*.yaml"):
        for p in load_sweep(f, tmp_path).cells: assert p["parameters"]["measure_on"] == "valid" and p["parameters"]["seed"] not in used


def test_claims_share_their_runs(plans):
    "What several claims name is one run: a parameter that slipped in one file would double the cost unseen."
    of = {i: set(plans["laptop", i].names) for i in CLAIMS}
    assert of["4a"] == of["4c"] and of["5b"] <= of["1a"] & of["4b"] and of["1a"] & of["2"] and not of["3"] & of["1a"]


def rows(*claims):
    "claims: of (name, [(diff, p), ...]), against a margin of 0"
    return pd.DataFrame([dict(claim=n, diff=d, p=p, margin=0.) for n, ds in claims for d, p in ds])


def test_all_differences_have_to_hold_and_one_below_speaks_against():
    v = P["decide"](rows(("all", [(.1, .001), (.2, .002)]), ("but one", [(.1, .001), (.2, .4)]), ("against", [(.1, .001), (-.1, .001)]), ("all below", [(-.1, .001)]), ("nothing known", [(.1, math.nan)])))
    assert dict(v.verdict) == {"all": "supported", "but one": "undecided", "against": "not supported", "all below": "not supported", "nothing known": "undecided"}
    assert v.p["all"] == .002 and v.p["against"] == .002, "the largest of those that all have to hold; the smallest of two, doubled"


difference_ = st.tuples(st.floats(-1, 1).filter(bool), st.floats(.0005, 1))
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(difference_, min_size=1, max_size=3), min_size=1, max_size=6), difference_)
def test_asking_more_never_decides_more(claims, one):
    few = P["decide"](rows(*((str(i), ds) for i, ds in enumerate(claims))))
    more = P["decide"](rows(*((str(i), ds) for i, ds in enumerate(claims)), ("one more", [one])))
    assert (more.p_holm[few.index] >= few.p_holm - 1e-12).all(), "Holm: each further claim has its price"
    changed = few.verdict != more.verdict[few.index]
    assert (more.verdict[few.index][changed] == "undecided").all()
    turned = P["decide"](rows(*((str(i), [(-d, p) for d, p in ds[:1]]) for i, ds in enumerate(claims))))
    alone = P["decide"](rows(*((str(i), ds[:1]) for i, ds in enumerate(claims))))
    swap = {"supported": "not supported", "not supported": "supported", "undecided": "undecided"}
    assert (turned.verdict == alone.verdict.map(swap)).all(), "one difference, turned around, is the opposite verdict"


def cases(values): return pd.DataFrame(dict(id=[f"c{i}" for i in range(len(values))], group=[f"g{i}" for i in range(len(values))], label="benign", dice=values, policy="diagonal"))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(-.1, .1), st.sampled_from([-.02, 0, .01]))
def test_p_is_that_of_the_margin(seed, shift, margin):
    rng = np.random.default_rng(seed)
    base = rng.uniform(.3, .9, 40)
    a, b = ([cases(base + s + rng.normal(0, .03, 40) + rng.normal(0, .01)) for _ in range(4)] for s in (shift, 0))
    d = P["difference"](a, b, "dice", margin)
    plain = hierarchical_paired(a, b, "dice")
    assert d["lo"] == plain["lo"] and d["diff"] == plain["diff"], "the interval is that of the difference itself"
    if min(abs(d["lo"] - margin), abs(d["hi"] - margin)) > 1e-6: assert (d["p"] < .05) == (margin < d["lo"] or margin > d["hi"])


def test_what_would_decide():
    d = dict(diff=.01, margin=0., lo=-.01, hi=.03, seeds=3, seed_sd=.008, n=300)
    k = int(P["decides"](d).removesuffix(" seeds"))
    assert 3 < k < 12
    assert int(P["decides"](d | dict(diff=.006, lo=-.014, hi=.026)).split()[0]) > k, "nearer to the margin takes more"
    assert int(P["decides"](d, .05 / 9).split()[0]) > k, "and so does asking with other claims"
    assert P["decides"](d | dict(lo=.001, hi=.019, seed_sd=.003)) == "", "decided already"
    assert P["decides"](d | dict(seed_sd=0.)).endswith(" 1,200 cases"), "where seeds do not vary, twice as wide as allowed takes four times the cases"
    assert "margin" in P["decides"](d | dict(diff=0., lo=-.02, hi=.02)) and "second seed" in P["decides"](d | dict(seed_sd=math.nan, seeds=1))


@pytest.mark.parametrize("seeds", [3, 5])
def test_so_many_seeds_do_decide(seeds):
    "The forecast, held against simulated runs: with the seeds it names, the same spread gives p < .05."
    rng = np.random.default_rng(0)
    base, z = rng.uniform(.3, .9, 60), rng.normal(size=200)
    def runs(k, shift):  # seeds of exactly this spread
        e = (z[:k] - z[:k].mean()) / z[:k].std(ddof=1) * .03
        return [cases(base + s) for s in shift + e]
    def test(k): return P["difference"](runs(k, .02), [cases(base)] * k, "dice")
    d = test(seeds)
    k = int(P["decides"](d).removesuffix(" seeds"))
    assert d["p"] > .05 and test(k)["p"] < .05 < test(k - 1)["p"]


def test_paper_scale_without_its_data_names_what_to_import(tmp_path, monkeypatch):
    monkeypatch.setenv("HTLAB_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    parameters = next(c for c in CELLS if c.startswith("scale ="))
    names, upto = {}, next(i for i, c in enumerate(CELLS) if "raise FileNotFoundError" in c)
    with pytest.raises(FileNotFoundError, match="htlab data import ln-int FOLDER.*-p sets="):
        for c in CELLS[:upto + 1]: exec(c + '\nscale = "paper"' * (c == parameters), names)
    assert set(names["absent"]) == {"ln-int", "ln-ext", "busi", "ddti", "tn3k", "prostate"}
