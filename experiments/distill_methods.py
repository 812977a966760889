"""Every classification loss under one recipe: `python -m experiments.distill_methods --data cifar10 --data-dir DIR`.

One teacher and one student of the resnet family, one initialisation and order of images a seed, one optimizer: only
the term beside the labels' cross entropy differs. Weights are those of the literature's code where it has the method,
else 1 or as soft targets have them; none was tuned here. The student sees the images as they are, so the teacher's
logits and maps are computed once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

from experiments import _distilling, _results
from experiments._distilling import (
    Learner,
    Lesson,
    Room,
    bars,
    command,
    gathered,
    hard,
    logits_loss,
    parameters,
    written,
)
from experiments._resnets import Resnet
from experiments._results import Column
from jaxcompress import distill, linen


@dataclass(frozen=True)
class Config(_distilling.Config):
    """Every single-image classification loss, on one pair of networks."""

    examples: int = 5_000
    epochs: int = 5
    teacher_epochs: int = 12
    rate: float = 2e-3
    teacher_blocks: int = 2
    teacher_widths: tuple[int, int, int] = (16, 32, 64)
    student_blocks: int = 1
    student_widths: tuple[int, int, int] = (8, 16, 32)
    stem_stride: int = 2
    methods: tuple[str, ...] = ()
    """Some of the methods; all by default."""


SHORT = Config(
    seeds=1, examples=300, epochs=1, teacher_epochs=2, teacher_blocks=1, teacher_widths=(8, 12, 16),
    student_widths=(4, 6, 8), stem_stride=1,
)  # fmt: skip
"""A run of seconds on digits, for tests; its accuracies mean little."""


class Seen(NamedTuple):
    """What a network makes of a batch: its logits, and each stage's map before the activation, NHWC."""

    logits: jax.Array
    maps: tuple[jax.Array, ...]

    @property
    def active(self) -> tuple[jax.Array, ...]:
        """The maps after the activation."""
        return tuple(nn.relu(x) for x in self.maps)

    @property
    def pooled(self) -> jax.Array:
        """The last map's mean over pixels, `[batch, channels]`."""
        return jnp.mean(nn.relu(self.maps[-1]), axis=(1, 2))


Term = Callable[[Any, Seen, Seen, Lesson], Any]
"""`(projector's params, student, teacher, lesson) -> value(s)`; the mean is taken."""


class Method(NamedTuple):
    """A term beside the labels: `hard * cross entropy + weight * term`."""

    term: Term
    weight: float = 1.0
    hard: float = 1.0
    init: Callable[[jax.Array], Any] = lambda key: {}


class Pair(NamedTuple):
    """What projectors must know of teacher and student."""

    student: tuple[tuple[int, int, int], ...]  # (height, width, channels) of each stage
    teacher: tuple[tuple[int, int, int], ...]
    margins: tuple[jax.Array, ...]  # of the teacher's stages, for OFD


def each(loss: Callable[..., jax.Array]) -> Term:
    """A loss on maps, summed over the stages."""
    return lambda p, s, t, lesson: sum(jnp.mean(loss(a, b)) for a, b in zip(s.active, t.active, strict=True))


def of_logits(loss: Callable[..., jax.Array], *, labels: bool = False, **options: Any) -> Term:
    """A loss on logits."""
    return lambda p, s, t, lesson: loss(s.logits, t.logits, *([lesson.labels] if labels else []), **options)


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
    return sum(jnp.mean(distill.flow_loss(ours[i : i + 2], theirs[i : i + 2])) for i in (0, 1))


