"Laws of benches, without a browser: pictures follow from values alone, the twin shows the live pictures' data, wrong knobs are refused and change nothing."
import io, math, subprocess, sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from htlab import widgets
from htlab.widgets import Bench, DriftBench, FilterBench, ImagePicture, Knob, MetricBench, PlotPicture, SpeckleBench, TablePicture, live


class Toy(Bench):
    knobs = {"n": Knob("n", 3, 0, 9, 1), "x": Knob("x", .5, -1, 1), "word": Knob("word", "a", options=("a", "b"))}
    pictures = {"image": ImagePicture(), "line": PlotPicture(), "table": TablePicture()}
    def compute(self, n, x, word):
        import pandas as pd
        if n == 9: raise ValueError("n=9: nine is too many")
        return {"image": dict(image=np.full((8, 8), 20 * n, np.uint8)), "line": dict(traces={"x": dict(x=[0, 1], y=[0, x], kind="line")}), "table": dict(table=pd.DataFrame({"word": [word]}), title=word)}


def values(bench): return st.fixed_dictionaries({}, optional={k: st.sampled_from(v.options) if v.options else st.integers(v.low, v.high) if isinstance(v.value, int) else st.floats(v.low, v.high) for k, v in bench.knobs.items()})
def same(a, b): return a.keys() == b.keys() and all(widgets._same(a[k], b[k]) for k in a)


@given(st.lists(values(Toy).filter(lambda v: v.get("n") != 9), min_size=1, max_size=5))
def test_pictures_follow_from_the_values_alone(turns):
    bench = Toy()
    for t in turns: bench.set(**t)
    fresh = Toy(**bench.values)
    assert same(bench.data, fresh.data) and bench.values == fresh.values
    assert bench.set(**bench.values).changed == []                               # once more changes nothing
    assert same(bench.reset().data, Toy().data) and bench.call == "Toy()"


@given(values(Toy).filter(lambda v: v.get("n") != 9))
def test_changed_names_what_is_different(turn):
    bench = Toy()
    bench.set(**turn)
    assert bench.changed == [p for p, k in zip(Toy.pictures, Toy.knobs) if bench.values[k] != Toy.knobs[k].value]


@pytest.mark.parametrize("wrong, says", [
    (dict(n=10), "n=10: a whole number from 0 to 9"), (dict(n=2.5), "n=2.5: a whole number"), (dict(x=math.nan), "x=nan: a number from -1 to 1"), (dict(x="1"), "x='1': a number"),
    (dict(word="c"), "word='c': choose from 'a', 'b'"), (dict(y=1), "Toy has no knob 'y': there are n, x, word"), (dict(x=0, n=9), "n=9: nine is too many")])
def test_what_is_wrong_is_refused_and_changes_nothing(wrong, says):
    bench = Toy(n=4)
    before, data = dict(bench.values), bench.data
    with pytest.raises(ValueError) as e: bench.set(**wrong)
    assert says in str(e.value) and "\n" not in str(e.value)
    assert bench.values == before and bench.data is data
    with pytest.raises(ValueError): Toy(**wrong)


@pytest.mark.parametrize("bench", [Toy, SpeckleBench, MetricBench])
def test_the_call_makes_the_same_pictures(bench):
    turned = {k: knob.options[-1] if knob.options else type(knob.value)(knob.low + .7 * (knob.high - knob.low)) for k, knob in bench.knobs.items()}
    one = bench(**turned)
    two = eval(one.call, {bench.__name__: bench})
    assert two.values == one.values and same(two.data, one.data)


# the twin

