// Memory, launches and coverage: what the interpreter does around single instructions.
#include "ptx/interpreter.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "instruction_kernel.h"
#include "sparse_memory.h"

using namespace simcuda::testing;
using simcuda::ptx::Coverage;
using simcuda::ptx::Dim3;
using simcuda::ptx::misaligned_access;
using simcuda::ptx::Module;

namespace {

constexpr Dim3 kOne{1, 1, 1};

const std::string kRegisters = ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %d<8>;\n";

// Runs a kernel whose one parameter, in %d0, is where its memory begins.
class MemoryKernel {
 public:
  explicit MemoryKernel(const std::string& body)
      : module_(module_with(".param .u64 memory", kRegisters + "ld.param.u64 %d0, [memory];\n" + body + "\nret;")) {
    memory_.allow(kMemory, kMemoryBytes, Access::kReadWrite);
    for (uint32_t i = 0; i < kMemoryBytes; ++i) *memory_.at(kMemory + i) = std::byte(i);
  }

  uint64_t run(Dim3 grid = kOne, Dim3 block = kOne, uint64_t steps = simcuda::ptx::kStepsPerThread) {
    std::vector<std::byte> parameters;
    append(parameters, kMemory);
    return simcuda::ptx::run(module_.kernel("test"), grid, block, parameters, memory_, steps);
  }

  template <typename T>
  T at(uint64_t offset) {
    T value;
    std::memcpy(&value, memory_.at(kMemory + offset), sizeof(T));
    return value;
  }
  Coverage coverage() const { return module_.kernel("test").coverage(); }

 private:
  Module module_;
  SparseMemory memory_;
};

}  // namespace

TEST_CASE("ptx: loads and stores of every width") {
  MemoryKernel kernel(
      "ld.global.u8 %h0, [%d0+1];\nst.global.u8 [%d0+1001], %h0;\n"
      "ld.u16 %h0, [%d0+2];\nst.u16 [%d0+1002], %h0;\n"
      "ld.global.nc.b32 %r0, [%d0+4];\nst.global.wb.b32 [%d0+1004], %r0;\n"
      "ld.global.cs.u64 %d1, [%d0+8];\nst.global.cs.u64 [%d0+1008], %d1;\n"
      "add.s64 %d2, %d0, 100;\nld.global.u32 %r1, [%d2+-4];\nst.global.u32 [%d2+-48], %r1;");
  kernel.run();
  for (const int offset : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) {
    CHECK(kernel.at<uint8_t>(1000 + static_cast<uint64_t>(offset)) == offset);
  }
  CHECK(kernel.at<uint32_t>(52) == kernel.at<uint32_t>(96));
}

TEST_CASE("ptx: loads and stores of vectors") {
  MemoryKernel kernel(
      "ld.global.nc.v4.u32 {%r0, %r1, %r2, %r3}, [%d0+16];\nst.global.v4.u32 [%d0+1008], {%r3, %r2, %r1, %r0};\n"
      "ld.global.v2.u64 {%d1, %d2}, [%d0+32];\nst.global.wt.v2.u64 [%d0+1024], {%d1, %d2};\n"
      "ld.v2.u8 {%h0, %h1}, [%d0+2];\nst.v2.u8 [%d0+1040], {%h1, %h0};");
  kernel.run();
  for (const uint64_t i : {0, 1, 2, 3}) CHECK(kernel.at<uint32_t>(1008 + 4 * i) == kernel.at<uint32_t>(28 - 4 * i));
  CHECK(kernel.at<uint64_t>(1024) == kernel.at<uint64_t>(32));
  CHECK(kernel.at<uint64_t>(1032) == kernel.at<uint64_t>(40));
  CHECK(kernel.at<uint16_t>(1040) == 0x0203);
}

TEST_CASE("ptx: a loaded value fills a wider register as its type says") {
  MemoryKernel kernel(
      "ld.s8 %r0, [%d0+200];\nst.u32 [%d0+1000], %r0;\nld.u8 %r1, [%d0+200];\nst.u32 [%d0+1004], %r1;\n"
      "ld.s16 %d1, [%d0+200];\nst.u64 [%d0+1008], %d1;\nld.b16 %d2, [%d0+200];\nst.u64 [%d0+1016], %d2;\n"
      "st.u8 [%d0+1024], %r0;");
  kernel.run();
  CHECK(kernel.at<int32_t>(1000) == static_cast<int8_t>(200));
  CHECK(kernel.at<uint32_t>(1004) == 200);
  CHECK(kernel.at<int64_t>(1008) == static_cast<int16_t>(0xC9C8));
  CHECK(kernel.at<uint64_t>(1016) == 0xC9C8);
  CHECK(kernel.at<uint16_t>(1024) == 0x01C8);  // one byte, and what was there before
}

