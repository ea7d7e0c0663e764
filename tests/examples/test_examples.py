"""Every example runs, and prints what it is there to show."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from albireo_jax.core.config import EngineConfig, SchedulerConfig
from albireo_jax.launch import launch
from albireo_jax.serving.app import create_app
from tests.labs.http_lab import served

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Of a model that writes its calls as Hermes does."""

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments, and gives what it prints."""

    def run_example(name: str, *arguments: str) -> str:
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        main: Callable[[Sequence[str]], None] = module.main
        main(arguments)
        return capsys.readouterr().out

    return run_example


@pytest.fixture(scope="module")
def model(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama that was given a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(data_dir / "models" / "stories260k", folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return str(folder)


@pytest.fixture(scope="module")
def url(model: str) -> Iterator[str]:
    """The API of a server of that model."""
    running = launch(
        EngineConfig(
            model=model, max_logprobs=0, scheduler=SchedulerConfig(max_rows=2, max_step_tokens=32, depth=2)
        )
    )
    try:
        with served(create_app(running)) as address:
            yield f"{address}/v1"
    finally:
        running.close()


def test_every_example_has_a_test() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert [path.stem for path in EXAMPLES if path.stem not in tests] == []


def test_offline(run: Run, model: str) -> None:
    printed = run("offline", "--model", model)
    assert printed.count("'Once upon a time' ->") == 2
    assert "T3 forward" in printed


def test_chat_client(run: Run, url: str) -> None:
    printed = run("chat_client", "--url", url, "--prompt", "Tell me of a cat.", "--prompt", "And of a dog?")
    cached = [int(line.split(",")[1].split()[0]) for line in printed.splitlines() if "cached]" in line]
    assert len(cached) == 2
    assert cached[1] > 0


def test_structured_output(run: Run, url: str) -> None:
    schema, regex, choice = run("structured_output", "--url", url).splitlines()
    assert 0 <= int(schema.rsplit(" is ")[-1]) <= 120
    assert len(regex.split()[-1].split("-")) == 3
    assert choice.split()[-1] in ("positive", "negative")


def test_tools(run: Run, url: str) -> None:
    call, _ = run("tools", "--url", url).split("\n", 1)
    arguments, result = call.removeprefix("add(").split(") = ")
    assert sum(json.loads(arguments).values()) == int(result)


def test_embedding_in_jax(run: Run, model: str) -> None:
    *texts, norm = run("embedding_in_jax", "--model", model).splitlines()
    scores = [float(line.split()[0]) for line in texts]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert float(norm.split()[-1]) > 0


def test_weight_update(run: Run, model: str) -> None:
    printed = run("weight_update", "--model", model, "--rounds", "4", "--rate", "0.05")
    rewards = [float(line.split()[-1]) for line in printed.splitlines()]
    assert len(rewards) == 4
    assert max(rewards[1:]) > rewards[0]


def test_tp_sweep(run: Run, model: str) -> None:
    printed = run("tp_sweep", "--model", model, "--tp", "1", "2", "--virtual-devices", "8")
    assert "the tokens are the same at every degree" in printed
    assert [int(line.split()[0]) for line in printed.splitlines()[1:3]] == [1, 2]
