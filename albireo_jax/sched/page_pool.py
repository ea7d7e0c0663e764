"""The pages of one tier by number: free, or taken by a number of owners."""

import numpy as np

from albireo_jax.core.plan import Int32s


class PagePool:
    """Pages 1 … `num_pages`, each free or taken; page 0 is the null page and never handed out.

    A page that is taken has a number of owners, perhaps none; it is free again once it is given back. A page
    that was given back last is handed out first, so the order depends on the calls alone.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._stack = np.arange(num_pages, 0, -1, dtype=np.int32)  # the free ones are [:num_free]
        self._num_free = num_pages
        self._owners = np.zeros(num_pages + 1, np.int32)
        self._last_place = np.zeros(num_pages + 1, np.int32)  # scratch

    @property
    def num_free(self) -> int:
        """Pages that `take` can hand out."""
        return self._num_free

    @property
    def free_pages(self) -> Int32s:
        """A copy of the free page numbers, the one handed out last first."""
        return self._stack[: self._num_free].copy()

    @property
    def owners(self) -> Int32s:
        """A copy of the number of owners by page number."""
        return self._owners.copy()

    def take(self, count: int) -> Int32s:
        """`count` free pages, each with one owner from now on."""
        assert count <= self._num_free, f"{count} pages wanted, {self._num_free} free"
        self._num_free -= count
        pages = self._stack[self._num_free : self._num_free + count].copy()
        self._owners[pages] = 1
        return pages

    def share(self, pages: Int32s) -> Int32s:
        """Give each of the distinct `pages` one owner more; gives those that had none."""
        self._owners[pages] += 1
        return pages[self._owners[pages] == 1]

    def release(self, pages: Int32s) -> Int32s:
        """Take one owner from each of `pages`, as often as it is listed; gives those that have none left.

        They are in the order of `pages`, each in its last place, and not free before they are given back.
        """
        places = np.arange(len(pages), dtype=np.int32)
        self._last_place[pages] = places
        is_last = self._last_place[pages] == places
        if is_last.all():
            self._owners[pages] -= 1  # faster than subtract.at, and the same if each is listed once
        else:
            np.subtract.at(self._owners, pages, 1)
        owners = self._owners[pages]
        assert (owners >= 0).all(), f"a page among {pages} is released but has no owner"
        return pages[is_last & (owners == 0)]

    def give_back(self, pages: Int32s) -> None:
        """Make `pages`, which have no owners, free again."""
        self._stack[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)
