"""The gates of programs compiled for a GPU.

What would make a step slow shows in the compiled text: copies of weights or of the KV pool, temporaries that
grow with the depth, collectives beyond those of the design, kernels that are launched one by one, and loops,
in which the host waits for the device.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from albireo_jax.core.config import Dtype, Quantization
from albireo_jax.core.logit_rules import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASED_TOKENS
from albireo_jax.core.memory import page_bytes, rules_bytes, weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import has_layers
from albireo_jax.nn.shapes import weight_names
from albireo_jax.runtime.batch import SLOT_FIELDS, Bucket
from albireo_jax.runtime.decode_loop import DecodeLoop
from albireo_jax.runtime.executor import Sampling
from albireo_jax.runtime.logit_rule_calls import LogitRuleProgram
from albireo_jax.runtime.logprob_calls import LogprobProgram
from albireo_jax.runtime.min_tokens import MinTokensProgram
from albireo_jax.sampling.logits import MASK_BITS
from albireo_jax.sampling.routes import Route, wire_bytes
from benchmarks.gpu_programs.compiled_programs import (
    MAX_LEN,
    MAX_ROWS,
    NUM_PAGES,
    NUM_TOP,
    PAGE_SIZE,
    Name,
    ProgramCase,
)
from benchmarks.gpu_programs.kernel_assembly import own_kernels, sampling_kernels, scratch_bytes
from benchmarks.gpu_programs.program_figures import ProgramFigures

MEMORY_TOLERANCE = 0.03
"""By how much what programs take on a device may differ from what `core.memory` counts.

The arguments of forward passes and loops from what is counted at their depth; what a program takes beside its
arguments, from nothing, in parts of the weights and pages of the whole model, as it does not grow with depth.
"""

MAX_PRODUCT_BODIES = 5
"""Distinct matrix products of a step: four of a layer, whatever the depth, and the head."""

_LAYER_PRODUCTS = 4
_WHOLE_FIELDS = 3  # of the weights: embedding, final norm and head
_MAX_STATE = 7  # arrays of the cache with its scales, and what the host sends
_PENALTIES = 3
_TABLE_BYTES = 4 * (MAX_ROWS + 1) * (MAX_LEN // PAGE_SIZE)
_FEWEST_LAUNCHES = 5  # that XLA makes a command buffer of
_LAYER_LAUNCHES: Mapping[Quantization | None, tuple[tuple[int, int], tuple[int, int]]] = MappingProxyType(
    {
        None: ((9, 10), (11, 12)),
        Quantization.INT8: ((12, 10), (14, 13)),
        Quantization.FP8_W8A16: ((12, 10), (14, 13)),
        Quantization.FP8: ((17, 19), (22, 23)),
    }
)
"""Launches of a layer on one device and on several, in decode steps and in steps with chunks.

