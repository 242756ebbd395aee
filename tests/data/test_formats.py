"""Rows as other programs write them: refused with the option to give, and read with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diglot.data import Sample, load_dataset, to_sample, usable_rows
from diglot.data.formats import column_mapping
from diglot.data.recognise import check_columns, check_routes
from diglot.errors import ConfigError, DataError

ASK, SAY = {"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four, 四."}
BRIEF = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": SAY["content"]}
THOUGHT = "It is the sum."
Q, A = ASK["content"], SAY["content"]


def save(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def first(name: str, **options: Any) -> Sample:
    return to_sample(load_dataset(name, **options)[0], "row 0")


# A row, the option that its refusal names, what is read before the reply.
ROWS: list[tuple[dict[str, Any], str, list[dict[str, str]]]] = [
    ({"conversations": [HUMAN, GPT]}, "--dataset_format sharegpt", [ASK]),
    ({"conversations": [HUMAN, GPT], "system": "Be brief."}, "--dataset_format sharegpt", [BRIEF, ASK]),
    ({"conversations": json.dumps([HUMAN, GPT])}, "--dataset_format sharegpt", [ASK]),
    ({"messages": [HUMAN, GPT]}, "--dataset_format sharegpt", [ASK]),
    ({"conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, GPT]}, "--dataset_format sharegpt",
     [ASK, {**SAY, "weight": 0}, ASK]),
    ({"conversations": [ASK, SAY]}, "--dataset_columns messages=conversations", [ASK]),
    ({"messages": json.dumps([ASK, SAY])}, "--dataset_format json_text", [ASK]),
    ({"instruction": Q, "input": "", "output": A}, "--dataset_format alpaca", [ASK]),
    ({"instruction": Q, "context": "", "response": A}, "--dataset_format alpaca", [ASK]),
    ({"question": Q, "answer": A}, "--dataset_columns user=question,assistant=answer", [ASK]),
    ({"problem": Q, "solution": A, "system_prompt": "Be brief."},
     "--dataset_columns user=problem,assistant=solution,system=system_prompt", [BRIEF, ASK]),
    ({"query": Q, "response": A, "history": [["Hi", "Hello"]]},
     "--dataset_columns user=query,assistant=response,history",
     [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, ASK]),
    ({"prompt": Q, "response": A}, "--dataset_columns user=prompt,assistant=response", [ASK]),
    ({"prompt": [ASK], "response": A}, "--dataset_columns prompt,completion=response", [ASK]),
    ({"prompt": Q, "chosen": A, "rejected": "Five."}, "--dataset_columns user=prompt,assistant=chosen", [ASK]),
    ({"prompt": Q, "chosen": [ASK, SAY], "rejected": [ASK, ASK]}, "--dataset_format preference", [ASK]),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]}, "--dataset_format preference", [ASK]),
    ({"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, "--dataset_format preference", [ASK]),
    ({"prompt": Q, "chosen": [SAY], "rejected": [SAY]}, "--dataset_format preference", [ASK]),
    ({"prompt": [ASK], "chosen": SAY, "rejected": SAY}, "--dataset_format preference", [ASK]),
    ({"prompt": [ASK], "chosen": A, "rejected": "Five."}, "--dataset_columns prompt,completion=chosen", [ASK]),
    ({"question": Q, "chosen": A, "rejected": "Five.", "system": "Be brief."},
     "--dataset_columns user=question,assistant=chosen,system", [BRIEF, ASK]),
    ({"instruction": Q, "chosen": A, "rejected": "Five."},
     "--dataset_format alpaca --dataset_columns output=chosen", [ASK]),
    ({"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A},
      "rejected": {"from": "gpt", "value": "Five."}}, "--dataset_format preference", [ASK]),
    ({"turns": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
     "--dataset_format sharegpt --dataset_columns conversations=turns", [ASK]),
    ({"chat": [ASK, SAY]}, "--dataset_columns messages=chat", [ASK]),
    ({"question": Q, "context": "", "answer": A},
     "--dataset_format alpaca --dataset_columns instruction=question,input=context,output=answer", [ASK]),
    ({"instruction": "", "input": Q, "output": A}, "--dataset_format alpaca", [ASK]),
    ({"prompt": Q, "text": "Below is ...", "output": A}, "--dataset_columns user=prompt,assistant=output", [ASK]),
    ({"prompt": [ASK], "Completion": A}, "--dataset_columns prompt,completion=Completion", [ASK]),
    ({"prompt": Q, "completion": A, "system": "Be brief."},
     "--dataset_columns user=prompt,assistant=completion,system", [BRIEF, ASK]),
    ({"messages": [ASK, SAY], "system_prompt": "Be brief."}, "--dataset_columns messages,system=system_prompt",
     [BRIEF, ASK]),
    ({"input": [ASK], "output": A}, "--dataset_columns prompt=input,completion=output", [ASK]),
    ({"question": Q, "reasoning": THOUGHT, "answer": A},
     "--dataset_columns user=question,assistant=answer,reasoning", [ASK]),
    ({"prompt": Q, "completion": A, "cot": THOUGHT, "system": "Be brief."},
     "--dataset_columns user=prompt,assistant=completion,system,reasoning=cot", [BRIEF, ASK]),
    ({"messages": [ASK, SAY], "thinking": THOUGHT}, "--dataset_columns messages,reasoning=thinking", [ASK]),
    ({"prompt": [ASK], "completion": A, "rationale": THOUGHT},
     "--dataset_columns prompt,completion,reasoning=rationale", [ASK]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "option", "read"), ROWS, ids=lambda x: "+".join(x) if isinstance(x, dict) else None)
def test_a_row_of_another_program_is_refused_with_the_option_that_reads_it(
    row: dict[str, Any], option: str, read: list[dict[str, str]], tmp_path: Path
) -> None:
    name = save(tmp_path, row)
    with pytest.raises(DataError) as caught:
        load_dataset(name)
    advice = str(caught.value).split(": ", 1)[1].split(" Give ")[1].split(", or in Python")[0].split()
    assert " ".join(advice).startswith(option)
    names = {"--dataset_format": "format", "--dataset_columns": "columns"}
    sample = first(name, **{names[n]: value for n, value in zip(advice[::2], advice[1::2], strict=True)})
    assert list(sample.conversation.messages or ()) == read
    assert sample.reply == A
    thought = [] if THOUGHT not in row.values() else [THOUGHT]
    assert [text for slot in (sample.answer.slots if sample.answer else ()) for text in slot.texts[:1]] in (
        [[*thought, A]] if thought else [[], [A]]
    )


ONE_MESSAGE = r"each row is one message\. Write each conversation"
SEVERAL = r"write the one answer to learn from, a string, into a column"
RESPONSES = r"items of OpenAI's Responses\. Write each row as `messages`: `instructions` as a system message"
ITEM = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": A}]}
FUNCTION = {"name": "f", "parameters": {}}


# A row, and what its refusal says must be written otherwise.
@pytest.mark.parametrize(("row", "advice"), [
    ({"input": [ASK], "output": [ITEM]}, RESPONSES),
    ({"input": Q, "instructions": "Be brief.", "output": [{"type": "reasoning", "summary": []}, ITEM]}, RESPONSES),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": Q}]}]}, RESPONSES),
    ({"messages": [ASK, {"type": "function_call", "name": "f", "arguments": "{}"}]}, RESPONSES),
    ({"message_id": "1", "parent_id": None, "text": Q, "role": "prompter", "lang": "en"}, ONE_MESSAGE),
    ({"conversation": "1", "role": "user", "content": Q}, ONE_MESSAGE),
    ({"message_tree_id": "1", "prompt": {"text": Q, "role": "prompter", "replies": []}}, "they are a tree of messages"),
    ({"messages": [ASK, SAY], "functions": [FUNCTION]}, r"OpenAI's older form.* Write them into `tools`"),
    ({"messages": [ASK, SAY], "functions": json.dumps([FUNCTION])}, r"OpenAI's older form.*`tool_calls`"),
    ({"messages": [ASK], "choices": [{"index": 0, "message": SAY}]}, r"answers of an API.* behind the messages of its"),
    ({"question": Q, "choices": ["Three.", A], "answer": 1}, r"to be chosen from.* Write it into the question"),
    ({"question": Q, "choices": {"text": ["Three.", A], "label": ["A", "B"]}, "answerKey": "B"}, r"to be chosen from"),
    ({"prompt": Q, "responses": [A, "Five."]}, SEVERAL),
    ({"question": Q, "generations": [A, "Five."]}, SEVERAL),
])  # fmt: skip
def test_a_row_that_no_option_reads_is_refused_with_how_to_write_it(
    row: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl .*has the columns .*{advice}"):
        load_dataset(save(tmp_path, row))


@pytest.mark.parametrize(("column", "value", "note"), [
    ("rejected", [SAY], "What was rejected teaches nothing here"),
    ("responses", [A, "Five."], "Answers are read from the end of `messages`"),
    ("reasoning", "on", "nothing reads the columns reasoning."),
])  # fmt: skip
def test_what_is_left_out_of_a_row_with_an_answer_is_explained_once(
    column: str, value: Any, note: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_dataset(save(tmp_path, {"messages": [ASK, SAY], column: value}))
    usable_rows(data, lambda _: True, name="train", about={}, on_bad_row="stop")
    assert caplog.text.count(note) == 1


def test_reasoning_beside_a_format_is_read_if_it_is_named(tmp_path: Path) -> None:
    row = {"instruction": Q, "output": A, "thought": THOUGHT}
    name = save(tmp_path, row)
    with pytest.raises(DataError, match=r"`thought` looks like what is thought before .*_columns reasoning=thought"):
        load_dataset(name, format="alpaca")
    sample = first(name, format="alpaca", columns="reasoning=thought")
    assert sample.answer is not None and sample.answer.text == THOUGHT + A
    assert first(save(tmp_path, {**row, "thought": None, "reasoning": "on"}), format="alpaca").answer is None


def test_an_instruction_with_an_input_is_one_question(tmp_path: Path) -> None:
    name = save(tmp_path, {"instruction": "Translate.", "input": "Hallo", "output": "Hello"})
    sample = first(name, format="alpaca")
    assert sample.conversation.messages == ({"role": "user", "content": "Translate.\n\nHallo"},)
    assert sample.reply == "Hello"


def test_columns_alone_are_read_and_others_are_left(tmp_path: Path) -> None:
    """Naming columns says that the others are to be left: a picture beside a text is then no error."""
    name = save(tmp_path, {"messages": [ASK, SAY], "images": ["a.png"], "tools": '[{"name": "f"}]'})
    with pytest.raises(DataError, match="row 0 has something in `images`"):
        load_dataset(name)
    assert first(name, columns="messages").conversation.tools is None
    assert first(name, columns={"messages": "messages", "tools": "tools"}).conversation.tools == ({"name": "f"},)


def test_a_label_that_is_the_answer_forbids_none(tmp_path: Path) -> None:
    assert first(save(tmp_path, {"q": "x", "label": "False"}), columns="user=q,assistant=label").reply == "False"
    assert first(save(tmp_path, {"prompt": "x", "completion": "y", "label": False}), columns="prompt").reply is None


def test_an_empty_column_of_pictures_is_no_picture(tmp_path: Path) -> None:
    assert first(save(tmp_path, {"messages": [ASK, SAY], "images": []})).reply == A


@pytest.mark.parametrize(("row", "options", "message"), [
    ({"conversations": [{"from": "narrator", "value": "x"}]}, {"format": "sharegpt"}, "'narrator'.*human"),
    ({"conversations": []}, {"format": "sharegpt"}, "expected a list of turns"),
    ({"messages": "[{"}, {"format": "json_text"}, "text but not JSON"),
    ({"q": 3, "a": "x"}, {"columns": "user=q,assistant=a"}, "`user` is 3, expected a string"),
    ({"q": None, "a": "x"}, {"columns": "user=q,assistant=a"}, "`assistant` something"),
    ({"prompt": "x", "s": "y"}, {"columns": "prompt,system=s"}, "`prompt` is plain text. Map it as `user`"),
    ({"messages": [BRIEF, ASK], "s": "y"}, {"columns": "messages,system=s"}, "begins with a system message"),
    ({"chosen": None, "rejected": "x"}, {"format": "preference"}, "`chosen` is None"),
    ({"q": "x", "a": "y", "label": False}, {"columns": "user=q,assistant=a"}, "`label` is False, as in KTO"),
    ({"q": "x", "h": ["y"]}, {"columns": "user=q,history=h"}, "pairs of a question and an answer"),
    ({"q": "x", "c": "y"}, {"columns": "user=q,reasoning=c"}, "no message of the assistant's to put it into"),
    ({"q": "x", "a": "y", "c": 3}, {"columns": "user=q,assistant=a,reasoning=c"}, "`reasoning` is 3, expected a str"),
])  # fmt: skip
def test_a_row_that_a_format_cannot_read_is_named_with_what_is_in_it(
    row: dict[str, Any], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl .* row 0.*{message}"):
        load_dataset(save(tmp_path, row), **options)


@pytest.mark.parametrize("arguments", ["", "user=a,user=b", {"user": 3}, "user=", {"user": ""}])
def test_a_mapping_that_says_nothing_or_too_much_is_refused(arguments: Any) -> None:
    with pytest.raises(ConfigError, match="dataset_columns"):
        column_mapping(arguments)


def test_a_mapping_names_what_is_read_and_what_is_there(tmp_path: Path) -> None:
    name = save(tmp_path, {"q": "x"})
    with pytest.raises(ConfigError, match="names question, which nothing reads"):
        load_dataset(name, columns="question=q")
    with pytest.raises(DataError, match="has no column question, which dataset_columns names; it has q"):
        load_dataset(name, columns="user=question")
    with pytest.raises(ConfigError, match="none of sharegpt"):
        load_dataset(name, format="shargpt")


@pytest.mark.parametrize(("row", "message"), [
    ({"input_ids": [1, 2], "labels": [1, 2]}, "Token ids belong to one tokenizer"),
    ({"data": [{"prompt": "x"}]}, "seem to be inside of 'data'"),
    ({"x": "y", "z": "w"}, "columns x, z, expected `prompt`"),
])  # fmt: skip
def test_columns_that_look_like_nothing_known_say_what_can_be_done(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_columns(list(row), row, "data")


def test_columns_that_nothing_reads_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_dataset(save(tmp_path, {"prompt": [ASK], "data_source": "x", "reward_model": {"a": 1}}))
    assert "nothing reads the columns data_source, reward_model" in caplog.text


def test_a_column_of_teachers_that_nothing_reads_is_refused() -> None:
    rows = [{"prompt": "x", "data_source": "math"}, {"prompt": "y", "data_source": "code"}]
    with pytest.raises(DataError, match="--dataset_columns prompt,teacher=data_source"):
        check_routes(list(rows[0]), rows, ["math", "code"], "train")
    check_routes(list(rows[0]), rows, ["math", "law"], "train")


@pytest.mark.parametrize("values", [{"answers": ["Four.", "4"]}, {"answer": {"text": ["Four."]}}])
def test_several_answers_are_not_called_an_answer(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds .*: write the one answer to learn from, a string, into a column"):
        load_dataset(save(tmp_path, {"question": Q, **values}))


def test_a_name_with_a_space_before_it_is_not_left_unread(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt, completion\na, b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"nothing reads ' completion', whose name .* Call them completion in the file"):
        load_dataset(str(path))


@pytest.mark.parametrize("speaker", ["function_call", "tool_call"])
def test_a_turn_of_sharegpt_that_calls_is_a_call(speaker: str, tmp_path: Path) -> None:
    call = {"name": "clock", "arguments": {"tz": "UTC"}}
    question, called = {"from": "human", "value": Q}, {"from": speaker, "value": json.dumps(call)}
    sample = first(save(tmp_path, {"conversations": [question, called]}), format="sharegpt")
    assert sample.answer is not None and sample.answer.text == 'clock{"tz": "UTC"}'
    turns = [question, called, {"from": "observation", "value": "noon"}, {"from": "gpt", "value": A}]
    read = first(save(tmp_path, {"conversations": turns}), format="sharegpt").conversation.messages
    assert read is not None and [m["role"] for m in read] == ["user", "assistant", "tool"]
    assert read[1]["tool_calls"] == [{"type": "function", "function": call}]
    with pytest.raises(DataError, match=r"row 0: a turn of '\w+' is 'noon', expected JSON text of {'name'"):
        load_dataset(
            save(tmp_path, {"conversations": [question, {"from": speaker, "value": "noon"}]}), format="sharegpt"
        )


def test_a_format_leaves_no_picture_and_no_system_text_unread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = {"conversations": [{"from": "human", "value": "<image>" + Q}, {"from": "gpt", "value": A}]}
    with pytest.raises(DataError, match=r"row 0: there is something in `image`, and only text can be compared"):
        load_dataset(save(tmp_path, {**turns, "image": "a.png"}), format="sharegpt")
    with pytest.raises(DataError, match=r"`system_prompt` looks like a system text.*_columns system=system_prompt"):
        load_dataset(save(tmp_path, {**turns, "system_prompt": "Be brief."}), format="sharegpt")
    read = first(save(tmp_path, {**turns, "system_prompt": "Be brief.", "chosen": A}),
                 format="sharegpt", columns="system=system_prompt")  # fmt: skip
    assert (read.conversation.messages or ())[0] == BRIEF and "nothing reads the columns chosen" in caplog.text


TEXTS = ["42", "null", "true", "[1, 2]", '{"a": 1}', "1e5", "NaN", '"quoted"', " 4", "007"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_is_json_stays_a_text_when_columns_are_mapped(streaming: bool, tmp_path: Path) -> None:
    name = save(tmp_path, *({"q": text, "a": text} for text in TEXTS))
    rows = load_dataset(name, columns="prompt=q,completion=a", streaming=streaming)
    assert [(row["prompt"], row["completion"]) for row in rows] == [(text, text) for text in TEXTS]
