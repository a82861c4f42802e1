// Attention in float32, for comparison with references at small sizes: plain multiply-adds, no tensor units, exact exponentials.
//
// One warp owns one row of the result (a query in the forward pass and for dQ, a key for dK and dV) and walks over the other side 32 rows at
// a time: lane i computes the score of row i, then all lanes add the 32 rows, each its own columns. Every sum has one order. Types, parameters and
// layout are those of attention.cu, which this is joined to; element size 4.

constexpr int F32_COLUMNS = 4;  // columns per lane: head_dim up to 128

INLINE float f32_dot(const float *a, const float *b, int n) {
    float sum = 0.f;
    for (int i = 0; i < n; ++i) sum = fmaf(a[i], b[i], sum);
    return sum;
}
INLINE float f32_warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
INLINE float f32_warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
// sum[j] += factor of lane i * row i, for the 32 rows from `first` on that exist.
INLINE void f32_add_rows(float (&sum)[F32_COLUMNS], float factor, const float *rows, i64 stride, int first, int tokens, int head_dim) {
    int lane = threadIdx.x & 31, count = min(32, tokens - first);
    for (int i = 0; i < count; ++i) {
        float f = __shfl_sync(0xffffffffu, factor, i);
        const float *row = rows + (i64)(first + i) * stride;
#pragma unroll
        for (int j = 0; j < F32_COLUMNS; ++j)
            if (lane + j * 32 < head_dim) sum[j] = fmaf(f, row[lane + j * 32], sum[j]);
    }
}
INLINE void f32_store(float *row, const float (&values)[F32_COLUMNS], float factor, int head_dim) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < F32_COLUMNS; ++j)
        if (lane + j * 32 < head_dim) row[lane + j * 32] = values[j] * factor;
}

INLINE void f32_forward(const AttentionArgs &p) {
    int lane = threadIdx.x & 31, query = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (query >= p.tokens) return;
    const float *q = (const float *)p.q + head_offset(p, p.q_row) + query * p.q_row, *k = (const float *)p.k + head_offset(p, p.k_row);
    const float *v = (const float *)p.v + head_offset(p, p.v_row);
    int end = p.causal ? query + 1 : p.tokens;
    float o[F32_COLUMNS] = {0.f, 0.f, 0.f, 0.f}, top = -__int_as_float(0x7f800000), sum = 0.f;
    for (int first = 0; first < end; first += 32) {
        int key = first + lane;
        float s = key < end ? f32_dot(q, k + key * p.k_row, p.head_dim) * p.scale : -__int_as_float(0x7f800000);
        float high = fmaxf(top, f32_warp_max(s)), shrink = expf(top - high), e = expf(s - high);
        top = high;
        sum = sum * shrink + f32_warp_sum(e);
#pragma unroll
        for (int j = 0; j < F32_COLUMNS; ++j) o[j] *= shrink;
        f32_add_rows(o, e, v, p.v_row, first, end, p.head_dim);
    }
    f32_store((float *)p.out_w + head_offset(p, p.out_row) + query * p.out_row, o, 1.f / sum, p.head_dim);
    if (lane == 0) p.lse[row_values_offset(p) + query] = top + logf(sum);
}

INLINE void f32_delta(const AttentionArgs &p) {
    int lane = threadIdx.x & 31, query = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (query >= p.tokens) return;
    const float *o = (const float *)p.out + head_offset(p, p.out_row) + query * p.out_row;
    const float *g = (const float *)p.dout + head_offset(p, p.dout_row) + query * p.dout_row;
    float sum = 0.f;
    for (int i = lane; i < p.head_dim; i += 32) sum = fmaf(o[i], g[i], sum);
    sum = f32_warp_sum(sum);
    if (lane == 0) p.delta[row_values_offset(p) + query] = sum;
}

INLINE void f32_keys(const AttentionArgs &p) {
    int lane = threadIdx.x & 31, key = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (key >= p.tokens) return;
    const float *q = (const float *)p.q + head_offset(p, p.q_row), *k = (const float *)p.k + head_offset(p, p.k_row) + key * p.k_row;
    const float *v = (const float *)p.v + head_offset(p, p.v_row) + key * p.v_row, *g = (const float *)p.dout + head_offset(p, p.dout_row);
    const float *lse = p.lse + row_values_offset(p), *delta = p.delta + row_values_offset(p);
    float dk[F32_COLUMNS] = {0.f, 0.f, 0.f, 0.f}, dv[F32_COLUMNS] = {0.f, 0.f, 0.f, 0.f};
    for (int first = p.causal ? key / 32 * 32 : 0; first < p.tokens; first += 32) {
        int query = first + lane;
        float prob = 0.f, ds = 0.f;
        if (query < p.tokens && (!p.causal || query >= key)) {
            prob = expf(f32_dot(q + query * p.q_row, k, p.head_dim) * p.scale - lse[query]);
            ds = prob * (f32_dot(g + query * p.dout_row, v, p.head_dim) - delta[query]);
        }
        f32_add_rows(dv, prob, g, p.dout_row, first, p.tokens, p.head_dim);
        f32_add_rows(dk, ds, q, p.q_row, first, p.tokens, p.head_dim);
    }
    f32_store((float *)p.dk + head_offset(p, p.dk_row) + key * p.dk_row, dk, p.scale, p.head_dim);
    f32_store((float *)p.dv + head_offset(p, p.dv_row) + key * p.dv_row, dv, 1.f, p.head_dim);
}

INLINE void f32_queries(const AttentionArgs &p) {
    int lane = threadIdx.x & 31, query = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (query >= p.tokens) return;
    const float *q = (const float *)p.q + head_offset(p, p.q_row) + query * p.q_row, *k = (const float *)p.k + head_offset(p, p.k_row);
    const float *v = (const float *)p.v + head_offset(p, p.v_row), *g = (const float *)p.dout + head_offset(p, p.dout_row) + query * p.dout_row;
    float lse = p.lse[row_values_offset(p) + query], delta = p.delta[row_values_offset(p) + query];
    int end = p.causal ? query + 1 : p.tokens;
    float dq[F32_COLUMNS] = {0.f, 0.f, 0.f, 0.f};
    for (int first = 0; first < end; first += 32) {
        int key = first + lane;
        float ds = 0.f;
        if (key < end) {
            float prob = expf(f32_dot(q, k + key * p.k_row, p.head_dim) * p.scale - lse);
            ds = prob * (f32_dot(g, v + key * p.v_row, p.head_dim) - delta);
        }
        f32_add_rows(dq, ds, k, p.k_row, first, end, p.head_dim);
    }
    f32_store((float *)p.dq + head_offset(p, p.dq_row) + query * p.dq_row, dq, p.scale, p.head_dim);
}

extern "C" __global__ __launch_bounds__(128) void attention_f32_forward(PARAMETERS) { f32_forward(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128) void attention_f32_delta(PARAMETERS) { f32_delta(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128) void attention_f32_keys(PARAMETERS) { f32_keys(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128) void attention_f32_queries(PARAMETERS) { f32_queries(ARGUMENTS); }
