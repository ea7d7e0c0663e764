"""EngineConfig to running engine: the one place that knows every concrete class."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from albireo_jax.core.config import Dtype, EngineConfig
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.memory import MemoryPlan
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.model_files import find_model
from albireo_jax.core.plan import CopyCosts
from albireo_jax.core.sampling_defaults import served_defaults
from albireo_jax.core.sizes import EngineSizes, engine_sizes, resolve_step_tokens
from albireo_jax.engine.energy import Meter, open_meter
from albireo_jax.engine.engine_client import EngineFigures, read_figures
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.interpreter import release_interpreter, settle_interpreter
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.request_metrics import MetricsSnapshot
from albireo_jax.engine.service import EngineService
from albireo_jax.engine.timeline import Timeline
from albireo_jax.models.registry import load_model, model_config, random_model
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.sharding import TP, make_mesh
from albireo_jax.runtime.attention_choice import choose_attention
from albireo_jax.runtime.batch import Bucket, bucket_grid
from albireo_jax.runtime.compile import Progress, use_persistent_cache
from albireo_jax.runtime.device_memory import budget_bytes, device_bytes, take_memory
from albireo_jax.runtime.executor import JaxExecutor
from albireo_jax.runtime.logit_rule_programs import LogitRulesShape, new_rules
from albireo_jax.runtime.sampling_programs import choose_sampling
from albireo_jax.runtime.state import StateShape, plan_state
from albireo_jax.runtime.step import LayerLoop, StepProgram, default_products
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.text.grammar.compiler import grammar_compiler
from albireo_jax.text.grammar.mask_threads import ThreadedMaskMaker
from albireo_jax.text.tokenizer import Tokenizer

_MAX_CPU_UNROLLED_LAYERS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An engine whose loop no thread runs yet: whoever steps it is its engine thread.

    `copy_costs` were measured if it has host pages.
    """

    config: EngineConfig
    model_config: ModelConfig
    dtype: Dtype
    memory: MemoryPlan
    limits: EngineLimits
    model: Decoder
    executor: JaxExecutor
    timeline: Timeline
    energy: Meter
    copy_costs: CopyCosts | None
    loop: EngineLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedService:
    """A service whose thread does not run yet, and what its front ends need to know."""

    ready: Prepared
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    service: EngineService

    def figures(self) -> EngineFigures:
        """The engine's measurements beside its statistics."""
        return read_figures(self.ready.timeline, self.ready.energy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A running engine and its parts, ready to take requests through `frontend`."""

    config: EngineConfig
    model_config: ModelConfig
    memory: MemoryPlan
    limits: EngineLimits
    served_name: str
    tokenizer: Tokenizer
    model: Decoder
    executor: JaxExecutor
    timeline: Timeline
    energy: Meter
    service: EngineService
    frontend: Frontend

    def update_weights(self, tree: DecoderWeights | Mapping[str, Any]) -> None:
        """Compute all later steps with new arrays; see `Decoder.replace_weights` for what is taken.

        Later requests find no prefix that the old weights computed.
        """
        self.model.replace_weights(tree)
        self.executor.replace_weights(self.model.weights())
        self.service.forget_prefixes()

    def request_totals(self) -> MetricsSnapshot:
        """Totals of the requests that passed through the frontend."""
        return self.frontend.metrics.snapshot()

    async def figures(self) -> EngineFigures:
        """The engine's measurements beside its statistics."""
        return read_figures(self.timeline, self.energy)

    def close(self) -> None:
        """Stop the engine thread; open requests end as aborted."""
        self.frontend.close()
        release_interpreter()


def launch(
    config: EngineConfig, *, progress: Progress | None = None, measure_sampling: bool = False
) -> Engine:
    """Load the model, compile every step, and start the engine thread; see `prepare`."""
    served = prepare_service(config, progress=progress, measure_sampling=measure_sampling)
    ready, tokenizer, ids = served.ready, served.tokenizer, served.eos_token_ids
    defaults = served_defaults(config)
    frontend = Frontend(served.service, tokenizer, limits=ready.limits, eos_token_ids=ids, defaults=defaults)
    settle_interpreter()
    return Engine(
        config=ready.config,
        model_config=ready.model_config,
        memory=ready.memory,
        limits=ready.limits,
        served_name=find_model(config.model).name,
        tokenizer=tokenizer,
        model=ready.model,
        executor=ready.executor,
        timeline=ready.timeline,
        energy=ready.energy,
        service=served.service,
        frontend=frontend,
    )


def prepare_service(
    config: EngineConfig, *, progress: Progress | None = None, measure_sampling: bool = False
) -> PreparedService:
    """Load tokenizer and model and compile every step; the service is not started. See `prepare`."""
    files = find_model(config.model)
    tokenizer = Tokenizer.from_files(files)
    served_defaults(config)  # refuses a broken file before the model loads
    ready = prepare(config, progress=progress, measure_sampling=measure_sampling)
    eos_token_ids = tuple(dict.fromkeys((*tokenizer.eos_token_ids, *ready.model_config.eos_token_ids)))
    compiler = grammar_compiler(tokenizer, vocab_size=ready.limits.vocab_size, eos_token_ids=eos_token_ids)
    return PreparedService(
        ready=ready,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        service=EngineService(ready.loop, ready.limits, compiler=compiler),
    )


def prepare(
    config: EngineConfig, *, progress: Progress | None = None, measure_sampling: bool = False
) -> Prepared:
    """Load the model and compile every step, without a tokenizer and without starting a thread.

    On GPUs every program also runs once, on padding: they load its kernels and record its graphs then.

    `progress` is called as buckets are compiled. `measure_sampling` times the sampling stage alone,
    so that the task table can tell T4 from T3. Raises ValueError or ModelError for what cannot be
    served, CapacityError where it does not fit.
    """
    files = find_model(config.model)
    model = replace(model_config(files), quantization=config.quantization)

    def load(dtype: Dtype, mesh: Mesh) -> Decoder:
        return load_model(files, config=model, dtype=dtype, mesh=mesh, form=_layer_form(config, mesh))

    return _prepare(config, model, load=load, progress=progress, measure_sampling=measure_sampling)


def prepare_random(
    config: EngineConfig,
    model: ModelConfig,
    *,
    seed: int = 0,
    buckets: tuple[Bucket, ...] | None = None,
    progress: Progress | None = None,
    measure_sampling: bool = False,
) -> Prepared:
    """The same for a model of this shape with random weights; no files are read, whatever `config` names.

    `buckets` are the sizes that steps are padded to, where fewer than all of the grid will do.
    """
    model = replace(model, quantization=config.quantization)

    def load(dtype: Dtype, mesh: Mesh) -> Decoder:
        return random_model(model, dtype=dtype, mesh=mesh, seed=seed, form=_layer_form(config, mesh))

    return _prepare(
        config, model, load=load, buckets=buckets, progress=progress, measure_sampling=measure_sampling
    )


def _prepare(
    config: EngineConfig,
    model: ModelConfig,
    *,
    load: Callable[[Dtype, Mesh], Decoder],
    progress: Progress | None,
    measure_sampling: bool,
    buckets: tuple[Bucket, ...] | None = None,
) -> Prepared:
    model.check_tp(config.parallel.tp)
    use_virtual_devices(config.parallel.virtual_devices)
    take_memory(config.cache.memory_share)
    mesh = make_mesh(config.parallel.tp)
    device = device_bytes(mesh, memory_share=config.cache.memory_share)
    config = resolve_step_tokens(config, device_bytes=device)
    dtype = config.dtype or _default_dtype(mesh)
    sizes = _sizes(config, model, mesh, dtype=dtype)
    use_persistent_cache(cache_folder())
    decoder = load(dtype, mesh)
    executor = _executor(
        config,
        model,
        decoder=decoder,
        mesh=mesh,
        sizes=sizes,
        dtype=dtype,
        buckets=buckets or _buckets(config, mesh, dtype),
        progress=progress,
    )
    if measure_sampling:
        executor.measure_sampling()
    copy_costs = executor.measure_copies() if sizes.limits.num_host_pages else None
    if not _is_cpu(mesh):  # a CPU has nothing to load
        executor.warm_up()
    timeline = Timeline()
    scheduler = _scheduler(config, sizes.limits, copy_costs)
    return Prepared(
        config=config,
        model_config=model,
        dtype=dtype,
        memory=sizes.memory,
        limits=sizes.limits,
        model=decoder,
        executor=executor,
        timeline=timeline,
        energy=_energy_meter(mesh),
        copy_costs=copy_costs,
        loop=EngineLoop(scheduler, executor, depth=config.scheduler.depth, timeline=timeline),
    )


def _scheduler(config: EngineConfig, limits: EngineLimits, copy_costs: CopyCosts | None) -> Scheduler:
    """A scheduler that has masks made by threads beside the engine's."""
    return Scheduler(
        config.scheduler,
        limits,
        shares_prefixes=config.cache.prefix_caching,
        copy_costs=copy_costs,
        mask_maker=ThreadedMaskMaker(),
    )


def use_virtual_devices(count: int) -> None:
    """Let the CPU stand for `count` devices; 0 changes nothing. Must come before the first array.

    Raises RuntimeError if JAX already started with other devices.
    """
    if not count:
        return
    jax.config.update("jax_platforms", "cpu")
    if jax.config.jax_num_cpu_devices != count:
        jax.config.update("jax_num_cpu_devices", count)


def _sizes(config: EngineConfig, model: ModelConfig, mesh: Mesh, *, dtype: Dtype) -> EngineSizes:
    return engine_sizes(
        config,
        model,
        budget_bytes=budget_bytes(mesh, memory_share=config.cache.memory_share),
        dtype=dtype,
        fills_memory=not _is_cpu(mesh),
    )


def _executor(
    config: EngineConfig,
    model: ModelConfig,
    *,
    decoder: Decoder,
    mesh: Mesh,
    sizes: EngineSizes,
    dtype: Dtype,
    buckets: tuple[Bucket, ...],
    progress: Progress | None,
) -> JaxExecutor:
    num_slots = config.scheduler.max_rows + 1
    rules = LogitRulesShape(
        num_slots=num_slots,
        padded_vocab=model.padded_vocab_size(config.parallel.tp),
        max_len=sizes.limits.max_model_len,
    )
    shape = StateShape(
        num_layers=model.num_layers,
        num_pages=sizes.memory.num_pages + 1,
        page_size=config.cache.page_size,
        num_kv_heads=model.kv_heads_at(config.parallel.tp),
        head_dim=model.head_dim,
        num_slots=num_slots,
        pages_per_slot=-(-sizes.limits.max_model_len // config.cache.page_size),
    )
    return JaxExecutor(
        _step_program(config, model, mesh, dtype=dtype),
        decoder.weights(),
        plan_state(shape, mesh, axis=TP, kv_dtype=config.cache.kv_dtype.resolve(dtype)),
        buckets=buckets,
        rules=new_rules(rules, mesh, axis=TP),
        max_len=rules.max_len,
        max_logprobs=sizes.limits.max_logprobs,
        num_host_pages=sizes.limits.num_host_pages,
        decode_steps=config.scheduler.decode_steps,
        progress=progress,
    )


def _step_program(config: EngineConfig, model: ModelConfig, mesh: Mesh, *, dtype: Dtype) -> StepProgram:
    return StepProgram(
        model=model,
        mesh=mesh,
        axis=TP,
        page_size=config.cache.page_size,
        sampling=config.sampling,
        layers=_layer_loop(config, model, mesh),
        products=config.gpu.product_library or default_products(model, mesh),
        graph_collectives=config.gpu.cuda_graph_collectives,
        attention=choose_attention(
            config.attention, model, mesh, dtype=dtype, kv_dtype=config.cache.kv_dtype
        ),
        sample_launch=choose_sampling(mesh),
    )


def _buckets(config: EngineConfig, mesh: Mesh, dtype: Dtype) -> tuple[Bucket, ...]:
    """All sizes that the steps of this configuration may need."""
    return bucket_grid(
        config.scheduler.max_rows,
        config.scheduler.max_step_tokens,
        # XLA makes a product with one row a multiplication and a sum: in bfloat16 on a CPU by a naive loop, 7
        # to 10 times slower than two rows; a GPU may store the summands, which are as many as the weights.
        min_rows=1 if _is_cpu(mesh) and dtype is Dtype.FLOAT32 else 2,
    )


def _layer_form(config: EngineConfig, mesh: Mesh) -> LayerForm:
    """The form in which the layers' weights are held."""
    return config.gpu.layer_form or (LayerForm.STACKED if _is_cpu(mesh) else LayerForm.UNSTACKED)


def _layer_loop(config: EngineConfig, model: ModelConfig, mesh: Mesh) -> LayerLoop:
    """Unrolled on GPUs and over unstacked weights; else only where so few layers compile in seconds."""
    if _layer_form(config, mesh) is LayerForm.UNSTACKED:
        return LayerLoop.UNSTACKED
    if not _is_cpu(mesh):
        return LayerLoop.UNROLLED
    few = config.gpu.layer_form is None and model.num_layers <= _MAX_CPU_UNROLLED_LAYERS
    return LayerLoop.UNSTACKED_DECODE if few else LayerLoop.SCANNED


def _energy_meter(mesh: Mesh) -> Meter:
    devices = mesh.devices.flat
    return open_meter([device.local_hardware_id for device in devices], platform=devices[0].platform)


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _default_dtype(mesh: Mesh) -> Dtype:
    """float32 on CPU, where bfloat16 is slow to scatter and to multiply by one row."""
    return Dtype.FLOAT32 if _is_cpu(mesh) else Dtype.BFLOAT16


def cache_folder() -> Path | None:
    """Folder of compiled programs, one for each kind of host: CPU programs fit no other kind.

    None for a user without a home.
    """
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "albireo_jax" / f"xla-{jax.__version__}-{platform.machine()}"
