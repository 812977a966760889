"""The MANIFEST's definitions that have no file: each formula written again in NumPy float64, values and gradients.

A gradient is checked along random directions against central differences of the NumPy formula.
"""

import math

import jax
import numpy as np
import pytest
from golden_adapter import evaluate

from jaxcompress import distill

SEED = 7


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def cross_entropy(z, labels):
    return -log_softmax(z)[np.arange(len(z)), labels].mean()


def l2_rows(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pool(x, size, reduce=np.mean):
    """Adaptive pooling of NHWC, one output pixel at a time."""
    (n, h, w, c), out = x.shape, np.empty((x.shape[0], *size, x.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * h // size[0], math.ceil((i + 1) * h / size[0]))
            columns = slice(j * w // size[1], math.ceil((j + 1) * w / size[1]))
            out[:, i, j] = reduce(x[:, rows, columns].reshape(n, -1, c), axis=1)
    return out


def kd_total_tfkd(student_logits, teacher_logits, labels):
    z = log_softmax(teacher_logits / 6.0), log_softmax(student_logits / 6.0)
    return 0.05 * cross_entropy(student_logits, labels) + 0.95 * 36 * (np.exp(z[0]) * (z[0] - z[1])).mean()


def kd_total_alpha0(student_logits, teacher_logits, labels):
    return kl(log_softmax(teacher_logits / 4), log_softmax(student_logits / 4)).mean()


def kd_total_beta(student_logits, teacher_logits, labels):
    soft = 16 * kl(log_softmax(teacher_logits / 4), log_softmax(student_logits / 4)).mean()
    return 0.3 * cross_entropy(student_logits, labels) + 0.4 * soft


def dist_torchdistill(student_logits, teacher_logits):
    s, t = softmax(student_logits / 2), softmax(teacher_logits / 2)
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    return 4 * 1.5 * (1 - rows) + 4 * 0.5 * (1 - columns)


def mlld_cc(student_logits, teacher_logits):
    s, t = softmax(student_logits / 3), softmax(teacher_logits / 3)
    return ((t.T @ t - s.T @ s) ** 2).sum() / s.shape[1]


def label_smoothing_tfkd(student_logits, labels):
    target = np.full(student_logits.shape, 0.1 / 9)
    target[np.arange(len(labels)), labels] = 0.9
    return -(target * log_softmax(student_logits)).sum(-1).mean()


def multi_teacher_textbrewer(student_logits, teacher_logits):
    return -(softmax(teacher_logits.mean(0) / 8) * log_softmax(student_logits / 8)).sum(-1).mean()


def jsd(beta, temperature=1.0):
    def of(student_logits, teacher_logits):
        s, t = softmax(student_logits / temperature), softmax(teacher_logits / temperature)
        m = (1 - beta) * s + beta * t
        if beta in (0, 1):
            return kl(np.log(s), np.log(t)).mean() if beta else kl(np.log(t), np.log(s)).mean()
        return (beta * kl(np.log(t), np.log(m)) + (1 - beta) * kl(np.log(s), np.log(m))).mean()

    return of


def jsd_unlabelled(student_logits, teacher_logits):
    return jsd(0.3)(student_logits, teacher_logits) * student_logits.shape[1]  # divided by the first axis only


def topk(alpha, tail):
    def of(student_logits, teacher_logits):
        ids = np.argsort(-student_logits, axis=-1)[..., :4]
        few = [np.take_along_axis(softmax(z), ids, -1) for z in (student_logits, teacher_logits)]
        if tail:
            few = [np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1) for p in few]
        else:
            few = [p / p.sum(-1, keepdims=True) for p in few]
        s, t = few
        m = (1 - alpha) * s + alpha * t
        return (alpha * kl(np.log(t), np.log(m)) + (1 - alpha) * kl(np.log(s), np.log(m))).mean()

    return of


def conv(x, kernel, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kh, kw = kernel.shape[:2]
    h, w = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    patches = [[x[:, i * stride : i * stride + kh, j * stride : j * stride + kw] for j in range(w)] for i in range(h)]
    return np.stack([np.stack([np.einsum("nabi,abio->no", p, kernel) for p in row], 1) for row in patches], 1)


def conv_transpose(x, kernel):
    """torch's ConvTranspose2d(kernel 4, stride 2, padding 1), IOHW: every input pixel stamps the kernel."""
    n, h, w, _ = x.shape
    out = np.zeros((n, 2 * h + 2, 2 * w + 2, kernel.shape[1]))
    for i in range(h):
        for j in range(w):
            out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("nc,coab->nabo", x[:, i, j], kernel)
    return out[:, 1:-1, 1:-1]


def hint_after(convolve):
    def of(student, teacher, conv_w, conv_b, bn_scale, bn_bias):
        y = convolve(student, conv_w) + conv_b
        y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5) * bn_scale + bn_bias
        return ((np.maximum(y, 0) - teacher) ** 2).mean()

    return of


def attention(x, p=2):
    return l2_rows((np.abs(x) ** p).mean(-1).reshape(len(x), -1))


def at_three(student0, teacher0, student1, teacher1):
    return sum(((attention(s) - attention(t)) ** 2).mean() for s, t in ((student0, teacher0), (student1, teacher1)))


def at_uneven(student, teacher):
    return ((attention(pool(student, (3, 3))) - attention(teacher)) ** 2).mean()


def sp_l1(student, teacher):
    ours, theirs = (x.reshape(len(x), -1) for x in (student, teacher))
    ours, theirs = (g / np.abs(g).sum(1, keepdims=True) for g in (ours @ ours.T, theirs @ theirs.T))
    return ((ours - theirs) ** 2).sum() / len(ours) ** 2


def cc_gaussian(student, teacher):
    def matrix(x):
        return sum(math.exp(-0.6) * 0.6**p / math.factorial(p) * (x @ x.T) ** p for p in range(3))

    return np.linalg.norm(matrix(student) - matrix(teacher)) / len(student) ** 2


def cc_bilinear(student, teacher):
    return np.linalg.norm(student @ student.T - teacher @ teacher.T) / len(student) ** 2


def rkd(student, teacher):
    def distances(x):
        d = np.sqrt(np.maximum(((x[:, None] - x[None]) ** 2).sum(-1), 1e-12)) * (1 - np.eye(len(x)))
        return d / d[d > 0].mean()

    def angles(x):
        e = x[None] - x[:, None]
        e = e / np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
        return np.einsum("ijd,ikd->ijk", e, e)

    def huber(d):
        return np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5).mean()

    return 2 * huber(distances(student) - distances(teacher)) + 3 * huber(angles(student) - angles(teacher))


def pkt(student, teacher):
    def distribution(x):
        s = (l2_rows(x) @ l2_rows(x).T + 1) / 2
        return s / s.sum(1, keepdims=True)

    p, q = distribution(teacher), distribution(student)
    return (p * np.log((p + 1e-6) / (q + 1e-6))).mean()


def vid(student, teacher, w1, w2, w3, log_scale):
    mean = np.maximum(np.maximum(pool(student, teacher.shape[1:3]) @ w1.T, 0) @ w2.T, 0) @ w3.T
    variance = np.log(1 + np.exp(log_scale)) + 1e-5
    return (0.5 * ((mean - teacher) ** 2 / variance + np.log(variance))).mean()


def fsp_max(student0, student1, teacher0, teacher1):
    def matrix(a, b):
        return np.einsum("nhwi,nhwj->nij", pool(a, b.shape[1:3], np.max), b) / (b.shape[1] * b.shape[2])

    difference = matrix(student0, student1) - matrix(teacher0, teacher1)
    return np.linalg.norm(difference, axis=1).sum() / len(difference)


def nst(student, teacher):
    s, t = (x.reshape(len(x), -1, x.shape[-1]) for x in (pool(student, teacher.shape[1:3]), teacher))
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))

    def mean(a, b):
        return np.mean([[(a[n].T @ b[n]) ** 2] for n in range(len(a))])

    return mean(t, t) + mean(s, s) - 2 * mean(s, t)