def methods(pair: Pair) -> dict[str, Method]:
    """Every method by name, with the weights of Tian et al. 2020's code for CIFAR-100 where it has the method."""
    middle, last = 1, -1
    hint = distill.conv_projector(pair.student[middle], pair.teacher[middle])
    variational = distill.variational_projector(pair.student[last][-1], pair.teacher[last][-1])
    review: Any = distill.review_fusion(pair.student, pair.teacher, channels=pair.student[last][-1])
    heads: Any = distill.contrastive_heads(pair.student[last][-1], pair.teacher[last][-1], 64)
    translate = distill.translator(pair.student[last][-1], factor_channels(pair))
    embed = distill.dense_projector(pair.student[last][-1], pair.teacher[last][-1])

    def vid(p: Any, s: Seen, t: Seen, lesson: Lesson) -> Any:
        mean = variational.apply(p, s.active[last])
        return distill.variational_information_loss(mean, t.active[last], p["log_scale"])

    def reviewed(p: Any, s: Seen, t: Seen, lesson: Lesson) -> Any:
        return over_stages(distill.review_loss)(review.apply(p, list(s.active)), t.active)

    def overhaul(ours: Any, theirs: Any) -> Any:
        parts = zip(ours, theirs, pair.margins, strict=True)
        return sum(jnp.mean(distill.margin_relu_loss(a, b, m)) / 2 ** (2 - i) for i, (a, b, m) in enumerate(parts))

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
        "soft targets (KD)": Method(of_logits(soft, temperature=4.0), 0.9, 0.1),
        "logit matching": Method(of_logits(distill.logit_matching_loss), 1.0, 0.1),
        "logit matching, centred": Method(of_logits(distill.logit_matching_loss, centred=True), 1.0, 0.1),
        "top half, tail in a bucket": Method(of_logits(distill.top_k_loss, k=0.5, temperature=4.0), 0.9, 0.1),
        "top half, renormalised": Method(of_logits(distill.top_k_loss, k=0.5, tail=False, temperature=4.0), 0.9, 0.1),
        "top quarter, renormalised": Method(
            of_logits(distill.top_k_loss, k=0.25, tail=False, temperature=4.0), 0.9, 0.1
        ),
        "decoupled (DKD)": Method(of_logits(distill.decoupled_loss, labels=True, beta=2.0)),
        "DIST": Method(of_logits(distill.dist_loss, beta=2.0, gamma=2.0)),
        "standardised logits": Method(of_logits(distill.standardized_soft_target_loss), 0.9, 0.1),
        "multi-level logits": Method(of_logits(distill.multi_level_loss), 1.0, 1.0),
        "reverse KL": Method(of_logits(distill.reverse_kl_loss, temperature=4.0), 0.9, 0.1),
        "Jensen-Shannon": Method(of_logits(distill.jensen_shannon_loss, temperature=4.0), 0.9, 0.1),
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


