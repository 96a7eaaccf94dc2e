"""``README.md`` of a package: what it is, how to run it, and where the runtime's own image processor differs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jinja2

from vlpack.export.origin import made_from
from vlpack.export.processor_config import GridDifference
from vlpack.quantize.policy import Policy
from vlpack.shipped import stock_runtime_example
from vlpack.version import __version__

_CARD = """\
---
library_name: onnxruntime-genai
{% if source.repo_id %}base_model: {{ source.repo_id }}
{% endif %}tags: [onnx, onnxruntime-genai, {{ genai_type }}, vlpack]
---
# {{ source.repo_id or source.name }}, {{ policy.precision }} for {{ policy.provider }}

{{ made_from }} by vlpack {{ version }}, for the stock onnxruntime-genai (0.18 or newer).

{% if complete -%}
With vlpack installed:

```
vlpack run . --image picture.jpg "What is in the picture?"
```
{% elif runnable -%}
This package contains the text decoder alone and takes no images. With vlpack installed:

```
vlpack run . "Why is the sky blue?"
```
{% else -%}
This package contains only these parts of the model: {{ parts | join(", ") }}. The runtime needs decoder, vision and
embedding together; build with `--part all` for a package that runs by itself.
{% if "decoder" in files %}
The decoder takes `inputs_embeds`{% if "per_layer_inputs" in decoder_inputs %} and `per_layer_inputs`, the DeepStack \
features of the image tokens (zeros for text){% endif %}.
{% endif %}{% endif %}
{% if complete or runnable -%}
With onnxruntime-genai alone (`pip install onnxruntime-genai`), `python stock_runtime.py . "QUESTION"\
{% if complete %} picture.jpg{% endif %}`:

```python
{{ stock_runtime }}```

By default the runtime uses half of the processor's cores. For another number, make the model from \
`config = og.Config(folder)` after `config.overlay('{"model": {"decoder": {"session_options": \
{"intra_op_num_threads": 8}}}}')`{% if complete %}, and the same for `vision`{% endif %}.

`max_length` in `genai_config.json` is at most 4096 tokens, because the runtime allocates the cache for all of them. \
For longer prompts and answers set the search option (a large image alone can take thousands of tokens); `vlpack run` \
does this automatically.

{% endif -%}
## Contents
| part | file |
| --- | --- |
{% for part, file in files.items() %}| {{ part }} | `{{ file }}` |
{% endfor %}
`vlpack.json` contains the hashes of all files, including those of the source; `vlpack inspect .` checks them.

## Precision
Activations are {{ policy.dtype }}; norms, rotary angles and residual sums are float32. The first rule that matches a \
module decides how its weights are stored:

| role | modules | stored as |
| --- | --- | --- |
{% for rule in policy.described() %}| {{ rule.role }} | `{{ rule.modules }}` | {{ rule.storage }} |
{% endfor %}
{%- if complete %}

## Images from C#, C++ and Java
`processor_config.json` configures the runtime's own image processor. It is close to transformers' but not equal, \
whereas vlpack's processor in Python is equal. They differ in these points:

{% if difference -%}
- Sizes: an edge of an even number of {{ difference.factor }}-pixel blocks and a half \
({{ difference.edges | join(", ") }} … pixels) is rounded up, whereas transformers rounds it down. Such images get \
another grid ({{ difference.width }}×{{ difference.height }}: {{ difference.runtime | join("×") }} patches instead of \
{{ difference.transformers | join("×") }}). No error or warning appears, but the model gets the image at another size: \
in trials its outputs differed from transformers' by 0.4 to 0.6 (relative), and the answer may differ. \
Make such an edge one pixel shorter beforehand, and both take the same grid.
{% endif -%}
- JPEG decoding differs by about one level in 255, and transparency is treated differently.
- Videos are not supported; vlpack supports them in Python, for Qwen3-VL.

To use transformers' pixels from other languages, too, prepare `pixel_values` and `image_grid_thw` yourself and pass \
them as named tensors, with `input_ids` whose image placeholders are expanded, and `num_image_tokens`.
{%- endif %}
"""


def model_card(
    source: Mapping[str, Any],
    policy: Policy,
    genai_type: str,
    files: Mapping[str, str],
    *,
    decoder_inputs: Collection[str] = (),
    difference: GridDifference | None = None,
) -> str:
    """The README of a package that generates text, as Markdown."""
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_CARD).render(
        source={"repo_id": None, "name": None, **source},
        made_from=made_from(source),
        policy=policy,
        genai_type=genai_type,
        files=files,
        parts=list(files),
        complete={"decoder", "vision", "embedding"} <= set(files),
        runnable="text" in files,
        decoder_inputs=decoder_inputs,
        difference=difference,
        stock_runtime=stock_runtime_example(),
        version=__version__,
    )
