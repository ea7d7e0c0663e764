"""The chunks of a stream: an object each, with the usage that the stream's options ask for."""

from typing import Any

from albireo_jax.serving.openai_objects import Heading, UsageCounter
from albireo_jax.serving.schemas.completion_bodies import StreamOptions
from albireo_jax.serving.sse import event


class Chunks:
    """Writes the chunks of one stream, objects of `kind`.

    With `include_usage` the last one tells the usage, and the others have a null in its place; with
    `continuous_usage_stats` each one tells what was counted so far.
    """

    def __init__(
        self, heading: Heading, kind: str, *, usage: UsageCounter, options: StreamOptions | None
    ) -> None:
        self._heading = heading
        self._kind = kind
        self._usage = usage
        self._ends_with_usage = options is not None and bool(options.include_usage)
        self.is_counted = options is not None and bool(options.continuous_usage_stats)
        """Whether chunks differ by what was counted, so that none can be encoded ahead."""

    def object(self, choice: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """The chunk of a choice."""
        if self.is_counted:
            fields["usage"] = self._usage.object()
        elif self._ends_with_usage:
            fields["usage"] = None
        return self._heading.object(self._kind, choices=[choice], **fields)

    def last_event(self) -> bytes:
        """The event that tells the usage of the whole stream; nothing where it is not asked for."""
        if not self._ends_with_usage:
            return b""
        return event(self._heading.object(self._kind, choices=[], usage=self._usage.object()))