With floats: two norms, four products, one activation, rotation with the write of keys and values, attention;
chunks attend once more, and several devices reduce twice. Partial sums of products with codes are added and
scaled by launches of their own where there are few rows. Products of fp8 with fp8 take up to three more each:
for the peaks of rows, their codes, and the scaling of the result.
"""

_STEP_LAUNCHES = 12  # before and after the layers, so that 32 of them are at most 300
_PARTIAL_SUMS_BYTES = 16 * 2**20  # of products that cores share by their inner dimension, at most 8 parts
_SELECTION_LAUNCHES = 6  # of a step whose rows filter, on one device
_SELECTION_READS = 6.05  # passes over all logits that these make at most
_EXCHANGE_LAUNCHES = (
    4  # over several devices: to trade shares of the vocabulary for rows, and ids for all ids
)
_EXCHANGE_READS = 2.0
_PACKING_BYTES = 2**18  # by which a few layers may pack their temporaries better than many


def breaches(case: ProgramCase, name: Name, found: ProgramFigures) -> list[str]:
    """The gates that a program breaks, a line each."""
    said = [
        *_copies(found),
        *_memory(case, name, found),
        *(_forward(case, name, found) if isinstance(name, Bucket) else []),
        *(_sampling(case, name, found) if isinstance(name, Sampling) else []),
        *(_loop(case, name, found) if isinstance(name, DecodeLoop) else []),
        *(_decisions(case, name, found) if isinstance(name, Sampling | DecodeLoop) else []),
        *_products(case, name, found),
    ]
    if not isinstance(name, Bucket | Sampling | DecodeLoop):
        said += _small(case, name, found)
    return said


def depth_breaches(shallow: ProgramFigures, deep: ProgramFigures) -> list[str]:
    """The figures of one program at two depths that grow with the depth and must not, a line each."""
    if deep.temp_bytes > 1.05 * shallow.temp_bytes + _PACKING_BYTES:
        return [f"temporaries grow with the layers: {shallow.temp_bytes} to {deep.temp_bytes} bytes"]
    if deep.product_bodies != shallow.product_bodies:
        return [f"{deep.product_bodies} distinct products, {shallow.product_bodies} with fewer layers"]
    return []


def temp_limit(case: ProgramCase, bucket: Bucket) -> int:
    """Bytes of temporaries that a forward pass may have: what one layer makes of its tokens, and no weights.

    Activations are counted as float32, which products with codes are before they are scaled. Beside them,
    what the attention kernels leave for each other, once, as layers take turns, and partial sums.
    """
    model, tp = case.config, case.tp
    qkv = (model.num_heads // tp + 2 * model.kv_heads_at(tp) // tp) * model.head_dim
    widths = 2 * model.intermediate_size // tp + model.hidden_size + qkv
    scratch = scratch_bytes(model, bucket, tp=tp, kv_dtype=case.kv_dtype)
    return 4 * bucket.tokens * widths + scratch + _PARTIAL_SUMS_BYTES


def _products(case: ProgramCase, name: Name, found: ProgramFigures) -> Iterator[str]:
    if isinstance(name, Bucket):
        wanted = _LAYER_PRODUCTS * case.layers if case.quantization is Quantization.FP8 else 0
        if found.fp8_products != wanted:
            yield f"{found.fp8_products} products of fp8 with fp8, expected {wanted}"
        if found.peaks != wanted:
            yield f"{found.peaks} peaks of rows, not one for each of {wanted} products of fp8 with fp8"
    if found.product_bodies > MAX_PRODUCT_BODIES:
        yield f"{found.product_bodies} distinct matrix products to tune, more than {MAX_PRODUCT_BODIES}"


def _copies(found: ProgramFigures) -> Iterator[str]:
    if found.weight_copies:
        yield f"{found.weight_copies} copies of a layer's weights"
    if found.pool_copies:
        yield f"{found.pool_copies} copies of the KV pool"


def _pool_bytes(case: ProgramCase, model: ModelConfig) -> int:
    """Bytes of the pages of all of a model's layers."""
    page = page_bytes(model, tp=case.tp, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16, kv_dtype=case.kv_dtype)
    return (NUM_PAGES + 1) * page


def _counted_bytes(case: ProgramCase, model: ModelConfig) -> int:
    return weight_bytes(model, tp=case.tp, dtype=Dtype.BFLOAT16) + _pool_bytes(case, model)


