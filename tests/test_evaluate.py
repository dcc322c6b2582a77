"Laws of htlab.evaluate: metrics against theory and libraries, a policy under which missing never pays, intervals that hold what they say."
import io, json, math, warnings
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import wilcoxon
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from htlab.evaluate import (_auroc, _lesion, _statistic, auroc_score, calibration, case_metrics, contour_distances, conventions, dice_score, evaluate_classification, evaluate_segmentation, fit_temperature, holm, loglik_score,
                            paired, paired_pooled, retrieval_cases, summarise, summarise_pooled, surface_dice, tempered)

torch.set_num_threads(1)
shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
masks = shapes.flatmap(lambda s: arrays(bool, s))
pairs = shapes.flatmap(lambda s: st.tuples(arrays(bool, s), arrays(bool, s)))
DISTANCES = ['hd95', 'asd', 'hd95_mm', 'asd_mm']

def square(row, col, side=8, shape=(40, 40)):
    mask = np.zeros(shape, bool)
    mask[row:row + side, col:col + side] = True
    return mask


@given(st.integers(2, 4), shapes, st.integers(0, 999))
def test_the_most_probable_class_is_argmax(classes, shape, seed):
    "Also where classes tie, which few different values see to: the first counts."
    p = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (classes, *shape)).astype('float32'))
    assert torch.equal(_lesion(p), p.argmax(0) == 1)


# ---- one case ------------------------------------------------------------------------------------------------------

@given(pairs)
def test_overlap(pair):
    m = case_metrics(*pair)
    assert m['iou'] == pytest.approx(m['dice'] / (2 - m['dice'])) and 0 <= m['iou'] <= m['dice'] <= 1
    assert (m['dice'] == 1) == np.array_equal(*pair)
    if m['dice'] == 1: assert m['hd95'] == m['asd'] == 0
    assert (m['area_pred'], m['area_true']) == tuple(p.sum() for p in pair)
    assert m['missed'] == (pair[1].any() and not pair[0].any()) and m['false_alarm'] == (pair[0].any() and not pair[1].any())

@given(pairs)
def test_symmetric_and_bounded(pair):
    a, b = case_metrics(*pair, .3), case_metrics(*pair[::-1], .3)
    for k in ['dice', 'iou', *DISTANCES]: assert a[k] == pytest.approx(b[k])
    assert 0 <= a['asd'] <= math.hypot(*pair[0].shape) and a['hd95'] <= math.hypot(*pair[0].shape)
    flipped = case_metrics(*(p.T[::-1] for p in pair), .3)
    for k in ['dice', 'iou', *DISTANCES]: assert a[k] == pytest.approx(flipped[k])

@given(pairs, st.integers(1, 5), st.integers(1, 5))
def test_translation(pair, down, right):
    padded = [np.pad(p, 1) for p in pair]                   # away from the rim, which is part of a contour
    moved = [np.pad(p, ((1 + down, 6 - down), (1 + right, 6 - right))) for p in pair]
    wide = [np.pad(p, ((1, 6), (1, 6))) for p in pair]
    a, b = case_metrics(*padded, 1), case_metrics(*wide, 1)
    assert case_metrics(*moved, 1) == b
    if all(p.any() for p in pair): assert a == b            # a wider frame changes nothing but the diagonal

@given(pairs, st.floats(1e-3, 10))
def test_millimetres(pair, mm):
    a, none = case_metrics(*pair, mm), case_metrics(*pair)
    for k in ('hd95', 'asd'):
        assert a[f'{k}_mm'] == pytest.approx(a[k] * mm) and math.isnan(none[f'{k}_mm']) and a[k] == none[k]

@pytest.mark.parametrize('shift', [0, 1, 5, 8, 20])
def test_shifted_squares_by_hand(shift):
    m = case_metrics(square(4, 4), square(4, 4 + shift))
    assert m['hd95'] == shift and m['dice'] == max(0, 1 - shift / 8)
    if shift >= 8:   # the contour pixel in column c of 8 is shift - 7 + c from the facing side; the two end columns hold 8 pixels each, the others 2
        assert m['asd'] == pytest.approx(sum((8 if c in (0, 7) else 2) * (shift - 7 + c) for c in range(8)) / 28)
    assert m['asd'] <= shift

def test_single_pixels_by_hand():
    a, b = square(3, 4, 1), square(6, 8, 1)
    m = case_metrics(a, b, .5)
    assert m['hd95'] == m['asd'] == 5 and m['hd95_mm'] == 2.5 and m['dice'] == 0

