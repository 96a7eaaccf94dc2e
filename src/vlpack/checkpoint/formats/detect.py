"""Reads and checks the declaration of a checkpoint's quantization, its method and parameters, without reading weights.

A method that vlpack does not read is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.config import Section
from vlpack.checkpoint.files import quote
from vlpack.checkpoint.gguf import Gguf
from vlpack.errors import CheckpointError

SECTIONS = {
    "quantization_config": "quantization_config",
    "compression_config": "compression_config of llm-compressor",
    "quantization": "quantization of MLX",
}
"""Objects in config.json that mark a quantized checkpoint, and their names in messages."""

FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "AutoGPTQ", "quant_config.json": "AutoAWQ"}
"""Settings files of quantized checkpoints beside config.json, and the tools that write them."""

ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_scale": "FP8, FP4 or INT8 with scales",
    ".weight_scale_2": "FP4 of ModelOpt",
    ".weight_global_scale": "FP4 of compressed-tensors",
    ".input_scale": "activations with scales",
    ".scales": "MLX, GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
}
"""Endings of tensor names that no unquantized model of the supported families has, and the methods that use them."""

READ = "compressed-tensors (pack-, int- and float-quantized), AWQ gemm, GPTQ, AutoRound, FP8 and bitsandbytes"
"""The formats that are read, for messages."""
HINT = f"Use the original checkpoint, in bfloat16 or float32, or one in a format that vlpack reads: {READ}."
"""Hint of errors about formats that are not read."""

ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
"""ModelOpt's algorithms whose weights are FP8 with scales per tensor or per channel."""
NVFP4 = "NVFP4, 4-bit floating point with scales for 16 values"
MXFP4 = "MXFP4, 4-bit floating point with scales for 32 values"
"""Descriptions of formats that are not read, for messages."""
MAX_GROUP = 1 << 20
"""Largest group or block size that is accepted."""


@dataclass(frozen=True)
class Scheme:
    """The declared quantization of some weights by compressed-tensors.

    Args:
        kind: ``int`` or ``float``.
        bits: bits of a code.
        strategy: extent of a scale: ``tensor``, ``channel``, ``group`` or ``block``.
        group_size: number of columns that share a scale, for the strategy ``group``.
        block: numbers of rows and columns that share a scale, for the strategy ``block``.
        symmetric: whether weights have no zero points.
    """

    kind: str
    bits: int
    strategy: str
    group_size: int = 0
    block: tuple[int, int] | None = None
    symmetric: bool = True


@dataclass(frozen=True)
class Declared:
    """The quantization that a checkpoint declares.

    Args:
        method: name of the method, as in ``quant_method``; it decides which tensors are read, and how.
        where: place of the declaration, such as ``quantization_config in config.json``, for messages.
        label: description of the format for users, such as ``GPTQ, 4 bits, groups of 128``.
        bits: bits of the smallest codes, 4 or 8.
        group_size: number of columns that share a scale, for AWQ and GPTQ; -1 for one scale per row.
        varies: whether bits and group size differ from module to module, so that the tensors decide.
        first_version: whether zero points are stored less 1, as in the first version of GPTQ's format.
        block: numbers of rows and columns that share a scale, for FP8 in blocks.
        schemes: declared schemes of compressed-tensors.
        skipped: modules that are declared not to be quantized. The tensors decide; this list is for descriptions.
    """

    method: str
    where: str
    label: str
    bits: int
    group_size: int = -1
    varies: bool = False
    first_version: bool = True
    block: tuple[int, int] | None = None
    schemes: tuple[Scheme, ...] = ()
    skipped: tuple[str, ...] = ()


