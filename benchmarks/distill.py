"""Distillation losses: alone, in a full step, at a language model's vocabulary, and the memory of relations.

The student is the shared MLP (`_mlp.py`); the teacher is the same network with other weights, and its forward pass is
part of the step. Losses on features see the last hidden layer's 1024 units as a map of 4x4 pixels and 64 channels;
losses on relations see that map's mean over its pixels, [128, 64], as after global pooling.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _mlp as mlp
from benchmarks._harness import Figure, Figures, Stepper, benchmark, compiled_bytes, exact, paired
from benchmarks.compiled import gpu
from jaxcompress import distill

MAP = (4, 4, 64)
CALLS = 5  # of each side in a round
STEP_CALLS = 2  # a step takes tens of milliseconds, and there are many to compare

Outputs = tuple[jax.Array, jax.Array]  # logits [batch, classes], last hidden layer [batch, height, width, channels]
Loss = Callable[[Outputs, Outputs, jax.Array], jax.Array]


def _on_logits(loss: Callable[..., jax.Array], **options: Any) -> Loss:
    return lambda s, t, labels: jnp.mean(loss(s[0], t[0], **options))


def _on_maps(loss: Callable[..., jax.Array], **options: Any) -> Loss:
    return lambda s, t, labels: jnp.mean(loss(s[1], t[1], **options))


def _on_vectors(loss: Callable[..., jax.Array], **options: Any) -> Loss:
    return lambda s, t, labels: jnp.mean(loss(*(x[1].mean(axis=(1, 2)) for x in (s, t)), **options))


def _with_labels(loss: Callable[..., jax.Array], **options: Any) -> Loss:
    return lambda s, t, labels: jnp.mean(loss(s[0], t[0], labels, **options))


def _without_teacher(loss: Callable[..., jax.Array]) -> Loss:
    return lambda s, t, labels: jnp.mean(loss(s[0], labels))


def _on_tokens(loss: Callable[..., jax.Array]) -> Loss:
    """The map's pixels as a transformer's 16 tokens of 64 features, and as the 16 x 16 scores of four heads."""
    shape = (-1, 16, 64) if loss is distill.hidden_state_loss else (-1, 4, 16, 16)
    return lambda s, t, labels: jnp.mean(loss(*(x[1].reshape(shape) for x in (s, t))))


def _on_boxes(loss: Callable[..., jax.Array]) -> Loss:
    return lambda s, t, labels: jnp.mean(loss(*(x[1].reshape(-1, 256, 4) for x in (s, t, t))))


def _contrastive(student: Outputs, teacher: Outputs, labels: jax.Array) -> jax.Array:
    """CRD against 1024 of 8192 remembered examples, in the maps' own 64 dimensions."""
    memory = distill.contrast_memory(jax.random.key(0), 8192, MAP[-1])
    s, t = (x[1].mean(axis=(1, 2)) for x in (student, teacher))
    indices = jnp.arange(len(s))
    others = jnp.concatenate([indices[:, None], jax.random.randint(jax.random.key(1), (len(s), 1024), 0, 8192)], axis=1)
    return jnp.mean(distill.contrastive_loss(s, t, memory, indices, others)[0])


