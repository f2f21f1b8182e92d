#include "driver/faults.h"

#include <sstream>
#include <stdexcept>

namespace simcuda {

Fault Faults::next_call(const std::string& function) {
  Function& state = functions_[function];
  const auto found = state.faults.find(++state.calls);
  if (found == state.faults.end()) return {};
  const Fault fault = found->second;
  state.faults.erase(found);
  return fault;
}

long Faults::calls(const std::string& function) const {
  long sum = 0;
  for (const auto& [name, state] : functions_) {
    if (function.empty() || name == function) sum += state.calls;
  }
  return sum;
}

void Faults::plan(const std::string& function, long nth_from_now, Fault fault) {
  Function& state = functions_[function];
  state.faults[state.calls + nth_from_now] = fault;
}

void Faults::plan(const std::string& text) {
  const std::string kAsynchronous = "async:";
  std::istringstream parts(text);
  std::string part;
  while (std::getline(parts, part, ';')) {
    if (part.empty()) continue;
    std::string rest = part;
    Fault fault;
    if (rest.compare(0, kAsynchronous.size(), kAsynchronous) == 0) {
      rest.erase(0, kAsynchronous.size());
      fault.time = FaultTime::kWork;
    }
    const size_t colon = rest.find(':');
    const size_t equals = rest.find('=');
    if (colon == std::string::npos || equals == std::string::npos || equals < colon) {
      throw std::invalid_argument("SIMCUDA_FAULT: not function:nth=error: " + part);
    }
    const long nth = std::stol(rest.substr(colon + 1, equals - colon - 1));
    fault.error = static_cast<CUresult>(std::stoi(rest.substr(equals + 1)));
    plan(rest.substr(0, colon), nth, fault);
  }
}

void Faults::clear() { functions_.clear(); }

}  // namespace simcuda
