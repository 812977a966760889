"""Kept targets: exact where they should be, within their bounds elsewhere, refused where they are another's."""

import functools
import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxcompress import distill, quantize, targets, train

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES, LABELS = (IMAGES[:512] / 16).astype(np.float32), LABELS[:512].astype(np.int32)
BATCH, SEEDS, STEPS = 64, 3, 48
TEMPERATURE = 3.0


def augmented(examples, seed):
    """Each image moved by up to one pixel, as its number and the seed say."""
    moves = np.stack([np.random.default_rng([int(i), seed]).integers(-1, 2, 2) for i in examples])
    images = IMAGES[examples].reshape(-1, 8, 8)
    return np.stack([np.roll(x, move, (0, 1)) for x, move in zip(images, moves, strict=True)]).reshape(-1, 64)


def init(widths, seed):
    rng = np.random.default_rng(seed)
    return [
        {"kernel": jnp.asarray(rng.normal(size=(n, m)) * np.sqrt(2 / n), jnp.float32), "bias": jnp.zeros(m)}
        for n, m in itertools.pairwise(widths)
    ]


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


@functools.cache
def teacher():
    params, optimizer = init((64, 64, 10), 0), optax.adam(3e-3)

    def step(carry, _):
        params, state = carry

        def loss(p):
            return distill.hard_label_loss(apply(p, IMAGES), LABELS).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200)[0])
    return run((params, optimizer.init(params)))[0]


