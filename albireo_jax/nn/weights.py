"""Stream the tensors of a checkpoint into the fused, stacked, sharded arrays of a decoder.

Checkpoints keep one matrix per projection and layer, output before input. Each device gets its share
of a stacked array from a callback that reads, layer by layer, only the rows or columns that the share
is made of: a rank's query, key and value heads are rows of three matrices, its part of the output and
down projections are columns of two. Matrices that become codes are read the same way, a layer at a time,
and so is everything where each layer has arrays of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from albireo_jax.core.config import Dtype
from albireo_jax.core.errors import WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import has_layers
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.nn.quantise import quantised
from albireo_jax.nn.shapes import SCALES, axis_sizes, layer_name, unquantised, weight_names, weight_shapes
from albireo_jax.nn.sharding import TP, named_sharding
from albireo_jax.nn.tensors import StoredTensor, TensorSource

_NAMED_AT_MOST = 5
_ROWS_PER_PANEL = 32  # of a transpose: what it writes of one line stays within a cache line or two
_ROWS_AT_ONCE = 16384  # of an embedding, so that dequantising one takes little memory


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """The names of a decoder's parts in a checkpoint, without the ending .weight or .bias.

    `{layer}` stands for a layer's number. `ignored` are endings of names that are no weights.
    `interleaved_rope` says that rows of queries and keys are stored pair by pair, as llama.cpp rotates them.
    """

    embed: str
    final_norm: str
    lm_head: str
    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    query_norm: str
    key_norm: str
    ignored: tuple[str, ...] = ()
    interleaved_rope: bool = False


def load_weights(
    source: TensorSource,
    names: TensorNames,
    *,
    config: ModelConfig,
    dtype: Dtype,
    mesh: Mesh,
    form: LayerForm = LayerForm.STACKED,
) -> DecoderWeights:
    """Weights of a decoder on `mesh`, converted to `dtype`; where the model is quantised, codes made of that.

    Raises WeightError naming tensor, file and both shapes if a tensor is missing, unused, of a wrong
    shape or not of numbers, before anything is read.
    """
    expected = expected_tensors(config, names)
    _check_names(source.tensors, expected, names, config)
    for name, shape in expected.items():
        _check_tensor(name, source.tensors[name], shape)
    assembly = _Assembly(source, names, config, mesh.shape[TP])
    arrays: dict[str, Any] = {}
    for field in weight_names(unquantised(config)):
        layer = partial(assembly.layer, field, dtype=dtype, mesh=mesh)
        if config.quantization is not None and field in SCALES:
            arrays |= quantised(config, field, layer, mesh=mesh, form=form)
        elif has_layers(field) and form is LayerForm.UNSTACKED:
            arrays[field] = tuple(map(layer, range(config.num_layers)))
        else:
            arrays[field] = assembly.array(field, dtype=dtype, mesh=mesh)
    return DecoderWeights(**arrays)


def expected_tensors(config: ModelConfig, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this model must have."""
    hidden, vocab = config.hidden_size, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        f"{names.attention_norm}.weight": (hidden,),
        f"{names.query}.weight": (queries, hidden),
        f"{names.key}.weight": (keys, hidden),
        f"{names.value}.weight": (keys, hidden),
        f"{names.output}.weight": (hidden, queries),
        f"{names.mlp_norm}.weight": (hidden,),
        f"{names.gate}.weight": (config.intermediate_size, hidden),
        f"{names.up}.weight": (config.intermediate_size, hidden),
        f"{names.down}.weight": (hidden, config.intermediate_size),
    }
    if config.attention_bias:
        layer |= {f"{names.query}.bias": (queries,)}
        layer |= {f"{name}.bias": (keys,) for name in (names.key, names.value)}
    if config.qk_norm:
        layer |= {f"{name}.weight": (config.head_dim,) for name in (names.query_norm, names.key_norm)}
    expected = {f"{names.embed}.weight": (vocab, hidden), f"{names.final_norm}.weight": (hidden,)}
    if not config.tie_word_embeddings:
        expected[f"{names.lm_head}.weight"] = (vocab, hidden)
    for number in range(config.num_layers):
        expected |= {name.format(layer=number): shape for name, shape in layer.items()}
    return expected


def _check_names(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    names: TensorNames,
    config: ModelConfig,
) -> None:
    where = sorted({str(tensor.file) for tensor in stored.values()})[0] if stored else "the checkpoint"
    missing = [name for name in expected if name not in stored]
    if missing:
        raise WeightError(f"{where}: missing {_list(missing)}, which {config.architecture} needs")
    ignored = names.ignored + ((f"{names.lm_head}.weight",) if config.tie_word_embeddings else ())
    unused = [name for name in stored if name not in expected and not name.endswith(ignored)]
    if unused:
        file = stored[unused[0]].file
        raise WeightError(f"{file}: unused {_list(unused)}, which {config.architecture} does not have")


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise WeightError(f"{tensor.file}: tensor {name} has shape {tensor.shape}, expected {shape}")
    if not tensor.is_float:
        raise WeightError(f"{tensor.file}: tensor {name} is of {tensor.dtype}, expected floats")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:_NAMED_AT_MOST])}{more}"


