"""What an inspection says of pairs of the zoo, against facts that are known of those tokenizers."""

from __future__ import annotations

import copy
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import support.chat_templates as chat
import support.tokenizers_zoo as zoo
from support.scored import read, renderer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diglot.data import Sample, to_sample
from diglot.inspection import Input, Inspection, align_text, inspect_pair
from diglot.inspection.facts import ObjectiveFacts
from diglot.inspection.measure import CRITICAL, agreement, critical
from diglot.inspection.texts import TEXTS
from diglot.inspection.verdict import SMALL, choose
from diglot.objectives import OBJECTIVES, Level
from diglot.trainers import DistillationConfig

CHAT = {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi there, friend!"}]}


@lru_cache
def inspected(student: str, teacher: str) -> Inspection:
    """Two tokenizers of the zoo on the built-in texts."""
    return inspect_pair(*(Input(name, _tokenizer(name)) for name in (student, teacher)))


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    return zoo.thinker() if name == "thinker" else zoo.ALL[name]()


def on(rows: list[dict[str, Any]], student: str, teacher: str) -> Inspection:
    samples = [to_sample(row, f"row {i}") for i, row in enumerate(rows)]
    return inspect_pair(*(Input(n, _tokenizer(n)) for n in (student, teacher)), samples, data="rows.jsonl")


@pytest.mark.parametrize(("student", "teacher"), [("chatml", "inst"), ("inst", "turns"), ("nfc", "wordpiece")])
def test_the_shares_are_those_of_an_alignment_counted_token_by_token(student: str, teacher: str) -> None:
    """Recounted from the spans of `align_text`, whose stop is one more pair for each text that is written whole."""
    result = inspected(student, teacher).agreement
    assert result is not None and result.texts == len(TEXTS)
    s, t = renderer(student), renderer(teacher)
    spans = [span for text in TEXTS for span in align_text(s.encoder, t.encoder, text)]
    tokens = sum(len(span.student) for span in spans)
    assert result.tokens_student == tokens
    assert result.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.tokens_per_byte_student == tokens / result.num_bytes
    pairs = sum(span.one_to_one for span in spans)
    whole = len(TEXTS)  # stops
    assert pairs <= round(result.one_to_one * (tokens + whole)) <= pairs + whole
    assert result.one_to_one + result.in_chunks + result.unalignable == pytest.approx(1.0)
    assert result.unalignable >= sum(len(x.student) for x in spans if not x.exact) / (tokens + whole)


def test_equal_vocabularies_are_the_same_and_all_tokens_are_shared() -> None:
    inspection = inspected("chatml", "chatml")
    assert (
        inspection.same
        and inspection.difference == ""
        and inspection.overlap is not None
        and inspection.agreement is not None
    )
    assert inspection.overlap.mass_student == inspection.overlap.mass_teacher == 1.0
    assert inspection.agreement.one_to_one == 1.0
    assert inspection.verdict.objective == "jsd" and "--objective" not in str(inspection.verdict.command)


def test_padding_of_an_embedding_is_named_and_makes_no_difference() -> None:
    padded = Input("padded", zoo.chatml(), num_embeddings=512)
    inspection = inspect_pair(padded, Input("plain", zoo.chatml()))
    assert inspection.same and "padded" in inspection.difference
    assert inspection.student is not None and inspection.student.padding_rows == 512 - len(zoo.chatml())


def test_different_vocabularies_say_why_and_what_they_share() -> None:
    inspection = inspected("chatml", "inst")
    assert inspection.same is False and "ids stand for other text" in inspection.difference
    mine, theirs = renderer("chatml").vocabulary, renderer("inst").vocabulary
    ours = {t for t in mine.tokens() if t} & {t for t in theirs.tokens() if t}
    assert inspection.overlap is not None and inspection.overlap.count == len(ours)
    assert 0 < inspection.overlap.mass_student < 1


def test_stops_say_where_each_came_from_and_bos_what_adds_it() -> None:
    student, teacher = inspected("chatml", "turns").student, inspected("chatml", "turns").teacher
    assert student is not None and teacher is not None
    assert [(s.text, s.source) for s in student.stops] == [("<|im_end|>", "template + tokenizer eos")]
    assert [(s.text, s.source) for s in teacher.stops] == [("<end_of_turn>", "template"), ("<eos>", "tokenizer eos")]
    assert student.bos is None and not student.adds_bos
    assert teacher.bos == "<bos>" and teacher.adds_bos and teacher.template_bos


def test_bytes_without_a_token_are_counted() -> None:
    """A byte-level alphabet has all 256; a Unigram without byte fallback has only those of its one-byte pieces."""
    student, teacher = inspected("chatml", "unigram").student, inspected("chatml", "unigram").teacher
    assert student is not None and teacher is not None
    table = renderer("unigram").vocabulary
    assert student.missing_bytes == 0
    assert teacher.missing_bytes == 256 - len({t for t in table.tokens() if len(t) == 1})


def test_both_renderings_spell_the_conversation_in_their_own_templates() -> None:
    rendering = inspected("chatml", "turns").rendering
    assert rendering is not None
    assert "<|im_start|>user\n" in "".join(t.text for t in rendering.student)
    assert "<start_of_turn>user\n" in "".join(t.text for t in rendering.teacher)
    for side in (rendering.student, rendering.teacher):
        assert "".join(t.text for t in side if t.role == "content") == "12 times 12 is 144."
        assert [t.role for t in side][-1] == "stop" and side[-1].control


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
ASKED = {"role": "user", "content": "Time?"}


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"prompt": "Two and two", "completion": " is four."}, "Two and two| is four."),
        ({"text": "Two and two is four."}, "|Two and two is four."),
        ({"prompt": "Two and two"}, "Two and two|"),
        ({"prompt": [ASKED]}, "Time?|"),
        ({"prompt": [ASKED], "completion": ""}, "Time?|"),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "Time?|clock|UTC"),
        ({"messages": [ASKED, {"role": "assistant", "thinking": "Late.", "content": "Noon."}]}, "Time?|Late.|Noon."),
    ],
)
def test_the_first_row_is_shown_as_training_reads_it(row: dict[str, Any], read: str) -> None:
    """In whatever form it comes, with all parts of its reply, and with no word that it does not hold."""
    rendering = on([row], "chatml", "turns").rendering
    assert rendering is not None
    prompt, *reply = read.split("|")
    for side in (rendering.student, rendering.teacher):
        assert prompt in "".join(t.text for t in side if t.role == "prompt")
        written = "".join(t.text for t in side if t.role not in ("prompt", "stop"))
        assert written == "" if reply == [""] else all(part in written for part in reply)
        assert "144" not in written
        assert (side[-1].role == "stop") == (row.keys() != {"prompt"})


