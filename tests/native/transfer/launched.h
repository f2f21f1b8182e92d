// The environment that a launcher gives a rank, for as long as a scope lasts.
#pragma once

#include <cstdlib>

namespace dcp_fast::testing {

class Launched {
 public:
  // nullptr: the variable is not there.
  Launched(const char* ranks, const char* rank) {
    set("LOCAL_WORLD_SIZE", ranks);
    set("LOCAL_RANK", rank);
  }
  ~Launched() {
    set("LOCAL_WORLD_SIZE", nullptr);
    set("LOCAL_RANK", nullptr);
  }
  Launched(const Launched&) = delete;
  Launched& operator=(const Launched&) = delete;

 private:
  static void set(const char* name, const char* value) {
    if (value != nullptr) {
      ::setenv(name, value, 1);  // NOLINT(concurrency-mt-unsafe)
    } else {
      ::unsetenv(name);  // NOLINT(concurrency-mt-unsafe)
    }
  }
};

}  // namespace dcp_fast::testing
