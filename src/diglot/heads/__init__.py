"""Logits from hidden states, a few rows at a time."""

from __future__ import annotations

from diglot.heads.branches import Branches, TreeReading
from diglot.heads.dropout import dropouts, turn_off_dropout
from diglot.heads.head import Head
from diglot.heads.hidden import cache_argument, last_hidden
from diglot.heads.modes import evaluating
from diglot.heads.rows import default_chunk_rows, log_softmax, logits_by_parts, reads_few_columns, reduce_rows
from diglot.heads.sharding import even_passes, gathered, keep_after_forward, shard_frozen
from diglot.heads.shared_prompts import hidden_at_rows, reads_prompts_once
from diglot.heads.summaries import summaries, token_logps

__all__ = [
    "Branches",
    "Head",
    "TreeReading",
    "cache_argument",
    "default_chunk_rows",
    "dropouts",
    "evaluating",
    "even_passes",
    "gathered",
    "hidden_at_rows",
    "keep_after_forward",
    "last_hidden",
    "log_softmax",
    "logits_by_parts",
    "reads_few_columns",
    "reads_prompts_once",
    "reduce_rows",
    "shard_frozen",
    "summaries",
    "token_logps",
    "turn_off_dropout",
]
