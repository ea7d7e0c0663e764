"""LLM: a model and its engine as one Python object."""

import difflib
import inspect
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePath
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar, Unpack, get_type_hints

from albireo_jax.core.checks import ArrayLike, flag
from albireo_jax.core.config import EngineConfig, EngineOverrides
from albireo_jax.core.engine_options import ENGINE_OPTIONS, engine_config, override
from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.choices import ChoiceDelta, Completion
from albireo_jax.engine.frontend import Prompt
from albireo_jax.engine.output_streams import SyncOutputStream
from albireo_jax.engine.prompts import (
    read_chat_options,
    read_conversations,
    read_params,
    read_priorities,
    read_prompts,
)
from albireo_jax.engine.timeline import TaskTable
from albireo_jax.launch import Engine, launch
from albireo_jax.nn.module import Decoder
from albireo_jax.runtime.compile import Progress

Conversation = Iterable[Mapping[str, Any]]
"""Messages with `role` and `content`, as the OpenAI API has them."""

PromptLike = str | Mapping[str, Any] | Iterable[int] | Conversation | ArrayLike
"""A text, token ids (a list, tuple, iterator, NumPy or JAX array), messages, or one of these in a dict with
`prompt`, `prompt_token_ids` or `messages`, as vLLM has it."""

_Make = TypeVar("_Make", bound=Callable[..., None])

