// Operations row by row: dequantisation, LayerNorm with modulation, RMSNorm with rotation.

// ---- INT8 rows times their scales ----------------------------------------------------------------------------------------------------

// The same arithmetic as the host's (`slab::quant::dequantize`): one float32 product, rounded to bfloat16 by integer arithmetic.
__device__ __forceinline__ u32 dequantised(int code, float scale) {
    if (isnan(scale)) return 0x7fc0u;
    const u32 bits = __float_as_uint(__fmul_rn((float)code, scale));
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ void put_bits(bf16* p, u32 bits) { p->bits = (u16)bits; }
__device__ __forceinline__ void put_bits(float* p, u32 bits) { *p = __uint_as_float(bits << 16); }

__device__ __forceinline__ void put16(bf16* p, const u32 (&b)[16]) {
    *(uint4*)p = make_uint4(b[0] | b[1] << 16, b[2] | b[3] << 16, b[4] | b[5] << 16, b[6] | b[7] << 16);
    *(uint4*)(p + 8) = make_uint4(b[8] | b[9] << 16, b[10] | b[11] << 16, b[12] | b[13] << 16, b[14] | b[15] << 16);
}

__device__ __forceinline__ void put16(float* p, const u32 (&b)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) *(uint4*)(p + i) = make_uint4(b[i] << 16, b[i + 1] << 16, b[i + 2] << 16, b[i + 3] << 16);
}

// Four rows a block, so that four loads are in flight; grid (rows / 4, columns / (16 THREADS)).
template <class T>
__device__ __forceinline__ void dequant_wide(T* out, i64 stride, const i8* q, i64 padded, const float* scales, i64 rows, i64 cols) {
    const i64 col = ((i64)blockIdx.y * THREADS + threadIdx.x) * 16, row = (i64)blockIdx.x * 4;
    if (col >= cols) return;
    uint4 codes[4];
    float scale[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (row + r < rows) {
            codes[r] = *(const uint4*)(q + (row + r) * padded + col);
            scale[r] = scales[row + r];
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (row + r >= rows) break;
        const u32 w[4] = {codes[r].x, codes[r].y, codes[r].z, codes[r].w};
        u32 bits[16];
#pragma unroll
        for (int i = 0; i < 16; i++) bits[i] = dequantised((int)(i8)(w[i / 4] >> (8 * (i % 4))), scale[r]);
        put16(out + (row + r) * stride + col, bits);
    }
}

// Rows of whole 512-code pieces. Every warp has a ring of STAGES pieces in shared memory that asynchronous copies fill ahead, so that a
// block, which has a multiprocessor's threads to itself, keeps 48 KiB on their way: a few blocks beside products come far, and as many as
// there are multiprocessors reach the memory's rate. The instructions count too: a code becomes float32 by placing it behind the exponent of 2^23
// (exact), and two products are rounded to bfloat16 by one instruction, to nearest even as the integer arithmetic does it. Scales that are no
// numbers take the slow way.
#define PIECE 512
#define STAGES 3
#define WARPS 32

__device__ __forceinline__ u32 dequantised2(u32 biased, int first, float scale) {
    const float low = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7650 + first)) - 8388736.0f;
    const float high = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7650 + first + 1)) - 8388736.0f;
    return narrow2(__fmul_rn(low, scale), __fmul_rn(high, scale));
}

__device__ __forceinline__ uint4 dequantised8(uint2 codes, float scale) {
    if (!(fabsf(scale) <= 3.4028235e38f)) {
        u32 b[8];
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] = dequantised((int)(i8)((i < 4 ? codes.x : codes.y) >> (8 * (i % 4))), scale);
        return make_uint4(b[0] | b[1] << 16, b[2] | b[3] << 16, b[4] | b[5] << 16, b[6] | b[7] << 16);
    }
    const u32 x = codes.x ^ 0x80808080u, y = codes.y ^ 0x80808080u;
    return make_uint4(dequantised2(x, 0, scale), dequantised2(x, 2, scale), dequantised2(y, 0, scale), dequantised2(y, 2, scale));
}

