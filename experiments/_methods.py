"""The single-image classification losses as terms beside the labels, by name, with the literature's weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments._distilling import Lesson, alike
from jaxcompress import distill

T = 4.0
"""Of the soft targets."""


class Seen(NamedTuple):
    """What a network makes of a batch: its logits, and each stage's map before the activation, NHWC."""

    logits: jax.Array
    maps: tuple[jax.Array, ...]
    embedding: jax.Array | None = None
    """`[batch, channels]`, what the last layer sees, where that is not the last map's mean."""

    @property
    def active(self) -> tuple[jax.Array, ...]:
        """The maps after the activation."""
        return tuple(nn.relu(x) for x in self.maps)

    @property
    def pooled(self) -> jax.Array:
        """The embedding, or the last map's mean over pixels, `[batch, channels]`."""
        return jnp.mean(nn.relu(self.maps[-1]), axis=(1, 2)) if self.embedding is None else self.embedding


Term = Callable[[Any, Seen, Seen, Lesson], Any]
"""`(projector's params, student, teacher, lesson) -> value(s)`; the mean is taken."""


class Method(NamedTuple):
    """A term beside the labels: `hard * cross entropy + factor * weight * term`.

    Adam's steps do not depend on the loss's size, so that only the ratio of the two counts: a factor on the term alone
    is enough, also where the literature gives labels and term weights that sum to 1.
    """

    term: Term
    weight: float = 1.0
    hard: float = 1.0
    init: Callable[[jax.Array], Any] = lambda key: {}


class Pair(NamedTuple):
    """What projectors must know of teacher and student."""

    student: tuple[tuple[int, int, int], ...]  # (height, width, channels) of each stage, two or more
    teacher: tuple[tuple[int, int, int], ...]
    margins: tuple[jax.Array, ...]  # of the teacher's stages, for OFD
    embeddings: tuple[int, int] | None = None  # channels of the student's and the teacher's, where `Seen` has any

    @property
    def pooled(self) -> tuple[int, int]:
        """Channels of `Seen.pooled` on both sides."""
        return self.embeddings or (self.student[-1][-1], self.teacher[-1][-1])


def each(loss: Callable[..., jax.Array]) -> Term:
    """A loss on maps, summed over the stages."""
    return lambda p, s, t, lesson: sum(jnp.mean(loss(a, b)) for a, b in zip(s.active, t.active, strict=True))


def of_logits(loss: Callable[..., jax.Array], *, labels: bool = False, **options: Any) -> Term:
    """A loss on logits."""
    return lambda p, s, t, lesson: loss(s.logits, t.logits, *([lesson.labels] if labels else []), **options)


def to_targets(table: str) -> Term:
    """Probabilities in a table of rows as soft targets."""
    return lambda p, s, t, lesson: distill.soft_label_loss(s.logits, lesson.rows[table], temperature=T)


def of_pooled(loss: Callable[..., jax.Array]) -> Term:
    """A loss on a batch's embeddings."""
    return lambda p, s, t, lesson: loss(s.pooled, t.pooled)


def projected(pair: Pair, loss: Callable[..., Any], before: bool = False) -> dict[str, Any]:
    """A loss on all stages after a 1x1 convolution each: the term and its `init`."""
    maps = [distill.dense_projector(a[-1], b[-1]) for a, b in zip(pair.student, pair.teacher, strict=True)]

    def init(key: jax.Array) -> Any:
        return [one.init(jax.random.fold_in(key, i)) for i, one in enumerate(maps)]

    def term(p: Any, s: Seen, t: Seen, lesson: Lesson) -> Any:
        ours, theirs = (s.maps, t.maps) if before else (s.active, t.active)
        return loss([one.apply(q, x) for one, q, x in zip(maps, p, ours, strict=True)], theirs)

    return {"term": term, "init": init}


