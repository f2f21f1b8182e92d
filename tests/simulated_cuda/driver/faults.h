// Counts the calls of each function, and makes the n-th one fail where that was asked for.
#pragma once

#include <cuda.h>

#include <map>
#include <string>

namespace simcuda {

enum class FaultTime {
  kCall,  // the call fails and does nothing
  kWork,  // the call succeeds, and what it enqueued fails when it is executed
};

struct Fault {
  CUresult error = CUDA_SUCCESS;
  FaultTime time = FaultTime::kCall;
};

class Faults {
 public:
  // Counts a call. Returns the fault that it must have: usually none, with CUDA_SUCCESS.
  Fault next_call(const std::string& function);

  // Of one function, or of all for an empty name.
  long calls(const std::string& function) const;

  // The nth next call fails, 1 being the very next.
  void plan(const std::string& function, long nth_from_now, Fault fault);
  // Reads "function:nth=error;async:function:nth=error". Throws std::invalid_argument naming what it does not
  // understand.
  void plan(const std::string& text);

  void clear();

 private:
  struct Function {
    long calls = 0;
    std::map<long, Fault> faults;
  };
  std::map<std::string, Function> functions_;
};

}  // namespace simcuda