class _Assembly:
    """Builds any device's share of any field from the tensors that it is made of."""

    def __init__(self, source: TensorSource, names: TensorNames, config: ModelConfig, tp: int) -> None:
        self._source = source
        self._names = names
        self._config = config
        self._shapes = weight_shapes(config, tp)
        self._sizes = axis_sizes(config, tp)

    def array(self, field: str, *, dtype: Dtype, mesh: Mesh) -> jax.Array:
        """The whole of `field`, sharded on `mesh`."""
        return _from_shares(
            self._shapes[field], named_sharding(mesh, field), dtype=dtype, fill=partial(self._fill, field)
        )

    def layer(self, field: str, number: int, *, dtype: Dtype, mesh: Mesh) -> jax.Array:
        """One layer of `field`, sharded on `mesh`."""
        return _from_shares(
            self._shapes[field][1:],
            named_sharding(mesh, layer_name(field)),
            dtype=dtype,
            fill=partial(self._fill_layer, field, number),
        )

    def _fill(self, field: str, out: NDArray[Any], index: tuple[slice, ...]) -> None:
        if field == "final_norm_D":
            out[...] = self._read(self._names.final_norm)
        elif field == "embed_VD":
            self._fill_vocabulary(self._names.embed, out, index[0])
        elif field == "lm_head_VD":
            self._fill_vocabulary(self._names.lm_head, out, index[0])
        else:
            for part, layer in zip(out, range(index[0].start, index[0].stop), strict=True):
                self._fill_layer(field, layer, part, index[1:])

    def _fill_layer(self, field: str, layer: int, out: NDArray[Any], index: tuple[slice, ...]) -> None:
        names, hidden = self._names, self._sizes["D"]
        match field:
            case "attention_norm_LD":
                out[...] = self._read(names.attention_norm, layer)
            case "wqkv_LDNXK":
                rows = self._heads(layer, index[1], kind="weight")
                _transpose(rows.reshape(-1, hidden), out.reshape(hidden, -1))
            case "bqkv_LNXK":
                out[...] = self._heads(layer, index[0], kind="bias")
            case "q_norm_LK":
                out[...] = self._read(names.query_norm, layer)
            case "k_norm_LK":
                out[...] = self._read(names.key_norm, layer)
            case "wo_LAD":
                _transpose(self._read(names.output, layer, slice(0, hidden), index[0]), out)
            case "mlp_norm_LD":
                out[...] = self._read(names.mlp_norm, layer)
            case "w_gate_up_LD2F":
                for half, name in enumerate((names.gate, names.up)):
                    _transpose(self._read(name, layer, index[2]), out[:, half])
            case "w_down_LFD":
                _transpose(self._read(names.down, layer, slice(0, hidden), index[0]), out)
            case _:
                raise AssertionError(f"no rule for {field}")

    def _heads(self, layer: int, heads: slice, *, kind: str) -> NDArray[Any]:
        """Rows [N X K ...] of the query, key and value matrices or biases for a range of kv heads."""
        queries = self._sizes["G"]
        q_rows = slice(heads.start * queries, heads.stop * queries)
        copies = self._sizes["N"] // self._config.num_kv_heads
        kv_rows = slice(heads.start // copies, (heads.stop - 1) // copies + 1)
        mine = np.arange(heads.start, heads.stop) // copies - kv_rows.start
        q = self._head_rows(self._names.query, layer, q_rows, kind=kind, is_rotated=True)
        k = self._head_rows(self._names.key, layer, kv_rows, kind=kind, is_rotated=True)[mine]
        v = self._head_rows(self._names.value, layer, kv_rows, kind=kind, is_rotated=False)[mine]
        q = q.reshape(-1, queries, *q.shape[1:])
        return np.concatenate([q, k[:, None], v[:, None]], axis=1)

    def _head_rows(self, name: str, layer: int, heads: slice, *, kind: str, is_rotated: bool) -> NDArray[Any]:
        width = self._sizes["K"]
        rows = self._read(name, layer, slice(heads.start * width, heads.stop * width), kind=kind)
        if is_rotated and self._names.interleaved_rope:
            pairs = rows.reshape(-1, width // 2, 2, *rows.shape[1:])
            return pairs.swapaxes(1, 2).reshape(-1, width, *rows.shape[1:])
        return rows.reshape(-1, width, *rows.shape[1:])

    def _fill_vocabulary(self, name: str, out: NDArray[Any], ids: slice) -> None:
        """Rows of a table of the vocabulary; those that pad it stay zero."""
        stop = min(ids.stop, self._config.vocab_size)
        for start in range(ids.start, stop, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, stop))
            out[rows.start - ids.start : rows.stop - ids.start] = self._read(name, None, rows)

    def _read(self, name: str, layer: int | None = None, *index: slice, kind: str = "weight") -> NDArray[Any]:
        full = f"{name}.{kind}" if layer is None else f"{name}.{kind}".format(layer=layer)
        return self._source.read(full, *index)


def _from_shares(
    shape: tuple[int, ...],
    sharding: NamedSharding,
    *,
    dtype: Dtype,
    fill: Callable[[NDArray[Any], tuple[slice, ...]], None],
) -> jax.Array:
    """An array made share by share: `fill` writes each device's bounds into zeros."""

    def share(index: Any) -> NDArray[Any]:
        bounds = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        out = np.zeros([part.stop - part.start for part in bounds], jnp.dtype(dtype.value))
        fill(out, bounds)
        return out

    return jax.make_array_from_callback(shape, sharding, share)


def _transpose(matrix: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the transpose of `matrix` into `out`, some rows at a time: three times as fast as at once."""
    for start in range(0, len(matrix), _ROWS_PER_PANEL):
        rows = slice(start, start + _ROWS_PER_PANEL)
        out[:, rows] = matrix[rows].T