extern "C" __global__ __launch_bounds__(32 * WARPS, 1) void dequant_pieces_bf16(bf16* out, i64 stride, const i8* q, i64 padded, const float* scales,
                                                                               i64 rows, i64 cols) {
    __shared__ uint4 rings[WARPS][STAGES][PIECE / 16];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 across = (u32)(cols / PIECE), items = across * (u32)rows, step = gridDim.x * WARPS;
    u32 ahead = blockIdx.x * WARPS + warp, item = ahead;
    float scale[STAGES];
    const auto fetch = [&](int stage) {
        if (ahead < items) {
            const i64 row = ahead / across, col = (i64)(ahead % across) * PIECE;
            const u32 to = (u32)__cvta_generic_to_shared(&rings[warp][stage][lane]);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(q + row * padded + col + lane * 16) : "memory");
            scale[stage] = scales[row];
        }
        // A group for every stage, empty ones too, so that the wait below always means the oldest.
        asm volatile("cp.async.commit_group;" ::: "memory");
        ahead += step;
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) fetch(stage);
    while (item < items) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            if (item >= items) break;
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
            // What the other lanes have fetched.
            __syncwarp();
            const uint2* codes = (const uint2*)rings[warp][stage];
            const uint2 first = codes[lane], second = codes[lane + 32];
            const i64 row = item / across, col = (i64)(item % across) * PIECE;
            bf16* to = out + row * stride + col + lane * 8;
            *(uint4*)to = dequantised8(first, scale[stage]);
            *(uint4*)(to + PIECE / 2) = dequantised8(second, scale[stage]);
            // Before others overwrite what this lane has read.
            __syncwarp();
            fetch(stage);
            item += step;
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}
#undef PIECE
#undef STAGES
#undef WARPS

// Any shape and alignment; grid (rows, columns / THREADS).
template <class T>
__device__ __forceinline__ void dequant_narrow(T* out, i64 stride, const i8* q, i64 padded, const float* scales, i64 rows, i64 cols) {
    const i64 col = (i64)blockIdx.y * THREADS + threadIdx.x, row = blockIdx.x;
    if (col < cols) put_bits(out + row * stride + col, dequantised(q[row * padded + col], scales[row]));
}

#define PARAMS(T) (T * out, i64 stride, const i8* q, i64 padded, const float* scales, i64 rows, i64 cols)
KERNEL(dequant_rows_bf16, PARAMS(bf16), dequant_wide(out, stride, q, padded, scales, rows, cols))
KERNEL(dequant_rows_f32, PARAMS(float), dequant_wide(out, stride, q, padded, scales, rows, cols))
KERNEL(dequant_rows_bf16_1, PARAMS(bf16), dequant_narrow(out, stride, q, padded, scales, rows, cols))
KERNEL(dequant_rows_f32_1, PARAMS(float), dequant_narrow(out, stride, q, padded, scales, rows, cols))
#undef PARAMS

// ---- LayerNorm without weights, with modulation --------------------------------------------------------------------------------------

// Mean and 1 / sigma of a row, in every thread. The variance is that of the centred values.
template <class T, int V>
__device__ __forceinline__ void moments(const T* x, int cols, float eps, float& mean, float& rstd) {
    float sum[1] = {0.0f};
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V];
        load<V>(x + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) sum[0] += a[i];
    }
    block_sum(sum);
    mean = sum[0] / cols;
    sum[0] = 0.0f;
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V];
        load<V>(x + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) sum[0] += (a[i] - mean) * (a[i] - mean);
    }
    block_sum(sum);
    rstd = 1.0f / sqrtf(sum[0] / cols + eps);
}

// y = (1 + scale) LN(x) + shift, one block a row; scale and shift have a row per sample of `tokens` rows.
template <class T, int V>
__device__ __forceinline__ void ln_mod(T* y, i64 ystride, const T* x, i64 xstride, const float* shift, const float* scale, i64 mstride, int tokens,
                                       int cols, float eps) {
    const i64 row = blockIdx.x, sample = row / tokens;
    x += row * xstride;
    y += row * ystride;
    shift += sample * mstride;
    scale += sample * mstride;
    float mean, rstd;
    moments<T, V>(x, cols, eps, mean, rstd);
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V], s[V], t[V];
        load<V>(x + c, a);
        load<V>(scale + c, s);
        load<V>(shift + c, t);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = (a[i] - mean) * rstd * (s[i] + 1.0f) + t[i];
        store<V>(y + c, a);
    }
}