@pytest.mark.filterwarnings('ignore::FutureWarning')
@settings(max_examples=60)
@given(pairs, st.floats(.05, 3))
def test_monai_agrees(pair, mm):
    "Our KD-trees and MONAI's surface distances are the same numbers, where both masks have a contour."
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_dice, compute_iou
    assume(all(p.any() for p in pair))
    ours = case_metrics(*pair, mm)
    p, t = (torch.tensor(m)[None, None].float() for m in pair)
    assert ours['dice'] == pytest.approx(compute_dice(p, t).item(), abs=1e-6) and ours['iou'] == pytest.approx(compute_iou(p, t).item(), abs=1e-6)
    for unit, spacing in (('', None), ('_mm', mm)):
        kw = dict(include_background=True, spacing=spacing)
        assert ours['hd95' + unit] == pytest.approx(compute_hausdorff_distance(p, t, percentile=95, **kw).item(), rel=1e-4, abs=1e-5)
        assert ours['asd' + unit] == pytest.approx(compute_average_surface_distance(p, t, symmetric=True, **kw).item(), rel=1e-4, abs=1e-5)

@given(pairs, st.floats(0, 8), st.floats(0, 4), st.floats(.1, 3))
def test_surface_dice(pair, tolerance, more, mm):
    pred, true = pair
    nsd, there, back = surface_dice(pred, true, tolerance), *contour_distances(pred, true)
    assert 0 <= nsd <= surface_dice(pred, true, tolerance + more) <= 1 and nsd == surface_dice(true, pred, tolerance)
    assert (len(there) > 0, len(back) > 0) == (pred.any(), true.any())
    if pred.any() != true.any(): assert nsd == 0 and np.isinf([*there, *back]).all()
    else: assert surface_dice(pred, true, math.hypot(*pred.shape)) == surface_dice(true, true, 0) == 1
    assert surface_dice(pred, true, np.float64(tolerance) * mm + 1e-9, mm) >= nsd                      # another unit, the same ruler

@pytest.mark.filterwarnings('ignore')
@settings(max_examples=60)
@given(pairs | shapes.map(lambda s: (np.zeros(s, bool), np.ones(s, bool))), st.booleans(), st.sampled_from([.5, 1.2, 2.7]))
def test_monais_row_is_monais(pair, swap, tolerance):
    "With any mask empty or none: what we say MONAI says is what MONAI says."
    from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU, SurfaceDiceMetric, SurfaceDistanceMetric
    pred, true = pair[::-1] if swap else pair
    p, t = (torch.tensor(m)[None, None].float() for m in (pred, true))
    row, kw = conventions(pred, true, tolerance).loc['MONAI'], dict(include_background=True)
    for name, metric in dict(dice=DiceMetric(), iou=MeanIoU(), hd95=HausdorffDistanceMetric(percentile=95, **kw), asd=SurfaceDistanceMetric(symmetric=True, **kw), nsd=SurfaceDiceMetric([tolerance], **kw)).items():
        assert row[name] == pytest.approx(metric(p, t).item(), rel=1e-4, abs=1e-5, nan_ok=True), name

@given(pairs)
def test_conventions_differ_only_where_a_mask_is_empty(pair):
    table = conventions(*pair)
    for m in ('dice', 'iou', 'hd95', 'asd', 'nsd'):
        values = table[m].dropna()
        if all(p.any() for p in pair): assert values.nunique() == 1 and len(values) == table[m].notna().sum()
    ours = case_metrics(*pair)
    assert all(table.loc["htlab 'diagonal'", m] == ours[m] for m in ('dice', 'iou', 'hd95', 'asd'))
    if not any(p.any() for p in pair): assert table.loc['TransUNet', 'dice'] == 0 and table.loc['surface-distance', 'hd95'] == math.inf and math.isnan(table.loc['nnU-Net v2', 'dice'])
    elif not pair[1].any(): assert table.loc['TransUNet', 'dice'] == 1 and math.isnan(table.loc['MONAI', 'dice'])

@given(pairs)
def test_missing_never_pays(pair):
    "Under the default policy no metric of a case with a lesion improves when the prediction is emptied; nor when a lesion is invented."
    pred, true = pair
    a, gone = case_metrics(pred, true, .2), case_metrics(np.zeros_like(pred), true, .2)
    if true.any():
        assert gone['dice'] <= a['dice'] and gone['iou'] <= a['iou'] and gone['dice'] == 0
        for k in DISTANCES: assert gone[k] >= a[k]
        assert gone['hd95'] == gone['asd'] == math.hypot(*true.shape)
    else:
        assert gone['dice'] == gone['iou'] == 1 and gone['hd95'] == gone['asd'] == 0 and not gone['missed']
        if pred.any(): assert a['false_alarm'] and a['dice'] == 0 and a['hd95'] == math.hypot(*true.shape)

def test_dropping_rewards_missing():
    "The fault of the release, under 'nan': mean HD95 improves when the worst case is given up; and the table says so."
    def table(empty, give_up):
        rows = [case_metrics(square(4, 4 + s) & (s < 9 or not give_up), square(4, 4), empty=empty) for s in range(10)]
        return summarise(pd.DataFrame(rows).assign(id=range(10), group=range(10), policy=empty), n_boot=50)
    assert table('nan', True).value['hd95'] < table('nan', False).value['hd95']
    assert table('diagonal', True).value['hd95'] > table('diagonal', False).value['hd95']
    for empty, scored in (('nan', 9), ('diagonal', 10)):
        t = table(empty, True)
        assert (t.scored['hd95'], t.n['hd95'], t.failures['hd95'], t.policy['hd95'], t.scored['dice']) == (scored, 10, 1, empty, 10)
        html = t._repr_html_()
        assert f'{scored} / 10' in html and '95%' in html and 'missed' in html and 'hd95' in html

