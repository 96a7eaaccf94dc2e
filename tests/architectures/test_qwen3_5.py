"""Qwen3.5: states over chunks and long prompts, planted faults, conversations, and what is kept in fp32.

Parts, whole, greedy tokens and precisions of its checkpoints are tested with all other families' in test_family.
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
from safetensors.numpy import load_file, save_file

from architectures.test_family import HYBRID, ODD_HYBRID, QWEN3_5, QWEN3_5_TEXT
from family import WEIGHTS, Member, make_member
from parity import Package, make_inputs, relative
from tiny import IMAGE, VIDEO, Tiny
from vlpack.architectures import ARCHITECTURES, qwen3_5
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.engine import Engine
from vlpack.errors import CheckpointError, OptionError, VlpackError
from vlpack.layers import ops
from vlpack.layers.attention import Attention
from vlpack.layers.rope import chunked_axes
from vlpack.options import parse_extra_options
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

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
    """A checkpoint, its package, and the reference."""

    def __init__(self, member: Member, folder: Path) -> None:
        self.member, self.checkpoint, self.folder = member, make_member(folder / "checkpoint", member), folder
        self.reference = member.model.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._package: Package | None = None

    def build(self, name: str, *extra: str, precision: str = "fp32", **options: Any) -> Path:
        """The folder of a package, built once for each name."""
        folder = self.folder / name
        if not folder.exists():
            options["extra_options"] = parse_extra_options(extra)
            build(self.checkpoint, folder, precision=precision, threads=1, **options)
        return folder

    @property
    def package(self) -> Package:
        """The sessions of the fp32 package, with the logits of all tokens."""
        if self._package is None:
            self._package = Package(self.build("all", "prune_lm_head=false"))
        return self._package

    def wanted(self, ids: np.ndarray) -> np.ndarray:
        """The reference's logits of a text, ``[1, S, V]``."""
        with torch.no_grad():
            logits: np.ndarray = self.reference(torch.tensor(ids)).logits.numpy()
        return logits

    def generated(self, ids: np.ndarray, count: int) -> list[int]:
        """The reference's greedy answer; its end is ignored."""
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
    """The logits of all tokens of a text, given to the decoder in steps of so many tokens."""
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
    def causal_convolution(op: Any, x: Any, kernel: Any, state: Any, silu: bool) -> Any:
        y, present = right(op, x, kernel, state, silu)
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


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("member", **MEMBERS)
def test_conversations(member: Member, count: int, made: Made) -> None:
    """Turn by turn the answer is transformers', whether the prompt continues what was seen or not."""
    hybrid = made(member)
    model = Model(hybrid.build("last"), threads=1)
    chat = model.chat(max_tokens=count, sampling=GREEDY)
    reused = []
    for text in TURNS:
        prompt = model.prompt([*chat.messages, {"role": "user", "content": text}])
        answer = chat.ask(text)
        assert answer.tokens == hybrid.generated(prompt.input_ids, count)
        reused.append(answer.stats.reused_tokens)
    # most long answers of random weights come out as other tokens when they are tokenized again
    assert not all(reused[1:]) if count == 12 else any(reused)


def test_going_back_is_wrong(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own way of taking tokens back, which vlpack must not take, changes the answer."""
    hybrid = made(SEES)
    model = Model(hybrid.build("last"), threads=1)
    monkeypatch.setattr(Model, "keeps_states", False)
    chat, answers, wanted = model.chat(max_tokens=12, sampling=GREEDY), [], []
    for text in TURNS:
        prompt = model.prompt([*chat.messages, {"role": "user", "content": text}])
        answers.append(chat.ask(text).tokens)
        wanted.append(hybrid.generated(prompt.input_ids, 12))
    assert answers[0] == wanted[0]
    assert answers != wanted


def test_images_in_a_conversation(made: Made) -> None:
    hybrid = made(SEES)
    model = Model(hybrid.build("last"), threads=1)
    chat = model.chat(max_tokens=3, sampling=GREEDY)
    picture = np.random.default_rng(5).integers(0, 256, (48, 80, 3), np.uint8)
    for text, images in (("Hello", []), ("What is this?", [picture]), ("And?", []), ("So?", [])):
        parts = [{"type": "image", "image": image} for image in images]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        prompt = model.prompt([*chat.messages, {"role": "user", "content": content}])
        arrays = prompt.transformers_arrays(IMAGE, VIDEO)
        given = {name: torch.tensor(array) for name, array in arrays.items()}
        out = hybrid.reference.generate(
            **given, attention_mask=torch.ones_like(given["input_ids"]), do_sample=False, max_new_tokens=3,
            eos_token_id=None,
        )  # fmt: skip
        assert chat.ask(text, images).tokens == out[0, prompt.input_ids.size :].tolist()


def test_the_engine_refuses(made: Made) -> None:
    with pytest.raises(VlpackError, match="linear attention"):
        Engine(made(SEES).build("last"))


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
    """A copy of a checkpoint with more tensors of these names."""
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
