"""Makes the reference beside this file: `python tests/experiments/bert_reference/make.py`, with torch and transformers.

A `BertModel` of two layers with random weights (larger than its initialisation's, so that every part counts), saved by
`save_pretrained`, and what it puts out for three sentences of several lengths and two segments.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

HERE = Path(__file__).parent


def reference(size: dict[str, int], seed: int) -> tuple[BertModel, dict[str, np.ndarray]]:
    """A random `BertModel` in evaluation mode, some inputs, and its outputs."""
    torch.manual_seed(seed)
    config = BertConfig(**size, attn_implementation="eager", output_hidden_states=True)
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (3, 9))
    mask, segments = np.arange(9)[None] < np.array([[9], [5], [1]]), rng.integers(0, 2, (3, 9))
    given = (torch.tensor(x) for x in (tokens, mask.astype(np.int64), segments))
    with torch.no_grad():
        out = model(**dict(zip(("input_ids", "attention_mask", "token_type_ids"), given, strict=True)))
    hidden = np.stack([x.numpy() for x in out.hidden_states])
    arrays = {"tokens": tokens, "mask": mask, "segments": segments, "hidden": hidden}
    return model, arrays | {"pooled": out.pooler_output.numpy()}


if __name__ == "__main__":
    size = {
        "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "vocab_size": 30,
        "max_position_embeddings": 16,
    }  # fmt: skip
    model, arrays = reference(size, 0)
    model.save_pretrained(HERE)
    np.savez(HERE / "expected.npz", **arrays)
