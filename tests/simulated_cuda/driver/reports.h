// What the simulator found wrong. Reports are texts that begin with a word in capitals that says what kind they are.
#pragma once

#include <mutex>
#include <string>
#include <vector>

namespace simcuda {

class Reports {
 public:
  void add(std::string text);
  std::vector<std::string> containing(const std::string& part) const;
  void clear();

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> texts_;
};

}  // namespace simcuda
