"""The precision policy, as data: which storage each weight gets, and the dtype of what flows between them.

A policy is a list of rules, of which the first that fits decides. A rule goes by a weight's *role*, what it is for:
``text.`` or ``vision.`` and then ``linear``, ``embedding``, ``head``, ``answers``, ``router``, ``expert``, ``output``
(the last matrix of a vision encoder), ``table`` or ``patches``. It may also go by the path of its module, which is the
checkpoint's, with q/k/v and gate/up joined:
``model.language_model.layers.3.self_attn.qkv_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import gcd

import onnx_ir as ir

from vlpack.errors import OptionError
from vlpack.quantize.rotate import rotation_size
from vlpack.storage import Blocks, ChannelInt8, Float, Storage, Transposed

PRECISIONS = ("fp32", "fp16", "int8", "int4")

OFFERED: Mapping[str, tuple[str, ...]] = {
    "cpu": PRECISIONS,
    "cuda": ("fp32", "fp16", "int4"),
    "dml": ("fp16", "int4"),
    "webgpu": ("fp16", "int4"),
}
"""Execution provider → its precisions. int8 is the CPU's own: other providers lack DynamicQuantizeMatMul."""

ROLES = tuple(f"text.{kind}" for kind in ("linear", "embedding", "head", "answers", "router", "expert"))
ROLES += tuple(f"vision.{kind}" for kind in ("linear", "output", "table", "patches"))
"""What a weight may be for."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Values that may share a scale."""

LARGEST_ROTATION = 64
"""Channels that are mixed where the graph rotates: a larger block costs more time (docs/results.md)."""

BALANCE_TOLERANCE = 8.0
"""Of 4-bit weights: how far a channel may be out of proportion before it is rescaled (docs/results.md)."""

EXPERT_PROVIDERS = ("cpu", "cuda")
"""Those with kernels for ORT's MoE and QMoE operators as they are used here."""


@dataclass(frozen=True)
class Rule:
    """Weights of a role, in modules whose paths match, and how they are stored; both are patterns (fnmatch).

    Args:
        role: a pattern.
        storage: of these weights.
        modules: a pattern.
        layers: only modules in these layers of the decoder; None for all.
    """

    role: str
    storage: Storage
    modules: str = "*"
    layers: tuple[int, ...] | None = None

    def fits(self, role: str, path: str) -> bool:
        """Whether it says how the weight of the module at ``path``, whose role is ``role``, is stored."""
        if not (fnmatchcase(role, self.role) and fnmatchcase(path, self.modules)):
            return False
        return self.layers is None or layer_and_name(path)[0] in self.layers

    def described(self) -> dict[str, str]:
        """As JSON."""
        some = "" if self.layers is None else f" in layers {', '.join(map(str, self.layers))}"
        return {"role": self.role, "modules": self.modules + some, "storage": self.storage.label}


@dataclass(frozen=True)
class PrecisionFacts:
    """What a policy must know of a model.

    Args:
        num_hidden_layers: of the decoder.
        expert_size: features that the blocks of an expert's weights must divide; None where there are no experts.
        scores: it is a reranker, whose result hangs on two rows of the head.
        width: features that the inputs of the decoder's matrices are multiples of; 0 where that is not known.
    """

    num_hidden_layers: int = 1
    expert_size: int | None = None
    scores: bool = False
    width: int = 0


