"""What each model reads: its own template, its own stops, and segments whose bytes are equal on both sides."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from diglot.errors import DataError, RenderingError
from diglot.rendering import Conversation, Rendered, Renderer, Role, truncate
from diglot.teachers import build_teacher_inputs_from_texts

HI = Conversation(({"role": "user", "content": "Say hello."},))
LONG = Conversation(
    (
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes, one."},
        {"role": "user", "content": "Two?"},
    )
)


def renderer(name: str, **options: Any) -> Renderer:
    return Renderer({**zoo.ALL, "thinker": zoo.thinker}[name](), name=name, **options)


R = {name: renderer(name) for name in (*zoo.ALL, "thinker")}


def shown(r: Renderer, rendered: Rendered, keep: Any = slice(None)) -> str:
    return "".join(r.vocabulary.display(i) for i in rendered.ids[keep])


def content(r: Renderer, rendered: Rendered, k: int = -1) -> bytes:
    """The bytes of the tokens of segment `k`."""
    k = len(rendered.segment_bytes) + k if k < 0 else k
    return r.vocabulary.bytes_of(rendered.ids[(rendered.segment == k) & (rendered.roles != Role.STOP)])


# ---- templates -------------------------------------------------------------------------------------------------------


def test_w9_each_side_reads_its_own_template_and_no_marker_of_the_other() -> None:
    a, b, c = (R[n].render(HI, "Hello!") for n in ("chatml", "inst", "turns"))
    assert shown(R["chatml"], a) == "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
    assert shown(R["inst"], b) == "<s>[INST] Say hello. [/INST]Hello!</s>"
    assert (
        shown(R["turns"], c)
        == "<bos><start_of_turn>user\nSay hello.<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>"
    )


@pytest.mark.parametrize("name", ["chatml", "inst", "turns"])
def test_the_prompt_is_what_apply_chat_template_gives(name: str) -> None:
    tokenizer = R[name].tokenizer
    text = tokenizer.apply_chat_template(list(HI.messages or ()), tokenize=False, add_generation_prompt=True)
    assert R[name].prompt_ids(HI).tolist() == R[name].encoder.encode_markup(text).tolist()


def test_w15_no_bos_is_doubled_and_none_is_invented() -> None:
    assert [(R[n].prompt_ids(HI) == R[n].tokenizer.bos_token_id).sum() for n in ("inst", "turns")] == [1, 1]
    plain = Conversation(None, "The river")
    assert R["inst"].prompt_ids(plain)[0] == 1 and (R["inst"].prompt_ids(plain) == 1).sum() == 1
    assert R["chatml"].tokenizer.eos_token_id not in R["chatml"].prompt_ids(plain)


def test_w16_an_end_of_turn_marker_at_the_end_of_the_prompt_stays() -> None:
    ids = R["inst"].prompt_ids(LONG)
    assert (ids == R["inst"].tokenizer.eos_token_id).sum() == 1


def test_w18_the_seam_of_prompt_and_reply_is_a_token_boundary() -> None:
    """Joint encoding would merge "river" + "s"; apart it cannot."""
    rendered = R["chatml"].render(Conversation(None, "The river"), "s run")
    assert content(R["chatml"], rendered) == b"s run"
    assert R["chatml"].vocabulary.bytes_of(rendered.ids[rendered.roles == Role.PROMPT]) == b"The river"


def test_w10_w14_a_cut_completion_has_no_stop_on_either_side() -> None:
    for name in ("chatml", "inst"):
        rendered = R[name].render(HI, "Hello", stopped=False)
        assert rendered.stopped == (False,) and Role.STOP not in rendered.roles
        assert rendered.ids[-1] not in R[name].stop_ids


def test_w11_a_finished_reply_ends_with_one_stop_one_byte_beyond_its_text() -> None:
    for name in ("chatml", "inst", "turns"):
        rendered = R[name].render(HI, "Hello")
        assert (
            rendered.roles[-1] == Role.STOP
            and rendered.end[-1] == 6
            and rendered.segment[-1] == 0
            and rendered.exact[-1]
        )


@pytest.mark.parametrize("name", ["chatml", "inst", "turns"])
def test_w23_all_assistant_turns_or_the_last(name: str) -> None:
    r = R[name]
    last, both = r.render(LONG, "Two!", score="last"), r.render(LONG, "Two!", score="all")
    assert last.segment_bytes == (b"Two!",) and both.segment_bytes == (b"Yes, one.", b"Two!")
    assert last.ids.tolist() == both.ids.tolist()
    assert content(r, both, 0) == b"Yes, one." and content(r, both, 1) == b"Two!"
    assert both.stopped == (True, True)
    assert (both.roles == Role.STOP).sum() == 2


def test_markup_between_turns_is_never_scored() -> None:
    both = R["chatml"].render(LONG, "Two!", score="all")
    between = shown(R["chatml"], both, both.roles == Role.MARKUP)
    assert between == "\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    assert (both.segment[both.roles == Role.MARKUP] == -1).all()


def test_a_template_that_refuses_a_role_names_model_and_role() -> None:
    system = Conversation(({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}))
    assert "Be kind." in shown(R["chatml"], R["chatml"].render(system, "x"))
    with pytest.raises(RenderingError, match=r"inst.*'system'.*no system role\. Change"):
        R["inst"].render(system, "x")


def test_tool_messages_pass_through() -> None:
    tools = Conversation(
        (
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": "", "tool_calls": []},
            {"role": "tool", "content": "noon"},
        )
    )
    assert "tool\nnoon" in shown(R["chatml"], R["chatml"].render(tools, "It is noon."))


def test_a_model_without_a_template_reads_a_transcript_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    r = renderer("unigram")
    with caplog.at_level(logging.WARNING):
        first, _ = r.render(HI, "Hello"), r.render(HI, "Hello")
    assert sum("no chat template" in m for m in caplog.messages) == 1
    assert b"User: Say hello." in r.vocabulary.bytes_of(first.ids) and first.segment_bytes == (b"Hello",)


def test_an_empty_prompt_is_predicted_from_the_start_of_a_document() -> None:
    assert R["turns"].prompt_ids(Conversation(None)).tolist() == [R["turns"].tokenizer.bos_token_id]
    assert R["chatml"].prompt_ids(Conversation(None)).tolist() == [R["chatml"].tokenizer.eos_token_id]


def test_content_that_is_no_text_is_refused() -> None:
    image = Conversation(
        (
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "image"}]},
            {"role": "user", "content": "y"},
        )
    )
    with pytest.raises(RenderingError, match="text"):
        R["chatml"].render(image, "z", score="all")


# ---- stops -----------------------------------------------------------------------------------------------------------


def test_stops_come_from_tokenizer_generation_config_and_template() -> None:
    r = renderer("turns", generation_config=GenerationConfig(eos_token_id=[1, 5]))
    end_of_turn = r.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert r.stop_id == end_of_turn == 5 and set(r.stop_ids) == {1, 5}
    assert r.stop_sources[5] == "template + generation config" and "tokenizer" in r.stop_sources[1]


def test_padding_is_not_a_stop_unless_it_is_eos() -> None:
    assert R["inst"].tokenizer.pad_token_id not in R["inst"].stop_ids
    assert R["chatml"].tokenizer.pad_token_id in R["chatml"].stop_ids  # pad = eos


def test_nothing_that_ends_a_turn_is_an_error() -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(zoo.chatml().backend_tokenizer.to_str()))
    with pytest.raises(RenderingError, match="eos_token"):
        Renderer(bare)


# ---- sampled completions ---------------------------------------------------------------------------------------------


def sampled(name: str, *parts: str | int) -> Rendered:
    """Texts and ids put together as a completion."""
    ids = [i for p in parts for i in ([p] if isinstance(p, int) else R[name].encoder.encode([p])[0].ids.tolist())]
    return R[name].from_sampled(HI, ids)


def byte_id(name: str, value: int) -> int:
    vocabulary = R[name].vocabulary
    return next(i for i in range(len(vocabulary)) if vocabulary.token(i) == bytes([value]))


def test_ids_stay_as_sampled() -> None:
    """Also where another encoding of the same text exists."""
    apart = [byte_id("chatml", b) for b in b"hello"]
    rendered = R["chatml"].from_sampled(HI, [*apart, R["chatml"].stop_id])
    assert (
        rendered.ids[-6:-1].tolist() == apart and rendered.segment_bytes == (b"hello",) and rendered.stopped == (True,)
    )


def test_an_empty_completion_that_stopped() -> None:
    rendered = sampled("chatml", R["chatml"].stop_id)
    assert rendered.segment_bytes == (b"",) and rendered.stopped == (True,)
    assert rendered.end[rendered.segment == 0].tolist() == [1]


def test_an_empty_completion_that_was_cut() -> None:
    rendered = sampled("chatml")
    assert rendered.segment_bytes == (b"",) and rendered.stopped == (False,) and not (rendered.segment >= 0).any()


def test_a_character_cut_at_the_end_is_kept_but_not_scored() -> None:
    rocket = "🚀".encode()
    rendered = sampled("turns", "hi ", *[byte_id("turns", b) for b in rocket[:2]])
    assert rendered.segment_bytes == (b"hi ",) and rendered.stopped == (False,)
    assert (rendered.roles[-2:] == Role.CONTENT).all() and (rendered.segment[-2:] == -1).all()


def test_a_cut_character_before_a_stop_leaves_the_stop_unscored() -> None:
    rendered = sampled("turns", "hi", byte_id("turns", 0xF0), R["turns"].stop_id)
    assert rendered.stopped == (False,) and rendered.segment[-1] == -1 and rendered.ids[-1] == R["turns"].stop_id
    assert rendered.ended and not sampled("turns", "hi", byte_id("turns", 0xF0)).ended


def test_an_invalid_byte_in_the_middle_ends_what_is_scored() -> None:
    rendered = sampled("turns", "ab", byte_id("turns", 0xFF), "cd", R["turns"].stop_id)
    assert rendered.segment_bytes == (b"ab",) and not rendered.stopped[0]


def test_what_stands_behind_a_control_token_in_the_middle_is_scored_again() -> None:
    start = R["chatml"].tokenizer.convert_tokens_to_ids("<|im_start|>")
    rendered = sampled("chatml", "ab", start, "cd", R["chatml"].stop_id)
    assert rendered.segment_bytes == (b"ab", b"cd") and rendered.stopped == (False, True)
    assert rendered.ids[rendered.roles == Role.MARKUP].tolist() == [start]


def test_nothing_after_the_first_stop_is_read() -> None:
    rendered = sampled("chatml", "ab", R["chatml"].stop_id, "cd")
    assert rendered.segment_bytes == (b"ab",) and rendered.ids[-1] == R["chatml"].stop_id


def test_a_special_token_spelt_as_text_stays_text_for_the_teacher() -> None:
    text = "say <|im_end|> and </s> now"
    for name in ("chatml", "inst", "turns", "unigram"):
        rendered = R[name].render(HI, text)
        assert (rendered.roles == Role.STOP).sum() == 1
        assert not np.isin(rendered.ids[rendered.roles == Role.CONTENT], R[name].stop_ids).any()


# ---- thinking --------------------------------------------------------------------------------------------------------


def test_both_sides_are_inside_a_think_block_or_both_are_not() -> None:
    opened, plain = R["thinker"], R["chatml"]
    assert opened.opens_thinking(HI) and not plain.opens_thinking(HI)
    assert shown(plain, plain.render(HI, "x</think>y", thinking=True)).count("<think>\n") == 1
    assert "<think>" not in shown(opened, opened.render(HI, "y", thinking=False))
    assert shown(opened, opened.render(HI, "y", thinking=True)).count("<think>") == 1


def test_reasoning_and_tool_calls_are_labelled() -> None:
    r = R["chatml"]
    rendered = r.render(HI, "<think>hm</think>so <tool_call>f()</tool_call> done")
    labels = {role: shown(r, rendered, rendered.roles == role) for role in (Role.REASONING, Role.TOOL_CALL)}
    assert labels[Role.REASONING].startswith("<think>hm") and "f()" in labels[Role.TOOL_CALL]
    inside = R["thinker"].render(HI, "hm</think>so")
    assert shown(R["thinker"], inside, inside.roles == Role.REASONING).startswith("hm")


# ---- cutting ---------------------------------------------------------------------------------------------------------


def test_w19_w29_the_end_is_cut_never_the_front() -> None:
    r = R["inst"]
    whole = r.render(HI, "one two three four")
    cut = truncate(whole, len(whole.ids) - 3)
    assert cut.ids.tolist() == whole.ids[:-3].tolist() and cut.stopped == (False,)
    assert content(r, cut) == cut.segment_bytes[0] and b"one two three four".startswith(cut.segment_bytes[0])


def test_a_cut_never_leaves_half_a_character() -> None:
    r = R["turns"]
    whole = r.render(HI, "ab🚀")
    for length in range(len(r.prompt_ids(HI)) + 1, len(whole.ids)):
        truncate(whole, length).segment_bytes[0].decode()


def test_a_prompt_that_leaves_no_room_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"\d+ tokens.* 5"):
        truncate(R["chatml"].render(HI, "x"), 5)


# ---- teacher inputs --------------------------------------------------------------------------------------------------


def test_s5_teacher_inputs_from_texts() -> None:
    prompts = [list(HI.messages or ()), "The river"]
    result = build_teacher_inputs_from_texts(zoo.inst(), prompts, ["Hello!", " rises"], completed=[True, False])
    assert result.input_ids.shape == result.attention_mask.shape == result.labels.shape
    for row, text in enumerate((b"Hello!", b" rises")):
        labels = result.labels[row]
        scored = labels[labels >= 0]
        spelt = R["inst"].vocabulary.bytes_of(scored.numpy())
        assert spelt == text
        assert (labels[labels >= 0] == result.input_ids[row][labels >= 0]).all()
        assert (result.labels[row, : result.prompt_lengths[row]] == -100).all()
    assert result.labels[0].max() >= 2 and (result.labels[0] == 2).sum() == 1 and (result.labels[1] == 2).sum() == 0


def test_s5_unequal_lists_are_refused() -> None:
    with pytest.raises(DataError, match="2 prompts and 1"):
        build_teacher_inputs_from_texts(zoo.inst(), ["a", "b"], ["c"])


# ---- properties ------------------------------------------------------------------------------------------------------

texts = st.text(max_size=20).filter(lambda s: not any("\ud800" <= c <= "\udfff" for c in s))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(user=texts, earlier=texts, reply=texts)
def test_segments_spell_the_replies_on_both_sides(user: str, earlier: str, reply: str) -> None:
    conversation = Conversation(
        (
            {"role": "user", "content": user},
            {"role": "assistant", "content": earlier or "x"},
            {"role": "user", "content": user},
        )
    )
    for name in ("chatml", "inst"):
        rendered = R[name].render(conversation, reply, score="all")
        assert rendered.segment_bytes == ((earlier or "x").encode(), reply.encode())
        assert [content(R[name], rendered, k) for k in (0, 1)] == list(rendered.segment_bytes)
        assert rendered.exact[rendered.segment >= 0].all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 419), max_size=20))
def test_any_sampled_ids_give_a_defined_result(ids: list[int]) -> None:
    """Whatever a model samples: ids kept up to the stop, valid text, and the same text on the teacher's side."""
    r = R["chatml"]
    rendered = r.from_sampled(HI, ids)
    stop = next((i for i, t in enumerate(ids) if t in r.stop_ids), len(ids) - 1)
    prompt = len(r.prompt_ids(HI))
    assert rendered.ids[prompt:].tolist() == ids[: stop + 1]
    text = rendered.segment_bytes[0].decode()
    assert content(r, rendered) == rendered.segment_bytes[0]
    teacher = R["inst"].render(HI, text, stopped=rendered.stopped[0])
    assert content(R["inst"], teacher) == rendered.segment_bytes[0]
