"""What one model reads for one conversation: ids, a role for each, and the byte ends of what is scored."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from diglot.errors import DataError, RenderingError
from diglot.rendering.assemble import Piece, assemble
from diglot.rendering.stops import describe_stops, find_stops, probe_template
from diglot.rendering.template import Template, content_text, missing_from, opens_thinking, with_thinking
from diglot.rendering.types import Conversation, Rendered, Role, Score
from diglot.vocabulary import ByteEncoder, Vocabulary

logger = logging.getLogger(__name__)

Ids = NDArray[np.int64]

_THINK = re.compile(rb"<think>.*?(?:</think>|\Z)", re.S)
_OPENED_THINK = re.compile(rb"\A.*?(?:</think>|\Z)", re.S)
_TOOL_CALL = re.compile(rb"<tool_call>.*?(?:</tool_call>|\Z)", re.S)


class Renderer:
    """One side of a pair: its tokenizer, vocabulary, chat template and stop set.

    Prompt and reply are always encoded apart, as at generation, so their seam is a token boundary.

    Args:
        num_embeddings: rows of the model's embedding.
        generation_config: of the model; its end-of-text ids join the stop set.
        chat_template_kwargs: handed to the chat template.
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
        name: str = "model",
    ) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer, num_embeddings)
        self.encoder = ByteEncoder(tokenizer, self.vocabulary)
        self.template = Template(tokenizer, chat_template_kwargs, name)
        probed = None
        if self.template.exists:
            probed = probe_template(self.template.text, self.encoder.encode_markup, self.vocabulary.control)
        self.stop_id, self.stop_sources = find_stops(
            tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None), probed, len(self.vocabulary), name
        )
        self.stop_ids = tuple(self.stop_sources)
        self._said: set[str] = set()
        logger.info(
            "%s: %s vocabulary of %d, stops at %s",
            name,
            self.vocabulary.kind,
            len(self.vocabulary),
            describe_stops(self.stop_sources, self.vocabulary.display),
        )

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
        return np.concatenate([p.ids for p in self._prompt(conversation, "last", thinking)])

    def _prompt(self, conversation: Conversation, score: Score, thinking: bool | None) -> list[Piece]:
        """What stands before the last reply. The first scored token always has one before it that predicts it."""
        if conversation.messages is None:
            pieces = [self._bos(), self._read(conversation.text)]
        elif score == "all":
            pieces = self._scored_prompt(conversation, thinking)
        else:
            pieces = self._messages_prompt(conversation, thinking)
        first = next((p for p in pieces if len(p.ids)), None)
        if first is None or first.text is not None:
            pieces.insert(0, Piece.prompt(np.array([self._document_start()], dtype=np.int64)))
        return pieces

    def _messages_prompt(self, conversation: Conversation, thinking: bool | None) -> list[Piece]:
        """Messages with the generation prompt, in one piece as the template writes it."""
        text = self._text(conversation)
        self._check_complete(conversation, text)
        text = with_thinking(text, thinking)
        return [self._markup(text, Role.PROMPT)] if self.has_template else [self._bos(), self._read(text)]

    def _scored_prompt(self, conversation: Conversation, thinking: bool | None) -> list[Piece]:
        """Messages cut where the assistant's turns stand, each turn a segment: its text as written, whole."""
        assert conversation.messages is not None
        texts, turns = self.template.pieces(conversation.messages, tools=conversation.tools)
        self._check_complete(conversation, "".join(texts))
        texts[-1] = with_thinking(texts[-1], thinking)
        pieces = [self._markup(texts[0], Role.PROMPT)] if self.has_template else [self._bos(), self._read(texts[0])]
        for turn, after in zip(turns, texts[1:], strict=True):
            text = content_text(conversation.messages[turn], self.name)
            pieces += self._scored_turn(self._encode(text), text, after)
        return pieces

    def _text(self, conversation: Conversation) -> str:
        assert conversation.messages is not None
        return self.template.text(conversation.messages, tools=conversation.tools, generation_prompt=True)

    def _bos(self) -> Piece:
        return Piece.prompt(np.array(self.encoder.bos_ids, dtype=np.int64))

    def _read(self, text: str) -> Piece:
        """Plain text that is read only."""
        return Piece.prompt(self._encode(text).ids)

    def _check_complete(self, conversation: Conversation, text: str) -> None:
        """Say once what kind of message this side never sees, and that a transcript stands in for a template."""
        if not self.has_template:
            self._say_once(f"The {self.name} has no chat template: it reads conversations as a plain transcript.")
        for kind in missing_from(text, conversation.messages or (), conversation.tools):
            self._say_once(
                f"The {self.name}'s chat template leaves out {kind!r}, which the data has: this side does not read it."
            )

    def _scored_turn(self, reply: Any, text: str, after: str) -> list[Piece]:
        """An earlier assistant turn: its content, its stop if the template writes one right behind, and the markup."""
        markup = self._markup(after, Role.MARKUP) if self.has_template else self._unmarked(after)
        stops = bool(len(markup.ids)) and int(markup.ids[0]) in self.stop_ids
        pieces = [self._content(reply.ids, reply.ends, reply.exact, text.encode(), stops, thinking=False)]
        if stops:
            pieces[0] = pieces[0].with_stop(int(markup.ids[0]))
            markup = Piece.plain(markup.ids[1:], Role.MARKUP)
        return [*pieces, markup]

    def _document_start(self) -> int:
        """What predicts the first token of a text from nothing: BOS, or the separator of documents."""
        bos = self.tokenizer.bos_token_id
        start = bos if bos is not None else self.tokenizer.eos_token_id
        if start is None:
            raise RenderingError(
                f"The prompt is empty and the {self.name}'s tokenizer has neither BOS nor EOS. Give a prompt."
            )
        self._say_once(f"The {self.name} reads {self.vocabulary.display(start)!r} before a text without a prompt.")
        return int(start)

    # ---- whole samples -----------------------------------------------------------------------------------------

    def render(
        self,
        conversation: Conversation,
        reply: str,
        *,
        stopped: bool = True,
        score: Score = "last",
        thinking: bool | None = None,
    ) -> Rendered:
        """A conversation with a reply that is given as text.

        Args:
            stopped: was the reply finished by its writer? If so this side's stop token follows.
            score: segments are the last reply only, or all assistant turns.
            thinking: whether the generation prompt is to end inside a think block; None: this side's own way.

        Raises:
            DataError: the reply is no text.
            RenderingError: the template refuses the conversation, or with `score="all"` drops a turn of it.
        """
        if not isinstance(reply, str):
            raise DataError(f"The reply is {type(reply).__name__}, expected a string. Give the text of the last turn.")
        read = self._encode(reply)
        opened = self._opened(conversation, thinking)
        content = self._content(read.ids, read.ends, read.exact, reply.encode(), stopped, opened)
        last = content.with_stop(self.stop_id) if stopped else content
        return assemble([*self._prompt(conversation, score, thinking), last])

    def from_sampled(
        self,
        conversation: Conversation,
        completion_ids: Sequence[int] | Ids,
        *,
        prompt_ids: Ids | None = None,
        thinking: bool | None = None,
        by_id: bool = False,
    ) -> Rendered:
        """A completion as the model sampled it: its ids stay as they are, the text is what they spell.

        Ids after the first stop are left out. Scored is the longest run of tokens from the start that are no control
        tokens and whose bytes together are valid UTF-8: what comes after an invalid byte, a cut character or a
        control token has no text that another model could read. The stop is scored only if all before it is.

        `by_id`: a model with the same ids reads it, so every id is scored; control tokens stand in the text by name.
        """
        ids = np.asarray(completion_ids, dtype=np.int64).reshape(-1)
        stops = np.flatnonzero(np.isin(ids, self.stop_ids))
        written = ids[: stops[0]] if len(stops) else ids
        scored = len(written) if by_id else self._valid_prefix(written)
        spelled = [self._spelled(i) for i in written[:scored].tolist()]
        text, ends = b"".join(spelled), np.cumsum([len(one) for one in spelled], dtype=np.int64)
        whole = bool(len(stops)) and scored == len(written)
        exact = np.ones(scored, dtype=np.bool_)
        content = self._content(written[:scored], ends, exact, text, whole, self._opened(conversation, thinking))
        if whole:
            content = content.with_stop(int(ids[stops[0]]))
        rest = ids[scored : stops[0] + 1] if len(stops) else ids[scored:]
        unscored = [] if whole else [Piece.unscored(rest, self.vocabulary.control[rest])]
        prompt = [Piece.prompt(prompt_ids)] if prompt_ids is not None else self._prompt(conversation, "last", thinking)
        return assemble([*prompt, content, *unscored])

    def _spelled(self, token: int) -> bytes:
        """The bytes of a token; a control token's name."""
        own = b"" if self.vocabulary.control[token] else bytes(self.vocabulary.token(token))
        return own or self.vocabulary.display(token).encode() or b"\xff"

    def _valid_prefix(self, ids: Ids) -> int:
        """How many tokens from the start are text: no control token, valid UTF-8, cut at the end of a character."""
        decoder, good = codecs.getincrementaldecoder("utf-8")(), 0
        for i, token in enumerate(ids):
            if self.vocabulary.control[token]:
                break
            try:
                decoder.decode(self.vocabulary.token(token))
            except UnicodeDecodeError:
                break
            if not decoder.getstate()[0]:
                good = i + 1
        return good

    # ---- parts -------------------------------------------------------------------------------------------------

    def _opened(self, conversation: Conversation, thinking: bool | None) -> bool:
        return self.opens_thinking(conversation) if thinking is None else thinking

    def _content(self, ids: Ids, ends: Ids, exact: Any, text: bytes, stopped: bool, thinking: bool) -> Piece:
        """A segment, its tokens labelled by what they overlap."""
        roles = np.full(len(ids), Role.CONTENT, dtype=np.int8)
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        spans = [(m.span(), Role.TOOL_CALL) for m in _TOOL_CALL.finditer(text)]
        spans += [(m.span(), Role.REASONING) for m in _THINK.finditer(text)]
        if thinking and (opened := _OPENED_THINK.match(text)):
            spans.append((opened.span(), Role.REASONING))
        for (low, high), role in spans:
            roles[(starts < high) & (ends > low)] = role
        return Piece(ids, roles, ends, exact, text, stopped)

    def _encode(self, text: str) -> Any:
        return self.encoder.encode([text])[0]

    def _unmarked(self, text: str) -> Piece:
        """What a transcript writes between turns: text, so that no special token can come of it."""
        return Piece.plain(self._encode(text).ids, Role.MARKUP)

    def _markup(self, text: str, role: Role) -> Piece:
        return Piece.plain(self.encoder.encode_markup(text), role)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)
