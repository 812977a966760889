# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A model thirty times smaller, step by step
#
# We train a small convolutional **teacher** on real handwritten digits, then make it small in four steps that compose:
# **distil** it into a student, **prune** the student, train it under **fake quantization**, and **pack** the integers
# into a file.
# Nothing in the model's code changes on the way.
#
# It needs a checkout of the project with the `experiments` extra installed, and runs there or in the folder `colabs`.
# On Colab, put the checkout there, `%cd` into it, and run the first cell, which installs the rest. A CPU is enough.
# If it asks for a restart (of NumPy, say, which was loaded before), restart the session, `%cd` again and begin anew.

# %%
import importlib.util
import os
import sys

sys.path[:0] = [".", ".."]  # of the checkout, only the library is installed; `experiments` lies beside it
if "google.colab" in sys.modules:
    gpu = os.path.exists("/dev/nvidiactl")  # a newer jax needs a newer libtpu or CUDA plugin than Colab's
    chip = "jax[tpu]" if importlib.util.find_spec("libtpu") else "jax[cuda12]" if gpu else "jax"
    get_ipython().run_line_magic("pip", f"install -q -e .[experiments] {chip}")

SHORT = bool(os.environ.get("JAXCOMPRESS_SHORT"))  # CI runs the notebook in seconds; its figures then mean nothing

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from experiments.data import batches, load
from experiments.models import Convnet, initialise

from jaxcompress import compressed, distill, nbytes, pack, prune, quantize, report, train

digits = load("digits")
print(len(digits.train), "images to train on,", len(digits.validation), "to choose by,", len(digits.test), "held out")

fig, axes = plt.subplots(1, 8, figsize=(8, 1.2))
for ax, image, label in zip(axes, digits.train.inputs(), digits.train.labels, strict=False):
    ax.imshow(image[..., 0], cmap="gray_r")
    ax.set_title(label)
    ax.axis("off")

# %% [markdown]
# ## One training loop for everything
#
# `train.make_step` jits one step around a loss and an optimizer. What is *frozen* (the teacher) goes in beside the
# state. A model of your own with batch normalisation or dropout takes the loss of `docs/training.md`.

# %%
teacher, student = Convnet(width=32), Convnet(width=16)
if SHORT:
    teacher, student = Convnet(width=8), Convnet(width=4)


def fit(model, loss_of, tx, steps, start=None, frozen=None):
    def loss_fn(params, batch, context):
        logits, loss = loss_of(params, batch, context.frozen)
        return loss, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"])}, context.extras

    start = start or initialise(model, 0, (8, 8, 1))["params"]
    state = train.TrainState.create(start, tx, key=jax.random.key(0))
    seen = []
    state = train.fit(
        train.make_step(loss_fn, tx),
        state,
        batches(digits.train, 64, seed=0),
        steps=steps,
        frozen=frozen,
        on_metrics=lambda n, metrics: seen.append(metrics["loss"]),
    )
    return state.params, seen


def validate(model, params):
    logits = jax.jit(compressed(lambda p, x: model.apply({"params": p}, x)))(params, digits.validation.inputs())
    return float(jnp.mean(jnp.argmax(logits, -1) == digits.validation.labels))


STEPS = 30 if SHORT else 1200


# %% [markdown]
# ## The teacher, from labels


# %%
def from_labels(params, batch, _):
    logits = teacher.apply({"params": params}, batch["image"])
    return logits, optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


teacher_params, curve = fit(teacher, from_labels, optax.adam(2e-3), STEPS)
plt.plot(curve)
plt.xlabel("step")
plt.ylabel("loss")
print(f"teacher: {validate(teacher, teacher_params):.1%} of the validation images, {nbytes(teacher_params):,} bytes")

# %% [markdown]
# ## Distil: learn the teacher's doubts
#
# A teacher's probabilities at a high *temperature* say which wrong answers are nearly right. Look at one image's:

