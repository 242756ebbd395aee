"""The map from hidden states to logits of a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from diglot.errors import ConfigError
from diglot.heads.hidden import run_with_hidden, unwrap
from diglot.heads.modes import evaluating
from diglot.heads.products import add_outer, product_dtype, result_dtype, rows_back, rows_times
from diglot.objectives.base import at_least_float32

# How model families write "cap * tanh(logits / cap)" in their configurations.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Head:
    """Output embedding, scale and soft cap of a model. Holds the model's own module, so it follows its training.

    Args:
        module: maps hidden states `[..., H]` to raw logits `[..., V]`.
        scale: factor on the raw logits.
        softcap: logits are bent to `softcap * tanh(logits / softcap)` after scaling, if given.
        name: of the model, for messages.
        frozen: the module's parameters get no gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        name: str = "model",
        frozen: bool = False,
    ) -> None:
        self.module, self.scale, self.softcap, self.name, self.frozen = module, scale, softcap, name, frozen

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a causal language model of `transformers`, whatever wraps it.

        Knows the scalings of Cohere (`logit_scale`), Granite (`logits_scaling`) and Gemma (`final_logit_softcapping`);
        `verify` finds out whether a model has others. `ConfigError` for a model without output embeddings.
        """
        inner = unwrap(model)
        module = inner.get_output_embeddings()
        if module is None:
            raise ConfigError(
                f"{type(inner).__name__} has no output embeddings, so no logits. Load it as a causal language model."
            )
        config = inner.config.get_text_config()
        softcap = next((cap for key in _SOFTCAPS if (cap := getattr(config, key, None))), None)
        return cls(module, scale=_scale(config), softcap=softcap, name=type(inner).__name__)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trainable parameters, a tied embedding among them."""
        return () if self.frozen else tuple(p for p in self.module.parameters() if p.requires_grad)

    def as_frozen(self) -> Head:
        """The same head, of which nothing gets a gradient from what is computed with it."""
        return Head(self.module, scale=self.scale, softcap=self.softcap, name=self.name, frozen=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of `hidden [..., H]`: float32, or float64 if the module computes in it."""
        return self.finished(self.raw(hidden))

    @property
    def device(self) -> torch.device | None:
        """Where the module is; None if it has no parameters."""
        first = next(self.module.parameters(), None)
        return None if first is None else first.device

    @property
    def is_linear(self) -> bool:
        """Can single columns be computed? Not where an adapter sits on the head."""
        return type(self.module) is nn.Linear

    def raw(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits before scale and soft cap; float32 or float64 of a linear head, else in the module's number type.

        Of the columns `ids` `[R, k]` only, if given, for `hidden [R, H]`: `[R, k]`; needs `is_linear`.
        """
        if not self.is_linear:
            return self.raw_with((), hidden)
        weight, bias = self._weight_and_bias
        dtype = product_dtype(weight)
        if ids is None:
            raw = _Product.apply(hidden.flatten(0, -2), weight, dtype).unflatten(0, hidden.shape[:-1])
            logits: Tensor = raw if bias is None else raw + bias
            return logits
        with torch.autocast(hidden.device.type, enabled=False):
            exact = result_dtype(dtype)
            chosen = nn.functional.embedding(ids, weight).to(exact)  # [R, k, H]
            raw = torch.bmm(chosen, hidden.to(exact).unsqueeze(-1)).squeeze(-1)
        return raw if bias is None else raw + bias[ids]

    def raw_with(self, parameters: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """What the module makes of `hidden`; `parameters`, if any, stand in for `self.parameters`, in this order."""
        own = {f"module.{name}": p for name, p in zip(self._trainable, parameters, strict=bool(parameters))}
        raw: Tensor = functional_call(_Unhooked(self.module), own, (self._as_input(hidden),))
        return raw

    def raw_rows(self, ids: Tensor | None = None) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Maps `hidden [R, H]` to what `raw` gives of the columns `ids` `[k]`, the same for all rows: `[R, k]`.

        Without gradient. The second argument is an earlier result, of at least as many rows, that may be overwritten:
        new memory for a hundred thousand columns costs a CPU as much time as their softmax.
        """
        if not self.is_linear:
            return lambda hidden, _: self.raw(hidden) if ids is None else self.raw(hidden)[:, ids]
        weight, bias = self._weight_and_bias
        if ids is not None:
            weight, bias = nn.functional.embedding(ids, weight), None if bias is None else bias[ids]
        dtype = product_dtype(weight)

        def raw(hidden: Tensor, out: Tensor | None) -> Tensor:
            logits = rows_times(hidden, weight, dtype, out)
            return logits if bias is None else logits.add_(bias)

        return raw

    def columns(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits `[R, k]` of the columns `ids` `[R, k]` only, for `hidden [R, H]`; needs `is_linear`."""
        return self.finished(self.raw(hidden, ids=ids))

    def finished(self, raw: Tensor) -> Tensor:
        """Logits from what `raw` gives."""
        logits = at_least_float32(raw)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @torch.no_grad()
    def pull_back(self, of_raw: Tensor, hidden: Tensor, sums: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        """From the gradient of what `raw` gives for `hidden [R, H]` to that of `hidden`; needs `is_linear`.

        The gradients of `self.parameters` are added to `sums`, in the same order: no second `[V, H]` is made for them.
        """
        into: dict[str, Tensor] = dict(zip(self._trainable, sums, strict=True))
        weight, of_raw = self.module.get_parameter("weight"), of_raw.contiguous()
        dtype = product_dtype(weight)
        if "bias" in into:
            of_bias = of_raw.sum(0) if ids is None else of_raw.flatten()
            _add_rows(into["bias"], of_bias, ids)
        if ids is None:
            if "weight" in into:
                add_outer(into["weight"], of_raw, hidden, dtype)
            return rows_back(of_raw, weight, dtype)
        hidden = hidden.to(of_raw.dtype)
        if "weight" in into:
            _add_rows(into["weight"], (of_raw.unsqueeze(-1) * hidden.unsqueeze(1)).flatten(0, 1), ids)
        chosen = nn.functional.embedding(ids, weight).to(of_raw.dtype)
        with torch.autocast(of_raw.device.type, enabled=False):
            return torch.bmm(of_raw.unsqueeze(1), chosen).squeeze(1)

    def verify(self, model: nn.Module) -> None:
        """Raise `ConfigError` unless this head gives the logits of `model` itself, on a few tokens.

        The tolerance is eight roundings of the model's number type, of the largest logit.
        """
        size = unwrap(model).get_input_embeddings().weight
        ids = torch.arange(2, 10, device=size.device)[None] % len(size)
        with torch.no_grad(), evaluating(model):
            hidden, own = run_with_hidden(model, ids, torch.ones_like(ids), all_logits=True)
            logits = self(hidden.to(self.device or hidden.device))
        rounding = max(torch.finfo(hidden.dtype).eps, torch.finfo(own.dtype).eps)
        tolerance = 8 * rounding * float(own.abs().max())
        difference = float((logits - own.to(logits)).abs().max()) if logits.shape == own.shape else float("inf")
        if not bool(torch.isfinite(own).all()):
            raise ConfigError(
                f"{self.name} gives logits that are no finite numbers, on its own first tokens: weights of it are NaN "
                "or infinite, or too large for their number type. Look at its file, or load it in float32."
            )
        if not difference <= tolerance:
            raise ConfigError(
                f"The head of {self.name} gives logits {tuple(logits.shape)} (scale {self.scale}, soft cap "
                f"{self.softcap}), the model itself {tuple(own.shape)}: largest difference {difference:.3g}, tolerance "
                f"{tolerance:.3g}. The model does something to its logits that is not known here; build the Head with "
                "its scale and softcap."
            )

    def _as_input(self, hidden: Tensor) -> Tensor:
        first = next(self.module.parameters(), None)
        if first is None or not first.is_floating_point() or torch.is_autocast_enabled(hidden.device.type):
            return hidden
        return hidden.to(first.dtype)

    @property
    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        own = dict(self.module.named_parameters())
        return own["weight"], own.get("bias")

    @property
    def _trainable(self) -> list[str]:
        return [name for name, p in self.module.named_parameters() if p.requires_grad and not self.frozen]


class _Product(torch.autograd.Function):
    """`hidden [R, H] @ weight.T` with results of 32 bits or more, and its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = dtype
        return rows_times(hidden, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_raw: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        of_hidden = rows_back(of_raw, weight, ctx.dtype).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            total = torch.zeros_like(weight, dtype=result_dtype(weight.dtype))
            add_outer(total, of_raw, hidden, ctx.dtype)
            of_weight = total.to(weight.dtype)
        return of_hidden, of_weight, None


def _add_rows(total: Tensor, values: Tensor, ids: Tensor | None) -> None:
    if ids is None:
        total.add_(values)
    else:
        total.index_add_(0, ids.flatten(), values.to(total.dtype))


class _Unhooked(nn.Module):
    """The module without its hooks: FSDP2's would take this for its own pass and free the parameters behind it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.module.forward(hidden)
        return logits


def _scale(config: Any) -> float:
    scale = getattr(config, "logit_scale", None)
    if isinstance(scale, (int, float)):
        return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if not isinstance(scaling, (int, float)):
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling  # the one that multiplies
