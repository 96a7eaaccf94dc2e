"""Causal attention with a key/value cache against float64, and against onnxruntime's GroupQueryAttention."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import vlpack_kernels
from onnx import TensorProto

from conftest import DOMAIN, session

BRAIN = vlpack_kernels.instruction_set() == "avx512_bf16"
needs_brain = pytest.mark.skipif(not BRAIN, reason="this instruction set has no products in bfloat16")
OUTPUTS = ("y", "present_key", "present_value")


class Case(NamedTuple):
    """A call of the operator: random tokens of several sequences, and a cache whose unused places are NaN.

    Attributes:
        sizes: query heads, key heads, channels.
        room: number of tokens that the cache has room for.
        held: number of keys of each sequence before the call.
        counts: number of new tokens of each sequence.
        size: standard deviation of the numbers.
        seed: seed of the numbers.
        narrow: whether the cache is in bfloat16.
    """

    sizes: tuple[int, int, int]
    room: int
    held: list[int]
    counts: list[int]
    size: float = 1.0
    seed: int = 0
    narrow: bool = False

    def arrays(self) -> dict[str, np.ndarray]:
        heads, key_heads, channels = self.sizes
        random, batch, new = np.random.default_rng(self.seed), len(self.held), max(self.counts)
        shapes = [(batch, new, count * channels) for count in (heads, key_heads, key_heads)]
        shapes += [(batch, key_heads, self.room, channels)] * 2
        made = [(random.standard_normal(shape) * self.size).astype(np.float32) for shape in shapes]
        for row, (held, count) in enumerate(zip(self.held, self.counts, strict=True)):
            for cache in made[3:]:
                cache[row, :, held:] = np.nan
                cache[...] = narrowed(cache) if self.narrow else cache
            for new_ones in made[:3]:
                new_ones[row, count:] = np.nan
        return dict(zip(("q", "k", "v", "past_key", "past_value"), made, strict=True))

    def open(self, threads: int = 1, packed: bool = True, domain: str = DOMAIN, **attributes: Any) -> Any:
        """A session for the lengths of this case."""
        lengths = [max(held + count, 1) for held, count in zip(self.held, self.counts, strict=True)]
        constants: dict[str, Any] = {"seqlens_k": np.array(lengths, np.int32) - 1}
        constants["total"] = np.array(max(lengths), np.int32)
        if packed:
            constants |= {f"none{place}": None for place in range(7, 16)}
            constants["query_seqlens"] = np.array(self.counts, np.int32)
        attributes |= {"num_heads": self.sizes[0], "kv_num_heads": self.sizes[1]}
        names = list(self.arrays())
        operator, narrow = "GroupQueryAttention", ()
        if self.narrow:
            operator, narrow = "NarrowGroupQueryAttention", (*names[3:], *OUTPUTS[1:])
        return session(operator, names, constants, threads, domain, OUTPUTS, narrow, **attributes)

    def run(self, *args: Any, scale: float = 0.0, exact: int = 0, **options: Any) -> list[np.ndarray]:
        """The outputs, with the cache bound in place."""
        return in_place(self.open(*args, scale=scale, exact=exact, **options), self.arrays())

    def truth(self, scale: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each sequence's output ``[count, heads · channels]`` in float64, and the cache after the call."""
        heads, key_heads, channels = self.sizes
        given, scale = self.arrays(), scale or channels**-0.5
        caches = [given["past_key"].copy(), given["past_value"].copy()]
        found = []
        for row, (held, count) in enumerate(zip(self.held, self.counts, strict=True)):
            for cache, name in zip(caches, "kv", strict=True):
                new = given[name][row, :count].reshape(count, key_heads, channels)
                cache[row, :, held : held + count] = new.transpose(1, 0, 2)
                cache[...] = narrowed(cache) if self.narrow else cache
            q = given["q"][row, :count].reshape(count, heads, channels).transpose(1, 0, 2).astype(np.float64)
            k, v = (cache[row, :, : held + count].repeat(heads // key_heads, 0).astype(np.float64) for cache in caches)
            scores = q @ k.transpose(0, 2, 1) * scale
            scores[:, np.arange(held + count) > np.arange(held, held + count)[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf)) if count else scores
            y = weights / weights.sum(-1, keepdims=True) @ v
            found.append(y.transpose(1, 0, 2).reshape(count, heads * channels))
        return found, caches

    def bound(self, exact: int = 0, scale: float = 0.0) -> float:
        """The largest error that rounding q, k, v and the exponentials can cause."""
        heads, key_heads, channels = self.sizes
        # fewer queries of a key head are multiplied in fp32 in any case
        rounds = BRAIN and not exact and max(self.counts) * heads // key_heads > (16 if self.narrow else 47)
        rounding = 2**-9 if rounds else 2**-20
        given = {name: np.nan_to_num(np.abs(array)) for name, array in self.arrays().items()}
        top = {name: array.reshape(-1, channels) for name, array in given.items()}
        # Σ |q| |k| of any query with any key
        products = max(float((top["q"] @ top[name].T).max(initial=0)) for name in ("k", "past_key"))
        scores = 2.1 * rounding * products * (scale or channels**-0.5)
        largest = max(given["v"].max(initial=0), given["past_value"].max(initial=0))
        return float((np.expm1(2 * scores) + 3 * rounding) * largest)

    def check(self, found: list[np.ndarray], scale: float = 0.0, exact: int = 0) -> None:
        """Checks the outputs of a call."""
        truth, caches = self.truth(scale)
        limit = self.bound(exact, scale)
        for row, count in enumerate(self.counts):
            assert np.abs(found[0][row, :count] - truth[row]).max(initial=0) <= limit, (row, self)
            assert not found[0][row, count:].any()
        for cache, after in zip(caches, found[1:], strict=True):
            np.testing.assert_array_equal(after, cache)  # also in places that must not be written


def narrowed(array: np.ndarray) -> np.ndarray:
    """The numbers rounded to bfloat16, ties to even."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def in_place(made: Any, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Runs a session with past and present keys and values in the same memory."""
    binding, kinds = made.io_binding(), {port.name: port.type for port in made.get_inputs()}
    caches = {name: array for name, array in given.items() if kinds[name] == "tensor(bfloat16)"}
    halves = {name: array.astype(ml_dtypes.bfloat16).view(np.uint16) for name, array in caches.items()}
    for name, array in given.items():
        if name in halves:
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(halves[name], TensorProto.BFLOAT16)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name.startswith("past"):
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
    binding.bind_output("y")
    made.run_with_iobinding(binding)
    for name, array in halves.items():
        given[name][...] = array.view(ml_dtypes.bfloat16)
    return [binding.get_outputs()[-1].numpy(), given["past_key"], given["past_value"]]


CASES = [
    Case((1, 1, 1), 1, [0], [1]),
    Case((4, 2, 16), 20, [0], [20]),  # a prompt
    Case((4, 2, 16), 150, [77], [1]),  # a token
    Case((16, 8, 128), 200, [130, 0, 64, 5], [1, 1, 1, 1]),  # a step of several sequences
    Case((8, 2, 64), 300, [129, 3], [2, 1]),
    Case((6, 2, 72), 290, [0, 190, 60], [100, 0, 41]),  # also one without new tokens
    Case((7, 1, 33), 200, [100, 0, 1], [30, 5, 64]),  # seven query heads with a key head
    Case((6, 2, 7), 100, [63, 64, 65], [1, 2, 3]),
    Case((3, 3, 80), 140, [0, 64], [64, 65]),
    Case((2, 1, 256), 100, [31], [69]),
    Case((5, 5, 24), 70, [0, 0], [0, 0]),
]
NAMES = ["-".join(map(str, (*case.sizes, *case.held, *case.counts))) for case in CASES]
STOCK = [place for place, case in enumerate(CASES) if case.sizes[2] % 8 == 0 and max(case.counts)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_it_is_close_to_float64(case: Case, exact: int, threads: int) -> None:
    case.check(case.run(threads, exact=exact), exact=exact)


@needs_brain
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_with_a_narrow_cache_it_is_close_to_float64(case: Case, threads: int) -> None:
    case = case._replace(narrow=True)
    case.check(case.run(threads))


@pytest.mark.skipif(BRAIN, reason="this processor has the instructions")
def test_a_narrow_cache_needs_bfloat16() -> None:
    with pytest.raises(Exception, match="needs a processor with AVX-512 and bfloat16"):
        CASES[1]._replace(narrow=True).run()


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=needs_brain)])
@pytest.mark.parametrize("exact", [0, 1])
def test_fuzzed_lengths_and_scales(exact: int, narrow: bool) -> None:
    exact = 0 if narrow else exact
    random = np.random.default_rng(1)
    for seed in range(40):
        batch, key_heads, group = (int(random.integers(1, top)) for top in (5, 4, 6))
        longest = int(random.choice([2, 9, 70]))
        counts = [int(random.integers(0, longest)) for _ in range(batch)]
        held = [int(random.integers(0, 150)) for _ in range(batch)]
        room = max(map(sum, zip(held, counts, strict=True))) + int(random.integers(1, 20))
        sizes = (key_heads * group, key_heads, int(random.integers(1, 100)))
        case = Case(sizes, room, held, counts, float(random.uniform(0.1, 2)), seed, narrow)
        scale = float(random.uniform(0.02, 0.3))
        case.check(case.run(2, scale=scale, exact=exact), scale, exact)