def test_a_row_whose_reply_cannot_be_read_stops_training_and_is_named() -> None:
    """Its prompt alone is in order: what training would say of the reply is what the verdict says."""
    refused = {"messages": [ASKED, {"role": "assistant", "content": "Noon.", "stamp": "12:00"}]}
    stamped = copy.deepcopy(zoo.chatml())
    stamped.chat_template = str(stamped.chat_template).replace("{{ m['content'] }}", "{{ m.stamp }}{{ m['content'] }}")
    samples = [to_sample(row, f"row {i}") for i, row in enumerate((CHAT, refused))]
    inspection = inspect_pair(Input("stamped", stamped), Input("turns", zoo.turns()), samples)
    assert not inspection.verdict.trainable and inspection.rendering is not None
    assert "row 1" in inspection.verdict.problems[0] and "stamp" in inspection.verdict.problems[0]


def test_without_data_a_template_that_reads_no_conversation_is_in_the_verdict() -> None:
    """The pair can still be trained on plain text."""
    broken = copy.deepcopy(zoo.turns())  # which all tests share
    broken.chat_template = "{{ raise_exception('no such role') }}"
    inspection = inspect_pair(Input("chatml", zoo.chatml()), Input("broken", broken))
    assert inspection.verdict.trainable and inspection.rendering is None
    assert any("no such role" in one and "teacher" in one for one in inspection.verdict.warnings)


def test_a_think_block_on_one_side_only_is_told() -> None:
    inspection = inspected("thinker", "chatml")
    assert inspection.student is not None and inspection.student.opens_thinking
    assert any("think block" in warning for warning in inspection.verdict.warnings)
    assert not any("think block" in warning for warning in inspected("chatml", "inst").verdict.warnings)


