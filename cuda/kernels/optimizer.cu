// AdamW over all adapters in one launch, and the global gradient norm.
//
// `table` has six words per tensor: addresses of parameter, gradient, first and second moment (float32), of a bf16 copy of the parameter
// (or 0), and the number of elements. `chunks` has two words per block: tensor, first element. Results do not depend on how tensors are cut.

#define CHUNK 4096

struct Part {
    const u64* tensor;
    i64 from, to;
};

__device__ __forceinline__ Part part_of(const u64* table, const u64* chunks) {
    Part p;
    p.tensor = table + 6 * chunks[2 * blockIdx.x];
    p.from = (i64)chunks[2 * blockIdx.x + 1];
    p.to = min(p.from + (i64)CHUNK, (i64)p.tensor[5]);
    return p;
}

// Sum of squares of a chunk of gradients, in float64: a square of a float32 is exact there.
KERNEL(grad_squares, (double* partial, const u64* table, const u64* chunks), {
    const Part p = part_of(table, chunks);
    const float* gradient = (const float*)p.tensor[1];
    double sum[1] = {0.0};
    for (i64 i = p.from + threadIdx.x; i < p.to; i += THREADS) sum[0] += (double)gradient[i] * gradient[i];
    block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
})

// norm[0] = the global norm, norm[1] = what gradients are multiplied with (PyTorch's clip_grad_norm_); one block.
KERNEL(grad_norm, (double* norm, const double* partial, i64 count, double limit), {
    double sum[1] = {0.0};
    for (i64 i = threadIdx.x; i < count; i += THREADS) sum[0] += partial[i];
    block_sum(sum);
    if (threadIdx.x == 0) {
        const double length = sqrt(sum[0]), scale = limit / (length + 1e-6);
        norm[0] = length;
        norm[1] = limit > 0.0 && isfinite(length) && scale < 1.0 ? (double)(float)scale : 1.0;
    }
})

// torch.optim.AdamW, each operation rounded by itself as on the host, so that both give the same bits. A norm that is not finite changes
// nothing: the caller reads it and stops the run.
KERNEL(adamw, (const u64* table, const u64* chunks, const double* norm, float keep, float beta1, float one_minus_beta1, float beta2,
               float one_minus_beta2, float step_size, float root_bias2, float eps), {
    if (!isfinite(norm[0])) return;
    const float clip = (float)norm[1];
    const Part p = part_of(table, chunks);
    float* parameter = (float*)p.tensor[0];
    const float* gradient = (const float*)p.tensor[1];
    float* first = (float*)p.tensor[2];
    float* second = (float*)p.tensor[3];
    bf16* copy = (bf16*)p.tensor[4];
    for (i64 i = p.from + threadIdx.x; i < p.to; i += THREADS) {
        const float g = clip == 1.0f ? gradient[i] : __fmul_rn(gradient[i], clip);
        const float m = __fadd_rn(__fmul_rn(beta1, first[i]), __fmul_rn(one_minus_beta1, g));
        const float v = __fadd_rn(__fmul_rn(beta2, second[i]), __fmul_rn(__fmul_rn(one_minus_beta2, g), g));
        const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), root_bias2), eps);
        const float x = __fsub_rn(__fmul_rn(parameter[i], keep), __fdiv_rn(__fmul_rn(step_size, m), root));
        first[i] = m;
        second[i] = v;
        parameter[i] = x;
        if (copy) put(copy + i, x);
    }
})
