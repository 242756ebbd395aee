"""A teacher's scores of its own reading, carried over to the tokens that a student sampled."""

from __future__ import annotations

import math
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import support.chat_templates as chat
import support.tokenizers_zoo as zoo
import torch
from numpy.typing import NDArray
from support.tiny import tiny_model

from diglot.engines import RULES, Projector, Reading, TeacherScores, Transcript, project_teacher_scores, score_hidden
from diglot.errors import ConfigError, DataError, RenderingError, TeacherError, VocabularyError
from diglot.rendering import Renderer

CHATML, INST, TURNS = (Renderer(make(), name=make.__name__) for make in (zoo.chatml, zoo.inst, zoo.turns))
ASK = [{"role": "user", "content": "Say hello to the children."}]
TEXT = "The river had been rising, naïve 数学 👩‍🚀 since dawn:\n  x = 12345; done."
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def sampled(student: Renderer, text: str, stop: bool = True) -> NDArray[np.int64]:
    ids = student.encoder.encode([text])[0].ids
    return np.append(ids, student.stop_id) if stop else ids


def scores_of(reading: Reading, seed: int = 0) -> TeacherScores:
    return TeacherScores(-np.random.default_rng(seed).exponential(0.7, len(reading.teacher_ids)))


def ends_by_hand(renderer: Renderer, ids: NDArray[np.int64]) -> list[int]:
    """The byte at which each token ends, stop one further: from the table of bytes alone."""
    ends, at = [], 0
    for token in ids.tolist():
        at += 1 if token in renderer.stop_ids else len(renderer.vocabulary.token(token))
        ends.append(at)
    return ends


@pytest.mark.parametrize("credit", sorted(RULES.keys() - {"pairs"}))
@pytest.mark.parametrize(("student", "teacher"), [(CHATML, INST), (INST, TURNS), (TURNS, CHATML)])
def test_the_sum_over_every_chunk_is_the_teachers(student: Renderer, teacher: Renderer, credit: str) -> None:
    """Chunks are found here from token bytes, by sets: nothing of the alignment is trusted."""
    projector, ids = Projector(student, teacher), sampled(student, TEXT * 20)
    reading = projector.read(Transcript.of_completion(ASK, ids))
    scores = scores_of(reading)
    own = -np.random.default_rng(1).exponential(0.7, len(ids))
    result = projector.project(reading, scores, credit=credit, student_logps=own)
    theirs = reading.teacher_ids[reading.first_scored :]
    ends_s, ends_t = ends_by_hand(student, ids), ends_by_hand(teacher, theirs)
    cuts = sorted({0} | (set(ends_s) & set(ends_t)))
    assert cuts[-1] == len((TEXT * 20).encode()) + 1 and len(cuts) > 50 and result.valid.all()
    for low, high in pairwise(cuts):
        mine = sum(lp for lp, end in zip(result.logps, ends_s, strict=True) if low < end <= high)
        other = zip(scores.logps[reading.first_scored :], ends_t, strict=True)
        assert abs(mine - math.fsum(lp for lp, end in other if low < end <= high)) < 1e-12


def test_one_to_one_tokens_have_the_teachers_own_log_prob_under_every_rule() -> None:
    projector, ids = Projector(CHATML, INST), sampled(CHATML, TEXT)
    reading = projector.read(Transcript.of_completion(ASK, ids))
    scores = scores_of(reading)
    alone = projector.project(reading, scores, credit="pairs")
    assert 0 < alone.valid.sum() < len(ids) and np.isnan(alone.logps[~alone.valid]).all()
    twins = {int(s): int(t) for s, t in zip(reading.alignment.pair_s, reading.alignment.pair_t, strict=True)}
    own = np.full(len(ids), -1.0)
    for credit in RULES:
        result = projector.project(reading, scores, credit=credit, student_logps=own)
        for i in np.flatnonzero(alone.valid):
            assert result.logps[i] == pytest.approx(scores.logps[reading.place_t[twins[int(i)]]], abs=1e-12)