class School:
    """The teacher, what it makes of the training images, and the student's training under each method."""

    def __init__(self, config: Config) -> None:
        c = config
        self.config, self.room = c, Room(c)
        classes = self.room.dataset.classes
        self.teacher = Resnet(c.teacher_blocks, c.teacher_widths, classes, c.stem_stride)
        self.student = Resnet(c.student_blocks, c.student_widths, classes, c.stem_stride)
        self.captured = linen.capture(self.student, "Stage_[0-9]+$")

    def taught(self) -> tuple[Any, dict[str, Any]]:
        """The teacher, and its rows: logits, maps, and the factors of its last map."""
        c, room = self.config, self.room
        learn = room.learner(self.teacher, logits_loss(self.teacher, hard), epochs=c.teacher_epochs)
        variables = room.trained("teacher", self.teacher, lambda: learn("teacher", 0))
        see = linen.capture(self.teacher, "Stage_[0-9]+$")

        @jax.jit
        def seen(images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            logits, found = see(variables, images)
            return logits, tuple(found[f"Stage_{i}"] for i in range(3))

        parts = [seen(room.images[i : i + 500]) for i in range(0, len(room.images), 500)]
        logits, maps = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        return variables, {"logits": logits, "maps": maps}

    def factors(self, pair: Pair, last: jax.Array) -> jax.Array:
        """Factor transfer's first phase: the teacher's last map in an autoencoder's factors."""
        coder = distill.paraphraser(pair.teacher[-1][-1], factor_channels(pair))

        def loss(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
            x = nn.relu(lesson.rows)
            return jnp.mean(distill.hint_loss(coder.decode(params, coder.encode(params, x)), x)), extras

        learn = Learner(self.room, lambda seed: {"params": coder.init(jax.random.key(seed))}, loss)
        params = learn("paraphraser", 0, rows=last)["params"]
        encode = jax.jit(coder.encode)
        return jnp.concatenate([encode(params, nn.relu(last[i : i + 500])) for i in range(0, len(last), 500)])

    def pair(self, variables: Any, maps: Any) -> Pair:
        """The shapes, and the margins of the teacher's stages."""
        shown: Any = jax.eval_shape(lambda: self.captured(self.room.init(self.student, 0), self.room.images[:1])[1])
        margins = []
        for i in range(3):
            norms = variables["params"][f"Stage_{i}"][f"Block_{self.config.teacher_blocks - 1}"]["BatchNorm_1"]
            margins.append(distill.expected_margin(norms["scale"], norms["bias"]))
        return Pair(
            tuple(shown[f"Stage_{i}"].shape[1:] for i in range(3)), tuple(x.shape[1:] for x in maps), tuple(margins)
        )

    def learner(self, method: Method, remembers: bool) -> Learner:
        """The student's training by a method, its projectors beside it, a contrast memory in the extras."""
        room = self.room

        def init(seed: int) -> dict[str, Any]:
            variables = room.init(self.student, seed)
            params = {"student": variables["params"], "beside": method.init(jax.random.key(10_000 + seed))}
            memory = distill.contrast_memory(jax.random.key(seed), len(room.labels), 64) if remembers else {}
            return {"params": params, "batch_stats": variables["batch_stats"], "memory": memory}

        def loss(params: Any, extras: Any, lesson: Lesson) -> tuple[jax.Array, Any]:
            variables = {"params": params["student"], "batch_stats": extras["batch_stats"]}
            (logits, moved), found = self.captured(variables, lesson.images, train=True, mutable=["batch_stats"])
            ours = Seen(logits, tuple(found[f"Stage_{i}"] for i in range(3)))
            theirs = Seen(lesson.rows["logits"], lesson.rows["maps"])
            term = method.term(params["beside"], ours, theirs, lesson._replace(extras=extras))
            term, memory = term if remembers else (term, extras["memory"])
            total = method.hard * jnp.mean(hard(logits, lesson)) + method.weight * jnp.mean(term)
            return total, {"batch_stats": moved["batch_stats"], "memory": memory}

        return Learner(room, init, loss)


def main(config: Config) -> _results.Result:
    """Runs every method and seed, and writes the result and the figure."""
    c, school = config, School(config)
    room = school.room
    variables, rows = school.taught()
    pair = school.pair(variables, rows["maps"])
    known = methods(pair)
    if unknown := set(c.methods) - set(known):
        raise ValueError(f"no method {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    chosen = [name for name in known if name in (c.methods or known)]
    if "factor transfer (FT)" in chosen:
        rows["factors"] = school.factors(pair, rows["maps"][-1])
    top = room.kept("teacher", lambda: room.test("teacher", school.teacher, variables))
    figures = [("teacher", 0, {"accuracy": top, "gain": 0.0})]
    base: dict[int, float] = {}
    for name in ("labels alone", *(n for n in chosen if n != "labels alone")):
        learn = school.learner(known[name], name == "contrastive (CRD)")

        def measured(seed: int, name: str = name, learn: Learner = learn) -> float:
            trained = learn(f"{name} {seed}", seed, rows=rows, knobs={"examples": len(room.labels)})
            student = {"params": trained["params"]["student"], "batch_stats": trained["batch_stats"]}
            return room.test(f"{name}, seed {seed}", school.student, student)

        for seed in range(c.seeds):
            value = room.kept(f"{name}, seed {seed}", partial(measured, seed))
            base.setdefault(seed, value)
            figures.append((name, seed, {"accuracy": value, "gain": value - base[seed]}))
        print(f"{name}: done", flush=True)
    size = parameters(room.init(school.student, 0))
    table = gathered(figures)
    result = room.result(
        name=f"distill_methods_{c.data}",
        title=f"{'Every classification loss' if len(chosen) == len(known) else 'Losses'} under one recipe, on {c.data}",
        source="The literature's tables are of CIFAR-100, 240 epochs and larger networks, so that their figures are not"
        " repeated here.",
        command=command("distill_methods", c),
        selection="nothing was chosen: the weights are those of Tian et al. 2020's code where it has the method, else"
        " 1 or as"
        " soft targets have them; none was tuned",
        columns=[Column("accuracy", "test accuracy (%)"), Column("gain", "over labels alone")],
        rows=table,
        pairs=[("accuracy", n, "labels alone") for n in chosen if n != "labels alone"] if c.seeds > 1 else (),
        notes=[
            room.setting(),
            f"Teacher: a resnet of {6 * c.teacher_blocks + 2} layers, widths {c.teacher_widths},"
            f" {parameters(variables):,} parameters, one for all seeds, {c.teacher_epochs} epochs. Student:"
            f" {6 * c.student_blocks + 2} layers, widths {c.student_widths}, {size:,} parameters. The first"
            f" convolution has"
            f" stride {c.stem_stride}.",
            "Features are the three stages' maps. Where the channels differ and the method has no projector of its own"
            " (FSP, AB, OFD, ICKD), a learned 1x1 convolution stands before the student's. Methods that their papers"
            " use"
            " in a phase before the training (FSP, AB) are a term beside the labels here, like all others.",
        ],
    )
    return written(
        result, c, lambda path: bars(path, table, "accuracy", x_title="test accuracy (%)", title=result.title)
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
