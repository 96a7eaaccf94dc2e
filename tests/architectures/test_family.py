"""Every family compared with live transformers: parts and whole in fp32, and greedy tokens of the stock runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from family import ROPE, Member, make_member
from parity import Inputs, Package, make_inputs, nothing_yet, relative
from tiny import IMAGE, Tiny
from vlpack.architectures import ARCHITECTURES
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import CheckpointError, OptionError
from vlpack.options import parse_extra_options
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-5
TOKENS = 32
MROPE = ROPE | {"mrope_section": [2, 3, 3]}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

BIASED = {"head_dim": 16, "attention_bias": True}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_TOO = {"head_dim": 32, "rope_parameters": YARN | {"beta_fast": 16, "attention_factor": 1.3}}
QWEN2_VL = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
QWEN2_5_VL: dict[str, Any] = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 64}
QWEN2_5_VL |= {"fullatt_block_indexes": [1]}


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
FEW = EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1], "num_experts": 4, "num_experts_per_tok": 3}
QWEN3_VL: dict[str, Any] = {
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_position_embeddings": 64,
}
QWEN3_VL |= {"deepstack_visual_indexes": [2, 0], "hidden_act": "gelu_pytorch_tanh"}

QWEN3_5 = {name: value for name, value in QWEN3_VL.items() if name != "deepstack_visual_indexes"}
HYBRID: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_hidden_layers": 4,
    "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
}
ODD_HYBRID = HYBRID | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "rope_parameters": ROPE | {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.5, "rope_theta": 1e6},
}
SHORT_HYBRID = HYBRID | {
    "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "linear_key_head_dim": 32,
    "linear_num_value_heads": 2,
}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 48}
QWEN3_5_TEXT = "Qwen3_5TextConfig"


def member(family: str, kind: str, *, old: bool = False, fused: bool = False, **settings: Any) -> Member:
    """A small model of a family; with ``old``, it has the tensor names of older checkpoints and a tied head."""
    text, vision = settings.get("text", {}), settings.get("vision")
    kinds = [
        k for k in ("attention_bias", "mlp_bias", "attention_factor") if k in text | text.get("rope_parameters", {})
    ]
    yarn = ["yarn"] if text.get("rope_parameters", ROPE)["rope_type"] == "yarn" else []
    kinds += [k for k in ("norm_topk_prob", "decoder_sparse_step") if k in text] + ["fused"] * fused
    name = " ".join([family, *(["old"] if old else []), *yarn, *kinds])
    config = settings.get("config", f"{family}Config")
    return Member(name, config, f"{family}{kind}", text, vision, tied=old, old=old, fused=fused)


CAUSAL, CONDITIONAL = "ForCausalLM", "ForConditionalGeneration"
TEXT_MEMBERS = [
    member("Qwen3", CAUSAL, text={"head_dim": 32}),
    member("Qwen3", CAUSAL, text=BIASED, old=True),
    member("Qwen3", CAUSAL, text={"head_dim": 32, "rope_parameters": YARN}),
    member("Qwen3", CAUSAL, text=YARN_TOO, old=True),
    member("Qwen2", CAUSAL),
    member("Qwen2", CAUSAL, old=True),
    member("Llama", CAUSAL, text={"num_key_value_heads": None, "rms_norm_eps": 1e-3}),
    member("Llama", CAUSAL, text={"head_dim": 32, "attention_bias": True, "hidden_act": "gelu"}),
    member("Llama", CAUSAL, text={"rope_parameters": YARN}),
    member("Llama", CAUSAL, text={"rope_parameters": LLAMA3}),
    member("Llama", CAUSAL, text={"mlp_bias": True, "rope_parameters": ROPE | {"rope_theta": 5e5}}, old=True),
    member("Qwen3Moe", CAUSAL, text=EXPERTS),
    member("Qwen3Moe", CAUSAL, text=FEW, old=True),
    member("Qwen3Moe", CAUSAL, text=EXPERTS | {"decoder_sparse_step": 2, "attention_bias": True}, fused=True),
    member("Qwen3_5", CAUSAL, text=HYBRID | {"hidden_act": "gelu", "attention_bias": True}, config=QWEN3_5_TEXT),
    member("Qwen3_5", CAUSAL, text=ODD_HYBRID, config=QWEN3_5_TEXT),
    member("Qwen3_5Moe", CAUSAL, text=SHORT_HYBRID | SHARED, config="Qwen3_5MoeTextConfig"),
    member("Qwen3Next", CAUSAL, text=HYBRID | SHARED | {"mlp_only_layers": [1]}),
    member("Qwen3Next", CAUSAL, text=ODD_HYBRID | SHARED | {"norm_topk_prob": False}, fused=True),
]
LAST_OF_FAMILY = list({each.model_class: each for each in TEXT_MEMBERS}.values())
CHUNKED = {"rope_parameters": MROPE}
INTERLEAVED = {"rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
VISION_MEMBERS = [
    member("Qwen2VL", CONDITIONAL, text=CHUNKED, vision=QWEN2_VL),
    member("Qwen2VL", CONDITIONAL, text=CHUNKED, vision=QWEN2_VL, old=True),
    member("Qwen2_5_VL", CONDITIONAL, text=CHUNKED, vision=QWEN2_5_VL),
    member("Qwen2_5_VL", CONDITIONAL, text=CHUNKED, vision=QWEN2_5_VL, old=True),
    member("Qwen3VLMoe", CONDITIONAL, text=EXPERTS | INTERLEAVED, vision=QWEN3_VL),
    member("Qwen3VLMoe", CONDITIONAL, text=EXPERTS | INTERLEAVED, vision=QWEN3_VL, old=True),
    member("Qwen3VLMoe", CONDITIONAL, text=EXPERTS | INTERLEAVED, vision=QWEN3_VL, fused=True),
    member("Qwen3_5", CONDITIONAL, text=SHORT_HYBRID, vision=QWEN3_5),
    member("Qwen3_5", CONDITIONAL, text=ODD_HYBRID, vision=QWEN3_5, old=True),
    member("Qwen3_5Moe", CONDITIONAL, text=ODD_HYBRID | SHARED, vision=QWEN3_5, fused=True),
    member("Qwen3_5Moe", CONDITIONAL, text=SHORT_HYBRID | SHARED, vision=QWEN3_5, old=True),
]
IDS: dict[str, Any] = {"ids": lambda member: member.name}
# whole windows are 8 patches (4 tokens) wide: fewer, just one, several, and edges that do not fill one
LAYOUTS: dict[str, list[Any]] = {
    "text": [()],
    "one image": [((1, 10, 22),)],
    "one token": [((1, 2, 2),)],
    "just a window": [((1, 8, 8),)],
    "two equal images": [((1, 4, 6), (1, 4, 6))],
    "two unequal images": [((1, 4, 12), (1, 18, 8))],
    "a batch of two": [((1, 12, 6),), ((1, 6, 12),)],
}  # fmt: skip


class Family:
    """A family's checkpoint, package and reference, made once."""

    def __init__(self, member: Member, folder: Path) -> None:
        self.checkpoint = make_member(folder / "checkpoint", member)
        build(
            self.checkpoint,
            folder / "all",
            precision="fp32",
            extra_options=parse_extra_options(["prune_lm_head=false"]),
        )
        build(self.checkpoint, folder / "last", precision="fp32")
        self.folder = folder
        self.package = Package(folder / "all")
        self.reference, loading = member.model.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), f"the reference is not the checkpoint: {loading}"
        self.reference.eval()

    def positions(self, inputs: Inputs) -> Any:
        ids = torch.tensor(inputs.ids)
        if not len(inputs.grid):
            return torch.arange(ids.shape[1]).expand(3, *ids.shape)
        kinds = (ids == IMAGE).int()
        positions, _ = self.reference.model.get_rope_index(ids, kinds, image_grid_thw=torch.tensor(inputs.grid))
        return positions


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[Member, Family] = {}  # not by name, because two members with the same name would share a checkpoint

    def get(member: Member) -> Family:
        if member not in made:
            made[member] = Family(member, tmp_path_factory.mktemp("family"))
        return made[member]

    return get


