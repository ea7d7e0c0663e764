"""The `albireo` command: each command calls one function, and none imports JAX before it must."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from albireo_jax.cli import options as flags
from albireo_jax.cli.bench import bench
from albireo_jax.cli.calibrate import calibrate
from albireo_jax.cli.launching import launched, needs_extra
from albireo_jax.cli.options import EngineFlags, with_engine_flags
from albireo_jax.cli.plan import plan
from albireo_jax.cli.report import report
from albireo_jax.cli.sampling_flags import SamplingFlags, with_sampling_flags
from albireo_jax.cli.sweep import sweep
from albireo_jax.core.errors import AlbireoError
from albireo_jax.core.model_files import find_model
from albireo_jax.core.types import SamplingParams

_CALLER_ERROR, _ENGINE_ERROR, _INTERRUPTED = 2, 1, 130

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
app.add_typer(bench, name="bench")
app.command()(calibrate)
app.command()(plan)
app.command()(report)
app.command()(sweep)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default the process's own, and exit.

    A failure is one line on standard error: code 2 for what the caller asked, 1 for what the engine
    did, 130 for an interrupt.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="albireo")
    except ValueError as error:
        _fail(error, _CALLER_ERROR)
    except AlbireoError as error:
        _fail(error, _ENGINE_ERROR)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"albireo: {error}", err=True)
    raise SystemExit(code) from error


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"albireo {version('albireo-jax')}")
        raise typer.Exit


@app.callback()
def albireo(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Serve large language models with JAX.

    \b
    albireo serve smollm2                        an OpenAI-compatible server on port 8000
    albireo generate smollm2 --chat -p "Hello"   one answer on the terminal
    albireo bench throughput smollm2             how fast it is, and where the time goes
    albireo report smollm2 --out report          that as a page, and what more devices would bring
    albireo calibrate CONFIG --output FILE.json  how long steps take here, for `albireo plan`
    albireo sweep MODEL --gpus 8                 at which tensor-parallel degree GPUs serve most

    albireo COMMAND --help explains a command and its flags.
    """
    del version  # its callback has shown it


@app.command()
@with_engine_flags
def serve(
    model: flags.Model,
    *,
    served_model_name: flags.ServedName = None,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8000,
    api_key: flags.ApiKey = None,
    allow_origin: flags.AllowOrigin = None,
    tool_call_parser: flags.ToolCallParser = None,
    reasoning_parser: flags.ReasoningParser = None,
    stream_interval: flags.StreamInterval = 1,
    frontends: flags.FrontEnds = 1,
    restarts: flags.Restarts = 3,
    engine: EngineFlags,
) -> None:
    """Serve MODEL over HTTP with OpenAI's API until interrupted.

    \b
    albireo serve smollm2
    albireo serve /models/Llama-3.1-8B-Instruct --tp 4 --host 0.0.0.0 --api-key SECRET
    albireo serve model.gguf --max-model-len 4096 --config engine.yaml
    """
    with needs_extra("serve"):
        from albireo_jax.cli.server_processes import run_server
        from albireo_jax.serving import auth, cors, process_jobs, server

    if api_key is not None:
        auth.check_api_key(api_key)  # before the model loads
    origins = tuple(cors.origins_of(allow_origin))
    config = engine.engine_config(model)
    with server.bind(host, port) as bound:
        http = process_jobs.HttpOptions(
            served_name=served_model_name or find_model(model).name,
            api_key=api_key,
            origins=origins,
            tool_call_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
            stream_interval=stream_interval,
        )
        run_server(config, http, bound=bound, num_front_ends=frontends, restarts=restarts)


@app.command()
@with_engine_flags
@with_sampling_flags
def generate(
    model: flags.Model,
    *,
    prompt: flags.PromptText,
    chat: flags.Chat = False,
    max_tokens: flags.MaxTokens = 256,
    stop: flags.Stop = None,
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Write MODEL's continuation of a prompt, or its answer in a chat, to standard output.

    \b
    albireo generate smollm2 --prompt "The capital of France is" --temperature 0
    albireo generate smollm2 --chat --prompt "Tell me a joke."
    cat question.txt | albireo generate smollm2 --chat --prompt -
    """
    given: dict[str, Any] = {**sampling.given(), "max_tokens": max_tokens, "stop": tuple(stop or ())}
    SamplingParams(**given)  # refuses what is wrong before the model loads
    text = sys.stdin.read() if prompt == "-" else prompt
    asked = [{"role": "user", "content": text}] if chat else text
    with launched(engine.engine_config(model)) as running:
        params = SamplingParams(**running.frontend.defaults.given() | given)
        with running.frontend.stream([asked], params) as stream:
            for deltas in stream:
                typer.echo("".join(delta.text for delta in deltas), nl=False)
            typer.echo()
