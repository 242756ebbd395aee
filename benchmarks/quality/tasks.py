"""Real prompts with reference texts, and answers that are right or wrong.

Rows come from the public sets of `demo/assets.py`. What trains, what chooses a rate (the end of the training part) and
what is measured (the held-out part) share no row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from assets import fetch_task, fetch_texts

from .programs import passes

VALIDATION = 64  # rows at the end of the training part


@dataclass(frozen=True)
class Item:
    """A row as the trainers take it, and what grades an answer to it (None: it has no right answer)."""

    row: dict[str, Any]  # prompt, completion
    grade: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Task:
    """How to read one set."""

    rows: Callable[[str], list[dict[str, Any]]]  # of a split of `assets`
    item: Callable[[dict[str, Any]], Item]
    programs: bool = False  # grading runs what the model wrote


def items(name: str, part: str) -> list[Item]:
    """`part`: "train", "validation" or "test". The order never changes."""
    task = TASKS[name]
    if part == "test":
        rows = task.rows("heldout")
    else:
        rows = task.rows("train")
        cut = max(len(rows) - VALIDATION, len(rows) // 2)
        rows = rows[:cut] if part == "train" else rows[cut:]
    return [task.item(row) for row in rows]


def chat(question: str, answer: str) -> dict[str, Any]:
    """One question and its answer as messages."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


# ---- numbers -----------------------------------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    """The last number of a text, without commas, plus signs and zeros that say nothing; None if there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    plain = numbers[-1].replace(",", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _gsm8k(row: dict[str, Any]) -> Item:
    wanted = last_number(row["answer"])
    instruction = "Solve the problem step by step. End with the answer as a number after ####."
    text = f"{row['question']}\n\n{instruction}"
    return Item(chat(text, row["answer"]), lambda answer: last_number(answer) == wanted)


# ---- competition mathematics -------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, with braces matched; None if there is none or it does not end."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len(r"\boxed{")
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[begin:at]
    return None


def plain_answer(answer: str) -> str:
    """The same answer whatever spaces, dollar signs, text boxes and forms of fractions it was written with."""
    answer = re.sub(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = re.sub(r"\\(?:left|right|!|,|;| |\$|%)", "", answer)
    answer = re.sub(r"[\s$%]", "", answer).rstrip(".")
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)


def _math(row: dict[str, Any]) -> Item:
    wanted = plain_answer(row["answer"])
    text = f"{row['question']}\n\nSolve step by step. Put the answer in \\boxed{{}}."

    def grade(answer: str) -> bool:
        own = boxed(answer)
        return own is not None and plain_answer(own) == wanted

    return Item(chat(text, row["solution"]), grade)


# ---- programs ----------------------------------------------------------------------------------------------------


def program_of(answer: str, prompt: str, entry_point: str | None) -> str:
    """The program in an answer: its first fenced block, or all of it; behind the prompt if it only goes on from it."""
    block = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = block[1] if block else answer
    goes_on = entry_point is not None and not re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE)
    return prompt + code if goes_on else code


def _program(row: dict[str, Any]) -> Item:
    text = f"Complete this Python code.\n\n{row['prompt']}"

    def grade(answer: str) -> bool:
        return passes(program_of(answer, row["prompt"], row["entry_point"]), row["tests"])

    return Item(chat(text, row["solution"]), grade)


def _programs(source: str | None) -> Callable[[str], list[dict[str, Any]]]:
    return lambda split: [row for row in fetch_task("programs", split) if source in (None, row["source"])]


# ---- prose -------------------------------------------------------------------------------------------------------


def _prose(row: dict[str, Any]) -> Item:
    """Twelve words as the prompt, the next forty-eight as the reference."""
    words = row["text"].split(" ")
    return Item({"prompt": " ".join(words[:12]), "completion": " " + " ".join(words[12:60])})


TASKS = {
    "gsm8k": Task(lambda split: fetch_texts("gsm8k", split), _gsm8k),
    "math500": Task(lambda split: fetch_task("math", split), _math),
    "humaneval": Task(_programs("humaneval"), _program, programs=True),
    "mbpp": Task(_programs("mbpp"), _program, programs=True),
    "programs": Task(_programs(None), _program, programs=True),
    "prose": Task(lambda split: fetch_texts("passages", split), _prose),
}