@pytest.mark.parametrize("member", TEXT_MEMBERS, **IDS)
def test_text_logits(member: Member, family: Any) -> None:
    made = family(member)
    ids = np.random.default_rng(0).integers(0, 2048, (1, 90))
    with torch.no_grad():
        wanted = made.reference(torch.tensor(ids)).logits.numpy()
    session = made.package.sessions["decoder"]
    past = {port.name: nothing_yet(port, 1) for port in session.get_inputs() if port.name.startswith("past")}
    axes = next(port.shape[:-2] for port in session.get_inputs() if port.name == "position_ids")  # M-RoPE has 3
    parts, position = [], 0
    for step in (60, 29, 1):  # prefill, a second chunk, and one token
        chunk = slice(position, position + step)
        positions = np.broadcast_to(np.arange(90)[chunk], (*axes, 1, step))
        mask = np.ones((1, position + step), np.int64)
        out = made.package.run(
            "decoder", input_ids=ids[:, chunk], attention_mask=mask, position_ids=positions.astype(np.int64), **past
        )
        parts.append(out.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in out.items()}
        position += step
    assert relative(np.concatenate(parts, axis=1), wanted) < TOLERANCE


@pytest.mark.parametrize("member", VISION_MEMBERS, **IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts(member: Member, layout: str, family: Any) -> None:
    made = family(member)
    inputs = make_inputs(Tiny(), *LAYOUTS[layout])
    positions = made.positions(inputs)
    arguments = {"input_ids": torch.tensor(inputs.ids), "position_ids": positions, "use_cache": False}
    if len(inputs.grid):
        pixels, grid = torch.tensor(inputs.pixels), torch.tensor(inputs.grid)
        arguments |= {"pixel_values": pixels, "image_grid_thw": grid}
        with torch.no_grad():
            out = made.reference.model.visual(pixels, grid_thw=grid)
            levels = getattr(out, "deepstack_features", None) or []
            features = torch.cat([out.pooler_output, *levels], dim=-1).numpy()
            if levels:
                arguments["mm_token_type_ids"] = (torch.tensor(inputs.ids) == IMAGE).int()
        assert relative(made.package.features(inputs), features) < TOLERANCE
        # images of equal size or with equal numbers of patches go into one call
        if len({int(g.prod()) for g in inputs.grid}) == 1:
            assert relative(made.package.features(inputs, packed=True), features) < TOLERANCE
    with torch.no_grad():
        wanted = made.reference(**arguments).logits.numpy()
    assert relative(made.package.logits(inputs, positions.numpy()), wanted) < TOLERANCE


@pytest.mark.parametrize("images", [[], [(40, 64)], [(48, 48)] * 2, [(32, 80), (80, 48)]], ids=str)
@pytest.mark.parametrize("member", TEXT_MEMBERS + VISION_MEMBERS, **IDS)
def test_greedy_tokens(member: Member, images: list[tuple[int, int]], family: Any) -> None:
    if images and member.vision is None:
        pytest.skip("a text model")
    made = family(member)
    random = np.random.default_rng(1)
    pictures = [random.integers(0, 256, (*size, 3), np.uint8) for size in images]
    model = Model(made.folder / "last", threads=1)
    answer = model.generate("What is here?", pictures, max_tokens=TOKENS, sampling=Sampling(temperature=0))
    arrays = model.prompt("What is here?", pictures).named_arrays()
    ids = torch.tensor(arrays["input_ids"]).long()
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        arguments |= {name: torch.tensor(arrays[name]) for name in ("pixel_values", "image_grid_thw")}
        arguments["mm_token_type_ids"] = (ids == IMAGE).int()
    out = made.reference.generate(**arguments, do_sample=False, max_new_tokens=TOKENS, eos_token_id=None)
    assert answer.tokens == out[0, ids.shape[1] :].tolist()
    assert len(answer.tokens) == TOKENS


@pytest.mark.parametrize("member", VISION_MEMBERS, **IDS)
def test_the_runtimes_own_pixels(member: Member, family: Any, tmp_path: Path) -> None:
    """The pixels of the runtime's own image processor, for callers without Python (`Architecture.normalize_flag`)."""
    og = pytest.importorskip("onnxruntime_genai")
    folder = family(member).folder / "last"
    # a smooth image of a size that neither processor changes
    ramp = np.linspace(0, 255, 48 * 80 * 3).reshape(48, 80, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    expected = Model(folder, threads=1).prompt("What is here?", [tmp_path / "ramp.png"])
    processor = og.Model(str(folder)).create_multimodal_processor()
    found = processor(expected.text, images=og.Images.open(str(tmp_path / "ramp.png")))
    assert expected.image_grid_thw is not None
    assert expected.pixel_values is not None
    assert np.array(found["image_grid_thw"].as_numpy()).tolist() == expected.image_grid_thw.tolist()
    np.testing.assert_allclose(np.array(found["pixel_values"].as_numpy()), expected.pixel_values, atol=0.02)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("member", [*LAST_OF_FAMILY, *VISION_MEMBERS], **IDS)
def test_other_precisions_are_close(member: Member, precision: str, family: Any, tmp_path: Path) -> None:
    made = family(member)
    options = parse_extra_options(["prune_lm_head=false"])
    build(made.checkpoint, tmp_path / "package", precision=precision, extra_options=options)
    package = Package(tmp_path / "package")
    bound = {"fp16": 5e-3, "int8": 0.08, "int4": 0.5}[precision]
    if member.vision is not None:
        inputs = make_inputs(Tiny(), ((1, 10, 22),))
        whole = made.package.features(inputs)
        assert relative(package.features(inputs), whole) < min(bound, 0.08)
        positions = made.positions(inputs).numpy()
        assert relative(package.logits(inputs, positions), made.package.logits(inputs, positions)) < bound
        return
    model, exact = Model(tmp_path / "package", threads=1), Model(made.folder / "last", threads=1)
    greedy = Sampling(temperature=0)
    answers = [m.generate("What is here?", max_tokens=8, sampling=greedy).tokens for m in (model, exact)]
    assert len(answers[0]) == 8
    if precision == "fp16":
        assert answers[0] == answers[1]


def test_parts_of_a_text_model(family: Any, tmp_path: Path) -> None:
    made = family(TEXT_MEMBERS[0])
    with pytest.raises(OptionError, match="no vision encoder"):
        build(made.checkpoint, tmp_path / "package", part="vision")
    with pytest.raises(OptionError, match="no vision encoder"):
        build(made.checkpoint, tmp_path / "package", vision_precision="int8")
    build(made.checkpoint, tmp_path / "text", precision="fp32", part="text")
    assert {p.name for p in (tmp_path / "text").iterdir()} == {p.name for p in (made.folder / "last").iterdir()}
    decoder = tmp_path / "decoder"
    build(
        made.checkpoint,
        decoder,
        precision="fp32",
        part="text",
        extra_options=parse_extra_options(["exclude_embeds=true"]),
    )
    assert "inputs_embeds" in {port.name for port in Package(decoder).sessions["decoder"].get_inputs()}


def test_templates_of_text_models_receive_content_as_a_string(tmp_path: Path) -> None:
    """The templates of text models take ``message.content`` as a string; a list of parts fails or is left out."""
    folder = make_member(tmp_path / "checkpoint", TEXT_MEMBERS[0])
    template = "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    build(folder, tmp_path / "package", precision="fp32")
    assert Model(tmp_path / "package", threads=1).prompt("What is here?").text == "user: What is here?"


@pytest.mark.parametrize("member", TEXT_MEMBERS + VISION_MEMBERS, **IDS)
def test_a_missing_epsilon_has_transformers_default(member: Member, family: Any) -> None:
    """An epsilon that the config leaves out has transformers' default."""
    from vlpack.architectures import ARCHITECTURES

    config = json.loads((family(member).checkpoint / "config.json").read_text(encoding="utf-8"))
    config.pop("rms_norm_eps", None)
    config.get("text_config", {}).pop("rms_norm_eps", None)
    reference = type(family(member).reference.config)(**config).get_text_config()
    assert ARCHITECTURES[config["architectures"][0]](config).decoder.eps == reference.rms_norm_eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window"),
        ({"rope_parameters": ROPE | {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_parameters": ROPE | {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor' is missing"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "'mscale' is not supported"),
        ({"rope_scaling": YARN}, "both there and differ"),
        ({"rope_parameters": {k: v for k, v in YARN.items() if k != "factor"}}, "'factor' is missing"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused(
    change: dict[str, Any], message: str, family: Any, tmp_path: Path
) -> None:
    config = Checkpoint.open(family(TEXT_MEMBERS[0]).checkpoint).config
    for architecture in (ARCHITECTURES["Qwen3ForCausalLM"], ARCHITECTURES["LlamaForCausalLM"]):
        with pytest.raises(CheckpointError, match=message):
            architecture({**config, **change})


def test_llama_without_its_context_length_is_refused(family: Any) -> None:
    config = Checkpoint.open(family(TEXT_MEMBERS[0]).checkpoint).config
    with pytest.raises(CheckpointError, match="'max_position_embeddings' is missing"):
        ARCHITECTURES["LlamaForCausalLM"]({**config, "max_position_embeddings": None})
