"""The precision policy of a package, as data: the storage of each weight and the dtype of the activations.

A policy is a list of rules; the first rule that matches a weight decides. A rule matches a weight's *role*, which is
``text.`` or ``vision.`` followed by its purpose: ``linear``, ``embedding``, ``head``, ``candidates``, ``answers``,
``router``, ``expert``, ``gate`` (few rows that decide how much of something is used), ``output`` (the last matrix of a
vision encoder), ``table`` or ``patches``. A rule can also match the path of the weight's module. Paths are the
checkpoint's, with q/k/v and gate/up joined:
``model.language_model.layers.3.self_attn.qkv_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

from vlpack.errors import OptionError, option
from vlpack.quantize.kept import storage_of
from vlpack.quantize.rotate import rotation_size
from vlpack.quantize.storage import Blocks, ChannelInt8, Float, Storage, Transposed, is_kept

PRECISIONS = ("fp32", "fp16", "int8", "int4")

OFFERED: Mapping[str, tuple[str, ...]] = {
    "cpu": PRECISIONS,
    "cuda": ("fp32", "fp16", "int4"),
    "dml": ("fp16", "int4"),
    "webgpu": ("fp16", "int4"),
}
"""Execution provider → precisions offered on it. int8 needs DynamicQuantizeMatMul, which only the CPU has."""

ROLES = tuple(
    f"text.{kind}" for kind in ("linear", "embedding", "head", "candidates", "answers", "router", "expert", "gate")
)
ROLES += tuple(f"vision.{kind}" for kind in ("linear", "output", "table", "patches"))
"""All roles that a weight can have."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Numbers of values that can share a scale."""

LARGEST_ROTATION = 64
"""Largest number of channels in a block that the graph rotates; larger blocks cost more time (docs/results.md)."""

BALANCE_TOLERANCE = 8.0
"""Largest ratio, relative to the median, at which a channel of 4-bit weights is not rescaled; the tolerance of
`vlpack.quantize.rotate.even_sizes` (docs/results.md)."""

EXPERT_PROVIDERS: tuple[str, ...] = ("cpu", "cuda")
"""Execution providers that have kernels for ORT's MoE and QMoE operators in the form used here."""


STATE_PROVIDERS: tuple[str, ...] = ("cpu",)
"""Execution providers on which linear attention has been run."""


@dataclass(frozen=True)
class Rule:
    """A rule of a policy: the storage of the weights whose role and module path match two fnmatch patterns.

    Args:
        role: pattern that the role must match.
        storage: storage of these weights.
        modules: pattern that the path of the module must match.
        layers: layers of the decoder to which the rule is limited; None for no limit.
    """

    role: str
    storage: Storage
    modules: str = "*"
    layers: tuple[int, ...] | None = None

    def fits(self, role: str, path: str) -> bool:
        """Whether the rule matches a weight of the role ``role`` in the module at ``path``."""
        if not (fnmatchcase(role, self.role) and fnmatchcase(path, self.modules)):
            return False
        return self.layers is None or layer_and_name(path)[0] in self.layers

    def described(self) -> dict[str, str]:
        """The rule as JSON."""
        some = "" if self.layers is None else f" in layers {', '.join(map(str, self.layers))}"
        return {"role": self.role, "modules": self.modules + some, "storage": self.storage.label}


@dataclass(frozen=True)
class PrecisionFacts:
    """The facts about a model on which its precision policy depends.

    Args:
        num_hidden_layers: number of layers of the decoder.
        expert_size: number of features that the block size of experts' weights must divide; None without experts.
        scores: whether the model is a reranker, whose score depends on two rows of the head.
        width: common divisor of the numbers of input features of the decoder's matrices; 0 where it is not known.
        gates: whether the decoder has weights of the role ``gate``.
    """

    num_hidden_layers: int = 1
    expert_size: int | None = None
    scores: bool = False
    width: int = 0
    gates: bool = False


