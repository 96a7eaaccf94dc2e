"""The settings of a LoRA adapter, read from ``adapter_config.json``; unsupported ones that affect a merge are errors.

Source: ``LoraConfig`` and ``get_pattern_key`` of peft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vlpack.checkpoint.config import Section
from vlpack.checkpoint.files import quote
from vlpack.errors import CheckpointError

T = TypeVar("T")
Patterns = tuple[tuple["re.Pattern[str]", T], ...]

MERGE_WITH_PEFT = "If peft can merge it (merge_and_unload, then save_pretrained), build from the result."

WITHOUT_EFFECT = frozenset(
    {
        # origin, training, and target modules, which the names of the tensors show anyway
        *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
        *("runtime_config", "megatron_core"),
        # settings of initializations that `init_lora_weights` names, and of a variant with its own switch (QALoRA)
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        # settings of ms-swift: learning rates, and the dtype that the tensors were trained in
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
    }
)
"""Settings that do not affect how a trained adapter is merged, whatever their values are."""

READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias"),
        *("modules_to_save", "lora_bias", "ensure_weight_tying", "init_lora_weights"),
    }
)
"""Settings that `LoraConfig.read` interprets. Others must be off unless they are `WITHOUT_EFFECT`."""

VARIANTS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "target_parameters": "LoRA on bare parameters, such as fused experts,",
    "trainable_token_indices": "training single tokens of the embedding",
    "layer_replication": "replicating layers",
    "alora_invocation_tokens": "Activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "megatron_config": "Megatron's layers",
}
"""Settings that switch on an unsupported variant of LoRA, and that variant's name in messages."""

PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
"""Initializations (``init_lora_weights``) that leave the base model unchanged; PiSSA, OLoRA and others change it."""


@dataclass(frozen=True)
class LoraConfig:
    """The settings of a LoRA adapter that a merge needs, under peft's names.

    Args:
        r: rank of the two factors ``A`` and ``B``.
        lora_alpha: numerator of the scaling.
        use_rslora: whether the scaling is ``lora_alpha / √r`` instead of ``lora_alpha / r``.
        rank_pattern: (pattern of module paths, rank) for modules whose rank is not ``r``; the first match decides.
        alpha_pattern: (pattern of module paths, alpha) for modules whose alpha is not ``lora_alpha``.
        modules_to_save: endings of the paths of modules that were trained in full.
        lora_bias: whether every ``B`` has a bias.
        ensure_weight_tying: whether a tied embedding and head stay tied although one of them was trained.
        base_model_name_or_path: the model that the adapter was trained on; None if it is not recorded.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    modules_to_save: tuple[str, ...]
    lora_bias: bool
    ensure_weight_tying: bool
    base_model_name_or_path: str | None

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> LoraConfig:
        """Reads the settings from a parsed ``adapter_config.json``.

        Args:
            values: the parsed JSON object.
            where: path of the file, for messages.

        Raises:
            CheckpointError: a setting is malformed, unknown, or asks for a method that vlpack does not merge.
        """
        config = Section(values, where)
        kind = values.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{where}: the adapter's peft_type is {quote(kind)}; only LORA is merged.")
        for name, value in values.items():
            if value and name not in READ and name not in WITHOUT_EFFECT:
                what = VARIANTS.get(name)
                reason = f"{what} is not supported" if what else "vlpack does not know this setting"
                raise CheckpointError(f"{where}: {quote(name)} is {quote(value)}; {reason}.", MERGE_WITH_PEFT)
        begun = values.get("init_lora_weights")
        if not (begun is None or isinstance(begun, bool) or begun in PLAIN_BEGINNINGS):
            raise CheckpointError(
                f"{where}: init_lora_weights is {quote(begun)}, which changes the base model before training.",
                "Save it again with save_pretrained(…, path_initial_model_for_weight_conversion=…), as peft describes.",
            )
        if config.flag("fan_in_fan_out", False):
            raise CheckpointError(f"{where}: fan_in_fan_out is true; no module of these models is stored that way.")
        config.choice("bias", ("none", "all", "lora_only"), "none")
        base = values.get("base_model_name_or_path")
        return cls(
            r=config.integer("r", 8),
            lora_alpha=config.number("lora_alpha", 8),
            use_rslora=config.flag("use_rslora", False),
            rank_pattern=_patterns(config, "rank_pattern", Section.integer),
            alpha_pattern=_patterns(config, "alpha_pattern", Section.number),
            modules_to_save=_names(config, "modules_to_save"),
            lora_bias=config.flag("lora_bias", False),
            ensure_weight_tying=config.flag("ensure_weight_tying", False),
            base_model_name_or_path=base if isinstance(base, str) and base else None,
        )

    def rank(self, module: str) -> int:
        """The rank of the LoRA on a module, given by its path at training time."""
        return _first(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """The scaling of a module's ``B A``. Source: peft; for ``use_rslora`` Kalajdzievski 2023 (arXiv:2312.03732)."""
        rank = self.rank(module)
        return _first(self.alpha_pattern, module, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)

    def saves(self, path: str) -> bool:
        """Whether the module or tensor at ``path``, or a module that contains it, was trained in full."""
        parts = path.split(".")
        around = (".".join(parts[: count + 1]) for count in range(len(parts)))
        return any(module.endswith(self.modules_to_save) for module in around)


def _names(config: Section, name: str) -> tuple[str, ...]:
    value = config.values.get(name) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
        raise CheckpointError(f"{config.where}: '{name}' must be a list of names.")
    return tuple(value)


def _patterns(config: Section, name: str, read: Any) -> Patterns[Any]:
    section = config.section(name, required=False)
    return tuple((_compiled(pattern, section.where), read(section, pattern)) for pattern in section.values)


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compiles a pattern with peft's meaning: it matches a module's path from the start or from a dot, up to the end.

    The pattern is untrusted, and some regular expressions take years to match. So no group may be repeated, and the
    number of repetitions and groups is limited, to more than names and lists of layers need.
    """
    repeats, groups = re.findall(r"[*+?{]", pattern), pattern.count("(")
    if len(pattern) > 1000 or len(repeats) > 3 or groups > 2 or re.search(r"\)[*+?{]", pattern):
        raise CheckpointError(f"{where}: {quote(pattern)} is too complex a pattern.", "Name the modules one by one.")
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except (re.error, OverflowError) as error:
        raise CheckpointError(f"{where}: {quote(pattern)} is not a regular expression: {error}.") from error


def _first(patterns: Patterns[T], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
