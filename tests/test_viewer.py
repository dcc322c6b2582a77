"Laws of the viewer, without a browser: heat over an image, cases let through by a filter, maps computed once, a refusal that stops nobody, the twin that shows the same."
import base64, io, re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from htlab import viewer as module
from htlab.attribute import attribute
from htlab.backbone import load_backbone
from htlab.dataset import ImageSet, world_prompts
from htlab.evaluate import case_metrics
from htlab.manifest import Manifest
from htlab.task import Contrast, Task
from htlab.viewer import Viewer, full_heat, overlay
from htlab.widgets import _same

images, heats = arrays(np.uint8, (6, 5)), arrays(np.float32, (6, 5), elements=st.floats(-8, 8, width=16))


# heat over an image

@given(images, heats, st.floats(0, 1), st.booleans())
def test_no_heat_and_no_opacity_leave_the_image_as_it_is(image, heat, opacity, signed):
    grey = np.repeat(image[..., None], 3, 2)
    assert np.array_equal(overlay(image, heat, 0, signed=signed), grey)
    assert np.array_equal(overlay(image, 0 * heat, opacity, signed=signed), grey)
    shown = overlay(image, heat, opacity, signed=signed)
    assert np.array_equal(shown[heat == 0], grey[heat == 0])
    if not signed: assert np.array_equal(shown[heat < 0], grey[heat < 0])


@given(images, heats, st.floats(.1, 1))
def test_what_is_for_is_redder_and_what_is_against_bluer(image, heat, opacity):
    shown = overlay(image, heat, opacity).astype(int)
    assert (shown[..., 0] - shown[..., 2])[heat > 0].min(initial=0) >= 0 >= (shown[..., 0] - shown[..., 2])[heat < 0].max(initial=0)
    full, grey = np.abs(heat) >= full_heat(heat), image[..., None]
    colour = np.where(heat[..., None] > 0, module.FOR, module.AGAINST)
    assert np.abs(shown - (grey + opacity * (colour - grey.astype(float))))[full].max(initial=0) <= .51       # full colour where the limit is reached


@given(images, heats, st.floats(.1, 1), st.sampled_from([.25, 4.]), st.booleans())
def test_the_unit_of_heat_does_not_matter(image, heat, opacity, factor, signed):
    a, b = (overlay(image, h, opacity, signed=signed).astype(int) for h in (heat, heat * np.float32(factor)))
    assert np.abs(a - b).max() <= 1


def test_heat_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"heat has the shape \(4, 4\), the image \(8, 8\)"): overlay(np.zeros((8, 8), np.uint8), np.zeros((4, 4)))


# cases

FAST = ("input_x_gradient", "integrated_gradients")
OPTIONS = {"integrated_gradients": {"steps": 4}}


@pytest.fixture(scope="module")
def data(): return ImageSet(Manifest.load("phantom").split("test"), 112, progress=False)


@pytest.fixture(scope="module")
def task(): return load_backbone("tiny"), world_prompts("label")


@pytest.fixture
def viewer(task, data): return Viewer(task, data, FAST, cases=range(8), options=OPTIONS)


TURNS = st.fixed_dictionaries({}, optional=dict(case=st.integers(0, 7), show=st.sampled_from(["all", "benign", "malignant", "right", "wrong"]), target=st.sampled_from(["predicted", "true", "benign", "malignant"]),
                                                opacity=st.sampled_from([0, .3, 1]), contour=st.sampled_from(["on", "off"]), scores=st.sampled_from(["none", "quick"])))