def over_stages(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The sum of a loss's means over the stages."""
    return lambda ours, theirs: sum(jnp.mean(loss(a, b)) for a, b in zip(ours, theirs, strict=True))


def flows(ours: Any, theirs: Any) -> Any:
    """FSP between each stage and the next."""
    return sum(jnp.mean(distill.flow_loss(ours[i : i + 2], theirs[i : i + 2])) for i in range(len(ours) - 1))


def methods(pair: Pair, beta: float = 2.0) -> dict[str, Method]:
    """Every method by name, with the weights of Tian et al. 2020's code for CIFAR-100 where it has the method.

    Args:
      pair: what it is for.
      beta: the weight of the other classes in decoupled distillation.
    """
    middle, last = len(pair.student) // 2, -1
    hint = distill.conv_projector(pair.student[middle], pair.teacher[middle])
    variational = distill.variational_projector(pair.student[last][-1], pair.teacher[last][-1])
    review: Any = distill.review_fusion(pair.student, pair.teacher, channels=pair.student[last][-1])
    heads: Any = distill.contrastive_heads(*pair.pooled, 64)
    translate = distill.translator(pair.student[last][-1], factor_channels(pair))
    embed = distill.dense_projector(*pair.pooled)

    def vid(p: Any, s: Seen, t: Seen, lesson: Lesson) -> Any:
        mean = variational.apply(p, s.active[last])
        return distill.variational_information_loss(mean, t.active[last], p["log_scale"])

    def reviewed(p: Any, s: Seen, t: Seen, lesson: Lesson) -> Any:
        return over_stages(distill.review_loss)(review.apply(p, list(s.active)), t.active)

    def overhaul(ours: Any, theirs: Any) -> Any:
        parts = zip(ours, theirs, pair.margins, strict=True)
        deepest = len(ours) - 1
        return sum(
            jnp.mean(distill.margin_relu_loss(a, b, m)) / 2 ** (deepest - i) for i, (a, b, m) in enumerate(parts)
        )

    def crd(p: Any, s: Seen, t: Seen, lesson: Lesson) -> Any:
        student, teacher = heads.apply(p, (s.pooled, t.pooled))
        examples = lesson.knobs["examples"]
        others = jax.random.randint(lesson.key, (len(lesson.places), 256), 0, examples)
        chosen = jnp.concatenate([lesson.places[:, None], others], axis=1)
        return distill.contrastive_loss(student, teacher, lesson.extras["memory"], lesson.places, chosen)

    soft = distill.soft_target_loss
    return {
        "labels alone": Method(lambda p, s, t, lesson: jnp.zeros(()), 0.0),
        "label smoothing": Method(lambda p, s, t, now: distill.label_smoothing_loss(s.logits, now.labels), hard=0.0),
        "teacher-free": Method(lambda p, s, t, now: distill.teacher_free_loss(s.logits, now.labels), hard=0.0),
        "self-training": Method(lambda p, s, t, now: soft(s.logits, now.rows["itself"], temperature=T), 0.9, 0.1),
        "re-weighting alone": Method(to_targets("weighing"), 0.9, 0.1),
        "class similarity alone": Method(to_targets("alike"), 0.9, 0.1),
        "soft targets (KD)": Method(of_logits(soft, temperature=T), 0.9, 0.1),
        "logit matching": Method(of_logits(distill.logit_matching_loss), 1.0, 0.1),
        "logit matching, centred": Method(of_logits(distill.logit_matching_loss, centred=True), 1.0, 0.1),
        "top half, tail in a bucket": Method(of_logits(distill.top_k_loss, k=0.5, temperature=T), 0.9, 0.1),
        "top half, renormalised": Method(of_logits(distill.top_k_loss, k=0.5, tail=False, temperature=T), 0.9, 0.1),
        "top quarter, tail in a bucket": Method(of_logits(distill.top_k_loss, k=0.25, temperature=T), 0.9, 0.1),
        "top quarter, renormalised": Method(
            of_logits(distill.top_k_loss, k=0.25, tail=False, temperature=T), 0.9, 0.1
        ),
        "decoupled (DKD)": Method(of_logits(distill.decoupled_loss, labels=True, beta=beta)),
        "DIST": Method(of_logits(distill.dist_loss, beta=2.0, gamma=2.0)),
        "standardised logits": Method(of_logits(distill.standardized_soft_target_loss), 0.9, 0.1),
        "multi-level logits": Method(of_logits(distill.multi_level_loss), 1.0, 1.0),
        "reverse KL": Method(of_logits(distill.reverse_kl_loss, temperature=T), 0.9, 0.1),
        "Jensen-Shannon": Method(of_logits(distill.jensen_shannon_loss, temperature=T), 0.9, 0.1),
        "hint (FitNet)": Method(
            lambda p, s, t, now: distill.hint_loss(hint.apply(p, s.active[middle]), t.active[middle]), 100.0,
            init=hint.init,
        ),
        "attention (AT), sum of squares": Method(each(distill.attention_transfer_loss), 1000.0),
        "attention (AT), sum": Method(each(lambda a, b: distill.attention_transfer_loss(a, b, kind="sum")), 1000.0),
        "attention (AT), largest square": Method(
            each(lambda a, b: distill.attention_transfer_loss(a, b, kind="power_max")), 1000.0
        ),
        "flow between layers (FSP)": Method(**projected(pair, flows), weight=50.0),
        "neuron selectivity (NST)": Method(each(distill.neuron_selectivity_loss), 50.0),
        "variational information (VID)": Method(vid, 1.0, init=variational.init),
        "activation boundaries (AB)": Method(
            **projected(pair, over_stages(distill.activation_boundary_loss), before=True), weight=1e-3
        ),
        "factor transfer (FT)": Method(
            lambda p, s, t, now: distill.factor_transfer_loss(
                translate.apply(p, s.active[last]), now.rows["factors"]
            ), 200.0, init=translate.init,
        ),
        "margin ReLU (OFD)": Method(**projected(pair, overhaul, before=True), weight=1e-3),
        "channel correlation (ICKD)": Method(
            **projected(pair, lambda ours, theirs: distill.inter_channel_loss(ours[-1], theirs[-1])), weight=2.5
        ),
        "review (ReviewKD)": Method(reviewed, 1.0, init=review.init),
        "distances (RKD-D)": Method(of_pooled(distill.distance_relation_loss), 25.0),
        "angles (RKD-A)": Method(of_pooled(distill.angle_relation_loss), 50.0),
        "distances and angles (RKD)": Method(of_pooled(distill.relational_loss), 1.0),
        "similarity (SP)": Method(
            lambda p, s, t, now: distill.similarity_preserving_loss(s.active[last], t.active[last]), 3000.0
        ),
        "correlation congruence (CC)": Method(of_pooled(distill.correlation_congruence_loss), 100.0),
        "probabilistic transfer (PKT)": Method(of_pooled(distill.probabilistic_transfer_loss), 30000.0),
        "contrastive (CRD)": Method(crd, 0.8, init=heads.init),
        "contrastive, in the batch": Method(
            lambda p, s, t, now: distill.in_batch_contrastive_loss(embed.apply(p, s.pooled), t.pooled), 0.8,
            init=embed.init,
        ),
    }  # fmt: skip


def factor_channels(pair: Pair) -> int:
    """Channels of the factors: half the teacher's, as in the paper."""
    return pair.teacher[-1][-1] // 2


def synthetic(logits: jax.Array, labels: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
    """The teachers of Tang et al. 2020 that keep one thing of a teacher's answers each, `[examples, classes]`.

    Args:
      logits: the teacher's, `[examples, classes]`.
      labels: `[examples]`.
      kernel: of the teacher's last layer, `[features, classes]`.
    """
    p = distill.temperature_softmax(logits, T)
    return {"weighing": distill.reweighting_teacher(p, labels), "alike": alike(p, labels, kernel)}
