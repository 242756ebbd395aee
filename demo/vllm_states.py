"""vLLM's connector for hidden states on a machine without an accelerator; vLLM imports it, nothing else does.

The one that vLLM 0.32 ships copies into pinned memory on a CUDA stream and asks the copy's event whether it is done.
Without a device the copy is done at once.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector


class Finished:
    """An event of a copy that is over."""

    def query(self) -> bool:
        return True


class StatesOnCPU(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Writes the same files."""

    def _submit_async_write(self, pending: Any) -> None:
        empty_like = torch.empty_like

        def unpinned(like: Any, *, device: Any = None, pin_memory: bool = False) -> Any:
            return empty_like(like, device=device)

        with mock.patch.object(torch, "empty_like", unpinned):
            super()._submit_async_write(pending)
        if pending.req_id in self._req_copy_events:
            self._req_copy_events[pending.req_id] = Finished()
