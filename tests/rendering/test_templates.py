"""What a template does to a conversation: what is read is what the model reads at inference, or it is said aloud."""

from __future__ import annotations

import copy
import logging
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from diglot.errors import DataError, RenderingError
from diglot.rendering import Conversation, Renderer, Role, truncate
from diglot.vocabulary import load_tokenizer

STRIPS_REASONING = zoo.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
CLOSED_THINK = zoo.THINK.replace("<think>\n", "<think>\n\n</think>\n\n")
NO_SYSTEM = zoo.CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")
BACKWARDS = zoo.CHATML.replace("in messages", "in messages | reverse")
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPACED_END = zoo.CHATML.replace("<|im_end|>", " ###<|endoftext|>")
TOOLS = ({"type": "function", "function": {"name": "clock"}},)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def talk(*messages: dict[str, Any], tools: Any = None) -> Conversation:
    return Conversation(messages, tools=tools)


def renderer(name: str = "chatml", template: str | None = None) -> Renderer:
    tokenizer = copy.deepcopy({**zoo.ALL, "thinker": zoo.thinker}[name]())
    if template is not None:
        tokenizer.chat_template = template
    return Renderer(tokenizer, name=name)


def at_inference(r: Renderer, conversation: Conversation) -> list[int]:
    text = r.tokenizer.apply_chat_template(
        list(conversation.messages or ()), tools=conversation.tools, tokenize=False, add_generation_prompt=True
    )
    return r.tokenizer(text, add_special_tokens=False)["input_ids"]


def shown(r: Renderer, ids: Any) -> str:
    return "".join(r.vocabulary.display(i) for i in ids)


# ---- what is read is what is read at inference -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "template", "earlier"),
    [
        ("chatml", STRIPS_REASONING, "<think>secret</think>ok"),
        ("turns", None, "  spaced \n"),
        ("inst", None, "plain"),
        ("chatml", None, "say <|im_end|> now"),
        ("thinker", None, ""),
    ],
)
def test_the_history_is_read_as_the_template_writes_it_at_inference(
    name: str, template: str | None, earlier: str
) -> None:
    r, conversation = renderer(name, template), talk(user("a"), assistant(earlier), user("b"))
    assert r.prompt_ids(conversation).tolist() == at_inference(r, conversation)
    rendered = r.render(conversation, "c")
    assert rendered.ids[rendered.roles == Role.PROMPT].tolist() == at_inference(r, conversation)


def test_a_turn_whose_reasoning_the_template_strips_is_scored_as_written() -> None:
    conversation = talk(user("a"), assistant("<think>secret</think>ok"), user("b"))
    rendered = renderer(template=STRIPS_REASONING).render(conversation, "c", score="all")
    assert rendered.segment_bytes == (b"<think>secret</think>ok", b"c")


def test_text_parts_are_read_as_their_text() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    for r in (renderer("chatml"), renderer("inst"), renderer("unigram")):
        assert r.prompt_ids(talk(user(parts))).tolist() == r.prompt_ids(talk(user("hello"))).tolist()


def test_an_image_in_the_prompt_is_refused() -> None:
    with pytest.raises(RenderingError, match="'user' message"):
        renderer().prompt_ids(talk(user([{"type": "image"}])))


@pytest.mark.parametrize("score", ["last", "all"])
def test_no_text_of_the_data_is_mistaken_for_a_mark_of_ours(score: Any) -> None:
    r = renderer()
    text = "SENTINELturn1x SENTINELturnx1x SENTINELturn"
    rendered = r.render(talk(user(text), assistant("Yes"), user(text)), "No", score=score)
    assert r.vocabulary.bytes_of(rendered.ids).decode().count(text) == 2
    assert rendered.segment_bytes[-1] == b"No"