@pytest.mark.parametrize('args, words', [
    ((np.zeros((4, 4)), np.zeros((4, 5))), ['(4, 4)', '(4, 5)']),
    ((np.full((4, 4), 255), np.zeros((4, 4))), ['pred', '255']), ((np.zeros((4, 4)), np.full((4, 4), np.nan)), ['true']),
    ((np.zeros((1, 4, 4)), np.zeros((4, 4))), ['pred', '(1, 4, 4)']), ((np.zeros((0, 4)), np.zeros((0, 4))), ['(0, 4)']),
    ((np.zeros((4, 4)), np.zeros((4, 4)), 0), ['spacing_mm=0']), ((np.zeros((4, 4)), np.zeros((4, 4)), math.inf), ['spacing_mm=inf']),
    ((np.zeros((4, 4)), np.zeros((4, 4)), None, 'skip'), ['skip', 'diagonal', 'nan'])])
def test_wrong_input(args, words):
    with pytest.raises(ValueError) as e: case_metrics(*args)
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value)

def test_tensors_ints_and_empty_fields_are_fine():
    a, b = square(3, 3), square(4, 4)
    assert case_metrics(torch.tensor(a), b.astype('uint8'), math.nan) == pytest.approx(case_metrics(a, b), nan_ok=True)


# ---- frames --------------------------------------------------------------------------------------------------------

class Set:
    "Masks given by a list; the image carries the probability the `Echo` task returns."
    def __init__(self, preds, trues, spacing=None): self.preds, self.trues, self.spacing = preds, trues, spacing
    def __len__(self): return len(self.trues)
    def __getitem__(self, i):
        image = torch.tensor(self.preds[i][::2, ::2], dtype=torch.float32).expand(3, -1, -1)
        return dict(image=image, mask=torch.tensor(self.trues[i][::2, ::2]).long(), label=i % 2, text='', id=f'c{i}')
    def native_mask(self, i): return self.trues[i]
    def to_native(self, map, i): return map.repeat_interleave(2, -1).repeat_interleave(2, -2)
    def row(self, i): return dict(id=f'c{i}', group=f'g{i // 2}' if i < 4 else None, label='ab'[i % 2], spacing_mm=self.spacing)

class Echo(torch.nn.Module):
    def __init__(self): super().__init__(); self.drop = torch.nn.Dropout(.9)
    def predict(self, batch):
        p = self.drop(batch['image'][:, :1]) * .8 + .1
        return torch.cat([1 - p, p], 1)

class Mean(Echo):
    def predict(self, batch):
        p = self.drop(batch['image']).mean((1, 2, 3))
        return torch.stack([1 - p, p], 1)

def even(rng, n): return [np.kron(rng.integers(0, 2, (4, 5)), np.ones((2, 2))).astype(bool) for _ in range(n)]

def test_segmentation_rows_are_case_metrics():
    rng = np.random.default_rng(0)
    preds, trues = even(rng, 7), even(rng, 7)
    preds[5][:] = False
    task = Echo().train()
    data = Set(preds, trues, spacing=.1)
    frame = evaluate_segmentation(task, data, batch_size=3, progress=False)
    assert task.training and frame.id.tolist() == [f'c{i}' for i in range(7)] and frame.group.tolist() == ['g0', 'g0', 'g1', 'g1', 'c4', 'c5', 'c6']
    for i, row in frame.iterrows():
        want = case_metrics(preds[i], trues[i], .1)
        assert {k: row[k] for k in want} == pytest.approx(want)
    assert frame.missed.tolist() == [i == 5 for i in range(7)] and set(frame.policy) == {'diagonal'}
    assert dice_score(task, data, batch_size=2) == pytest.approx(frame.dice.mean())   # masks of 2 x 2 blocks lose nothing at half size
    pd.testing.assert_frame_equal(frame, evaluate_segmentation(task, data, batch_size=7, progress=False))
    again = pd.read_csv(io.StringIO(evaluate_segmentation(task, data, empty='nan', progress=False).to_csv(index=False)))
    t = summarise(again, n_boot=20)
    assert t.policy['hd95'] == 'nan' and t.failures['dice'] == 1 and t.scored['hd95_mm'] == 6

