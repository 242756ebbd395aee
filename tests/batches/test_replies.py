"""Replies that are more than content: reasoning, calls and control tokens, each side in its own markup, all scored."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import support.chat_templates as chat
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from diglot.batches import PairReader, ReadPair, align_pairs
from diglot.data import to_sample
from diglot.errors import DataError
from diglot.rendering import Conversation, Rendered, Renderer, Role

HI = Conversation(({"role": "user", "content": "Hi"},))
CALL = [{"type": "function", "function": {"name": "clock", "arguments": {"tz": "UTC"}}}]


@lru_cache
def side(name: str, backend: str = "byte-level") -> Renderer:
    return Renderer(chat.tokenizer(name, backend), name=name)


def tail(r: Renderer, read: Rendered) -> str:
    """What follows the user's turn; segments in brackets."""
    text, inside = "", -1
    for i, segment in zip(read.ids.tolist(), read.segment.tolist(), strict=True):
        if segment != inside:
            text += ("⟧" if inside >= 0 else "") + ("⟦" if segment >= 0 else "")
            inside = segment
        text += r.vocabulary.display(i)
    return (text + ("⟧" if inside >= 0 else "")).split("Hi", 1)[1]


def sampled(student: str, teacher: str, text: str, same: bool = False) -> ReadPair:
    ids = side(student).encoder.encode_markup(text)
    pair = PairReader(side(student), side(teacher), same_vocabulary=same).sampled(HI, ids)
    assert pair is not None
    prompt = len(side(student).prompt_ids(HI))
    assert pair.student.ids[prompt:].tolist() == ids.tolist()
    return pair


def written(student: str, teacher: str, message: dict[str, Any]) -> ReadPair:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", **message}]}
    pair = PairReader(side(student), side(teacher), same_vocabulary=False).written(to_sample(row, "row 7"))
    assert pair is not None
    return pair


def all_covered(pair: ReadPair, on_policy: bool) -> bool:
    stats = align_pairs([pair], pad_s=0, pad_t=0, on_policy=on_policy).stats
    return stats["covered"] == stats["tokens"] == stats["written"] - stats["excluded"]


HARMONY = "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
THINKS = "<think>\nSum.\n</think>\n\nFour.<|im_end|>"


@pytest.mark.parametrize(
    ("student", "teacher", "text", "reads", "texts"),
    [
        ("harmony", "thinks", HARMONY, "<think>\n⟦Sum.⟧\n</think>\n\n⟦Four.<|im_end|>⟧", (b"Sum.", b"Four.")),
        ("harmony", "chatml", HARMONY, "<think>\n⟦Sum.⟧\n</think>\n\n⟦Four.<|im_end|>⟧", (b"Sum.", b"Four.")),
        ("harmony", "headers", "<|channel|>final<|message|>Four.<|return|>", "⟦Four.<e>⟧", (b"Four.",)),
        ("thinks", "harmony", THINKS, HARMONY.replace("Sum.", "⟦Sum.⟧").replace("Four.", "⟦Four.") + "⟧", None),
        ("thinks", "harmony", "<think>\nSu", "<|channel|>analysis<|message|>⟦Su⟧", (b"Su",)),
        ("thinks", "chatml", THINKS, "⟦" + THINKS + "⟧", (b"<think>\nSum.\n</think>\n\nFour.",)),
        ("thinks", "opens a think block", THINKS, "⟦" + THINKS[:-10] + "<e>⟧", None),
        ("opens a think block", "thinks", "Sum.\n</think>\n\nFour.<e>", "<think>\n⟦Sum.\n</think>\n\nFour.<|im_end|>⟧", None),
        ("opens a think block", "harmony", "Sum.\n</think>\n\nFour.<e>", "final<|message|>⟦Four.<|return|>⟧", None),
        ("brackets", "thinks", '[TOOL_CALLS]add[ARGS]{"a": 2}</s>', '"arguments": ⟦{"a": 2}⟧}\n</tool_call>⟦<|im_end|>⟧', None),
        ("brackets", "thinks", "[THINK]hm[/THINK]yes</s>", "<think>\n⟦hm⟧\n</think>\n\n⟦yes<|im_end|>⟧", None),
        ("spelt markers", "thinks", "Four.</s>", "<think>\n\n</think>\n\n⟦Four.<|im_end|>⟧", (b"Four.",)),
        ("thinks", "chatml", "Four.<|im_end|>", "⟦Four.<|im_end|>⟧", (b"Four.",)),
        ("thinks", "brackets", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
         "[TOOL_CALLS]⟦f⟧[ARGS]⟦{}</s>⟧", (b"f", b"{}")),
    ],
)  # fmt: skip
def test_what_a_student_writes_is_read_in_the_teachers_own_markup(
    student: str, teacher: str, text: str, reads: str, texts: tuple[bytes, ...] | None
) -> None:
    pair = sampled(student, teacher, text)
    assert tail(side(teacher), pair.teacher).endswith(reads)
    assert pair.student.segment_bytes == pair.teacher.segment_bytes
    assert texts is None or pair.student.segment_bytes == texts
    assert all_covered(pair, on_policy=True)


