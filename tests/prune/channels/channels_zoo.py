"""Small models of the architectures that people prune: `ZOO[name]() -> (fn, params, inputs)`.

Plain functions here; Flax models are in `test_channels_flax.py`. Importing the families fills `ZOO`.
"""

import channels_zoo_convolutions  # noqa: F401 its models register themselves
import channels_zoo_others  # noqa: F401 likewise
import channels_zoo_transformers  # noqa: F401 likewise
from channels_models import ZOO

__all__ = ["ZOO"]
