// Attention forward and backward in bf16 with f32 accumulation: softmax(scale Q K^T) V without a tokens x tokens matrix.
//
// Method: online softmax over key tiles (Dao, "FlashAttention-2", arXiv 2307.08691) on the warp-level tensor instruction
// mma.sync.m16n8k16. The backward pass recomputes the probabilities from the saved log-sum-exp and runs twice: one block per key
// tile for dK and dV, one block per query tile for dQ. That costs seven products instead of five, and in return no sum is shared between
// blocks: every output element is summed by one warp in one order, so that two runs give equal bytes.
//
// Orientation: a warp always owns rows of the result. In the dK/dV pass it owns keys and computes the transposed scores K Q^T, because the
// accumulator layout of the instruction is the layout of its left operand: the probabilities go from one product to the next in registers.
//
// Layout: q, k, v, out and their gradients are rows of tokens; head h is the columns [h*head_dim, (h+1)*head_dim) of a row, sample b the
// rows [b*tokens, (b+1)*tokens). lse and delta are f32 [batch, heads, tokens]. Rows are 16-byte aligned. head_dim is a multiple of 8, padded with
// zeros to the template's D in shared memory.
//
// No headers: a machine with the driver and the run-time compiler alone can build this.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct AttentionArgs {
    const void *q, *k, *v, *out, *dout;
    void *out_w, *dq, *dk, *dv;
    float *lse, *delta;
    i64 q_row, k_row, v_row, out_row, dout_row, dq_row, dk_row, dv_row;  // elements between tokens
    int tokens, heads, head_dim, causal;
    float scale;
};

// Every kernel of attention has these parameters, in the order of attention/fallback.rs; pointers that a kernel does not use may be null.
#define PARAMETERS                                                                                                                          \
    const void *q, const void *k, const void *v, const void *out, const void *dout, void *out_w, void *dq, void *dk, void *dv, float *lse,  \
        float *delta, i64 q_row, i64 k_row, i64 v_row, i64 out_row, i64 dout_row, i64 dq_row, i64 dk_row, i64 dv_row, int tokens, int heads, \
        int head_dim, int causal, float scale
#define ARGUMENTS                                                                                                                     \
    AttentionArgs {                                                                                                                   \
        q, k, v, out, dout, out_w, dq, dk, dv, lse, delta, q_row, k_row, v_row, out_row, dout_row, dq_row, dk_row, dv_row, tokens, heads, \
            head_dim, causal, scale                                                                                                   \
    }

#define INLINE __device__ __forceinline__
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

