// Row statistics of logits; a warp reads each logit of its row once.
//
// A tile holds the raw products of some rows with one or more heads, float32, (rows, heads, stride). Columns of a head
// beyond `classes` are padding, so that four logits load at once (stride is a multiple of 4). The logit of a column is
// raw * scale + bias. A warp takes one row of one head. Its lanes loop over the columns, four at a time, each with its
// own maximum, sum of exponentials, sum of their squares (for the Brier score), rank of the label and best column; a
// reduction combines them at the end.
//
// Along an interpolation a warp takes one row and GROUP alphas: two logits are loaded, and each alpha has its own
// running maximum. With a common bound, such as the interpolated maxima of the ends, a row on which the ends disagree
// underflows.
//
// Logits are computed by explicit fused operations, so that the label's logit, computed first, is bit for bit the one
// that the loop computes again: ties are exact, and are ranked by index.
//
// Scalars (rows, classes, ...) are int; offsets are 64-bit. Outputs are (heads or alphas, out_stride), the row last;
// each may be null. Everything is deterministic.

#ifndef GROUP
#define GROUP 7  // alphas in registers at once: a divisor of the usual 21
#endif

constexpr int LANES = 32;
constexpr int WIDTH = 4;
constexpr unsigned EVERYONE = 0xffffffffu;
constexpr int NO_COLUMN = 0x7fffffff;
constexpr float LOWEST = -3.402823466e38f;

struct Running {
    float top, sum, square;  // largest logit; sums of exp(z - top) and of its square
    int above, best;         // logits that rank before the label's; column of the largest
};

struct Outputs {
    float* nll;
    int* rank;
    float *confidence, *brier;
    int* predicted;
};

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float logit(float raw, float scale, float bias) { return __fmaf_rn(raw, scale, bias); }

__device__ __forceinline__ float between(float first, float second, float alpha) {
    return __fmaf_rn(1.0f - alpha, first, __fmul_rn(alpha, second));
}

__device__ __forceinline__ void load(const float* row, const float* bias, float scale, int column, float (&z)[WIDTH]) {
    const float4 raw = *reinterpret_cast<const float4*>(row + column);
    float4 shift = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (bias != nullptr) shift = *reinterpret_cast<const float4*>(bias + column);
    z[0] = logit(raw.x, scale, shift.x);
    z[1] = logit(raw.y, scale, shift.y);
    z[2] = logit(raw.z, scale, shift.z);
    z[3] = logit(raw.w, scale, shift.w);
}

__device__ __forceinline__ void drop_padding(int column, int classes, float (&z)[WIDTH]) {
    if (column + WIDTH <= classes) return;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
        if (column + i >= classes) z[i] = negative_infinity();
}

// Logits that rank before the label's: larger ones, and equal ones in earlier columns.
__device__ __forceinline__ int outranked(const float (&z)[WIDTH], int column, int label, float target) {
    int count = 0;
    if (column + WIDTH <= label) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) count += z[i] >= target;
    } else if (column > label) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) count += z[i] > target;
    } else {  // the label is one of these four
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) count += column + i < label ? z[i] >= target : z[i] > target;
    }
    return count;
}

__device__ __forceinline__ void absorb(Running& run, const float (&z)[WIDTH], int column) {
    const float top = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
    if (top > run.top) {
        const float shrink = __expf(run.top - top);
        run.top = top;
        run.sum *= shrink;
        run.square *= shrink * shrink;
        run.best = column + (z[0] == top ? 0 : z[1] == top ? 1 : z[2] == top ? 2 : 3);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float share = __expf(z[i] - run.top);
        run.sum += share;
        run.square = __fmaf_rn(share, share, run.square);
    }
}

// Reduce over the lanes: the common maximum first, so that each lane rescales once.
__device__ __forceinline__ void meet(Running& run) {
    float top = run.top;
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(EVERYONE, top, step));
    const float shrink = __expf(run.top - top);
    run.sum *= shrink;
    run.square *= shrink * shrink;
    if (run.top < top) run.best = NO_COLUMN;
    run.top = top;
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        run.sum += __shfl_xor_sync(EVERYONE, run.sum, step);
        run.square += __shfl_xor_sync(EVERYONE, run.square, step);
        run.above += __shfl_xor_sync(EVERYONE, run.above, step);
        run.best = min(run.best, __shfl_xor_sync(EVERYONE, run.best, step));
    }
}