// dx = [residual +] rstd (g - mean(g) - n mean(g n)), g = (1 + scale) dy, n = LN(x). dx may be dy or the residual itself.
template <class T, int V>
__device__ __forceinline__ void ln_mod_bwd(T* dx, i64 dxstride, const T* residual, i64 rstride, const T* dy, i64 dystride, const T* x, i64 xstride,
                                           const float* scale, i64 mstride, int tokens, int cols, float eps) {
    const i64 row = blockIdx.x, sample = row / tokens;
    x += row * xstride;
    dy += row * dystride;
    dx += row * dxstride;
    scale += sample * mstride;
    float mean, rstd;
    moments<T, V>(x, cols, eps, mean, rstd);
    float sum[2] = {0.0f, 0.0f};
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V], d[V], s[V];
        load<V>(x + c, a);
        load<V>(dy + c, d);
        load<V>(scale + c, s);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float g = d[i] * (s[i] + 1.0f);
            sum[0] += g;
            sum[1] += g * ((a[i] - mean) * rstd);
        }
    }
    block_sum(sum);
    const float mean_g = sum[0] / cols, mean_gn = sum[1] / cols;
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V], d[V], s[V], r[V];
        load<V>(x + c, a);
        load<V>(dy + c, d);
        load<V>(scale + c, s);
        if (residual) load<V>(residual + row * rstride + c, r);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float n = (a[i] - mean) * rstd;
            const float g = (d[i] * (s[i] + 1.0f) - mean_g - n * mean_gn) * rstd;
            a[i] = residual ? r[i] + g : g;
        }
        store<V>(dx + c, a);
    }
}

#define PARAMS(T) \
    (T * y, i64 ystride, const T* x, i64 xstride, const float* shift, const float* scale, i64 mstride, int tokens, int cols, float eps)
#define ARGS (y, ystride, x, xstride, shift, scale, mstride, tokens, cols, eps)
KERNEL(ln_mod_bf16, PARAMS(bf16), ln_mod<bf16, 8> ARGS)
KERNEL(ln_mod_bf16_1, PARAMS(bf16), ln_mod<bf16, 1> ARGS)
KERNEL(ln_mod_f32, PARAMS(float), ln_mod<float, 4> ARGS)
KERNEL(ln_mod_f32_1, PARAMS(float), ln_mod<float, 1> ARGS)
#undef PARAMS
#undef ARGS
#define PARAMS(T)                                                                                                                            \
    (T * dx, i64 dxstride, const T* residual, i64 rstride, const T* dy, i64 dystride, const T* x, i64 xstride, const float* scale,          \
     i64 mstride, int tokens, int cols, float eps)
#define ARGS (dx, dxstride, residual, rstride, dy, dystride, x, xstride, scale, mstride, tokens, cols, eps)
KERNEL(ln_mod_bwd_bf16, PARAMS(bf16), ln_mod_bwd<bf16, 8> ARGS)
KERNEL(ln_mod_bwd_bf16_1, PARAMS(bf16), ln_mod_bwd<bf16, 1> ARGS)
KERNEL(ln_mod_bwd_f32, PARAMS(float), ln_mod_bwd<float, 4> ARGS)
KERNEL(ln_mod_bwd_f32_1, PARAMS(float), ln_mod_bwd<float, 1> ARGS)
#undef PARAMS
#undef ARGS

// ---- Queries, keys and values between projection and attention -----------------------------------------------------------------------

// A group of `lanes` threads (a power of two, at most 32) has one head of one token; blockIdx.y is 0 for queries, 1 for keys, 2 for values.
// Packed side: row b tokens + t, `stride` apart, head h at column h hd. Attention side: element (b, t + first, h) at
// b ob + (t + first) ot + h oh. Tables cos and sin have a row of hd / 2 per token of the joint sequence, shared by all samples.
struct Place {
    i64 packed, joint;
    int table, lane;
    bool valid;
};