def schedule(steps=STEPS):
    """(examples, augmentation seed) of every step: epochs in shuffled order, SEEDS augmentations by turns."""
    order = np.random.default_rng(5)
    epochs = [order.permutation(len(IMAGES)) for _ in range(-(-steps * BATCH // len(IMAGES)))]
    per_epoch = len(IMAGES) // BATCH
    for k in range(steps):
        epoch, place = divmod(k, per_epoch)
        yield epochs[epoch][place * BATCH : (place + 1) * BATCH], epoch % SEEDS


_apply = jax.jit(apply)


def predict(x):
    return _apply(teacher(), x)


WHO = {"teacher": "the teacher", "data": "digits, moved"}


def to_build(count=512):
    for seed in range(SEEDS):
        for start in range(0, count, BATCH):
            examples = np.arange(start, start + BATCH)
            yield examples, seed, augmented(examples, seed)


def soft_loss(student, kept):
    if isinstance(kept, distill.TopKTargets):
        return distill.top_k_target_loss(student, kept, temperature=TEMPERATURE)
    return distill.soft_target_loss(student, kept, temperature=TEMPERATURE)


def loss_fn(params, batch, context):
    logits = apply(params, batch["image"])
    kept = batch["teacher"] if "teacher" in batch else apply(context.frozen, batch["image"])
    hard = distill.hard_label_loss(logits, batch["label"])
    return (0.3 * hard + 0.7 * soft_loss(logits, kept)).mean(), {}, context.extras


step = train.make_step(loss_fn, optax.adam(3e-3))


def student_after(read, steps=STEPS):
    state = train.TrainState.create(init((64, 16, 10), 1), optax.adam(3e-3), key=jax.random.key(0))
    for examples, seed in schedule(steps):
        batch = {"image": augmented(examples, seed), "label": LABELS[examples]}
        frozen = teacher() if read is None else None
        state, _ = step(state, batch if read is None else batch | {"teacher": read(examples, seed)}, frozen)
    return state.params


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


@pytest.fixture(scope="module")
def live():
    return flat(student_after(None))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return targets.build(tmp_path_factory.mktemp("full"), predict, to_build(), **WHO, part_size=200)


def test_a_full_store_gives_the_live_runs_parameters_bit_for_bit(full, live):
    """Six epochs of augmented digits, each in another order, in batches that the teacher never saw together."""
    assert len(full) == SEEDS * len(IMAGES)
    kept = flat(student_after(full.logits))
    assert kept.tobytes() == live.tobytes()
    unaugmented = flat(student_after(lambda examples, seed: full.logits(examples, 0)))
    assert np.abs(unaugmented - live).max() > 1e-2  # the seed matters


@pytest.mark.slow
def test_bfloat16_stays_within_its_bound(tmp_path, full, live):
    """Of the gradient and of the cross-entropy, on every digit, at several temperatures; and near on the whole run."""
    small = targets.build(tmp_path, predict, to_build(), **WHO, dtype="bfloat16")
    examples = np.arange(len(IMAGES))
    exact, rounded = full.logits(examples, 1), small.logits(examples, 1)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded.max(-1), exact.max(-1), rtol=1e-6)
    student = apply(init((64, 16, 10), 1), augmented(examples, 1)) * 3
    for temperature in (1.0, TEMPERATURE, 20.0):
        bound = targets.rounding_bound(exact, temperature)

        def loss(z, t, T=temperature):
            return distill.soft_cross_entropy_loss(z, t, temperature=T)

        gradients = [jax.grad(lambda z, t=t, loss=loss: loss(z, t).sum())(student) for t in (exact, rounded)]
        moved = np.abs(gradients[0] - gradients[1]).sum(-1)
        slack = 1e-5 * temperature  # float32 sums
        assert (moved <= temperature * bound + slack).all()
        spread = student.max(-1) - student.min(-1)
        losses = np.abs(loss(student, exact) - loss(student, rounded))
        assert (losses <= temperature / 2 * bound * spread + 1e-5 * np.abs(loss(student, exact))).all()
        assert moved.max() > 0.01 * (temperature * bound).max()  # a bound that says something
    kept = flat(student_after(small.logits))
    assert 0 < np.linalg.norm(kept - live) < 0.01 * np.linalg.norm(live)
    assert small.header.record().itemsize == 2 * 10 + 4 and full.header.record().itemsize == 4 * 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_top_k_is_short_of_the_full_loss_by_the_tails_divergence(tmp_path, full, dtype):
    """With its tail: an identity for the value, a bound for the gradient, on every digit at both kept temperatures."""
    few = targets.build(
        tmp_path, predict, to_build(BATCH), **WHO, top_k=0.3, temperatures=(1.0, TEMPERATURE), dtype=dtype
    )
    examples = np.arange(BATCH)
    exact = full.logits(examples, 2)
    student = apply(init((64, 16, 10), 1), augmented(examples, 2)) * 3
    for temperature in (1.0, TEMPERATURE):
        kept = few.top_k(examples, 2, temperature=temperature)
        assert kept.indices.shape == (BATCH, 3) and kept.indices.dtype == np.int32
        np.testing.assert_allclose(np.exp(kept.log_probabilities).sum(-1) + np.exp(kept.log_tail), 1, rtol=1e-5)
        p, q = (np.asarray(distill.temperature_softmax(z, temperature), np.float64) for z in (exact, student))
        rest = np.ones_like(p, bool)
        np.put_along_axis(rest, kept.indices, False, -1)
        tail, tail_student = (p * rest).sum(-1), (q * rest).sum(-1)
        np.testing.assert_allclose(np.exp(kept.log_tail), tail, rtol=1e-4)
        terms = np.where(rest, p * (np.log(p / tail[:, None]) - np.log(q / tail_student[:, None])), 0)
        short = temperature**2 * terms.sum(-1)
        tolerance = 1e-4 if dtype == "float32" else 0.1
        losses = [
            lambda z, T=temperature: distill.soft_target_loss(z, exact, temperature=T),
            lambda z, T=temperature, kept=kept: distill.top_k_target_loss(z, kept, temperature=T),
        ]
        np.testing.assert_allclose(losses[1](student), losses[0](student) - short, rtol=tolerance, atol=tolerance)
        gradients = [jax.grad(lambda z, loss=loss: loss(z).sum())(student) for loss in losses]
        moved = np.abs(gradients[0] - gradients[1]).sum(-1)
        rounding = 0 if dtype == "float32" else temperature * np.asarray(targets.rounding_bound(exact, temperature))
        assert (moved <= 2 * temperature * tail + rounding + 1e-5).all()
    with pytest.raises(ValueError, match=r"kept at the temperatures \(1.0, 3.0\), not at 2"):
        few.top_k(examples, temperature=2.0)
    with pytest.raises(ValueError, match="top 3 classes only"):
        few.logits(examples)


@pytest.mark.slow
def test_float32_top_k_is_what_top_k_targets_gives(tmp_path, full):
    """All classes kept leave no tail, and the loss is the full one's."""
    for k in (2, 10):
        kept = targets.build(
            tmp_path / str(k), predict, to_build(BATCH), **WHO, top_k=k, temperatures=[TEMPERATURE]
        ).top_k([3, 1, 3], [2, 0, 2])
        z = np.stack([full.logits([i], s)[0] for i, s in ((3, 2), (1, 0), (3, 2))])
        want = distill.top_k_targets(z, k, temperature=TEMPERATURE)
        np.testing.assert_array_equal(kept.indices, want.indices)
        np.testing.assert_allclose(kept.log_probabilities, want.log_probabilities, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(kept.log_tail, want.log_tail, rtol=1e-5)
    assert np.isneginf(kept.log_tail).all()


def test_sequences_and_read_order(tmp_path, rng):
    """Logits [tokens, vocabulary] an example, keys that are large, negative, or there twice, in any order."""
    logits = rng.normal(size=(6, 5, 7)).astype(np.float32)
    examples, seeds = np.array([10**12, -3, 5, 5, 8, 5]), np.array([1, 2, 2, 7, 2**40, 7])
    kept = targets.build(tmp_path, lambda x: x, [(examples, seeds, logits)], teacher="t", data="d", part_size=2)
    assert len(kept) == 5  # (5, 7) came twice: the first is kept
    np.testing.assert_array_equal(kept.logits([5, -3, 10**12, 8], [7, 2, 1, 2**40]), logits[[3, 1, 0, 4]])
    np.testing.assert_array_equal(kept.find(np.array([[5, 1], [7, 2], [-3, 2]])) >= 0, [False, False, True])
    with pytest.raises(KeyError, match=r"2 of 3 targets are not in .* example 6 with seed 2"):
        kept.logits([5, 6, 9], 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_classes_that_a_teacher_rules_out_stay_ruled_out(tmp_path, rng, dtype):
    """A logit of -inf, as masked vocabularies have, is kept exactly, and the bound is that of the other classes."""
    logits = rng.normal(size=(4, 6)).astype(np.float32) * 5
    logits[:, 2] = -np.inf
    kept = targets.build(tmp_path, lambda x: x, [(np.arange(4), 0, logits)], teacher="t", data="d", dtype=dtype)
    found = kept.logits(np.arange(4))
    assert np.isneginf(found[:, 2]).all() and np.isfinite(np.delete(found, 2, 1)).all()
    bound, want = (jax.jit(targets.rounding_bound)(z, 2.0) for z in (logits, np.delete(logits, 2, 1)))
    np.testing.assert_allclose(bound, want, rtol=1e-5)
    p, q = (np.exp((z - z.max(1, keepdims=True)) / 2) for z in (logits, found))
    moved = np.abs(p / p.sum(1, keepdims=True) - q / q.sum(1, keepdims=True)).sum(1)
    assert (moved <= bound + 1e-6).all()


def test_an_interrupted_build_goes_on(tmp_path, full):
    """Whole parts stay, half a part is cleared away, and only what is missing is computed."""
    asked = []

    def dying(x):
        if len(asked) == 7:
            raise RuntimeError("the machine goes away")
        asked.append(len(x))
        return predict(x)

    with pytest.raises(RuntimeError, match="goes away"):
        targets.build(tmp_path, dying, to_build(), **WHO, part_size=150)
    assert len(list(tmp_path.glob("part-*"))) == 2 and len(targets.TargetCache(tmp_path, **WHO)) == 300
    (tmp_path / "part-00002.array_record.writing").write_bytes(b"half a part")
    asked.clear()
    again = targets.build(tmp_path, lambda x: asked.append(len(x)) or predict(x), to_build(), **WHO, part_size=150)
    assert len(asked) == SEEDS * 8 - 4  # four batches of 64 lay in whole parts, and the fifth in part
    assert not list(tmp_path.glob("*.writing")) and len(again) == len(full)
    everything = np.tile(np.arange(len(IMAGES)), SEEDS), np.repeat(np.arange(SEEDS), len(IMAGES))
    np.testing.assert_array_equal(again.logits(*everything), full.logits(*everything))
    asked.clear()
    targets.build(tmp_path, lambda x: asked.append(len(x)) or predict(x), to_build(), **WHO)
    assert not asked


def test_a_cache_of_others_is_refused(tmp_path):
    params = teacher()
    mark = targets.fingerprint(params)
    nudged = jax.tree.map(lambda x: x, params)
    nudged[0]["bias"] = nudged[0]["bias"].at[0].add(1e-7)
    assert mark == targets.fingerprint(jax.tree.map(np.asarray, params)) != targets.fingerprint(nudged)
    assert mark != targets.fingerprint(jax.tree.map(lambda x: x.astype("bfloat16"), params))
    one = list(to_build(BATCH))[:1]
    targets.build(tmp_path, predict, one, teacher=mark, data="digits")
    for wrong, message in [
        ({"teacher": targets.fingerprint(nudged), "data": "digits"}, "their teacher is"),
        ({"teacher": mark, "data": "letters"}, "their data is 'digits', and 'letters' is wanted"),
    ]:
        with pytest.raises(targets.TargetMismatchError, match=message):
            targets.TargetCache(tmp_path, **wrong)
        with pytest.raises(targets.TargetMismatchError, match=message):
            targets.build(tmp_path, predict, one, **wrong)
    for other, message in [
        ({"dtype": "bfloat16"}, "their dtype is 'float32'"),
        ({"top_k": 4}, "their k is None, and 4"),
    ]:
        with pytest.raises(targets.TargetMismatchError, match=message):
            targets.build(tmp_path, predict, one, teacher=mark, data="digits", **other)
    with pytest.raises(FileNotFoundError, match=r"make them with targets.build"):
        targets.TargetCache(tmp_path / "elsewhere", teacher=mark, data="digits")


def test_a_teacher_whose_inputs_are_rounded_is_another():
    marks = [
        targets.fingerprint(quantize.convert(teacher(), {"0/kernel": quantize.Affine(8, activation_bits=bits)}))
        for bits in (None, 4, 8)
    ]
    assert len(set(marks)) == 3


def test_a_cache_goes_to_another_process(tmp_path, rng, monkeypatch):
    """As grain's workers get it, whose current directory may be another."""
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(targets.build("kept", lambda x: x, [(np.arange(4), 0, logits)], teacher="t", data="d"))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(sent).logits(np.arange(4)), logits)


def test_damage_and_bad_input(tmp_path, rng):
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    who = {"teacher": "t", "data": "d"}

    def make(path, *batches, **kwargs):
        return targets.build(path, lambda x: x, batches, **who, **kwargs)

    for call, message in [
        (lambda: make(tmp_path / "a"), "gave no example"),
        (lambda: make(tmp_path / "a", (np.arange(3), 0, logits)), "for 3 examples"),
        (lambda: make(tmp_path / "a", (np.arange(4), logits)), "batches are triples"),
        (lambda: make(tmp_path / "a", (np.arange(4.0), 0, logits)), "examples must be integers"),
        (lambda: make(tmp_path / "a", (np.arange(4), 0, logits * np.nan)), "are NaN"),
        (lambda: make(tmp_path / "a", (np.arange(4), 0, np.where(logits > 1, np.inf, logits))), "largest is infinite"),
        (lambda: make(tmp_path / "a", (np.arange(4), 0, logits - np.inf)), "largest is infinite"),
        (lambda: make(tmp_path / "b", (np.arange(4), 0, logits), dtype="float16"), "dtype must be"),
        (lambda: make(tmp_path / "b", (np.arange(4), 0, logits), top_k=2, temperatures=()), "temperatures"),
        (lambda: make(tmp_path / "b", (np.arange(4), 0, logits), top_k=9), "k"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    make(tmp_path / "c", (np.arange(4), 0, logits))
    part = tmp_path / "c" / "part-00000.array_record"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"part-00000.array_record is damaged; remove it and build again"):
        targets.TargetCache(tmp_path / "c", **who)
    middle = whole.index(logits[2].tobytes())
    part.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match="is damaged"):
        targets.TargetCache(tmp_path / "c", **who).logits(np.arange(4))
    part.write_bytes(whole)
    header = json.loads((tmp_path / "c" / "header.json").read_text())
    (tmp_path / "c" / "header.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(targets.TargetMismatchError, match="format 99"):
        targets.TargetCache(tmp_path / "c", **who)
    (tmp_path / "c" / "header.json").write_text("{")
    with pytest.raises(ValueError, match=r"header.json is damaged"):
        targets.TargetCache(tmp_path / "c", **who)


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_keys_are_whole_numbers_to_the_last_digit(tmp_path, kind):
    """Names' hashes as numbers: neighbours beyond 2**53, which are one in float64, and unsigned ones beyond int64."""
    largest = 2 ** (63 if kind == np.int64 else 64) - 1
    keys = np.array([2**53, 2**53 + 1, largest, largest - 1], kind)
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    for directory, examples, seeds in (("examples", keys, 0), ("seeds", np.zeros(4, int), keys)):
        kept = targets.build(tmp_path / directory, lambda x: x, [(examples, seeds, rows)], teacher="t", data="d")
        assert len(kept) == 4
        np.testing.assert_array_equal(
            kept.logits(examples[::-1], seeds if directory == "examples" else seeds[::-1]), rows[::-1]
        )
