"""Bytes of weights and of KV pages, and how many pages fit: arithmetic only."""

from dataclasses import dataclass

from albireo_jax.core.config import Dtype, KvDtype
from albireo_jax.core.errors import CapacityError
from albireo_jax.core.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory of one device: bytes of its weight shard and of one page, and the number of pages that fit.

    `copy_bytes` are those of a second copy of the layers, 0 where there is none.
    """

    weight_bytes: int
    page_bytes: int
    num_pages: int
    copy_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCount:
    """Counts of the numbers that one rank holds: layers' matrices, embedding and head, and the rest.

    `channels` are the output channels of the matrices. The rest are norms and biases.
    """

    matrices: int
    channels: int
    embeddings: int
    rest: int

    @property
    def total(self) -> int:
        """Parameters of the rank."""
        return self.matrices + self.embeddings + self.rest


def count_weights(model: ModelConfig, *, tp: int) -> WeightCount:
    """The numbers that one of `tp` ranks holds; a tied embedding is counted once."""
    hidden, head_dim = model.hidden_size, model.head_dim
    width, up_width = model.num_heads // tp * head_dim, model.intermediate_size // tp
    qkv_width = width + 2 * model.kv_heads_at(tp) // tp * head_dim
    rest = 2 * hidden + model.attention_bias * qkv_width + model.qk_norm * 2 * head_dim
    tables = 1 if model.tie_word_embeddings else 2
    return WeightCount(
        matrices=model.num_layers * hidden * (qkv_width + width + 3 * up_width),
        channels=model.num_layers * (qkv_width + hidden + 2 * up_width + hidden),
        embeddings=tables * model.padded_vocab_size(tp) // tp * hidden,
        rest=model.num_layers * rest + hidden,
    )


def weight_bytes(model: ModelConfig, *, tp: int, dtype: Dtype) -> int:
    """Bytes of the weights that one of `tp` ranks holds: norms and biases, codes and scales included."""
    tables = count_weights(model, tp=tp).embeddings + model.hidden_size
    return layer_bytes(model, tp=tp, dtype=dtype) + tables * dtype.num_bytes


def layer_bytes(model: ModelConfig, *, tp: int, dtype: Dtype) -> int:
    """Bytes of the weights of all layers: without embedding, head and the final norm."""
    count = count_weights(model, tp=tp)
    rest = count.rest - model.hidden_size
    if model.quantization is None:
        return (count.matrices + rest) * dtype.num_bytes
    return count.matrices + 4 * count.channels + rest * dtype.num_bytes


def pool_share(memory_share: float) -> float:
    """Share of a device's memory for all that an engine has there: what stays, and half of the rest."""
    return (1 + memory_share) / 2


def kept_bytes(pool_bytes: int, *, memory_share: float) -> int:
    """Bytes for what stays in a pool: `memory_share` of the device, if the pool is `pool_share` of it."""
    return int(pool_bytes * memory_share / pool_share(memory_share))


def page_bytes(
    model: ModelConfig, *, tp: int, page_size: int, dtype: Dtype, kv_dtype: KvDtype = KvDtype.AUTO
) -> int:
    """Bytes of one page of keys and values of all layers on one of `tp` ranks, with their scales.

    `dtype` is the model's, which the pages have too unless `kv_dtype` says otherwise.
    """
    vectors = 2 * model.num_layers * page_size * model.kv_heads_at(tp) // tp
    return vectors * kv_dtype.vector_bytes(model.head_dim, dtype=dtype)


def host_pages(memory_bytes: int, *, tp: int, page_bytes: int) -> int:
    """Pages that fit in so much of the host's memory, where a page takes the `page_bytes` of all `tp` ranks.

    Where a model has fewer key/value heads than ranks, the host too keeps the copy of each rank. 0 bytes hold
    0 pages; raises CapacityError if more are given but no page fits.
    """
    pages = memory_bytes // (tp * page_bytes)
    if memory_bytes and not pages:
        raise CapacityError(
            f"host_memory_bytes {memory_bytes} holds no KV page, which takes {tp * page_bytes} bytes there"
        )
    return pages


def rules_bytes(model: ModelConfig, *, tp: int, num_slots: int) -> int:
    """Bytes on one of `tp` ranks of what penalties count per slot; the other rules take a few KB a slot."""
    return num_slots * model.padded_vocab_size(tp) // tp * 4


def plan_memory(
    model: ModelConfig,
    *,
    tp: int,
    page_size: int,
    dtype: Dtype,
    budget_bytes: int,
    kv_dtype: KvDtype = KvDtype.AUTO,
    max_pages: int | None = None,
    copies_layers: bool = False,
) -> MemoryPlan:
    """Pages that fit beside the weights in `budget_bytes` of one device, `max_pages` at most.

    With `copies_layers` the weights of the layers are there twice, as loops of decode steps need on a GPU.
    Raises CapacityError if the weights leave no room for one page besides the null page.
    """
    weights = weight_bytes(model, tp=tp, dtype=dtype)
    copy = layer_bytes(model, tp=tp, dtype=dtype) if copies_layers else 0
    page = page_bytes(model, tp=tp, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype)
    num_pages = (budget_bytes - weights - copy) // page - 1  # one page is the null page
    if num_pages < 1:
        twice = f", the second copy of the layers for --decode-steps above 1 {copy}" if copy else ""
        raise CapacityError(
            f"the weights take {weights} bytes{twice} and a KV page {page}; with the null page and one more "
            f"they do not fit in {budget_bytes} bytes per device at tp {tp}"
        )
    if max_pages is not None:
        num_pages = min(num_pages, max_pages)
    return MemoryPlan(weight_bytes=weights, page_bytes=page, num_pages=num_pages, copy_bytes=copy)
