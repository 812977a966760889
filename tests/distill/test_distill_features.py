"""Losses on features and relations: what each is blind to, its limits, its projectors, its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import distill


@pytest.fixture
def maps(rng):
    return tuple(rng.normal(size=(2, 3, 4, 4, 5)).astype("float32"))


@pytest.fixture
def rows(rng):
    return tuple(rng.normal(size=(2, 6, 8)).astype("float32"))


MAP_LOSSES = [
    distill.hint_loss,
    distill.factor_transfer_loss,
    distill.review_loss,
    distill.attention_transfer_loss,
    distill.inter_channel_loss,
    distill.neuron_selectivity_loss,
]
RELATIONS = [
    distill.relational_loss,
    distill.similarity_preserving_loss,
    distill.correlation_congruence_loss,
    distill.probabilistic_transfer_loss,
]


@pytest.mark.parametrize("loss", MAP_LOSSES)
def test_zero_on_the_teacher_itself_and_positive_elsewhere(maps, loss):
    np.testing.assert_allclose(loss(maps[1], maps[1]), 0, atol=1e-6)
    assert np.all(loss(*maps) > 1e-4)


@pytest.mark.parametrize(
    "loss", [distill.attention_transfer_loss, distill.factor_transfer_loss, distill.inter_channel_loss]
)
def test_blind_to_the_features_scale(maps, loss):
    np.testing.assert_allclose(loss(1e3 * maps[0], 1e-3 * maps[1]), loss(*maps), rtol=1e-4)


def test_attention_is_blind_to_the_order_of_channels_and_selectivity_too(maps):
    shuffled = maps[0][..., ::-1]
    for loss in (distill.attention_transfer_loss, distill.neuron_selectivity_loss):
        np.testing.assert_allclose(loss(shuffled, maps[1]), loss(*maps), rtol=1e-4)
    assert not np.allclose(distill.inter_channel_loss(shuffled, maps[1]), distill.inter_channel_loss(*maps), rtol=1e-2)


def test_inter_channel_loss_is_blind_to_the_order_of_pixels(maps):
    mirrored = maps[0][:, ::-1, ::-1]
    np.testing.assert_allclose(
        distill.inter_channel_loss(mirrored, maps[1]), distill.inter_channel_loss(*maps), rtol=1e-4
    )


@pytest.mark.parametrize(
    "kind,power", [("sum", 1), ("power_sum", 2), ("power_sum", 3), ("power_max", 2), ("power_max", 4)]
)
def test_attention_maps_are_the_papers(maps, kind, power):
    magnitude = np.abs(maps[0].astype(float))
    raw = magnitude.max(-1) ** power if kind == "power_max" else (magnitude**power).sum(-1)
    flat = raw.reshape(3, -1)
    want = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(distill.attention_map(maps[0], kind, power), want, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3.5])
def test_attention_transfer_with_any_norm(maps, order):
    a, b = (np.asarray(distill.attention_map(x), float) for x in maps)
    want = np.linalg.norm(a - b, ord=order, axis=1)
    np.testing.assert_allclose(distill.attention_transfer_loss(*maps, norm_order=order), want, rtol=1e-4)


def test_power_max_tends_to_the_largest_pixel(maps):
    attention = np.asarray(distill.attention_map(maps[0], "power_max", 200))
    assert np.all(attention.max(1) > 0.99)
    np.testing.assert_array_equal(attention.argmax(1), np.abs(maps[0]).max(-1).reshape(3, -1).argmax(1))


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (1, 4), (4, 4)])
def test_adaptive_pool_keeps_the_mean_of_constant_rows_and_covers_all(rng, size):
    x = rng.normal(size=(2, 4, 4, 3)).astype("float32")
    pooled = distill.adaptive_pool(x, size)
    assert pooled.shape == (2, *size, 3)
    covered = jax.grad(lambda x: distill.adaptive_pool(x, size).sum())(x)
    assert np.all(covered > 0)
    np.testing.assert_allclose(distill.adaptive_pool(jnp.full_like(x, 3.0), size), 3.0, rtol=1e-6)


def test_review_pools_are_blind_to_local_shuffles_in_part(maps):
    """A shift within a 4x4 map changes the finest term but not the global pool's."""
    uniform = np.ones((1, 4, 4, 1), "float32")
    spread = distill.review_loss(uniform, np.zeros_like(uniform))  # every pool sees it
    checker = np.indices((4, 4)).sum(0)[None, :, :, None] % 2 * 2 - 1.0
    local = distill.review_loss(checker.astype("float32"), np.zeros_like(uniform))  # pools see nothing
    np.testing.assert_allclose(spread, 1.0)
    np.testing.assert_allclose(local, 1 / (1 + 0.5 + 0.25), rtol=1e-6)