INLINE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory; `bytes` 0 writes zeros and reads nothing.
INLINE void copy16(u32 to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
INLINE void copy4(u32 to, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
INLINE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
INLINE void copy_wait_all() { asm volatile("cp.async.wait_group 0;\n" ::: "memory"); }

INLINE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
INLINE void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// c[16 x 8] += a[16 x 16] b[16 x 8]
INLINE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
INLINE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two values rounded to bf16, `low` in the low half.
INLINE u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
INLINE float low_half(u32 x) { return __uint_as_float(x << 16); }
INLINE float high_half(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// A tile of rows in shared memory: D bf16 per row in chunks of 16 bytes, the chunk index xor-ed with the row so that the eight rows which one
// matrix load touches lie in eight different groups of banks. Every tile starts at a multiple of 256 bytes.
template <int D>
INLINE u32 swizzle(int row) {
    return D >= 64 ? (row & 7) : ((row >> 1) & 3);
}
template <int D>
INLINE u32 tile_offset(int row, int chunk) {
    return (u32)(row * (D * 2) + (((u32)chunk ^ swizzle<D>(row)) << 4));
}

// Rows [first, first + ROWS) of a head into a tile; rows past `tokens` and columns past `head_dim` become zeros.
template <int ROWS, int D, int NT>
INLINE void load_tile(u32 tile, const u16 *head, i64 stride, int first, int tokens, int head_dim) {
    constexpr int CHUNKS = D / 8, STEP = NT / CHUNKS;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "every thread copies the same number of chunks, all with the same swizzle");
    int row = (int)threadIdx.x / CHUNKS, chunk = (int)threadIdx.x % CHUNKS;
    u32 to = tile + tile_offset<D>(row, chunk);
    int left = chunk * 8 < head_dim ? tokens - first - row : 0;  // rows of this thread's column that exist
    const u16 *from = head + (i64)(first + row) * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) {
        bool there = i * STEP < left;
        copy16(to + i * (STEP * D * 2), there ? from : head, there ? 16 : 0);
        from += STEP * stride;
    }
}

// f32 values of rows [first, first + ROWS), zeros past `tokens`.
template <int ROWS>
INLINE void load_row_values(u32 to, const float *values, int first, int tokens) {
    if ((int)threadIdx.x < ROWS) {
        int row = first + (int)threadIdx.x;
        bool there = row < tokens;
        copy4(to + threadIdx.x * 4, values + (there ? row : 0), there ? 4 : 0);
    }
}

// Addresses of the three operand shapes. Each is the address for step 0; step s along the tile's columns (16 of them) is `address ^ (s << 5)`,
// and r rows further (a multiple of 8) is `+ r * D * 2`.
template <int D>
INLINE u32 left_operand(u32 tile, int first_row) {  // 16 rows x 16 columns
    int lane = threadIdx.x & 31, row = first_row + (lane & 15);
    return tile + tile_offset<D>(row, lane >> 4);
}
template <int D>
INLINE u32 right_operand(u32 tile) {  // 16 rows (n) x 16 columns (k), used as k x n: two n tiles of 8
    int lane = threadIdx.x & 31, row = (lane & 7) + ((lane >> 4) << 3);
    return tile + tile_offset<D>(row, (lane >> 3) & 1);
}
template <int D>
INLINE u32 right_operand_transposed(u32 tile) {  // 16 rows (k) x 16 columns (n)
    int lane = threadIdx.x & 31, row = lane & 15;
    return tile + tile_offset<D>(row, lane >> 4);
}

// c[16 x 8 N] += left[16 x D] right[8 N x D]^T, both in shared memory.
template <int D, int N>
INLINE void multiply_rows(float (&c)[N][4], u32 left, u32 right) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        u32 a[4];
        load_matrices(a, left ^ (step << 5));
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            u32 b[4];
            load_matrices(b, (right ^ (step << 5)) + n * 16 * D * 2);
            multiply(c[2 * n], a, b[0], b[1]);
            multiply(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// c[16 x D] += left[16 x 8 N] right[8 N x D]: left in registers as packed accumulators, right in shared memory.
template <int D, int N>
INLINE void multiply_columns(float (&c)[D / 8][4], const u32 (&left)[N / 2][4], u32 right) {
#pragma unroll
    for (int step = 0; step < N / 2; ++step) {
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            u32 b[4];
            load_matrices_transposed(b, (right ^ (n << 5)) + step * 16 * D * 2);
            multiply(c[2 * n], left[step], b[0], b[1]);
            multiply(c[2 * n + 1], left[step], b[2], b[3]);
        }
    }
}

// Accumulators [16 x 8 N] as the left operand of the next product.
template <int N>
INLINE void pack_left(u32 (&a)[N / 2][4], const float (&c)[N][4]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        a[i][0] = pack(c[2 * i][0], c[2 * i][1]);
        a[i][1] = pack(c[2 * i][2], c[2 * i][3]);
        a[i][2] = pack(c[2 * i + 1][0], c[2 * i + 1][1]);
        a[i][3] = pack(c[2 * i + 1][2], c[2 * i + 1][3]);
    }
}

template <int N>
INLINE void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
}

// 16 rows of a result, scaled by one factor for each half, to global memory through 16 rows of a tile that only this warp uses.
template <int D>
INLINE void store_rows(const float (&c)[D / 8][4], float upper, float lower, u32 tile, int tile_row, u16 *head, i64 stride, int first, int tokens,
                       int head_dim) {
    int lane = threadIdx.x & 31, group = lane >> 2, pair = lane & 3;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        u32 a = pack(c[n][0] * upper, c[n][1] * upper), b = pack(c[n][2] * lower, c[n][3] * lower);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + tile_offset<D>(tile_row + group, n) + pair * 4), "r"(a) : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + tile_offset<D>(tile_row + group + 8, n) + pair * 4), "r"(b) : "memory");
    }
    __syncwarp();
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < 16 * CHUNKS / 32; ++i) {
        int index = i * 32 + lane, row = index / CHUNKS, chunk = index % CHUNKS;
        u32 x, y, z, w;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                     : "r"(tile + tile_offset<D>(tile_row + row, chunk))
                     : "memory");
        if (first + row < tokens && chunk * 8 < head_dim) *(uint4 *)(head + (i64)(first + row) * stride + chunk * 8) = make_uint4(x, y, z, w);
    }
}