def test_rules_differ_as_they_say_inside_a_chunk() -> None:
    projector, ids = Projector(INST, CHATML), sampled(INST, TEXT)
    reading = projector.read(Transcript.of_completion(ASK, ids))
    own = -np.random.default_rng(1).exponential(0.7, len(ids))
    by_rule = {c: projector.project(reading, scores_of(reading), credit=c, student_logps=own) for c in RULES}
    chunk = by_rule["shared"].chunk
    wide = np.flatnonzero(np.bincount(chunk) > 1)
    assert len(wide)
    for c in wide:
        at = np.flatnonzero(chunk == c)
        total = by_rule["shared"].logps[at].sum()
        assert np.ptp(by_rule["shared"].logps[at]) < 1e-12
        assert np.ptp((by_rule["gap"].logps - own)[at]) < 1e-12
        assert by_rule["first"].logps[at].tolist() == pytest.approx([total, *[0.0] * (len(at) - 1)])
        assert by_rule["last"].logps[at].tolist() == pytest.approx([*[0.0] * (len(at) - 1), total])


def test_the_same_tokenizer_gives_the_teachers_numbers_back_even_for_tokens_that_it_would_not_write() -> None:
    """Single bytes: canonical text would be cut otherwise, and the teacher reads the very ids."""
    table = CHATML.vocabulary
    single = {table.token(i): i for i in range(len(table)) if table.lengths[i] == 1}
    ids = np.array([single[bytes([b])] for b in TEXT.encode()] + [CHATML.stop_id])
    projector = Projector(CHATML, Renderer(zoo.chatml(), name="teacher"))
    reading = projector.read(Transcript.of_completion(ASK, ids))
    scores = scores_of(reading)
    assert reading.teacher_ids[reading.first_scored :].tolist() == ids.tolist()
    result = projector.project(reading, scores)
    assert result.valid.all() and result.logps.tolist() == scores.logps[reading.first_scored :].tolist()


def test_the_end_of_a_turn_is_one_event_whatever_either_side_writes_for_it() -> None:
    """The teacher's mass on any of its stop ids is the stop's."""
    assert len(TURNS.stop_ids) > 1
    projector, ids = Projector(CHATML, TURNS), sampled(CHATML, "Say")
    reading = projector.read(Transcript.of_completion(ASK, ids))
    assert reading.teacher_ids[reading.place_t[-1]] == TURNS.stop_id
    count = len(reading.teacher_ids)
    other = next(i for i in TURNS.stop_ids if i != TURNS.stop_id)
    top_ids, top_logps = np.full((count, 2), -1), np.full((count, 2), -np.inf)
    at = reading.place_t[-1]
    top_ids[at], top_logps[at] = [TURNS.stop_id, other], np.log([0.5, 0.25])
    logps = np.full(count, -1.0)
    logps[at] = math.log(0.5)
    result = projector.project(reading, TeacherScores(logps, top_ids, top_logps))
    assert result.logps[-1] == pytest.approx(math.log(0.75))
    assert result.likeliest is not None and result.at is not None and result.at[-1] == len(ids) - 1
    assert result.likeliest.ids[-1].tolist() == [CHATML.stop_id, -1, -1]
    assert result.likeliest.residual[-1] == pytest.approx(0.25)


def test_of_several_turns_with_tools_and_reasoning_only_what_was_sampled_is_scored() -> None:
    turns = ['<think>\nadd them\n</think>\n<tool_call>\n{"name": "add"}\n</tool_call>', "It is 13,023."]
    messages = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": "not looked at", "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "tool", "content": "13023"},
        {"role": "assistant", "content": "not looked at"},
    ]
    head = CHATML.prompt_ids(_conversation(messages[:2]))
    between = CHATML.encoder.encode_markup("\n<|im_start|>tool\n13023<|im_end|>\n<|im_start|>assistant\n")
    first, second = (sampled(CHATML, text) for text in turns)
    ids = np.concatenate([head, first, between, second])
    mask = np.repeat([0, 1, 0, 1], [len(head), len(first), len(between), len(second)])
    projector = Projector(CHATML, TURNS)
    reading = projector.read(Transcript.of_mask(messages, ids, mask, TOOLS))
    text = zoo.turns().decode(reading.teacher_ids)
    assert all(turn in text for turn in turns) and "13023" in text and "not looked at" not in text
    scores = scores_of(reading)
    result = projector.project(reading, scores)
    assert result.valid.tolist() == (mask == 1).tolist() and np.isnan(result.logps[mask == 0]).all()
    assert result.logps[mask == 1].sum() == pytest.approx(scores.logps[reading.place_t].sum(), abs=1e-12)
    spelt = TURNS.vocabulary.bytes_of(reading.teacher_ids[reading.place_t[~reading.stop_t]])
    assert spelt.decode() == "".join(turns)


