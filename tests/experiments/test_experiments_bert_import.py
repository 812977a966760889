"""BERT checkpoints of Hugging Face against what `transformers` itself computes from them."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments._bert import Bert, Size
from experiments._bert_import import bert_params, load_bert, size_of

REFERENCE = Path(__file__).parent / "bert_reference"
"""A random `BertModel`, saved by `save_pretrained`, and its outputs: made by `make.py` there."""
TINY = Size(layers=2, hidden=12, heads=3, intermediate=20, vocabulary=30, positions=16)


def agree(size: Size, params: dict, expected: dict[str, np.ndarray]) -> None:
    """Every hidden state of every token that is one, and the pooled first."""
    tokens, mask = expected["tokens"].astype(np.int32), expected["mask"]
    found = jax.jit(Bert(size).apply)({"params": params}, tokens, mask, segments=expected["segments"].astype(np.int32))
    assert len(found.hidden) == size.layers + 1
    for ours, theirs in zip(found.hidden, expected["hidden"], strict=True):
        np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-5)
    np.testing.assert_allclose(found.pooled, expected["pooled"], atol=1e-5)


def test_a_checkpoint_of_transformers_gives_its_outputs():
    size, params = load_bert(REFERENCE)
    assert size == TINY
    expected = dict(np.load(REFERENCE / "expected.npz"))
    assert np.ptp(expected["hidden"]) > 2 and not expected["mask"].all() and expected["segments"].any()
    agree(size, params, expected)
    shapes = jax.eval_shape(Bert(size).init, jax.random.key(0), expected["tokens"], expected["mask"])["params"]
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)


def test_a_checkpoint_of_transformers_as_installed():
    """The same, of another size and seed, where transformers and torch are there."""
    pytest.importorskip("transformers")
    reference = runpy.run_path(str(REFERENCE / "make.py"))["reference"]
    shape = dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads"), (3, 24, 4), strict=True))
    shape |= {"intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 12}
    model, expected = reference(shape, 1)
    size = size_of(model.config.to_dict())
    agree(size, bert_params({name: x.numpy() for name, x in model.state_dict().items()}, size), expected)


def test_other_names_of_the_same_tensors():
    """A model with heads has the encoder's tensors below `bert.`; the first checkpoints had gamma and beta."""
    tensors = load_file(REFERENCE / "model.safetensors")
    renamed = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in tensors.items()
    }
    renamed |= {"cls.predictions.bias": np.zeros(30), "bert.embeddings.position_ids": np.arange(16)[None]}
    jax.tree.map(np.testing.assert_array_equal, bert_params(renamed, TINY), bert_params(tensors, TINY))


def test_tensors_that_are_not_a_berts():
    tensors = load_file(REFERENCE / "model.safetensors")
    key = "encoder.layer.1.output.dense.weight"
    without = {name: x for name, x in tensors.items() if name != key}
    with pytest.raises(ValueError, match=rf"missing {key}; unknown none"):
        bert_params(without, TINY)
    with pytest.raises(ValueError, match=r"missing none; unknown encoder\.layer\.2\.x"):
        bert_params(tensors | {"encoder.layer.2.x": np.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=rf"{key} \(20, 12\), not \(12, 20\)"):
        bert_params(tensors | {key: tensors[key].T}, TINY)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight \(30, 12\), not \(31, 12\)"):
        bert_params(tensors, TINY._replace(vocabulary=31))


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json: a checkpoint is a folder with"):
        load_bert(tmp_path)
    shutil.copy(REFERENCE / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no .*model\.safetensors"):
        load_bert(tmp_path)
    save_file(load_file(REFERENCE / "model.safetensors"), tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_new"}))
    with pytest.raises(ValueError, match="the encoder has hidden_act 'gelu' built in; the checkpoint has 'gelu_new'"):
        load_bert(tmp_path)
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no hidden_size in the configuration of a BERT"):
        load_bert(tmp_path)
