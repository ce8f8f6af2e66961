// Threads that wait for work, and a barrier between them: spinning first, because a step is over in microseconds, then
// yielding, so that two processes on the same cores do not burn each other's time.
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

// All threads meet here; none goes on before the last has come. Reusable at once: a meeting is told by its number.
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
    static constexpr int EAGER = 100;   // a pause alone takes some ten nanoseconds, as long as most meetings
    static constexpr int SPINS = 1000;  // some tens of microseconds: longer than any thread is late by itself
    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> meeting_{0};
};

// run(f) calls f(0 .. n - 1) on n threads, the caller's among them, and returns when all are done. Threads do not
// survive a fork: in the child, run throws.
//
// All models of a process that want as many threads share one pool: a draft and its target take turns, and the threads
// of one that has just stopped would spin where those of the other are to run.
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
    std::mutex turn_;  // of whoever calls run
    Job job_ = nullptr;
    void* with_ = nullptr;
    bool ending_ = false;
    alignas(64) std::atomic<uint32_t> number_{0};  // of the job that is under way
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable called_;
};

}  // namespace lab