@pytest.mark.parametrize("bench", [Toy, SpeckleBench, MetricBench])
def test_the_twin_shows_the_data_of_the_live_pictures(bench):
    bench = bench()
    fig, view = bench.static(), widgets._View(bench)
    assert len(fig.axes) == len(bench.pictures)
    for ax, (name, picture) in zip(fig.axes, bench.pictures.items()):
        data, widget = bench.data[name], view.pictures[name]
        if isinstance(picture, ImagePicture):
            shown = np.asarray(Image.open(io.BytesIO(widget.value)))
            zoom = len(shown) // len(data["image"])
            drawn = np.asarray(ax.images[0].get_array())
            grey = np.abs(shown[::zoom, ::zoom].astype(int) - (drawn if drawn.ndim == 3 else drawn[..., None]) * 255)
            assert (grey.max(-1) < 1).mean() > .9                                # all but the contours
            assert len(ax.collections) == sum(data.get(k) is not None and bool(np.any(data[k])) for k in ("mask", "pred"))
        elif isinstance(picture, PlotPicture):
            assert [t.name for t in widget.data] == list(data["traces"])
            lines = {line.get_label(): line for line in ax.lines}
            for t in widget.data:
                assert np.array_equal(t.y, data["traces"][t.name]["y"], equal_nan=True)
                if t.name in lines: assert np.array_equal(lines[t.name].get_ydata(), t.y, equal_nan=True)
        else:
            for text in map(str, data["table"].to_numpy().ravel()): assert text in widget.value.replace("&amp;", "&") and text in [c.get_text().get_text() for c in ax.tables[0].get_celld().values()]
    assert fig._supxlabel.get_text() == bench.call


def test_the_view_follows_the_bench_and_the_bench_the_view():
    bench = Toy()
    view = bench._view = widgets._View(bench)
    view.knobs["n"].value = 5
    assert bench.values["n"] == 5 and bench.changed == ["image"] and "changed: image" in view.said.value and view.call.value == "<code>Toy(n=5)</code>"
    bench.set(x=-.5, word="b")
    assert (view.knobs["x"].value, view.knobs["word"].value) == (-.5, "b") and bench.changed == ["line", "table"]
    sent = view.pictures["line"].data[0].y
    view.knobs["n"].value = 9                                                    # compute refuses it
    assert "ValueError: n=9: nine is too many" in view.said.value and bench.values["n"] == 5 and view.pictures["line"].data[0].y is sent
    view.reset.click()
    assert bench.values == Toy().values and {k: w.value for k, w in view.knobs.items()} == bench.values


@pytest.mark.parametrize("asked, is_live", [("", False), ("static", False), ("live", True)])
def test_live_only_where_somebody_listens(monkeypatch, asked, is_live):
    monkeypatch.setenv("HTLAB_WIDGETS", asked)
    bundle = Toy()._repr_mimebundle_()
    assert live() == is_live == ("application/vnd.jupyter.widget-view+json" in bundle)
    assert Image.open(io.BytesIO(bundle["image/png"])).width > 300 and bundle["text/plain"] == "Toy()"
    monkeypatch.setenv("HTLAB_WIDGETS", "perhaps")
    with pytest.raises(ValueError, match="HTLAB_WIDGETS='perhaps': write live or static"): live()


@pytest.mark.parametrize("cell, is_live", [({}, False), ({"cellId": "1"}, True)])
def test_a_front_end_with_cells_is_live(monkeypatch, cell, is_live):
    class Shell:
        def get_parent(self): return {"metadata": cell}
    monkeypatch.delenv("HTLAB_WIDGETS", raising=False)
    monkeypatch.setattr(widgets, "get_ipython", Shell)
    assert live() == is_live


# the benches