@settings(max_examples=6, deadline=None)
@given(turns=st.lists(TURNS, min_size=1, max_size=3))
def test_pictures_follow_from_the_values_alone(task, data, shared, turns):
    for t in turns: shared.set(**t)
    fresh = Viewer(task, data, FAST, cases=range(8), options=OPTIONS, **shared.values)
    assert fresh.values == shared.values and all(_same(fresh.data[k], shared.data[k]) for k in fresh.pictures)
    v = shared.values
    row = data.rows[v["case"]]
    probabilities = shared.task.predict({"image": data[v["case"]]["image"][None]})[0]
    index = {"predicted": int(probabilities.argmax()), "true": shared.classes.index(row["label"])}.get(v["target"], shared.classes.index(v["target"]) if v["target"] in shared.classes else None)
    assert shared.explained() == index and shared.data["image"]["title"].startswith(f"{row['id']}: {row['label']}, predicted {shared.classes[probabilities.argmax()]}")
    assert np.array_equal(shared.data["image"]["image"], data.pixels(v["case"])[0])
    assert (shared.data["image"]["mask"] is None) == (v["contour"] == "off")
    if v["contour"] == "on": assert np.array_equal(shared.data["image"]["mask"], data.pixels(v["case"])[1] > 0)
    a = attribute(shared.task, data[v["case"]]["image"][None], FAST[0], target=index)
    assert np.array_equal(shared.data[FAST[0]]["image"][:112], overlay(data.pixels(v["case"])[0], a.heat[0], v["opacity"], signed=a.signed))


@pytest.fixture(scope="module")
def shared(task, data): return Viewer(task, data, FAST, cases=range(8), options=OPTIONS)


def test_a_map_is_computed_once_whatever_else_is_turned(viewer, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "attribute", lambda task, images, method, target=None, **o: asked.append((method, target)) or attribute(task, images, method, target, **o))
    viewer.set(case=3)
    assert [m for m, _ in asked] == list(FAST) == viewer.computed
    for turn in (dict(opacity=.2), dict(contour="off"), dict(scores="none"), dict(case=0), dict(case=3)):
        viewer.set(**turn)
        assert viewer.computed == [] and len(asked) == 2, turn
    assert set(viewer.set(opacity=.9).changed) == set(FAST)
    viewer.set(target="benign"), viewer.set(target="malignant")
    assert len(asked) == 4 and {t for _, t in asked} == {0, 1}         # `predicted` was one of the two


def test_while_a_map_is_computed_its_panel_says_so(viewer, monkeypatch):
    view, seen = module._CaseView(viewer), {}
    viewer._view = view
    def look(task, images, method, target=None, **o):
        seen[method] = view.titles[method].value, "htlab-busy" in view.pictures[method]._dom_classes, view.titles["image"].value, view.titles[FAST[0]].value
        return attribute(task, images, method, target, **o)
    monkeypatch.setattr(module, "attribute", look)
    viewer.set(case=6)
    for method in FAST: assert "computing" in seen[method][0] and seen[method][1] and viewer.dataset.rows[6]["id"] in seen[method][2]     # the image is there first
    assert "computing" not in seen[FAST[1]][3], "a map is shown when it is there, not when all are"
    assert not any("computing" in view.titles[m].value or "htlab-busy" in view.pictures[m]._dom_classes for m in FAST)


def test_memory_is_bounded(task, data):
    viewer = Viewer(task, data, FAST[:1], cases=range(6), keep=2)
    for _ in range(5): viewer.step()
    assert viewer._mapped.cache_info().currsize == 2
    assert viewer.step(-1).computed == [] and viewer.step(-1).computed == [FAST[0]]


def test_a_filter_lets_through_what_it_says_and_steps_walk_it(viewer, data):
    with torch.no_grad(): predicted = [viewer.classes[int(viewer.task.predict({"image": data[i]["image"][None]}).argmax())] for i in range(8)]
    label = [r["label"] for r in data.rows[:8]]
    expected = {"all": range(8), "right": [i for i in range(8) if predicted[i] == label[i]], "wrong": [i for i in range(8) if predicted[i] != label[i]]} | {c: [i for i in range(8) if label[i] == c] for c in ("benign", "malignant")}
    for show, cases in expected.items():
        assert viewer.matching(show) == list(cases)
        if not cases: continue
        viewer.reset().set(case=0, show=show)
        walked = [viewer.values["case"]] + [viewer.step().values["case"] for _ in cases]
        assert walked == [*cases, cases[-1]]                           # each once, and at the end it stays
        assert viewer.step(-100).values["case"] == cases[0]
    viewer.reset().set(show="benign", case=7)
    for c in range(7, -1, -1): assert viewer.set(case=c).values["case"] in expected["benign"]   # a slider moved by one gets on
    assert viewer.values["case"] == expected["benign"][0]