@lru_cache
def marked(template: str, *markers: str) -> Renderer:
    """A model whose control tokens are these, with a template that knows nothing of them but what it writes itself."""
    built = chat.byte_level()
    built.add_special_tokens([*markers, "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return Renderer(tokenizer, name="student")


CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>",
)  # fmt: skip
PLAINEST = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}[assistant]"
KNOWN = [
    (CHANNELS, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.</s>"),
    ((PLAINEST, "[THINK]", "[/THINK]"), "[THINK]Hm.[/THINK]Yes.</s>"),
    ((PLAINEST, "<|channel>", "<channel|>"), "<|channel>thought\nHm.<channel|>Yes.</s>"),
    ((PLAINEST, "<|START_THINKING|>", "<|END_THINKING|>"), "<|START_THINKING|>Hm.<|END_THINKING|>Yes.</s>"),
]
CALLED = [
    (CHANNELS, '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2}<|call|>'),
    ((PLAINEST, "[TOOL_CALLS]", "[ARGS]"), '[TOOL_CALLS]add[ARGS]{"a": 2}</s>'),
]


@pytest.mark.parametrize(("one", "text"), [*KNOWN, *CALLED])
def test_markers_that_the_template_does_not_know_are_read_for_what_they_are(one: tuple[str, ...], text: str) -> None:
    student, parts = marked(*one), (b"add", b'{"a": 2}') if (one, text) in CALLED else (b"Hm.", b"Yes.")
    ids = student.encoder.encode_markup(text)
    pair = PairReader(student, side("thinks"), same_vocabulary=False).sampled(HI, ids)
    assert pair is not None and pair.student.segment_bytes == pair.teacher.segment_bytes == parts
    theirs = side("thinks").tokenizer.decode(pair.teacher.ids)
    assert ("<tool_call>" if (one, text) in CALLED else "<think>\nHm.\n</think>\n\nYes.") in theirs
    assert not any(marker in theirs for marker in one[1:]) and all_covered(pair, on_policy=True)
    back = PairReader(side("thinks"), student, same_vocabulary=False)
    own = side("thinks").encoder.encode_markup(theirs.split("assistant\n")[-1])
    there = back.sampled(HI, own)
    assert there is not None and there.teacher.segment_bytes == parts
    assert there.teacher.ids[-len(ids) :].tolist() == ids.tolist()


@pytest.mark.parametrize(
    "text", ["[TOOL_CALLS]", '[TOOL_CALLS]add[ARGS]{"a": 2}', "[THINK]Hm.[/THINK]Yes.", "Yes.</s>"]
)
def test_a_reply_that_spells_a_sides_control_tokens_is_said_to_be_read_as_letters(text: str) -> None:
    """Rendered beforehand, it would teach a student letters in the place of the markers that it writes."""
    sides = [Renderer(chat.tokenizer(name), name=name) for name in ("brackets", "thinks")]
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}
    pair = PairReader(*sides, same_vocabulary=False).written(to_sample(row, "row 7"))
    assert pair is not None and pair.student.segment_bytes == (text.encode(),)
    spelt = re.findall(r"\[\w+\]|</s>", text)[0]
    (note,) = sides[0].notes
    assert f"spells {spelt!r}, a control token of the brackets" in note and "tool_calls" in note
    assert not sides[1].notes
    quiet = Renderer(chat.tokenizer("brackets"), markers="text", name="student")
    quiet.render(HI, text)
    assert not quiet.notes


def test_markers_of_two_families_say_nothing() -> None:
    both = marked(PLAINEST, "[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>")
    assert not both.markup.layout((Role.REASONING, Role.CONTENT)).own


