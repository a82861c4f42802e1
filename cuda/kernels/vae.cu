// The VAE's operations in float32, channels last: a pixel is a row of `channels` values, an image's pixel rows follow each other, images of a
// batch too. What a launch sees of an image may be a strip: `rows` pixel rows of `height`, the first of them row `first`.

// ---- Neighbourhoods of pixels side by side, for convolutions as matrix products ------------------------------------------------------

// One pixel row of the result per blockIdx.x: for every pixel taps_y * taps_x neighbours of `channels` values. Row j of all (images after
// each other, `out_rows` each) starts at row (j % out_rows) * stride + base of the image, which is twice as large where up is 1 (each
// pixel twice in both directions). Beyond the image are zeros. With a table (mean, scale and shift by image and channel) the values are
// normalised on the way, and with silu 1 activated.
template <int V>
__device__ __forceinline__ void patches(float* out, i64 out_stride, const float* x, const float* table, int silu, int rows, int width, int channels,
                                        int first, int height, int taps_y, int taps_x, int stride, int up, int pad_x, int base, int out_rows,
                                        int row0, int out_width) {
    const int groups = channels / V, item = blockIdx.y * THREADS + threadIdx.x;
    if (item >= out_width * taps_y * taps_x * groups) return;
    const int j = row0 + blockIdx.x, image = j / out_rows;
    const int channel = item % groups * V, tap = item / groups;
    const int kx = tap % taps_x, ky = tap / taps_x % taps_y, ox = tap / (taps_x * taps_y);
    const int u = (j - image * out_rows) * stride + base + ky, v = ox * stride + kx - pad_x;
    float a[V];
    if (u < 0 || v < 0 || u >= height << up || v >= width << up) {
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = 0.0f;
    } else {
        load<V>(x + (((i64)image * rows + (u >> up) - first) * width + (v >> up)) * channels + channel, a);
        if (table) {
            const float* t = table + (i64)image * 3 * channels + channel;
            float mean[V], scale[V], shift[V];
            load<V>(t, mean);
            load<V>(t + channels, scale);
            load<V>(t + 2 * channels, shift);
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float n = (a[i] - mean[i]) * scale[i] + shift[i];
                a[i] = silu ? n * sigmoid(n) : n;
            }
        }
    }
    store<V>(out + ((i64)blockIdx.x * out_width + ox) * out_stride + (ky * taps_x + kx) * channels + channel, a);
}

#define PARAMS                                                                                                                             \
    (float* out, i64 out_stride, const float* x, const float* table, int silu, int rows, int width, int channels, int first, int height,   \
     int taps_y, int taps_x, int stride, int up, int pad_x, int base, int out_rows, int row0, int out_width)
#define ARGUMENTS                                                                                                                          \
    (out, out_stride, x, table, silu, rows, width, channels, first, height, taps_y, taps_x, stride, up, pad_x, base, out_rows, row0,       \
     out_width)
KERNEL(vae_patches, PARAMS, patches<4> ARGUMENTS)
KERNEL(vae_patches_1, PARAMS, patches<1> ARGUMENTS)
#undef PARAMS
#undef ARGUMENTS

// The commonest case of the same, a pixel beside its left and its right neighbour: every value is read and normalised once and goes to its three
// places. Row blockIdx.x of the result is row `top` + blockIdx.x of the one image.
extern "C" __global__ __launch_bounds__(THREADS) void vae_triples(float* out, const float* x, const float* table, int silu, int width, int channels,
                                                                  int first, int height, int top) {
    const int groups = channels / 4, item = blockIdx.y * THREADS + threadIdx.x;
    if (item >= width * groups) return;
    const int column = item / groups, channel = (item - column * groups) * 4, u = top + (int)blockIdx.x;
    float a[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (u >= 0 && u < height) {
        load<4>(x + ((i64)(u - first) * width + column) * channels + channel, a);
        if (table) {
            float mean[4], scale[4], shift[4];
            load<4>(table + channel, mean);
            load<4>(table + channels + channel, scale);
            load<4>(table + 2 * channels + channel, shift);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float n = (a[i] - mean[i]) * scale[i] + shift[i];
                a[i] = silu ? n * sigmoid(n) : n;
            }
        }
    }
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float* to = out + ((i64)blockIdx.x * width + column) * 3 * channels + channel;
    store<4>(to + channels, a);
    if (column + 1 < width) store<4>(to + 3 * channels, a);
    if (column > 0) store<4>(to - channels, a);
    if (column == 0) store<4>(to, zero);
    if (column + 1 == width) store<4>(to + 2 * channels, zero);
}

// ---- Biases, and the sums that a group norm needs -------------------------------------------------------------------------------------

// Most accesses of a pixel: LANES_MAX in ops/vae.rs.
#define LANES_MAX 1024