CHANNELS = np.zeros(MAP[-1], np.float32)
LOSSES: dict[str, Loss] = {
    "soft_target": _on_logits(distill.soft_target_loss, temperature=4.0),
    "logit_matching": _on_logits(distill.logit_matching_loss),
    "distillation": _with_labels(distill.distillation_loss, temperature=4.0),
    "label_smoothing": _without_teacher(distill.label_smoothing_loss),
    "teacher_free": _without_teacher(distill.teacher_free_loss),
    "several_teachers": lambda s, t, labels: jnp.mean(distill.several_teachers_loss(s[0], jnp.stack([t[0], -t[0]]))),
    "mutual_learning": lambda s, t, labels: jnp.mean(distill.mutual_learning_loss([s[0], t[0]], labels, learner=0)),
    "detection_class": _with_labels(distill.detection_class_loss),
    "decoupled": _with_labels(distill.decoupled_loss),
    "standardized": _on_logits(distill.standardized_soft_target_loss),
    "reverse_kl": _on_logits(distill.reverse_kl_loss),
    "jensen_shannon": _on_logits(distill.jensen_shannon_loss),
    "dist": _on_logits(distill.dist_loss),
    "multi_level": _on_logits(distill.multi_level_loss),
    "top_k": _on_logits(distill.top_k_loss, k=5),
    "hint": _on_maps(distill.hint_loss),
    "attention_transfer": _on_maps(distill.attention_transfer_loss),
    "factor_transfer": _on_maps(distill.factor_transfer_loss),
    "inter_channel": _on_maps(distill.inter_channel_loss),
    "neuron_selectivity": _on_maps(distill.neuron_selectivity_loss),
    "review": _on_maps(distill.review_loss),
    "activation_boundary": _on_maps(distill.activation_boundary_loss),
    "distance_relation": _on_vectors(distill.distance_relation_loss),
    "angle_relation": _on_vectors(distill.angle_relation_loss),
    "similarity_preserving": _on_vectors(distill.similarity_preserving_loss),
    "correlation_congruence": _on_vectors(distill.correlation_congruence_loss),
    "probabilistic_transfer": _on_vectors(distill.probabilistic_transfer_loss),
    "consecutive_correlation": _on_vectors(distill.consecutive_correlation_loss),
    "in_batch_contrastive": _on_vectors(distill.in_batch_contrastive_loss),
    "contrastive": _contrastive,
    "flow": lambda s, t, labels: jnp.mean(distill.flow_loss((s[1], s[1][..., ::-1]), (t[1], t[1][..., ::-1]))),
    "variational_information": _on_maps(distill.variational_information_loss, log_scale=CHANNELS),
    "margin_relu": _on_maps(distill.margin_relu_loss, margin=CHANNELS - 0.5),
    "hidden_state": _on_tokens(distill.hidden_state_loss),
    "attention_matrix": _on_tokens(distill.attention_matrix_loss),
    "detection_box": _on_boxes(distill.detection_box_loss),
}


def outputs(params: mlp.Params, x: jax.Array) -> Outputs:
    """The MLP's logits and its last hidden layer as a map."""
    last = len(params) - 1
    for i in range(last):
        layer = params[f"Dense_{i}"]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    head = params[f"Dense_{last}"]
    return x @ head["kernel"] + head["bias"], x.reshape(-1, *MAP)