def test_the_errors_of_many_keys_are_small() -> None:
    """The relative errors for Gaussian inputs, which docs/kernels.md states."""
    for counts, exact, limit in ([400], 0, 5e-3 if BRAIN else 2e-6), ([400], 1, 2e-6), ([2], 0, 2e-6):
        case = Case((4, 2, 128), 800, [400], counts)
        found, (truth,) = case.run(exact=exact)[0][0], case.truth()[0]
        assert np.linalg.norm(found - truth) <= limit * np.linalg.norm(truth)


@pytest.mark.parametrize("case", CASES[1:7], ids=NAMES[1:7])
def test_threads_do_not_change_the_result(case: Case) -> None:
    first = case.run()[0]
    for threads in (2, 3):
        np.testing.assert_array_equal(case.run(threads)[0], first)


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=needs_brain)])
@pytest.mark.parametrize(("total", "parts"), [(8, [1] * 8), (8, [3, 5]), (180, [100, 80]), (180, [77, 103])])
def test_a_token_does_not_depend_on_others_of_its_call(total: int, parts: list[int], narrow: bool) -> None:
    """A prompt can be processed in parts, and drafted tokens checked together."""
    case = Case((4, 2, 40), 300, [75], [total], size=2.0, narrow=narrow)
    given = case.arrays()
    whole = case.run()
    done, cache = 0, [given["past_key"], given["past_value"]]
    for count in parts:
        step = {name: np.ascontiguousarray(given[name][:, done : done + count]) for name in "qkv"}
        step |= dict(zip(("past_key", "past_value"), cache, strict=True))
        part = case._replace(held=[75 + done], counts=[count])
        y, *cache = in_place(part.open(scale=0.0, exact=0), step)
        np.testing.assert_array_equal(y, whole[0][:, done : done + count])
        done += count
    np.testing.assert_array_equal(cache, whole[1:])


