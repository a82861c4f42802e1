// Operations element by element over views of rows: block (row, group of THREADS V columns); and sums over whole matrices.

#define AT(V)                                                                    \
    const i64 row = blockIdx.x, col = ((i64)blockIdx.y * THREADS + threadIdx.x) * (V); \
    if (col >= cols) return;

// m = silu(gate) value
template <class T, int V>
__device__ __forceinline__ void swiglu(T* m, i64 mstride, const T* gate, i64 gstride, const T* value, i64 vstride, i64 cols) {
    AT(V)
    float g[V], v[V];
    load<V>(gate + row * gstride + col, g);
    load<V>(value + row * vstride + col, v);
#pragma unroll
    for (int i = 0; i < V; i++) g[i] = g[i] * sigmoid(g[i]) * v[i];
    store<V>(m + row * mstride + col, g);
}

// With s = sigmoid(gate): dgate = dm value (s + silu (1 - s)), dvalue = dm silu. The results may replace gate and value.
template <class T, int V>
__device__ __forceinline__ void swiglu_bwd(T* dgate, i64 dgstride, T* dvalue, i64 dvstride, const T* dm, i64 dmstride, const T* gate, i64 gstride,
                                           const T* value, i64 vstride, i64 cols) {
    AT(V)
    float g[V], v[V], d[V];
    load<V>(gate + row * gstride + col, g);
    load<V>(value + row * vstride + col, v);
    load<V>(dm + row * dmstride + col, d);
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float s = sigmoid(g[i]), silu = g[i] * s;
        g[i] = d[i] * v[i] * (silu * (1.0f - s) + s);
        v[i] = d[i] * silu;
    }
    store<V>(dgate + row * dgstride + col, g);
    store<V>(dvalue + row * dvstride + col, v);
}

// y = h + gate o, the gate per sample; h null: y = gate o, which is the backward.
template <class T, int V>
__device__ __forceinline__ void gated(T* y, i64 ystride, const T* h, i64 hstride, const float* gate, i64 gstride, const T* o, i64 ostride, int tokens,
                                      i64 cols) {
    AT(V)
    float a[V], g[V], b[V];
    load<V>(o + row * ostride + col, b);
    load<V>(gate + row / tokens * gstride + col, g);
    if (h) load<V>(h + row * hstride + col, a);
#pragma unroll
    for (int i = 0; i < V; i++) b[i] = h ? fmaf(g[i], b[i], a[i]) : g[i] * b[i];
    store<V>(y + row * ystride + col, b);
}

// stream += gate o in float32, and its copy y: the sum rounded, or with h round(h + gate o), bit for bit what `gated` makes of the same h.
template <class T, int V>
__device__ __forceinline__ void gated_stream(T* y, i64 ystride, float* stream, i64 sstride, const T* h, i64 hstride, const float* gate, i64 gstride,
                                             const T* o, i64 ostride, int tokens, i64 cols) {
    AT(V)
    float a[V], g[V], b[V], s[V];
    load<V>(o + row * ostride + col, b);
    load<V>(gate + row / tokens * gstride + col, g);
    load<V>(stream + row * sstride + col, s);
    if (h) load<V>(h + row * hstride + col, a);
#pragma unroll
    for (int i = 0; i < V; i++) {
        s[i] = fmaf(g[i], b[i], s[i]);
        b[i] = h ? fmaf(g[i], b[i], a[i]) : s[i];
    }
    store<V>(stream + row * sstride + col, s);
    store<V>(y + row * ystride + col, b);
}

// out = a + factor b, rounded once; a null: out = factor b, which is also the cast.
template <class TO, class TB, int V>
__device__ __forceinline__ void add(TO* out, i64 ostride, const TO* a, i64 astride, const TB* b, i64 bstride, float factor, i64 cols) {
    AT(V)
    float x[V], y[V];
    load<V>(b + row * bstride + col, y);
    if (a) load<V>(a + row * astride + col, x);
#pragma unroll
    for (int i = 0; i < V; i++) y[i] = a ? x[i] + factor * y[i] : factor * y[i];
    store<V>(out + row * ostride + col, y);
}

template <class T, int V>
__device__ __forceinline__ void silu(T* y, i64 ystride, const T* x, i64 xstride, i64 cols) {
    AT(V)
    float a[V];
    load<V>(x + row * xstride + col, a);
#pragma unroll
    for (int i = 0; i < V; i++) a[i] *= sigmoid(a[i]);
    store<V>(y + row * ystride + col, a);
}

