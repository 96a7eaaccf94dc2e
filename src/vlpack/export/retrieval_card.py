"""``README.md`` of an embedding model's or reranker's package: how to run it, with vlpack or onnxruntime alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from vlpack.export.origin import made_from
from vlpack.export.retrieval import CHAT
from vlpack.preprocess.retrieval_prompts import AFTER, BEFORE, JUDGE, plain_pair
from vlpack.quantize.policy import Policy
from vlpack.tasks import EMBEDDING, RERANKER
from vlpack.version import __version__

_CARD = """\
---
library_name: onnx
{% if source.repo_id %}base_model: {{ source.repo_id }}
{% endif %}pipeline_tag: {{ "text-ranking" if reranker else "feature-extraction" }}
tags: [onnx, onnxruntime, {{ task }}, vlpack]
---
# {{ source.repo_id or source.name }}, {{ policy.precision }} for {{ policy.provider }}

{{ made_from }} by vlpack {{ version }}, \
for the task {{ task }}. It runs on plain onnxruntime; onnxruntime-genai has no such models.

{% if not runnable -%}
This package contains only these parts of the model: {{ files | join(", ") }}. Build with `--part all` for a package \
that runs by itself.

{% elif reranker -%}
```python
import vlpack

model = vlpack.load(".")
model.score("What is the capital of China?", ["Beijing is.", "Gravity attracts."])  # probabilities, 0 … 1
```
{% else -%}
```python
import vlpack

model = vlpack.load(".")
{% if chat -%}
model.embed(["a text"{% if images %}, {"image": "a.png"}, {"image": "b.png", "text": "both"}{% endif %}])
{%- else -%}
model.embed(["a document"])
{%- endif %}  # float32 [n, {{ encoder.hidden_size }}], |x| = 1
model.embed(["a query"], instruction="Given a web search query, retrieve relevant passages that answer the query")
```
{% endif %}
## Inputs and outputs
{% for name, part in parts.items() %}
`{{ files[name] }}` ({{ name }}): \
{{ part.inputs | map("shown") | join(", ") }} → {{ part.outputs | map("shown") | join(", ") }}
{% endfor %}
Pad rows on the right; `attention_mask` is 1 for tokens and 0 for padding. \
{% if reranker %}`scores` is the probability of the token `yes` ({{ encoder.answers.yes }}) against `no` \
({{ encoder.answers.no }}) after the last token.{% else %}`sentence_embedding` is the hidden state of the last token, \
of length 1.{% endif %}
{%- if images %} \
The rows of `image_features` of all images belong, in order, to the tokens {{ encoder.image.image_token_id }}; without \
images, pass an array of 0 rows. `position_ids` are those of M-RoPE: for text, positions increase on all three axes; \
the tokens of an image all have the same position in time, their rows and columns count from that position, and the \
text after it begins after the larger of both. Images have {{ encoder.image.min_pixels }} to \
{{ encoder.image.max_pixels }} pixels.
{%- endif %}

## Prompt
{% if prompt -%}
```
{{ prompt }}```
The last line break is part of the prompt. \
{% if chat %}An image is written as `<|vision_start|><|image_pad|><|vision_end|>` before its text, with the \
placeholder repeated for each feature.{% endif %}
{% else -%}
The prompt of a document is its text; that of a query is `Instruct: INSTRUCTION`, a line break and `Query:TEXT`. Both \
get the special tokens that the tokenizer adds.
{% endif %}
{%- for name, prompt in encoder.prompts.items() %}
Prompt `{{ name }}`: `{{ prompt | replace("\\n", "\\\\n") }}`
{% endfor %}
## Precision
Activations are {{ policy.dtype }}; norms, rotary angles, residual sums and results are float32. The first rule that \
matches a module decides how its weights are stored:

| role | modules | stored as |
| --- | --- | --- |
{% for rule in policy.described() %}| {{ rule.role }} | `{{ rule.modules }}` | {{ rule.storage }} |
{% endfor %}
`vlpack.json` contains the hashes of all files, including those of the source; `vlpack inspect .` checks them.
"""


def encoder_card(
    source: Mapping[str, Any],
    policy: Policy,
    task: str,
    encoder: Mapping[str, Any],
    files: Mapping[str, str],
    parts: Mapping[str, Any],
) -> str:
    """The README of an embedding model's or reranker's package, as Markdown.

    Args:
        source: section ``source`` of the manifest.
        policy: precision policy of the package.
        task: ``embedding`` or ``reranker``.
        encoder: section ``encoder`` of the manifest.
        files: file names of the graphs by part.
        parts: inputs and outputs of each part.
    """
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["shown"] = lambda port: f"`{port.name}` [{', '.join(map(str, port.shape))}]"
    default = encoder["default_prompt"]
    instruction = (encoder["prompts"][default] if default is not None else "") or encoder["instruction"]
    return environment.from_string(_CARD).render(
        source={"repo_id": None, "name": None, **source},
        made_from=made_from(source),
        policy=policy,
        task=task,
        reranker=task == RERANKER,
        chat=encoder["form"] == CHAT,
        images="image" in encoder,
        prompt=_prompt(task, encoder["form"], instruction or ""),
        encoder=encoder,
        files=files,
        parts={name: part for name, part in parts.items() if name in files},
        runnable="text" in files or {"decoder", "vision", "embedding"} <= set(files),
        version=__version__,
    )


def _prompt(task: str, form: str, instruction: str) -> str:
    """The prompt, with words in capitals in place of texts; empty if the prompt is the text alone."""
    if form != CHAT:
        return "" if task == EMBEDDING else BEFORE + plain_pair(instruction, "QUERY", "DOCUMENT") + AFTER
    system, user = instruction, "TEXT"
    if task == RERANKER:
        system, user = JUDGE, f"<Instruct>: {instruction}<Query>:QUERY\n<Document>:DOCUMENT"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
