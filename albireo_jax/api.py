"""LLM: a model and its engine as one Python object."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, cast

from albireo_jax.core.config import (
    MAX_LOGPROBS,
    MEMORY_SHARE,
    AttentionBackend,
    CacheConfig,
    Dtype,
    EngineConfig,
    KvDtype,
    ParallelConfig,
    Quantization,
    SamplingMode,
    SchedulerConfig,
)
from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Prompt
from albireo_jax.engine.timeline import TaskTable
from albireo_jax.engine.turns import ChoiceDelta, Completion
from albireo_jax.launch import Engine, launch
from albireo_jax.nn.module import Decoder
from albireo_jax.runtime.compile import Progress

TextOrIds = str | Sequence[int]
"""A prompt as text, or as token ids."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages with `role` and `content`, as the OpenAI API has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one prompt came to: n outputs, each with text, token_ids, finish_reason and stop_reason."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]


class LLM:
    """A loaded model, compiled and ready; close it, or use it in a `with` block.

    `model` is a built-in name (`smollm2`), a Hugging Face folder, a GGUF file or a saved checkpoint.
    `virtual_devices` lets the CPU stand for that many devices; what is None fits the machine by itself.
    `quantization` "int8" or "fp8" keeps the layers' matrices in one byte a number, made of what is loaded.
    Pages, their precision, those on the host and the sharing of prefixes are as in `core.config.CacheConfig`,
    rows, steps and their depth as in `core.config.SchedulerConfig`.
    Raises ValueError or ModelError for what cannot be served, naming the value and the limit.
    """

    def __init__(
        self,
        model: str,
        *,
        tp: int = 1,
        virtual_devices: int = 0,
        dtype: str | None = None,
        quantization: str | None = None,
        max_model_len: int | None = None,
        max_rows: int = 64,
        max_step_tokens: int = 512,
        num_pages: int | None = None,
        page_size: int = 16,
        kv_cache_dtype: str = "auto",
        memory_share: float = MEMORY_SHARE,
        host_kv_memory_bytes: int = 0,
        prefix_caching: bool = True,
        depth: int = 2,
        decode_steps: int = 1,
        sampling: str = "sharded",
        attention: str = "auto",
        max_logprobs: int = MAX_LOGPROBS,
        measure_sampling: bool = False,
        progress: Progress | None = None,
    ) -> None:
        config = EngineConfig(
            model=model,
            dtype=None if dtype is None else Dtype(dtype),
            quantization=None if quantization is None else Quantization(quantization),
            max_model_len=max_model_len,
            max_logprobs=max_logprobs,
            sampling=SamplingMode(sampling),
            attention=AttentionBackend(attention),
            parallel=ParallelConfig(tp=tp, virtual_devices=virtual_devices),
            cache=CacheConfig(
                page_size=page_size,
                num_pages=num_pages,
                kv_dtype=KvDtype(kv_cache_dtype),
                memory_share=memory_share,
                host_memory_bytes=host_kv_memory_bytes,
                prefix_caching=prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_rows=max_rows, max_step_tokens=max_step_tokens, depth=depth, decode_steps=decode_steps
            ),
        )
        self.engine: Engine = launch(config, progress=progress, measure_sampling=measure_sampling)

    def generate(
        self,
        prompts: TextOrIds | Sequence[TextOrIds],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Complete one prompt or several, in their order; `params` for all or one for each.

        Raises ValueError, and generates nothing, if any prompt or parameter is refused.
        """
        return self._generate(_prompts(prompts), params)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Answer one conversation or several, rendered by the model's chat template."""
        return self._generate(_conversations(messages), params)

    def stream(
        self, prompt: TextOrIds | Conversation, params: SamplingParams | None = None
    ) -> Iterator[ChoiceDelta]:
        """Complete one prompt or conversation token by token; leaving the iterator early ends the request."""
        with self.engine.frontend.stream([prompt], params or SamplingParams()) as turn:
            for deltas in turn:
                yield from deltas

    @property
    def model(self) -> Decoder:
        """The sharded flax.nnx module; calling it with token ids gives their logits."""
        return self.engine.model

    def update_weights(self, tree: Mapping[str, Any]) -> None:
        """Replace all or some weights by arrays of the same names, shapes and dtype; nothing is recompiled.

        Steps dispatched from now on use them; keys and values that open requests cached stay as they
        are, and later requests do not find them. A quantised model takes its matrices as floats too. Raises
        WeightError, and changes nothing, for an unknown name or another shape or dtype.
        """
        self.engine.update_weights(tree)

    def task_table(self) -> TaskTable:
        """Where the time of the latest steps went; `engine.timeline.render` makes text of it."""
        return self.engine.timeline.table()

    def close(self) -> None:
        """Stop the engine; open requests end as aborted."""
        self.engine.close()

    def __enter__(self) -> Self:
        """The LLM."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the engine."""
        self.close()

    def _generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Generation]:
        chosen = SamplingParams() if params is None else params
        each = [chosen] * len(prompts) if isinstance(chosen, SamplingParams) else list(chosen)
        token_ids = [self.engine.frontend.encode(prompt) for prompt in prompts]
        completions = iter(self.engine.frontend.generate(token_ids, each))
        return [
            Generation(
                prompt_token_ids=ids,
                outputs=tuple(replace(next(completions), choice=sample) for sample in range(own.n)),
            )
            for ids, own in zip(token_ids, each, strict=True)
        ]


def _prompts(prompts: TextOrIds | Sequence[TextOrIds]) -> Sequence[TextOrIds]:
    """A list of prompts, from one or from several."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("TextOrIds", prompts)]
    return cast("Sequence[TextOrIds]", prompts)


def _conversations(messages: Conversation | Sequence[Conversation]) -> Sequence[Conversation]:
    """A list of conversations, from one or from several."""
    if messages and isinstance(messages[0], Mapping):
        return [cast("Conversation", messages)]
    return cast("Sequence[Conversation]", messages)