#define PARAMS(T) (T * m, i64 mstride, const T* gate, i64 gstride, const T* value, i64 vstride, i64 cols)
#define ARGS (m, mstride, gate, gstride, value, vstride, cols)
KERNEL(swiglu_bf16, PARAMS(bf16), swiglu<bf16, 8> ARGS)
KERNEL(swiglu_bf16_1, PARAMS(bf16), swiglu<bf16, 1> ARGS)
KERNEL(swiglu_f32, PARAMS(float), swiglu<float, 4> ARGS)
KERNEL(swiglu_f32_1, PARAMS(float), swiglu<float, 1> ARGS)
#undef PARAMS
#undef ARGS
#define PARAMS(T)                                                                                                                  \
    (T * dgate, i64 dgstride, T* dvalue, i64 dvstride, const T* dm, i64 dmstride, const T* gate, i64 gstride, const T* value, i64 vstride, \
     i64 cols)
#define ARGS (dgate, dgstride, dvalue, dvstride, dm, dmstride, gate, gstride, value, vstride, cols)
KERNEL(swiglu_bwd_bf16, PARAMS(bf16), swiglu_bwd<bf16, 8> ARGS)
KERNEL(swiglu_bwd_bf16_1, PARAMS(bf16), swiglu_bwd<bf16, 1> ARGS)
KERNEL(swiglu_bwd_f32, PARAMS(float), swiglu_bwd<float, 4> ARGS)
KERNEL(swiglu_bwd_f32_1, PARAMS(float), swiglu_bwd<float, 1> ARGS)
#undef PARAMS
#undef ARGS
#define PARAMS(T) \
    (T * y, i64 ystride, const T* h, i64 hstride, const float* gate, i64 gstride, const T* o, i64 ostride, int tokens, i64 cols)
#define ARGS (y, ystride, h, hstride, gate, gstride, o, ostride, tokens, cols)
KERNEL(gated_bf16, PARAMS(bf16), gated<bf16, 8> ARGS)
KERNEL(gated_bf16_1, PARAMS(bf16), gated<bf16, 1> ARGS)
KERNEL(gated_f32, PARAMS(float), gated<float, 4> ARGS)
KERNEL(gated_f32_1, PARAMS(float), gated<float, 1> ARGS)
#undef PARAMS
#undef ARGS
#define PARAMS(T)                                                                                                                          \
    (T * y, i64 ystride, float* stream, i64 sstride, const T* h, i64 hstride, const float* gate, i64 gstride, const T* o, i64 ostride, int tokens, \
     i64 cols)
#define ARGS (y, ystride, stream, sstride, h, hstride, gate, gstride, o, ostride, tokens, cols)
KERNEL(gated_stream_bf16, PARAMS(bf16), gated_stream<bf16, 8> ARGS)
KERNEL(gated_stream_bf16_1, PARAMS(bf16), gated_stream<bf16, 1> ARGS)
#undef PARAMS
#undef ARGS
#define PARAMS(TO, TB) (TO * out, i64 ostride, const TO* a, i64 astride, const TB* b, i64 bstride, float factor, i64 cols)
#define ARGS (out, ostride, a, astride, b, bstride, factor, cols)
KERNEL(add_bf16_bf16, PARAMS(bf16, bf16), add<bf16, bf16, 8> ARGS)
KERNEL(add_bf16_f32, PARAMS(bf16, float), add<bf16, float, 8> ARGS)
KERNEL(add_f32_bf16, PARAMS(float, bf16), add<float, bf16, 8> ARGS)
KERNEL(add_f32_f32, PARAMS(float, float), add<float, float, 4> ARGS)
KERNEL(add_bf16_bf16_1, PARAMS(bf16, bf16), add<bf16, bf16, 1> ARGS)
KERNEL(add_bf16_f32_1, PARAMS(bf16, float), add<bf16, float, 1> ARGS)
KERNEL(add_f32_bf16_1, PARAMS(float, bf16), add<float, bf16, 1> ARGS)
KERNEL(add_f32_f32_1, PARAMS(float, float), add<float, float, 1> ARGS)
#undef PARAMS
#undef ARGS
#define PARAMS(T) (T * y, i64 ystride, const T* x, i64 xstride, i64 cols)
KERNEL(silu_bf16, PARAMS(bf16), silu<bf16, 8>(y, ystride, x, xstride, cols))
KERNEL(silu_bf16_1, PARAMS(bf16), silu<bf16, 1>(y, ystride, x, xstride, cols))
KERNEL(silu_f32, PARAMS(float), silu<float, 4>(y, ystride, x, xstride, cols))
KERNEL(silu_f32_1, PARAMS(float), silu<float, 1>(y, ystride, x, xstride, cols))
#undef PARAMS

