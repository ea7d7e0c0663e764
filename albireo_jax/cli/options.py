"""The flags of the commands: those of the engine as one dataclass, the others as types of parameters."""

import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from albireo_jax.cli.config_file import use_config_file
from albireo_jax.core.config import (
    MAX_DEPTH,
    MAX_LOGPROBS,
    MEMORY_SHARE,
    STEP_TOKENS,
    TP_DEGREES,
    AttentionBackend,
    CacheConfig,
    Dtype,
    EngineConfig,
    GenerationConfig,
    KvDtype,
    ParallelConfig,
    Quantization,
    SamplingMode,
    SchedulerConfig,
    model_dtype,
)
from albireo_jax.core.gpu_options import GpuConfig
from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2 (built in), a Hugging Face folder, a saved checkpoint, or a .gguf file.",
        show_default=False,
    ),
]
NoModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Not needed: no model is loaded.", show_default=False),
]


def _model_dtype(value: str) -> Dtype | None:
    try:
        return model_dtype(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """Flags of every command that runs an engine; see `with_engine_flags`."""

    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Read flags from a YAML file, one `flag: value` a line; the command line wins.",
            is_eager=True,
            callback=use_config_file,
            show_default=False,
        ),
    ] = None
    tp: Annotated[
        int, typer.Option(metavar="N", help=f"Devices that share the model: one of {list(TP_DEGREES)}.")
    ] = 1
    virtual_devices: Annotated[
        int, typer.Option(metavar="N", help="Let the CPU stand for N devices; 0: use real ones.")
    ] = 0
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            parser=_model_dtype,
            metavar="auto|float32|bfloat16",
            help="Of weights and activations. Default, and auto: bfloat16 on GPUs, float32 on CPUs.",
            show_default=False,
        ),
    ] = None
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            metavar="|".join(Quantization),
            help="Keep the layers' matrices in one byte a number, made while loading; fp8 also rounds what "
            "they are multiplied with (W8A8), the others only weights. Default: as --dtype.",
            show_default=False,
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest sequence, prompt and answer. Default: the model's own, or what memory holds.",
            show_default=False,
        ),
    ] = None
    max_rows: Annotated[
        int, typer.Option(metavar="N", help="Requests computed at once; the others wait.")
    ] = 64
    max_step_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens computed per step; longer prompts take several. Default: 512; 2048 on 80 GB GPUs.",
            show_default=False,
        ),
    ] = None
    num_pages: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pages of the key/value cache. Default: what requests can use and memory holds.",
            show_default=False,
        ),
    ] = None
    page_size: Annotated[int, typer.Option(metavar="N", help="Tokens per page.")] = 16
    kv_cache_dtype: Annotated[
        KvDtype,
        typer.Option(
            metavar="|".join(KvDtype),
            help="Of cached keys and values; int8 and fp8 are scaled per token and head. auto: as the model.",
        ),
    ] = KvDtype.AUTO
    memory_share: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Share of each GPU's memory for weights and pages; activations and CUDA need what is left.",
        ),
    ] = MEMORY_SHARE
    max_logprobs: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Likeliest tokens that can be asked for beside each token; 0: no log probabilities.",
        ),
    ] = MAX_LOGPROBS
    host_kv_memory: Annotated[
        float,
        typer.Option(
            metavar="GIB",
            help="Memory of the host for cached keys and values that have no room on the devices; 0: none.",
        ),
    ] = 0.0
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Read the beginning of a prompt from the cache if an earlier one began like it.",
        ),
    ] = True
    depth: Annotated[
        int,
        typer.Option(metavar="N", help=f"Steps in flight, up to {MAX_DEPTH}; 1 plans and computes in turn."),
    ] = 2
    decode_steps: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Tokens per request that one dispatch samples while nothing waits; they come in bursts.",
        ),
    ] = 1
    sampling: Annotated[
        SamplingMode,
        typer.Option(
            metavar="sharded|replicated",
            help="Split the sampling of a step over the devices, or do all of it on each.",
        ),
    ] = SamplingMode.SHARDED
    attention: Annotated[
        AttentionBackend,
        typer.Option(
            metavar="|".join(AttentionBackend),
            help="Operations of XLA, or CUDA kernels. auto: kernels on NVIDIA GPUs for models they can do.",
        ),
    ] = AttentionBackend.AUTO
    generation_config: Annotated[
        GenerationConfig,
        typer.Option(
            metavar="|".join(GenerationConfig),
            help="Sampling parameters that a request leaves out: the model's generation_config.json, or not.",
        ),
    ] = GenerationConfig.AUTO
    cuda_graph_collectives: Annotated[
        bool,
        typer.Option(
            "--cuda-graph-collectives/--no-cuda-graph-collectives",
            help="Record collectives into CUDA graphs; NCCL is said to hang there at times.",
        ),
    ] = False

    def engine_config(self, model: str) -> EngineConfig:
        """The configuration of an engine for `model`; raises ValueError for values out of range."""
        return EngineConfig(
            model=model,
            dtype=self.dtype,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_logprobs=self.max_logprobs,
            sampling=self.sampling,
            attention=self.attention,
            generation_config=self.generation_config,
            parallel=ParallelConfig(tp=self.tp, virtual_devices=self.virtual_devices),
            cache=CacheConfig(
                page_size=self.page_size,
                num_pages=self.num_pages,
                kv_dtype=self.kv_cache_dtype,
                memory_share=self.memory_share,
                host_memory_bytes=_gib(self.host_kv_memory),
                prefix_caching=self.prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_rows=self.max_rows,
                max_step_tokens=STEP_TOKENS if self.max_step_tokens is None else self.max_step_tokens,
                depth=self.depth,
                decode_steps=self.decode_steps,
            ),
            step_tokens_by_device=self.max_step_tokens is None,
            gpu=GpuConfig(cuda_graph_collectives=self.cuda_graph_collectives),
        )


