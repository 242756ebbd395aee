"""The pictures of the documentation are what the real tokenizers give."""

from __future__ import annotations

import pictures
import pytest
from support.real_assets import model_folder, tokenizer

from diglot.vocabulary import ByteEncoder

pytestmark = pytest.mark.real


def test_the_committed_pictures_are_what_is_drawn() -> None:
    assert model_folder("smollm2-135m-instruct").exists() and tokenizer("gemma3") is not None
    drawn = dict(pictures.pictures())
    assert len(drawn) == len(pictures.DRAWN)
    for path, svg in drawn.items():
        assert path.read_text(encoding="utf-8") == svg, f"{path.name}: run demo/pictures.py"


def test_what_the_page_says_of_them_is_so() -> None:
    """One digit at a time and three; bytes of what has no token; an accent that is rewritten."""
    of: dict[str, ByteEncoder] = {name: pictures.encoder(name) for name in ("qwen3", "llama3", "smollm2-135m-instruct")}
    digits = pictures.align_text(of["qwen3"], of["llama3"], "12345")
    assert [(span.student, span.teacher) for span in digits] == [
        ((b"1", b"2", b"3"), (b"123",)),
        ((b"4", b"5"), (b"45",)),
    ]
    accent = pictures.align_text(of["qwen3"], of["llama3"], "cafe\u0301")
    assert [span.exact for span in accent] == [True, False] and "e\u0301".encode() == b"e\xcc\x81"
    pieces = [piece for text in ("学", "👩") for piece in of["smollm2-135m-instruct"].encode([text])[0].ids.tolist()]
    assert len(pieces) > 2
