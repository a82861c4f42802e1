// What every unit starts with. No header is included: the run-time compiler has none on a user's machine.
//
// A kernel is a template over the element type T and the number V of elements per access (16 bytes where every row allows it, else 1),
// made callable by a line that begins with KERNEL(name, (parameters), body). Every parameter is a scalar or pointer of at most 8 bytes.
// Sums run in a fixed order (within a thread, then a butterfly within a warp, then over the warps): the same bytes in every run.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define THREADS 256
#define FULL 0xffffffffu
#define KERNEL(name, params, ...) extern "C" __global__ __launch_bounds__(THREADS, 4) void name params { __VA_ARGS__; }

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Two float32 to bfloat16, ties to even, the first in the lower half.
__device__ __forceinline__ u32 narrow2(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ void put(float* p, float x) { *p = x; }
__device__ __forceinline__ void put(bf16* p, float x) { p->bits = (u16)narrow2(x, 0.0f); }

// V elements as float32. V is 16 / sizeof(T), or less: then element by element; float32 beside bf16 takes V = 8 in two accesses.
template <int V>
__device__ __forceinline__ void load(const float* p, float (&x)[V]) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const float4 a = *(const float4*)(p + i);
            x[i] = a.x;
            x[i + 1] = a.y;
            x[i + 2] = a.z;
            x[i + 3] = a.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = p[i];
    }
}

template <int V>
__device__ __forceinline__ void load(const bf16* p, float (&x)[V]) {
    if constexpr (V == 8) {
        const uint4 a = *(const uint4*)p;
        const u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(w[i] << 16);
            x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = widen(p[i]);
    }
}

template <int V>
__device__ __forceinline__ void store(float* p, const float (&x)[V]) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) *(float4*)(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) p[i] = x[i];
    }
}

template <int V>
__device__ __forceinline__ void store(bf16* p, const float (&x)[V]) {
    if constexpr (V == 8) {
        *(uint4*)p = make_uint4(narrow2(x[0], x[1]), narrow2(x[2], x[3]), narrow2(x[4], x[5]), narrow2(x[6], x[7]));
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) put(p + i, x[i]);
    }
}

// Sums over the block, in every thread. All threads of a block of THREADS must come here.
template <int N, class F>
__device__ __forceinline__ void block_sum(F (&x)[N]) {
    __shared__ F warps[THREADS / 32][N];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) x[i] += __shfl_xor_sync(FULL, x[i], o);
    }
    // Nobody may still read the sums of an earlier call.
    __syncthreads();
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < N; i++) warps[warp][i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = 0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) x[i] += warps[w][i];
    }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