def test_light_to_import():
    run = subprocess.run([sys.executable, "-c", "import sys, htlab.widgets\nassert not {'torch', 'plotly'} & set(sys.modules)\nhtlab.widgets.SpeckleBench().static()\nassert 'torch' not in sys.modules"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_display_settings_leave_the_envelope_alone():
    bench = SpeckleBench()
    for knob, value in dict(gain=7., dynamic_range=35.).items(): assert bench.set(**{knob: value}).changed == ["image", "grey", "spectrum"]
    assert set(bench.set(frequency=5.).changed) == set(bench.pictures)


@settings(max_examples=25)
@given(values(MetricBench))
def test_metric_bench_agrees_with_evaluate(turn):
    from htlab.evaluate import case_metrics
    bench = MetricBench(**turn)
    d = bench.data["masks"]
    ours, shown = case_metrics(d["pred"], d["mask"]), bench.data["table"]["table"].loc["htlab 'diagonal'"]
    assert shown["Dice"] == f"{ours['dice']:.3g}" and shown["HD95"] == f"{ours['hd95']:.3g}"
    assert d["mask"].any() == (bench.values["truth"] == "lesion") and (bench.data["table"]["title"] == "missed") == ours["missed"] and (bench.data["table"]["title"] == "false alarm") == ours["false_alarm"]


def test_metric_bench_moves_as_told():
    at = lambda **kw: np.argwhere(MetricBench(**{"across": 0} | kw).data["masks"]["pred"])
    rest = at()
    assert np.allclose(at(down=10, across=-7).mean(0) - rest.mean(0), (10, -7), atol=.2)
    assert len(at(scale=.5)) == pytest.approx(len(rest) / 4, rel=.1) and len(at(scale=0)) == 0 and len(at(scale=0, stray=5)) == 25


@pytest.fixture(scope="module")
def task():
    "A segmentation task that has learned nothing, at once: the laws do not ask how good it is."
    import torch
    from htlab.backbone import load_backbone
    from htlab.task import Segment
    torch.manual_seed(0)
    return Segment(load_backbone("tiny")).eval()


def test_filter_bench_passes_all_at_the_start(task):
    bench = FilterBench(task)
    image, through, plain = (bench.data[k] for k in ("image", "mask", "spectrum"))
    assert np.abs(image["image"].astype(int) - through["image"]).max() <= 1 and np.array_equal(image["mask"], through["mask"])
    after = dict(bench.set(ring_7=0.).data)
    assert bench.values["preset"] == "own" and bench.call == "FilterBench(task, ring_7=0.0)" and not np.array_equal(after["image"]["image"], image["image"])
    assert bench.reset().values["preset"] == "all pass" and same(bench.data["image"], image)


@settings(max_examples=10)
@given(st.sampled_from(list(widgets.PRESETS)), st.integers(0, 7), st.floats(0, 2))
def test_a_preset_sets_the_rings_and_a_ring_ends_the_preset(task, name, ring, value):
    bench = FilterBench(task, preset=name)
    assert tuple(bench.values[f"ring_{i}"] for i in range(8)) == widgets.PRESETS[name]
    bench.set(**{f"ring_{ring}": value})
    rings = tuple(bench.values[f"ring_{i}"] for i in range(8))
    assert bench.values["preset"] == next((n for n, p in widgets.PRESETS.items() if p == rings), "own")
    assert FilterBench(task, **bench.values).values == bench.values


def test_filter_bench_leaves_the_task_as_it_was(task):
    import torch
    x = {"image": torch.rand(1, 3, 112, 112)}
    before = task.predict(x)
    bench = FilterBench(task, preset="high pass", block=max(task.taps or task.backbone.taps_default))
    assert torch.equal(task.predict(x), before) and not any(b._forward_hooks for b in task.backbone.blocks)
    with pytest.raises(ValueError, match=f"a whole number from 0 to {bench.values['block']}"): bench.set(block=bench.values["block"] + 1)


def adapted(init):
    import torch
    from htlab.backbone import load_backbone
    from htlab.inject import add_adapters
    torch.manual_seed(0)
    return add_adapters(load_backbone("tiny"), "mona", init=init)


def test_drift_bench_measures_from_rest():
    bench = DriftBench(adapted("reference"), cases=20)
    table = lambda: bench.data["table"]["table"].astype(float)
    assert (table()["moved"] == 0).all()
    bench.set(tgc=.9)
    assert (table()["moved"] > 0).all() and np.allclose(table()["moved"] / table()["between classes"], table()["ratio"], atol=.02) and not same(bench.data["frozen"], bench.data["adapted"])
    end = {k: np.array([t["traces"]["tgc"][a][-1] for a in "xy"]) for k, t in bench.data.items() if k in ("frozen", "adapted")}
    for k, at in end.items(): assert np.allclose(at, [bench.data[k]["traces"]["now"][a][0] for a in "xy"], atol=1e-4)    # the end of the way of this knob
    same_tower = DriftBench(adapted("identity"), cases=20, tgc=.9)
    assert same_tower.data["table"]["table"].loc["frozen", "moved"] == same_tower.data["table"]["table"].loc["adapted", "moved"]


def test_drift_bench_wants_adapters(task):
    with pytest.raises(ValueError, match="backbone 'tiny' has no adapters"): DriftBench(task.backbone)
