// Operations of the text encoder: RMS norm, rotation of halves, causal attention of captions that lie one behind the other.

// ---- RMS norm ------------------------------------------------------------------------------------------------------------------------

// y = w round(x / rms(x)), one block a row: two roundings, as the reference.
template <class T, int V>
__device__ __forceinline__ void rms_norm(T* y, i64 ystride, const T* x, i64 xstride, const T* w, int cols, float eps) {
    x += blockIdx.x * xstride;
    y += blockIdx.x * ystride;
    float sum[1] = {0.0f};
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V];
        load<V>(x + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) sum[0] += a[i] * a[i];
    }
    block_sum(sum);
    const float r = 1.0f / sqrtf(sum[0] / cols + eps);
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V], g[V];
        load<V>(x + c, a);
        load<V>(w + c, g);
        T rounded;
#pragma unroll
        for (int i = 0; i < V; i++) {
            put(&rounded, a[i] * r);
            a[i] = widen(rounded) * g[i];
        }
        store<V>(y + c, a);
    }
}

#define PARAMS(T) (T * y, i64 ystride, const T* x, i64 xstride, const T* w, int cols, float eps)
#define ARGS (y, ystride, x, xstride, w, cols, eps)
KERNEL(rms_norm_bf16, PARAMS(bf16), rms_norm<bf16, 8> ARGS)
KERNEL(rms_norm_bf16_1, PARAMS(bf16), rms_norm<bf16, 1> ARGS)
KERNEL(rms_norm_f32, PARAMS(float), rms_norm<float, 4> ARGS)
KERNEL(rms_norm_f32_1, PARAMS(float), rms_norm<float, 1> ARGS)
#undef PARAMS
#undef ARGS

// ---- Rotation of halves --------------------------------------------------------------------------------------------------------------

// In place: element j of a head's first half and j of its second are turned by the angle of the row's position; the table has a row of hd / 2
// for each position, in the type of the activations. Block: a row; threads go over heads and pairs.
template <class T>
__device__ __forceinline__ void rotate_halves(T* x, i64 stride, const u32* positions, const T* cosine, const T* sine, int heads, int hd) {
    const int half = hd / 2;
    const i64 table = (i64)positions[blockIdx.x] * half;
    x += blockIdx.x * stride;
    for (int i = threadIdx.x; i < heads * half; i += THREADS) {
        const int j = i % half;
        T* first = x + (i64)(i / half) * hd + j;
        const float a = widen(*first), b = widen(first[half]), c = widen(cosine[table + j]), s = widen(sine[table + j]);
        put(first, a * c - b * s);
        put(first + half, b * c + a * s);
    }
}
KERNEL(rotate_halves_bf16, (bf16* x, i64 stride, const u32* positions, const bf16* cosine, const bf16* sine, int heads, int hd),
       rotate_halves(x, stride, positions, cosine, sine, heads, hd))
KERNEL(rotate_halves_f32, (float* x, i64 stride, const u32* positions, const float* cosine, const float* sine, int heads, int hd),
       rotate_halves(x, stride, positions, cosine, sine, heads, hd))

// ---- Causal attention of packed captions ---------------------------------------------------------------------------------------------

// Block (tile, head): TILE queries of one caption against its keys up to the last of them, TILE at a time. `tiles` has three numbers for each
// tile: the caption's first row, the first query's place in the caption, and the caption's rows. Four threads share a query: each has every
// fourth key of a tile for the scores, and a quarter of the features for the sum. Everything is float32 until the result is rounded. Keys and
// values take turns in one shared tile; rows are padded so that four neighbours lie in different banks. HD is the least multiple that holds a head.
#define TILE 32
#define NONE __int_as_float(0xff800000)
#define LANES 4

template <class T, int HD>
__device__ __forceinline__ void fill_tile(float (&tile)[TILE][HD + 4], const T* from, i64 stride, int rows, int hd) {
    constexpr int V = 16 / sizeof(T);
    // The same for all threads of a block.
    if (hd % V == 0 && stride % V == 0 && (size_t)from % 16 == 0) {
        for (int i = threadIdx.x * V; i < TILE * HD; i += TILE * LANES * V) {
            const int row = i / HD, col = i % HD;
            float a[V] = {};
            if (row < rows && col < hd) load<V>(from + row * stride + col, a);
#pragma unroll
            for (int j = 0; j < V; j += 4) *(float4*)&tile[row][col + j] = make_float4(a[j], a[j + 1], a[j + 2], a[j + 3]);
        }
        return;
    }
    for (int i = threadIdx.x; i < TILE * HD; i += TILE * LANES) {
        const int row = i / HD, col = i % HD;
        tile[row][col] = row < rows && col < hd ? widen(from[row * stride + col]) : 0.0f;
    }
}