def _cross_entropy(student: Outputs, teacher: Outputs | None, labels: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(student[0], labels).mean()


def step(loss: Loss | None) -> Callable[..., tuple[mlp.State, jax.Array]]:
    """A jitted adam step `(state, teacher, (inputs, labels))`: hard labels, and `loss` beside them if there is one."""
    optimizer = optax.adam(1e-3)

    def total(params: mlp.Params, teacher: mlp.Params, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        student = outputs(params, data[0])
        hard = _cross_entropy(student, None, data[1])
        return hard if loss is None else hard + loss(student, outputs(teacher, data[0]), data[1])

    def update(state: mlp.State, teacher: mlp.Params, data: tuple[jax.Array, jax.Array]) -> tuple[mlp.State, jax.Array]:
        params, optimizer_state = state
        value, gradient = jax.value_and_grad(total)(params, teacher, data)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    return jax.jit(update, donate_argnums=0)


@benchmark("distill.loss")
def _loss(rounds: int) -> Figures:
    """Each loss alone, value and gradient at batch 128, against the cross-entropy with hard labels."""
    data = mlp.batch()
    student, teacher = outputs(mlp.params(0), data[0]), outputs(mlp.params(2), data[0])

    def alone(loss: Loss) -> Callable[[], Any]:
        run = jax.jit(jax.value_and_grad(loss))
        return lambda: run(student, teacher, data[1])

    plain = alone(_cross_entropy)
    return {  # few calls a round: beside the relations of a batch the cross-entropy takes no time at all
        name: paired(alone(loss), plain, "cross-entropy alone", rounds, calls=CALLS) for name, loss in LOSSES.items()
    }


@benchmark("distill.step")
def _step(rounds: int) -> Figures:
    """A full step with each loss and the teacher's forward pass, against the plain cross-entropy step."""
    data, teacher = mlp.batch(), mlp.params(2)

    def stepper(run: Callable[..., Any]) -> Stepper:
        return Stepper(run, mlp.init(optax.adam(1e-3)), teacher, data)

    plain = step(None)  # compiled once for all
    return {
        name: paired(stepper(step(loss)), stepper(plain), "plain cross-entropy step", rounds, calls=STEP_CALLS)
        for name, loss in LOSSES.items()
    }


@benchmark("distill.fused")
def _fused(rounds: int) -> Figures:
    """The chunked loss and gradients, 1024 tokens, 512 features, vocabulary 32768, against optax on all logits."""
    arrays = _language_model(1024, 512, 32768)
    ours, theirs = _with_gradients(_chunked), _with_gradients(_on_all_logits)
    return {
        "time": paired(lambda: ours(*arrays), lambda: theirs(*arrays), ALL_LOGITS, rounds),
        "bytes": _bytes(compiled_bytes(ours, *arrays)["temp"], compiled_bytes(theirs, *arrays)["temp"], ALL_LOGITS),
    }


@benchmark("distill.cuda")
def _cuda(rounds: int) -> Figures:
    """Temporary bytes of the chunked loss compiled for a GPU (see `compiled.py`), in bfloat16, at the shape of Liger's.

    8,192 tokens, a vocabulary of 131,072, 2,048 features and the teacher's 4,096.
    """
    del rounds  # compiled bytes do not vary
    with gpu() as device:
        chip = jax.sharding.SingleDeviceSharding(device)
        shapes = (8192, 2048), (2048, 131072), (8192, 4096), (4096, 131072)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=chip) for shape in shapes]
        ours, theirs = (compiled_bytes(_with_gradients(f), *arrays)["temp"] for f in (_chunked, _on_all_logits))
    return {"bytes": _bytes(ours, theirs, ALL_LOGITS)}


ALL_LOGITS = "optax.losses.kl_divergence on all logits"


def _on_all_logits(student: jax.Array, head: jax.Array, teacher: jax.Array, teacher_head: jax.Array) -> jax.Array:
    log_student = jax.nn.log_softmax((student @ head).astype(jnp.float32) / 2.0)
    soft_targets = jax.nn.softmax((teacher @ teacher_head).astype(jnp.float32) / 2.0)
    return 4.0 * optax.losses.kl_divergence(log_student, soft_targets).mean()


def _chunked(*arrays: jax.Array) -> jax.Array:
    return distill.fused_distillation_loss(*arrays, temperature=2.0)


def _with_gradients(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def _language_model(tokens: int, features: int, vocabulary: int) -> list[jax.Array]:
    shapes = ((tokens, features), (features, vocabulary)) * 2
    keys = jax.random.split(jax.random.key(0), 4)
    scales = (1.0, features**-0.5) * 2
    return [c * jax.random.normal(key, shape) for key, shape, c in zip(keys, shapes, scales, strict=True)]


@benchmark("distill.relations")
def _relations(rounds: int) -> Figures:
    """Temporary bytes of relation losses with their gradients at batch 1024, against one [batch, batch, batch]."""
    del rounds  # compiled bytes do not vary
    x = jax.ShapeDtypeStruct((1024, 128), jnp.float32)
    losses = {
        "distance": distill.distance_relation_loss,
        "angle": distill.angle_relation_loss,
        "correlation_congruence": distill.correlation_congruence_loss,
        "similarity_preserving": distill.similarity_preserving_loss,
        "probabilistic_transfer": distill.probabilistic_transfer_loss,
    }
    cube = "[1024, 1024, 1024] in float32"
    return {
        f"{name}.bytes": _bytes(compiled_bytes(jax.value_and_grad(loss), x, x)["temp"], 4 * 1024**3, cube)
        for name, loss in losses.items()
    }


def _bytes(ours: int, theirs: int, baseline: str) -> Figure:
    return exact(ours / theirs, "x", baseline, bytes=ours, baseline_bytes=theirs)
