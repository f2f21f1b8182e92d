#include "copy/cpu.h"

namespace dcp_fast::copy {

namespace {

std::vector<Vectors> find_runnable() {
  std::vector<Vectors> found{Vectors::kNone};
#if defined(__x86_64__)
  found.push_back(Vectors::kSse2);
  // These ask whether the operating system saves the registers too.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("f16c") != 0;
  if (avx2) found.push_back(Vectors::kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
      __builtin_cpu_supports("avx512vl") != 0) {
    found.push_back(Vectors::kAvx512);
  }
#elif defined(__aarch64__)
  found.push_back(Vectors::kNeon);
#endif
  return found;
}

}  // namespace

const std::vector<Vectors>& runnable_vectors() {
  static const std::vector<Vectors> kFound = find_runnable();
  return kFound;
}

}  // namespace dcp_fast::copy