def _conversation(messages: list[dict[str, Any]]) -> Any:
    from diglot.rendering import Conversation

    return Conversation(tuple(messages))


def test_an_earlier_assistant_message_that_was_not_sampled_is_only_read() -> None:
    messages = [*ASK, {"role": "assistant", "content": "Hello."}, *ASK, {"role": "assistant", "content": ""}]
    ids = sampled(CHATML, "Hi there")
    result = project_teacher_scores(
        CHATML, INST, messages, ids, lambda query: np.full(len(query), -0.5), sampled=np.ones(len(ids))
    )
    assert result.valid.all()


def test_a_turn_without_text_is_no_segment_and_the_others_keep_their_own_scores() -> None:
    messages = [*ASK, {"role": "assistant"}, *ASK, {"role": "assistant"}]
    second = sampled(CHATML, "Hi there")
    ids = np.concatenate([[CHATML.stop_id], CHATML.prompt_ids(_conversation(ASK)), second])
    mask = np.ones(len(ids))
    mask[1 : -len(second)] = 0
    result = project_teacher_scores(CHATML, INST, messages, ids, lambda query: np.full(len(query), -0.5), sampled=mask)
    assert not result.valid[0] and result.valid[-len(second) :].all() and not result.valid[: -len(second)].any()


def test_what_no_other_model_can_read_is_not_valid_and_never_a_number() -> None:
    """A cut character, what comes after it, and a stop that comes after that."""
    table = CHATML.vocabulary
    half = next(i for i in range(len(table)) if table.token(i) == "数".encode()[:1])
    good = sampled(CHATML, "Say hello", stop=False)
    ids = np.concatenate([good, [half], sampled(CHATML, "more")])
    result = project_teacher_scores(CHATML, INST, ASK, ids, lambda query: np.full(len(query), -0.5))
    assert result.valid.tolist() == [True] * len(good) + [False] * (len(ids) - len(good))
    assert np.isnan(result.logps[len(good) :]).all() and result.filled(-9.0)[len(good) :].tolist() == [-9.0] * (
        len(ids) - len(good)
    )


def test_what_follows_a_control_token_is_not_valid_and_counts_as_sampled() -> None:
    """In the only turn, in an earlier one, and as the first token of a turn: the tokens before it keep their scores."""
    good, control = sampled(CHATML, "Say hello", stop=False), CHATML.vocabulary.control.nonzero()[0]
    start = next(i for i in control.tolist() if i not in CHATML.stop_ids)
    broken = np.concatenate([good, [start], sampled(CHATML, "more")])
    ask = lambda query: np.full(len(query), -0.5)  # noqa: E731
    result = project_teacher_scores(CHATML, INST, ASK, broken, ask)
    assert result.valid.tolist() == [True] * len(good) + [False] * (len(broken) - len(good))
    assert result.sampled.all() and result.coverage == pytest.approx(len(good) / len(broken))
    none = project_teacher_scores(CHATML, INST, ASK, [start, *good], ask)
    assert not none.valid.any() and none.coverage == 0.0
    between, second = CHATML.prompt_ids(_conversation(ASK)), sampled(CHATML, "Hi there")
    ids = np.concatenate([broken, between, second])
    mask = np.repeat([1, 0, 1], [len(broken), len(between), len(second)])
    messages = [*ASK, {"role": "assistant"}, *ASK, {"role": "assistant"}]
    both = project_teacher_scores(CHATML, TURNS, messages, ids, ask, sampled=mask)
    assert both.valid[: len(good)].all() and both.valid[-len(second) :].all()
    assert int(both.valid.sum()) == len(good) + len(second) and (both.sampled == (mask == 1)).all()


