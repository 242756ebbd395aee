"""Rows of a dataset: what is said about a bad one, and tools that a table has changed."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from diglot.data import to_sample
from diglot.data.formats import convert
from diglot.errors import DataError, DiglotError

ASK = {"role": "user", "content": "How many?"}
SAY = {"role": "assistant", "content": "Two."}
BRIEF = {"role": "system", "content": "Be brief."}
F, G = ({"type": "function", "function": {"name": name, "parameters": {}}} for name in "fg")


def calling(arguments):
    return {**SAY, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "nothing in its columns question, expected `prompt`"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": []}, "`prompt` is [], expected a string or a non-empty list"),
        ({"prompt": 3}, "`prompt` is 3"),
        ({"prompt": "a", "completion": 3}, "`completion` is 3, expected a string"),
        ({"prompt": [ASK], "completion": [ASK]}, "the last message of `completion` is from 'user'"),
        ({"prompt": [{"content": "no role"}]}, "expected {'role': ..., 'content': ...}"),
        ({"messages": [SAY]}, "the only message is the assistant's"),
        ({"messages": "How many?"}, "`messages` is 'How many?'"),
        ({"text": 3}, "`text` is 3, expected a string"),
        ({"prompt": "a", "tools": "[{"}, "`tools` is a string but not JSON"),
        ({"prompt": "a", "tools": ["f"]}, "expected a list of JSON schemas"),
        ({"prompt": None, "completion": "c"}, "nothing in its columns completion, prompt"),
        ({"messages": [{"role": "user", "content": None}, SAY]}, "has neither content nor a call"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": []}]}, "has neither content nor a call"),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "the last message has weight 0"),
        ({"messages": [ASK, {**SAY, "role": "gpt"}]}, "a message of the role 'gpt', expected 'assistant'"),
        ({"messages": [{**ASK, "role": "User"}, SAY]}, "a message of the role 'User', expected 'user'"),
        ({"messages": [ASK, {**SAY, "reasoning": ["Hm."]}]}, "the reasoning of the last message is ['Hm.']"),
        ({"prompt": [1, 2]}, "`prompt` holds 1, expected {'role': ..., 'content': ...}. Token ids belong to one"),
        ({"text": [1, 2]}, "`text` is [1, 2], expected a string. Token ids belong to one tokenizer"),
        ({"prompt": "a", "completion": "b", "label": False}, "`label` is False, as in KTO's data"),
        ({"messages": [ASK, SAY], "kto_tag": "false"}, "`kto_tag` is 'false', as in KTO's data"),
        ({"messages": [ASK, {**SAY, "loss": False}]}, "(or `loss`, `train` false)"),
        ({"messages": [ASK, {**SAY, "prefix": True}]}, "'prefix', which says that it is unfinished"),
        ({"messages": [ASK, {**SAY, "content": "", "refusal": "No."}]}, "'refusal', which no template writes"),
        ({"messages": [ASK, {**SAY, "weight": 0.5}, ASK, SAY]}, "a message of weight 0.5, expected 0 or 1"),
        ({"messages": [ASK, calling('{"city": "Ro')]}, """the arguments of a call of 'f' are '{"city": "Ro', which"""),
        ({"messages": [ASK, calling("print(2)"), ASK, SAY]}, "'print(2)', which is text but not JSON"),
        ({"messages": [ASK, calling('"{}"')]}, "'\"{}\"'. Expected an object, or JSON text of one"),
        ({"messages": [ASK, calling(["Rome"])]}, "are '[\"Rome\"]'. Expected an object, or JSON text of one"),
        ({"messages": [ASK, {**SAY, "tool_calls": [{"id": "1"}]}, ASK, SAY]}, "a message calls {'id': '1'}, expected"),
        ({"messages": [{**ASK, "tools": [F]}, SAY]}, "of the role 'user' has `tools`, which no template reads there"),
        ({"messages": [{**BRIEF, "tools": [F]}, ASK], "tools": [G]}, "offers other `tools` than the column, or than"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, message) -> None:
    with pytest.raises(DataError) as caught:
        to_sample(row, "my.jsonl row 12")
    assert "my.jsonl row 12" in str(caught.value)
    assert message in str(caught.value)


def test_fields_that_a_table_filled_with_none_are_gone_at_every_depth() -> None:
    schemas = [
        {"type": "function", "function": {"name": "a", "parameters": {"properties": {"city": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "b", "parameters": {"properties": {"day": {"type": "integer"}}}}},
    ]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": {"city": "Rome"}}}]}
    rows = [{"messages": [ASK, call], "tools": schemas[:1]}, {"messages": [ASK, SAY], "tools": schemas[1:]}]
    table = Dataset.from_list(rows)
    assert table[0]["tools"][0]["function"]["parameters"]["properties"].get("day", 0) is None  # what is guarded against
    for row, schema in zip(table, schemas, strict=True):
        assert to_sample(row, "row").conversation.tools == (schema,)
    assert to_sample({**table[0], "messages": [ASK, table[0]["messages"][1], ASK]}, "row").conversation.messages == (
        ASK,
        {**call, "content": None},
        ASK,
    )


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("tools", [[F], json.dumps([F])])
def test_tools_in_a_system_message_are_the_tools_of_the_row(role, tools) -> None:
    system = {**BRIEF, "role": role}
    plain = to_sample({"messages": [system, ASK, SAY], "tools": [F]}, "row")
    assert plain.conversation.tools == (F,) and "tools" not in plain.conversation.messages[0]
    offering = {**system, "tools": tools}
    for row in (
        {"messages": [offering, ASK, SAY]},
        {"messages": [offering, ASK, SAY], "tools": [F]},
        {"prompt": [offering, ASK], "completion": "Two."},
        {"prompt": [offering, ASK], "completion": [SAY]},
    ):
        assert to_sample(row, "row") == plain
    view = to_sample({"prompt": [ASK], "teacher_prompt": [offering, ASK]}, "row").conversation
    assert view.tools is None and view.teacher_view.tools == (F,)


@pytest.mark.parametrize("label", [True, None, 1, "general", 0])
def test_a_label_that_does_not_forbid_an_answer_leaves_it_and_a_prompt_has_none(label) -> None:
    assert to_sample({"messages": [ASK, SAY], "label": label}, "row").reply == "Two."
    for row in ({"prompt": [ASK]}, {"messages": [ASK]}, {"text": "Two."}):
        assert to_sample({**row, "label": False}, "row").conversation is not None


def test_a_null_among_the_arguments_of_a_call_stays_where_no_table_wrote_it() -> None:
    arguments = {"city": "Rome", "unit": None, "days": [{"of": None}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a", "arguments": arguments}}]}
    sample = to_sample({"messages": [ASK, call, ASK, call]}, "row")
    assert sample.answer is not None and sample.answer.slots[1].texts == (json.dumps(arguments),)
    assert sample.conversation.messages[1] == call
    schema = {"name": "a", "parameters": {"properties": {"unit": {"default": None}}}}
    assert to_sample({"prompt": [ASK], "tools": json.dumps([schema])}, "row").conversation.tools == (schema,)


def test_a_message_may_say_something_else_than_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    thought = {"role": "assistant", "content": None, "reasoning_content": "Two, I think."}
    for message in (call, thought):
        assert to_sample({"messages": [ASK, message]}, "row").answer is not None


@pytest.mark.parametrize("name", ["loss", "train"])
def test_what_others_call_the_weight_of_a_message_is_its_weight(name) -> None:
    turns = [ASK, {**SAY, name: False}, ASK, {**SAY, name: True}]
    assert to_sample({"messages": turns}, "row") == to_sample(
        {"messages": [ASK, {**SAY, "weight": 0}, ASK, SAY]}, "row"
    )
    shared = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two.", name: False}]
    with pytest.raises(DataError, match="weight 0"):
        to_sample(convert({"conversations": shared}, "sharegpt", None), "row")


def test_a_message_of_weight_1_is_a_message_without_a_weight() -> None:
    assert to_sample({"messages": [ASK, {**SAY, "weight": 1}]}, "row") == to_sample({"messages": [ASK, SAY]}, "row")


def test_tools_may_be_a_string_of_json() -> None:
    assert to_sample({"prompt": [ASK], "tools": '[{"name": "f"}]'}, "row").conversation.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("column", "row"),
    [
        ("prompt", {"prompt": "half \ud83d", "completion": "fine"}),
        ("completion", {"prompt": "fine", "completion": "\ude00 half"}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "half \ud83d"}]}]}),
        ("text", {"text": "half \ud83d"}),
        ("teacher_prompt", {"prompt": "fine", "teacher_prompt": "half \ud83d"}),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_by_row_and_column(column, row):
    with pytest.raises(DataError, match=rf"rows.jsonl row 3 holds the lone surrogate U\+D[0-9A-F]{{3}} in `{column}`"):
        to_sample(row, "rows.jsonl row 3")


def test_a_whole_emoji_is_taken():
    assert to_sample({"text": "whole \U0001f600"}, "rows.jsonl row 3").reply == "whole \U0001f600"


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 5}, {"type": "thinking"}, "Hi"])
def test_a_part_of_content_that_is_no_text_is_refused_with_what_it_is(part) -> None:
    with pytest.raises(DiglotError) as caught:
        to_sample({"messages": [{**ASK, "content": [{"type": "text", "text": "a"}, part]}, SAY]}, "row 12")
    assert "row 12: the content of a 'user' message" in str(caught.value) and f"not {part!r}. Only" in str(caught.value)
