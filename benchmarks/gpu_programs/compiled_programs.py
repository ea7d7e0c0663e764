"""The engine's own programs, compiled for H100s on a machine that has none; no array is ever made.

Sizes are those of an engine with default limits, but for two: the depth of the model, as every layer compiles
for itself, and the number of pages, which no program depends on.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from albireo_jax.core.config import Dtype, KvDtype, Quantization, SamplingMode
from albireo_jax.core.model_config import Llama3RopeScaling, ModelConfig
from albireo_jax.nn.axes import has_layers
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.nn.quantise import weight_dtypes
from albireo_jax.nn.shapes import layer_name, weight_shapes
from albireo_jax.nn.sharding import TP, placement, shardings
from albireo_jax.ops.cuda.kernels import Architecture, LaunchFn, launch_on
from albireo_jax.runtime.batch import ADMISSIONS, SLOT_FIELDS, Bucket, layout
from albireo_jax.runtime.decode_loop import DecodeLoop, DecodeLoops
from albireo_jax.runtime.executor import Sampling
from albireo_jax.runtime.logit_rule_calls import LogitRuleCalls, LogitRuleProgram
from albireo_jax.runtime.logit_rule_programs import LogitRulesShape, new_rules, rules_specs
from albireo_jax.runtime.logprob_calls import LogprobCalls, LogprobProgram
from albireo_jax.runtime.min_tokens import MinTokensCalls, MinTokensProgram
from albireo_jax.runtime.sampling_programs import admit, jit_sample, routes
from albireo_jax.runtime.state import CacheState, DeviceState, StateShape, plan_state
from albireo_jax.runtime.step import LayerLoop, StepProgram, begin_with_pages, default_products, jit_forward
from albireo_jax.runtime.step_attention import AttentionByKernels
from albireo_jax.runtime.transfer import CopyProgram, HostPages
from albireo_jax.sampling.logits import Rules

PAGE_SIZE, MAX_ROWS, MAX_LEN, NUM_PAGES, NUM_HOST_PAGES = 16, 64, 8192, 4096, 32
NUM_TOP = 20
DECODE, MIXED = Bucket(MAX_ROWS, MAX_ROWS), Bucket(512, MAX_ROWS)
LOOP_STEPS, LOOP_ROWS = 4, 8
_H100 = launch_on(Architecture.HOPPER)

_LLAMA = partial(
    ModelConfig,
    architecture="LlamaForCausalLM",
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    ),
)

MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3.1-8b": _LLAMA(num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32),
        "llama-3.1-70b": _LLAMA(num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64),
        "qwen2.5-32b": ModelConfig(
            architecture="Qwen2ForCausalLM",
            num_layers=64,
            hidden_size=5120,
            intermediate_size=27648,
            num_heads=40,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=152064,
            max_position=131072,
            rms_norm_eps=1e-5,
            rope_theta=1000000.0,
            attention_bias=True,
        ),
    }
)
"""Shapes of the models whose programs are looked at."""

Name = (
    Bucket | Sampling | MinTokensProgram | LogitRuleProgram | LogprobProgram | DecodeLoop | CopyProgram | str
)
"""A program, as the executor names it; "admit" and "begin with pages" for those that write slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramCase:
    """A model by its name in `MODELS`, cut to `layers` layers, over `tp` devices; quantised if it says so.

    `kv_dtype` is that of its KV pages. With `graph_collectives` CUDA graphs hold its collectives too.
    """

    model: str
    tp: int
    layers: int
    quantization: Quantization | None = None
    kv_dtype: KvDtype = KvDtype.AUTO
    graph_collectives: bool = False

    @property
    def config(self) -> ModelConfig:
        """The model's shape at this depth, quantised or not."""
        return replace(self.whole, num_layers=self.layers)

    @property
    def whole(self) -> ModelConfig:
        """The same at full depth."""
        return replace(MODELS[self.model], quantization=self.quantization)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledProgram:
    """A program's text, its memory per device in bytes, and the order of its launches where XLA gave it."""

    text: str
    argument_bytes: int
    alias_bytes: int
    temp_bytes: int
    output_bytes: int
    launches: str


def h100s(target_config: str) -> tuple[Any, ...]:
    """Eight H100s of one machine that need not exist; `target_config` describes one to XLA.

    Raises RuntimeError where JAX's CUDA plugin is not installed.
    """
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target_config, topology="1x1x8"
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise RuntimeError(f"JAX cannot compile for CUDA here: {error}") from error
    return tuple(described.devices)


def mesh_of(devices: Iterable[Any], tp: int) -> Mesh:
    """The engine's mesh over the first `tp` of some devices."""
    return Mesh(np.array(list(devices)[:tp]), (TP,), axis_types=(AxisType.Auto,))


def step_program(case: ProgramCase, mesh: Mesh, launch: LaunchFn = _H100) -> StepProgram:
    """The step program that `albireo_jax.launch` builds for this model on GPUs; `launch` runs its kernels."""
    return StepProgram(
        model=case.config,
        mesh=mesh,
        axis=TP,
        page_size=PAGE_SIZE,
        sampling=SamplingMode.SHARDED,
        layers=LayerLoop.UNSTACKED,
        attention=AttentionByKernels(launch),
        sample_launch=launch,
        products=default_products(case.config, mesh),
        graph_collectives=case.graph_collectives,
    )