def test_an_unknown_control_token_is_an_edge_behind_which_scoring_goes_on() -> None:
    pair = sampled("chatml", "headers", "ab<|im_start|>cd<|im_end|>")
    assert tail(side("headers"), pair.teacher).endswith("⟦ab⟧<|im_start|>⟦cd<e>⟧")
    assert not side("headers").vocabulary.control[pair.teacher.ids[pair.teacher.segment >= 0][:-1]].any()
    stats = align_pairs([pair], pad_s=0, pad_t=0, on_policy=True).stats
    assert stats["tokens"] == 5 and stats["written"] == 6 and stats["excluded"] == 0


def test_a_marker_that_ends_a_call_is_a_stop() -> None:
    r = side("harmony")
    assert r.vocabulary.display(r.stop_id) == "<|return|>"
    assert {r.vocabulary.display(i) for i in r.stop_ids} == {"<|return|>", "<|call|>"}
    text = ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>'
    pair = sampled("harmony", "thinks", text)
    assert pair.student.segment_bytes == (b"add", b'{"a": 2}') and pair.student.stopped == (False, True)
    assert all_covered(pair, on_policy=True)


def test_with_one_vocabulary_the_teacher_reads_the_very_ids() -> None:
    for text in (THINKS, "Four.<|im_end|>", "ab<|start|>cd<|im_end|>"):
        pair = sampled("chatml", "thinks", text, same=True)
        ids = side("chatml").encoder.encode_markup(text)
        assert pair.teacher.ids[-len(ids) :].tolist() == ids.tolist()
        assert all_covered(pair, on_policy=True) or "<|start|>" in text
    opening = tail(side("thinks"), sampled("chatml", "thinks", "Four.<|im_end|>", same=True).teacher)
    assert opening.endswith("<think>\n\n</think>\n\n⟦Four.<|im_end|>⟧")


@pytest.mark.parametrize(
    ("message", "texts"),
    [
        ({"content": None, "tool_calls": CALL}, (b"clock", b'{"tz": "UTC"}')),
        ({"content": "So:", "tool_calls": CALL * 2}, (b"So:", *(b"clock", b'{"tz": "UTC"}') * 2)),
        ({"content": "4", "reasoning_content": "2 and 2"}, (b"2 and 2", b"4")),
        ({"content": "4", "reasoning": "2 and 2"}, (b"2 and 2", b"4")),
        ({"content": "<think>\n2 and 2\n</think>\n\n4"}, (b"2 and 2", b"4")),
        ({"content": "4"}, (b"4",)),
    ],
)
def test_fields_beside_the_content_are_part_of_the_reply_on_both_sides(
    message: dict[str, Any], texts: tuple[bytes, ...]
) -> None:
    for student, teacher in (("harmony", "thinks"), ("thinks", "brackets"), ("headers", "harmony")):
        pair = written(student, teacher, message)
        assert pair.student.segment_bytes == pair.teacher.segment_bytes
        joined = b"".join(pair.student.segment_bytes)
        assert pair.student.segment_bytes == texts or all(text in joined for text in texts)
        assert all_covered(pair, on_policy=False)


@pytest.mark.parametrize("name", ["thinks", "brackets", "harmony"])
@pytest.mark.parametrize(
    "message", [{"content": None, "tool_calls": CALL}, {"content": "4", "reasoning_content": "2 and 2"}]
)
def test_a_call_and_reasoning_are_read_as_the_template_writes_them(name: str, message: dict[str, Any]) -> None:
    fields = {"reasoning_content": {"harmony": "thinking", "brackets": "reasoning"}.get(name, "reasoning_content")}
    own = {"role": "assistant", **{fields.get(k, k): v for k, v in message.items()}}
    text = side(name).template.text([{"role": "user", "content": "Hi"}, own])
    read = written(name, "headers", message).student
    assert read.ids.tolist() == side(name).encoder.encode_markup(text)[: len(read.ids)].tolist()