CHANNELS = Renderer(chat.tokenizer("harmony"), name="channels")
REPLY = "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REPLY, "<think>\nSum.\n</think>\n\nFour."),
        (REPLY[: REPLY.index("m.<|end")], "<think>\nSu"),
        (REPLY[REPLY.index("<|channel|>final") :], "Four."),
        ("<|channel|>final<|message|>Four.<|start|>assistant<|return|>", "Four."),
    ],
)
@pytest.mark.parametrize("teacher", [TURNS, Renderer(chat.tokenizer("thinks"), name="thinks")])
def test_each_channel_of_a_reply_is_read_in_the_teachers_own_markup(
    teacher: Renderer, text: str, expected: str
) -> None:
    ids, projector = CHANNELS.encoder.encode_markup(text), Projector(CHANNELS, teacher)
    reading = projector.read(Transcript.of_completion(ASK, ids))
    prompt = len(teacher.prompt_ids(_conversation(ASK)))
    assert expected in teacher.tokenizer.decode(reading.teacher_ids[prompt:])
    scores = scores_of(reading)
    result = projector.project(reading, scores)
    assert result.logps[result.valid].sum() == pytest.approx(scores.logps[reading.place_t].sum(), abs=1e-12)
    spelt = CHANNELS.vocabulary.bytes_of(ids[result.valid & ~CHANNELS.vocabulary.control[ids]])
    assert spelt.decode() == expected.replace("<think>\n", "").replace("\n</think>\n\n", "")
    assert result.valid[-1] == ("assistant<|return|>" not in text)  # the stop, or the last of a cut text


def test_channels_that_cannot_be_told_apart_are_refused_by_name() -> None:
    """Without the student's template, and in an earlier turn: else nothing would be scored, and nobody would say so."""
    bare = chat.tokenizer("harmony")
    bare.chat_template = None
    ids = CHANNELS.encoder.encode_markup(REPLY)
    ask = lambda query: np.full(len(query), -0.5)  # noqa: E731
    with pytest.raises(RenderingError, match=r"<\|channel\|>'.*no chat template"):
        project_teacher_scores(Renderer(bare), TURNS, ASK, ids, ask)
    messages = [*ASK, {"role": "assistant"}, *ASK, {"role": "assistant"}]
    between = CHANNELS.prompt_ids(_conversation(ASK))
    whole, mask = np.concatenate([ids, between, ids]), np.ones(2 * len(ids) + len(between))
    mask[len(ids) : -len(ids)] = 0
    with pytest.raises(RenderingError, match="turn 0 of 2 has reasoning and content"):
        project_teacher_scores(CHANNELS, TURNS, messages, whole, ask, sampled=mask)
    answer = CHANNELS.encoder.encode_markup(REPLY[REPLY.index("<|channel|>final") :])
    whole, mask = np.concatenate([answer, between, ids]), np.ones(len(ids) + len(between) + len(answer))
    mask[len(answer) : -len(ids)] = 0
    result = project_teacher_scores(CHANNELS, TURNS, messages, whole, ask, sampled=mask)
    assert CHANNELS.vocabulary.bytes_of(whole[result.valid]).decode() == "Four.Sum.Four."


@pytest.mark.parametrize("teacher", [TURNS, INST])
def test_a_stray_control_token_in_a_finished_reply_of_several_parts_is_read_by_name_and_scored_behind(
    teacher: Renderer,
) -> None:
    """As in the trainers; in a reply with one part it ends what is scored."""
    ids, projector = (
        CHANNELS.encoder.encode_markup(REPLY.replace("Four", "Fo<|start|>ur")),
        Projector(CHANNELS, teacher),
    )
    reading = projector.read(Transcript.of_completion(ASK, ids))
    result = projector.project(reading, scores_of(reading))
    assert "Fo<|start|>ur." in teacher.tokenizer.decode(reading.teacher_ids)
    assert CHANNELS.vocabulary.bytes_of(ids[result.valid]).decode() == "Sum.Four." and result.valid[-1]
    assert not result.valid[:-1][CHANNELS.vocabulary.control[ids[:-1]]].any()


@pytest.mark.parametrize("begun", ["<|start|>", "<|start|>assist", "<|start|>assistant<|channel|>fin"])
def test_the_markup_of_a_part_that_was_cut_before_it_began_is_no_text_of_the_part_before(begun: str) -> None:
    ids, projector = (
        CHANNELS.encoder.encode_markup(REPLY[: REPLY.index("<|start|>")] + begun),
        Projector(CHANNELS, TURNS),
    )
    reading = projector.read(Transcript.of_completion(ASK, ids))
    result = projector.project(reading, scores_of(reading))
    assert CHANNELS.vocabulary.bytes_of(ids[result.valid]).decode() == "Sum."
    assert TURNS.tokenizer.decode(reading.teacher_ids).endswith("<think>\nSum.") and not reading.stop_t.any()