@pytest.mark.parametrize("name", CRITICAL)
def test_critical_places_are_found_and_their_tokens_counted(name: str) -> None:
    """Recounted with a loop over tokens and bytes."""
    texts = ["x = 12345 + 67\n    return  数学 and 99", "no such thing", "数学は 12\n\t\ty -= 1 한국 max_value: Привет"]
    written = read("chatml", "inst", texts).written
    result = next(c for c in critical(written, renderer("chatml"), renderer("inst")) if c.name == name)
    places = sum(len(CRITICAL[name].findall(text)) for text in texts)
    touched = 0
    for k, text in enumerate(texts):
        marked = {
            b for m in CRITICAL[name].finditer(text)
            for b in range(len(text[: m.start()].encode()), len(text[: m.end()].encode()))
        }  # fmt: skip
        side = written.student
        for start, end, segment in zip(side.start, side.end, side.segment, strict=True):
            touched += int(segment == k and bool(marked & set(range(start, end))))
    assert (result.places, result.tokens_student) == (places, touched) and places > 0
    assert 0 <= result.one_to_one <= result.aligned <= 1
    marked_bytes = sum(len(m.encode()) for text in texts for m in CRITICAL[name].findall(text))
    spans = [align_text(renderer("chatml").encoder, renderer("inst").encoder, text) for text in texts]
    alike = 0
    for text, cut in zip(texts, spans, strict=True):
        for match in CRITICAL[name].finditer(text):
            low = len(text[: match.start()].encode())
            inside = range(low, low + len(match.group().encode()))
            alike += sum(len(set(inside) & set(range(one.start, one.end))) for one in cut if one.one_to_one)
    assert result.num_bytes == marked_bytes
    assert result.cut_unlike == pytest.approx(1 - alike / marked_bytes)
    mine, theirs = result.example or (("a",), ("a",))
    assert result.example is None or (mine != theirs and all(mine) and all(theirs))


def test_texts_that_a_tokenizer_changes_are_counted_as_not_alignable() -> None:
    result = inspected("chatml", "wordpiece").agreement
    assert result is not None and result.inexact_texts_teacher > 0 and result.inexact_texts_student == 0
    assert result.unalignable > 0
    unchanged = agreement(read("chatml", "inst", ["plain words", "and more"]).written)
    assert unchanged.unalignable == 0 and unchanged.inexact_texts_student == 0


def test_reencoding_counts_beginnings_that_get_other_ids() -> None:
    result = inspected("chatml", "inst").reencoding
    assert result is not None and result.cuts > 50
    assert 0 <= result.changed_student < 0.5 and 0 <= result.changed_teacher < 0.5
    side, cuts, changed = renderer("chatml"), 0, 0
    for text in TEXTS[:4]:
        ids = side.encoder.encode([text])[0].ids.tolist()
        for i in range(1, len(ids)):
            head = side.vocabulary.bytes_of(ids[:i])
            cuts += 1
            changed += side.encoder.encode([head.decode("utf-8")])[0].ids.tolist() != ids[:i]
    assert abs(changed / cuts - result.changed_student) < 0.15


def test_the_verdict_on_objectives_is_their_own() -> None:
    """Each objective is asked: on unequal vocabularies `jsd` refuses itself, in its own words; the rest find rows."""
    rows = {one.name: one for one in inspected("chatml", "inst").verdict.objectives}
    assert rows.keys() == OBJECTIVES.keys()
    assert rows["jsd"].outcome == "fails" and "compares id by id" in rows["jsd"].reason
    assert rows["strict"].outcome != "fails" and 0 < (rows["strict"].share or 0) < 1
    assert rows["span"].share == 1.0 and rows["span"].needs == "log-probs of the text"


def test_a_teacher_that_gives_log_probs_only_leaves_the_objectives_that_need_no_more() -> None:
    inputs = [Input(name, zoo.ALL[name]()) for name in ("chatml", "inst")]
    verdict = inspect_pair(*inputs, offered=Level.TEXT_LOGPROBS).verdict
    working = {one.name for one in verdict.objectives if one.outcome != "fails"}
    assert working == {name for name, cls in OBJECTIVES.items() if cls.needs <= Level.TEXT_LOGPROBS}
    assert verdict.objective in working and f"--objective {verdict.objective}" in str(verdict.command)


