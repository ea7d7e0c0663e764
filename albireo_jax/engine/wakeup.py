"""A thread that waits for sockets is woken by other threads."""

import os


class Wakeup:
    """Something to poll beside sockets: `fd` becomes readable when any thread calls `ring`.

    Rings before the next `clear` count as one, and cost the caller nothing but the first.
    """

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)
        self._has_rung = False

    def ring(self) -> None:
        """Make `fd` readable."""
        if not self._has_rung:
            self._has_rung = True
            os.write(self._write_fd, b"\0")

    def clear(self) -> None:
        """Forget the rings before, so that what they tell of must be looked for behind this call."""
        try:
            os.read(self.fd, 2**12)
        except BlockingIOError:
            return
        self._has_rung = False

    def close(self) -> None:
        """Close both ends; nobody may ring any more."""
        os.close(self.fd)
        os.close(self._write_fd)
