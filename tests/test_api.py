"""The LLM object on a real model: its options reach the engine, and prefixes are its to share or not."""

from pathlib import Path

import pytest

from albireo_jax import LLM, SamplingParams
from albireo_jax.core.config import KvDtype

PROMPT = "Once upon a time, a dog named Max found a big red ball in the garden and was happy."
PARAMS = SamplingParams(max_tokens=20, temperature=0)


@pytest.mark.compiles
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_prefixes_are_shared_unless_turned_off(data_dir: Path, prefix_caching: bool) -> None:
    model = str(data_dir / "models" / "stories260k")
    options = {} if prefix_caching else {"prefix_caching": False}
    with LLM(
        model, max_rows=1, max_step_tokens=16, kv_cache_dtype="int8", host_kv_memory_bytes=2**20, **options
    ) as llm:
        assert llm.engine.config.cache.kv_dtype is KvDtype.INT8
        assert llm.engine.limits.num_host_pages > 0
        first, again = (llm.generate(PROMPT, PARAMS)[0] for _ in range(2))
        deltas = list(llm.stream(PROMPT, PARAMS))
    found = (len(first.prompt_token_ids) - 1) // 16 * 16 * prefix_caching
    assert [answer.outputs[0].cached_tokens for answer in (first, again)] == [0, found]
    assert sum(delta.cached_tokens for delta in deltas) == found
    assert (found > 0) == prefix_caching
    assert first.outputs[0].text == again.outputs[0].text == "".join(delta.text for delta in deltas) != ""
