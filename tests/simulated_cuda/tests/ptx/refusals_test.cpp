// What the interpreter does not know it has to refuse, with the line, rather than to guess.
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "instruction_kernel.h"

using simcuda::ptx::Module;
using simcuda::testing::module_with;

namespace {

// The statement stands in line 7.
std::string kernel_of(const std::string& statement) {
  return module_with(".param .u64 a, .param .u32 b",
                     ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<4>; .reg .b64 %d<4>;\n" + statement + "\nret;");
}

void check_refused(const std::string& statement, const std::string& reason) {
  CAPTURE(statement);
  CHECK_THROWS_WITH_AS(Module(kernel_of(statement)), doctest::Contains("PTX line 7: "), std::runtime_error);
  CHECK_THROWS_WITH_AS(Module(kernel_of(statement)), doctest::Contains(reason.c_str()), std::runtime_error);
}

}  // namespace

TEST_CASE("ptx refuses: instructions that make threads depend on one another") {
  for (const char* statement :
       {"bar.sync 0;", "barrier.sync 0;", "membar.gl;", "fence.acq_rel.gpu;", "atom.global.add.u32 %r0, [%d0], 1;",
        "red.global.add.u32 [%d0], 1;", "shfl.sync.idx.b32 %r0, %r1, 0, 31, -1;", "vote.sync.any.pred %p0, %p1, -1;",
        "activemask.b32 %r0;", "cp.async.wait_all;", "call foo;", "trap;", "exit;", "brx.idx %r0, table;"}) {
    check_refused(statement, "unknown instruction");
  }
}

TEST_CASE("ptx refuses: instructions that it does not know") {
  for (const char* statement :
       {"add32 %r0, %r1, %r2;", "popc.b32 %r0, %r1;", "prmt.b32 %r0, %r1, %r2, 0;", "bfe.u32 %r0, %r1, 0, 8;",
        "fma.rn.f32 %r0, %r1, %r2, %r3;", "lop3.b32 %r0, %r1, %r2, %r3, 1;"}) {
    check_refused(statement, "unknown instruction");
  }
}

TEST_CASE("ptx refuses: other memory than global") {
  for (const char* space : {"shared", "local", "const", "volatile", "relaxed.gpu"}) {
    check_refused("ld." + std::string(space) + ".u32 %r0, [%d0];", "unknown type or modifier");
    check_refused("st." + std::string(space) + ".u32 [%d0], %r0;", "unknown type or modifier");
  }
  check_refused("ld.nc.u32 %r0, [%d0];", "unknown type or modifier .nc");
  check_refused("st.param.u32 [b], %r0;", "unknown type or modifier .param");
  check_refused("cvta.to.shared.u64 %d0, %d1;", "expected .global");
  check_refused("cvta.global.u32 %r0, %r1;", "expected .u64");
  check_refused(".shared .b32 buffer;", "expected a name, not '.b32'");
}

TEST_CASE("ptx refuses: modifiers that it does not know") {
  check_refused("add.sat.s32 %r0, %r1, %r2;", ".sat");
  check_refused("add.cc.u32 %r0, %r1, %r2;", ".cc");
  check_refused("mul.s32 %r0, %r1, %r2;", "expected .lo");
  check_refused("mul.wide.u64 %d0, %d1, %d2;", "unknown type");
  check_refused("mul24.lo.u32 %r0, %r1, %r2;", "unknown instruction");
  check_refused("mad.hi.u32 %r0, %r1, %r2, %r3;", "expected .lo");
  check_refused("mad.wide.u64 %d0, %d1, %d2, %d3;", "unknown type");
  check_refused("setp.eq.and.u32 %p0, %r0, %r1, %p1;", ".and");
  check_refused("setp.lo.u32 %p0, %r0, %r1;", "unknown comparison .lo");
  check_refused("setp.lt.b32 %p0, %r0, %r1;", "unknown type or modifier .b32");
  check_refused("cvt.sat.u16.u32 %h0, %r0;", ".sat");
  check_refused("cvt.rz.f32.u32 %r0, %r0;", ".rz");
  check_refused("cvt.rn.f16.u32 %h0, %r0;", ".f16");
  check_refused("mul.f32 %r0, %r1, %r2;", "expected .lo");
  check_refused("mul.rn.ftz.f32 %r0, %r1, %r2;", ".ftz");
  check_refused("add.rz.f32 %r0, %r1, %r2;", ".rz");
  check_refused("bfi.b16 %h0, %h1, %h2, 1, 2;", "unknown type");
  check_refused("shf.l.b32 %r0, %r1, %r2, %r3;", "expected .clamp");
  check_refused("ld.global.L1 %r0, [%d0];", ".L1");
  check_refused("ld.global.u32.u32 %r0, [%d0];", "unknown modifier .u32");
  check_refused("$here: bra.other $here;", "unknown modifier .other");
  check_refused("ret.other;", "unknown modifier .other");
}

TEST_CASE("ptx refuses: types that it does not know or that an instruction does not have") {
  for (const char* type : {"f32", "f64", "f16", "u128", "b32x", "u", "b8", "u8", "pred"}) {
    check_refused("add." + std::string(type) + " %r0, %r1, %r2;", "unknown type or modifier");
  }
  check_refused("add.b32 %r0, %r1, %r2;", "unknown type");
  check_refused("and.u32 %r0, %r1, %r2;", "unknown type");
  check_refused("and.b8 %r0, %r1, %r2;", "unknown type");
  check_refused("shl.u32 %r0, %r1, %r2;", "unknown type");
  check_refused("neg.u32 %r0, %r1;", "unknown type");
  check_refused("selp.pred %p0, %p1, %p2, %p3;", "unknown type");
  check_refused("ld.global.pred %p0, [%d0];", "unknown type");
  check_refused("cvt.u32.b16 %r0, %h0;", "unknown type");
  check_refused("ld.global.v4.u64 {%d0, %d1, %d2, %d3}, [%d0];", "no access is that wide");
  check_refused("st.global.v4.b64 [%d0], {%d0, %d1, %d2, %d3};", "no access is that wide");
  check_refused("ld.global.v8.u32 %r0, [%d0];", ".v8");
}

TEST_CASE("ptx refuses: operands that do not fit") {
  check_refused("add.u32 %r0, %r1;", "expected a register or number");
  check_refused("add.u32 %r0, %r1, %r2, %r3;", "too many operands");
  check_refused("add.u32 %r0, %r1, %d2;", "does not fit %d2");
  check_refused("add.u64 %d0, %d1, %r2;", "does not fit %r2");
  check_refused("add.u32 %r0, %r1, %p2;", "does not fit %p2");
  check_refused("cvt.u64.u32 %d0, %p0;", "does not fit %p0");
  check_refused("cvt.u64.u32 %r0, %r0;", "does not fit %r0");
  check_refused("cvt.u64.u32 %d0, %h0;", "does not fit %h0");
  check_refused("selp.u32 %r0, %r1, %r2, %r3;", "does not fit %r3");
  check_refused("and.pred %p0, %p1, 1;", "expected a register or number");
  check_refused("@%r0 mov.u32 %r1, %r2;", "does not fit %r0");
  check_refused("add.u32 5, %r1, %r2;", "expected a register to write to");
  check_refused("add.u32 %r4, %r1, %r2;", "unknown register %r4");
  check_refused("add.u32 %r0, %tid.x, 1;", "unknown register %tid.x");
  check_refused("mov.u32 %tid.x, %r0;", "unknown register %tid.x");
  check_refused("mov.u64 %d0, %tid.x;", "special registers have 32 bits");
  check_refused("mov.u32 %r0, %laneid;", "unknown register %laneid");
  check_refused("mov.u32 %r0, %clock;", "unknown register %clock");
  check_refused("mov.u64 %d0, a;", "unknown register a");
  check_refused("mov.b64 %d0, {%r0, %r1};", "expected a register or number");
  check_refused("mov.u16 %h0, 65536;", "does not fit 16 bits");
  check_refused("mov.s16 %h0, -32769;", "does not fit 16 bits");
  check_refused("mov.u32 %r0, 0755;", "unknown number");
  check_refused("mov.u32 %r0, 0f3F800000;", "unknown number");
  check_refused("mov.u32 %r0, 1.5;", "unknown number");
  check_refused("ld.global.u32 %r0, %d0;", "expected an address");
  check_refused("ld.global.u32 %r0, [%r1];", "does not fit %r1");
  check_refused("ld.global.u32 %h0, [%d0];", "does not fit %h0");
  check_refused("ld.global.u32 %r0, [%d0+8+8];", "expected ']'");
  check_refused("ld.global.u32 {%r0, %r1}, [%d0];", "expected a register");
  check_refused("ld.global.v2.u32 %r0, [%d0];", "expected a vector");
  check_refused("ld.global.v4.u32 {%r0, %r1}, [%d0];", "expected a vector");
  check_refused("st.global.u32 [%d0], {%r0, %r1};", "expected a register");
  check_refused("ld.param.u32 %r0, [c];", "unknown parameter c");
  check_refused("ld.param.u64 %d0, [b];", "reads past parameter b");
  check_refused("ld.param.u32 %r0, [a+8];", "reads past parameter a");
  check_refused("ld.param.u32 %r0, [a+2];", "misaligned parameter");
  check_refused("ld.param.v2.u32 {%r0, %r1}, [b];", "reads past parameter b");
  check_refused("ld.param.v2.u16 {%h0, %h1}, [a+2];", "misaligned parameter");
  check_refused("ld.param.v4.u64 {%d0, %d1, %d2, %d3}, [a];", "no access is that wide");
  check_refused("mul.rn.f32 %r0, %r1, 1;", "unknown number 1");
  check_refused("mul.rn.f32 %r0, %r1, 0f3F8000;", "unknown number 0f3F8000");
  check_refused("mul.rn.f32 %r0, %r1, %d2;", "does not fit %d2");
  check_refused("bra $nowhere;", "unknown label $nowhere");
  check_refused("bra [%d0];", "expected a label");
}

TEST_CASE("ptx refuses: text that does not parse") {
  check_refused("setp.eq.u32 %p0|%p1, %r0, %r1;", "unexpected character '|'");
  check_refused("mov.u32 %r0, 1 }", "expected ';'");
  check_refused(".pragma \"unknown\";", "unknown pragma");
  check_refused(".pragma \"nounroll", "a string without an end");
  check_refused(".reg .f64 %f;", "unknown type '.f64'");
  check_refused(".reg .b32 %r<2>;", "declared twice");
  check_refused("$a: $a: mov.u32 %r0, 1;", "declared twice");
  check_refused("$a: bra $b; $b: }", "branches past the last instruction");
  check_refused("mov.u32 %r0, 1; }", "does not end with ret");
  check_refused("@%p0 ret; }", "does not end with ret");
}

TEST_CASE("ptx refuses: modules and directives that it does not know") {
  const std::string head = ".version 6.0\n.target sm_50\n.address_size 64\n";
  const auto refused = [](const std::string& text, const char* reason) {
    CAPTURE(text);
    CHECK_THROWS_WITH_AS(Module{text}, doctest::Contains(reason), std::runtime_error);
    CHECK_THROWS_WITH_AS(Module{text}, doctest::Contains("PTX line "), std::runtime_error);
  };
  refused("", "expected .version");
  refused(".version 6.0\n.target sm_50\n.address_size 32\n", "64 bits");
  refused(head + ".global .u32 counter;", "expected .entry");
  refused(head + ".func f() { ret; }", "expected .entry");
  refused(head + ".entry f(.param .f64 a) { ret; }", "unknown type '.f64'");
  refused(head + ".entry f(.param .pred a) { ret; }", "a predicate is no parameter");
  refused(head + ".entry f(.param .u64 .ptr .global a) { ret; }", "expected a name, not '.ptr'");
  refused(head + ".entry f() .reqntid 32 { ret; }", "expected '{'");
  refused(head + ".entry f() { }", "does not end with ret");
  refused(head + ".entry f() { ret;", "expected");
  CHECK_THROWS_WITH(Module(head + ".entry f() { ret; } .entry f() { ret; }"), "PTX: kernel f is declared twice");
  CHECK_THROWS_WITH(Module(head).kernel("f"), "no kernel f in this module");
}