def boundary(s, t):
    return np.where((s > -1) & (t <= 0), (s + 1) ** 2, 0) + np.where((s <= 1) & (t > 0), (s - 1) ** 2, 0)


def ft_full(student, teacher):
    s, t = (l2_rows(x.reshape(len(x), -1)) for x in (student, teacher))
    return np.abs(s - t).mean()


def ofd(student, teacher, margin):
    s, t, m = student, teacher, margin
    parts = ((s - m) ** 2 * ((s > m) & (t <= m)), (s - t) ** 2 * ((s > t) & (m < t) & (t <= 0)), (s - t) ** 2 * (t > 0))
    return sum(p.sum() for p in parts) / len(s)


def crd(student, teacher, ws, bs, wt, bt, memory_v1, memory_v2, idx, contrast_idx, constants=None):
    vs, vt = l2_rows(student @ ws.T + bs), l2_rows(teacher @ wt.T + bt)
    n, k, total = len(memory_v1), contrast_idx.shape[1] - 1, 0.0
    for side, (v, memory) in enumerate(((vs, memory_v2), (vt, memory_v1))):
        x = np.exp(np.einsum("bkd,bd->bk", memory[contrast_idx], v) / 0.07)
        x = x / (CONSTANTS[side] if constants is None else constants[side])
        total -= np.log(x[:, 0] / (x[:, 0] + k / n + 1e-7)).sum()
        total -= np.log(k / n / (x[:, 1:] + k / n + 1e-7)).sum()
    return total / len(vs)


