"""The shape of a model: frozen, and checked when it is made."""

from dataclasses import dataclass

from albireo_jax.core.config import TP_DEGREES, Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling (Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """All positions divided by `factor` (Hugging Face `rope_type: linear`)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRopeScaling:
    """YaRN's frequency scaling (arXiv 2309.00071, Hugging Face `rope_type: yarn`).

    Waves that turn more than `beta_fast` times over the original context are kept, those that turn less than
    `beta_slow` times are slowed by `factor`, those between are blended along channels, from whole channel to
    whole channel if `truncates`. Queries and keys are multiplied by `attention_factor`.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True


RopeScaling = Llama3RopeScaling | LinearRopeScaling | YarnRopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer; the numbers that its weight files must agree with.

    `num_heads` counts query heads and is a multiple of `num_kv_heads`. `sliding_window` W lets a
    token see itself and the W - 1 before it; None sees all. `quantization` is what the devices hold, made of
    the files' floats as these are read; None keeps them.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    quantization: Quantization | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse shapes that no model has."""
        sizes = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position": self.max_position,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @property
    def queries_per_kv_head(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def tp_degrees(self) -> tuple[int, ...]:
        """Tensor-parallel degrees that divide this model, key/value heads replicated where t exceeds them."""
        return tuple(t for t in TP_DEGREES if self._divides(t))

    def check_tp(self, tp: int) -> None:
        """Raise ValueError, with the degrees that would do, if `tp` ranks cannot share this model."""
        if tp not in self.tp_degrees():
            raise ValueError(
                f"tp {tp} does not divide this model ({self.num_heads} heads, {self.num_kv_heads} "
                f"key/value heads, intermediate size {self.intermediate_size}); "
                f"possible: {list(self.tp_degrees())}"
            )

    def kv_heads_at(self, tp: int) -> int:
        """Key/value heads over all ranks at degree `tp`: replicated up to `tp` where there are fewer."""
        return max(self.num_kv_heads, tp)

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rounded up to a multiple of `tp`: what the sharded embedding and head hold."""
        return -(-self.vocab_size // tp) * tp

    def _divides(self, tp: int) -> bool:
        heads = self.num_heads % tp == 0 and (self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0)
        return heads and self.intermediate_size % tp == 0
