// A thread pool, and a barrier. Waiting threads spin first, because a step takes microseconds; then they yield, so that
// two processes on the same cores do not slow each other down.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#include <sched.h>
#include <unistd.h>

namespace lab {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits before a thread yields: some hundreds of microseconds, longer than the usual delay of a thread. A thread that yields
// too soon loses its core to another process for milliseconds.
constexpr int SPINS = 10000;

// A barrier for all threads. It can be reused at once: every meeting has a number.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait() {
        if (threads_ == 1) return;
        const uint32_t meeting = meeting_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            meeting_.store(meeting + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; meeting_.load(std::memory_order_acquire) == meeting; ++spins) {
            if (spins < SPINS) {
                if (spins > EAGER) relax();
            } else {
                sched_yield();
            }
        }
    }

private:
    static constexpr int EAGER = 100;   // no pause at first: one takes about ten nanoseconds, as long as most barriers
    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> meeting_{0};
};

// run(f) calls f(0 .. n - 1) on n threads, including the caller's, and returns when all are done. Threads do not
// survive a fork: in the child, run throws.
//
// All models of a process with the same thread count share one pool. A draft model and its target alternate: with two
// pools, the idle threads of one would spin on the cores that the other needs.
class Pool {
public:
    static std::shared_ptr<Pool> of(int threads);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    using Job = void (*)(void* with, int thread);
    void run(Job job, void* with);

    int size() const { return size_; }
    Barrier barrier;

private:
    void work(int thread);

    const int size_;
    const pid_t owner_;
    std::vector<std::thread> workers_;
    std::mutex turn_;  // held by the caller of run
    Job job_ = nullptr;
    void* with_ = nullptr;
    bool ending_ = false;
    alignas(64) std::atomic<uint32_t> number_{0};  // number of the current job
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable called_;
};

}  // namespace lab
