#include "driver/reports.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace simcuda {

namespace {

// A broken program repeats itself; beyond this nobody reads on.
constexpr size_t kMostReports = 10000;

}  // namespace

void Reports::add(std::string text) {
  static const bool verbose = std::getenv("SIMCUDA_VERBOSE") != nullptr;  // NOLINT(concurrency-mt-unsafe)
  if (verbose) std::fprintf(stderr, "simcuda: %s\n", text.c_str());
  const std::scoped_lock lock(mutex_);
  if (texts_.size() < kMostReports) texts_.push_back(std::move(text));
}

std::vector<std::string> Reports::containing(const std::string& part) const {
  const std::scoped_lock lock(mutex_);
  std::vector<std::string> found;
  for (const std::string& text : texts_) {
    if (text.find(part) != std::string::npos) found.push_back(text);
  }
  return found;
}

void Reports::clear() {
  const std::scoped_lock lock(mutex_);
  texts_.clear();
}

}  // namespace simcuda