def test_what_a_template_writes_behind_several_calls_alone_closes_a_single_one_too() -> None:
    """As DeepSeek V3's: a single call ended where its arguments did, so students learned to leave it open."""
    name, end = "{{ c.function.name }}", "{% if not loop.first %}[/calls]</s>{% endif %}"
    call = f"[call]{name}\n{{{{ c.function.arguments }}}}\n[/call]{end}"
    turn = "{% if m.tool_calls %}[calls]{% for c in m.tool_calls %}" + call + "{% endfor %}{% else %}"
    template = "{% for m in messages %}[{{ m.role }}]" + turn + "{{ m.content }}</s>{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    student = marked(template, "[calls]", "[call]", "[/call]", "[/calls]")
    for calls in (CALL, CALL * 2):
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        sample = to_sample({"messages": [{"role": "user", "content": "Hi"}, message]}, "row 7")
        pair = PairReader(student, side("chatml"), same_vocabulary=False).written(sample)
        assert pair is not None
        one = '[call]⟦clock⟧\n⟦{"tz": "UTC"}⟧\n[/call]'
        assert tail(student, pair.student) == f"</s>[assistant][calls]{one * len(calls)}[/calls]⟦</s>⟧"


@pytest.mark.parametrize("field", [None, "reasoning_content"])
def test_calls_behind_a_text_are_in_the_templates_own_markup_though_it_drops_them_there(field: str | None) -> None:
    """As DeepSeek V3's: the calls were read in a common markup, which that model never writes."""
    call = "[calls]{{ m.tool_calls[0].function.name }}\n{{ m.tool_calls[0].function.arguments }}[/calls]"
    turn = "{% if m.content is none %}" + call + "{% else %}{{ m.content + '' }}{% endif %}</s>"
    template = "{% for m in messages %}[{{ m.role }}]" + turn + "{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    message = {"role": "assistant", "content": "So:", "tool_calls": CALL, **({field: "Hm."} if field else {})}
    row = to_sample({"messages": [{"role": "user", "content": "Hi"}, message]}, "row 7")
    for special in (True, False):
        student = marked(template, *["[calls]", "[/calls]"] * special)
        if not special:  # as DeepSeek's own: added, and not special
            student.tokenizer.add_tokens([AddedToken("[calls]"), AddedToken("[/calls]")])
            student = Renderer(student.tokenizer, name="student")
        pair = PairReader(student, side("thinks"), same_vocabulary=False).written(row)
        assert pair is not None
        thought = "<think>\n⟦Hm.⟧\n</think>\n\n" if field else ""
        calls = '[calls]⟦clock⟧\n⟦{"tz": "UTC"}⟧[/calls]⟦</s>⟧'
        assert tail(student, pair.student) == f"</s>[assistant]{thought}⟦So:⟧{calls}"
        assert not any("calls of tools" in note for note in student.notes)
        assert any("reasoning" in note for note in student.notes) == bool(field)


@pytest.mark.parametrize("content", [None, "So:"])
@pytest.mark.parametrize("thinker_writes", [True, False])
def test_a_call_that_both_sides_spell_alike_is_one_text_an_empty_think_block_before_it_or_not(
    content: str | None, thinker_writes: bool
) -> None:
    """Read in parts, nothing of its markup would be learnt, nor a token that holds some of it and some of the call."""
    thinker, plain = side("thinks"), marked(PLAINEST)
    sides = (thinker, plain) if thinker_writes else (plain, thinker)
    message = {"role": "assistant", "content": content, "tool_calls": CALL}
    sample = to_sample({"messages": [{"role": "user", "content": "Hi"}, message]}, "row 7")
    pair = PairReader(*sides, same_vocabulary=False).written(sample)
    call = '<tool_call>\n{"name": "clock", "arguments": {"tz": "UTC"}}\n</tool_call>'
    spelt = "\n".join(part for part in (content, call) if part)
    assert pair is not None and pair.student.segment_bytes == pair.teacher.segment_bytes == (spelt.encode(),)
    for one, read in zip(sides, (pair.student, pair.teacher), strict=True):
        assert tail(one, read).count(f"<think>\n\n</think>\n\n⟦{spelt}") == (one is thinker)
        assert read.exact[read.segment >= 0].all()
    assert all_covered(pair, on_policy=False)


def test_reasoning_after_a_prompt_that_opens_the_block_is_read_as_at_inference() -> None:
    name = "opens a think block"
    read = written(name, "chatml", {"content": "4", "reasoning_content": "2 and 2"}).student
    prompt = side(name).prompt_ids(HI)
    assert read.ids[: len(prompt)].tolist() == prompt.tolist() and read.segment_bytes == (b"2 and 2\n</think>\n\n4",)
    plain = written(name, "chatml", {"content": "4"}).student
    assert tail(side(name), plain) == "<a>⟦4<e>⟧"