INLINE i64 head_offset(const AttentionArgs &p, i64 row_stride) {
    return (i64)blockIdx.z * p.tokens * row_stride + (i64)blockIdx.y * p.head_dim;
}
INLINE i64 row_values_offset(const AttentionArgs &p) { return ((i64)blockIdx.z * p.heads + blockIdx.y) * p.tokens; }

INLINE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
INLINE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---------------------------------------------------------------- forward
// One block per WARPS * 16 * M query rows; a warp owns M groups of 16. Shared memory: Q, one K tile, one V tile.

template <int N, int M>
INLINE void mask_scores(float (&s)[M][N][4], int first_row, int first_key, int tokens, int causal) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int key = first_key + n * 8 + (lane & 3) * 2 + (e & 1), row = first_row + m * 16 + (lane >> 2) + (e >> 1) * 8;
                if (key >= tokens || (causal && key > row)) s[m][n][e] = -__int_as_float(0x7f800000);
            }
}

template <int D, int M, int WARPS, int BN>
INLINE void attention_forward(const AttentionArgs &p) {
    constexpr int NT = WARPS * 32, BM = WARPS * 16 * M, N = BN / 8, ROW = D * 2;
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 tile_q = shared_address(memory), tile_k = tile_q + BM * ROW, tile_v = tile_k + BN * ROW;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int first = blockIdx.x * BM, own = warp * 16 * M;
    const u16 *q = (const u16 *)p.q + head_offset(p, p.q_row), *k = (const u16 *)p.k + head_offset(p, p.k_row);
    const u16 *v = (const u16 *)p.v + head_offset(p, p.v_row);
    int end = p.causal ? min(p.tokens, first + BM) : p.tokens;

    load_tile<BM, D, NT>(tile_q, q, p.q_row, first, p.tokens, p.head_dim);
    load_tile<BN, D, NT>(tile_k, k, p.k_row, 0, p.tokens, p.head_dim);
    copy_commit();

    float o[M][D / 8][4], top[M][2], sum[M][2];
    const float factor = p.scale * LOG2E;
#pragma unroll
    for (int m = 0; m < M; ++m) {
        clear<D / 8>(o[m]);
        top[m][0] = top[m][1] = -__int_as_float(0x7f800000);
        sum[m][0] = sum[m][1] = 0.f;
    }
    u32 left[M], right_k = right_operand<D>(tile_k), right_v = right_operand_transposed<D>(tile_v);
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = left_operand<D>(tile_q, own + m * 16);

    for (int key = 0; key < end; key += BN) {
        copy_wait_all();
        __syncthreads();  // K is there, and nobody reads the last V any more
        load_tile<BN, D, NT>(tile_v, v, p.v_row, key, p.tokens, p.head_dim);
        copy_commit();

        float s[M][N][4];
#pragma unroll
        for (int m = 0; m < M; ++m) clear<N>(s[m]);
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            u32 a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) load_matrices(a[m], left[m] ^ (step << 5));
#pragma unroll
            for (int n = 0; n < N / 2; ++n) {
                u32 b[4];
                load_matrices(b, (right_k ^ (step << 5)) + n * 16 * ROW);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply(s[m][2 * n], a[m], b[0], b[1]);
                    multiply(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        if (key + BN > p.tokens || (p.causal && key + BN > first)) mask_scores<N, M>(s, first + own, key, p.tokens, p.causal);

        copy_wait_all();
        __syncthreads();  // V is there, and nobody reads this K any more
        if (key + BN < end) {
            load_tile<BN, D, NT>(tile_k, k, p.k_row, key + BN, p.tokens, p.head_dim);
            copy_commit();
        }

        u32 a[M][N / 2][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float high = top[m][half];
#pragma unroll
                for (int n = 0; n < N; ++n) high = fmaxf(high, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                high = quad_max(high);
                float shrink = power_of_two((top[m][half] - high) * factor), offset = high * factor, add = 0.f;
                top[m][half] = high;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    float x = power_of_two(fmaf(s[m][n][2 * half], factor, -offset));
                    float y = power_of_two(fmaf(s[m][n][2 * half + 1], factor, -offset));
                    s[m][n][2 * half] = x;
                    s[m][n][2 * half + 1] = y;
                    add += x + y;
                }
                sum[m][half] = sum[m][half] * shrink + add;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    o[m][n][2 * half] *= shrink;
                    o[m][n][2 * half + 1] *= shrink;
                }
            }
            pack_left<N>(a[m], s[m]);
        }
#pragma unroll
        for (int step = 0; step < N / 2; ++step)
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                u32 b[4];
                load_matrices_transposed(b, (right_v ^ (n << 5)) + step * 16 * ROW);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply(o[m][2 * n], a[m][step], b[0], b[1]);
                    multiply(o[m][2 * n + 1], a[m][step], b[2], b[3]);
                }
            }
    }

    u16 *out = (u16 *)p.out_w + head_offset(p, p.out_row);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float total[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] = quad_sum(sum[m][half]);
            int row = first + own + m * 16 + (lane >> 2) + half * 8;
            if ((lane & 3) == 0 && row < p.tokens) p.lse[row_values_offset(p) + row] = top[m][half] * p.scale + logf(total[half]);
        }
        // This warp's rows of Q are read by no other warp.
        store_rows<D>(o[m], 1.f / total[0], 1.f / total[1], tile_q, own + m * 16, out, p.out_row, first + own + m * 16, p.tokens, p.head_dim);
    }
}