@dataclass(frozen=True)
class QuantizationOptions:
    """The user's choices about quantized weights and the key/value cache.

    Args:
        block_size: number of values that share a scale, in all weights in blocks; None for `default_block_size`.
        is_symmetric: whether blocks have no zero points; None gives zero points only to calibrated 4-bit weights on the
            CPU, whose blocks are so large that zero points take no time.
        accuracy_level: accuracy level of MatMulNBits on the CPU: 1 computes with fp32 activations, 4 with 8-bit ones.
        weight_type: dtype of int8 matrices, ``int8`` or ``uint8``; see `vlpack.quantize.storage.ChannelInt8`.
        mixed: ``int4`` or ``int8`` for parts of the decoder, by selector, as in the builder's
            ``matmul_mixed_precision``.
        vision: precision of the vision encoder; None to derive it from the package's precision.
        kv_cache: ``int8``, or None to keep keys and values in the dtype of the activations.
        calibrated: whether the decoder's 4-bit matrices, or in int8 packages its 8-bit ones, are rounded by GPTQ.
        balance: whether channels are balanced (`vlpack.quantize.rotate`). None balances the inputs of quantized weights
            only; True those of float weights, too.
        rotation: whether blocks of channels are rotated (`vlpack.quantize.rotate`). None rotates the inputs of
            quantized weights on the CPU only; True those of float weights, too, which only changes rounding errors.
        eight_bits: layers in which matrices of an int4 package's decoder have 8 bits, by the matrix's name in a layer,
            such as ``mlp.down_proj``, or ``*`` for all matrices. None for the default: `default_eight_bits` in
            packages for the CPU that are not calibrated and have no mixed layers, else no layers.
        narrow_scales: whether scales of 4-bit blocks, except those of experts, are stored in 8 bits on the CPU.
        kept: matrices that keep the codes of a quantized checkpoint, as `vlpack.quantize.kept.as_rule` describes them.
    """

    block_size: int | None = None
    is_symmetric: bool | None = None
    accuracy_level: int = 4
    weight_type: str = "int8"
    mixed: Mapping[str, str] = field(default_factory=dict)
    vision: str | None = None
    kv_cache: str | None = None
    calibrated: bool = False
    balance: bool | None = None
    rotation: bool | None = None
    narrow_scales: bool = True
    eight_bits: Mapping[str, Sequence[int]] | None = None
    kept: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Policy:
    """The precision policy of a package: how its weights are stored and in which dtype it computes.

    It is printed by ``inspect`` and written to the manifest.

    Args:
        precision: name of the precision, one of `PRECISIONS`.
        provider: execution provider that the package is made for.
        dtype: dtype of activations, ``float32`` or ``float16``. Norms, rotary angles and residual sums are fp32 in
            both.
        rules: rules for the storage of weights; the first that matches decides.
        options: choices from which the rules were made.
    """

    precision: str
    provider: str
    dtype: str
    rules: tuple[Rule, ...]
    options: QuantizationOptions

    def storage(self, role: str, path: str = "") -> Storage:
        """The storage of a weight of the role ``role`` in the module at ``path``."""
        assert role in ROLES, f"{role} at {path} is no role"
        for rule in self.rules:
            if rule.fits(role, path):
                return rule.storage
        raise AssertionError(f"no rule for {role} at {path}: the last rule must match everything")

    def rotation(self, storage: Storage | None, cols: int) -> int:
        """Block size of the rotation of the columns of a weight of this storage with ``cols`` columns; 1 for none."""
        chosen = self.options.rotation
        if is_kept(storage):
            return 1
        quantized = isinstance(storage, Blocks | ChannelInt8)
        wanted = (quantized and self.provider == "cpu") if chosen is None else chosen
        return rotation_size(cols, LARGEST_ROTATION) if wanted else 1

    def balance(self, storage: Storage | None) -> float | None:
        """The kind of balance of the input channels of a weight of this storage; None for no balance.

        0 stands for `vlpack.quantize.rotate.equal_columns`; other numbers are tolerances of
        `vlpack.quantize.rotate.even_sizes`.
        """
        quantized = isinstance(storage, Blocks | ChannelInt8)
        if self.options.balance is False or not (quantized or self.options.balance):
            return None
        if isinstance(storage, Blocks) and storage.bits == 4:
            return BALANCE_TOLERANCE
        # calibration measures the sizes of activations; making them equal to those of the weights harms both least
        return 1.0 if isinstance(storage, ChannelInt8) and storage.calibrated else 0.0

    @property
    def scores_candidates(self) -> bool:
        """Whether the head has 4 bits and its likeliest tokens are scored again in 8 bits, which only the CPU does."""
        head = self.storage("text.head")
        return self.provider == "cpu" and isinstance(head, Blocks) and head.bits == 4

    @property
    def cache(self) -> str:
        """The dtype in which keys and values are cached."""
        return self.options.kv_cache or self.dtype

    def described(self) -> list[dict[str, str]]:
        """The policy's rules as JSON."""
        return [rule.described() for rule in self.rules]