def test_steps_over_the_classes_stay_inside(viewer):
    assert [viewer.step(1, "target").values["target"] for _ in range(5)] == ["true", "benign", "malignant", "malignant", "malignant"]
    assert viewer.step(-9, "target").values["target"] == "predicted"


def test_a_case_may_be_named(viewer, data):
    assert viewer.set(case=data.rows[5]["id"]).values["case"] == 5
    chosen = Viewer(viewer.task, data, (), cases=[data.rows[6]["id"], 2])
    assert chosen.cases == [6, 2] and chosen.data["image"]["title"].startswith(data.rows[6]["id"])


def test_a_refusal_shows_its_reason_and_stops_nobody(viewer, monkeypatch):
    whole = viewer.data
    def refuse(task, images, method, target=None, **o):
        if method == FAST[0]: raise ValueError("no attention <here>")
        return attribute(task, images, method, target, **o)
    monkeypatch.setattr(module, "attribute", refuse)
    other = Viewer(viewer.task, viewer.dataset, FAST, cases=range(8), options=OPTIONS)
    assert "no attention <here>" in other.data[FAST[0]]["title"] and other.data[FAST[0]]["failed"]
    assert _same(other.data[FAST[1]], whole[FAST[1]])
    view = module._CaseView(other)
    assert "&lt;here&gt;" in view.titles[FAST[0]].value


class Known(Task):
    "A segmentation that is bright pixels, so its answer is known"
    def __init__(self): super().__init__(SimpleNamespace(name="known"), torch.nn.Identity())
    def output(self, batch): x = batch["image"][:, 0]; return torch.stack([.5 - x, x - .5], 1)


class Squares:
    "Four cases: found, missed, false alarm, clear"
    classes, rows = ["lesion", "none"], [dict(id=f"case {k}", label=l) for k, l in enumerate(["lesion", "lesion", "none", "none"])]
    def __len__(self): return 4
    def __getitem__(self, i):
        image, mask = torch.zeros(3, 16, 16), torch.zeros(16, 16, dtype=torch.long)
        if i in (0, 2): image[:, 4:9, 4:9] = 1
        if i < 2: mask[6:9, 4:9] = 1
        return dict(image=image, mask=mask)


def test_what_became_of_a_segmented_case():
    viewer = Viewer(Known(), Squares(), ())
    assert {k: viewer.matching(k) for k in ("found", "missed", "false alarm", "clear")} == {"found": [0], "missed": [1], "false alarm": [2], "clear": [3]}
    assert viewer.values["target"] == "lesion" and viewer.matching("none") == [2, 3]
    found = viewer.data["image"]
    assert found["pred"].sum() == 25 and f"Dice {case_metrics(found['pred'], found['mask'])['dice']:.2f}" in found["title"]


@pytest.mark.parametrize("wrong, says", [
    (dict(methods=("gradcam",)), "no method 'gradcam'; there are "), (dict(options={"cam": {}}), "no method 'cam'"), (dict(cases=[3, 999999]), "cases: 999999 is neither an id nor a row number below"), (dict(cases=["nobody"]), "'nobody' is neither"),
    (dict(cases=[]), "cases: none given"), (dict(classes=["a", "b", "c"]), "the model tells 2 apart, the names are"), (dict(case=8), "case=8: a whole number from 0 to 7"), (dict(case="nobody"), "case='nobody': no case of this viewer"),
    (dict(show="odd"), "show='odd': choose from"), (dict(target="cyst"), "target='cyst': choose from 'predicted', 'true', 'benign', 'malignant'")])