// One pixel row of the strip per blockIdx.x, image blockIdx.y. Sums and sums of squares of every group go to the place of that row of the image:
// what they are does not depend on how the image is cut into strips. In double, where a square of a float is exact, so that the variance
// can be had from them.
template <int V>
__device__ __forceinline__ void finish(float* y, const float* bias, const float* bias2, double* sums, int rows, int width, int channels, int groups,
                                       int first, int height) {
    __shared__ double part[2][LANES_MAX];
    const int lanes = channels / V, row = blockIdx.x, image = blockIdx.y;
    const bool narrow = lanes < THREADS;
    const int across = narrow ? THREADS / lanes : 1, pixel0 = narrow ? threadIdx.x / lanes : 0;
    float* line = y + ((i64)image * rows + row) * width * channels;
    if (pixel0 < across) {
        for (int lane = narrow ? threadIdx.x % lanes : threadIdx.x; lane < lanes; lane += THREADS) {
            float b[V], c[V];
#pragma unroll
            for (int i = 0; i < V; i++) b[i] = 0.0f;
            if (bias) load<V>(bias + lane * V, b);
            if (bias2) {
                load<V>(bias2 + lane * V, c);
#pragma unroll
                for (int i = 0; i < V; i++) b[i] += c[i];
            }
            double sum = 0.0, squares = 0.0;
#pragma unroll 4
            for (int p = pixel0; p < width; p += across) {
                float a[V];
                float* at = line + (i64)p * channels + lane * V;
                load<V>(at, a);
#pragma unroll
                for (int i = 0; i < V; i++) a[i] += b[i];
                if (bias || bias2) store<V>(at, a);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    const double d = a[i];
                    sum += d;
                    squares = fma(d, d, squares);
                }
            }
            part[0][pixel0 * lanes + lane] = sum;
            part[1][pixel0 * lanes + lane] = squares;
        }
    }
    if (!sums) return;
    __syncthreads();
    const int per = lanes / groups;
    for (int g = threadIdx.x; g < groups; g += THREADS) {
        double sum = 0.0, squares = 0.0;
        for (int p = 0; p < across; p++) {
            for (int l = 0; l < per; l++) {
                sum += part[0][p * lanes + g * per + l];
                squares += part[1][p * lanes + g * per + l];
            }
        }
        double* to = sums + (((i64)image * height + first + row) * groups + g) * 2;
        to[0] = sum;
        to[1] = squares;
    }
}

#define PARAMS                                                                                                                             \
    (float* y, const float* bias, const float* bias2, double* sums, int rows, int width, int channels, int groups, int first, int height)
#define ARGUMENTS (y, bias, bias2, sums, rows, width, channels, groups, first, height)
KERNEL(vae_finish, PARAMS, finish<4> ARGUMENTS)
KERNEL(vae_finish_1, PARAMS, finish<1> ARGUMENTS)
#undef PARAMS
#undef ARGUMENTS

// Group blockIdx.x of image blockIdx.y: its rows' sums to mean, scale and shift of each of its channels.
extern "C" __global__ __launch_bounds__(THREADS) void vae_norm_table(float* table, const double* sums, const float* weight, const float* bias,
                                                                     int height, int groups, int channels, double count, double eps) {
    const int group = blockIdx.x, image = blockIdx.y, per = channels / groups;
    double s[2] = {0.0, 0.0};
    for (int r = threadIdx.x; r < height; r += THREADS) {
        const double* from = sums + (((i64)image * height + r) * groups + group) * 2;
        s[0] += from[0];
        s[1] += from[1];
    }
    block_sum(s);
    const double mean = s[0] / count, variance = fmax(s[1] / count - mean * mean, 0.0);
    const double rstd = 1.0 / sqrt(variance + eps);
    float* to = table + (i64)image * 3 * channels;
    for (int c = group * per + threadIdx.x; c < (group + 1) * per; c += THREADS) {
        to[c] = (float)mean;
        to[channels + c] = (float)(rstd * (double)weight[c]);
        to[2 * channels + c] = bias[c];
    }
}

// ---- Pixels ---------------------------------------------------------------------------------------------------------------------------

// 8-bit values to -1 .. 1, rounded as the host does it: divided by 127.5, then less 1.
extern "C" __global__ __launch_bounds__(THREADS) void vae_pixels(float* out, const u8* bytes, i64 count) {
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) out[i] = __fadd_rn(__fdiv_rn((float)bytes[i], 127.5f), -1.0f);
}

// ---- Softmax of a row, in place -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float block_max(float x) {
    __shared__ float warps[THREADS / 32];
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, o));
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
    __syncthreads();
    x = warps[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; w++) x = fmaxf(x, warps[w]);
    return x;
}

template <int V>
__device__ __forceinline__ void softmax(float* x, i64 stride, int cols) {
    float* row = x + (i64)blockIdx.x * stride;
    float top = -__int_as_float(0x7f800000);
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V];
        load<V>(row + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) top = fmaxf(top, a[i]);
    }
    top = block_max(top);
    float sum[1] = {0.0f};
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V];
        load<V>(row + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) {
            a[i] = expf(a[i] - top);
            sum[0] += a[i];
        }
        store<V>(row + c, a);
    }
    block_sum(sum);
    const float factor = 1.0f / sum[0];
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float a[V];
        load<V>(row + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] *= factor;
        store<V>(row + c, a);
    }
}

KERNEL(vae_softmax, (float* x, i64 stride, int cols), softmax<4>(x, stride, cols))
KERNEL(vae_softmax_1, (float* x, i64 stride, int cols), softmax<1>(x, stride, cols))
