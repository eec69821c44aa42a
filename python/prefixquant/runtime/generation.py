# SPDX-License-Identifier: Apache-2.0
"""`Runtime`: a loaded checkpoint that continues prompts."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefixquant.errors import OutOfMemoryError, UserError
from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.cpu_step import CpuStep
from prefixquant.runtime.decoder import Decoder, Step
from prefixquant.runtime.graphs import DecodeGraphs, PromptGraphs, places_for
from prefixquant.runtime.sampling import Sampling, choose
from prefixquant.runtime.weights import Weights, load_weights

_CAPACITY_STEP = 256  # tokens; a cache is grown to a multiple of it
_GREEDY = Sampling()


class Runtime:
    """Continues batches of prompts of any lengths; not for use by several threads at once.

    The cache is allocated at the first call and kept; a call that needs more sequences or more
    tokens replaces it by a larger one.

    Args:
        weights: what the decoder computes with.
        stop_ids: a sequence ends behind one of these tokens (EOS).
        max_length: most tokens of a sequence, prompt and new ones together; None: the positions
            that the model was made for.
    """

    def __init__(
        self, weights: Weights, *, stop_ids: Iterable[int] = (), max_length: int | None = None
    ):
        positions = weights.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= positions:
            raise UserError(f"max_length: expected 1 to {positions}, got {max_length}")
        self.weights = weights
        self.stop_ids = frozenset(stop_ids)
        self.max_length = max_length or positions
        self.decoder = Decoder(weights)
        self.cache: StaticCache | None = None
        self._graphs: dict[int, DecodeGraphs] = {}  # by the number of places
        self._prompt_graphs: PromptGraphs | None = None
        self._cpu_step: CpuStep | None = None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        kv_bits: int | None = None,
        head_bits: int = 16,
        max_length: int | None = None,
    ) -> "Runtime":
        """Loads a checkpoint onto the device, block by block; its linears stay packed.

        Args:
            path: the checkpoint folder.
            device: "cpu", "cuda" or "cuda:N".
            dtype: of the residual stream; None: float32 on the CPU, elsewhere that of the stored
                16-bit tensors.
            kv_bits: None: as the checkpoint says; 16 keeps keys and values in 16 bits.
            head_bits: 16, or 8 for a weight-only 8-bit ``lm_head``.
            max_length: as for `Runtime`.

        Raises:
            CheckpointError: the checkpoint is damaged, incomplete or of another version.
            UnsupportedModelError: its activations are not quantized with static scales.
            UserError: a wrong argument.
        """
        weights = load_weights(
            path, torch.device(device), dtype, kv_bits=kv_bits, head_bits=head_bits
        )
        return cls(weights, stop_ids=_stop_ids(Path(path), weights), max_length=max_length)

    # ---- generation ----

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to and including a stop token.

        Args, Raises: as for `stream`.
        """
        new: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, sampling):
            for sequence, token in zip(new, tokens, strict=True):
                if token is not None:
                    sequence.append(token)
        return new

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
    ) -> Iterator[list[int | None]]:
        """Yields the next token of each prompt, step by step; None where it has ended.

        Args:
            prompts: token ids, without the prefix of the checkpoint.
            max_new_tokens: of each prompt, at least 1.
            sampling: how a token is chosen.

        Raises:
            UserError: an empty prompt, an unknown token id, or more tokens than `max_length`.
            OutOfMemoryError: the cache or the step does not fit; the runtime stays usable.
        """
        prompts = [list(prompt) for prompt in prompts]
        self._check(prompts, max_new_tokens)
        return self._stream(prompts, max_new_tokens, sampling) if prompts else iter(())

    @torch.inference_mode()
    def _stream(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[list[int | None]]:
        lengths = [len(prompt) for prompt in prompts]
        try:
            self.reserve(len(prompts), max(lengths) + max_new_tokens)
            running = [True] * len(prompts)
            for tokens in self._tokens(prompts, max_new_tokens, sampling):
                yield [t if r else None for t, r in zip(tokens, running, strict=True)]
                running = [
                    r and t not in self.stop_ids for t, r in zip(tokens, running, strict=True)
                ]
                if not any(running):
                    return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            self._drop_cache()
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"{self.weights.device}: out of memory at {len(prompts)} sequences of up to "
                f"{max(lengths) + max_new_tokens} tokens; fewer of either need less"
            ) from error

    def _tokens(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[list[int]]:
        """The chosen tokens of every step, also of sequences that have ended."""
        batch, lengths = len(prompts), [len(prompt) for prompt in prompts]
        places = places_for(batch, self.weights.device)
        generator = sampling.generator(self.weights.device)
        step = Step.after(lengths, places, self.cache)
        logits = self._prefill(prompts)
        step.tokens[:batch] = choose(logits, sampling, generator)
        if self.weights.device.type != "cuda":
            for count in range(1, max_new_tokens + 1):
                yield step.tokens.tolist()
                if count < max_new_tokens:
                    logits = self._cpu_step.decode(step, max(lengths) + count)
                    step.tokens.copy_(choose(logits, sampling, generator))
                    step.advance()
            return
        if places not in self._graphs:
            self._graphs[places] = DecodeGraphs(self.decoder, self.cache, places)
        graphs = self._graphs[places]
        graphs.begin(step)
        pending = _Readback(graphs.step.tokens[:batch])
        for count in range(1, max_new_tokens):
            # The step behind a token is launched before that token is read, so that the device
            # never waits for the host; it is in vain where all sequences turn out to have ended.
            logits = graphs.replay(max(lengths) + count)
            if not sampling.greedy:
                graphs.step.tokens[:batch] = choose(logits[:batch], sampling, generator)
            following = _Readback(graphs.step.tokens[:batch])
            yield pending.tokens()
            pending = following
        yield pending.tokens()

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        """float32 [B, V], the logits behind the prompts, which are then in the cache."""
        logits = None
        if self.weights.device.type == "cuda" and len(prompts) == 1:
            if self._prompt_graphs is None:
                self._prompt_graphs = PromptGraphs(self.decoder, self.cache)
            logits = self._prompt_graphs.logits(prompts[0])
        return self.decoder.prefill(prompts, self.cache) if logits is None else logits

    # ---- memory ----

    @torch.inference_mode()
    def reserve(self, batch: int, capacity: int) -> None:
        """Makes ``cache`` hold so many sequences of so many tokens; it may lose its rows."""
        places = places_for(batch, self.weights.device)
        kept = self.cache
        if kept is not None and kept.batch >= places and kept.capacity >= capacity:
            return
        capacity = min(-(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP, self.max_length)
        self._drop_cache()
        weights = self.weights
        self.decoder.reserve_positions(capacity)
        self.cache = StaticCache.allocate(
            weights.geometry, weights.kv_bits, places, capacity, weights.dtype, weights.device
        )
        if weights.device.type == "cpu":
            self._cpu_step = CpuStep(self.decoder, self.cache)

    def _drop_cache(self) -> None:
        self.cache, self._graphs, self._prompt_graphs, self._cpu_step = None, {}, None, None
        if self.weights.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        vocab = self.weights.geometry.vocab
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompts: expected at least one token, prompt {index} has none")
            if min(prompt) < 0 or max(prompt) >= vocab:
                raise UserError(
                    f"prompts: expected token ids from 0 to {vocab - 1}, prompt {index} has "
                    f"{min(prompt)} to {max(prompt)}"
                )
            if len(prompt) + max_new_tokens > self.max_length:
                raise UserError(
                    f"prompts: expected at most {self.max_length} tokens with the new ones, "
                    f"prompt {index} has {len(prompt)} and max_new_tokens is {max_new_tokens}"
                )


class _Readback:
    """Tokens on their way from a GPU: the copy starts at once and is waited for when needed."""

    def __init__(self, tokens: Tensor):
        self._host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
        self._host.copy_(tokens, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tokens.device))

    def tokens(self) -> list[int]:
        self._done.synchronize()
        return self._host.tolist()


def _stop_ids(folder: Path, weights: Weights) -> set[int]:
    """The EOS tokens of generation_config.json, or else of config.json."""
    from transformers import GenerationConfig

    ids = weights.config.eos_token_id
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list | tuple) else {ids}


def _is_out_of_memory(error: BaseException | None) -> bool:
    # torch says it by a type on a GPU and by a text on a CPU; the end of a graph capture that ran
    # out of memory raises another error, in whose context the first one is.
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__context__
    return False
