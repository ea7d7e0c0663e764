"""Random requests for the scheduler, and the rules that they follow."""

import numpy as np

from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request
from tests.labs.sched_lab import FREE, VOCAB_SIZE, Bond


def draw_bond(random: np.random.Generator) -> Bond:
    """None for half of the requests, and a rule for most of the others."""
    late = random.integers(0, 12, size=3).tolist()
    if random.random() < 0.5:
        return Bond(breaks_after=late[0]) if random.random() < 0.15 else FREE
    return Bond(
        modulus=int(random.integers(4, 9)),
        max_length=late[0] if random.random() < 0.3 else None,
        fails_after=late[1] if random.random() < 0.15 else None,
        breaks_after=late[2] if random.random() < 0.1 else None,
    )


def draw_request(request_id: str, random: np.random.Generator) -> Request:
    """A request whose prompt may begin as others do."""
    prompt = random.integers(VOCAB_SIZE, size=random.integers(1, 21))
    shared = int(prompt.sum()) % (len(prompt) + 1)
    prompt[:shared] = np.arange(shared) % VOCAB_SIZE
    max_tokens = int(random.integers(1, 17))
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt.tolist()),
        max_tokens=max_tokens,
        min_tokens=int(random.integers(0, max_tokens + 1)) if random.random() < 0.5 else 0,
        sampling=TokenSampling(temperature=float(random.choice((0.0, 0.7))), seed=int(random.integers(4))),
        stop_ids=tuple(random.choice(VOCAB_SIZE, size=random.integers(3), replace=False).tolist()),
        logprobs=2 if prompt.sum() % 2 else None,
        prompt_logprobs=None if prompt.sum() % 3 else 0,
        cache_salt="" if prompt.sum() % 5 else "own",
        priority=int(prompt[-1]) % 3 - 1,
    )
