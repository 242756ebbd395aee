"""What a dataset looks like, and which options make it readable: a proposal, never done by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diglot.data.formats import BAD, CONVERSATIONS, LABELS, MEDIA, OWN, READS, SHARED, SPEAKERS, WRITTEN, is_answered
from diglot.errors import DataError

EXPECTED = "`prompt`, `prompt` and `completion`, `messages`, or `text`"
QUESTIONS = ("question", "query", "problem", "user", "input", "instruction")
ANSWERS = ("answer", "response", "solution", "assistant", "output", "answers", "target", "reply", "completions",
           "responses", "outputs", "generations")  # fmt: skip
THOUGHTS = ("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "rationale", "chain_of_thought", "cot")
SYSTEMS = ("system", "system_prompt", "system_message")


def check_columns(columns: Sequence[str], row: Mapping[str, Any], where: str) -> list[str]:
    """Raise DataError for columns that are not understood, with the option that says what they are.

    Args:
        row: the first of the dataset: what is in a column says more than its name.

    Returns:
        The columns that nothing reads, sorted. They do not look like text that a model should read.
    """
    looks = _suggestion(columns, row)
    if looks is not None:
        what, option = looks
        if not option.startswith("--"):
            raise DataError(f"{where} has the columns {_listed(columns)}: {what} {option}")
        raise DataError(f"{where} has the columns {_listed(columns)}: {what} Give {option}{_in_python(option)}.")
    if not {"prompt", "messages", "text"} & set(columns):
        raise DataError(
            f"{where} has the columns {_listed(columns)}, expected {EXPECTED}. {_explanation(columns, row)}"
        )
    labels = {name for name in LABELS if isinstance(row.get(name), bool)}
    return sorted(set(columns) - _read(row) - {*MEDIA, *labels, "__row__", BAD, WRITTEN})


def check_format(
    name: str, mapping: Mapping[str, str] | None, columns: Sequence[str], row: Mapping[str, Any], where: str
) -> list[str]:
    """The columns that a format does not read; raise DataError if one of them looks like a system text.

    Args:
        mapping: of columns, new name -> name in the data.
        row: the first of the dataset.
    """
    read = {*READS[name], *SHARED, *(mapping or {}).values(), *MEDIA}
    unread = sorted(one for one in columns if one not in read and not one.startswith("__"))
    beside = {"system": next((one for one in SYSTEMS if one in unread and row.get(one)), None)}
    beside["reasoning"] = _thought(unread, row)
    for part, column in beside.items():
        if column is not None and part not in (mapping or {}):
            pairs = [*(f"{new}={old}" for new, old in (mapping or {}).items()), f"{part}={column}"]
            option = f"--dataset_format {name} --dataset_columns {','.join(pairs)}"
            raise DataError(
                f"{where}: `{column}` looks like {_BESIDE[part]}, and is not read. Give {option}{_in_python(option)}."
            )
    return unread


def unread_columns(where: str, names: Sequence[str]) -> str:
    """That nothing reads these columns, and what that means of those that hold answers."""
    notes = [note for column, note in _UNREAD.items() if column in names]
    return " ".join([f"{where}: nothing reads the columns {', '.join(names)}.", *notes])


_BESIDE = {"system": "a system text", "reasoning": "what is thought before the answer"}
_REJECTED = "What was rejected teaches nothing here: no objective compares two answers."
_ANSWERED = "Answers are read from the end of `messages`, or from `completion`: write the one to learn from there."
_UNREAD = {"rejected": _REJECTED, "rejected_response": _REJECTED, "responses": _ANSWERED}


def check_routes(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], labels: Sequence[str], where: str) -> None:
    """Raise DataError where a column that nothing reads names teachers by their labels, row for row.

    Args:
        rows: the first of the dataset.
        labels: of several teachers.
    """
    if "teacher" in columns or not rows:
        return
    for name in sorted(set(columns) - _read(rows[0])):
        values = {str(row.get(name)) for row in rows}
        if values <= set(labels):
            own = ",".join(one for one in OWN if one in columns and rows[0].get(one) is not None)
            option = f"--dataset_columns {own},teacher={name}"
            raise DataError(
                f"{where} names the teachers {', '.join(sorted(values))} in `{name}`, which nothing reads: every "
                f"teacher would read every row. Give {option}{_in_python(option)}, or call the column otherwise."
            )


def _suggestion(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """What the columns look like, and the option to give, or what else is to be done.

    None where they are Diglot's own or unknown.
    """
    looks = (
        _of_names,
        _of_responses,
        _of_trees,
        _of_functions,
        _of_choices,
        _of_conversations,
        _of_answers,
        _of_beside,
    )
    suggestions = (one(columns, row) for one in looks)
    return next((suggestion for suggestion in suggestions if suggestion is not None), None)


def _of_names(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Own names in other letters, or with spaces around them, as behind the comma of a table's header."""
    meant = {name: name.strip().lower() for name in columns if name not in OWN}
    meant = {name: own for name, own in meant.items() if own in OWN and own not in columns and row.get(name)}
    if not meant:
        return None
    what = f"nothing reads {', '.join(map(repr, meant))}, whose name is written otherwise."
    if any(name != name.strip() for name in meant):
        return what, f"Call them {', '.join(meant.values())} in the file."
    own = {one: one for one in OWN if one in columns and row.get(one) is not None}
    return what, _joined({**own, **{new: old for old, new in meant.items()}}, columns, row)