def test_padding_behind_a_stop_was_not_sampled_and_may_be_any_number() -> None:
    ids = np.append(sampled(CHATML, "Say hello"), [0, -100])
    result = project_teacher_scores(CHATML, INST, ASK, ids, lambda query: np.full(len(query), -0.5))
    assert result.sampled.tolist() == result.valid.tolist() == [True] * (len(ids) - 2) + [False] * 2


def test_a_completion_that_was_cut_has_no_stop_and_all_its_tokens_count() -> None:
    ids = sampled(CHATML, "Say hello", stop=False)
    projector = Projector(CHATML, TURNS)
    reading = projector.read(Transcript.of_completion(ASK, ids))
    assert not reading.stop_t.any() and projector.project(reading, scores_of(reading)).coverage == 1.0


def test_what_lies_beyond_the_teachers_window_is_not_valid() -> None:
    whole = Projector(CHATML, INST).read(Transcript.of_completion(ASK, sampled(CHATML, TEXT)))
    projector = Projector(CHATML, INST, teacher_max_length=len(whole.teacher_ids) - 10)
    reading = projector.read(Transcript.of_completion(ASK, sampled(CHATML, TEXT)))
    result = projector.project(reading, scores_of(reading))
    assert len(reading.teacher_ids) == len(whole.teacher_ids) - 10 and 0.5 < result.coverage < 1.0
    assert result.valid[: int(result.valid.sum())].all() and not result.valid[-1]


def test_likeliest_ids_come_for_every_token_that_can_be_compared_and_hold_one_mass() -> None:
    """Also inside the teacher's tokens. Exactness: test_covering.py."""
    model = tiny_model(zoo.inst(), seed=3)
    student = TURNS  # its tokens end inside those of the teacher
    projector, ids = Projector(student, INST), sampled(student, TEXT)
    reading = projector.read(Transcript.of_completion(ASK, ids))
    with torch.no_grad():
        states = model.model(torch.from_numpy(reading.teacher_ids)[None]).last_hidden_state[0]
    scores = score_hidden(states, model.lm_head, reading.teacher_ids, top=12)
    result = projector.project(reading, scores)
    assert result.likeliest is not None and result.at is not None
    inside = set(ends_by_hand(student, ids)) - set(ends_by_hand(INST, reading.teacher_ids[reading.first_scored :]))
    spelt = TEXT.encode()
    starts = [0, *ends_by_hand(student, ids)[:-1]]
    whole = [k for k, start in enumerate(starts) if start == len(spelt) or spelt[start] & 0xC0 != 0x80]  # of characters
    assert inside & set(starts) and set(result.at.tolist()) >= set(whole)
    named = result.likeliest.ids >= 0
    assert named.any(-1).all() and (result.likeliest.ids[named] < len(student.vocabulary)).all()
    total = np.exp(result.likeliest.logps).sum(-1) + result.likeliest.residual
    np.testing.assert_allclose(total, 1.0, atol=1e-9)
    assert ((result.likeliest.unknown >= 0) & (result.likeliest.unknown <= result.likeliest.residual)).all()


def test_hidden_states_give_the_scores_of_the_models_own_logits() -> None:
    model = tiny_model(zoo.inst(), seed=3)
    ids = Projector(CHATML, INST).read(Transcript.of_completion(ASK, sampled(CHATML, TEXT * 5))).teacher_ids
    with torch.no_grad():
        result = model(torch.from_numpy(ids)[None], output_hidden_states=True)
        rows = result.logits[0].log_softmax(-1)
    scores = score_hidden(result.hidden_states[-1][0], model.lm_head, ids, top=4)
    assert len(ids) > 256 and scores.top_ids is not None
    expected = rows[:-1].gather(-1, torch.from_numpy(ids[1:, None]))[:, 0]
    torch.testing.assert_close(torch.from_numpy(scores.logps[1:]).float(), expected, atol=1e-5, rtol=0)
    assert scores.top_ids[1:].tolist() == rows[:-1].topk(4).indices.tolist()


@pytest.mark.parametrize("shape", [(1, 79, 8), (77, 8), (81, 8), (79,)])
def test_hidden_states_of_another_text_or_a_batch_are_refused(shape: tuple[int, ...]) -> None:
    """More of them, as of a padded text, would be read without a word."""
    with pytest.raises(TeacherError, match=r"79 ids and hidden states of shape .*, expected \[79, H\]"):
        score_hidden(torch.zeros(shape), torch.nn.Linear(8, 340), np.arange(79))