def test_a_field_that_the_template_reads_and_that_cannot_be_scored_refuses_the_row() -> None:
    tokenizer = chat.tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content }}{{ m.citations }}")
    reader = PairReader(Renderer(tokenizer, name="student"), side("thinks"), same_vocabulary=False)
    message = {"role": "assistant", "content": "4", "citations": "[1]"}
    sample = to_sample({"messages": [{"role": "user", "content": "Hi"}, message]}, "row 7")
    with pytest.raises(DataError, match=r"row 7.*citations.*student"):
        reader.written(sample)
    assert written("thinks", "harmony", {"content": "4", "citations": "[1]"}).student.segment_bytes == (b"4",)
    with pytest.raises(DataError, match=r"row 7.*function_call"):
        written("thinks", "harmony", {"content": None, "function_call": {"name": "f"}})


def test_a_space_of_the_markup_is_no_part_of_the_reply() -> None:
    """Llama 2's first token holds the space that its template writes: it is read, and not compared."""
    r = side("spaced brackets", "prefixed, legacy")
    reader = PairReader(r, side("chatml"), same_vocabulary=False)
    pair = reader.sampled(HI, r.encoder.encode_markup(" Four. </s>"))
    assert pair is not None and pair.student.segment_bytes == pair.teacher.segment_bytes == (b"Four.",)
    assert Role.STOP in pair.student.roles and pair.student.exact[pair.student.segment >= 0][-1]


def test_a_space_that_words_begin_with_behind_a_marker_is_no_part_of_what_was_written() -> None:
    """The tokenizer puts it there: what is sampled is cut and given to the teacher as the same reply from a row is."""
    r = side("brackets", "prefixed, legacy")
    reader = PairReader(r, side("thinks"), same_vocabulary=False)
    for text, fields in (
        ("[THINK]hm[/THINK]yes</s>", {"content": "yes", "reasoning_content": "hm"}),
        ('[TOOL_CALLS]clock[ARGS]{"tz": "UTC"}</s>', {"content": None, "tool_calls": CALL}),
    ):
        row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", **fields}]}
        replies = reader.written(to_sample(row, "row 7"))
        pair = reader.sampled(HI, np.array(r.tokenizer(text, add_special_tokens=False)["input_ids"]))
        assert pair is not None and replies is not None
        assert pair.student.segment_bytes == pair.teacher.segment_bytes == replies.student.segment_bytes
        for one, other in ((pair.student, replies.student), (pair.teacher, replies.teacher)):
            assert one.ids.tolist() == other.ids.tolist() and one.segment.tolist() == other.segment.tolist()
            assert one.end.tolist() == other.end.tolist() and (one.exact | ~other.exact).all()


def test_all_of_several_teachers_compare_the_same_tokens_of_the_student() -> None:
    """It is run once: where one teacher needs a reply in parts, all have it so."""
    names = {"chatml": True, "harmony": False, "headers": False}
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": THINKS[:-10]}]}
    for student in ("thinks", "chatml"):
        readers = [PairReader(side(student), side(name), same_vocabulary=same) for name, same in names.items()]
        for reader in readers:
            reader.others = tuple(other for other in readers if other is not reader)
        ids = side(student).encoder.encode_markup(THINKS)
        for pairs in (
            [reader.sampled(HI, ids) for reader in readers],
            [reader.written(to_sample(row, "row 7")) for reader in readers],
        ):
            assert all(pair is not None and pair.student.segment_bytes == (b"Sum.", b"Four.") for pair in pairs)
            for pair in pairs:
                assert pair is not None and pairs[0] is not None
                assert pair.student.ids.tolist() == pairs[0].student.ids.tolist()
                assert pair.student.segment.tolist() == pairs[0].student.segment.tolist()
                assert pair.teacher.segment_bytes == pair.student.segment_bytes
                assert all_covered(pair, on_policy=pairs[0].student.own_markup > 0)


@pytest.mark.parametrize("behind", ["", "\n", " and so on"])
def test_many_calls_are_read_without_turning_back(behind: str) -> None:
    """Each further call would double the time of a search that tries every way to cut them."""
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    pair = sampled("thinks", "brackets", "\n".join([call] * 40) + behind + "<|im_end|>")
    assert pair.student.segment_bytes[:4] == (b"f", b"{}") * 2 and len(pair.student.segment_bytes) == 80
    assert all_covered(pair, on_policy=True)