class TestAPairThatCannotBeTrained:
    """Says so, and why, and proposes no command."""

    def check(self, inspection: Inspection, *words: str) -> None:
        assert not inspection.verdict.trainable and inspection.verdict.command is None
        text = " ".join(inspection.verdict.problems)
        assert all(word in text for word in words), text

    def test_a_tokenizer_whose_bytes_cannot_be_read(self) -> None:
        backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        backend.decoder = decoders.CTC()
        odd = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[UNK]")
        inspection = inspect_pair(Input("chatml", zoo.chatml()), Input("odd", odd))
        self.check(inspection, "does not say which bytes")
        assert inspection.teacher is None and json.loads(json.dumps(inspection.to_dict()))["agreement"] is None

    def test_a_model_without_a_template_on_conversations(self) -> None:
        self.check(on([CHAT], "chatml", "unigram"), "teacher has no chat template", "1 of 1 rows")
        assert on([{"text": "Plain text is fine for it, of course."}], "chatml", "unigram").verdict.trainable

    def test_a_template_that_refuses_a_row(self) -> None:
        row = {"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]}
        self.check(on([CHAT, row], "chatml", "inst"), "row 1", "no system role")

    def test_texts_that_hardly_align(self) -> None:
        default = DistillationConfig.__dataclass_fields__["min_coverage"].default
        samples = [Sample(to_sample({"text": "x"}, "r").conversation, "ÀÉÎ ÕÜ ÇÑ ÀÉÎÕÜ ÂÊ", "row 0")]
        inputs = [Input(name, zoo.ALL[name]()) for name in ("chatml", "unigram_nfkc")]
        self.check(inspect_pair(*inputs, samples, min_coverage=default), "can be aligned", "min_coverage")


def test_rows_with_prompts_only_are_measured_on_their_prompts() -> None:
    rows = [{"prompt": [{"role": "user", "content": "Say hello to the children."}]}]
    inspection = on(rows, "chatml", "inst")
    assert inspection.agreement is not None and inspection.agreement.num_bytes == len("Say hello to the children.")
    assert "--dataset_name rows.jsonl" in str(inspection.verdict.command)


def test_the_result_is_plain_json_without_nan() -> None:
    text = json.dumps(inspected("chatml", "turns").to_dict(), allow_nan=False)
    assert json.loads(text)["agreement"]["texts"] == len(TEXTS)
    assert not any(isinstance(v, float) and math.isnan(v) for v in json.loads(text)["overlap"].values())


@pytest.mark.parametrize("text", ["def f(x):\n    return 12345", "👩‍🚀 naïve 数学", " a  b ", "", "ÀÉ plain ÕÜ"])
@pytest.mark.parametrize("teacher", ["inst", "turns", "wordpiece"])
def test_spans_cover_the_text_in_order_and_exact_ones_spell_it(text: str, teacher: str) -> None:
    spans = align_text(renderer("chatml").encoder, renderer(teacher).encoder, text)
    at = 0
    for span in spans:
        assert span.start == at
        at = span.end
        if span.exact:
            assert b"".join(span.student) == b"".join(span.teacher) == text.encode()[span.start : span.end]
    assert at in (len(text.encode()), -1) or not spans


def facts(*working: str) -> list[ObjectiveFacts]:
    return [ObjectiveFacts(name, "works", "", "hidden states", 1.0) for name in working]


def test_what_auto_takes_is_recommended_and_one_to_one_rows_only_if_nothing_else_works() -> None:
    assert choose(False, facts("strict", "bpm", "covering")) == "covering"
    assert choose(False, facts("strict", "bpm", "span")) == "span"
    assert choose(False, facts("strict", "gold")) == "strict"
    assert choose(True, facts("strict", "covering", "jsd")) == "jsd"
    assert choose(False, []) is None


def test_a_pair_that_cuts_the_texts_alike_starts_with_the_default_as_training_does() -> None:
    """The texts of the data are not those that the student will write."""
    result = on([{"text": "a b"}] * 3, "chatml", "inst")
    assert result.agreement is not None and result.agreement.one_to_one == 1.0
    assert result.verdict.objective == "covering" and "--objective" not in (result.verdict.command or "")


def test_little_text_of_much_meaning_is_warned_of_in_much_text() -> None:
    """One number in a long text of words that both sides cut alike."""
    result = on([{"text": "the " * 300 + "1234567"}], "chatml", "inst")
    digits = next(one for one in result.critical if one.name == "digits")
    assert digits.num_bytes == 7
    warned = any("digits" in one and "cut differently" in one for one in result.verdict.warnings)
    assert warned == (digits.cut_unlike > SMALL)


def numbers(whole: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of single letters that reads numbers of up to three digits whole, or digit by digit."""
    pairs = [(a, b) for a in "12345" for b in "12345"] if whole else []
    pairs += [(a + b, c) for a, b in pairs for c in "12345"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<stop>", *alphabet, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<stop>")


@pytest.mark.parametrize("student_whole", [False, True])
def test_ending_a_text_shows_which_rows_are_compared_by_the_choice_of_what_was_written(student_whole: bool) -> None:
    """No row of a number has a pair as long as the number goes on; every one has if the text ends in front of it."""
    texts = [f"row {i} " + "letters that all read alike, " * 60 + "123 and 451" for i in (1, 2, 3)]
    samples = [to_sample({"text": text}, "row") for text in texts]
    sides = [Input(str(whole), numbers(whole)) for whole in (student_whole, not student_whole)]
    inspection = inspect_pair(*sides, samples)
    digits = next(one for one in inspection.critical if one.name == "digits")
    assert digits.cuts == (9 if student_whole else 21) and digits.ends == 1.0
    alone = 3 / digits.cuts  # the numbers of the rows, of one digit
    assert digits.goes_on == pytest.approx(alone)
    assert inspection.agreement is not None and inspection.agreement.bytes_cut_unlike < SMALL
    assert inspection.verdict.objective == "covering"
    assert any(f"digits {alone:.0%} and 100% of {digits.cuts}" in one for one in inspection.verdict.warnings)


def test_a_class_that_both_sides_cut_alike_is_compared_either_way() -> None:
    inspection = inspect_pair(*(Input(name, numbers(True)) for name in ("a", "b")))
    digits = next(one for one in inspection.critical if one.name == "digits")
    assert digits.cuts > 20 and digits.goes_on == digits.ends == 1.0
    assert not any("Simulated" in one for one in inspection.verdict.warnings)


def test_what_a_side_leaves_out_or_reads_unlike_its_file_is_in_the_verdict(tmp_path: Path) -> None:
    zoo.chatml().save_pretrained(tmp_path)
    stated = tmp_path / "tokenizer.json"
    spec = json.loads(stated.read_text())
    stated.write_text(json.dumps({**spec, "normalizer": {"type": "Lowercase"}}))
    changed = copy.deepcopy(zoo.chatml())
    changed.name_or_path = str(tmp_path)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    row = {"messages": [{"role": "user", "content": "Time?"}, call, {"role": "user", "content": "Well?"}]}
    inspection = inspect_pair(Input("s", changed), Input("t", zoo.inst()), [to_sample(row, "row 0")])
    warnings = "\n".join(inspection.verdict.warnings)
    assert "student: the loaded tokenizer does not cut text as its own" in warnings
    assert "The student's chat template leaves out 'tool_calls'" in warnings
    assert not inspected("chatml", "inst").student.notes


@pytest.mark.parametrize(
    ("message", "kind", "markup"),
    [
        ({"content": "4", "reasoning_content": "2 and 2"}, "reasoning", r"'<think>\n…\n</think>\n\n…'"),
        (
            {"content": None, "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}]},
            "calls of tools",
            r"""'<tool_call>\n{"name": "…", "arguments": …}\n</tool_call>'""",
        ),
    ],
)
def test_markup_that_a_template_does_not_write_is_named_with_its_side(
    message: dict[str, Any], kind: str, markup: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The student's template writes both, the teacher's neither."""
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", **message}]
    sides = Input("s", chat.tokenizer("thinks")), Input("t", zoo.chatml())
    inspection = inspect_pair(*sides, [to_sample({"messages": talk}, "row 0")])
    warned = [one for one in inspection.verdict.warnings if "no chat template that writes" in one]
    assert len(warned) == 1 and warned[0] in caplog.text
    assert warned[0].startswith(f"The teacher has no chat template that writes {kind}") and markup in warned[0]
