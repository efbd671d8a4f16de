"""The tables of hand-made traces and the kinds of real kernel names."""

import pytest

from cs336_systems.instruments.trace import category, category_rows, kernel_rows, range_rows, short_name, work_in

GEMM = "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_warpgroupsize1x1x1_execute_segment_k_off_kernel"
EXP = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel_cuda(at::TensorIteratorBase&)"
    "::{lambda()#2}::operator()() const::{lambda(float)#1}, std::array<char*, 2ul> >(int, ...)"
)
SUM = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, "
    "at::native::sum_functor<float, float, float>::operator()(at::TensorIterator&)::{lambda(float, float)#1}>, "
    "unsigned int, float, 4, 4> >(...)"
)
FOREACH = (
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)"
    "::TensorListMetadata<3>, at::native::(anonymous namespace)::PointwiseOpScalarListFunctor<float, 3, 3, 0>, "
    "std::divides<float>, float>(...)"
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (GEMM, "matmuls"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmuls"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_256x128_8x4_nn_align1>(...)", "matmuls"),
        ("ampere_sgemm_128x64_tn", "matmuls"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, ...>(...)", "matmuls"),
        ("triton_tem_fused_mm_3", "matmuls"),
        ("aten::bmm", "matmuls"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 4, cutlass::bfloat16_t>>", "fused attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_6", "fused attention"),
        (EXP, "elementwise"),
        ("triton_poi_fused__to_copy_add_mul_silu_4", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::masked_fill_kernel(...)>", "elementwise"),
        ("void at::native::elementwise_kernel_with_index<int, at::native::arange_cuda_out(...)>", "elementwise"),
        ("aten::masked_fill_", "elementwise"),
        (SUM, "reductions"),
        ("triton_per_fused__softmax_2", "reductions"),
        ("triton_red_fused_mean_pow_rsqrt_1", "reductions"),
        ("aten::amax", "reductions"),
        (FOREACH, "multi-tensor"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("Memset (Device)", "copies and fills"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, ...>", "copies and fills"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copies and fills"),
        ("void at::native::vectorized_gather_kernel<16, long>(...)", "indexing"),
        ("void at::native::indexing_backward_kernel<float, 4>(...)", "indexing"),
        ("aten::view", "other"),
    ],
)  # fmt: skip
def test_kinds(name, kind):
    assert category(name) == kind


def test_short_names():
    assert short_name(EXP, 60) == "vectorized_elementwise: exp_kernel_cuda"
    assert short_name(SUM) == "reduce: sum_functor"
    assert short_name(EXP) == "vectorized_elementwise: exp_kernel_…"
    assert short_name(FOREACH).startswith("multi_tensor_apply: PointwiseOp")
    assert len(short_name(GEMM)) == 36
    assert short_name("aten::mm") == "aten::mm"


def annotation(name, start, end):
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": end - start, "tid": 1}


def kernel(name, launched, start, duration, correlation, thread=1):
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 1, "tid": thread,
         "args": {"correlation": correlation}},
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "tid": 7,
         "args": {"correlation": correlation}},
    ]  # fmt: skip


@pytest.fixture
def gpu_trace():
    """Two steps of 1000 µs. Kernels run long after their launch; the backward pass launches from thread 2."""
    events = []
    for step in (0, 1):
        t = 1000 * step
        events += [
            annotation("forward", t, t + 100),
            annotation("scores", t + 20, t + 30),
            annotation("softmax", t + 30, t + 40),
            annotation("backward", t + 110, t + 200),
            annotation("optimizer", t + 210, t + 250),
            *kernel(GEMM, t + 10, t + 300, 40, 10 * step + 1),
            *kernel(GEMM, t + 25, t + 340, 20, 10 * step + 2),
            *kernel(EXP, t + 35, t + 370, 10, 10 * step + 3),
            *kernel(GEMM, t + 150, t + 400, 100, 10 * step + 4, thread=2),
            *kernel(SUM, t + 160, t + 500, 20, 10 * step + 5, thread=2),
            *kernel(FOREACH, t + 220, t + 520, 30, 10 * step + 6),
            {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": t + 600, "dur": 5, "tid": 7,
             "args": {"correlation": 999}},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": t + 5, "dur": 9, "tid": 1},
        ]  # fmt: skip
    return {"traceEvents": events}


def test_kernels_belong_to_the_range_that_launched_them(gpu_trace):
    rows = {row["range"].strip(): row for row in range_rows(work_in(gpu_trace), 2, {"scores": 3e9})}
    assert list(rows) == ["forward", "scores", "softmax", "backward", "optimizer", "other", "step"]
    assert {name: row["busy_ms"] for name, row in rows.items()} == pytest.approx(
        {"forward": 0.07, "scores": 0.02, "softmax": 0.01, "backward": 0.12, "optimizer": 0.03, "other": 0.005,
         "step": 0.225}
    )  # fmt: skip
    assert rows["forward"]["span_ms"] == pytest.approx(0.08)  # 300 to 380, of which 10 idle
    assert rows["forward"]["calls"] == 3
    assert rows["forward"]["matmul_%"] == 85.71
    assert rows["scores"]["GFLOP"] == 3
    assert rows["step"]["share_%"] == 100


def test_kinds_per_phase(gpu_trace):
    rows = {row["kind"]: row for row in category_rows(work_in(gpu_trace), 2)}
    assert next(iter(rows)) == "matmuls"
    assert rows["matmuls"]["forward"] == pytest.approx(0.06)
    assert rows["matmuls"]["backward"] == pytest.approx(0.1)
    assert rows["matmuls"]["step"] == pytest.approx(0.16)
    assert rows["reductions"]["forward"] == 0
    assert rows["copies and fills"]["other"] == pytest.approx(0.005)
    assert sum(row["share_%"] for row in rows.values()) == pytest.approx(100, abs=0.3)


def test_kernels_per_phase(gpu_trace):
    rows = kernel_rows(work_in(gpu_trace), 2)
    first = {row["range"]: row for row in rows if row["rank"] == 1}
    assert first["forward"]["kernel"] == GEMM
    assert first["forward"]["calls"] == 2
    assert first["forward"]["ms"] == pytest.approx(0.06)
    assert first["optimizer"]["kind"] == "multi-tensor"
    assert first["step"]["calls"] == 3
    assert sum(row["ms"] for row in rows if row["range"] == "step") == pytest.approx(0.225)


def test_operators_count_without_what_they_call():
    def op(name, start, end, thread=1):
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": end - start, "tid": thread}

    trace = {
        "traceEvents": [
            annotation("forward", 0, 100),
            op("aten::linear", 0, 50), op("aten::t", 0, 10), op("aten::mm", 10, 40), op("aten::empty", 12, 14),
            op("aten::add", 50, 60), op("aten::exp", 0, 5, thread=2),
        ]
    }  # fmt: skip
    own = {one.name: one.duration for one in work_in(trace)}
    assert own == {
        "aten::linear": 10, "aten::t": 10, "aten::mm": 28, "aten::empty": 2, "aten::add": 10, "aten::exp": 5
    }  # fmt: skip