@pytest.mark.parametrize("case", CASES[1:7], ids=NAMES[1:7])
def test_a_cache_in_other_memory_is_copied(case: Case) -> None:
    given = case.arrays()
    found = case.open(2, scale=0.0, exact=1).run(None, given)
    truth, caches = case.truth()
    for row, (held, count) in enumerate(zip(case.held, case.counts, strict=True)):
        assert np.abs(found[0][row, :count] - truth[row]).max(initial=0) <= case.bound(1)
        for cache, after in zip(caches, found[1:], strict=True):
            np.testing.assert_array_equal(after[row, :, : held + count], cache[row, :, : held + count])


def test_a_cache_that_grows() -> None:
    """Without room for the new tokens, the present cache is in other memory and as long as all tokens."""
    case = Case((4, 2, 16), 90, [60, 40], [30, 30])
    given, (truth, caches) = case.arrays(), case.truth()
    for name in ("past_key", "past_value"):
        given[name] = np.ascontiguousarray(given[name][:, :, :60])
    y, *present = case.open(2, packed=False, scale=0.0, exact=1).run(None, given)
    for row, end in enumerate((90, 70)):
        assert np.abs(y[row] - truth[row]).max() <= case.bound(1)
        for cache, after in zip(caches, present, strict=True):
            assert after.shape == (2, 2, 90, 16)
            np.testing.assert_array_equal(after[row, :, :end], cache[row, :, :end])