__device__ __forceinline__ Place place(i64 stride, i64 ob, i64 ot, i64 oh, i64 items, int tokens, int first, int heads, int hd, int lanes) {
    const i64 item = (i64)blockIdx.x * (THREADS / lanes) + threadIdx.x / lanes;
    const int head = (int)(item % heads);
    const i64 row = item / heads, sample = row / tokens;
    const int token = (int)(row % tokens) + first;
    Place p;
    p.packed = row * stride + (i64)head * hd;
    p.joint = sample * ob + token * ot + head * oh;
    p.table = token * (hd / 2);
    p.lane = threadIdx.x % lanes;
    p.valid = item < items;
    return p;
}

__device__ __forceinline__ float group_sum(float x, int lanes) {
    for (int o = lanes / 2; o > 0; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}

template <class T, int V>
__device__ __forceinline__ void copy_head(T* to, const T* from, const Place& p, int hd, int lanes) {
    if (!p.valid) return;
    for (int c = p.lane * V; c < hd; c += lanes * V) {
        float a[V];
        load<V>(from + c, a);
        store<V>(to + c, a);
    }
}

// y = R (w x / rms(x)); the values are only moved.
template <class T, int V>
__device__ __forceinline__ void qk_norm_rope(const T* q, i64 qstride, const T* k, i64 kstride, const T* v, i64 vstride, T* oq, T* ok, T* ov, i64 ob,
                                             i64 ot, i64 oh, const float* wq, const float* wk, const float* cosine, const float* sine, i64 items,
                                             int tokens, int first, int heads, int hd, int lanes, float eps) {
    const int part = blockIdx.y;
    const T* x = part == 0 ? q : part == 1 ? k : v;
    T* y = part == 0 ? oq : part == 1 ? ok : ov;
    const float* w = part == 0 ? wq : wk;
    const Place p = place(part == 0 ? qstride : part == 1 ? kstride : vstride, ob, ot, oh, items, tokens, first, heads, hd, lanes);
    x += p.packed;
    y += p.joint;
    if (part == 2) {
        copy_head<T, V>(y, x, p, hd, lanes);
        return;
    }
    float sum = 0.0f;
    for (int c = p.lane * V; p.valid && c < hd; c += lanes * V) {
        float a[V];
        load<V>(x + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) sum += a[i] * a[i];
    }
    const float r = 1.0f / sqrtf(group_sum(sum, lanes) / hd + eps);
    for (int c = p.lane * V; p.valid && c < hd; c += lanes * V) {
        float a[V], g[V], co[V / 2], si[V / 2];
        load<V>(x + c, a);
        load<V>(w + c, g);
        load<V / 2>(cosine + p.table + c / 2, co);
        load<V / 2>(sine + p.table + c / 2, si);
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            const float x0 = a[i] * r * g[i], x1 = a[i + 1] * r * g[i + 1];
            a[i] = x0 * co[i / 2] - x1 * si[i / 2];
            a[i + 1] = x1 * co[i / 2] + x0 * si[i / 2];
        }
        store<V>(y + c, a);
    }
}