TEST_CASE("ptx: misaligned accesses") {
  CHECK_THROWS_AS(MemoryKernel("ld.u16 %h0, [%d0+1];").run(), misaligned_access);
  CHECK_THROWS_AS(MemoryKernel("ld.u32 %r0, [%d0+2];").run(), misaligned_access);
  CHECK_THROWS_AS(MemoryKernel("ld.u64 %d1, [%d0+4];").run(), misaligned_access);
  CHECK_THROWS_AS(MemoryKernel("ld.v2.u32 {%r0, %r1}, [%d0+4];").run(), misaligned_access);
  CHECK_THROWS_AS(MemoryKernel("ld.v4.u32 {%r0, %r1, %r2, %r3}, [%d0+8];").run(), misaligned_access);
  CHECK_THROWS_AS(MemoryKernel("mov.u32 %r0, 0;\nst.u32 [%d0+1], %r0;").run(), misaligned_access);
  CHECK_THROWS_WITH(MemoryKernel("ld.u16 %h0, [%d0+1];").run(),
                    doctest::Contains("PTX line 8: misaligned access of 2"));
}

TEST_CASE("ptx: what memory throws passes through") {
  CHECK_THROWS_WITH(MemoryKernel("ld.u64 %d1, [%d0+4096];").run(), doctest::Contains("read out of bounds"));
  CHECK_THROWS_WITH(MemoryKernel("st.u64 [%d0+-8], %d0;").run(), doctest::Contains("write out of bounds"));
}

TEST_CASE("ptx: registers that were not written") {
  CHECK_THROWS_WITH(MemoryKernel("add.u32 %r0, %r1, 1;").run(), doctest::Contains("PTX line 8: reads a register"));
  CHECK_THROWS_WITH(MemoryKernel("st.u64 [%d0], %d1;").run(), doctest::Contains("reads a register"));
  CHECK_THROWS_WITH(MemoryKernel("ld.u64 %d1, [%d2];").run(), doctest::Contains("reads a register"));
  CHECK_THROWS_WITH(MemoryKernel("@%p0 ret;").run(), doctest::Contains("guard is read"));
  // What an earlier thread wrote is not there either.
  const std::string only_thread_0 =
      "mov.u32 %r0, %tid.x;\nsetp.ne.u32 %p0, %r0, 0;\n@!%p0 mov.u32 %r1, 1;\nst.u32 [%d0], %r1;";
  CHECK_NOTHROW(MemoryKernel(only_thread_0).run(kOne, {1, 1, 1}));
  CHECK_THROWS_WITH(MemoryKernel(only_thread_0).run(kOne, {2, 1, 1}), doctest::Contains("reads a register"));
}

TEST_CASE("ptx: endless loops end") {
  MemoryKernel kernel("$again: bra $again;");
  CHECK_THROWS_WITH(kernel.run(kOne, kOne, 1000), doctest::Contains("a thread that does not end"));
}

TEST_CASE("ptx: every thread knows its place") {
  // Each thread stores all twelve special registers at its linear index.
  std::string body = "mov.u32 %r0, 0;\n";
  const auto times_plus = [&](const char* size, const char* index) {
    body += "mov.u32 %r1, " + std::string(size) + ";\nmov.u32 %r2, " + index + ";\nmad.lo.u32 %r0, %r0, %r1, %r2;\n";
  };
  for (const char* axis : {"z", "y", "x"})
    times_plus(("%nctaid." + std::string(axis)).c_str(), ("%ctaid." + std::string(axis)).c_str());
  for (const char* axis : {"z", "y", "x"})
    times_plus(("%ntid." + std::string(axis)).c_str(), ("%tid." + std::string(axis)).c_str());
  body += "mul.wide.u32 %d1, %r0, 4;\nadd.s64 %d1, %d0, %d1;\nst.u32 [%d1], %r0;";
  MemoryKernel kernel(body);
  const Dim3 grid{2, 3, 2};
  const Dim3 block{3, 2, 5};
  const uint32_t threads = 12 * 30;
  CHECK(kernel.run(grid, block) == threads * kernel.coverage().total);
  for (uint32_t i = 0; i < threads; ++i) REQUIRE(kernel.at<uint32_t>(4 * uint64_t{i}) == i);
}

