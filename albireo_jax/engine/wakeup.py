"""A thread that waits for sockets is woken by other threads."""

import os
import threading


class Wakeup:
    """Something to poll beside sockets: `fd` becomes readable when any thread calls `ring`.

    Rings before the next `clear` count as one, and only the first costs a system call. Once it is closed,
    rings do nothing.
    """

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        self._has_rung = self._is_closed = False
        self._lock = threading.Lock()  # guards against ringing what is closed, whose number others may have

    def ring(self) -> None:
        """Make `fd` readable."""
        with self._lock:
            if not self._has_rung and not self._is_closed:
                self._has_rung = True
                os.write(self._write_fd, b"\0")

    def clear(self) -> None:
        """Forget the rings before, so that what they tell of must be looked for behind this call."""
        with self._lock:
            if self._has_rung:
                os.read(self.fd, 1)
                self._has_rung = False

    def close(self) -> None:
        """Close both ends."""
        with self._lock:
            self._is_closed = True
            os.close(self.fd)
            os.close(self._write_fd)
