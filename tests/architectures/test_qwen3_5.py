"""Qwen3.5: states over chunks and long prompts, planted faults, conversations, and weights kept in fp32.

test_family tests the parts, the whole graph, greedy tokens and precisions, together with all other families.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from architectures.test_family import HYBRID, ODD_HYBRID, QWEN3_5, QWEN3_5_TEXT
from family import WEIGHTS, Member, make_member
from parity import Package, make_inputs, relative
from samples import vlpack
from tiny import IMAGE, VIDEO, Tiny
from vlpack.architectures import ARCHITECTURES, qwen3_5
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.decoding.slots import BACK, WORTH
from vlpack.errors import CheckpointError, OptionError
from vlpack.export.description import inspect_checkpoint
from vlpack.layers import ops
from vlpack.layers.attention import Attention
from vlpack.layers.rope import chunked_axes
from vlpack.options import parse_extra_options
from vlpack.preprocess import Prompt
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.verification.cases import built_in
from vlpack.verification.run import verify

og = pytest.importorskip("onnxruntime_genai")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-5
TOKENS = 32
GREEDY = Sampling(temperature=0)
LONG = {"max_position_embeddings": 4096}
TEXT = Member("q", QWEN3_5_TEXT, "Qwen3_5ForCausalLM", text=HYBRID | LONG)
ODD = Member("odd", QWEN3_5_TEXT, "Qwen3_5ForCausalLM", text=ODD_HYBRID | LONG, tied=True)
SEES = Member("sees", "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", text=HYBRID | LONG, vision=QWEN3_5)
MEMBERS: dict[str, Any] = {"argvalues": [TEXT, ODD, SEES], "ids": lambda member: member.name}
Made = Callable[[Member], "Hybrid"]


class Hybrid:
    """A checkpoint with its packages and the reference model."""

    def __init__(self, member: Member, folder: Path) -> None:
        self.member, self.checkpoint, self.folder = member, make_member(folder / "checkpoint", member), folder
        self.reference = member.model.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._package: Package | None = None

    def build(self, name: str, *extra: str, precision: str = "fp32", **options: Any) -> Path:
        """Builds a package once for each name and returns its folder."""
        folder = self.folder / name
        if not folder.exists():
            options["extra_options"] = parse_extra_options(extra)
            build(self.checkpoint, folder, precision=precision, threads=1, **options)
        return folder

    @property
    def package(self) -> Package:
        """The sessions of the fp32 package, built to return the logits of all tokens."""
        if self._package is None:
            self._package = Package(self.build("all", "prune_lm_head=false"))
        return self._package

    def wanted(self, ids: np.ndarray) -> np.ndarray:
        """The reference's logits of a text, ``[1, S, V]``."""
        with torch.no_grad():
            logits: np.ndarray = self.reference(torch.tensor(ids)).logits.numpy()
        return logits

    def generated(self, ids: np.ndarray, count: int) -> list[int]:
        """The first ``count`` tokens of the reference's greedy answer, without stopping at an end token."""
        given = torch.tensor(ids).long()
        out = self.reference.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, eos_token_id=None
        )
        answer: list[int] = out[0, given.shape[1] :].tolist()
        return answer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    found: dict[str, Hybrid] = {}

    def get(member: Member) -> Hybrid:
        if member.name not in found:
            found[member.name] = Hybrid(member, tmp_path_factory.mktemp(member.name))
        return found[member.name]

    return get


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((count, seed)).integers(0, 2000, (1, count))


def in_steps(package: Package, ids: np.ndarray, *steps: int) -> np.ndarray:
    """The logits of all tokens of a text that the decoder processes in calls with these numbers of tokens."""
    assert sum(steps) == ids.shape[1]
    past, first, found = None, 0, []
    for step in steps:
        some = ids[:, first : first + step]
        tokens = package.embed(some, np.zeros((0, 64), np.float32)) if "embedding" in package.sessions else {}
        positions = np.broadcast_to(np.arange(first, first + step), (3, 1, step)).astype(np.int64)
        logits, past = package.decode(tokens or {"input_ids": some}, positions, past)
        found.append(logits)
        first += step
    return np.concatenate(found, axis=1)