_NAMES_ELSEWHERE = {
    "tensor_parallel_size": "tp",
    "max_num_seqs": "max_rows",
    "max_num_batched_tokens": "max_step_tokens",
    "gpu_memory_utilization": "memory_share",
    "mem_fraction_static": "memory_share",
    "block_size": "page_size",
    "num_gpu_blocks_override": "num_pages",
    "enable_prefix_caching": "prefix_caching",
    "swap_space": "host_kv_memory_bytes",
    "context_length": "max_model_len",
    "attention_backend": "attention",
    "model_path": "model",
    "tp_size": "tp",
    "torch_dtype": "dtype",
}
"""Names that vLLM, SGLang or transformers have for options of `LLM`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The outputs of one prompt: n of them, each with text, token_ids, finish_reason and stop_reason."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]


def _with_options(make: _Make) -> _Make:
    """Show the options of an engine in the signature of LLM, where `help` and notebooks look for them."""
    signature = inspect.signature(make)
    kinds = get_type_hints(EngineOverrides)
    options = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default.value if isinstance(option.default, StrEnum) else option.default,
            annotation=kinds[option.name],
        )
        for option in ENGINE_OPTIONS
    ]
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    positional = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    shown = [*positional, *options, *own[len(positional) :]]
    make.__signature__ = signature.replace(parameters=shown)  # pyright: ignore[reportFunctionMemberAccess]
    return make


class LLM:
    """A loaded model, compiled and ready; close it, or use it in a `with` block.

    `model` is a built-in name (`smollm2`), a Hugging Face folder, a GGUF file or a saved checkpoint. The
    options are the fields of `core.config.EngineConfig` and of the configurations that it holds, where they
    are explained. Options that are not given are as in `config`, whose model is left aside, or have defaults.
    `dtype` None or "auto" is bfloat16 on GPUs and float32 on CPUs.
    `virtual_devices` lets the CPU stand for that many devices; what is None fits the machine by itself.
    `quantization` "int8", "fp8" or "fp8_w8a16" keeps the layers' matrices in one byte a number, made of what
    is loaded; "fp8" rounds what they are multiplied with too.
    `generation_config` "none" leaves the sampling defaults of the model's files aside.
    Raises ValueError or ModelError for what cannot be served, naming the value and the limit.
    """

    @_with_options
    def __init__(
        self,
        model: str | PurePath,
        config: EngineConfig | None = None,
        *,
        measure_sampling: bool = False,
        progress: Progress | None = None,
        **overrides: Unpack[EngineOverrides],
    ) -> None:
        _refuse(overrides)
        chosen = _config(model, config, overrides)
        measures = flag("measure_sampling", measure_sampling)
        self.engine: Engine = launch(chosen, progress=progress, measure_sampling=measures)

    def generate(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        priority: int | Iterable[int] | None = None,
    ) -> list[Generation]:
        """Complete one prompt or several, in their order; `params` for all or one for each.

        With the scheduling policy "priority" the lowest `priority` is served first: one for all or one for
        each, None is 0. Raises ValueError, and generates nothing, if any prompt or parameter is refused.
        """
        return self._generate(read_prompts(prompts), params, priority=priority)

    def chat(
        self,
        messages: str | Conversation | Mapping[str, Any] | Iterable[Conversation],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int | Iterable[int] | None = None,
    ) -> list[Generation]:
        """Answer one conversation or several, rendered by the model's chat template.

        A text is one message of a user. `tools` are OpenAI function schemas; `chat_template_kwargs` are more
        variables of the template. With `continue_final_message` the answer goes on where the last message
        ends. `priority` is as in `generate`.
        Raises as `generate` does.
        """
        options = read_chat_options(
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        tokenizer, longest = self.engine.tokenizer, self.engine.limits.max_sequence_len
        rendered = [
            tuple(tokenizer.encode_chat(conversation, context_len=longest, **options))
            for conversation in read_conversations(messages)
        ]
        return self._generate(rendered, params, priority=priority)

    def stream(
        self,
        prompt: PromptLike,
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        priority: int | None = None,
    ) -> Iterator[ChoiceDelta]:
        """Complete one prompt or conversation token by token; leaving the iterator early ends the request.

        The request begins with the call, which raises ValueError if it is refused. `priority` is as in
        `generate`.
        """
        prompts = read_prompts(prompt)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one prompt, got {len(prompts)}")
        each = read_params(params, 1, self.default_sampling_params())
        priorities = read_priorities(priority, 1)
        deltas = _read(self.engine.frontend.stream(prompts, each, priority=priorities))
        next(deltas)
        return deltas

    def default_sampling_params(self) -> SamplingParams:
        """Parameters of calls that give none: ours, and over them the model's generation_config.json."""
        return self.engine.frontend.defaults.params()

    @property
    def model(self) -> Decoder:
        """The sharded flax.nnx module; calling it with token ids [T] or [B, T] gives their logits.

        The first call with a shape compiles a program. On GPUs XLA then drops the CUDA graphs of all earlier
        ones, and each size of step records its graph again when it is next run: some milliseconds each, once.
        """
        return self.engine.model

    def update_weights(self, tree: Mapping[str, Any]) -> None:
        """Replace all or some weights by arrays of the same names, shapes and dtype; nothing is recompiled.

        Steps dispatched from now on use them; keys and values that open requests cached stay as they
        are, and later requests do not find them. A quantised model takes its matrices as floats too. Raises
        WeightError, and changes nothing, for an unknown name or another shape or dtype.
        """
        self.engine.update_weights(tree)

    def task_table(self) -> TaskTable:
        """The wall time of the latest steps by task, as data that prints as a table."""
        return self.engine.timeline.table()

    def close(self) -> None:
        """Stop the engine; open requests end as aborted. A second call changes nothing."""
        self.engine.close()

    def __enter__(self) -> Self:
        """The LLM. Raises EngineDeadError if it was closed."""
        self.engine.service.check_running()
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: the weights lie on devices and a thread runs the engine."""
        raise pickle.PicklingError(
            "an LLM cannot be pickled or copied, it owns devices and a thread; make one in each process"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the engine."""
        self.close()

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None,
        *,
        priority: int | Iterable[int] | None,
    ) -> list[Generation]:
        each = read_params(params, len(prompts), self.default_sampling_params())
        priorities = read_priorities(priority, len(prompts))
        token_ids = [self.engine.frontend.encode(prompt, must_fit=True) for prompt in prompts]
        completions = iter(self.engine.frontend.generate(token_ids, each, priority=priorities))
        return [
            Generation(
                prompt_token_ids=ids,
                outputs=tuple(replace(next(completions), choice=sample) for sample in range(own.n)),
            )
            for ids, own in zip(token_ids, each, strict=True)
        ]


def _read(stream: SyncOutputStream) -> Generator[ChoiceDelta]:
    """The deltas of a stream after an empty one, at which the stream is this generator's to close."""
    with stream:
        yield ChoiceDelta(choice=0, text="", token_ids=(), finish_reason=None, stop_reason=None)
        for deltas in stream:
            yield from deltas


def _config(model: str | PurePath, config: object, overrides: Mapping[str, Any]) -> EngineConfig:
    """The configuration that the arguments of an LLM mean; raises ValueError for what is refused."""
    name = str(model) if isinstance(model, PurePath) else model
    if config is None:
        return engine_config(name, overrides)
    if not isinstance(config, EngineConfig):
        raise ValueError(f"config must be an EngineConfig, got {config!r:.200}")
    return override(replace(config, model=name), overrides)


def _refuse(overrides: Mapping[str, object]) -> None:
    """Raise ValueError for an option that is not known, naming the one that was probably meant, or all."""
    known = [*inspect.signature(LLM).parameters]
    for name in overrides:
        if name in known:
            continue
        near = _NAMES_ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
        hint = f"did you mean {near!r}?" if near else f"those known are {known}"
        raise ValueError(f"LLM has no option {name!r}; {hint}")
