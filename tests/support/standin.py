"""A device for machines that have none: it refuses what CUDA refuses, and counts where the host has to wait.

torch lets Python stand in for a backend of its own (`PrivateUse1`). A tensor of the device `standin:i` is a subclass
that holds an ordinary CPU tensor; every operation runs there with the CPU's own kernels, so values are the CPU's.
Before it runs, CUDA's rules are applied: no two devices in one operation, but for scalars of the CPU; no numpy of a
device tensor; an index of the CPU into a device tensor is a hidden copy. Where CUDA would make the host wait (an item,
a blocking copy, a size that depends on values), that is counted under the phase of the run and the innermost line of
Diglot. With `torch.use_deterministic_algorithms` an operation raises that would on CUDA.

Not seen here: the numerics of kernels, streams and their races, memory, several processes.

`install` changes torch, transformers and accelerate for the whole process: use it in one of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
NAME = "standin"
SOURCES = "/src/diglot/"

_ITEM = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
_SIZE_BY_VALUE = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.bincount.default,
}  # fmt: skip
_UNORDERED = {
    aten.cumsum.default, aten.cumsum_.default, aten.put_.default, aten.put.default, aten.histc.default,
    aten.kthvalue.default, aten.median.dim, aten.nanmedian.dim, aten.scatter_reduce.two, aten.scatter_reduce_.two,
    aten.bincount.default,
}  # fmt: skip
"""What torch raises at on CUDA under `use_deterministic_algorithms`, as far as a language model could come to it (the
list in its documentation; pooling, padding, resampling and losses of pictures are left out)."""
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Waits:
    """How often the host waited, by phase, kind and line."""

    def __init__(self) -> None:
        self.phase, self.counts = "setup", Counter[tuple[str, str, str]]()

    def note(self, kind: str) -> None:
        """One more, at the innermost line of Diglot that is running."""
        self.counts[self.phase, kind, _line()] += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What happens inside belongs to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def total(self, phase: str) -> int:
        """Of one phase."""
        return sum(count for (where, _, _), count in self.counts.items() if where == phase)

    def table(self, phase: str) -> list[str]:
        """Kinds and lines of one phase, the most frequent first."""
        return [f"{n} {kind} {line}" for (where, kind, line), n in self.counts.most_common() if where == phase]


waits = Waits()


def _line() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if SOURCES in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.split(SOURCES)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on the device; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int = 0) -> DeviceTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, index),
        )  # fmt: skip
        made.inner = inner.detach()
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds it as a tensor of the CPU, and what reads it puts it where it belongs."""
        return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = DeviceTensor(self.inner.clone(), self.device.index)
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if op is aten.copy_.default:
        return _copy(*args, **kwargs)
    if op is aten._to_copy.default:
        return _to(*args, **kwargs)
    if op in _UNORDERED and torch.are_deterministic_algorithms_enabled():
        _check_order(op, args, kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    held = [x for x in tensors if isinstance(x, DeviceTensor)]
    if op in _INDEXING:
        _check_indices(args[0], args[1], args[2] if len(args) > 2 else None)
    else:
        places = {str(x.device) for x in tensors if isinstance(x, DeviceTensor) or x.dim() > 0}
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {sorted(places)} in {op}")
    if op in _ITEM:
        waits.note("item")
    elif op in _SIZE_BY_VALUE:
        waits.note(str(op).split(".")[1])
    elif op is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        waits.note("repeat_interleave")
    index: int | None = held[0].device.index if held else 0
    if (device := kwargs.get("device")) is not None:
        device = torch.device(device)
        index = None if device.type == "cpu" else device.index or 0
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(DeviceTensor, lambda x: x.inner, (args, kwargs))
    result = op(*inner_args, **inner_kwargs)
    if op is aten._local_scalar_dense.default or index is None:
        return result
    wrapped = tree_map_only(torch.Tensor, lambda x: DeviceTensor(x, index), result)
    return return_and_correct_aliasing(op, args, kwargs, wrapped)


def _check_order(op: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where the order of an operation's sums is not fixed on CUDA."""
    whole = not args[0].dtype.is_floating_point
    if op in (aten.cumsum.default, aten.cumsum_.default) and whole:
        return
    if op in (aten.scatter_reduce.two, aten.scatter_reduce_.two) and args[4] not in ("sum", "mean"):
        return
    if op is aten.bincount.default and (args[1] if len(args) > 1 else kwargs.get("weights")) is None:
        return
    if op in (aten.put_.default, aten.put.default) and len(args) > 3 and args[3]:
        return
    raise RuntimeError(f"{op} does not have a deterministic implementation on CUDA ({_line()})")


def _check_indices(own: torch.Tensor, indices: Any, values: Any) -> None:
    for one in (x for x in indices if isinstance(x, torch.Tensor)):
        if isinstance(one, DeviceTensor) and one.device != own.device:
            raise RuntimeError(
                f"indices should be on the device of the indexed tensor ({own.device}), found {one.device}"
            )
        if one.device != own.device:
            waits.note("index of the host")
        if one.dtype == torch.bool and isinstance(own, DeviceTensor):
            waits.note("boolean index")
    if isinstance(values, torch.Tensor) and values.dim() > 0 and values.device != own.device:
        raise RuntimeError(f"values on {values.device} put into a tensor on {own.device}")


def _copy(own: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    here, there = isinstance(own, DeviceTensor), isinstance(other, DeviceTensor)
    if here != there and other.numel() and not (here and non_blocking):
        waits.note("copy to the device" if here else "copy to the host")
    (own.inner if isinstance(own, DeviceTensor) else own).copy_(
        other.inner if isinstance(other, DeviceTensor) else other
    )
    return own


def _to(x: torch.Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **keywords: Any) -> Any:
    """Between devices and number types."""
    target = x.device if device is None else torch.device(device)
    inner = x.inner if isinstance(x, DeviceTensor) else x
    result = aten._to_copy.default(inner, dtype=dtype, memory_format=keywords.get("memory_format"))
    if target.type == "cpu":
        if isinstance(x, DeviceTensor) and x.numel():
            waits.note("copy to the host")
        return result
    if not isinstance(x, DeviceTensor) and x.numel() and not non_blocking:
        waits.note("copy to the device")
    return DeviceTensor(result, target.index or 0)


class _Module:
    """`torch.standin`."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    set_device = manual_seed = manual_seed_all = staticmethod(lambda _: None)
    synchronize = empty_cache = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class _Guard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
    is_available = is_built = lambda self: True

    def has_primary_context(self, device: int) -> bool:
        return True


_libraries: list[torch.library.Library] = []


def install() -> None:
    """Register the device, and make it the one on which a `Trainer` trains. Once per process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Module, _Hooks(), _Guard())
    own, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((own, rest))

    def index_of(device: Any) -> int:
        return (torch.device(device).index or 0) if device is not None else 0

    def empty(size: Any, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any) -> Any:
        inner = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
        return DeviceTensor(inner, index_of(device))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype), index_of(device))

    own.impl("empty.memory_format", empty, "PrivateUse1")
    own.impl("empty_strided", empty_strided, "PrivateUse1")
    own.impl("_copy_from", lambda x, to, non_blocking=False: _copy(to, x, non_blocking), "PrivateUse1")
    own.impl("_copy_from_and_resize", lambda x, to: _copy(to, x), "PrivateUse1")
    rest.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")  # type: ignore[attr-defined]
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # type: ignore[attr-defined]

    from accelerate.state import PartialState
    from transformers import PreTrainedModel, TrainingArguments

    PartialState.default_device = property(lambda self: torch.device(NAME, 0))
    plain = TrainingArguments._setup_devices.func

    def setup(self: Any) -> torch.device:
        plain(self)
        self._n_gpu = 1
        return torch.device(NAME, 0)

    chosen: Any = cached_property(setup)
    chosen.__set_name__(TrainingArguments, "_setup_devices")
    TrainingArguments._setup_devices = chosen
    plain_save = PreTrainedModel.save_pretrained

    def save(self: Any, folder: Any, *positional: Any, state_dict: Any = None, **keywords: Any) -> Any:
        # safetensors reads memory by its address, which a tensor that stands in for another has not.
        weights = self.state_dict() if state_dict is None else state_dict
        held = {name: x.inner if isinstance(x, DeviceTensor) else x for name, x in weights.items()}
        return plain_save(self, folder, *positional, state_dict=held, **keywords)

    PreTrainedModel.save_pretrained = save  # type: ignore[method-assign]