def descend(loss, params, steps):
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=steps))(params)
    return params


@pytest.mark.slow
def test_review_fusion_has_the_teachers_shapes_and_early_stages_hear_of_deep_ones(rng):
    student, teacher = [(8, 8, 3), (4, 4, 5), (2, 2, 6)], [(8, 8, 4), (4, 4, 8), (1, 1, 8)]
    fusion = distill.review_fusion(student, teacher, channels=7)
    params = jax.jit(fusion.init)(jax.random.key(0))
    maps = [rng.normal(size=(2, *shape)).astype("float32") for shape in student]
    fused = fusion.apply(params, maps)
    assert [x.shape for x in fused] == [(2, *shape) for shape in teacher]

    def of_stage(i, j):
        def of_map(m):
            return fusion.apply(params, [*maps[:j], m, *maps[j + 1 :]])[i].sum()

        return np.any(jax.grad(of_map)(maps[j]))

    reach = [[of_stage(i, j) for j in range(3)] for i in range(3)]
    np.testing.assert_array_equal(reach, np.triu(np.ones((3, 3), bool)))  # stage i learns from stages j >= i


@pytest.mark.slow
def test_paraphraser_learns_to_reconstruct_and_translator_to_match(rng):
    teacher = rng.normal(size=(8, 4, 4, 1)).astype("float32") * np.ones(4, "float32")  # one factor in four channels
    student = np.concatenate([teacher[..., :1], rng.normal(size=(8, 4, 4, 1))], -1).astype("float32")
    coder, translate = distill.paraphraser(4, 2), distill.translator(2, 2)
    params = jax.jit(coder.init)(jax.random.key(0))

    def reconstruction(p):
        return distill.hint_loss(coder.decode(p, coder.encode(p, teacher)), teacher).mean()

    trained = descend(reconstruction, params, 300)
    assert reconstruction(trained) < 0.3 * reconstruction(params)
    factors = coder.encode(trained, teacher)
    assert factors.shape == (8, 4, 4, 2)
    ours = jax.jit(translate.init)(jax.random.key(1))

    def transfer(p):
        return distill.factor_transfer_loss(translate.apply(p, student), factors).mean()

    assert transfer(descend(transfer, ours, 200)) < 0.5 * transfer(ours)


def test_activation_boundary_teaches_sides_only():
    teacher = np.array([[5.0, 0.1, -0.1, -7.0]], "float32")
    assert distill.activation_boundary_loss(np.array([[1.5, 2.0, -1.5, -1.0]], "float32"), teacher) == 0
    assert distill.activation_boundary_loss(-teacher, teacher) > 0


def test_margin_relu_lets_the_student_be_more_negative():
    teacher, margin = np.array([[2.0, -3.0]], "float32"), np.array([-0.5, -0.5], "float32")
    assert distill.margin_relu_loss(np.array([[2.0, -9.0]], "float32"), teacher, margin) == 0
    np.testing.assert_allclose(distill.margin_relu_loss(np.array([[1.0, 0.5]], "float32"), teacher, margin), 1 + 1)


@pytest.mark.slow
def test_expected_margin_is_the_mean_of_negative_draws(rng):
    scale, bias = np.array([1.0, -2.0, 0.5, 0.1], "float32"), np.array([0.0, 1.0, -1.0, 5.0], "float32")
    got = np.asarray(distill.expected_margin(scale, bias))
    for i in range(3):
        draws = rng.normal(bias[i], abs(scale[i]), 400_000)
        np.testing.assert_allclose(got[i], draws[draws < 0].mean(), rtol=0.01)
    np.testing.assert_allclose(got[3], -0.3, rtol=1e-5)  # hardly ever negative
    assert np.all(np.isfinite(distill.expected_margin(np.zeros(2), np.array([1.0, -1.0]))))