// ---------------------------------------------------------------- backward
// delta = rowsum(dO * O), one warp per token and head.
INLINE void attention_row_delta(const AttentionArgs &p) {
    i64 index = (i64)blockIdx.x * 8 + (threadIdx.x >> 5);
    int lane = threadIdx.x & 31, batch = blockIdx.z;
    if (index >= (i64)p.tokens * p.heads) return;
    int token = (int)(index / p.heads), head = (int)(index % p.heads);
    float sum = 0.f;
    if (lane * 4 < p.head_dim) {
        i64 row = (i64)batch * p.tokens + token, column = (i64)head * p.head_dim + lane * 4;
        uint2 a = *(const uint2 *)((const u16 *)p.out + row * p.out_row + column), b = *(const uint2 *)((const u16 *)p.dout + row * p.dout_row + column);
        sum = low_half(a.x) * low_half(b.x) + high_half(a.x) * high_half(b.x) + low_half(a.y) * low_half(b.y) + high_half(a.y) * high_half(b.y);
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) p.delta[((i64)batch * p.heads + head) * p.tokens + token] = sum;
}

// dK, dV: one block per WARPS * 16 keys, a warp owns 16 of them. Shared memory: K, V, STAGES times (Q, dO tiles of BM rows), then their lse and delta.
// Query rows past the end are zeros with lse = delta = 0: probability 1 times a zero row, no mask needed.
template <int D, int WARPS, int BM, int STAGES>
INLINE void attention_backward_keys(const AttentionArgs &p) {
    constexpr int NT = WARPS * 32, BN = WARPS * 16, N = BM / 8, ROW = D * 2, PAIR = 2 * BM * ROW;
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 tile_k = shared_address(memory), tile_v = tile_k + BN * ROW, stage0 = tile_v + BN * ROW, rows0 = stage0 + STAGES * PAIR;
    const float *rows = (const float *)(memory + 2 * BN * ROW + STAGES * PAIR);
    int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16, first = blockIdx.x * BN;
    const u16 *q = (const u16 *)p.q + head_offset(p, p.q_row), *k = (const u16 *)p.k + head_offset(p, p.k_row);
    const u16 *v = (const u16 *)p.v + head_offset(p, p.v_row), *dout = (const u16 *)p.dout + head_offset(p, p.dout_row);
    const float *lse = p.lse + row_values_offset(p), *delta = p.delta + row_values_offset(p);

    auto load = [&](int stage, int query) {
        u32 tile = stage0 + stage * PAIR, values = rows0 + stage * BM * 8;
        load_tile<BM, D, NT>(tile, q, p.q_row, query, p.tokens, p.head_dim);
        load_tile<BM, D, NT>(tile + BM * ROW, dout, p.dout_row, query, p.tokens, p.head_dim);
        load_row_values<BM>(values, lse, query, p.tokens);
        load_row_values<BM>(values + BM * 4, delta, query, p.tokens);
        copy_commit();
    };
    // A key is seen by itself and later queries only when causal.
    int begin = p.causal ? first / BM * BM : 0;
    load_tile<BN, D, NT>(tile_k, k, p.k_row, first, p.tokens, p.head_dim);
    load_tile<BN, D, NT>(tile_v, v, p.v_row, first, p.tokens, p.head_dim);
    load(0, begin);

    float dk[D / 8][4], dv[D / 8][4];
    clear<D / 8>(dk);
    clear<D / 8>(dv);
    u32 left_k = left_operand<D>(tile_k, own), left_v = left_operand<D>(tile_v, own);
    const float factor = p.scale * LOG2E;
    int stage = 0;
    for (int query = begin; query < p.tokens; query += BM) {
        copy_wait_all();
        __syncthreads();  // this stage is there; with two stages, nobody reads the other any more
        if (STAGES == 2 && query + BM < p.tokens) load(stage ^ 1, query + BM);
        u32 tile_q = stage0 + stage * PAIR, tile_do = tile_q + BM * ROW;
        const float *values = rows + stage * BM * 2;

        float s[N][4];
        clear<N>(s);
        multiply_rows<D, N>(s, left_k, right_operand<D>(tile_q));
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float2 l = *(const float2 *)(values + n * 8 + (lane & 3) * 2);
            l.x *= LOG2E;
            l.y *= LOG2E;
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = power_of_two(fmaf(s[n][e], factor, -((e & 1) ? l.y : l.x)));
        }
        if (p.causal && query < first + BN) {
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (query + n * 8 + (lane & 3) * 2 + (e & 1) < first + own + (lane >> 2) + (e >> 1) * 8) s[n][e] = 0.f;
        }
        u32 a[N / 2][4];
        pack_left<N>(a, s);
        multiply_columns<D, N>(dv, a, right_operand_transposed<D>(tile_do));

        float ds[N][4];
        clear<N>(ds);
        multiply_rows<D, N>(ds, left_v, right_operand<D>(tile_do));
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float2 l = *(const float2 *)(values + BM + n * 8 + (lane & 3) * 2);
#pragma unroll
            for (int e = 0; e < 4; ++e) ds[n][e] = s[n][e] * (ds[n][e] - ((e & 1) ? l.y : l.x));
        }
        pack_left<N>(a, ds);
        multiply_columns<D, N>(dk, a, right_operand_transposed<D>(tile_q));
        if (STAGES == 2) {
            stage ^= 1;
        } else if (query + BM < p.tokens) {
            __syncthreads();
            load(0, query + BM);
        }
    }
    u16 *to_k = (u16 *)p.dk + head_offset(p, p.dk_row), *to_v = (u16 *)p.dv + head_offset(p, p.dv_row);
    // This warp's rows of K and V are read by no other warp.
    store_rows<D>(dk, p.scale, p.scale, tile_k, own, to_k, p.dk_row, first + own, p.tokens, p.head_dim);
    store_rows<D>(dv, 1.f, 1.f, tile_v, own, to_v, p.dv_row, first + own, p.tokens, p.head_dim);
}

