// A small module for tests: PTX as nvcc would write it, and launches of its kernels.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "machine.h"

namespace simcuda::testing {

// Thread i copies the i-th word of `count`.
constexpr const char* kCopyWords = R"(
.version 6.0
.target sm_50
.address_size 64

.visible .entry copy_words(
  .param .u64 copy_words_param_0,
  .param .u64 copy_words_param_1,
  .param .u32 copy_words_param_2
)
{
  .reg .pred %p<2>;
  .reg .b32 %r<7>;
  .reg .b64 %rd<8>;

  ld.param.u64 %rd1, [copy_words_param_0];
  ld.param.u64 %rd2, [copy_words_param_1];
  ld.param.u32 %r2, [copy_words_param_2];
  mov.u32 %r3, %ctaid.x;
  mov.u32 %r4, %ntid.x;
  mov.u32 %r5, %tid.x;
  mad.lo.s32 %r1, %r3, %r4, %r5;
  setp.ge.u32 %p1, %r1, %r2;
  @%p1 bra $L__end;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd2, %rd3;
  add.s64 %rd5, %rd1, %rd3;
  ld.global.u32 %r6, [%rd4];
  st.global.u32 [%rd5], %r6;
$L__end:
  ret;
}
)";

class Kernels {
 public:
  Kernels() {
    OK(cuModuleLoadData(&module_, kCopyWords));
    OK(cuModuleGetFunction(&function_, module_, "copy_words"));
  }
  ~Kernels() { cuModuleUnload(module_); }
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  CUfunction copy_words() const { return function_; }
  CUmodule module() const { return module_; }

  void copy_words(CUdeviceptr to, CUdeviceptr from, uint32_t count, CUstream stream) const {
    void* parameters[] = {&to, &from, &count};
    constexpr unsigned int kThreads = 32;
    OK(cuLaunchKernel(function_, (count + kThreads - 1) / kThreads, 1, 1, kThreads, 1, 1, 0, stream, parameters,
                      nullptr));
  }

 private:
  CUmodule module_ = nullptr;
  CUfunction function_ = nullptr;
};

}  // namespace simcuda::testing