def _gib(size: float) -> int:
    """Bytes of a size in GiB."""
    if not math.isfinite(size):
        raise ValueError(f"host_kv_memory must be a finite number, got {size}")
    return int(size * 2**30)


def with_flags(kind: type[Any], *, argument: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as flags; it takes them as one argument of that name.

    typer reads flags from a function's signature, so the signature it sees is the command's own with
    the fields in place of the argument.
    """
    hints = get_type_hints(kind, include_extras=True)
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [parameter for name, parameter in signature.parameters.items() if name != argument]

        @wraps(command)
        def run(**values: Any) -> None:
            flags = kind(**{parameter.name: values.pop(parameter.name) for parameter in added})
            command(**{argument: flags}, **values)

        run.__signature__ = signature.replace(parameters=[*own, *added])  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
        return run

    return decorate


with_engine_flags = with_flags(EngineFlags, argument="engine")
"""Gives a command that runs an engine all its flags, as the argument `engine`."""


def _optional(name: str, *, metavar: str, help: str) -> Any:
    """An option without a default to show; its help says what holds where it is not given."""
    return typer.Option(name, metavar=metavar, help=help, show_default=False)


ServedName = Annotated[
    str | None,
    _optional(
        "--served-model-name",
        metavar="NAME",
        help="Name that clients ask for. Default: the built-in, folder's or file's name.",
    ),
]
Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 for all.")]
Port = Annotated[int, typer.Option("--port", metavar="N", help="Port to listen at; 0 takes a free one.")]
ApiKey = Annotated[
    str | None,
    _optional("--api-key", metavar="KEY", help="Refuse requests without `Authorization: Bearer KEY`."),
]
AllowOrigin = Annotated[
    list[str] | None,
    _optional(
        "--allow-origin",
        metavar="ORIGIN",
        help="Origin whose pages may call from a browser; may be repeated; none for none. Default: all.",
    ),
]
ToolCallParser = Annotated[
    ToolFormat | None,
    _optional(
        "--tool-call-parser",
        metavar="|".join(ToolFormat),
        help="How the model writes tool calls. Default: as its chat template shows.",
    ),
]
ReasoningParser = Annotated[
    ReasoningFormat | None,
    _optional(
        "--reasoning-parser",
        metavar="|".join(ReasoningFormat),
        help="How the model sets off its reasoning. Default: as its chat template shows.",
    ),
]

PromptText = Annotated[
    str, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from standard input.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Ask as a user in a chat instead of continuing the text.")]
MaxTokens = Annotated[
    int | None,
    _optional(
        "--max-tokens", metavar="N", help="Longest answer. Default: as long as the model's context allows."
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0 always takes the likeliest token.")
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens of this mass.")
]
TemperatureOrModels = Annotated[
    float | None,
    _optional("--temperature", metavar="X", help="0 always takes the likeliest token. Default: the model's."),
]
TopPOrModels = Annotated[
    float | None,
    _optional(
        "--top-p", metavar="X", help="Draw from the likeliest tokens of this mass. Default: the model's."
    ),
]
TopKOrModels = Annotated[
    int | None,
    _optional(
        "--top-k", metavar="N", help="Draw from the N likeliest tokens; 0: from all. Default: the model's."
    ),
]
MinPOrModels = Annotated[
    float | None,
    _optional(
        "--min-p",
        metavar="X",
        help="Leave out tokens X times less likely than the likeliest. Default: the model's.",
    ),
]
Seed = Annotated[
    int | None,
    _optional("--seed", metavar="N", help="Draws the same answer again. Default: random."),
]
Stop = Annotated[
    list[str] | None,
    _optional("--stop", metavar="TEXT", help="End before this text; may be repeated."),
]

NumRequests = Annotated[int, typer.Option("--requests", metavar="N", help="Requests sent at once.")]
InputLen = Annotated[int, typer.Option("--input-len", metavar="N", help="Tokens of each random prompt.")]
OutputLen = Annotated[int, typer.Option("--output-len", metavar="N", help="Tokens generated for each.")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", help="Runs that count, after the warm-up.")]
Rows = Annotated[
    list[int] | None,
    _optional("--rows", metavar="N", help="Requests in the step; may be repeated. Default: 32, 128 and 512."),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Decode steps to time.")]