// dQ: one block per WARPS * 16 query rows, a warp owns 16 of them. Shared memory: Q, dO, STAGES times (K, V tiles of BN rows).
template <int D, int WARPS, int BN, int STAGES>
INLINE void attention_backward_queries(const AttentionArgs &p) {
    constexpr int NT = WARPS * 32, BM = WARPS * 16, N = BN / 8, ROW = D * 2, PAIR = 2 * BN * ROW;
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 tile_q = shared_address(memory), tile_do = tile_q + BM * ROW, stage0 = tile_do + BM * ROW;
    int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16, first = blockIdx.x * BM;
    const u16 *q = (const u16 *)p.q + head_offset(p, p.q_row), *k = (const u16 *)p.k + head_offset(p, p.k_row);
    const u16 *v = (const u16 *)p.v + head_offset(p, p.v_row), *dout = (const u16 *)p.dout + head_offset(p, p.dout_row);

    auto load = [&](int stage, int key) {
        u32 tile = stage0 + stage * PAIR;
        load_tile<BN, D, NT>(tile, k, p.k_row, key, p.tokens, p.head_dim);
        load_tile<BN, D, NT>(tile + BN * ROW, v, p.v_row, key, p.tokens, p.head_dim);
        copy_commit();
    };
    load_tile<BM, D, NT>(tile_q, q, p.q_row, first, p.tokens, p.head_dim);
    load_tile<BM, D, NT>(tile_do, dout, p.dout_row, first, p.tokens, p.head_dim);
    load(0, 0);

    float lse2[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = first + own + (lane >> 2) + half * 8;
        bool there = row < p.tokens;
        lse2[half] = there ? p.lse[row_values_offset(p) + row] * LOG2E : 0.f;
        delta[half] = there ? p.delta[row_values_offset(p) + row] : 0.f;
    }
    float dq[D / 8][4];
    clear<D / 8>(dq);
    u32 left_q = left_operand<D>(tile_q, own), left_do = left_operand<D>(tile_do, own);
    const float factor = p.scale * LOG2E;
    int end = p.causal ? min(p.tokens, first + BM) : p.tokens, stage = 0;
    for (int key = 0; key < end; key += BN) {
        copy_wait_all();
        __syncthreads();
        if (STAGES == 2 && key + BN < end) load(stage ^ 1, key + BN);
        u32 tile_k = stage0 + stage * PAIR, tile_v = tile_k + BN * ROW;

        float s[N][4];
        clear<N>(s);
        multiply_rows<D, N>(s, left_q, right_operand<D>(tile_k));
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = power_of_two(fmaf(s[n][e], factor, -lse2[e >> 1]));
        if (key + BN > p.tokens || (p.causal && key + BN > first)) {
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int column = key + n * 8 + (lane & 3) * 2 + (e & 1);
                    if (column >= p.tokens || (p.causal && column > first + own + (lane >> 2) + (e >> 1) * 8)) s[n][e] = 0.f;
                }
        }
        float ds[N][4];
        clear<N>(ds);
        multiply_rows<D, N>(ds, left_do, right_operand<D>(tile_v));
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) ds[n][e] = s[n][e] * (ds[n][e] - delta[e >> 1]);
        u32 a[N / 2][4];
        pack_left<N>(a, ds);
        multiply_columns<D, N>(dq, a, right_operand_transposed<D>(tile_k));
        if (STAGES == 2) {
            stage ^= 1;
        } else if (key + BN < end) {
            __syncthreads();
            load(0, key + BN);
        }
    }
    u16 *to = (u16 *)p.dq + head_offset(p, p.dq_row);
    store_rows<D>(dq, p.scale, p.scale, tile_q, own, to, p.dq_row, first + own, p.tokens, p.head_dim);
}

