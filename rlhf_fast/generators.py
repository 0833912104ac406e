"""Where the responses of an online trainer come from: the decode loop here, or a server that has the policy's weights.

A server's kernels round otherwise than the trainer's, so that its logprobs are of a slightly different policy: the
trainers report that as ``mismatch``, compute ``old_logprobs`` anew, and correct the advantages by the ratio of the two
policies if ``importance_cap`` is set.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_fast.generate import Generation, decode
from rlhf_fast.pretrained import merged, silent


class Generator(Protocol):
    """What writes responses for a trainer."""

    def sync(self, policy: nn.Module) -> None:
        """Take over the weights of ``policy``; called once before the responses of a step are written."""

    def write(
        self,
        policy: nn.Module,
        prompt_ids: Tensor,  # [B, P], padded on the left
        prompt_mask: Tensor,  # [B, P], bool
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        pad_id: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seeds: Tensor,  # [B], int64
    ) -> Generation:
        """A response to each prompt, of at least one token, on the device of the prompts.

        Its logprobs are those of the tokens drawn under the unfiltered softmax at that temperature. The same weights
        and seeds should give the same responses: a run can be resumed bit for bit only if they do.
        """


class DecodeGenerator:
    """The policy itself writes, by ``decode``."""

    def sync(self, policy: nn.Module) -> None:
        """Nothing to do."""

    def write(self, policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, **numbers: Any) -> Generation:
        """As ``decode`` does."""
        return decode(policy, prompt_ids, prompt_mask, **numbers)


class VLLMGenerator:
    """vLLM writes, on the accelerator of this process or on several, with the weights of the policy before each step.

    They travel as safetensors through ``folder``, on which every worker of the engine loads them: one way for one
    worker and for tensor parallelism. Written against vLLM's public interface (``LLM.generate`` with token ids,
    ``worker_extension_cls``, ``collective_rpc``, ``reset_prefix_cache``), version 0.11; not run with vLLM itself yet.

    Args:
        model: the policy as it starts: a path or a Hub id.
        folder: a place for one copy of the weights that the workers can read; ``/dev/shm`` is memory, if there is one.
        options: of ``vllm.LLM``, say ``gpu_memory_utilization=0.3`` or ``tensor_parallel_size=2``.
    """

    def __init__(self, model: str | Path, *, folder: str | Path | None = None, **options: Any) -> None:
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("VLLMGenerator needs vLLM: pip install vllm", name=error.name) from error

        memory = Path("/dev/shm")
        self.folder = folder if folder is not None else memory if memory.is_dir() else None
        reader = f"{WeightReader.__module__}.{WeightReader.__qualname__}"
        # Processed: at the temperature of the sampling, which the raw ones are not.
        self.engine = LLM(
            model=str(model), worker_extension_cls=reader, logprobs_mode="processed_logprobs", **options
        )  # fmt: skip

    def sync(self, policy: nn.Module) -> None:
        """Load the weights of ``policy``, adapters merged, into every worker, and forget what the old ones computed."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="rlhf-fast-") as folder:
            with silent():
                merged(policy).save_pretrained(folder)
            self.engine.collective_rpc("read_weights", args=(folder,))
        self.engine.reset_prefix_cache()

    def write(
        self,
        policy: nn.Module,
        prompt_ids: Tensor,  # [B, P]
        prompt_mask: Tensor,  # [B, P], bool
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        pad_id: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seeds: Tensor,  # [B]
    ) -> Generation:
        """As ``Generator.write``. Raises ``ValueError`` for top_k and top_p.

        vLLM reports the logprob under the filtered distribution, and the ratio needs that of the policy.
        """
        if top_k > 0 or top_p < 1:
            raise ValueError(f"vLLM's logprobs are of what top_k={top_k} and top_p={top_p} leave: turn both off")
        from vllm import SamplingParams

        numbers = {"temperature": temperature, "max_tokens": max_new_tokens, "stop_token_ids": list(stop_ids)}
        prompts = [
            {"prompt_token_ids": ids[mask].tolist()}
            for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu().bool(), strict=True)
        ]
        asked = [
            SamplingParams(n=1, seed=seed, logprobs=0, ignore_eos=True, detokenize=False, **numbers)
            for seed in seeds.tolist()
        ]
        written = [found.outputs[0] for found in self.engine.generate(prompts, asked, use_tqdm=False)]
        responses = [list(output.token_ids) for output in written]
        logprobs = [
            [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
            for output in written
        ]
        return assembled(responses, logprobs, stop_ids=stop_ids, pad_id=pad_id, device=prompt_ids.device)


class WeightReader:
    """What vLLM's workers inherit, to load the weights that ``VLLMGenerator.sync`` wrote."""

    model_runner: Any

    def read_weights(self, folder: str) -> None:
        """Load every safetensors file of ``folder`` into the model of this worker, which takes its part of each."""
        from safetensors import safe_open

        def weights() -> Iterator[tuple[str, Tensor]]:
            for file in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(file, "pt") as stored:
                    for name in stored.keys():  # noqa: SIM118 (it is no dict)
                        yield name, stored.get_tensor(name)

        self.model_runner.model.load_weights(weights())


def assembled(
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    device: torch.device | str,
) -> Generation:
    """A ``Generation`` from the tokens of each response and their logprobs, as a server returns them."""
    width = max(map(len, responses), default=0)
    ids = torch.tensor([[*tokens, *[pad_id] * (width - len(tokens))] for tokens in responses], dtype=torch.long)
    values = torch.tensor([[*found, *[0.0] * (width - len(found))] for found in logprobs], dtype=torch.float32)
    mask = torch.arange(width) < torch.tensor([len(tokens) for tokens in responses])[:, None]
    ended = torch.tensor([bool(tokens) and tokens[-1] in stop_ids for tokens in responses])
    return Generation(ids.to(device), mask.to(device), values.to(device), ended.to(device))


def check_written(written: Generation, count: int, longest: int) -> None:
    """Raise ``ValueError`` unless ``written`` is what a ``Generator`` must return for ``count`` prompts."""
    shape = written.responses.shape
    if len(shape) != 2 or shape[0] != count or shape[1] > longest:
        raise ValueError(
            f"the generator must return [{count}, T] responses of up to {longest} tokens, got {list(shape)}"
        )
    for name, tensor in (("mask", written.mask), ("logprobs", written.logprobs)):
        if tensor.shape != shape:
            raise ValueError(
                f"the generator's {name} must be {list(shape)} like its responses, got {list(tensor.shape)}"
            )
    empty = (~written.mask.any(1)).nonzero()
    if len(empty):
        raise ValueError(f"the generator wrote nothing to prompt {int(empty[0]) + 1} of {count}")
    wrong = (written.mask & ~(written.logprobs <= 1e-3)).any(1).nonzero()  # NaN too; a server may round up
    if len(wrong):
        raise ValueError(f"the generator's logprobs of prompt {int(wrong[0]) + 1} of {count} are above 0 or NaN")