def detect(checkpoint: Checkpoint) -> Declared | None:
    """The quantization that a checkpoint declares; None if it is not quantized.

    Raises:
        CheckpointError: the method is not one that vlpack reads, the declaration is damaged, or only the names of
            tensors show that the checkpoint is quantized, so that nothing tells how to read them.
    """
    if isinstance(checkpoint, Gguf):
        return _gguf(checkpoint)
    found = next(_declarations(checkpoint), None)
    if found is None:
        for name in checkpoint.tensors:
            for end, what in ENDINGS.items():
                if name.endswith(end):
                    raise refused(
                        checkpoint,
                        f"{what}: it has the tensor {quote(name)}",
                        "and no config.json or other file of it says how",
                    )
        return None
    section, where = found
    declared = _read(checkpoint, section, where)
    skipped: list[str] = []
    for key in ("ignore", "modules_to_not_convert", "llm_int8_skip_modules", "exclude_modules"):
        names = section.values.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{section.where}: '{key}' must be a list of names of modules.")
        skipped += names
    return replace(declared, skipped=tuple(skipped))


def _gguf(checkpoint: Gguf) -> Declared | None:
    """The quantization of a GGUF file, from the types of its tensors; None if no tensor is stored in blocks."""
    kinds = list(checkpoint.block_values())
    if not kinds:
        return None
    # the most frequent type decides, because files with 4 bits store some matrices in 5 or 6 bits
    label = f"GGUF, {' and '.join(kind.name for kind in kinds)}"
    return Declared("gguf", f"GGUF, {checkpoint.place.name}", label, 4 if kinds[0].bits <= 4 else 8)


def refused(checkpoint: Checkpoint, what: str, why: str = "which vlpack does not read") -> CheckpointError:
    """The error for a quantized checkpoint that cannot be built."""
    return CheckpointError(f"{checkpoint.folder}: the checkpoint is already quantized ({what}), {why}.", HINT)


def _declarations(checkpoint: Checkpoint) -> Iterator[tuple[Section, str]]:
    """Yields the declarations of a checkpoint, most important first: the object, and its place for messages."""
    config_file = str(checkpoint.folder / "config.json")
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        for name, what in SECTIONS.items():
            given = config.get(name)
            if given is None:
                continue
            if name == "quantization":
                raise refused(checkpoint, f"{what} in config.json")
            if not isinstance(given, dict):
                raise CheckpointError(f"{config_file}: '{name}' must be an object.", HINT)
            values = dict(given)
            if name == "compression_config":
                values.setdefault("quant_method", "compressed-tensors")
            yield Section(values, f"{config_file}: {name}"), f"{what} in config.json"
    for file, tool in FILES.items():
        settings = checkpoint.json(file) or {}
        nested = settings.get("quantization")
        values = dict(nested if isinstance(nested, dict) else settings)
        method = next((values[key] for key in ("quant_algo", "quant_method", "bits", "w_bit") if values.get(key)), None)
        if method is None:
            continue  # ModelOpt writes its file for unquantized models too, without a method
        shown = f"{method} bits" if isinstance(method, int) else quote(method)
        if tool == "AutoAWQ":
            values = {"bits": values.get("w_bit"), "group_size": values.get("q_group_size"), **values}
        kind = {"ModelOpt": "modelopt", "AutoGPTQ": "gptq", "AutoAWQ": "awq"}[tool]
        values["quant_method"] = kind
        yield Section(values, str(checkpoint.folder / file)), f"{shown}, as {tool}'s {file} says"