@pytest.mark.parametrize(
    "student,teacher,kernel",
    [
        ((4, 4, 3), (4, 4, 5), (1, 1)),
        ((8, 8, 3), (4, 4, 5), (3, 3)),
        ((5, 6, 3), (3, 3, 5), (3, 4)),
        ((3, 3, 2), (6, 6, 4), (4, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch_norm", [False, True])
def test_conv_projector_meets_the_teachers_shape(rng, student, teacher, kernel, batch_norm):
    projector = distill.conv_projector(student, teacher, batch_norm=batch_norm)
    params = jax.jit(projector.init)(jax.random.key(0))
    assert params["kernel"].shape == (*kernel, student[2], teacher[2])
    x = rng.normal(size=(2, *student)).astype("float32")
    y = projector.apply(params, x)
    assert y.shape == (2, *teacher)
    assert np.all(y >= 0) if batch_norm else np.any(y < 0)


def test_what_learns_beside_a_half_precision_student_stays_in_float32(rng):
    """Parameters in float32 and maps in bfloat16, as in mixed precision: the float32 results of the rounded maps."""
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.bfloat16)
    coder, fusion = distill.paraphraser(3, 2), distill.review_fusion([(4, 4, 3)], [(4, 4, 5)], channels=2)
    cases = {
        "convolution": distill.conv_projector((4, 4, 3), (4, 4, 5), batch_norm=True),
        "dense": distill.dense_projector(3, 5),
        "variational": distill.variational_projector(3, 5),
        "translator": distill.translator(3, 2),
        "paraphraser": distill.Projector(coder.init, coder.encode),
        "review": distill.Projector(fusion.init, lambda p, x: fusion.apply(p, [x])[0]),
    }
    for name, projector in cases.items():
        params = jax.jit(projector.init)(jax.random.key(0))
        found, gradient = jax.jit(jax.value_and_grad(lambda p, x, f=projector.apply: f(p, x).sum()))(params, x)
        np.testing.assert_allclose(found, projector.apply(params, x.astype(jnp.float32)).sum(), rtol=1e-5, err_msg=name)
        assert {leaf.dtype for leaf in jax.tree.leaves((found, gradient))} == {jnp.dtype("float32")}, name


def test_dense_projector_learns_a_linear_teacher(rng):
    """A hint can be met through the projector: the loss falls to nothing when the teacher is linear in the student."""
    student = rng.normal(size=(64, 6)).astype("float32")
    teacher = (student @ rng.normal(size=(6, 9)) + 1).astype("float32")
    projector = distill.dense_projector(6, 9)
    params = jax.jit(projector.init)(jax.random.key(0))

    def loss(p):
        return distill.hint_loss(projector.apply(p, student), teacher).mean()

    step = jax.jit(lambda p: jax.tree.map(lambda w, g: w - 2.0 * g, p, jax.grad(loss)(p)))
    first = loss(params)
    for _ in range(200):
        params = step(params)
    assert loss(params) < 1e-4 * first
    assert "bias" not in distill.dense_projector(6, 9, bias=False).init(jax.random.key(0))


def test_variational_information_is_a_gaussians_likelihood(rng):
    mean, teacher = rng.normal(size=(2, 3, 2, 2, 4)).astype("float32")
    log_scale = rng.normal(size=4).astype("float32")
    deviation = np.sqrt(np.log1p(np.exp(log_scale)) + 1e-5)
    likelihood = jax.scipy.stats.norm.logpdf(teacher, mean, deviation) + np.log(2 * np.pi) / 2
    got = distill.variational_information_loss(mean, teacher, log_scale)
    np.testing.assert_allclose(got, -likelihood.mean((1, 2, 3)), rtol=1e-4)


def test_variational_projector_starts_at_its_variance():
    params = distill.variational_projector(3, 4, initial_variance=5.0).init(jax.random.key(0))
    np.testing.assert_allclose(jax.nn.softplus(params["log_scale"]) + 1e-5, 5.0, rtol=1e-5)


@pytest.mark.parametrize("loss", RELATIONS)
def test_relations_need_no_common_size_and_vanish_on_the_teacher(rng, loss):
    student, teacher = rng.normal(size=(5, 4)).astype("float32"), rng.normal(size=(5, 3, 2)).astype("float32")
    assert loss(student, teacher) > 1e-5
    np.testing.assert_allclose(loss(teacher, teacher), 0, atol=1e-6)


@pytest.mark.parametrize("loss", RELATIONS)
def test_relations_are_blind_to_a_rotation(rows, rng, loss):
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype("float32")
    np.testing.assert_allclose(loss(rows[0] @ rotation, rows[1]), loss(*rows), rtol=1e-3)


def test_distance_and_angle_relations_are_blind_to_shift_and_scale(rows):
    for loss in (distill.distance_relation_loss, distill.angle_relation_loss):
        np.testing.assert_allclose(loss(5 * rows[0] + 2, rows[1]), loss(*rows), rtol=1e-3)


def test_gaussian_correlation_is_the_kernels_series(rows):
    unit = rows[0] / np.linalg.norm(rows[0], axis=1, keepdims=True)
    kernel = np.exp(-0.4 * ((unit[:, None] - unit[None]) ** 2).sum(-1))
    np.testing.assert_allclose(distill.correlation_matrix(rows[0], gamma=0.4, order=12), kernel, rtol=1e-4)


@pytest.mark.parametrize("loss", [*RELATIONS, distill.consecutive_correlation_loss])
def test_a_batch_of_one_has_no_relation(rows, loss):
    one = rows[0][:1]
    np.testing.assert_allclose(loss(one, 3 * one), 0, atol=12 if loss is distill.consecutive_correlation_loss else 1e-6)


@pytest.mark.parametrize(
    "loss", [distill.angle_relation_loss, distill.distance_relation_loss, distill.correlation_congruence_loss]
)
def test_no_batch_cubed_tensor_at_1024(loss):
    """[batch, batch, batch] in float32 is 4 GiB at 1024; value and gradient must do with a few [batch, batch]."""
    x = jax.ShapeDtypeStruct((1024, 64), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_in_batch_contrast_prefers_matching_pairs(rows, rng):
    teacher = rows[1]
    loss = functools.partial(distill.in_batch_contrastive_loss, temperature=0.05)
    matched, shuffled = loss(teacher * 3, teacher), loss(teacher[::-1], teacher)
    assert np.all(matched < 0.1) and np.all(shuffled > 1)
    np.testing.assert_allclose(
        distill.in_batch_contrastive_loss(teacher, teacher, temperature=1e6), np.log(6), rtol=1e-4
    )
    where = np.array([True] * 5 + [False])
    got = distill.in_batch_contrastive_loss(*rows, where=where)
    np.testing.assert_allclose(got[:5], distill.in_batch_contrastive_loss(rows[0][:5], rows[1][:5]), rtol=1e-5)
    assert got[5] == 0


def test_flow_loss_padding_and_sizes(maps):
    where = np.array([True, False, True])
    spoiled = maps[0].copy()
    spoiled[1] = np.nan
    second = maps[0][:, :2, :2, :3]
    got = distill.flow_loss((spoiled, second), (maps[1], second), where=where)
    want = distill.flow_loss((maps[0], second), (maps[1], second))
    np.testing.assert_allclose(got, want * where, rtol=1e-5)
    matrix = distill.flow_matrix(maps[0], second)
    assert matrix.shape == (3, 5, 3)
    want = np.einsum("nhwi,nhwj->nij", maps[0].reshape(3, 2, 2, 2, 2, 5).mean((2, 4)), second) / 4
    np.testing.assert_allclose(matrix, want, rtol=1e-4, atol=1e-6)


def test_bad_input(maps, rows):
    cut = maps[1][:, :3]
    wrong = [
        (lambda: distill.review_fusion([(2, 2, 1)], []), "same stages"),
        (lambda: distill.hint_loss(maps[0], cut), "one shape"),
        (lambda: distill.hint_loss(maps[0], maps[1][:2]), "one batch"),
        (lambda: distill.attention_transfer_loss(rows[0], rows[1]), r"\[batch, height, width, channels\]"),
        (lambda: distill.attention_transfer_loss(*maps, norm_order=0.5), "norm_order must be at least 1"),
        (lambda: distill.attention_map(maps[0], "mean"), "kind must be"),
        (lambda: distill.attention_map(maps[0], power=0.5), "power must be at least 1"),
        (lambda: distill.flow_matrix(*maps, pool="min"), "'mean' or 'max'"),
        (lambda: distill.flow_matrix(rows[0], rows[1]), r"\[batch, height, width, channels\]"),
        (lambda: distill.flow_loss((maps[0], maps[0], maps[0]), (maps[1],) * 3), "pairs of maps"),
        (lambda: distill.flow_loss(maps, (maps[1], maps[1][..., :2])), "flow matrices"),
        (lambda: distill.inter_channel_loss(maps[0], maps[1][..., :3]), "channel matrices"),
        (lambda: distill.correlation_congruence_loss(*rows, kernel="rbf"), "'gaussian' or 'bilinear'"),
        (lambda: distill.conv_projector((3, 3, 1), (4, 4, 1)), "no single convolution"),
        (lambda: distill.contrast_loss(rows[0][:, :1], 10), "at least one negative"),
        (lambda: distill.in_batch_contrastive_loss(rows[0], rows[1][:, :3]), "one shape"),
        (lambda: distill.hint_loss(np.float32(1), np.float32(1)), "got a scalar"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