def last_logits(folder: Path, ids: np.ndarray, chunk_size: int) -> np.ndarray:
    """The stock runtime's logits after a prompt."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=ids.shape[1] + 8, chunk_size=chunk_size)
    generator = og.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    logits: np.ndarray = np.array(generator.get_logits())[0, -1]
    return logits


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("member", **MEMBERS)
def test_prompts_of_many_lengths(member: Member, count: int, made: Made) -> None:
    hybrid, ids = made(member), random_ids(count)
    wanted = hybrid.wanted(ids)
    assert relative(in_steps(hybrid.package, ids, count), wanted) < TOLERANCE
    if count > 2:
        steps = (2, 1, count - 4, 1)  # shorter than the convolution's kernel, and token by token
        assert relative(in_steps(hybrid.package, ids, *steps), wanted) < TOLERANCE
    for chunk_size in (0, 3, 64):
        assert relative(last_logits(hybrid.build("last"), ids, chunk_size), wanted[0, -1]) < TOLERANCE


@pytest.mark.parametrize("member", [TEXT, SEES], ids=lambda member: member.name)
def test_a_long_prompt(member: Member, made: Made) -> None:
    hybrid, ids = made(member), random_ids(3000)
    wanted = hybrid.wanted(ids)
    assert relative(in_steps(hybrid.package, ids, 3000), wanted) < TOLERANCE
    assert relative(last_logits(hybrid.build("last"), ids, 512), wanted[0, -1]) < TOLERANCE


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALED = Member(
    "yarn", QWEN3_5_TEXT, "Qwen3_5ForCausalLM", text=HYBRID | {"rope_parameters": HYBRID["rope_parameters"] | YARN}
)


def test_yarn_with_partial_rotation(made: Made) -> None:
    """Angles are scaled, and so are the queries and keys, beyond the original length too."""
    hybrid, ids = made(SCALED), random_ids(200)
    wanted = hybrid.wanted(ids)
    assert relative(in_steps(hybrid.package, ids, 150, *[1] * 10, 40), wanted) < TOLERANCE
    assert relative(last_logits(hybrid.build("last"), ids, 64), wanted[0, -1]) < TOLERANCE


@pytest.mark.parametrize("chunk_size", [0, 7])
@pytest.mark.parametrize("member", **MEMBERS)
def test_greedy_tokens_in_chunks(member: Member, chunk_size: int, made: Made) -> None:
    hybrid, ids = made(member), random_ids(45)
    wanted = hybrid.generated(ids, TOKENS)
    assert len(set(wanted)) > TOKENS // 4
    model = og.Model(str(hybrid.build("last")))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=45 + TOKENS, chunk_size=chunk_size, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    for _ in range(TOKENS):
        generator.generate_next_token()
    assert np.array(generator.get_sequence(0))[45:].tolist() == wanted


def no_gate(patch: pytest.MonkeyPatch) -> None:
    split = Attention._split_gate
    patch.setattr(Attention, "_split_gate", lambda self, op, x: (split(self, op, x)[0], None))


def other_gate(patch: pytest.MonkeyPatch) -> None:
    def split_gate(self: Attention, op: Any, projected: Any) -> Any:
        qkv, gate = right(self, op, projected)
        return qkv, op.Neg(gate)

    right = Attention._split_gate
    patch.setattr(Attention, "_split_gate", split_gate)


def unscaled(patch: pytest.MonkeyPatch) -> None:
    def linear_attention(op: Any, q: Any, *rest: Any) -> Any:
        return right(op, op.Mul(q, 4.0), *rest)

    right = ops.linear_attention
    patch.setattr(ops, "linear_attention", linear_attention)


def no_one(patch: pytest.MonkeyPatch) -> None:
    read = qwen3_5.read_hybrid

    def read_hybrid(*arguments: Any, **options: Any) -> Any:
        return replace(read(*arguments, **options), norm_offset=0.0)

    patch.setattr(qwen3_5, "read_hybrid", read_hybrid)


def late_state(patch: pytest.MonkeyPatch) -> None:
    def causal_convolution(op: Any, x: Any, kernel: Any, state: Any) -> Any:
        y, present = right(op, x, kernel, state)
        older = op.Slice(op.Concat(state, present, axis=2), [-4], [-1], [2])  # without the newest token
        return y, ops.typed(older, ops.FLOAT, ops.shape_of(state))

    right = ops.causal_convolution
    patch.setattr(ops, "causal_convolution", causal_convolution)


def other_heads(patch: pytest.MonkeyPatch) -> None:
    def linear_attention(op: Any, q: Any, k: Any, v: Any, state: Any, g: Any, beta: Any, keys: int, values: int) -> Any:
        q, k = (op.Concat(*[x] * (values // keys), axis=-1) for x in (q, k))
        return right(op, q, k, v, state, g, beta, values, values)

    right = ops.linear_attention
    patch.setattr(ops, "linear_attention", linear_attention)


def chunked(patch: pytest.MonkeyPatch) -> None:
    read = qwen3_5.TextDecoder.read
    patch.setattr(
        qwen3_5.TextDecoder, "read", lambda *given, **options: read(*given, **options | {"mrope_layout": chunked_axes})
    )


def early_kernel(patch: pytest.MonkeyPatch) -> None:
    def causal_convolution(op: Any, x: Any, *rest: Any) -> Any:
        later = op.Concat(op.Slice(x, [1], [2**62], [2]), op.Slice(x, [-1], [2**62], [2]), axis=2)
        return right(op, ops.typed(later, ops.FLOAT, ops.shape_of(x)), *rest)

    right = ops.causal_convolution
    patch.setattr(ops, "causal_convolution", causal_convolution)


FAULTS = [no_gate, unscaled, no_one, late_state, other_heads, chunked]


@pytest.mark.parametrize("fault", [None, *FAULTS], ids=lambda fault: fault.__name__ if fault else "none")
def test_planted_faults_are_seen(
    fault: Callable[[pytest.MonkeyPatch], None] | None, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = made(SEES)
    inputs = make_inputs(Tiny(), ((1, 6, 10),))
    ids, kinds = torch.tensor(inputs.ids), torch.tensor(inputs.ids == IMAGE).int()
    pixels, grid = torch.tensor(inputs.pixels), torch.tensor(inputs.grid)
    positions, _ = hybrid.reference.model.get_rope_index(ids, kinds, image_grid_thw=grid)
    with torch.no_grad():
        wanted = hybrid.reference(
            input_ids=ids, pixel_values=pixels, image_grid_thw=grid, position_ids=positions, use_cache=False
        ).logits.numpy()
    if fault is not None:
        fault(monkeypatch)
    build(
        hybrid.checkpoint, tmp_path / "p", precision="fp32", extra_options=parse_extra_options(["prune_lm_head=false"])
    )
    package = Package(tmp_path / "p")
    embeds, places = package.embed(inputs.ids, package.features(inputs)), positions.numpy()
    cut = 8  # within the image
    halves = [{name: x[:, :cut] for name, x in embeds.items()}, {name: x[:, cut:] for name, x in embeds.items()}]
    first, past = package.decode(halves[0], places[:, :, :cut])
    second, _ = package.decode(halves[1], places[:, :, cut:], past)
    error = relative(np.concatenate([first, second], axis=1), wanted)
    assert error < TOLERANCE if fault is None else error > 100 * TOLERANCE


TURNS = ["What is this?", "And its colour?", "Which is older, and why is it so?", "Thank you.", "Go on."]


LONG_TURNS = [text + " river stone" * words for text, words in zip(TURNS, (45, 60, 5, 70, 1), strict=True)]


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("member", **MEMBERS)
def test_conversations(member: Member, count: int, made: Made) -> None:
    """In every turn the answer equals transformers', and earlier turns are not computed again."""
    hybrid = made(member)
    chat = Model(hybrid.build("last"), threads=1, lazy=True).chat(max_tokens=count, sampling=GREEDY)
    reused, before = [], 0
    for text in LONG_TURNS:
        prompt = chat.model.prompt([*chat.messages, {"role": "user", "content": text}])
        answer = chat.ask(text)
        assert answer.tokens == hybrid.generated(prompt.input_ids, count)
        if before:  # all but the end of the latest prompt with a snapshot
            assert answer.stats.reused_tokens >= before - BACK - WORTH
        reused.append(answer.stats.reused_tokens)
        before = prompt.input_ids.size
    assert reused[0] == 0
    assert all(reused[1:])
    chat.drop(2)  # another beginning: what was kept does not fit
    prompt = chat.model.prompt([*chat.messages, {"role": "user", "content": "And now?"}])
    assert chat.ask("And now?").tokens == hybrid.generated(prompt.input_ids, count)


