"""A file written by format version 1 is read by every later one, on every machine and with every constriction."""

import base64

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import pack
from jaxcompress.arrays import Quantized

FILE = """
iUpYQw0KGgoBACEBAABQ6G1EeNpNkE1uwyAQha+C2NYLPBCMuUXWUVSNw7i1aoNlcKokyt0LcZt0Nfy8+d6bufGJEjpMyO2NT+iIW95dWB+WCRM7
0xKH4FnN7xVPC1FRDT6pUvcr+jRcyZXLGceVYm5e87c5SKhqcWToo7FgJFOuMZ1Shlc8nnAsLv0YMEk41BU8lS2Trm/AaZeF3ZAyUFV8JP+RPrkF
UfFTmOY10btLl/kfhd9zwOKcnx4BtNqgyuodc8Kpvm1lhv7pX/4P5Tyip1gaalu/vYqxUqrtAEIycKhpJ5oMmpfVl9E3Tq03jg/+SkvYQFKXTrBK
bwSlGIgOEBqRARPGr7LsEMZn2mwnmGvRNE1LWePDEOl3qTmqObIFv60EtjuBUbLr89w/ic6Hnetr+Zdcl1/+mBnN0zzXn5hxM69/8/x6ySV9cvOS
PJnLpfRPnj/e4+9pkn95vPkP/WgHWUyiEuiQGGd2WuSCkFh/Rqk2nFpi+FowD+TkSoPcKhp9VVskEYrMyWaB+xNZQQjGur6WgqaWQkU+W/RcZYZV
MCaXiEyxsDDR6XglJUEwxsvDZjoTeD/ZxidOGhyR0CHsGAR5Wiub0Nix0shMIuRB0TVVoE8roVPLVaSwN24np8cZrUscF7DM7NpYvFwzIO3Y0CVu
eUz5tNAVci1NVqRbK3N1DzI8Q/7FKgCkG6jB/+u6cWKLqmvH3cgWHHdCBvhBvm9XgLJlMC7Sd2U6jK5OFgxfy0fhUr4EwpwmjaNxR9hWM8Z5k/Ad
aIT18///IyLi////ASfhUtvukaVTv7bV+5+HNW9oOvP//f77LweYqp/BNf8KpbrjTISFyxIgm51b6A0xQ1H11ESZMaxNpcXvTVN4KBvwqj6Dtic+
J3WsRaCJ0oHpHC8B//9jOOv/////x/////84/////+P/////em/9/////////8f/////f1N704UDFDwmY98BMdA+KxfzR8mvgKBKjBEATUCz2f0M
dkO4K8xlZxiFvNflxs3XiyZ/bpydiIWNKNv6A9Q8VozJeUOXPL/SbgbqJaLclbbgB9klRH1c1Liy5kTPbBEWTRobCTkJy5Lq7gtqoJAF2Jwxqt/3
XHBxM635hx+7MPRk5Q1RSx0HUsI+ycMEDZIpzMRvmvflsjIkADTVG4VoSaTcDxYxoYQc+HccqA94tmxwdBHXwTk67OpbdnQpjyGSE12J+DwZJa6y
nthjL3ITybG5vDC9vZChmFHKNUED+MujenVLmkfzBDsf6QqKkzuuSJopbtWwFt1oeW3xXDRAg4PSTofdgwP5Kn/QoBxDiGLiTKTENWcJK690CZnL
Q1E1Xznb1YxVknVB4Z/8/4Mg2NL/gyAItvQBk4MR6TA6qTp61b2BtTEcFY8OsCPuf3Ne2ioLrR+pujIuyiJU+AiYR7o29oZXLC3mLoWecnEQdsMJ
vQlVcUHfTjokUCMN4Ye6w7r3FOZWNnIqra+s7yFBi94ZC7hHY980i21yiIVJjXzlz/G0XW4RCHs/ssSHHjpxpCcveHbJ+bcGtFPSXngFBAJ3xXdi
gx+G5rSneSNtPhzfhi8UWWndu8wXe4be/gMg4eX7LGmsEYeX1ad9sXb9Eu57owc17nJIjUgNni25P6QRp3QD48FGacYWQEflFmaTP0t49HJNQAL1
Alqr+kO+bmvNAm0qibpju88ahLLA9Xul0Xo7/1gqigU7Q8YM2cbuOB3i1xZ5OX79//j1H/BkcEEriVk5/Rcg36GAoILsec2VXHTbArVL6fJ7UO5Q
DZz7PwHz4j/+/+M//uM/HmPfgP1N4c5MHQYjFS1cdu3UPjuxeTeeYvNuPBNtptrE5t14dWAVFybaTLXXU4RTiM278Q==
"""


def golden_tree():
    i = np.arange(640)
    steps = (i * i * 7 % 11 + i * 3 % 5 - 6).astype(np.int8)  # a bell of sixteen codes
    return {
        "int4": Quantized.from_codes(jnp.asarray(np.clip(steps, -7, 7).reshape(32, 20)), jnp.ones((1, 20)), bits=4),
        "int8": np.where(i % 10 == 0, steps * 8, 0).astype(np.int8),
        "float32": (i % 37 - 18).astype(np.float32) / 64,
        "pruned": np.where(i % 13 == 0, (i - 320) / 8, 0).astype(np.float16),
        "mask": i * i % 9 == 0,
        "noise": np.array([2654435761 * k % 2**32 for k in range(1, 9)], np.uint32),
    }


def test_a_file_of_version_1_is_read(tmp_path):
    data = base64.b64decode(FILE)
    (tmp_path / "file").write_bytes(data)
    expected, found = golden_tree(), pack.load(tmp_path / "file")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert pack.load_metadata(tmp_path / "file") == {"made": "by format version 1"}
    described = str(pack.read_header(tmp_path / "file"))
    for coding in ("raw:", "ans8:", "ans4:", "ans2:", "ans1:", " planes ", " nonzero "):
        assert coding in described, coding  # else the file would not show that all of them are read


def test_the_same_tree_is_written_in_the_same_sections_today(tmp_path):
    (tmp_path / "golden").write_bytes(base64.b64decode(FILE))
    pack.save(tmp_path / "file", golden_tree(), {"made": "by format version 1"})
    assert pack.read_header(tmp_path / "file") == pack.read_header(tmp_path / "golden")
