// XXH3-64 of pieces of a payload, seed 0: the checksum that the loader computed on the host, computed again on what reached the device.
//
// One block of threads hashes a piece. A long piece is a chain over its 1 KiB blocks, acc = scramble(acc + sum of the block), whose sums do
// not depend on the chain: warps 1 to 7 make the sums of the next blocks while warp 0 walks the chain over the last ones. Constants
// and order are the published algorithm's (xxHash, XXH3 with its default secret); short pieces are one thread's work.

#define SUMMING_WARPS 7
#define SUMS_PER_WARP 8
#define SUMS (SUMMING_WARPS * SUMS_PER_WARP)
#define BLOCK_BYTES 1024

#define PRIME32_1 0x9e3779b1ull
#define PRIME32_2 0x85ebca77ull
#define PRIME32_3 0xc2b2ae3dull
#define PRIME64_1 0x9e3779b185ebca87ull
#define PRIME64_2 0xc2b2ae3d27d4eb4full
#define PRIME64_3 0x165667b19e3779f9ull
#define PRIME64_4 0x85ebca77c2b2ae63ull
#define PRIME64_5 0x27d4eb2f165667c5ull
#define PRIME_MX1 0x165667919e3779f9ull
#define PRIME_MX2 0x9fb21c651e98df25ull

// The default secret as little-endian words.
__constant__ u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

__device__ __forceinline__ u64 shifted(u64 low, u64 high, int bytes) {
    return bytes == 0 ? low : low >> (8 * bytes) | high << (64 - 8 * bytes);
}

// Eight bytes of the secret from byte `at`, which is at most 184.
__device__ __forceinline__ u64 secret(int at) {
    return shifted(SECRET[at / 8], SECRET[at % 8 ? at / 8 + 1 : at / 8], at % 8);
}

// Eight bytes from anywhere. Only words that hold one of them are read.
__device__ __forceinline__ u64 read64(const u8* p) {
    const int off = (int)((u64)p & 7);
    const u64* word = (const u64*)(p - off);
    return off == 0 ? word[0] : shifted(word[0], word[1], off);
}

__device__ __forceinline__ u64 read32(const u8* p) { return p[0] | (u64)p[1] << 8 | (u64)p[2] << 16 | (u64)p[3] << 24; }

__device__ __forceinline__ u64 swap64(u64 x) {
    const u32 low = __byte_perm((u32)x, 0, 0x0123), high = __byte_perm((u32)(x >> 32), 0, 0x0123);
    return (u64)low << 32 | high;
}

__device__ __forceinline__ u64 rotl(u64 x, int bits) { return x << bits | x >> (64 - bits); }
__device__ __forceinline__ u64 fold(u64 a, u64 b) { return a * b ^ __umul64hi(a, b); }

__device__ __forceinline__ u64 avalanche(u64 h) {
    h ^= h >> 37;
    h *= PRIME_MX1;
    return h ^ h >> 32;
}

__device__ __forceinline__ u64 avalanche64(u64 h) {
    h ^= h >> 33;
    h *= PRIME64_2;
    h ^= h >> 29;
    h *= PRIME64_3;
    return h ^ h >> 32;
}

__device__ __forceinline__ u64 mix16(const u8* p, int at) { return fold(read64(p) ^ secret(at), read64(p + 8) ^ secret(at + 8)); }

// At most 240 bytes.
__device__ u64 hash_short(const u8* p, u64 len) {
    if (len == 0) return avalanche64(secret(56) ^ secret(64));
    if (len <= 3) {
        const u64 packed = (u64)p[0] << 16 | (u64)p[len >> 1] << 24 | p[len - 1] | len << 8;
        return avalanche64(packed ^ ((u32)secret(0) ^ (u32)secret(4)));
    }
    if (len <= 8) {
        u64 h = (read32(p + len - 4) + (read32(p) << 32)) ^ secret(8) ^ secret(16);
        h ^= rotl(h, 49) ^ rotl(h, 24);
        h *= PRIME_MX2;
        h ^= (h >> 35) + len;
        h *= PRIME_MX2;
        return h ^ h >> 28;
    }
    if (len <= 16) {
        const u64 low = read64(p) ^ secret(24) ^ secret(32), high = read64(p + len - 8) ^ secret(40) ^ secret(48);
        return avalanche(len + swap64(low) + high + fold(low, high));
    }
    u64 acc = len * PRIME64_1;
    if (len <= 128) {
        for (int i = ((int)len - 1) / 32; i >= 0; i--) acc += mix16(p + 16 * i, 32 * i) + mix16(p + len - 16 * (i + 1), 32 * i + 16);
        return avalanche(acc);
    }
    for (int i = 0; i < 8; i++) acc += mix16(p + 16 * i, 16 * i);
    acc = avalanche(acc);
    for (int i = 8; i < (int)len / 16; i++) acc += mix16(p + 16 * i, 16 * (i - 8) + 3);
    return avalanche(acc + mix16(p + len - 16, 119));
}