@pytest.mark.parametrize("count", [1, 12])
def test_conversations_in_the_runtime(count: int, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vlpack does not decode itself, turns that do not continue the sequence are computed from the beginning."""
    hybrid = made(SEES)
    monkeypatch.setattr(Model, "kept_conversation", lambda *_: None)
    model = Model(hybrid.build("last"), threads=1)
    chat = model.chat(max_tokens=count, sampling=GREEDY)
    reused = []
    for text in TURNS:
        prompt = model.prompt([*chat.messages, {"role": "user", "content": text}])
        answer = chat.ask(text)
        assert answer.tokens == hybrid.generated(prompt.input_ids, count)
        reused.append(answer.stats.reused_tokens)
    # most long answers of random weights have other tokens when they are tokenized again
    assert not all(reused[1:]) if count == 12 else any(reused)


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""A template that, like published ones, thinks by default and omits the reasoning of earlier turns."""


def test_thinking_by_default(made: Made, tmp_path: Path) -> None:
    hybrid = made(SEES)
    source = shutil.copytree(hybrid.checkpoint, tmp_path / "source")
    (source / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    build(source, tmp_path / "p", precision="fp32")
    model = Model(tmp_path / "p", threads=1)
    chat, before = model.chat(max_tokens=6, sampling=GREEDY), 0
    for text in LONG_TURNS[:3]:
        prompt = model.prompt([*chat.messages, {"role": "user", "content": text}])
        assert prompt.text.endswith("<think>\n")
        answer = chat.ask(text)
        assert answer.tokens == hybrid.generated(prompt.input_ids, 6)
        assert chat.messages[-1]["reasoning_content"]  # the whole answer: random weights do not end it
        assert not chat.messages[-1]["content"]
        assert bool(answer.stats.reused_tokens) == bool(before)
        assert answer.stats.reused_tokens >= before - BACK
        before = prompt.input_ids.size


def test_going_back_is_wrong(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own rewinding changes the answer, so vlpack must not use it."""
    hybrid = made(SEES)
    model = Model(hybrid.build("last"), threads=1)
    monkeypatch.setattr(Model, "keeps_states", False)
    monkeypatch.setattr(Model, "kept_conversation", lambda *_: None)
    chat, answers, wanted = model.chat(max_tokens=12, sampling=GREEDY), [], []
    for text in TURNS:
        prompt = model.prompt([*chat.messages, {"role": "user", "content": text}])
        answers.append(chat.ask(text).tokens)
        wanted.append(hybrid.generated(prompt.input_ids, 12))
    assert answers[0] == wanted[0]
    assert answers != wanted


def with_images(hybrid: Hybrid, prompt: Prompt, count: int) -> list[int]:
    """The first ``count`` tokens of the reference's greedy answer to a prompt, without stopping at an end token."""
    given = {name: torch.tensor(array) for name, array in prompt.transformers_arrays(IMAGE, VIDEO).items()}
    mask = torch.ones_like(given["input_ids"])
    out = hybrid.reference.generate(
        **given, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    answer: list[int] = out[0, prompt.input_ids.size :].tolist()
    return answer


@pytest.mark.parametrize("size", [(48, 80), (384, 400)], ids=["small", "more than a chunk"])
@pytest.mark.parametrize("kept", [True, False])
def test_images_in_a_conversation(
    kept: bool, size: tuple[int, int], made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large image is computed in two calls, and the states after it are copied within it."""
    hybrid = made(SEES)
    if not kept:
        monkeypatch.setattr(Model, "kept_conversation", lambda *_: None)
    model = Model(hybrid.build("last"), threads=1)
    chat = model.chat(max_tokens=3, sampling=GREEDY)
    picture, *others = (
        np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8) for shape in (size, (64, 48), (32, 80))
    )
    turns: list[tuple[str, list[Any]]] = [("Hello", []), ("?", [picture]), ("And?", [])]
    turns += [(TURNS[2] * 3, [others[0]]), ("So?", [others[1]])]
    for text, images in turns:
        parts = [{"type": "image", "image": image} for image in images]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        prompt = model.prompt([*chat.messages, {"role": "user", "content": content}])
        answer = chat.ask(text, images)
        assert answer.tokens == with_images(hybrid, prompt, 3)
    assert not kept or answer.stats.reused_tokens > 0


@pytest.mark.parametrize(("precision", "others"), [("int8", "int8"), ("int4", "int4"), ("fp16", "float16")])
def test_what_is_kept_in_fp32(precision: str, others: str, made: Made) -> None:
    folder = made(SEES).build(precision, precision=precision)
    manifest = json.loads((folder / "vlpack.json").read_text(encoding="utf-8"))
    decoder = next(part for part in manifest["parts"].values() if part["name"] == "decoder")
    layer = "model.language_model.layers.1.linear_attn"
    kept = ("in_proj_ba", "conv1d.weight", "A_log", "dt_bias", "norm.weight")
    assert {decoder["weights"][f"{layer}.{name}"]["storage"] for name in kept} == {"float32"}
    for name in ("in_proj_qkv", "in_proj_z", "out_proj"):
        assert decoder["weights"][f"{layer}.{name}"]["storage"].startswith(others)
    for name in ("conv_state", "recurrent_state"):
        assert decoder["inputs"][f"past_key_values.1.{name}"][0] == "FLOAT"
    assert {"role": "text.gate", "modules": "*", "storage": "float32"} in manifest["policy"]
    assert manifest["states"] == "float32"


def with_more(checkpoint: Path, folder: Path, *names: str) -> Path:
    """A copy of a checkpoint with additional tensors of these names."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {name: np.ones((4, 4), np.float32) for name in names}, folder / WEIGHTS)
    return folder


def test_layers_that_draft_are_left_out(made: Made, tmp_path: Path) -> None:
    for member, names in ((SEES, ("mtp.fc.weight",)), (TEXT, ("mtp.fc.weight", "model.visual.merger.weight"))):
        more = with_more(made(member).checkpoint, tmp_path / member.name / "more", *names)
        result = build(more, tmp_path / member.name / "package", precision="fp32")
        notes = [note for note in map(str, result.notes) if "leaves out" in note]
        assert len(notes) == len(names)
        assert "mtp.*" in notes[0]
        before, after = made(member).build("last"), tmp_path / member.name / "package"
        for path in before.glob("*.onnx*"):
            assert path.read_bytes() == (after / path.name).read_bytes()
    other = with_more(made(SEES).checkpoint, tmp_path / "other", "mpt.fc.weight")
    with pytest.raises(CheckpointError, match="no place for"):
        build(other, tmp_path / "refused", precision="fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_output_gate": False}, "without an output gate"),
        ({"output_gate_type": "sigmoid"}, "'output_gate_type' is 'sigmoid'"),
        ({"layer_types": ["linear_attention"] * 4}, "no layer has full attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "a list of 4 words"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding-window"),
        ({"layer_types": ["mamba"] * 4}, "a list of 4 words"),
        ({"linear_num_value_heads": 3}, "not a multiple of linear_num_key_heads"),
        ({"linear_conv_kernel_dim": 1}, "'linear_conv_kernel_dim' is 1"),
        ({"rope_parameters": HYBRID["rope_parameters"] | {"partial_rotary_factor": 0.03}}, "0 of 32 channels"),
        ({"rope_parameters": HYBRID["rope_parameters"] | {"partial_rotary_factor": 1.5}}, "48 of 32 channels"),
        ({"rope_parameters": HYBRID["rope_parameters"] | {"mrope_section": [6, 5, 5]}}, "the 8 channels that rotate"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused(change: dict[str, Any], message: str, made: Made) -> None:
    config = Checkpoint.open(made(TEXT).checkpoint).config
    with pytest.raises(CheckpointError, match=message):
        ARCHITECTURES["Qwen3_5ForCausalLM"]({**config, **change})


def test_what_is_not_offered(made: Made, tmp_path: Path) -> None:
    checkpoint = made(SEES).checkpoint
    for provider in ("cuda", "dml", "webgpu"):
        with pytest.raises(OptionError, match=f"linear attention are not offered on {provider}"):
            build(checkpoint, tmp_path / "package", precision="fp16", execution_provider=provider)
    for task in ("embedding", "reranker"):
        with pytest.raises(CheckpointError, match=f"not offered for the task {task}"):
            build(checkpoint, tmp_path / "package", task=task)


TARGETS = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj", "o_proj", "down_proj"]


def test_adapters_in_layers_of_both_kinds(made: Made, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    hybrid, ids = made(TEXT), random_ids(40)
    live = TEXT.model.from_pretrained(hybrid.checkpoint, dtype=torch.float32, attn_implementation="eager")
    adapted = peft.get_peft_model(live, peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = adapted.merge_and_unload().eval()(torch.tensor(ids)).logits.numpy()
    assert relative(wanted, hybrid.wanted(ids)) > 0.02  # the adapters change the result
    extra = parse_extra_options(["prune_lm_head=false"])
    build(hybrid.checkpoint, tmp_path / "p", precision="fp32", lora=tmp_path / "adapter", extra_options=extra)
    assert relative(in_steps(Package(tmp_path / "p"), ids, 40), wanted) < TOLERANCE


@pytest.mark.parametrize("member", [TEXT, SEES], ids=lambda member: member.name)
def test_an_8_bit_cache(member: Member, made: Made) -> None:
    """Keys and values have 8 bits, including those of partially rotated heads; states stay fp32."""
    hybrid, ids = made(member), random_ids(70)
    package = Package(hybrid.build("cache", "kv_cache=int8", "prune_lm_head=false"))
    types = {port.name.rpartition(".")[2]: port.type for port in package.sessions["decoder"].get_inputs()}
    assert (types["key"], types["value"]) == ("tensor(int8)", "tensor(int8)")
    assert (types["conv_state"], types["recurrent_state"]) == ("tensor(float)", "tensor(float)")
    wanted = in_steps(hybrid.package, ids, 70)
    for steps in ((70,), (40, *[1] * 10, 20)):
        assert relative(in_steps(package, ids, *steps), wanted) < 0.01


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_calibration(precision: str, made: Made, tmp_path: Path) -> None:
    """The matrices of linear attention are calibrated; its gates are not, and no weight is further off than it may."""
    hybrid, ids = made(TEXT), random_ids(200, seed=9)
    extra = ["prune_lm_head=false"]
    if precision == "int4":
        extra += ["block_size=32", "is_symmetric=true", "matmul_mixed_precision=mixed_layers:int4"]
    options: list[dict[str, Any]] = [{}, {"calibrate": "self"}]
    wanted, errors = hybrid.wanted(ids), []
    for number, chosen in enumerate(options):
        folder = tmp_path / str(number)
        build(hybrid.checkpoint, folder, precision=precision, extra_options=parse_extra_options(extra), **chosen)
        errors.append(relative(in_steps(Package(folder), ids, 200), wanted))
    assert errors[1] < 1.2 * errors[0]  # random weights, whose logits say little of a calibration
    manifest = json.loads((tmp_path / "1" / "vlpack.json").read_text(encoding="utf-8"))
    (part,) = manifest["parts"].values()
    layer = "model.layers.1.linear_attn"
    storages = {
        name: part["weights"][f"{layer}.{name}"]["storage"] for name in ("in_proj_qkv", "in_proj_z", "out_proj")
    }
    assert all("calibrated" in storage for storage in storages.values())
    assert part["weights"][f"{layer}.in_proj_ba"]["storage"] == "float32"
    report = verify(tmp_path / "1", hybrid.checkpoint, tokens=4, cases=built_in(sees=False)[:1])
    assert all(weight.same for weight in report.weights)


def test_bits_by_halves_of_layers(made: Made, tmp_path: Path) -> None:
    build(made(TEXT).checkpoint, tmp_path / "p", calibrate="self", bits=6.0)
    manifest = json.loads((tmp_path / "p" / "vlpack.json").read_text(encoding="utf-8"))
    assert any("linear_attn" in rule["modules"] or "mlp" in rule["modules"] for rule in manifest["policy"])


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("member", **MEMBERS)
def test_verified(member: Member, precision: str, made: Made) -> None:
    """In exact arithmetic with the package's weights, all stages equal the reference's, also those inside layers."""
    hybrid = made(member)
    sees = member.vision is not None
    cases = built_in(sees=sees, videos=sees)
    report = verify(hybrid.build(precision, precision=precision), hybrid.checkpoint, cases=cases[-2:], tokens=8)
    assert all(weight.same for weight in report.weights)
    stages = [stage for case in report.cases for stage in case.stages if stage.graph]
    assert max(stage.graph.relative for stage in stages if stage.graph) < 1e-4
    names = {stage.name.partition(": ")[2] for stage in stages}
    assert names >= {"convolution", "gates", "recurrence", "gated norm", "gated attention"}
    if precision == "fp32":  # the effect of rounding on random weights is not checked here
        assert not report.findings


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (other_gate, "gated attention"),
        (other_heads, "recurrence"),
        (early_kernel, "convolution"),
    ],
)
def test_verify_names_the_stage(
    fault: Callable[[pytest.MonkeyPatch], None], stage: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = made(TEXT)
    with monkeypatch.context() as patched:
        fault(patched)
        build(hybrid.checkpoint, tmp_path / "p", precision="fp32")
    report = verify(tmp_path / "p", hybrid.checkpoint, tokens=1, cases=built_in(sees=False)[:1])
    assert report.findings[0].stage.endswith(stage)


def test_an_altered_norm_is_found(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification reports a package whose norm weights lack the added 1."""
    hybrid = made(TEXT)
    with monkeypatch.context() as patched:
        no_one(patched)
        build(hybrid.checkpoint, tmp_path / "p", precision="fp32")
    report = verify(tmp_path / "p", hybrid.checkpoint, tokens=1, cases=built_in(sees=False)[:1])
    assert report.findings[0].stage == "weights"
    assert "norm" in report.findings[0].message


def test_text_alone(made: Made, tmp_path: Path) -> None:
    """A text package of a checkpoint with vision gives the same answers to texts as the complete model."""
    hybrid = made(SEES)
    build(hybrid.checkpoint, tmp_path / "p", precision="fp32", part="text")
    config = json.loads((tmp_path / "p" / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["type"] == "qwen3_5_text"
    model = Model(tmp_path / "p", threads=1)
    answer = model.generate("What is here?", max_tokens=TOKENS, sampling=GREEDY)
    assert answer.tokens == hybrid.generated(model.prompt("What is here?").input_ids, TOKENS)


HUB_LINEAR: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "mtp_num_hidden_layers": 1,
    "mlp_only_layers": [],
    "head_dim": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-06,
    "vocab_size": 248320,
    "eos_token_id": 248044,
}
HUB_ROPE = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"}
HUB_SIZES: dict[str, dict[str, Any]] = {
    "9B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
           "num_key_value_heads": 4, "linear_num_value_heads": 32},
    "27B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
            "num_key_value_heads": 4, "linear_num_value_heads": 48, "output_gate_type": "swish"},
    "35B-A3B": {"hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
                "linear_num_value_heads": 32, "num_experts": 256, "num_experts_per_tok": 8,
                "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
}  # fmt: skip
"""Sizes of published config.json files."""


def published(size: str, vision_type: str, old: bool) -> dict[str, Any]:
    """A config.json as published; ``old`` has the rotary settings of transformers 4."""
    text = HUB_LINEAR | HUB_SIZES[size]
    kinds = [*["linear_attention"] * 3, "full_attention"]
    text["layer_types"] = kinds * (text["num_hidden_layers"] // 4)
    if old:
        text |= {"rope_theta": 10000000, "partial_rotary_factor": 0.25, "rope_scaling": HUB_ROPE}
    else:
        text["rope_parameters"] = HUB_ROPE | {"rope_theta": 10000000, "partial_rotary_factor": 0.25}
    vision: dict[str, Any] = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
    }
    vision |= {"num_position_embeddings": 2304, "out_hidden_size": text["hidden_size"], "patch_size": 16}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_act": "gelu_pytorch_tanh"}
    vision |= {"deepstack_visual_indexes": [], "model_type": vision_type}
    name = "Qwen3_5MoeForConditionalGeneration" if "A" in size else "Qwen3_5ForConditionalGeneration"
    return {"architectures": [name], "text_config": text, "vision_config": vision, "tie_word_embeddings": False}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("vision_type", ["qwen3_5", "qwen3_5_vision", "qwen3_5_moe"])
@pytest.mark.parametrize("size", HUB_SIZES)
def test_published_configs(size: str, vision_type: str, old: bool, tmp_path: Path) -> None:
    config = published(size, vision_type, old)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    described = inspect_checkpoint(tmp_path, weights=False)
    layers = config["text_config"]["num_hidden_layers"]
    assert described["text"]["linear_layers"] == layers * 3 // 4
    assert described["text"]["linear_value_heads"] == config["text_config"]["linear_num_value_heads"]
    assert described["parts"] == ["decoder", "vision", "embedding"]
    heads = config["text_config"]["linear_num_value_heads"]
    inputs = described["graphs"]["decoder"]["inputs"]
    assert inputs["past_key_values.*.recurrent_state"][1] == ["batch_size", heads, 128, 128]
    assert inputs["past_key_values.*.conv_state"][1] == ["batch_size", 4096 + 128 * heads, 3]
    architecture = ARCHITECTURES[config["architectures"][0]](config)
    assert architecture.text.linear_layers == tuple(layer for layer in range(layers) if layer % 4 < 3)
    frequencies = architecture.decoder.frequencies
    assert frequencies.channels == 64
    assert frequencies.inverse[1] == pytest.approx(1e7 ** (-2 / 64))
    assert frequencies.axis_of[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert np.bincount(frequencies.axis_of).tolist() == [11, 11, 10]
    assert architecture.vision is not None
    assert architecture.vision.image_token_id == 248056  # the default, because the config has no such id


def test_commands_for_packages(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """run, eval and bench take packages of this family; run and eval answer as transformers does."""
    folder, picture = made(SEES).build("last"), tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (48, 80, 3), np.uint8)).save(picture)
    answered = vlpack(
        capsys, "run", folder, "What?", "--image", picture, "--max-tokens", 3, "--temperature", 0, "--json"
    )
    assert answered.code == 0, answered.err
    prompt = Model(folder, threads=1, lazy=True).prompt("What?", [picture])
    assert json.loads(answered.out)["tokens"] == with_images(made(SEES), prompt, 3)
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"question": "What?", "image": "picture.png", "answer": "x"}), encoding="utf-8")
    scored = vlpack(capsys, "eval", folder, data, "--reference", made(SEES).checkpoint, "--max-tokens", 3, "--json")
    assert scored.code == 0, scored.err
    package, reference = json.loads(scored.out)["scores"]
    assert package["answers"] == reference["answers"]
    measured = vlpack(
        capsys, "bench", folder, "--prompt-tokens", 20, "--image", "64x32", "--new-tokens", 3, "--repeat", 1, "--json"
    )
    assert measured.code == 0, measured.err
    assert [work["prompt_tokens"] > 10 for work in json.loads(measured.out)["works"]] == [True, True]