CONSTANTS = [1.0, 1.0]  # CRD's normalising constants: from the undisturbed inputs, then held

IMAGES = {"student", "teacher", "student0", "student1", "teacher0", "teacher1"}
LOGITS = {"student_logits": (6, 10), "teacher_logits": (6, 10)}
LABELLED = {**LOGITS, "labels": 10}
LM = {"student_logits": (4, 3, 12), "teacher_logits": (4, 3, 12)}
MAPS = {"student": (4, 4, 4, 3), "teacher": (4, 4, 4, 3)}
ROWS = {"student": (6, 5), "teacher": (6, 7)}
CRD = {"student": (4, 6), "teacher": (4, 9), "ws": (5, 6), "bs": (5,), "wt": (5, 9), "bt": (5,)} | {
    "memory_v1": (12, 5), "memory_v2": (12, 5)
}  # fmt: skip
REGRESSOR = {"conv_b": (5,), "bn_scale": (5,), "bn_bias": (5,)}

CASES = {
    "tfkd": ("kd_total", {"alpha": 0.95, "T": 6.0}, LABELLED, kd_total_tfkd),
    "torchdistill_alpha0": ("kd_total", {"alpha": 0.0, "beta": 1.0, "T": 4.0}, LABELLED, kd_total_alpha0),
    "torchdistill_beta": ("kd_total", {"alpha": 0.3, "beta": 0.4, "T": 4.0}, LABELLED, kd_total_beta),
    "torchdistill_tau2": ("dist", {"beta": 1.5, "gamma": 0.5, "tau": 2.0}, LOGITS, dist_torchdistill),
    "cc_T3": ("mlld", {"T": 3.0}, LOGITS, mlld_cc),
    "smooth_tfkd": ("label_smoothing", {"eps": 0.1}, {"student_logits": (6, 10), "labels": 10}, label_smoothing_tfkd),
    "textbrewer": (
        "multi_teacher",
        {"T": 8.0},
        {"student_logits": (6, 10), "teacher_logits": (3, 6, 10)},
        multi_teacher_textbrewer,
    ),
    "beta0": ("jsd", {"beta": 0.0}, LOGITS, jsd(0)),
    "beta1": ("jsd", {"beta": 1.0}, LOGITS, jsd(1)),
    "beta0.9_T2": ("jsd", {"beta": 0.9, "T": 2.0}, LOGITS, jsd(0.9, 2.0)),
    "unlabelled": ("jsd", {"beta": 0.3}, LM, jsd_unlabelled),
    "jsd_tail": ("topk_kd", {"k": 4, "alpha": 0.5, "add_tail": True}, LM, topk(0.5, True)),
    "jsd_renorm": ("topk_kd", {"k": 4, "alpha": 0.3, "add_tail": False}, LM, topk(0.3, False)),
    "convreg_valid": (
        "fitnet_hint",
        {},
        {"student": (4, 5, 5, 3), "teacher": (4, 3, 3, 5), "conv_w": (5, 3, 3, 3), **REGRESSOR},
        hint_after(lambda x, w: conv(x, w.transpose(2, 3, 1, 0))),
    ),
    "convreg_transposed": (
        "fitnet_hint",
        {},
        {"student": (4, 3, 3, 3), "teacher": (4, 6, 6, 5), "conv_w": (3, 5, 4, 4), **REGRESSOR},
        hint_after(conv_transpose),
    ),
    "list": (
        "at",
        {"p": 2},
        {"student0": (4, 4, 4, 3), "teacher0": (4, 4, 4, 5), "student1": (4, 2, 2, 3), "teacher1": (4, 2, 2, 3)},
        at_three,
    ),
    "uneven": ("at", {"p": 2}, {"student": (4, 5, 5, 3), "teacher": (4, 3, 3, 2)}, at_uneven),
    "l1": ("sp_torchdistill", {}, MAPS, sp_l1),
    "torchdistill_gaussian": ("cc", {"gamma": 0.3, "max_p": 2}, {"student": (6, 5), "teacher": (6, 5)}, cc_gaussian),
    "torchdistill_bilinear": ("cc", {}, {"student": (6, 5), "teacher": (6, 5)}, cc_bilinear),
    "total": ("rkd", {"w_d": 2.0, "w_a": 3.0}, ROWS, rkd),
    "kdzoo_pkt": ("pkt", {"eps": 1e-6}, ROWS, pkt),
    "s_larger": (
        "vid",
        {"eps": 1e-5},
        {"student": (4, 4, 4, 3), "teacher": (4, 2, 2, 5), "w1": (5, 3), "w2": (5, 5), "w3": (5, 5), "log_scale": (5,)},
        vid,
    ),
    "torchdistill_max": (
        "fsp",
        {},
        {"student0": (4, 4, 4, 3), "student1": (4, 2, 2, 5), "teacher0": (4, 4, 4, 3), "teacher1": (4, 2, 2, 5)},
        fsp_max,
    ),
    "nst_pooled": ("nst", {}, {"student": (4, 4, 4, 3), "teacher": (4, 2, 2, 5)}, nst),
    "kdzoo_ab": ("ab", {"margin": 1.0}, MAPS, lambda student, teacher: boundary(student, teacher).mean()),
    "torchdistill_ab": ("ab", {"margin": 1.0}, MAPS, lambda student, teacher: boundary(student, teacher).sum() / 4),
    "kdzoo_ft": ("ft", {}, MAPS, ft_full),
    "partial": ("ofd", {}, {**MAPS, "margin": (3,)}, ofd),
    "memory": ("crd", {"T": 0.07}, CRD, crd),
}