def _read(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """Reads a declaration with the reader of its method.

    Args:
        checkpoint: the checkpoint, for messages.
        section: the object with the declaration.
        where: its place, for messages.

    Raises:
        CheckpointError: the method is not read, or the declaration is damaged.
    """
    method = section.values.get("quant_method")
    readers = {
        "compressed-tensors": _compressed,
        "awq": _awq,
        "gptq": _gptq,
        "auto-round": _auto_round,
        "fp8": _fp8,
        "bitsandbytes": _bitsandbytes,
        "modelopt": _modelopt,
    }
    if method == "mxfp4":
        raise refused(checkpoint, f"{MXFP4}; {where}")
    if not isinstance(method, str) or method not in readers:
        name = "of no method that it names" if method is None else f"by the method {quote(method)}"
        raise refused(checkpoint, f"{where}, {name}")
    return readers[method](checkpoint, section, where)


def _group_size(section: Section, default: int | None = None) -> int:
    """A declared group size: -1 for one group per row, or the number of columns of a group."""
    size = section.integer("group_size", default, low=-1, high=MAX_GROUP)
    if size == 0:
        raise CheckpointError(f"{section.where}: 'group_size' is 0; it must be -1 or the number of columns of a group.")
    return size


def _groups(size: int) -> str:
    """The description of a group size for users."""
    return "one scale per row" if size == -1 else f"groups of {size}"


def _awq(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """The declaration of AWQ."""
    version = str(section.values.get("version", "gemm")).lower()
    bits = section.integer("bits", high=64)
    if version != "gemm" or bits != 4:
        raise refused(checkpoint, f"AWQ {quote(version)} with {bits} bits; {where}")
    if not section.flag("zero_point", True):
        raise refused(checkpoint, f"AWQ without zero points; {where}")
    size = _group_size(section, 128)
    return Declared("awq", where, f"AWQ, 4 bits, {_groups(size)}", 4, size)


def _gptq(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """The declaration of GPTQ, in either version of its format."""
    bits, size = section.integer("bits", high=64), _group_size(section, -1)
    form = section.values.get("checkpoint_format") or section.values.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2") or bits not in (4, 8):
        raise refused(checkpoint, f"GPTQ in the format {quote(form)} with {bits} bits; {where}")
    order = ", desc_act" if section.values.get("desc_act") is True else ""
    label = f"GPTQ, {bits} bits, {_groups(size)}{order}"
    return Declared("gptq", where, label, bits, size, bool(section.values.get("dynamic")), form == "gptq")


def _auto_round(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """AutoRound's own declaration of the layouts of GPTQ's first version (``auto_gptq``) and AWQ (``auto_awq``)."""
    packing = str(section.values.get("packing_format", "auto_round:auto_gptq"))
    bits, size = section.integer("bits", high=64), _group_size(section, 128)
    plain = section.values.get("data_type", "int") == "int" and not section.values.get("rotation_config")
    known = packing.endswith((":auto_gptq", ":auto_awq"))
    if not (plain and known) or bits not in ((4,) if "awq" in packing else (4, 8)):
        raise refused(checkpoint, f"AutoRound in the format {quote(packing)} with {bits} bits; {where}")
    label, varies = f"AutoRound, {bits} bits, {_groups(size)}", bool(section.values.get("extra_config"))
    if "awq" in packing:
        return Declared("awq", where, label, bits, size)
    return Declared("gptq", where, label, bits, size, varies)


def _fp8(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """The declaration of FP8 as transformers writes it, with or without blocks."""
    if section.values.get("fmt", "e4m3") != "e4m3":
        raise refused(checkpoint, f"FP8 of the type {quote(section.values['fmt'])}; {where}")
    if section.values.get("weight_block_size") is None:
        return Declared("fp8", where, "FP8", 8)
    block = _pair(section, "weight_block_size")
    return Declared("fp8", where, f"FP8 in blocks of {block[0]} × {block[1]}", 8, block=block)


def _pair(section: Section, name: str) -> tuple[int, int]:
    """The numbers of rows and of columns of a block, from a setting."""
    sizes = section.integers(name, low=1, high=MAX_GROUP)
    if len(sizes) != 2:
        raise CheckpointError(f"{section.where}: '{name}' must be two numbers, of rows and of columns.")
    return sizes[0], sizes[1]


def _bitsandbytes(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """The declaration of bitsandbytes, in 4 or 8 bits."""
    four, eight = (section.flag(name, False) for name in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        raise CheckpointError(f"{section.where}: one of 'load_in_4bit' and 'load_in_8bit' must be true.")
    kind = str(section.values.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    if kind not in ("nf4", "fp4", "int8"):
        raise refused(checkpoint, f"bitsandbytes of the type {quote(kind)}; {where}")
    return Declared("bitsandbytes", where, f"bitsandbytes {kind}", 4 if four else 8)


def _modelopt(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """The declaration of ModelOpt, of which only FP8 is read."""
    values = section.values
    layers = values.get("quantized_layers")
    each = layers.values() if isinstance(layers, dict) else []
    algorithms = {str(values.get("quant_algo"))} - {"None", "MIXED_PRECISION"}
    algorithms |= {str(one.get("quant_algo")) for one in each if isinstance(one, dict)}
    for scheme in _schemes(checkpoint, section, where) if isinstance(values.get("config_groups"), dict) else ():
        algorithms.add("FP8" if (scheme.kind, scheme.bits) == ("float", 8) else f"{scheme.kind}{scheme.bits}")
    if not algorithms:
        raise CheckpointError(f"{section.where} does not say which algorithm ModelOpt used (quant_algo).", HINT)
    for name in sorted(algorithms - set(ALGORITHMS)):
        raise refused(checkpoint, f"{NVFP4 if 'FP4' in name else name} of ModelOpt; {where}")
    return Declared("modelopt", where, "FP8 of ModelOpt", 8)


def _compressed(checkpoint: Checkpoint, section: Section, where: str) -> Declared:
    """The declaration of compressed-tensors, with all its schemes."""
    form = str(section.values.get("format", "pack-quantized"))
    sparsity = section.values.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else str(sparsity)
    if "nvfp4" in form or "mxfp4" in form:
        raise refused(checkpoint, f"{NVFP4 if 'nvfp4' in form else MXFP4}, of compressed-tensors; {where}")
    if sparse != "dense":
        raise refused(checkpoint, f"sparse weights of compressed-tensors, {quote(sparse)}; {where}")
    if section.values.get("transform_config"):
        raise refused(checkpoint, f"compressed-tensors with transforms of the activations; {where}")
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
    if form not in known:
        raise refused(checkpoint, f"compressed-tensors in the format {quote(form)}; {where}")
    schemes = tuple(_schemes(checkpoint, section, where))
    if not schemes:
        raise CheckpointError(f"{section.where}: 'config_groups' names no quantized weights.", HINT)
    for scheme in schemes:
        if (scheme.kind, scheme.bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise refused(checkpoint, f"compressed-tensors with {scheme.bits} bits of the type {scheme.kind}; {where}")
    labels = dict.fromkeys(_scheme_label(scheme) for scheme in schemes)
    bits = min(scheme.bits for scheme in schemes)
    return Declared("compressed-tensors", where, f"compressed-tensors, {'; '.join(labels)}", bits, schemes=schemes)


def _scheme_label(scheme: Scheme) -> str:
    """The description of a scheme for users."""
    extent = {
        "tensor": "one scale per matrix",
        "channel": "one scale per row",
        "group": f"groups of {scheme.group_size}",
        "block": "blocks of {} × {}".format(*(scheme.block or (0, 0))),
    }[scheme.strategy]
    kind = "FP8" if scheme.kind == "float" else f"{scheme.bits} bits"
    return f"{kind}, {extent}" + ("" if scheme.symmetric else ", zero points")


def _schemes(checkpoint: Checkpoint, section: Section, where: str) -> Iterator[Scheme]:
    """Yields the schemes of ``config_groups`` that quantize weights."""
    groups = section.section("config_groups")
    if len(groups.values) > 10_000:
        raise CheckpointError(f"{groups.where} has more than 10000 entries.")
    for name in groups.values:
        one = groups.section(name)
        if one.values.get("weights") is None:
            continue
        weights = one.section("weights")
        form = str(one.values.get("format") or "")
        kind, bits = weights.choice("type", ["int", "float"], "int"), weights.integer("num_bits", 8, high=64)
        size = weights.values.get("group_size")
        if kind == "float" and bits == 4:
            what = MXFP4 if size == 32 or "mx" in form else NVFP4
            raise refused(checkpoint, f"{what}; {where}")
        strategy = weights.values.get("strategy")
        if strategy is None:  # as compressed-tensors infers it
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        if strategy not in ("tensor", "channel", "group", "block"):
            raise refused(checkpoint, f"compressed-tensors with the strategy {quote(strategy)}; {where}")
        if strategy == "group" and size == -1:
            strategy = "channel"
        yield Scheme(
            kind,
            bits,
            strategy,
            weights.integer("group_size", low=1, high=MAX_GROUP) if strategy == "group" else 0,
            _pair(weights, "block_structure") if strategy == "block" else None,
            weights.flag("symmetric", True),
        )