# %%
image = digits.train.inputs()[:1]
logits = teacher.apply({"params": teacher_params}, image)
fig, axes = plt.subplots(1, 3, figsize=(9, 2), sharey=True)
for ax, temperature in zip(axes, (1.0, 4.0, 8.0), strict=True):
    ax.bar(range(10), distill.temperature_softmax(logits, temperature)[0])
    ax.set_title(f"temperature {temperature:g}")


# %%
def from_teacher(params, batch, frozen, apply=student.apply):
    logits = apply({"params": params}, batch["image"])
    guidance = teacher.apply({"params": frozen}, batch["image"])
    return logits, distill.distillation_loss(logits, guidance, batch["label"], alpha=0.9, temperature=8.0).mean()


student_params, _ = fit(student, from_teacher, optax.adam(3e-3), STEPS, frozen=teacher_params)
print(f"student: {validate(student, student_params):.1%}, {nbytes(student_params):,} bytes")

# %% [markdown]
# ## Prune: an optimizer that leaves zeros
#
# `prune.sparsify` stands last in the chain. It ramps the sparsity up while the other weights go on learning; there is
# no call to remember in the loop.

# %%
ramp = prune.polynomial(begin=0, end=STEPS // 2, every=max(1, STEPS // 40))
tx = optax.chain(optax.adam(2e-3), prune.sparsify({"kernel$": 0.5}, ramp))
pruned_params, _ = fit(student, from_teacher, tx, STEPS, start=student_params, frozen=teacher_params)
print(f"pruned: {validate(student, pruned_params):.1%}, {report.nonzeros(pruned_params):,} weights left")

# %% [markdown]
# ## Quantize: round while training, then keep the integers
#
# `quantize.fake` is a function transform: same signature, same parameters, but kernels and what meets them are rounded,
# and gradients pass straight through. Pruning, distillation and fake quantization now work in one step.

# %%
rules = {"kernel$": quantize.Affine(bits=4, activation_bits=8)}
fake = quantize.fake(student.apply, rules)
tx = optax.chain(optax.adam(1e-3), prune.sparsify({"kernel$": 0.5}, prune.one_shot()))
tuned_params, _ = fit(
    student, lambda p, b, f: from_teacher(p, b, f, fake), tx, STEPS, start=pruned_params, frozen=teacher_params
)
integers = quantize.convert(tuned_params, rules)
print(f"integers: {validate(student, integers):.1%}, {nbytes(integers):,} bytes in memory")
plt.hist(integers["Dense_0"]["kernel"].codes().ravel(), bins=range(-8, 9), align="left")
plt.xlabel("integer of a weight in the first dense layer")

# %% [markdown]
# ## Pack: a file as small as the integers' entropy

# %%
size = pack.save("student.jxc", integers)
loaded = pack.load("student.jxc")
print(f"{size:,} bytes on disk: {nbytes(teacher_params) / size:.0f} times less than the teacher's weights")

# %% [markdown]
# ## The held-out images, once for each model

# %%
rows = []
for name, model, params, stored in [
    ("teacher", teacher, teacher_params, nbytes(teacher_params)),
    ("student", student, student_params, nbytes(student_params)),
    ("packed", student, loaded, size),
]:
    test = digits.test.read(for_model=name)
    logits = jax.jit(compressed(lambda p, x, model=model: model.apply({"params": p}, x)))(params, test.inputs())
    rows.append(
        report.Row(name, {"accuracy": 100 * float(jnp.mean(jnp.argmax(logits, -1) == test.labels)), "bytes": stored})
    )

columns = [report.Column("accuracy", "test accuracy (%)", ".2f"), report.Column("bytes", "bytes")]
print(report.table(rows, columns))

# %% [markdown]
# `python -m experiments.quickstart --seeds 5` is the careful version of this notebook: a fair comparison with a student
# trained from scratch, learning rates chosen on validation data, five seeds, and everything measured from files.
# `report.cost(fn, params, inputs)` says what any of these models costs: parameters, bytes, operations, memory, seconds.
# To use `student.jxc` in another process, take `pack.load`, `compressed` and the model's code.