TEST_CASE("ptx: parameters have their natural alignment, or their own") {
  const Module module(module_with(".param .u8 a, .param .u64 b, .param .u32 c, .param .align 16 .b8 d[24]",
                                  kRegisters + "ld.param.u64 %d0, [b];\nld.param.u8 %r0, [a];\nld.param.u32 %r1, [c];\n"
                                               "ld.param.u32 %r2, [d+20];\nst.u32 [%d0], %r0;\nst.u32 [%d0+4], %r1;\n"
                                               "st.u32 [%d0+8], %r2;\nret;"));
  const auto& kernel = module.kernel("test");
  const std::vector<size_t> offsets{0, 8, 16, 32};
  const std::vector<size_t> sizes{1, 8, 4, 24};
  REQUIRE(kernel.parameters().size() == 4);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(kernel.parameters()[i].offset == offsets[i]);
    CHECK(kernel.parameters()[i].size == sizes[i]);
  }
  REQUIRE(kernel.parameter_bytes() == 56);
  std::vector<std::byte> parameters(56);
  parameters[0] = std::byte{7};
  std::memcpy(&parameters[8], &kMemory, 8);
  parameters[16] = std::byte{8};
  parameters[52] = std::byte{9};
  SparseMemory memory;
  memory.allow(kMemory, 12, Access::kReadWrite);
  simcuda::ptx::run(kernel, kOne, kOne, parameters, memory);
  for (const uint64_t i : {0, 1, 2}) CHECK(*memory.at(kMemory + 4 * i) == std::byte(7 + i));
}

TEST_CASE("ptx: launches that do not fit the kernel") {
  const Module module(
      ".version 6.0 .target sm_50 .address_size 64 .visible .entry test(.param .u64 a) .maxntid 64, 1, 1 { ret; }");
  SparseMemory memory;
  const auto launch = [&](Dim3 grid, Dim3 block, size_t bytes) {
    simcuda::ptx::run(module.kernel("test"), grid, block, std::vector<std::byte>(bytes), memory);
  };
  CHECK_NOTHROW(launch({5, 1, 1}, {64, 1, 1}, 8));
  CHECK_THROWS_WITH(launch(kOne, {65, 1, 1}, 8), doctest::Contains("cannot run blocks of 65 threads"));
  CHECK_THROWS_WITH(launch(kOne, {32, 3, 1}, 8), doctest::Contains("cannot run blocks of 96 threads"));
  CHECK_THROWS_WITH(launch({0, 1, 1}, kOne, 8), doctest::Contains("cannot run"));
  CHECK_THROWS_WITH(launch(kOne, {1, 0, 1}, 8), doctest::Contains("cannot run"));
  CHECK_THROWS_WITH(launch(kOne, kOne, 7), doctest::Contains("needs 8 bytes of parameters"));
}

TEST_CASE("ptx: coverage counts what was executed, not what was skipped") {
  MemoryKernel kernel(
      "mov.u32 %r0, %tid.x;\nsetp.gt.u32 %p0, %r0, 1;\n@%p0 bra $rare;\nret;\n$rare: st.u32 [%d0], %r0;");
  Coverage coverage = kernel.coverage();
  CHECK(coverage.executed == 0);
  CHECK(coverage.total == 7);
  kernel.run(kOne, {2, 1, 1});
  coverage = kernel.coverage();
  CHECK(coverage.executed == 4);
  CHECK(coverage.lines_never_executed == std::vector<int>{10, 12, 13});
  kernel.run(kOne, {3, 1, 1});
  CHECK(kernel.coverage().executed == 7);
  CHECK(kernel.coverage().lines_never_executed.empty());
}

TEST_CASE("ptx: coverage includes runs that failed") {
  MemoryKernel kernel("ld.u32 %r0, [%d0+2];");
  CHECK_THROWS_AS(kernel.run(), misaligned_access);
  CHECK(kernel.coverage().executed == 2);
}

TEST_CASE("ptx: several host threads run one kernel") {
  const InstructionKernel kernel("add.u32 %d, %a, %b;", {32, 32, 32});
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int& count : wrong) {
    threads.emplace_back([&] {
      for (uint32_t i = 0; i < 500; ++i) count += kernel(i, i) != 2 * i ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4));
}
