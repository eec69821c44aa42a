// SPDX-License-Identifier: Apache-2.0
// Argument checks. A failed check throws std::invalid_argument (pybind11 turns it into ValueError)
// whose text names the operation, the argument, what was expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace prefixquant {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace prefixquant

// PQ_CHECK(op, condition, "x: expected ..., got ", value): the message is built only on failure.
#define PQ_CHECK(op, condition, ...)                                                             \
  do {                                                                                           \
    if (!(condition)) throw std::invalid_argument(::prefixquant::concat(op, ": ", __VA_ARGS__)); \
  } while (0)
