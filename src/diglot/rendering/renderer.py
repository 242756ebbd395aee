"""What one model reads for one conversation: ids, a role for each, and the byte ends of what is scored."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from diglot.arrays import Ids
from diglot.errors import DataError, RenderingError
from diglot.rendering.assemble import Piece, assemble, cut_segments, join
from diglot.rendering.encoding import Item, encode_items, writes_dummy_prefix
from diglot.rendering.labels import label_segment
from diglot.rendering.markers import CUT, MarkerGuard
from diglot.rendering.markup import CALL, PLAIN, PROBE, Layout, Markup, common_markup
from diglot.rendering.reply import plain_reply
from diglot.rendering.stops import describe_stops, find_stops, probe_template
from diglot.rendering.template import (
    Template,
    content_text,
    missing_from,
    opens_thinking,
    with_thinking,
    without_thinking,
)
from diglot.rendering.types import Conversation, Rendered, Reply, Role, Score, Shape, Slot
from diglot.vocabulary import ByteEncoder, Vocabulary
from diglot.vocabulary.own_file import describe_difference, difference_from_file

logger = logging.getLogger(__name__)


class Renderer:
    """One side of a pair: its tokenizer, vocabulary, chat template and stop set.

    What is read before the last reply is, id by id, what `apply_chat_template` gives. Generation prompt and reply are
    encoded apart, as at generation, so their seam is a token boundary.

    Args:
        num_embeddings: rows of the model's embedding.
        generation_config: of the model; its end-of-text ids join the stop set.
        chat_template_kwargs: handed to the chat template.
        fold_system: put a system message that the template refuses or drops into the first user's.
        markers: what is done about names of control tokens in the text of messages; see `rendering.markers`.
        name: for messages, "student" or "teacher".

    Raises:
        VocabularyError: the bytes of the tokens cannot be known.
        RenderingError: nothing ends a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_embeddings: int | None = None,
        generation_config: GenerationConfig | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        fold_system: bool = False,
        markers: str = "read",
        name: str = "model",
    ) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer, num_embeddings)
        self.encoder = ByteEncoder(tokenizer, self.vocabulary)
        self.template = Template(tokenizer, chat_template_kwargs, name, fold_system=fold_system)
        self.guard = MarkerGuard(self.encoder, markers, name)
        probed = None
        if self.template.exists:
            probed = probe_template(self.template.text, self.encoder.encode_markup, self.vocabulary.control)
        self.stop_id, self.stop_sources = find_stops(
            tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None), probed, len(self.vocabulary), name
        )
        self.markup = Markup(self.template, self.vocabulary, self.encoder.encode_markup, tuple(self.stop_sources))
        after_call = self.markup.layout(CALL)
        if after_call.stop is not None and after_call.stop not in self.stop_sources:
            self.stop_sources[after_call.stop] = "template, after a tool call"
        self.stop_ids = tuple(self.stop_sources)
        self.notes: list[str] = []
        """What this side leaves out or reads in another way than its user may expect, as far as it has come up."""
        self._logged: set[str] = set()
        if (difference := difference_from_file(tokenizer)) is not None:
            self._note(describe_difference(difference, name))
        logger.info(
            "%s: %s vocabulary of %d, stops at %s",
            name,
            self.vocabulary.kind,
            len(self.vocabulary),
            describe_stops(self.stop_sources, self.vocabulary.display),
        )

    @classmethod
    def of_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Renderer:
        """What `model` reads with its tokenizer; `options` are those of the constructor."""
        rows: Any = model.get_input_embeddings()
        return cls(tokenizer, num_embeddings=rows.num_embeddings, generation_config=model.generation_config, **options)

    @property
    def has_template(self) -> bool:
        """Does the tokenizer come with a chat template?"""
        return self.template.exists

    # ---- prompts -----------------------------------------------------------------------------------------------

    def opens_thinking(self, conversation: Conversation) -> bool:
        """Does this side's generation prompt end inside a think block?"""
        if conversation.messages is None or not self.has_template:
            return False
        return opens_thinking(self._text(conversation))

    def prompt_ids(self, conversation: Conversation, *, thinking: bool | None = None) -> Ids:
        """Everything this side reads before the last reply, as at inference. Never empty."""
        pieces = self._prompt(conversation, self._prompt_text(conversation, thinking))
        return np.concatenate([piece.ids for piece in pieces])

    def _prompt_text(self, conversation: Conversation, thinking: bool | None, bare: bool = False) -> str:
        """The text of the prompt; `bare` is one without any think block at its end."""
        if conversation.messages is None:
            return conversation.text
        text = self._text(conversation)
        self._check_complete(conversation, text)
        return without_thinking(text) if bare else with_thinking(text, thinking)

    def _prompt(self, conversation: Conversation, text: str) -> list[Piece]:
        """What stands before the last reply. The first scored token always has one before it that predicts it."""
        if conversation.messages is not None and self.has_template:
            parts = text.split(CUT)
            read = [self.encoder.encode_markup(part, start=k == 0) for k, part in enumerate(parts)]
            return self._started([Piece.prompt(np.concatenate(read))])
        if any(name in text for name in self._stop_names):
            self._note(
                f"A prompt that is plain text holds markers of the {self.name}'s template, which are read as letters. "
                "Give conversations as lists of messages, so that each side writes its own markers."
            )
        return self._started([self._bos(), Piece.prompt(self.encoder.encode([text], start=True)[0].ids)])

    def _scored_prompt(self, conversation: Conversation, thinking: bool | None, bare: bool) -> tuple[list[Piece], str]:
        """Messages with the assistant's earlier turns as segments, their text as written, encoded as one text."""
        assert conversation.messages is not None
        messages = self.guard.guarded(conversation.messages)
        texts, turns = self.template.pieces(messages, tools=conversation.tools)
        self._check_complete(conversation, "".join(texts))
        texts[-1] = without_thinking(texts[-1]) if bare else with_thinking(texts[-1], thinking)
        around = [[Item(self._around, part) for part in text.split(CUT)] for text in texts]
        contents = [Item("segment", content_text(conversation.messages[turn], self.name)) for turn in turns]
        items = [item for before, content in zip(around, contents, strict=False) for item in (*before, content)]
        items += around[-1]
        piece = encode_items(self.encoder, items, start=True)
        for k in range(len(contents)):
            label_segment(piece, k, opened=False)
            if (at := self._stop_behind(piece, k)) is not None:
                piece = piece.with_stop(at, k)
        pieces = self._started([piece] if self.has_template else [self._bos(), piece])
        return pieces, "".join(item.text for item in items)

    def _stop_behind(self, piece: Piece, segment: int) -> int | None:
        """Where the stop of an earlier turn stands: right behind it, or behind what the template closes a turn with."""
        inside = np.flatnonzero(piece.segment == segment)
        if not len(inside):
            return None
        closing = len(self._closing_ids)
        for at in range(int(inside[-1]) + 1, min(int(inside[-1]) + 2 + closing, len(piece.ids))):
            if int(piece.ids[at]) in self.stop_ids:
                return at
        return None

    @cached_property
    def _dummy_prefix(self) -> bool:
        """Does this side begin a reply with a space that no reply has?"""
        if not self.has_template:
            return False
        return writes_dummy_prefix(self.encoder, self.template.text([PROBE], generation_prompt=True))

    @cached_property
    def _prefix_behind_controls(self) -> bool:
        """Does this side begin a word behind a control token with a space that no text has?"""
        return writes_dummy_prefix(self.encoder, self.vocabulary.display(self.stop_id))

    @cached_property
    def _closing_ids(self) -> Ids:
        """What the template writes between a reply and its stop."""
        return self.encoder.encode_markup(self.markup.layout(PLAIN).around[-1])

    def _started(self, pieces: list[Piece]) -> list[Piece]:
        first = next((p for p in pieces if len(p.ids)), None)
        if first is None or first.segment[0] >= 0:
            pieces.insert(0, Piece.prompt(np.array([self._document_start()], dtype=np.int64)))
        return pieces

    @property
    def _around(self) -> Literal["markup", "text"]:
        """What a template writes is markup; a transcript is text, so that no special token can come of it."""
        return "markup" if self.has_template else "text"

    def _text(self, conversation: Conversation) -> str:
        assert conversation.messages is not None
        messages = self.guard.guarded(conversation.messages)
        text = self.template.text(messages, tools=conversation.tools, generation_prompt=True)
        if self.guard.manner == "read" and self.has_template:
            self._warn_of_markers(messages)
        return text

    def _warn_of_markers(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Say once that a message holds what ends a turn on this side."""
        for message in messages:
            content = message.get("content")
            if isinstance(content, str) and any(name in content for name in self._stop_names):
                self._note(
                    f"A message holds a marker that ends a turn for the {self.name}, and is read as one, as a served "
                    "model reads it; the other side may read others. Set markers to 'text' or 'refuse' to avoid it."
                )

    @cached_property
    def _stop_names(self) -> list[str]:
        return [self.vocabulary.names[i] for i in self.stop_ids if i in self.vocabulary.names]

    def _bos(self) -> Piece:
        return Piece.prompt(np.array(self.encoder.bos_ids, dtype=np.int64))

    def _check_complete(self, conversation: Conversation, text: str) -> None:
        """Say once what kind of message this side never sees, and that a transcript stands in for a template."""
        if not self.has_template:
            self._log_once(f"The {self.name} has no chat template: it reads conversations as a plain transcript.")
        for kind in missing_from(text, conversation.messages or (), conversation.tools):
            self._note(
                f"The {self.name}'s chat template leaves out {kind!r}, which the data has: this side does not read it."
            )

    def _document_start(self) -> int:
        """What predicts the first token of a text from nothing: BOS, or the separator of documents."""
        bos = self.tokenizer.bos_token_id
        start = bos if bos is not None else self.tokenizer.eos_token_id
        if start is None:
            raise RenderingError(
                f"The prompt is empty and the {self.name}'s tokenizer has neither BOS nor EOS. Give a prompt."
            )
        self._log_once(f"The {self.name} reads {self.vocabulary.display(start)!r} before a text without a prompt.")
        return int(start)

    # ---- whole samples -----------------------------------------------------------------------------------------

    def render(
        self,
        conversation: Conversation,
        reply: str | Reply,
        *,
        stopped: bool = True,
        score: Score = "last",
        thinking: bool | None = None,
    ) -> Rendered:
        """A conversation with a reply that is given as text, or as parts.

        A text is one segment, after what the template itself writes before a reply. Parts are a segment each (two for
        the call of a tool), in this side's own markup.

        Args:
            stopped: was the reply finished by its writer? If so this side's stop token follows.
            score: segments are the last reply only, or all assistant turns.
            thinking: whether the text of a reply starts inside a think block; None: this side's own way.

        Raises:
            DataError: the reply is no text.
            RenderingError: the template refuses the conversation, or with `score="all"` drops a turn of it.
        """
        if not isinstance(reply, (str, Reply)):
            raise DataError(f"The reply is {type(reply).__name__}, expected a string. Give the text of the last turn.")
        parts = plain_reply(reply) if isinstance(reply, str) else reply
        layout = self._layout(conversation, parts, thinking)
        self.note_common(parts.shape)
        self._note_spelt(parts)
        if not stopped:
            layout = replace(layout, around=(*layout.around[:-1], ""))
        if score == "all" and conversation.messages is not None:
            prompt, text = self._scored_prompt(conversation, thinking, layout.bare)
        else:
            text = self._prompt_text(conversation, thinking, layout.bare)
            prompt = self._prompt(conversation, text)
        before = text if self.encoder.has_edges and self.has_template and conversation.messages else ""
        opened = isinstance(reply, str) and not layout.bare and self._opened(conversation, thinking)
        tail = self._tail(parts, layout, before, opened)
        if stopped:
            stop = self.stop_id if layout.stop is None else layout.stop
            ending = Piece.plain(np.array([stop], dtype=np.int64), Role.MARKUP)
            joined = join([tail, ending])
            tail = joined.with_stop(len(joined.ids) - 1, len(joined.texts) - 1)
        return assemble([*prompt, tail], parts)

    def as_written(self, conversation: Conversation, written: Rendered, *, thinking: bool | None = None) -> Rendered:
        """The very ids that another model with the same vocabulary wrote, after what this side reads before them."""
        reply = written.reply
        assert reply is not None
        first = written.prompt_length
        tail = Piece(*(getattr(written, name)[first:] for name in ("ids", "roles", "end", "exact", "segment")))
        ids = np.where(tail.roles == Role.STOP, self.stop_id, tail.ids)
        scored = tail.segment >= 0
        tail = replace(tail, ids=ids, exact=tail.exact | scored, texts=written.segment_bytes, stopped=written.stopped)
        layout = self._layout(conversation, plain_reply(reply.whole) if reply.whole is not None else reply, thinking)
        pieces = self._prompt(conversation, self._prompt_text(conversation, thinking, layout.bare))
        if reply.is_plain and (not len(scored) or scored[0]):
            pieces.append(Piece.prompt(self.encoder.encode_markup(layout.around[0])))
        return assemble([*pieces, tail], reply)

    def _layout(self, conversation: Conversation, parts: Reply, thinking: bool | None) -> Layout:
        """What stands around the parts, and whether the prompt before them is one without a think block."""
        if conversation.messages is None and parts.is_plain:
            return Layout(("", ""))
        layout = self.markup.layout(parts.shape)
        if parts.shape[0] == Role.REASONING:
            return replace(layout, bare=layout.bare or not layout.own)
        if not parts.is_plain:
            return layout
        if parts.text.lstrip().startswith("<think>"):  # the text brings a block of its own
            return replace(layout, around=("", layout.around[-1]), bare=thinking is not True)
        if self._opened(conversation, thinking):  # the text starts inside the block
            return replace(layout, around=("", layout.around[-1]), bare=False)
        return layout

    def note_common(self, shape: Shape) -> None:
        """Say once which parts of a reply this side is given in markup that is not its own."""
        common = self.markup.layout(shape).common
        for kind, alone in (("reasoning", (Role.REASONING, Role.CONTENT)), ("calls of tools", CALL)):
            if alone[0] in common:
                self._note(
                    f"The {self.name} has no chat template that writes {kind} as one of the replies has them: it reads "
                    f"them as {common_markup(alone)!r}. If it was trained with other markup, give its tokenizer a "
                    "template that writes that."
                )

    def _note_spelt(self, parts: Reply) -> None:
        """Say once that a reply spells what this side has a control token for."""
        if not self.has_template or self.guard.manner == "text":
            return
        names = (*self.markup.controls, *self._stop_names)
        texts = [text for slot in parts.slots for text in slot.texts]
        if spelt := next((name for name in names if any(name in text for text in texts)), None):
            self._note(
                f"A reply spells {spelt!r}, a control token of the {self.name}, and is read as those letters, which "
                "this side never writes. Give reasoning and calls as fields of the message (reasoning_content, "
                "tool_calls), and a reply without its end: each side then reads its own markers."
            )

    def _tail(self, parts: Reply, layout: Layout, before: str, opened: bool) -> Piece:
        """The parts of a reply and what stands around them."""
        items, roles = [Item(self._around, layout.around[0])], []
        for slot, after in zip(parts.slots, layout.around[1:], strict=True):
            for k, (text, edge) in enumerate(zip(slot.texts, (*slot.edges, ""), strict=True)):
                # As in `_parts`. An edge may have no name: ids behind the tokenizer's, which only pad an embedding.
                if text or (slot is parts.slots[-1] and k == len(slot.edges)):
                    items.append(Item("segment", text))
                    roles.append(slot.role)
                items.append(Item("text", edge))
            items.append(Item(self._around, after))
        piece = encode_items(self.encoder, items, before=before)
        for k, role in enumerate(roles):
            if role == Role.CONTENT and parts.is_plain:
                label_segment(piece, k, opened)
            piece.roles[(piece.segment == k) & (piece.roles == Role.CONTENT)] = role
        return piece

    # ---- what a model wrote ------------------------------------------------------------------------------------

    def from_sampled(
        self,
        conversation: Conversation,
        completion_ids: Sequence[int] | Ids,
        *,
        prompt_ids: Ids | None = None,
        thinking: bool | None = None,
        split: bool = False,
    ) -> Rendered:
        """A completion as the model sampled it: its ids stay as they are, the text is what they spell.

        Ids after the first stop are left out. Control tokens are no text: they are edges of segments, and what stands
        behind one is scored again. Nothing is scored from the first invalid byte or cut character on, since no other
        model could read it; nor is the stop then.

        Args:
            split: one segment for each part of the reply, rather than one for all of it, also where it holds no control
                tokens.
        """
        ids = np.asarray(completion_ids, dtype=np.int64).reshape(-1)
        stops = np.flatnonzero(np.isin(ids, self.stop_ids))
        ids = ids[: stops[0] + 1] if len(stops) else ids
        written = ids[: stops[0]] if len(stops) else ids
        marked, ends = self.markup.marked(written)
        valid = self._valid_prefix(written, marked, ends)
        whole = bool(len(stops)) and valid == len(written)
        opened = self._opened(conversation, thinking)
        text = marked[: int(ends[valid - 1]) if valid else 0]
        reply, spans, roles = self._parts(text, opened, whole, split, conversation)
        outside = np.where(self.vocabulary.control[ids], Role.MARKUP, Role.CONTENT).astype(np.int8)
        outside[: valid if spans else 0] = Role.MARKUP
        outside[len(written) :] = Role.STOP
        if len(ids) > len(written):
            ends = np.append(ends, ends[-1] if len(ends) else 0)
        exact = np.ones(len(ids), dtype=np.bool_)
        ends[valid:] = len(text)
        piece = cut_segments(ids, ends, exact, spans, [text[low:high] for low, high in spans], outside)
        for k, role in enumerate(roles):
            if role == Role.CONTENT and len(roles) == 1:
                label_segment(piece, k, opened and reply.whole is not None)
            piece.roles[(piece.segment == k) & (piece.roles == Role.CONTENT)] = role
        if whole:
            piece = piece.with_stop(len(ids) - 1, len(spans) - 1)
        edges = sum(len(slot.edges) for slot in reply.slots)
        broken = 0 if whole or valid == len(written) else len(ids) - valid
        markup = int((piece.segment[:valid] < 0).sum()) - edges + broken
        if prompt_ids is not None:
            return assemble([Piece.prompt(prompt_ids), piece], reply, markup)
        return assemble([*self._prompt(conversation, self._prompt_text(conversation, thinking)), piece], reply, markup)

    def _parts(
        self, text: bytes, opened: bool, finished: bool, split: bool, conversation: Conversation
    ) -> tuple[Reply, list[tuple[int, int]], list[Role]]:
        """The parts of what was written, with the bytes and the role of each segment."""
        has_controls = b"\xff" in text
        if conversation.messages is None and not has_controls:
            return plain_reply(text.decode()), [(0, len(text))], [Role.CONTENT]
        shape, slots = self.markup.find(text, opened, finished)
        if shape[0] == Role.REASONING and len(shape) > 1 and slots[0][0] == slots[0][1]:
            shape, slots = shape[1:], slots[1:]  # an empty think block
        names, prefixes = self.vocabulary.names, (self._dummy_prefix, self._prefix_behind_controls)
        parts = [_edges(text, *slot, role, names, prefixes) for role, slot in zip(shape, slots, strict=True)]
        first = _behind_prefix(text, 0, len(text), prefixes)
        reply = Reply(tuple(slot for slot, _ in parts), None if has_controls else text[first:].decode())
        if not split and not has_controls:
            low, high = slots[0] if shape == PLAIN else (0, len(text))
            return reply, [(max(first, low), high)], [Role.CONTENT]
        all_segments = [(run, slot.role) for slot, runs in parts for run in runs]
        segments = [
            (run, role) for k, (run, role) in enumerate(all_segments) if run[0] < run[1] or k == len(all_segments) - 1
        ]
        return reply, [run for run, _ in segments], [role for _, role in segments]

    def _valid_prefix(self, ids: Ids, marked: bytes, ends: Ids) -> int:
        """How many tokens from the start are text or control tokens: valid UTF-8, cut at the end of a character."""
        edges = [*np.flatnonzero(self.vocabulary.control[ids]).tolist(), len(ids)]
        first = 0
        for edge in edges:
            low = int(ends[first - 1]) if first else 0
            high = int(ends[edge - 1]) if edge else 0
            try:
                marked[low:high].decode()
            except UnicodeDecodeError as error:
                good = low + error.start  # where the first character begins that is none, or not whole
                count = int(np.searchsorted(ends[:edge], good, side="right"))
                while count > first and ends[count - 1] < good and marked[ends[count - 1]] & 0xC0 == 0x80:
                    count -= 1  # this token ends inside a character that the next one would finish
                return count
            first = edge + 1
        return len(ids)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _opened(self, conversation: Conversation, thinking: bool | None) -> bool:
        return self.opens_thinking(conversation) if thinking is None else thinking

    def _note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)
            logger.warning(message)

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.warning(message)


_MARK = re.compile(rb"\xff(\d+)\xfe")


def _edges(
    text: bytes, low: int, high: int, role: Role, names: Mapping[int, str], prefixes: tuple[bool, bool]
) -> tuple[Slot, list[tuple[int, int]]]:
    """A slot at `[low, high)` of marked bytes, cut at its control tokens, and the bytes of each run.

    Args:
        prefixes: may a space that stands first in the text, or first behind a control token, be the tokenizer's own?
    """
    runs, edges = [], []
    for mark in _MARK.finditer(text, low, high):
        runs.append((low, mark.start()))
        edges.append(names.get(int(mark[1]), ""))
        low = mark.end()
    runs.append((low, high))
    runs = [(_behind_prefix(text, a, b, prefixes), b) for a, b in runs]
    return Slot(role, tuple(text[a:b].decode() for a, b in runs), tuple(edges)), runs


def _behind_prefix(text: bytes, low: int, high: int, prefixes: tuple[bool, bool]) -> int:
    """Where what was meant begins in the run `[low, high)`: behind the space that a tokenizer begins words with."""
    first, behind_control = low == 0, text[low - 1 : low] == b"\xfe"
    own = (first and prefixes[0]) or (behind_control and prefixes[1])
    return low + 1 if own and low < high and text[low : low + 1] == b" " else low
