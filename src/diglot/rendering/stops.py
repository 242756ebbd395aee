"""Which ids end a turn: the tokenizer's word, the generation config's, and what the template itself writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diglot.errors import RenderingError


def find_stops(
    eos_token_id: int | list[int] | None,
    generation_eos: int | list[int] | None,
    template_stop: int | None,
    num_ids: int,
    name: str,
) -> tuple[int, dict[int, str]]:
    """The id that this side writes at the end of a turn, and all that end one with where each comes from.

    The template's own end marker goes first, then the generation config's first id, then the tokenizer's. Ids at or
    beyond `num_ids` belong to another model and are left out.
    """
    stops: dict[int, list[str]] = {}
    for source, ids in (
        ("template", template_stop),
        ("generation config", generation_eos),
        ("tokenizer eos", eos_token_id),
    ):
        for one in ids if isinstance(ids, (list, tuple)) else [ids]:
            if one is not None and 0 <= one < num_ids:
                stops.setdefault(int(one), []).append(source)
    if not stops:
        raise RenderingError(
            f"No token of the {name} ends a turn: the tokenizer has eos {eos_token_id!r}, the generation config "
            f"{generation_eos!r}, and the template writes none. Set tokenizer.eos_token."
        )
    return next(iter(stops)), {one: " + ".join(sources) for one, sources in stops.items()}


def probe_template(render: Callable[..., str], encode: Callable[[str], Any], control: Any) -> int | None:
    """The first control token that a template writes after an assistant's turn, or None if it writes none.

    A marker that opens a turn ends none, though a template without an end marker writes it next.

    Args:
        render: messages -> text. Templates that refuse the probe have no end marker that could be found.
        encode: text -> ids, special tokens recognised.
        control: bool [V], which ids are control tokens.
    """
    user, reply = "SENTINELuser", "SENTINELreply"
    try:
        text = render([{"role": "user", "content": user}, {"role": "assistant", "content": reply}])
    except Exception:
        return None
    before, _, rest = text.partition(user)
    between, separator, after = rest.rpartition(reply)
    if not separator:
        return None
    first, middle, last = ([int(i) for i in encode(part) if control[i]] for part in (before, between, after))
    # What opens a conversation also opens its turns, unless it is a BOS: then the next one does.
    opening = first[:1] if first[:1] and first[0] in middle else first[1:2]
    return next((i for i in last if i not in opening), None)


def describe_stops(sources: Mapping[int, str], display: Callable[[int], str]) -> str:
    """The stop set in words."""
    return ", ".join(f"{display(one)} ({one}, {source})" for one, source in sources.items())
