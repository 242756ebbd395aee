"""Turns in a student's ids: found by its template, and believed only if rendering gives the very ids back."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from support.real_assets import tokenizer as real_tokenizer

from diglot.engines.turns import TurnFinder
from diglot.errors import DataError, RenderingError, VocabularyError
from diglot.rendering import Conversation, Renderer

CHATML, TURNS, INST = (Renderer(make(), name="student") for make in (zoo.chatml, zoo.turns, zoo.inst))
TALK = [
    ("system", "Be brief: naïve 数学."),
    ("user", "Hi <b> 12"),
    ("assistant", "Hello\n there"),
    ("user", "More?\n"),
    ("assistant", "Yes 数学!"),
]


def ids_of(
    renderer: Renderer, talk: list[tuple[str, str]], stop: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """As an engine keeps a conversation: what the template adds, replies as sampled; and where the replies are."""
    ids: list[int] = []
    turns: list[tuple[int, int]] = []
    messages = [{"role": role, "content": content} for role, content in talk]
    around, _ = renderer.template.pieces(messages[:-1], tools=None)
    replies = [content for role, content in talk if role == "assistant"]
    for text, reply in zip(around, replies, strict=True):
        markup = renderer.encoder.encode_markup(text).tolist()
        ids += markup[1:] if turns else markup  # it begins with the stop that was sampled
        own = renderer.encoder.encode([reply])[0].ids.tolist()
        turns.append((len(ids), len(ids) + len(own) + 1))
        ids += [*own, renderer.stop_id]
    return (ids, turns) if stop else (ids[:-1], [*turns[:-1], (turns[-1][0], len(ids) - 1)])


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("renderer", [CHATML, INST])
def test_all_turns_are_found_where_they_are(renderer: Renderer, stop: bool) -> None:
    talk = TALK[0 if renderer is CHATML else 1 :]
    ids, turns = ids_of(renderer, talk, stop)
    result = TurnFinder(renderer).find(ids)
    assert list(result.turns) == turns and result.ids.tolist() == ids
    between = [[(m["role"], m["content"]) for m in before] for before in result.messages]
    assert between == [[m for m in talk[:-2] if m[0] != "assistant"], [talk[-2]]]


def test_one_turn_of_a_template_that_trims_is_found() -> None:
    ids, turns = ids_of(TURNS, TALK[1:3])
    assert list(TurnFinder(TURNS).find(ids).turns) == turns


def test_results_of_tools_are_messages_of_their_own() -> None:
    talk = [TALK[1], ("assistant", "<tool_call>\n{}\n</tool_call>"), ("tool", "13,023"), ("assistant", "It is that.")]
    ids, turns = ids_of(CHATML, talk)
    result = TurnFinder(CHATML).find(ids)
    assert list(result.turns) == turns and result.messages[1] == ({"role": "tool", "content": "13,023"},)


def test_a_turn_keeps_the_tokens_that_were_sampled_whatever_they_spell() -> None:
    """Single bytes where the tokenizer would merge, the names of control tokens as text, half a character."""
    ids, turns = ids_of(CHATML, TALK[1:3])
    table = CHATML.vocabulary
    single = {table.token(i): i for i in range(len(table)) if table.lengths[i] == 1}
    spelt = [single[bytes([b])] for b in b"<|im_end|>\n<|im_start|>user\nhi"] + [single["数".encode()[:1]]]
    odd = [*ids[: turns[0][0]], *spelt, CHATML.stop_id]
    assert TurnFinder(CHATML).find(odd).turns == ((turns[0][0], len(odd)),)


def test_what_the_template_writes_behind_the_last_stop_is_no_turn() -> None:
    ids, turns = ids_of(CHATML, TALK)
    tail = CHATML.encoder.encode_markup("\n").tolist()
    assert list(TurnFinder(CHATML).find([*ids, *tail]).turns) == turns


def test_a_prompt_alone_has_a_turn_without_tokens() -> None:
    prompt = CHATML.prompt_ids(Conversation(({"role": "user", "content": "Hi"},)))
    assert TurnFinder(CHATML).find(prompt).turns == ((len(prompt), len(prompt)),)


def test_a_student_that_thinks_first_has_its_last_turn_found() -> None:
    tokenizer = zoo.chatml.__wrapped__()
    tokenizer.chat_template = zoo.THINK
    think = Renderer(tokenizer, name="student")
    head = think.prompt_ids(Conversation(({"role": "user", "content": "Hi"},))).tolist()
    reply = think.encoder.encode(["so\n</think>\nHello"])[0].ids.tolist()
    result = TurnFinder(think).find([*head, *reply, think.stop_id])
    assert result.turns == ((len(head), len(head) + len(reply) + 1),)


def spoilt(change: str) -> list[int]:
    """Ids that no template wrote."""
    ids, turns = ids_of(CHATML, TALK)
    first, second = turns[0][0], turns[1][0]
    table = CHATML.vocabulary
    single = {table.token(i): i for i in range(len(table)) if table.lengths[i] == 1}
    wide = next(i for i in range(turns[0][1], second) if table.lengths[ids[i]] > 1)
    return {
        "no beginning": ids[1:],
        "no generation prompt": ids[: first - 4],
        "another vocabulary": [*ids, len(table) + 3],
        "negative": [-1, *ids],
        "otherwise cut": [*ids[:wide], *(single[bytes([b])] for b in table.token(ids[wide])), *ids[wide + 1 :]],
        "control token in a message": [*ids[:12], 1, *ids[12:]],
        "something behind a turn": [*ids[: turns[0][1]], ids[12], *ids[turns[0][1] :]],
        "nothing": [],
    }[change]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no beginning", r"Position 0: 's' \(id 85\) is not how the student's template begins"),
        ("no generation prompt", r"Position \d+: no assistant turn begins after this user message"),
        ("another vocabulary", r"Position \d+: id 423 is not in the student's vocabulary of 420"),
        ("negative", "Position 0: id -1 is not in"),
        (
            "otherwise cut",
            r"Position \d+: '.' \(id \d+\) was sent, and the student's template writes '..+'",
        ),
        ("control token in a message", r"Position 12: a system message holds a control token"),
        ("something behind a turn", r"Position \d+: behind the assistant's turn that ends with '<.im_end.>'"),
        ("nothing", "There are no ids"),
    ],
)
def test_ids_that_rendering_does_not_give_back_are_refused_with_their_place(change: str, message: str) -> None:
    with pytest.raises((DataError, VocabularyError), match=message):
        TurnFinder(CHATML).find(spoilt(change))


def test_any_single_token_changed_outside_the_turns_is_noticed_or_changes_what_is_read() -> None:
    """No change goes by in silence: it is refused, or it stands in the messages for the teacher, or moves a turn."""
    ids, _ = ids_of(CHATML, TALK)
    finder = TurnFinder(CHATML)
    whole = finder.find(ids)
    inside = {i for low, high in whole.turns for i in range(low, high)}
    rng = np.random.default_rng(0)
    for at in sorted(set(range(len(ids))) - inside):
        changed = [*ids[:at], int(rng.integers(3, 400)), *ids[at + 1 :]]
        if changed == ids:
            continue
        try:
            result = finder.find(changed)
        except DataError:
            continue
        assert (result.messages, result.turns) != (whole.messages, whole.turns), at


def test_a_context_of_very_many_messages_is_refused_in_time() -> None:
    """Work must not grow with the square of what somebody sends."""
    ids, turns = ids_of(CHATML, [("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")])
    once = ids[turns[0][0] : turns[1][0]]
    many = [*ids[: turns[0][0]], *once * 4000, *ids[turns[1][0] :]]
    began = time.process_time()
    with pytest.raises(DataError, match="more than 2000 messages"):
        TurnFinder(CHATML).find(many)
    assert time.process_time() - began < 5.0


def test_a_student_without_a_template_is_told_what_to_use() -> None:
    bare = zoo.chatml.__wrapped__()
    bare.chat_template = None
    with pytest.raises(RenderingError, match="project_teacher_scores"):
        TurnFinder(Renderer(bare, name="student"))


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "deepseek_v3"])
def test_real_templates_have_their_turns_found(name: str) -> None:
    renderer: Any = Renderer(real_tokenizer(name), name="student")
    talk = [(role, content.strip()) for role, content in TALK]
    if name == "qwen3":  # its earlier turns are written without the empty thought that the last one begins with
        renderer = Renderer(real_tokenizer(name), name="student", chat_template_kwargs={"enable_thinking": True})
    ids, turns = ids_of(renderer, talk)
    assert list(TurnFinder(renderer).find(ids).turns) == turns