@dataclass(frozen=True)
class QuantizationOptions:
    """What can be chosen about quantized weights, and about the cache.

    Args:
        block_size: values that share a scale, in all weights in blocks; None for `default_block_size`.
        is_symmetric: no zero points; None for all weights but calibrated 4-bit ones, in whose larger blocks zero points
            take no time on the CPU.
        accuracy_level: of MatMulNBits on the CPU: 1 computes with fp32 activations, 4 with 8-bit ones.
        weight_type: of int8 matrices, ``int8`` or ``uint8``; see `vlpack.storage.ChannelInt8`.
        mixed: selector → ``int4`` or ``int8`` for parts of the decoder, as the builder's ``matmul_mixed_precision``.
        vision: precision of the vision encoder where it is not to follow from the package's.
        kv_cache: ``int8``, or None to keep keys and values in the dtype of the activations.
        calibrated: 4-bit matrices, or those of int8, of the decoder are rounded for the inputs that they meet.
        balance: no channel is much larger than others, where weights are quantized (`vlpack.quantize.rotate`); None
            for where it pays.
        rotation: blocks of channels are rotated, likewise; True also where weights are floats, which changes nothing
            but rounding.
        eight_bits: matrices of an int4 package's decoder that have 8 bits: name in a layer, such as ``mlp.down_proj``,
            or ``*`` for all, → layers; None for `outer_layers`, where nothing else was chosen.
        narrow_scales: scales of 4-bit blocks lie in the file in 8 bits on the CPU, but for those of experts.
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


@dataclass(frozen=True)
class Policy:
    """How a package is stored and computed; printed by ``inspect``, written to the manifest.

    Args:
        precision: its name, one of `PRECISIONS`.
        provider: the execution provider it is made for.
        dtype: of activations: ``float32`` or ``float16``. Norms, rotary angles and residual sums are fp32 in both.
        rules: the first that fits wins.
        options: the choices that they were made by.
    """

    precision: str
    provider: str
    dtype: str
    rules: tuple[Rule, ...]
    options: QuantizationOptions

    def storage(self, role: str, path: str = "") -> Storage:
        """How the weight of the module at ``path`` is kept, whose role is ``role``."""
        assert role in ROLES, f"{role} at {path} is no role"
        for rule in self.rules:
            if rule.fits(role, path):
                return rule.storage
        raise AssertionError(f"no rule for {role} at {path}: the last rule must match everything")

    def rotation(self, storage: Storage | None, cols: int) -> int:
        """Size of the blocks of columns that are rotated in a weight of that storage; 1 for none."""
        chosen = self.options.rotation
        quantized = isinstance(storage, Blocks | ChannelInt8)
        wanted = (quantized and self.provider == "cpu") if chosen is None else chosen
        return rotation_size(cols, LARGEST_ROTATION) if wanted else 1

    def balance(self, storage: Storage | None) -> float | None:
        """How the channels that a weight of that storage reads are balanced; None where they are not.

        0 makes the readers' columns equally large, other numbers are tolerances of `vlpack.quantize.rotate.even_sizes`.
        """
        quantized = isinstance(storage, Blocks | ChannelInt8)
        if self.options.balance is False or not (quantized or self.options.balance):
            return None
        if isinstance(storage, Blocks) and storage.bits == 4:
            return BALANCE_TOLERANCE
        # where the activations' sizes are known, they and the weights are made alike, which costs either least
        return 1.0 if isinstance(storage, ChannelInt8) and storage.calibrated else 0.0

    @property
    def ir_dtype(self) -> ir.DataType:
        """`dtype` as onnx_ir has it."""
        return ir.DataType.FLOAT if self.dtype == "float32" else ir.DataType.FLOAT16

    @property
    def cache(self) -> str:
        """The dtype of keys and values."""
        return self.options.kv_cache or self.dtype

    def described(self) -> list[dict[str, str]]:
        """The rules as JSON."""
        return [rule.described() for rule in self.rules]


def make_policy(
    precision: str, provider: str, options: QuantizationOptions, facts: PrecisionFacts = PrecisionFacts()
) -> Policy:
    """The policy of a precision on an execution provider.

    Raises:
        OptionError: the pair, or an option with it, is not offered.
    """
    if provider not in OFFERED:
        raise OptionError(f"Unknown execution provider '{provider}'.", "Offered: " + ", ".join(OFFERED) + ".")
    if precision not in OFFERED[provider]:
        where = [name for name, offered in OFFERED.items() if precision in offered]
        hint = f"{provider} has {', '.join(OFFERED[provider])}"
        hint += f"; {precision} is offered on {', '.join(where)}." if where else "."
        raise OptionError(f"Precision '{precision}' is not offered on {provider}.", hint)
    dtype = "float16" if precision == "fp16" or (precision == "int4" and provider != "cpu") else "float32"
    if options.mixed and precision != "int4":
        raise OptionError("matmul_mixed_precision goes with int4.", f"The precision is {precision}.")
    if options.calibrated and precision not in ("int8", "int4"):
        raise OptionError("Calibration goes with int8 and int4.", f"{precision} needs none: leave --calibrate away.")
    rules = (
        *_vision_rules(precision, provider, dtype, options),
        *([Rule("text.answers", Float("float32"))] if facts.scores else []),
        *_eight_bit_rules(precision, provider, options, facts),
        *_sensitive_rules(precision, provider, dtype, options, facts),
        *_expert_rules(precision, provider, dtype, options, facts.expert_size),
        *_text_rules(precision, provider, dtype, options, facts.width),
    )
    return Policy(precision, provider, dtype, rules, options)


def default_block_size(precision: str, provider: str, bits: int, *, calibrated: bool = False) -> int:
    """Of weights of ``bits`` bits in a package of that precision.

    More values to a scale are less to read, and so less time a token; what they cost was measured on the CPU
    (docs/results.md). In 4 bits 64 shows in the answers, but calibrated ones of 128 are nearer than others of 32. An
    int8 package has so small an error that 128 show in it.
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
    """Blocks as the options have them, or by default, whose size then divides ``divided``, or if it can ``width``."""
    size = options.block_size or gcd(default_block_size(precision, provider, bits, calibrated=calibrated), divided)
    while not options.block_size and not divided and size > 32 and width % size:
        size //= 2  # of a block that the width cuts, the rest would be padding
    # other providers' scales are fp16 as they are; experts' kernel was not tried with others than its own
    narrow = options.narrow_scales and bits == 4 and provider == "cpu" and dtype == "float32" and not divided
    symmetric = not (calibrated and provider == "cpu") if options.is_symmetric is None else options.is_symmetric
    return Blocks(bits, size, symmetric, dtype, options.accuracy_level, calibrated, narrow=narrow)