def _memory(case: ProgramCase, name: Name, found: ProgramFigures) -> Iterator[str]:
    """Donated state is written where it is, and what comes and goes is little beside what stays."""
    pool = _pool_bytes(case, case.config)
    sampler = 4 * (MAX_ROWS + 1) * (1 + SLOT_FIELDS)
    donated = {"admit": sampler, "begin with pages": _TABLE_BYTES}
    match name:
        case Bucket():
            wanted = pool + _TABLE_BYTES
        case Sampling():
            wanted = sampler
        case DecodeLoop():
            wanted = pool + _TABLE_BYTES + sampler
        case MinTokensProgram() | LogprobProgram():
            wanted = 0  # log probabilities still need the logits that bans change
        case LogitRuleProgram():
            wanted = 0 if "apply" in name.kind else _rules_bytes(case)
        case str():
            wanted = donated[name]
        case _:
            wanted = pool if "write" in name.kind else 0
    if found.alias_bytes != wanted:
        yield f"{found.alias_bytes} bytes are written in place, not the {wanted} of the donated state"
    beside = found.temp_bytes + max(0, found.output_bytes - wanted)
    whole = _counted_bytes(case, case.whole)
    if beside > MEMORY_TOLERANCE * whole:
        yield f"{beside} bytes beside the arguments, where {whole} are counted for the whole model"


