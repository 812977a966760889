"""What is public: each module without an underscore lists its names, and no more than a user is told of."""

import importlib
import inspect
import pkgutil

import pytest

import jaxcompress

MODULES = ["jaxcompress"] + [
    found.name
    for found in pkgutil.walk_packages(jaxcompress.__path__, "jaxcompress.")
    if not any(part.startswith("_") for part in found.name.split("."))
]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_lists_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__
    own = {key for key, x in vars(module).items() if getattr(x, "__module__", None) == name and key[0] != "_"}
    assert len(set(listed)) == len(listed)
    assert own - {"T"} <= set(listed)
    for key in listed:
        x = getattr(module, key)
        if inspect.isclass(x) or inspect.isfunction(x):
            assert x.__module__.startswith("jaxcompress."), key
            assert inspect.getdoc(x), key
