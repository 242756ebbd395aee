"""From options to the engine that writes the student's completions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diglot.errors import ConfigError
from diglot.http.address import checked_address
from diglot.options import DistillationConfig
from diglot.rendering import Renderer
from diglot.rollouts.engine import RolloutEngine
from diglot.rollouts.sampler import TransformersSampler

if TYPE_CHECKING:
    from diglot.rollouts.vllm_wire import Sampling
    from diglot.rollouts.weights import WeightsFolder


def make_engine(args: DistillationConfig, renderer: Renderer, sampler: TransformersSampler) -> RolloutEngine:
    """The engine that the options name.

    Raises:
        ConfigError: a mode that cannot run here, an address that cannot be used, or packages that are missing.
        RolloutError: a server that is not the student's.
    """
    if not args.use_vllm:
        return sampler
    from diglot.rollouts.vllm_wire import Sampling
    from diglot.rollouts.weights import WeightsFolder

    place = args.vllm_weights_dir or str(Path(str(args.output_dir)) / "vllm-weights")
    if Path(place).exists() and not Path(place).is_dir():
        raise ConfigError(f"vllm_weights_dir={place!r} is not allowed: it must be a folder, and it is a file.")
    sampling = Sampling(renderer.stop_ids, args.temperature, args.top_p, args.top_k)
    weights = WeightsFolder(Path(place))
    if args.vllm_mode == "colocate":
        return _colocated(args, sampling, weights)
    from diglot.rollouts.vllm_server import KEY_VARIABLE, VLLMServer

    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    address = checked_address(url, "vllm_server_base_url", KEY_VARIABLE)
    limits = dict(max_length=args.max_length, timeout=args.vllm_server_timeout)
    return VLLMServer.connect(address, renderer, sampling, weights, **limits)  # type: ignore[arg-type]


def _colocated(args: DistillationConfig, sampling: Sampling, weights: WeightsFolder) -> RolloutEngine:
    from diglot.rollouts.vllm_colocate import ColocatedVLLM

    if args.world_size > 1:
        raise ConfigError(
            f"vllm_mode='colocate' runs in one process, and there are {args.world_size}. Choose vllm_mode='server'."
        )
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    options: dict[str, Any] = {"gpu_memory_utilization": args.vllm_gpu_memory_utilization}
    if args.max_length is not None:
        options["max_model_len"] = args.max_length
    return ColocatedVLLM(sampling, weights, options, dtype)