template <class T, int HD>
__device__ __forceinline__ void caption_attention(T* out, i64 ostride, const T* q, const T* k, const T* v, i64 stride, const u32* tiles, int group, int hd,
                                                  float scale) {
    __shared__ __align__(16) float queries[TILE][HD + 4], tile[TILE][HD + 4];
    __shared__ float weights[TILE][TILE + 1];
    const u32* at = tiles + 3 * blockIdx.x;
    const i64 start = at[0];
    const int first = at[1], rows = at[2], head = blockIdx.y, row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int count = min(TILE, rows - first);
    q += (start + first) * stride + (i64)head * hd;
    k += start * stride + (i64)(head / group) * hd;
    v += start * stride + (i64)(head / group) * hd;
    fill_tile<T, HD>(queries, q, stride, count, hd);
    float largest = NONE, sum = 0.0f, mixed[HD / LANES];
#pragma unroll
    for (int d = 0; d < HD / LANES; d++) mixed[d] = 0.0f;
    for (int begin = 0; begin < first + count; begin += TILE) {
        const int keys = min(TILE, rows - begin);
        __syncthreads();
        fill_tile<T, HD>(tile, k + begin * stride, stride, keys, hd);
        __syncthreads();
        float score[TILE / LANES];
#pragma unroll
        for (int j = 0; j < TILE / LANES; j++) score[j] = 0.0f;
#pragma unroll 4
        for (int d = 0; d < HD; d += 4) {
            const float4 x = *(const float4*)&queries[row][d];
#pragma unroll
            for (int j = 0; j < TILE / LANES; j++) {
                const float4 y = *(const float4*)&tile[j * LANES + lane][d];
                score[j] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
            }
        }
        float top = largest;
#pragma unroll
        for (int j = 0; j < TILE / LANES; j++) {
            const int key = begin + j * LANES + lane;
            score[j] = key <= first + row && key < rows ? score[j] * scale : NONE;
            top = fmaxf(top, score[j]);
        }
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        // The first tile has the first key, which every query sees: `top` is a number from then on.
        const float shrink = expf(largest - top);
        float part = 0.0f;
#pragma unroll
        for (int j = 0; j < TILE / LANES; j++) {
            const float weight = expf(score[j] - top);
            weights[row][j * LANES + lane] = weight;
            part += weight;
        }
        part += __shfl_xor_sync(FULL, part, 1);
        part += __shfl_xor_sync(FULL, part, 2);
        sum = sum * shrink + part;
        largest = top;
        __syncthreads();
        fill_tile<T, HD>(tile, v + begin * stride, stride, keys, hd);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < HD / LANES; d++) mixed[d] *= shrink;
        for (int key = 0; key < keys; key++) {
            const float weight = weights[row][key];
#pragma unroll
            for (int d = 0; d < HD / LANES; d += 4) {
                const float4 y = *(const float4*)&tile[key][lane * 4 + d * LANES];
                mixed[d] += weight * y.x;
                mixed[d + 1] += weight * y.y;
                mixed[d + 2] += weight * y.z;
                mixed[d + 3] += weight * y.w;
            }
        }
    }
    if (row >= count) return;
    out += (start + first + row) * ostride + (i64)head * hd;
#pragma unroll
    for (int d = 0; d < HD / LANES; d++) {
        const int col = lane * 4 + d / 4 * 4 * LANES + d % 4;
        if (col < hd) put(out + col, mixed[d] / sum);
    }
}

#define PARAMS(T) (T * out, i64 ostride, const T* q, const T* k, const T* v, i64 stride, const u32* tiles, int group, int hd, float scale)
#define ARGS (out, ostride, q, k, v, stride, tiles, group, hd, scale)
extern "C" __global__ __launch_bounds__(TILE* LANES) void caption_attention_bf16_32 PARAMS(bf16) { caption_attention<bf16, 32> ARGS; }
extern "C" __global__ __launch_bounds__(TILE* LANES) void caption_attention_bf16_64 PARAMS(bf16) { caption_attention<bf16, 64> ARGS; }
extern "C" __global__ __launch_bounds__(TILE* LANES) void caption_attention_bf16_128 PARAMS(bf16) { caption_attention<bf16, 128> ARGS; }
extern "C" __global__ __launch_bounds__(TILE* LANES) void caption_attention_f32_32 PARAMS(float) { caption_attention<float, 32> ARGS; }
extern "C" __global__ __launch_bounds__(TILE* LANES) void caption_attention_f32_64 PARAMS(float) { caption_attention<float, 64> ARGS; }
extern "C" __global__ __launch_bounds__(TILE* LANES) void caption_attention_f32_128 PARAMS(float) { caption_attention<float, 128> ARGS; }
#undef PARAMS
#undef ARGS
#undef TILE
#undef NONE
#undef LANES