def _rules_bytes(case: ProgramCase) -> int:
    """Bytes on each device of the rules of all slots: its share of the counts, everything else whole."""
    slots, vocab = MAX_ROWS + 1, case.config.padded_vocab_size(case.tp)
    bad_words = (MAX_BAD_WORDS + 1) * MAX_BAD_WORD_TOKENS  # and the last tokens, to compare them with
    words = -(-vocab // MASK_BITS) + 2 * MAX_BIASED_TOKENS + bad_words + _PENALTIES
    return rules_bytes(case.config, tp=case.tp, num_slots=slots) + 4 * slots * words


def _arguments(case: ProgramCase, found: ProgramFigures) -> Iterator[str]:
    counted = _counted_bytes(case, case.config)
    if abs(found.argument_bytes / counted - 1) > MEMORY_TOLERANCE:
        yield f"{found.argument_bytes} bytes of arguments, where {counted} are counted"


def _forward(case: ProgramCase, bucket: Bucket, found: ProgramFigures) -> Iterator[str]:
    model, tp = case.config, case.tp
    limit = temp_limit(case, bucket)
    if found.temp_bytes > limit:
        yield f"{found.temp_bytes} bytes of temporaries, more than {limit}"
    fields = sum(map(has_layers, weight_names(model)))
    most = _WHOLE_FIELDS + _MAX_STATE + model.num_layers * fields
    if found.num_arguments > most:
        yield f"{found.num_arguments} arguments, more than {most}"
    yield from _arguments(case, found)
    sums = 2 * case.layers + 1 if tp > 1 else 0
    result_bytes = bucket.tokens * model.hidden_size * Dtype.BFLOAT16.num_bytes
    if found.collectives != ({("all-reduce", result_bytes): sums} if sums else {}):
        yield f"collectives {dict(found.collectives)}, not {sums} all-reduces of {result_bytes} bytes"
    if found.loops or found.host_waits:
        yield f"{found.loops} loops and {found.host_waits} waits of the host in a forward pass"
    kernels = own_kernels(model, bucket, tp=tp, kv_dtype=case.kv_dtype)
    if found.kernels != kernels:
        yield f"{found.kernels} kernels of ours, not {kernels}"
    yield from _launches(case, bucket, found)
    yield from _command_buffers(found, sums=0 if case.graph_collectives else sums)


def _launches(case: ProgramCase, bucket: Bucket, found: ProgramFigures) -> Iterator[str]:
    """A layer's launches are those of its design.

    Several devices reduce once at the beginning, too: that is begun, awaited and done.
    """
    a_layer = _LAYER_LAUNCHES[case.quantization][case.tp > 1][not bucket.is_decode]
    a_step = _STEP_LAUNCHES + (3 if case.tp > 1 else 0)
    most = case.layers * a_layer + a_step
    if found.launches > most:
        yield f"{found.launches} launches, more than {most}: {a_layer} a layer and {a_step} a step"


def _command_buffers(found: ProgramFigures, *, sums: int) -> Iterator[str]:
    """Everything is in a command buffer but collectives and the few kernels between some of them.

    XLA ends a buffer at each collective, and begins none for fewer than `_FEWEST_LAUNCHES`. What the first
    collective runs beside has a buffer of its own.
    """
    if found.command_buffers is None or found.lone_launches is None or found.longest_run is None:
        yield "XLA does not tell what is in command buffers"
        return
    most = sums + 2 if sums else 1
    if not 1 <= found.command_buffers <= most:
        yield f"{found.command_buffers} command buffers, not 1 ... {most}"
    if found.longest_run >= (_FEWEST_LAUNCHES if sums else 1):
        yield f"{found.longest_run} launches in a row are in no command buffer"


def _loop(case: ProgramCase, loop: DecodeLoop, found: ProgramFigures) -> Iterator[str]:
    yield from _arguments(case, found)
    bucket = Bucket(loop.rows, loop.rows)
    kernels = own_kernels(case.config, bucket, tp=case.tp, kv_dtype=case.kv_dtype)
    if loop.route >= Route.ALL_TO_ALL:
        kernels += len(sampling_kernels(case.config, tp=case.tp))
    if found.kernels != kernels:
        yield f"{found.kernels} kernels of attention and sampling, not {kernels}"


def _decisions(case: ProgramCase, name: Sampling | DecodeLoop, found: ProgramFigures) -> Iterator[str]:
    """Sampling has nothing to decide, and one GPU decides by itself how often loops of decode steps turn.

    Over several, XLA keeps loops with collectives out of command buffers, and the host decides.
    """
    waits = int(isinstance(name, DecodeLoop) and case.tp > 1)
    if found.host_waits > waits:
        yield f"{found.host_waits} waits of the host, more than {waits}"
    if case.tp == 1 or (case.graph_collectives and isinstance(name, Sampling)):
        yield from _command_buffers(found, sums=0)


def _sampling(case: ProgramCase, name: Sampling, found: ProgramFigures) -> Iterator[str]:
    columns = case.config.padded_vocab_size(case.tp)
    wanted = wire_bytes(name.route, rows=name.rows, columns=columns, ranks=case.tp)
    if found.moved_bytes > wanted:
        yield f"{found.moved_bytes} bytes travel, more than {wanted}"
    if name.route >= Route.ALL_TO_ALL:
        yield from _selection(case, name, found)
    gathered = max((size for kind, size in found.collectives if kind == "all-gather"), default=0)
    if gathered > 4 * name.rows:
        yield f"an all-gather of {gathered} bytes, where only {name.rows} ids should be gathered"


def _selection(case: ProgramCase, name: Sampling, found: ProgramFigures) -> Iterator[str]:
    """Few launches read the logits few times, whatever the rows of a step filter by."""
    several = case.tp > 1
    most = _SELECTION_LAUNCHES + several * _EXCHANGE_LAUNCHES
    if found.launches > most:
        yield f"{found.launches} launches to sample, more than {most}"
    logits_bytes = 4 * -(-name.rows // case.tp) * case.config.padded_vocab_size(case.tp)
    passes = found.read_bytes / logits_bytes
    if passes > _SELECTION_READS + several * _EXCHANGE_READS:
        yield f"{found.read_bytes} bytes read to sample, {passes:.2f} times the logits of a rank's rows"
    kernels = len(sampling_kernels(case.config, tp=case.tp))
    if found.kernels != kernels:
        yield f"{found.kernels} sampling kernels, not {kernels}"


def _small(case: ProgramCase, name: Name, found: ProgramFigures) -> Iterator[str]:
    """Programs beside forward passes and sampling decide nothing, and send nothing but log probabilities."""
    if found.host_waits:
        yield f"{found.host_waits} waits of the host, where there should be none"
    numbers = 4 + 2 * NUM_TOP * case.tp  # of a token: four sums, and each rank's likeliest with their ids
    most = 4 * numbers * name.wanted if isinstance(name, LogprobProgram) and case.tp > 1 else 0
    if found.moved_bytes > most:
        yield f"collectives {dict(found.collectives)} move more than {most} bytes"
