"""A server with a key never starts with one that cannot be sent, and lets nobody in without it."""

import asyncio
from pathlib import Path

import pytest

from albireo_jax.cli import main
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

UNSENDABLE = [
    "",
    " ",
    "a b",
    "secret\n",
    "\nsecret",
    "\tsecret",
    "schlüssel",
    "日本",
    "a\x00",
    "a\x7f",
    "\udc80",
]
SENDABLE = ["x", "secret", "sk-0_9.~+/=", '"quoted"', "Bearer", "a" * 500]


@pytest.mark.parametrize("key", UNSENDABLE)
def test_a_key_that_cannot_be_sent_is_refused_at_the_start(
    key: str, engine: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="api_key") as refusal:
        create_app(engine, api_key=key)
    assert len(key) < 2 or key not in str(refusal.value)
    config = tmp_path / "serve.yaml"
    config.write_text(f"api-key: {key!r}" if key.isprintable() and key.isascii() else 'api-key: "a\\nb"')
    commands = [["serve", "no-such-model", "--config", str(config)]]
    if "\x00" not in key:
        commands.append(["serve", "no-such-model", "--api-key", key])
    for command in commands:
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
        assert "api_key" in capsys.readouterr().err  # told before the model is looked for


@pytest.mark.parametrize("key", SENDABLE)
def test_only_the_key_opens(key: str, engine: Lab) -> None:
    wrong = ["", "Bearer", "Bearer ", f"Bearer {key}x", f"Bearer x{key}", f"Basic {key}", key, f"Bearer{key}"]

    async def statuses() -> list[int]:
        async with in_process(create_app(engine, api_key=key)) as client:
            headers = [{}, *({"authorization": value} for value in [*wrong, f"bearer  {key} "])]
            return [(await client.get("/v1/models", headers=header)).status_code for header in headers]

    *refused, opened = asyncio.run(statuses())
    assert refused == [401] * len(refused)
    assert opened == 200