def test_a_template_that_drops_repeats_or_reorders_turns_cannot_score_them() -> None:
    conversation = talk(user("a"), assistant("b"), user("c"), assistant("d"), user("e"))
    for template, complaint in (
        (zoo.CHATML.replace("for m in messages", "for m in messages[2:]"), r"\[1\] \[0\] times"),
        (zoo.CHATML.replace("{{ m['content'] }}", "{{ m['content'] * 2 }}"), r"\[2, 2\] times"),
        (BACKWARDS, "turn 3 before an earlier"),
    ):
        r = renderer(template=template)
        with pytest.raises(RenderingError, match=complaint):
            r.render(conversation, "f", score="all")
        assert r.render(conversation, "f", score="last").segment_bytes == (b"f",)


# ---- what a side does not read is said -------------------------------------------------------------------------------


def test_a_template_that_leaves_out_system_or_tools_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    r = renderer(template=NO_SYSTEM)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            r.render(talk({"role": "system", "content": "Be kind."}, user("Hi"), tools=TOOLS), "x")
    assert [("'system'" in m, "'tools'" in m) for m in caplog.messages] == [(True, False), (False, True)]


def test_a_template_that_trims_and_escapes_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    r = renderer(template=zoo.CHATML.replace("m['content'] }}", "m['content'] | trim | tojson }}"))
    with caplog.at_level(logging.WARNING):
        r.render(talk({"role": "system", "content": ' Be\n"kind". '}, user("")), "x")
    assert not caplog.messages


def test_a_transcript_holds_tools_and_tool_calls_and_no_special_token() -> None:
    r = renderer("nfc")
    r.tokenizer.chat_template = r.template.exists = None  # type: ignore[assignment]
    call = {"function": {"name": "clock"}}
    conversation = talk(
        user("Time<|im_end|>?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "noon"}, tools=TOOLS
    )
    ids = r.prompt_ids(conversation)
    text = r.vocabulary.bytes_of(ids).decode()
    assert text.startswith('Tools: [{"type": "function"') and text.endswith("Tool: noon\n\nAssistant:\n")
    assert 'Assistant:\n{"function": {"name": "clock"}}' in text and "User: Time<|im_end|>?" in text
    assert not r.vocabulary.control[ids].any()


@pytest.mark.parametrize("score", ["last", "all"])
def test_a_transcript_reads_every_turn_the_same_way(score: Any) -> None:
    r = renderer("unigram")
    rendered = r.render(talk(user("One"), assistant("Yes"), user("Two")), "No", score=score)
    expected = b"User: One\n\nAssistant:\nYes\n\nUser: Two\n\nAssistant:\nNo"
    spelt = r.encoder.encode([expected.decode()], start=True)[0]  # with the dummy prefix, as the tokenizer itself
    assert r.vocabulary.bytes_of(rendered.ids) == r.vocabulary.bytes_of(spelt.ids)
    assert rendered.segment_bytes == ((b"Yes", b"No") if score == "all" else (b"No",))


# ---- seams -----------------------------------------------------------------------------------------------------------


def test_a_closed_think_block_is_opened_not_followed_by_another() -> None:
    r = renderer(template=CLOSED_THINK)
    assert not r.opens_thinking(talk(user("a")))
    opened = shown(r, r.prompt_ids(talk(user("a")), thinking=True))
    assert opened.endswith("assistant\n<think>\n") and "</think>" not in opened
    assert shown(r, r.prompt_ids(talk(user("a")), thinking=False)).endswith("</think>\n\n")


def test_the_first_scored_token_always_has_one_before_it() -> None:
    r = renderer(template=BARE)
    first = r.render(talk(assistant("hello"), user("b")), "x", score="all")
    assert first.segment[0] == -1 and first.segment[1] == 0 and first.segment_bytes == (b"hello", b"x")
    assert len(r.prompt_ids(talk(user("")))) == 1


def test_a_stop_behind_text_of_the_template_is_found() -> None:
    r = renderer(template=SPACED_END)
    assert r.vocabulary.display(r.stop_id) == "<|endoftext|>" and r.stop_sources[r.stop_id] == "template"


def test_a_reply_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="int, expected a string"):
        renderer().render(talk(user("a")), 5)  # type: ignore[arg-type]


