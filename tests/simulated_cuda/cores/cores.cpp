// Answers the questions by which programs find out how many cores they may use, with what SIMULATED_CORES says:
//
//   SIMULATED_CORES=16 LD_PRELOAD=libsimcores.so program
//
// It makes nothing faster: it shows what a program does with as many threads as it would start on another machine.
#include <sched.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace {

int cores() {
  const char* text = std::getenv("SIMULATED_CORES");
  const int count = text != nullptr ? std::atoi(text) : 0;
  return count > 0 ? count : 1;
}

}  // namespace

extern "C" {

int get_nprocs() noexcept { return cores(); }
int get_nprocs_conf() noexcept { return cores(); }

int sched_getaffinity(pid_t /*pid*/, size_t size, cpu_set_t* set) noexcept {
  if (size * 8 < static_cast<size_t>(cores())) {
    errno = EINVAL;
    return -1;
  }
  std::memset(set, 0, size);
  for (int core = 0; core < cores(); ++core) CPU_SET_S(static_cast<size_t>(core), size, set);
  return 0;
}

}  // extern "C"