def test_tensors_lists_and_arrays_are_the_same_to_it() -> None:
    ids = sampled(CHATML, TEXT)
    query: list[Any] = []

    def ask(teacher_ids: NDArray[np.int64]) -> Any:
        query.append(teacher_ids)
        return torch.linspace(-2, -0.1, len(teacher_ids), dtype=torch.float64)

    own = np.linspace(-1, -0.5, len(ids))
    one = project_teacher_scores(CHATML, INST, ASK, ids, ask, credit="gap", student_logps=own)
    logps = ask(query[0])
    many: list[tuple[Any, Any, Any]] = [
        (torch.from_numpy(ids), logps, torch.from_numpy(own)),
        (ids.tolist(), logps.tolist(), own.tolist()),
        (ids.astype(np.int32), TeacherScores.of(logps), own),
    ]
    for inputs, scores, mine in many:
        other = project_teacher_scores(CHATML, INST, ASK, inputs, scores, credit="gap", student_logps=mine)
        assert other.logps.tolist() == one.logps.tolist() and other.valid.tolist() == one.valid.tolist()


def test_bare_tokenizers_do_as_well_as_renderers() -> None:
    ids = sampled(CHATML, TEXT)
    logps = lambda query: -np.arange(len(query)) / 7  # noqa: E731
    one = project_teacher_scores(zoo.chatml(), zoo.inst(), ASK, ids, logps)
    assert one.logps.tolist() == project_teacher_scores(CHATML, INST, ASK, ids, logps).logps.tolist()


def test_a_projector_pickles_and_threads_share_it() -> None:
    """Prompts with control tokens and texts that spell them, at once: neither may be read as the other."""
    projector = pickle.loads(pickle.dumps(Projector(CHATML, INST)))
    texts = [f"{i} <|im_end|> </s> {TEXT * (i % 5 + 1)}" for i in range(12)]
    transcripts = [Transcript.of_completion(ASK, sampled(CHATML, text)) for text in texts]

    def run(transcript: Transcript) -> list[Any]:
        reading = projector.read(transcript)
        result = projector.project(reading, scores_of(reading))
        return [reading.teacher_ids.tolist(), result.filled(1.0).tolist()]

    alone = [run(t) for t in transcripts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, transcripts * 8))
    assert together == alone * 8
    assert all(text.encode() in INST.vocabulary.bytes_of(ids) for text, (ids, _) in zip(texts, alone, strict=True))


def test_a_projector_that_has_been_used_with_likeliest_ids_pickles() -> None:
    """Into the workers of Ray: what it found out about the tokenizers is found out again there."""
    projector = Projector(CHATML, TURNS)
    reading = projector.read(Transcript.of_completion(ASK, sampled(CHATML, TEXT)))
    count = len(reading.teacher_ids)
    scores = TeacherScores.of(np.full(count, -0.5), np.tile([100, 300], (count, 1)), np.tile([-2.0, -3.0], (count, 1)))
    one = projector.project(reading, scores)
    again, other = pickle.loads(pickle.dumps((projector, reading)))
    result = again.project(other, scores)
    assert one.likeliest is not None and result.likeliest is not None
    assert result.likeliest.ids.tolist() == one.likeliest.ids.tolist() and result.logps.tolist() == one.logps.tolist()


OWN = np.full(len(sampled(CHATML, TEXT)), -1.0)


