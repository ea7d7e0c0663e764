"""The attention kernels of a model's steps, and what CUDA's assembler makes of them; needs no GPU.

A kernel that runs out of registers still runs, several times slower: it keeps the rest in memory. The
assembler tells so, and how many blocks of the kernel a core can hold follows from what it tells.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp

from albireo_jax.core.config import Dtype, KvDtype
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.decoder import Projected
from albireo_jax.nn.layers import Rotation
from albireo_jax.ops.cuda.kernels import Architecture, Entry, Kernel, Launch, ptx
from albireo_jax.ops.kv_cache import new_cache
from albireo_jax.ops.norm_cuda import norm_kernel
from albireo_jax.runtime.batch import Bucket, StepInputs
from albireo_jax.runtime.state import PAGE_DTYPES, CacheState
from albireo_jax.runtime.step_attention import AttentionByKernels
from albireo_jax.sampling.sample_cuda import sampling_kernel
from benchmarks.gpu_programs.compiled_programs import (
    MAX_LEN,
    MAX_ROWS,
    MIXED,
    MODELS,
    NUM_PAGES,
    PAGE_SIZE,
)
from benchmarks.gpu_programs.machine_code import Loop, code_instructions, product_loop

KERNEL_MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        **MODELS,
        "smollm2": ModelConfig(
            architecture="LlamaForCausalLM",
            num_layers=30,
            hidden_size=576,
            intermediate_size=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            vocab_size=49152,
            max_position=8192,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        ),
        "wide heads": replace(MODELS["llama-3.1-8b"], num_heads=16, head_dim=256),
    }
)
"""Models whose kernels are looked at: those whose programs are, and heads of half and twice their width."""

ARCHITECTURES = ("sm_80", "sm_90")
KV_DTYPES = (KvDtype.BFLOAT16, KvDtype.INT8, KvDtype.FP8)  # in the order of KV_KIND

_CORE_REGISTERS = 65536
_ROLES: Mapping[str, int] = MappingProxyType({"prepare": 1, "rotate": 4, "decode rows": 3, "chunks": 2})
"""Kernels of a step with decode rows and chunks, in order, and the blocks that a core must hold of each.

The attention kernels' grids are made for so many: with fewer, the last blocks wait for the first.
"""

_SAMPLING_ROLES: Mapping[str, int] = MappingProxyType({"peaks": 2, "draw": 1})
"""Kernels that select tokens; a block takes a row, with all the threads that it may have."""

_RESIDUAL_ROLES: Mapping[str, int] = MappingProxyType({"add": 4})
"""The residual after an all-reduce, with its norm: with fewer blocks a core waits for memory."""

_ADD_INSTRUCTIONS, _CHUNK_INSTRUCTIONS = 70, 95
"""Most instructions of the kernel of residuals, and more of them for each 8 channels that a thread takes."""

LOOP_INSTRUCTIONS: Mapping[tuple[str, KvDtype, int], tuple[int, int]] = MappingProxyType(
    {
        ("decode rows", KvDtype.BFLOAT16, 64): (615, 605),
        ("decode rows", KvDtype.INT8, 64): (725, 725),
        ("decode rows", KvDtype.FP8, 64): (950, 735),
        ("decode rows", KvDtype.BFLOAT16, 128): (1110, 1070),
        ("decode rows", KvDtype.INT8, 128): (1130, 1115),
        ("decode rows", KvDtype.FP8, 128): (1540, 1110),
        ("chunks", KvDtype.BFLOAT16, 64): (550, 550),
        ("chunks", KvDtype.INT8, 64): (800, 810),
        ("chunks", KvDtype.FP8, 64): (845, 795),
        ("chunks", KvDtype.BFLOAT16, 128): (710, 715),
        ("chunks", KvDtype.INT8, 128): (955, 960),
        ("chunks", KvDtype.FP8, 128): (1050, 925),
    }
)
"""Most instructions of the loop over cached tokens for 64 of them, by role, pages and width of a head.