def draw(shapes):
    rng = np.random.default_rng(SEED)
    inputs = {}
    for name, shape in shapes.items():
        if name == "labels":
            inputs[name] = rng.integers(0, shape, len(inputs["student_logits"]))
        else:
            scale = {"student_logits": 2.0, "teacher_logits": 2.0}.get(name, 1.0)
            value = scale * rng.normal(size=shape)
            inputs[name] = -np.abs(value) / 2 if name == "margin" else value
    if "memory_v1" in inputs:
        inputs["memory_v1"], inputs["memory_v2"] = l2_rows(inputs["memory_v1"]), l2_rows(inputs["memory_v2"])
        inputs["idx"] = np.arange(4) * 2
        inputs["contrast_idx"] = np.concatenate([inputs["idx"][:, None], rng.integers(0, 12, (4, 3))], 1)
    return {k: v.astype("float32") if v.dtype.kind == "f" else v for k, v in inputs.items()}


def widen(inputs):
    return {k: v.astype("float64") if v.dtype.kind == "f" else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name, monkeypatch):
    family, params, shapes, reference = CASES[name]
    inputs = draw(shapes)
    wide = widen(inputs)
    if family == "crd":
        monkeypatch.setitem(globals(), "CONSTANTS", normalisers(wide))
    images = {f"{k}_nhwc" if k in IMAGES and v.ndim == 4 else k: v for k, v in inputs.items()}
    result = evaluate(family, images, {**params, "case": name})
    np.testing.assert_allclose(result["loss"], reference(**wide), rtol=5e-5)
    rng = np.random.default_rng(SEED + 1)
    for key, gradient in result["grads"].items():
        k = key.removesuffix("_nhwc")
        direction = rng.normal(size=wide[k].shape)
        step = 1e-5
        plus, minus = (reference(**{**wide, k: wide[k] + sign * step * direction}) for sign in (1, -1))
        along = np.sum(np.asarray(gradient, float) * direction)
        limit = 1e-3 * np.linalg.norm(gradient) * np.linalg.norm(direction) / math.sqrt(direction.size) + 1e-6
        assert abs(along - (plus - minus) / (2 * step)) < limit, key


