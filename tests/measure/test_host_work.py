from albireo_jax.core.plan import StepPlan
from albireo_jax.measure.host_work import bench_host


def test_every_measured_step_decodes_all_rows() -> None:
    plans: list[StepPlan] = []
    bench = bench_host((3, 17), pack=plans.append, steps=40, warmup_steps=5)
    assert [sample.rows for sample in bench.samples] == [3, 17]
    assert [plan.num_rows for plan in plans] == [3] * 45 + [17] * 45
    assert all(plan.num_tokens == plan.num_rows and plan.samples.all() for plan in plans)
    for sample in bench.samples:
        assert len(sample.plan_s) == len(sample.pack_s) == len(sample.commit_s) == 40
        assert min(sample.plan_s) > 0
        assert min(sample.commit_s) > 0
        assert min(sample.step_s) < sample.median_step_s < max(sample.step_s)


def test_page_ends_are_spread_over_the_steps() -> None:
    plans: list[StepPlan] = []
    bench_host((32,), pack=plans.append, steps=64, warmup_steps=0)
    assert {len(plan.update_pages) for plan in plans} == {2}


def test_the_text_has_a_line_per_batch() -> None:
    lines = bench_host((2, 4), pack=lambda _: None, steps=3, warmup_steps=0).render().splitlines()
    assert [line.split()[0] for line in lines] == ["rows", "2", "4"]