// ---------------------------------------------------------------- instances
// The table in attention/fallback.rs repeats these numbers. "wide" is for devices whose blocks may have 200 KiB of shared memory, "narrow" for the
// others.
extern "C" __global__ __launch_bounds__(256, 1) void attention_delta(PARAMETERS) { attention_row_delta(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_forward_32(PARAMETERS) { attention_forward<32, 2, 4, 64>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_forward_64(PARAMETERS) { attention_forward<64, 2, 4, 64>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_forward_128_wide(PARAMETERS) { attention_forward<128, 2, 4, 64>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_forward_128_narrow(PARAMETERS) { attention_forward<128, 2, 4, 32>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_keys_32(PARAMETERS) { attention_backward_keys<32, 4, 64, 2>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_keys_64(PARAMETERS) { attention_backward_keys<64, 4, 64, 2>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_keys_128_wide(PARAMETERS) { attention_backward_keys<128, 4, 64, 2>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(256, 1) void attention_keys_128_narrow(PARAMETERS) { attention_backward_keys<128, 8, 64, 1>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_queries_32(PARAMETERS) { attention_backward_queries<32, 4, 64, 2>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_queries_64(PARAMETERS) { attention_backward_queries<64, 4, 64, 2>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(128, 2) void attention_queries_128_wide(PARAMETERS) { attention_backward_queries<128, 4, 64, 2>(ARGUMENTS); }
extern "C" __global__ __launch_bounds__(256, 1) void attention_queries_128_narrow(PARAMETERS) { attention_backward_queries<128, 8, 64, 1>(ARGUMENTS); }