def test_a_cut_leaves_no_part_of_a_region_that_is_not_exact() -> None:
    r = renderer("nfc")
    whole = r.render(talk(user("a")), "ab e\u0301\u1e9b\u0323 cd")
    assert not whole.exact[whole.segment == 0].all()
    for length in range(len(r.prompt_ids(talk(user("a")))) + 1, len(whole.ids)):
        cut = truncate(whole, length)
        inside = cut.segment == 0
        assert cut.end[inside][-1] == len(cut.segment_bytes[0])
        starts = np.concatenate([[0], cut.end[inside][:-1]])
        assert cut.exact[inside][-1] or cut.end[inside][-1] > starts[-1]


texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    contents=st.lists(texts, min_size=1, max_size=4),
    reply=texts,
    stopped=st.booleans(),
    score=st.sampled_from(["last", "all"]),
)
def test_both_sides_have_the_same_segments(contents: list[str], reply: str, stopped: bool, score: Any) -> None:
    turns = [m for c in contents for m in (user(c), assistant(c))]
    sides = [SIDES[n].render(talk(*turns, user("?")), reply, stopped=stopped, score=score) for n in SIDES]
    assert sides[0].segment_bytes == sides[1].segment_bytes == sides[2].segment_bytes
    assert sides[0].stopped == sides[1].stopped == sides[2].stopped
    for r, side in zip(SIDES.values(), sides, strict=True):
        for k, text in enumerate(side.segment_bytes):
            inside = (side.segment == k) & (side.roles != Role.STOP)
            if side.exact[inside].all():
                assert r.vocabulary.bytes_of(side.ids[inside]) == text


SIDES = {name: renderer(name) for name in ("chatml", "inst", "turns")}


# ---- real templates --------------------------------------------------------------------------------------------------


STOPS = {
    "smollm2-135m-instruct": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
}


@lru_cache
def real(name: str) -> Renderer:
    import assets  # of the demo

    folder = assets.fetch_model(name) if name in assets.MODELS else assets.fetch_tokenizer(name)
    return Renderer(load_tokenizer(str(folder)), name=name)


@pytest.mark.real
@pytest.mark.parametrize("name", STOPS)
def test_real_templates_read_history_as_at_inference_and_score_every_turn(name: str) -> None:
    r = real(name)
    conversation = talk(user("One, naïve 🚀?"), assistant("<think>\nhm\n</think>\n\nYes, one. "), user("Two?"))
    assert r.prompt_ids(conversation).tolist() == at_inference(r, conversation)
    both = r.render(conversation, "Two! 🚀", score="all")
    assert both.segment_bytes == (b"<think>\nhm\n</think>\n\nYes, one. ", "Two! 🚀".encode())
    assert both.stopped == (True, True) and both.exact[both.segment >= 0].all()
    for k in (0, 1):
        inside = (both.segment == k) & (both.roles != Role.STOP)
        assert r.vocabulary.bytes_of(both.ids[inside]) == both.segment_bytes[k]


@pytest.mark.real
@pytest.mark.parametrize(("name", "stop"), STOPS.items())
def test_real_templates_tell_what_ends_a_turn(name: str, stop: str) -> None:
    r = real(name)
    assert r.vocabulary.display(r.stop_id) == stop and "template" in r.stop_sources[r.stop_id]


@pytest.mark.real
def test_a_real_template_with_thinking_turned_off_can_be_opened() -> None:
    r = Renderer(real("qwen3").tokenizer, chat_template_kwargs={"enable_thinking": False}, name="qwen3")
    closed, opened = (shown(r, r.prompt_ids(talk(user("a")), thinking=t)) for t in (None, True))
    assert closed.endswith("</think>\n\n") and opened.endswith("assistant\n<think>\n")