def test_classification_rows():
    rng = np.random.default_rng(1)
    data, task = Set(even(rng, 9), even(rng, 9)), Mean()
    frame = evaluate_classification(task, data, batch_size=4, progress=False)
    assert list(frame) == ['id', 'group', 'label', 'y', 'p_0', 'p_1', 'pred'] and frame.y.tolist() == [i % 2 for i in range(9)]
    np.testing.assert_allclose(frame.p_1, [p.mean() for p in data.preds], rtol=1e-6)
    assert (frame.pred == (frame.p_1 > .5)).all()
    assert auroc_score(task, data) == pytest.approx(roc_auc_score(frame.y, frame.p_1)) and task.training
    assert loglik_score(task, data) == pytest.approx(np.log(np.where(frame.y, frame.p_1, frame.p_0)).mean(), rel=1e-5)

def test_evaluation_refuses():
    rng = np.random.default_rng(0)
    data = Set(even(rng, 3), even(rng, 3)); data.augment = True
    with pytest.raises(ValueError, match='augment'): evaluate_segmentation(Echo(), data, progress=False)
    with pytest.raises(ValueError, match='empty'): evaluate_segmentation(Echo(), Set([], []), progress=False)
    data = Set(even(rng, 3), even(rng, 3)); data.preds[1] = np.full((8, 10), np.nan)
    task = Echo()
    with pytest.raises(ValueError, match='finite for id c1'): evaluate_classification(Mean(), data, progress=False)
    with pytest.raises(ValueError, match='finite'): evaluate_segmentation(task, data, progress=False)
    assert task.training
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='auto'): evaluate_segmentation(task, data, device='cuda', progress=False)


# ---- statistics ----------------------------------------------------------------------------------------------------

def classes(n, c, seed=0, groups=None, decimals=2):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, c, n), rng.dirichlet(np.ones(c), n)
    p = np.round(.6 * p + .4 * np.eye(c)[y] * rng.uniform(0, 1, (n, 1)), decimals)
    frame = pd.DataFrame(dict(id=[f'i{i}' for i in range(n)], group=rng.integers(0, groups or n, n).astype(str), label=np.array(list('abcdef'))[y], y=y))
    return frame.assign(**{f'p_{k}': p[:, k] for k in range(c)}, pred=p.argmax(1))

@settings(max_examples=40)
@given(n=st.integers(2, 40), c=st.integers(2, 4), decimals=st.integers(0, 4), seed=st.integers(0, 999))
def test_sklearn_agrees_also_on_resamples(n, c, decimals, seed):
    "AUROC (ties!), F1 and accuracy under weights are sklearn's on the repeated rows."
    frame = classes(n, c, seed, decimals=decimals)
    w = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=3).astype(float)
    for row in [np.ones(n), *w]:
        pick = np.repeat(np.arange(n), row.astype(int))
        y, hit = frame.y[pick], frame.pred[pick]
        one = row[None]
        for k in range(c):
            a = _auroc(frame[f'p_{k}'].to_numpy(), (frame.y == k).to_numpy(), one)[0]
            assert a == pytest.approx(roc_auc_score(y == k, frame[f'p_{k}'][pick])) if (y == k).nunique() == 2 else math.isnan(a)
        assert _statistic(frame, 'accuracy', one)[0] == pytest.approx(accuracy_score(y, hit))
        f1 = _statistic(frame, 'f1', one)[0]
        if c > 2: assert f1 == pytest.approx(f1_score(y, hit, average='macro'))
        elif (y == 1).any() or (hit == 1).any(): assert f1 == pytest.approx(f1_score(y, hit))
        else: assert math.isnan(f1)

def test_positive_class_is_malignant_wherever_it_stands():
    frame = classes(60, 2, 3).assign(label=lambda f: np.where(f.y == 0, 'malignant', 'normal'))
    t = summarise(frame, n_boot=50)
    assert t.value['f1'] == pytest.approx(f1_score(frame.y, frame.pred, pos_label=0)) and t.value['auroc'] == pytest.approx(roc_auc_score(frame.y == 0, frame.p_0))

def test_macro_auroc_of_three():
    frame = classes(90, 3, 4, decimals=6)
    want = np.mean([roc_auc_score(frame.y == k, frame[f'p_{k}']) for k in range(3)])
    assert summarise(frame, ['auroc'], n_boot=10).value['auroc'] == pytest.approx(want)