def make_policy(
    precision: str, provider: str, options: QuantizationOptions, facts: PrecisionFacts = PrecisionFacts()
) -> Policy:
    """Makes the precision policy for an execution provider and a model with these facts.

    Raises:
        OptionError: the precision is not offered on the execution provider, or an option is not offered with them.
    """
    if provider not in OFFERED:
        raise OptionError(f"Unknown execution provider '{provider}'.", "Offered: " + ", ".join(OFFERED) + ".")
    if precision not in OFFERED[provider]:
        where = [name for name, offered in OFFERED.items() if precision in offered]
        hint = f"{provider} has {', '.join(OFFERED[provider])}"
        hint += f"; {precision} is offered on {', '.join(where)}." if where else "."
        raise OptionError(f"Precision '{precision}' is not offered on {provider}.", hint)
    if facts.gates and provider not in STATE_PROVIDERS:
        raise OptionError(
            f"Models with linear attention are not offered on {provider}: vlpack has not been run with its operators "
            "there.",
            f"Offered: {', '.join(STATE_PROVIDERS)}.",
        )
    dtype = "float16" if precision == "fp16" or (precision == "int4" and provider != "cpu") else "float32"
    if options.mixed and precision != "int4":
        raise OptionError(
            f"{option('extra.matmul_mixed_precision')} needs the precision int4, not {precision}.",
            f"Choose {option('precision', 'int4')}, or leave the option out.",
        )
    if options.calibrated and precision not in ("int8", "int4"):
        raise OptionError(
            f"Calibration needs the precision int8 or int4, not {precision}.", f"Leave {option('calibrate')} out."
        )
    rules = (
        *_kept_rules(options, dtype),
        *_vision_rules(precision, provider, dtype, options),
        *([Rule("text.answers", Float("float32"))] if facts.scores else []),
        # gates decide for how long a state remembers: their errors grow exponentially, and they are small
        *([Rule("text.gate", Transposed("float32"))] if facts.gates else []),
        *_eight_bit_rules(precision, provider, options, facts),
        *_sensitive_rules(precision, provider, dtype, options, facts),
        *_expert_rules(precision, provider, dtype, options, facts.expert_size),
        *_text_rules(precision, provider, dtype, options, facts.width),
    )
    return Policy(precision, provider, dtype, rules, options)


def _kept_rules(options: QuantizationOptions, dtype: str) -> Iterator[Rule]:
    for rule in options.kept:
        layers = None if rule["layers"] is None else tuple(rule["layers"])
        yield Rule("*", storage_of(rule, dtype), rule["modules"], layers)


def default_block_size(precision: str, provider: str, bits: int, *, calibrated: bool = False) -> int:
    """The default block size of weights of ``bits`` bits in a package of that precision.

    Larger blocks have fewer scales to read and so take less time per token; their cost in accuracy was measured on the
    CPU (docs/results.md). For 4-bit weights a block size of 64 changes answers visibly, but calibrated weights in
    blocks of 128 are more accurate than uncalibrated ones in blocks of 32. The error of an int8 package is so small
    that a block size of 128 would be visible in it.
    """
    if provider == "cpu" and (bits == 8 or calibrated):
        return 128 if precision == "int4" else 64
    return 32


