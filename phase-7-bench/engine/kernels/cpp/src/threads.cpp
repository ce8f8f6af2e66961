#include "threads.h"

#include <chrono>
#include <map>
#include <stdexcept>

namespace lab {

namespace {
// How long a thread without work spins. The next step of a decoding loop arrives sooner.
constexpr auto PATIENCE = std::chrono::microseconds(1000);
constexpr int BETWEEN_LOOKS = 64;  // spins between two reads of the clock
}  // namespace

std::shared_ptr<Pool> Pool::of(int threads) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<Pool>> pools;
    const std::lock_guard<std::mutex> hold(mutex);
    std::shared_ptr<Pool> pool = pools[threads].lock();
    if (pool == nullptr || pool->owner_ != getpid()) pools[threads] = pool = std::make_shared<Pool>(threads);
    return pool;
}

Pool::Pool(int threads) : barrier(threads), size_(threads), owner_(getpid()) {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
    if (getpid() != owner_) {
        for (std::thread& worker : workers_) worker.detach();
        return;
    }
    ending_ = true;
    run([](void*, int) {}, nullptr);
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Job job, void* with) {
    if (size_ == 1) return job(with, 0);
    if (getpid() != owner_) throw std::runtime_error("the model's threads are in another process: make it after a fork");
    const std::lock_guard<std::mutex> turn(turn_);
    job_ = job;
    with_ = with;
    busy_.store(size_ - 1, std::memory_order_relaxed);
    number_.fetch_add(1);  // sequentially consistent with the sleepers' load: either they see the job, or we see them
    if (asleep_.load() > 0) {
        std::lock_guard<std::mutex> hold(mutex_);
        called_.notify_all();
    }
    job(with, 0);
    for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; ++spins) {
        if (spins < SPINS) relax();
        else sched_yield();
    }
}

void Pool::work(int thread) {
    uint32_t done = 0;
    for (;;) {
        auto until = std::chrono::steady_clock::now() + PATIENCE;
        for (int spins = 0; number_.load(std::memory_order_acquire) == done;) {
            relax();
            if (++spins % BETWEEN_LOOKS != 0) continue;
            if (std::chrono::steady_clock::now() < until) {
                if (spins > 16 * BETWEEN_LOOKS) sched_yield();
                continue;
            }
            std::unique_lock<std::mutex> hold(mutex_);
            asleep_.fetch_add(1);
            called_.wait(hold, [&] { return number_.load() != done; });
            asleep_.fetch_sub(1);
            break;
        }
        done += 1;  // every job waits for all threads, so no thread misses one
        const bool last = ending_;
        job_(with_, thread);
        busy_.fetch_sub(1, std::memory_order_acq_rel);
        if (last) return;
    }
}

}  // namespace lab