def test_one_class_has_no_auroc_and_rare_classes_no_crash():
    frame = classes(20, 2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t = summarise(frame[frame.y == 0], n_boot=50)
        assert math.isnan(t.value['auroc']) and math.isnan(t.lo['auroc']) and t.to_dict()['auroc']['value'] is None and np.isfinite(t.lo['accuracy'])
        rare = frame.assign(y=[1] + [0] * 19)               # a third of the draws have one class only
        t = summarise(rare, n_boot=300)
        assert 0 <= t.lo['auroc'] <= t.value['auroc'] <= t.hi['auroc'] <= 1
        assert math.isnan(summarise(frame.assign(group='same'), n_boot=20).lo['accuracy'])
    assert 'none' in summarise(frame.assign(group='same'), n_boot=20)._repr_html_()

def gaussian(rng, groups, each, n=None):
    v = (rng.standard_normal((groups, 1)) + .5 * rng.standard_normal((groups, each))).ravel()
    return pd.DataFrame(dict(id=np.arange(v.size), group=np.repeat(np.arange(groups), each), dice=v, policy='diagonal'))

def test_coverage_is_nominal():
    "The interval holds the true mean about as often as it says, for clustered data, at two levels."
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for t in range(400):
        frame = gaussian(rng, 60, 3)
        for k, level in enumerate((.95, .8)):
            r = summarise(frame, ['dice'], level=level, n_boot=300, seed=t).loc['dice']
            hits[k] += r.lo <= 0 <= r.hi
    assert .91 <= hits[0] / 400 <= .985 and .74 <= hits[1] / 400 <= .86

def test_copies_add_nothing():
    "Every case four times within its group: the same interval; as groups of their own: half as wide."
    frame = gaussian(np.random.default_rng(1), 40, 1)
    copies = pd.concat([frame] * 4).assign(id=range(160))
    one, four, wrong = summarise(frame), summarise(copies), summarise(copies.assign(group=range(160)))
    assert four.lo['dice'] == pytest.approx(one.lo['dice']) and four.hi['dice'] == pytest.approx(one.hi['dice']) and four.groups['dice'] == 40
    assert (wrong.hi - wrong.lo)['dice'] == pytest.approx((one.hi - one.lo)['dice'] / 2, rel=.15)

def test_summary_repeats_and_is_json():
    frame = classes(50, 3, 7, groups=20)
    a, b, c = summarise(frame, seed=1), summarise(frame.sample(frac=1, random_state=0), seed=1), summarise(frame, seed=2)
    assert json.loads(json.dumps(a.to_dict())) == a.to_dict() and a.to_dict() == summarise(frame, seed=1).to_dict()
    assert a.value.to_dict() == pytest.approx(b.value.to_dict()) and not a.lo.equals(c.lo)
    assert (a.lo <= a.value).all() and (a.value <= a.hi).all() and list(a.index) == ['auroc', 'accuracy', 'f1']
    assert set(a.to_dict()['auroc']) == {'value', 'lo', 'hi', 'n', 'groups', 'scored', 'failures', 'policy'}
    assert isinstance(a[['value']], type(a)) and a[['value']]._repr_html_() and a.loc[['f1']].note == a.note
    wide = summarise(frame, level=.99)
    assert (wide.lo <= summarise(frame, level=.5).lo).all()

def test_summary_refuses():
    frame = classes(9, 2)
    for bad, word in [(frame[:0], 'no cases'), (frame.drop(columns='group'), "'group'"), (frame.assign(id='x'), "'x' occurs twice"),
                      (frame.assign(group=[None] + ['a'] * 8), 'i0')]:
        with pytest.raises(ValueError, match=word): summarise(bad)
    for metric in ('dice', 'label'):
        with pytest.raises(ValueError, match=f"no metric '{metric}'.*auroc"): summarise(frame, [metric])


# ---- pairs ---------------------------------------------------------------------------------------------------------

def two(seed=0, groups=25, each=1, effect=.3):
    rng = np.random.default_rng(seed)
    a = gaussian(rng, groups, each)
    return a.assign(dice=a.dice + effect + .5 * rng.standard_normal(len(a))), a

@given(seed=st.integers(0, 99))
@settings(max_examples=10)
def test_wilcoxon_is_scipy_s_and_order_does_not_matter(seed):
    a, b = two(seed)
    r = paired(a, b, 'dice', n_boot=100)
    assert r['p'] == wilcoxon(a.dice, b.dice).pvalue and r['diff'] == pytest.approx((a.dice - b.dice).mean()) and r['n'] == r['total'] == 25
    assert paired(a, b.sample(frac=1, random_state=seed), 'dice', n_boot=100) == r
    swapped = paired(b, a, 'dice', n_boot=100)
    assert swapped['diff'] == pytest.approx(-r['diff']) and swapped['p'] == pytest.approx(r['p']) and swapped['lo'] == pytest.approx(-r['hi'])
    assert json.loads(json.dumps(r)) == r

def test_pairs_of_groups_count_once():
    a, b = two(groups=20, each=3)
    r = paired(a, b, 'dice')
    d = (a.dice - b.dice).groupby(a.group).mean()
    assert (r['n'], r['groups']) == (60, 20) and r['p'] == wilcoxon(d).pvalue and r['lo'] < r['diff'] < r['hi']

def test_a_model_against_itself():
    a, frame = two()[0], classes(40, 2)
    for r in (paired(a, a, 'dice'), paired(frame, frame, 'auroc'), paired(frame, frame, 'f1'), paired(frame, frame, 'accuracy')):
        assert r['diff'] == r['lo'] == r['hi'] == 0 and r['p'] == 1

def test_paired_auroc_sees_a_better_model():
    good, bad = classes(80, 2, 1), classes(80, 2, 1)
    bad[['p_0', 'p_1']] = np.random.default_rng(0).dirichlet([1, 1], 80)
    r = paired(good, bad, 'auroc')
    assert r['lo'] > 0 and r['p'] < .01 and r['diff'] == pytest.approx(roc_auc_score(good.y, good.p_1) - roc_auc_score(bad.y, bad.p_1)) and r['test'] == 'bootstrap'
    single = paired(good[good.y == 0], bad[bad.y == 0], 'auroc')
    assert math.isnan(single['diff']) and math.isnan(single['p'])

def test_unscored_pairs_are_counted():
    a, b = two()
    a.loc[2, 'dice'] = np.nan
    r = paired(a, b, 'dice')
    assert (r['n'], r['total']) == (24, 25) and r['b'] == pytest.approx(b.dice.drop(2).mean())

def test_mismatch_is_named():
    a, b = two()
    with pytest.raises(ValueError, match='1 id.*24'): paired(a, b[:-1], 'dice')
    with pytest.raises(ValueError, match='differ in 25'): paired(a[:12], b[12:], 'dice')
    with pytest.raises(ValueError, match='id 0: group'): paired(a, b.assign(group='z'), 'dice')
    with pytest.raises(ValueError, match="policy is 'diagonal'.*'nan'"): paired(a, b.assign(policy='nan'), 'dice')
    with pytest.raises(ValueError, match='id i.: y'): paired(classes(9, 2), classes(9, 2).assign(y=1), 'auroc')
    with pytest.raises(ValueError, match='not of one kind'): paired(a, classes(25, 2).assign(id=a.id, group=a.group), 'dice')
    with pytest.raises(ValueError, match="no metric 'hd95'"): paired(a, b, 'hd95')
    with pytest.raises(ValueError, match='no case is scored'): paired(a.assign(dice=np.nan), b, 'dice')
    assert paired(a, b.assign(id=b.id.astype(str)), 'dice')['n'] == 25   # a csv may read ids as numbers


# ---- several seeds, several comparisons ------------------------------------------------------------------------------

def noisy(frame, seeds, sd=.2): return [frame.assign(dice=frame.dice + sd * np.random.default_rng(s).standard_normal(len(frame))) for s in seeds]

@given(seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_pools_of_one_are_single(seed):
    (a, b), (p, q) = two(seed, each=2), (classes(40, 2, seed), classes(40, 2, seed).sample(frac=1, random_state=seed))
    for x, y, metrics in ((a, b, ['dice']), (p, q, ['auroc', 'f1', 'accuracy', 'ece', 'brier'])):
        for m in metrics: assert paired_pooled([x], [y], m, n_boot=50) == paired(x, y, m, n_boot=50) | dict(seeds=1)
        one, pool = summarise(x, metrics, n_boot=50), summarise_pooled([x], metrics, n_boot=50)
        assert one.to_dict() == pool.drop(columns=['seeds', 'seed_sd']).to_dict() and pool.seed_sd.isna().all() and one.note == pool.note

def test_seeds_are_averaged_within_a_case():
    a, b = two(groups=20, each=3)
    A, B = noisy(a, range(3)), noisy(b, range(5, 7))
    r = paired_pooled(A, [B[0], B[1].sample(frac=1, random_state=0)], 'dice', n_boot=200)
    mean = lambda runs, f: f.assign(dice=np.mean([c.dice for c in runs], axis=0))
    assert r | dict(seeds=2) == paired(mean(A, a), mean(B, b), 'dice', n_boot=200) | dict(seeds=2) and r['groups'] == 20 and r['n'] == 60
    s = summarise_pooled(A, ['dice'], n_boot=200)
    assert s.value['dice'] == pytest.approx(mean(A, a).dice.mean()) and s.seed_sd['dice'] == pytest.approx(np.std([c.dice.mean() for c in A], ddof=1)) and s.seeds['dice'] == 3
    assert s.lo['dice'] == pytest.approx(summarise(mean(A, a), ['dice'], n_boot=200).lo['dice']) and json.loads(json.dumps(s.to_dict())) == s.to_dict()
    assert 'SD over seeds' in s._repr_html_() and '3 seeds' in s.note
    copies = paired_pooled([a] * 3, [b] * 3, 'dice', n_boot=200)
    single = paired(a, b, 'dice', n_boot=200)
    assert all(copies[k] == pytest.approx(single[k]) for k in ('p', 'lo', 'hi', 'diff')), "the same run three times is no evidence"

def test_statistics_of_all_cases_are_averaged_over_seeds():
    runs = [classes(60, 2, 3) for _ in range(2)]
    runs[1][['p_0', 'p_1']] = np.random.default_rng(0).dirichlet([1, 1], 60)
    want = np.mean([roc_auc_score(c.y, c.p_1) for c in runs])
    assert summarise_pooled(runs, ['auroc'], n_boot=50).value['auroc'] == pytest.approx(want) == paired_pooled(runs, runs[:1], 'auroc', n_boot=50)['a']

def test_unscored_in_one_seed_is_unscored():
    a, b = two()
    hole = a.copy(); hole.loc[2, 'dice'] = np.nan
    assert paired_pooled([a, hole], [b], 'dice')['n'] == 24 and summarise_pooled([a, hole], ['dice']).scored['dice'] == 24

def test_pools_refuse():
    a, b = two()
    with pytest.raises(ValueError, match='empty'): paired_pooled([], [a], 'dice')
    with pytest.raises(ValueError, match='empty'): summarise_pooled([])
    with pytest.raises(ValueError, match='differ in 1 id'): paired_pooled([a, a[:-1]], [b], 'dice')
    with pytest.raises(ValueError, match='policy'): summarise_pooled([a, a.assign(policy='nan')])

def test_holm_by_hand():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02]) and holm([.4, .6]) == pytest.approx([.8, .8]) and holm([.02]) == pytest.approx([.02])
    assert holm([math.nan, .03, .02]) == pytest.approx([math.nan, .04, .04], nan_ok=True) and not len(holm([]))

