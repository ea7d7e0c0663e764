"""Parsers of a text that comes in pieces, written as if it were all there.

A parser is a generator over an `IncrementalParser`: where it needs a character that has not come, it yields,
and `push` resumes it. What it has read is either said at once or held: held text is said after all if it
turns out to be ordinary text, and dropped if it was syntax. Decisions rest on characters alone, never on
where a piece ended, so the outcome does not depend on how the text was cut. Each character is read once;
what is looked at again when more comes is shorter than a marker.
"""

import re
from collections.abc import Callable, Generator

from albireo_jax.text.answers.json_repair import JsonRepair

Reading = Generator[None, None, bool]
"""A step of a parser: yields while it waits for text, and returns whether it read what it was to read."""

_SPACES = re.compile(r"[ \t\n\r]*+")


class IncrementalParser:
    """Text as it comes, read from left to right; `say` takes what is ordinary text."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._text = ""
        self._at = 0
        self._final = False
        self._held: list[str] = []
        self._begins_line = True  # only white space was read since the last line's end

    @property
    def ended(self) -> bool:
        """Whether all of the text has been read and no more will come."""
        return self._final and self._at == len(self._text)

    def add(self, text: str, *, final: bool) -> None:
        """Have more to read, with `final` all there will be."""
        self._text = self._text[self._at :] + text
        self._at = 0
        self._final = final

    def hold(self, text: str) -> None:
        """Keep text that was read for later."""
        if text:
            self._held.append(text)

    def release(self) -> None:
        """Say what is held: it was no syntax."""
        self._begins_line = False
        if self._held:
            held, self._held = self._held, []
            self.say("".join(held))

    def drop(self) -> str:
        """Forget what is held, and return it: it was syntax."""
        held = "".join(self._held)
        self._held.clear()
        return held

    def next_is(self, characters: str) -> Reading:
        """Whether one of `characters` comes next; reads nothing."""
        while self._at == len(self._text) and not self._final:
            yield
        return self._at < len(self._text) and self._text[self._at] in characters

    def spaces(self) -> Reading:
        """Read and hold white space; False if the text ends with it."""
        return (yield from self.run(_SPACES, self.hold))

    def run(self, characters: "re.Pattern[str]", take: Callable[[str], None]) -> Reading:
        """Read the longest run of a class of characters; False if the text ends with it."""
        while True:
            match = characters.match(self._text, self._at)
            assert match is not None, "a run may be empty"
            take(match.group())
            self._at = match.end()
            if self._at < len(self._text):
                return True
            if self._final:
                return False
            yield

    def literal(self, wanted: str) -> Reading:
        """Read and hold exactly `wanted`, or nothing."""
        while not self._final and wanted.startswith(self._text[self._at :]) and self._missing(wanted):
            yield
        if not self._text.startswith(wanted, self._at):
            return False
        self.hold(wanted)
        self._at += len(wanted)
        return True

    def value(self, take: Callable[[str, str], None]) -> Reading:
        """Read a JSON value, piece by piece; False where it stops being one, which is left unread.

        `take` gets each piece as it was written, and the strict JSON that is made of it.
        """
        mender = JsonRepair()
        while True:
            end = mender.mend(self._text, self._at)
            if end > self._at:
                take(self._text[self._at : end], mender.take())
            self._at = end
            if mender.done:
                return True
            if mender.failed or self._final:
                break
            yield
        if not mender.failed and self._at < len(self._text):  # an escape that the text's end cuts off
            take(self._text[self._at :], "")
            self._at = len(self._text)
        return False

    def until(self, *markers: str) -> Generator[None, None, str]:
        """Say what comes before a marker, then hold the white space in front of it and the marker.

        Returns the marker; at the text's end "", and only white space is held.
        """
        while True:
            found = [(at, marker) for marker in markers if (at := self._text.find(marker, self._at)) >= 0]
            at, marker = min(found, default=(self._before_beginning_of(markers), ""))
            self._say_trimmed(at)
            if marker:
                self.hold(marker)
                self._at += len(marker)
                return marker
            if self._final:
                return ""
            yield

    def until_line(self, beginnings: str, marker: str) -> Generator[None, None, str]:
        """As `until`, but a line that begins with one of `beginnings` counts as a marker too.

        For such a line its first character is returned, which is left unread.
        """
        line = re.compile(rf"\n[ \t]*+(?=[{re.escape(beginnings)}])|{re.escape(marker)}")
        while True:
            if self._begins_line:
                yield from self.spaces()
                if (yield from self.next_is(beginnings)):
                    return self._text[self._at]
            match = line.search(self._text, self._at)
            if match is None:
                self._say_trimmed(self._before_beginning_of((marker,)))
                if self._final:
                    return ""
                yield
            elif match.group() == marker:
                self._say_trimmed(match.start())
                return (yield from self.until(marker))
            else:
                self._say_trimmed(match.end())

    def rest(self) -> Reading:
        """Say all that is held or comes."""
        while True:
            self.release()
            if self._at < len(self._text):
                self.say(self._text[self._at :])
            self._at = len(self._text)
            if self._final:
                return True
            yield

    def _missing(self, wanted: str) -> bool:
        return len(self._text) - self._at < len(wanted)

    def _say_trimmed(self, end: int) -> None:
        """Read up to `end`, the white space there held."""
        body = self._text[self._at : end]
        shown = body.rstrip(" \t\n\r")
        if shown:
            self.release()
            self.say(shown)
            self._begins_line = False
        self.hold(body[len(shown) :])
        self._begins_line |= "\n" in body[len(shown) :]
        self._at = end

    def _before_beginning_of(self, markers: tuple[str, ...]) -> int:
        """Offset from which the text's end may begin a marker; the end itself if it cannot."""
        text, end = self._text, len(self._text)
        if self._final:
            return end
        longest = min(max(map(len, markers)) - 1, end - self._at)
        return next(
            (
                end - size
                for size in range(longest, 0, -1)
                if any(size < len(marker) and text.endswith(marker[:size]) for marker in markers)
            ),
            end,
        )