// With g = w R^T dy and r = 1 / rms(x): dx = r (g - r^2 x mean(g x)).
template <class T, int V>
__device__ __forceinline__ void qk_norm_rope_bwd(const T* q, i64 qstride, const T* k, i64 kstride, const T* dq, const T* dk, const T* dv, i64 ob, i64 ot,
                                                 i64 oh, T* gq, i64 gqstride, T* gk, i64 gkstride, T* gv, i64 gvstride, const float* wq,
                                                 const float* wk, const float* cosine, const float* sine, i64 items, int tokens, int first, int heads,
                                                 int hd, int lanes, float eps) {
    const int part = blockIdx.y;
    const T* dy = part == 0 ? dq : part == 1 ? dk : dv;
    T* dx = part == 0 ? gq : part == 1 ? gk : gv;
    const float* w = part == 0 ? wq : wk;
    const Place to = place(part == 0 ? gqstride : part == 1 ? gkstride : gvstride, ob, ot, oh, items, tokens, first, heads, hd, lanes);
    dy += to.joint;
    dx += to.packed;
    if (part == 2) {
        copy_head<T, V>(dx, dy, to, hd, lanes);
        return;
    }
    const Place from = place(part == 0 ? qstride : kstride, ob, ot, oh, items, tokens, first, heads, hd, lanes);
    const T* x = (part == 0 ? q : k) + from.packed;
    float square = 0.0f, product = 0.0f;
    for (int pass = 0; pass < 2; pass++) {
        const float r = 1.0f / sqrtf(square / hd + eps), mean = product / hd * (r * r);
        for (int c = to.lane * V; to.valid && c < hd; c += lanes * V) {
            float a[V], d[V], g[V], co[V / 2], si[V / 2];
            load<V>(x + c, a);
            load<V>(dy + c, d);
            load<V>(w + c, g);
            load<V / 2>(cosine + to.table + c / 2, co);
            load<V / 2>(sine + to.table + c / 2, si);
#pragma unroll
            for (int i = 0; i < V; i += 2) {
                g[i] *= d[i] * co[i / 2] + d[i + 1] * si[i / 2];
                g[i + 1] *= d[i + 1] * co[i / 2] - d[i] * si[i / 2];
            }
#pragma unroll
            for (int i = 0; i < V; i++) {
                if (pass == 0) {
                    square += a[i] * a[i];
                    product += g[i] * a[i];
                } else {
                    g[i] = (g[i] - a[i] * mean) * r;
                }
            }
            if (pass == 1) store<V>(dx + c, g);
        }
        if (pass == 0) {
            square = group_sum(square, lanes);
            product = group_sum(product, lanes);
        }
    }
}

#define PARAMS(T)                                                                                                                            \
    (const T* q, i64 qstride, const T* k, i64 kstride, const T* v, i64 vstride, T* oq, T* ok, T* ov, i64 ob, i64 ot, i64 oh, const float* wq, \
     const float* wk, const float* cosine, const float* sine, i64 items, int tokens, int first, int heads, int hd, int lanes, float eps)
#define ARGS \
    (q, qstride, k, kstride, v, vstride, oq, ok, ov, ob, ot, oh, wq, wk, cosine, sine, items, tokens, first, heads, hd, lanes, eps)
KERNEL(qk_norm_rope_bf16, PARAMS(bf16), qk_norm_rope<bf16, 8> ARGS)
KERNEL(qk_norm_rope_bf16_2, PARAMS(bf16), qk_norm_rope<bf16, 2> ARGS)
KERNEL(qk_norm_rope_f32, PARAMS(float), qk_norm_rope<float, 4> ARGS)
KERNEL(qk_norm_rope_f32_2, PARAMS(float), qk_norm_rope<float, 2> ARGS)
#undef PARAMS
#undef ARGS
#define PARAMS(T)                                                                                                                           \
    (const T* q, i64 qstride, const T* k, i64 kstride, const T* dq, const T* dk, const T* dv, i64 ob, i64 ot, i64 oh, T* gq, i64 gqstride, \
     T* gk, i64 gkstride, T* gv, i64 gvstride, const float* wq, const float* wk, const float* cosine, const float* sine, i64 items,        \
     int tokens, int first, int heads, int hd, int lanes, float eps)
#define ARGS                                                                                                                                 \
    (q, qstride, k, kstride, dq, dk, dv, ob, ot, oh, gq, gqstride, gk, gkstride, gv, gvstride, wq, wk, cosine, sine, items, tokens, first, \
     heads, hd, lanes, eps)
KERNEL(qk_norm_rope_bwd_bf16, PARAMS(bf16), qk_norm_rope_bwd<bf16, 8> ARGS)
KERNEL(qk_norm_rope_bwd_bf16_2, PARAMS(bf16), qk_norm_rope_bwd<bf16, 2> ARGS)
KERNEL(qk_norm_rope_bwd_f32, PARAMS(float), qk_norm_rope_bwd<float, 4> ARGS)
KERNEL(qk_norm_rope_bwd_f32_2, PARAMS(float), qk_norm_rope_bwd<float, 2> ARGS)
#undef PARAMS
#undef ARGS
