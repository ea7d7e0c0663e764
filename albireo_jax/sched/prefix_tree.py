"""The prefix tree: its nodes are full pages, found by the hash of their tokens and all tokens before.

A page's digest is the SHA-256 of its parent's digest and of its tokens; the root's is that of a salt. So
equal digests mean equal tokens at equal positions behind the same salt, and a request that finds a chain of
pages from the root can read them instead of computing them again. Only full pages are nodes.

A page may lie on the device, on the host, or be gone; then nothing behind it can be reached, so nodes leave
from the leaves on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from albireo_jax.core.plan import NULL_PAGE, Int32s

Digest = bytes


@dataclass(slots=True, eq=False)
class Node:
    """A full page: its number on the device and on the host, NULL_PAGE where it is not.

    `device_children` of its `children` are on the device. A node without a digest is in no tree. `idle_since`
    counts when its page became idle; 0 if it is owned, or not on the device. It `is_proven` once a row that
    read or wrote it sampled from finite logits.
    """

    digest: Digest = b""
    parent: "Node | None" = None
    page: int = NULL_PAGE
    host_page: int = NULL_PAGE
    children: dict[Digest, "Node"] = field(default_factory=dict["bytes", "Node"])
    device_children: int = 0
    idle_since: int = 0
    is_proven: bool = False

    @property
    def is_behind_device_pages(self) -> bool:
        """Whether the page before it, if there is one, is on the device."""
        return self.parent is None or self.parent.page != NULL_PAGE


def root_digest(salt: str) -> Digest:
    """The digest before that of a first page: prompts with different salts share nothing."""
    return hashlib.sha256(salt.encode(errors="surrogatepass")).digest()


def shared_root(salt: str, *, generation: int = 0) -> Digest:
    """The root of all requests of one `cache_salt` that were added between two losses of all prefixes."""
    return root_digest(f"{generation}/shared/{salt}")


def packed_digests(token_ids: Int32s, *, salt: str, page_size: int) -> bytes:
    """The root of a prompt and the digests of its full pages, one after the other; any thread may make them.

    A later generation has other digests.
    """
    digests: list[Digest] = []
    root = shared_root(salt)
    extend_digests(digests, root, token_ids, page_size=page_size)
    return b"".join((root, *digests))


def unpacked_digests(packed: bytes, root: Digest, *, num_pages: int) -> list[Digest]:
    """The digests of `num_pages` pages behind `root`; none if others were packed."""
    size = len(root)
    if not packed.startswith(root) or len(packed) != (1 + num_pages) * size:
        return []
    return [packed[end - size : end] for end in range(2 * size, len(packed) + 1, size)]


def extend_digests(digests: list[Digest], root: Digest, token_ids: Int32s, *, page_size: int) -> None:
    """Append the digests of the full pages of `token_ids` that `digests` does not hold yet."""
    if (len(digests) + 1) * page_size <= len(token_ids):
        new_ids = token_ids[len(digests) * page_size :]
        digests += page_digests(digests[-1] if digests else root, new_ids, page_size=page_size)


def page_digests(parent: Digest, token_ids: Int32s, *, page_size: int) -> list[Digest]:
    """The digests of the full pages of `token_ids`, which are behind the page of the digest `parent`."""
    data, page_bytes = token_ids.tobytes(), page_size * token_ids.itemsize
    digests: list[Digest] = []
    for end in range(page_bytes, len(data) + 1, page_bytes):
        parent = hashlib.sha256(parent + data[end - page_bytes : end]).digest()
        digests.append(parent)
    return digests


class PrefixTree:
    """The nodes by digest. The tree knows where pages are, and moves none."""

    def __init__(self) -> None:
        self._nodes: dict[Digest, Node] = {}

    def __len__(self) -> int:
        """Number of pages that can be found."""
        return len(self._nodes)

    def get(self, digest: Digest) -> Node | None:
        """The node of this digest."""
        return self._nodes.get(digest)

    def find(self, digests: Sequence[Digest]) -> list[Node]:
        """The longest chain of nodes with these digests, from the first on."""
        chain: list[Node] = []
        for digest in digests:
            node = self._nodes.get(digest)
            if node is None:
                break
            chain.append(node)
        return chain

    def insert(self, node: Node, digest: Digest, *, parent: Digest | None) -> bool:
        """Make a page of the device a node; False if its parent is not there or the digest is known."""
        above = None if parent is None else self._nodes.get(parent)
        if digest in self._nodes or (parent is not None and (above is None or above.page == NULL_PAGE)):
            return False
        node.digest, node.parent = digest, above
        self._nodes[digest] = node
        if above is not None:
            above.children[digest] = node
            above.device_children += 1
        return True

    def move(self, node: Node, *, page: int, host_page: int) -> None:
        """Note where a node's page lies now."""
        was, node.page, node.host_page = node.page, page, host_page
        if node.parent is not None:
            node.parent.device_children += (page != NULL_PAGE) - (was != NULL_PAGE)

    def remove(self, node: Node) -> list[Node]:
        """Take a node out with all behind it, which cannot be reached any more; gives them, leaves first."""
        if node.parent is not None:
            del node.parent.children[node.digest]
            node.parent.device_children -= node.page != NULL_PAGE
        gone = [node]
        for above in gone:  # grows while it is read
            if above.children:
                gone += above.children.values()
        for each in gone:
            del self._nodes[each.digest]
            each.digest, each.parent, each.children, each.device_children = b"", None, {}, 0
        return gone[::-1]

    def nodes(self) -> list[Node]:
        """All nodes, parents before their children."""
        return list(self._nodes.values())