def _of_conversations(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    name = next((one for one in CONVERSATIONS if one in columns and row.get(one)), None)
    if name is None and not {"prompt", "text", "chosen"} & set(columns):
        name = next((one for one in columns if _turns(row[one])), None)
    if name is None or (name != "messages" and "messages" in columns):
        return None
    value = row[name]
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            option = "--dataset_format json_text" if name == "messages" else "--dataset_format sharegpt"
            return f"`{name}` holds messages as JSON text.", option
        return None
    turns = _turns(value)
    if turns == "from":
        option = "preference" if row.get("chosen") and row.get("rejected") else "sharegpt"
        mapping = "" if name in CONVERSATIONS else f" --dataset_columns conversations={name}"
        return f"`{name}` looks like ShareGPT's turns (`from`, `value`).", f"--dataset_format {option}{mapping}"
    if turns == "role" and name != "messages":
        answer = next((one for one in ANSWERS if isinstance(row.get(one), str)), None)
        if answer is not None and value[-1].get("role") != "assistant":
            return f"`{name}` holds messages, and `{answer}` the answer.", _joined(
                {"prompt": name, "completion": answer}, columns, row
            )
        return f"`{name}` holds messages.", f"--dataset_columns messages={name}"
    return None


def _turns(value: Any) -> str | None:
    """What says who speaks in a list of turns: "from" or "role"; None if it is no such list."""
    first = value[0] if isinstance(value, Sequence) and value and not isinstance(value, str) else None
    if not isinstance(first, Mapping):
        return None
    has_text = first.get("value") is not None or first.get("content") is not None
    return next((name for name in ("from", "role") if isinstance(first.get(name), str) and has_text), None)


def _of_answers(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Alpaca, preferences, and questions with answers."""
    if row.get("messages") is not None or (row.get("prompt") is not None and row.get("completion") is not None):
        return None
    if row.get("prompt") is None and row.get("text") is not None:
        if row.get("completion") is None:
            return None
        what = "`completion` belongs to a prompt, and `text` is read without one."
        return what, "--dataset_columns prompt=text,completion"
    if "chosen" in columns:
        return _of_preferences(columns, row)
    if "instruction" in columns and "prompt" not in columns:
        return _of_instructions(columns)
    question = next((one for one in QUESTIONS if one in columns), None)
    answer = next((one for one in ANSWERS if one in columns and one != question), None)
    if "prompt" in columns:
        if answer is None:
            return None
        names = ("user", "assistant") if isinstance(row.get("prompt"), str) else ("prompt", "completion")
        what = f"`{answer}` looks like the answer to `prompt`, and is not read."
        if row.get(answer) is not None and not isinstance(row[answer], str):
            return what, _to_choose(answer, row[answer])
        return what, _joined(dict(zip(names, ("prompt", answer), strict=True)), columns, row)
    if question is None:
        return None
    if answer is not None and row.get(answer) is not None and not isinstance(row[answer], str):
        return f"`{question}` and `{answer}` look like questions and answers.", _to_choose(answer, row[answer])
    if answer is not None and isinstance(row.get("context"), str):
        option = f"--dataset_format alpaca --dataset_columns instruction={question},input=context,output={answer}"
        return f"`{question}`, `context` and `{answer}` look like questions about a text and answers.", option
    parts = {"user": question, **({"assistant": answer} if answer else {})}
    what = (
        f"`{question}` and `{answer}` look like questions and answers."
        if answer
        else f"`{question}` looks like questions."
    )
    return what, _joined(parts, columns, row)


def _of_instructions(columns: Sequence[str]) -> tuple[str, str]:
    renamed = []
    if "input" not in columns and "context" in columns:
        renamed.append("input=context")
    if "output" not in columns:
        renamed += [f"output={one}" for one in ANSWERS if one in columns][:1]
    system = [f"system={one}" for one in SYSTEMS[1:] if one in columns]
    mapping = ",".join([*renamed, *system[:1]])
    return "they look like Alpaca's.", "--dataset_format alpaca" + (f" --dataset_columns {mapping}" if mapping else "")


def _to_choose(name: str, value: Any) -> str:
    return (
        f"`{name}` holds {value!r:.60}: write the one answer to learn from, a string, into a column, or name the "
        "columns that are to be read with --dataset_columns."
    )


def _of_preferences(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str]:
    what = "they look like preferences, of which `chosen` is the answer to learn from."
    chosen, prompt = row.get("chosen"), row.get("prompt")
    if isinstance(chosen, Sequence) and chosen and not isinstance(chosen, str) and isinstance(chosen[0], str):
        return what, _to_choose("chosen", chosen)
    if not isinstance(chosen, str):
        return what, "--dataset_format preference"
    if "instruction" in columns and prompt is None:
        return what, "--dataset_format alpaca --dataset_columns output=chosen"
    question = next((one for one in ("prompt", *QUESTIONS) if one in columns), None)
    if question is None:
        return what, "--dataset_columns text=chosen (plain text, for its whole length)"
    names = ("user", "assistant") if isinstance(row.get(question), str) else ("prompt", "completion")
    return what, _joined(dict(zip(names, (question, "chosen"), strict=True)), columns, row)


def _of_beside(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """A system text, or what was thought before the answer, in a column of its own would be read by nobody."""
    own = [one for one in OWN if one in columns and row.get(one) is not None]
    beside = {"system": next((one for one in SYSTEMS if one in columns), None)}
    beside["reasoning"] = _thought(columns, row) if is_answered(row) else None
    part, name = next(((part, name) for part, name in beside.items() if name is not None), ("", ""))
    if not name or not own:
        return None
    parts = {one: one for one in own}
    if isinstance(row.get("prompt"), str) and "messages" not in own:
        parts = {"user": "prompt", **({"assistant": "completion"} if "completion" in own else {})}
        parts |= {one: one for one in own if one not in ("prompt", "completion")}
    parts |= {new: old for new, old in beside.items() if old is not None}
    return f"`{name}` looks like {_BESIDE[part]}, and is not read.", _joined(parts, columns, row)


def _thought(columns: Sequence[str], row: Mapping[str, Any]) -> str | None:
    """The column of what was thought before an answer: one of words, since "on" and "high" say how to think."""
    return next((one for one in THOUGHTS if one in columns and len(str(row[one] or "").split()) > 2), None)


def _joined(parts: Mapping[str, str], columns: Sequence[str], row: Mapping[str, Any]) -> str:
    system, thought = next((one for one in SYSTEMS if one in columns), None), _thought(columns, row)
    extra = {"system": system} if system else {}
    extra |= {"reasoning": thought} if thought and "assistant" in parts else {}
    extra |= {"history": "history"} if "history" in columns and "user" in parts else {}
    extra |= {one: one for one in ("tools", "teacher_prompt", "teacher") if one in columns}
    pairs = {**parts, **{new: old for new, old in extra.items() if old is not None}}
    return "--dataset_columns " + ",".join(new if new == old else f"{new}={old}" for new, old in pairs.items())


# ---- what has to be written otherwise first ------------------------------------------------------------------------


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _of_responses(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Items of OpenAI's Responses, and `instructions` before them."""
    name = next((one for one in ("input", "output", "messages") if one in columns and _has_items(row.get(one))), None)
    if name is None:
        return None
    return f"`{name}` holds items of OpenAI's Responses.", (
        "Write each row as `messages`: `instructions` as a system message; an item of the type message with its text "
        "as `content`; function_call as an assistant's message with `tool_calls` of {'type': 'function', 'function': "
        "{'name': ..., 'arguments': ...}}; function_call_output as a message of the role 'tool'; the text of reasoning "
        "as `reasoning_content` of the message behind it. `tools` become {'type': 'function', 'function': ...}."
    )


def _has_items(value: Any) -> bool:
    items = [one for one in _list(value) if isinstance(one, Mapping)]
    parts = [part for one in items for part in _list(one.get("content")) if isinstance(part, Mapping)]
    return any(one.get("type") in _ITEMS for one in items) or any(
        part.get("type") in ("input_text", "output_text") for part in parts
    )


def _of_trees(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """A message a row, as OASST has them: `text` would be read as a text of its own."""
    tree = row.get("prompt")
    whole = isinstance(tree, Mapping) and "replies" in tree
    text = next((one for one in ("text", "content", "message") if isinstance(row.get(one), str)), None)
    alone = text is not None and str(row.get("role")).lower() in (*SPEAKERS, "prompter")
    if not whole and not alone and not {"message_id", "parent_id"} <= set(columns):
        return None
    return "they are a tree of messages." if whole else "each row is one message.", (
        "Write each conversation, as OASST's from its first message to one without a reply, as a row `messages` of "
        "{'role': 'user' or 'assistant', 'content': ...} (prompter is 'user')."
    )


def _of_functions(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    functions = row.get("functions")
    named = any(isinstance(one, Mapping) and "name" in one for one in _list(functions))
    if "tools" in columns or not (named or (isinstance(functions, str) and '"name"' in functions)):
        return None
    return "`functions` holds tools in OpenAI's older form, and is not read.", (
        "Write them into `tools`, each as {'type': 'function', 'function': ...}, and `function_call` of a message as "
        "`tool_calls`, a list of the same."
    )


def _of_choices(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Answers of an API, or what a question asks to choose from."""
    name = next((one for one in ("choices", "options") if one in columns and row[one]), None)
    if name is None:
        return None
    if any(isinstance(one, Mapping) and "message" in one for one in _list(row[name])):
        return f"`{name}` holds answers of an API, and is not read.", (
            "Write the `message` of the one to learn from behind the messages of its prompt, in `messages`."
        )
    if {"prompt", "messages", "text"} & set(columns) or isinstance(row[name], (bool, int, float)):
        return None
    return f"`{name}` looks like what is to be chosen from, and is not read.", (
        "Write it into the question, and the answer in the words that it is to have, into `messages`, or into columns "
        "`user` and `assistant` for --dataset_columns user,assistant."
    )


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _explanation(columns: Sequence[str], row: Mapping[str, Any]) -> str:
    """What to do about columns that look like nothing known."""
    if "input_ids" in columns:
        return "Token ids belong to one tokenizer, and two models read these rows: give their text."
    value = row.get(columns[0])
    inside = value[0] if isinstance(value, Sequence) and value and columns[0] not in CONVERSATIONS else None
    if len(columns) == 1 and isinstance(inside, Mapping) and {*OWN, *CONVERSATIONS, *QUESTIONS} & set(inside):
        return f"The rows seem to be inside of {columns[0]!r}: write that list alone into a file."
    return (
        "Say which of yours are which, in the models' chat templates, with --dataset_columns user=QUESTION,"
        "assistant=ANSWER, or as plain text with prompt=TEXT,completion=TEXT; or in Python "
        "load_dataset(..., columns={...})."
    )


def _in_python(option: str) -> str:
    words = option.split()
    names = {"--dataset_format": "format", "--dataset_columns": "columns"}
    arguments = ", ".join(f"{names[a]}={b!r}" for a, b in zip(words[::2], words[1::2], strict=False) if a in names)
    return f", or in Python load_dataset(..., {arguments})"


def _read(row: Mapping[str, Any]) -> set[str]:
    """Which columns a row like this is read from."""
    always = {"tools", "teacher_prompt", "teacher"}
    if row.get("messages") is not None:
        return always | {"messages"}
    if row.get("prompt") is not None:
        return always | {"prompt", "completion"}
    return always | {"text"} if row.get("text") is not None else always | {"messages", "prompt", "completion", "text"}


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(sorted(c for c in columns if not c.startswith("__")))
