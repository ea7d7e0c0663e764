"""Constraints are compiled beside the engine thread, in threads of their own.

A request brings its constraint as a specification. Who is about to send one has it compiled before, to refuse
it before an answer begins; the request then finds it compiled. One that was dropped meanwhile is compiled
again, in another pool, which refuses nothing that the engine has taken.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from albireo_jax.core.plan import Int32s, TokenConstraint
from albireo_jax.core.types import Request, StructuredOutput
from albireo_jax.engine.thread_pools import BoundedPool

_PREPARING_THREADS, _MAX_PREPARING = 32, 64
_REQUEST_THREADS, _MAX_REQUESTS = 4, 2**31
"""Fewer than the complex grammars that a sandbox tries at once, so that it refuses none of a request."""

_Result = TypeVar("_Result")


class CompiledGrammar(Protocol):
    """A compiled specification, from which the constraints of any number of requests start."""

    def constraint(self, *, ignore_eos: bool = False) -> TokenConstraint:
        """A constraint at the beginning of an answer; takes microseconds."""
        ...

    def first_mask(self) -> Int32s:
        """Words of the tokens that an answer may begin with, as in `TokenConstraint.mask`."""
        ...


class Compiler(Protocol):
    """Compiles specifications and keeps those compiled lately; any thread may call it."""

    def find(self, structured: StructuredOutput) -> CompiledGrammar | None:
        """The grammar if it was compiled lately; returns at once."""
        ...

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        """Compile in seconds at most; raises ValueError for what is wrong, OverloadedError."""
        ...


class NoCompiler:
    """Stands where a model has no end-of-sequence id, without which no constrained answer could end."""

    def find(self, structured: StructuredOutput) -> None:
        """Nothing was compiled."""
        del structured

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        """Raise ValueError."""
        del structured
        raise ValueError("structured output needs an end-of-sequence id, the model has none")


class ConstraintCompiler:
    """Compiles the constraints of requests; any thread may call it, and no call takes long."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._preparing = BoundedPool("grammars", threads=_PREPARING_THREADS, max_queued=_MAX_PREPARING)
        self._requests = BoundedPool(
            "grammars of requests", threads=_REQUEST_THREADS, max_queued=_MAX_REQUESTS
        )

    def first_mask(self, structured: StructuredOutput) -> "Future[Int32s]":
        """The words of `CompiledGrammar.first_mask` for a request to come.

        The future, or the call, raises ValueError for what does not compile, OverloadedError if too many
        wait.
        """
        return self._with(self._preparing, structured, lambda grammar: grammar.first_mask())

    def constraint(self, request: Request) -> "Future[TokenConstraint] | None":
        """The constraint of a request that the engine has taken; None if it asks for none."""
        if request.structured is None:
            return None
        return self._with(
            self._requests,
            request.structured,
            lambda grammar: grammar.constraint(ignore_eos=request.ignore_eos),
        )

    def close(self) -> None:
        """Begin to compile nothing more."""
        self._preparing.close()
        self._requests.close()

    def _with(
        self,
        pool: BoundedPool,
        structured: StructuredOutput,
        use: Callable[[CompiledGrammar], _Result],
    ) -> "Future[_Result]":
        """The result of `use` on the compiled grammar; `pool` compiles it unless it was compiled lately."""
        grammar = self._compiler.find(structured)
        if grammar is None:
            return pool.submit(lambda: use(self._compiler.compile(structured)))
        done = Future[_Result]()
        done.set_result(use(grammar))
        return done