def _channels(options: QuantizationOptions) -> ChannelInt8:
    return ChannelInt8(signed=options.weight_type == "int8")


def _text_rules(precision: str, provider: str, dtype: str, options: QuantizationOptions, width: int) -> list[Rule]:
    if precision in ("fp32", "fp16"):
        kept = Float(dtype)
        return [Rule("text.embedding", kept), Rule("text.head", kept), Rule("text.*", Transposed(dtype))]
    # The head decides every token and the embedding feeds every layer: 8 bits, in blocks along the row, so that a tied
    # pair is stored once. DirectML has 4-bit kernels only.
    bits = int(options.mixed.get("last_matmul", "int4" if provider == "dml" else "int8")[3:])
    fitted = options.calibrated and bits == 4
    head = _blocks(precision, provider, dtype, options, bits, width=width, calibrated=fitted)
    # a table is looked up and multiplies nothing, so that there is nothing to fit it to
    table = _blocks(precision, provider, dtype, options, 8, width=width) if fitted else head
    embedding: Storage = table if provider == "cpu" else Float(dtype)
    rules = [Rule("text.embedding", embedding), Rule("text.head", head)]
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
    # the CPU's QMoE has one width for all of a layer's experts
    experts = _blocks(precision, provider, dtype, options, bits, facts.expert_size or 0)
    names = {"self_attn.qkv_proj": storage, "mlp.down_proj": storage, "mlp.experts.*": experts}
    layers = sensitive_layers(facts.num_hidden_layers)
    return [Rule("text.*", kept, f"*.layers.{layer}.{name}") for layer in layers for name, kept in names.items()]