On sm_80 and sm_90; of groups of up to 8 query heads: more take a second product for the same tokens.
"""

_SPILLED_BYTES: Mapping[tuple[str, KvDtype, int, str], int] = MappingProxyType(
    {("chunks", KvDtype.FP8, 256, "sm_80"): 8}
)
"""Bytes of registers that a thread may spill, and of its stack, where that is not 0."""

_PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS, _SHARED = re.compile(r"Used (\d+) registers"), re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """Figures of a kernel from the assembler: registers of a thread, bytes, instructions, products' loop."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: int = 0
    loop: Loop | None = None

    def blocks(self, threads: int) -> int:
        """Blocks of so many threads that the registers of a core suffice for."""
        rounded = -(-self.registers // 8) * 8
        return _CORE_REGISTERS // (rounded * threads)


def launches(
    model: ModelConfig, bucket: Bucket, *, tp: int, kv_dtype: KvDtype = KvDtype.AUTO
) -> tuple[Launch, ...]:
    """The kernel launches on each device in a step of this size: one of the step, then those of a layer."""
    heads, group = model.kv_heads_at(tp) // tp, model.num_heads // model.kv_heads_at(tp)
    pages = (model.num_layers, NUM_PAGES + 1, PAGE_SIZE, heads, model.head_dim)
    seen: list[Launch] = []

    def note(what: Launch, _: Sequence[jax.Array]) -> Sequence[jax.Array]:
        seen.append(what)
        return [jnp.zeros(result.shape, result.dtype) for result in what.results]

    def step() -> None:
        tokens, rows, width = bucket.tokens, bucket.rows, model.head_dim
        dtype, norm_K = jnp.bfloat16, jnp.zeros(width, jnp.bfloat16)
        angles_TH, of_row = jnp.zeros((tokens, width // 2)), jnp.zeros(rows, jnp.int32)
        projected = Projected(
            qkv_TNXK=jnp.zeros((tokens, heads, group + 2, width), dtype),
            bias_NXK=jnp.zeros((heads, group + 2, width), dtype) if model.attention_bias else None,
            q_norm_K=norm_K if model.qk_norm else None,
            k_norm_K=norm_K if model.qk_norm else None,
            eps=model.rms_norm_eps,
            by=Rotation(angles_TH, angles_TH),
        )
        kv = new_cache(pages, PAGE_DTYPES[kv_dtype.resolve(Dtype.BFLOAT16)])
        slots = MAX_ROWS + 1
        state = CacheState(kv, jnp.zeros((slots, MAX_LEN // PAGE_SIZE), jnp.int32))
        inputs = StepInputs(jnp.zeros(tokens, jnp.int32), *(3 * (of_row,)), *(3 * (of_row[:1],)))
        last_Z = jnp.zeros(slots, jnp.int32)
        attention = AttentionByKernels(note)
        found = attention.prepare(model, state, inputs, last_token_Z=last_Z, group=group)
        found.attend(0, projected, found.cache)

    jax.eval_shape(step)
    return tuple(seen)


def own_kernels(model: ModelConfig, bucket: Bucket, *, tp: int, kv_dtype: KvDtype = KvDtype.AUTO) -> int:
    """The number of launches of our kernels in a forward pass of all of a model's layers.

    Over several devices each residual that follows an all-reduce has one, but that of the last layer's end.
    """
    residuals = 2 * model.num_layers - 1 if tp > 1 else 0
    return 1 + model.num_layers * (len(launches(model, bucket, tp=tp, kv_dtype=kv_dtype)) - 1) + residuals


def scratch_bytes(model: ModelConfig, bucket: Bucket, *, tp: int, kv_dtype: KvDtype = KvDtype.AUTO) -> int:
    """Bytes on each device of what a layer's kernels leave for each other: results of cut contexts."""
    _, _, first, *_ = launches(model, bucket, tp=tp, kv_dtype=kv_dtype)
    _, _, *unfinished = first.results
    return sum(result.size * result.dtype.itemsize for result in unfinished)


def kernels(model: ModelConfig, *, tp: int, kv_dtype: KvDtype) -> dict[str, Kernel]:
    """The kernels of a model's steps by what they are for; decode steps launch no chunks."""
    seen = launches(model, MIXED, tp=tp, kv_dtype=kv_dtype)
    return {role: launch.kernel for role, launch in zip(_ROLES, seen, strict=True)}


def sampling_kernels(model: ModelConfig, *, tp: int) -> dict[str, Kernel]:
    """The kernels that select the tokens of a step's rows, by what they are for."""
    entries = zip(_SAMPLING_ROLES, (Entry.PEAKS, Entry.DRAW), strict=True)
    return {role: sampling_kernel(entry, model.padded_vocab_size(tp)) for role, entry in entries}


def residual_kernels(model: ModelConfig) -> dict[str, Kernel]:
    """The kernel that adds what an all-reduce gives and normalises the sum, the same at every degree."""
    return {"add": norm_kernel(model.hidden_size, eps=model.rms_norm_eps)}


def assemble(text: str, architecture: str) -> Assembled:
    """Assemble PTX of one kernel with `ptxas`, which must be on the path; returns the kernel's figures.

    Raises RuntimeError with its words if it refuses, OSError where there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [
            "ptxas",
            "-v",
            f"-arch={architecture}",
            "-o",
            str(source.with_suffix(".cubin")),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"ptxas refuses a kernel for {architecture}: {said}")
        cubin = source.with_suffix(".cubin").read_bytes()
    loop, instructions = product_loop(cubin, architecture), code_instructions(cubin)
    return replace(read_assembler(said), instructions=instructions, loop=loop)


def read_assembler(said: str) -> Assembled:
    """The figures in the words of `ptxas -v` on one kernel. Raises RuntimeError if they are not there."""
    properties, used, shared = (pattern.search(said) for pattern in (_PROPERTIES, _REGISTERS, _SHARED))
    if properties is None or used is None:
        raise RuntimeError(f"ptxas does not tell what a kernel uses: {said}")
    stack, stores, loads = map(int, properties.groups())
    return Assembled(
        registers=int(used.group(1)),
        stack_bytes=stack,
        spill_bytes=stores + loads,
        shared_bytes=int(shared.group(1)) if shared else 0,
    )


def kernel_breaches(role: str, kernel: Kernel, found: Assembled, *, architecture: str) -> list[str]:
    """The ways in which a kernel assembled for an architecture is not as it must be, a line each."""
    said: list[str] = []
    spilled = _SPILLED_BYTES.get((*_attention(role, kernel), architecture), 0)
    if max(found.spill_bytes, found.stack_bytes) > spilled:
        said.append(f"{found.spill_bytes} bytes of spilled registers, {found.stack_bytes} bytes of stack")
    blocks = found.blocks(kernel.threads)
    wanted = {**_ROLES, **_SAMPLING_ROLES, **_RESIDUAL_ROLES}[role]
    if blocks < wanted:
        said.append(f"{found.registers} registers leave room for {blocks} blocks a core, not {wanted}")
    if kernel.entry is Entry.ADD:
        said += _add_breaches(kernel, found)
    limit = _loop_limit(role, kernel, architecture)
    if limit is not None and found.loop is None:
        said.append("no loop holds the matrix products")
    if limit is not None and found.loop is not None:
        said += _loop_breaches(found.loop, limit, _products(role, kernel))
    return said


def loop_instructions(role: str, kernel: Kernel, loop: Loop) -> float:
    """Instructions of the loop over cached tokens for 64 of them; its products tell how many a turn takes."""
    return 4 * loop.instructions * _products(role, kernel) / loop.products


def _products(role: str, kernel: Kernel) -> int:
    """Matrix products for 16 cached tokens: 16 by 16 by 8 numbers each, for scores and for outputs.

    In decode rows each product of int8 values has a second one, which takes off what they are too large by.
    """
    macros = dict(kernel.macros)
    channel_tiles = 2 * -(-int(macros["HEAD_DIM"]) // 32)
    if role != "decode rows":
        return 4 * channel_tiles
    of_stages = 3 if KV_DTYPES[int(macros["KV_KIND"])] is KvDtype.INT8 else 2
    return of_stages * channel_tiles * -(-int(macros["GROUP"]) // 8)


def _add_breaches(kernel: Kernel, found: Assembled) -> list[str]:
    chunks = -(-int(dict(kernel.macros)["WIDTH"]) // (8 * kernel.threads))
    limit = _ADD_INSTRUCTIONS + chunks * _CHUNK_INSTRUCTIONS
    if found.instructions > limit:
        return [f"{found.instructions} instructions for {chunks} times 8 channels a thread, not {limit}"]
    return []


def _loop_breaches(loop: Loop, limit: int, products: int) -> list[str]:
    if loop.products % products:
        return [f"{loop.products} products in the loop over cached tokens, where 16 tokens take {products}"]
    needed = 4 * loop.instructions * products / loop.products
    if needed > limit:
        return [f"the loop over cached tokens has {needed:.0f} instructions for 64 tokens, not {limit}"]
    return []


def _loop_limit(role: str, kernel: Kernel, architecture: str) -> int | None:
    if kernel.entry is not Entry.ATTEND or int(dict(kernel.macros)["GROUP"]) > 8:
        return None
    limits = LOOP_INSTRUCTIONS.get(_attention(role, kernel))
    return None if limits is None else limits[ARCHITECTURES.index(architecture)]


def _attention(role: str, kernel: Kernel) -> tuple[str, KvDtype, int]:
    """The key of limits by role, pages and width of a head; the last two are those of attention alone."""
    macros = {"KV_KIND": "0", "HEAD_DIM": "0"} | dict(kernel.macros)
    return role, KV_DTYPES[int(macros["KV_KIND"])], int(macros["HEAD_DIM"])


def assembled(kernel: Kernel, architecture: str) -> Assembled:
    """The same of a kernel in the source."""
    return assemble(ptx(kernel, Architecture(architecture.removeprefix("sm_"))), architecture)
