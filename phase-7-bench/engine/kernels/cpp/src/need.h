// The check of arguments that all entries share.
#pragma once

#include <stdexcept>

namespace lab {

// std::invalid_argument, which Python sees as ValueError, unless `good`.
inline void need(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

}  // namespace lab