// ---- Time embedding ------------------------------------------------------------------------------------------------------------------

// Row b: cosines, then sines, of 1000 value[b] frequencies[j]; an odd last channel is zero.
template <class T>
__device__ __forceinline__ void sinusoid(T* out, i64 stride, const float* values, const float* frequencies, i64 channels) {
    const i64 row = blockIdx.x, col = (i64)blockIdx.y * THREADS + threadIdx.x, half = channels / 2;
    if (col >= channels) return;
    const i64 j = col < half ? col : col - half;
    float y = 0.0f;
    if (j < half) {
        const float angle = __fmul_rn(__fmul_rn(values[row], 1000.0f), frequencies[j]);
        y = col < half ? cosf(angle) : sinf(angle);
    }
    put(out + row * stride + col, y);
}
KERNEL(sinusoid_bf16, (bf16* out, i64 stride, const float* values, const float* frequencies, i64 channels),
       sinusoid(out, stride, values, frequencies, channels))
KERNEL(sinusoid_f32, (float* out, i64 stride, const float* values, const float* frequencies, i64 channels),
       sinusoid(out, stride, values, frequencies, channels))

// ---- Products of float32 rows with a weight ---------------------------------------------------------------------------------------------

// out[b, n] = [out[b, n] +] sum over k of x[b, k] w[n, k]: x is not rounded to the weight's type as the tensor instructions would have it.
// A warp has one n and up to R rows of x. How a row is summed depends neither on R nor on the other rows.
template <class T, int V, int R>
__device__ __forceinline__ void linear(float* out, i64 ostride, const float* x, i64 xstride, const T* w, i64 wstride, i64 rows, i64 outs, i64 cols,
                                       int add) {
    const int lane = threadIdx.x & 31;
    const i64 n = (i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), first = (i64)blockIdx.y * R;
    if (n >= outs) return;
    w += n * wstride;
    x += first * xstride;
    float sum[R] = {};
#pragma unroll(R == 1 ? 4 : 1)
    for (i64 c = lane * V; c < cols; c += 32 * V) {
        float a[V];
        load<V>(w + c, a);
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (first + r < rows) {
                float b[V];
                load<V>(x + r * xstride + c, b);
#pragma unroll
                for (int i = 0; i < V; i++) sum[r] = fmaf(a[i], b[i], sum[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) sum[r] += __shfl_xor_sync(FULL, sum[r], o);
        if (lane == 0 && first + r < rows) {
            float* to = out + (first + r) * ostride + n;
            *to = add ? *to + sum[r] : sum[r];
        }
    }
}
#define PARAMS(T) (float* out, i64 ostride, const float* x, i64 xstride, const T* w, i64 wstride, i64 rows, i64 outs, i64 cols, int add)
#define ARGS (out, ostride, x, xstride, w, wstride, rows, outs, cols, add)
KERNEL(linear_row_bf16, PARAMS(bf16), linear<bf16, 8, 1> ARGS)
KERNEL(linear_row_bf16_1, PARAMS(bf16), linear<bf16, 1, 1> ARGS)
KERNEL(linear_row_f32, PARAMS(float), linear<float, 4, 1> ARGS)
KERNEL(linear_row_f32_1, PARAMS(float), linear<float, 1, 1> ARGS)
KERNEL(linear_rows_bf16, PARAMS(bf16), linear<bf16, 8, 8> ARGS)
KERNEL(linear_rows_bf16_1, PARAMS(bf16), linear<bf16, 1, 8> ARGS)
KERNEL(linear_rows_f32, PARAMS(float), linear<float, 4, 8> ARGS)
KERNEL(linear_rows_f32_1, PARAMS(float), linear<float, 1, 8> ARGS)
#undef PARAMS
#undef ARGS

// ---- Loss ----------------------------------------------------------------------------------------------------------------------------

// One partial sum of squared differences a block (float64), and the gradient `factor (prediction - target)` if wanted. The elements of a
// block depend on the grid alone, which the caller fixes.
template <class TG, class TP>
__device__ __forceinline__ void mse(double* partial, TG* gradient, i64 gstride, const TP* prediction, i64 pstride, const float* target, i64 tstride,
                                    i64 rows, i64 cols, float factor) {
    double sum[1] = {0.0};
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < rows * cols; i += (i64)gridDim.x * THREADS) {
        const i64 row = i / cols, col = i % cols;
        const float d = widen(prediction[row * pstride + col]) - target[row * tstride + col];
        sum[0] += (double)d * d;
        if (gradient) put(gradient + row * gstride + col, factor * d);
    }
    block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
}
#define PARAMS(TG, TP) \
    (double* partial, TG* gradient, i64 gstride, const TP* prediction, i64 pstride, const float* target, i64 tstride, i64 rows, i64 cols, float factor)
#define ARGS (partial, gradient, gstride, prediction, pstride, target, tstride, rows, cols, factor)
KERNEL(mse_bf16_bf16, PARAMS(bf16, bf16), mse ARGS)
KERNEL(mse_bf16_f32, PARAMS(bf16, float), mse ARGS)
KERNEL(mse_f32_f32, PARAMS(float, float), mse ARGS)
#undef PARAMS
#undef ARGS

// out = factor * sum of `count` partial sums; one block.
KERNEL(sum_partials, (double* out, const double* partial, i64 count, double factor), {
    double sum[1] = {0.0};
    for (i64 i = threadIdx.x; i < count; i += THREADS) sum[0] += partial[i];
    block_sum(sum);
    if (threadIdx.x == 0) *out = sum[0] * factor;
})

// Adds the number of values that are not finite to *count. An integer sum does not depend on its order.
template <class T>
__device__ __forceinline__ void count_bad(u32* count, const T* x, i64 stride, i64 cols) {
    const i64 row = blockIdx.x, col = (i64)blockIdx.y * THREADS + threadIdx.x;
    const int bad = col < cols && !isfinite(widen(x[row * stride + col]));
    const int total = __syncthreads_count(bad);
    if (threadIdx.x == 0 && total) atomicAdd(count, (u32)total);
}
KERNEL(count_bad_bf16, (u32 * count, const bf16* x, i64 stride, i64 cols), count_bad(count, x, stride, cols))
KERNEL(count_bad_f32, (u32 * count, const float* x, i64 stride, i64 cols), count_bad(count, x, stride, cols))

// ---- From page-locked host memory, by multiprocessors instead of a copy engine ---------------------------------------------------------

#define FETCH_UNROLL 4

extern "C" __global__ __launch_bounds__(THREADS) void fetch_host(uint4* to, const uint4* from, i64 count) {
    const i64 all = (i64)gridDim.x * THREADS;
    for (i64 first = (i64)blockIdx.x * THREADS + threadIdx.x; first < count; first += FETCH_UNROLL * all) {
        uint4 words[FETCH_UNROLL];
#pragma unroll
        for (int i = 0; i < FETCH_UNROLL; i++) {
            if (first + i * all < count) words[i] = from[first + i * all];
        }
#pragma unroll
        for (int i = 0; i < FETCH_UNROLL; i++) {
            if (first + i * all < count) to[first + i * all] = words[i];
        }
    }
}

// ---- Random values for checks and synthetic runs ---------------------------------------------------------------------------------------

__device__ __forceinline__ u32 hashed(u64 x) {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return (u32)(x >> 33);
}

// Uniform in [-limit, limit), a function of the seed and the position alone.
template <class T>
__device__ __forceinline__ void random(T* x, i64 stride, i64 cols, u64 seed, float limit) {
    const i64 row = blockIdx.x, col = (i64)blockIdx.y * THREADS + threadIdx.x;
    if (col >= cols) return;
    const u32 bits = hashed(seed * 0x9e3779b97f4a7c15ull + (u64)(row * cols + col)) & 0xffffffu;
    put(x + row * stride + col, ((float)bits * (1.0f / 8388608.0f) - 1.0f) * limit);
}
KERNEL(random_bf16, (bf16* x, i64 stride, i64 cols, u64 seed, float limit), random(x, stride, cols, seed, limit))
KERNEL(random_f32, (float* x, i64 stride, i64 cols, u64 seed, float limit), random(x, stride, cols, seed, limit))