def normalisers(x):
    """Each side's mean score times the number of examples, as the first call computes it."""
    vs, vt = l2_rows(x["student"] @ x["ws"].T + x["bs"]), l2_rows(x["teacher"] @ x["wt"].T + x["bt"])
    pairs = ((vs, x["memory_v2"]), (vt, x["memory_v1"]))
    scores = (np.exp(np.einsum("bkd,bd->bk", m[x["contrast_idx"]], v) / 0.07) for v, m in pairs)
    return [s.mean() * len(x["memory_v1"]) for s in scores]


def test_crd_memory_after_two_steps():
    x = draw(CRD)
    wide = widen(x)
    heads = distill.contrastive_heads(6, 9, 5)
    weights = {"student": {"kernel": x["ws"].T, "bias": x["bs"]}, "teacher": {"kernel": x["wt"].T, "bias": x["bt"]}}
    embeddings = heads.apply(weights, (x["student"], x["teacher"]))
    memory = distill.ContrastMemory(x["memory_v1"], x["memory_v2"], np.float32(-np.inf), np.float32(-np.inf))
    first, memory = distill.contrastive_loss(*embeddings, memory, x["idx"], x["contrast_idx"])
    constants = normalisers(wide)
    np.testing.assert_allclose(np.exp([memory.student_log_constant, memory.teacher_log_constant]), constants, rtol=1e-4)
    np.testing.assert_allclose(np.mean(first), crd(**wide, constants=constants), rtol=5e-5)
    for name, v in (
        ("memory_v1", x["student"] @ x["ws"].T + x["bs"]),
        ("memory_v2", x["teacher"] @ x["wt"].T + x["bt"]),
    ):
        wide[name][x["idx"]] = l2_rows((wide[name][x["idx"]] + l2_rows(v.astype(float))) / 2)
    np.testing.assert_allclose(memory.student, wide["memory_v1"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(memory.teacher, wide["memory_v2"], rtol=1e-5, atol=1e-6)
    second, after = distill.contrastive_loss(*embeddings, memory, x["idx"], x["contrast_idx"])
    np.testing.assert_allclose(np.mean(second), crd(**wide, constants=constants), rtol=5e-5)
    assert after.student_log_constant == memory.student_log_constant


def test_rkd_with_duplicates_keeps_value_and_finite_gradient():
    x = draw(ROWS)
    x["student"][3] = x["student"][0]
    result = evaluate("rkd", x, {"w_d": 2.0, "w_a": 3.0})
    np.testing.assert_allclose(result["loss"], rkd(**widen(x)), rtol=5e-5)
    assert np.all(np.isfinite(result["grads"]["student"])) and np.max(np.abs(result["grads"]["student"])) < 10


def test_nchw_gradients_come_back_in_nchw():
    x = draw(MAPS)
    result = evaluate("nst", {f"{k}_nchw": np.moveaxis(v, -1, 1) for k, v in x.items()}, {})
    want = evaluate("nst", {f"{k}_nhwc": v for k, v in x.items()}, {})
    np.testing.assert_allclose(result["grads"]["student_nchw"], np.moveaxis(want["grads"]["student_nhwc"], -1, 1))


def test_rkd_does_not_depend_on_a_sides_scale_however_large():
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(5, n)).astype("float32") for n in (3, 4))

    def result(a, b):
        return jax.value_and_grad(distill.relational_loss)(a, b)

    value, gradient = result(student, teacher)
    for large_student, large_teacher in ((1e25, 1.0), (1.0, 1e25), (1e25, 1e30)):
        got, slope = result(student * np.float32(large_student), teacher * np.float32(large_teacher))
        np.testing.assert_allclose(got, value, rtol=1e-4)
        np.testing.assert_allclose(slope * np.float32(large_student), gradient, rtol=1e-3, atol=1e-3)