def _blocks(
    precision: str,
    provider: str,
    dtype: str,
    options: QuantizationOptions,
    bits: int,
    divided: int = 0,
    *,
    width: int = 0,
    calibrated: bool = False,
) -> Blocks:
    """Storage in blocks; a default block size divides ``divided`` if that is not 0, or else ``width`` if possible."""
    size = options.block_size or gcd(default_block_size(precision, provider, bits, calibrated=calibrated), divided)
    while not options.block_size and not divided and size > 32 and width % size:
        size //= 2  # a block that extends beyond the width would be padded
    # other providers have fp16 scales already, and narrow scales were not tried with the kernel for experts
    narrow = options.narrow_scales and bits == 4 and provider == "cpu" and dtype == "float32" and not divided
    symmetric = not (calibrated and provider == "cpu") if options.is_symmetric is None else options.is_symmetric
    return Blocks(bits, size, symmetric, dtype, options.accuracy_level, calibrated, narrow=narrow)


def _channels(options: QuantizationOptions) -> ChannelInt8:
    return ChannelInt8(signed=options.weight_type == "int8")


def _text_rules(precision: str, provider: str, dtype: str, options: QuantizationOptions, width: int) -> list[Rule]:
    if precision in ("fp32", "fp16"):
        kept = Float(dtype)
        return [Rule("text.embedding", kept), Rule("text.head", kept), Rule("text.*", Transposed(dtype))]
    # The head decides every token and the embedding feeds every layer, so both have 8 bits, in blocks along the row, so
    # that a tied pair is stored once. DirectML has only 4-bit kernels.
    bits = int(options.mixed.get("last_matmul", "int4" if provider == "dml" else "int8")[3:])
    fitted = options.calibrated and bits == 4
    head = _blocks(precision, provider, dtype, options, bits, width=width, calibrated=fitted)
    rules = [Rule("text.head", head)]
    if provider == "cpu":
        # the 8-bit rows from which a 4-bit head's likeliest tokens are scored again are the embedding's if it is tied
        table = _blocks(precision, provider, dtype, options, 8, width=width)
        rules += [Rule("text.embedding", table)]
        rules += [Rule("text.candidates", table)] if bits == 4 else []
    else:
        rules.append(Rule("text.embedding", Float(dtype)))
    if precision == "int8":
        return [*rules, Rule("text.*", replace(_channels(options), calibrated=options.calibrated))]
    matrices = _blocks(precision, provider, dtype, options, 4, width=width, calibrated=options.calibrated)
    return [*rules, Rule("text.*", matrices)]


def _sensitive_rules(
    precision: str, provider: str, dtype: str, options: QuantizationOptions, facts: PrecisionFacts
) -> list[Rule]:
    if "mixed_layers" not in options.mixed:
        return []
    bits = int(options.mixed["mixed_layers"][3:])
    storage = _blocks(precision, provider, dtype, options, bits)
    # the CPU's QMoE requires the same number of bits for all matrices of a layer's experts
    experts = _blocks(precision, provider, dtype, options, bits, facts.expert_size or 0)
    names = {"self_attn.qkv_proj": storage, "mlp.down_proj": storage, "mlp.experts.*": experts}
    if facts.gates:
        names["linear_attn.in_proj_qkv"] = storage
    layers = sensitive_layers(facts.num_hidden_layers)
    return [Rule("text.*", kept, f"*.layers.{layer}.{name}") for layer in layers for name, kept in names.items()]


def layer_and_name(path: str) -> tuple[int | None, str]:
    """The number of the layer or vision block that contains a module, None if there is none, and its path in it."""
    found = re.fullmatch(r"(?:.*\.)?(?:layers|blocks)\.(\d+)\.(.+)", path)
    return (int(found[1]), found[2]) if found else (None, path)


