"""Laws of htlab.fewshot: heads agree with what they are by definition, shots are nested, curves are repeatable."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from htlab.embed import Embeddings
from htlab.fewshot import HEADS, draw_shots, fit_head, learning_curve


def vectors(seed, n=60, e=16, classes=3, apart=1.):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.standard_normal((n, e)) + apart * np.eye(e)[y] * e**.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y


def embedded(seed, model="a tower", **kw):
    x, y = vectors(seed, **kw)
    return Embeddings(x, pd.DataFrame(dict(id=[f"i{i}" for i in range(len(y))], label=np.array(["benign", "malignant", "normal"])[y])), "image", model)


@given(seed=st.integers(0, 99), name=st.sampled_from(list(HEADS)), scale=st.floats(.1, 10))
def test_probabilities_and_the_length_of_vectors(seed, name, scale):
    x, y = vectors(seed)
    p = fit_head(name, x, y, 3)(x)
    assert p.shape == (60, 3) and np.allclose(p.sum(1), 1, atol=1e-5) and (p >= 0).all()
    assert np.allclose(fit_head(name, scale * x, y, 3)(scale * x), p, atol=1e-3), "only directions count"
    at = np.random.default_rng(seed).permutation(60)
    assert np.allclose(fit_head(name, x[at], y[at], 3)(x), p, atol=1e-3), "the order of the shots does not"
    swap = np.array([2, 0, 1])
    assert np.allclose(fit_head(name, x, swap[y], 3)(x)[:, swap], p, atol=2e-3), "nor do the numbers of the classes"


@given(st.integers(0, 99))
def test_heads_are_what_they_are_called(seed):
    x, y = vectors(seed)
    z, _ = vectors(seed + 1000)
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert (fit_head("prototype", x, y, 3)(z).argmax(1) == ((z[:, None] - means) ** 2).sum(2).argmin(1)).all(), "the nearest mean"
    assert (fit_head("tip", x[:1].repeat(3, 0), [0, 1, 2], 3)(z) == fit_head("tip", x[:1].repeat(3, 0), [0, 1, 2], 3)(z)[:, :1]).all(), "one image with three labels says nothing"
    words = np.eye(16, dtype=np.float32)[:3]
    logits = 100 * z @ words.T + np.stack([np.exp(5.5 * (z @ x[y == c].T - 1)).sum(1) for c in range(3)], 1)
    assert np.allclose(fit_head("tip", x, y, 3, words)(z), softmax(logits, 1), atol=1e-4), "the formula of the paper"
    assert np.allclose(fit_head("probe", x, y, 3)(z), LogisticRegression(max_iter=1000).fit(4 * x, y).predict_proba(4 * z), atol=1e-4)


@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 30))
def test_shots_are_nested_and_balanced(seed, a, b):
    labels = np.array(["b", "m", "m", "n"] * 10)
    few, many = (draw_shots(labels, k, seed) for k in sorted((a, b)))
    assert set(few) <= set(many) and len(set(many)) == len(many)
    assert all((labels[many] == c).sum() == min(max(a, b), (labels == c).sum()) for c in "bmn")


def test_a_curve_is_repeatable_and_rises():
    train, test = embedded(0, n=300, apart=.25), embedded(1, n=300, apart=.25)
    one, two = (learning_curve(train, test, shots=(1, 32), seeds=range(4)) for _ in range(2))
    assert one.equals(two) and len(one) == 3 * 2 * 4 and set(one.n) == {300}
    mean = one.groupby(["head", "shots"])[["accuracy", "auroc"]].mean().unstack()
    for m in ("accuracy", "auroc"): assert (mean[m][32] > mean[m][1]).all() and (mean[m][32] > 1 / 3).all()


def test_refusals():
    x, y = vectors(0)
    for wrong, says in ((lambda: fit_head("prob", x, y, 3), "choose from prototype"), (lambda: fit_head("probe", x[:2], [0, 0], 2), "every class from 0 to 1"), (lambda: fit_head("probe", x, y[:5], 3), "one label for each"),
                        (lambda: draw_shots(y, 0), "whole number from 1"), (lambda: learning_curve(embedded(0), embedded(1, "another")), "one tower"),
                        (lambda: learning_curve(embedded(0).where(np.arange(60) % 3 < 2), embedded(1)), "normal"), (lambda: learning_curve(embedded(0), embedded(1).where(np.arange(60) % 3 < 2)), "every class in both")):
        with pytest.raises(ValueError, match=says): wrong()


def test_the_bench_takes_what_there_is():
    "More shots than a class has: all it has, and the title says so."
    from htlab.classroom import ShotsBench
    bench = ShotsBench(*(embedded(i, n=41, classes=2) for i in (0, 1)), shots=128)
    assert "20 per class" in bench.data["curve"]["title"] and bench.data["curve"]["traces"]["here"]["x"] == [np.log2(20)]
    assert "ShotsBench(train, test, shots=128)" == bench.call
