"""What a GPU's programs have to be tuned and compiled for: distinct products, distinct texts of kernels."""

import pytest

from albireo_jax.runtime.batch import bucket_grid
from benchmarks.gpu_programs.compiled_programs import MODELS
from benchmarks.gpu_programs.kernel_assembly import launches
from benchmarks.gpu_programs.matrix_products import product_bodies
from benchmarks.lib.hlo import parse


def test_products_with_other_slices_are_distinct_and_those_of_equal_layers_are_one():
    hlo = """\
HloModule step

%one (p0: bf16[2,8,4], p1: bf16[3,8]) -> bf16[3,4] {
  %p0 = bf16[2,8,4]{2,1,0} parameter(0)
  %p1 = bf16[3,8]{1,0} parameter(1)
  %slice.1 = bf16[1,8,4]{2,1,0} slice(%p0), slice={[0:1], [0:8], [0:4]}, metadata={op_name="a"}
  %bitcast.1 = bf16[8,4]{1,0} bitcast(%slice.1)
  ROOT %dot.1 = bf16[3,4]{1,0} dot(%p1, %bitcast.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (w: bf16[2,8,4], x: bf16[3,8]) -> bf16[3,4] {
  %w = bf16[2,8,4]{2,1,0} parameter(0)
  %x = bf16[3,8]{1,0} parameter(1)
  %y = bf16[8,8]{1,0} parameter(2)
  %f.1 = bf16[3,4]{1,0} fusion(%w, %x), kind=kCustom, calls=%one, backend_config={"a":"1"}
  %f.2 = bf16[3,4]{1,0} fusion(%w, %x), kind=kCustom, calls=%two, backend_config={"a":"2"}
  %c.1 = (bf16[3,8]{1,0}, s8[9]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="b"}, backend_config={"operation_queue_id":"0","beta":0}
  %c.2 = (bf16[3,8]{1,0}, s8[9]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="c"}, backend_config={"operation_queue_id":"1","beta":0}
  ROOT %other = bf16[3,4]{1,0} add(%f.1, %f.2)
}
"""
    first, (head, main) = hlo[hlo.index("%one") :], hlo.split("ENTRY")
    second = first[: first.index("ENTRY")].replace("%one", "%two").replace(".1", ".2")

    def bodies(two):
        return product_bodies(parse(head + two + "ENTRY" + main))

    assert sorted(bodies(second).values()) == [2, 2]
    assert sorted(bodies(second.replace("[0:1]", "[1:2]")).values()) == [1, 1, 2]
    with_beta = bodies(second) + product_bodies(
        parse(hlo.replace("%two", "%one").replace('"beta":0', '"beta":1'))
    )
    assert len(with_beta) == 3


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-32b"])
def test_no_kernels_text_depends_on_the_size_of_a_step(model):
    """The driver compiles each distinct text: those of an engine must not be as many as its buckets."""
    grid = bucket_grid(256, 2048, min_rows=2)
    seen = {
        is_decode: {
            frozenset(launch.kernel for launch in launches(MODELS[model], bucket, tp=1))
            for bucket in grid
            if bucket.is_decode == is_decode
        }
        for is_decode in (True, False)
    }
    assert [len(kinds) for kinds in seen.values()] == [1, 1]
    assert len(frozenset.union(*seen[True], *seen[False])) <= 5