@pytest.mark.parametrize(
    ("turns", "messages", "message"),
    [
        (((0, 99),), (ASK,), r"\[0, 99\) of 4 ids"),
        (((2, 4), (0, 2)), (ASK, ASK), r"\[0, 2\) of 4 ids, .* \(here from 4\)"),
        (((0, 2), (2, 4)), (ASK,), "2 sampled turns and 1 runs of messages"),
        ((), (), "0 sampled turns"),
        (((0, 4),), (["Hi"],), "Message 0 is 'Hi'"),
        (((0, 4),), (None,), "The conversation is NoneType"),
        (((0, 4),), None, "The messages are NoneType"),
        (((0.0, 4.0),), (ASK,), r"The sampled turns are \(\(0.0, 4.0\),\), expected pairs of whole numbers"),
        (((0, 1, 2),), (ASK,), "expected pairs of whole numbers"),
        ((3,), (ASK,), "expected pairs of whole numbers"),
        (None, (ASK,), "expected pairs of whole numbers"),
    ],
)
def test_a_transcript_whose_parts_do_not_fit_is_refused_when_it_is_made(
    turns: Any, messages: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Transcript(np.arange(4), turns, messages)


@pytest.mark.parametrize(
    ("ids", "logps", "message"),
    [
        ([50, 60], [-1.0, math.nan], "log-prob of nan"),
        ([50, 60], [-1.0, 0.5], "log-prob of 0.5, expected numbers of at most 0"),
        ([50, 60], [-0.1, -0.1], "1.810 of the mass together"),
        ([50, 50], [-1.0, -1.0], "id 50 twice"),
        ([50, -5], [-1.0, -1.0], "id -5 with a log-prob of -1.0"),
        ([50.5, 60.0], [-1.0, -1.0], "float64, expected whole numbers"),
        (None, [-4.0, -math.inf], "give it -4.0000 and its own log-prob is -0.5000, expected the same"),
    ],
)
def test_likeliest_ids_that_are_no_part_of_one_distribution_are_refused(ids: Any, logps: Any, message: str) -> None:
    """Rows that stand one place further, the likeliest mistake, give the written id another log-prob."""

    def ask(query: NDArray[np.int64]) -> TeacherScores:
        rows = np.column_stack([query, np.full(len(query), -1)]) if ids is None else np.tile(ids, (len(query), 1))
        return TeacherScores.of(np.full(len(query), -0.5), rows, np.tile(logps, (len(query), 1)))

    with pytest.raises(TeacherError, match=message):
        project_teacher_scores(CHATML, INST, ASK, sampled(CHATML, TEXT), ask)


def test_scores_that_are_made_without_of_are_read_as_with_it() -> None:
    """Lists and tensors in the dataclass itself, and rows of another length."""
    ids = sampled(CHATML, TEXT)
    right = project_teacher_scores(CHATML, INST, ASK, ids, lambda query: np.full(len(query), -0.5)).logps.tolist()
    for make in (list, torch.from_numpy):
        ask = lambda query: TeacherScores(make(np.full(len(query), -0.5)))  # noqa: E731, B023
        assert project_teacher_scores(CHATML, INST, ASK, ids, ask).logps.tolist() == right
    short: Any = lambda query: TeacherScores(np.full(len(query), -0.5), np.zeros((3, 2), int), np.zeros((3, 2)))  # noqa: E731
    with pytest.raises(TeacherError, match="likeliest ids have shape"):
        project_teacher_scores(CHATML, INST, ASK, ids, short)


@pytest.mark.parametrize("window", [0, -1, True, "12", 20.5])
def test_a_window_that_is_no_number_of_tokens_is_refused(window: Any) -> None:
    with pytest.raises(ConfigError, match=r"teacher_max_length is .*, expected a whole number"):
        Projector(CHATML, INST, teacher_max_length=window)


def test_what_fills_places_without_a_score_is_one_number_or_one_each() -> None:
    result = project_teacher_scores(CHATML, INST, ASK, sampled(CHATML, TEXT), lambda query: np.full(len(query), -0.5))
    for wrong in ([1.0], np.zeros(len(OWN) + 1)):
        with pytest.raises(DataError, match="values of shape"):
            result.filled(wrong)


def test_a_long_text_costs_at_most_20_microseconds_a_token() -> None:
    projector = Projector(CHATML, INST)
    transcript = Transcript.of_completion(ASK, sampled(CHATML, TEXT * 200))

    def once() -> float:
        began = time.process_time()
        reading = projector.read(transcript)
        scores = TeacherScores(np.full(len(reading.teacher_ids), -1.0))
        projector.project(reading, scores)
        return time.process_time() - began

    assert len(transcript.ids) > 5000 and min(once() for _ in range(5)) / len(transcript.ids) < 20e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": np.zeros(3)}, TeacherError, "reads .* tokens and there are 3 log-probs"),
        ({"scores": lambda query: np.full(len(query), np.nan)}, TeacherError, "log-prob of token 1 .* is nan"),
        ({"scores": lambda query: np.full(len(query), 0.5)}, TeacherError, "is 0.5, expected a number of at most 0"),
        ({"scores": np.zeros((2, 3))}, TeacherError, "shape .2, 3., expected"),
        ({"credit": "best"}, ConfigError, "no credit rule 'best': choose one of shared"),
        ({"credit": "gap"}, ConfigError, "give the student's log-probs"),
        ({"credit": "gap", "student_logps": [0.0]}, DataError, "student log-probs of shape .1,."),
        ({"ids": [1.5, 2.0]}, DataError, "float64, expected whole numbers"),
        ({"ids": [[5, 6], [7, 8]]}, DataError, "shape .2, 2., expected .n.: give the ids of one text"),
        ({"ids": [[5, 6], [7]]}, DataError, "lists of several lengths"),
        ({"ids": [5, 420]}, VocabularyError, "Position 1: id 420 is not in the student's vocabulary of 420"),
        ({"ids": [-100, 5]}, VocabularyError, "Position 0: id -100 is not in"),
        ({"scores": lambda query: [{"1": -0.5}] * len(query)}, TeacherError, "is no list, array or tensor of numbers"),
        ({"scores": lambda query: np.zeros(len(query), dtype=bool)}, TeacherError, "no list, array or tensor of numb"),
        ({"scores": lambda query: ["-0.5"] * len(query)}, TeacherError, "no list, array or tensor of numbers"),
        ({"scores": lambda query: np.zeros(len(query), "M8[s]")}, TeacherError, "no list, array or tensor of numbers"),
        ({"scores": lambda query: [-(10**400)] * len(query)}, TeacherError, "no list, array or tensor of numbers"),
        ({"scores": lambda query: torch.zeros(len(query), device="meta")}, TeacherError, "no list, array or tensor"),
        ({"ids": torch.ones(3).bfloat16()}, DataError, "Token ids are float64, expected whole numbers"),
        ({"ids": torch.ones(3).to_sparse()}, DataError, "Token ids are Tensor that numpy cannot read"),
        ({"ids": torch.ones(3, device="meta")}, DataError, "Token ids are Tensor that numpy cannot read"),
        ({"tools": 3}, DataError, "The tools are int, expected a list"),
        ({"ids": [], "credit": "gap"}, ConfigError, "give the student's log-probs"),
        ({"credit": ["shared"]}, ConfigError, "no credit rule"),
        ({"credit": "gap", "student_logps": OWN * np.nan}, DataError, "log-prob of token 0 .* is nan, expected a fin"),
        ({"credit": "gap", "student_logps": OWN * np.inf}, DataError, "is -inf, expected a finite number"),
        ({"credit": "gap", "student_logps": -OWN}, DataError, "is 1.0, expected a finite number of at most 0"),
        ({"conversation": "Hi"}, DataError, "The conversation is str, expected a list of messages"),
        ({"conversation": ["Hi"]}, DataError, "Message 0 is 'Hi', expected a mapping with a role"),
        ({"conversation": [{"content": "Hi"}]}, DataError, "expected a mapping with a role"),
        ({"conversation": [*ASK, {"role": "assistant", "content": "x"}]}, DataError, "ends with an assistant's mess"),
        ({"sampled": np.full(len(OWN), -100)}, DataError, "mask of sampled ids holds -100, expected 0 and 1"),
        ({"sampled": np.full(len(OWN), 0.3)}, DataError, "mask of sampled ids holds 0.3"),
        ({"sampled": np.full(len(OWN), np.nan)}, DataError, "mask of sampled ids holds nan"),
        ({"sampled": ["0"] * len(OWN)}, DataError, "mask of sampled ids holds 0, expected 0 and 1"),
        ({"conversation": Transcript.of_completion(ASK, [5])}, DataError, "ids given beside a Transcript"),
        ({"sampled": [1]}, DataError, "a mask of shape .1,."),
        ({"sampled": np.zeros(len(sampled(CHATML, TEXT)))}, DataError, "0 sampled runs"),
        ({"sampled": np.ones(len(sampled(CHATML, TEXT)))}, DataError, "1 sampled runs and .* 0 assistant messages"),
        ({"conversation": [{"role": "system", "content": "x"}]}, RenderingError, "no system role"),
    ],
)
def test_what_does_not_belong_together_is_refused_with_both_values(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs: dict[str, Any] = {
        "conversation": ASK,
        "ids": sampled(CHATML, TEXT),
        "scores": lambda query: np.full(len(query), -1.0),
    }
    with pytest.raises(error, match=message):
        project_teacher_scores(CHATML, INST, **{**inputs, **change})