def weights_of(program: StepProgram) -> DecoderWeights:
    """The weights, bfloat16 where they are not codes or scales, as shapes with their shardings.

    They are one array per layer where the program's steps read them so.
    """
    mesh, shapes = program.mesh, weight_shapes(program.model, program.mesh.size)
    dtypes = weight_dtypes(program.model, jnp.dtype(jnp.bfloat16))

    def field(name: str) -> Any:
        def array(own: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtypes[name], sharding=placement(mesh, own, dtypes[name]))

        if program.layers is not LayerLoop.UNSTACKED or not has_layers(name):
            return array(name, shapes[name])
        num_layers, *shape = shapes[name]
        return (array(layer_name(name), tuple(shape)),) * num_layers

    return DecoderWeights(**{name: field(name) for name in shapes})


def state_of(program: StepProgram, kv_dtype: KvDtype = KvDtype.AUTO) -> DeviceState:
    """The device state, as shapes with their shardings."""
    model, mesh = program.model, program.mesh
    shape = StateShape(
        num_layers=model.num_layers,
        num_pages=NUM_PAGES + 1,
        page_size=PAGE_SIZE,
        num_kv_heads=model.kv_heads_at(mesh.size),
        head_dim=model.head_dim,
        num_slots=MAX_ROWS + 1,
        pages_per_slot=MAX_LEN // PAGE_SIZE,
    )
    pages = kv_dtype.resolve(Dtype.BFLOAT16)
    return plan_state(shape, mesh, axis=TP, kv_dtype=pages).arrays


def rules_of(program: StepProgram) -> Rules:
    """The rules of all slots, as shapes with their shardings."""
    vocab = program.model.padded_vocab_size(program.mesh.size)
    shape = LogitRulesShape(num_slots=MAX_ROWS + 1, padded_vocab=vocab, max_len=MAX_LEN)
    shapes = jax.eval_shape(lambda: new_rules(shape, program.mesh, axis=TP))
    return jax.tree.map(_placed, shapes, shardings(program.mesh, rules_specs(TP)))


def programs(
    program: StepProgram, kv_dtype: KvDtype = KvDtype.AUTO
) -> dict[Name, Callable[[], jax.stages.Lowered]]:
    """The programs of steps and of page copies, ready to be lowered, as `JaxExecutor` has them.

    Of buckets and of copies only the largest; of loops of decode steps those of `LOOP_ROWS` rows.
    """
    state = state_of(program, kv_dtype)
    cache, sampler = state
    table_ZM = cache.page_table_ZM
    copies = HostPages(cache.kv, program.mesh, axis=TP, num_host_pages=NUM_HOST_PAGES).programs()

    def lower_sampling(name: Sampling) -> jax.stages.Lowered:
        rows = name.rows
        return jit_sample(program, name.route).lower(sampler, program.logits(rows), program.ints(3 * rows))

    found: dict[Name, Callable[[], jax.stages.Lowered]] = {
        bucket: partial(_lower_forward, program, bucket, cache=cache) for bucket in (DECODE, MIXED)
    }
    for route in routes(program):
        found[Sampling(MAX_ROWS, route)] = partial(lower_sampling, Sampling(MAX_ROWS, route))
    found |= MinTokensCalls(program).programs((MAX_ROWS,), sampler)
    found["admit"] = lambda: admit.lower(sampler, program.ints(ADMISSIONS, 1 + SLOT_FIELDS))
    found["begin with pages"] = lambda: begin_with_pages.lower(
        table_ZM, program.ints(ADMISSIONS, 1 + table_ZM.shape[1])
    )
    found |= LogitRuleCalls(program, rules_of(program), max_len=MAX_LEN).programs((MAX_ROWS,))
    found |= LogprobCalls(program, weights_of(program), num_top=NUM_TOP).programs((DECODE, MIXED))
    found |= _loops(program).programs((Bucket(LOOP_ROWS, LOOP_ROWS),), state)
    return found | {name: lower for name, lower in copies.items() if name.pages == NUM_HOST_PAGES}


def _loops(program: StepProgram) -> DecodeLoops:
    """Loops of decode steps with the weights in the form that `JaxExecutor` gives them."""
    loops = DecodeLoops(program, max_steps=LOOP_STEPS)
    weights = weights_of(replace(program, layers=LayerLoop.UNSTACKED))
    loops.use_weights({LayerLoop.UNSTACKED: weights}, weights)
    return loops


def compile_program(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compile as a GPU would have it compiled, and read what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        # Before passes over the launches and, where these change anything, after; this one sorts last.
        found = sorted(Path(folder).glob("*.thunk_sequence*.txt"))
        launches = found[-1].read_text() if found else ""
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA tells the memory of every GPU program"
    return CompiledProgram(
        text=compiled.as_text() or "",
        argument_bytes=memory.argument_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        launches=launches,
    )


def _lower_forward(program: StepProgram, bucket: Bucket, *, cache: CacheState) -> jax.stages.Lowered:
    weights, shape = weights_of(program), layout(bucket, PAGE_SIZE)
    return jit_forward(program, shape, weights).lower(
        weights, cache, program.ints(MAX_ROWS + 1), program.ints(shape.num_words)
    )


def _placed(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