def test_what_is_wrong_is_refused(task, data, wrong, says):
    with pytest.raises(ValueError) as e: Viewer(task, data, **dict(methods=FAST, cases=range(8)) | wrong)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_an_augmented_data_set_and_a_task_without_classes_are_refused(task, data):
    with pytest.raises(ValueError, match="Contrast knows captions, no classes"): Viewer(Contrast(task[0]), data)
    with pytest.raises(ValueError, match="augment"): Viewer(task, ImageSet(data.manifest, 112, augment=True, progress=False))


def test_a_filter_that_nothing_passes_changes_nothing(task, data):
    benign = [i for i, r in enumerate(data.rows[:8]) if r["label"] == "benign"]
    viewer = Viewer(task, data, (), cases=benign)
    wrong = viewer.matching("wrong")
    viewer = Viewer(task, data, (), cases=[benign[wrong[0]]])
    before = viewer.data
    with pytest.raises(ValueError, match="show='right': no case is that"): viewer.set(show="right")
    assert viewer.data is before and viewer.values["show"] == "all"


# the twin, the file and the live view

def test_the_twin_shows_what_the_view_shows(viewer):
    fig, view = viewer.static(), module._CaseView(viewer)
    for ax, (name, picture) in zip(fig.axes, viewer.pictures.items()):
        if name == "classes": continue
        shown, drawn = np.asarray(Image.open(io.BytesIO(view.pictures[name].value)))[::2, ::2], np.asarray(ax.images[0].get_array())
        assert (np.abs(shown.astype(int) - (drawn if drawn.ndim == 3 else drawn[..., None]) * 255).max(-1) < 1).mean() > .9   # all but the contour
    assert set(viewer._repr_mimebundle_()) == {"text/plain", "image/png"}                                                # nobody asked with a cell id


def test_a_file_holds_the_twin_of_every_case_and_asks_for_nothing(viewer, tmp_path):
    viewer.set(case=2, show=viewer.dataset.rows[2]["label"])
    text = viewer.to_html(tmp_path / "cases.html", [1, 4], progress=False).read_text()
    assert viewer.values["case"] == 2 and [p.name for p in tmp_path.iterdir()] == ["cases.html"]
    pictures = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', text)
    assert "://" not in re.sub(r"base64,[^\"]*", "", text)
    for case, (alt, png) in zip((1, 4), pictures, strict=True):
        viewer.set(show="all", case=case).static().savefig(twin := io.BytesIO(), format="png")
        assert alt == viewer.data["image"]["title"] and base64.b64decode(png) == twin.getvalue()
    with pytest.raises(ValueError, match="cases: none given"): viewer.to_html(tmp_path / "none.html", [])


def test_the_call_makes_the_same_viewer(viewer, task, data):
    viewer.set(case=4, target="true", opacity=.25)
    again = eval(viewer.call, dict(Viewer=Viewer, task=task, dataset=data, cases=range(8), options=OPTIONS))
    assert again.values == viewer.values and all(_same(again.data[k], viewer.data[k]) for k in viewer.pictures)


def test_arrows_buttons_and_what_arrives_while_the_kernel_works(viewer):
    view = viewer._view = module._CaseView(viewer)
    keys = view.box.children[1].children[0].children[-1]
    keys.across = 1
    assert viewer.values["case"] == view.knobs["case"].value == 1 and "computed: input_x_gradient, integrated_gradients" in view.said.value
    keys.across += 4                                                   # four presses, one message
    assert viewer.values["case"] == 5
    keys.across -= 1
    keys.down += 1
    assert viewer.values["case"] == 4 and viewer.values["target"] == view.knobs["target"].value == "true"
    view.knobs["opacity"].value = .1
    assert "computed: nothing" in view.said.value
    assert not any("htlab-busy" in p._dom_classes for p in view.pictures.values())
    view.knobs["show"].value = "wrong"
    assert viewer.values["case"] == view.knobs["case"].value in viewer.matching("wrong")
