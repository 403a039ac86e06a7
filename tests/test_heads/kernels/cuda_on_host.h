// Enough of CUDA to run a warp-level kernel on a CPU: the kernel's source is included as it is, each warp's 32 lanes
// are fibers that take turns at every shuffle. Blocks and warps run one after another. No shared memory, no atomics.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __restrict__ __restrict

struct Index {
    unsigned x;
};
static Index blockIdx, blockDim, threadIdx;

struct float4 {
    float x, y, z, w;
};
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __int_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
static float __fmul_rn(float a, float b) { return a * b; }
#define __expf(x) std::exp(x)  // the C library has that name already
using std::min;

namespace host {
constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;
static ucontext_t scheduler, fibers[kLanes];
static std::vector<char> stacks(kLanes* kStack);
static bool done[kLanes];
static int lane;
static double slots[kLanes];  // wide enough for any int or float
static std::function<void()> kernel;

static void body() {
    kernel();
    done[lane] = true;
}

static void yield() { swapcontext(&fibers[lane], &scheduler); }

static void run_warp(unsigned first_thread) {
    for (int i = 0; i < kLanes; ++i) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = &stacks[i * kStack];
        fibers[i].uc_stack.ss_size = kStack;
        fibers[i].uc_link = &scheduler;
        done[i] = false;
        makecontext(&fibers[i], body, 0);
    }
    while (!std::all_of(done, done + kLanes, [](bool d) { return d; }))
        for (lane = 0; lane < kLanes; ++lane)
            if (!done[lane]) {
                threadIdx.x = first_thread + lane;
                swapcontext(&scheduler, &fibers[lane]);
            }
}

static void launch(unsigned blocks, unsigned threads, std::function<void()> call) {
    kernel = call;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (unsigned thread = 0; thread < threads; thread += kLanes) run_warp(thread);
}
}  // namespace host

template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
    host::slots[host::lane] = value;
    host::yield();  // every lane has written
    const T other = static_cast<T>(host::slots[host::lane ^ mask]);
    host::yield();  // every lane has read
    return other;
}

#include KERNEL_SOURCE

extern "C" void host_nll_heads(unsigned blocks, unsigned threads, const float* tile, const float* bias,
                               const float* scale, const long long* labels, int rows, int heads, int classes,
                               int stride, long long out_stride, float* nll, int* rank, float* confidence,
                               float* brier, int* predicted) {
    host::launch(blocks, threads, [=] {
        nll_heads(tile, bias, scale, labels, rows, heads, classes, stride, out_stride, nll, rank, confidence, brier,
                  predicted);
    });
}

extern "C" void host_nll_alphas(unsigned blocks, unsigned threads, const float* tile, const float* bias,
                                const float* scale, const float* alphas, const long long* labels, int rows,
                                int n_alphas, int classes, int stride, long long out_stride, float* nll,
                                int* rank, float* confidence, float* brier, int* predicted) {
    host::launch(blocks, threads, [=] {
        nll_alphas(tile, bias, scale, alphas, labels, rows, n_alphas, classes, stride, out_stride, nll, rank,
                   confidence, brier, predicted);
    });
}
