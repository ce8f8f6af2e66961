// A CUDA graph on a CPU: phase 5's emulator, which can also record launches and replay them.
//
// Device memory is one arena. While it is closed, only a running kernel can access it; any other access is a fault
// (SIGSEGV). While launches are recorded, none is executed: the grid, the block and the arguments are kept as they are.
//
//     SPECDEC_CUDA_EMULATOR=recorder/emulator.h python generate.py --kernels cuda --device cpu --cuda-graph on
#pragma once

#define RECORDER
#include "../../phase-5-kernels-kvcache/checks/emulator.h"

#include <functional>
#include <sys/mman.h>

namespace emulated {

struct Launch {
    std::function<void()> execute;
    uint64_t hash;  // of the grid, the block, the kernel and its arguments
};

struct Device {
    char* arena = nullptr;
    size_t size = 0;
    bool closed = false, recording = false;
    std::vector<Launch> launches;  // of all graphs
};

inline Device device;

inline void protect(int access) {
    if (device.arena && mprotect(device.arena, device.size, access)) abort();
}

// Opens the arena for a kernel.
struct Opened {
    Opened() { if (device.closed) protect(PROT_READ | PROT_WRITE); }
    ~Opened() { if (device.closed) protect(PROT_NONE); }
};

inline uint64_t fnv(const void* bytes, size_t n, uint64_t hash = 14695981039346656037u) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ static_cast<const unsigned char*>(bytes)[i]) * 1099511628211u;
    return hash;
}

// body: a kernel with its arguments, all by value.
template <class Body> void run(dim3 grid, dim3 block, const Body& body) {
    static_assert(std::is_trivially_copyable_v<Body>);
    if (!device.recording) {
        Opened opened;
        execute(grid, block, body);
        return;
    }
    alignas(Body) unsigned char bytes[sizeof(Body)];
    auto* plain = new (bytes) Body(body);
    __builtin_clear_padding(plain);
    uint64_t hash = fnv(bytes, sizeof bytes, fnv(&block, sizeof block, fnv(&grid, sizeof grid)));
    device.launches.push_back({[=] { execute(grid, block, body); }, hash});
}

}  // namespace emulated

// What engine/recorded.py calls.
#define EXPORTED extern "C" inline __attribute__((visibility("default"), used))

EXPORTED void* recorder_arena(size_t size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    emulated::device.arena = static_cast<char*>(at), emulated::device.size = size;
    return at;
}
EXPORTED void recorder_close(int closed) {
    emulated::protect(closed ? PROT_NONE : PROT_READ | PROT_WRITE);
    emulated::device.closed = closed;
}
EXPORTED void recorder_record(int recording) { emulated::device.recording = recording; }
EXPORTED long recorder_launches() { return emulated::device.launches.size(); }
EXPORTED uint64_t recorder_hash(long number) { return emulated::device.launches.at(number).hash; }
EXPORTED void recorder_replay(long first, long last) {
    for (long i = first; i < last; i++) {
        emulated::Opened opened;
        emulated::device.launches.at(i).execute();
    }
}
