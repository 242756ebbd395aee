"""From an address to the teacher behind it, of the highest level that its server gives."""

from __future__ import annotations

import logging
from collections.abc import Callable

from diglot.http.client import Client
from diglot.rendering import Renderer
from diglot.teachers.probe import check_server
from diglot.teachers.readout import Readout
from diglot.teachers.served import ServedTeacher
from diglot.teachers.served_chosen import ServedChosen, gives_chosen
from diglot.teachers.served_rows import ServedRows, gives_states
from diglot.teachers.wire import find_wire

logger = logging.getLogger(__name__)

_START_SECONDS = 60.0  # of retries while nothing has been trained that a stop could cost


def connect_server(
    url: str,
    renderer: Renderer,
    *,
    model: str | None = None,
    max_length: int | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    budget: float = 600.0,
    load_readout: Callable[[], Readout] | None = None,
) -> ServedTeacher:
    """The teacher at `url` (as `checked_address` gives it), after its start-up probe.

    One that gives whole rows, if the server hands out hidden states and `load_readout` brings norm and head; one that
    scores chosen ids, if the server does.

    Raises:
        TeacherError: the server cannot be a teacher (`probe`).
    """
    client = Client(url, connections=concurrency, timeout=timeout, budget=min(budget, _START_SECONDS))
    teacher: ServedTeacher
    try:
        wire = find_wire(client, model)
        check_server(client, wire, renderer)
        readout = None if load_readout is None else gives_states(client, wire, renderer, load_readout)
        if readout is not None:
            teacher = ServedRows(client, wire, renderer, max_length, concurrency, readout=readout)
        else:
            kind = ServedChosen if gives_chosen(client, wire, renderer) else ServedTeacher
            teacher = kind(client, wire, renderer, max_length, concurrency)
    except BaseException:
        client.close()
        raise
    client.budget = budget
    logger.info(
        "teacher: %s at %s, served by %s, window %s, gives %s",
        wire.info.model,
        url,
        wire.name,
        wire.info.window,
        teacher.level.name,
    )
    return teacher
