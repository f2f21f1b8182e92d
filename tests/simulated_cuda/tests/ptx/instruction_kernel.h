// A kernel around a few instructions under test: operands come from parameters, the result is stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "ptx/interpreter.h"
#include "sparse_memory.h"

namespace simcuda::testing {

// Where kernels under test have their memory, for them to read and write.
constexpr uint64_t kMemory = uint64_t{1} << 40;
constexpr uint64_t kMemoryBytes = 4096;

inline std::string module_with(const std::string& parameters, const std::string& body) {
  return ".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry test(" + parameters + ")\n{\n" + body +
         "\n}\n";
}

template <typename T>
void append(std::vector<std::byte>& bytes, const T& value) {
  bytes.resize(bytes.size() + sizeof(T));
  std::memcpy(bytes.data() + bytes.size() - sizeof(T), &value, sizeof(T));
}

// `instructions` compute %d from %a, %b and %c. Bits of each register in this order; 1 for a predicate, 0 for none.
class InstructionKernel {
 public:
  InstructionKernel(const std::string& instructions, const std::vector<int>& bits)
      : module_(module_with(".param .u64 out, .param .u64 a, .param .u64 b, .param .u64 c", body(instructions, bits))) {
  }

  uint64_t operator()(uint64_t a, uint64_t b = 0, uint64_t c = 0) const {
    SparseMemory memory;
    memory.allow(kMemory, 8, Access::kReadWrite);
    const uint64_t nothing = 0;
    memory.write(kMemory, &nothing, sizeof(nothing));
    std::vector<std::byte> parameters;
    for (const uint64_t value : {kMemory, a, b, c}) append(parameters, value);
    ptx::run(module_.kernel("test"), {1, 1, 1}, {1, 1, 1}, parameters, memory);
    uint64_t result = 0;
    std::memcpy(&result, memory.at(kMemory), sizeof(result));
    return result;
  }

 private:
  static std::string body(const std::string& instructions, const std::vector<int>& bits) {
    static constexpr const char* kNames = "dabc";
    std::string text = ".reg .b64 %out; .reg .b32 %flag;\nld.param.u64 %out, [out];\n";
    for (size_t i = 0; i < bits.size(); ++i) {
      const std::string name(1, kNames[i]);
      if (bits[i] == 0) continue;
      const std::string width = std::to_string(bits[i]);
      text += bits[i] == 1 ? ".reg .pred %" + name + ";\n" : ".reg .b" + width + " %" + name + ";\n";
      if (i == 0) continue;
      if (bits[i] == 1) {
        text += "ld.param.u32 %flag, [" + name + "];\nsetp.ne.u32 %" + name + ", %flag, 0;\n";
      } else {
        text += "ld.param.b" + width + " %" + name + ", [" + name + "];\n";
      }
    }
    text += instructions + "\n";
    if (bits[0] == 1) return text + "selp.b32 %flag, 1, 0, %d;\nst.b32 [%out], %flag;\nret;";
    return text + "st.b" + std::to_string(bits[0]) + " [%out], %d;\nret;";
  }

  ptx::Module module_;
};

}  // namespace simcuda::testing