def test_prompts_of_different_lengths_without_query_seqlens() -> None:
    """Padding follows the shorter prompts, and its tokens are neither written nor computed."""
    case = Case((4, 2, 16), 40, [0, 0, 0], [33, 40, 7])
    case.check(case.run(2, packed=False, exact=1), exact=1)


@pytest.mark.parametrize("case", [CASES[place] for place in STOCK], ids=[NAMES[place] for place in STOCK])
def test_it_does_what_the_stock_operator_does(case: Case) -> None:
    packed = len(set(case.counts)) > 1
    if packed and tuple(map(int, ort.__version__.split(".")[:2])) < (1, 32):
        pytest.skip("query_seqlens came with onnxruntime 1.32")
    given = {name: np.nan_to_num(array) for name, array in case.arrays().items()}
    stock = in_place(case.open(1, packed, "com.microsoft"), {name: array.copy() for name, array in given.items()})
    found = in_place(case.open(1, packed, scale=0.0, exact=1), given)
    for row, (held, count) in enumerate(zip(case.held, case.counts, strict=True)):
        np.testing.assert_allclose(found[0][row, :count], stock[0][row, :count], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(found[1:], stock[1:], strict=True):
            np.testing.assert_array_equal(mine[row, :, : held + count], theirs[row, :, : held + count])


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=needs_brain)])
@pytest.mark.parametrize("count", [1, 40])
def test_a_nan_stays_in_its_sequence(count: int, narrow: bool) -> None:
    case = Case((4, 2, 16), 200, [100, 64, 30], [count] * 3, narrow=narrow)
    clean, given = case.run()[0], case.arrays()
    given["k"][1, 0, 3] = np.nan  # of the first key head, which serves two query heads
    y = in_place(case.open(scale=0.0, exact=0), given)[0]
    assert np.isnan(y[1, :, :32]).all()
    y[1, :, :32] = clean[1, :, :32]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("count", [3, 70])
def test_large_scores_choose_one_key(count: int) -> None:
    """Also one after which all others are hidden, and one whose score is far above those before it."""
    case = Case((2, 1, 64), 300, [130], [count])
    given, keys = case.arrays(), np.arange(130 + count)
    given["past_key"][...], given["k"][...] = 0, 0
    given["past_key"][0, 0, 5, 0] = given["past_key"][0, 0, 100, 1] = 1e4
    given["k"][0, :, 2] = 1e3 * np.arange(1, count + 1)  # the later, the larger: each token would choose the last one
    given["past_value"][0, 0, :130], given["v"][0] = keys[:130, None] % 100, keys[130:, None] % 100
    given["q"][...] = 0
    for token in range(count):
        given["q"][0, token, token % 3] = given["q"][0, token, 64 + token % 3] = 1e3
    chosen = np.array([(5, 100, 130 + token)[token % 3] for token in range(count)])
    y = in_place(case.open(scale=1.0, exact=0), given)[0]
    np.testing.assert_array_equal(y[0], np.repeat(chosen[:, None] % 100, 128, 1))


def test_lengths_and_shapes_that_do_not_fit_are_errors() -> None:
    case = Case((4, 2, 16), 20, [5, 3], [2, 2])
    options = {"scale": 0.0, "exact": 0}
    with pytest.raises(Exception, match="contradict"):
        case._replace(held=[5, -1]).open(**options).run(None, case.arrays())
    with pytest.raises(Exception, match="contradict"):  # more new tokens than there are
        case._replace(counts=[2, 3]).open(**options).run(None, case.arrays())
    with pytest.raises(Exception, match="one number for each sequence"):
        case._replace(held=[5], counts=[2]).open(**options).run(None, case.arrays())
    with pytest.raises(Exception, match="past keys and values"):
        case.open(**options).run(None, case.arrays() | {"past_value": np.zeros((2, 2, 21, 16), np.float32)})
    with pytest.raises(Exception, match="head size of q"):
        case.open(**options).run(None, case.arrays() | {"v": np.zeros((2, 2, 33), np.float32)})
    with pytest.raises(Exception, match="three dimensions"):
        case.open(**options).run(None, case.arrays() | {"q": np.zeros((2, 64), np.float32)})
    with pytest.raises(Exception, match="multiple of kv_num_heads"):
        case._replace(sizes=(4, 3, 16)).open(**options)
