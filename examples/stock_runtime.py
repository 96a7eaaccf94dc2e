"""Ask a package with onnxruntime-genai alone: python stock_runtime.py PACKAGE QUESTION [IMAGE ...]"""

import json
import sys

import onnxruntime_genai as og

folder, question, *images = sys.argv[1:]
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}] if images else question
messages = json.dumps([{"role": "user", "content": content}])
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

params = og.GeneratorParams(model)
params.set_search_options(max_length=4096)  # the prompt and the answer together, in tokens
generator = og.Generator(model, params)
if images:
    processor = model.create_multimodal_processor()
    generator.set_inputs(processor(prompt, images=og.Images.open(*images)))
else:
    generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