__device__ __forceinline__ void write(const Running& run, float target, long long place, const Outputs& out) {
    const float whole = 1.0f / run.sum;
    const float likely = __expf(target - run.top) * whole;
    if (out.nll != nullptr) out.nll[place] = logf(run.sum) + (run.top - target);
    if (out.confidence != nullptr) out.confidence[place] = whole;
    if (out.brier != nullptr) out.brier[place] = run.square * whole * whole + (1.0f - 2.0f * likely);
    if (out.rank != nullptr) out.rank[place] = run.above;
    // A row of NaN has no best column. Column 0 keeps counts by column in bounds; the NLL is NaN.
    if (out.predicted != nullptr) out.predicted[place] = run.best == NO_COLUMN ? 0 : run.best;
}

__device__ __forceinline__ long long warp_index() {
    return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
}

// One warp per row and head. bias is (heads, stride) or null, scale (heads,).
extern "C" __global__ void __launch_bounds__(256)
    nll_heads(const float* __restrict__ tile, const float* __restrict__ bias, const float* __restrict__ scale,
              const long long* __restrict__ labels, int rows, int heads, int classes, int stride, long long out_stride,
              float* nll, int* rank, float* confidence, float* brier, int* predicted) {
    const long long warp = warp_index();
    if (warp >= static_cast<long long>(rows) * heads) return;
    const int head = static_cast<int>(warp % heads);
    const long long row = warp / heads;
    const int lane = threadIdx.x % LANES;
    const int label = static_cast<int>(labels[row]);
    const float* mine = tile + warp * stride;
    const float* shift = bias == nullptr ? nullptr : bias + static_cast<long long>(head) * stride;
    const float factor = scale[head];
    const float target = logit(mine[label], factor, shift == nullptr ? 0.0f : shift[label]);
    Running run = {LOWEST, 0.0f, 0.0f, 0, NO_COLUMN};
#pragma unroll 2
    for (int column = WIDTH * lane; column < classes; column += WIDTH * LANES) {
        float z[WIDTH];
        load(mine, shift, factor, column, z);
        drop_padding(column, classes, z);
        run.above += outranked(z, column, label, target);
        absorb(run, z, column);
    }
    meet(run);
    if (lane == 0) write(run, target, head * out_stride + row, {nll, rank, confidence, brier, predicted});
}

// One warp per row and group of alphas, on tiles of two heads; bias is (2, stride) or null, scale (2,).
extern "C" __global__ void __launch_bounds__(256)
    nll_alphas(const float* __restrict__ tile, const float* __restrict__ bias, const float* __restrict__ scale,
               const float* __restrict__ alphas, const long long* __restrict__ labels, int rows, int n_alphas,
               int classes, int stride, long long out_stride, float* nll, int* rank, float* confidence, float* brier,
               int* predicted) {
    const int groups = (n_alphas + GROUP - 1) / GROUP;
    const long long warp = warp_index();
    if (warp >= static_cast<long long>(rows) * groups) return;
    const int first = static_cast<int>(warp % groups) * GROUP;  // adjacent groups of a row share reads in L1
    const long long row = warp / groups;
    const int lane = threadIdx.x % LANES;
    const int label = static_cast<int>(labels[row]);
    const float* mine = tile + 2 * row * stride;
    const float* shift = bias == nullptr ? nullptr : bias + stride;
    const float ends[2] = {logit(mine[label], scale[0], bias == nullptr ? 0.0f : bias[label]),
                           logit(mine[stride + label], scale[1], shift == nullptr ? 0.0f : shift[label])};
    float alpha[GROUP], target[GROUP];
    Running run[GROUP];
#pragma unroll
    for (int k = 0; k < GROUP; ++k) {
        alpha[k] = alphas[min(first + k, n_alphas - 1)];
        target[k] = between(ends[0], ends[1], alpha[k]);
        run[k] = {LOWEST, 0.0f, 0.0f, 0, NO_COLUMN};
    }
    for (int column = WIDTH * lane; column < classes; column += WIDTH * LANES) {
        float one[WIDTH], two[WIDTH];
        load(mine, bias, scale[0], column, one);
        load(mine + stride, shift, scale[1], column, two);
#pragma unroll
        for (int k = 0; k < GROUP; ++k) {
            float z[WIDTH];
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) z[i] = between(one[i], two[i], alpha[k]);
            drop_padding(column, classes, z);
            run[k].above += outranked(z, column, label, target[k]);
            absorb(run[k], z, column);
        }
    }
#pragma unroll
    for (int k = 0; k < GROUP; ++k) {
        meet(run[k]);
        if (lane == 0 && first + k < n_alphas)
            write(run[k], target[k], (first + k) * out_stride + row, {nll, rank, confidence, brier, predicted});
    }
}
