// CUDA threads on a CPU, to test the kernels without a GPU: slow, for tests only.
//
// Blocks run one after the other. Every thread of a block is a fiber (ucontext), which runs until it waits at a barrier
// or for the other lanes of its warp; then the next fiber runs. Barriers, shuffles and tensor core products behave as
// on a GPU. A barrier that not all threads reach is an error. Every other block runs its threads in reverse order, so
// that a missing barrier is noticed. Shared memory is filled with NaN before every block, so that a read of
// uninitialised memory is noticed.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Barrier {
    int expected = 0, arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Barrier barrier;
    uint64_t slots[32];
    uint32_t fragments[32][6];
};

struct Fiber {
    ucontext_t context;
    jmp_buf point;
    dim3 thread;
    bool started = false, done = false;
    Barrier* at = nullptr;  // the barrier it waits at, and the generation it waits for
    unsigned generation = 0;
    std::unique_ptr<char[]> stack;
};

constexpr size_t STACK = 128 << 10, SHARED = 227 << 10;

struct Machine {
    std::vector<Fiber> fibers{1024};
    Warp warps[32];
    Barrier block;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    unsigned blocks = 0;
    alignas(128) unsigned char shared[SHARED];
};

inline Machine machine;

inline int number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline int lane() { return number() % 32; }
inline Warp& warp() { return machine.warps[number() / 32]; }

inline void release(Barrier& barrier) {
    barrier.arrived = 0;
    barrier.generation++;
}

inline void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.expected) {
        release(barrier);
        return;
    }
    Fiber* mine = machine.current;
    mine->at = &barrier;
    mine->generation = barrier.generation;
    if (!_setjmp(mine->point)) _longjmp(machine.scheduler, 1);
}

inline void leave(Barrier& barrier) {
    if (--barrier.expected > 0 && barrier.arrived == barrier.expected) release(barrier);
}

inline void enter() {
    machine.body(machine.argument);
    machine.current->done = true;
    leave(warp().barrier);
    leave(machine.block);
    _longjmp(machine.scheduler, 1);
}

inline void resume(Fiber& fiber) {
    machine.current = &fiber;
    threadIdx = fiber.thread;
    if (_setjmp(machine.scheduler)) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

inline void run_block(int threads) {
    machine.block = Barrier{threads};
    for (int w = 0; w * 32 < threads; w++) machine.warps[w].barrier = Barrier{threads - w * 32 < 32 ? threads - w * 32 : 32};
    memset(machine.shared, 0xff, SHARED);
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = machine.fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        unsigned x = i % blockDim.x, rest = i / blockDim.x;
        fiber.thread = dim3(x, rest % blockDim.y, rest / blockDim.y);
        fiber.started = fiber.done = false;
        fiber.at = nullptr;
    }
    bool backward = machine.blocks++ % 2;
    for (int left = threads; left;) {
        bool moved = false;
        for (int i = 0; i < threads; i++) {
            Fiber& fiber = machine.fibers[backward ? threads - 1 - i : i];
            if (fiber.done || (fiber.at && fiber.at->generation == fiber.generation)) continue;
            fiber.at = nullptr;
            moved = true;
            resume(fiber);
            left -= fiber.done;
        }
        if (!moved) throw std::runtime_error("threads of a block wait at different barriers");
    }
}

template <class Body> void execute(dim3 grid, dim3 block, const Body& body) {
    static std::mutex one;
    std::lock_guard<std::mutex> lock(one);
    blockDim = block;
    gridDim = grid;
    machine.argument = const_cast<Body*>(&body);
    machine.body = [](void* argument) { (*static_cast<const Body*>(argument))(); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                run_block(block.x * block.y * block.z);
            }
}

#ifndef RECORDER  // a header that includes this one, to record launches
template <class Body> void run(dim3 grid, dim3 block, const Body& body) { execute(grid, block, body); }
#endif

template <class T> T exchange(T value, int source) {
    Warp& mine = warp();
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    mine.slots[lane()] = bits;
    wait(mine.barrier);
    bits = mine.slots[source];
    wait(mine.barrier);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::machine.block); }
inline void __syncwarp(unsigned = ~0u) { emulated::wait(emulated::warp().barrier); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulated::exchange(value, emulated::lane() ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T value, int by) {
    int lane = emulated::lane();
    return emulated::exchange(value, lane < by ? lane : lane - by);
}
template <class T> T __shfl_sync(unsigned, T value, int source) { return emulated::exchange(value, source & 31); }
template <class T> T atomicAdd(T* address, T value) {
    T before = *address;
    *address += value;
    return before;
}