def layer_and_name(path: str) -> tuple[int | None, str]:
    """The decoder's layer that a module is in, None where it is in none, and its path in there."""
    found = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.+)", path)
    return (int(found[1]), found[2]) if found else (None, path)


def _eight_bit_rules(precision: str, provider: str, options: QuantizationOptions, facts: PrecisionFacts) -> list[Rule]:
    """The CPU's fastest product of 8 bits: a scale per channel, in activations per token."""
    chosen = options.eight_bits
    if chosen is None:
        as_it_comes = precision == "int4" and provider == "cpu" and not options.calibrated
        outer = outer_layers(facts.num_hidden_layers)
        chosen = {"*": outer} if as_it_comes and outer and "mixed_layers" not in options.mixed else {}
    storage = replace(_channels(options), calibrated=options.calibrated)
    return [Rule("text.linear", storage, f"*.{name}", tuple(layers)) for name, layers in sorted(chosen.items())]


def outer_layers(num_hidden_layers: int) -> list[int]:
    """Those that suffer most from 4 bits where nothing was measured: the first seventh and the last.

    They take what scales of 8 bits save (docs/results.md).
    """
    first = list(range(num_hidden_layers // 7))
    return [*first, num_hidden_layers - 1] if first else []


def _expert_rules(
    precision: str, provider: str, dtype: str, options: QuantizationOptions, size: int | None
) -> list[Rule]:
    if size is None:
        return []
    if provider not in EXPERT_PROVIDERS:
        raise OptionError(
            f"Mixtures of experts are not offered on {provider}.", f"Offered: {', '.join(EXPERT_PROVIDERS)}."
        )
    # which experts a token goes to must not hang on rounding, and the router is small
    router = Rule("text.router", Transposed("float32"))
    if precision in ("fp32", "fp16"):
        return [router, Rule("text.expert", Float(dtype))]
    storage = _blocks(precision, provider, dtype, options, 8 if precision == "int8" else 4, size)
    if size % storage.block_size or storage.block_size not in BLOCK_SIZES:
        block_size = options.block_size or min(BLOCK_SIZES)
        raise OptionError(
            f"block_size={block_size} does not divide the experts' sizes (by {size}), which QMoE needs.",
            "Choose a smaller one." if block_size > min(BLOCK_SIZES) else "Choose another precision.",
        )
    return [router, Rule("text.expert", storage)]


def _vision_rules(precision: str, provider: str, dtype: str, options: QuantizationOptions) -> list[Rule]:
    # 4-bit vision changes what the model sees; 8 bits cost it nothing that the digits checkpoint or its features show
    default = {"int4": "int8" if provider == "cpu" else "fp16"}.get(precision, precision)
    vision = options.vision or default
    if vision not in OFFERED[provider]:
        raise OptionError(f"Vision precision '{vision}' is not offered on {provider}.")
    if vision == "int8":
        storage: Storage = _channels(options)
    elif vision == "int4":
        storage = _blocks(precision, provider, dtype, options, 4)
    else:
        storage = Transposed("float16" if vision == "fp16" else "float32")
    kept = storage.dtype if isinstance(storage, Transposed) else dtype
    rules = [Rule("vision.table", Float("float32")), Rule("vision.patches", Transposed(kept))]
    if vision == "int8":
        # what this matrix loses is in the features as it is: half of their error, for a fortieth of the products
        rules.append(Rule("vision.output", Transposed("float32")))
    return [*rules, Rule("vision.*", storage)]


def sensitive_layers(num_hidden_layers: int) -> list[int]:
    """Layers whose weights suffer most from 4 bits: the first and last eighth, and every third between (llama.cpp)."""
    eighth = num_hidden_layers // 8
    return [
        layer
        for layer in range(num_hidden_layers)
        if layer < eighth or layer >= num_hidden_layers - eighth or (layer - eighth) % 3 == 2
    ]