@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_nothing_and_bonferroni_and_keeps_the_order(p):
    p, h = np.array(p), holm(p)
    assert (h >= p).all() and (h <= np.minimum(1, p * len(p)) + 1e-12).all() and (np.diff(h[np.argsort(p)]) >= 0).all()
    order = np.random.default_rng(0).permutation(len(p))
    assert holm(p[order]) == pytest.approx(h[order])


# ---- retrieval -------------------------------------------------------------------------------------------------------

def pairs_of(n, noise, seed=0, captions=None, **kw):
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((n, 16))
    if captions: text = text[[captions.index(c) for c in captions]]
    return retrieval_cases(text + noise * rng.standard_normal(text.shape), text, range(n), [f'g{i // 2}' for i in range(n)], captions, strict=captions is None, **kw)

@given(n=st.integers(1, 30), noise=st.floats(0, 5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_recall_rises_to_one(n, noise, seed):
    frame = pairs_of(n, noise, seed)
    assert len(frame) == 2 * n and frame['rank'].between(1, n).all() and frame.gallery.eq(n).all() and frame.right.eq(1).all()
    recall = summarise(frame, [f'recall@{k}' for k in range(1, n + 1)], n_boot=10).value
    assert (np.diff(recall) >= 0).all() and recall.iloc[-1] == 1
    if noise == 0: assert recall.iloc[0] == 1

def test_random_embeddings_are_found_by_chance():
    rng, n, hits = np.random.default_rng(0), 20, []
    for _ in range(100): hits.append(retrieval_cases(rng.standard_normal((n, 16)), rng.standard_normal((n, 16)), range(n), range(n), strict=True)['rank'].to_numpy())
    for k in (1, 5, 10): assert np.mean(np.stack(hits) <= k) == pytest.approx(k / n, abs=4 * math.sqrt(k / n * (1 - k / n) / (100 * n)))

def test_order_and_length_do_not_matter():
    rng = np.random.default_rng(0)
    a, b, ids, order = rng.standard_normal((30, 8)), rng.standard_normal((30, 8)), np.arange(30), rng.permutation(30)
    captions = [f'c{i % 7}' for i in ids]
    one = retrieval_cases(a, b, ids, ids, captions).set_index('id')
    two = retrieval_cases(torch.tensor(3 * a[order]), b[order] / 2, ids[order], ids[order], [captions[i] for i in order]).set_index('id').loc[one.index]
    assert one.equals(two) and set(one.right) == {4, 5}
    flipped = retrieval_cases(b, a, ids, ids, captions)
    assert sorted(flipped[flipped.direction == 'image-to-text']['rank']) == sorted(one[one.direction == 'text-to-image']['rank'])

def test_identical_captions_and_ties():
    captions = ['a', 'b', 'a', 'b']
    assert pairs_of(4, 0, captions=captions)['rank'].eq(1).all()
    same = np.ones((4, 3))
    collapsed = retrieval_cases(same, same, range(4), range(4), strict=True)
    assert collapsed['rank'].eq(4).all(), 'everything alike finds nothing'
    text = np.eye(4)[[0, 1, 0, 1]]
    strict = retrieval_cases(text, text, range(4), range(4), captions, strict=True)
    assert strict['rank'].eq(2).all() and strict.policy.eq('own pair').all()

def test_recall_summary_and_pairs():
    frame, better = pairs_of(40, 3), pairs_of(40, 1)
    table = summarise(frame, n_boot=100)
    assert list(table.index) == [f'{d} recall@{k}' for d in ('text-to-image', 'image-to-text') for k in (1, 2, 5, 10)] and table.scored.eq(40).all() and 'gallery of 40' in table.note
    assert table.value['text-to-image recall@5'] == (frame[frame.direction == 'text-to-image']['rank'] <= 5).mean()
    r = paired(better, frame, 'text-to-image recall@1', n_boot=100)
    assert r['n'] == 40 and r['total'] == 80 and r['diff'] > 0 and r['test'] == 'wilcoxon'
    assert paired_pooled([better] * 2, [frame], 'recall@5', n_boot=50)['n'] == 80
    back = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    assert summarise(back, n_boot=100).to_dict() == table.to_dict()
    for bad in ('recall@0', 'recall@x', 'sideways recall@1'):
        with pytest.raises(ValueError, match='no metric'): summarise(frame, [bad])
    with pytest.raises(ValueError, match='gallery'): paired(frame, frame.assign(gallery=50), 'recall@1')

@pytest.mark.parametrize('args, match', [((np.ones((2, 3)), np.ones((3, 3)), 'ab', 'ab'), 'paired'), ((np.ones((2, 3)), np.ones((2, 3)), 'ab', 'ab'), 'strict=True'), ((np.ones((2, 3)), np.ones((2, 3)), 'aa', 'ab', 'ab'), 'different ids'),
                                         ((np.full((2, 3), np.nan), np.ones((2, 3)), 'ab', 'ab', 'ab'), 'finite'), ((np.ones((0, 3)), np.ones((0, 3)), '', '', ''), 'paired')])
def test_retrieval_refuses(args, match):
    with pytest.raises(ValueError, match=match): retrieval_cases(*args)


# ---- calibration -----------------------------------------------------------------------------------------------------

def simulated(n, factor=1., seed=0, classes=2):
    "Classes drawn with the model's own probabilities; then its logits times `factor`."
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, classes))
    soft = lambda z: np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    y, p = (soft(z).cumsum(1) < rng.random((n, 1))).sum(1).clip(max=classes - 1), soft(factor * z)
    return pd.DataFrame(dict(id=range(n), group=range(n), label=y.astype(str), y=y) | {f'p_{c}': p[:, c] for c in range(classes)} | dict(pred=p.argmax(1)))