// What a stripe of 64 bytes adds to the accumulators: `product` to the lane's own, `plain` to its neighbour's.
__device__ __forceinline__ void stripe(const u8* p, u64 key, u64& product, u64& plain) {
    const u64 word = read64(p), mixed = word ^ key;
    product += (mixed & 0xffffffffull) * (mixed >> 32);
    plain += word;
}

// The sums of four groups of eight lanes in all of them, and each lane's share of its neighbour's words.
__device__ __forceinline__ u64 gather(u64 product, u64 plain) {
    for (int d = 8; d < 32; d *= 2) {
        product += __shfl_xor_sync(FULL, product, d);
        plain += __shfl_xor_sync(FULL, plain, d);
    }
    return product + __shfl_xor_sync(FULL, plain, 1);
}

__device__ __forceinline__ u64 hash_long(const u8* p, u64 len, u64 (*sums)[SUMS][8]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, word = lane % 8, group = lane / 8;
    const u64 blocks = (len - 1) / BLOCK_BYTES, rounds = (blocks + SUMS - 1) / SUMS;
    const u64 start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    u64 acc = start[0];
#pragma unroll
    for (int i = 1; i < 8; i++) acc = word == i ? start[i] : acc;
    u64 keys[4];
#pragma unroll
    for (int q = 0; q < 4; q++) keys[q] = SECRET[4 * q + group + word];
    const u64 scramble = SECRET[16 + word];
    for (u64 round = 0; round <= rounds; round++) {
        if (warp > 0 && round < rounds) {
            for (int i = 0; i < SUMS_PER_WARP; i++) {
                const int place = (warp - 1) * SUMS_PER_WARP + i;
                const u64 block = round * SUMS + place;
                if (block >= blocks) break;
                u64 product = 0, plain = 0;
#pragma unroll
                for (int q = 0; q < 4; q++) stripe(p + block * BLOCK_BYTES + 64 * (4 * q + group) + 8 * word, keys[q], product, plain);
                const u64 sum = gather(product, plain);
                if (group == 0) sums[round & 1][place][word] = sum;
            }
        }
        if (warp == 0 && round > 0) {
            const u64 left = blocks - (round - 1) * SUMS;
            const int count = left < SUMS ? (int)left : SUMS;
            for (int i = 0; i < count; i++) {
                acc += sums[(round - 1) & 1][i][word];
                acc = (acc ^ acc >> 47 ^ scramble) * PRIME32_1;
            }
        }
        __syncthreads();
    }
    if (warp > 0) return 0;
    u64 product = 0, plain = 0;
    const u8* tail = p + blocks * BLOCK_BYTES;
    const int stripes = (int)((len - 1 - blocks * BLOCK_BYTES) / 64);
    for (int i = group; i < stripes; i += 4) stripe(tail + 64 * i + 8 * word, SECRET[i + word], product, plain);
    if (group == 0) stripe(p + len - 64 + 8 * word, secret(121 + 8 * word), product, plain);
    __syncwarp();
    acc += gather(product, plain);
    const u64 mixed = acc ^ secret(11 + 8 * word), other = __shfl_xor_sync(FULL, mixed, 1);
    u64 result = word % 2 == 0 ? fold(mixed, other) : 0;
    for (int d = 1; d < 8; d *= 2) result += __shfl_xor_sync(FULL, result, d);
    return avalanche(result + len * PRIME64_1);
}

// `pieces` holds start and length of each piece of `payload`; `hashes` and `pieces` may lie in page-locked host memory.
extern "C" __global__ __launch_bounds__(THREADS) void xxh3_pieces(u64* hashes, const u8* payload, const u64* pieces) {
    __shared__ u64 sums[2][SUMS][8];
    const u64 from = pieces[2 * blockIdx.x], len = pieces[2 * blockIdx.x + 1];
    const u8* p = payload + from;
    u64 hash = 0;
    if (len > 240) {
        hash = hash_long(p, len, sums);
    } else if (threadIdx.x == 0) {
        hash = hash_short(p, len);
    }
    if (threadIdx.x == 0) hashes[blockIdx.x] = hash;
}
