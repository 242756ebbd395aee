"""Alignment against a brute-force oracle, and its invariants."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diglot.alignment import Alignment, Side, align, check_bytes
from diglot.alignment.align import starts
from diglot.errors import AlignmentError

checked = settings(derandomize=True, deadline=None, max_examples=300)


def side(*segments: list[int], inexact: tuple[int, ...] = (), stop: tuple[int, ...] = ()) -> Side:
    """A side from the byte ends of each segment; `inexact` and `stop` are packed token indices."""
    end = np.array([e for ends in segments for e in ends], dtype=np.int64)
    segment = np.repeat(np.arange(len(segments)), [len(ends) for ends in segments]).astype(np.int64)
    index = np.arange(len(end))
    return Side(end, segment, ~np.isin(index, inexact), np.isin(index, stop))


@dataclass(frozen=True)
class Case:
    """Two sides of the same segments. A side may be cut short; ends repeat for tokens without bytes."""

    student: Side
    teacher: Side
    num_segments: int


@st.composite
def one_side(draw: st.DrawFn, lengths: list[int], stopped: list[bool]) -> Side:
    ends, exact, stop = [], [], []
    for length, finished in zip(lengths, stopped, strict=True):
        inner = draw(st.lists(st.integers(0, length), max_size=length + 2)) if length else []
        here = sorted([*inner, length]) if length else [0] * draw(st.integers(0, 2))
        marks = [False] * len(here)
        if finished:
            here, marks = [*here, length + 1], [*marks, True]
        count = draw(st.integers(0, len(here))) if draw(st.integers(0, 3)) == 0 else len(here)  # truncation
        ends.append(here[:count])
        stop += marks[:count]
        exact += [draw(st.integers(0, 5)) > 0 for _ in range(count)]
    made = side(*ends)
    return Side(made.end, made.segment, np.array(exact, dtype=bool), np.array(stop, dtype=bool))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 9), max_size=4))
    stopped = [draw(st.booleans()) for _ in lengths]
    return Case(draw(one_side(lengths, stopped)), draw(one_side(lengths, stopped)), len(lengths))


def oracle_chunks(case: Case) -> tuple[list[int], list[int], list[tuple[int, list[int], list[int]]]]:
    """Chunk of each token of both sides, and (segment, student tokens, teacher tokens) of each chunk."""
    chunks: list[tuple[int, list[int], list[int]]] = []
    for number in range(case.num_segments):
        tokens, with_bytes = [], []
        for one in (case.student, case.teacher):
            mine = [i for i in range(len(one.end)) if one.segment[i] == number]
            start = 0
            spans = []
            for i in mine:
                spans.append((i, start, int(one.end[i])))
                start = int(one.end[i])
            tokens.append(spans)
            with_bytes.append({end for _, start, end in spans if end > start})
        shared = sorted(with_bytes[0] & with_bytes[1])
        first = len(chunks)
        chunks += [(number, [], []) for _ in shared]
        for which, spans in enumerate(tokens, start=1):
            for position, (i, start, end) in enumerate(spans):
                later = [e for _, s, e in spans[position:] if e > s]
                earlier = [e for _, s, e in spans[:position] if e > s]
                # Its own end, else that of the next token with bytes, else that of the last one.
                ends_at = end if end > start else later[0] if later else earlier[-1] if earlier else None
                inside = [k for k, boundary in enumerate(shared) if ends_at is not None and ends_at <= boundary]
                if inside:
                    chunks[first + inside[0]][which].append(i)
    chunk_s, chunk_t = [-1] * len(case.student.end), [-1] * len(case.teacher.end)
    for k, (_, tokens_s, tokens_t) in enumerate(chunks):
        for i in tokens_s:
            chunk_s[i] = k
        for i in tokens_t:
            chunk_t[i] = k
    return chunk_s, chunk_t, chunks


def oracle_teacher_at(case: Case) -> list[int]:
    start_s, start_t = starts(case.student).tolist(), starts(case.teacher).tolist()
    return [
        max(
            (
                j
                for j in range(len(start_t))
                if case.teacher.segment[j] == case.student.segment[i] and start_t[j] <= start_s[i]
            ),
            default=-1,
        )
        for i in range(len(start_s))
    ]


@checked
@given(cases())
def test_alignment_is_what_a_token_by_token_search_finds(case: Case) -> None:
    alignment = align(case.student, case.teacher, case.num_segments)
    chunk_s, chunk_t, chunks = oracle_chunks(case)
    assert alignment.chunk_s.tolist() == chunk_s
    assert alignment.chunk_t.tolist() == chunk_t
    assert alignment.chunk_segment.tolist() == [number for number, _, _ in chunks]
    assert alignment.count_s.tolist() == [len(s) for _, s, _ in chunks]
    assert alignment.count_t.tolist() == [len(t) for _, _, t in chunks]
    exact = [bool(case.student.exact[s].all() and case.teacher.exact[t].all()) for _, s, t in chunks]
    assert alignment.chunk_exact.tolist() == exact
    assert alignment.chunk_stop.tolist() == [bool(case.student.stop[s].any()) for _, s, _ in chunks]
    pairs = [(s[0], t[0]) for (_, s, t), ok in zip(chunks, exact, strict=True) if ok and len(s) == len(t) == 1]
    assert list(zip(alignment.pair_s.tolist(), alignment.pair_t.tolist(), strict=True)) == pairs
    assert alignment.teacher_at.tolist() == oracle_teacher_at(case)
    assert alignment.dropped == chunk_s.count(-1) + chunk_t.count(-1)
    if chunk_s:
        in_exact = sum(len(s) for (_, s, _), ok in zip(chunks, exact, strict=True) if ok)
        assert alignment.coverage == pytest.approx(in_exact / len(chunk_s))
        assert alignment.one_to_one == pytest.approx(len(pairs) / len(chunk_s))


@checked
@given(cases())
def test_each_chunk_covers_the_same_bytes_on_both_sides_without_a_gap(case: Case) -> None:
    alignment = align(case.student, case.teacher, case.num_segments)
    spans = []
    for one, chunk in ((case.student, alignment.chunk_s), (case.teacher, alignment.chunk_t)):
        start = starts(one)
        spans.append([(start[chunk == k].min(), one.end[chunk == k].max()) for k in range(alignment.num_chunks)])
        for number in range(case.num_segments):
            inside = chunk[(one.segment == number) & (chunk >= 0)]
            assert (np.diff(inside) >= 0).all()
    assert spans[0] == spans[1]
    for k, (start, _) in enumerate(spans[0]):
        continues = k > 0 and alignment.chunk_segment[k] == alignment.chunk_segment[k - 1]
        assert start == (spans[0][k - 1][1] if continues else 0)


@checked
@given(cases())
def test_swapping_the_sides_swaps_the_result(case: Case) -> None:
    one, other = (
        align(case.student, case.teacher, case.num_segments),
        align(case.teacher, case.student, case.num_segments),
    )
    for here, there in (("chunk_s", "chunk_t"), ("count_s", "count_t"), ("pair_s", "pair_t")):
        assert getattr(one, here).tolist() == getattr(other, there).tolist()
    assert one.chunk_exact.tolist() == other.chunk_exact.tolist()


@checked
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_segments_only_renumbers(case: Case, random: object) -> None:
    order = list(range(case.num_segments))
    random.shuffle(order)  # type: ignore[attr-defined]

    def reordered(one: Side) -> tuple[Side, np.ndarray]:
        picked = np.concatenate([np.flatnonzero(one.segment == n) for n in order] or [np.zeros(0, np.int64)])
        segment = np.array([order.index(n) for n in one.segment[picked]], dtype=np.int64)
        return Side(one.end[picked], segment, one.exact[picked], one.stop[picked]), picked

    (student, from_s), (teacher, from_t) = reordered(case.student), reordered(case.teacher)
    plain, moved = align(case.student, case.teacher, case.num_segments), align(student, teacher, case.num_segments)
    pairs = zip(from_s[moved.pair_s], from_t[moved.pair_t], strict=True)
    assert sorted(pairs) == sorted(zip(plain.pair_s, plain.pair_t, strict=True))
    assert (moved.coverage, moved.one_to_one, moved.dropped) == (plain.coverage, plain.one_to_one, plain.dropped)
    for number in range(case.num_segments):
        here = moved.chunk_segment == order.index(number)
        assert moved.count_s[here].tolist() == plain.count_s[plain.chunk_segment == number].tolist()


def test_a_side_aligned_with_itself_is_all_pairs() -> None:
    one = side([2, 5, 6], [], [1, 4, 5], stop=(2, 5))
    alignment = align(one, one, 3)
    assert alignment.pair_s.tolist() == alignment.pair_t.tolist() == alignment.chunk_s.tolist() == list(range(6))
    assert (alignment.coverage, alignment.one_to_one, alignment.dropped) == (1.0, 1.0, 0)
    assert np.flatnonzero(alignment.chunk_stop).tolist() == [2, 5]


def test_known_example() -> None:
    #          The | cat | s | STOP        against   Th | e | cats | STOP
    alignment = align(side([3, 6, 7, 8], stop=(3,)), side([2, 3, 7, 8], stop=(3,)), 1)
    assert alignment.chunk_s.tolist() == [0, 1, 1, 2]
    assert alignment.chunk_t.tolist() == [0, 0, 1, 2]
    assert alignment.chunk_stop.tolist() == [False, False, True]
    assert (alignment.pair_s.tolist(), alignment.pair_t.tolist()) == ([3], [3])
    assert alignment.teacher_at.tolist() == [0, 2, 2, 3]
    assert (alignment.coverage, alignment.one_to_one, alignment.dropped) == (1.0, 0.25, 0)


def test_tokens_without_bytes_join_the_next_token_and_at_the_end_the_last_chunk() -> None:
    alignment = align(side([0, 0, 2, 2, 5, 5, 5]), side([2, 5]), 1)
    assert alignment.chunk_s.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert alignment.count_s.tolist() == [3, 4]
    assert alignment.pair_s.tolist() == []


def test_tokens_without_bytes_before_a_stop_join_the_stop() -> None:
    alignment = align(side([2, 2, 3], stop=(2,)), side([2, 3], stop=(1,)), 1)
    assert alignment.chunk_s.tolist() == [0, 1, 1]
    assert alignment.pair_s.tolist() == [0]


def test_tokens_after_the_last_shared_boundary_lie_in_no_chunk() -> None:
    alignment = align(side([2, 4]), side([2, 3, 6, 7], stop=(3,)), 1)  # the student's copy was cut after byte 4
    assert alignment.chunk_s.tolist() == [0, -1]
    assert alignment.chunk_t.tolist() == [0, -1, -1, -1]
    assert alignment.dropped == 4
    assert alignment.coverage == 0.5


def test_a_segment_that_one_side_has_not_read_is_dropped_alone() -> None:
    alignment = align(side([1], [2, 3], [4]), side([1], [], [4]), 3)
    assert alignment.chunk_s.tolist() == [0, -1, -1, 1]
    assert alignment.chunk_segment.tolist() == [0, 2]
    assert alignment.teacher_at.tolist() == [0, -1, -1, 1]


def test_an_inexact_region_is_a_chunk_but_never_a_pair() -> None:
    # Teacher tokens 1 and 2 spell bytes 2..5 of the text otherwise: the first of them ends where the region starts.
    alignment = align(side([2, 5, 7]), side([2, 2, 5, 7], inexact=(1, 2)), 1)
    assert alignment.chunk_t.tolist() == [0, 1, 1, 2]
    assert alignment.chunk_exact.tolist() == [True, False, True]
    assert alignment.pair_s.tolist() == [0, 2]
    assert alignment.coverage == pytest.approx(2 / 3)


def test_nothing_aligns_to_nothing() -> None:
    alignment = align(side(), side(), 0)
    assert (alignment.num_chunks, alignment.coverage, alignment.one_to_one, alignment.dropped) == (0, 1.0, 1.0, 0)
    one_sided = align(side([1, 2]), side(), 1)
    assert (one_sided.chunk_s.tolist(), one_sided.coverage, one_sided.dropped) == ([-1, -1], 0.0, 2)


@pytest.mark.parametrize(
    ("student", "num_segments", "message"),
    [
        (Side(*side([3, 2]).__dict__.values()), 1, r"segment 0, token 1 has end 2 after 3"),
        (side([1], [2]), 1, r"segments run from 0 to 1, but there are 1"),
        (side([-1]), 1, r"segment 0, token 0 ends at byte -1"),
        (side([1, 2, 3], stop=(1,)), 1, r"segment 0, token 2 has stop False after True"),
        (side([2, 2], stop=(1,)), 1, r"a stop token ends at length \+ 1"),
    ],
)
def test_sides_that_break_the_rules_are_named(student: Side, num_segments: int, message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        align(student, student, num_segments)


def test_descending_segments_are_named() -> None:
    good = side([1], [1])
    with pytest.raises(AlignmentError, match=r"teacher: segment 0, token 1 has segment 0 after 1"):
        align(good, Side(good.end, good.segment[::-1].copy(), good.exact, good.stop), 2)


def test_another_number_type_is_named() -> None:
    good = side([1, 2])
    with pytest.raises(AlignmentError, match=r"student\.end is int32 \(2,\), expected int64"):
        align(Side(good.end.astype(np.int32), good.segment, good.exact, good.stop), good, 1)


def test_a_boundary_that_stops_one_side_only_is_named() -> None:
    with pytest.raises(AlignmentError, match=r"segment 0: a boundary at byte 3 is the stop event of one side only"):
        align(side([2, 3], stop=(1,)), side([2, 3]), 1)


def test_check_bytes_names_the_first_difference() -> None:
    check_bytes(b"same", b"same", "row 3")
    with pytest.raises(AlignmentError, match=r"row 3.*from byte 2 on.*b'me' of 4 bytes.*b'ne' of 4"):
        check_bytes(b"same", b"sane", "row 3")
    with pytest.raises(AlignmentError, match=r"from byte 4 on.*b'' of 4 bytes.*b'!' of 5"):
        check_bytes(b"same", b"same!", "row 3")


def test_to_gives_the_same_as_tensors() -> None:
    torch = pytest.importorskip("torch")
    alignment = align(side([2, 5, 6], stop=(2,)), side([5, 6], stop=(1,)), 1)
    moved = alignment.to("cpu").to("cpu")
    for field in fields(Alignment):
        before, after = getattr(alignment, field.name), getattr(moved, field.name)
        if isinstance(before, np.ndarray):
            assert isinstance(after, torch.Tensor)
            assert after.tolist() == before.tolist()
        else:
            assert after == before
    assert moved.num_chunks == alignment.num_chunks


def test_alignment_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, diglot.alignment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