@pytest.mark.parametrize('classes', [2, 4])
def test_a_calibrated_simulator_is_calibrated(classes):
    small, large, sure = simulated(500, classes=classes), simulated(50_000, classes=classes), simulated(500, 3, classes=classes)
    table, bins = calibration(small, n_boot=200)
    chance = table.ece_if_calibrated['ece']
    assert abs(table.value['ece'] - chance) < chance and table.lo['ece'] < table.value['ece'] < table.hi['ece']
    assert (((bins.lo <= bins.confidence) & (bins.confidence <= bins.hi)).mean() >= .7) and bins.n.sum() == 500 and bins.n.max() - bins.n.min() <= 1
    assert summarise(large, ['ece'], n_boot=1).value['ece'] < .01, 'with many cases the gap goes to 0'
    assert calibration(sure, n_boot=50)[0].value['ece'] > 3 * calibration(sure, n_boot=50)[0].ece_if_calibrated['ece']

def test_ece_by_hand():
    frame = pd.DataFrame(dict(id=range(4), group=range(4), label='x', y=[0, 0, 1, 0], p_0=[.9, .9, .6, .6], p_1=[.1, .1, .4, .4], pred=0))
    assert summarise(frame, ['ece'], n_boot=10).value['ece'] == pytest.approx(.5 * abs(.9 - 1) + .5 * abs(.6 - .5))
    assert calibration(frame, bins=1, n_boot=10)[1].to_dict('records')[0] == pytest.approx(dict(n=4, confidence=.75, right=.75, lo=.25, hi=1), nan_ok=True, abs=.26)

