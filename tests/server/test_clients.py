"""The unchanged openai package as the client of a server, because most programs use it."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

import numpy as np
import pydantic
import pytest

from samples import ANSWERS, IMAGES
from server.conftest import Running, data_uri, seen

openai: Any = pytest.importorskip("openai")


@pytest.fixture
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["digits", "tools", "embedding", "reranker"]
    assert client.models.retrieve("tools").owned_by == "vlpack"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("name", ["00.png", "05.png", "11.png"])
def test_chat(name: str, client: Any) -> None:
    made = client.chat.completions.create(model="digits", messages=seen(name), temperature=0)
    choice = made.choices[0]
    assert choice.message.content is not None
    assert choice.message.content.split() == ANSWERS[name]["read"].split()
    assert (choice.finish_reason, choice.message.role, made.model) == ("stop", "assistant", "digits")
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_a_stream(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "digits",
        "messages": seen(),
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices].count("stop") == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    told = [one for chunk in chunks if chunk.choices for one in (chunk.choices[0].logprobs or _NONE).content]
    assert [one.token for one in told] == [one.token for one in whole.choices[0].logprobs.content]
    assert b"".join(bytes(one.bytes) for one in told).decode() == text
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob <= 0 for one in told)


class _Nothing:
    content: tuple = ()


_NONE = _Nothing()


class Reading(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["digits", "letters"]
    certain: bool
    rows: list[Literal[1, 2, 3]] = pydantic.Field(min_length=1, max_length=2)


def test_parse_with_pydantic(client: Any) -> None:
    made = client.chat.completions.parse(
        model="tools", messages=[{"role": "user", "content": "What?"}], response_format=Reading, max_tokens=80
    )
    assert isinstance(made.choices[0].message.parsed, Reading)
    other = client.responses.parse(model="tools", input="What?", text_format=Reading, max_output_tokens=80)
    assert isinstance(other.output_parsed, Reading)


class Weather(pydantic.BaseModel):
    """The weather of a place."""

    model_config = pydantic.ConfigDict(extra="forbid")
    place: Literal["Oslo", "Lima"]
    days: Literal[1, 2]


def test_tools(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    asked: dict[str, Any] = {
        "model": "tools",
        "tools": [openai.pydantic_function_tool(Weather)],
        "tool_choice": {"type": "function", "function": {"name": "Weather"}},
        "temperature": 0,
        "max_tokens": 100,
    }
    made = client.chat.completions.parse(messages=messages, **asked)
    message = made.choices[0].message
    assert made.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(messages=messages, **asked) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.delta" in kinds
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    # the conversation continues with the tool's result
    messages += [message.model_dump(exclude={"parsed"}), {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    after = client.chat.completions.create(
        model="tools", messages=messages, tools=asked["tools"], temperature=0, max_tokens=5
    )
    assert after.usage.prompt_tokens > made.usage.prompt_tokens
    assert after.choices[0].message.content


def test_embeddings(client: Any) -> None:
    made = client.embeddings.create(model="embedding", input=["one", "two"])
    rows = np.array([one.embedding for one in made.data])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    plain = client.embeddings.create(model="embedding", input="two", encoding_format="float")
    assert np.allclose(plain.data[0].embedding, rows[1], atol=1e-6)
    assert 0 < plain.usage.prompt_tokens < made.usage.prompt_tokens
    short = client.embeddings.create(model="embedding", input="two", dimensions=8)
    assert np.allclose(short.data[0].embedding, rows[1][:8] / np.linalg.norm(rows[1][:8]), atol=1e-5)


def test_responses(client: Any) -> None:
    image = {"type": "input_image", "image_url": data_uri(IMAGES / "00.png"), "detail": "auto"}
    asked = [{"role": "user", "content": [image, {"type": "input_text", "text": "Read the digits."}]}]
    made = client.responses.create(model="digits", input=asked, temperature=0, metadata={"a": "b"})
    assert made.output_text.split() == ANSWERS["00.png"]["read"].split()
    assert (made.status, made.metadata, made.store) == ("completed", {"a": "b"}, False)
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    with client.responses.stream(model="digits", input=asked, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == made.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == made.output_text
    cut = client.responses.create(model="tools", input="Hello", temperature=0, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_responses_with_tools(client: Any) -> None:
    tool = {"type": "function", "name": "weather", "parameters": Weather.model_json_schema(), "strict": True}
    asked: dict[str, Any] = {"model": "tools", "tools": [tool], "max_output_tokens": 100, "temperature": 0}
    forced = {"tool_choice": "required", "parallel_tool_calls": False}
    made = client.responses.create(input="Weather?", **asked, **forced)
    (call,) = made.output
    assert call.type == "function_call"
    Weather.model_validate_json(call.arguments)
    with client.responses.stream(input="Weather?", **asked, **forced) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert streamed.arguments == call.arguments
    assert kinds.count("response.function_call_arguments.done") == 1
    items = [{"role": "user", "content": "Weather?"}, call.model_dump(exclude_none=True, exclude={"parsed_arguments"})]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "Rain."})
    after = client.responses.create(input=items, **{**asked, "max_output_tokens": 4})
    assert after.usage.input_tokens > made.usage.input_tokens


def test_completions(client: Any) -> None:
    made = client.completions.create(model="tools", prompt="Once", max_tokens=6, temperature=0, logprobs=1)
    assert len(made.choices[0].logprobs.tokens) == 6
    chunks = client.completions.create(model="tools", prompt="Once", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == made.choices[0].text


def test_errors_are_those_of_the_package(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="'logit_bias' is not supported") as caught:
        client.chat.completions.create(model="digits", messages=seen(), logit_bias={"1": 1})
    assert (caught.value.param, caught.value.type) == ("logit_bias", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="ask /v1/embeddings"):
        client.chat.completions.create(model="embedding", messages=seen())


def test_base64_is_what_the_package_decodes(running: Running) -> None:
    body = {"model": "embedding", "input": "two"}
    plain = running.ask("/v1/embeddings", body).json["data"][0]["embedding"]
    coded = running.ask("/v1/embeddings", {**body, "encoding_format": "base64"}).json["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.float32(plain))
    assert json.loads(json.dumps(plain)) == plain