def _eight_bit_rules(precision: str, provider: str, options: QuantizationOptions, facts: PrecisionFacts) -> list[Rule]:
    """Rules for the 8-bit matrices of an int4 package, with one scale per channel: the CPU's fastest 8-bit product."""
    chosen = options.eight_bits
    if chosen is None:
        as_it_comes = precision == "int4" and provider == "cpu" and not options.calibrated
        mixed = "mixed_layers" in options.mixed
        chosen = default_eight_bits(facts.num_hidden_layers) if as_it_comes and not mixed else {}
    storage = replace(_channels(options), calibrated=options.calibrated)
    return [Rule("text.linear", storage, f"*.{name}", tuple(layers)) for name, layers in sorted(chosen.items())]


def default_eight_bits(num_hidden_layers: int) -> dict[str, Sequence[int]]:
    """The matrices that get 8 bits by default, because 4 bits usually harm them most: name in a layer → layers.

    They are all matrices of the first fourteenth of the layers and of the last layer, and attention, which is the
    smaller part of a layer, in the first two fifths. They take about as many additional bytes as 8-bit scales save
    (docs/results.md).
    """
    first = num_hidden_layers // 14
    if not first:
        return {}
    return {"*": [*range(first), num_hidden_layers - 1], "self_attn.*": range(first, num_hidden_layers * 2 // 5)}


def _expert_rules(
    precision: str, provider: str, dtype: str, options: QuantizationOptions, size: int | None
) -> list[Rule]:
    if size is None:
        return []
    if provider not in EXPERT_PROVIDERS:
        raise OptionError(
            f"Mixtures of experts are not offered on {provider}.", f"Offered: {', '.join(EXPERT_PROVIDERS)}."
        )
    # the choice of experts must not depend on rounding, and the router is small
    router = Rule("text.router", Transposed("float32"))
    if precision in ("fp32", "fp16"):
        return [router, Rule("text.expert", Float(dtype))]
    bits = 8 if precision == "int8" else 4
    storage = _blocks(precision, provider, dtype, options, bits, size, calibrated=options.calibrated)
    if size % storage.block_size or storage.block_size not in BLOCK_SIZES:
        block_size = options.block_size or min(BLOCK_SIZES)
        raise OptionError(
            f"{option('extra.block_size', block_size)} does not divide the experts' sizes "
            f"(multiples of {size}), as QMoE requires.",
            "Choose a smaller block size." if block_size > min(BLOCK_SIZES) else "Choose another precision.",
        )
    return [router, Rule("text.expert", storage)]


def _vision_rules(precision: str, provider: str, dtype: str, options: QuantizationOptions) -> list[Rule]:
    # 4 bits change image features visibly; with 8 bits no loss was found in the digits checkpoint or its features
    default = {"int4": "int8" if provider == "cpu" else "fp16"}.get(precision, precision)
    vision = options.vision or default
    if vision not in OFFERED[provider]:
        raise OptionError(
            f"Vision precision '{vision}' is not offered on {provider}.", f"Offered: {', '.join(OFFERED[provider])}."
        )
    if vision == "int8":
        storage: Storage = _channels(options)
    elif vision == "int4":
        storage = _blocks(precision, provider, dtype, options, 4)
    else:
        storage = Transposed("float16" if vision == "fp16" else "float32")
    kept = storage.dtype if isinstance(storage, Transposed) else dtype
    rules = [Rule("vision.table", Float("float32")), Rule("vision.patches", Transposed(kept))]
    if vision == "int8":
        # the features are this matrix's output: quantizing it would cause half of their error, for 1/40 of the products
        rules.append(Rule("vision.output", Transposed("float32")))
    return [*rules, Rule("vision.*", storage)]


def sensitive_layers(num_hidden_layers: int) -> list[int]:
    """The layers that llama.cpp stores in more bits: the first and last eighth, and every third one between them."""
    eighth = num_hidden_layers // 8
    return [
        layer
        for layer in range(num_hidden_layers)
        if layer < eighth or layer >= num_hidden_layers - eighth or (layer - eighth) % 3 == 2
    ]
