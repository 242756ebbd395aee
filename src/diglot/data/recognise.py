"""What a dataset looks like, and which options make it readable: a proposal, never done by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diglot.data.formats import CONVERSATIONS, LABELS, MEDIA, OWN, READS, SHARED
from diglot.errors import DataError

EXPECTED = "`prompt`, `prompt` and `completion`, `messages`, or `text`"
QUESTIONS = ("question", "query", "problem", "user", "input", "instruction")
ANSWERS = ("answer", "response", "solution", "assistant", "output", "answers", "target", "reply", "completions")
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
    return sorted(set(columns) - _read(row) - {*MEDIA, *labels, "__row__", "__bad__"})


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
    if "system" not in (mapping or {}) and (system := [one for one in SYSTEMS if one in unread and row.get(one)]):
        pairs = [*(f"{new}={old}" for new, old in (mapping or {}).items()), f"system={system[0]}"]
        option = f"--dataset_format {name} --dataset_columns {','.join(pairs)}"
        raise DataError(
            f"{where}: `{system[0]}` looks like a system text, and is not read. Give {option}{_in_python(option)}."
        )
    return unread


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
    looks = (_of_names, _of_conversations, _of_answers, _of_system)
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
    return what, _joined({**own, **{new: old for old, new in meant.items()}}, columns)


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
        return what, _joined(dict(zip(names, ("prompt", answer), strict=True)), columns)
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
    return what, _joined(parts, columns)


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
    return what, _joined(dict(zip(names, (question, "chosen"), strict=True)), columns)


def _of_system(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """A system text in a column of its own would be read by nobody."""
    name = next((one for one in SYSTEMS if one in columns), None)
    own = [one for one in OWN if one in columns and row.get(one) is not None]
    if name is None or not own:
        return None
    parts = {one: one for one in own}
    if isinstance(row.get("prompt"), str) and "messages" not in own:
        parts = {"user": "prompt", **({"assistant": "completion"} if "completion" in own else {})}
        parts |= {one: one for one in own if one not in ("prompt", "completion")}
    return f"`{name}` looks like a system text, and is not read.", _joined({**parts, "system": name}, columns)


def _joined(parts: Mapping[str, str], columns: Sequence[str]) -> str:
    system = next((one for one in SYSTEMS if one in columns), None)
    extra = {"system": system} if system else {}
    extra |= {"history": "history"} if "history" in columns and "user" in parts else {}
    extra |= {one: one for one in ("tools", "teacher_prompt", "teacher") if one in columns}
    pairs = {**parts, **{new: old for new, old in extra.items() if old is not None}}
    return "--dataset_columns " + ",".join(new if new == old else f"{new}={old}" for new, old in pairs.items())


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
