"""The dyadic histogram and the coded streams, against exhaustive search and the entropy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress.pack import PackError, _model, _streams

WIDTHS = (1, 2, 4, 8)


@st.composite
def histograms(draw):
    width = draw(st.sampled_from(WIDTHS))
    few = st.sampled_from([0, 0, 0, 1, 2, 7, 100, 10**6])
    counts = draw(hnp.arrays(np.int64, 2**width, elements=few))
    counts[draw(st.integers(0, 2**width - 1))] += 1
    return width, counts


def cheapest_tree(counts):
    """The least cost over all trees, by trying them all."""
    total = sum(counts)
    if len(counts) == 1 or total == 0:
        return 0.0
    half = len(counts) // 2
    left = sum(counts[:half])
    data = sum(n * math.log2(total / n) for n in (left, total - left) if n)
    bits = max(2, (total.bit_length() + 1) // 2)
    halved = 1 + bits + 0.72 + data + cheapest_tree(counts[:half]) + cheapest_tree(counts[half:])
    return min(halved, 1 + total * math.log2(len(counts)))


def entropy_bytes(symbols):
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@given(histograms())
def test_reader_and_writer_agree_on_the_model(case):
    width, counts = case
    written = _model.fit(_model.plan(counts))
    read = _model.read(written.table + b"what follows", int(counts.sum()), width)
    assert read.table == written.table
    np.testing.assert_array_equal(read.probabilities, written.probabilities)
    assert written.probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (written.probabilities[counts > 0] > 0).all()
    assert len(written.table) < _model.LONGEST


@given(st.lists(st.sampled_from([0, 1, 3, 50, 999]), min_size=8, max_size=8).filter(any))
def test_the_tree_is_the_cheapest_of_all(counts):
    assert _model.plan(np.array(counts)).bits == pytest.approx(cheapest_tree(counts))


@given(histograms())
def test_a_plan_tells_what_coding_will_take(case):
    _, counts = case
    plan = _model.plan(counts)
    model = _model.fit(plan)
    used = counts > 0
    bits = 8 * len(model.table) - (counts[used] * np.log2(model.probabilities[used])).sum()
    halvings = sum(int(level.sum()) for level in plan.halved)
    assert abs(bits - plan.bits) <= 8 + 2 * halvings  # the last byte of the table, and rounding of the shares


@pytest.mark.parametrize("total", [1, 2, 30, 1000, 10**6])
def test_shares_are_exact_where_a_half_is_empty_and_near_elsewhere(total):
    bits = _model._share_bits_int(total)
    for left in {0, 1, total // 3, total // 2, total - 1, total}:
        share = _model._share(_model._nearest_level(left, total, bits), bits)
        if left in (0, total):
            assert share == left / total
        else:
            p = left / total
            assert 0 < share < 1
            # within the noise of the sample: a few standard deviations
            assert abs(share - p) <= 3 * math.sqrt((p * (1 - p) + 1 / total) / total) or total < 30


def test_a_table_that_is_cut_short_is_refused():
    counts = np.random.default_rng(0).integers(0, 1000, 256)
    table = _model.fit(_model.plan(counts)).table
    for length in range(len(table)):
        with pytest.raises(PackError, match="cut short"):
            _model.read(table[:length], int(counts.sum()), 8)


@pytest.mark.parametrize("width", WIDTHS)
@given(data=hnp.arrays(np.uint8, st.integers(1, 400), elements=st.sampled_from([0, 0, 0, 1, 16, 17, 128, 255])))
def test_every_width_is_lossless(width, data):
    model = _model.fit(_model.plan(_streams._narrow(_streams.histogram(data), width)))
    coded = bytearray(model.table + _streams._words(data, width, model))
    np.testing.assert_array_equal(_streams.decode(f"ans{width}", coded, data.size), data)


def test_streams_longer_than_a_chunk_are_lossless(rng):
    data = rng.binomial(20, 0.3, _streams._CHUNK * 2 + 17).astype(np.uint8)
    for width in WIDTHS:
        model = _model.fit(_model.plan(_streams._narrow(_streams.histogram(data), width)))
        coded = bytearray(model.table + _streams._words(data, width, model))
        np.testing.assert_array_equal(_streams.decode(f"ans{width}", coded, data.size), data)


@pytest.mark.parametrize("width", WIDTHS)
def test_narrow_histograms_count_the_symbols_of_the_split(rng, width):
    data = rng.integers(0, 256, 5000, dtype=np.uint8)
    symbols = _streams._split(data, width)
    np.testing.assert_array_equal(
        np.bincount(symbols, minlength=2**width), _streams._narrow(_streams.histogram(data), width)
    )
    np.testing.assert_array_equal(_streams._join(symbols, width), data)


def encode(data):
    return _streams.encode(data, _streams.plan(_streams.histogram(data)))


SOURCES = {
    "gaussian int8": lambda rng, n: np.clip(np.round(rng.normal(size=n) * 30), -127, 127).astype(np.int8),
    "laplace int8": lambda rng, n: np.clip(np.round(rng.laplace(size=n) * 12), -127, 127).astype(np.int8),
    "90 % zeros": lambda rng, n: (rng.integers(-100, 101, n) * (rng.uniform(size=n) < 0.1)).astype(np.int8),
    "saturated": lambda rng, n: np.clip(np.round(rng.normal(size=n) * 90), -127, 127).astype(np.int8),
    "five values": lambda rng, n: rng.choice([-90, -3, 0, 3, 90], n, p=[0.1, 0.2, 0.4, 0.2, 0.1]).astype(np.int8),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("n", [500, 5000, 200_000])
def test_coded_streams_come_close_to_their_entropy(rng, source, n):
    data = SOURCES[source](rng, n)
    coding, coded = encode(data.view(np.uint8))
    # telling each used symbol's frequency costs half of log2(n) bits (Rissanen 1984); the histogram, half of that
    table = 0.5 * math.log2(n) * (np.unique(data).size - 1) / 8
    assert len(coded) <= 1.001 * entropy_bytes(data) + 0.5 * table + 30
    np.testing.assert_array_equal(_streams.decode(coding, bytearray(coded), n).view(np.int8), data)


def test_narrow_symbols_are_taken_where_they_are_cheaper(rng):
    codes = np.clip(np.round(rng.normal(size=2000) * 2.5), -7, 7).astype(np.int8)
    assert encode((codes[0::2] & 15 | codes[1::2] << 4).astype(np.uint8))[0] == "ans4"
    assert encode(np.packbits(rng.uniform(size=2000) < 0.1))[0] in ("ans1", "ans2")
    pattern = np.array([3, 5, 6, 9, 10, 12])[rng.integers(0, 6, 2000)]  # 2:4 masks: two bits of each four
    coding, coded = encode((pattern[0::2] | pattern[1::2] << 4).astype(np.uint8))
    assert coding == "ans4"
    assert len(coded) <= 1.02 * 2000 * math.log2(6) / 8


def test_noise_is_stored_as_it_is(rng):
    data = rng.integers(0, 256, 100_000, dtype=np.uint8)
    assert encode(data) == ("raw", data.tobytes())


@pytest.mark.parametrize("n", [0, 1, 7, 8, 100, 10_000_000])
def test_a_constant_costs_next_to_nothing_but_a_byte_in_4096(n):
    data = np.full(n, 200, np.uint8)
    coding, coded = encode(data)
    assert n // _streams.EXPANSION <= len(coded) <= n // _streams.EXPANSION + min(n, 20)
    np.testing.assert_array_equal(_streams.decode(coding, bytearray(coded), n), data)


def test_what_is_not_a_coded_stream_is_refused(rng):
    data = rng.binomial(20, 0.3, 1000).astype(np.uint8)
    coding, coded = encode(data)
    with pytest.raises(PackError):
        _streams.decode(coding, bytearray(coded), 999)
    with pytest.raises(PackError):
        _streams.decode(coding, bytearray(coded[:-3]), 1000)
    with pytest.raises(PackError, match="can't hold"):
        _streams.decode(coding, bytearray(coded), 10**15)
    with pytest.raises(PackError, match="wanted"):
        _streams.decode("raw", bytearray(10), 11)


def test_levels_of_a_share_rise_and_are_finest_at_the_ends():
    shares = [_model._share(k, 6) for k in range(64)]
    steps = [b - a for a, b in itertools.pairwise(shares)]
    assert shares[0] == 0 and shares[-1] == 1 and min(steps) > 0
    assert steps[0] < steps[31] / 10


def read_as_told(coded, size, width):
    """A stream's symbols, by the docstrings of `_model.py` and `_streams.py` alone."""
    probabilities, bits, used, total = [0.0] * 2**width, int.from_bytes(coded, "little"), 0, size * 8 // width

    def take(n):
        nonlocal used
        used += n
        return bits >> (used - n) & (1 << n) - 1

    def node(start, n, share):
        if share == 0 or n == 1:
            probabilities[start] = share
        elif take(1):
            b = max(2, (int(total * share).bit_length() + 1) // 2)
            t = take(b) / (2**b - 1)
            left = t**2 * (3 - 2 * t)
            node(start, n // 2, share * left)
            node(start + n // 2, n // 2, share * (1 - left))
        else:
            probabilities[start : start + n] = [share / n] * n

    node(0, 2**width, 1.0)
    data = coded[-(-used // 8) :].rstrip(b"\0")
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    scale = (2**24 - len(probabilities)) / sum(probabilities)
    starts = [int(scale * p) + i for i, p in enumerate(itertools.accumulate(probabilities, initial=0.0))]
    state = words.pop() if words else 0
    state = state << 32 | words.pop() if words else state
    for _ in range(total):
        q = state % 2**24
        i = max(i for i in range(len(probabilities)) if starts[i] <= q)
        state = (min(starts[i + 1], 2**24) - starts[i]) * (state >> 24) + q - starts[i]
        state = state << 32 | words.pop() if state < 2**32 and words else state
        yield i
    assert (state, words) == (0, [])


@pytest.mark.parametrize("size", [9, 3000])
@pytest.mark.parametrize("width", WIDTHS)
def test_another_program_can_read_a_stream(rng, width, size):
    data = (rng.geometric(0.6, size) * rng.integers(0, 5, size) * 11 % 256).astype(np.uint8)
    counts = _streams._narrow(_streams.histogram(data), width)
    model = _model.fit(_model.plan(counts))
    coded = model.table + _streams._words(data, width, model)
    assert list(read_as_told(coded, size, width)) == _streams._split(data, width).tolist()