@pytest.mark.parametrize('classes', [2, 3])
def test_brier_is_scikit_learn_s(classes):
    from sklearn.metrics import brier_score_loss
    frame = simulated(200, 2, classes=classes)
    p = frame.filter(regex='^p_').to_numpy()
    assert summarise(frame, ['brier'], n_boot=10).value['brier'] == pytest.approx(brier_score_loss(frame.y, p[:, 1] if classes == 2 else p))

@pytest.mark.parametrize('factor', [.3, 1, 4])
@pytest.mark.parametrize('classes', [2, 3])
def test_temperature_finds_the_factor(factor, classes):
    frame = simulated(20_000, factor, classes=classes)
    T = fit_temperature(frame)
    assert T == pytest.approx(factor, rel=.06)
    cool = tempered(frame, T)
    p, q = (f.filter(regex='^p_').to_numpy() for f in (frame, cool))
    assert (p.argmax(1) == q.argmax(1)).all() and q.sum(1) == pytest.approx(np.ones(len(q))) and fit_temperature(cool) == pytest.approx(1, rel=.01)
    assert tempered(frame, 1.)[['p_0', 'p_1']].to_numpy() == pytest.approx(p[:, :2])
    if classes == 2: assert summarise(cool[:500], ['auroc'], n_boot=2).value['auroc'] == pytest.approx(summarise(frame[:500], ['auroc'], n_boot=2).value['auroc'])

def test_calibration_refuses():
    for f in (calibration, fit_temperature):
        with pytest.raises(ValueError, match='p_0'): f(two()[0])
    with pytest.raises(ValueError, match='temperature'): tempered(simulated(5), 0)
    with pytest.raises(ValueError, match='bins'): calibration(simulated(5), bins=0)
