"""Maps the families of `golden/MANIFEST.md` to calls of the library.

`evaluate(family, inputs, params)` gives the loss and its gradients as the MANIFEST defines them: the library's loss on
examples is averaged here, and where a peer's number differs by a constant factor the factor stands here.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import distill

Inputs = dict[str, jax.Array]
Params = Mapping[str, Any]

IGNORED = -100


def evaluate(family: str, inputs: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The loss of a golden family on a case's inputs.

    Args:
      family: a name from the MANIFEST.
      inputs: arrays by the MANIFEST's names; images as `NAME_nhwc`, or `NAME_nchw`, or both. Other entries of the
        case's file are ignored.
      params: the case's parameters. Where the definitions of a family cannot be told apart by them, `"case"` in
        them names the case (`"centered_c10"`, `"kdzoo"`, ...).

    Returns:
      `{"loss": scalar, "grads": {input name: array}}`, gradients for every floating input on the student's side,
      under the names given, images in the layouts given.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(sorted(FAMILIES))}")
    arrays, layouts = _read(inputs)
    learned = {k: v for k, v in arrays.items() if _is_learned(k) and jnp.issubdtype(v.dtype, jnp.floating)}
    constants = {k: v for k, v in arrays.items() if k not in learned}
    loss, grads = jax.jit(jax.value_and_grad(lambda x: FAMILIES[family]({**constants, **x}, params)))(learned)
    return {"loss": loss, "grads": _write(grads, layouts)}


def _read(inputs: Mapping[str, Any]) -> tuple[Inputs, dict[str, list[str]]]:
    arrays: Inputs = {}
    layouts: dict[str, list[str]] = {}
    for key, value in inputs.items():
        name, _, layout = key.rpartition("_")
        if key.startswith(("loss", "grad_", "meta")) or np.asarray(value).dtype.kind not in "fiu":
            continue
        if layout not in ("nchw", "nhwc"):
            arrays[key] = jnp.asarray(value)
            continue
        layouts.setdefault(name, []).append(layout)
        arrays[name] = jnp.asarray(value) if layout == "nhwc" else jnp.moveaxis(jnp.asarray(value), 1, -1)
    return arrays, layouts


def _write(grads: Inputs, layouts: dict[str, list[str]]) -> Inputs:
    result = {}
    for name, grad in grads.items():
        for layout in layouts.get(name, [""]):
            key = f"{name}_{layout}" if layout else name
            result[key] = jnp.moveaxis(grad, -1, 1) if layout == "nchw" else grad
    return result


def _is_learned(name: str) -> bool:
    return not name.startswith(("teacher", "margin", "memory", "Z_"))


def _is_case(params: Params, *names: str) -> bool:
    return any(name in str(params.get("case", "")) for name in names)


def _mean_over_tokens(losses: jax.Array, labels: jax.Array | None) -> jax.Array:
    return distill.masked_mean(losses, None if labels is None else labels != IGNORED)


def _logits(x: Inputs) -> tuple[jax.Array, jax.Array]:
    return x["student_logits"], x["teacher_logits"]


def kd_hinton(x: Inputs, params: Params) -> jax.Array:
    return jnp.mean(distill.soft_target_loss(*_logits(x), temperature=params.get("T", 4.0)))


def kd_total(x: Inputs, params: Params) -> jax.Array:
    hard = jnp.mean(distill.hard_label_loss(x["student_logits"], x["labels"]))
    temperature = params.get("T", 4.0)
    soft = jnp.mean(distill.soft_target_loss(*_logits(x), temperature=temperature))
    alpha = params["alpha"]
    if "gamma" in params:
        return params["gamma"] * hard + alpha * soft
    if _is_case(params, "alpha0") or alpha == 0:
        return soft / temperature**2
    if "beta" in params or not _is_case(params, "tfkd"):
        total = distill.distillation_loss(*_logits(x), x["labels"], alpha=1 - alpha, temperature=temperature)
        beta = params.get("beta", 1 - alpha)
        return jnp.mean(total) if beta == 1 - alpha else alpha * hard + beta * soft
    classes = x["student_logits"].shape[-1]
    return (1 - alpha) * hard + alpha * soft / classes


def logits_mse(x: Inputs, params: Params) -> jax.Array:
    return jnp.mean(distill.logit_matching_loss(*_logits(x), centred=_is_case(params, "cent")))


def dml(x: Inputs, params: Params) -> jax.Array:
    one, two = x["logits_net1"], x["logits_net2"]
    first = jnp.mean(distill.soft_target_loss(one, two))
    second = jnp.mean(distill.soft_target_loss(two, one))  # its gradient is net 2's; its value is not in the loss
    return first + second - jax.lax.stop_gradient(second)


def dkd(x: Inputs, params: Params) -> jax.Array:
    weights = {"alpha": params.get("alpha", 1.0), "beta": params.get("beta", 8.0)}
    return jnp.mean(distill.decoupled_loss(*_logits(x), x["labels"], temperature=params.get("T", 4.0), **weights))


def dist(x: Inputs, params: Params) -> jax.Array:
    tau = params.get("tau", 1.0)
    loss = distill.dist_loss(*_logits(x), beta=params.get("beta", 1.0), gamma=params.get("gamma", 1.0), temperature=tau)
    return loss if _is_case(params, "torchdistill") else loss / tau**2


def logit_std(x: Inputs, params: Params) -> jax.Array:
    return jnp.mean(distill.standardized_soft_target_loss(*_logits(x), temperature=params.get("T", 2.0)))


def mlld(x: Inputs, params: Params) -> jax.Array:
    loss = distill.class_correlation_loss if _is_case(params, "cc") else distill.batch_correlation_loss
    return loss(*_logits(x), temperature=params.get("T", 4.0))


def label_smoothing(x: Inputs, params: Params) -> jax.Array:
    return jnp.mean(
        distill.label_smoothing_loss(
            x["student_logits"], x["labels"], params.get("eps", 0.1), onto_wrong_only=_is_case(params, "tfkd")
        )
    )


def tfkd_reg(x: Inputs, params: Params) -> jax.Array:
    student = x["student_logits"]
    of_peer = {}
    if "multiplier" in params:
        of_peer = {"multiplier": params["multiplier"] / student.shape[-1], "student_temperature": 1.0}
    losses = distill.teacher_free_loss(
        student,
        x["labels"],
        alpha=params["alpha"],
        temperature=params["tau"],
        correct_probability=params.get("correct_prob", 0.99),
        **of_peer,
    )
    return jnp.mean(losses)


def soft_ce_tinybert(x: Inputs, params: Params) -> jax.Array:
    temperature = params.get("T", 1.0)
    losses = distill.soft_cross_entropy_loss(*_logits(x), temperature=temperature)
    return jnp.mean(losses) / temperature**2 / x["student_logits"].shape[-1]


def multi_teacher(x: Inputs, params: Params) -> jax.Array:
    student, teachers = _logits(x)
    temperature = params.get("T", 4.0)
    if _is_case(params, "textbrewer", "mean_logits"):
        return (
            jnp.mean(distill.soft_cross_entropy_loss(student, teachers.mean(0), temperature=temperature))
            / temperature**2
        )
    mean = distill.ensemble_targets(teachers, temperature=temperature, mean="probabilities")
    return jnp.mean(distill.soft_label_loss(student, mean, temperature=temperature))


def jsd(x: Inputs, params: Params) -> jax.Array:
    temperature = params.get("T", 1.0)
    losses = distill.jensen_shannon_loss(*_logits(x), params.get("beta", 0.5), temperature=temperature) / temperature**2
    if "labels" not in x and losses.ndim > 1:
        return jnp.sum(losses) / losses.shape[0]  # the peer's 'batchmean' divides by the first axis only
    return _mean_over_tokens(losses, x.get("labels"))


def reverse_kl(x: Inputs, params: Params) -> jax.Array:
    return _mean_over_tokens(distill.reverse_kl_loss(*_logits(x)), x.get("labels"))


def soft_ce_lm(x: Inputs, params: Params) -> jax.Array:
    return _mean_over_tokens(distill.soft_cross_entropy_loss(*_logits(x)), x.get("labels"))


def topk_kd(x: Inputs, params: Params) -> jax.Array:
    tail, beta = bool(params.get("add_tail", True)), params.get("alpha", 0.0)
    return jnp.mean(distill.top_k_loss(*_logits(x), params["k"], tail=tail, support="student", beta=beta))


def jsd_liger_fused(x: Inputs, params: Params) -> jax.Array:
    temperature = params.get("T", 1.0)
    hard, soft = params["weight_hard"], params["weight_soft"] / temperature**2
    total = distill.fused_distillation_loss(
        x["student_input"],
        x["student_weight"].T,
        x["teacher_input"],
        x["teacher_weight"].T,
        x["labels"],
        alpha=soft / (hard + soft),
        beta=params["beta"],
        temperature=temperature,
        where=x["labels"] != params.get("ignore_index", IGNORED),
        chunk=params.get("chunk_size", 16),
    )
    return (hard + soft) * total


def fitnet_hint(x: Inputs, params: Params) -> jax.Array:
    student, teacher = x["student"], x["teacher"]
    if "conv_w" in x:
        projector = distill.conv_projector(student.shape[1:], teacher.shape[1:], batch_norm=True)
        if 2 * student.shape[1] == teacher.shape[1]:  # a transposed convolution's IOHW, as the equal convolution's HWIO
            kernel = jnp.transpose(x["conv_w"], (2, 3, 0, 1))[::-1, ::-1]
        else:
            kernel = jnp.transpose(x["conv_w"], (2, 3, 1, 0))
        weights = {"kernel": kernel, "bias": x["conv_b"], "scale": x["bn_scale"], "offset": x["bn_bias"]}
        student = projector.apply(weights, student)
    return jnp.mean(distill.hint_loss(student, teacher))


def _maps(x: Inputs) -> list[tuple[jax.Array, jax.Array]]:
    if "student0" not in x:
        return [(x["student"], x["teacher"])]
    return [(x[f"student{i}"], x[f"teacher{i}"]) for i in range(sum(name.startswith("student") for name in x))]


def at(x: Inputs, params: Params) -> jax.Array:
    power = params.get("p", 2)
    return sum(jnp.mean(distill.attention_transfer_loss(s, t, power=power)) for s, t in _maps(x))


def at_variants(x: Inputs, params: Params) -> jax.Array:
    norm_order = None if "p" in params else 2
    power = params.get("p", 2)
    return jnp.mean(distill.attention_transfer_loss(x["student"], x["teacher"], power=power, norm_order=norm_order))


def sp(x: Inputs, params: Params) -> jax.Array:
    return distill.similarity_preserving_loss(x["student"], x["teacher"])


def sp_torchdistill(x: Inputs, params: Params) -> jax.Array:
    return distill.similarity_preserving_loss(x["student"], x["teacher"], norm_order=1)


def cc(x: Inputs, params: Params) -> jax.Array:
    pair = x["student"], x["teacher"]
    if _is_case(params, "torchdistill") or "max_p" in params or "kernel" in params:
        bilinear = params.get("kernel", params.get("kernel_type")) == "bilinear" or _is_case(params, "bilinear")
        series = {"gamma": params.get("gamma", 0.4), "order": params.get("max_p", params.get("P", 2))}
        kernel = "bilinear" if bilinear else "gaussian"
        square = distill.correlation_congruence_loss(*pair, kernel=kernel, normalize=False, **series)
        return jnp.sqrt(square) / pair[0].shape[0]
    if "gamma" in params:
        return distill.correlation_congruence_loss(*pair, gamma=params["gamma"], order=params["P"])
    return distill.consecutive_correlation_loss(*pair)


def rkd(x: Inputs, params: Params) -> jax.Array:
    weights = {"distance_weight": params.get("w_d", 25.0), "angle_weight": params.get("w_a", 50.0)}
    return distill.relational_loss(x["student"], x["teacher"], **weights)


def pkt(x: Inputs, params: Params) -> jax.Array:
    return distill.probabilistic_transfer_loss(x["student"], x["teacher"], epsilon=params.get("eps", 1e-7))


def vid(x: Inputs, params: Params) -> jax.Array:
    student, teacher = distill.pool_to_smaller(x["student"], x["teacher"])
    projector = distill.variational_projector(student.shape[-1], teacher.shape[-1])
    mean = projector.apply({name: x[name].T for name in ("w1", "w2", "w3")}, student)
    epsilon = params.get("eps", 1e-5)
    return jnp.mean(distill.variational_information_loss(mean, teacher, x["log_scale"], epsilon=epsilon))


def fsp(x: Inputs, params: Params) -> jax.Array:
    variant = {"pool": "max", "by_column": True} if _is_case(params, "torchdistill") else {}
    maps = _maps(x)
    pairs = [zip(*two, strict=True) for two in itertools.pairwise(maps)]
    return sum(jnp.mean(distill.flow_loss(student, teacher, **variant)) for student, teacher in pairs)


def nst(x: Inputs, params: Params) -> jax.Array:
    return sum(jnp.mean(distill.neuron_selectivity_loss(s, t)) for s, t in _maps(x))


def ab(x: Inputs, params: Params) -> jax.Array:
    maps, margin = _maps(x), params.get("margin", 1.0)
    sums = [jnp.mean(distill.activation_boundary_loss(s, t, margin=margin)) for s, t in maps]
    if _is_case(params, "kdzoo"):
        return sums[0] / maps[0][0][0].size
    if _is_case(params, "torchdistill") or len(maps) == 1:
        return sum(sums)
    return sum(loss * 2.0 ** (i - len(maps) + 1) for i, loss in enumerate(sums)) * 3 / 1000


def ft(x: Inputs, params: Params) -> jax.Array:
    collapse = "p2" in params or _is_case(params, "repdistiller")
    pair = x["student"], x["teacher"]
    return jnp.mean(distill.factor_transfer_loss(*pair, order=params.get("p2", 1), collapse_channels=collapse))


def crd(x: Inputs, params: Params) -> jax.Array:
    if "x" in x:
        scores = jnp.log(x["x"][..., 0])
        return jnp.mean(distill.contrast_loss(scores, params["n_data"], epsilon=params.get("eps", 1e-7)))
    heads = distill.contrastive_heads(x["student"].shape[1], x["teacher"].shape[1], x["ws"].shape[0])
    weights = {
        "student": {"kernel": x["ws"].T, "bias": x["bs"]},
        "teacher": {"kernel": x["wt"].T, "bias": x["bt"]},
    }
    embeddings = heads.apply(weights, (x["student"], x["teacher"]))
    constants = (x["Z_v1"], x["Z_v2"]) if _is_case(params, "step2") else (jnp.zeros(()),) * 2  # 0: not yet set
    memory = distill.ContrastMemory(x["memory_v1"], x["memory_v2"], *map(jnp.log, constants))
    temperature = params.get("T", params.get("nce_t", 0.07))
    momentum = params.get("momentum", params.get("nce_m", 0.5))
    losses, _ = distill.contrastive_loss(
        *embeddings, memory, x["idx"], x["contrast_idx"], temperature=temperature, momentum=momentum
    )
    return jnp.mean(losses)


def tinybert(x: Inputs, params: Params) -> jax.Array:
    student = distill.LayerOutputs(_numbered(x, "student_hidden"), _numbered(x, "student_att"))
    teacher = distill.LayerOutputs(_numbered(x, "teacher_hidden"), _numbered(x, "teacher_att"))
    weights = {"kernel": x["fit_w"].T, "bias": x["fit_b"]}
    projector = distill.dense_projector(*weights["kernel"].shape)
    project = functools.partial(projector.apply, weights)
    return jnp.mean(distill.intermediate_loss(student, teacher, project=project))


def _numbered(x: Inputs, name: str) -> list[jax.Array]:
    return [x[f"{name}{i}"] for i in range(sum(key.startswith(name) for key in x))]


def reviewkd_hcl(x: Inputs, params: Params) -> jax.Array:
    return sum(jnp.mean(distill.review_loss(s, t)) for s, t in _maps(x))


def ofd(x: Inputs, params: Params) -> jax.Array:
    return jnp.mean(distill.margin_relu_loss(x["student"], x["teacher"], x["margin"].reshape(-1)))


def ickd(x: Inputs, params: Params) -> jax.Array:
    losses = distill.inter_channel_loss(x["student"], x["teacher"])
    return jnp.mean(losses) / losses.shape[0]


FAMILIES: dict[str, Callable[[Inputs, Params], jax.Array]] = {
    f.__name__: f
    for f in (
        kd_hinton, kd_total, logits_mse, dml, dkd, dist, logit_std, mlld, label_smoothing, tfkd_reg, soft_ce_tinybert,
        multi_teacher, jsd, reverse_kl, soft_ce_lm, topk_kd, jsd_liger_fused, fitnet_hint, at, at_variants, sp,
        sp_torchdistill, cc, rkd, pkt, vid, fsp, nst, ab, ft, crd, tinybert, reviewkd_hcl, ofd, ickd,
    )
}  # fmt: skip
